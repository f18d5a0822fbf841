"""Options of a run: checked dataclasses, their command-line options, and YAML files.

`PPOConfig` and `ClassicConfig` are pydantic dataclasses with strict types. A field is written as

    gamma: Fraction = setting(0.99, "discount per step")

where the annotation holds type, range and choices, and `setting` the default and the help text. `checked_options`
turns pydantic's errors into one sentence, and `options` reads the fields for command lines and documentation.
"""

import argparse
import dataclasses
import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar, Union, get_args, get_origin, runtime_checkable

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import nearest

MAX_SEED = 2**32 - 1  # of numpy
STRICT = ConfigDict(strict=True, validate_assignment=True, allow_inf_nan=False, extra="forbid")

Count = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Le(MAX_SEED)]
Threads = Annotated[int, Ge(0), Le(4096)]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
NonNegative = Annotated[float, Ge(0.0)]
Positive = Annotated[float, Gt(0.0)]
Strings = tuple[Annotated[str, MinLen(1)], ...]


@runtime_checkable
class HasPostInit(Protocol):
    """A dataclass that checks combinations of its options in `__post_init__`."""

    def __post_init__(self) -> None: ...


Value = TypeVar("Value")
Config = TypeVar("Config")


def setting(default: Value, help: str) -> Value:
    """Return a dataclass field with its default and its help text; its type is that of the default, as mypy needs."""
    return dataclasses.field(default=default, metadata={"help": help})


def plain_value(value: object) -> object:
    """Convert a value to a type of YAML and JSON, before it is checked.

    A number of numpy or a member of an Enum that is a Python number or string becomes one, and a list becomes a tuple.
    """
    if isinstance(value, list):
        return tuple(value)
    for kind in (float, int):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    if hasattr(type(value), "__float__") and not isinstance(value, bool):  # a tensor: pydantic would convert it
        raise ValueError(f"{type(value).__name__} is no number of Python")
    return str.__str__(value) if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a config class: what its annotation and `setting` say."""

    name: str
    default: object  # of the type of the option
    help: str
    kind: type  # bool, int, float, str, or tuple (of strings)
    optional: bool  # None is a value
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None  # only together with `low`
    above: float | None = None  # a bound that the value must exceed


@functools.cache
def options(config_class: type) -> dict[str, Option]:
    """Read the options of a pydantic dataclass, by name."""
    if not is_pydantic_dataclass(config_class):
        raise TypeError(f"{config_class.__name__} is not a pydantic dataclass")
    infos = config_class.__pydantic_fields__
    return {
        field.name: _read_option(field.name, infos[field.name], field.metadata["help"])
        for field in dataclasses.fields(config_class)
    }


def _read_option(name: str, info: FieldInfo, help: str) -> Option:
    annotation, constraints = info.annotation, list(info.metadata)
    optional = get_origin(annotation) in (Union, types.UnionType)
    if optional:
        (annotation,) = (x for x in get_args(annotation) if x is not types.NoneType)
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        constraints += more
    choices: tuple[str, ...] = get_args(annotation) if get_origin(annotation) is Literal else ()
    kind = str if choices else get_origin(annotation) or annotation
    if not isinstance(kind, type):
        raise TypeError(f"the option {name} has the annotation {annotation}, which is no type")
    bounds = {
        name: getattr(constraint, attribute)
        for constraint in constraints
        for kind_of_bound, attribute, name in ((Ge, "ge", "low"), (Le, "le", "high"), (Gt, "gt", "above"))
        if isinstance(constraint, kind_of_bound)
    }
    return Option(name, info.default, help, kind, optional, choices, **bounds)


def checked_options(config_class: type[Config]) -> type[Config]:
    """Make a pydantic dataclass raise `UserError`, with one sentence about the first wrong value.

    An assignment checks the new value and then, by `__post_init__`, the combinations of options; a value that fails
    either check is not kept. To change two options that depend on each other, use `dataclasses.replace`.
    """
    initialize: Callable[..., None] = config_class.__init__
    assign = config_class.__setattr__

    @functools.wraps(initialize)
    def __init__(self: Config, *args: object, **kwargs: object) -> None:
        try:
            initialize(self, *args, **kwargs)
        except ValidationError as error:
            raise _readable(config_class, error.errors(include_url=False)[0], args, kwargs) from None

    @functools.wraps(assign)
    def __setattr__(self: Config, name: str, value: object) -> None:
        before = self.__dict__.get(name)
        try:
            assign(self, name, value)
        except ValidationError as error:
            raise _readable(config_class, error.errors(include_url=False)[0], (), {name: value}) from None
        try:
            if isinstance(self, HasPostInit):
                self.__post_init__()
        except UserError:
            self.__dict__[name] = before
            raise

    for method in (__init__, __setattr__):
        setattr(config_class, method.__name__, method)
    return config_class


def _readable(
    config_class: type, error: ErrorDetails, args: Sequence[object], kwargs: Mapping[str, object]
) -> Exception:
    """Translate an error of pydantic: `UserError` for a wrong value, else what a dataclass would raise."""
    first = error["loc"][0] if error["loc"] else ""
    if error["type"] == "unexpected_keyword_argument":
        return TypeError(f"{config_class.__name__}.__init__() got an unexpected keyword argument {first!r}")
    if error["type"] == "unexpected_positional_argument":
        return TypeError(f"{config_class.__name__}.__init__() takes at most {len(options(config_class))} arguments")
    if error["type"] == "multiple_argument_values":
        return TypeError(f"{config_class.__name__}.__init__() got multiple values for argument {first!r}")
    if error["type"] == "no_such_attribute":
        near = nearest(str(first), options(config_class))
        return AttributeError(f"{config_class.__name__} has no option {first!r}{near}")
    name = list(options(config_class))[first] if isinstance(first, int) else first
    values = {**dict(zip(options(config_class), args, strict=False)), **kwargs}
    return UserError(_sentence(options(config_class)[name], error["type"], values[name]))


def _sentence(option: Option, error: str, value: object) -> str:
    """Say what an option must be, and what it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if error == "string_unicode":
        return f"{option.name} has half of a character of two parts (a lone surrogate): got {value!r}"
    if option.kind is tuple:
        return f"{option.name} must be a tuple of texts that are not empty, got {value!r}"
    if error == "literal_error" and isinstance(value, str):
        return f"{option.name} must be one of {', '.join(option.choices)}; got {value!r}"
    if option.kind is float and number and error in ("finite_number", "float_type"):  # float_type: 10**400
        return f"{option.name} must be a finite number, got {value}"
    if error == "greater_than":
        off = ": none switches it off" if option.optional else ""
        return f"{option.name} must be above {option.above:g}, got {value}{off}"
    if error in ("greater_than_equal", "less_than_equal"):
        return f"{option.name} must {_bounds(option)}, got {value}"
    return f"{option.name} must be of type {option.kind.__name__}{' or None' * option.optional}, got {value!r}"


