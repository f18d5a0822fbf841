"""PPO on real episodes: advantages in both autoreset modes, updates, resuming, learning, and errors."""

import argparse
import dataclasses
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')

from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402

from ppo_fast.classic import ClassicConfig, ClassicTrainer  # noqa: E402
from ppo_fast.classic import ppo as algorithm  # noqa: E402
from ppo_fast.classic.config import add_arguments  # noqa: E402
from ppo_fast.classic.logger import RunLogger  # noqa: E402
from ppo_fast.classic.normalize import RunningMeanStd  # noqa: E402
from ppo_fast.classic.optimizer import Adam  # noqa: E402
from ppo_fast.common import checkpoint  # noqa: E402
from ppo_fast.common.errors import NonFiniteError, UserError  # noqa: E402

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]


class Diary(gymnasium.Env):
    """Episodes of 1 to 6 random steps that end in either way; records each transition."""

    observation_space = spaces.Box(-10, 10, (3,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, action_space: spaces.Space | None = None):
        self.action_space = self.action_space if action_space is None else action_space
        self.transitions: list[tuple] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 7))
        self.observation = self.np_random.normal(size=3).astype(np.float32)
        return self.observation, {}

    def step(self, action):
        before, self.left = self.observation, self.left - 1
        self.observation = self.np_random.normal(size=3).astype(np.float32)
        terminated = self.left == 0 and bool(self.np_random.random() < 0.5)
        truncated = self.left == 0 and not terminated
        reward = float(self.np_random.normal())
        self.transitions.append((before, action, reward, self.observation, terminated, truncated))
        return self.observation, reward, terminated, truncated, {}


class Stripes(gymnasium.Env):
    """uint8 images, channels first or last; the action must be the brighter half."""

    action_space = spaces.Discrete(2)

    def __init__(self, shape):
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bright = int(self.np_random.integers(2))
        image = np.zeros(self.observation_space.shape, np.uint8)
        rows = image if image.shape[-1] <= 3 else np.moveaxis(image, 0, -1)
        rows[self.bright * 6 : self.bright * 6 + 6] = 255
        return image, {}

    def step(self, action):
        image, _ = self.reset()
        return image, float(action == self.bright), True, False, {}


class Target(gymnasium.Env):
    """One step: the reward is higher the nearer the action is to 0.7."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), -float((action[0] - 0.7) ** 2), True, False, {}


def diaries(mode, count=3, **options):
    return SyncVectorEnv([lambda: Diary(**options) for _ in range(count)], autoreset_mode=mode)


def small(**options) -> ClassicConfig:
    defaults = dict(num_envs=3, rollout_steps=16, total_steps=10**6, hidden_size=8, minibatches=2, epochs=1, quiet=True)
    return ClassicConfig(**{**defaults, "eval_episodes": 0, "gamma": 0.9, "lam": 0.8, **options})


def by_hand(transitions, value, gamma, lam):
    """Compute the lambda-advantages of one environment's transitions, from the last to the first."""
    advantages, following = [], 0.0
    for observation, _, reward, after, terminated, truncated in reversed(transitions):
        ended = terminated or truncated
        delta = reward + gamma * (0.0 if terminated else value(after)) - value(observation)
        following = delta + (0.0 if ended else gamma * lam * following)
        advantages.append(following)
    return advantages[::-1]


def of_environment(trainer, batch, column, i):
    """Select the rows of a batch column that belong to environment i."""
    owners = np.flatnonzero(trainer.mask.flatten().numpy()) % trainer.envs.num_envs
    return column[torch.from_numpy(owners == i)]


@pytest.mark.parametrize("mode", MODES)
def test_advantages_match_a_recursion_by_hand_over_recorded_episodes(mode):
    trainer = ClassicTrainer(small(), envs=diaries(mode))
    seen = [0] * 3
    for _ in range(4):  # later rollouts begin inside an episode, or with a step that only resets
        trainer.collect()
        batch, _ = trainer.advantages()
        for i, env in enumerate(trainer.envs.envs):
            new, seen[i] = env.transitions[seen[i] :], len(env.transitions)

            def value(x):
                return trainer.network.value(torch.from_numpy(x)[None]).item()

            expected = torch.tensor(by_hand(new, value, 0.9, 0.8))
            got = of_environment(trainer, batch, batch.advantages, i)
            values = torch.tensor([value(step[0]) for step in new])
            assert len(expected) == len(got)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # one row's GEMM rounds differently
            torch.testing.assert_close(
                of_environment(trainer, batch, batch.returns, i), expected + values, rtol=0, atol=1e-5
            )
        learned = trainer.learn(batch, lr=1e-2, clip=0.2)
        assert learned["grad_norm"] > 0
    kinds = {(step[4], step[5]) for env in trainer.envs.envs for step in env.transitions}
    assert kinds == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize("mode", MODES)
