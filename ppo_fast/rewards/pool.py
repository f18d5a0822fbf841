"""Pool: slow rewards run in worker processes, with a time limit for each answer.

A signal for the trainer's process group, such as Ctrl-C, reaches no worker: a reward is computed to its end, and the
trainer saves the run. Each worker has a session of its own, with all subprocesses that user code starts in it. Only
this module ends them, all together: after the time limit, with the pool, and when the trainer has ended.
"""

import math
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import TYPE_CHECKING, Any

from ppo_fast.common.errors import UserError, print_error
from ppo_fast.llm.reward.function import arguments_of, check_columns, load_reward
from ppo_fast.rewards.overlap import package

if TYPE_CHECKING:  # pebble is optional
    from pebble import ProcessFuture, ProcessPool

POSIX = os.name == "posix"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Worker(SpawnProcess):
    """A process that signals do not end."""

    def start(self) -> None:
        """Start with signals blocked, until `_prepare` has set their handlers."""
        with _signals_blocked():
            super().start()

    def terminate(self) -> None:
        """Kill the worker and its subprocesses; not by SIGTERM, which it ignores."""
        if self.exitcode is None and self.pid is not None:
            _kill_session(self.pid)
            self.kill()


class _Context(SpawnContext):
    Process = _Worker


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM for this thread, and for each process that it starts, inside this block."""
    if not POSIX:
        yield
        return
    resource_tracker.ensure_running()  # before: its start unblocks these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_session(leader: int) -> None:
    if POSIX:
        with suppress(ProcessLookupError, PermissionError):  # there is none yet, or all of it has ended
            os.killpg(leader, signal.SIGKILL)


class Pool:
    """A reward function that runs in worker processes, one completion at a time in each, within a time limit.

    An answer for which the function raises, returns no finite number, calls exit(), or takes too long (its process
    with all subprocesses is then killed) gets `fallback`. A call with such answers prints one line to stderr, with
    their number and the first of them; `failed` is their number in the last call, which is logged. Metrics have the
    name of the function.

    Args:
        reward: a function that can be imported, or its name as the command line takes it ("rewards.py:correct").
        timeout: seconds that one answer may take.
        fallback: the number for such an answer. It has no default: a silent 0 may be a good score.
        workers: processes. They are spawned, not forked: a fork of a process with threads and a GPU can hang. They
            import the function's module; a script that makes a Pool needs `if __name__ == "__main__":`.

    Raises:
        UserError: the function cannot be sent to another process, or pebble is not installed; when called: the data
            lacks a column, or no worker could start.

    >>> reward = Pool("rewards.py:runs_the_tests", timeout=10.0, fallback=-1.0)  # doctest: +SKIP
    """

    def __init__(
        self, reward: Callable[..., Sequence[object]] | str, *, timeout: float, fallback: float, workers: int = 2
    ) -> None:
        numbers = all(isinstance(x, float | int) and math.isfinite(x) for x in (timeout, fallback))
        if not (numbers and timeout > 0 and isinstance(workers, int) and workers >= 1):
            raise UserError(
                "a pool needs a timeout > 0, a finite fallback and at least one worker, got"
                f" {timeout!r}, {fallback!r} and {workers!r}"
            )
        self.function = load_reward(reward) if isinstance(reward, str) else reward
        self.__name__ = getattr(self.function, "__name__", type(self.function).__name__)
        try:
            pickled = pickle.dumps(reward)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"the reward {self.__name__!r} cannot be sent to another process ({error}): put it at the top of a"
                " module"
            ) from error
        self.timeout, self.fallback = timeout, fallback
        self.failed = 0
        self._pool: ProcessPool = package("pebble", "pebble").ProcessPool(
            max_workers=workers, context=_Context(), initializer=_prepare, initargs=(pickled,)
        )
        weakref.finalize(self, _stop, self._pool)  # also when Python ends

    def __call__(self, prompts: Sequence[object], completions: Sequence[str], **columns: list) -> list[float]:
        """Return one number for each answer, in their order."""
        taken = self.columns_taken(columns)
        jobs = [
            self._pool.schedule(
                _score,
                args=(prompts[row], completions[row], {name: column[row] for name, column in taken.items()}),
                timeout=self.timeout,
            )
            for row in range(len(completions))
        ]
        values, failures = [], []
        try:
            for row, job in enumerate(jobs):
                value = self._result(job)
                if isinstance(value, str):
                    reason = " ".join(value.split())
                    failures.append(f"{reason} at answer {row} ({completions[row]!r:.80}) to {prompts[row]!r:.80}")
                values.append(self.fallback if isinstance(value, str) else value)
        finally:
            for job in jobs:
                job.cancel()
        self.failed = len(failures)
        if failures:
            print_error(
                f"reward {self.__name__!r}: {len(failures)} of {len(values)} answers have no judgement and get"
                f" {self.fallback:g}; the first: {failures[0]}"
            )
        return values

    def columns_taken(self, columns: Mapping[str, list]) -> dict[str, list]:
        """Return the columns that the function gets."""
        taken = arguments_of(self.function, columns)
        check_columns(self.function, taken)
        return taken

    def _result(self, job: "ProcessFuture[float | str]") -> float | str:
        """Return a number, or the reason why there is none."""
        try:
            return job.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"no worker of the pool for the reward {self.__name__!r} could begin; the reason is printed above."
                " Workers import the function's module: a script needs `if __name__ == '__main__':`, a notebook the"
                " function in a file"
            ) from error
        except TimeoutError:
            return f"no judgement within {self.timeout:g} s"
        except UserError:
            raise
        except Exception as error:  # whatever ended its process
            return f"{type(error).__name__}: {error}"


# In a worker: its one reward function. Any: `float` converts what code of the user returns, or raises
_LOADED: list[Callable[..., Sequence[Any]]] = []


def _prepare(pickled: bytes) -> None:
    """Set the signal handlers of a worker, and load its reward function.

    It is unpickled here, after signals are unblocked: that imports its module, which may start subprocesses.
    """
    for number in SIGNALS:
        signal.signal(number, _ignore)
    if POSIX:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reward = pickle.loads(pickled)
    _LOADED.append(load_reward(reward) if isinstance(reward, str) else reward)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. Subprocesses do not inherit a handler, unlike SIG_IGN: `Popen.terminate` must end them."""


def _end_with_parent() -> None:
    """End a reward that hangs, and its subprocesses, after the trainer was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _kill_session(os.getpid())
        os._exit(1)


def _score(prompt: object, completion: str, columns: dict[str, object]) -> float | str:
    """Compute the reward of one completion in a worker: return its number, or the reason why there is none."""
    try:
        values = list(_LOADED[0]([prompt], [completion], **{name: [value] for name, value in columns.items()}))
        if len(values) != 1:
            return f"{len(values)} values for 1 answer"
        number = float(values[0])
    except UserError:  # not caused by the answer
        raise
    except BaseException as error:  # user code; exit() and errors that cannot be pickled must not reach the trainer
        return f"{type(error).__name__}: {error}"[:500]
    return number if math.isfinite(number) else f"{number} is not finite"


def _stop(pool: "ProcessPool") -> None:
    pool.stop()
    pool.join()
