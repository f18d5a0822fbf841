"""The tensors and options of a scalar loss, as ppo_fast.ops builds them for every implementation; its statistics."""

import functools
from typing import NamedTuple

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
    """The inputs that get no gradient."""

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
    """Numbers and choices; the names are those of reference.py, but for value_clip, which is `clip` of value_loss."""

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
    policy: bool, entropy: bool, value: bool, tensors: LossTensors, options: LossOptions
) -> tuple[int, tuple[str, ...]]:
    """Return the statistics that these inputs have, as bits of ALL_STATS and by name, in its order."""
    return _wanted(
        policy,
        options.dual_clip is not None,
        entropy,
        tensors.ref_logprobs is not None,
        value,
        options.value_clip is not None,
    )


def named_stats(stats: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Name the statistics, from a tensor of them alone, or of the first or all of ALL_STATS."""
    scalars = stats.unbind()
    if len(scalars) == len(names):
        return dict(zip(names, scalars, strict=True))
    return {name: scalars[ALL_STATS.index(name)] for name in names}
