"""OpenRLHF: its PPO arithmetic by ppo_fast, instead of OpenRLHF's own functions.

>>> import ppo_fast.integrations.openrlhf as fast  # doctest: +SKIP
>>> fast.patch()  # before the trainer is made, in every process; fast.unpatch() undoes it  # doctest: +SKIP

Ray starts every worker with it under `ray job submit --runtime-env-json
'{"worker_process_setup_hook": "ppo_fast.integrations.openrlhf.patch"}' -- python3 -m openrlhf.cli.train_ppo_ray ...`.

Tested with OpenRLHF 0.11. Nothing at a masked position, NaN included, reaches a loss, and a batch without a
counted step has loss 0 where OpenRLHF's is NaN. policy_loss_type="gspo" is computed by OpenRLHF.
"""

from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.integrations._patch import Patch, peer

TESTED = ("0.11.",)
_NOTE = ", on a machine with a GPU"
if TYPE_CHECKING:
    from openrlhf.models import loss as _loss
    from openrlhf.models import utils as _utils
    from openrlhf.trainer.ppo_utils import experience_maker as _maker
else:
    _loss = peer("openrlhf", "openrlhf.models.loss", TESTED, _NOTE)
    _utils = peer("openrlhf", "openrlhf.models.utils", TESTED, _NOTE)
    _maker = peer("openrlhf", "openrlhf.trainer.ppo_utils.experience_maker", TESTED, _NOTE)


class _Options(TypedDict, total=False):
    """Options of our losses."""

    aggregation: Literal["token-mean", "token-sum", "seq-mean-token-mean"]
    denominator: float


