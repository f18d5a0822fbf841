"""What a run of classic.py shows and leaves behind: a progress line, metrics as JSON Lines, TensorBoard events."""

import dataclasses
import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from ppo_fast.common.checkpoint import GrowingFile, remove, reported, write_file
from ppo_fast.common.console import Output
from ppo_fast.common.errors import UserError
from ppo_fast.common.logger import Events, step_in
from ppo_fast.common.plots import can_draw, draw_learning_curves

LIVE_EVERY, FIRST_LINE, LINES_EVERY = 0.5, 2.0, 5.0  # seconds between lines; without a terminal they are added
BAR = 20  # characters
FILES = ("summary.json", "config.json", "learning_curves.png", "episode.gif")  # of a run, besides metrics.jsonl
FOLDERS = ("checkpoints", "tensorboard", "frames")
CURVES = {
    "return": "return (mean of the last 100 episodes)",
    "episode_length": "steps of an episode",
    "entropy": "entropy (nats per action)",
    "approx_kl": "KL of an update (nats)",
    "clip_fraction": "clip fraction",
    "explained_variance": "explained variance of the values",
}


class Log:
    """Metrics as JSON Lines and TensorBoard events, and a line of progress; a context manager.

    A thread shows the progress, so that a slow environment does not delay it.

    Args:
        config: of the run.
        steps_done: steps before this run; later rows of the metrics are removed.
        recent: how many episodes the reported return is the mean of.
        position: gives the steps done by now, also within a rollout; None: those of the last recorded metrics.
    """

    def __init__(self, config: Any, steps_done: int, recent: int, position: Callable[[], int] | None = None) -> None:
        self.config, self.began, self.recent, self.start = config, steps_done, recent, time.perf_counter()
        self.position = position or (lambda: int(self.metrics.get("step", self.began)))
        self.doing: Callable[[], str] | None = None  # what is shown instead of the progress
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float | None]] = []  # as in metrics.jsonl
        self.file: GrowingFile | None = None
        self.events: Events | None = None
        self.output = None if config.quiet or sys.stdout is None else Output(cast(TextIO, sys.stdout))
        self.live, self.open_line = self.output is not None and self.output.isatty(), False
        self.lock, self.ended = threading.RLock(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if config.out is None:
            return
        self._open(Path(config.out), steps_done)

    def _open(self, folder: Path, steps_done: int) -> None:
        """Opens the files of a run that begins, or that continues after `steps_done`."""
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
            continued = path.exists() and not c.overwrite
            rows = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if continued else []
            kept = [  # half a line is no row, and what is later will be done again
                row for number, row in enumerate(rows, start=1) if step_in(row, f"{path}, line {number}") <= steps_done
            ]
            if c.overwrite:
                _remove_run(folder)
            write_file(path, "".join(row + "\n" for row in kept))
            write_file(folder / "config.json", json.dumps(dataclasses.asdict(c), indent=2) + "\n")
            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()  # two runs in one folder would be drawn as one curve
        self.history = [json.loads(row) for row in kept]
        self.file = GrowingFile(path)
        if c.tensorboard:
            self.events = Events(folder / "tensorboard")
            for row in self.history:
                self.events.add(row)

    def __enter__(self) -> "Log":
        if self.output is not None:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_watching()
        for stream in (self.file, self.events):
            if stream is not None:
                stream.close()

    def _stop_watching(self) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        self._end_line()

    def _watch(self) -> None:
        wait = LIVE_EVERY if self.live else FIRST_LINE
        while not self.ended.wait(wait):
            self.show()
            elapsed = time.perf_counter() - self.start
            wait = LIVE_EVERY if self.live else min(max(LINES_EVERY, elapsed / 50), 60.0)

    def record(self, metrics: dict[str, float]) -> None:
        """Keeps the metrics of an update, and shows those of the last one."""
        if self.config.out is not None:
            finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
            self.history.append(finite)
        if self.file is not None:
            self.file.write_row(finite)
        if self.events is not None:
            self.events.add(metrics)
        self.metrics = metrics
        if metrics["step"] >= self.config.total_steps:
            self.show()

    def line(self) -> str:
        """The progress by now: steps, speed, time left, and the metrics of the last update."""
        if self.doing is not None:
            return self.doing()
        total, done, metrics = self.config.total_steps, self.position(), self.metrics
        speed = max(done - self.began, 1) / max(time.perf_counter() - self.start, 1e-9)
        filled = round(BAR * min(done / total, 1.0))
        wide = shutil.get_terminal_size().columns >= 3 * BAR  # else the bar would leave no room for the time left
        text = f"[{'#' * filled}{'.' * (BAR - filled)}] " if self.live and wide else ""
        text += f"{done}/{total} steps  {speed:.0f}/s  {_duration((total - done) / speed)} left"
        forms = {"return": "return {:.4g}", "entropy": "entropy {:.3f}", "approx_kl": "kl {:.4f}"}
        forms |= {"clip_fraction": "clip {:.3f}", "explained_variance": "explained variance {:.2f}"}
        return "  ".join([text, *(form.format(metrics[name]) for name, form in forms.items() if name in metrics)])

    def show(self) -> None:
        """Prints the progress."""
        with self.lock:
            if self.output is None:
                return
            if self.live:
                columns = shutil.get_terminal_size().columns
                self.output.write(f"\r{self.line()[: columns - 1]}\x1b[K")  # a line that wraps could not be replaced
                self.open_line = True
            else:
                self.output.write(self.line() + "\n")
            self.output.flush()

    def _end_line(self) -> None:
        with self.lock:
            if self.open_line and self.output is not None:
                self.output.write("\n")
                self.open_line = False

    def say(self, text: str) -> None:
        """Prints a sentence."""
        with self.lock:
            self._end_line()
            if self.output is not None:
                self.output.write(text + "\n")
                self.output.flush()

    def close_with(self, summary: dict[str, Any]) -> None:
        """Writes summary and curves to OUT, and says what came out and where it is."""
        self._stop_watching()
        out = None if self.config.out is None else Path(self.config.out)
        if out is not None:
            with reported(f"{out / 'summary.json'} could not be written", out / "summary.json"):
                write_file(out / "summary.json", json.dumps(summary, indent=2) + "\n")
            if can_draw():
                title = f"PPO on {self.config.env}"
                draw_learning_curves(self.history, out / "learning_curves.png", title, CURVES, "steps of environments")
        text = f"{summary['steps']} steps in {summary['seconds']:.1f} s, {summary['episodes']} episodes"
        if summary["return"] is not None:
            text += f", last {self.recent}: mean return {summary['return']:.4g}"
        self.say(text)
        if summary["eval_returns"]:
            low, high = min(summary["eval_returns"]), max(summary["eval_returns"])
            self.say(
                f"evaluation, likeliest actions, {len(summary['eval_returns'])} episodes:"
                f" mean return {summary['eval_return']:.4g}, {low:.4g} to {high:.4g}"
            )
        if out is None:
            self.say("nothing was saved: --out FOLDER keeps the policy, metrics and curves")
            return
        found = [name for name in ("metrics.jsonl", *FOLDERS, *FILES) if (out / name).exists()]
        self.say(f"{', '.join(found[:-1])} and {found[-1]} are in {out}; to use the policy:")
        self.say(f"  ppo_fast.classic.load({str(out)!r}).act(observation)")


def _remove_run(folder: Path) -> None:
    """Removes what an earlier run has left in its folder, and nothing else."""
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
