"""TODO docstring."""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

from ppo_fast.common.errors import UserError

MAX_SEED = 2**32 - 1  # of numpy


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple = (),
    above: float | None = None,
) -> Any:
    """A field with its help text and the range, or the choices, of its value. `above` is a bound that the value must
    exceed; `low` and `high` belong to the range."""
    limits = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "choices": choices, **limits})


def plain_value(value: Any) -> Any:
    """A number of numpy, or a member of an Enum, that is a Python number or text, as that: YAML knows no others."""
    for kind in (float, int):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return str.__str__(value) if isinstance(value, str) else value


def check_setting(name: str, value: Any, option: dataclasses.Field) -> None:
    """Refuses a value of the wrong type, out of its range, or not among its choices."""
    optional = "None" in str(option.type)
    if value is None and optional:
        return
    if "tuple" in str(option.type):
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) and x for x in value):
            raise UserError(f"{name} must be a tuple of texts that are not empty, got {value!r}")
        return
    kind = next(t for t in (bool, int, float, str) if t.__name__ in str(option.type).split(" |")[0] or option.type is t)
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} must be of type {kind.__name__}{' or None' * optional}, got {value!r}")
    low, high, above, choices = (option.metadata[key] for key in ("low", "high", "above", "choices"))
    if choices and value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    if kind is float and not abs(value) <= sys.float_info.max:
        raise UserError(f"{name} must be a finite number, got {value}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"lie in [{_plain(low)}, {_plain(high)}]" if high is not None else f"be at least {_plain(low)}"
        raise UserError(f"{name} must {bounds}, got {value}")
    if above is not None and not value > above:
        off = ": none switches it off" if optional else ""
        raise UserError(f"{name} must be above {above:g}, got {value}{off}")


def add_option(parser: argparse.ArgumentParser, option: dataclasses.Field) -> None:
    """A field made by `setting` as an option of a command line; what its default is stands in the help only."""
    flag = "--" + option.name.replace("_", "-")
    default = "none" if option.default in (None, ()) else option.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    text = f"{option.metadata['help']} (default: {default}{_range(option)})".replace("%", "%%")
    kind = str(getattr(option.type, "__name__", option.type))
    if "bool" in kind:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    if "tuple" in kind:
        parser.add_argument(flag, nargs="+", metavar="TEXT", help=text)
        return
    types: dict[str, Any] = {"int": int, "float": float, "str": str}
    kind = next(name for name in types if name in kind.replace("None", ""))
    parser.add_argument(
        flag,
        type=_or_none(types[kind]) if "None" in str(option.type) else types[kind],
        choices=option.metadata["choices"] or None,
        metavar=None if option.metadata["choices"] else kind.upper(),
        help=text,
    )


def _range(option: dataclasses.Field) -> str:
    low, high, above = (option.metadata[key] for key in ("low", "high", "above"))
    if above is not None:
        return f"; above {above:g}"
    if low is None:
        return ""
    return f"; at least {_plain(low)}" if high is None else f"; {_plain(low)} to {_plain(high)}"


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _or_none(kind: type) -> Any:
    """A type of argparse that also takes "none"."""

    def convert(text: str) -> Any:
        return None if text == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the known name that is most like the given one, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def read_yaml(path: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """Options of a YAML file by name, an underscore or a hyphen between words.

    Raises:
        UserError: the file cannot be read, is not YAML, or has a name that is unknown or stands there twice.
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
            raise UserError(f"{path}: the option {name} stands there twice")
    for key, node in root.value:
        if node.tag.endswith(":int") and re.fullmatch(r"[-+]?0\d+|.*:.*", node.value):
            raise UserError(
                f"{path}: {key.value}: {node.value} is {read[key.value]} in YAML 1.1, where 010 is octal and 1:30 is"
                " base 60: write a decimal number"
            )
    return {str(key).replace("-", "_"): value for key, value in read.items()}
