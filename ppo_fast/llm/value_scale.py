"""The scale of returns and scores: units of the critic's head, and the least divisor of whitening.

PopArt (van Hasselt et al. 2016): the head predicts v = (V - mu) / sigma, where mu and sigma are moving moments of the
Monte-Carlo returns. Everything stays on the device, so that a step does not wait for it. All ranks have the whole
rollout and compute the same numbers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.common.device import widest_float
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.policy import Policy
from ppo_fast.llm.optimizer import Optimizer
from ppo_fast.llm.sharding import local_part, reshard, to_full_tensor

ROUNDING = 1e-6  # a spread below this share of the mean is that of fp32: none
FLOOR = 0.25  # the least divisor of whitening, as a share of the spread of scores
FLOOR_OF_EQUAL = 1.0  # the same in a rollout whose scores are all equal
FLOOR_HORIZONS = 5  # the spread falls by a factor e in so many horizons of the value scale
# Whitening with this divisor, then multiplied by it, only centres: a power of two adds no rounding
UNSCALED = 2.0**60


class Whitening(NamedTuple):
    """How advantages are whitened: (A - mean) / max(sqrt(var + eps), min_std), times `factor`."""

    eps: float = 1e-8
    min_std: float | Tensor = 0.0
    factor: Tensor | None = None  # 0-dim; None: 1


class Moments(NamedTuple):
    """Mean and biased variance, 0-dim fp64 on the device (fp32 on mps, which has no fp64)."""

    mean: Tensor
    variance: Tensor

    def std(self) -> Tensor:
        """The standard deviation; 0 where it is within the rounding of the mean."""
        std = self.variance.sqrt()
        return torch.where(std > ROUNDING * self.mean.abs(), std, 0)

    def is_finite(self) -> Tensor:
        """Whether both are numbers."""
        return self.mean.isfinite() & self.variance.isfinite()


class _State(NamedTuple):
    returns: Moments  # moving
    spread: Tensor  # of the scores: moving maximum
    updates: int  # rollouts whose returns are in the moments


class ValueScale:
    """Moving moments of the Monte-Carlo returns, to which the critic is rescaled, and the spread of the scores.

    The moments are bias-corrected: the weight of rollout n is (1 - b) / (1 - b^n) with b = 1 - 1 / value_scale_horizon,
    so that the first rollout alone sets them. Each answer of a rollout has the same weight, and each of its tokens the
    same part of it. Without any spread sigma is 1.

    A rescale from sigma to sigma' leaves each V as it is. Its error in units of the head, v - (R - mu) / sigma =
    (V - R) / sigma, becomes k = sigma / sigma' times as large. So does the gradient of the value loss with respect to
    w' and b', which is that error times h and times 1: Adam's first moment of the head is multiplied by k and its
    second one by k^2. The gradient with respect to h is the error times w', which is k^2 times as large; Adam's moments
    of the backbone are not changed, since they follow within 1 / (1 - beta2) updates, and those of an actor's backbone
    have the policy's gradient in them, too.

    Args:
        policy: its critic is rescaled.
        optimizer: of the critic.
        config: value_scale_horizon is read.
    """

    _state: _State
    _floor: Tensor  # of whitening in the last rollout, in units of the reward
    _dtype: torch.dtype

    def __init__(self, policy: Policy, optimizer: Optimizer, config: PPOConfig) -> None:
        self.policy, self.critic, self.optimizer = policy, policy.critic, optimizer
        self.decay = 1 - 1 / config.value_scale_horizon
        self.spread_decay = 1 - 1 / (FLOOR_HORIZONS * config.value_scale_horizon)
        self.load_state_dict({})

    @property
    def is_new(self) -> bool:
        """Whether no rollout has set the scale."""
        return self._state.updates == 0

    def observe_scores(self, scores: Tensor, mask: Tensor) -> Whitening:
        """Add the scores of a rollout and return how its advantages are whitened.

        The divisor of whitening is at least FLOOR times the spread of the scores, which is the standard deviation over
        answers of the score (of scores of tokens: of the sum of those from a token on). It rises at once and falls
        slowly. The KL penalty has no part in it. Without this floor, whitening would turn the noise that is left when
        all scores are equal, which is errors of the critic and the KL, into advantages of size 1; a rollout without
        any spread says nothing about which answers are better, and FLOOR_OF_EQUAL replaces FLOOR. As long as no
        scores differed, advantages are centred and not scaled.

        Advantages in units of sigma are (A / sigma - mean / sigma) / max(std / sigma, floor / sigma): sigma cancels,
        and nothing is left to divide. There is no eps, which would have a unit; the floor is above 0.

        Args:
            scores: [B], or [B, T] for a score of each token.
            mask: [B, T].
        """
        if scores.ndim == 1:
            following = scores[:, None].expand_as(mask)
        else:
            following = torch.where(mask, scores.to(self._dtype), 0).flip(1).cumsum(1).flip(1)
        found = moments_of(following, mask, self._dtype)
        present = torch.where(found.is_finite(), found.std(), 0)
        spread = torch.maximum(present, self.spread_decay * self._state.spread)
        self._state = self._state._replace(spread=spread)
        seen = spread > 0
        self._floor = torch.where(present > 0, FLOOR, FLOOR_OF_EQUAL) * spread
        return Whitening(
            eps=0.0,
            min_std=torch.where(seen, self._floor, UNSCALED).float(),
            factor=torch.where(seen, 1.0, UNSCALED).float(),
        )

    def update(self, returns: Tensor, mask: Tensor) -> Tensor:
        """Add the Monte-Carlo returns of a rollout and rescale the critic; return by how much its values changed.

        That is 0, but for the first rollout and a head that is still zero: its values become the mean of the returns.

        Args:
            returns: [B, T], in units of the reward.
            mask: [B, T].
        """
        state = self._state
        found = moments_of(returns, mask, self._dtype)
        share = (1 - self.decay) / (1 - self.decay ** (state.updates + 1))
        moved = _mixture(state.returns, found, share) if state.updates else found
        kept = found.is_finite()  # else the loss is not finite either, and the run ends
        moved = Moments(*(torch.where(kept, new, old) for new, old in zip(moved, state.returns, strict=True)))
        self._state = state._replace(returns=moved, updates=state.updates + 1)
        reshard(self.policy)
        critic, head = self.critic, self.critic.head
        old_mean, is_zero = critic.value_mean.clone(), self._is_zero() if state.updates == 0 else None
        factor = critic.rescale(moved.mean, self.std())
        self.optimizer.scale_moments([head.weight, head.bias], factor)
        if is_zero is None:
            return torch.zeros_like(old_mean)
        with torch.no_grad():
            local_part(head.bias).mul_(~is_zero)
        return is_zero * (critic.value_mean - old_mean)

    def _is_zero(self) -> Tensor:
        """Whether the whole head is zero; collective."""
        norm = nn.utils.get_total_norm([p.detach() for p in self.critic.head.parameters()])
        return to_full_tensor(norm) == 0

    def std(self) -> Tensor:
        """Sigma: the moving standard deviation of returns; 1 without any spread."""
        std = self._state.returns.std()
        return torch.where(std > torch.finfo(torch.float32).tiny, std, 1)  # the critic has it in fp32

    def metrics(self) -> dict[str, Tensor]:
        """Mu, sigma and the least divisor of whitening, in units of the reward."""
        critic = self.critic
        return {
            "value_mean": critic.value_mean.clone(),
            "value_std": critic.value_std.clone(),
            "advantage_min_std": self._floor,  # 0: no scores differed yet
        }

    def snapshot(self) -> _State:
        """The state, for `restore` after a step that failed; without a copy to the host."""
        return self._state

    def restore(self, state: _State) -> None:
        """Return to the moments of a snapshot. The critic keeps its scale, and its values with it."""
        self._state = state

    def state_dict(self) -> dict[str, float]:
        """The moments, by names of a checkpoint's state."""
        state = self._state
        return {
            "return_mean": state.returns.mean.item(),
            "return_variance": state.returns.variance.item(),
            "score_spread": state.spread.item(),
            "value_scale_updates": state.updates,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the moments of a checkpoint; none: the next rollout sets them."""
        device = self.critic.value_mean.device
        self._dtype = widest_float(device)
        names = ("return_mean", "return_variance", "score_spread")
        mean, variance, spread = (
            torch.tensor(state.get(name, 0.0), dtype=self._dtype, device=device) for name in names
        )
        self._state = _State(Moments(mean, variance), spread, int(state.get("value_scale_updates", 0)))


def moments_of(x: Tensor, mask: Tensor, dtype: torch.dtype) -> Moments:
    """Moments of x [B, T] over the mask, where each row with a counted step has the same weight."""
    counts = mask.sum(1, keepdim=True)
    weights = mask.to(dtype) / counts.clamp(min=1) / (counts > 0).sum().clamp(min=1)
    x = torch.where(mask, x.to(dtype), 0)
    mean = (weights * x).sum()
    return Moments(mean, (weights * (x - mean).square()).sum())


def _mixture(old: Moments, new: Moments, share: float) -> Moments:
    """Moments of a mixture of two distributions, of which the new one has this share."""
    gap = new.mean - old.mean
    variance = (1 - share) * old.variance + share * new.variance + share * (1 - share) * gap.square()
    return Moments(old.mean + share * gap, variance)
