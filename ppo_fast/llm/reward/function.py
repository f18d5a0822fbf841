"""Reward functions: loading them by name, with options and columns of the data."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import nearest
from ppo_fast.llm.data import RESERVED

_SPEC = re.compile(r"(?P<module>.+?):(?P<name>[A-Za-z_]\w*)\s*(?P<call>\(.*\))?", re.DOTALL)


@dataclass(frozen=True)
class Configured:
    """A reward function with some of its arguments fixed, and others taken from columns of another name.

    >>> from ppo_fast.rewards import numeric
    >>> Configured(numeric, {"tolerance": 1.0}, {"reference": "answer"})(["6 * 7?"], ["41"], answer=["42"])
    [1.0]
    """

    function: Callable[..., Sequence[object]]
    options: dict[str, object] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # argument: column

    @property
    def __name__(self) -> str:
        return _called(self.function)

    def __call__(self, prompts: Sequence[object], completions: Sequence[str], **columns: list) -> Sequence[object]:
        return self.function(prompts, completions, **self.options, **self.columns_taken(columns))

    def columns_taken(self, columns: Mapping[str, list]) -> dict[str, list]:
        """The columns that the function gets, by the names of its arguments."""
        missing = [column for column in self.columns.values() if column not in columns]
        if missing:
            raise UserError(
                f"the data has no column {missing[0]!r}, which the reward {_called(self.function)!r} asks for"
                f"{of_data(missing[0], columns)}"
            )
        renamed = {argument: columns[column] for argument, column in self.columns.items()}
        bound = functools.partial(self.function, **self.options)
        return arguments_of(bound, {**columns, **renamed}, given=set(renamed))


def arguments_of(
    function: Callable[..., object], columns: Mapping[str, list], given: Collection[str] = ()
) -> dict[str, list]:
    """Select the columns for a reward function: all of them with **columns, else its named arguments.

    An argument that is fixed already (by functools.partial) does not come from the data.

    Raises:
        UserError: the function needs a column that the data lacks; or a keyword-only argument with a default, an
            option, has the name of a column, which is ambiguous.
    """
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    parameters = inspect.signature(function).parameters
    free = {name: column for name, column in columns.items() if name not in fixed}
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        free = {name: column for name, column in free.items() if name in parameters}
    called = _called(function)
    for name, taken in list(parameters.items())[2:]:  # after prompts and completions
        variable = taken.kind in (taken.VAR_KEYWORD, taken.VAR_POSITIONAL)
        if taken.default is taken.empty and not variable and name not in free:
            raise UserError(
                f"the data has no column {name!r}, which the reward {called!r} asks for{of_data(name, columns)}; to"
                f" take another: {called}({name}=COLUMN)"
            )
    for name in free:
        parameter = parameters.get(name)
        if parameter is None or parameter.kind is not parameter.KEYWORD_ONLY or name in given:
            continue
        if parameter.default is not parameter.empty:
            raise UserError(
                f"{name!r} is an option of the reward {called!r} and a column of the data: fix it, as in"
                f" {called}({name}={parameter.default!r}), or rename the column"
            )
    return free


def of_data(missing: str, columns: Collection[str]) -> str:
    """List, for the message of a missing column, those of the data without those of the trainer, and the nearest."""
    known = [name for name in columns if name not in RESERVED]
    has = f"it has {', '.join(known)}" if known else "it has none besides the prompt"
    return f"{nearest(missing, known)}; {has}"


def _called(function: Callable[..., object]) -> str:
    """Return the name of a reward function for messages."""
    inner = function.func if isinstance(function, functools.partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def check_signature(function: Callable[..., object]) -> None:
    """Reject a function that does not take (prompts, completions, **columns) in this order, or is asynchronous."""
    called = _called(function)
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    if any(kind(f) for kind in kinds for f in (function, getattr(function, "__call__", None))):  # noqa: B004
        raise UserError(
            f"the reward {called!r} is asynchronous: give a function that returns asyncio.run(...) of the coroutine"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the arguments of the reward {called!r} cannot be read: put it into a function f(prompts, completions)"
        ) from error
    given = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    few = len(given) < 2 and all(p.kind is not p.VAR_POSITIONAL for p in parameters)
    if few or given[:1] == ["completions"] or "prompts" in given[1:]:
        raise UserError(
            f"the reward {called!r} takes ({', '.join(given)}), but is called as {called}(prompts, completions,"
            " **columns): give its arguments this order"
        )


def check_columns(function: Callable[..., object], columns: Mapping[str, list]) -> None:
    """Raise the error of a call with the columns of the data, without a call."""
    check_signature(function.function if isinstance(function, Configured) else function)
    columns = arguments_of(function, columns)
    if (inner := getattr(function, "columns_taken", None)) is not None:  # Configured, Pool
        inner(columns)


def load_reward(spec: str) -> Callable[..., Sequence[object]]:
    """Load the function MODULE:FUNCTION or FILE.py:FUNCTION, optionally with arguments.

    In FUNCTION(name=value, ...) a value is a Python literal, or a bare name: that column of the data. A class is
    instantiated with the literals.

    Raises:
        UserError: it cannot be read, imported or found.

    >>> load_reward("ppo_fast.rewards:numeric(reference=answer, tolerance=0.5)").columns
    {'reference': 'answer'}
    """
    read = _SPEC.fullmatch(spec.strip())
    if read is None:
        raise UserError(
            f"--reward must be MODULE:FUNCTION or FILE.py:FUNCTION, perhaps with (option=value, ...), got {spec!r}"
        )
    function = _named(spec, read["module"], read["name"])
    if read["call"] is None and not inspect.isclass(function):
        return function
    options, columns = _arguments(spec, read["call"] or "()")
    if inspect.isclass(function):
        if columns:
            raise UserError(f"{spec}: {next(iter(columns.values()))} is no literal: a text needs quotation marks")
        try:
            inspect.signature(function).bind(**options)
        except TypeError as error:
            raise UserError(f"{spec}: {error}") from error
        try:
            return cast(Callable[..., Sequence[object]], function(**options))  # `check_signature` examines it
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # user code
            raise UserError(f"{spec}: {_told(error)}") from error
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in [*options, *columns]:
        if name not in parameters and not takes_all:
            takes = ", ".join(list(parameters)[2:]) or "none"
            raise UserError(f"{spec}: {read['name']} has no argument {name!r}; it has {takes}")
    return Configured(function, options, columns)


def _arguments(spec: str, call: str) -> tuple[dict[str, object], dict[str, str]]:
    """Parse "(name=value, ...)" into literals and columns."""
    options: dict[str, object] = {}
    columns: dict[str, str] = {}
    try:
        read = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(read, ast.Call) or read.args:
            raise ValueError("arguments must be given by name")
        for keyword in read.keywords:
            if keyword.arg is None:
                raise ValueError("** cannot be used here")
            if isinstance(keyword.value, ast.Name):
                columns[keyword.arg] = keyword.value.id
            else:
                options[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(
            f"cannot read the arguments in {spec!r}: {reason}; expected (name=value, ...), each value a literal or the"
            " name of a column"
        ) from error
    return options, columns


def _named(spec: str, module_name: str, name: str) -> Callable[..., Sequence[object]]:
    try:
        if module_name.endswith(".py"):
            module = _module_from_file(Path(module_name))
        else:
            here = str(Path.cwd())
            if here not in sys.path:
                sys.path.insert(0, here)
            module = importlib.import_module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"cannot import the reward {spec!r}: {error}") from error
    except (Exception, SystemExit) as error:  # user code
        raise UserError(f"cannot import the reward {spec!r}: {_told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{module_name} has no function {name!r}, which --reward {spec} names")
    return function


def _told(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _module_from_file(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:  # only for a name that does not end in .py
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
