"""Records a run of the arithmetic example: what the README's table shows.

python bench/arithmetic.py --seed 2    # bench/results/cpu-2core/arithmetic/seed-2.jsonl
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from json_lines import Writer
from static import git

from ppo_fast.examples import arithmetic

OUT = Path(__file__).parent / "results" / "cpu-2core" / "arithmetic"


def summary(seed: int) -> dict[str, Any]:
    """The example's own figures."""
    with tempfile.TemporaryDirectory() as folder:
        arithmetic.main(["--seed", str(seed), "--out", folder])
        return json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    writer = Writer(OUT / f"seed-{seed}.jsonl", git("rev-parse", "HEAD"))
    writer.add({"command": f"python bench/arithmetic.py --seed {seed}", **summary(seed)})


if __name__ == "__main__":
    main()
