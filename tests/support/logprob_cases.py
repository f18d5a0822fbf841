"""Shared by the tests of token_logprobs: both backends, inputs, and the comparison with fp64."""

import torch
from support.accuracy import assert_error_at_most_twice_eager
from torch import Tensor

from ppo_fast.kernels import reference


def make(shape: tuple[int, ...], device: torch.device, *, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * scale
    tokens = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits.to(device), tokens.to(device)


def differentiate(function, logits: Tensor, tokens: Tensor, mask: Tensor | None = None, *, g=None, h=None, **options):
    """logprobs, entropy and d(sum g logp + sum h H)/d logits; g or h None: that output is not used."""
    logits = logits.detach().requires_grad_()
    logp, entropy = function(logits, tokens, mask, with_entropy=True, **options)
    outputs = [x for x, u in ((logp, g), (entropy, h)) if u is not None]
    upstream = [u.to(x) for x, u in ((logp, g), (entropy, h)) if u is not None]
    return logp.detach(), entropy.detach(), torch.autograd.grad(outputs, logits, upstream)[0]


def reference_in(dtype: torch.dtype):
    """The reference computed in `dtype`; its gradient comes back in the logits' own."""
    return lambda logits, *args, **options: reference.token_logprobs(logits.to(dtype), *args, **options)


def check(function, logits: Tensor, tokens: Tensor, mask: Tensor | None = None, **options) -> None:
    """Values and the gradients of both outputs: an error of at most twice that of PyTorch computing in fp32."""
    generator = torch.Generator().manual_seed(1)
    g, h = (torch.randn(tokens.shape, generator=generator).to(logits.device) for _ in range(2))
    actual = differentiate(function, logits, tokens, mask, g=g, h=h, **options)
    eager = differentiate(reference_in(torch.float32), logits, tokens, mask, g=g, h=h, **options)
    truth = differentiate(reference.token_logprobs, logits.double(), tokens, mask, g=g, h=h, **options)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert actual[2].dtype == logits.dtype
    for name, a, e, t in zip(("logprobs", "entropy", "gradient"), actual, eager, truth, strict=True):
        assert_error_at_most_twice_eager(a, e, t, name=name)
