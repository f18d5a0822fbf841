"""policy_loss, value_loss and ppo_loss: both backends against the reference in fp64, forward and gradients."""

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import assert_error_at_most_twice_eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppo_fast.kernels import eager_loss, loss, reference
from ppo_fast.kernels.launch import interpreting

pytestmark = pytest.mark.usefixtures("nan_empty")

AGGREGATIONS = reference.AGGREGATIONS
GRADIENTS = ("logprobs", "values", "entropy")
POLICY = ("logprobs", "old_logprobs", "advantages")
VALUE = ("values", "old_values", "returns")
PPO = ("logprobs", "values", "old_logprobs", "old_values", "advantages", "returns")
OPTIONAL = ("entropy", "ref_logprobs", "weights")
EVERYTHING = {"entropy_coef": 0.3, "kl_coef": 0.7, "kl_estimator": "k3", "dual_clip": 1.5, "value_coef": 1.3}


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return loss if request.param == "triton" else eager_loss


def make(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every per-step input in fp32, of a size at which all clips are active on some steps; fp64 gives the truth."""
    g = torch.Generator().manual_seed(seed)
    sizes = {name: 0.3 if "logprobs" in name else 1.0 for name in (*PPO, *OPTIONAL)}
    return {name: size * torch.randn(shape, generator=g).to(device) for name, size in sizes.items()}


def make_mask(shape: tuple[int, ...], device: torch.device, seed: int = 1, share: float = 0.7) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).to(device)


def evaluate(
    module: ModuleType,
    x: dict[str, Tensor],
    mask: Tensor | None = None,
    *,
    upstream: float = 1.0,
    kind: str = "ppo",
    leaf: Callable[[Tensor], Tensor] = lambda t: t.detach().clone().requires_grad_(),
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, statistics and gradients; the optional inputs take part if x has them."""
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
    """A sum of terms of size 1 errs by about one rounding (1e-7) of their total weight, in whatever order it goes."""
    names = ("aggregation", "denominator", "norm_length", "cu_seqlens")
    chosen = {"aggregation": "token-mean"} | {name: options[name] for name in names if name in options}
    counted = torch.ones_like(next(iter(x.values())), dtype=torch.bool) if mask is None else mask
    return max(1e-6, 1e-7 * reference.token_weights(counted, **chosen).sum().item())


def check(
    module: ModuleType, x: dict[str, Tensor], mask: Tensor | None = None, *, kind: str = "ppo", **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The backend errs at most twice as much as the reference run in the inputs' own dtype; both against fp64."""
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


def close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Default tolerance: a few roundings of fp32 on numbers of order 1."""
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected).to(actual), rtol=tolerance, atol=1e-6)


def the_same(a: tuple, b: tuple) -> None:
    close(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        close(a[1][name], b[1][name], 1e-5)


# Numbers that a reader can check


def test_the_policy_term_differs_from_a_hand_calculation(backend, device):
    logprobs = torch.tensor([math.log(1.5), 0.0, math.log(0.5), 9.0], device=device, requires_grad=True)
    advantages = torch.tensor([1.0, 2.0, -1.0, 9.0], device=device)
    mask = torch.tensor([True, True, True, False], device=device)
    out, stats = backend.policy_loss(logprobs, torch.zeros(4, device=device), advantages, mask)
    out.backward()
    # ratios 1.5, 1, 0.5: terms max(-1.5, -1.2), -2, max(0.5, 0.8)
    close(out, (-1.2 - 2.0 + 0.8) / 3)
    close(logprobs.grad, torch.tensor([0.0, -2 / 3, 0.0, 0.0]))
    expected_kl = ((1.5 - 1 - math.log(1.5)) + 0 + (0.5 - 1 - math.log(0.5))) / 3
    for name, value in {
        "policy_loss": -0.8,
        "approx_kl": expected_kl,
        "clip_fraction": 2 / 3,
        "ratio_mean": 1.0,
        "ratio_max": 1.5,
    }.items():
        close(stats.pop(name), value)
    assert not stats


def test_the_value_term_differs_from_a_hand_calculation(backend, device):
    values = torch.tensor([0.5, 0.0, 2.0, 9.0], device=device, requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.0, 2.0, 9.0], [1.0, 1.0, 2.0, -9.0]], device=device)
    mask = torch.tensor([True, True, True, False], device=device)
    out, stats = backend.value_loss(values, old, returns, mask, clip=0.2)
    out.backward()
    # squared errors 0.25, 1, 0; with the first value clipped to 0.2: 0.64
    close(out, 0.5 * (0.64 + 1.0 + 0.0) / 3)
    close(values.grad, torch.tensor([0.0, -1 / 3, 0.0, 0.0]))
    close(stats.pop("value_loss"), 0.82 / 3)
    close(stats.pop("value_clip_fraction"), 1 / 3)
    assert not stats


def test_the_five_aggregations_differ_from_hand_calculations(backend, device):
    # Ratio 1: the term is -A. Rows with 2, 1 and 0 counted steps.
    advantages = -torch.tensor([[1.0, 3.0, 9.0, 9.0], [5.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]], device=device)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool, device=device)
    expected = {
        "token-mean": 9 / 3,
        "token-sum": 9.0,
        "seq-mean-token-sum": (4 + 5) / 2,
        "seq-mean-token-mean": (2 + 5) / 2,
        "seq-mean-token-sum-norm": (4 / 4 + 5 / 4) / 2,
    }
    zero = torch.zeros_like(advantages)
    for aggregation, value in expected.items():
        close(backend.policy_loss(zero, zero, advantages, mask, aggregation=aggregation)[0], value)
    norm = {"aggregation": "seq-mean-token-sum-norm", "norm_length": 2.0}
    close(backend.policy_loss(zero, zero, advantages, mask, **norm)[0], (4 / 2 + 5 / 2) / 2)


def test_the_total_differs_from_policy_minus_entropy_plus_kl_plus_value(backend, device):
    x, mask = make((3, 7), device), make_mask((3, 7), device)
    out, stats, _ = evaluate(backend, x, mask, entropy_coef=0.1, kl_coef=0.2, value_coef=0.3)
    total = stats["policy_loss"] - 0.1 * stats["entropy"] + 0.2 * stats["ref_kl"] + 0.3 * stats["value_loss"]
    close(out, total)


# Identities


def test_ratio_one_is_not_the_plain_policy_gradient(backend, device):
    x = make((4, 9), device)
    x = {name: x[name] for name in POLICY} | {"old_logprobs": x["logprobs"]}
    mask = make_mask((4, 9), device)
    out, stats, grads = evaluate(backend, x, mask, kind="policy")
    n = mask.sum()
    close(out, -(x["advantages"] * mask).sum() / n, 1e-5)
    close(grads["logprobs"], -x["advantages"] * mask / n)
    assert (stats["ratio_mean"], stats["ratio_max"]) == (1, 1)
    assert (stats["approx_kl"], stats["clip_fraction"]) == (0, 0)


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a != "token-sum"])
def test_the_loss_depends_on_how_a_batch_is_split_into_micro_batches(backend, device, aggregation):
    x, mask = make((6, 8), device), make_mask((6, 8), device)
    mask[2] = False
    denominator = mask.sum() if aggregation == "token-mean" else mask.any(-1).sum()
    options = {"aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1}
    whole, _, grads = evaluate(backend, x, mask, **options)
    parts = [
        evaluate(backend, {k: v[rows] for k, v in x.items()}, mask[rows], denominator=denominator, **options)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    close(sum(part[0] for part in parts), whole)
    for name in grads:
        close(torch.cat([part[2][name] for part in parts]), grads[name])


def test_the_order_of_tokens_matters(backend, device):
    x, mask = make((101,), device), make_mask((101,), device)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(3)).to(device)
    one = evaluate(backend, x, mask, **EVERYTHING)
    other = evaluate(backend, {k: v[order] for k, v in x.items()}, mask[order], **EVERYTHING)
    the_same(one, other)
    for name in one[2]:
        close(one[2][name][order], other[2][name])


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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_sequences_give_another_loss_than_padded_ones(backend, device, aggregation, index):
    x, mask, packed, packed_mask, cu_seqlens = ragged(device)
    options = EVERYTHING | {"aggregation": aggregation, "norm_length": 12.0}
    padded = evaluate(backend, x, mask, **options)
    other = evaluate(backend, packed, packed_mask, cu_seqlens=cu_seqlens.to(index), **options)
    the_same(padded, other)
    for name in padded[2]:
        close(other[2][name][packed_mask], padded[2][name][mask])
        assert not other[2][name][~packed_mask].any()


def test_packed_sequences_without_a_mask_lose_the_empty_ones(backend, device):
    _, _, packed, _, cu_seqlens = ragged(device)
    for aggregation in AGGREGATIONS:
        check(backend, packed, aggregation=aggregation, cu_seqlens=cu_seqlens, norm_length=4.0)


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a.startswith("seq")])
def test_a_sequence_without_counted_steps_counts(backend, device, aggregation):
    x, mask = make((4, 6), device), make_mask((4, 6), device)
    mask[1] = False
    kept = torch.tensor([0, 2, 3], device=device)
    whole = evaluate(backend, x, mask, aggregation=aggregation)
    without = evaluate(backend, {k: v[kept] for k, v in x.items()}, mask[kept], aggregation=aggregation)
    the_same(whole, without)


# Against the reference


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["policy", "value", "ppo"])
@pytest.mark.parametrize("masked", [True, False])
def test_an_aggregation_differs_from_the_reference(backend, device, aggregation, kind, masked):
    x = make((3, 700), device)  # more than one block of steps in all, and of a row
    check(backend, x, make_mask((3, 700), device) if masked else None, kind=kind, aggregation=aggregation)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 1), (1, 63), (2, 1000), (1, 512), (2, 3, 5), (1025,)])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_an_odd_size_differs_from_the_reference(backend, device, shape, aggregation):
    check(backend, make(shape, device), make_mask(shape, device), aggregation=aggregation, **EVERYTHING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_a_dtype_errs_more_than_eager_pytorch(backend, device, dtype, aggregation):
    if dtype == torch.float64 and backend is loss:
        pytest.skip("fp64 goes to the torch backend")
    x, mask = to(make((4, 300), device), dtype), make_mask((4, 300), device)
    check(backend, x, mask, aggregation=aggregation, **EVERYTHING)


@pytest.mark.parametrize("estimator", reference.KL_ESTIMATORS)
@pytest.mark.parametrize("log_ratio_clamp", [20.0, 0.25])
def test_a_kl_estimator_differs_from_the_reference(backend, device, estimator, log_ratio_clamp):
    x, mask = make((4, 30), device), make_mask((4, 30), device)
    options = {"kl_coef": 0.7, "kl_estimator": estimator, "log_ratio_clamp": log_ratio_clamp}
    _, stats, _ = check(backend, x, mask, kind="policy", **options)
    assert stats["ref_kl"] != 0


@pytest.mark.parametrize(
    "options",
    [
        {"clip_low": 0.1, "clip_high": 0.3},
        {"clip_low": 0, "clip_high": 1},  # ints slip through
        {"dual_clip": 1.25},
        {"dual_clip": 3.0, "clip_high": 0.5},
        {"log_ratio_clamp": 0.2},
        {"entropy_coef": 0.0},
        {"value_clip": None},
        {"value_clip": 1.0, "value_coef": 0.0},
        {"denominator": 7.5},
        {"denominator": 1, "aggregation": "seq-mean-token-mean"},
        {"norm_length": 3.0, "aggregation": "seq-mean-token-sum-norm"},
        {"norm_length": 3, "denominator": 2.0, "aggregation": "seq-mean-token-sum-norm"},
    ],
    ids=str,
)
def test_an_option_differs_from_the_reference(backend, device, options):
    x, mask = make((4, 30), device), make_mask((4, 30), device)
    check(backend, x, mask, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_a_denominator_on_the_device_differs_from_the_same_number(backend, device, dtype):
    x, mask = make((4, 30), device), make_mask((4, 30), device)
    for aggregation in AGGREGATIONS:
        if aggregation == "token-sum":
            continue
        number = evaluate(backend, x, mask, aggregation=aggregation, denominator=9.0)
        on_device = torch.tensor(9, dtype=dtype, device=device)
        tensor = evaluate(backend, x, mask, aggregation=aggregation, denominator=on_device)
        assert torch.equal(number[0], tensor[0])
        assert all(torch.equal(number[2][name], tensor[2][name]) for name in number[2])


def test_dual_clip_bounds_good_advantages_or_not_the_bad_ones(backend, device):
    logprobs = torch.full((4,), math.log(4.0), device=device, requires_grad=True)
    advantages = torch.tensor([-1.0, -2.0, 1.0, 0.0], device=device)
    out, stats = backend.policy_loss(logprobs, torch.zeros(4, device=device), advantages, dual_clip=3.0)
    out.backward()
    close(out, (3.0 + 6.0 - 1.2 + 0.0) / 4)
    close(stats["dual_clip_fraction"], 0.5)
    assert not logprobs.grad.any()


@pytest.mark.parametrize("kind", ["value", "ppo"])
def test_a_value_mask_of_its_own_is_mixed_up_with_the_mask(backend, device, kind):
    x, mask, other = make((5, 40), device), make_mask((5, 40), device), make_mask((5, 40), device, seed=7, share=0.3)
    for aggregation in AGGREGATIONS:
        if kind == "value":
            check(backend, x, other, kind="value", aggregation=aggregation)
        else:
            check(backend, x, mask, value_mask=other, aggregation=aggregation)
            check(backend, x, None, value_mask=other, aggregation=aggregation)


# Ties


def tie(backend: ModuleType, device: torch.device, kind: str, inputs: dict[str, list[float]], **options: Any) -> Tensor:
    """The gradient at a tie, after comparing it with autograd's through the reference."""
    x = {name: torch.tensor(v, device=device) for name, v in inputs.items()}
    _, _, grads = check(backend, x, kind=kind, aggregation="token-sum", **options)
    return grads["values" if kind == "value" else "logprobs"] / 1.7


def test_the_gradient_at_the_clip_bound_is_lost(backend, device):
    inputs = {"logprobs": [0.5, 0.5], "old_logprobs": [0.5, 0.5], "advantages": [1.0, -2.0]}
    close(tie(backend, device, "policy", inputs, clip_low=0.0, clip_high=0.0), torch.tensor([-1.0, 2.0]))


def test_the_gradient_at_the_bound_of_the_log_ratio_is_lost(backend, device):
    inputs = {"logprobs": [0.5, -0.5, 0.75], "old_logprobs": [0.0, 0.0, 0.0], "advantages": [1.0, -1.0, 1.0]}
    grad = tie(backend, device, "policy", inputs, log_ratio_clamp=0.5, clip_low=0.9, clip_high=0.9)
    close(grad, torch.tensor([-math.exp(0.5), math.exp(-0.5), 0.0]))


def test_a_zero_advantage_gives_a_gradient(backend, device):
    inputs = {"logprobs": [0.0, 1.0, -1.0], "old_logprobs": [0.0, 0.0, 0.0], "advantages": [0.0, 0.0, -0.0]}
    assert not tie(backend, device, "policy", inputs, dual_clip=1.5).any()


def test_a_tie_with_the_dual_bound_does_not_halve_the_gradient(backend, device):
    inputs = {"logprobs": [0.5, 0.5], "old_logprobs": [0.5, 0.5], "advantages": [-1.0, 1.0]}
    close(tie(backend, device, "policy", inputs, dual_clip=1.0), torch.tensor([0.5, -1.0]))


def test_a_tie_of_the_value_errors_does_not_halve_the_gradient(backend, device):
    # |v - R| = |clipped v - R| = 0.25, from both sides; at the clip bound; within the clip range
    inputs = {"values": [1.0, 0.5, 0.25], "old_values": [0.0, 0.0, 0.0], "returns": [0.75, 1.0, 1.0]}
    close(tie(backend, device, "value", inputs, clip=0.5), torch.tensor([0.125, -0.5, -0.75]))


def test_rounding_inside_the_clip_range_counts_as_clipping(backend, device):
    # old + (v - old) differs from v by a rounding on many of these; none is out of range.
    g = torch.Generator().manual_seed(0)
    old = torch.randn(2000, generator=g).to(device)
    values = old + 0.1 * torch.rand(2000, generator=g).to(device)
    _, stats = backend.value_loss(values, old, torch.zeros_like(old), clip=0.2)
    assert stats["value_clip_fraction"] == 0


def test_the_gradient_of_absolute_kl_at_zero_is_not_zero(backend, device):
    zero = [0.0, 0.0]
    inputs = {"logprobs": zero, "old_logprobs": zero, "advantages": zero, "ref_logprobs": zero}
    assert not tie(backend, device, "policy", inputs, kl_coef=1.0, kl_estimator="abs").any()


# Hostile values


def test_a_huge_log_ratio_overflows(backend, device):
    x = make((4, 8), device)
    x["logprobs"] += torch.tensor([[1e4], [-1e4], [0.0], [0.0]], device=device)
    x["ref_logprobs"] += torch.tensor([[0.0], [0.0], [1e4], [-1e4]], device=device)
    out, stats, grads = check(backend, x, kl_estimator="k3", kl_coef=0.1, dual_clip=3.0)
    assert out.isfinite()
    assert all(value.isfinite() for value in stats.values())
    _, _, alone = evaluate(backend, {name: x[name] for name in POLICY}, kind="policy")
    assert not alone["logprobs"][:2].any()
    assert grads["logprobs"].isfinite().all()


def test_an_infinite_logprob_gives_nan(backend, device):
    x = {name: t for name, t in make((2, 4), device).items() if name in POLICY}
    x["logprobs"][0, 1] = -torch.inf
    out, stats, grads = evaluate(backend, x, kind="policy")
    assert out.isfinite()
    assert stats["ratio_mean"].isfinite()
    assert grads["logprobs"].isfinite().all()
    assert evaluate(backend, x, kind="policy", log_ratio_clamp=math.inf)[0].isfinite()  # ratio 0


def test_the_ratio_of_a_large_log_ratio_loses_digits(backend, device):
    # exp2(x log2(e)) would lose |x| ulp: 1e-6 here.
    log_ratio = torch.linspace(-20, 20, 64, device=device)
    x = {"logprobs": log_ratio, "old_logprobs": torch.zeros(64, device=device)}
    x |= {"advantages": torch.ones(64, device=device)}
    for i in (0, 20, 40, 63):
        one = {name: t[i : i + 1] for name, t in x.items()}
        ratio = evaluate(backend, one, kind="policy")[1]["ratio_mean"].double()
        assert abs(ratio / log_ratio[i].double().exp() - 1) < 4e-7


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -100.0])
def test_what_stands_at_a_masked_position_reaches_a_result(backend, device, aggregation, bad):
    x, mask = make((4, 30), device), make_mask((4, 30), device)
    options = EVERYTHING | {"aggregation": aggregation}
    clean = evaluate(backend, x, mask, **options)
    dirty = evaluate(backend, {name: t.masked_fill(~mask, bad) for name, t in x.items()}, mask, **options)
    assert torch.equal(clean[0], dirty[0])
    assert all(torch.equal(clean[1][name], dirty[1][name]) for name in clean[1])
    for name, grad in dirty[2].items():
        assert torch.equal(grad, clean[2][name])
        assert not grad[~mask].any()


