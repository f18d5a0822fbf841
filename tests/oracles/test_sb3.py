"""Stable-Baselines3 2.9.2 as an oracle: RolloutBuffer.compute_returns_and_advantage, time-major, in fp32 numpy."""

import numpy as np
import pytest
import torch
from oracles.cases import BACKENDS, assert_equal, draw

import ppo_fast as ppo

MISSING = "stable-baselines3 is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("stable_baselines3", reason=MISSING)

from gymnasium import spaces  # noqa: E402
from stable_baselines3.common.buffers import RolloutBuffer  # noqa: E402

GAMMA_LAM = [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)]


def filled_buffer(rewards, values, ended, gamma, lam):
    """ended [T, N]: the step was an episode's last; SB3 keeps it one step later, as episode_starts."""
    steps, envs = rewards.shape
    buffer = RolloutBuffer(
        steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), device="cpu", gamma=gamma, gae_lambda=lam, n_envs=envs
    )
    starts = np.vstack([np.ones((1, envs), dtype=bool), ended.numpy()[:-1]])
    for t in range(steps):
        zero = np.zeros((envs, 1), dtype=np.float32)
        buffer.add(zero, zero, rewards[t].numpy(), starts[t], values[t], torch.zeros(envs))
    return buffer


def rollout(steps, envs, seed=130):
    rewards, values = draw(steps, envs, seed=seed).float(), draw(steps, envs, seed=seed + 1).float()
    kind = torch.rand(steps, envs, generator=torch.Generator().manual_seed(seed + 2))
    return rewards, values, kind < 0.2, kind > 0.8, draw(envs, seed=seed + 3).float()


@pytest.mark.parametrize(
    ("steps", "envs", "backend"),
    [(1, 1, "torch"), (16, 4, "torch"), (100, 3, "torch"), (16, 4, "triton")],  # the interpreter is slow at 100 steps
)
@pytest.mark.parametrize(("gamma", "lam"), GAMMA_LAM)
def test_time_major_gae_matches_sb3s_buffer(steps, envs, gamma, lam, backend):
    """Switches: terminated = the step before an episode start (dones for the last step); bootstrap = last_values."""
    rewards, values, ended, _, last_values = rollout(steps, envs)
    buffer = filled_buffer(rewards, values, ended, gamma, lam)
    buffer.compute_returns_and_advantage(last_values, ended[-1].numpy())
    advantages, returns = ppo.gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        terminated=ended,
        bootstrap=last_values,
        time_major=True,
        backend=backend,
    )
    assert_equal(advantages, torch.from_numpy(buffer.advantages), atol=1e-5)
    assert_equal(returns, torch.from_numpy(buffer.returns), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("gamma", "lam"), GAMMA_LAM)
def test_a_time_limit_is_bootstrapped_as_in_sb3(gamma, lam, backend):
    """Switch: SB3 adds gamma V(last observation) to the reward of a truncated step; ours takes it as final_values."""
    rewards, values, terminated, truncated, last_values = rollout(20, 4, seed=140)
    final_values = draw(20, 4, seed=145).float()
    ended = terminated | truncated
    augmented = torch.where(truncated, rewards + gamma * final_values, rewards)
    buffer = filled_buffer(augmented, values, ended, gamma, lam)
    buffer.compute_returns_and_advantage(last_values, ended[-1].numpy())
    advantages, returns = ppo.gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        terminated=terminated,
        truncated=truncated,
        final_values=torch.where(truncated, final_values, torch.nan),
        bootstrap=last_values,
        time_major=True,
        backend=backend,
    )
    assert_equal(advantages, torch.from_numpy(buffer.advantages), atol=1e-5)
    assert_equal(returns, torch.from_numpy(buffer.returns), atol=1e-5)
