"""Empty stand-ins for what OpenRLHF 0.11 imports and its arithmetic never calls (deepspeed and flash_attn need a GPU).

`install()` puts a finder at the end of the import path: a package from the list that is not installed becomes a module
in which every name exists, as a class that does nothing. flash_attn.ops stays missing, so that OpenRLHF takes its own
PyTorch path for log-probabilities.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

PACKAGES = frozenset(
    (
        "aiohttp",
        "bitsandbytes",
        "deepspeed",
        "flash_attn",
        "peft",
        "pylatexenc",
        "ray",
        "torchdata",
        "transformers",
        "vllm",
    )
)


class _Anything:
    """A class to inherit from, to call or to decorate with."""

    def __init__(self, *args: object, **options: object) -> None: ...

    def __call__(self, decorated: object = None, *args: object, **options: object) -> object:
        return decorated


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in PACKAGES or fullname.startswith("flash_attn.ops"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def install() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
