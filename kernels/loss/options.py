"""policy_loss, value_loss and ppo_loss in front of their two backends: names and signatures, no arithmetic.

A backend is one function, run(logprobs, entropy, values, tensors, options) -> (loss, statistics). logprobs is None for
value_loss and values for policy_loss; gradients flow to these three arguments only, everything else is a constant, and
there is no second derivative. reference.py says what is computed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ALL_STATS = (
    "policy_loss",
    "approx_kl",
    "clip_fraction",
    "ratio_mean",
    "ratio_max",
    "dual_clip_fraction",
    "entropy",
    "ref_kl",
    "value_loss",
    "value_clip_fraction",
)


class LossTensors(NamedTuple):
    """Everything that gets no gradient."""

    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    ref_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    value_mask: Tensor | None = None  # None is `mask`
    cu_seqlens: Tensor | None = None


class LossOptions(NamedTuple):
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    log_ratio_clamp: float = 20.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k2"
    value_coef: float = 1.0
    value_clip: float | None = None
    aggregation: str = "token-mean"
    denominator: float | Tensor | None = None
    norm_length: float | None = None


_NO_POLICY = LossOptions()[: LossOptions._fields.index("value_clip")]
_BITS = {name: 1 << i for i, name in enumerate(ALL_STATS)}


@functools.cache
def _wanted(
    policy: bool, dual_clip: bool, entropy: bool, ref: bool, value: bool, value_clip: bool
) -> tuple[int, tuple[str, ...]]:
    has = dict.fromkeys(ALL_STATS, policy)
    has |= {"dual_clip_fraction": policy and dual_clip, "entropy": entropy, "ref_kl": ref}
    has |= {"value_loss": value, "value_clip_fraction": value and value_clip}
    names = tuple(name for name in ALL_STATS if has[name])
    return sum(_BITS[name] for name in names), names


def wanted_stats(
    policy: bool, entropy: bool, value: bool, t: LossTensors, o: LossOptions
) -> tuple[int, tuple[str, ...]]:
    """The statistics that these inputs have, as bits of ALL_STATS and by name, in its order."""
    return _wanted(
        policy, o.dual_clip is not None, entropy, t.ref_logprobs is not None, value, o.value_clip is not None
    )


def stat_names(policy: bool, entropy: bool, value: bool, t: LossTensors, o: LossOptions) -> tuple[str, ...]:
    """The names alone."""
    return wanted_stats(policy, entropy, value, t, o)[1]


def named_stats(stats: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics with these names, from a tensor of them alone, or of the first or all of ALL_STATS."""
    scalars = stats.unbind()
    if len(scalars) == len(names):
        return dict(zip(names, scalars, strict=True))
    return {name: scalars[ALL_STATS.index(name)] for name in names}


def refuse_double_backward() -> None:
    """For a backward: autograd runs it with gradients enabled only where it is to be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "policy_loss, value_loss and ppo_loss have no double backward: call backward without create_graph=True, "
            "or use ppo_fast.kernels.reference"
        )


def public_functions(  # they build tuples by position, which takes half the time
    run: Callable[
        [Tensor | None, Tensor | None, Tensor | None, LossTensors, LossOptions], tuple[Tensor, dict[str, Tensor]]
    ],
) -> tuple[Callable, Callable, Callable]:
    """policy_loss, value_loss and ppo_loss of a backend, with the signatures of reference.py."""

    def policy_loss(
        logprobs: Tensor,  # [..., T]
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
        kl_estimator: str = "k2",
        weights: Tensor | None = None,
        aggregation: str = "token-mean",
        denominator: float | Tensor | None = None,
        norm_length: float | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """reference.policy_loss; gradients flow to `logprobs` and `entropy` only."""
        return run(
            logprobs,
            entropy,
            None,
            LossTensors(old_logprobs, advantages, mask, weights, ref_logprobs, None, None, None, cu_seqlens),
            LossOptions(
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
            ),
        )

    def value_loss(
        values: Tensor,  # [..., T]
        old_values: Tensor | None,
        returns: Tensor,
        mask: Tensor | None = None,
        *,
        clip: float | None = 0.2,
        aggregation: str = "token-mean",
        denominator: float | Tensor | None = None,
        norm_length: float | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """reference.value_loss; gradients flow to `values` only."""
        return run(
            None,
            None,
            values,
            LossTensors(None, None, mask, None, None, old_values, returns, None, cu_seqlens),
            LossOptions(*_NO_POLICY, clip, aggregation, denominator, norm_length),
        )

    def ppo_loss(
        logprobs: Tensor,  # [..., T]
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
        kl_estimator: str = "k2",
        weights: Tensor | None = None,
        aggregation: str = "token-mean",
        denominator: float | Tensor | None = None,
        norm_length: float | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """reference.ppo_loss; gradients flow to `logprobs`, `values` and `entropy` only."""
        return run(
            logprobs,
            entropy,
            values,
            LossTensors(
                old_logprobs, advantages, mask, weights, ref_logprobs, old_values, returns, value_mask, cu_seqlens
            ),
            LossOptions(
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
            ),
        )

    return policy_loss, value_loss, ppo_loss
