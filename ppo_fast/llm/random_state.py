"""The random generators of a process: torch's on the CPU and on the device, Python's and numpy's."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_fast.common.device import get_rng_state, set_rng_state


@dataclass(frozen=True)
class RandomState:
    """The state of all generators of a process at one moment.

    Args:
        tensors: torch's: `torch`, and one named as the type of the device.
        others: Python's and numpy's, as values of JSON.
    """

    tensors: dict[str, Tensor]
    others: dict[str, Any]

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """The present state."""
        tensors = {"torch": torch.get_rng_state()}
        state = get_rng_state(device)
        if state is not None:
            tensors[device.type] = state
        kind, keys, *rest = np.random.get_state()
        return cls(tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]})

    def restore(self, device: torch.device) -> None:
        """Sets all generators to this state."""
        torch.set_rng_state(self.tensors["torch"])
        if device.type in self.tensors:
            set_rng_state(self.tensors[device.type], device)
        version, keys, gauss = self.others["python"]
        random.setstate((version, tuple(keys), gauss))
        kind, words, *rest = self.others["numpy"]
        np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))
