"""The tensors and options of shape_rewards, masked_whiten and rlhf_advantages, as ppo_fast.ops builds them."""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

STATISTICS = ("score_mean", "reward_mean", "kl_mean", "return_mean", "advantage_mean", "advantage_std")


class AdvantageTensors(NamedTuple):
    """What rlhf_advantages turns into advantages."""

    scores: Tensor  # [B] or [B, T]
    logprobs: Tensor  # [B, T], as the next three
    ref_logprobs: Tensor
    values: Tensor
    mask: Tensor


class ShapingOptions(NamedTuple):
    """Options of shape_rewards."""

    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    score_clip: float | None = None
    reward_at: str = "last"


class WhiteningOptions(NamedTuple):
    """Options of masked_whiten."""

    shift_mean: bool = True
    unbiased: bool = True
    eps: float = 1e-8
    min_std: float | Tensor = 0.0  # a tensor: 0-dim on the device, or on any device while a graph is recorded
    group: dist.ProcessGroup | None = None
