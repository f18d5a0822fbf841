"""Shared by the tests of the losses: inputs, a call with its gradients, and the comparison with the reference."""

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support.accuracy import assert_error_at_most_twice_eager
from support.backends import TORCH, TRITON, Operations
from torch import Tensor

from ppo_fast.kernels import reference
from ppo_fast.kernels.loss import custom_op

AGGREGATIONS = reference.AGGREGATIONS
GRADIENTS = ("logprobs", "values", "entropy")
POLICY = ("logprobs", "old_logprobs", "advantages")
VALUE = ("values", "old_values", "returns")
PPO = ("logprobs", "values", "old_logprobs", "old_values", "advantages", "returns")
OPTIONAL = ("entropy", "ref_logprobs", "weights")
EVERYTHING = {"entropy_coef": 0.3, "kl_coef": 0.7, "kl_estimator": "k3", "dual_clip": 1.5, "value_coef": 1.3}


def make(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every per-step input in fp32, of a size at which all clips are active on some steps; fp64 gives the truth."""
    g = torch.Generator().manual_seed(seed)
    sizes = {name: 0.3 if "logprobs" in name else 1.0 for name in (*PPO, *OPTIONAL)}
    return {name: size * torch.randn(shape, generator=g).to(device) for name, size in sizes.items()}


def make_mask(shape: tuple[int, ...], device: torch.device, seed: int = 1, share: float = 0.7) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).to(device)


def evaluate(
    module: Operations | ModuleType,
    x: dict[str, Tensor],
    mask: Tensor | None = None,
    *,
    upstream: float = 1.0,
    kind: str = "ppo",
    leaf: Callable[[Tensor], Tensor] = lambda t: t.detach().clone().requires_grad_(),
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, statistics and gradients; optional inputs are used if x has them."""
    names = {"ppo": PPO, "policy": POLICY, "value": VALUE}[kind]
    needs = [name for name in GRADIENTS if name in x and (name in names or (name == "entropy" and kind != "value"))]
    x = x | {name: leaf(x[name]) for name in needs}
    given_inputs = {name: x[name] for name in OPTIONAL if name in x and kind != "value"}
    function = getattr(module, f"{kind}_loss")
    out, stats = function(*(x[name] for name in names), mask, **given_inputs, **options)
    grads = torch.autograd.grad(out, [x[name] for name in needs], torch.full_like(out, upstream), allow_unused=True)
    return out, stats, dict(zip(needs, grads, strict=True))


def to(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in x.items()}


def options_to(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}


def summation_slack(x: dict[str, Tensor], mask: Tensor | None, options: dict[str, Any]) -> float:
    """The rounding error of a sum of terms of size 1, in any order: about 1e-7 of their total weight."""
    names = ("aggregation", "denominator", "norm_length", "cu_seqlens")
    chosen = {"aggregation": "token-mean"} | {name: options[name] for name in names if name in options}
    counted = torch.ones_like(next(iter(x.values())), dtype=torch.bool) if mask is None else mask
    return max(1e-6, 1e-7 * reference.token_weights(counted, **chosen).sum().item())


def check(
    module: Operations | ModuleType,
    x: dict[str, Tensor],
    mask: Tensor | None = None,
    *,
    kind: str = "ppo",
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Check that the error is at most twice that of the reference in the inputs' own dtype; both against fp64."""
    dtype = x["values" if kind == "value" else "logprobs"].dtype
    results = [evaluate(module, x, mask, kind=kind, upstream=1.7, **options)]
    for precision in (dtype, torch.float64):
        in_dtype = to(x, precision), options_to(options, precision)
        results.append(evaluate(reference, in_dtype[0], mask, kind=kind, upstream=1.7, **in_dtype[1]))
    (actual, stats, grads), (eager, eager_stats, eager_grads), (truth, true_stats, true_grads) = results
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.shape == ()
    slack = summation_slack(x, mask, options)
    assert_error_at_most_twice_eager(actual, eager, truth, name="loss", slack=slack)
    assert list(stats) == list(true_stats)
    for name, value in stats.items():
        assert not value.requires_grad
        assert value.shape == ()
        assert_error_at_most_twice_eager(value, eager_stats[name], true_stats[name], name=name, slack=slack)
    for name, grad in grads.items():
        assert grad.dtype == x[name].dtype
        assert_error_at_most_twice_eager(grad, eager_grads[name], true_grads[name], name=f"gradient of {name}")
    return actual, stats, grads


def norm_length(aggregation: str, length: float) -> dict[str, float]:
    """The option norm_length where the aggregation has it."""
    return {"norm_length": length} if aggregation == "seq-mean-token-sum-norm" else {}


def close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Default tolerance: a few roundings of fp32 on numbers of order 1."""
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected).to(actual), rtol=tolerance, atol=1e-6)


def the_same(a: tuple, b: tuple) -> None:
    close(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        close(a[1][name], b[1][name], 1e-5)


def ragged(
    device: torch.device, lengths: tuple[int, ...] = (3, 0, 9, 1, 5)
) -> tuple[dict, Tensor, dict, Tensor, Tensor]:
    """The same sequences padded and packed: x, mask, packed x, packed mask, cu_seqlens."""
    T = max(lengths) + 2
    inside = torch.arange(T, device=device) < torch.tensor(lengths, device=device).unsqueeze(-1)
    x, mask = make(tuple(inside.shape), device), inside & make_mask(tuple(inside.shape), device)
    packed = {name: t[inside] for name, t in x.items()}
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=torch.int32)
    return x, mask, packed, mask[inside], cu_seqlens


@pytest.fixture(params=["triton", "torch", "loop"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Operations:
    """On a CPU the compiled loop of cpu.py computes small fp32 losses: "torch" is without it."""
    if request.param == "loop":
        pytest.importorskip("numba", reason="numba is not installed")
    elif request.param == "torch":
        monkeypatch.setattr(custom_op, "numba_supports", lambda *_: False)
    return TRITON if request.param == "triton" else TORCH
