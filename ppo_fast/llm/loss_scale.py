"""The loss scale of float16, in which small gradients would become 0: the algorithm of torch.amp.GradScaler.

Gradients are computed of the loss times the scale, and divided by it before they are clipped. A scale at which one of
them overflows is halved, and the update is not made. The scale doubles again after many updates.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ppo_fast.common.errors import NonFiniteError

START = 2.0**16  # GradScaler's numbers: the first scale, and the updates after which it doubles
INTERVAL = 2000
MAX_SKIPPED = 16  # in a row: from START they lead to a scale of 1


class LossScale:
    """The scale, a power of two, and when it changes. Without float16 it is 1, and nothing is multiplied."""

    def __init__(self, dtype: str) -> None:
        self.enabled = dtype == "float16"
        self.scale = START if self.enabled else 1.0
        self.made = 0  # updates since the scale changed
        self.skipped = 0  # in a row

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, times the scale."""
        (loss * self.scale if self.enabled else loss).backward()

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide gradients by the scale: exact, unless they become smaller than fp32 numbers."""
        gradients = [p.grad for p in parameters if p.grad is not None] if self.enabled else []
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def overflows(self, norms: Mapping[str, float]) -> bool:
        """Adapt the scale to an update's gradient norms; True: the update must be skipped.

        Raises:
            NonFiniteError: more than MAX_SKIPPED updates in a row were skipped.
        """
        if not self.enabled:
            return False
        if all(map(math.isfinite, norms.values())):
            self.skipped, self.made = 0, self.made + 1
            if self.made >= INTERVAL:
                self.scale, self.made = 2 * self.scale, 0
            return False
        self.scale, self.made, self.skipped = self.scale / 2, 0, self.skipped + 1
        if self.skipped > MAX_SKIPPED:
            raise NonFiniteError(
                f"{' and '.join(norms)} overflowed in float16 in {self.skipped} updates in a row, the last with a loss"
                f" scale of {2 * self.scale:g}: none of them was made; --dtype float32 has no such limit, and a lower"
                " learning rate may help"
            )
        return True

    def state_dict(self) -> dict[str, float]:
        """The scale and its counts; nothing without float16."""
        if not self.enabled:
            return {}
        return {"loss_scale": self.scale, "loss_scale_made": self.made, "loss_scale_skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the scale of a checkpoint."""
        if self.enabled:
            self.scale, self.made = state["loss_scale"], int(state["loss_scale_made"])
            self.skipped = int(state["loss_scale_skipped"])
