"""Replaces functions of another project by ours, everywhere it has imported them, and restores them."""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType

ANY_VERSION = "PPO_FAST_ANY_VERSION"


def peer(package: str, module: str, tested: tuple[str, ...], note: str = "") -> ModuleType:
    """Import a module of another project.

    Args:
        package: as it is installed, such as "verl".
        tested: versions that it was tested with, each a prefix such as "0.9."; the first is recommended.
        note: what else an installation needs.

    Raises:
        ImportError: it is not installed; or its version was not tested, and the environment variable
            PPO_FAST_ANY_VERSION is not 1.
    """
    install = f'pip install "{package}=={tested[0]}*"{note}'
    try:
        version = importlib.metadata.version(package)
        if version.startswith(tested) or os.environ.get(ANY_VERSION) == "1":
            return importlib.import_module(module)
    except ImportError as error:  # also PackageNotFoundError
        raise ImportError(f"this integration needs {package}: {install} ({error})") from error
    raise ImportError(
        f"{package} {version} is installed, but ppo_fast was tested with {' and '.join(x + '*' for x in tested)}:"
        f" {install}, or set the environment variable {ANY_VERSION}=1 and compare the numbers"
    )


class Patch:
    """Functions of one package and their replacements; a context manager, or `apply` and `undo`.

    Args:
        package: as it is installed, such as "verl".
        replacements: "module:function" -> our function.
    """

    def __init__(self, package: str, replacements: Mapping[str, Callable[..., object]]) -> None:
        self.package = package
        self.replacements = replacements
        self.undone: list[tuple[dict[str, object], str, object]] = []  # a module's names, one of them, its value

    def apply(self, *, quiet: bool = False) -> "Patch":
        """Replace the functions, where they are defined, imported by name or registered, and print which.

        Raises:
            RuntimeError: it is applied already.
            AttributeError: the package has no such function.
        """
        if self.undone:
            raise RuntimeError(f"{self.package} is patched already")
        for place, ours in self.replacements.items():
            module_name, name = place.split(":")
            theirs = getattr(importlib.import_module(module_name), name)
            for module in self._modules():
                for names in (vars(module), *(x for x in vars(module).values() if type(x) is dict)):  # and registries
                    for alias in [key for key, value in names.items() if value is theirs]:
                        self.undone.append((names, alias, theirs))
                        names[alias] = ours
        if not quiet:
            replaced = ", ".join(place.split(":")[1] for place in self.replacements)
            version = importlib.metadata.version(self.package)
            print(f"ppo_fast: in {self.package} {version} replaced {replaced}")
        return self

    def _modules(self) -> list[ModuleType]:
        root = next(iter(self.replacements)).split(":")[0].split(".")[0]
        return [m for key, m in list(sys.modules.items()) if key.split(".")[0] == root and isinstance(m, ModuleType)]

    def undo(self) -> None:
        """Restore the original functions."""
        for names, alias, theirs in reversed(self.undone):
            ours, names[alias] = names[alias], theirs
            for module in self._modules():  # one that was imported in the meantime has ours by name
                for late in [key for key, value in vars(module).items() if value is ours]:
                    setattr(module, late, theirs)
        self.undone.clear()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
