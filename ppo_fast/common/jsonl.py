"""JSON Lines: files of a run that grow by one row, and are truncated where a run resumes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ppo_fast.common.checkpoint import GrowingFile, write_file
from ppo_fast.common.errors import UserError

Row = dict[str, float | None]  # the metrics of one step: JSON has no NaN


class JsonLines(GrowingFile):
    """A file to which rows are appended; it contains each row completely or not at all."""

    def write_row(self, row: Mapping[str, object]) -> None:
        """Append a row."""
        self.write(as_lines([row]))


def as_lines(rows: Iterable[Mapping[str, object]]) -> str:
    """Format rows, one a line; what JSON cannot represent is written as a string."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Read a metrics.jsonl whose lines are all complete."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def step_of(line: str, where: str) -> float:
    """Return the step of a row of metrics.jsonl or samples.jsonl.

    Args:
        line: the row.
        where: file and line for the error.

    Raises:
        UserError: the line is not such a row.
    """
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    if not isinstance(step, int | float):
        raise UserError(
            f"{where} is not a row that ppo-fast wrote ({line!r:.60}): remove this line to resume, or start again with"
            " --overwrite"
        )
    return step


def truncate_rows(path: Path, step: int) -> list[str]:
    """Remove the rows of steps after `step` from a file, which is made if it is missing; return the lines that stay.

    A killed process may have left a part of a line: its step is later than every checkpoint.

    Raises:
        UserError: a line is not a row of a run; the message names it.
        OSError: the file cannot be read or written.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() and step else []
    if lines and not _is_row(lines[-1]):  # empty, or a part of a row
        del lines[-1]
    kept = [line for number, line in enumerate(lines, start=1) if step_of(line, f"{path}, line {number}") <= step]
    write_file(path, "".join(line + "\n" for line in kept))
    return kept


def _is_row(line: str) -> bool:
    """Check for a complete row, such as one whose end of line an editor has removed."""
    try:
        step_of(line, "")
    except UserError:
        return False
    return True
