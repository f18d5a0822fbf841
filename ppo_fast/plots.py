"""Pictures of a run."""

from pathlib import Path

CURVES = {
    "score": "score (mean of a step's answers)",
    "kl": "KL to the reference (nats per token)",
    "entropy": "entropy (nats per token)",
    "learn/clip_fraction": "clip fraction",
    "explained_variance": "explained variance of the critic",
    "learn/grad_norm": "gradient norm of the actor",
}


def draw_learning_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """A PNG with one small plot for each curve that the history has."""
    from matplotlib.figure import Figure

    curves = {name: label for name, label in CURVES.items() if name in history[0]}
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3).flat
    steps = [metrics["step"] for metrics in history]
    for axis, (name, label) in zip(axes, curves.items(), strict=False):
        axis.plot(steps, [metrics[name] for metrics in history], color="#1f77b4", linewidth=1.4)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("PPO step")
        axis.grid(alpha=0.3)
    for axis in axes:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
