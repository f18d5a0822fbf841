"""Human feedback in the terminal: two answers to a prompt, the choice of a person, one more line in a file of pairs."""

import codecs
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ppo_fast.common.errors import UserError
from ppo_fast.common.jsonl import as_lines
from ppo_fast.common.text import escape_control
from ppo_fast.llm.data import json_rows
from ppo_fast.llm.preferences.reward_model import Pair, read_pairs

KEYS = "1 or 2: the better answer; s: skip; q: save and quit"


@dataclass(frozen=True)
class Choice:
    """A prompt with two answers or more."""

    prompt: str
    answers: list[str]


def _are_several_texts(answers: list[object]) -> bool:
    return len(answers) >= 2 and all(isinstance(x, str) for x in answers)


def read_choices(path: str | Path) -> list[Choice]:
    """Read a JSON Lines file of prompts with two answers or more.

    Raises:
        UserError: the message names file and line.
    """
    rows = []
    for where, row in json_rows(path, "answers"):
        prompt, answers = row.get("prompt"), row.get("answers")
        if not isinstance(prompt, str) or not isinstance(answers, list) or not _are_several_texts(answers):
            raise UserError(f'{where}: expected {{"prompt": text, "answers": [text, text]}}')
        rows.append(Choice(prompt, answers))
    if not rows:
        raise UserError(f"{path} has nothing to choose from: it is empty")
    return rows


def label(
    answers: str | Path, out: str | Path, *, console: Console | None = None, ask: Callable[[str], str] = input
) -> int:
    """Ask about every row of `answers` that is not in `out`, and append each choice to `out` at once.

    Args:
        answers: JSON Lines with {"prompt": text, "answers": [text, text, ...]}; the first two that differ are shown.
        out: JSON Lines of pairs, {"prompt", "chosen", "rejected", "kind": "person"}, made if it is missing.
        console: for the output.
        ask: prints a question and returns the input. `rich.prompt` would not be shorter: its `Prompt` reads from a
            stream, and end of input, Ctrl-C and a missing standard input must be handled here as well.

    Returns:
        The number of choices.

    Raises:
        UserError: one of the files cannot be read or written.
    """
    console = console or Console()
    rows, made = read_choices(answers), 0
    known = {(p.prompt, frozenset((p.chosen, p.rejected))) for p in _pairs_in(out)}
    _append(out, "")  # before the first choice: it must be writable
    console.print(KEYS)
    for number, row in enumerate(rows, start=1):
        first = row.answers[0]
        second = next((text for text in row.answers[1:] if text != first), None)
        if second is None or (row.prompt, frozenset((first, second))) in known:
            continue
        _show(console, row.prompt, first, second, f"{number} of {len(rows)}")
        choice = _choice(ask)
        if choice == "q":
            break
        if choice == "s":
            continue
        chosen, rejected = (first, second) if choice == "1" else (second, first)
        pair = dataclasses.asdict(Pair(row.prompt, chosen, rejected, "person"))
        _append(out, as_lines([pair]))
        made += 1
    console.print(f"{made} choices were added to {out}")
    return made


def _pairs_in(path: str | Path) -> list[Pair]:
    """Read the pairs of the output file. Only a file to which lines can be added is accepted."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error
    start = data.removeprefix(codecs.BOM_UTF8).strip()
    if not start:
        return []
    if not start.startswith(b"{"):
        raise UserError(f"{path} is no JSON Lines file of pairs: choose another --out")
    return read_pairs(path)


def _show(console: Console, prompt: str, first: str, second: str, title: str) -> None:
    console.print(Panel(_lines(prompt), title=title))
    panels = [Panel(_lines(text), title=name) for name, text in (("1", first), ("2", second))]
    console.print(Columns(panels, equal=True, expand=True))


def _lines(text: str) -> Text:
    return Text("\n".join(map(escape_control, text.split("\n"))))


def _choice(ask: Callable[[str], str]) -> str:
    while True:
        try:
            typed = ask("which is better? ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            return "q"
        except RuntimeError as error:  # what input() raises without standard input
            raise UserError(f"there is no terminal to choose in: {error}") from error
        if typed in ("1", "2", "s", "q"):
            return typed


def _append(path: str | Path, line: str) -> None:
    """Append a line, after a line break if the last line of the file has none."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a+b") as file:
            cut = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut = file.read() != b"\n"
            file.write(("\n" * cut + line).encode())
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error
