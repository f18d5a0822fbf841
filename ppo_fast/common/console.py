"""Terminal output of commands: sentences and progress bars, whose errors do not end a run.

This module imports neither torch nor transformers, which takes seconds: a command first prints what it does.
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ppo_fast.common.errors import print_error

FIRST_LINE, LINES_EVERY = 2.0, 10.0  # seconds between lines of `counted` without a terminal


class Output:
    """A text stream whose errors do not end a run: its reader has ended, its disk is full, or it cannot encode a text.

    After an error of the system nothing more is printed, which a line on stderr reports. Characters that the encoding
    of the stream lacks are printed as backslash escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.works = True

    def write(self, text: str) -> int:
        """Print the text, if the stream still works."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the buffer."""
        self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        """Check whether the stream is a terminal."""
        return self.stream.isatty()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self.works:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.works = False
            with suppress(OSError, ValueError):  # else Python fails again at its end, when it flushes the buffer
                empty = os.open(os.devnull, os.O_WRONLY)
                os.dup2(empty, self.stream.fileno())
                os.close(empty)
            with suppress(OSError, ValueError, AttributeError):
                reason = getattr(error, "strerror", None) or error
                print_error(f"ppo-fast: cannot print ({reason}); the run continues without output")


def console_of(*, quiet: bool) -> Console:
    """Make the console of a run: standard output, whose errors do not end the run."""
    output = None if sys.stdout is None else cast(TextIO, Output(sys.stdout))  # None: closed at the start
    return Console(quiet=quiet, file=output)


def say(console: Console, text: str) -> None:
    """Print a sentence at once: in one line, or on a terminal in lines that are broken between words."""
    if console.is_terminal and len(text) > console.width:
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def bar_of(console: Console) -> Progress:
    """Make a progress bar with the time left, which is shown on a terminal only."""
    room = max(8, console.width - 24)  # columns besides count, time and a short bar
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
    """Show the progress of a phase of `total` steps, and the time left.

    Yields `advance(done, text)`, where `done` counts the steps that are done, and `text` is an optional description. A
    terminal shows a bar; else there is a line after two seconds, every ten seconds, and at the end.
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
    """Print, at the start of an example, what its first seconds are spent on."""
    if not {"--quiet", "-h", "--help"} & set(sys.argv):
        print("importing PyTorch and transformers, which takes some seconds", flush=True)
