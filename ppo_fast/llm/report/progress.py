"""Output of a run: a line for each step, a table of responses, metrics as JSON Lines and TensorBoard events."""

import json
import re
import sys
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from ppo_fast.common.checkpoint import UNFINISHED, reported, write_file
from ppo_fast.common.console import bar_of, console_of, say
from ppo_fast.common.device import device_module, pick_device
from ppo_fast.common.folders import mark
from ppo_fast.common.jsonl import JsonLines, Row, as_lines, truncate_rows
from ppo_fast.common.logger import MetricsLog, remove_events
from ppo_fast.common.text import shortened
from ppo_fast.llm.config import PPOConfig, yaml_text
from ppo_fast.llm.data import as_text
from ppo_fast.llm.packing.rollout import Rollout

SAMPLES_SHOWN = 5
TIME_PARTS = ("sample", "reward", "advantages", "learn")
HEADING_EVERY = 20  # lines


class Column(NamedTuple):
    """A column of the table of steps."""

    heading: str
    width: int
    decimals: int
    metric: str


# With step and seconds, 120 columns are enough for 99999 steps. A narrow terminal shows the first ones only
COLUMNS = [
    Column("score", 8, 3, "score"),
    Column("kl", 8, 4, "kl"),
    Column("clip", 6, 3, "learn/clip_fraction"),
    Column("entropy", 8, 3, "entropy"),
    Column("exp.var", 8, 3, "explained_variance"),
    Column("grad", 7, 3, "learn/grad_norm"),
    Column("critic", 7, 3, "learn/critic_grad_norm"),
    Column("tokens", 7, 1, "answer_tokens"),
    Column("tok/s", 7, 0, "tokens_per_second"),
    Column("MiB", 7, 0, "memory_mib"),
]
MFU = Column("mfu", 6, 3, "mfu")  # behind all others, where a terminal is wider


