"""Output of a classic run: a progress line, metrics as JSON Lines and TensorBoard events, summary and curves."""

import dataclasses
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.common.checkpoint import remove, reported, write_file
from ppo_fast.common.console import Output
from ppo_fast.common.errors import UserError
from ppo_fast.common.jsonl import truncate_rows
from ppo_fast.common.logger import MetricsLog, remove_events
from ppo_fast.common.plots import can_draw, draw_learning_curves

LIVE_EVERY, FIRST_LINE, LINES_EVERY = 0.5, 2.0, 5.0  # seconds between lines; on a terminal one line is replaced
BAR = 20  # characters
FILES = ("summary.json", "config.json", "learning_curves.png", "episode.gif")  # of a run, besides metrics.jsonl
FOLDERS = ("checkpoints", "tensorboard", "frames")
NUM_RECENT = 100  # the reported return is the mean of this number of episodes
CURVES = {
    "return": f"return (mean of the last {NUM_RECENT} episodes)",
    "episode_length": "steps of an episode",
    "entropy": "entropy (nats per action)",
    "approx_kl": "KL of an update (nats)",
    "clip_fraction": "clip fraction",
    "explained_variance": "explained variance of the values",
}
SHOWN = {
    "return": "return {:.4g}",
    "entropy": "entropy {:.3f}",
    "approx_kl": "kl {:.4f}",
    "clip_fraction": "clip {:.3f}",
    "explained_variance": "explained variance {:.2f}",
}


Summary = TypedDict(
    "Summary",
    {
        "env": str,
        "steps": int,
        "episodes": int,
        "seconds": float,
        "steps_per_second": float,
        "return": float | None,
        "eval_returns": list[float],
        "eval_return": float | None,
    },
)


