"""Prompts: reading them from a file or folder, turning them into tokens, and dealing them out in a seeded order.

A prompt is a text, or a chat: a list of messages {"role": ..., "content": ...}, which goes through the tokenizer's chat
template. Reward functions get it as it stands in the data.
"""

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppo_fast.errors import UserError

Prompt = str | list[dict[str, Any]]

# reward functions get these names
RESERVED = ("prompt", "prompts", "completions", "raw_completions", "completion_ids", "ended")


def read_prompts(path: str | Path, prompt_field: str = "prompt", *, chat: bool = False) -> list[dict[str, Any]]:
    """Rows of a file or folder in its own order, each a dict whose "prompt" is `prompt_field`; all others are kept.

    Args:
        path: a JSON Lines file; a Parquet file (.parquet), or a folder of them, read by name; or a folder that the
            `save_to_disk` of Hugging Face's datasets wrote. Parquet needs pyarrow, the other folder datasets.
        prompt_field: the column with the prompt, a text or a list of messages.
        chat: texts become a chat of one message by the user.

    Raises:
        UserError: it cannot be read, has no rows, or a row has no usable prompt; the message names file and row.
    """
    path = Path(path)
    if path.is_dir():
        rows = _read_folder(path, prompt_field)
    elif path.suffix == ".parquet" and path.exists():
        rows = _read_parquet([path], prompt_field)
    else:
        rows = read_jsonl(path, prompt_field)
    if chat:
        for row in rows:
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return rows


def read_jsonl(path: str | Path, prompt_field: str) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, each a dict whose "prompt" is that of `prompt_field`; all other fields are kept.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line is malformed, lacks the field, or has no usable
            prompt; the message names file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without the mark that Windows puts first
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the field {twice!r} twice; remove one")
    return found