def _bounds(option: Option) -> str:
    if option.high is None:
        return f"be at least {_plain(option.low)}"
    return f"be in [{_plain(option.low)}, {_plain(option.high)}]"


def _plain(bound: float | None) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def json_object(name: str, text: str, example: str) -> dict[str, object]:
    """Read the value of an option that is a JSON object.

    Raises:
        UserError: it is something else; the message names the option and gives the example.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {text}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{name} must be a JSON object such as {example}, got {text}")
    return found


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add every option of a config class to a command line; the help text says the default, which is not set here."""
    for option in options(config_class).values():
        _add_option(parser, option)


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    flag = "--" + option.name.replace("_", "-")
    default = "none" if option.default in (None, ()) else option.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    text = f"{option.help} (default: {default}{_range(option)})".replace("%", "%%")
    if option.kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif option.kind is tuple:
        parser.add_argument(flag, nargs="+", metavar="TEXT", help=text)
    else:
        parser.add_argument(
            flag,
            type=_or_none(option.kind) if option.optional else option.kind,
            choices=option.choices or None,
            metavar=None if option.choices else option.kind.__name__.upper(),
            help=text,
        )


def _range(option: Option) -> str:
    if option.above is not None:
        return f"; above {option.above:g}"
    if option.low is None:
        return ""
    low = _plain(option.low)
    return f"; at least {low}" if option.high is None else f"; {low} to {_plain(option.high)}"


def _or_none(kind: type) -> Callable[[str], object]:
    """Return a type for argparse that also accepts "none"."""

    def convert(text: str) -> object:
        return None if text == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def read_yaml(path: str | Path, known: Iterable[str]) -> dict[str, object]:
    """Read the options in a YAML file by name, with an underscore or a hyphen between words.

    Raises:
        UserError: the file cannot be read, is not YAML, or has a name that is unknown or occurs twice.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        root, read = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the configuration: {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no such date or number
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply: it must hold lines like `lr: 1.0e-6`") from error
    if root is None:
        return {}
    if not isinstance(read, dict):
        raise UserError(f"{path} must hold lines like `lr: 1.0e-6`, got {type(read).__name__}")
    known, names = set(known), [str(key.value).replace("-", "_") for key, _ in root.value]
    for name in names:
        if name not in known:
            raise UserError(f"{path}: unknown option {name}{nearest(name, known)}")
        if names.count(name) > 1:
            raise UserError(f"{path}: the option {name} occurs twice")
    for key, node in root.value:
        if node.tag.endswith(":int") and re.fullmatch(r"[-+]?0\d+|.*:.*", node.value):
            raise UserError(
                f"{path}: {key.value}: {node.value} is {read[key.value]} in YAML 1.1, where 010 is octal and 1:30 is"
                " base 60: write a decimal number"
            )
    return {str(key).replace("-", "_"): value for key, value in read.items()}
