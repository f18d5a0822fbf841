"""What a run shows and leaves behind: a live line, a table of answers, metrics as JSON Lines and TensorBoard events."""

import json
import math
import re
import sys
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ppo_fast.common.checkpoint import UNFINISHED, GrowingFile, reported, write_file
from ppo_fast.common.console import bar_of, console_of, say
from ppo_fast.common.device import device_module, pick_device
from ppo_fast.common.errors import UserError
from ppo_fast.common.folders import mark
from ppo_fast.common.logger import Events, step_in
from ppo_fast.common.text import shortened
from ppo_fast.llm.config import PPOConfig, yaml_text
from ppo_fast.llm.data import as_text
from ppo_fast.llm.packing.rollout import Rollout

SAMPLES_SHOWN = 5
TIME_PARTS = ("sample", "reward", "advantages", "learn")
HEADING_EVERY = 20  # lines

# Heading, width, decimals, metric; with step and seconds, 120 columns hold up to 99999 steps. A narrow terminal shows
# the first ones only
COLUMNS = [
    ("score", 8, 3, "score"),
    ("kl", 8, 4, "kl"),
    ("clip", 6, 3, "learn/clip_fraction"),
    ("entropy", 8, 3, "entropy"),
    ("exp.var", 8, 3, "explained_variance"),
    ("grad", 7, 3, "learn/grad_norm"),
    ("critic", 7, 3, "learn/critic_grad_norm"),
    ("tokens", 7, 1, "answer_tokens"),
    ("tok/s", 7, 0, "tokens_per_second"),
    ("MiB", 7, 0, "memory_mib"),
]