def _mean(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean over the counted positions; NaN where there is none."""
    if mask is None:
        return x.mean(dim)
    return torch.where(mask.bool(), x, 0).sum(dim) / mask.bool().sum(dim)


def _aggregation(
    token_level: bool, dp_size: int, tokens: float | Tensor | None, sequences: float | Tensor | None
) -> tuple[float | Tensor, _Options]:
    """A factor of the loss, and our options that mean the same. OpenRLHF's ranks average, so it multiplies by dp_size.

    The global counts may be below 1, divided by accumulation steps, and lie on the GPU: they stay in the factor.
    """
    if token_level:
        if tokens is None:
            return 1.0, {"aggregation": "token-mean"}
        return dp_size / tokens, {"aggregation": "token-sum"}
    if sequences is None:
        return 1.0, {"aggregation": "seq-mean-token-mean"}
    return dp_size / sequences, {"aggregation": "seq-mean-token-mean", "denominator": 1.0}


class PolicyLoss(_loss.PolicyLoss):
    """OpenRLHF's clipped policy loss with its dual clip and its corrections for the sampler's log-probabilities.

    Raises:
        ValueError: policy_loss_type is unknown, or a clip range is out of bounds.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: object = (0.5, 5.0),
    ) -> None:
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type must be 'ppo' or 'gspo', got {policy_loss_type!r}")
        if not (0 <= clip_eps_low <= 1 and clip_eps_high >= 0):
            raise ValueError(
                f"clip_eps_low must be in [0, 1] and clip_eps_high non-negative, got {clip_eps_low}, {clip_eps_high}"
            )
        super().__init__(
            clip_eps_low,
            clip_eps_high,
            dual_clip,
            token_level_loss,
            policy_loss_type,
            is_correction_level,
            is_correction_mode,
            is_correction_gating,
            is_correction_threshold,
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """loss, clip_ratio, ppo_kl, and with a correction vllm_kl and is_filter_ratio. Tensors are [B, T]."""
        if self.policy_loss_type == "gspo":
            return super().forward(
                log_probs,
                old_log_probs,
                advantages,
                action_mask,
                rollout_log_probs,
                dp_size,
                batch_num_tokens,
                global_batch_size,
            )
        weights = kl = filtered = None
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError(f"is_correction_level={self.is_correction_level!r} needs rollout_log_probs")
            weights, filtered = self._correction(old_log_probs, rollout_log_probs, action_mask)
            kl = _mean(rollout_log_probs - old_log_probs, action_mask)
        factor, options = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        out = ppo.policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            action_mask,
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            weights=weights,
            **options,
        )
        ppo_kl = _mean((old_log_probs - log_probs).detach(), action_mask)
        return out.loss * factor, out.stats["clip_fraction"], ppo_kl, kl, filtered

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights of the loss from pi_old / pi_rollout, and the share of tokens or sequences outside of the band."""
        log_ratio = (old - rollout).detach()
        statistic = log_ratio
        if self.is_correction_gating != "ratio":
            p, q = (x.detach().exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            statistic = (p - q).abs()
            if self.is_correction_gating == "binary_kl":
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if self.is_correction_level == "seq":
            statistic = _mean(statistic, mask, -1).unsqueeze(-1)
        if self.is_correction_gating == "ratio":
            statistic = statistic.exp()
        low, high = self.is_correction_threshold
        inside = (statistic >= low) & (statistic <= high)
        outside = _mean((~inside).float(), None if self.is_correction_level == "seq" else mask)
        if self.is_correction_mode == "clip":
            return statistic.clamp(low, high), outside
        return torch.where(inside, log_ratio.exp(), 0), outside


class ValueLoss(_loss.ValueLoss):
    """OpenRLHF's value loss, 0.5 max of both squared errors with clip_eps."""

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; tensors are [B, T]."""
        factor, options = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        return factor * ppo.value_loss(values, old_values, returns, action_mask, clip=self.clip_eps, **options).loss


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of labels [...] under logits [..., V], in the logits' dtype.

    The logits are divided by the temperature in place, as in OpenRLHF, whose entropy reads them afterwards.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    found = ppo.token_logprobs(logits, labels)
    assert isinstance(found, Tensor)
    return found.to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy [...] of softmax(logits [..., V]) in nats, in the logits' dtype; logits may be -inf."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return ppo.token_logprobs(logits, index, with_entropy=True)[1].to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """OpenRLHF's KL per token: k1, k2 or k3, in fp32, clamped to +-10.

    `unbiased_gradient`: any estimator gets k2's gradient, times pi / pi_old, at most 10, where log_probs_old is given.
    """
    d = log_probs.float() - log_probs_base.float()
    if kl_estimator == "k1":
        value = d
    elif kl_estimator == "k2":
        value = 0.5 * d.square()
    elif kl_estimator == "k3":
        bounded = d.clamp(min=-10)  # below, the result is cut anyway, and exp must not overflow in the gradient
        value = torch.expm1(-bounded) + bounded
    else:
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
    value = value.clamp(-10, 10)
    if not unbiased_gradient:
        return value
    gradient = 0.5 * d.square()
    if log_probs_old is not None:
        ratio = (log_probs.detach().float() - log_probs_old.detach().float()).exp()
        gradient = gradient * ratio.clamp(max=_utils.KL_IS_WEIGHT_CLIP)
    return value.detach() + (gradient - gradient.detach())


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """Rewards [B, T]: -kl_coef kl, and r [B] at the last token that the mask counts; 0 outside of the mask.

    A row without such a token has r at its last position, as in OpenRLHF, which logs the sum of a row as its return.

    Args:
        r: scores, cut to reward_clip_range first.
        kl_coef: no penalty if it is negative.
        kl, action_mask: [B, T].
    """
    if action_mask is None or not isinstance(kl, Tensor):
        raise ValueError("compute_reward needs an action_mask, and kl as one tensor [B, T]")
    if reward_clip_range:
        r = r.clamp(*reward_clip_range)
    shaped = ppo.shape_rewards(r, kl, torch.zeros_like(kl), action_mask, kl_coef=max(kl_coef, 0.0), kl_estimator="k1")
    rewards = shaped[0].to(kl.dtype)
    rewards[:, -1] += torch.where(action_mask.bool().any(-1), 0, r).to(kl.dtype)
    return rewards


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """GAE [B, T] (Schulman et al. 2016, equation 16) as RemoteExperienceMaker's method of this name.

    A masked step is not skipped: it counts with value and reward 0, and has an advantage.
    """
    given = [x for x in (values, rewards, action_mask) if x is not None]
    if action_mask is not None:
        values, rewards = (torch.where(action_mask.bool(), x, 0) for x in (values, rewards))
    advantages, returns = ppo.gae(rewards, values, gamma=gamma, lam=lambd)
    dtype = torch.bool
    for x in given:
        dtype = torch.promote_types(dtype, x.dtype)
    return advantages.to(dtype), returns.to(dtype)


class RemoteExperienceMaker(_maker.RemoteExperienceMaker):
    """OpenRLHF's, with the function above as its method."""

    def get_advantages_and_returns(
        self, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        return get_advantages_and_returns(values, rewards, action_mask, gamma, lambd)


_patch = Patch(
    "openrlhf",
    {
        **{f"openrlhf.models.loss:{c.__name__}": c for c in (PolicyLoss, ValueLoss)},
        **{
            f"openrlhf.models.utils:{f.__name__}": f
            for f in (log_probs_from_logits, compute_entropy, compute_approx_kl, compute_reward)
        },
        "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker": RemoteExperienceMaker,
    },
)


def patch(*, quiet: bool = False) -> Patch:
    """Replace OpenRLHF's functions and classes by these; also for `with patch(): ...`.

    Raises:
        RuntimeError: it is patched already.
    """
    return _patch.apply(quiet=quiet)


def unpatch() -> None:
    """Restore OpenRLHF's functions."""
    _patch.undo()