def test_steps_that_only_reset_are_not_in_the_batch(mode):
    trainer = ClassicTrainer(small(rollout_steps=40), envs=diaries(mode))
    trainer.collect()
    batch, _ = trainer.advantages()
    for i, env in enumerate(trainer.envs.envs):
        assert np.array_equal(
            of_environment(trainer, batch, batch.observations, i), np.stack([x[0] for x in env.transitions])
        )
        assert of_environment(trainer, batch, batch.actions, i).tolist() == [x[1] for x in env.transitions]
    total = sum(len(env.transitions) for env in trainer.envs.envs)
    assert trainer.global_step == len(batch.actions) == total
    assert (total == 120) == (mode == AutoresetMode.SAME_STEP)


@pytest.mark.parametrize("mode", MODES)
def test_episode_returns_are_the_sums_of_their_rewards(mode):
    trainer = ClassicTrainer(small(rollout_steps=25), envs=diaries(mode))
    found: list[tuple[float, int]] = []
    for _ in range(3):
        trainer.collect()
        found += [(total, length) for _, total, length in trainer.finished]
    expected = []
    for env in trainer.envs.envs:
        total, length = 0.0, 0
        for *_, reward, _, terminated, truncated in env.transitions:
            total, length = total + reward, length + 1
            if terminated or truncated:
                expected.append((total, length))
                total, length = 0.0, 0
    assert len(found) > 20
    assert sorted(x for _, x in found) == sorted(x for _, x in expected)
    np.testing.assert_allclose(sorted(x for x, _ in found), sorted(x for x, _ in expected), atol=1e-5)


def test_rewards_of_steps_that_only_reset_do_not_count():
    class Generous(SyncVectorEnv):
        def step(self, actions):
            resets = self._autoreset_envs.copy()
            raw, rewards, *rest = super().step(actions)
            return raw, rewards + 1000 * resets, *rest

    trainer = ClassicTrainer(small(), envs=Generous([Diary] * 3))
    trainer.collect()
    assert len(trainer.finished) > 5
    assert max(total for _, total, _ in trainer.finished) < 500


@pytest.mark.parametrize("mode", MODES)
def test_normalized_rewards_leave_out_steps_that_only_reset(mode):
    trainer = ClassicTrainer(small(rollout_steps=30, normalize_rewards=True), envs=diaries(mode))
    trainer.collect()
    returns = []
    for env in trainer.envs.envs:
        discounted = 0.0
        for *_, reward, _, terminated, truncated in env.transitions:
            discounted = discounted * 0.9 + reward
            returns.append(discounted)
            discounted = 0.0 if terminated or truncated else discounted
    np.testing.assert_allclose(trainer.return_rms.mean, np.mean(returns), atol=1e-6)  # rewards are fp32
    np.testing.assert_allclose(trainer.return_rms.var, np.var(returns), atol=1e-6)
    assert trainer.rewards[~trainer.mask].abs().sum() == 0


@pytest.mark.parametrize("mode", MODES)
def test_final_observations_are_normalized_like_the_others(mode):
    """The value at the end of a truncated episode uses the same statistics and clipping as all other observations."""
    trainer = ClassicTrainer(small(normalize_observations=True), envs=diaries(mode))
    trainer.collect()
    moments, rows = trainer.observation_rms, []
    if mode == AutoresetMode.SAME_STEP:
        assert trainer.final_observations
        rows = [row for _, _, row in trainer.final_observations]
    seen = np.concatenate([trainer.observations.flatten(0, 1).numpy(), *([np.stack(rows)] if rows else [])])
    assert abs(seen.mean()) < 0.5
    assert 0.5 < seen.std() < 1.5
    counted = trainer.mask.sum() if mode == AutoresetMode.NEXT_STEP else 48
    assert 0 <= moments.count - counted <= 3  # and those after the rollout, where the next one begins


