"""Records of what the interpreter found: where they are kept, and which commit and versions they belong to."""

import datetime
import json
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import triton

if TYPE_CHECKING:
    from ptx.emulator import Emulator, Launch

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "compiled"


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def commit() -> str:
    changed = git("status", "--porcelain", "kernels", "ppo_fast", "tests")
    return git("rev-parse", "--short", "HEAD") + (", changed" if changed else "")


def provenance() -> str:
    versions = f"triton {triton.__version__}, Python {platform.python_version()}"
    return f"Commit {commit()}, {versions}, {datetime.date.today().isoformat()}"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def variant_name(launch: "Launch") -> str:
    """What distinguishes a variant from the others of its kernel: dtypes and constexprs."""
    dtypes = sorted({kind[1:] for _, kind in launch.types if kind in ("*fp32", "*bf16", "*fp16")} - {"fp32"})
    return " ".join([*(dtypes or ["fp32"]), *(f"{name}={x}" for name, x in launch.constexprs)])


def write_counts(path: Path, cases: "Counter[Launch]", emulator: "Emulator") -> None:
    """How many tests launched each variant, and how many issues it had."""
    rows = [
        [launch.kernel.__name__, variant_name(launch), count, emulator.faults[launch]]
        for launch, count in sorted(cases.items(), key=lambda item: (item[0].kernel.__name__, variant_name(item[0])))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def read_counts(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, variant) -> (tests, issues), from all workers."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for path in sorted(folder.glob("*.json")):
        for kernel, variant, cases, issues in json.loads(path.read_text(encoding="utf-8")):
            before = found.get((kernel, variant), (0, 0))
            found[kernel, variant] = before[0] + cases, before[1] + issues
    return found
