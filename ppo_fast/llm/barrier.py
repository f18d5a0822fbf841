"""A barrier with a time limit that names the process that is missing, before each collective operation.

A collective operation waits inside PyTorch until its process group gives up, and its error names no process. Here each
process announces itself in the key-value store of the process group and waits with a limit of its own, so that a slow
or dead process is named.
"""

import time
from typing import TYPE_CHECKING

from ppo_fast.common.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

PAUSE = 0.1  # seconds, the longest between two looks at the store
SILENCE = 3.0  # seconds in which a process that has lost another one announces itself
FAILED = "ppo_fast/failed"  # the key of the rank that has failed


class MonitoredBarrier:
    """The barriers at which a process waits for the others; all processes reach them in the same order.

    Args:
        store: of the process group.
        rank: of this process.
        size: the number of processes.
        limit: seconds after which a barrier fails.
    """

    def __init__(self, store: "Store", rank: int, size: int, limit: float) -> None:
        self.store, self.rank, self.size, self.limit = store, rank, size, limit
        self.count = 0
        self._announce("the start")

    def __call__(self, where: str, *, signal: str = "") -> str:
        """Wait for all processes.

        Args:
            where: what this process has finished, for the messages of the others.
            signal: the name of the signal that asked this process to stop; "" without one.

        Returns:
            The name of a signal that any process brought, the same in all; "" if none did.

        Raises:
            UserError: a process has failed, or did not come in time; the message names it and what it did last.
        """
        name = f"ppo_fast/barrier/{self.count}"
        self.count += 1
        self._announce(where)
        if signal:
            self.store.set(f"{name}/signal", signal)
        if self.store.add(f"{name}/arrived", 1) == self.size:
            brought = self.store.get(f"{name}/signal").decode() if self.store.check([f"{name}/signal"]) else ""
            self.store.set(f"{name}/all", brought)
        if not self._comes(f"{name}/all", self.limit):
            missing = self._named(self._late()) or "no rank"
            self.failed()  # a late process must not find this barrier complete, and wait for this process
            raise UserError(
                f"rank {self.rank} waited {self.limit:g} s after {where!r} for processes that did not come: {missing};"
                " process_timeout sets this limit"
            )
        self._raise_if_one_failed()
        brought = self.store.get(f"{name}/all").decode()
        self._remove_keys(self.count - 2)
        return brought

    def failed(self) -> None:
        """Announce to the others that this process ends with an error."""
        self.store.set(FAILED, str(self.rank))

    def lost(self) -> str:
        """Name the processes that no longer answer, after a collective operation failed; "" if all do.

        Each process in which the operation failed announces itself. A process that does not announce itself within
        SILENCE seconds has ended, or still computes.

        Raises:
            UserError: a process has announced that it failed.
        """
        self._raise_if_one_failed()
        self.store.set(f"ppo_fast/lost/{self.rank}", "")
        end = time.monotonic() + SILENCE
        silent = [r for r in range(self.size) if not self._comes(f"ppo_fast/lost/{r}", end - time.monotonic())]
        return self._named(silent)

    def _announce(self, where: str) -> None:
        self.store.set(f"ppo_fast/at/{self.rank}", f"{self.count} {where}")

    def _comes(self, key: str, limit: float) -> bool:
        """Whether the key is in the store within `limit` seconds.

        `store.wait` is not used: it blocks signal handlers, and TCPStore prints a warning after each time limit.
        """
        begun = time.monotonic()
        while not self.store.check([key]):
            passed = time.monotonic() - begun
            if passed > limit:
                return False
            self._raise_if_one_failed()
            time.sleep(min(PAUSE, 0.001 + passed / 20))
        return True

    def _raise_if_one_failed(self) -> None:
        if self.store.check([FAILED]):
            rank = self.store.get(FAILED).decode()
            raise UserError(f"rank {rank} has ended with an error; the reason is in its own message")

    def _remove_keys(self, number: int) -> None:
        """Remove the keys of an earlier barrier, which every process has left."""
        if number >= 0 and self.rank == 0:
            for key in ("signal", "arrived", "all"):
                self.store.delete_key(f"ppo_fast/barrier/{number}/{key}")

    def _late(self) -> list[int]:
        """The ranks that have not come to the barrier at which this process waits."""
        return [rank for rank in range(self.size) if self._last(rank)[0] < self.count]

    def _last(self, rank: int) -> tuple[int, str]:
        """How many barriers a process has reached, and what it had finished then."""
        key = f"ppo_fast/at/{rank}"
        if not self.store.check([key]):  # get would wait for it
            return 0, "nothing"
        count, _, where = self.store.get(key).decode().partition(" ")
        return int(count), where

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank}, last seen after {self._last(rank)[1]!r}" for rank in ranks)
