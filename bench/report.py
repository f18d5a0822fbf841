"""Tables and pictures from the records of the benchmarks.

    pytest bench --size default --benchmark-json bench/results/MACHINE/NAME.json --benchmark-save-data
    python bench/report.py bench/results/MACHINE/*.json

writes README.md and one picture per operation into the folder of the records. A record without machine, versions and
commit is refused. The shortest time of a group is bold, whoever's it is.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "#c0392b"
OTHERS = "#7f8c8d"

Row = dict[str, Any]


class BadRecord(Exception):
    """A file that is no record, or one that does not say where it comes from."""


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Facts of a record, and its rows."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        machine, commit, rows = record["machine_info"], record["commit_info"]["id"], record["benchmarks"]
        versions = machine["versions"]
        cpu = machine["cpu"]["brand_raw"]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRecord(f"{path} is no record of these benchmarks: {error!r}") from error
    if not commit or commit == "unknown" or not versions.get("torch"):
        raise BadRecord(f"{path} lacks the commit or the versions that it was measured with")
    if not rows:
        raise BadRecord(f"{path} has no rows")
    gpu = machine.get("gpu")
    facts = {
        "machine": gpu["name"] if gpu else f"{cpu}, {machine['threads']} threads",
        "python": machine["python_version"],
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items() if v),
        "commit": commit[:10],
        "date": record["datetime"][:10],
    }
    return facts, [row["extra_info"] for row in rows]


def groups_of(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """operation -> shape and dtype -> rows."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        shape = f"{row['shape']}, {row['dtype']}"
        found.setdefault(row["operation"], {}).setdefault(shape, []).append(row)
    return found


def spread(row: Row) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the samples, in ms."""
    deciles = statistics.quantiles(row["samples_ms"], n=10, method="inclusive")
    return statistics.median(row["samples_ms"]), deciles[1], deciles[7]


def shown(ms: float) -> str:
    if ms < 1:
        return f"{1e3 * ms:.3g} us"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| | median | 20 % ... 80 % | times ours | peak extra memory | largest error |",
        "|---|---|---|---|---|---|",
    ]
    ours = next((spread(row)[0] for row in rows if row["provider"] == "ppo_fast"), None)
    best = min(spread(row)[0] for row in rows)
    for row in sorted(rows, key=lambda row: spread(row)[0]):
        median, low, high = spread(row)
        time = f"**{shown(median)}**" if median == best else shown(median)
        ratio = "" if ours is None else f"{median / ours:.2f}"
        error = f"{row['max_error']:.1e}" if "max_error" in row else ""
        memory = f"{row['peak_extra_bytes'] / 2**20:.1f} MiB"
        lines.append(f"| {row['provider']} | {time} | {shown(low)} ... {shown(high)} | {ratio} | {memory} | {error} |")
    first = rows[0]
    if first["bytes"]:
        lines += ["", f"Copying {first['bytes'] / 2**20:.3g} MiB in and out takes {shown(first['floor_ms'])}."]
    return lines


def draw(operation: str, shapes: dict[str, list[Row]], path: Path) -> None:
    """Horizontal bars per shape: time on the left, peak memory on the right, each with its number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(rows) for rows in shapes.values()]
    figure, axes = plt.subplots(
        len(shapes),
        2,
        figsize=(11, 0.32 * sum(heights) + 0.9 * len(shapes)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for (shape, rows), (left, right) in zip(shapes.items(), axes, strict=True):
        rows = sorted(rows, key=lambda row: -spread(row)[0])
        names = [row["provider"] for row in rows]
        colours = [OURS if name.startswith("ppo_fast") else OTHERS for name in names]
        times, sizes = [spread(row)[0] for row in rows], [row["peak_extra_bytes"] / 2**20 for row in rows]
        left.bar_label(left.barh(names, times, color=colours), map(shown, times), padding=3, fontsize=8)
        right.bar_label(right.barh(names, sizes, color=colours), [f"{x:.3g}" for x in sizes], padding=3, fontsize=8)
        right.set_yticklabels([])
        left.set_title(shape, loc="left", fontsize=9)
        for axis in (left, right):
            axis.margins(x=0.15)
            axis.tick_params(labelsize=8)
            axis.set_xticks([])
            axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[-1][0].set_xlabel("median time")
    axes[-1][1].set_xlabel("peak extra memory, MiB")
    figure.suptitle(operation, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(paths: Sequence[Path], folder: Path) -> None:
    """README.md and pictures for records of one machine."""
    lines = ["# Measured", "", "Made by `python bench/report.py` from the records beside this page.", ""]
    body: list[str] = []
    sources: dict[str, list[str]] = {}
    for path in paths:
        facts, rows = read(path)
        where = "{machine}; Python {python}; {versions}; commit {commit}, {date}".format(**facts)
        sources.setdefault(where, []).append(f"[{path.name}]({path.name})")
        for operation, shapes in groups_of(rows).items():
            picture = "".join(c if c.isalnum() else "-" for c in operation.split(":")[0]) + ".png"
            draw(operation, shapes, folder / picture)
            body += ["", f"## {operation}", "", f"![{operation}]({picture})"]
            for shape, group in shapes.items():
                body += ["", f"### {shape}", "", *table(group)]
    lines += [f"- {', '.join(names)}: {where}" for where, names in sources.items()]
    (folder / "README.md").write_text("\n".join(lines + body) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="JSON records, all in one folder: one machine")
    options = parser.parse_args(arguments)
    folders = {path.parent for path in options.records}
    if len(folders) > 1:
        parser.error(f"the records lie in {len(folders)} folders; a report is about one machine")
    try:
        write(options.records, folders.pop())
    except (BadRecord, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
