"""Checkpoint folders and the other files of a run: written whole or not at all.

OUT/checkpoints/step-N holds safetensors files, state.json, and SHA256SUMS over both (`sha256sum -c` reads it, too). It
is written under another name, synced to the disk, and renamed: whatever stops the process, a folder called step-N is
whole, and the one before it was not touched. Other files are written in the same way (`write_file`), and files that
grow take a whole record or nothing (`GrowingFile`). An error of the disk becomes one sentence (`reported`).
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_fast.common.errors import UserError

FORMAT = 1
SUMS = "SHA256SUMS"
STATE = "state.json"
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # of file systems that sync files, but not folders
UNFINISHED = ".unfinished"  # a folder that is being written
OUTDATED = ".outdated"  # a folder that is being removed


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # by file name without suffix


def write(
    parent: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], *, keep: int
) -> Path:
    """Writes parent/step-N and removes all but the newest `keep`.

    Args:
        parent: made if it is missing.
        step: N.
        tensors: what goes into each safetensors file, by its name without suffix. Must not share memory.
        state: what JSON can hold.
        keep: how many checkpoints stay, this one included.

    Raises:
        UserError: it cannot be written, for instance because the disk is full. The earlier ones are whole.
    """
    folder = parent / f"step-{step}"
    new = parent / (folder.name + UNFINISHED)
    try:
        with reported(f"the checkpoint of step {step} could not be written to {parent}", parent):
            sweep(parent)
            new.mkdir(parents=True)
            for name, some in tensors.items():
                save_file({key: x.detach().cpu().contiguous() for key, x in some.items()}, new / f"{name}.safetensors")
            (new / STATE).write_text(json.dumps({"format": FORMAT, "step": step, **state}) + "\n", encoding="utf-8")
            files = sorted(new.iterdir())
            (new / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")
            replace(new, folder)
    except UserError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    prune(parent, keep)
    return folder


@contextmanager
def reported(what: str, path: Path | None = None) -> Iterator[None]:
    """Turns an error of the disk inside this block into a sentence.

    Args:
        what: the first part of the sentence, such as "the model could not be written to runs/first/model".
        path: a file or folder of a run, whose newest checkpoint is named; None: no run is concerned.

    Raises:
        UserError: "WHAT: reason; where to resume".
    """
    try:
        yield
    except Exception as error:  # tokenizers raises a plain Exception; its text ends in "(os error 28)" for a full disk
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what}: {reason}" + (f"; {_where_to_resume(path)}" if path is not None else "")) from error


def _where_to_resume(path: Path) -> str:
    """Names the newest checkpoint of the run that a file or folder belongs to."""
    near = [path, *(above / "checkpoints" for above in (path, *path.parents[:2]))]
    last = next((found for folder in near if (found := newest(folder)) is not None), None)
    if last is None:
        return "there is no checkpoint to resume from"
    return f"{last} is whole, and the run can be resumed from it with --resume"


def _encoded(text: bytes | str) -> bytes:
    """UTF-8. Half of a surrogate pair, which UTF-8 cannot hold, becomes a backslash escape, as JSON has them."""
    return text.encode("utf-8", errors="backslashreplace") if isinstance(text, str) else text


def write_file(path: Path, data: bytes | str) -> None:
    """Writes a whole file, or leaves the one that was there.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(path.name + UNFINISHED)
    try:
        new.write_bytes(_encoded(data))
        sync(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


class GrowingFile:
    """A file to which whole records are appended: a record that does not fit on the disk leaves no part of it.

    Errors are UserErrors that name the newest checkpoint of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reported():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab", buffering=0)  # without a buffer: `close` has nothing left to write

    def lost(self) -> bool:
        """Whether somebody has removed or renamed the file, or a folder above it, since it was opened."""
        try:
            return not os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except OSError:
            return True

    def write(self, record: bytes | str) -> None:
        """Appends the record."""
        with self._reported():
            end = os.fstat(self.file.fileno()).st_size
            left = memoryview(_encoded(record))
            try:
                while left:
                    left = left[self.file.write(left) :]
            except OSError:
                with suppress(OSError):  # the error to report is that of writing
                    self.file.truncate(end)
                raise

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Appends a line of JSON."""
        self.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

    def flush(self) -> None:
        """Does nothing: no record waits in a buffer. `RecordWriter` of TensorBoard calls it."""

    def sync(self) -> None:
        """Waits until all records are on the disk."""
        with self._reported():
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def _reported(self) -> AbstractContextManager[None]:
        return reported(f"{self.path} could not be written", self.path)


def prune(parent: Path, keep: int) -> None:
    """Removes all but the newest `keep`."""
    with reported(f"an old checkpoint could not be removed from {parent}", parent):
        for old in _all(parent)[:-keep]:
            remove(old)


def drop_after(parent: Path, step: int) -> None:
    """Removes checkpoints of later steps: they belong to a branch of the run that `step` does not continue."""
    for folder in _all(parent):
        if _step_of(folder) > step:
            remove(folder)


def newest(parent: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    found = _all(parent)
    return found[-1] if found else None


def read(folder: Path) -> Checkpoint:
    """A checkpoint that `write` wrote.

    Raises:
        UserError: it is damaged, or something else; the message says which file and why.
    """
    sums = _sums(folder)
    for name, written in sums.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"the checkpoint {folder} is damaged: {name} is missing; {_advice(folder)}")
        try:
            found = sha256(file)
        except OSError as error:
            raise UserError(f"cannot read the checkpoint: {file}: {error.strerror or error}") from error
        if found != written:
            raise UserError(f"the checkpoint {folder} is damaged: {name} is not as it was written; {_advice(folder)}")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"the checkpoint {folder} is damaged: {STATE} is not JSON; {_advice(folder)}") from error
    if state.get("format") != FORMAT:
        raise UserError(f"the checkpoint {folder} has format {state.get('format')}; this ppo_fast reads {FORMAT}")
    tensors = {Path(name).stem: load_file(folder / name) for name in sums if name.endswith(".safetensors")}
    return Checkpoint(folder, state, tensors)


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        others = [other for other in _all(folder.parent) if other != folder]
        advice = f"; {_advice(folder)}" if others else ""
        raise UserError(f"{folder} is not a checkpoint of ppo_fast: no readable {SUMS} in it{advice}") from error
    found = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) != len(lines) or STATE not in sums:
        raise UserError(f"the checkpoint {folder} is damaged: {SUMS} is not as it was written; {_advice(folder)}")
    return sums


