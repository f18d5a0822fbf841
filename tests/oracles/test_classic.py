"""ppo_fast.classic, Stable-Baselines3 2.9.2 and torchrl 0.14.1: the same updates, the same advantages of episodes."""

import numpy as np
import pytest
import torch

MISSING = "{} is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("stable_baselines3", reason=MISSING.format("stable-baselines3"))
functional = pytest.importorskip("torchrl.objectives.value.functional", reason=MISSING.format("torchrl"))

import against_sb3  # noqa: E402
from oracles.test_sb3 import filled_buffer  # noqa: E402

from ppo_fast.classic import ClassicConfig, ClassicTrainer  # noqa: E402
from ppo_fast.classic.ppo import Batch  # noqa: E402

HYPERPARAMETERS = dict(envs=4, steps=1024, rollout=64, batch=32, lam=0.9, gamma=0.98, epochs=3, lr=1e-3)


def weights_apart(policy, trainer) -> float:
    """The norm of the difference between SB3's weights and ours."""
    ours = ClassicTrainer(trainer.config)
    against_sb3.copy_weights(policy, ours)
    pairs = zip(ours.weights, trainer.weights, strict=True)
    return torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm().item()


@pytest.mark.parametrize(
    ("env", "entropy", "decay"),
    [
        ("CartPole-v1", 0.0, False),
        ("CartPole-v1", 0.05, True),
        ("Pendulum-v1", 0.0, True),
        ("Pendulum-v1", 0.05, False),
    ],
)
def test_updates_from_sb3s_rollouts_in_sb3s_order_end_at_the_same_weights(monkeypatch, env, entropy, decay):
    """Four rollouts of 24 optimizer steps, both with their own Adam from first to last; the rollouts are SB3's."""
    zoo = {**HYPERPARAMETERS, "entropy": entropy, "decay": decay}
    model, trainer = against_sb3.sb3_model(env, 0, zoo, sde=False), ClassicTrainer(against_sb3.our_config(env, 0, zoo))
    against_sb3.copy_weights(model.policy, trainer)
    train, permutation, randperm = model.train, np.random.permutation, torch.randperm
    distances = []

    def both():
        orders = []
        monkeypatch.setattr(np.random, "permutation", lambda n: orders.append(permutation(n)) or orders[-1])
        train()
        given = iter(orders)
        monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.from_numpy(next(given)))
        buffer, remaining = model.rollout_buffer, model._current_progress_remaining if decay else 1.0
        columns = {name: torch.from_numpy(getattr(buffer, name)) for name in ("observations", "actions")}
        actions = columns["actions"].long()[:, 0] if trainer.discrete else columns["actions"]
        flat = (torch.from_numpy(getattr(buffer, x)[:, 0]) for x in ("log_probs", "values", "advantages", "returns"))
        trainer.learn(Batch(columns["observations"], actions, *flat), lr=1e-3 * remaining, clip=0.2 * remaining)
        monkeypatch.setattr(torch, "randperm", randperm)
        distances.append(weights_apart(model.policy, trainer))

    start = torch.cat([x.detach().flatten() for x in model.policy.parameters()])
    model.train = both
    model.learn(1024)
    moved = torch.cat([x.detach().flatten() for x in model.policy.parameters()]) - start
    assert len(distances) == 4
    assert moved.norm() > 0.5
    assert max(distances) < 1e-5 * moved.norm()


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.5)])
def test_advantages_of_recorded_episodes_match(autoreset, gamma, lam):
    """CartPole with a limit of 20 steps: a random policy's episodes end in both ways. The steps that only reset are
    taken out; then SB3 gets gamma V(last observation) added to the reward of a cut episode, torchrl that value."""
    options = {"env_kwargs": '{"max_episode_steps": 20}', "vectorization": "sync", "autoreset": autoreset}
    config = ClassicConfig(env="CartPole-v1", num_envs=5, rollout_steps=90, gamma=gamma, lam=lam, quiet=True, **options)
    trainer = ClassicTrainer(config)
    trainer.collect()
    batch, _ = trainer.advantages()
    ours = torch.full((2, *trainer.rewards.shape), torch.nan)
    ours[:, trainer.mask] = torch.stack([batch.advantages, batch.returns])
    with torch.no_grad():
        values = trainer.network.value(trainer.observations.flatten(0, 1)).view(91, 5)
        following = values[1:].clone()
        for t, n, last in trainer.final_observations:
            following[t, n] = trainer.network.value(torch.from_numpy(last[None]))[0]
    terminated, truncated, both_ways = trainer.terminated, trainer.truncated, [0, 0]
    for n in range(5):
        rows = trainer.mask[:, n].nonzero()[:, 0]
        reward, value, ahead, end, cut = (
            x[rows, n, None] for x in (trainer.rewards, values[:-1], following, terminated, truncated)
        )
        both_ways = [a + int(b.sum()) for a, b in zip(both_ways, (end, cut), strict=True)]
        buffer = filled_buffer(reward + gamma * ahead * cut, value, end | cut, gamma, lam)
        buffer.compute_returns_and_advantage(ahead[-1], (end | cut)[-1].numpy())
        torchrl = functional.vec_generalized_advantage_estimate(
            gamma, lam, value[None], ahead[None], reward[None], (end | cut)[None], end[None]
        )
        for mine, sb3, other in zip(ours[:, rows, n, None], (buffer.advantages, buffer.returns), torchrl, strict=True):
            torch.testing.assert_close(mine, torch.from_numpy(sb3), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine, other[0], rtol=1e-5, atol=1e-5)
    assert min(both_ways) >= 5
