"""policy_loss, value_loss and ppo_loss: their signatures, documentation and checks."""

from typing import NamedTuple

from torch import Tensor

from ppo_fast.kernels.loss.custom_op import compute_loss
from ppo_fast.kernels.loss.options import LossOptions, LossTensors
from ppo_fast.ops import checks
from ppo_fast.ops.backend import Backend, uses_triton
from ppo_fast.ops.checks import Aggregation, KLEstimator, public_operation


class LossOutput(NamedTuple):
    """The results of the losses: `loss`, a scalar with the graph, and `stats`, detached scalars on the device."""

    loss: Tensor
    stats: dict[str, Tensor]


@public_operation
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k2",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """PPO's clipped surrogate objective, negated (Schulman et al. 2017, "Proximal Policy Optimization", eq. 7).

    r = exp(clamp(logp - old_logp, +-log_ratio_clamp)); term = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)).
    loss = agg(weights term) - entropy_coef agg(entropy) + kl_coef agg(kl). The paper maximises min(...); we minimise
    its negative, and allow two clip ranges (Yu et al. 2025, DAPO) and a second bound for A < 0 (Ye et al. 2020, eq. 5).

    Args:
        logprobs, old_logprobs, advantages: [..., T] (or [total] with cu_seqlens). Gradients flow to logprobs and
        entropy. mask: the same shape, True where a token counts.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1; where A < 0 the term is at most -c A.
        log_ratio_clamp: bound of every exponent, in nats.
        entropy, entropy_coef: bonus for a random policy; entropy [..., T] in nats.
        ref_logprobs, kl_coef, kl_estimator: KL penalty to a reference, with d = logp - ref: k1 = d, k2 = d^2/2,
            k3 = exp(-d) - 1 + d, abs = |d|. As a loss only k2 has the gradient of the true KL; k1's has mean 0.
        weights: [..., T] factors of the term, for instance a truncated importance correction for the sampler.
        aggregation: token-mean, token-sum, seq-mean-token-sum, seq-mean-token-mean, or seq-mean-token-sum-norm (which
            divides each sequence's sum by norm_length, default T). Sequences without a counted token do not count.
        denominator: replaces the number of tokens (token-mean) or sequences (seq-mean-*), so that the loss does not
            depend on how a batch is cut into micro-batches or over ranks.
        cu_seqlens: [S + 1] boundaries of packed sequences.

    Returns:
        loss, and stats: policy_loss, approx_kl = mean(r - 1 - log r), clip_fraction, ratio_mean, ratio_max, and, where
        their inputs are given, entropy, ref_kl, dual_clip_fraction. Means are over the counted tokens of this call.

    >>> out = policy_loss(torch.tensor([0.0, 0.5]), torch.zeros(2), torch.tensor([1.0, 1.0]))
    >>> round(out.loss.item(), 4), out.stats["clip_fraction"].item()  # -(1 + 1.2) / 2: the second ratio is clipped
    (-1.1, 0.5)
    """
    checks.floating("logprobs", logprobs)
    # By position, which takes half the time
    tensors = LossTensors(old_logprobs, advantages, mask, weights, ref_logprobs, None, None, None, cu_seqlens)
    options = LossOptions(
        clip_low,
        clip_high,
        dual_clip,
        log_ratio_clamp,
        entropy_coef,
        kl_coef,
        kl_estimator,
        1.0,
        None,
        aggregation,
        denominator,
        norm_length,
    )
    _check_policy(logprobs, entropy, tensors, options)
    tensors = _with_masks(tensors, logprobs, "logprobs")
    checks.loss_aggregation("logprobs", logprobs, options, cu_seqlens)
    use_triton = uses_triton(backend, logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights)
    return LossOutput(*compute_loss(logprobs, entropy, None, tensors, options, use_triton=use_triton))


def _with_masks(tensors: LossTensors, first: Tensor, name: str) -> LossTensors:
    """Check the masks, after all tensors that must have the same shape, and return them as bool."""
    mask, value_mask = tensors.mask, tensors.value_mask
    if mask is not None:
        mask = checks.flag("mask", mask, first.shape, first.device, name)
    if value_mask is not None:
        value_mask = checks.flag("value_mask", value_mask, first.shape, first.device, "values")
    if mask is tensors.mask and value_mask is tensors.value_mask:
        return tensors
    return tensors._replace(mask=mask, value_mask=value_mask)


def _check_policy(logprobs: Tensor, entropy: Tensor | None, tensors: LossTensors, options: LossOptions) -> None:
    """Check the tensors and options of the policy loss, and that bonus and penalty have what they need."""
    old_logprobs, advantages, _, weights, ref_logprobs, *_ = tensors
    given = old_logprobs is not None and advantages is not None
    same = logprobs.shape, logprobs.dtype, logprobs.device
    if not given or not checks.alike(*same, old_logprobs, advantages, entropy, ref_logprobs, weights):
        checks.matching("old_logprobs", old_logprobs, logprobs, "logprobs")
        checks.matching("advantages", advantages, logprobs, "logprobs")
        for name, x in (("entropy", entropy), ("ref_logprobs", ref_logprobs), ("weights", weights)):
            if x is not None:
                checks.matching(name, x, logprobs, "logprobs")
    if entropy is None and options.entropy_coef != 0:
        raise ValueError(f"entropy_coef={options.entropy_coef} needs entropy, which was not given")
    if ref_logprobs is None and options.kl_coef != 0:
        raise ValueError(f"kl_coef={options.kl_coef} needs ref_logprobs, which was not given")
    checks.policy_options(options)


@public_operation
def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """The clipped squared error of the critic: 0.5 max((v - R)^2, (old_v + clamp(v - old_v, +-clip) - R)^2).

    With clip=None it is 0.5 (v - R)^2 and old_values may be None. The clipping is that of openai/baselines' ppo2
    (Engstrom et al. 2020, "Implementation Matters", section 3); the paper has the plain square.

    Args:
        values, old_values, returns: [..., T] (or [total] with cu_seqlens). Gradients flow to values.
        mask: the same shape, True where a step counts.
        clip: how far a value may move from old_values before its gradient stops, in units of the return.
        aggregation, denominator, norm_length, cu_seqlens: as in `policy_loss`.

    Returns:
        loss, and stats: value_loss, and with a clip value_clip_fraction.

    >>> loss = value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0])).loss  # 0.5 (0.2 - 2)^2
    >>> round(loss.item(), 4)
    1.62
    """
    checks.floating("values", values)
    tensors = LossTensors(None, None, mask, None, None, old_values, returns, None, cu_seqlens)
    options = LossOptions(value_clip=clip, aggregation=aggregation, denominator=denominator, norm_length=norm_length)
    _check_value(values, old_values, returns, clip)
    tensors = _with_masks(tensors, values, "values")
    checks.loss_aggregation("values", values, options, cu_seqlens)
    use_triton = uses_triton(backend, values, old_values, returns)
    return LossOutput(*compute_loss(None, None, values, tensors, options, use_triton=use_triton))


def _check_value(values: Tensor, old_values: Tensor | None, returns: Tensor, clip: float | None) -> None:
    if returns is None or not checks.alike(values.shape, values.dtype, values.device, returns, old_values):
        checks.matching("returns", returns, values, "values")
        if old_values is not None:
            checks.matching("old_values", old_values, values, "values")
    if clip is not None:
        if not clip >= 0:
            checks.not_negative("the value clip", clip)
        if old_values is None:
            raise ValueError(f"a value clip of {clip} needs old_values, which is None")


@public_operation
def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor | None,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    value_coef: float = 0.5,
    value_clip: float | None = 0.2,
    value_mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k2",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """Policy and value loss together (Schulman et al. 2017, eq. 9): policy_loss + value_coef value_loss.

    One pass computes the loss, its statistics and all gradients; the backward pass only scales them.

    Args:
        logprobs, old_logprobs, advantages: as in `policy_loss`; the options are those of `policy_loss`.
        values, old_values, returns: as in `value_loss`.
        value_coef: weight of the value loss (c1 in the paper). The entropy bonus is entropy_coef (c2).
        value_clip: `clip` of `value_loss`.
        value_mask: True where a value counts; `mask` if not given. Shape as `mask`. A `denominator` replaces both
        counts.

    Returns:
        loss, and the stats of both losses.

    >>> one = torch.ones(1, 3)
    >>> out = ppo_loss(0 * one, one, 0 * one, one, advantages=one, returns=one, mask=torch.ones(1, 3, dtype=torch.bool))
    >>> out.loss.item(), out.stats["ratio_mean"].item()
    (-1.0, 1.0)
    """
    checks.floating("logprobs", logprobs)
    tensors = LossTensors(
        old_logprobs, advantages, mask, weights, ref_logprobs, old_values, returns, value_mask, cu_seqlens
    )
    options = LossOptions(
        clip_low,
        clip_high,
        dual_clip,
        log_ratio_clamp,
        entropy_coef,
        kl_coef,
        kl_estimator,
        value_coef,
        value_clip,
        aggregation,
        denominator,
        norm_length,
    )
    _check_policy(logprobs, entropy, tensors, options)
    checks.loss_aggregation("logprobs", logprobs, options, cu_seqlens)
    if not checks.alike(logprobs.shape, logprobs.dtype, logprobs.device, values):
        checks.matching("values", values, logprobs, "logprobs")
    _check_value(values, old_values, returns, value_clip)
    tensors = _with_masks(tensors, logprobs, "logprobs")
    others = (values, old_logprobs, old_values, advantages, returns, entropy, ref_logprobs, weights)
    use_triton = uses_triton(backend, logprobs, *others)
    return LossOutput(*compute_loss(logprobs, entropy, values, tensors, options, use_triton=use_triton))
