"""The options of token_logprobs, as ppo_fast.ops builds them for every implementation, and its outputs."""

from typing import NamedTuple

import torch
from torch import Tensor


class LogprobOptions(NamedTuple):
    temperature: float = 1.0
    with_entropy: bool = False
    inplace_backward: bool = False  # the gradient is written over the logits


def compute_dtype(logits: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def allocate(logits: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Uninitialised logprobs, entropy (None if it is not wanted), and statistics [4, N] for the backward."""
    dtype = compute_dtype(logits)
    logprobs = torch.empty_like(tokens, dtype=dtype, memory_format=torch.contiguous_format)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    return logprobs, entropy, torch.empty(4, tokens.numel(), dtype=dtype, device=logits.device)
