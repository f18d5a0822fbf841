"""PPO's scalar losses in vectorised PyTorch, for a CPU and any other device: policy_loss, value_loss and ppo_loss.

The gradients are written down by hand and made in the forward, beside the terms that they share; the backward is one
scale. Every per-token tensor is traversed by elementwise operations only, nothing synchronises, and nothing is longer
than the inputs. Gradients flow to logprobs, values and entropy; every other tensor is a constant.

Notation: the surrogate is maximised here (objective = -term), which saves a negation and changes no bit.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.numba_loops import numba_works
from ppo_fast.kernels.loss.options import LossOptions, LossTensors, public_functions, refuse_double_backward, stat_names


class _Scale(NamedTuple):
    """loss = sum_i share_i term_i / normaliser; statistics are sums over `count`."""

    count: int | Tensor  # counted steps, at least 1
    share: float | Tensor | None  # None is 1
    normaliser: float | Tensor


class _Parts(NamedTuple):
    """One term of the loss, its gradients before normaliser and upstream gradient, and its statistics."""

    loss: Tensor
    scale: _Scale
    gradients: tuple[Tensor | None, ...]
    stats: dict[str, Tensor]


def _selector(mask: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
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


def _shared(x: Tensor, scale: _Scale) -> Tensor:
    return x if scale.share is None else x * scale.share


def _sequence_lengths(counted: Tensor | None, like: Tensor, cu_seqlens: Tensor | None) -> Tensor | int:
    """Counted steps of each sequence: [..., 1] for rows, [S] for pieces, one number where all rows are full."""
    if cu_seqlens is None:
        return like.shape[-1] if counted is None else counted.sum(-1, keepdim=True)
    if counted is None:
        return cu_seqlens.diff()
    before = torch.nn.functional.pad(counted.cumsum(0), (1, 0))
    return before[cu_seqlens.long()].diff()


def loss_scale(
    counted: Tensor | None, like: Tensor, cu_seqlens: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> _Scale:
    """What reference.token_weights says, without a weight per token where one number does."""
    count = max(like.numel(), 1) if counted is None else counted.sum().clamp(min=1)
    if options.aggregation == "token-sum":
        return _Scale(count, None, 1.0)
    given = options.denominator
    if isinstance(given, Tensor):
        given = given.detach().to(dtype)
    if options.aggregation == "token-mean":
        return _Scale(count, None, count if given is None else given)
    lengths = _sequence_lengths(counted, like, cu_seqlens)
    if isinstance(lengths, int):
        sequences = max(like.numel() // max(lengths, 1), 1)
    else:
        sequences = (lengths > 0).sum().clamp(min=1)
    normaliser = sequences if given is None else given
    if options.aggregation == "seq-mean-token-sum":
        return _Scale(count, None, normaliser)
    if options.aggregation == "seq-mean-token-sum-norm":
        norm = max(like.shape[-1], 1) if options.norm_length is None else options.norm_length
        normaliser = normaliser * norm
        return _Scale(count, None, normaliser.to(dtype) if isinstance(normaliser, Tensor) else normaliser)
    if isinstance(lengths, int):
        return _Scale(count, 1.0 / max(lengths, 1), normaliser)
    share = lengths.clamp(min=1).to(dtype).reciprocal()
    if cu_seqlens is not None:
        steps = torch.arange(like.shape[0], device=like.device)
        share = share[torch.bucketize(steps, cu_seqlens[1:].long(), right=True).clamp(max=len(share) - 1)]
    return _Scale(count, share, normaliser)


def _kl_and_slope(d: Tensor, kind: str, log_ratio_clamp: float) -> tuple[Tensor, Tensor]:
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
    d: Tensor, advantages: Tensor, o: LossOptions, sums: dict[str, Tensor], need_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ratio, objective and its derivative by the log-probability, from log-ratios d; adds to the sums of statistics.

    A tie of minimum or maximum halves the derivative, as in autograd: `order` is 1, 0 or -1 as the term that depends on
    the log-probability is chosen, ties, or is not. A masked step (d = 0, advantage 0) has objective and derivative 0.
    """
    clamped = d.clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
    ratio = clamped.exp()
    clipped_ratio = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    unclipped, clipped = advantages * ratio, advantages * clipped_ratio
    objective = torch.minimum(unclipped, clipped)
    order = (clipped - unclipped).sign()
    sums["clip_fraction"] = _count_negative(order)
    slope = None
    if need_slope:  # within the clip range both terms are one, and both have the derivative
        slope = unclipped * (1 - 0.5 * _differ(ratio, clipped_ratio) * (1 - order)) * (1 - _differ(d, clamped))
    if o.dual_clip is not None:
        bound = advantages.clamp(max=0) * o.dual_clip  # 0 for good advantages, whose objective is never below
        order = (objective - bound).sign()
        sums["dual_clip_fraction"] = _count_negative(order)
        slope = None if slope is None else slope * (0.5 + 0.5 * order)
        objective = torch.maximum(objective, bound)
    return ratio, objective, slope


