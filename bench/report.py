"""Tables and pictures from the records of the benchmarks.

    pytest bench --record runs/bench/NAME.jsonl
    python bench/report.py runs/bench/*.jsonl [--out FOLDER]

writes README.md and the pictures into a folder that is new, empty, or an earlier report (default: runs/report). The
page of this repository is made with --out bench/results/MACHINE. A record without machine, versions and commit is
rejected. The shortest time of a group is bold, also that of a baseline, and the page begins with the cells in which a
baseline is better. Records of bench/against_*.py (whole programs) get a table of medians.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import json_lines
from plots import picture_of
from rows import (
    CEILINGS,
    OURS,
    Groups,
    Row,
    floor_ms,
    groups_of,
    has_floor,
    is_rival,
    memory_mib,
    shown,
    shown_number,
    spread,
)

from ppo_fast.common.errors import UserError
from ppo_fast.common.folders import claim

LEGEND = """\
Each row is one way to do the same work on the same inputs in one process. *Times ours*: below 1 is faster than
ppo_fast. *Of the floor*: the time that the bytes and FLOPs of the task take at least, at the rates of a large copy and
of a library's matrix product of that shape, both measured in the same process, divided by the row's time (small data
that stays in the caches can beat it). *Launches*: kernels started on the GPU. *Error*: largest absolute difference
from fp64. *Peak extra memory*: what the call held at once beyond its inputs, gradients counted; NumPy's own arrays are
not seen. A time is the median, with the 20th and 80th percentile behind it.
"""


class BadRecord(Exception):
    """A file that is no record, or a record without machine, versions and commit."""


class Record(NamedTuple):
    path: Path
    title: str  # of a whole program
    source: str  # machine, versions, commit, date in words
    rows: list[Row]  # of `pytest bench`
    runs: dict[str, list[dict[str, Any]]]  # of whole programs


def read(path: Path) -> list[Record]:
    """The record of a file; several where it holds a whole program's for several tasks."""
    try:
        record = json_lines.read(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError("not an object")
        if "runs" in record:
            return [program(path, path.stem, record)]
        if record and all(isinstance(x, dict) and "runs" in x for x in record.values()):
            return [program(path, f"{path.stem}, {name}", x) for name, x in record.items()]
        return [benchmarks(path, record)]
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRecord(f"{path} is no record of these benchmarks: {error!r}") from error


def benchmarks(path: Path, record: dict[str, Any]) -> Record:
    """pytest-benchmark's JSON with what conftest.py adds."""
    machine, commit = record.get("machine_info") or {}, record.get("commit_info") or {}
    versions, cpu = machine.get("versions") or {}, (machine.get("cpu") or {}).get("brand_raw")
    gpu = machine.get("gpu")
    check_header(path, commit.get("id"), cpu or gpu, versions)
    rows = [row["extra_info"] for row in record["benchmarks"] if row["extra_info"].get("samples_ms")]
    if not rows:
        raise BadRecord(f"{path} has no rows")
    place = f"{gpu['name']}, CUDA {gpu.get('cuda', '?')}" if gpu else f"{cpu}, {machine['threads']} threads"
    changed = ", with changes" if commit.get("dirty") else ""
    source = (
        f"{place}; Python {machine['python_version']}; {named(versions)}; commit {commit['id'][:10]}{changed},"
        f" {record['datetime'][:10]}"
    )
    return Record(path, "", source, rows, {})


def program(path: Path, title: str, record: dict[str, Any]) -> Record:
    """{"date", "commit", "machine", "versions", "runs": {who: [{quantity: number or one for each step}]}}"""
    check_header(path, record.get("commit"), record.get("machine"), record.get("versions") or {})
    machine = ", ".join(f"{name} {x}" for name, x in record["machine"].items() if x)
    source = f"{machine}; {named(record['versions'])}; commit {record['commit'][:10]}, {record['date']}"
    return Record(path, title, source, [], record["runs"])


def check_header(path: Path, commit: object, machine: object, versions: dict[str, Any]) -> None:
    missing = [
        what
        for what, is_there in (
            ("the commit", commit and commit != "unknown"),
            ("the machine", machine),
            ("the versions", versions.get("torch")),
        )
        if not is_there
    ]
    if missing:
        raise BadRecord(f"{path} lacks {' and '.join(missing)} that it was measured with")


def named(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {v}" for name, v in versions.items() if v)


def table(rows: list[Row]) -> list[str]:
    """One group, fastest first; columns that no row fills are left out."""
    ours = next((spread(row)[0] for row in rows if row["provider"] == OURS), None)
    baselines = [spread(row)[0] for row in rows if row["provider"] not in CEILINGS]
    best = min(baselines, default=None)
    lines: list[dict[str, str]] = []
    for row in sorted(rows, key=lambda row: spread(row)[0]):
        median, low, high = spread(row)
        cells = {
            "": f"*{row['provider']}*" if row["provider"] in CEILINGS else row["provider"],
            "median": f"**{shown(median)}**" if median == best else shown(median),
            "20 % ... 80 %": f"{shown(low)} ... {shown(high)}",
            "times ours": "" if ours is None else f"{median / ours:.2f}",
            "of the floor": f"{100 * floor_ms(rows) / median:.3g} %" if has_floor(row) else "",
            "in a CUDA graph": shown(statistics.median(row["replay_ms"])) if "replay_ms" in row else "",
            "call, host": shown(row["call_us"] / 1e3) if "call_us" in row else "",
            "launches": str(row.get("launches", "-")).replace("-", ""),
            "peak extra memory": "" if memory_mib(row) is None else f"{shown_number(memory_mib(row))} MiB",
            "error": "" if row.get("max_error") is None else f"{row['max_error']:.1e}",
        }
        lines.append(cells)
    columns = [name for name in lines[0] if name == "" or any(line[name] for line in lines)]
    text = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    text += ["| " + " | ".join(line[name] for name in columns) + " |" for line in lines]
    return [*text, *floor_in_words(rows)]


def floor_in_words(rows: list[Row]) -> list[str]:
    row, floor = rows[0], floor_ms(rows)
    if not row["bytes"] or not has_floor(row):
        return []
    text = f"Floor {shown(floor)}: {row['bytes'] / 2**20:.3g} MiB at {row['copy_gb_per_s']:.4g} GB/s"
    if "gemm" in row:
        text += f", {row['flops'] / 1e12:.3g} TFLOP at {row['gemm_tflop_per_s']:.3g} TFLOP/s (GEMM {row['gemm']})"
    if floor < row["floor_ms"]:
        text += ", or the time of a ceiling, which is less"
    cache = f" L2 {row['l2']}." if row.get("l2", "").startswith("cold") else ""
    return ["", f"{text}.{cache}"]


def parts_table(rows: list[Row]) -> list[str]:
    """Amdahl: the share of each part in a step."""
    split = [row for row in rows if row.get("parts_ms")]
    if not split:
        return []
    names = list(split[0]["parts_ms"])
    lines = [
        "",
        "Shares of the parts, each measured alone:",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1),
    ]
    lines[-1] += "|"
    for row in split:
        whole = sum(row["parts_ms"].values())
        cells = [f"{shown(ms)}, {100 * ms / whole:.0f} %" for ms in row["parts_ms"].values()]
        lines.append(f"| {row['provider']} | {' | '.join(cells)} |")
    return lines


def behind(operations: dict[str, Groups]) -> list[str]:
    """Where a baseline, or a variant of ours, is faster than ours, or a baseline needs less memory, in words."""
    lines: list[str] = []
    for operation, groups in operations.items():
        for shape, rows in groups.items():
            ours = next((row for row in rows if row["provider"] == OURS), None)
            if ours is None:
                continue
            for row in rows:
                if row is ours or row["provider"] in CEILINGS:
                    continue
                time = spread(ours)[0] / spread(row)[0]
                faster = f"{time:.2f} times as fast" if time > 1 else ""
                theirs, mine = memory_mib(row), memory_mib(ours)
                smaller = ""
                if is_rival(row) and theirs is not None and mine is not None and theirs < 0.95 * mine:
                    smaller = f"needs {shown_number(theirs)} instead of {shown_number(mine)} MiB"
                if faster or smaller:
                    lines.append(
                        f"- {operation}, {shape}: {row['provider']}, {', '.join(filter(None, (faster, smaller)))}"
                    )
    return lines or ["Nowhere in these records."]


def listed(x: Any) -> list[Any]:
    """The steps of a run without the first, a warm-up; a number that is not one for each step as it is."""
    return (x[1:] or x) if isinstance(x, list) else [x]


def is_number(x: Any) -> bool:
    """A number, or None where there was nothing to count."""
    return x is None or isinstance(x, (int, float))


def runs_table(record: Record) -> list[str]:
    """Medians of a whole program's runs: of its numbers, or of those of all steps."""
    first = next(iter(record.runs.values()))[0]
    quantities = [name for name, x in first.items() if name != "seed" and all(map(is_number, listed(x)))]
    lines = [f"| | {' | '.join(quantities)} |", "|---" * (len(quantities) + 1) + "|"]
    for who, runs in record.runs.items():
        cells = []
        for name in quantities:
            found = [x for run in runs if name in run for x in listed(run[name]) if is_number(x)]
            numbers = [x for x in found if x is not None]
            cell = [shown_number(statistics.median(numbers))] if numbers else []
            if len(numbers) < len(found):
                cell.append(f"({len(found) - len(numbers)} of {len(found)} never)")
            cells.append(" ".join(cell))
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return lines


def page(records: list[Record], folder: Path) -> str:
    rows = [row for record in records for row in record.rows]
    operations = groups_of(rows)
    sources: dict[str, list[str]] = {}
    for record in records:
        link = f"[{record.path.name}]({Path(os.path.relpath(record.path, folder)).as_posix()})"
        if link not in sources.setdefault(record.source, []):
            sources[record.source].append(link)
    lines = ["# Measured", "", "Made by `python bench/report.py` from these records:", ""]
    lines += [f"- {', '.join(names)}: {source}" for source, names in sources.items()]
    if rows:
        lines += ["", LEGEND, "## Where we are behind", "", *behind(operations)]
    for operation, groups in operations.items():
        lines += ["", f"## {operation}"]
        for picture in picture_of(operation, groups, folder):
            lines += ["", f"![{operation}]({picture.name})"]
        for shape, group in groups.items():
            lines += ["", f"### {shape}", "", *table(group), *parts_table(group)]
    for record in records:
        if record.runs:
            lines += [
                "",
                f"## Whole programs: {record.title}",
                "",
                "Medians over all runs, and over their steps but the first.",
                "",
            ]
            lines += runs_table(record)
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "records", nargs="+", type=Path, help="records (JSON, JSON Lines), all in one folder: one machine"
    )
    parser.add_argument(
        "--out", default="runs/report", type=Path, metavar="FOLDER", help="folder of the page (default: runs/report)"
    )
    options = parser.parse_args(arguments)
    folders = {path.parent for path in options.records}
    if len(folders) > 1:
        parser.error(f"the records are in {len(folders)} folders; a report is about one machine")
    try:
        records = [record for path in options.records for record in read(path)]
        folder = claim(options.out, "bench/report.py")
        text = page(records, folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
    except (BadRecord, UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"README.md and its pictures are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
