"""One run per folder: a lock that the operating system releases when its process ends, for whatever reason."""

import errno
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppo_fast.common.errors import UserError
from ppo_fast.common.folders import claim

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # of flock, for instance on NFS without a lock daemon
LOCK, HOLDER = ".lock", ".lock.holder"

_held: set[tuple[Path | None, int]] = set()  # folder and thread


def absolute(folder: str | Path) -> Path:
    """Return the folder with an absolute path; UserError if it is relative to a folder that was removed."""
    try:
        return Path(folder).absolute()
    except FileNotFoundError as error:
        raise UserError(f"{folder} is relative to the current folder, which was removed: change to another") from error


@contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Lock a folder inside this block for this thread of this process; it is made if it is missing.

    A folder with files of others is rejected (`ppo_fast.common.folders`). A thread that has the lock may enter the
    block again. Without a folder, or on a file system without locks, nothing is locked.

    Raises:
        UserError: another run has the folder, and the message names it; or the folder does not belong to this project,
            or cannot be written.
    """
    from filelock import FileLock, Timeout  # here: `ppo-fast doctor` needs no filelock

    folder = None if folder is None else absolute(folder)
    mine = (folder, threading.get_ident())
    if folder is None or mine in _held:
        yield
        return
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        claim(folder)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is using {folder}: {_holder(folder)}; choose another --out, or stop that run"
        ) from None
    except NotImplementedError:  # no flock on this file system
        yield
        return
    except OSError as error:
        if error.errno in NO_LOCKS:
            yield
            return
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    _held.add(mine)
    try:
        _say_who(folder)
        yield
    finally:
        _held.discard(mine)
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _say_who(folder: Path) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {os.getpid()} on {platform.node() or 'this machine'}, since {started}"
    try:
        (folder / HOLDER).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text(encoding="utf-8").strip() or "an unknown process"
    except OSError:
        return "an unknown process"