def _policy(
    logprobs: Tensor,
    entropy: Tensor | None,
    t: LossTensors,
    o: LossOptions,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> _Parts:
    keep = _selector(t.mask, dtype)
    logprobs = logprobs.to(dtype)
    scale = loss_scale(t.mask, logprobs, t.cu_seqlens, o, dtype)
    d, advantages = keep(logprobs - t.old_logprobs.to(dtype)), keep(t.advantages.to(dtype))
    sums: dict[str, Tensor] = {}
    ratio, objective, slope = _surrogate(d, advantages, o, sums, needs[0])
    sums["approx_kl"] = (ratio - 1 - d).sum()
    ratio = keep(ratio)
    sums["ratio_mean"] = ratio.sum()
    if t.weights is not None:
        weights = keep(t.weights.to(dtype))
        objective = objective * weights
        slope = None if slope is None else slope * weights
    policy = -_shared(objective, scale).sum() / scale.normaliser
    loss, d_logprobs, d_entropy = policy, None if slope is None else -slope, None
    if entropy is not None:
        kept = keep(entropy.to(dtype))
        sums["entropy"] = kept.sum()
        loss = loss - o.entropy_coef * (_shared(kept, scale).sum() / scale.normaliser)
        if needs[1]:
            ones = torch.ones_like(kept) if t.mask is None else t.mask.to(dtype)
            d_entropy = _shared(-o.entropy_coef * ones, scale)
    if t.ref_logprobs is not None:
        d_ref = keep(logprobs - t.ref_logprobs.to(dtype))
        kl, kl_slope = _kl_and_slope(d_ref, o.kl_estimator, o.log_ratio_clamp)
        sums["ref_kl"] = kl.sum()
        loss = loss + o.kl_coef * (_shared(kl, scale).sum() / scale.normaliser)
        d_logprobs = None if d_logprobs is None else d_logprobs + o.kl_coef * keep(kl_slope)
    means = torch.stack(tuple(sums.values())) / scale.count
    stats = dict(zip(sums, means.unbind(), strict=True))
    stats["policy_loss"] = policy
    stats["ratio_max"] = ratio.amax() if ratio.numel() else ratio.new_zeros(())
    return _Parts(loss, scale, (None if d_logprobs is None else _shared(d_logprobs, scale), d_entropy), stats)


def _value(values: Tensor, t: LossTensors, o: LossOptions, dtype: torch.dtype, need_gradient: bool) -> _Parts:
    mask = t.mask if t.value_mask is None else t.value_mask
    keep = _selector(mask, dtype)
    values, returns = values.to(dtype), t.returns.to(dtype)
    scale = loss_scale(mask, values, t.cu_seqlens, o, dtype)
    error = keep(values - returns)
    squared, slope = error * error, error
    stats = {}
    if o.value_clip is not None:
        # Clamped between its bounds, a value in range stays itself; old + (v - old) would round and look like clipping.
        old = t.old_values.to(dtype)
        clipped_values = values.clamp(old - o.value_clip, old + o.value_clip)
        clipped_squared = keep(clipped_values - returns).square()
        order = (squared - clipped_squared).sign()
        stats["value_clip_fraction"] = _count_negative(order) / scale.count
        if need_gradient:
            slope = error * (1 - 0.5 * _differ(values, clipped_values) * (1 - order))
        squared = torch.maximum(squared, clipped_squared)
    loss = 0.5 * _shared(squared, scale).sum() / scale.normaliser
    gradient = _shared(o.value_coef * slope, scale) if need_gradient else None
    return _Parts(loss, scale, (gradient,), {"value_loss": loss, **stats})


def forward(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    t: LossTensors,
    o: LossOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None], list[float | Tensor | None]]:
    """loss, statistics, the three un-normalised gradients and what divides each of them."""
    floats = [x for x in (logprobs, entropy, values, *t) if x is not None and x.is_floating_point()]
    dtype = reduce(torch.promote_types, [x.dtype for x in floats], torch.float32)
    gradients: list[Tensor | None] = [None, None, None]
    divisors: list[float | Tensor | None] = [None, None, None]
    stats: dict[str, Tensor] = {}
    losses = []
    if logprobs is not None:
        part = _policy(logprobs, entropy, t, o, dtype, needs)
        gradients[:2], divisors[:2] = part.gradients, [part.scale.normaliser] * 2
        losses.append(part.loss)
        stats |= part.stats
    if values is not None:
        part = _value(values, t, o, dtype, needs[2])
        gradients[2], divisors[2] = part.gradients[0], part.scale.normaliser
        losses.append(o.value_coef * part.loss)
        stats |= part.stats
    # A statistic is never the loss itself: only one of them carries the graph, and users divide losses in place.
    loss = losses[0].clone() if len(losses) == 1 else losses[0] + losses[1]
    return loss.to(dtype), stats, gradients, divisors


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        t: LossTensors,
        o: LossOptions,
        needs: tuple[bool, ...],
        names: list[str],
    ) -> tuple[Tensor, ...]:
        loss, stats, gradients, divisors = forward(logprobs, entropy, values, t, o, needs)
        on_device = [x if isinstance(x, Tensor) else None for x in divisors]
        ctx.save_for_backward(*gradients, *on_device)
        ctx.divisors = [None if isinstance(x, Tensor) else x for x in divisors]
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, values)]
        ordered = [stats[name] for name in names]
        ctx.mark_non_differentiable(*ordered)
        ctx.set_materialize_grads(False)
        return loss, *ordered

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grad_loss is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        out: list[Tensor | None] = [None, None, None]
        for i in range(3):
            if saved[i] is not None:
                divisor = ctx.divisors[i] if saved[3 + i] is None else saved[3 + i]
                out[i] = (saved[i] * (grad_loss / divisor)).to(ctx.dtypes[i])
        return *out, None, None, None, None


