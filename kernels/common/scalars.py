"""Numbers as tensors, for operators of torch.compile: new values of a tensor compile nothing."""

import torch
from torch import Tensor


def as_tensor(x: float | Tensor) -> Tensor:
    """A number as a 0-dim CPU tensor. torch.full would make it a constant of the graph, an addition does not."""
    return x.detach() if isinstance(x, Tensor) else torch.zeros((), dtype=torch.float64, device="cpu") + x


def as_number(x: Tensor) -> float | Tensor:
    """Returns the number in such a tensor, or the tensor itself if it has one number per row."""
    return x.item() if x.ndim == 0 and x.device.type == "cpu" else x
