"""Inputs of gae, its implementations, and their comparison with the reference in fp64."""

import pytest
import torch
from support.backends import TORCH, TRITON
from torch import Tensor

from ppo_fast.kernels import reference
from ppo_fast.kernels.gae import eager


@pytest.fixture(params=["triton", "numba", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The three implementations."""
    if request.param == "triton":
        return TRITON.gae
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr(eager, "numba_works", lambda: request.param == "numba")
    return TORCH.gae


def double(options: dict) -> dict:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}


def check(function, bound: float = 1e-5, **options) -> None:
    """Advantages and returns within `bound` of fp64, relative to the largest: fp32 sums over at most 1000 steps."""
    for actual, truth in zip(function(**options), reference.gae(**double(options)), strict=True):
        assert actual.shape == truth.shape
        assert actual.dtype == (torch.float64 if options["values"].dtype == torch.float64 else torch.float32)
        assert not actual.requires_grad
        error = (actual.double() - truth).abs().max().item() if truth.numel() else 0.0
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        assert error <= bound * scale


def everything(shape: tuple[int, ...], rows: int, seed: int = 0) -> dict:
    """Inputs with a mask that has gaps, ends, cuts and a bootstrap; NaN and flags are where they must not be read."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rewards, values, final_values = torch.randn(3, *shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.7
    flags = torch.rand(2, *shape, generator=g) < 0.15
    flags |= ~mask
    truncated = flags[1]
    final_values = torch.where(truncated & mask, final_values, torch.nan)
    return {
        "rewards": torch.where(mask, rewards, torch.nan),
        "values": torch.where(mask, values, torch.nan),
        "mask": mask,
        "terminated": flags[0],
        "truncated": truncated,
        "final_values": final_values,
        "bootstrap": torch.randn(rows, generator=g),
    }
