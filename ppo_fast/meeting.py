"""Where the processes of a run wait for each other so that a slow or dead one is named, and no other waits for good.

A collective operation waits inside PyTorch until its process group gives up, and its error names no process. Here each
process announces itself in the key-value store of the process group and waits there, with a limit of its own.
"""

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ppo_fast.errors import UserError

POLL = timedelta(seconds=1)  # Python handles signals between two waits
FAILED = "ppo_fast/failed"  # the key of the rank that has


class Meeting:
    """The meetings of one process with the others, which all come to the same ones in the same order.

    Args:
        store: of the process group.
        rank: of this process.
        size: the number of processes.
        limit: seconds after which a meeting fails.
    """

    def __init__(self, store: Any, rank: int, size: int, limit: float) -> None:
        self.store, self.rank, self.size, self.limit = store, rank, size, limit
        self.count = 0
        self.at("the start")

    def at(self, where: str) -> None:
        """Announces what this process does from now on, for the messages of the others."""
        self.store.set(f"ppo_fast/at/{self.rank}", f"{self.count} {where}")

    def __call__(self, where: str, *, flag: bool = False) -> bool:
        """Waits for all processes; whether any of them came with a flag.

        Args:
            where: what they have finished, for the message.
            flag: this process's part of the answer.

        Raises:
            UserError: a process has failed, or did not come in time; the message names it and what it was last seen
                at.
        """
        name = f"ppo_fast/meeting/{self.count}"
        self.count += 1
        self.at(where)
        flags = self.store.add(f"{name}/flags", int(flag))
        if self.store.add(f"{name}/arrived", 1) == self.size:
            self.store.set(f"{name}/all", str(self.store.add(f"{name}/flags", 0)))
        end = time.monotonic() + self.limit
        while True:
            try:
                self.store.wait([f"{name}/all"], POLL)
                break
            except dist.DistStoreError:
                if self.store.check([FAILED]):
                    rank = self.store.get(FAILED).decode()
                    raise UserError(f"rank {rank} has ended with an error; the reason is in its own message") from None
                if time.monotonic() > end:
                    raise UserError(self._missing(where)) from None
        flags = int(self.store.get(f"{name}/all"))
        self._forget(self.count - 2)
        return flags > 0

    def failed(self) -> None:
        """Tells the others that this process ends with an error."""
        self.store.set(FAILED, str(self.rank))

    def _forget(self, number: int) -> None:
        """Removes the keys of an earlier meeting, which every process has left."""
        if number >= 0 and self.rank == 0:
            for key in ("flags", "arrived", "all"):
                self.store.delete_key(f"ppo_fast/meeting/{number}/{key}")

    def late(self) -> dict[int, str]:
        """Processes that have not come to the meeting at which this one waits, and what each was last seen at."""
        found = {}
        for rank in range(self.size):
            count, _, where = self.store.get(f"ppo_fast/at/{rank}").decode().partition(" ")
            if int(count) < self.count:
                found[rank] = where
        return found

    def _missing(self, where: str) -> str:
        late = self.late()
        named = ", ".join(f"rank {rank}, last seen after {its!r}" for rank, its in late.items()) or "no rank"
        return (
            f"rank {self.rank} waited {self.limit:g} s after {where!r} for processes that did not come: {named};"
            " process_timeout sets this limit"
        )
