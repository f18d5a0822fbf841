"""Prompts: reading them from a file, and dealing them out step by step in a seeded order."""

import json
from pathlib import Path
from typing import Any

import torch

from ppo_fast.errors import UserError


def read_jsonl(path: str | Path, prompt_field: str) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, each a dict whose "prompt" is the text of `prompt_field`; all other fields are kept.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line is malformed, lacks the field, or has an empty
            prompt; the message names file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the prompts: {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the prompts: {path} is not UTF-8 text (byte {error.start})") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}", prompt_field))
    if not rows:
        raise UserError(f"{path} has no prompts: it is empty")
    return rows


def _parse(line: str, where: str, prompt_field: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: malformed JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if prompt_field not in row:
        raise UserError(f"{where}: no field {prompt_field!r}; the fields are {', '.join(map(repr, row)) or 'none'}")
    prompt = row.pop(prompt_field)
    if not isinstance(prompt, str):
        raise UserError(f"{where}: field {prompt_field!r} must be a string, got {type(prompt).__name__}")
    if not prompt.strip():
        raise UserError(f"{where}: the prompt is empty")
    for reserved in ("prompt", "prompts", "completions", "completion_ids"):
        if reserved in row:
            raise UserError(f"{where}: field {reserved!r} clashes with a name that reward functions get; rename it")
    return {"prompt": prompt, **row}


class Prompts:
    """Deals rows in a seeded random order, epoch after epoch, n at a time.

    >>> prompts = Prompts([{"prompt": "a"}, {"prompt": "b"}], seed=0)
    >>> sorted(row["prompt"] for row in prompts.take(2))
    ['a', 'b']
    """

    def __init__(self, rows: list[dict[str, Any]], *, seed: int = 0) -> None:
        if not rows:
            raise UserError("there are no prompts to train on")
        for number, row in enumerate(rows):
            if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise UserError(f"prompt {number} must be a string that is not empty, got {row.get('prompt')!r}")
        self.rows = rows
        self.seed = seed
        self.dealt = 0  # rows given out since the start: the whole state

    def take(self, n: int) -> list[dict[str, Any]]:
        taken: list[dict[str, Any]] = []
        while len(taken) < n:
            epoch, position = divmod(self.dealt, len(self.rows))
            some = self._order(epoch)[position : position + n - len(taken)]
            taken += [self.rows[i] for i in some]
            self.dealt += len(some)
        return taken

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()


def columns(rows: list[dict[str, Any]], repeat: int) -> dict[str, list]:
    """Rows to columns, each row `repeat` times; a field that some rows lack is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows for _ in range(repeat)] for name in names}