def _traceable(o: LossOptions, device: torch.device) -> LossOptions:
    """The numbers as tensors: torch.compile would make a float a constant, and compile again for the next value."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    given = {name: zero + x for name, x in zip(o._fields, o, strict=True) if isinstance(x, (int, float))}
    return o._replace(**given)


class _SmallLoss(torch.autograd.Function):
    """The same in one compiled loop; the statistics are one tensor, since each output of a Function costs time."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        t: LossTensors,
        o: LossOptions,
        num_stats: int,
    ) -> tuple[Tensor, Tensor]:
        from ppo_fast.kernels.loss import cpu as cpu_loss

        loss, stats, ctx.gradients = cpu_loss.forward(logprobs, entropy, values, t, o, num_stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grad_loss is None:
            return (None,) * 6
        return *(None if x is None else x * grad_loss for x in ctx.gradients), None, None, None


def _is_small(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, t: LossTensors, o: LossOptions
) -> bool:
    """Whether one compiled loop can do it."""
    first = values if logprobs is None else logprobs
    if first is None or not first.is_cpu or torch.compiler.is_compiling() or not numba_works():
        return False
    from ppo_fast.kernels.loss import cpu as cpu_loss

    return cpu_loss.takes(logprobs, entropy, values, t, o)


def _loss(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, t: LossTensors, o: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    names = stat_names(logprobs is not None, entropy is not None, values is not None, t, o)
    if _is_small(logprobs, entropy, values, t, o):
        loss, stats = _SmallLoss.apply(logprobs, entropy, values, t, o, len(names))
        return loss, dict(zip(names, stats.unbind(), strict=True))
    if torch.compiler.is_compiling():
        o = _traceable(o, (values if logprobs is None else logprobs).device)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (logprobs, entropy, values))
    if any(needs):
        loss, *ordered = _Loss.apply(logprobs, entropy, values, t, o, needs, names)
        if torch.compiler.is_compiling():  # which forgets mark_non_differentiable in torch 2.11
            ordered = [x.detach() for x in ordered]
        return loss, dict(zip(names, ordered, strict=True))
    with torch.no_grad():  # a constant that requires a gradient gets none here either
        loss, stats, _, _ = forward(logprobs, entropy, values, t, o, needs)
    return loss, {name: stats[name] for name in names}


policy_loss, value_loss, ppo_loss = public_functions(_loss)
