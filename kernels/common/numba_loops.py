"""Compilation of loops by numba to C functions, where numba is installed and works.

numba keeps the machine code of a loop on disk: beside this file, in a folder of the user where that cannot be written,
or in NUMBA_CACHE_DIR. Compiling a loop takes a second or two, once for each machine and version; many processes that
start together on a new machine each do so. `ppo-fast compile` does it ahead of time.
"""

import ctypes
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from numba.core.ccallback import CFunc
    from numba.core.types import Type

Compiled = tuple[Callable[..., None], object]  # a C function, and what keeps its machine code alive


class Array(Protocol):
    """A pointer to numbers or flags, as a loop that numba compiles gets it."""

    def __getitem__(self, index: int) -> float: ...

    def __setitem__(self, index: int, value: float) -> None: ...


class IndexArray(Protocol):
    """A pointer to integers that a loop reads."""

    def __getitem__(self, index: int) -> int: ...


@cache
def numba_works() -> bool:
    """Return whether numba can be imported; warn with the reason if an installed one cannot."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except Exception as error:  # ImportError, or what its libraries raise
        reason = " ".join(str(error).split())
        warnings.warn(
            f"numba is installed but cannot be imported ({reason}): the operations on the CPU use PyTorch alone, which"
            " is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def c_function(body: Callable[..., None], arguments: "Sequence[Type]", fastmath: set[str] | None = None) -> Compiled:
    """Compile the loop `body` to a C function; also return the numba object that keeps its machine code alive.

    Args:
        body: a function without a result that numba can compile, and that does not raise.
        arguments: numba's types of its arguments. Pointers are passed as addresses.
        fastmath: LLVM's flags.
    """
    import numba
    from numba import types

    signature = types.void(*arguments)

    def compiled(cache: bool) -> "CFunc":
        return numba.cfunc(signature, cache=cache, error_model="numpy", fastmath=fastmath or False)(body)

    try:
        code = compiled(cache=True)
    except Exception:  # the cache has no folder, or a damaged file, for which pickle has errors of many types
        code = compiled(cache=False)
    if code.address is None:
        raise RuntimeError(f"numba has compiled {body.__name__}, but has no address of it")
    c_types: dict[Type, type[ctypes.c_float | ctypes.c_double | ctypes.c_int64 | ctypes.c_void_p]] = {
        types.float32: ctypes.c_float,
        types.float64: ctypes.c_double,
        types.int64: ctypes.c_int64,
    }
    return ctypes.CFUNCTYPE(None, *(c_types.get(x, ctypes.c_void_p) for x in arguments))(code.address), code