def _parse(line: str, where: str, prompt_field: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: malformed JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or brackets in brackets
        raise UserError(f"{where}: JSON that Python cannot read: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return _row(row, where, prompt_field)


def _row(row: dict[str, Any], where: str, prompt_field: str) -> dict[str, Any]:
    if prompt_field not in row:
        raise UserError(f"{where}: no field {prompt_field!r}; the fields are {', '.join(map(repr, row)) or 'none'}")
    prompt = row.pop(prompt_field)
    check_prompt(prompt, where, f"field {prompt_field!r}")
    _check_names(row, where, RESERVED)
    return {"prompt": prompt, **row}


def _check_names(row: Mapping[str, Any], where: str, reserved: Sequence[str]) -> None:
    for name in reserved:
        if name in row:
            raise UserError(f"{where}: field {name!r} clashes with a name that reward functions get; rename it")


def check_prompt(prompt: Any, where: str, name: str) -> None:
    """Refuses what is neither a text that is not empty nor a chat that waits for an answer."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where}: the prompt is empty")
        _check_text(prompt, where)
        return
    if not isinstance(prompt, list):
        raise UserError(f"{where}: {name} must be a string or a list of messages, got {type(prompt).__name__}")
    if not prompt:
        raise UserError(f"{where}: the prompt is empty: a chat without messages")
    for number, message in enumerate(prompt, start=1):
        right = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not right:
            raise UserError(
                f'{where}: message {number} must be {{"role": text, "content": text}}, got {str(message)[:80]}'
            )
        _check_text(message["role"] + message["content"], where)
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message is the assistant's, which the model is to write: leave it out")


def _check_text(text: str, where: str) -> None:
    """Refuses half of a UTF-16 pair, which JSON can hold as an escape sequence, but no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the prompt has {text[error.start]!a} at character {error.start}, which is half of a character"
            " (a lone surrogate): correct the data"
        ) from error


def as_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that come from Python, as a list of dicts.

    Raises:
        UserError: they are something else, such as a dict of columns or a DataFrame.
    """
    what = "rows must be a list of dicts, one for each prompt"
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"{what}, got {type(rows).__name__}")
    found = list(rows)
    for number, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise UserError(f'{what}, but row {number} is {str(row)[:40]!r}: give {{"prompt": text}}')
        for name in row:
            if not isinstance(name, str):
                raise UserError(f"row {number} has the column {name!r}: names of columns must be texts")
    return [dict(row) for row in found]


def check_rows(rows: list[dict[str, Any]]) -> None:
    """`check_prompt` for rows that come from Python."""
    if not rows:
        raise UserError("there are no prompts")
    for number, row in enumerate(rows):
        check_prompt(row.get("prompt"), f"prompt {number}", "it")
        _check_names(row, f"prompt {number}", [name for name in RESERVED if name != "prompt"])


def _read_folder(folder: Path, prompt_field: str) -> list[dict[str, Any]]:
    if (folder / "state.json").is_file():  # written by Dataset.save_to_disk
        return _read_dataset(folder, prompt_field)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file())
        raise UserError(f"{folder} holds the splits {', '.join(splits)}: name one, for instance {folder / splits[0]}")
    files = sorted(folder.glob("*.parquet"))
    if files:
        return _read_parquet(files, prompt_field)
    raise UserError(f"{folder} is a folder, but neither did save_to_disk write it nor does it hold .parquet files")


def _read_dataset(folder: Path, prompt_field: str) -> list[dict[str, Any]]:
    datasets = _package("datasets", folder)
    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read the data set in {folder}: {error}") from error
    return _rows(rows, str(folder), prompt_field)


def _read_parquet(files: list[Path], prompt_field: str) -> list[dict[str, Any]]:
    arrow, parquet = _package("pyarrow", files[0]), _package("pyarrow.parquet", files[0])
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            read = parquet.read_table(str(file), partitioning=None).to_pylist()
        except (OSError, ValueError, arrow.ArrowException) as error:  # ValueError: not UTF-8, or no such time
            raise UserError(f"cannot read the prompts: {file}: {error}") from error
        rows += _rows(read, str(file), prompt_field)
    return rows


def _rows(rows: Iterable[dict[str, Any]], where: str, prompt_field: str) -> list[dict[str, Any]]:
    found = [_row(dict(row), f"{where}, row {number}", prompt_field) for number, row in enumerate(rows, start=1)]
    if not found:
        raise UserError(f"{where} has no prompts: it is empty")
    return found


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{path} needs {package}: pip install {package}, or the extra ppo_fast[data]") from error


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Each prompt's tokens: of a text as the tokenizer makes them, of a chat those of its template.

    The template ends where the assistant's answer begins, and has written its own special tokens: the tokenizer does
    not add a second begin token. Neither does it to a text that begins with this token, and what it appends to a text,
    such as an end token, is left out, because the answer continues the text (`tokenizer_notes` reports both).
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [chat_text(tokenizer, prompt) for prompt in prompts if not isinstance(prompt, str)]
    plain = iter(_plain_ids(tokenizer, texts) if texts else [])
    # verbose: a warning of too many tokens, although long prompts are left out
    templated = iter(tokenizer(chats, add_special_tokens=False, verbose=False)["input_ids"] if chats else [])
    return [next(plain if isinstance(prompt, str) else templated) for prompt in prompts]


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    before, after = added_ids(tokenizer)
    found = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        ids = without_second_begin(ids, before)
        found.append(ids[: -len(after)] if after and ids[-len(after) :] == after else ids)
    return found


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after each text."""
    for text in ("a", *list(getattr(tokenizer, "get_vocab", dict)())[:16]):
        try:
            bare, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
        except Exception:  # tokenizers raises a plain one for a text that the vocabulary does not cover
            continue
        starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        if bare and starts:
            return whole[: starts[0]], whole[starts[0] + len(bare) :]
    return [], []


def without_second_begin(ids: list[int], before: list[int]) -> list[int]:
    """Token ids of a text without what the tokenizer put before it, if the text has the same at its beginning."""
    n = len(before)
    return ids[n:] if n and ids[:n] == ids[n : 2 * n] == before else ids


def tokenizer_notes(tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """What `prompt_ids` leaves out of these prompts, in sentences for the start of a run."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    before, after = added_ids(tokenizer)
    notes = []
    if texts and after:
        notes.append(
            f"the tokenizer appends {tokenizer.decode(after)!r} to each text: prompts are used without it, because the"
            " answer continues the prompt"
        )
    begin = tokenizer.decode(before)
    some = [text for text in texts if begin and text.startswith(begin)]
    if some:
        twice = sum(without_second_begin(ids, before) != ids for ids in tokenizer(some)["input_ids"])
        if twice:
            notes.append(
                f"{twice} of {len(texts)} prompts begin with {begin!r}, which the tokenizer puts"
                " before each text: it is not added a second time"
            )
    return notes


def chat_text(tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """A chat as the text that the tokenizer's template makes of it.

    Raises:
        UserError: there is no template, or it fails for these messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the prompts are chats, but the tokenizer has no chat template: take a model that was tuned for chat, set"
            " tokenizer.chat_template, or give plain texts"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template computes with what it is given, and can raise an error of any class
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template fails for the prompt {messages!s:.160}: {reason}") from error


def as_text(prompt: Prompt) -> str:
    """A prompt for people to read: a chat becomes one line for each message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class Prompts:
    """Deals rows in a seeded random order, epoch after epoch, n at a time.

    >>> prompts = Prompts([{"prompt": "a"}, {"prompt": "b"}], seed=0)
    >>> sorted(row["prompt"] for row in prompts.take(2))
    ['a', 'b']
    """

    def __init__(self, rows: list[dict[str, Any]], *, seed: int = 0) -> None:
        check_rows(rows)
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


def with_all_fields(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have the same fields, in the same order: None where one lacks what another has."""
    fields = dict.fromkeys(name for row in rows for name in row)
    return [{**fields, **row} for row in rows]


def columns(rows: list[dict[str, Any]], repeat: int) -> dict[str, list]:
    """Rows to columns, each row `repeat` times; a field that some rows lack is None there."""
    rows = with_all_fields(rows)
    return {name: [row[name] for row in rows for _ in range(repeat)] for name in rows[0]}