class Progress:
    """Writes the metrics of each step to files, and prints them; a context manager, so that files are always closed."""

    def __init__(
        self,
        config: PPOConfig,
        prompts_left_out: int = 0,
        run_options: dict[str, object] | None = None,
        steps_done: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Args:
        steps_done: the files continue after that step; rows of later steps are removed.
        device: the device whose memory is logged; None: the one that `config` names.
        """
        self.config = config
        self.steps_done = steps_done
        self.run_options = run_options or {}
        self.device = pick_device(config.device) if device is None else device
        self.lines = 0
        self.console = console_of(quiet=config.quiet)
        self.bar = bar_of(self.console)
        self.task = self.bar.add_task("PPO", total=config.total_steps, completed=steps_done)
        self.metrics = MetricsLog()
        self.samples_file: JsonLines | None = None
        if config.out is not None:
            self._open(Path(config.out))
        if prompts_left_out:
            self.info(f"{prompts_left_out} prompts are too long and were left out")

    def _open(self, folder: Path) -> None:
        with reported(f"cannot write to {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            rows = truncate_logs(folder, self.steps_done)
            write_file(folder / "config.yaml", yaml_text(self.config, self.run_options))
            remove_events(folder)
        self._open_files(folder, rows)

    def _open_files(self, folder: Path, rows: list[Row]) -> None:
        """Open the files that grow with each step; `rows` are those of metrics.jsonl."""
        self.metrics.open(folder, rows, tensorboard=self.config.tensorboard)
        self.samples_file = JsonLines(folder / "samples.jsonl")

    @property
    def rows(self) -> list[Row]:
        """The metrics of all steps, as in metrics.jsonl."""
        return self.metrics.rows

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self._close()

    def _close(self) -> None:
        self.metrics.close()
        if self.samples_file is not None:
            self.samples_file.close()

    def log_step(self, metrics: dict[str, float], rollout: Rollout | None) -> None:
        """Log the metrics of a step, print its line, and every `show_samples_every` steps its table of responses."""
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
        """Print a sentence."""
        say(self.console, text)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Write the metrics of one step to metrics.jsonl and TensorBoard."""
        self._reopen()
        self.metrics.write(metrics)

    def _reopen(self) -> None:
        """Write the files of the run again if they were removed or renamed during the run."""
        if self.metrics.file is None or not self.metrics.file.lost():
            return
        folder = self.metrics.file.path.parent
        self._close()
        with reported(f"cannot write to {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            mark(folder)
            write_file(folder / "config.yaml", yaml_text(self.config, self.run_options))
            write_file(folder / "metrics.jsonl", as_lines(self.rows))
        self._open_files(folder, self.rows)
        self.info(f"{folder} was removed or renamed during the run: its metrics are written again, other files are not")

    def sync(self) -> None:
        """Sync the files to the disk: a checkpoint must not be of a later step than the metrics file."""
        for file in (self.metrics.file, self.samples_file):
            if file is not None:
                file.sync()

    def _show_samples(self, rollout: Rollout, step: int) -> None:
        table = Table(title=f"answers in step {step}", title_justify="left")
        table.add_column("prompt", ratio=1)
        table.add_column("answer", ratio=1)
        table.add_column("score", justify="right")
        for row in range(min(SAMPLES_SHOWN, len(rollout))):
            prompt, answer, value = rollout.columns["prompt"][row], rollout.completions[row], rollout.scores[row]
            table.add_row(Text(shortened(as_text(prompt))), Text(shortened(answer)), f"{value:z.3f}")
            if self.samples_file is not None:
                self.samples_file.write_row({"step": step, "prompt": prompt, "answer": answer, "score": value})
        self.console.print(table)


def truncate_logs(folder: Path, step: int) -> list[Row]:
    """Remove what is later than `step` from metrics.jsonl, samples.jsonl and eval/; return the metrics that stay.

    Raises:
        UserError: a line is not one that a run writes; the message names it.
        OSError: a file cannot be read or written.
    """
    for unfinished in [*folder.glob("*" + UNFINISHED), *(folder / "eval").glob("*" + UNFINISHED)]:
        if unfinished.is_file():
            unfinished.unlink()
    metrics, _ = (truncate_rows(folder / name, step) for name in ("metrics.jsonl", "samples.jsonl"))
    for file in (folder / "eval").glob("step-*.*"):
        number = re.fullmatch(r"step-(\d+)", file.stem)
        if number is not None and (not step or int(number[1]) > step):
            file.unlink()
    return [json.loads(line) for line in metrics]


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return memory_mib: the peak of PyTorch on a GPU, or of the process in RAM; nothing where it is not counted."""
    if device.type not in ("cpu", "mps"):
        return {"memory_mib": device_module(device).max_memory_allocated(device) / 2**20}
    if sys.platform == "win32":
        return {}
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_mib": most / (2**20 if sys.platform == "darwin" else 2**10)}


def heading(total_steps: int, width: int | None = None) -> str:
    """Format the names above the numbers of `line`."""
    count, split, mfu = _fitting(total_steps, width)
    names = "".join(f"{x.heading:>{x.width}}" for x in COLUMNS[:count])
    return " " * len(_step(0, total_steps)) + names + "      s" + SPLIT * split + f"{MFU.heading:>{MFU.width}}" * mfu


def line(metrics: dict[str, float], total_steps: int, width: int | None = None) -> str:
    """Format the numbers of a step, as wide as `heading`; a hyphen means that the step does not have the number.

    A terminal with `width` columns shows as many numbers as fit; None: all.
    """
    count, split, mfu = _fitting(total_steps, width)
    numbers = "".join(_number(metrics.get(x.metric), x.width, x.decimals) for x in COLUMNS[:count])
    parts = [metrics[f"seconds/{name}"] for name in TIME_PARTS]
    shares = [f"{100 * x / max(sum(parts), 1e-9):.0f}%" for x in parts] if split else []
    split_text = "".join(f"{share:>{size}}" for share, size in zip(shares, (7, 7, 4, 6), strict=False))
    split_text += _number(metrics.get(MFU.metric), MFU.width, MFU.decimals) * mfu
    return f"{_step(int(metrics['step']), total_steps)}{numbers}{_number(sum(parts), 7, 2)}{split_text}"


SPLIT = " sample reward adv learn"


def _fitting(total_steps: int, width: int | None) -> tuple[int, bool, bool]:
    """Return how many of COLUMNS fit into a terminal, and whether the split of the seconds and MFU do."""
    if width is None:
        return len(COLUMNS), True, True
    left = width - len(_step(0, total_steps)) - 7  # the seconds
    sizes = list(accumulate(x.width for x in COLUMNS))
    count = sum(size <= left for size in sizes)
    split = sizes[-1] + len(SPLIT)
    return count, split <= left, split + MFU.width <= left


def _step(step: int, total_steps: int) -> str:
    return f"step {step:{len(str(total_steps))}}/{total_steps}"


def _number(x: float | None, width: int, decimals: int) -> str:
    """Format a number, with fewer decimals or in powers of ten where it would touch the next column."""
    if x is None:
        return f"{'-':>{width}}"
    forms = [f"{x:z.{decimals}f}", f"{x:z.0f}", f"{x:.1e}", f"{x:.0e}"]  # z: never -0
    return f"{next((form for form in forms if len(form) < width), '...'):>{width}}"
