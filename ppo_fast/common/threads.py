"""How many threads a run uses, and what they do while they wait.

PyTorch computes on a CPU with the threads of OpenMP. After each piece of work they wait for the next one in a loop that
keeps their core busy (libgomp: some milliseconds). On a machine with other work, also a second run of this project, a
waiting thread then takes the core from a working one, and everything becomes several times slower. Here a waiting
thread sleeps after some 20 microseconds. At once would be as good on a shared machine, but many short operations on a
quiet one then take up to 1.7 times as long, since waking a thread takes longer than the gap between two of them
(bench/wait_policy.py). OpenMP reads the policy once, when importing torch loads it: commands, examples, tests and
benchmarks set it before.
"""

import os
import sys

POLICY, SPIN = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"  # libgomp, which PyTorch brings, follows the second if it is set
PASSIVE = {POLICY: "PASSIVE", SPIN: "1000"}


def wait_passively() -> None:
    """Set the wait policy of OpenMP's threads to PASSIVE, after a short spin, for this process and those it starts.

    If the user has set one of the two variables, both stay as they are. After torch has been imported this has no
    effect on the process itself, and so it does nothing.
    """
    if "torch" not in sys.modules and not PASSIVE.keys() & os.environ.keys():
        os.environ.update(PASSIVE)


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
    if count > 1 and policy.upper() != "PASSIVE" and SPIN not in os.environ:
        note += (
            f"; while they wait they keep their cores busy ({POLICY} = {policy or 'unset'}): on a shared machine set"
            f" {SPIN}={PASSIVE[SPIN]} before torch is imported"
        )
    return note