def test_running_statistics_match_those_of_all_data_at_once():
    data = np.random.default_rng(0).normal(3.0, 2.0, (100, 4))
    moments = RunningMeanStd((4,))
    for part in np.split(data, [1, 10, 60]):
        moments.update(part)
    moments.update(data[:0])
    np.testing.assert_allclose(moments.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.var, data.var(0), rtol=1e-12)


def test_adam_matches_pytorchs():
    ours, theirs = torch.ones(5), torch.nn.Parameter(torch.ones(5))
    adam, reference = Adam(ours, 1e-2), torch.optim.Adam([theirs], lr=0.1, eps=1e-2)
    for step in range(20):
        theirs.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        reference.step()
        adam.step(theirs.grad, 0.1)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("discrete", [True, False])
def test_gradients_by_hand_match_autograd(activation, shared, layers, discrete):
    space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,), np.float32)
    config = small(activation=activation, shared=shared, hidden_layers=layers, minibatches=1)
    trainer = ClassicTrainer(config, envs=diaries(MODES[0], action_space=space))
    trainer.collect()
    batch, _ = trainer.advantages()
    found = []
    for by_hand in (True, False):
        if by_hand:
            policy, values, activations = trainer.network.forward_with_cache(batch.observations)
        else:
            (policy, values), activations = trainer.network(batch.observations), None
        logp, entropy = trainer.network.logprobs(policy, batch.actions, with_entropy=True)
        loss = (logp * batch.advantages).mean() + (values - batch.returns).square().mean() + entropy.mean()
        trainer.gradient.fill_(torch.nan)
        trainer.backward(loss, policy, values, activations)
        found.append(trainer.gradient.clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_first_ratio_is_one():
    trainer = ClassicTrainer(small(minibatches=1), envs=diaries(AutoresetMode.NEXT_STEP))
    trainer.collect()
    batch, _ = trainer.advantages()
    out = trainer.network(batch.observations)[0]
    logp, _ = trainer.network.logprobs(out, batch.actions, with_entropy=False)
    torch.testing.assert_close(logp, batch.old_logprobs, rtol=0, atol=1e-6)  # the rollout's GEMM has more rows


@pytest.mark.parametrize("discrete", [True, False])
def test_log_probabilities_and_entropy_match_pytorchs_distributions(discrete):
    space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,), np.float32)
    trainer = ClassicTrainer(small(log_std_init=-0.3), envs=diaries(MODES[0], action_space=space))
    policy = torch.randn(7, trainer.num_outputs)
    if discrete:
        truth = torch.distributions.Categorical(logits=policy)
        actions, expected = truth.sample(), truth.entropy()
        logp = truth.log_prob(actions)
    else:
        normal = torch.distributions.Normal(policy, np.exp(-0.3))
        actions = normal.sample()
        logp, expected = normal.log_prob(actions).sum(-1), normal.entropy().sum(-1)
    ours, entropy = trainer.network.logprobs(policy, actions, with_entropy=True)
    torch.testing.assert_close(ours, logp)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(trainer.network.logprobs(policy, actions, with_entropy=False)[0], logp)


def test_actions_are_sampled_from_the_policy():
    trainer = ClassicTrainer(small(rollout_steps=2000), envs=diaries(MODES[0]))
    wanted = torch.tensor([0.2, 0.5, 0.3])
    with torch.no_grad():
        trainer.network.policy_head.weights[0].zero_()
        trainer.network.policy_head.biases[0].copy_(wanted.log())
    trainer.collect()
    shares = torch.bincount(trainer.actions.flatten(), minlength=3) / trainer.actions.numel()
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.03)  # 6000 draws: five standard deviations


def test_continuous_actions_are_clipped_to_the_bounds_of_the_environment():
    low, high = np.array([-0.1, -5], np.float32), np.array([0.1, 0.2], np.float32)
    trainer = ClassicTrainer(small(), envs=diaries(MODES[0], action_space=spaces.Box(low, high)))
    trainer.collect()
    sent = np.stack([x[1] for env in trainer.envs.envs for x in env.transitions])
    assert (sent >= low).all()
    assert (sent <= high).all()
    assert (trainer.actions.numpy() > high).any()  # the actions of the batch are those that were sampled


