"""Threads for loops compiled by numba, whose calls release the GIL."""

import _thread
from collections.abc import Callable

import torch
from torch import Tensor

_STEPS_PER_THREAD = 1 << 18  # about 0.3 ms of work; an idle core takes 0.06 ms to start


def split_rows(rows: int, steps: int, cu_seqlens: Tensor | None = None, per_thread: int = 0) -> list[int]:
    """Return boundaries of row ranges, one range per thread, with about the same number of steps in each."""
    workers = steps // (per_thread or _STEPS_PER_THREAD)
    if workers > 1:
        workers = min(workers, torch.get_num_threads(), rows)
    if workers <= 1:
        return [0, rows]
    if cu_seqlens is None:
        return [rows * i // workers for i in range(workers + 1)]
    wanted = torch.tensor([steps * i // workers for i in range(1, workers)], device="cpu")
    return [0, *torch.searchsorted(cu_seqlens[:-1], wanted).tolist(), rows]


def in_threads(work: Callable[[int], None], count: int, threads: int) -> None:
    """Run work(0), ..., work(count - 1) on `threads` threads, but not on more than PyTorch has.

    Bare threads, because threading.Thread.start waits until the new one runs, which takes another 0.1 ms.
    """
    threads = 1 if threads <= 1 else min(count, threads, torch.get_num_threads())
    if threads == 1:
        for number in range(count):
            work(number)
        return
    errors: list[BaseException] = []

    def some(first: int) -> None:
        for number in range(first, count, threads):
            work(number)

    def helper(first: int, done: _thread.LockType) -> None:
        try:
            some(first)
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    waiting = []
    for first in range(1, threads):
        done = _thread.allocate_lock()
        done.acquire()
        _thread.start_new_thread(helper, (first, done))
        waiting.append(done)
    some(0)
    for done in waiting:
        done.acquire()
    if errors:
        raise errors[0]
