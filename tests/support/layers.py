"""The modules of ppo_fast, their layers, and the imports between them."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ppo_fast"

# Layers from bottom to top: a module imports from its own package and from the layers before it. Packages in one layer
# do not import each other.
LAYERS = [
    ["kernels"],
    ["ops"],
    [""],  # ppo_fast/__init__.py, which offers the operations
    ["common"],
    ["llm", "classic", "integrations", "recipes"],
    ["rewards"],
    ["doctor"],
    ["cli"],
    ["examples"],
]


def python_files() -> list[Path]:
    files = [f for f in PACKAGE.rglob("*.py") if "kernels" not in f.parts[len(PACKAGE.parts) :]]
    return sorted(files) + sorted((PACKAGE / "kernels").rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ("ppo_fast", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in python_files()}


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Module, name ("" for the module itself) and local name of every import from ppo_fast, wherever it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ppo_fast":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (
                    (full, "", alias.asname or alias.name)
                    if full in FILES
                    else (
                        node.module,
                        alias.name,
                        alias.asname or alias.name,
                    )
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ppo_fast":
                    yield alias.name, "", alias.asname or "ppo_fast"


@functools.cache
def graph() -> dict[str, set[str]]:
    """Each module, and the modules of ppo_fast that it imports."""
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
    return {name: {module for module, _, _ in imported_names(tree)} - {name} for name, tree in trees.items()}


def layer(module: str) -> int:
    package = (*module.split("."), "")[1]
    return next(number for number, packages in enumerate(LAYERS) if package in packages)
