"""Stable-Baselines3: rollout buffers whose advantages come from `ppo_fast.gae`.

>>> from stable_baselines3 import PPO  # doctest: +SKIP
>>> from ppo_fast.integrations.sb3 import RolloutBuffer  # doctest: +SKIP
>>> PPO("MlpPolicy", "CartPole-v1", rollout_buffer_class=RolloutBuffer).learn(10_000)  # doctest: +SKIP

Tested with Stable-Baselines3 2.9. Everything but `compute_returns_and_advantage` is SB3's own, recurrent policies'
buffers of sb3-contrib excluded. A time limit reaches the buffer as SB3 does it: the value of the last observation is in
the reward of the truncated step.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.integrations._patch import peer

TESTED = ("2.9.",)
if TYPE_CHECKING:
    from stable_baselines3.common import buffers as _buffers
else:
    _buffers = peer("stable-baselines3", "stable_baselines3.common.buffers", TESTED)

Floats = npt.NDArray[np.float32]


def advantages_and_returns(
    rewards: Floats,
    values: Floats,
    episode_starts: Floats,
    last_values: Tensor,
    dones: npt.NDArray[np.bool_],
    gamma: float,
    gae_lambda: float,
) -> tuple[Floats, Floats]:
    """GAE over a buffer (Schulman et al. 2016, equation 16).

    Args:
        rewards, values, episode_starts: [T, N] fp32; a start of 1 means that the step before ended an episode.
        last_values: N values of the observations after the last step.
        dones: [N], whether the last step ended an episode.
        gamma, gae_lambda: discount, and lambda.

    Returns:
        advantages and returns, [T, N] fp32.
    """
    ended = np.concatenate([episode_starts[1:], np.asarray(dones, dtype=episode_starts.dtype)[None]])
    advantages, returns = ppo.gae(
        torch.from_numpy(rewards),
        torch.from_numpy(values),
        gamma=gamma,
        lam=gae_lambda,
        terminated=torch.from_numpy(ended),
        bootstrap=last_values.detach().cpu().float().flatten(),
        time_major=True,
    )
    return advantages.numpy(), returns.numpy()


class _Fast:
    """What both buffers have in common."""

    rewards: Floats  # these are attributes of SB3's buffers
    values: Floats
    episode_starts: Floats
    gamma: float
    gae_lambda: float

    def compute_returns_and_advantage(self, last_values: Tensor, dones: npt.NDArray[np.bool_]) -> None:
        """Fill `advantages` and `returns`; SB3 calls it at the end of collect_rollouts."""
        self.advantages, self.returns = advantages_and_returns(
            self.rewards, self.values, self.episode_starts, last_values, dones, self.gamma, self.gae_lambda
        )


class RolloutBuffer(_Fast, _buffers.RolloutBuffer):
    """For `PPO(..., rollout_buffer_class=RolloutBuffer)`, and A2C."""


class DictRolloutBuffer(_Fast, _buffers.DictRolloutBuffer):
    """The same for observations that are a dict (MultiInputPolicy)."""
