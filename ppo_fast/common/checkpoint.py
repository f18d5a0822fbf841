"""Checkpoint folders and other files of a run: each is written completely or not at all.

OUT/checkpoints/step-N has safetensors files, state.json, and SHA256SUMS of all of them (`sha256sum -c` reads it, too).
It is written under another name, synced to the disk, and renamed: whatever stops the process, a folder called step-N is
complete, and the one before it is unchanged. Other files are written in the same way (`write_file`), and files that
grow contain each record completely or not at all (`GrowingFile`). An error of the disk becomes one sentence
(`reported`).
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
    """The contents of a checkpoint folder."""

    folder: Path
    state: dict[str, Any]  # JSON of several kinds of runs: each knows its own keys and types
    tensors: dict[str, dict[str, Tensor]]  # by file name without suffix


def write(
    parent: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, object], *, keep: int
) -> Path:
    """Write parent/step-N and remove all but the newest `keep`.

    Args:
        parent: made if it is missing.
        step: N.
        tensors: of each safetensors file, by its name without suffix. They must not share memory.
        state: a dict that JSON can represent.
        keep: number of checkpoints to keep, with this one.

    Raises:
        UserError: it cannot be written, for instance because the disk is full. The earlier ones are complete.
    """
    folder = parent / f"step-{step}"
    new = parent / (folder.name + UNFINISHED)
    try:
        with reported(f"the checkpoint of step {step} could not be written to {parent}", parent):
            remove_partial(parent)
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
    """Turn an error of the disk inside this block into a sentence.

    Args:
        what: the first part of the sentence, such as "the model could not be written to runs/first/model".
        path: a file or folder of a run, whose newest checkpoint is named; None: the block belongs to no run.

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
    """Name the newest checkpoint of the run that a file or folder belongs to."""
    near = [path, *(above / "checkpoints" for above in (path, *path.parents[:2]))]
    last = next((found for folder in near if (found := newest(folder)) is not None), None)
    if last is None:
        return "there is no checkpoint to resume from"
    return f"{last} is whole, and the run can be resumed from it with --resume"


def _encoded(text: bytes | str) -> bytes:
    """Encode as UTF-8. A lone surrogate, which UTF-8 cannot represent, becomes a backslash escape, as in JSON."""
    return text.encode("utf-8", errors="backslashreplace") if isinstance(text, str) else text


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file completely, or keep the one that exists.

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
    """A file to which records are appended: a record that does not fit on the disk leaves no part of it.

    Errors are UserErrors that name the newest checkpoint of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reported():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab", buffering=0)  # without a buffer: `close` has nothing left to write

    def lost(self) -> bool:
        """Check whether the file, or a folder above it, was removed or renamed after it was opened."""
        try:
            return not os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except OSError:
            return True

    def write(self, record: bytes | str) -> None:
        """Append a record."""
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

    def flush(self) -> None:
        """Do nothing: no record waits in a buffer. `RecordWriter` of TensorBoard calls it."""

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        with self._reported():
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _reported(self) -> AbstractContextManager[None]:
        return reported(f"{self.path} could not be written", self.path)


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    with reported(f"an old checkpoint could not be removed from {parent}", parent):
        for old in _all(parent)[:-keep]:
            remove(old)


def drop_after(parent: Path, step: int) -> None:
    """Remove checkpoints of later steps: they belong to a branch of the run that `step` does not continue."""
    for folder in _all(parent):
        if _step_of(folder) > step:
            remove(folder)


def newest(parent: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None."""
    found = _all(parent)
    return found[-1] if found else None


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint that `write` wrote.

    Raises:
        UserError: it is damaged, or something else; the message names the file and the reason.
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
    return f"remove it to continue from {others[-1]}" if others else "there is no other: start again with --overwrite"


def _all(parent: Path) -> list[Path]:
    """List complete checkpoints in the order of their steps."""
    found = [p for p in parent.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def remove_partial(parent: Path) -> None:
    """Remove folders that a killed process has written or removed in part."""
    for folder in [*parent.glob("*" + UNFINISHED), *parent.glob("*" + OUTDATED)]:
        _delete(folder)


def remove(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that a part of it is never taken for the whole."""
    _delete(_set_aside(folder))


def _delete(folder: Path) -> None:
    """Delete a folder; of a link to a folder, which may be on another disk, only the link."""
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
    """Rename `new` to `folder` after all its files have reached the disk; an earlier `folder` is removed.

    If the process is killed in between, `recover` restores the name of the earlier one.
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
    """Clean up after a `replace` that was interrupted: `folder` is then the old one or the new one, and complete."""
    new, outdated = (folder.with_name(folder.name + suffix) for suffix in (UNFINISHED, OUTDATED))
    if outdated.exists() and not folder.exists():
        outdated.rename(folder)
    for left in (new, outdated):
        if left.exists():
            shutil.rmtree(left)


def check_folders(out: Path) -> None:
    """Raise UserError if OUT, or a name in it, cannot be written to, or not be replaced at the end of the run."""
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{str(out).encode(errors='backslashreplace').decode()} is not ASCII, which is the encoding of this"
            " process: set PYTHONUTF8=1, or choose another --out"
        ) from None
    for name in ("model", "critic", "best", "checkpoints", "eval", "rollouts"):
        path = out / name
        replaced = name in ("model", "critic", "best")  # as a whole, by renaming: a link would not lead to the new one
        if path.is_symlink() and (replaced or not path.exists()):
            raise UserError(f"{path} is a link, and the run needs a folder there: remove it, or choose another --out")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, and the run needs a folder there: remove it, or choose another --out")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
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
    """Compute the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
