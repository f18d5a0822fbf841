"""Record a run of the arithmetic example: the README's first command and its table.

python bench/arithmetic.py    # seed-0.jsonl and seed-0.png in bench/results/cpu-2core/arithmetic

The record has the command, its seed, figures and seconds, the machine, its threads, and its load (the mean number of
runnable processes in the minute before). Nothing else should run at the same time: the load should be about 0.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from json_lines import Writer
from rich.console import Console
from static import git

from ppo_fast.examples import arithmetic

OUT = Path(__file__).parent / "results" / "cpu-2core" / "arithmetic"


def command(seed: int) -> str:
    """The command line of a user for this seed."""
    return "python -m ppo_fast.examples.arithmetic" + f" --seed {seed}" * (seed != arithmetic.SEED)


def summary(seed: int) -> dict[str, Any]:
    """The example's own figures; its learning curves are copied beside the record."""
    with tempfile.TemporaryDirectory() as folder:
        if arithmetic.main(["--seed", str(seed), "--out", folder]) != 0:
            raise SystemExit("the example failed")
        shutil.copyfile(Path(folder) / "learning_curves.png", OUT / f"seed-{seed}.png")
        return json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))


def table(row: dict[str, Any]) -> str:
    """The table that the command prints, as the README shows it."""
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(arithmetic.table(row))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=arithmetic.SEED)
    seed = parser.parse_args().seed
    load = round(os.getloadavg()[0], 2)
    writer = Writer(OUT / f"seed-{seed}.jsonl", git("rev-parse", "HEAD"))
    row = {"command": command(seed), "load_before": load, **summary(seed)}
    writer.add(row)
    print(f"load {load} before the run; for the README:\n\n{table(row)}\n\nthe record is {writer.path}")


if __name__ == "__main__":
    main()
