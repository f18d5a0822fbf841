"""Records that are complete at every moment: JSON Lines, each line written as soon as it is known.

The first line is the header: machine, versions, commit, date, command. Each further line is a row. A run that is killed
leaves a record of everything that it measured.
"""

import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # to run from a checkout that is not installed

from ppo_fast.common.threads import POLICY, wait_passively

wait_passively()  # before torch is imported: every script of this folder that computes imports this module first

import torch  # noqa: E402

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "numba",
    "transformers",
    "flash-attn",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "verl",
    "openrlhf",
    "torchrl",
    "stable-baselines3",
    "rl-triton",
)


def machine() -> dict[str, Any]:
    """Versions, threads and the GPU."""
    found: dict[str, Any] = {"threads": torch.get_num_threads(), POLICY: os.environ.get(POLICY), "versions": {}}
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def foreign(path: Path) -> str:
    """Return why a file must not be overwritten: it is no record of a benchmark; "" if it is one, empty or missing."""
    if path.is_dir():
        return f"{path} is a folder: name a file in it"
    head = path.read_bytes()[:1000] if path.exists() else b""
    if not head.strip() or b'"machine_info"' in head or (b'"commit"' in head and b'"versions"' in head):
        return ""
    return f"{path} is no record of these benchmarks and would be overwritten: choose another name"


def check_own(path: Path | None) -> None:
    """End the program with a message if the file must not be overwritten."""
    if path is not None and (problem := foreign(path)):
        raise SystemExit(problem)


def processor() -> str:
    """The name of the processor, where the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


class Writer:
    """Writes a record, counts the rows that failed, and checks a time budget."""

    def __init__(
        self, path: Path, commit: str, budget: float | None = None, *, arguments: Sequence[str] | None = None
    ) -> None:
        """Args:
        arguments: of the command, for the header, where those of this process name paths of a machine.
        """
        self.path = path
        self.budget = budget
        self.failed = 0
        self.started = time.monotonic()
        check_own(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        place = {
            "python_version": platform.python_version(),
            "cpu": {"brand_raw": processor()},
            **machine(),
        }
        date = datetime.datetime.now(datetime.UTC).isoformat()
        shown = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", os.path.relpath(sys.argv[0]), *shown])
        header = {"machine_info": place, "commit_info": {"id": commit}, "datetime": date, "command": command}
        path.write_text(json.dumps(header) + "\n")

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def measure(self, about: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        """Write a row of `about` and the call's results; a row without enough memory or time is recorded as such.

        A row with "passed" false, or whose call raises another error, counts as failed.
        """
        start = time.monotonic()
        row = dict(about)
        if self.budget is not None and start - self.started > self.budget:
            row["skipped"] = f"the budget of {self.budget:g} s is spent"
        else:
            try:
                row |= call()
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = str(error).splitlines()[0]
            except Exception as error:  # whatever a compiler, driver or library raises is a result, and others follow
                row |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
            row["seconds"] = round(time.monotonic() - start, 3)
        self.failed += row.get("passed") is False
        self.add(row)
        print(json.dumps(row), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def read(path: Path) -> dict[str, Any]:
    """Read a record in the form of pytest-benchmark's JSON; the last line may be incomplete."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header, rows = json.loads(lines[0]), []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return {**header, "benchmarks": [{"extra_info": row} for row in rows]}
