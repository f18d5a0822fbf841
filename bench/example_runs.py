"""Record a run of an example that answers problems before and after PPO: the README's tables and learning curves.

python bench/example_runs.py pretrained              # seed-0.jsonl and seed-0.png in bench/results/cpu-2core/pretrained
python bench/example_runs.py pretrained --seed 1 --dtype float32    # seed-1-float32.jsonl and .png
python bench/example_runs.py arithmetic

The record has the command, its seed, figures and seconds, the machine, its threads, and its load (the mean number of
runnable processes in the minute before). Nothing else should run at the same time: the load should be about 0.
"""

import argparse
import importlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from json_lines import Writer
from rich.console import Console
from static import git

RESULTS = Path(__file__).parent / "results" / "cpu-2core"
EXAMPLES = ("pretrained", "arithmetic")


def module_of(example: str) -> ModuleType:
    """The module of an example."""
    return importlib.import_module(f"ppo_fast.examples.{example}")


def options_of(example: str, seed: int, dtype: str | None) -> list[str]:
    """The options of a user for this seed and dtype."""
    return ["--seed", str(seed)] * (seed != module_of(example).SEED) + (["--dtype", dtype] if dtype else [])


def summary(example: str, options: list[str], picture: Path) -> dict[str, Any]:
    """The example's own figures; its learning curves are copied beside the record."""
    with tempfile.TemporaryDirectory() as folder:
        if module_of(example).main([*options, "--out", folder]) != 0:
            raise SystemExit("the example failed")
        shutil.copyfile(Path(folder) / "learning_curves.png", picture)
        return json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))


def table(example: str, row: dict[str, Any]) -> str:
    """The table that the command prints, as the README shows it."""
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(module_of(example).table(row))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=EXAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the pretrained example (default: auto)")
    given = parser.parse_args()
    options = options_of(given.example, given.seed, given.dtype)
    name = f"seed-{given.seed}" + (f"-{given.dtype}" if given.dtype else "")
    out = RESULTS / given.example
    out.mkdir(exist_ok=True)
    load = round(os.getloadavg()[0], 2)
    writer = Writer(out / f"{name}.jsonl", git("rev-parse", "HEAD"))
    command = " ".join([f"python -m ppo_fast.examples.{given.example}", *options])
    row = {"command": command, "load_before": load, **summary(given.example, options, out / f"{name}.png")}
    if "model" in row:  # the place of a package's file is that of this machine
        row["model"] = Path(row["model"]).name
    writer.add(row)
    print(f"load {load} before the run; for the README:\n\n{table(given.example, row)}\n\nthe record is {writer.path}")


if __name__ == "__main__":
    main()
