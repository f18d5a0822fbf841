"""Prompts: reading them from a file or folder, turning them into tokens, and drawing them in a seeded order.

A prompt is a text, or a chat: a list of messages {"role": ..., "content": ...}, which goes through the tokenizer's chat
template. Reward functions get it as it is in the data.
"""

import codecs
import gzip
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch

from ppo_fast.common.errors import UserError
from ppo_fast.common.options import json_object
from ppo_fast.common.text import nearest
from ppo_fast.llm.hub import is_dataset_name, load_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, object]]

_TEMPLATE_OPTIONS = "ppo_fast_chat_template_kwargs"  # an attribute of a tokenizer
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")

# reward functions get these names
RESERVED = ("prompt", "prompts", "completions", "raw_completions", "completion_ids", "ended")


def read_prompts(path: str | Path, prompt_field: str = "prompt", *, chat: bool = False) -> list[dict[str, object]]:
    """Rows of a file, folder or data set in its own order, each a dict whose "prompt" is `prompt_field`.

    All other columns are kept.

    Args:
        path: a file of JSON Lines, or of a JSON array of objects, perhaps gzipped; a Parquet file, or a folder of
            .parquet files, read by name; a folder that the `save_to_disk` of Hugging Face's datasets wrote; or, if
            nothing of this name exists, a data set of the hub, OWNER/NAME:SPLIT or OWNER/NAME:CONFIGURATION:SPLIT,
            perhaps with @REVISION after NAME. FOLDER:SPLIT reads one of several splits of a folder. Parquet needs
            pyarrow, data sets need datasets.
        prompt_field: the column with the prompt, a text or a list of messages.
        chat: texts become a chat of one message by the user.

    Raises:
        UserError: it cannot be read, has no rows, or a row has no usable prompt; the message names file and row.
    """
    return read_named_prompts(path, prompt_field, chat=chat)[0]


def read_named_prompts(
    path: str | Path, prompt_field: str = "prompt", *, chat: bool = False
) -> tuple[list[dict[str, object]], str]:
    """Return the rows that `read_prompts` reads, and their name: of a data set of the hub with its commit."""
    if is_dataset_name(path):
        data, name = load_dataset(str(path))
        rows = _rows(data, name, prompt_field)
    else:
        rows, name = _read_here(Path(path), prompt_field), str(path)
    if chat:
        for row in rows:
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return rows, name


def _read_here(path: Path, prompt_field: str) -> list[dict[str, object]]:
    folder, split = _folder_and_split(path)
    try:
        if folder.is_dir():
            rows = _read_folder(folder, split, prompt_field)
        elif _is_parquet(path):
            rows = _read_parquet([path], prompt_field)
        else:
            rows = read_jsonl(path, prompt_field)
    except OSError as error:
        raise UserError(f"cannot read the prompts: {path}: {error.strerror or error}") from error
    return rows


def _folder_and_split(path: Path) -> tuple[Path, str | None]:
    """Return the two parts of FOLDER:SPLIT; any other path without a split."""
    folder, colon, split = str(path).rpartition(":")
    return (Path(folder), split) if colon and not path.exists() and Path(folder).is_dir() else (path, None)