def test_discrete_actions_that_start_at_seven_reach_the_environment():
    trainer = ClassicTrainer(small(), envs=diaries(MODES[0], action_space=spaces.Discrete(3, start=7)))
    trainer.collect()
    assert {int(x[1]) for env in trainer.envs.envs for x in env.transitions} == {7, 8, 9}


@pytest.mark.parametrize("cnn", [False, True])
def test_an_update_matches_plain_pytorch(cnn):
    """Whitened advantages, clipped ratio, clipped value, entropy, clipped gradient and Adam, three epochs."""
    clips = dict(value_clip=0.05, max_grad_norm=0.1, value_coef=0.7, entropy_coef=0.02)
    config = small(minibatches=1, epochs=3, lr=3e-2, **clips)
    makers = [lambda: Stripes((12, 10, 3))] * 3 if cnn else [Diary] * 3
    trainer, other = (ClassicTrainer(config, envs=SyncVectorEnv(makers)) for _ in range(2))
    trainer.collect()
    batch, _ = trainer.advantages()
    network = other.network
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-2, eps=1e-5)
    advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    for _ in range(3):
        policy, values = network(batch.observations)
        chosen = torch.distributions.Categorical(logits=policy)
        ratio = (chosen.log_prob(batch.actions) - batch.old_logprobs).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).mean()
        near = batch.old_values + (values - batch.old_values).clamp(-0.05, 0.05)
        errors = torch.maximum((values - batch.returns).square(), (near - batch.returns).square())
        loss = -surrogate + 0.7 * 0.5 * errors.mean() - 0.02 * chosen.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
    metrics = trainer.learn(batch, lr=3e-2, clip=0.1)
    assert metrics["clip_fraction"] > 0
    assert metrics["value_clip_fraction"] > 0
    assert metrics["grad_norm"] > 0.1
    torch.testing.assert_close(trainer.adam.weights, other.adam.weights, rtol=0, atol=1e-4)  # three steps of 0.03


def test_learning_rate_and_clip_fall_linearly():
    trainer = ClassicTrainer(small(total_steps=960, clip_schedule="linear", lr=1e-3), envs=diaries(MODES[1]))
    metrics = [trainer.step() for _ in range(20)]  # of 48 steps
    assert [m["lr"] for m in metrics] == pytest.approx([1e-3 * (1 - i / 20) for i in range(20)])
    assert [m["clip"] for m in metrics] == pytest.approx([0.2 * (1 - i / 20) for i in range(20)])


def test_each_epoch_has_every_step_once_in_a_new_order(monkeypatch):
    trainer, seen = ClassicTrainer(small(epochs=3, minibatches=4), envs=diaries(MODES[0])), []
    trainer.collect()
    batch, _ = trainer.advantages()
    forward_with_cache = trainer.network.forward_with_cache
    monkeypatch.setattr(trainer.network, "forward_with_cache", lambda x: seen.append(x) or forward_with_cache(x))
    trainer.learn(batch, lr=1e-3, clip=0.2)
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    assert len(seen) == 12
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(batch.observations.tolist())


def test_target_kl_stops_an_update():
    trainer = ClassicTrainer(small(epochs=50, target_kl=0.01), envs=diaries(MODES[0]))
    trainer.collect()
    batch, _ = trainer.advantages()
    before = trainer.adam.steps
    metrics = trainer.learn(batch, lr=0.05, clip=0.2)
    assert 0 < metrics["minibatches"] < 100
    assert trainer.adam.steps - before == metrics["minibatches"]


def test_a_reward_that_is_not_finite_ends_the_run():
    trainer = ClassicTrainer(small(), envs=diaries(MODES[0]))
    trainer.collect()
    t, i = trainer.mask.nonzero()[5].tolist()
    trainer.rewards[t, i] = torch.inf
    with pytest.raises(NonFiniteError, match="a return of rollout 1 is not finite"):
        trainer.advantages()


