"""Metrics of a run in memory, in metrics.jsonl, and as TensorBoard events."""

import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from ppo_fast.common.checkpoint import GrowingFile
from ppo_fast.common.errors import UserError
from ppo_fast.common.jsonl import JsonLines, Row


class Events:
    """TensorBoard scalars of a run, in one file.

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
        """Write the metrics of one step; None becomes NaN."""
        values = [
            self.summary.Value(tag=name, simple_value=math.nan if value is None else value)
            for name, value in metrics.items()
        ]
        self._write(step=int(metrics["step"] or 0), summary=self.summary(value=values))

    def _write(self, **content: object) -> None:  # fields of TensorBoard's Event
        self.records.write(self.event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class MetricsLog:
    """The metrics of each step: a list in memory, and the files of a run that has a folder."""

    def __init__(self) -> None:
        self.rows: list[Row] = []  # as in metrics.jsonl
        self.file: JsonLines | None = None
        self.events: Events | None = None

    def open(self, folder: Path, rows: list[Row], *, tensorboard: bool) -> None:
        """Append to metrics.jsonl, which contains `rows`, and start a new file of events with them."""
        self.rows = rows
        self.file = JsonLines(folder / "metrics.jsonl")
        if tensorboard:
            self.events = Events(folder / "tensorboard")
            for row in rows:
                self.events.add(row)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Store the metrics of a step; a number that is not finite becomes null in the file, which JSON can express."""
        row: Row = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self.rows.append(row)
        if self.file is not None:
            self.file.write_row(row)
        if self.events is not None:
            self.events.add(metrics)

    def close(self) -> None:
        """Close the files."""
        for file in (self.file, self.events):
            if file is not None:
                file.close()


def remove_events(folder: Path) -> None:
    """Remove the TensorBoard events in OUT: two runs in one folder would be drawn as one curve."""
    for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
        old.unlink()
