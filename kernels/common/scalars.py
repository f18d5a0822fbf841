"""Numbers as tensors, for operators of torch.compile: new values of a tensor compile nothing."""

import math

import torch
from torch import Tensor


def as_tensor(x: float | Tensor) -> Tensor:
    """A number as a 0-dim CPU tensor. torch.full would make it a constant of the graph, an addition does not."""
    return x.detach() if isinstance(x, Tensor) else torch.zeros((), dtype=torch.float64, device="cpu") + x


def as_number(x: Tensor) -> float | Tensor:
    """Return the number in such a tensor, or the tensor itself if it has one number per row."""
    return x.item() if x.ndim == 0 and x.device.type == "cpu" else x


def number_tensor(x: float | Tensor | None) -> Tensor:
    """A number, or a number in a tensor on any device, as a 0-dim fp64 tensor on the CPU; NaN for None."""
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    if isinstance(x, Tensor):
        return zero + x.detach().to(zero)
    return zero + (math.nan if x is None else x)
