"""Learning curves, and the quantities of one response token by token, as PNG files."""

import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_fast.common.checkpoint import reported, write_file

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "score": "score (mean of the responses of a step)",
    "validation": "right answers on held-out prompts",
    "eval/score": "score on held-out prompts",
    "kl": "KL to the reference (nats per token)",
    "entropy": "entropy (nats per token)",
    "learn/clip_fraction": "clip fraction",
    "explained_variance": "explained variance of the critic",
    "learn/grad_norm": "gradient norm of the actor",
}


def can_draw() -> bool:
    """Check whether matplotlib is installed; without it a run has no pictures."""
    return find_spec("matplotlib") is not None


def _save(figure: "Figure", path: Path, dpi: int) -> None:
    """Write the picture as a PNG, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    with reported(f"the picture {path} could not be written", path):
        write_file(path, buffer.getvalue())


def draw_learning_curves(
    history: Sequence[Mapping[str, float | None]],
    path: Path,
    title: str,
    labels: Mapping[str, str] = CURVES,
    step_label: str = "PPO step",
) -> None:
    """Draw a PNG with one small plot over the steps for each of the first six `labels` in the history."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = {name: label for name, label in labels.items() if any(m.get(name) is not None for m in history)}
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3).flat
    for (name, label), axis in zip(list(curves.items())[:6], axes, strict=False):
        points = [(metrics["step"], metrics[name]) for metrics in history if metrics.get(name) is not None]
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= FEW_POINTS else None
        axis.plot(steps, values, color="#1f77b4", linewidth=1.4, marker=marker, markersize=4)
        axis.set_xlim(*_steps_shown([metrics["step"] for metrics in history]))
        axis.set_ylim(*range_shown(values))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel(step_label)
        axis.grid(alpha=0.3)
    for axis in axes:  # without a curve
        axis.set_visible(False)
    _save(figure, path, dpi=120)


FEW_POINTS = 20  # up to this number, each point has a marker
SMALLEST = 1e-5  # half of the smallest range of an axis: differences below are noise of fp32


def _steps_shown(steps: Sequence[float | None]) -> tuple[float, float]:
    """Return the range of the axis of steps; of a single one, from the step before to the step after."""
    known = [x for x in steps if x is not None]
    low, high = min(known), max(known)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def range_shown(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis for these values: from the smallest to the largest, with a margin.

    For a constant it is a tenth of it to both sides, for zeros -0.1 to 0.1.
    """
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, 1.1 * (high - low) / 2
    largest = max(abs(low), abs(high))
    if high - low <= SMALLEST * largest or largest <= SMALLEST:
        half = 0.1 * largest if largest > SMALLEST else 0.1
    return middle - half, middle + half


TOKENS_DRAWN = 150  # a longer picture could not be read

LABELS = {
    "reward": "reward\n(KL penalty in it)",
    "kl": "KL to the\nreference (nats)",
    "value": "value",
    "advantage": "advantage",
    "ratio": "ratio after the\nstep (log scale)",
}


def draw_tokens(
    tokens: list[str], numbers: dict[str, list[float]], path: Path, title: str, clip: tuple[float, float]
) -> None:
    """Draw a PNG with one row for each quantity over the tokens of a response, the first TOKENS_DRAWN of them.

    `clip` is (clip_low, clip_high): dashed lines show where the gradient of the ratio becomes 0.
    """
    from matplotlib.figure import Figure

    count = min(len(tokens), TOKENS_DRAWN)
    if count < len(tokens):
        title += f" (the first {count} of {len(tokens)} tokens)"
    figure = Figure(figsize=(max(8.0, 1.6 + 0.24 * count), 1.5 + 1.25 * len(numbers)), layout="constrained")
    figure.suptitle(_drawable(title), fontsize=10, parse_math=False)
    axes = figure.subplots(len(numbers), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, numbers.items(), strict=True):
        _bars(axis, name, values[:count], clip)
    axes[-1].set_xticks(
        range(count), [_drawable(x[:16]) for x in tokens[:count]], rotation=90, fontsize=8, parse_math=False
    )
    axes[-1].set_xlim(-0.7, max(count, 10) - 0.3)
    _save(figure, path, dpi=110)


def _bars(axis: "Axes", name: str, values: list[float], clip: tuple[float, float]) -> None:
    """Draw bars from 0, or for a ratio from 1; blue upwards, red downwards."""
    heights = [math.log(x) if name == "ratio" else x for x in values]
    axis.bar(range(len(values)), heights, color=["#d62728" if x < 0 else "#1f77b4" for x in heights], width=0.8)
    axis.axhline(0, color="black", linewidth=0.6)
    if name == "ratio":
        bounds = [math.log(x) for x in (1 - clip[0], 1 + clip[1]) if x > 0]
        for bound in bounds:
            axis.axhline(bound, color="grey", linewidth=0.8, linestyle="--")
        most = max(abs(x) for x in [*heights, *bounds]) * 1.15 or 1.0
        axis.set_ylim(-most, most)
        ticks = [-most / 1.15, 0, most / 1.15]
        axis.set_yticks(ticks, [f"{math.exp(x):.2f}" for x in ticks])
    axis.set_ylabel(LABELS[name], fontsize=8, rotation=0, ha="right", va="center")
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", alpha=0.3)


def _drawable(text: str) -> str:
    """Replace each character that matplotlib's font lacks by a box: matplotlib would warn about every one."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else "\u25a1" for c in text)
