"""Pictures of a report: time and memory against N, T or V where a record has three or more of them, else bars."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import (
    CEILINGS,
    OURS,
    Groups,
    Row,
    axes_of,
    floor_ms,
    has_floor,
    is_ours,
    memory_mib,
    shown,
    shown_number,
    spread,
)

RED, PALE_RED, BLACK, GREY = "#c0392b", "#e59866", "#222222", "#7f8c8d"
BASELINES = ("#2471a3", "#1e8449", "#7d3c98", "#b7950b", "#117864", "#5d6d7e", "#a04000", "#2e4053")
MEMORY_FLOOR = 1e-3  # MiB; a logarithm has no 0


def picture_of(operation: str, groups: Groups, folder: Path) -> list[Path]:
    """Draw the pictures of a record; return the files in order."""
    stem = "".join(c if c.isalnum() else "-" for c in operation.split(":")[0])
    drawn = []
    for axis, fixed, rows in sweeps(groups):
        told = " ".join(f"{name}={x}" for name, x in fixed.items())
        path = folder / f"{stem}-against-{axis}.png"
        if path in drawn:
            path = folder / f"{stem}-against-{axis}-{told.replace(' ', '-').replace('=', '')}.png"
        lines(f"{operation}, {told}" if told else operation, axis, rows, path)
        drawn.append(path)
    if not drawn:
        drawn = [folder / f"{stem}.png"]
        bars(operation, groups, drawn[0])
    return drawn


def sweeps(groups: Groups) -> Iterator[tuple[str, dict[str, int], list[Row]]]:
    """(axis, what stays, rows) for each axis that takes three or more values while all others stay."""
    rows = [row for group in groups.values() for row in group]
    found: dict[tuple[str, tuple[tuple[str, int], ...], str], list[Row]] = {}
    for row in rows:
        axes = axes_of(row)
        for axis in axes:
            others = tuple((name, x) for name, x in axes.items() if name != axis)
            found.setdefault((axis, others, row["dtype"]), []).append(row)
    for (axis, others, _), members in found.items():
        if len({axes_of(row)[axis] for row in members}) >= 3:
            yield axis, dict(others), members


def lines(title: str, axis: str, rows: list[Row], path: Path) -> None:
    """Time on the left with its floor, peak extra memory on the right, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = sorted({row["provider"] for row in rows}, key=lambda name: (name != OURS, not name.startswith(OURS), name))
    baselines = [name for name in names if not name.startswith(OURS) and name not in CEILINGS]
    for name in names:
        mine = sorted((row for row in rows if row["provider"] == name), key=lambda row: axes_of(row)[axis])
        x, times = [axes_of(row)[axis] for row in mine], [spread(row) for row in mine]
        look = style(name, baselines)
        left.plot(x, [t[0] for t in times], label=name, **look)
        left.fill_between(x, [t[1] for t in times], [t[2] for t in times], color=look["color"], alpha=0.15, lw=0)
        if name not in CEILINGS and all(memory_mib(row) is not None for row in mine):
            right.plot(x, [max(MEMORY_FLOOR, memory_mib(row) or 0) for row in mine], **look)
    floors = []
    for x in sorted({axes_of(row)[axis] for row in rows}):
        at_x = [row for row in rows if axes_of(row)[axis] == x]
        floors += [(x, floor_ms(at_x))] * has_floor(at_x[0])
    if floors:
        left.plot(*zip(*floors, strict=True), color=BLACK, ls="--", lw=1, label="floor")
    for panel, told in ((left, "median time, ms"), (right, "peak extra memory, MiB")):
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_title(told, loc="left", fontsize=9)
        ticks = sorted({axes_of(row)[axis] for row in rows})
        panel.set_xticks(ticks, [str(t) for t in ticks], rotation=30 if len(ticks) > 4 else 0)
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def style(name: str, baselines: list[str]) -> dict[str, Any]:
    if name == OURS:
        return {"color": RED, "lw": 2.5, "marker": "o", "zorder": 5}
    if name.startswith(OURS):
        marker = "o^vD"[sum(name.encode()) % 4]  # distinguishes our variants
        return {"color": PALE_RED, "lw": 1.5, "marker": marker, "ms": 5, "zorder": 4}
    if name in CEILINGS:
        return {"color": BLACK, "lw": 1, "ls": ":"}
    return {"color": BASELINES[baselines.index(name) % len(BASELINES)], "lw": 1.3, "marker": "s", "ms": 4}


def bars(operation: str, groups: Groups, path: Path) -> None:
    """Horizontal bars per shape: time on the left with its floor, peak memory on the right, each with its number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(rows) for rows in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(11, 0.32 * sum(heights) + 0.9 * len(groups)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for (shape, rows), (left, right) in zip(groups.items(), axes, strict=True):
        rows = sorted(rows, key=lambda row: -spread(row)[0])
        names = [row["provider"] for row in rows]
        colours = [RED if n == OURS else PALE_RED if is_ours(r) else GREY for n, r in zip(names, rows, strict=True)]
        times, sizes = [spread(row)[0] for row in rows], [memory_mib(row) or 0 for row in rows]
        left.bar_label(left.barh(names, times, color=colours), map(shown, times), padding=3, fontsize=8)
        right.bar_label(right.barh(names, sizes, color=colours), map(shown_number, sizes), padding=3, fontsize=8)
        if has_floor(rows[0]):
            left.axvline(floor_ms(rows), color=BLACK, ls="--", lw=1)
        right.set_yticklabels([])
        left.set_title(shape, loc="left", fontsize=9)
        for axis in (left, right):
            axis.margins(x=0.15)
            axis.tick_params(labelsize=8)
            axis.set_xticks([])
            axis.spines[["top", "right", "bottom"]].set_visible(False)
    dashed = "; dashed: floor" if any(has_floor(row) for rows in groups.values() for row in rows) else ""
    axes[-1][0].set_xlabel(f"median time{dashed}")
    axes[-1][1].set_xlabel("peak extra memory, MiB")
    figure.suptitle(operation, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
