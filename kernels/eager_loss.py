"""PPO's scalar losses in vectorised PyTorch, for a CPU and any other device: policy_loss, value_loss and ppo_loss.

The gradients are written down by hand and made in the forward, beside the terms that they share; the backward is one
scale. Every per-token tensor is traversed by elementwise operations only, nothing synchronises, and nothing is longer
than the inputs. Gradients flow to logprobs, values and entropy; every other tensor is a constant.

Notation: the surrogate is maximised here (objective = -term), which saves a negation and changes no bit.
"""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.loss_op import LossOptions, LossTensors, public_functions, stat_names


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


def _keep(x: Tensor, counted: Tensor | None) -> Tensor:
    return x if counted is None else torch.where(counted, x, 0)


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


def _scale(
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
    return inverse_ratio - 1 + d, 1 - torch.where(exponent == d, inverse_ratio, 0)


def _surrogate(
    logprobs: Tensor, t: LossTensors, o: LossOptions, stats: dict[str, Tensor], dtype: torch.dtype, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The objective per token and its derivative by the log-probability; sums of statistics go to `stats`.

    A masked step has log-ratio 0 and advantage 0, hence ratio 1, objective 0 and derivative 0.
    """
    d = _keep(logprobs - t.old_logprobs.to(dtype), t.mask)
    advantages = _keep(t.advantages.to(dtype), t.mask)
    clamped = d.clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
    ratio = clamped.exp()
    clipped_ratio = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    unclipped, clipped = advantages * ratio, advantages * clipped_ratio
    is_clipped = clipped < unclipped
    objective = torch.minimum(unclipped, clipped)
    slope = None
    if need_gradient:
        slope = unclipped.masked_fill(is_clipped, 0)
        half = (unclipped == clipped) & (clipped_ratio != ratio)  # a tie that rounding made: autograd splits it
        slope = torch.where(half, 0.5 * unclipped, slope)
    stats["clip_fraction"] = is_clipped.sum().to(dtype)
    if o.dual_clip is not None:
        bound = advantages * o.dual_clip
        harmful = advantages < 0
        is_dual_clipped = harmful & (objective < bound)
        if slope is not None:
            slope = torch.where(harmful & (objective == bound), 0.5 * slope, slope).masked_fill(is_dual_clipped, 0)
        objective = torch.where(is_dual_clipped, bound, objective)
        stats["dual_clip_fraction"] = is_dual_clipped.sum().to(dtype)
    if slope is not None:
        slope = torch.where(clamped == d, slope, 0)
    counted_ratio = _keep(ratio, t.mask)
    stats["approx_kl"] = (ratio - 1 - d).sum()
    stats["ratio_mean"] = counted_ratio.sum()
    stats["ratio_max"] = counted_ratio.amax() if ratio.numel() else ratio.new_zeros(())
    if t.weights is not None:
        weights = _keep(t.weights.to(dtype), t.mask)
        objective = objective * weights
        slope = None if slope is None else slope * weights
    return objective, slope


def _policy(
    logprobs: Tensor,
    entropy: Tensor | None,
    t: LossTensors,
    o: LossOptions,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> _Parts:
    logprobs = logprobs.to(dtype)
    scale = _scale(t.mask, logprobs, t.cu_seqlens, o, dtype)
    sums: dict[str, Tensor] = {}
    objective, slope = _surrogate(logprobs, t, o, sums, dtype, needs[0])
    policy = -_shared(objective, scale).sum() / scale.normaliser
    loss = policy
    d_logprobs = None if slope is None else -slope
    d_entropy = None
    if entropy is not None:
        kept = _keep(entropy.to(dtype), t.mask)
        sums["entropy"] = kept.sum()
        loss = loss - o.entropy_coef * (_shared(kept, scale).sum() / scale.normaliser)
        if needs[1]:
            ones = torch.ones_like(kept) if t.mask is None else t.mask.to(dtype)
            d_entropy = _shared(-o.entropy_coef * ones, scale)
    if t.ref_logprobs is not None:
        d_ref = _keep(logprobs - t.ref_logprobs.to(dtype), t.mask)
        kl, kl_slope = _kl_and_slope(d_ref, o.kl_estimator, o.log_ratio_clamp)
        sums["ref_kl"] = kl.sum()
        loss = loss + o.kl_coef * (_shared(kl, scale).sum() / scale.normaliser)
        if d_logprobs is not None:
            d_logprobs = d_logprobs + o.kl_coef * _keep(kl_slope, t.mask)
    stats = {"policy_loss": policy, "ratio_max": sums.pop("ratio_max")}
    means = torch.stack(tuple(sums.values())) / scale.count
    stats |= dict(zip(sums, means.unbind(), strict=True))
    return _Parts(loss, scale, (None if d_logprobs is None else _shared(d_logprobs, scale), d_entropy), stats)


def _value(values: Tensor, t: LossTensors, o: LossOptions, dtype: torch.dtype, need_gradient: bool) -> _Parts:
    counted = t.mask if t.value_mask is None else t.value_mask
    values, returns = values.to(dtype), t.returns.to(dtype)
    scale = _scale(counted, values, t.cu_seqlens, o, dtype)
    error = _keep(values - returns, counted)
    squared, slope = error * error, error
    stats = {}
    if o.value_clip is not None:
        old = t.old_values.to(dtype)
        move = values - old
        clamped = move.clamp(-o.value_clip, o.value_clip)
        # Inside the clip range old + (v - old) is v: adding it up would make rounding look like clipping.
        outside = clamped != move if counted is None else (clamped != move) & counted
        clipped_error = torch.where(outside, old + clamped - returns, error)
        clipped_squared = clipped_error * clipped_error
        is_clipped = clipped_squared > squared
        if need_gradient:
            half = outside & (squared == clipped_squared)
            slope = torch.where(half, 0.5 * error, error.masked_fill(is_clipped, 0))
        squared = torch.maximum(squared, clipped_squared)
        stats["value_clip_fraction"] = is_clipped.sum().to(dtype) / scale.count
    loss = 0.5 * _shared(squared, scale).sum() / scale.normaliser
    gradient = _shared(o.value_coef * slope, scale) if need_gradient else None
    return _Parts(loss, scale, (gradient,), {"value_loss": loss, **stats})


def _forward(
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
        loss, stats, gradients, divisors = _forward(logprobs, entropy, values, t, o, needs)
        on_device = [x if isinstance(x, Tensor) else None for x in divisors]
        ctx.save_for_backward(*gradients, *on_device)
        ctx.divisors = [None if isinstance(x, Tensor) else x for x in divisors]
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, values)]
        ordered = [stats[name] for name in names]
        ctx.mark_non_differentiable(*ordered)
        return loss, *ordered

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("create_graph=True: policy_loss, value_loss and ppo_loss have no second derivative")
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


def _loss(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, t: LossTensors, o: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    names = stat_names(logprobs is not None, entropy is not None, values is not None, t, o)
    if torch.compiler.is_compiling():
        o = _traceable(o, (values if logprobs is None else logprobs).device)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (logprobs, entropy, values))
    if any(needs):
        loss, *ordered = _Loss.apply(logprobs, entropy, values, t, o, needs, names)
        return loss, dict(zip(names, ordered, strict=True))
    with torch.no_grad():  # a constant that requires a gradient gets none here either
        loss, stats, _, _ = _forward(logprobs, entropy, values, t, o, needs)
    return loss, {name: stats[name] for name in names}


policy_loss, value_loss, ppo_loss = public_functions(_loss)
