"""shape_rewards, masked_whiten and rlhf_advantages in PyTorch, for a CPU and any other device.

The results of reference.py in fewer passes over the data. No result has a graph: rewards, advantages and returns are
data. Nothing waits for the device. On a CPU with numba, the compiled loops of cpu.py are used.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast.kernels.advantages.options import STATISTICS, AdvantageTensors, ShapingOptions, WhiteningOptions
from ppo_fast.kernels.common.numba_loops import numba_works
from ppo_fast.kernels.common.scalars import as_tensor
from ppo_fast.kernels.gae.custom_op import gae
from ppo_fast.kernels.gae.eager import float_dtype
from ppo_fast.kernels.gae.options import GAEOptions

_LOG_RATIO_CLAMP = 20.0  # as in reference.kl_estimate


def _numba_supports(first: Tensor, *others: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not numba_works():
        return False
    from ppo_fast.kernels.advantages import cpu

    return cpu.supports(first, *others)


def _kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """reference.kl_estimate, one temporary at most."""
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square_().mul_(0.5)
    if kind == "k3":
        return torch.exp(-d.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)).sub_(1).add_(d)
    return d.abs_()


def _real(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype)


def _score_slot(mask: Tensor, reward_at: str) -> tuple[Tensor, Tensor]:
    """The slot of each row's score, [B], and whether the row has one: the last counted step, or the one after it."""
    T = mask.shape[-1]
    steps = torch.arange(1, T + 1, dtype=torch.int32, device=mask.device)
    last = (mask * steps).amax(-1).long()  # counted from 1, so that 0 is: none
    slot = last - 1 if reward_at == "last" else last.clamp(max=T - 1)
    return slot.clamp_(min=0), last > 0


def shape_rewards(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    mask: Tensor,
    options: ShapingOptions,
) -> tuple[Tensor, ...]:
    """Rewards and KL, and for "after_last" the longer mask: reference.shape_rewards without a graph."""
    if _numba_supports(scores, logprobs, ref_logprobs, mask):
        from ppo_fast.kernels.advantages import cpu

        return cpu.shape_rewards(scores, logprobs, ref_logprobs, mask, options, clamp=_LOG_RATIO_CLAMP)
    kl_coef, kl_estimator, score_clip, reward_at = options
    dtype = float_dtype(scores, logprobs, ref_logprobs)
    with torch.no_grad():
        kl = _kl(_real(logprobs, dtype), _real(ref_logprobs, dtype), kl_estimator)
        kl = torch.where(mask, kl, 0)
        score = _real(scores, dtype)
        if score_clip is not None:
            score = score.clamp(-float(score_clip), float(score_clip))
        rewards = kl * -float(kl_coef)
        if scores.ndim == mask.ndim:
            return rewards.add_(torch.where(mask, score, 0)), kl
        if mask.numel() == 0:
            return (rewards, kl) if reward_at == "last" else (rewards, kl, mask.clone())
        slot, present = _score_slot(mask, reward_at)
        slot = slot.unsqueeze(-1)
        rewards.scatter_add_(-1, slot, torch.where(present, score, 0).unsqueeze(-1))
        if reward_at == "last":
            return rewards, kl
        return rewards, kl, mask.scatter(-1, slot, mask.gather(-1, slot) | present.unsqueeze(-1))


