"""Fingerprint: a hash of the code, the options and the weights of a reward function.

It is the same in every process of one Python version, and does not depend on the names of files, on line numbers or on
what a function has stored in lists, dicts and counters.
"""

import dis
import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator
from typing import Protocol, TypeGuard

from torch import nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_SPEED = {"batch_size", "workers", "device"}  # options that change no value


class Tokenizer(Protocol):
    """A tokenizer of transformers, which this module does not import."""

    chat_template: object

    def get_vocab(self) -> dict[str, int]: ...


def reward_fingerprint(function: object, weights: Callable[[nn.Module], str]) -> str:
    """Return 16 hexadecimal digits that change with a reward function.

    They depend on its bytecode and that of the functions and classes of its module that it uses, on its defaults and
    constants, on the options of `Configured`, `functools.partial`, `Pool` and of objects (attributes with the name of
    an argument of __init__), and on the weights and tokenizers of models. Code in other modules counts by its name.

    Args:
        function: a reward function, or an object that is called as one.
        weights: the fingerprint of a model's weights, for instance `ppo_fast.llm.models.weights.weights_hash`.

    >>> a, b = (reward_fingerprint(lambda p, c, factor=x: [factor] * len(c), str) for x in (1.0, 2.0))
    >>> a == b
    False
    """
    described = _Description(weights).of(function, options=True)
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


class _Description:
    """Describes objects by tuples and strings, each function and object once."""

    def __init__(self, weights: Callable[[nn.Module], str]) -> None:
        self.weights = weights
        self.seen: dict[int, tuple[int, object]] = {}  # with the object, so that its id is not used again

    def of(self, x: object, *, options: bool = False) -> object:
        """Describe an object. `options`: lists and dicts are settings; elsewhere they are state, which is left out."""
        if isinstance(x, _PLAIN):
            return type(x).__name__, repr(x)
        if isinstance(x, tuple) or (options and isinstance(x, list)):
            return type(x).__name__, [self.of(item, options=options) for item in x]
        if isinstance(x, frozenset) or (options and isinstance(x, set)):
            return "set", sorted(repr(self.of(item)) for item in x)
        if options and isinstance(x, dict):
            pairs = ((repr(self.of(key)), self.of(value, options=True)) for key, value in x.items())
            return "dict", sorted(pairs, key=lambda pair: pair[0])
        if isinstance(x, re.Pattern):
            return "pattern", x.pattern, x.flags
        if isinstance(x, types.ModuleType):
            return "module", x.__name__
        if isinstance(x, list | dict | set | bytearray):
            return "state", type(x).__name__
        if id(x) in self.seen:
            return "seen", self.seen[id(x)][0]
        self.seen[id(x)] = len(self.seen), x
        return self._once(x)

    def _once(self, x: object) -> object:
        if isinstance(x, types.CodeType):
            return self._code(x)
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, functools.partial):
            fixed = (self.of(list(x.args), options=True), self.of(x.keywords, options=True))
            return "partial", self.of(x.func), fixed
        if isinstance(x, types.MethodType):
            return "method", self.of(x.__func__), self.of(x.__self__)
        if isinstance(x, staticmethod | classmethod):
            return type(x).__name__, self.of(x.__func__)
        if isinstance(x, property):
            return "property", [self.of(f) for f in (x.fget, x.fset)]
        if isinstance(x, type):
            return self._class(x)
        if (inner := getattr(x, "__wrapped__", None)) is not None:  # of functools.lru_cache
            return "wrapped", self.of(inner)
        if _is_tokenizer(x):
            return "tokenizer", tokenizer_fingerprint(x)
        if isinstance(x, nn.Module):
            return "model", type(x).__qualname__, self.weights(x)
        if isinstance(x, types.BuiltinFunctionType):
            return "built-in", x.__module__, x.__qualname__
        return "object", self.of(type(x)), self._options(x)

    def _code(self, code: types.CodeType) -> object:
        constants = [self.of(constant) for constant in code.co_consts]
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return "code", code.co_code.hex(), constants, names, counts

    def _function(self, function: types.FunctionType) -> object:
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        rebound = set(_stored(code, "STORE_DEREF"))
        closure = [(name, self.of(_content(cell))) for name, cell in cells if name not in rebound]
        defaults = [(name, self.of(value)) for name, value in sorted((function.__kwdefaults__ or {}).items())]
        return "function", self.of(code), self.of(function.__defaults__), defaults, closure, self._globals(function)

    def _globals(self, function: types.FunctionType) -> object:
        """Describe the globals that a function uses: functions, classes, and constants that no function changes."""
        space = function.__globals__
        used = sorted({name for code in _codes(function.__code__) for name in code.co_names} & space.keys())
        functions = [x for x in space.values() if isinstance(x, types.FunctionType) and x.__globals__ is space]
        rebound = {name for x in (function, *functions) for name in _stored(x.__code__, "STORE_GLOBAL")}
        found = []
        for name in used:
            x = space[name]
            own = getattr(x, "__module__", None) == space.get("__name__")
            if isinstance(x, types.FunctionType | type) or hasattr(x, "__wrapped__"):
                found.append((name, self.of(x) if own else (getattr(x, "__module__", ""), x.__qualname__)))
            elif name not in rebound and isinstance(x, (*_PLAIN, tuple, frozenset, re.Pattern)):
                found.append((name, self.of(x)))
        return found

    def _class(self, x: type) -> object:
        kinds = (types.FunctionType, staticmethod, classmethod, property, *_PLAIN, tuple, frozenset)
        names = [name for name in sorted(vars(x)) if name not in ("__module__", "__doc__", "__firstlineno__")]
        members = [(name, self.of(vars(x)[name])) for name in names if isinstance(vars(x)[name], kinds)]
        bases = [self.of(base) if base.__module__ == x.__module__ else base.__qualname__ for base in x.__bases__]
        return "class", x.__qualname__, bases, members

    def _options(self, x: object) -> object:
        """List attributes with the name of an argument of __init__, and `function`, which `Pool` calls."""
        try:
            arguments = set(inspect.signature(type(x).__init__).parameters) - _SPEED
        except (TypeError, ValueError):  # a type without Python code
            return None
        state = getattr(x, "__dict__", {})
        return [
            (name, self.of(state[name], options=True)) for name in sorted(arguments | {"function"}) if name in state
        ]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """List a code object and all code objects in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _stored(code: types.CodeType, operation: str) -> Iterator[str]:
    """List the names that code assigns to by an operation."""
    for part in _codes(code):
        yield from (x.argval for x in dis.get_instructions(part) if x.opname == operation)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _is_tokenizer(x: object) -> TypeGuard[Tokenizer]:
    """Check by hasattr: since Python 3.12 isinstance does not see what `__getattr__` of a wrapper finds."""
    return hasattr(x, "get_vocab") and hasattr(x, "chat_template")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a fingerprint of a tokenizer without the truncation and padding of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    described |= {"truncation": None, "padding": None, "template": tokenizer.chat_template}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=repr).encode()).hexdigest()
