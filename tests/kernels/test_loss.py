"""policy_loss, value_loss and ppo_loss: both backends against the reference in fp64, forward and gradients."""

import math
from typing import Any

import pytest
import torch
from support.backends import TRITON, Operations
from support.loss_cases import (
    AGGREGATIONS,
    EVERYTHING,
    OPTIONAL,
    POLICY,
    PPO,
    check,
    close,
    evaluate,
    make,
    make_mask,
    norm_length,
    ragged,
    the_same,
    to,
)
from support.loss_cases import backend as backend_fixture
from torch import Tensor

from ppo_fast.kernels import reference
from ppo_fast.ops import checks

backend = backend_fixture
pytestmark = pytest.mark.usefixtures("nan_empty")


# Numbers that a reader can check


def test_the_policy_term_matches_a_hand_calculation(backend, device):
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


def test_the_value_term_matches_a_hand_calculation(backend, device):
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


def test_the_five_aggregations_match_hand_calculations(backend, device):
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


def test_the_total_is_policy_minus_entropy_plus_kl_plus_value(backend, device):
    x, mask = make((3, 7), device), make_mask((3, 7), device)
    out, stats, _ = evaluate(backend, x, mask, entropy_coef=0.1, kl_coef=0.2, value_coef=0.3)
    total = stats["policy_loss"] - 0.1 * stats["entropy"] + 0.2 * stats["ref_kl"] + 0.3 * stats["value_loss"]
    close(out, total)


# Identities


def test_ratio_one_gives_the_plain_policy_gradient(backend, device):
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
def test_the_loss_does_not_depend_on_the_split_into_micro_batches(backend, device, aggregation):
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


def test_the_order_of_tokens_changes_nothing(backend, device):
    x, mask = make((101,), device), make_mask((101,), device)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(3)).to(device)
    one = evaluate(backend, x, mask, **EVERYTHING)
    other = evaluate(backend, {k: v[order] for k, v in x.items()}, mask[order], **EVERYTHING)
    the_same(one, other)
    for name in one[2]:
        close(one[2][name][order], other[2][name])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_sequences_give_the_loss_of_padded_ones(backend, device, aggregation, index):
    x, mask, packed, packed_mask, cu_seqlens = ragged(device)
    options = EVERYTHING | {"aggregation": aggregation} | norm_length(aggregation, 12.0)
    padded = evaluate(backend, x, mask, **options)
    other = evaluate(backend, packed, packed_mask, cu_seqlens=cu_seqlens.to(index), **options)
    the_same(padded, other)
    for name in padded[2]:
        close(other[2][name][packed_mask], padded[2][name][mask])
        assert not other[2][name][~packed_mask].any()


