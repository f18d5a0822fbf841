"""Checkpoint folders: written whole or not at all, and refused if they are not what was written.

OUT/checkpoints/step-N holds safetensors files, state.json, and SHA256SUMS over both (`sha256sum -c` reads it, too). It
is written under another name, synced to the disk, and renamed: whatever stops the process, a folder called step-N is
whole, and the one before it was not touched.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_fast.errors import UserError

FORMAT = 1
SUMS = "SHA256SUMS"
STATE = "state.json"
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
        sweep(parent)
        new.mkdir(parents=True)
        for name, some in tensors.items():
            save_file({key: x.detach().cpu().contiguous() for key, x in some.items()}, new / f"{name}.safetensors")
        (new / STATE).write_text(json.dumps({"format": FORMAT, "step": step, **state}) + "\n", encoding="utf-8")
        files = sorted(new.iterdir())
        (new / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")
        replace(new, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        last = newest(parent)
        whole = f"{last} is whole, and a run goes on from there with --resume" if last else "there is none before it"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the checkpoint of step {step} could not be written to {parent}: {reason}; {whole}") from error
    prune(parent, keep)
    return folder


def prune(parent: Path, keep: int) -> None:
    """Removes all but the newest `keep`."""
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
        if sha256(file) != written:
            raise UserError(f"the checkpoint {folder} is damaged: {name} is not as it was written; {_advice(folder)}")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise UserError(f"the checkpoint {folder} has format {state.get('format')}; this ppo_fast reads {FORMAT}")
    tensors = {Path(name).stem: load_file(folder / name) for name in sums if name.endswith(".safetensors")}
    return Checkpoint(folder, state, tensors)


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is not a checkpoint of ppo_fast: no readable {SUMS} in it") from error
    found = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) != len(lines) or STATE not in sums:
        raise UserError(f"the checkpoint {folder} is damaged: {SUMS} is not as it was written; {_advice(folder)}")
    return sums


def _advice(folder: Path) -> str:
    others = [other for other in _all(folder.parent) if other != folder]
    return f"remove it to go on from {others[-1]}" if others else "there is no other: start anew with --overwrite"


def _all(parent: Path) -> list[Path]:
    """Whole checkpoints in the order of their steps."""
    found = [p for p in parent.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def sweep(parent: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for folder in [*parent.glob("*" + UNFINISHED), *parent.glob("*" + OUTDATED)]:
        shutil.rmtree(folder)


def remove(folder: Path) -> None:
    """Removes a folder; its name goes first, so that no half of it is taken for a whole."""
    shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    outdated = folder.with_name(folder.name + OUTDATED)
    if outdated.exists():
        shutil.rmtree(outdated)
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
        shutil.rmtree(outdated)


def recover(folder: Path) -> None:
    """Cleans up after a `replace` that did not come to its end: `folder` is the old one, or the new one, but whole."""
    new, outdated = (folder.with_name(folder.name + suffix) for suffix in (UNFINISHED, OUTDATED))
    if outdated.exists() and not folder.exists():
        outdated.rename(folder)
    for left in (new, outdated):
        if left.exists():
            shutil.rmtree(left)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
