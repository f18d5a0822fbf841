"""Ctrl-C and SIGTERM: the step comes to its end, the run is saved, and then it stops."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Request:
    """Whether somebody has asked the run to stop, and by which signal."""

    name: str | None = None


@contextmanager
def stop_requests(say: Callable[[str], None], *, alone: bool = True) -> Iterator[Request]:
    """Inside this block the first SIGINT or SIGTERM is noted, and said; the second works as it did before.

    Not alone, but under torchrun, a process gets SIGINT from the terminal and again from torchrun: the second is
    ignored. SIGTERM works as ever: torchrun sends it when another process has failed, for which nobody should wait.
    Signals reach the main thread only: elsewhere nothing changes.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        if alone:
            _restore(before)
        else:
            signal.signal(number, signal.SIG_IGN)
        again = "; once more to leave at once" if alone else ""
        say(f"{request.name}: this step comes to its end, then the run is saved{again}")

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        _restore(before)


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