def test_packed_sequences_without_a_mask_match_the_reference(backend, device):
    _, _, packed, _, cu_seqlens = ragged(device)
    for aggregation in AGGREGATIONS:
        check(backend, packed, aggregation=aggregation, cu_seqlens=cu_seqlens, **norm_length(aggregation, 4.0))


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a.startswith("seq")])
def test_a_sequence_without_counted_steps_does_not_count(backend, device, aggregation):
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
def test_every_aggregation_matches_the_reference(backend, device, aggregation, kind, masked):
    x = make((3, 700), device)  # more than one block of steps in all, and of a row
    check(backend, x, make_mask((3, 700), device) if masked else None, kind=kind, aggregation=aggregation)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 1), (1, 63), (2, 1000), (1, 512), (2, 3, 5), (1025,)])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_odd_sizes_match_the_reference(backend, device, shape, aggregation):
    check(backend, make(shape, device), make_mask(shape, device), aggregation=aggregation, **EVERYTHING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_every_dtype_errs_at_most_twice_as_much_as_eager_pytorch(backend, device, dtype, aggregation):
    if dtype == torch.float64 and backend is TRITON:
        pytest.skip("fp64 goes to the torch backend")
    x, mask = to(make((4, 300), device), dtype), make_mask((4, 300), device)
    check(backend, x, mask, aggregation=aggregation, **EVERYTHING)


@pytest.mark.parametrize("estimator", reference.KL_ESTIMATORS)
@pytest.mark.parametrize("log_ratio_clamp", [20.0, 0.25])
def test_every_kl_estimator_matches_the_reference(backend, device, estimator, log_ratio_clamp):
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
def test_every_option_matches_the_reference(backend, device, options):
    x, mask = make((4, 30), device), make_mask((4, 30), device)
    check(backend, x, mask, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_a_denominator_on_the_device_equals_the_same_number(backend, device, dtype):
    x, mask = make((4, 30), device), make_mask((4, 30), device)
    for aggregation in AGGREGATIONS:
        if aggregation == "token-sum":
            continue
        number = evaluate(backend, x, mask, aggregation=aggregation, denominator=9.0)
        on_device = torch.tensor(9, dtype=dtype, device=device)
        tensor = evaluate(backend, x, mask, aggregation=aggregation, denominator=on_device)
        assert torch.equal(number[0], tensor[0])
        assert all(torch.equal(number[2][name], tensor[2][name]) for name in number[2])


def test_dual_clip_bounds_negative_advantages_only(backend, device):
    logprobs = torch.full((4,), math.log(4.0), device=device, requires_grad=True)
    advantages = torch.tensor([-1.0, -2.0, 1.0, 0.0], device=device)
    out, stats = backend.policy_loss(logprobs, torch.zeros(4, device=device), advantages, dual_clip=3.0)
    out.backward()
    close(out, (3.0 + 6.0 - 1.2 + 0.0) / 4)
    close(stats["dual_clip_fraction"], 0.5)
    assert not logprobs.grad.any()


@pytest.mark.parametrize("kind", ["value", "ppo"])
def test_the_value_mask_is_separate_from_the_mask(backend, device, kind):
    x, mask, other = make((5, 40), device), make_mask((5, 40), device), make_mask((5, 40), device, seed=7, share=0.3)
    for aggregation in AGGREGATIONS:
        if kind == "value":
            check(backend, x, other, kind="value", aggregation=aggregation)
        else:
            check(backend, x, mask, value_mask=other, aggregation=aggregation)
            check(backend, x, None, value_mask=other, aggregation=aggregation)


# Ties


def tie(backend: Operations, device: torch.device, kind: str, inputs: dict[str, list[float]], **options: Any) -> Tensor:
    """The gradient at a tie, after comparing it with autograd's through the reference."""
    x = {name: torch.tensor(v, device=device) for name, v in inputs.items()}
    _, _, grads = check(backend, x, kind=kind, aggregation="token-sum", **options)
    return grads["values" if kind == "value" else "logprobs"] / 1.7


def test_the_gradient_at_the_clip_bound_is_kept(backend, device):
    inputs = {"logprobs": [0.5, 0.5], "old_logprobs": [0.5, 0.5], "advantages": [1.0, -2.0]}
    close(tie(backend, device, "policy", inputs, clip_low=0.0, clip_high=0.0), torch.tensor([-1.0, 2.0]))


def test_the_gradient_at_the_bound_of_the_log_ratio_is_kept(backend, device):
    inputs = {"logprobs": [0.5, -0.5, 0.75], "old_logprobs": [0.0, 0.0, 0.0], "advantages": [1.0, -1.0, 1.0]}
    grad = tie(backend, device, "policy", inputs, log_ratio_clamp=0.5, clip_low=0.9, clip_high=0.9)
    close(grad, torch.tensor([-math.exp(0.5), math.exp(-0.5), 0.0]))


def test_a_zero_advantage_gives_no_gradient(backend, device):
    inputs = {"logprobs": [0.0, 1.0, -1.0], "old_logprobs": [0.0, 0.0, 0.0], "advantages": [0.0, 0.0, -0.0]}
    assert not tie(backend, device, "policy", inputs, dual_clip=1.5).any()


def test_a_tie_with_the_dual_bound_halves_the_gradient(backend, device, monkeypatch):
    monkeypatch.setattr(checks, "policy_options", lambda options: None)  # a bound of 1, where a tie is exact
    inputs = {"logprobs": [0.5, 0.5], "old_logprobs": [0.5, 0.5], "advantages": [-1.0, 1.0]}
    close(tie(backend, device, "policy", inputs, dual_clip=1.0), torch.tensor([0.5, -1.0]))


def test_a_tie_of_the_value_errors_halves_the_gradient(backend, device):
    # |v - R| = |clipped v - R| = 0.25, from both sides; at the clip bound; within the clip range
    inputs = {"values": [1.0, 0.5, 0.25], "old_values": [0.0, 0.0, 0.0], "returns": [0.75, 1.0, 1.0]}
    close(tie(backend, device, "value", inputs, clip=0.5), torch.tensor([0.125, -0.5, -0.75]))


def test_rounding_inside_the_clip_range_does_not_count_as_clipping(backend, device):
    # old + (v - old) differs from v by a rounding on many of these; none is out of range.
    g = torch.Generator().manual_seed(0)
    old = torch.randn(2000, generator=g).to(device)
    values = old + 0.1 * torch.rand(2000, generator=g).to(device)
    _, stats = backend.value_loss(values, old, torch.zeros_like(old), clip=0.2)
    assert stats["value_clip_fraction"] == 0


def test_the_gradient_of_absolute_kl_at_zero_is_zero(backend, device):
    zero = [0.0, 0.0]
    inputs = {"logprobs": zero, "old_logprobs": zero, "advantages": zero, "ref_logprobs": zero}
    assert not tie(backend, device, "policy", inputs, kl_coef=1.0, kl_estimator="abs").any()


# Hostile values


def test_a_huge_log_ratio_does_not_overflow(backend, device):
    x = make((4, 8), device)
    x["logprobs"] += torch.tensor([[1e4], [-1e4], [0.0], [0.0]], device=device)
    x["ref_logprobs"] += torch.tensor([[0.0], [0.0], [1e4], [-1e4]], device=device)
    out, stats, grads = check(backend, x, kl_estimator="k3", kl_coef=0.1, dual_clip=3.0)
    assert out.isfinite()
    assert all(value.isfinite() for value in stats.values())
    _, _, alone = evaluate(backend, {name: x[name] for name in POLICY}, kind="policy")
    assert not alone["logprobs"][:2].any()
    assert grads["logprobs"].isfinite().all()


def test_an_infinite_logprob_gives_finite_results(backend, device):
    x = {name: t for name, t in make((2, 4), device).items() if name in POLICY}
    x["logprobs"][0, 1] = -torch.inf
    out, stats, grads = evaluate(backend, x, kind="policy")
    assert out.isfinite()
    assert stats["ratio_mean"].isfinite()
    assert grads["logprobs"].isfinite().all()
    assert evaluate(backend, x, kind="policy", log_ratio_clamp=math.inf)[0].isfinite()  # ratio 0


def test_the_ratio_of_a_large_log_ratio_keeps_its_digits(backend, device):
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
def test_values_at_masked_positions_reach_no_result(backend, device, aggregation, bad):
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
def test_nan_at_a_counted_position_reaches_the_loss(backend, device, name, aggregation):
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
def test_nothing_counted_is_zero_with_a_graph(backend, device, aggregation, shape):
    x, mask = make(shape, device), torch.zeros(shape, dtype=torch.bool, device=device)
    out, stats, grads = evaluate(backend, x, mask, aggregation=aggregation, **EVERYTHING)
    assert out.requires_grad
    assert out == 0
    assert all(value == 0 for value in stats.values())
    assert all(grad.shape == shape and not grad.any() for grad in grads.values())


def test_no_sequences_at_all_give_zero(backend, device):
    x, cu_seqlens = make((0,), device), torch.zeros(1, dtype=torch.int32, device=device)
    for aggregation in AGGREGATIONS:
        options = {"aggregation": aggregation} | norm_length(aggregation, 1.0)
        assert evaluate(backend, x, cu_seqlens=cu_seqlens, **options)[0] == 0


# Properties