def test_a_gradient_that_is_not_finite_leaves_the_weights_unchanged():
    trainer = ClassicTrainer(small(), envs=diaries(MODES[0]))
    trainer.collect()
    batch, _ = trainer.advantages()
    weights = trainer.adam.weights.clone()
    with pytest.raises(NonFiniteError, match="gradient of update 1 is nan"):
        trainer.learn(batch._replace(observations=batch.observations * torch.nan), lr=1e-3, clip=0.2)
    assert torch.equal(weights, trainer.adam.weights)


def without_times(path: Path) -> list[dict]:
    rows = [json.loads(row) for row in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in row.items() if "second" not in k} for row in rows]


class Killed(Exception):
    pass


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
@pytest.mark.parametrize("env", ["ppo_fast/Maze-v0", "CartPole-v1"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_killed(tmp_path, monkeypatch, env, autoreset):
    # With 6 steps and one that only resets, episodes end at the end of the third rollout, where a checkpoint is written
    kwargs = '{"size": 5, "max_steps": 6}' if "Maze" in env else "{}"
    options = dict(env=env, env_kwargs=kwargs, autoreset=autoreset, num_envs=4, rollout_steps=16, total_steps=600)
    options |= dict(normalize_observations=True, normalize_rewards=True, save_every=3, tensorboard=False)
    whole = ClassicTrainer(small(**options, out=str(tmp_path / "whole")))
    whole.train()

    killed = ClassicTrainer(small(**options, out=str(tmp_path / "killed")))
    step = killed.step
    monkeypatch.setattr(killed, "step", lambda: step() if killed.updates_done < 5 else (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        killed.train()
    assert len(without_times(tmp_path / "killed")) == 5  # two of them are repeated after resuming
    resumed = ClassicTrainer(small(**options, out=str(tmp_path / "killed"), resume=True))
    resumed.train()

    assert whole.updates_done == resumed.updates_done > 8
    assert torch.equal(whole.adam.weights, resumed.adam.weights)
    assert torch.equal(whole.adam.square, resumed.adam.square)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")
    if "Maze" in env:  # its state is in the checkpoint: saving changes nothing
        never = ClassicTrainer(small(**{**options, "save_every": 0}))
        never.train()
        assert torch.equal(never.adam.weights, whole.adam.weights)


def test_a_state_restores_the_next_update():
    options = dict(env="ppo_fast/Maze-v0", normalize_rewards=True, rollout_steps=40, total_steps=1000)
    trainer, other = (ClassicTrainer(small(**options, seed=seed)) for seed in (1, 2))
    for _ in range(2):
        trainer.step()
    other.load_state_dict(trainer.state_dict())
    assert other.global_step == trainer.global_step
    metrics = [{k: x for k, x in t.step().items() if "second" not in k} for t in (trainer, other)]
    assert metrics[0] == metrics[1]
    assert torch.equal(trainer.adam.weights, other.adam.weights)


def test_a_run_made_longer_has_the_bits_of_one_that_was_long_from_the_start(tmp_path):
    """The last update also saves a checkpoint, which must not contain what is reset after it."""
    options = dict(env="Pendulum-v1", rollout_steps=8, lr_schedule="constant", save_every=1, tensorboard=False)
    options |= dict(normalize_observations=True, num_envs=2)
    whole = ClassicTrainer(small(**options, total_steps=96, out=str(tmp_path / "whole")))
    whole.train()
    ClassicTrainer(small(**options, total_steps=48, out=str(tmp_path / "parts"))).train()
    longer = ClassicTrainer(small(**options, total_steps=96, out=str(tmp_path / "parts"), resume=True))
    longer.train()
    assert whole.updates_done == longer.updates_done == 6
    assert torch.equal(whole.adam.weights, longer.adam.weights)


@pytest.mark.parametrize("save_every", [0, 2])
@pytest.mark.parametrize("env", ["ppo_fast/Maze-v0", "CartPole-v1"])
def test_ctrl_c_saves_the_run_and_keeps_its_bits(tmp_path, monkeypatch, env, save_every):
    options = dict(env=env, total_steps=400, save_every=save_every, tensorboard=False)
    whole = ClassicTrainer(small(**options, out=str(tmp_path / "whole")))
    whole.train()
    stopped = ClassicTrainer(small(**options, out=str(tmp_path / "parts")))
    step, before = stopped.step, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        stopped, "step", lambda: (stopped.updates_done == 4 and signal.raise_signal(signal.SIGINT), step())[1]
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.updates_done == 5  # the update was completed
    assert signal.getsignal(signal.SIGINT) is before
    resumed = ClassicTrainer(small(**options, out=str(tmp_path / "parts"), resume=True))
    resumed.train()
    assert resumed.global_step >= 400
    if "Maze" in env or save_every:  # CartPole starts new episodes at every checkpoint, also at that of Ctrl-C
        assert torch.equal(whole.adam.weights, resumed.adam.weights)
        assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def test_metrics_are_written_at_once_and_a_partial_line_is_removed(tmp_path):
    options = dict(env="CartPole-v1", out=str(tmp_path), tensorboard=False)
    with RunLogger(small(**options), 0) as log:
        log.log_metrics({"step": 48, "entropy": 0.5})
        log.log_metrics({"step": 96, "entropy": 0.4})
        assert [row["step"] for row in without_times(tmp_path)] == [48, 96]
        log.metrics.file.write('{"step": 1')
    with RunLogger(small(**options, resume=True), 96):
        assert [row["step"] for row in without_times(tmp_path)] == [48, 96]


def test_progress_is_shown_after_a_rollout_that_only_resets(capsys):
    config = small(num_envs=1, rollout_steps=1, minibatches=1, total_steps=3, quiet=False)
    trainer = ClassicTrainer(config, envs=SyncVectorEnv([Target]))
    with RunLogger(config, 0) as log:
        for step in (1, 1, 2, 2, 3):
            metrics = trainer.step()
            assert metrics["step"] == step
            log.log_metrics(metrics)
            log.log_progress()
    assert capsys.readouterr().out.count(" steps  ") == 6


def test_an_evaluation_episode_without_an_end_is_cut():
    """Without slip, in FrozenLake, an untrained policy walks against a wall; here no step limit ends that."""
    lake = {"env": "FrozenLake-v1", "env_kwargs": '{"is_slippery": false, "max_episode_steps": -1}'}
    trainer = ClassicTrainer(small(**lake, eval_max_steps=50))
    trainer.act = lambda observations: np.zeros(1, int)
    with pytest.warns(RuntimeWarning, match="episode 0 is cut after 50 steps"):
        assert trainer.evaluate(1) == [0.0]


class Drawn(Target):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012  # Gymnasium's interface

    def __init__(self, picture=None, render_mode=None):
        self.picture, self.render_mode = picture, render_mode

    def render(self):
        return self.picture


class Undrawn(Drawn):
    metadata = {"render_modes": []}  # noqa: RUF012


@pytest.mark.filterwarnings("ignore:.*render")
@pytest.mark.parametrize(
    ("made", "picture", "message"),
    [
        (Drawn, None, "no picture"),
        (Drawn, np.zeros((4, 4, 3)), "float64"),
        (Drawn, [np.zeros((4, 4, 3), np.uint8)], r"\[1, 4, 4, 3\]"),
        (Undrawn, np.zeros((4, 4, 3), np.uint8), "no render_mode rgb_array"),
    ],
)
def test_environments_that_render_no_picture_are_rejected_before_the_training(
    tmp_path, monkeypatch, made, picture, message
):
    spec = gymnasium.envs.registration.EnvSpec(id="Drawn-v0", entry_point=made)
    monkeypatch.setitem(gymnasium.registry, "Drawn-v0", spec)
    config = small(env="Drawn-v0", total_steps=50, eval_episodes=1, record="gif", out=str(tmp_path / "x"))
    trainer = ClassicTrainer(config, env_kwargs={"picture": picture})
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert trainer.global_step == 0


def test_a_checkpoint_of_other_options_is_rejected(tmp_path):
    ClassicTrainer(small(env="CartPole-v1", total_steps=50, out=str(tmp_path), tensorboard=False)).train()
    other = ClassicTrainer(small(env="CartPole-v1", total_steps=50, out=str(tmp_path), resume=True, gamma=0.5))
    with pytest.raises(UserError, match=r"gamma = 0\.9, not 0\.5"):
        other.train()


def test_a_damaged_checkpoint_is_rejected(tmp_path):
    ClassicTrainer(small(env="CartPole-v1", total_steps=50, out=str(tmp_path), tensorboard=False)).train()
    folder = checkpoint.newest(tmp_path / "checkpoints")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    again = ClassicTrainer(small(env="CartPole-v1", total_steps=50, out=str(tmp_path), resume=True))
    with pytest.raises(UserError, match=r"model\.safetensors is not as it was written"):
        again.train()


def test_an_earlier_run_is_kept(tmp_path):
    options = dict(env="CartPole-v1", total_steps=50, out=str(tmp_path), tensorboard=False)
    ClassicTrainer(small(**options)).train()
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="already holds a run"):
        ClassicTrainer(small(**options)).train()
    assert (tmp_path / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"num_envs": 1, "rollout_steps": 2, "minibatches": 3}, "minibatches must be at most"),
        ({"network": "transformer"}, "network must be one of"),
        ({"resume": True}, "need out"),
        ({"overwrite": True}, "need out"),
        ({"overwrite": True, "resume": True, "out": "x"}, "give one of them"),
        ({"record": "gif", "eval_episodes": 3}, "need out"),
        ({"record": "gif", "eval_episodes": 0, "out": "x"}, "eval_episodes of at least 1"),
        ({"autoreset": "same_step", "vectorization": "vector_entry_point"}, "same_step needs"),
    ],
)
def test_a_bad_option_is_rejected(options, message):
    with pytest.raises(UserError, match=message):
        ClassicConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "NoSuch-v0"}, "cannot make the environment NoSuch-v0"),
        ({"env_kwargs": "{"}, "env_kwargs is not JSON"),
        ({"env_kwargs": "[1]"}, "must be a JSON object"),
        ({"env_kwargs": '{"colour": 1}'}, "unexpected keyword argument"),
        ({"network": "cnn"}, "network = cnn needs images"),
        ({"device": "abacus"}, "got 'abacus'"),
        ({"env": "FrozenLake-v1", "normalize_observations": True}, r"Discrete\(16\): there is nothing to normalize"),
        ({"env": "FrozenLake-v1", "env_kwargs": '{"map_name": "9x9"}'}, r"FrozenLake-v1: KeyError\('9x9'\)"),
        ({"vectorization": "vector_entry_point", "env": "Acrobot-v1"}, "vector entry point"),
    ],
)
def test_environments_that_cannot_be_made_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        ClassicTrainer(small(**options))


