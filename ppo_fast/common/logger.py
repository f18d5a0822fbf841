"""TODO docstring."""

import json
import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_fast.common.checkpoint import GrowingFile
from ppo_fast.common.errors import UserError


class Events:
    """TensorBoard's scalars of a run, in one file.

    They are written at once. SummaryWriter of PyTorch writes in a thread, and after an error in it the run hangs.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError("tensorboard is not installed: pip install tensorboard, or --no-tensorboard") from error

        self.event, self.summary = Event, Summary
        self.file = GrowingFile(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")

    def add(self, metrics: Mapping[str, float | None]) -> None:
        """Writes the metrics of one step; None becomes NaN."""
        values = [
            self.summary.Value(tag=name, simple_value=math.nan if value is None else value)
            for name, value in metrics.items()
        ]
        self._write(step=int(metrics["step"] or 0), summary=self.summary(value=values))

    def _write(self, **content: Any) -> None:
        self.records.write(self.event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def step_in(line: str, where: str) -> float:
    """The step of a row of metrics.jsonl or samples.jsonl; `where` names file and line in the UserError for others."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    if not isinstance(step, int | float):
        raise UserError(
            f"{where} is not a row that ppo-fast wrote ({line!r:.60}): remove this line to resume, or start anew with"
            " --overwrite"
        )
    return step
