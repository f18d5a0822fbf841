"""Shared by the with_* examples: progress with the time left, and errors of missing packages.

Unlike ppo_fast/common/console.py, it needs no package besides Python: an environment of another project may lack rich.
"""

import shutil
import sys
import time

from ppo_fast.common.errors import print_error


def announce(module: str, text: str) -> None:
    """Print what an example does; called with `__name__` before the imports that take seconds."""
    if module == "__main__":
        print(text, flush=True)


class Progress:
    """A bar with the time left on stderr; where that is no terminal, a line for each tenth.

    Args:
        what: the first word of each line.
        total: steps until the end.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.shown = -1
        self.started = time.monotonic()

    def show(self, done: int) -> None:
        """`done` steps are finished."""
        self.done = done
        tenths, count = 10 * done // self.total, f"{done}/{self.total}  {self.left(done)}"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            text = f"{self.what} [{'#' * tenths:10}] {count}"[:width]
            print(f"\r{text:{width}}", end="\n" if done >= self.total else "", file=sys.stderr, flush=True)
        elif tenths != self.shown:
            print(f"{self.what} {count}", file=sys.stderr, flush=True)
        self.shown = tenths

    def left(self, done: int) -> str:
        """The time left after `done` steps, such as "1:05 left"."""
        if done == 0:
            return ""
        minutes, seconds = divmod(round((self.total - done) * (time.monotonic() - self.started) / done), 60)
        return f"{minutes}:{seconds:02} left"


def failed(name: str, error: Exception, install: str) -> int:
    """Print one sentence with the line that installs what is missing, and return the exit status."""
    text = str(error)
    print_error(f"{name}: error: {text}{'' if 'pip install' in text else f': {install}'}")
    return 1
