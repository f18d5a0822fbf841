"""The random generators of a process: torch's on the CPU and on the device, Python's and numpy's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ppo_fast.common.device import get_rng_state, set_rng_state


class HostState(TypedDict):
    """The states of Python's generator and of numpy's; in JSON, tuples are lists."""

    python: tuple[int, Sequence[int], float | None]
    numpy: tuple[str, Sequence[int], int, int, float]


@dataclass(frozen=True)
class RandomState:
    """The state of all generators of a process at one moment.

    Args:
        tensors: torch's: `torch`, and one named as the type of the device.
        others: Python's and numpy's.
    """

    tensors: dict[str, Tensor]
    others: HostState

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """The present state."""
        tensors = {"torch": torch.get_rng_state()}
        state = get_rng_state(device)
        if state is not None:
            tensors[device.type] = state
        version, words, gauss = random.getstate()
        array = np.random.get_state()
        assert isinstance(array, tuple)  # numpy's older format
        kind, keys, position, has_normal, normal = array
        numpy = (kind, keys.tolist(), position, has_normal, normal)
        return cls(tensors, {"python": (version, words, gauss), "numpy": numpy})

    def restore(self, device: torch.device) -> None:
        """Set all generators to this state."""
        torch.set_rng_state(self.tensors["torch"])
        if device.type in self.tensors:
            set_rng_state(self.tensors[device.type], device)
        version, keys, gauss = self.others["python"]
        random.setstate((version, tuple(keys), gauss))
        kind, words, position, has_normal, normal = self.others["numpy"]
        np.random.set_state((kind, np.array(words, dtype=np.uint32), position, has_normal, normal))
