"""Execution of a translated kernel: the programs of a grid in random order, one block of threads in lockstep at a time.

Everything that a GPU would do without complaint, but should not, becomes an Issue.
"""

import itertools
import random
import re
import traceback
from collections import Counter
from typing import NamedTuple

import numpy as np
from ptx.arithmetic import Approximations, Value
from ptx.memory import GlobalMemory, Segment, SharedMemory
from ptx.program import parse
from ptx.translate import NAMESPACE, Translation, translate

MAX_BRANCHES = 1_000_000  # of a block; more is an endless loop


class Issue(NamedTuple):
    """A fault of a kernel."""

    kernel: str
    message: str
    instruction: str
    source: str  # file, line and column in the Triton source

    def __str__(self) -> str:
        return f"{self.kernel}: {self.message}: {self.instruction!r} at {self.source or 'an unknown line'}"


class Abort(Exception):
    """The block cannot continue after the fault that this names."""

    def __init__(self, message: str, instruction: int) -> None:
        super().__init__(message)
        self.instruction = instruction


class Kernel:
    """A compiled kernel that can be run."""

    def __init__(self, ptx: str, *, contract: bool = False) -> None:
        self.program = parse(ptx)
        self.translation: Translation = translate(self.program, contract=contract)
        namespace = dict(NAMESPACE)
        exec(self.translation.code, namespace)
        self.function = namespace["kernel"]

    @property
    def name(self) -> str:
        return self.program.name


class Machine:
    """One launch."""

    def __init__(self, kernel: Kernel, segments: list[Segment], shared_bytes: int) -> None:
        self.kernel = kernel
        self.threads = kernel.program.threads
        self.issues: Counter[Issue] = Counter()
        self.global_memory = GlobalMemory(segments, self.threads, self.report)
        self.shared_memory = SharedMemory(shared_bytes, self.threads, self.report)
        self.branch_count = 0
        lanes = np.arange(self.threads, dtype=np.uint32)
        self.special: dict[str, Value] = {"laneid": lanes % np.uint32(32), "tid_x": lanes}
        self.special |= {"tid_y": np.uint32(0), "tid_z": np.uint32(0)}
        self.special |= {"ntid_x": np.uint32(self.threads), "ntid_y": np.uint32(1), "ntid_z": np.uint32(1)}
        self.lane, self.first_lane = np.arange(self.threads) % 32, np.arange(self.threads) // 32 * 32

    def report(self, message: str, instruction: int) -> None:
        at = self.kernel.translation.instructions[instruction]
        self.issues[Issue(self.kernel.name, message, at.text, at.source)] += 1

    # What translated code calls

    def branches(self, mask: Value, instruction: int) -> bool:
        """Whether the block takes a branch: all its threads must agree."""
        self.branch_count += 1
        if self.branch_count > MAX_BRANCHES:
            raise Abort("endless loop", instruction)
        if np.ndim(mask) == 0:
            return bool(mask)
        taken = np.count_nonzero(mask)
        if taken not in (0, self.threads):
            raise Abort(f"divergent branch, taken by {taken} of {self.threads} threads", instruction)
        return taken > 0

    def barrier(self, mask: Value | None, instruction: int) -> None:
        waiting = self.threads if mask is None else np.count_nonzero(np.broadcast_to(mask, self.threads))
        if waiting == 0:
            return
        if waiting != self.threads:
            raise Abort(f"divergent barrier, reached by {waiting} of {self.threads} threads", instruction)
        self.shared_memory.barrier()
        self.shared_memory.epoch += 1
        self.global_memory.epoch += 1

    def whole_warps(self, members: Value, instruction: int) -> None:
        if np.count_nonzero(members != np.uint32(0xFFFFFFFF)):
            raise Abort("exchange between a part of a warp's lanes", instruction)

    def shuffle(self, mode: str, value: Value, distance: Value, clamp: Value) -> Value:
        """shfl.sync in whole warps: a thread gets the value of another lane of its warp, or keeps its own."""
        if np.ndim(value) == 0:
            return value
        lane, distance, limits = self.lane, np.asarray(distance).astype(np.int64) & 31, int(np.ravel(clamp)[0])
        segment, bound = (limits >> 8) & 31, limits & 31
        last = (lane & segment) | (bound & ~segment & 31)
        if mode == "bfly":
            source = lane ^ distance
        elif mode == "up":
            source = lane - distance
        elif mode == "down":
            source = lane + distance
        else:
            source = (lane & segment) | (distance & ~segment & 31)
        valid = source >= last if mode == "up" else source <= last
        return value[self.first_lane + np.where(valid, source, lane)]

    def reduce_warps(self, operation: np.ufunc, value: Value) -> Value:
        """redux.sync in whole warps."""
        if np.ndim(value) == 0 and operation is not np.add:
            return value
        rows = np.broadcast_to(value, self.threads).reshape(-1, 32)
        return np.repeat(operation.reduce(rows, axis=1), 32).astype(rows.dtype)

    def matrix_address(self, rows: Value, matrix: int, instruction: int) -> Value:
        """The address of each thread's two elements of a matrix. Lane 8 m + i has that of row i of matrix m."""
        addresses = np.broadcast_to(rows, self.threads)
        row = addresses[self.first_lane + 8 * matrix + self.lane // 4]
        if np.count_nonzero(row & np.uint64(15)):
            raise Abort("misaligned row of a matrix, which must be a multiple of 16 bytes", instruction)
        return row + (4 * (self.lane % 4)).astype(np.uint64)

    # The grid

    def run_block(self, parameters: dict[str, Value], approximate: Approximations) -> None:
        try:
            self.kernel.function(self, approximate, parameters)
        except Abort as fault:
            self.report(str(fault), fault.instruction)
        except NameError as unbound:
            *_, (_, python_line) = traceback.walk_tb(unbound.__traceback__)
            name = re.search(r"'(\w+?)[sf]?'", str(unbound))
            line = self.kernel.translation.line_of[python_line]
            self.report(f"register %{name[1] if name else '?'} is read before it is written", line)

    def run(
        self, parameters: dict[str, Value], grid: tuple[int, int, int], approximate: Approximations, seed: int
    ) -> None:
        """Run every program of the grid, in an order that the seed determines."""
        self.special |= {f"nctaid_{axis}": np.uint32(n) for axis, n in zip("xyz", grid, strict=True)}
        programs = list(itertools.product(*map(range, grid)))
        random.Random(seed).shuffle(programs)
        with np.errstate(all="ignore"):
            for index, position in enumerate(programs):
                self.special |= {f"ctaid_{axis}": np.uint32(n) for axis, n in zip("xyz", position, strict=True)}
                self.branch_count = 0
                self.shared_memory.reset()
                self.global_memory.program = self.shared_memory.program = index
                self.global_memory.epoch = self.shared_memory.epoch = 0
                self.run_block(parameters, approximate)
                self.shared_memory.barrier()
            self.global_memory.check()
