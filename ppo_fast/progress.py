"""What a run shows and leaves behind: a live line, a table of answers, metrics as JSON Lines and TensorBoard events."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from ppo_fast.config import PPOConfig
from ppo_fast.errors import UserError
from ppo_fast.rollout import Rollout

SAMPLES_SHOWN = 5
TIME_PARTS = ("sample", "reward", "advantages", "learn")


class Progress:
    """Shows and records the metrics of each step; a context manager, so that files are closed whatever happens."""

    def __init__(self, config: PPOConfig, prompts_left_out: int = 0) -> None:
        self.config = config
        self.console = Console(quiet=config.quiet, file=sys.stdout)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=config.quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("PPO", total=config.total_steps)
        self.metrics_file: TextIO | None = None
        self.events: Any = None  # torch.utils.tensorboard.SummaryWriter
        if config.out is not None:
            self._open(Path(config.out))
        if prompts_left_out:
            self.console.print(f"{prompts_left_out} prompts are too long and were left out")

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics_file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
            self.samples_file = (folder / "samples.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()  # two runs in one folder would be drawn as one curve
            self.events = SummaryWriter(folder / "tensorboard")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.metrics_file is not None:
            self.metrics_file.close()
            self.samples_file.close()
        if self.events is not None:
            self.events.close()

    def show(self, metrics: dict[str, float], rollout: Rollout | None) -> None:
        """One step's line, and every `show_samples_every` steps its table of answers."""
        step = int(metrics["step"])
        if self.metrics_file is not None:
            self.metrics_file.write(json.dumps(metrics) + "\n")
            self.metrics_file.flush()
        if self.events is not None:
            for name, value in metrics.items():
                self.events.add_scalar(name, value, step)
        self.bar.update(self.task, completed=step)
        self.console.print(_line(metrics, self.config.total_steps), soft_wrap=True)
        every = self.config.show_samples_every
        if rollout is not None and every and (step % every == 0 or step == 1):
            self._show_samples(rollout, step)

    def _show_samples(self, rollout: Rollout, step: int) -> None:
        table = Table(title=f"answers in step {step}", title_justify="left")
        table.add_column("prompt", ratio=1)
        table.add_column("answer", ratio=1)
        table.add_column("score", justify="right")
        for row in range(min(SAMPLES_SHOWN, len(rollout))):
            prompt, answer, value = rollout.columns["prompt"][row], rollout.completions[row], rollout.scores[row]
            table.add_row(Text(_shortened(prompt)), Text(_shortened(answer)), f"{value:.3f}")
            if self.metrics_file is not None:
                sample = {"step": step, "prompt": prompt, "answer": answer, "score": value}
                self.samples_file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        self.console.print(table)


def _line(metrics: dict[str, float], total_steps: int) -> str:
    """step 12/100  score 0.53  kl 0.010 ...  1.9 s: sample 45 %, reward 1 %, advantages 12 %, learn 42 %"""
    shown = {
        "score": metrics["score"],
        "kl": metrics.get("kl"),
        "clip": metrics["learn/clip_fraction"],
        "entropy": metrics["entropy"],
        "value loss": metrics["learn/value_loss"],
        "tokens": metrics["answer_tokens"],
    }
    numbers = "  ".join(f"{name} {x:.3f}" for name, x in shown.items() if x is not None)
    parts = {name: metrics[f"seconds/{name}"] for name in TIME_PARTS}
    total = sum(parts.values())
    split = ", ".join(f"{name} {100 * x / total:.0f} %" for name, x in parts.items())
    width = len(str(total_steps))
    return f"step {int(metrics['step']):{width}}/{total_steps}  {numbers}  {total:.2f} s: {split}"


def _shortened(text: str, longest: int = 160) -> str:
    """Text for a table cell: whitespace made visible as single spaces, the middle left out where it is long."""
    flat = " ".join(text.split()) if text.strip() else repr(text)
    return flat if len(flat) <= longest else f"{flat[: longest // 2]} ... {flat[-longest // 2 :]}"
