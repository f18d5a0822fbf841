"""shape_rewards, masked_whiten and rlhf_advantages in Triton: see reference.py for what they compute.

In eager mode the launchers of advantages_launch.py are called at once; torch.compile sees three opaque operators. No
result carries a graph.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast.kernels.advantages.launch import (
    STATISTICS,
    Shaping,
    Whitening,
    launch_masked_whiten,
    launch_rlhf_advantages,
    launch_shape_rewards,
)
from ppo_fast.kernels.common.scalars import as_number, as_tensor


def _refuse_group(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        raise NotImplementedError("group is not implemented under torch.compile: call this outside the compiled code")


def _shape_operator() -> torch.library.CustomOpDef:
    """What torch.compile sees. Numbers are 0-dim CPU tensors, so that new values compile nothing."""

    def launch(
        scores: Tensor,
        logprobs: Tensor,
        refs: Tensor,
        mask: Tensor,
        kl_coef: Tensor,
        clip: Tensor,
        kind: str,
        reward_at: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shaping = Shaping(kl_coef.item(), kind, clip.item(), reward_at)
        rewards, kl, longer = launch_shape_rewards(scores, logprobs, refs, mask, shaping)
        return rewards, kl, mask.new_empty(0) if longer is None else longer

    operator = torch.library.custom_op(
        "ppo_fast::shape_rewards_triton",
        launch,
        mutates_args=(),
        schema="(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, Tensor kl_coef, Tensor score_clip,"
        " str kl_estimator, str reward_at) -> (Tensor, Tensor, Tensor)",
    )

    def fake(scores, logprobs, refs, mask, kl_coef, clip, kind, reward_at):
        like = mask.new_empty(mask.shape, dtype=torch.float32)
        longer = mask.new_empty(mask.shape if reward_at == "after_last" else (0,))
        return like, torch.empty_like(like), longer

    operator.register_fake(fake)
    return operator


def _whiten_operator() -> torch.library.CustomOpDef:
    operator = torch.library.custom_op(
        "ppo_fast::masked_whiten_triton",
        lambda x, mask, shift_mean, unbiased, eps: launch_masked_whiten(
            x, mask, Whitening(shift_mean, unbiased, eps.item(), None)
        ),
        mutates_args=(),
        schema="(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, Tensor eps) -> Tensor",
    )
    operator.register_fake(lambda x, *_: x.new_empty(x.shape, dtype=torch.float32))
    return operator


def _advantages_operator() -> torch.library.CustomOpDef:
    def launch(
        scores: Tensor,
        logprobs: Tensor,
        refs: Tensor,
        values: Tensor,
        mask: Tensor,
        kl_coef: Tensor,
        clip: Tensor,
        gamma: Tensor,
        lam: Tensor,
        eps: Tensor,
        bootstrap: Tensor | None,
        kind: str,
        reward_at: str,
        whiten: bool,
        shift_mean: bool,
        unbiased: bool,
    ) -> tuple[Tensor, ...]:
        shaping = Shaping(kl_coef.item(), kind, clip.item(), reward_at)
        whitening = Whitening(shift_mean, unbiased, eps.item(), None)
        tensors = scores, logprobs, refs, values, mask
        return launch_rlhf_advantages(tensors, shaping, as_number(gamma), as_number(lam), bootstrap, whiten, whitening)

    operator = torch.library.custom_op(
        "ppo_fast::rlhf_advantages_triton",
        launch,
        mutates_args=(),
        schema="(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Tensor kl_coef,"
        " Tensor score_clip, Tensor gamma, Tensor lam, Tensor eps, Tensor? bootstrap, str kl_estimator, str reward_at,"
        " bool whiten, bool shift_mean, bool unbiased) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )

    def fake(*args: Tensor | str | bool | None) -> tuple[Tensor, ...]:
        mask = args[4]
        outputs = (mask.new_empty(mask.shape, dtype=torch.float32) for _ in range(4))
        return *outputs, mask.new_empty(len(STATISTICS), dtype=torch.float32)

    operator.register_fake(fake)
    return operator


_SHAPE, _WHITEN, _ADVANTAGES = _shape_operator(), _whiten_operator(), _advantages_operator()


def shape_rewards(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    reward_at: str = "last",
) -> tuple[Tensor, ...]:
    """reference.shape_rewards in one launch; fp32 out, without a graph."""
    if torch.compiler.is_compiling():
        tensors = [x.detach() for x in (scores, logprobs, ref_logprobs, mask)]
        clip = math.inf if score_clip is None else score_clip
        result = _SHAPE(*tensors, as_tensor(kl_coef), as_tensor(clip), kl_estimator, reward_at)
    else:
        shaping = Shaping(kl_coef, kl_estimator, score_clip, reward_at)
        result = launch_shape_rewards(scores, logprobs, ref_logprobs, mask, shaping)
    return result if reward_at == "after_last" else result[:2]


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """reference.masked_whiten in two launches, without a graph; with `group`, over the elements of all its ranks."""
    if torch.compiler.is_compiling():
        _refuse_group(group)
        return _WHITEN(x.detach(), mask, shift_mean, unbiased, as_tensor(eps))
    return launch_masked_whiten(x, mask, Whitening(shift_mean, unbiased, eps, group))


def rlhf_advantages(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    reward_at: str = "last",
    gamma: float | Tensor = 1.0,  # or [B]
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,  # [B]
    whiten: bool = True,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """reference.rlhf_advantages in two or three launches: advantages, returns, rewards, KL and statistics."""
    tensors = scores, logprobs, ref_logprobs, values, mask
    if torch.compiler.is_compiling():
        _refuse_group(group)
        clip = math.inf if score_clip is None else score_clip
        numbers = [as_tensor(x) for x in (kl_coef, clip, gamma, lam, eps)]
        *outputs, stats = _ADVANTAGES(
            *(x.detach() for x in tensors), *numbers, bootstrap, kl_estimator, reward_at, whiten, shift_mean, unbiased
        )
    else:
        shaping = Shaping(kl_coef, kl_estimator, score_clip, reward_at)
        whitening = Whitening(shift_mean, unbiased, eps, group)
        *outputs, stats = launch_rlhf_advantages(tensors, shaping, gamma, lam, bootstrap, whiten, whitening)
    advantages, returns, rewards, kl = outputs
    return advantages, returns, rewards, kl, dict(zip(STATISTICS, stats.unbind(), strict=True))
