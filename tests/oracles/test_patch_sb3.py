"""Stable-Baselines3 with our rollout buffer: the same advantages, the same training."""

import numpy as np
import pytest
import torch

MISSING = "stable-baselines3 is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("stable_baselines3", reason=MISSING)

import gymnasium  # noqa: E402
from gymnasium import spaces  # noqa: E402
from stable_baselines3 import A2C, PPO  # noqa: E402
from stable_baselines3.common import buffers  # noqa: E402

from ppo_fast.examples import with_sb3  # noqa: E402
from ppo_fast.integrations import sb3  # noqa: E402


def filled(kind, steps: int, envs: int, gamma: float, lam: float, space=None):
    draw = np.random.default_rng(0)
    space = space or spaces.Box(-1, 1, (1,))
    buffer = kind(steps, space, spaces.Discrete(2), device="cpu", gamma=gamma, gae_lambda=lam, n_envs=envs)
    for _ in range(steps):
        seen = {k: np.zeros((envs, 1), np.float32) for k in space.spaces} if isinstance(space, spaces.Dict) else None
        buffer.add(
            np.zeros((envs, 1), np.float32) if seen is None else seen,
            np.zeros((envs, 1), np.float32),
            draw.normal(size=envs).astype(np.float32),
            (draw.random(envs) < 0.2).astype(np.float32),
            torch.from_numpy(draw.normal(size=envs).astype(np.float32)),
            torch.zeros(envs),
        )
    return buffer, torch.from_numpy(draw.normal(size=(envs, 1)).astype(np.float32)), draw.random(envs) < 0.5


@pytest.mark.parametrize(("steps", "envs"), [(1, 1), (16, 3), (128, 8)])
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("observations", ["box", "dict"])
def test_advantages_of_our_buffer_match_sb3(steps, envs, gamma, lam, observations):
    kinds, space = (buffers.RolloutBuffer, sb3.RolloutBuffer), None
    if observations == "dict":
        kinds = (buffers.DictRolloutBuffer, sb3.DictRolloutBuffer)
        space = spaces.Dict({"a": spaces.Box(-1, 1, (1,)), "b": spaces.Box(-1, 1, (1,))})
    found = []
    for kind in kinds:
        buffer, last, dones = filled(kind, steps, envs, gamma, lam, space)
        buffer.compute_returns_and_advantage(last, dones)
        found.append((buffer.advantages, buffer.returns))
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


class Constant(gymnasium.Env):
    """Reward 1 in every step, `length` steps in an episode, ended or cut."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, length: int, *, cut: bool) -> None:
        self.length, self.cut, self.time = length, cut, 0

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        over = self.time == self.length
        return np.zeros(1, np.float32), 1.0, over and not self.cut, over and self.cut, {}


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("cut", [False, True])
def test_returns_of_constant_rewards_match_the_closed_form(algorithm, lam, cut):
    """With values of V and rewards of 1: lambda = 1 gives the rest of the episode, and V behind a time limit."""
    model = algorithm(
        "MlpPolicy",
        Constant(5, cut=cut),
        n_steps=10,
        gamma=0.9,
        gae_lambda=lam,
        rollout_buffer_class=sb3.RolloutBuffer,
        seed=0,
        **({"batch_size": 10} if algorithm is PPO else {}),
    )
    model.learn(10)
    buffer = model.rollout_buffer
    returns, values = buffer.returns.flatten(), buffer.values.flatten()
    value = values[0]
    assert np.allclose(values, value), "all observations are alike"
    end = value if cut else 0.0
    expected, advantage = np.zeros(5), 0.0
    for step in reversed(range(5)):
        after = end if step == 4 else value
        advantage = 1 + 0.9 * after - value + 0.9 * lam * advantage
        expected[step] = advantage + value
    np.testing.assert_allclose(returns, np.tile(expected, 2), atol=1e-4)


def test_training_with_our_buffer_is_the_same():
    weights = []
    for kind in (buffers.RolloutBuffer, sb3.RolloutBuffer):
        model = PPO(
            "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, seed=0, rollout_buffer_class=kind, device="cpu"
        )
        model.learn(256)
        weights.append(torch.cat([p.detach().flatten() for p in model.policy.parameters()]))
    assert torch.allclose(*weights, atol=1e-4)


def test_the_buffer_is_on_the_cpu_whatever_the_default_device_is():
    mine, last, dones = filled(sb3.RolloutBuffer, 32, 16, 0.99, 0.95)
    mine.compute_returns_and_advantage(last, dones)
    expected = mine.advantages
    torch.set_default_device("meta")
    try:
        mine.compute_returns_and_advantage(last, dones)
    finally:
        torch.set_default_device(None)
    assert np.array_equal(mine.advantages, expected)


def test_the_example_compares_means_of_sampled_episodes(capsys, monkeypatch):
    """Of both, from the same weights; so the untrained policy cannot be lucky."""
    from stable_baselines3.common import evaluation

    calls, evaluate = [], evaluation.evaluate_policy
    monkeypatch.setattr(
        evaluation, "evaluate_policy", lambda *a, **options: calls.append(options) or evaluate(*a, **options)
    )
    assert with_sb3.main(["--steps", "2048", "--seeds", "1"]) == 0
    out, err = capsys.readouterr()
    assert calls == [{"n_eval_episodes": 100, "deterministic": False}] * 3
    seed, before, theirs, ours, their_ms, our_ms = map(float, out.splitlines()[-1].split())
    assert seed == 0
    assert 15 < before < 35  # of random actions: 22
    assert theirs == pytest.approx(ours, abs=15)  # one update, the same up to rounding
    assert min(their_ms, our_ms) > 0
    assert err.splitlines()[-1].startswith("steps 4096/4096")
