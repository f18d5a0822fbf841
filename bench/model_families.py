"""The table of model families: how each causal family of transformers is computed, in a tiny size on a CPU.

    python bench/model_families.py --write    # bench/results/families/table.md; takes minutes

Each model makes one step in fp32 with weights that do not change (tests/support/every_family.py).
"""

import argparse
import datetime
import sys
from pathlib import Path

import json_lines  # noqa: F401  # before torch
import torch
import transformers
from static import git

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))

from support.every_family import KINDS, Outcome, build, outcome_of  # noqa: E402

OUT = ROOT / "results" / "families"
SLOW = ("kimi_linear",)  # its recurrence takes minutes on a CPU


def row(kind: str) -> str:
    """A line of the table."""
    model = None if kind in SLOW else build(kind)
    if model is None:
        return f"| {kind} | {'not run: slow on a CPU' if kind in SLOW else 'no tiny model can be built'} | | | | |"
    found = outcome_of(model)
    if found.error is not None:
        return f"| {kind} | rejected: {found.error} | | | | |"
    numbers = f"{found.gap:.1e} | {found.sampler_gap:.1e} | {found.ratio:.7f}"
    return f"| {kind} | {rows_of(found)} | {sampling_of(found)} | {numbers} |"


def rows_of(found: Outcome) -> str:
    rows = "packed" if found.packed else "padded"
    return ("" if found.linear else "own logits, ") + (rows if found.batched else "one by one")


def sampling_of(found: Outcome) -> str:
    padding = "left padding" if found.left_padding else "equal lengths"
    return padding if found.cache else f"{padding}, no cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {OUT.relative_to(ROOT.parent)}/table.md")
    parser.add_argument("kinds", nargs="*", help="families; all if none is given")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    commit = git("rev-parse", "--short", "HEAD") + (", changed" if git("status", "--porcelain") else "")
    lines = []
    for kind in options.kinds or KINDS:
        lines.append(row(kind))
        print(lines[-1], flush=True)
    if not options.write:
        return
    OUT.mkdir(parents=True, exist_ok=True)
    OUT.joinpath("table.md").write_text(f"""# Model families

Made by `python bench/model_families.py --write`. Commit {commit}, torch {torch.__version__}, transformers
{transformers.__version__}, {datetime.date.today()}. One step of a tiny model in fp32 on a CPU.

Rows: how hidden states are computed while learning; "own logits" come from the model's own forward instead of the fused
LM head. Gap: the largest difference, in nats, of the log-probabilities of the answers to those of the model's own
forward on one sequence. Sampler gap: the same between sampling and learning. Ratio: the largest of the first update.

| family | rows | sampling | gap | sampler gap | ratio |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}
""")
    print(f"table.md is in {OUT}")


if __name__ == "__main__":
    main()
