"""What the oracle tests share: ragged masks, inputs for both backends, and the comparison with a peer's numbers.

Ours gets NaN at masked positions and the peer zeros there, since most peers multiply by the mask. The peer computes in
fp64 where it can; ours in fp64 (torch backend) and fp32 (Triton, compiled and emulated without a GPU).
"""

from collections.abc import Callable

import torch
from torch import Tensor

B, T = 5, 9
DTYPES = {"torch": torch.float64, "triton": torch.float32}
BACKENDS = tuple(DTYPES)


def _lengths(*lengths: int) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths).unsqueeze(-1)


MASKS = {
    "full": torch.ones(B, T, dtype=torch.bool),
    "right-padded": _lengths(9, 4, 1, 7, 2),
    "left-padded": _lengths(9, 4, 1, 7, 2).flip(-1),
    "empty-row": _lengths(9, 0, 3, 0, 5),
    "gaps": _lengths(9, 9, 8, 7, 6) & (torch.arange(B * T).view(B, T) * 7 % 5 > 1),
}
WITHOUT_GAPS = ("full", "right-padded", "left-padded")


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers that fp32 holds exactly, as fp64, so that both dtypes see the same input."""
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g)).double()


def tokens_below(vocabulary: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def policy_inputs(scale: float = 0.8) -> dict[str, Tensor]:
    """Log-ratios wide enough for every clip to act on some steps, and for none to meet the clamp at +-20."""
    old = -draw(B, T, seed=1).abs()
    logprobs = old + draw(B, T, seed=2, scale=scale)
    return {"logprobs": logprobs.float().double(), "old_logprobs": old, "advantages": draw(B, T, seed=3)}


def value_inputs() -> dict[str, Tensor]:
    return {"values": draw(B, T, seed=4), "old_values": draw(B, T, seed=5), "returns": draw(B, T, seed=6, scale=1.5)}


def for_ours(mask: Tensor, dtype: torch.dtype, **tensors: Tensor) -> dict[str, Tensor]:
    """The inputs in our dtype, with NaN where masked: nothing of that may reach a result."""
    return {name: torch.where(mask, x, torch.nan).to(dtype) for name, x in tensors.items()}


def for_peer(mask: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
    return {name: torch.where(mask, x, 0.0) for name, x in tensors.items()}


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A scalar function and its gradient at x."""
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf)[0]


def assert_equal(ours: Tensor, peer: Tensor, name: str = "result", *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal up to rounding. fp64: 1e-7, because peers add 1e-8 to counts; fp32: 1e-5, some tens of roundings."""
    exact = ours.dtype == torch.float64 and peer.dtype == torch.float64
    rtol = rtol or (1e-7 if exact else 1e-5)
    atol = atol or (1e-9 if exact else 2e-6)
    torch.testing.assert_close(ours.double(), peer.double(), rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")
