"""Errors that mean "the input is wrong": their message is complete, and the command line prints it without a
traceback. Warnings of this project are printed likewise."""

import warnings
from pathlib import Path


class UserError(Exception):
    """Something the caller gave cannot be used; the message says what, where, and what to do."""


class RewardError(UserError):
    """A reward function raised, or returned something that is not one finite number for each answer or token."""


class NonFiniteError(UserError):
    """A loss or gradient became NaN or infinite; the step was not taken, and the weights are as before it."""


class InvariantError(UserError):
    """A number of a run that is known in advance has another value: the run would learn something else."""


def plain_warnings() -> None:
    """From now on, a warning of this project is one line, without its place in our code; other warnings stay."""
    earlier = warnings.formatwarning
    if getattr(earlier, "__module__", "") == __name__:
        return
    ours = str(Path(__file__).parent)

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(ours):
            return f"ppo-fast: warning: {message}\n"
        return earlier(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