def test_an_observation_without_a_dimension_is_rejected():
    class Scalar(Diary):
        observation_space = spaces.Box(-10, 10, (), np.float32)

    with pytest.raises(UserError, match="observation space Box"):
        ClassicTrainer(small(), envs=SyncVectorEnv([Scalar]))


def test_same_step_with_gymnasium_1_0_is_rejected(monkeypatch):
    monkeypatch.delattr(gymnasium.vector, "AutoresetMode")
    with pytest.raises(UserError, match=r"same_step needs Gymnasium 1\.1"):
        ClassicTrainer(small(autoreset="same_step"))


def test_triton_without_a_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr("ppo_fast.kernels.common.launch.interpreting", lambda: False)
    with pytest.raises(UserError, match="backend='triton' needs"):
        ClassicTrainer(small(backend="triton"))


def test_disabled_autoreset_is_rejected():
    with pytest.raises(UserError, match="autoreset mode Disabled"):
        ClassicTrainer(small(), envs=diaries(AutoresetMode.DISABLED))


@pytest.mark.parametrize(
    "options",
    [
        {"shared": True, "env": "CartPole-v1"},
        {"hidden_layers": 0, "env": "CartPole-v1"},
        {"env": "FrozenLake-v1", "activation": "relu"},
        {"env": "Pendulum-v1", "entropy_coef": 0.01, "value_clip": 0.2, "clip_schedule": "linear"},
        {"env": "ppo_fast/Maze-v0", "network": "cnn"},
        {"env": "ppo_fast/Maze-v0", "network": "cnn", "shared": True},
        {"env": "CartPole-v1", "vectorization": "sync", "rollout_steps": 1, "num_envs": 1, "minibatches": 1},
    ],
)
def test_every_combination_of_network_and_environment_is_trained(options):
    trainer = ClassicTrainer(small(**{"total_steps": 200, **options}))
    before = trainer.adam.weights.clone()
    trainer.train()
    assert trainer.global_step >= 200
    assert torch.isfinite(trainer.adam.weights).all()
    assert not torch.equal(before, trainer.adam.weights)


