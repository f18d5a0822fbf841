"""shape_rewards, masked_whiten and rlhf_advantages for torch.compile, in front of launch.py and eager.py.

No result has a graph. torch.compile traces eager.py, and uses an opaque operator for each launcher. Numbers enter an
operator as 0-dim CPU tensors, so that new values compile nothing.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast.kernels.advantages import eager
from ppo_fast.kernels.advantages.options import STATISTICS, AdvantageTensors, ShapingOptions, WhiteningOptions
from ppo_fast.kernels.common.scalars import as_number, as_tensor
from ppo_fast.kernels.gae.options import GAEOptions


def shape_rewards(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    mask: Tensor,
    options: ShapingOptions,
    *,
    use_triton: bool,
) -> tuple[Tensor, ...]:
    """Rewards and KL, and for "after_last" the longer mask: reference.shape_rewards."""
    if not use_triton:
        return eager.shape_rewards(scores, logprobs, ref_logprobs, mask, options)
    if torch.compiler.is_compiling():
        tensors = [x.detach() for x in (scores, logprobs, ref_logprobs, mask)]
        result = _shape_operator(*tensors, *_numbers(options), options.kl_estimator, options.reward_at)
    else:
        from ppo_fast.kernels.advantages import launch

        result = launch.shape_rewards(scores, logprobs, ref_logprobs, mask, options)
    return result if options.reward_at == "after_last" else result[:2]


def masked_whiten(x: Tensor, mask: Tensor | None, options: WhiteningOptions, *, use_triton: bool) -> Tensor:
    """reference.masked_whiten; with a group, over the elements of all its ranks."""
    if not use_triton:
        return eager.masked_whiten(x, mask, options)
    if torch.compiler.is_compiling():
        _refuse_group(options.group)
        numbers = as_tensor(options.eps), as_tensor(options.min_std)
        return _whiten_operator(x.detach(), mask, options.shift_mean, options.unbiased, *numbers)
    from ppo_fast.kernels.advantages import launch

    return launch.masked_whiten(x, mask, options)


def rlhf_advantages(
    tensors: AdvantageTensors,
    shaping: ShapingOptions,
    gae_options: GAEOptions,  # of which it uses gamma, lam, critic_lam and bootstrap
    whitening: WhiteningOptions,
    *,
    whiten: bool,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Advantages, returns, rewards, KL and statistics: reference.rlhf_advantages."""
    if not use_triton:
        return eager.rlhf_advantages(tensors, shaping, gae_options, whitening, whiten=whiten)
    if torch.compiler.is_compiling():
        _refuse_group(whitening.group)
        further = gae_options.gamma, gae_options.lam, whitening.eps, whitening.min_std
        numbers = *_numbers(shaping), *(as_tensor(x) for x in further)
        critic_lam = None if gae_options.critic_lam is None else as_tensor(gae_options.critic_lam)
        flags = whiten, whitening.shift_mean, whitening.unbiased
        advantages, returns, rewards, kl, stats = _advantages_operator(
            *(x.detach() for x in tensors),
            *numbers,
            critic_lam,
            gae_options.bootstrap,
            shaping.kl_estimator,
            shaping.reward_at,
            *flags,
        )
    else:
        from ppo_fast.kernels.advantages import launch

        advantages, returns, rewards, kl, stats = launch.rlhf_advantages(
            tensors, shaping, gae_options, whitening, whiten=whiten
        )
    return advantages, returns, rewards, kl, dict(zip(STATISTICS, stats.unbind(), strict=True))


def _refuse_group(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        raise NotImplementedError("group is not implemented under torch.compile: call this outside the compiled code")


def _numbers(options: ShapingOptions) -> tuple[Tensor, Tensor]:
    """kl_coef and score_clip; no clip is an infinite one."""
    clip = math.inf if options.score_clip is None else options.score_clip
    return as_tensor(options.kl_coef), as_tensor(clip)


def _run_shape(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: Tensor,
    score_clip: Tensor,
    kl_estimator: str,
    reward_at: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from ppo_fast.kernels.advantages import launch

    options = ShapingOptions(kl_coef.item(), kl_estimator, score_clip.item(), reward_at)
    rewards, kl, *longer = launch.shape_rewards(scores, logprobs, ref_logprobs, mask, options)
    return rewards, kl, longer[0] if longer else mask.new_empty(0)


def _shapes_of_shape(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: Tensor,
    score_clip: Tensor,
    kl_estimator: str,
    reward_at: str,
) -> tuple[Tensor, Tensor, Tensor]:
    like = mask.new_empty(mask.shape, dtype=torch.float32)
    longer = mask.new_empty(mask.shape if reward_at == "after_last" else (0,))
    return like, torch.empty_like(like), longer


_shape_operator = torch.library.custom_op(
    "ppo_fast::shape_rewards_triton",
    _run_shape,
    mutates_args=(),
    schema="(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, Tensor kl_coef, Tensor score_clip,"
    " str kl_estimator, str reward_at) -> (Tensor, Tensor, Tensor)",
)
_shape_operator.register_fake(_shapes_of_shape)


def _run_whiten(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: Tensor, min_std: Tensor
) -> Tensor:
    from ppo_fast.kernels.advantages import launch

    return launch.masked_whiten(x, mask, WhiteningOptions(shift_mean, unbiased, eps.item(), as_number(min_std)))


_whiten_operator = torch.library.custom_op(
    "ppo_fast::masked_whiten_triton",
    _run_whiten,
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, Tensor eps, Tensor min_std) -> Tensor",
)
_whiten_operator.register_fake(lambda x, *_: x.new_empty(x.shape, dtype=torch.float32))


def _run_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: Tensor,
    score_clip: Tensor,
    gamma: Tensor,
    lam: Tensor,
    eps: Tensor,
    min_std: Tensor,
    critic_lam: Tensor | None,
    bootstrap: Tensor | None,
    kl_estimator: str,
    reward_at: str,
    whiten: bool,
    shift_mean: bool,
    unbiased: bool,
) -> tuple[Tensor, ...]:
    from ppo_fast.kernels.advantages import launch

    tensors = AdvantageTensors(scores, logprobs, ref_logprobs, values, mask)
    shaping = ShapingOptions(kl_coef.item(), kl_estimator, score_clip.item(), reward_at)
    gae_options = GAEOptions(
        as_number(gamma),
        as_number(lam),
        bootstrap=bootstrap,
        critic_lam=None if critic_lam is None else as_number(critic_lam),
    )
    whitening = WhiteningOptions(shift_mean, unbiased, eps.item(), as_number(min_std))
    return launch.rlhf_advantages(tensors, shaping, gae_options, whitening, whiten=whiten)


def _shapes_of_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, *_: object
) -> tuple[Tensor, ...]:
    outputs = (mask.new_empty(mask.shape, dtype=torch.float32) for _ in range(4))
    return *outputs, mask.new_empty(len(STATISTICS), dtype=torch.float32)


_advantages_operator = torch.library.custom_op(
    "ppo_fast::rlhf_advantages_triton",
    _run_advantages,
    mutates_args=(),
    schema="(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Tensor kl_coef,"
    " Tensor score_clip, Tensor gamma, Tensor lam, Tensor eps, Tensor min_std, Tensor? critic_lam, Tensor? bootstrap,"
    " str kl_estimator, str reward_at, bool whiten, bool shift_mean, bool unbiased)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_advantages_operator.register_fake(_shapes_of_advantages)
