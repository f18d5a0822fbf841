"""PPO's scalar losses in vectorised PyTorch, for a CPU and any other device: policy_loss, value_loss and ppo_loss.

The gradients are written by hand and computed in the forward, together with the terms that they share; the backward,
in custom_op.py, scales them. Every per-token tensor is traversed by elementwise operations only, nothing synchronises,
and nothing is longer than the inputs.

Notation: the surrogate is maximised here (objective = -term), which saves a negation and changes no bit.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.memory import required
from ppo_fast.kernels.loss.options import LossOptions, LossTensors


class LossScale(NamedTuple):
    """loss = sum_i share_i term_i / normaliser; statistics are sums over `steps`."""

    steps: int | Tensor  # counted ones, at least 1
    token_weight: float | Tensor | None  # None is 1
    normaliser: float | Tensor


class _Parts(NamedTuple):
    """One term of the loss, its gradients before normaliser and upstream gradient, and its statistics."""

    loss: Tensor
    scale: LossScale
    gradients: tuple[Tensor | None, ...]
    stats: dict[str, Tensor]


def _make_selector(mask: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> x where mask is True and 0 elsewhere, whatever its value there."""
    if mask is None:
        return lambda x: x
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return lambda x: torch.where(mask, x, 0)
    # A bitwise AND: on a CPU torch.where takes 3 to 15 times as long, and a product would keep NaN.
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    bits = mask.to(integer).neg_()
    return lambda x: (x.view(integer) & bits).view(dtype)


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """1 where a != b, else 0 (also for NaN), as a float: on a CPU a comparison costs four subtractions."""
    return (a - b).sign().abs()


def _count_negative(sign: Tensor) -> Tensor:
    """How many elements of a tensor of -1, 0 and 1 are -1."""
    return -sign.clamp(max=0).sum()


def _weighted(x: Tensor, scale: LossScale) -> Tensor:
    return x if scale.token_weight is None else x * scale.token_weight


def _sequence_lengths(mask: Tensor | None, like: Tensor, cu_seqlens: Tensor | None) -> Tensor | int:
    """Counted steps of each sequence: [..., 1] for rows, [S] for pieces, one number where all rows are full."""
    if cu_seqlens is None:
        return like.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
    if mask is None:
        return cu_seqlens.diff()
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before[cu_seqlens.long()].diff()


