"""Accesses to memory, and those of them that conflict: two that overlap, of which one writes, without an order.

Threads of a warp are ordered, warps of a block are ordered by barriers, and blocks are not ordered at all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Access(NamedTuple):
    """What one instruction did in one execution."""

    writes: bool
    instruction: int
    program: int
    epoch: int  # barriers that the block has passed
    addresses: np.ndarray  # (n,) uint64, of the active threads
    width: int  # bytes of each
    warps: np.ndarray  # (n,) of the active threads


class Conflict(NamedTuple):
    """Two instructions that access the same bytes; the first one writes."""

    writer: int
    other: int
    other_writes: bool
    address: int
    count: int  # pieces of memory that these two dispute


def _pieces(accesses: list[Access]) -> tuple[np.ndarray, ...]:
    """Per piece of memory that an access touched: its number, the access, and the warp."""
    size = min(access.width for access in accesses)
    pieces, owners, warps = [], [], []
    for i, access in enumerate(accesses):
        count = access.width // size
        first = access.addresses.astype(np.int64) // size
        pieces.append((first[:, None] + np.arange(count)).ravel() if count > 1 else first)
        owners.append(np.full(len(first) * count, i))
        warps.append(np.repeat(access.warps, count) if count > 1 else access.warps)
    return np.concatenate(pieces) * size, np.concatenate(owners), np.concatenate(warps)


def _disputed(key: np.ndarray, owner: np.ndarray, writes: np.ndarray) -> np.ndarray:
    """Indices of the entries whose key a writer and somebody else have."""
    order = np.argsort(key, kind="stable")
    key, owner, writes = key[order], owner[order], writes[order]
    starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
    several = np.minimum.reduceat(owner, starts) != np.maximum.reduceat(owner, starts)
    bad = several & np.logical_or.reduceat(writes, starts)
    if not bad.any():
        return np.empty(0, np.int64)
    return order[np.repeat(bad, np.diff(np.append(starts, len(key))))]


def _report(pieces: np.ndarray, access: np.ndarray, accesses: list[Access]) -> Iterator[Conflict]:
    """One conflict for each pair of instructions."""
    found: dict[tuple[int, int, bool], list[int]] = {}
    for piece in np.unique(pieces)[:64]:
        here = [accesses[i] for i in access[pieces == piece]]
        writer = next(a for a in here if a.writes)
        for other in here:
            if (other.program, other.epoch) != (writer.program, writer.epoch) or other is not writer:
                found.setdefault((writer.instruction, other.instruction, other.writes), []).append(int(piece))
    for (writer, other, writes), where in found.items():
        yield Conflict(writer, other, writes, where[0], len(where))


def between_programs(accesses: list[Access]) -> Iterator[Conflict]:
    """Conflicts of different blocks of a launch."""
    if not any(access.writes for access in accesses) or len({access.program for access in accesses}) < 2:
        return
    pieces, access, _ = _pieces(accesses)
    programs = np.array([a.program for a in accesses])[access]
    bad = _disputed(pieces, programs, np.array([a.writes for a in accesses])[access])
    if len(bad):
        yield from _report(pieces[bad], access[bad], accesses)


def between_warps(accesses: list[Access]) -> Iterator[Conflict]:
    """Conflicts of the warps of one block between two barriers; all accesses are of one block and epoch."""
    if len(accesses) == 0 or not any(access.writes for access in accesses):
        return
    pieces, access, warps = _pieces(accesses)
    bad = _disputed(pieces, warps, np.array([a.writes for a in accesses])[access])
    if len(bad):
        yield from _report(pieces[bad], access[bad], accesses)