def merge_over_group(count: Tensor, mean: Tensor, m2: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Count, mean and sum of squared deviations of the elements of all ranks (Chan, Golub and LeVeque 1979).

    Every rank adds the same numbers in rank order, hence the same bits everywhere. fp64, so that counts are exact.
    """
    mine = torch.stack([count.double(), mean.double(), m2.double()])
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, mine, group=group)
    counts, means, m2s = torch.stack(ranks, dim=1)
    total = counts.sum()
    merged = (counts * means).sum() / total.clamp(min=1)
    return total, merged, m2s.sum() + (counts * (means - merged).square()).sum()


def _moments(x: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Count, mean and sum of squared deviations over the counted elements, and x - mean with 0 elsewhere."""
    kept = x if mask is None else torch.where(mask, x, 0)
    count = torch.full_like(x.sum(), x.numel()) if mask is None else mask.sum().to(x.dtype)
    mean = kept.sum() / count.clamp(min=1)
    centred = kept - mean if mask is None else torch.where(mask, x - mean, 0)
    m2 = torch.linalg.vector_norm(centred).square()
    if group is None:
        return count, mean, m2, centred
    total, merged, m2 = merge_over_group(count, mean, m2, group)
    shift = (mean - merged).to(x.dtype)
    centred = centred + shift if mask is None else torch.where(mask, centred + shift, 0)
    return total, merged.to(x.dtype), m2, centred


def _scale(variance: Tensor, options: WhiteningOptions) -> Tensor:
    """1 / max(sqrt(variance + eps), min_std)"""
    scale = torch.rsqrt(variance + float(options.eps))
    if not isinstance(options.min_std, Tensor) and options.min_std == 0:
        return scale
    return torch.minimum(scale, as_tensor(options.min_std).to(scale.dtype).reciprocal())


def _whiten(x: Tensor, mask: Tensor | None, options: WhiteningOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The whitened x, and mean and standard deviation (unbiased or not) of x itself."""
    count, mean, m2, centred = _moments(x, mask, options.group)
    variance = m2 / (count - int(options.unbiased)).clamp(min=1)
    scale = torch.where(count > 1, _scale(variance, options), 1).to(x.dtype)
    whitened = centred * scale
    if not options.shift_mean:
        whitened = whitened + mean if mask is None else torch.where(mask, whitened + mean, 0)
    return whitened, mean, variance.sqrt().to(x.dtype)


def _whiten_with_numba(
    x: Tensor, mask: Tensor | None, options: WhiteningOptions, *, in_place: bool = False
) -> tuple[Tensor, float, float]:
    """`_whiten` by compiled loops, with mean and standard deviation as numbers."""
    from ppo_fast.kernels.advantages import cpu

    count, mean, m2 = cpu.moments(x, mask)
    if options.group is not None:
        own = torch.tensor((count, mean, m2), dtype=torch.float64, device="cpu")
        count, mean, m2 = (y.item() for y in merge_over_group(own[0], own[1], own[2], options.group))
    variance = m2 / max(count - int(options.unbiased), 1.0)
    spread = math.sqrt(variance + float(options.eps))
    floor = float(options.min_std)
    spread = floor if spread < floor else spread  # not max, which would lose a NaN
    scale = 1.0 if count <= 1 else math.inf if spread == 0 else 1 / spread
    shift = 0.0 if options.shift_mean else mean
    whitened = cpu.scaled(x, mask, mean=mean, scale=scale, shift=shift, in_place=in_place)
    return whitened, mean, math.sqrt(variance)


def masked_whiten(x: Tensor, mask: Tensor | None, options: WhiteningOptions) -> Tensor:
    """reference.masked_whiten without a graph; with `group`, count, mean and variance are those of all its ranks."""
    if _numba_supports(x, mask) and not isinstance(options.min_std, Tensor):
        return _whiten_with_numba(x, mask, options)[0]
    with torch.no_grad():
        return _whiten(_real(x, float_dtype(x)), mask, options)[0]


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """Mean where counted; x is 0 elsewhere."""
    return x.sum() / counted.sum().clamp(min=1)


def rlhf_advantages(
    tensors: AdvantageTensors,
    shaping: ShapingOptions,
    gae_options: GAEOptions,  # of which it uses gamma, lam, critic_lam and bootstrap
    whitening: WhiteningOptions,
    *,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Advantages, returns, rewards, KL and statistics: shape_rewards, gae and masked_whiten in a row."""
    scores, logprobs, ref_logprobs, values, mask = tensors
    by_numba = _numba_supports(*tensors) and not isinstance(whitening.min_std, Tensor)
    if by_numba:
        from ppo_fast.kernels.advantages import cpu

        sums = torch.empty(len(mask), len(cpu.SUMS), dtype=torch.float64, device="cpu")
        rewards, kl, *longer = cpu.shape_rewards(
            scores, logprobs, ref_logprobs, mask, shaping, clamp=_LOG_RATIO_CLAMP, sums=sums
        )
    else:
        rewards, kl, *longer = shape_rewards(scores, logprobs, ref_logprobs, mask, shaping)
    steps = longer[0] if longer else mask
    advantages, returns = gae(rewards, values, gae_options._replace(mask=steps), use_triton=False)
    stats: Sequence[Tensor]
    with torch.no_grad():
        if by_numba:
            whitened, *spread = _whiten_with_numba(advantages, mask, whitening, in_place=whiten)
            means = _means_with_numba(sums, returns, steps if longer else None)
            stats = torch.tensor((*means, *spread), dtype=torch.float32, device="cpu").unbind()
        else:
            whitened, mean, std = _whiten(advantages, mask, whitening)
            rows, score = mask.any(-1), _real(scores, rewards.dtype)
            score = torch.where(rows if score.ndim == 1 else mask, score, 0)
            stats = _mean(score, rows), _mean(rewards, rows), _mean(kl, mask), _mean(returns, steps), mean, std
        if not whiten:
            whitened = torch.where(mask, advantages, 0) if longer else advantages
    return whitened, returns, rewards, kl, dict(zip(STATISTICS, stats, strict=True))


def _means_with_numba(sums: Tensor, returns: Tensor, steps: Tensor | None) -> list[float]:
    """Scores and rewards per row, KL per token, returns per step; returns are 0 where nothing counts.

    sums [B, len(SUMS)] are those of cpu.shape_rewards; steps are those of the mask if not given.
    """
    from ppo_fast.kernels.advantages import cpu

    rows, tokens, kl, rewards, scores = sums.sum(0).tolist()
    count = tokens if steps is None else int(steps.sum())
    total = cpu.total(returns)
    parts = ((scores, rows), (rewards, rows), (kl, tokens), (total, count))
    return [x / max(n, 1) for x, n in parts]