@pytest.mark.parametrize("name", [*PPO, *OPTIONAL])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_nan_at_a_counted_position_is_swallowed(backend, device, name, aggregation):
    x, mask = make((4, 30), device), make_mask((4, 30), device)
    mask[2, 3] = True
    x[name][2, 3] = torch.nan
    out, stats, _ = evaluate(backend, x, mask, aggregation=aggregation, **EVERYTHING)
    assert out.isnan()
    of_input = {"logprobs": ("ratio_max", "ratio_mean", "approx_kl"), "old_logprobs": ("ratio_max",)}
    of_input |= {"values": ("value_loss",), "entropy": ("entropy",), "ref_logprobs": ("ref_kl",)}
    assert all(stats[s].isnan() for s in of_input.get(name, ()))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0), (0,)])
def test_nothing_counted_is_not_a_zero_with_a_graph(backend, device, aggregation, shape):
    x, mask = make(shape, device), torch.zeros(shape, dtype=torch.bool, device=device)
    out, stats, grads = evaluate(backend, x, mask, aggregation=aggregation, **EVERYTHING)
    assert out.requires_grad
    assert out == 0
    assert all(value == 0 for value in stats.values())
    assert all(grad.shape == shape and not grad.any() for grad in grads.values())


def test_no_sequences_at_all_fails(backend, device):
    x, cu_seqlens = make((0,), device), torch.zeros(1, dtype=torch.int32, device=device)
    for aggregation in AGGREGATIONS:
        assert evaluate(backend, x, aggregation=aggregation, cu_seqlens=cu_seqlens, norm_length=1.0)[0] == 0