@pytest.mark.parametrize("shape", [(12, 10, 3), (2, 12, 10)])
def test_images_have_their_channels_first(shape):
    trainer = ClassicTrainer(small(), envs=SyncVectorEnv([lambda: Stripes(shape)] * 3))
    assert trainer.observations.dtype == torch.uint8
    seen = []
    handle = trainer.network.policy_trunk[1].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    trainer.collect()
    handle.remove()
    assert seen[0].shape[1:] == (min(shape), 12, 10)
    assert seen[0].max() == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_continuous_policy_finds_its_target(mode):
    config = small(rollout_steps=32, num_envs=8, epochs=4, lr=1e-2, total_steps=6000, minibatches=4)
    trainer = ClassicTrainer(config, envs=SyncVectorEnv([Target] * 8, autoreset_mode=mode))
    trainer.train()
    assert abs(trainer.act(np.ones((1, 1), np.float32))[0, 0] - 0.7) < 0.1
    assert trainer.network.log_std.item() < -0.3


def test_cartpole_is_learned():
    """With the other settings of bench/against_sb3.py: seeds 0 to 5 all reach 500."""
    config = ClassicConfig(
        total_steps=40_000,
        rollout_steps=32,
        minibatches=1,
        epochs=15,
        lam=0.9,
        gamma=0.99,
        lr=3e-3,
        clip=0.1,
        max_grad_norm=2.0,
        entropy_coef=0.01,
        value_coef=2.0,
        eval_episodes=5,
        quiet=True,
    )
    assert ClassicTrainer(config).train()["eval_return"] > 400  # the maximum is 500; a random policy has 22