class RunLogger:
    """Writes the metrics of a run, and prints its progress; a context manager.

    A thread prints the progress, so that a slow environment does not delay it.

    Args:
        config: of the run.
        first_step: steps of environments before this run; later rows of the metrics are removed.
        current_step: returns the steps done so far, also within a rollout; None: those of the last logged metrics.
    """

    def __init__(self, config: ClassicConfig, first_step: int, current_step: Callable[[], int] | None = None) -> None:
        self.config, self.first_step, self.started = config, first_step, time.perf_counter()
        self.current_step = current_step or (lambda: int(self.latest.get("step", first_step)))
        self.phase: Callable[[], str] | None = None  # what is printed instead of the progress of the training
        self.latest: dict[str, float] = {}
        self.metrics = MetricsLog()
        self.output = None if config.quiet or sys.stdout is None else Output(sys.stdout)
        self.live, self.line_is_open = self.output is not None and self.output.isatty(), False
        self.lock, self.ended = threading.RLock(), threading.Event()
        self.thread = threading.Thread(target=self._print_regularly, daemon=True)
        if config.out is not None:
            self._open(Path(config.out))

    def _open(self, folder: Path) -> None:
        """Open the files of a run that starts, or that continues after `first_step`."""
        path, c = folder / "metrics.jsonl", self.config
        if (folder / "config.yaml").exists():
            raise UserError(f"{folder} holds a run of `ppo-fast train`: choose another --out")
        if path.exists() and not c.resume and not c.overwrite:
            raise UserError(
                f"{folder} already holds a run; choose another --out, continue it with --resume, or replace it with"
                " --overwrite"
            )
        with reported(f"cannot write to {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            if c.overwrite:
                _remove_run(folder)
            kept = truncate_rows(path, 0 if c.overwrite else self.first_step)
            write_file(folder / "config.json", json.dumps(dataclasses.asdict(c), indent=2) + "\n")
            remove_events(folder)
        self.metrics.open(folder, [json.loads(row) for row in kept], tensorboard=c.tensorboard)

    def __enter__(self) -> "RunLogger":
        if self.output is not None:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_printing()
        self.metrics.close()

    def _stop_printing(self) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        self._end_line()

    def _print_regularly(self) -> None:
        wait = LIVE_EVERY if self.live else FIRST_LINE
        while not self.ended.wait(wait):
            self.log_progress()
            elapsed = time.perf_counter() - self.started
            wait = LIVE_EVERY if self.live else min(max(LINES_EVERY, elapsed / 50), 60.0)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Store the metrics of an update, and print those of the last update."""
        if self.config.out is not None:
            self.metrics.write(metrics)
        self.latest = metrics
        if metrics["step"] >= self.config.total_steps:
            self.log_progress()

    def log_progress(self) -> None:
        """Print steps, speed, time left, and the metrics of the latest update."""
        with self.lock:
            if self.output is None:
                return
            if self.live:
                columns = shutil.get_terminal_size().columns
                self.output.write(f"\r{self.line()[: columns - 1]}\x1b[K")  # a line that wraps could not be replaced
                self.line_is_open = True
            else:
                self.output.write(self.line() + "\n")
            self.output.flush()

    def line(self) -> str:
        """Format the progress."""
        if self.phase is not None:
            return self.phase()
        total, done = self.config.total_steps, self.current_step()
        speed = max(done - self.first_step, 1) / max(time.perf_counter() - self.started, 1e-9)
        filled = round(BAR * min(done / total, 1.0))
        wide = shutil.get_terminal_size().columns >= 3 * BAR  # else the bar would leave no space for the time left
        text = f"[{'#' * filled}{'.' * (BAR - filled)}] " if self.live and wide else ""
        text += f"{done}/{total} steps  {speed:.0f}/s  {_duration((total - done) / speed)} left"
        return "  ".join([text, *(form.format(self.latest[x]) for x, form in SHOWN.items() if x in self.latest)])

    def _end_line(self) -> None:
        with self.lock:
            if self.line_is_open and self.output is not None:
                self.output.write("\n")
                self.line_is_open = False

    def info(self, text: str) -> None:
        """Print a sentence."""
        with self.lock:
            self._end_line()
            if self.output is not None:
                self.output.write(text + "\n")
                self.output.flush()

    def log_summary(self, summary: Summary) -> None:
        """Write summary and curves to OUT, and print the results and where they are."""
        self._stop_printing()
        out = None if self.config.out is None else Path(self.config.out)
        if out is not None:
            self._write_summary(out, summary)
        text = f"{summary['steps']} steps in {summary['seconds']:.1f} s, {summary['episodes']} episodes"
        if summary["return"] is not None:
            text += f", last {NUM_RECENT}: mean return {summary['return']:.4g}"
        self.info(text)
        if summary["eval_returns"]:
            low, high = min(summary["eval_returns"]), max(summary["eval_returns"])
            self.info(
                f"evaluation, most likely actions, {len(summary['eval_returns'])} episodes:"
                f" mean return {summary['eval_return']:.4g}, {low:.4g} to {high:.4g}"
            )
        if out is None:
            self.info("nothing was saved: --out FOLDER keeps the policy, metrics and curves")
            return
        found = [name for name in ("metrics.jsonl", *FOLDERS, *FILES) if (out / name).exists()]
        self.info(f"{', '.join(found[:-1])} and {found[-1]} are in {out}; to use the policy:")
        self.info(f"  ppo_fast.classic.load({str(out)!r}).act(observation)")

    def _write_summary(self, out: Path, summary: Summary) -> None:
        with reported(f"{out / 'summary.json'} could not be written", out / "summary.json"):
            write_file(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        if can_draw():
            title = f"PPO on {self.config.env}"
            draw_learning_curves(self.metrics.rows, out / "learning_curves.png", title, CURVES, "steps of environments")


def _remove_run(folder: Path) -> None:
    """Remove what an earlier run has written to its folder, and nothing else."""
    for name in FOLDERS:
        if (folder / name).exists():
            remove(folder / name)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
