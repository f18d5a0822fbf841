"""The packages of ppo_fast as bricks: each imports only from bricks below it.

python bench/layers.py    # bench/results/layers/layers.png and layers.json, which a test compares with the imports

kernels are read through ops; the two modules that read them directly are named in tests/project/test_layout.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # to run from a checkout that is not installed

from support.layers import LAYERS, graph  # noqa: E402

OUT = ROOT / "bench" / "results" / "layers"
# Left and right end, lowest and highest row, and contents of each brick
BRICKS = {
    "kernels": (0, 1, 0, 0, "reference.py, and a folder for each operation: Triton, PyTorch, numba, autograd"),
    "ops": (0, 1, 1, 1, "the public operations: checks, choice of a backend; `import ppo_fast` offers them"),
    "common": (0, 0.8, 2, 2, "errors, options, devices, checkpoints, signals, output folders, loggers"),
    "llm": (0, 0.44, 3, 3, "trainer for language models"),
    "classic": (0.44, 0.64, 3, 4, "PPO for Gymnasium"),
    "recipes": (0.64, 0.8, 3, 4, "configurations"),
    "rewards": (0, 0.22, 4, 5, "ready\nreward functions"),
    "doctor": (0.22, 0.44, 4, 4, "what a machine runs"),
    "cli": (0.22, 0.8, 5, 5, "the command ppo-fast"),
    "integrations": (0.8, 1, 2, 5, "drop-in functions\nfor other trainers"),
    "examples": (0, 1, 6, 6, "python -m ppo_fast.examples.NAME"),
}


def package(module: str) -> str:
    """The package of a module; ppo_fast/__init__.py is part of ops here."""
    return (*module.split("."), "")[1] or "ops"


def edges() -> set[tuple[str, str]]:
    """Pairs of a package and one that it imports."""
    pairs = {(package(name), package(imported)) for name, found in graph().items() for imported in found}
    return {(a, b) for a, b in pairs if a != b}


def described() -> dict[str, Any]:
    """What the picture shows: layers from bottom to top, and the imports between packages."""
    return {"layers": LAYERS, "imports": sorted(list(pair) for pair in edges())}


def draw(path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.6), dpi=110)
    for name, (left, right, low, high, text) in BRICKS.items():
        place = (left + 0.004, low + 0.06)
        box = plt.Rectangle(place, right - left - 0.008, high - low + 0.88, facecolor="#e8f0f8", edgecolor="#35618e")
        axes.add_patch(box)
        middle = (left + right) / 2, (low + high + 1) / 2
        axes.text(middle[0], middle[1] + 0.06, name, ha="center", va="bottom", fontsize=11, weight="bold")
        axes.text(middle[0], middle[1] - 0.02, text, ha="center", va="top", fontsize=8, color="#333333")
    axes.set(xlim=(0, 1), ylim=(0, 7))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    draw(OUT / "layers.png")
    (OUT / "layers.json").write_text(json.dumps(described(), indent=1) + "\n", encoding="utf-8")
    print(f"{OUT}/layers.png and layers.json are written")


if __name__ == "__main__":
    main()