def test_two_runs_of_one_seed_have_the_same_bits():
    flats = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)
        trainer = ClassicTrainer(small(env="CartPole-v1", total_steps=300))
        trainer.train()
        flats.append(trainer.adam.weights)
    assert torch.equal(*flats)


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_pictures_of_an_episode_are_written(tmp_path, kind):
    from PIL import Image

    config = small(
        env="ppo_fast/Maze-v0",
        env_kwargs='{"size": 5, "max_steps": 6}',
        total_steps=50,
        eval_episodes=1,
        record=kind,
        out=str(tmp_path),
    )
    ClassicTrainer(config).train()
    path = tmp_path / "episode.gif" if kind == "gif" else tmp_path / "frames" / "0000.png"
    assert Image.open(path).size == (120, 120)
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.filterwarnings("ignore:.*not in the possible render_modes")
def test_an_environment_that_cannot_be_drawn_fails_before_the_training(tmp_path):
    config = small(
        env="ppo_fast/TextGeneration-v0", total_steps=50, eval_episodes=1, record="gif", out=str(tmp_path / "x")
    )
    trainer = ClassicTrainer(config)
    with pytest.raises(UserError, match="render_mode must be"):
        trainer.train()
    assert trainer.global_step == 0


def test_progress_is_printed_unless_quiet(capsys):
    ClassicTrainer(small(env="CartPole-v1", total_steps=100)).train()
    assert capsys.readouterr().out == ""
    ClassicTrainer(small(env="CartPole-v1", total_steps=100, quiet=False, eval_episodes=2)).train()
    out = capsys.readouterr().out
    assert re.search(r"1\d\d/100 steps .* entropy 0\.\d+", out)
    assert "2 episodes: mean return" in out


def test_command_line_and_dataclass_have_the_same_defaults():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = ClassicConfig()
    assert vars(parser.parse_args([])) == dataclasses.asdict(defaults)
    given = parser.parse_args(["--env", "Pendulum-v1", "--target-kl", "0.1", "--no-tensorboard", "--network", "mlp"])
    assert (given.env, given.target_kl, given.tensorboard, given.network) == ("Pendulum-v1", 0.1, False, "mlp")
    assert parser.parse_args(["--target-kl", "none"]).target_kl is None  # as the help prints it
    assert "Adam's learning rate (default: 0.00025; at least 0)" in " ".join(parser.format_help().split())


def test_every_core_detail_is_named_in_the_file():
    text = Path(algorithm.__file__).read_text(encoding="utf-8")
    assert {int(n) for n in re.findall(r"Detail (\d+)", text)} == set(range(1, 14))
