"""What a run of classic.py shows and leaves behind: a progress line, metrics as JSON Lines, TensorBoard events."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from ppo_fast.checkpoint import GrowingFile, reported, write_file
from ppo_fast.errors import UserError
from ppo_fast.progress import Events, step_in


class Log:
    """Metrics as JSON Lines and TensorBoard events, and a line of progress; a context manager."""

    def __init__(self, config: Any, steps_done: int, recent: int) -> None:
        self.config, self.began, self.recent, self.start = config, steps_done, recent, time.perf_counter()
        self.file: GrowingFile | None = None
        self.events: Events | None = None
        self.shown, self.live = self.start, sys.stdout.isatty()
        if config.out is None:
            return
        folder = Path(config.out)
        path = folder / "metrics.jsonl"
        if path.exists() and not config.resume:
            raise UserError(f"{folder} already holds a run; continue it with --resume, or choose another --out")
        with reported(f"cannot write to {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            rows = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
            kept = [  # half a line is no row, and what is later will be done again
                row for number, row in enumerate(rows, start=1) if step_in(row, f"{path}, line {number}") <= steps_done
            ]
            write_file(path, "".join(row + "\n" for row in kept))
            write_file(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()  # two runs in one folder would be drawn as one curve
        self.file = GrowingFile(path)
        if config.tensorboard:
            self.events = Events(folder / "tensorboard")
            for row in kept:
                self.events.add(json.loads(row))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.file, self.events):
            if stream is not None:
                stream.close()

    def record(self, metrics: dict[str, float]) -> None:
        if self.file is not None:
            finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
            self.file.write_row(finite)
        if self.events is not None:
            self.events.add(metrics)
        shown = {"return": math.nan, "approx_kl": math.nan, "clip_fraction": math.nan, **metrics}  # not all are there
        now, last = time.perf_counter(), metrics["step"] >= self.config.total_steps
        if self.config.quiet or (now - self.shown < (0.2 if self.live else 5.0) and not last):
            return
        self.shown = now
        speed = max(metrics["step"] - self.began, 1) / (now - self.start)
        text = (
            f"{int(metrics['step'])}/{self.config.total_steps} steps  {speed:.0f}/s"
            f"  {max(0.0, (self.config.total_steps - metrics['step']) / speed):.0f} s left"
            f"  return {shown['return']:.4g}  entropy {metrics['entropy']:.3f}"
            f"  kl {shown['approx_kl']:.4f}  clip {shown['clip_fraction']:.3f}"
            f"  explained variance {metrics['explained_variance']:.2f}"
        )
        print(f"\r{text}\x1b[K" if self.live else text, end="\n" if last or not self.live else "", flush=True)

    def say(self, text: str) -> None:
        if not self.config.quiet:
            print(f"\n{text}" if self.live else text, flush=True)

    def close_with(self, summary: dict[str, Any]) -> None:
        c = self.config
        if c.out is not None:
            path = Path(c.out) / "summary.json"
            with reported(f"{path} could not be written", path):
                write_file(path, json.dumps(summary, indent=2) + "\n")
        if c.quiet:
            return
        print(f"{summary['steps']} steps in {summary['seconds']:.1f} s, {summary['episodes']} episodes", end="")
        print(f", last {self.recent}: mean return {summary['return']:.4g}" if summary["return"] is not None else "")
        if summary["eval_returns"]:
            low, high = min(summary["eval_returns"]), max(summary["eval_returns"])
            print(f"evaluation, likeliest actions, {len(summary['eval_returns'])} episodes: ", end="")
            print(f"mean return {summary['eval_return']:.4g}, {low:.4g} to {high:.4g}")
        if c.out is not None:
            names = ("metrics.jsonl", "summary.json", "checkpoints", "tensorboard", "episode.gif", "frames")
            print(f"{', '.join(name for name in names if (Path(c.out) / name).exists())} are in {c.out}")
