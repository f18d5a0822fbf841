"""Records each operation for which the host would wait on CUDA: what it was, and which line asked for it."""

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_OWNERS = ("ppo_fast", "transformers", "peft")  # waits inside other packages belong to the one of these that called


class Wait(NamedTuple):
    """One wait of the host."""

    kind: str  # item, value, shape, copy to host, copy to device, synchronize
    operation: str
    owner: str  # the package of the innermost line of ppo_fast, transformers or peft; else "test"
    place: str  # that line, its file relative to the package: llm/packing/pack.py:33, generation/utils.py:2841
    caller: str  # the innermost line of ppo_fast; empty if there is none


class Waits(list[Wait]):
    """The waits of one block, in order."""

    def of(self, owner: str) -> "Waits":
        """Those that lines of `owner` asked for."""
        return Waits(wait for wait in self if wait.owner == owner)

    def called_from(self, file: str) -> "Waits":
        """Those inside calls by `file` of ppo_fast, as "llm/sample.py"."""
        return Waits(wait for wait in self if wait.caller.split(":")[0] == file)

    def by_place(self) -> Counter[tuple[str, str, str]]:
        """How often each (owner, place, kind) made the host wait."""
        return Counter((wait.owner, wait.place, wait.kind) for wait in self)

    def __str__(self) -> str:
        rows = sorted(Counter((w.owner, w.place, w.kind, w.operation, w.caller) for w in self).items())
        return "\n".join(f"{n:5d}  {' '.join(row[:2]):45s} {'; '.join(row[2:])}" for row, n in rows)


_recording: list[Waits] = []  # the innermost block last
_set_hook: list[Callable[[object], None]] = []  # of the extension, once the device is registered


def connect(set_hook: Callable[[object], None]) -> None:
    """Give this module the extension's function that installs the hook."""
    _set_hook[:] = [set_hook]


@contextlib.contextmanager
def record_waits() -> Iterator[Waits]:
    """The waits of this block. An inner block's are not in the outer block's list."""
    waits = Waits()
    _recording.append(waits)
    _set_hook[0](report)
    try:
        yield waits
    finally:
        _recording.pop()
        _set_hook[0](report if _recording else None)


def report(kind: str, operation: str) -> None:
    """Add a wait to the list of the current block, if there is one."""
    if _recording:
        _recording[-1].append(Wait(kind, operation, *_location()))


def _location() -> tuple[str, str, str]:
    """(owner, place, caller) of the call that is being made.

    The threads of autograd begin inside PyTorch, so they have no line: the main thread, which waits in `backward`, has.
    """
    folders = {f"{Path(found).parent}{os.sep}": name for name in _OWNERS if (found := _file_of(name))}
    main_thread = threading.main_thread().ident or 0
    # The frames have no name here: a frame that refers to itself would keep all tensors of its callers alive.
    lines = list(_lines(sys._getframe(1), folders)) or list(_lines(sys._current_frames().get(main_thread), folders))
    if not lines:
        return "unknown", "unknown", ""
    caller = next((place for owner, place in lines if owner == "ppo_fast"), "")
    return *lines[0], caller


def _file_of(package: str) -> str | None:
    return getattr(sys.modules.get(package), "__file__", None)


def _lines(frame: FrameType | None, folders: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(owner, place) of the lines of all owners, innermost first; where there are none, of the innermost test."""
    test = None
    found = False
    while frame is not None:
        file = frame.f_code.co_filename
        for folder, owner in folders.items():
            if file.startswith(folder):
                found = True
                yield owner, f"{file.removeprefix(folder)}:{frame.f_lineno}"
        if test is None and Path(file).name.startswith("test_"):
            test = "test", f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    if not found and test is not None:
        yield test
