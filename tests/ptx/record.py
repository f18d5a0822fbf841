"""Records of what the interpreter found: where they are kept, and which commit and versions they belong to."""

import datetime
import platform
import subprocess
from pathlib import Path

import triton

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
