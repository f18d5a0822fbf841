"""Worker processes of AsyncVectorEnv and signals: Ctrl-C in a terminal reaches them, too, before the run is saved."""

import os
import signal
import threading
from types import FrameType

import gymnasium
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from ppo_fast.common.signals import GRACE, SIGNALS


def defer_signals(env: gymnasium.Env, *, trainer: int) -> gymnasium.Env:
    """Return `env` unchanged; in a worker process (not `trainer`), signals no longer end it at once.

    SIGINT and SIGHUP are ignored: the process ends with its pipe. SIGTERM, which multiprocessing sends, ends it after
    GRACE seconds.
    """
    if os.getpid() != trainer:
        for number in SIGNALS:
            signal.signal(number, _end_later if number == signal.SIGTERM else _ignore)
    return env


def _ignore(number: int, frame: FrameType | None) -> None:  # unlike SIG_IGN, not inherited by programs it starts
    pass


def _end_later(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(GRACE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def close(envs: VectorEnv) -> None:
    """Close environments; worker processes that have ended, or that are in the middle of a step, are killed."""
    base = envs.unwrapped
    waiting = isinstance(base, AsyncVectorEnv) and base._state != AsyncState.DEFAULT
    try:
        if not waiting:
            envs.close()
            return
    except (OSError, EOFError):  # of the pipe of a process that has ended
        pass
    for process in getattr(base, "processes", ()):
        process.kill()
        process.join()
    base.closed = True  # else its __del__ closes it again