def _is_parquet(path: Path) -> bool:
    """By its name, or by its first bytes; of a pipe, from which nothing can be read twice, neither."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"


def read_jsonl(path: str | Path, prompt_field: str) -> list[dict[str, object]]:
    """Rows of a JSON file, each a dict whose "prompt" is that of `prompt_field`; all other fields are kept.

    Raises:
        UserError: the file is missing, empty or no text, or a row is malformed, lacks the field, or has no usable
            prompt; the message names file and line.
    """
    rows = [_row(row, where, prompt_field) for where, row in json_rows(path, "prompts")]
    if not rows:
        raise UserError(f"{path} has no prompts: it is empty")
    return rows


PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


def read_text(path: str | Path, what: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with the mark that Windows puts first; unpacked, if it is gzipped.

    Args:
        path: the file.
        what: what it holds, for messages, such as "prompts".

    Raises:
        UserError: it cannot be read, or is no such text.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what}: {path}: {error.strerror or error}") from error
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read the {what}: {path} is a damaged gzip file: {error}") from error
    for magic, name in PACKED.items():
        if data.startswith(magic):
            raise UserError(f"cannot read the {what}: {path} is a {name} file: unpack it, or use gzip")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        name = "UTF-16" if wide else "UTF-8"
        raise UserError(
            f"cannot read the {what}: {path} is not {name} text (byte {error.start}): save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"cannot read the {what}: {path} has a zero byte: it is no text, or UTF-16; save it as UTF-8")
    return text


def json_rows(path: str | Path, what: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The objects of a JSON Lines file, or of a file with one JSON array, each with its place for messages.

    Raises:
        UserError: the file cannot be read, or something in it is no JSON object; the message names the line.
    """
    text = read_text(path, what)
    if text.lstrip().startswith("["):
        found = _parse(text, str(path), what)
        assert isinstance(found, list)  # as its first character says
        places: Iterable[tuple[str, object]] = (
            (f"{path}, row {number}", row) for number, row in enumerate(found, start=1)
        )
    else:
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
        lines = [(where, line) for where, line in lines if line.strip()]
        if lines:
            _check_first_line(lines[0][1], text, path, what)
        places = ((where, _parse(line, where, what)) for where, line in lines)
    for where, row in places:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield where, row


def _check_first_line(line: str, text: str, path: str | Path, what: str) -> None:
    """Reject a table, another kind of text, and one object over many lines, by the first line."""
    needed = "give one JSON object a line, or a JSON array of objects"
    if not line.lstrip().startswith("{"):
        convert = "; pandas.read_csv(FILE).to_json(NEW, orient='records', lines=True) converts a CSV file"
        table = convert if "," in line or "\t" in line else ""
        raise UserError(f"cannot read the {what}: {path} is not JSON, its first line is {line!r:.60}: {needed}{table}")
    if line.strip() == "{":
        raise UserError(f"cannot read the {what}: {path} has one JSON object over several lines: {needed}")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the field {twice!r} twice; remove one")
    return found


def _parse(text: str, where: str, what: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise UserError(f"{where}: malformed JSON: {error.msg} ({place})") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or brackets in brackets
        raise UserError(f"{where}: JSON that Python cannot read: {error}") from error


def _row(row: Mapping[str, object], where: str, prompt_field: str) -> dict[str, object]:
    """A checked row whose "prompt" is that of `prompt_field`."""
    for name in row:
        if not isinstance(name, str):
            raise UserError(f"{where}: the field {name!r} must have a text as its name")
    if prompt_field not in row:
        near = nearest(prompt_field, row)
        raise UserError(f"{where}: no field {prompt_field!r}{near}; the fields are {_listed(row)}")
    others = {name: x for name, x in row.items() if name != prompt_field}
    check_prompt(row[prompt_field], where, f"field {prompt_field!r}")
    _check_names(others, where, RESERVED)
    return {"prompt": row[prompt_field], **others}


def _listed(row: Mapping[str, object]) -> str:
    names = [repr(name) for name in row]
    return ", ".join(names[:20]) + f" and {len(names) - 20} more" * (len(names) > 20) if names else "none"


def _check_names(row: Mapping[str, object], where: str, reserved: Sequence[str]) -> None:
    for name in reserved:
        if name in row:
            raise UserError(f"{where}: field {name!r} clashes with a name that reward functions get; rename it")


def check_prompt(prompt: object, where: str, name: str) -> None:
    """Reject what is neither a text that is not empty nor a chat that ends before a completion."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where}: the prompt is empty")
        _check_text(prompt, where)
        return
    if not isinstance(prompt, list):
        got = "null" if prompt is None else type(prompt).__name__
        raise UserError(f"{where}: {name} must be a string or a list of messages, got {got}")
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
    """Reject half of a UTF-16 pair, which JSON can hold as an escape sequence, but no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the prompt has {text[error.start]!a} at character {error.start}, which is half of a character"
            " (a lone surrogate): correct the data"
        ) from error