# Layouts


def views(name: str) -> Callable[[Tensor], Tensor]:
    """From a contiguous [6, 8] tensor: the same values in another layout."""

    def sliced(x: Tensor) -> Tensor:
        wide = x.new_zeros(6, 17) if x.dtype == torch.bool else x.new_full((6, 17), torch.nan)
        wide[:, 5:13] = x
        return wide[:, 5:13]

    def every_other(x: Tensor) -> Tensor:
        wide = x.new_zeros(6, 16) if x.dtype == torch.bool else x.new_full((6, 16), torch.nan)
        wide[:, ::2] = x
        return wide[:, ::2]

    def offset(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 8)

    def transposed(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    def deep(x: Tensor) -> Tensor:  # no view as [rows, T] exists
        return x.view(2, 3, 8).transpose(0, 1).contiguous().transpose(0, 1)

    return {
        "sliced": sliced,
        "every_other": every_other,
        "offset": offset,
        "transposed": transposed,
        "deep": deep,
    }[name]


@pytest.mark.parametrize("layout", ["sliced", "every_other", "offset", "transposed", "deep"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_strides_are_ignored(backend, device, layout, aggregation):
    x, mask = make((6, 8), device), make_mask((6, 8), device)
    shape = (2, 3, 8) if layout == "deep" else (6, 8)
    plain = {name: t.view(shape) for name, t in x.items()}
    expected = evaluate(backend, plain, mask.view(shape), aggregation=aggregation, **EVERYTHING)
    view = views(layout)
    for some in (set(x), {"values", "advantages"}):  # all tensors, and a mixture of layouts
        mixed = {name: view(t) if name in some else plain[name] for name, t in x.items()}
        found = evaluate(
            backend,
            mixed,
            view(mask) if len(some) > 2 else mask.view(shape),
            leaf=lambda t: t.detach().requires_grad_(),
            aggregation=aggregation,
            **EVERYTHING,
        )
        the_same(found, expected)
        for name in expected[2]:
            close(found[2][name], expected[2][name])


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_expanded_advantages_are_read_out_of_bounds(backend, device, aggregation):
    x, mask = make((6, 8), device), make_mask((6, 8), device)
    for small in (x["advantages"][:, :1], x["advantages"][:1], x["advantages"][:1, :1]):
        check(backend, x | {"advantages": small.expand(6, 8)}, mask, aggregation=aggregation)


def test_packed_tensors_with_a_stride_are_misread(backend, device):
    _, _, packed, mask, cu_seqlens = ragged(device)
    wide = {name: torch.stack([t, t * torch.nan], -1)[:, 0] for name, t in packed.items()}
    options = {"aggregation": "seq-mean-token-mean", "cu_seqlens": cu_seqlens}
    the_same(evaluate(backend, wide, mask, **options), evaluate(backend, packed, mask, **options))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_row_stride_past_2_to_the_31_elements_wraps_around(device, aggregation):
    # Untouched memory: the system hands out pages only where something is written.
    rows, T, stride = 3, 4, 2**31 // 2 + 8
    x, mask = make((rows, T), device), make_mask((rows, T), device)
    storage = torch.UntypedStorage(2 * ((rows - 1) * stride + T), device=device)
    far = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (rows, T), (stride, 1))
    far.copy_(x["logprobs"])
    near = x | {"logprobs": x["logprobs"].half()}
    expected = evaluate(loss, near, mask, aggregation=aggregation)
    found = evaluate(loss, x | {"logprobs": far}, mask, aggregation=aggregation, leaf=lambda t: t.requires_grad_())
    the_same(found, expected)


def test_mixed_dtypes_are_refused_or_change_the_dtype_of_a_gradient(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    half = {"logprobs", "old_values", "entropy", "weights"}
    mixed = {name: t.half() if name in half else t for name, t in x.items()}
    out, _, grads = evaluate(backend, mixed, mask, **EVERYTHING)
    truth, _, true_grads = evaluate(reference, to(mixed, torch.float64), mask, **EVERYTHING)
    assert out.dtype == torch.float32
    close(out, truth, 1e-5)
    assert [grads[name].dtype for name in GRADIENTS] == [torch.float16, torch.float32, torch.float16]
    for name in grads:
        close(grads[name].float(), true_grads[name], 1e-3)  # one rounding to fp16


# Autograd


def test_a_second_backward_differs_from_the_first(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    leaves = [x[name].requires_grad_() for name in GRADIENTS]
    inputs = [x[name] for name in PPO]
    out, _ = backend.ppo_loss(*inputs, mask, entropy=x["entropy"], entropy_coef=0.1)
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    scaled = torch.autograd.grad(out, leaves, torch.tensor(-3.0, device=device), retain_graph=True)
    again = torch.autograd.grad(out, leaves)
    for a, b, c in zip(first, scaled, again, strict=True):
        assert torch.equal(a, c)
        close(b, -3 * a)


def test_a_loss_divided_in_place_spoils_the_backward_or_the_statistics(backend, device):
    x = {name: t for name, t in make((4, 20), device).items() if name in POLICY}
    _, stats, grads = evaluate(backend, x, kind="policy")
    leaf = x["logprobs"].clone().requires_grad_()
    out, found = backend.policy_loss(leaf, x["old_logprobs"], x["advantages"])
    out /= 4
    out.backward()
    close(leaf.grad, grads["logprobs"] / 4)
    assert torch.equal(found["policy_loss"], stats["policy_loss"])


def test_create_graph_gives_wrong_second_derivatives_in_silence(backend, device):
    x = make((2, 3), device)
    leaf = x["logprobs"].requires_grad_()
    out, _ = backend.ppo_loss(*(x[name] for name in PPO))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(torch.autograd.grad(out, leaf, create_graph=True)[0].sum(), leaf)


@pytest.mark.parametrize("needed", [("logprobs",), ("values",), ("entropy",), ("logprobs", "entropy")])
def test_a_gradient_that_nobody_asked_for_displaces_another(backend, device, needed):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    _, _, all_grads = evaluate(backend, x, mask, **EVERYTHING)
    x |= {name: x[name].clone().requires_grad_() for name in needed}
    inputs = {name: x[name] for name in OPTIONAL}
    out, _ = backend.ppo_loss(*(x[name] for name in PPO), mask, **inputs, **EVERYTHING)
    out.backward()
    for name in GRADIENTS:
        if name in needed:
            assert torch.equal(x[name].grad, all_grads[name])
        else:
            assert x[name].grad is None


def test_a_constant_gets_a_gradient(backend, device):
    x = {name: t.requires_grad_() for name, t in make((2, 3), device).items()}
    denominator = torch.tensor(3.0, device=device, requires_grad=True)
    inputs = {name: x[name] for name in OPTIONAL}
    out, _ = backend.ppo_loss(*(x[name] for name in PPO), denominator=denominator, **inputs, **EVERYTHING)
    out.backward()
    assert {name for name, t in x.items() if t.grad is not None} == set(GRADIENTS)
    assert denominator.grad is None


def test_without_gradients_a_buffer_for_them_is_made(device, monkeypatch):
    x, mask = make((4, 1000), device), make_mask((4, 1000), device)
    sizes: list[int] = []
    empty = torch.empty

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", recording)
    out, stats = loss.ppo_loss(*(x[name] for name in PPO), mask)
    with torch.no_grad():
        loss.ppo_loss(*(x[name].requires_grad_() for name in PPO), mask)
    assert max(sizes) < 1000
    assert not out.requires_grad
    assert not any(value.requires_grad for value in stats.values())
    sizes.clear()
    loss.ppo_loss(*(x[name] for name in PPO), mask)
    assert 8000 <= max(sizes) < 12000  # two of three


def test_without_gradients_the_torch_backend_computes_them(device):
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    x, mask = make((4, 20), device), make_mask((4, 20), device)
    inputs = [x[name] for name in PPO]
    with Count() as without:
        eager_loss.ppo_loss(*inputs, mask)
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    with Count() as with_gradients:
        eager_loss.ppo_loss(*inputs, mask)
    assert without.calls < with_gradients.calls - 8
    with torch.no_grad(), Count() as disabled:
        eager_loss.ppo_loss(*inputs, mask)
    assert disabled.calls == without.calls


def test_gradcheck_fails_in_fp64(device):
    x, mask = to(make((3, 5), device), torch.float64), make_mask((3, 5), device)
    leaves = [x[name].requires_grad_() for name in GRADIENTS]

    def run(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        rest = [x[name] for name in ("old_logprobs", "old_values", "advantages", "returns")]
        more = {"weights": x["weights"], "ref_logprobs": x["ref_logprobs"], "aggregation": "seq-mean-token-mean"}
        return eager_loss.ppo_loss(logprobs, values, *rest, mask, entropy=entropy, **more, **EVERYTHING)[0]

    assert torch.autograd.gradcheck(run, leaves)


def test_checkpointing_changes_the_gradients(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    _, _, expected = evaluate(backend, x, mask, aggregation="seq-mean-token-mean", **EVERYTHING)
    inputs = {name: x[name] for name in OPTIONAL if name != "entropy"}

    def run(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        rest = [x[name] for name in ("old_logprobs", "old_values", "advantages", "returns")]
        options = {"aggregation": "seq-mean-token-mean", **inputs, **EVERYTHING}
        return backend.ppo_loss(1 * logprobs, 1 * values, *rest, mask, entropy=1 * entropy, **options)[0]

    for use_reentrant in (False, True):
        leaves = [x[name].clone().requires_grad_() for name in GRADIENTS]
        torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=use_reentrant).backward()
        for leaf, name in zip(leaves, GRADIENTS, strict=True):
            assert torch.equal(leaf.grad, expected[name])


def test_autocast_changes_the_arithmetic(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    expected = evaluate(backend, x, mask, **EVERYTHING)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = evaluate(backend, x, mask, **EVERYTHING)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[2][name], expected[2][name]) for name in GRADIENTS)


# Properties


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict, Tensor | None, str, dict]:
    kind = draw(st.sampled_from(["ppo", "policy", "value"]))
    options: dict[str, Any] = {"aggregation": draw(st.sampled_from(AGGREGATIONS))}
    lengths = draw(st.none() | st.lists(st.integers(0, 9), max_size=4))
    cu_seqlens = None
    if lengths is None:
        shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))
    else:
        shape, cu_seqlens = (sum(lengths),), torch.tensor([0, *itertools.accumulate(lengths)])
    seed = draw(st.integers(0, 2**20))
    x, mask = make(shape, torch.device("cpu"), seed), make_mask(shape, torch.device("cpu"), seed + 1)
    x = {name: t for name, t in x.items() if name not in OPTIONAL or draw(st.booleans())}
    options |= {"cu_seqlens": cu_seqlens}
    if cu_seqlens is not None or draw(st.booleans()):
        options["norm_length"] = draw(st.floats(1, 20))
    if options["aggregation"] != "token-sum":
        options["denominator"] = draw(st.none() | st.floats(1, 50))
    clip = st.none() | st.floats(0.05, 2)
    if kind == "value":
        options["clip"] = draw(clip)
    if kind == "ppo":
        options |= {"value_clip": draw(clip), "value_coef": draw(st.floats(0, 2))}
        options["value_mask"] = draw(st.sampled_from([None, ~mask]))
    if kind != "value":
        options |= {"clip_low": draw(st.floats(0, 1)), "clip_high": draw(st.floats(0, 1))}
        options |= {"dual_clip": draw(st.none() | st.floats(1.1, 4)), "log_ratio_clamp": draw(st.floats(0.1, 20))}
        options |= {"kl_coef": draw(st.floats(-1, 1)), "kl_estimator": draw(st.sampled_from(reference.KL_ESTIMATORS))}
        options["entropy_coef"] = draw(st.floats(-1, 1)) if "entropy" in x else 0.0
    return x, draw(st.sampled_from([None, mask])), kind, options


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_some_combination_of_options_differs_from_the_reference(backend, device, problem):
    x, mask, kind, options = problem
    move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    x = {name: t.to(device) for name, t in x.items()}
    check(backend, x, None if mask is None else mask.to(device), kind=kind, **move)


def test_a_repetition_gives_other_bits(backend, device):
    shape, repeats = ((2, 300), 4) if interpreting() else ((5, 700), 100)
    x, mask = make(shape, device), make_mask(shape, device)
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        first = evaluate(backend, x, mask, aggregation=aggregation, **EVERYTHING)
        for _ in range(repeats):
            again = evaluate(backend, x, mask, aggregation=aggregation, **EVERYTHING)
            assert torch.equal(first[0], again[0])
            assert all(torch.equal(first[2][name], again[2][name]) for name in GRADIENTS)


# torch.compile


SCALARS = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "log_ratio_clamp",
    "entropy_coef",
    "kl_coef",
    "value_coef",
    "value_clip",
)


def count_graphs(function: Callable, calls: list[tuple]) -> tuple[int, list]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    results = [compiled(*call) for call in calls]
    return counter.frame_count, results


def compiled_call(backend: ModuleType, aggregation: str) -> Callable:
    def run(leaves: tuple[Tensor, ...], rest: tuple[Tensor, ...], mask: Tensor, numbers: tuple[float, ...]):
        logprobs, values, entropy = leaves
        old_logprobs, old_values, advantages, returns, ref_logprobs = rest
        named = dict(zip((*SCALARS, "denominator"), numbers, strict=True))
        return backend.ppo_loss(
            2 * logprobs,
            values.exp(),
            old_logprobs,
            old_values,
            advantages,
            returns,
            mask,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            kl_estimator="k3",
            aggregation=aggregation,
            **named,
        )

    return run


def compile_inputs(shape: tuple[int, ...], device: torch.device) -> tuple:
    x = make(shape, device)
    leaves = tuple(x[name].requires_grad_() for name in GRADIENTS)
    rest = tuple(x[name] for name in ("old_logprobs", "old_values", "advantages", "returns", "ref_logprobs"))
    return leaves, rest, make_mask(shape, device)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_torch_compile_breaks_the_graph_or_recompiles_for_every_size_and_number(backend, device, aggregation):
    base = (0.2, 0.2, 3.0, 20.0, 0.01, 0.1, 0.5, 0.2, 7.0)
    calls = [
        (*compile_inputs((3 + i, 5 + 2 * i), device), tuple(number * (1 + 0.01 * i) for number in base))
        for i in range(12)
    ]
    function = compiled_call(backend, aggregation)
    graphs, results = count_graphs(function, calls)
    assert graphs <= 3
    for i in (0, 1, 11):
        (found, stats), call = results[i], calls[i]
        expected, expected_stats = function(*call)
        close(found, expected)
        assert not any(value.requires_grad for value in stats.values())
        for name in stats:
            close(stats[name], expected_stats[name])
        for a, b in zip(torch.autograd.grad(found, call[0]), torch.autograd.grad(expected, call[0]), strict=True):
            close(a, b)


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_torch_compile_fails_without_gradients_or_with_a_denominator_on_the_device(backend, device, kind):
    x, mask = make((3, 8), device), make_mask((3, 8), device)
    names = POLICY if kind == "policy" else VALUE
    denominator = torch.tensor(5, device=device)

    def run(*tensors: Tensor) -> tuple:
        options = {"aggregation": "seq-mean-token-sum-norm", "denominator": tensors[-1]}
        return getattr(backend, f"{kind}_loss")(*tensors[:-1], **options)

    call = (*(x[name] for name in names), mask, denominator)
    _, [(found, stats)] = count_graphs(run, [call])
    expected, expected_stats = run(*call)
    close(found, expected)
    assert stats.keys() == expected_stats.keys()
    assert found.dtype == torch.float32


def test_the_operator_for_torch_compile_lies_about_shapes_or_aliases(device):
    x, mask = make((2, 8), device), make_mask((2, 8), device)  # 16 steps: the buffer of gradients has no padding
    numbers = torch.tensor([0.2, 0.2, math.nan, 20.0, 0.1, 0.1, 1.0, 0.2, math.nan, math.nan], dtype=torch.float64)
    x["logprobs"].requires_grad_()
    names = ("logprobs", "entropy", "values", "old_logprobs", "advantages")
    tensors = [
        *(x[name] for name in names),
        mask,
        *(x[n] for n in ("weights", "ref_logprobs", "old_values", "returns")),
    ]
    inputs = (*tensors, None, None, None, numbers, "k3", "token-mean", [True, False, False])
    torch.library.opcheck(torch.ops.ppo_fast.ppo_loss.default, inputs)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_bf16_errs_more_than_eager_pytorch(backend, device, aggregation):
    x, mask = to(make((16, 1024), device), torch.bfloat16), make_mask((16, 1024), device)
    check(backend, x, mask, aggregation=aggregation, **EVERYTHING)


@pytest.mark.gpu
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_forward_takes_more_than_two_launches_or_a_backward_more_than_one(device, aggregation):
    x, mask = make((16, 1024), device), make_mask((16, 1024), device)
    inputs = [x[name].requires_grad_(name in GRADIENTS) for name in PPO]

    def launches(run: Callable) -> tuple[int, Any]:
        run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = run()
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0), result

    count, (out, _) = launches(lambda: loss.ppo_loss(*inputs, mask, aggregation=aggregation))
    assert count <= 2
    one = torch.ones((), device=device)
    count, _ = launches(lambda: torch.autograd.grad(out, inputs[:2], one, retain_graph=True))
    assert count <= 1


@pytest.mark.gpu
def test_the_host_waits_for_the_device(backend, device):
    x, mask = make((16, 1024), device), make_mask((16, 1024), device)
    denominator = mask.sum()
    inputs = [x[name].requires_grad_(name in GRADIENTS) for name in PPO]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for aggregation in AGGREGATIONS[:1] + AGGREGATIONS[2:]:
            for given_count in (None, denominator):
                out, _ = backend.ppo_loss(*inputs, mask, aggregation=aggregation, denominator=given_count)
                out.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_cannot_capture_it(backend, device):
    x, mask = make((16, 1024), device), make_mask((16, 1024), device)
    inputs = [x[name].requires_grad_(name in GRADIENTS) for name in PPO]

    def run() -> tuple:
        out, stats = backend.ppo_loss(*inputs, mask)
        return out, stats, torch.autograd.grad(out, inputs[:2])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randn_like(t) * 0.3)
    graph.replay()
    expected = run()
    assert torch.equal(captured[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(captured[2], expected[2], strict=True))
