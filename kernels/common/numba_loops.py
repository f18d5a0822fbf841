"""Compilation of loops by numba to C functions, where numba is installed and works.

numba keeps the machine code of a loop on disk: beside this file, in a folder of the user where that cannot be written,
or in NUMBA_CACHE_DIR. Compiling a loop takes a second or two, once for each machine and version; many processes that
start together on a new machine each do so. `ppo-fast compile` does it ahead of time.
"""

import ctypes
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

Array = Any  # an array in a loop that numba compiles: a pointer, which a type checker cannot index


@cache
def numba_works() -> bool:
    """Returns whether numba can be imported; warns with the reason if an installed one cannot."""
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


def c_function(
    body: Callable[..., None], arguments: Sequence[Any], fastmath: set[str] | None = None
) -> tuple[Callable[..., None], Any]:
    """Compiles the loop `body` to a C function; also returns the numba object that keeps its machine code alive.

    Args:
        body: a function without a result that numba can compile, and that does not raise.
        arguments: numba's types of its arguments. Pointers are passed as addresses.
        fastmath: LLVM's flags.
    """
    import numba
    from numba import types

    options: dict[str, Any] = {"nopython": True, "error_model": "numpy", "fastmath": fastmath or False}
    compiler = partial(numba.cfunc, types.void(*arguments), **options)
    try:
        code = compiler(cache=True)(body)
    except Exception:  # the cache has no folder, or a damaged file, for which pickle has errors of many types
        code = compiler()(body)
    c_types: dict[Any, Any] = {
        types.float32: ctypes.c_float,
        types.float64: ctypes.c_double,
        types.int64: ctypes.c_int64,
    }
    return ctypes.CFUNCTYPE(None, *(c_types.get(x, ctypes.c_void_p) for x in arguments))(code.address), code  # type: ignore[arg-type]  # an address, once it is compiled
