"""Ctrl-C, SIGTERM and SIGHUP: the current step is completed, the run is saved, and then it stops.

Under torchrun a signal can reach one process when another has ended: torchrun sends SIGTERM when a process has failed,
and kills the others 30 seconds later. A process then has GRACE seconds in which all must complete their step.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None  # as of signal.getsignal
GRACE = 20.0  # seconds
REPEATED = 1.0  # seconds within which a second signal is the same request: `timeout` and some launchers send it twice
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Request:
    """A request to stop the run, and the signal that made it; `name` is None before."""

    name: str | None = None
    agreed: threading.Event = field(default_factory=threading.Event)  # all processes stop together


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Request]:
    """Handle SIGNALS inside this block: the first one is stored and reported.

    A second one, not within REPEATED seconds, has the effect that it had before. The handlers stay until the block
    ends: a signal may arrive while a reward function runs, whose changes of handlers are undone. SIGHUP is sent when a
    terminal is closed; where it is ignored, as under nohup, it stays ignored. Signals reach the main thread only: in
    other threads nothing changes.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if request.name is not None:
            if time.monotonic() - first >= REPEATED:
                _handle_as(before[number], number, frame)
            return
        request.name, first = signal.Signals(number).name, time.monotonic()
        with suppress(RuntimeError):  # the signal interrupted another message
            say(f"{request.name}: this step is completed, then the run is saved; once more to stop at once")

    before = _handle(note)
    try:
        yield request
    finally:
        _restore(before)


@contextmanager
def stop_requests_of_several(say: Callable[[str], None], give_up: Callable[[str], None]) -> Iterator[Request]:
    """Handle SIGNALS in one of several processes, which gets SIGINT twice: from the terminal and from torchrun.

    All signals after the first are ignored. If the processes have not agreed to stop GRACE seconds after it
    (`Request.agreed`), `give_up` is called with the name of the signal, and the process ends with status 128 + signal.
    This does not depend on the main thread, which may wait inside PyTorch for a process that has ended.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    wakes, woken = socket.socketpair()
    wakes.setblocking(False)

    def watch() -> None:
        while first := woken.recv(1):
            if first[0] in SIGNALS:
                break
        if not first:
            return  # the block has ended
        number = first[0]
        request.name = signal.Signals(number).name
        say(f"{request.name}: this step is completed, then the run is saved")
        if not request.agreed.wait(GRACE):
            give_up(request.name)
            os._exit(128 + number)

    before = _handle(lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(wakes.fileno())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield request
    finally:
        request.agreed.set()
        signal.set_wakeup_fd(wakeup)
        _restore(before)
        wakes.close()
        watcher.join()
        woken.close()


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Handler]:
    """Set a handler for SIGNALS and return the earlier ones. SIGHUP stays ignored where it is."""
    handled = [n for n in SIGNALS if n in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def _restore(handlers: dict[int, Handler]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # a handler that is not Python's
            signal.signal(number, handler)


def _handle_as(handler: Handler, number: int, frame: FrameType | None) -> None:
    """Call a handler of `signal.signal`."""
    if callable(handler):
        handler(number, frame)
    elif handler is not signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
