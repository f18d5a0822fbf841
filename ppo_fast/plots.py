"""Pictures of a run."""

from pathlib import Path

CURVES = {
    "score": "score (mean of a step's answers)",
    "validation": "right answers on held-out prompts",
    "kl": "KL to the reference (nats per token)",
    "entropy": "entropy (nats per token)",
    "learn/clip_fraction": "clip fraction",
    "explained_variance": "explained variance of the critic",
    "learn/grad_norm": "gradient norm of the actor",
}


def draw_learning_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """A PNG with one small plot for each of the first six curves that the history has."""
    from matplotlib.figure import Figure

    curves = {name: label for name, label in CURVES.items() if any(name in metrics for metrics in history)}
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3).flat
    for (name, label), axis in zip(list(curves.items())[:6], axes, strict=False):
        points = [(metrics["step"], metrics[name]) for metrics in history if name in metrics]
        axis.plot(*zip(*points, strict=True), color="#1f77b4", linewidth=1.4)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("PPO step")
        axis.grid(alpha=0.3)
    for axis in axes:  # those that no curve has taken
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