class Progress:
    """Shows and records the metrics of each step; a context manager, so that files are closed whatever happens."""

    def __init__(
        self,
        config: PPOConfig,
        prompts_left_out: int = 0,
        run_options: dict[str, Any] | None = None,
        steps_done: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Args:
        steps_done: the files continue after that step; lines of later steps are removed.
        device: the device whose memory is recorded; None: the one that `config` names.
        """
        self.config = config
        self.steps_done = steps_done
        self.run_options = run_options or {}
        self.device = pick_device(config.device) if device is None else device
        self.lines = 0
        self.console = console_of(quiet=config.quiet)
        self.bar = bar_of(self.console)
        self.task = self.bar.add_task("PPO", total=config.total_steps, completed=steps_done)
        self.recorded: list[dict[str, float | None]] = []  # as in metrics.jsonl
        self.metrics_file: GrowingFile | None = None
        self.events: Events | None = None
        if config.out is not None:
            self._open(Path(config.out))
        if prompts_left_out:
            self.info(f"{prompts_left_out} prompts are too long and were left out")

    def _open(self, folder: Path) -> None:
        with reported(f"cannot write to {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.recorded = truncate_logs(folder, self.steps_done)
            write_file(folder / "config.yaml", yaml_text(self.config, self.run_options))
            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()  # two runs in one folder would be drawn as one curve
        self._open_files(folder)

    def _open_files(self, folder: Path) -> None:
        """Opens the files that grow with each step."""
        self.metrics_file = GrowingFile(folder / "metrics.jsonl")
        self.samples_file = GrowingFile(folder / "samples.jsonl")
        if self.config.tensorboard:
            self.events = Events(folder / "tensorboard")
            for metrics in self.recorded:
                self.events.add(metrics)

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self._close()

    def _close(self) -> None:
        if self.metrics_file is not None:
            self.metrics_file.close()
            self.samples_file.close()
        if self.events is not None:
            self.events.close()

    def log_step(self, metrics: dict[str, float], rollout: Rollout | None) -> None:
        """One step's line, and every `show_samples_every` steps its table of answers."""
        step = int(metrics["step"])
        self.log_metrics(metrics)
        self.bar.update(self.task, completed=step)
        width = self.console.width if self.console.is_terminal else None
        if self.lines % HEADING_EVERY == 0:
            self.console.print(heading(self.config.total_steps, width), style="bold", soft_wrap=True)
        self.lines += 1
        say(self.console, line(metrics, self.config.total_steps, width))
        every = self.config.show_samples_every
        if rollout is not None and every and (step % every == 0 or step == 1):
            self._show_samples(rollout, step)

    def info(self, text: str) -> None:
        """A sentence, as it is and in one line."""
        say(self.console, text)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Writes the metrics of one step to file and TensorBoard; what is not finite becomes null, which is JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._reopen()
        self.recorded.append(finite)
        if self.metrics_file is not None:
            self.metrics_file.write_row(finite)
        if self.events is not None:
            self.events.add(metrics)

    def _reopen(self) -> None:
        """Makes the files of the run again if they were removed or renamed while it was going."""
        if self.metrics_file is None or not self.metrics_file.lost():
            return
        folder = self.metrics_file.path.parent
        self._close()
        with reported(f"cannot write to {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            mark(folder)
            write_file(folder / "config.yaml", yaml_text(self.config, self.run_options))
            write_file(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.recorded))
        self._open_files(folder)
        self.info(f"{folder} was removed or renamed during the run: its metrics are written again, other files are not")

    def sync(self) -> None:
        """All that was recorded is on the disk; a checkpoint must not know of more steps than the metrics file."""
        if self.metrics_file is not None:
            for file in (self.metrics_file, self.samples_file):
                file.sync()

    def _show_samples(self, rollout: Rollout, step: int) -> None:
        table = Table(title=f"answers in step {step}", title_justify="left")
        table.add_column("prompt", ratio=1)
        table.add_column("answer", ratio=1)
        table.add_column("score", justify="right")
        for row in range(min(SAMPLES_SHOWN, len(rollout))):
            prompt, answer, value = rollout.columns["prompt"][row], rollout.completions[row], rollout.scores[row]
            table.add_row(Text(shortened(as_text(prompt))), Text(shortened(answer)), f"{value:z.3f}")
            if self.metrics_file is not None:
                self.samples_file.write_row({"step": step, "prompt": prompt, "answer": answer, "score": value})
        self.console.print(table)


def truncate_logs(folder: Path, step: int) -> list[dict[str, float | None]]:
    """Takes what is later than `step` out of metrics.jsonl, samples.jsonl and eval/; the metrics that stay.

    A killed process may have left half a line: it is later than every checkpoint.

    Raises:
        UserError: a line is not one that a run writes; the message names it.
        OSError: a file cannot be read or written.
    """
    for unfinished in [*folder.glob("*" + UNFINISHED), *(folder / "eval").glob("*" + UNFINISHED)]:
        if unfinished.is_file():
            unfinished.unlink()
    kept: dict[str, list[str]] = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = folder / name
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() and step else []
        if lines and not _is_row(lines[-1]):  # empty, or half a row of a killed process
            del lines[-1]
        kept[name] = [
            line for number, line in enumerate(lines, start=1) if step_in(line, f"{path}, line {number}") <= step
        ]
        write_file(path, "".join(line + "\n" for line in kept[name]))
    for file in (folder / "eval").glob("step-*.*"):
        number = re.fullmatch(r"step-(\d+)", file.stem)
        if number is not None and (not step or int(number[1]) > step):
            file.unlink()
    return [json.loads(line) for line in kept["metrics.jsonl"]]


def _is_row(line: str) -> bool:
    """Whether it is a whole row, such as one whose end of line an editor has removed."""
    try:
        step_in(line, "")
    except UserError:
        return False
    return True


def peak_memory(device: torch.device) -> dict[str, float]:
    """memory_mib: the most that PyTorch has held on a GPU, or the process in RAM; nothing where this is not counted."""
    if device.type not in ("cpu", "mps"):
        return {"memory_mib": device_module(device).max_memory_allocated(device) / 2**20}
    if sys.platform == "win32":
        return {}
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_mib": most / (2**20 if sys.platform == "darwin" else 2**10)}


def heading(total_steps: int, width: int | None = None) -> str:
    """The names above the numbers of `line`."""
    count, split = _fitting(total_steps, width)
    names = "".join(f"{name:>{size}}" for name, size, _, _ in COLUMNS[:count])
    return " " * len(_step(0, total_steps)) + names + "      s" + SPLIT * split


def line(metrics: dict[str, float], total_steps: int, width: int | None = None) -> str:
    """One step in numbers, as wide as `heading`; what a step does not have is a hyphen.

    A terminal with `width` columns gets as many numbers as fit; None: all.
    """
    count, split = _fitting(total_steps, width)
    numbers = "".join(_number(metrics.get(name), size, decimals) for _, size, decimals, name in COLUMNS[:count])
    parts = [metrics[f"seconds/{name}"] for name in TIME_PARTS]
    shares = [f"{100 * x / max(sum(parts), 1e-9):.0f}%" for x in parts] if split else []
    split_text = "".join(f"{share:>{size}}" for share, size in zip(shares, (7, 7, 4, 6), strict=False))
    return f"{_step(int(metrics['step']), total_steps)}{numbers}{_number(sum(parts), 7, 2)}{split_text}"


SPLIT = " sample reward adv learn"


def _fitting(total_steps: int, width: int | None) -> tuple[int, bool]:
    """How many of COLUMNS fit into a terminal, and whether the split of the seconds does."""
    if width is None:
        return len(COLUMNS), True
    left = width - len(_step(0, total_steps)) - 7  # the seconds
    sizes = list(accumulate(size for _, size, _, _ in COLUMNS))
    count = sum(size <= left for size in sizes)
    return count, sizes[-1] + len(SPLIT) <= left


def _step(step: int, total_steps: int) -> str:
    return f"step {step:{len(str(total_steps))}}/{total_steps}"


def _number(x: float | None, width: int, decimals: int) -> str:
    """A number, with fewer decimals or in powers of ten where it would touch its neighbour."""
    if x is None:
        return f"{'-':>{width}}"
    forms = [f"{x:z.{decimals}f}", f"{x:z.0f}", f"{x:.1e}", f"{x:.0e}"]  # z: never -0
    return f"{next((form for form in forms if len(form) < width), '...'):>{width}}"
