"""gae, shape_rewards, masked_whiten and rlhf_advantages: their signatures, documentation and checks."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.advantages import custom_op as advantages_op
from ppo_fast.kernels.advantages.options import AdvantageTensors, ShapingOptions, WhiteningOptions
from ppo_fast.kernels.gae import custom_op as gae_op
from ppo_fast.kernels.gae.options import GAEOptions
from ppo_fast.kernels.reference import KL_ESTIMATORS, REWARD_POSITIONS
from ppo_fast.ops import checks
from ppo_fast.ops.backend import Backend, uses_triton
from ppo_fast.ops.checks import KLEstimator, public_operation


class AdvantageOutput(NamedTuple):
    """The results of `rlhf_advantages`: four tensors [B, T], 0 at masked steps, and detached scalars on the device."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor
    stats: dict[str, Tensor]


@public_operation
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    final_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    time_major: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t. r_t is the reward for the
    action taken at step t (the paper's r_t; Gymnasium returns it from the step that follows).

    Args:
        rewards, values: [..., T]; [T, N] if time_major, read in place; [total] with cu_seqlens.
        gamma, lam: floats in [0, 1], or tensors with one for each row ([B], [N] or [S]).
        mask: True where a step counts. A masked step is skipped and returns 0: the steps before and after it are
            treated as adjacent.
        terminated: the episode ended in this step: V_{t+1} is 0 and the trace is cut.
        truncated: the episode was cut here, but had not ended: V_{t+1} is final_values_t and the trace is cut.
        bootstrap: one value for each row, V of the state after its last counted step; 0 if not given.
        final_values: V of the observation before each reset, the shape of rewards; needed with truncated.
        cu_seqlens: [S + 1] boundaries of packed sequences.
        time_major: the first dimension is time.

    Returns:
        (advantages, returns), the shape of rewards, fp32 (fp64), without a graph.

    >>> advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]]), gamma=1.0, lam=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([[0.5, 0.5, 0.5]], [[1.0, 1.0, 1.0]])
    """
    checks.floating("rewards", rewards)
    shape, device = rewards.shape, rewards.device
    if not shape:
        raise ValueError("rewards must have at least one dimension, got a scalar")
    if values is None or not checks.alike(shape, rewards.dtype, device, values, final_values):
        checks.matching("values", values, rewards, "rewards")
        if final_values is not None:
            checks.matching("final_values", final_values, rewards, "rewards")
    rows: tuple[int, ...] = shape[1:] if time_major else shape[:-1]
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, rewards, "rewards")
        if time_major:
            raise ValueError("time_major and cu_seqlens exclude each other: packed tensors have one dimension")
        rows = (cu_seqlens.shape[0] - 1,)
    if isinstance(gamma, Tensor) or not 0 <= gamma <= 1:
        checks.discount("gamma", gamma, rows, device)
    if isinstance(lam, Tensor) or not 0 <= lam <= 1:
        checks.discount("lam", lam, rows, device)
    if mask is not None:
        mask = checks.flag("mask", mask, shape, device, "rewards")
    if terminated is not None:
        terminated = checks.flag("terminated", terminated, shape, device, "rewards")
    if truncated is not None:
        truncated = checks.flag("truncated", truncated, shape, device, "rewards")
        if final_values is None:
            raise ValueError("truncated needs final_values, the values of the observations before each reset")
    if bootstrap is not None:
        checks.floating("bootstrap", bootstrap)
        checks.shape("bootstrap", bootstrap, rows, "the rows")
        checks.device("bootstrap", bootstrap, device, "rewards")
    options = GAEOptions(gamma, lam, mask, terminated, truncated, bootstrap, final_values, cu_seqlens, time_major)
    use_triton = uses_triton(backend, rewards, values, bootstrap, final_values)
    return gae_op.gae(rewards, values, options, use_triton=use_triton)


def _check_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    options: ShapingOptions,
) -> Tensor:
    """Check what turns scores into rewards; the mask as bool."""
    _, kl_estimator, score_clip, reward_at = options
    checks.floating("logprobs", logprobs)
    shape, device = logprobs.shape, logprobs.device
    if len(shape) != 2:
        raise ValueError(f"logprobs must have shape [B, T], got {tuple(shape)}")
    if ref_logprobs is None or not checks.alike(shape, logprobs.dtype, device, ref_logprobs):
        checks.matching("ref_logprobs", ref_logprobs, logprobs, "logprobs")
    checks.floating("scores", scores)
    if scores.shape != shape[:1] and scores.shape != shape:
        raise ValueError(
            f"scores must have shape [B] or [B, T] with [B, T] = {tuple(shape)}; got {tuple(scores.shape)}"
        )
    if scores.device != device:
        checks.device("scores", scores, device, "logprobs")
    if kl_estimator not in KL_ESTIMATORS:
        checks.one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    if reward_at not in REWARD_POSITIONS:
        checks.one_of("reward_at", reward_at, REWARD_POSITIONS)
    if reward_at == "after_last" and scores.ndim == 2:
        raise ValueError("reward_at='after_last' needs one score for each sequence, got scores [B, T]")
    if score_clip is not None:
        checks.not_negative("score_clip", score_clip)
    counted = checks.flag("mask", mask, shape, device, "logprobs")
    if counted is None:
        raise TypeError("mask must be a bool tensor [B, T], got None")
    return counted


@public_operation
def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: KLEstimator = "k1",
    score_clip: float | None = None,
    reward_at: Literal["last", "after_last"] = "last",
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """Rewards of RLHF: -kl_coef kl_t at every counted token, plus the score at the last one.

    The KL-shaped reward of Ziegler et al. 2019 and Stiennon et al. 2020 (section 3.4), token by token.

    Args:
        scores: [B], one for each response, or [B, T], one for each token.
        logprobs, ref_logprobs: [B, T] of the policy that sampled, and of the reference.
        mask: [B, T], True at the tokens of the response.
        kl_coef, kl_estimator: weight and estimator of the KL, as in `policy_loss`.
        score_clip: scores are clamped to +-score_clip first.
        reward_at: "last" puts the score at the last counted token; "after_last" one slot later (at most T - 1), where
            OpenAI's code and TRL's have it, and then also returns the mask with that slot, for `gae`.

    Returns:
        (rewards [B, T], kl [B, T]) and, for "after_last", the longer mask; no graph.

    >>> mask = torch.tensor([[True, True, False]])
    >>> rewards, kl = shape_rewards(torch.tensor([1.0]), torch.zeros(1, 3), torch.zeros(1, 3), mask)
    >>> (rewards + 0.0).tolist()
    [[0.0, 1.0, 0.0]]
    """
    options = ShapingOptions(kl_coef, kl_estimator, score_clip, reward_at)
    mask = _check_rewards(scores, logprobs, ref_logprobs, mask, options)
    use_triton = uses_triton(backend, scores, logprobs, ref_logprobs)
    return advantages_op.shape_rewards(scores, logprobs, ref_logprobs, mask, options, use_triton=use_triton)


@public_operation
def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    min_std: float | Tensor = 0.0,
    group: torch.distributed.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """(x - mean) / max(sqrt(var + eps), min_std) over the counted elements, 0 elsewhere.

    One counted element, or none: centred, not scaled. With `group`, mean and variance are those of all ranks'
    elements, merged in rank order (Chan et al. 1979), so that the result is that of the whole batch.

    Args:
        x: any shape. mask: the same shape, True where an element counts.
        shift_mean: False keeps the mean and only scales the spread.
        unbiased: Bessel's correction, n - 1.
        eps: added to the variance.
        min_std: the divisor is never below this: a finite number, or a 0-dim tensor on the device of x. New values of
            either compile nothing, and nothing waits for the device to read the tensor.
        group: a torch.distributed process group; None for this process alone.

    >>> masked_whiten(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])).tolist()
    [-0.7071067690849304, 0.7071067690849304, 0.0]
    """
    checks.floating("x", x)
    mask = checks.flag("mask", mask, x.shape, x.device, "x")
    if not eps >= 0:
        checks.not_negative("eps", eps)
    if isinstance(min_std, Tensor) or not 0 <= min_std < math.inf:
        min_std = checks.min_std(min_std, x.device, "x")
    options = WhiteningOptions(shift_mean, unbiased, eps, min_std, group)
    return advantages_op.masked_whiten(x, mask, options, use_triton=uses_triton(backend, x))


@public_operation
def rlhf_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: KLEstimator = "k1",
    score_clip: float | None = None,
    reward_at: Literal["last", "after_last"] = "last",
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    critic_lam: float | Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = True,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    min_std: float | Tensor = 0.0,
    group: torch.distributed.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> AdvantageOutput:
    """From scores to whitened advantages: `shape_rewards`, `gae` and `masked_whiten` in a row.

    Advantages and returns may have lambdas of their own (decoupled GAE of VC-PPO, Yuan et al. 2025, arXiv 2503.01491,
    and of VAPO, arXiv 2504.05118): advantages A_t^(lam), returns R_t = A_t^(critic_lam) + V_t, where

        A_t^(x) = delta_t + gamma x A_{t+1}^(x),    delta_t = r_t + gamma V_{t+1} - V_t.

    Both come from one pass over the data: the same launches and bytes as with one lambda.

    With "after_last" the score's slot is a step of gae and has a return, but no token was chosen there: its advantage
    is 0 and it takes no part in the whitening.

    Args:
        scores, logprobs, ref_logprobs, mask, kl_coef, kl_estimator, score_clip, reward_at: as in `shape_rewards`.
        values: [B, T]. gamma, lam, bootstrap: as in `gae`.
        critic_lam: lambda of the returns, a float in [0, 1] or a tensor [B] with one for each row; None: that of lam.
        whiten: False leaves the advantages as they are. shift_mean, unbiased, eps, min_std, group: as in
            `masked_whiten`.

    Returns:
        advantages, returns, rewards, kl, and stats: score_mean and reward_mean per sequence, kl_mean per token,
        return_mean, and advantage_mean and advantage_std before whitening.

    >>> one = torch.ones(2, 3)
    >>> out = rlhf_advantages(torch.tensor([1.0, 2.0]), -one, -one, 0 * one, one, gamma=1.0, lam=1.0, whiten=False)
    >>> out.advantages.tolist(), out.stats["score_mean"].item()
    ([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], 1.5)
    """
    shaping = ShapingOptions(kl_coef, kl_estimator, score_clip, reward_at)
    mask = _check_rewards(scores, logprobs, ref_logprobs, mask, shaping)
    checks.matching("values", values, logprobs, "logprobs")
    rows, device = scores.shape[:1], scores.device
    if isinstance(gamma, Tensor) or not 0 <= gamma <= 1:
        checks.discount("gamma", gamma, rows, device)
    if isinstance(lam, Tensor) or not 0 <= lam <= 1:
        checks.discount("lam", lam, rows, device)
    if critic_lam is not None and (isinstance(critic_lam, Tensor) or not 0 <= critic_lam <= 1):
        checks.discount("critic_lam", critic_lam, rows, device)
    if bootstrap is not None:
        checks.floating("bootstrap", bootstrap)
        checks.shape("bootstrap", bootstrap, rows, "the rows")
        checks.device("bootstrap", bootstrap, device, "logprobs")
    if not eps >= 0:
        checks.not_negative("eps", eps)
    if isinstance(min_std, Tensor) or not 0 <= min_std < math.inf:
        min_std = checks.min_std(min_std, device, "scores")
    use_triton = uses_triton(backend, scores, logprobs, ref_logprobs, values, bootstrap)
    output = advantages_op.rlhf_advantages(
        AdvantageTensors(scores, logprobs, ref_logprobs, values, mask),
        shaping,
        GAEOptions(gamma, lam, bootstrap=bootstrap, critic_lam=critic_lam),
        WhiteningOptions(shift_mean, unbiased, eps, min_std, group),
        whiten=whiten,
        use_triton=use_triton,
    )
    return AdvantageOutput(*output)
