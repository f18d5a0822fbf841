"""Inputs of linear_logprobs and linear_ppo_loss."""

import torch
from torch import Tensor

from ppo_fast.kernels import reference

BASIC = ("hidden", "weight", "tokens", "old_logprobs", "advantages")


def make(*shape: int, V: int, D: int = 16, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with ratios on both sides of the clip range."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(*shape, D, generator=g), torch.randn(V, D, generator=g)
    tokens = torch.randint(0, V, shape, generator=g)
    logprobs = reference.linear_logprobs(hidden, weight, tokens)
    old, ref, advantages = (torch.randn(*shape, generator=g) for _ in range(3))
    x = {"hidden": hidden, "weight": weight, "tokens": tokens, "old_logprobs": logprobs + 0.3 * old}
    x |= {"advantages": advantages, "ref_logprobs": logprobs + 0.3 * ref, "weights": torch.rand(*shape, generator=g)}
    x |= {"mask": torch.rand(*shape, generator=g) < 0.7, "bias": torch.randn(V, generator=g)}
    return {name: value.to(device) for name, value in x.items()}
