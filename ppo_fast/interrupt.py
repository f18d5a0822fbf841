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
def stop_requests(say: Callable[[str], None]) -> Iterator[Request]:
    """Inside this block the first SIGINT or SIGTERM is noted, and said; the second works as it did before.

    Signals reach the main thread only: elsewhere nothing changes.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        _restore(before)
        say(f"{request.name}: this step comes to its end, then the run is saved; once more to leave at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        _restore(before)


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
