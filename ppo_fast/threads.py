"""How many threads a run uses, and what they do while they wait.

PyTorch computes on a CPU with the threads of OpenMP. After each piece of work they wait for the next one in a loop that
keeps their core busy (libgomp: some milliseconds). On a machine with other work, also a second run of this project, a
waiting thread then takes the core from a working one, and everything becomes several times slower. With the wait policy
PASSIVE a waiting thread sleeps. OpenMP reads the policy once, when importing torch loads it: commands, examples, tests
and benchmarks set it before.
"""

import os
import sys

POLICY = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Set the wait policy of OpenMP's threads to PASSIVE for this process and those that it starts.

    A policy of the user stays, as does GOMP_SPINCOUNT, which means the same to libgomp. After torch has been imported
    this has no effect on the process itself, and so it does nothing.
    """
    if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault(POLICY, "PASSIVE")


def set_threads(count: int) -> None:
    """Let PyTorch use `count` threads in this process; 0: as many as it has chosen."""
    import torch

    if count:
        torch.set_num_threads(count)


def threads_note() -> str:
    """How many threads a run on the CPU uses, and what to do where they do not sleep while they wait.

    >>> threads_note()  # doctest: +ELLIPSIS
    '... thread...'
    """
    import torch

    count = torch.get_num_threads()
    note = f"{count} thread{'s' * (count > 1)}"
    policy = os.environ.get(POLICY, "")
    if count > 1 and policy.upper() != "PASSIVE" and "GOMP_SPINCOUNT" not in os.environ:
        note += (
            f"; while they wait they keep their cores busy ({POLICY} = {policy or 'unset'}): on a shared machine set"
            f" {POLICY}=PASSIVE before torch is imported"
        )
    return note
