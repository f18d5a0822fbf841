"""Wrappers by name, for the command line: MODULE:NAME, perhaps with (option=value, ...)."""

import ast
import functools
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium

from ppo_fast.common.errors import UserError

Wrapper = Callable[[gymnasium.Env], gymnasium.Env]
_SPEC = re.compile(r"(?P<module>[\w.]+):(?P<name>[A-Za-z_]\w*)\s*(?P<call>\(.*\))?", re.DOTALL)


def search_here() -> None:
    """Add the current folder to the import path, as python -m does and an installed command does not."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def load_wrappers(names: Sequence[str]) -> list[Wrapper]:
    """Load wrappers by name, such as gymnasium.wrappers:TimeLimit(max_episode_steps=100).

    Raises:
        UserError: one cannot be read, imported or found.
    """
    return [_load(name) for name in names]


def _load(text: str) -> Wrapper:
    read = _SPEC.fullmatch(text.strip())
    if read is None:
        raise UserError(f"wrapper must be MODULE:NAME, perhaps with (option=value, ...), got {text!r}")
    search_here()
    try:
        module = importlib.import_module(read["module"])
    except ImportError as error:
        raise UserError(f"cannot import the wrapper {text!r}: {error}") from error
    made = getattr(module, read["name"], None)
    if not callable(made):
        raise UserError(f"{read['module']} has no wrapper {read['name']!r}")
    return functools.partial(made, **_options(text, read["call"] or "()"))


def _options(text: str, call: str) -> dict[str, object]:
    try:
        read = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(read, ast.Call) or read.args or any(keyword.arg is None for keyword in read.keywords):
            raise ValueError("arguments must be given by name")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in read.keywords}
    except (SyntaxError, ValueError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(
            f"cannot read the arguments of the wrapper {text!r}: {reason}; expected (option=value, ...), each value a"
            " literal"
        ) from error