def loss_scale(
    mask: Tensor | None, like: Tensor, cu_seqlens: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> LossScale:
    """Return reference.token_weights, without a weight per token where one number is enough."""
    count = max(like.numel(), 1) if mask is None else mask.sum().clamp(min=1)
    if options.aggregation == "token-sum":
        return LossScale(count, None, 1.0)
    given = options.denominator
    if isinstance(given, Tensor):
        given = given.detach().to(dtype)
    if options.aggregation == "token-mean":
        return LossScale(count, None, count if given is None else given)
    lengths = _sequence_lengths(mask, like, cu_seqlens)
    if isinstance(lengths, int):
        sequences: int | Tensor = max(like.numel() // max(lengths, 1), 1)
    else:
        sequences = (lengths > 0).sum().clamp(min=1)
    normaliser = sequences if given is None else given
    if options.aggregation == "seq-mean-token-sum":
        return LossScale(count, None, normaliser)
    if options.aggregation == "seq-mean-token-sum-norm":
        norm = max(like.shape[-1], 1) if options.norm_length is None else options.norm_length
        normaliser = normaliser * norm
        return LossScale(count, None, normaliser.to(dtype) if isinstance(normaliser, Tensor) else normaliser)
    if isinstance(lengths, int):
        return LossScale(count, 1.0 / max(lengths, 1), normaliser)
    token_weight = lengths.clamp(min=1).to(dtype).reciprocal()
    if cu_seqlens is not None:
        steps = torch.arange(like.shape[0], device=like.device)
        token_weight = token_weight[
            torch.bucketize(steps, cu_seqlens[1:].long(), right=True).clamp(max=len(token_weight) - 1)
        ]
    return LossScale(count, token_weight, normaliser)


def _kl_and_gradient(d: Tensor, kind: str, log_ratio_clamp: float) -> tuple[Tensor, Tensor]:
    """reference.kl_estimate and its derivative by the log-probability."""
    if kind == "k1":
        return d, torch.ones_like(d)
    if kind == "k2":
        return 0.5 * d * d, d
    if kind == "abs":
        return d.abs(), d.sign()
    exponent = d.clamp(-log_ratio_clamp, log_ratio_clamp)
    inverse_ratio = torch.exp(-exponent)
    return inverse_ratio - 1 + d, 1 - inverse_ratio * (1 - _differ(d, exponent))


def _surrogate(
    d: Tensor, advantages: Tensor, options: LossOptions, sums: dict[str, Tensor], need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ratio, objective and its derivative by the log-probability, from log-ratios d; adds to the sums of statistics.

    A tie of minimum or maximum halves the derivative, as in autograd: `order` is 1, 0 or -1 as the term that depends on
    the log-probability is chosen, ties, or is not. A masked step (d = 0, advantage 0) has objective and derivative 0.
    """
    clamped = d.clamp(-options.log_ratio_clamp, options.log_ratio_clamp)
    ratio = clamped.exp()
    clipped_ratio = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    unclipped, clipped = advantages * ratio, advantages * clipped_ratio
    objective = torch.minimum(unclipped, clipped)
    order = (clipped - unclipped).sign()
    sums["clip_fraction"] = _count_negative(order)
    gradient = None
    if need_gradient:  # within the clip range both terms are one, and both have the derivative
        gradient = unclipped * (1 - 0.5 * _differ(ratio, clipped_ratio) * (1 - order)) * (1 - _differ(d, clamped))
    if options.dual_clip is not None:
        bound = advantages.clamp(max=0) * options.dual_clip  # 0 for good advantages, whose objective is never below
        order = (objective - bound).sign()
        sums["dual_clip_fraction"] = _count_negative(order)
        gradient = None if gradient is None else gradient * (0.5 + 0.5 * order)
        objective = torch.maximum(objective, bound)
    return ratio, objective, gradient


def _policy(
    logprobs: Tensor,
    entropy: Tensor | None,
    tensors: LossTensors,
    options: LossOptions,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> _Parts:
    select = _make_selector(tensors.mask, dtype)
    logprobs = logprobs.to(dtype)
    scale = loss_scale(tensors.mask, logprobs, tensors.cu_seqlens, options, dtype)
    d, advantages = (
        select(logprobs - required(tensors.old_logprobs).to(dtype)),
        select(required(tensors.advantages).to(dtype)),
    )
    sums: dict[str, Tensor] = {}
    ratio, objective, gradient = _surrogate(d, advantages, options, sums, needs[0])
    sums["approx_kl"] = (ratio - 1 - d).sum()
    ratio = select(ratio)
    sums["ratio_mean"] = ratio.sum()
    if tensors.weights is not None:
        weights = select(tensors.weights.to(dtype))
        objective = objective * weights
        gradient = None if gradient is None else gradient * weights
    policy = -_weighted(objective, scale).sum() / scale.normaliser
    loss, d_logprobs, d_entropy = policy, None if gradient is None else -gradient, None
    if entropy is not None:
        kept = select(entropy.to(dtype))
        sums["entropy"] = kept.sum()
        loss = loss - options.entropy_coef * (_weighted(kept, scale).sum() / scale.normaliser)
        if needs[1]:
            ones = torch.ones_like(kept) if tensors.mask is None else tensors.mask.to(dtype)
            d_entropy = _weighted(-options.entropy_coef * ones, scale)
    if tensors.ref_logprobs is not None:
        d_ref = select(logprobs - tensors.ref_logprobs.to(dtype))
        kl, kl_gradient = _kl_and_gradient(d_ref, options.kl_estimator, options.log_ratio_clamp)
        sums["ref_kl"] = kl.sum()
        loss = loss + options.kl_coef * (_weighted(kl, scale).sum() / scale.normaliser)
        d_logprobs = None if d_logprobs is None else d_logprobs + options.kl_coef * select(kl_gradient)
    means = torch.stack(tuple(sums.values())) / scale.steps
    stats = dict(zip(sums, means.unbind(), strict=True))
    stats["policy_loss"] = policy
    stats["ratio_max"] = ratio.amax() if ratio.numel() else ratio.new_zeros(())
    return _Parts(loss, scale, (None if d_logprobs is None else _weighted(d_logprobs, scale), d_entropy), stats)


def _value(
    values: Tensor, tensors: LossTensors, options: LossOptions, dtype: torch.dtype, need_gradient: bool
) -> _Parts:
    mask = tensors.mask if tensors.value_mask is None else tensors.value_mask
    select = _make_selector(mask, dtype)
    values, returns = values.to(dtype), required(tensors.returns).to(dtype)
    scale = loss_scale(mask, values, tensors.cu_seqlens, options, dtype)
    error = select(values - returns)
    squared, gradient = error * error, error
    stats = {}
    if options.value_clip is not None:
        # Clamped between its bounds, a value in range does not change; old + (v - old) would round, as if clipped.
        old = required(tensors.old_values).to(dtype)
        clipped_values = values.clamp(old - options.value_clip, old + options.value_clip)
        clipped_squared = select(clipped_values - returns).square()
        order = (squared - clipped_squared).sign()
        stats["value_clip_fraction"] = _count_negative(order) / scale.steps
        if need_gradient:
            gradient = error * (1 - 0.5 * _differ(values, clipped_values) * (1 - order))
        squared = torch.maximum(squared, clipped_squared)
    loss = 0.5 * _weighted(squared, scale).sum() / scale.normaliser
    d_values = _weighted(options.value_coef * gradient, scale) if need_gradient else None
    return _Parts(loss, scale, (d_values,), {"value_loss": loss, **stats})


def forward(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    tensors: LossTensors,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None], list[float | Tensor | None]]:
    """Return loss, statistics, the three un-normalised gradients and the divisor of each."""
    floats = [x for x in (logprobs, entropy, values, *tensors) if x is not None and x.is_floating_point()]
    dtype = reduce(torch.promote_types, [x.dtype for x in floats], torch.float32)
    gradients: list[Tensor | None] = [None, None, None]
    divisors: list[float | Tensor | None] = [None, None, None]
    stats: dict[str, Tensor] = {}
    losses = []
    if logprobs is not None:
        part = _policy(logprobs, entropy, tensors, options, dtype, needs)
        gradients[:2], divisors[:2] = part.gradients, [part.scale.normaliser] * 2
        losses.append(part.loss)
        stats |= part.stats
    if values is not None:
        part = _value(values, tensors, options, dtype, needs[2])
        gradients[2], divisors[2] = part.gradients[0], part.scale.normaliser
        losses.append(options.value_coef * part.loss)
        stats |= part.stats
    # A statistic is never the loss itself: only one of them carries the graph, and users divide losses in place.
    loss = losses[0].clone() if len(losses) == 1 else losses[0] + losses[1]
    return loss.to(dtype), stats, gradients, divisors
