"""Errors that mean "the input is wrong", and the format of warnings.

The message of a `UserError` is complete: the command line prints it without a traceback.
"""

import sys
import warnings
from pathlib import Path


class UserError(Exception):
    """An input cannot be used; the message says what is wrong, where, and what to do."""


class RewardError(UserError):
    """A reward function raised, or returned something other than one finite number for each answer or token."""


class NonFiniteError(UserError):
    """A loss or gradient became NaN or infinite; the step was not taken, and the weights are unchanged."""


class InvariantError(UserError):
    """A quantity whose value is known in advance has another value: the run would optimize something else."""


def print_error(text: str) -> None:
    """Print a line on stderr in one write.

    `print` makes two where PYTHONUNBUFFERED is set, between which another process may write.
    """
    if sys.stderr is not None:  # None: closed at the start
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def plain_warnings() -> None:
    """Format warnings of this project as one line, without the source line; other warnings are unchanged."""
    earlier = warnings.formatwarning
    if getattr(earlier, "__module__", "") == __name__:
        return
    ours = str(Path(__file__).parents[1])

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(ours):
            return f"ppo-fast: warning: {message}\n"
        return earlier(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
