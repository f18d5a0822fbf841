"""Shared by the examples whose answers are right or wrong: an early end of PPO, and the files and table of a run."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ppo_fast.common.checkpoint import reported, write_file
from ppo_fast.common.console import say
from ppo_fast.common.plots import can_draw, draw_learning_curves
from ppo_fast.llm.trainer import AfterStep, PPOTrainer

FILES = ("summary.json", "learning_curves.png", "metrics.jsonl", "samples.jsonl", "tensorboard", "model")


def until_good(console: Console, share: Callable[[], float], *, every: int, enough: float) -> AfterStep:
    """Make a function that ends PPO early: it is called after each step.

    Args:
        console: where it prints.
        share: returns the share of right answers to validation problems.
        every: number of steps between two validations.
        enough: share that ends PPO, if two validations in a row reach it.
    """
    shares: list[float] = []

    def good_enough(trainer: PPOTrainer, metrics: dict[str, float]) -> bool:
        if trainer.steps_done % every == 0:
            metrics["validation"] = share()
            shares.append(metrics["validation"])
            say(console, f"validation {100 * shares[-1]:.1f} %")
        return len(shares) >= 2 and min(shares[-2:]) >= enough

    return good_enough


def write_results(
    out: Path, summary: Mapping[str, object], history: Sequence[Mapping[str, float | None]], title: str
) -> None:
    """Write summary.json and, where matplotlib is installed, learning_curves.png."""
    with reported(f"cannot write to {out}", out):
        write_file(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    if can_draw():
        draw_learning_curves(history, out / "learning_curves.png", title)


def say_files(console: Console, out: Path) -> None:
    """Print which files of a run are in its folder."""
    say(console, f"{', '.join(name for name in FILES if (out / name).exists())} are in {out}")
