"""What commands print: sentences that do not end a run where they cannot be printed, and how far a phase is.

This module imports neither torch nor transformers, which takes seconds: a command says first what it does.
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

FIRST_LINE, LINES_EVERY = 2.0, 10.0  # seconds, of `counted` where there is no terminal


class Output:
    """A text stream whose errors do not end a run: its reader has ended, its disk is full, or it cannot encode a text.

    After an error of the system nothing more is printed, which a line on stderr says. What the stream's encoding lacks
    is printed as backslash escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.works = True

    def write(self, text: str) -> int:
        """Prints the text, if the stream still works."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Passes on what waits in a buffer."""
        self._attempt(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if not self.works:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.works = False
            with suppress(OSError, ValueError):  # else Python fails again at its end, with what waits in the buffer
                empty = os.open(os.devnull, os.O_WRONLY)
                os.dup2(empty, self.stream.fileno())
                os.close(empty)
            with suppress(OSError, ValueError, AttributeError):
                reason = getattr(error, "strerror", None) or error
                print(f"ppo-fast: cannot print ({reason}); the run continues without output", file=sys.stderr)


def console_of(*, quiet: bool) -> Console:
    """What a run prints to: standard output, whose errors do not end the run."""
    output = None if sys.stdout is None else cast(TextIO, Output(sys.stdout))  # None: closed at the start
    return Console(quiet=quiet, file=output)


def say(console: Console, text: str) -> None:
    """Prints a sentence as it is, at once: in one line, or on a terminal in lines that end between words."""
    if console.is_terminal and len(text) > console.width:
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def bar_of(console: Console) -> Progress:
    """A bar with the time left, where there is a terminal."""
    room = max(8, console.width - 24)  # what count, time and a short bar leave
    return Progress(
        TextColumn("{task.description}", table_column=Column(max_width=room, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


@contextmanager
def counted(console: Console, what: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows how far a phase of `total` steps is, and the time left.

    Yields `advance(done, text)`: `done` steps are done, and `text`, which may be left out, says how. A terminal shows a
    bar; else there is a line after two seconds, every ten seconds, and at the end.
    """
    start = time.perf_counter()
    next_line = start + FIRST_LINE
    with bar_of(console) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: int, text: str = "") -> None:
            nonlocal next_line
            described = f"{what}, {text}" if text else what
            bar.update(task, completed=done, description=described)
            now = time.perf_counter()
            if not bar.disable or (now < next_line and done < total):
                return
            next_line = now + LINES_EVERY
            left = (now - start) / max(done, 1) * (total - done)
            say(console, f"{described}: {done}/{total}" + (f", {left:.0f} s left" if done < total else ""))

        yield advance


def announce_imports() -> None:
    """For the start of an example: what its first seconds are spent on."""
    if not {"--quiet", "-h", "--help"} & set(sys.argv):
        print("importing PyTorch and transformers, which takes some seconds", flush=True)
