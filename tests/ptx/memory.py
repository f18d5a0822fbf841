"""Global and shared memory of a launch, with checks of every access.

Memory holds no shadow copy: accesses are written down and compared at barriers and at the end of a launch, so a tensor
with a stride of 2^31 costs no more than a small one. Bytes that have never been written are recognised by their value,
POISON, which allocations are filled with.
"""

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ptx.arithmetic import Value
from ptx.races import Access, between_programs, between_warps
from ptx.translate import POISON

Report = Callable[[str, int], None]  # (what is wrong, index of the instruction)
_TYPES: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ALL = np.arange(1)


class Segment(NamedTuple):
    """The memory of one tensor's storage."""

    start: int  # address
    data: np.ndarray  # uint8
    label: str  # names of the arguments that point into it
    element: int = 4  # bytes of the smallest element of these tensors; 1 for bool only
    inside: np.ndarray | None = None  # for each element, whether one of these tensors has it; None: each has all

    @property
    def end(self) -> int:
        return self.start + len(self.data)


def poisoned(raw: np.ndarray, size: int) -> bool:
    """Whether bytes hold POISON in one of their words, in one of their halves if elements have `size` 2, or, if they
    are bools, in one of them."""
    if size == 1:
        return bool(np.isin(raw, np.frombuffer(np.uint32(POISON).tobytes(), np.uint8)).any())
    kind, value = (np.uint16, POISON % 2**16) if size == 2 else (np.uint32, POISON)
    return bool(np.count_nonzero(np.ascontiguousarray(raw).view(kind) == value))