def _advice(folder: Path) -> str:
    others = [other for other in _all(folder.parent) if other != folder]
    return f"remove it to continue from {others[-1]}" if others else "there is no other: start anew with --overwrite"


def _all(parent: Path) -> list[Path]:
    """Whole checkpoints in the order of their steps."""
    found = [p for p in parent.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def sweep(parent: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for folder in [*parent.glob("*" + UNFINISHED), *parent.glob("*" + OUTDATED)]:
        _delete(folder)


def remove(folder: Path) -> None:
    """Removes a folder; its name goes first, so that no half of it is taken for a whole."""
    _delete(_set_aside(folder))


def _delete(folder: Path) -> None:
    """Deletes a folder; of a link to one, which may lie on another disk, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _set_aside(folder: Path) -> Path:
    outdated = folder.with_name(folder.name + OUTDATED)
    if outdated.exists() or outdated.is_symlink():
        _delete(outdated)
    return folder.rename(outdated)


def replace(new: Path, folder: Path) -> None:
    """Gives `new` the name `folder` after all in it has reached the disk; one that has it already is removed.

    If the process is killed in between, `recover` gives the old one its name back.
    """
    for path in sorted(new.rglob("*")):
        sync(path)
    sync(new)
    outdated = _set_aside(folder) if folder.exists() else None
    os.rename(new, folder)
    sync(folder.parent)
    if outdated is not None:
        _delete(outdated)


def recover(folder: Path) -> None:
    """Cleans up after a `replace` that did not come to its end: `folder` is the old one, or the new one, but whole."""
    new, outdated = (folder.with_name(folder.name + suffix) for suffix in (UNFINISHED, OUTDATED))
    if outdated.exists() and not folder.exists():
        outdated.rename(folder)
    for left in (new, outdated):
        if left.exists():
            shutil.rmtree(left)


def check_folders(out: Path) -> None:
    """Raises UserError if OUT, or a name in it, is one that the run could not write to or replace at its end."""
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{str(out).encode(errors='backslashreplace').decode()} is not ASCII, which is the encoding of this"
            " process: set PYTHONUTF8=1, or choose another --out"
        ) from None
    for name in ("model", "best", "checkpoints", "eval"):
        path = out / name
        replaced = name in ("model", "best")  # as a whole, by renaming: a link would not lead to the new one
        if path.is_symlink() and (replaced or not path.exists()):
            raise UserError(f"{path} is a link, and the run needs a folder there: remove it, or choose another --out")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, and the run needs a folder there: remove it, or choose another --out")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SYNC):
            raise
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
