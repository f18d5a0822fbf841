"""What the C library does with memory that PyTorch frees on a CPU.

PyTorch allocates the tensors of a CPU with malloc. glibc returns large blocks to the kernel as soon as they are freed,
and each page of the next tensor of that size costs a page fault, which clears the page: in the learn step of a model
with 135 million weights 110 000 faults an update, a fifth of its time on a virtual machine.
"""

import ctypes
import sys

# parameters of mallopt, from glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
KEPT_BYTES = 2**31 - 1  # free memory at the end of the heap that stays with the process: mallopt takes an int
STEP_BYTES = 64 << 20  # by which the heap grows


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next tensors, up to 2 GiB; return whether this C library can.

    It has an effect on the whole process. Peak memory stays the same; memory between the peaks does not fall.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and others have none
    if mallopt is None:
        return False
    # no block is mapped alone: glibc's threshold for that is at most 32 MiB
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: KEPT_BYTES, _TOP_PAD: STEP_BYTES}
    return all([mallopt(parameter, value) == 1 for parameter, value in wanted.items()])