class _Memory:
    """What global and shared memory share: which threads access what."""

    def __init__(self, threads: int, report: Report) -> None:
        self.report = report
        self.warps = np.arange(threads) // 32
        self.threads = threads
        self.program = self.epoch = 0

    def active(self, addresses: Value, mask: Value | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Addresses of the threads that take part, and which threads those are (None: all, or one for all)."""
        if mask is None or (np.ndim(mask) == 0 and mask):
            return np.atleast_1d(addresses), None
        if np.ndim(mask) == 0:
            return np.empty(0, np.uint64), _ALL[:0]
        chosen = np.flatnonzero(mask)
        if len(chosen) == self.threads:
            return np.atleast_1d(addresses), None
        return (addresses[chosen] if np.ndim(addresses) else np.full(len(chosen), addresses)), chosen

    def access(
        self, writes: bool, instruction: int, addresses: np.ndarray, width: int, chosen: np.ndarray | None
    ) -> Access:
        warps = self.warps if chosen is None else self.warps[chosen]
        if len(addresses) == 1 < len(warps):  # one address for all threads: each warp reads, and one of them writes
            warps = warps[:1] if writes else np.unique(warps)
            addresses = np.repeat(addresses, len(warps))
        return Access(writes, instruction, self.program, self.epoch, addresses, width, warps)

    def spread(self, loaded: np.ndarray, chosen: np.ndarray | None, scalar: bool) -> list[Value]:
        """Columns of what the active threads loaded, one number for each thread; POISON in the others."""
        if scalar:
            return [loaded[0, i] for i in range(loaded.shape[1])]
        if chosen is None:
            return [loaded[:, i] for i in range(loaded.shape[1])]
        poison = (POISON << 32 | POISON) % 2 ** (8 * loaded.dtype.itemsize)
        out = np.full((loaded.shape[1], self.threads), poison, loaded.dtype)
        out[:, chosen] = loaded.T
        return list(out)

    def columns(self, values: tuple[Value, ...], width: int, count: int, chosen: np.ndarray | None) -> np.ndarray:
        """Values to store, (active threads, count)."""
        rows = self.threads if chosen is None else len(chosen)
        out = np.empty((rows, count), _TYPES[width])
        for i, value in enumerate(values):
            out[:, i] = value[chosen] if chosen is not None and np.ndim(value) else value
        return out

    def aligned(self, addresses: np.ndarray, width: int, instruction: int) -> bool:
        if width > 1 and np.count_nonzero(addresses & np.uint64(width - 1)):
            self.report(f"misaligned access of {width} bytes", instruction)
            return False
        return True

    def one_writer(self, addresses: np.ndarray, rows: np.ndarray, instruction: int) -> tuple[np.ndarray, np.ndarray]:
        """Report threads that store different values to one address in one instruction."""
        if len(addresses) == 1 and len(rows) > 1:
            if np.count_nonzero(rows != rows[0]):
                self.report("threads store different values to one address", instruction)
            return addresses, rows[:1]
        if np.count_nonzero(addresses[1:] <= addresses[:-1]):
            order = np.argsort(addresses, kind="stable")
            again = order[1:][addresses[order][1:] == addresses[order][:-1]]
            before = order[:-1][addresses[order][1:] == addresses[order][:-1]]
            if np.count_nonzero(rows[again] != rows[before]):
                self.report("threads store different values to one address", instruction)
        return addresses, rows


class GlobalMemory(_Memory):
    """Storages of tensors, at the addresses that the tensors have."""

    def __init__(self, segments: list[Segment], threads: int, report: Report) -> None:
        super().__init__(threads, report)
        self.segments = sorted(segments, key=lambda segment: segment.start)
        self.starts = [segment.start for segment in self.segments]
        self.log: dict[int, list[Access]] = {segment.start: [] for segment in self.segments}

    def find(self, low: int, high: int) -> Segment | None:
        """The storage that holds all bytes from low to high."""
        i = bisect.bisect_right(self.starts, low) - 1
        return self.segments[i] if i >= 0 and high <= self.segments[i].end else None

    def pieces(self, addresses: np.ndarray, size: int, operation: str, instruction: int) -> list[tuple[Segment, Any]]:
        """Storages, and which of the addresses are in them; an address in none of them is reported."""
        if not len(addresses):
            return []
        whole = self.find(int(addresses.min()), int(addresses.max()) + size)
        if whole is not None:
            return [(whole, slice(None))]
        left, found = np.ones(len(addresses), bool), []
        for segment in self.segments:
            if len(segment.data) < size:
                continue
            inside = left & (addresses >= segment.start) & (addresses <= segment.end - size)
            if inside.any():
                found.append((segment, np.flatnonzero(inside)))
                left &= ~inside
        if left.any():
            self.report(f"{operation} out of bounds by {self.distance(int(addresses[left][0]), size)}", instruction)
        return found

    def distance(self, address: int, size: int) -> str:
        """How far an access goes beyond the nearest tensor."""
        distances = [(max(s.start - address, address + size - s.end), s.label) for s in self.segments]
        if not distances:
            return f"any tensor ({address:#x})"
        gap, label = min(distances)
        return f"{gap} bytes ({label})"

    def load(self, addresses: Value, width: int, count: int, mask: Value | None, instruction: int) -> list[Value]:
        active, chosen = self.active(addresses, mask)
        scalar, size = np.ndim(addresses) == 0 and chosen is None, width * count
        out = np.full((len(active), count), POISON % 2 ** (8 * width), _TYPES[width])
        if self.aligned(active, size, instruction):
            for segment, which in self.pieces(active, size, "load", instruction):
                here = active[which]
                self.log[segment.start].append(
                    self.access(False, instruction, here, size, which if chosen is None else chosen[which])
                    if not isinstance(which, slice)
                    else self.access(False, instruction, here, size, chosen)
                )
                out[which] = self.values(segment, here, width, count, instruction)
        return self.spread(out, chosen, scalar)

    def values(self, segment: Segment, addresses: np.ndarray, width: int, count: int, instruction: int) -> np.ndarray:
        size = width * count
        offsets = (addresses - np.uint64(segment.start)).astype(np.int64)
        first = int(offsets[0])
        if (
            len(offsets) > 1
            and int(offsets[-1]) == first + size * (len(offsets) - 1)
            and not np.count_nonzero(offsets[1:] - offsets[:-1] != size)
        ):
            raw = segment.data[first : first + size * len(offsets)].reshape(len(offsets), size)
        else:
            raw = segment.data[offsets[:, None] + np.arange(size)]
        if self.unwritten(segment, raw, offsets, width):
            self.report(f"load of bytes of {segment.label} that have never been written", instruction)
        return np.ascontiguousarray(raw).view(_TYPES[width])

    def unwritten(self, segment: Segment, raw: np.ndarray, offsets: np.ndarray, width: int) -> bool:
        """Whether a loaded word or half, a bool, or the word around another byte, is POISON."""
        if width >= 2 or segment.element == 1:
            return poisoned(raw, min(width, segment.element))
        poison = np.frombuffer(np.uint32(POISON).tobytes(), np.uint8)
        suspicious = raw[:, 0] == poison[offsets % 4]
        for offset in offsets[suspicious]:
            word = segment.data[offset // 4 * 4 : offset // 4 * 4 + 4]
            if len(word) == 4 and np.array_equal(word, poison):
                return True
        return False

    def store(
        self,
        addresses: Value,
        width: int,
        count: int,
        mask: Value | None,
        instruction: int,
        values: tuple[Value, ...],
    ) -> None:
        active, chosen = self.active(addresses, mask)
        size = width * count
        if not len(active) or not self.aligned(active, size, instruction):
            return
        rows = self.columns(values, width, count, chosen)
        if len(rows) > len(active) == 1 and np.ndim(addresses) == 0:
            rows = rows if np.count_nonzero(rows != rows[0]) else rows[:1]
        active, rows = self.one_writer(active, rows, instruction)
        for segment, which in self.pieces(active, size, "store", instruction):
            here = active[which]
            threads = which if chosen is None else chosen[which]
            self.log[segment.start].append(
                self.access(True, instruction, here, size, None if isinstance(threads, slice) else threads)
            )
            offsets = (here - np.uint64(segment.start)).astype(np.int64)
            raw = np.ascontiguousarray(rows[which]).view(np.uint8).reshape(len(offsets), size)
            if (width >= 2 or segment.element == 1) and poisoned(raw, min(width, segment.element)):
                self.report("store of a register that was never written", instruction)
            if (
                segment.inside is not None
                and not segment.inside[
                    offsets[:, None] // segment.element + np.arange(-(-size // segment.element))
                ].all()
            ):
                self.report(f"store outside of the view {segment.label}", instruction)
            segment.data[offsets[:, None] + np.arange(size)] = raw

    def check(self) -> None:
        """Report the conflicts of a whole launch."""
        for segment in self.segments:
            log = self.log[segment.start]
            for conflict in between_programs(log):
                verb = "writes" if conflict.other_writes else "reads"
                self.report(f"a program writes bytes of {segment.label} that another program {verb}", conflict.other)
            if any(access.writes for access in log):
                self.check_warps(segment, log)

    def check_warps(self, segment: Segment, log: list[Access]) -> None:
        groups: dict[tuple[int, int], list[Access]] = {}
        for access in log:
            groups.setdefault((access.program, access.epoch), []).append(access)
        for group in groups.values():
            for conflict in between_warps(group):
                verb = "writes" if conflict.other_writes else "reads"
                self.report(
                    f"a warp writes bytes of {segment.label} that another warp {verb}, without a barrier between",
                    conflict.other,
                )


class SharedMemory(_Memory):
    """The shared memory of a block."""

    def __init__(self, size: int, threads: int, report: Report) -> None:
        super().__init__(threads, report)
        self.data = np.zeros(size, np.uint8)
        self.written = np.zeros(size, bool)
        self.log: list[Access] = []

    def reset(self) -> None:
        """For the next block."""
        self.data.fill(0xA5)
        self.written.fill(False)

    def inside(self, addresses: np.ndarray, size: int, operation: str, instruction: int) -> bool:
        if len(addresses) and int(addresses.max()) + size > len(self.data):
            self.report(f"{operation} out of bounds of shared memory ({len(self.data)} bytes)", instruction)
            return False
        return len(addresses) > 0

    def load(self, addresses: Value, width: int, count: int, mask: Value | None, instruction: int) -> list[Value]:
        active, chosen = self.active(addresses, mask)
        size, scalar = width * count, np.ndim(addresses) == 0 and chosen is None
        out = np.full((len(active), count), POISON % 2 ** (8 * width), _TYPES[width])
        if self.aligned(active, size, instruction) and self.inside(active, size, "load", instruction):
            where = active.astype(np.int64)[:, None] + np.arange(size)
            if not self.written[where].all():
                self.report("load of shared memory that was never written", instruction)
            out = self.data[where].view(_TYPES[width])
            self.log.append(self.access(False, instruction, active, size, chosen))
        return self.spread(out, chosen, scalar)

    def store(
        self,
        addresses: Value,
        width: int,
        count: int,
        mask: Value | None,
        instruction: int,
        values: tuple[Value, ...],
    ) -> None:
        active, chosen = self.active(addresses, mask)
        size = width * count
        if not self.aligned(active, size, instruction) or not self.inside(active, size, "store", instruction):
            return
        active, rows = self.one_writer(active, self.columns(values, width, count, chosen), instruction)
        where = active.astype(np.int64)[:, None] + np.arange(size)
        self.data[where] = rows.view(np.uint8).reshape(len(rows), size)
        self.written[where] = True
        self.log.append(self.access(True, instruction, active, size, chosen))

    def barrier(self) -> None:
        """Report conflicts since the last barrier."""
        for conflict in between_warps(self.log):
            verb = "writes" if conflict.other_writes else "reads"
            self.report(
                f"a warp writes shared memory that another warp {verb}, without a barrier between", conflict.other
            )
        self.log.clear()