def as_rows(rows: Iterable[Mapping[str, object]], name: str = "rows") -> list[dict[str, object]]:
    """Rows that come from Python, as a list of dicts, checked as the rows of a file are.

    Args:
        rows: dicts with a "prompt".
        name: what messages call them.

    Raises:
        UserError: they are something else, such as a dict of columns or a DataFrame; there are none; or one has no
            usable prompt.
    """
    what = f"{name} must be a list of dicts, one for each prompt"
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"{what}, got {type(rows).__name__}")
    found = list(rows)
    if not found:
        raise UserError(f"{name} has no prompts: it is empty")
    for number, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise UserError(f'{what}, but {name}[{number}] is {str(row)[:40]!r}: give {{"prompt": text}}')
    return [_row(row, f"{name}[{number}]", "prompt") for number, row in enumerate(found)]


def _read_folder(folder: Path, split: str | None, prompt_field: str) -> list[dict[str, object]]:
    if (folder / "state.json").is_file() and split is None:  # written by Dataset.save_to_disk
        return _read_dataset(folder, prompt_field)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file())
        return _read_dataset(folder / _known_split(folder, split, splits), prompt_field)
    names = sorted(os.listdir(folder))  # unlike `glob`, it reports a folder that cannot be read
    files = [name for name in names if name.endswith(".parquet")]
    splits = sorted({_split_of_file(name) for name in files} - {""})
    if split is not None or len(splits) > 1:
        split = _known_split(folder, split, splits)
        files = [name for name in files if _split_of_file(name) == split]
    if files:
        return _read_parquet([folder / name for name in files], prompt_field)
    other = next((name for name in names if name.endswith((".jsonl", ".json", ".gz"))), None)
    advice = f": name a file in it, such as {folder / other}" if other is not None else ""
    raise UserError(
        f"{folder} is a folder, but neither did save_to_disk write it nor does it hold .parquet files{advice}"
    )


def _split_of_file(name: str) -> str:
    """Return the split with which the name of a file begins, as in train-00000-of-00001.parquet; "" if none."""
    word = re.split(r"[-_.]", name)[0]
    return word if word in SPLITS else ""


def _known_split(folder: Path, split: str | None, splits: list[str]) -> str:
    """Return the split that is named, if the folder has it."""
    if split in splits:
        return split
    if not splits:
        raise UserError(f"{folder} has no splits: leave out :{split}")
    several = f"holds the splits {', '.join(splits)}" if split is None else f"has no split {split!r}"
    raise UserError(f"{folder} {several}: name one of its splits, for instance {folder}:{splits[0]}")


def _read_dataset(folder: Path, prompt_field: str) -> list[dict[str, object]]:
    datasets = _package("datasets", folder)
    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read the data set in {folder}: {error}") from error
    return _rows(rows, str(folder), prompt_field)


def _read_parquet(files: list[Path], prompt_field: str) -> list[dict[str, object]]:
    arrow, parquet = _package("pyarrow", files[0]), _package("pyarrow.parquet", files[0])
    rows: list[dict[str, object]] = []
    for file in files:
        try:
            names = parquet.read_schema(str(file)).names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{file} has the column {twice!r} twice: remove one")
            read = parquet.read_table(str(file), partitioning=None).to_pylist()
        except (OSError, ValueError, OverflowError, arrow.ArrowException) as error:  # not UTF-8, no such time
            raise UserError(f"cannot read the prompts: {file}: {error}") from error
        rows += _rows(read, str(file), prompt_field)
    return rows


def _rows(rows: Iterable[dict[str, object]], where: str, prompt_field: str) -> list[dict[str, object]]:
    found = [_row(dict(row), f"{where}, row {number}", prompt_field) for number, row in enumerate(rows, start=1)]
    if not found:
        raise UserError(f"{where} has no prompts: it is empty")
    return found


def _package(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{path} needs {package}: pip install {package}, or the extra ppo_fast[data]") from error


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> list[list[int]]:
    """Each prompt's tokens: of a text as the tokenizer makes them, of a chat those of its template.

    The template ends where the assistant's answer begins, and has written its own special tokens: the tokenizer does
    not add a second begin token. Neither does it to a text that begins with this token, and what it appends to a text,
    such as an end token, is left out, because the completion continues the text (`tokenizer_notes` reports both).
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [chat_text(tokenizer, prompt) for prompt in prompts if not isinstance(prompt, str)]
    plain = iter(_plain_ids(tokenizer, texts) if texts else [])
    # verbose: a warning of too many tokens, although long prompts are left out
    templated = iter(tokenizer(chats, add_special_tokens=False, verbose=False)["input_ids"] if chats else [])
    return [next(plain if isinstance(prompt, str) else templated) for prompt in prompts]


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    before, after = added_ids(tokenizer)
    found = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        ids = without_second_begin(ids, before)
        found.append(ids[: -len(after)] if after and ids[-len(after) :] == after else ids)
    return found


def added_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
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


def tokenizer_notes(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> list[str]:
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
    assert isinstance(begin, str)  # of one list of ids
    some = [text for text in texts if begin and text.startswith(begin)]
    if some:
        twice = sum(without_second_begin(ids, before) != ids for ids in tokenizer(some)["input_ids"])
        if twice:
            notes.append(
                f"{twice} of {len(texts)} prompts begin with {begin!r}, which the tokenizer puts"
                " before each text: it is not added a second time"
            )
    return notes


def set_template_options(tokenizer: "PreTrainedTokenizerBase", given: str) -> None:
    """Set arguments that the chat template of a tokenizer gets in a run; they are not saved with the tokenizer.

    Args:
        tokenizer: of the actor.
        given: a JSON object, such as {"enable_thinking": false}.

    Raises:
        UserError: it is no JSON object, or the template has no variable of this name.
    """
    option = "--chat-template-kwargs"
    options = json_object(option, given, '{"enable_thinking": false}')
    template = str(tokenizer.chat_template or "")
    unknown = [name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unknown:
        raise UserError(f"{option}: the chat template of the tokenizer has no variable {unknown[0]!r}")
    setattr(tokenizer, _TEMPLATE_OPTIONS, options)


def template_options(tokenizer: object) -> dict[str, Any]:  # whatever the template takes
    """Return the arguments that `set_template_options` has set."""
    return getattr(tokenizer, _TEMPLATE_OPTIONS, {})


def chat_text(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, object]], *, add_generation_prompt: bool = True
) -> str:
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
        chat = cast(list[dict[str, str]], messages)  # templates read other values than texts, too
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt, **template_options(tokenizer)
        )
    except Exception as error:  # a template computes with what it is given, and can raise an error of any class
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template fails for the prompt {messages!s:.160}: {reason}") from error
    assert isinstance(text, str)  # as tokenize=False asks for
    return text


def prompts_of(rows: Iterable[Mapping[str, object]]) -> list[Prompt]:
    """The prompts of rows that `read_prompts` or `as_rows` has checked."""
    return [cast(Prompt, row["prompt"]) for row in rows]


def as_text(prompt: Prompt) -> str:
    """A prompt for people to read: a chat becomes one line for each message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class Prompts:
    """Draws rows in a seeded random order, epoch after epoch, n at a time.

    >>> prompts = Prompts([{"prompt": "a"}, {"prompt": "b"}], seed=0)
    >>> sorted(row["prompt"] for row in prompts.take(2))
    ['a', 'b']
    """

    def __init__(self, rows: list[dict[str, object]], *, seed: int = 0) -> None:
        self.rows = rows
        self.seed = seed
        self.num_drawn = 0  # rows drawn since the start: the whole state

    def state_dict(self) -> dict[str, int]:
        """The position in the data."""
        return {"dealt": self.num_drawn}  # the name in checkpoints

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue at the position of a checkpoint."""
        self.num_drawn = int(state["dealt"])

    def take(self, n: int) -> list[dict[str, object]]:
        """The next n rows."""
        taken: list[dict[str, object]] = []
        while len(taken) < n:
            epoch, position = divmod(self.num_drawn, len(self.rows))
            some = self._order(epoch)[position : position + n - len(taken)]
            taken += [self.rows[i] for i in some]
            self.num_drawn += len(some)
        return taken

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()


def with_all_fields(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows that all have the same fields, in the same order: None where one lacks what another has."""
    fields = dict.fromkeys(name for row in rows for name in row)
    return [{**fields, **row} for row in rows]


def columns(rows: list[dict[str, object]], repeat: int) -> dict[str, list]:
    """Rows to columns, each row `repeat` times; a field that some rows lack is None there."""
    rows = with_all_fields(rows)
    return {name: [row[name] for row in rows for _ in range(repeat)] for name in rows[0]}
