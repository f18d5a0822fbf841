"""Classic RL with environments of others: autoreset modes, spaces, wrappers, evaluation, states."""

import functools
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')

from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper  # noqa: E402
from gymnasium.wrappers import NormalizeObservation, RescaleAction, TimeLimit  # noqa: E402
from gymnasium.wrappers.vector import RecordEpisodeStatistics, RescaleObservation  # noqa: E402
from support.given import Given  # noqa: E402

from ppo_fast.classic import (  # noqa: E402
    ClassicConfig,
    ClassicTrainer,
)
from ppo_fast.classic.envs.maze import Maze  # noqa: E402
from ppo_fast.classic.envs.vector import environment_states, resets_in_same_step  # noqa: E402
from ppo_fast.classic.spaces import action_decoder, observation_encoder  # noqa: E402
from ppo_fast.common.errors import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]


class Vector(VectorEnv):
    """Two environments that count to 5 and reset in the step of the last reward."""

    def __init__(self, metadata):
        self.num_envs, self.t, self.metadata = 2, np.zeros(2, int), metadata
        self.single_observation_space = spaces.Box(-9, 9, (1,), np.float32)
        self.single_action_space = spaces.Discrete(4)
        self.observation_space = spaces.Box(-9, 9, (2, 1), np.float32)
        self.action_space = spaces.MultiDiscrete([4, 4])

    def reset(self, *, seed=None, options=None):
        self.t[:] = 0
        return self.t[:, None].astype(np.float32), {}

    def step(self, actions):
        self.t += 1
        over = self.t >= 5
        self.t[over] = 0
        return self.t[:, None].astype(np.float32), np.ones(2), over, np.zeros(2, bool), {}


def small(**options) -> ClassicConfig:
    defaults = dict(num_envs=2, rollout_steps=16, total_steps=64, hidden_size=8, minibatches=1, epochs=1, quiet=True)
    return ClassicConfig(**{**defaults, "eval_episodes": 0, **options})


def trainer_of(make, count=2, mode=AutoresetMode.NEXT_STEP, **options) -> ClassicTrainer:
    return ClassicTrainer(small(**options), envs=SyncVectorEnv([make] * count, autoreset_mode=mode))


@pytest.fixture
def register(monkeypatch):
    def add(name: str, entry_point, **more) -> str:
        spec = gymnasium.envs.registration.EnvSpec(id=name, entry_point=entry_point, **more)
        monkeypatch.setitem(gymnasium.registry, name, spec)
        return name

    return add


# Autoreset modes


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, "SameStep"])
def test_a_mode_is_read_from_a_member_or_its_text(mode):
    trainer = ClassicTrainer(small(rollout_steps=20), envs=Vector({"autoreset_mode": mode}))
    trainer.collect()
    assert trainer.same_step
    assert trainer.mask.all()
    assert {length for _, _, length in trainer.finished} == {5}
    following = AutoresetMode.NEXT_STEP if isinstance(mode, AutoresetMode) else "NextStep"
    assert not resets_in_same_step(Vector({"autoreset_mode": following}))


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, "Disabled", "samestep", "SAME_STEP", "", None, 3])
def test_other_modes_are_rejected(mode):
    with pytest.raises(
        UserError, match=f"autoreset mode {getattr(mode, 'value', mode)}; PPO needs|does not declare when"
    ):
        ClassicTrainer(small(), envs=Vector({"autoreset_mode": mode}))


def test_environments_that_declare_no_mode_are_rejected():
    with pytest.raises(UserError, match=r'Vector does not declare when it resets .* metadata\["autoreset_mode"\]'):
        ClassicTrainer(small(), envs=Vector({}))


def test_a_wrapper_with_metadata_of_its_own_has_the_mode_of_what_it_wraps():
    class Named(VectorWrapper):
        metadata = {"render_modes": []}  # noqa: RUF012

    class Converted(VectorWrapper):
        metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    same = SyncVectorEnv([Given], autoreset_mode=AutoresetMode.SAME_STEP)
    assert resets_in_same_step(Named(same))
    assert resets_in_same_step(VectorWrapper(Named(same)))
    assert not resets_in_same_step(VectorWrapper(Converted(same)))


def test_vectors_of_one_class_keep_their_own_modes():
    """As in Gymnasium 1.1, where both have the metadata of the class."""
    first, second = (SyncVectorEnv([Given], autoreset_mode=mode) for mode in ("NextStep", "SameStep"))
    first.metadata = second.metadata
    assert not resets_in_same_step(first)
    assert resets_in_same_step(second)
    assert not resets_in_same_step(RecordEpisodeStatistics(first))


@pytest.mark.filterwarnings("ignore:.*AutoresetMode")
def test_environments_from_make_vec_need_no_declared_mode(register):
    class Undeclared(Vector):
        def __init__(self, num_envs, render_mode=None):
            super().__init__({})

    name = register("Undeclared-v0", Given, vector_entry_point=Undeclared)
    assert not ClassicTrainer(small(env=name)).same_step


def test_gymnasium_1_0_resets_in_the_next_step(monkeypatch):
    envs = SyncVectorEnv([Given])
    envs.metadata = {}
    del envs.autoreset_mode
    monkeypatch.delattr(gymnasium.vector, "AutoresetMode")
    assert not resets_in_same_step(envs)


# Observations


def test_integers_are_divided_by_their_declared_size():
    box = spaces.Box(np.array([0, -4, 0, 0]), np.array([1, 2, 10, 0]), dtype=np.int16)
    code = observation_encoder("it", box)
    seen = code.encode(np.array([[1, -4, 5, 0]], np.int16), None)
    np.testing.assert_allclose(seen, [[1, -1, 0.5, 0]])
    assert observation_encoder("it", spaces.Box(0, 1, (8, 8, 27), np.uint8)).scale is None  # they are unchanged
    pixels = observation_encoder("it", spaces.Box(0, 255, (128,), np.uint8))
    assert pixels.encode(np.full((1, 128), 255, np.uint8), None).max() == 1
    unbounded = observation_encoder("it", spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64))
    assert unbounded.scale is None
    assert observation_encoder("it", spaces.Box(0, 255, (2,), np.float32)).scale is None


@pytest.mark.parametrize("network", ["cnn", "mlp"])
@pytest.mark.parametrize("high", [1, 255, "each"])
def test_the_input_of_a_network_is_from_zero_to_one(network, high):
    shape = (8, 6, 3)
    highs = (
        np.array([1, 10, 255], np.uint8) * np.ones(shape, np.uint8)
        if high == "each"
        else np.full(shape, high, np.uint8)
    )

    class Full(Given):
        def observe(self):
            return highs.copy()

    make = functools.partial(Full, spaces.Box(np.zeros(shape, np.uint8), highs, dtype=np.uint8))
    trainer, seen = trainer_of(make, network=network), []
    trunk = trainer.network.policy_trunk
    layer = trunk[0] if network == "cnn" else trunk
    forward = layer.forward
    layer.forward = lambda x, *tape: seen.append(x if network == "mlp" else forward(x)) or forward(x, *tape)
    trainer.collect()
    assert (trainer.observations.dtype == torch.uint8) == (network == "cnn")
    assert all(torch.allclose(x, torch.ones_like(x)) for x in seen[:5])


class Maps(Given):
    """One of two planes is on in a random cell; the plane is the right action. Episodes of 20 steps."""

    def __init__(self, high=1, render_mode=None):
        super().__init__(spaces.Box(0, high, (4, 4, 9), np.uint8), steps=20)
        self.high = high

    def observe(self):
        self.right, maps = int(self.np_random.integers(2)), np.zeros((4, 4, 9), np.uint8)
        maps[self.np_random.integers(4), self.np_random.integers(4), (3, 7)[self.right]] = self.high
        return maps

    def step(self, action):
        reward = float(action == self.right)
        observation, _, *rest = super().step(action)
        return observation, reward, *rest


def test_maps_of_zero_and_one_are_learned_from_like_those_of_255():
    """The same numbers reach the network, so that both runs have the same bits."""
    trained = []
    for high in (1, 255):
        options = dict(num_envs=8, rollout_steps=64, total_steps=5000, lr=1e-2, minibatches=4, epochs=4)
        trainer = ClassicTrainer(small(**options), envs=SyncVectorEnv([functools.partial(Maps, high=high)] * 8))
        trained.append(trainer.train()["return"])
    assert trained[0] > 14  # 10 is chance
    assert trained[1] == pytest.approx(trained[0], abs=2)


def test_one_hot_observations_take_memory_for_one_row_each():
    n = 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = observation_encoder("it", spaces.Discrete(n, start=-2))
    start = time.perf_counter()
    for _ in range(20):
        seen = code.encode(np.array([-2, n - 3]), None)
    assert time.perf_counter() - start < 2
    assert seen.shape == (2, n)
    assert seen[0, 0] == seen[1, n - 1] == 1
    assert seen.sum() == 2
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 300 * 2**20  # n x n: 1.6 GB


@pytest.mark.parametrize("value", [-3, 3])
def test_an_observation_outside_of_its_discrete_space_is_named(value):
    with pytest.raises(UserError, match=r"an observation is \[-?\d\], outside of its space, -2 to 2"):
        observation_encoder("it", spaces.Discrete(5, start=-2)).encode(np.array([value]), None)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Discrete(3)}),
        spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 9, (2, 2), np.uint8))),
        spaces.MultiBinary(4),
        spaces.MultiDiscrete([2, 3]),
    ],
)
@pytest.mark.parametrize("vectorization", ["auto", "async"])
def test_composite_observations_are_flattened(register, space, vectorization):
    name = register("Composite-v0", functools.partial(Given, space))
    trainer = ClassicTrainer(small(env=name, eval_episodes=1, vectorization=vectorization))
    assert trainer.observation_shape == spaces.flatten_space(space).shape
    assert trainer.train()["eval_returns"] == [5.0]


def test_a_space_that_cannot_be_flattened_is_named_with_what_to_do(register):
    name = register("Texts-v0", functools.partial(Given, spaces.Text(5)))
    with pytest.raises(UserError, match=r"observation space Text.*a wrapper that selects a part"):
        ClassicTrainer(small(env=name))

    class Mission(spaces.Space):
        """A space class of a package, as MiniGrid has."""

    space = spaces.Dict({"image": spaces.Box(0, 255, (2, 2, 3), np.uint8), "mission": Mission(None, None)})
    name = register("Mission-v0", functools.partial(Given, space))
    with pytest.raises(UserError, match=r"observation space Dict.*a wrapper that selects a part"):
        ClassicTrainer(small(env=name, vectorization="async"))  # Gymnasium has no shared memory for its observations


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_running_statistics_are_of_double_precision(dtype):
    class Far(Given):
        def observe(self):
            offset, spread = (0, 400) if dtype == np.float16 else (1e6, 1)
            return (self.np_random.normal(size=3) * spread + offset).astype(dtype)

    make = functools.partial(Far, spaces.Box(-np.inf, np.inf, (3,), dtype))
    trainer = trainer_of(make, count=8, rollout_steps=128, normalize_observations=True)
    trainer.collect()
    assert trainer.observation_rms.var.dtype == np.float64
    seen = trainer.observations[64:128][trainer.mask[64:]]
    assert seen.std().item() == pytest.approx(1, abs=0.05)  # 3000 numbers: four standard errors


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "action", [spaces.Discrete(2), spaces.Box(-1, 1, (2,), np.float32), spaces.Box(0, 3, (1,), int)]
)
def test_the_observation_after_a_termination_is_not_needed(normalize, action):
    class Lost(Given):
        def step(self, action):
            observation, reward, terminated, *rest = super().step(action)
            return np.full(3, np.nan, np.float32) if terminated else observation, reward, terminated, *rest

    trainer = trainer_of(functools.partial(Lost, action=action), normalize_observations=normalize)
    trainer.train()
    assert trainer.global_step >= 64
    assert np.isfinite(trainer.observation_rms.mean).all()
    assert torch.isfinite(trainer.observations).all()


def test_running_statistics_include_the_observations_that_are_acted_on():
    class Numbers(Given):
        def observe(self):
            return np.full(3, 1000.0 if self.t >= self.steps else self.t, np.float32)

    box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    found = []
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        steps = 24 if mode == AutoresetMode.NEXT_STEP else 20  # four episodes of 5, and the steps that only reset
        trainer = trainer_of(
            functools.partial(Numbers, box), mode=mode, rollout_steps=steps - 1, normalize_observations=True
        )
        trainer.collect()
        found.append(trainer.observation_rms)
    assert [float(x.mean[0]) for x in found] == pytest.approx([2.0, 2.0])
    assert [float(x.var[0]) for x in found] == pytest.approx([2.0, 2.0])


# Actions


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.uint64, np.float64])
def test_integer_actions_are_rounded_to_the_nearest_and_clipped(dtype):
    code = action_decoder("it", spaces.Box(0, 3, (1,), dtype))
    given = code.to_environment(np.array([[-0.4], [0.6], [1.9], [2.99], [7.0], [-9.0]], np.float32))
    assert given.dtype == dtype
    wanted = [0, 0.6, 1.9, 2.99, 3, 0] if dtype == np.float64 else [0, 1, 2, 3, 3, 0]
    np.testing.assert_allclose(given.ravel(), wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.int16])
def test_the_largest_integers_do_not_overflow(dtype):
    limits = np.iinfo(dtype)
    space = spaces.Box(limits.min, limits.max, (1,), dtype)
    given = action_decoder("it", space).to_environment(np.array([[-1e30], [0.0], [1e30]], np.float32))
    assert all(space.contains(x) for x in given)
    assert given[0, 0] <= limits.min * 0.999
    assert given[2, 0] >= limits.max * 0.999


@pytest.mark.parametrize(
    ("space", "wanted"),
    [
        (spaces.Box(100, 200, (1,), np.float32), [100, 150, 175]),
        (spaces.Box(10, 20, (1,), np.int64), [10, 15, 18]),  # 17.5 is rounded to the even one
        (spaces.Box(-20, -10, (1,), np.int64), [-20, -15, -12]),
        (spaces.Box(5, np.inf, (1,), np.float32), [5, 5, 5.5]),
        (spaces.Box(-np.inf, -5, (1,), np.float64), [-25, -5, -5]),
        (spaces.Box(-np.inf, 0, (1,), np.float32), [-20, 0, 0]),
        (spaces.Box(-2, 2, (1,), np.float32), [-2, 0, 0.5]),
        (spaces.Box(0, 1, (1,), np.float32), [0, 0, 0.5]),
        (spaces.Box(0, 20, (1,), np.float32), [0, 0, 0.5]),
        (spaces.Box(0, 512, (1,), np.float32), [0, 256, 384]),
        (spaces.Box(-100, 100, (1,), np.int32), [-100, 0, 50]),
    ],
)
def test_a_range_that_is_wide_or_without_zero_is_measured_from_its_middle_or_its_bound(space, wanted):
    given = action_decoder("it", space).to_environment(np.array([[-20.0], [0.0], [0.5]], np.float32))
    assert all(space.contains(x) for x in given)
    assert given.ravel().tolist() == wanted


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Box(-1, 1, (), np.float64),
        spaces.Box(0, 5, (2, 2), np.uint8),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.MultiDiscrete([3, 2], start=[-1, 5]),
        spaces.MultiBinary(3),
        spaces.MultiBinary([2, 2]),
        spaces.Discrete(3, start=-1),
    ],
)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_actions_of_any_shape_reach_the_environment(register, space, vectorization):
    name = register("Given-v0", functools.partial(Given, action=space))
    config = small(env=name, eval_episodes=1, vectorization=vectorization, entropy_coef=0.01, total_steps=96)
    trainer = ClassicTrainer(config)
    before = trainer.adam.weights.clone()
    assert trainer.train()["eval_returns"] == [5.0]  # Given checks that its space contains each action
    assert not torch.equal(before, trainer.adam.weights)
    if vectorization == "sync":
        given = np.array([env.unwrapped.actions for env in trainer.envs.envs])
        assert given.shape[2:] == space.shape
        assert given.min() < given.max()


def test_several_choices_have_the_log_probability_of_all_of_them():
    sizes = [2, 3, 4]
    trainer = trainer_of(functools.partial(Given, action=spaces.MultiDiscrete(sizes)))
    policy, actions = torch.randn(7, 9), torch.stack([torch.randint(n, (7,)) for n in sizes], -1)
    parts = [torch.distributions.Categorical(logits=x) for x in policy.split(sizes, -1)]
    logp, entropy = trainer.network.logprobs(policy, actions, with_entropy=True)
    torch.testing.assert_close(logp, sum(p.log_prob(a) for p, a in zip(parts, actions.unbind(-1), strict=True)))
    torch.testing.assert_close(entropy, sum(p.entropy() for p in parts))


def test_several_choices_are_learned():
    class Wanted(Given):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, float(action[0] == 1) + float(action[1] == 3), *rest

    options = dict(num_envs=8, rollout_steps=32, total_steps=6000, minibatches=4, epochs=4, lr=1e-2)
    trainer = trainer_of(functools.partial(Wanted, action=spaces.MultiDiscrete([2, 3], start=[0, 2])), 8, **options)
    trainer.train()
    assert trainer.act(np.zeros((1, 3), np.float32)).tolist() == [[1, 3]]


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Box(-1, 1, (0,), np.float32), spaces.Dict()])
def test_other_action_spaces_are_rejected(space):
    with pytest.raises(UserError, match="has the action space"):
        action_decoder("it", space)


def test_the_environment_gets_a_copy_of_the_actions():
    class Remaps(Vector):
        def step(self, actions):
            self.given.append(actions.copy())
            actions %= 2
            return super().step(actions)

    envs = Remaps({"autoreset_mode": "SameStep"})
    envs.given = []
    trainer = ClassicTrainer(small(), envs=envs)
    trainer.collect()
    assert np.array_equal(np.array(envs.given), trainer.actions.numpy())
    assert max(map(np.max, envs.given)) > 1


def test_a_last_observation_that_the_environment_changes_later_is_kept():
    class Reuses(Given):
        def __init__(self):
            super().__init__()
            self.buffer = np.zeros(3, np.float32)

        def observe(self):
            self.buffer[:] = self.t
            return self.buffer

        def step(self, action):
            observation, reward, terminated, *_ = super().step(action)
            return observation, reward, False, terminated, {}

    trainer = trainer_of(Reuses, mode=AutoresetMode.SAME_STEP)

    class Notes(VectorWrapper):
        def step(self, actions):
            *out, infos = self.env.step(actions)
            for i in np.flatnonzero(out[3]):  # SyncVectorEnv resets, and so changes the buffer, before it returns
                infos["final_obs"][i] = self.env.envs[i].buffer
                self.env.envs[i].buffer[:] = 5
            return *out, infos

    trainer.envs = Notes(trainer.envs)
    trainer.collect()
    assert [row.tolist() for *_, row in trainer.final_observations] == [[5.0] * 3] * 6


# Evaluation


def test_an_evaluation_has_the_wrappers_of_environments_from_python(monkeypatch):
    from gymnasium.envs.classic_control.pendulum import PendulumEnv

    torque, step = [], PendulumEnv.step
    monkeypatch.setattr(PendulumEnv, "step", lambda self, u: (torque.append(abs(float(u[0]))), step(self, u))[1])

    def make():
        return RescaleAction(gymnasium.make("Pendulum-v1"), np.float32(-1), np.float32(1))

    for vector in (SyncVectorEnv, lambda makers: RecordEpisodeStatistics(SyncVectorEnv(makers))):
        trainer = ClassicTrainer(small(env="CartPole-v1"), envs=vector([make] * 2))
        trainer.network.policy_head.biases[0].data.fill_(100.0)
        torque.clear()
        trainer.evaluate(1)
        assert max(torque) == 2.0  # without the wrapper the action 1 is a torque of 1


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_evaluation_has_the_wrappers_of_the_option(register, vectorization):
    name = register("Given-v0", functools.partial(Given, steps=50))
    wrapper = ("gymnasium.wrappers:TimeLimit(max_episode_steps=7)",)
    trainer = ClassicTrainer(small(env=name, eval_episodes=1, wrapper=wrapper, vectorization=vectorization))
    summary = trainer.train()
    assert summary["eval_returns"] == [7.0]
    assert summary["return"] == 7.0


def test_an_evaluation_has_the_wrappers_of_the_argument(register):
    name = register("Given-v0", functools.partial(Given, steps=50))
    trainer = ClassicTrainer(
        small(env=name, eval_episodes=1), wrappers=[functools.partial(TimeLimit, max_episode_steps=6)]
    )
    assert trainer.train()["eval_returns"] == [6.0]
    with pytest.raises(UserError, match="put them around those in envs"):
        ClassicTrainer(small(), wrappers=[TimeLimit], envs=SyncVectorEnv([Given]))


def test_an_evaluation_uses_the_environment_that_eval_env_makes():
    trainer = ClassicTrainer(
        small(eval_episodes=1),
        envs=Vector({"autoreset_mode": "SameStep"}),
        eval_env=lambda: Given(spaces.Box(-9, 9, (1,), np.float32), spaces.Discrete(4), steps=3),
    )
    assert trainer.train()["eval_returns"] == [3.0]


def wrapped(envs):
    return RescaleObservation(envs, np.float32(-1), np.float32(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Vector({"autoreset_mode": "SameStep"}),
        lambda: wrapped(SyncVectorEnv([functools.partial(Given, spaces.Box(0, 9, (2,), np.float32))])),
        lambda: AsyncVectorEnv([lambda: NormalizeObservation(Given())]),
    ],
)
def test_environments_that_cannot_be_made_again_for_the_evaluation_are_rejected_before_the_training(make):
    envs = make()
    trainer = ClassicTrainer(small(eval_episodes=1), envs=envs)
    with pytest.raises(UserError, match=r"pass eval_env.*eval_episodes = 0"):
        trainer.train()
    assert trainer.global_step == 0
    envs.close()


def test_environments_to_evaluate_in_with_other_bounds_are_rejected():
    trainer = ClassicTrainer(
        small(eval_episodes=1), envs=SyncVectorEnv([Given]), eval_env=lambda: Given(action=spaces.Discrete(3))
    )
    with pytest.raises(UserError, match=r"evaluate in has Discrete\(3\) where the training has Discrete\(2\)"):
        trainer.train()
    assert trainer.global_step == 0


def test_a_vector_form_from_make_vec_is_evaluated_in_one_of_its_kind():
    envs = gymnasium.make_vec("CartPole-v1", num_envs=3, max_episode_steps=4)
    trainer = ClassicTrainer(small(env="Pendulum-v1", total_steps=30), envs=envs)
    assert trainer.evaluate(2) == [4.0, 4.0]


def test_a_vector_form_with_other_spaces_is_evaluated_in_one_of_its_kind(register):
    """As in ALE: the single form has frames, the vector form has stacks of small frames."""

    class Stacked(Vector):
        def __init__(self, num_envs, render_mode=None):
            super().__init__({"autoreset_mode": AutoresetMode.SAME_STEP})
            self.num_envs, self.t = num_envs, np.zeros(num_envs, int)

        def step(self, actions):
            observations, _, over, _, _ = super().step(actions)
            return observations, np.ones(self.num_envs), over, np.zeros(self.num_envs, bool), {}

    name = register("Stacked-v0", Given, vector_entry_point=Stacked)
    assert ClassicTrainer(small(env=name, eval_episodes=2)).train()["eval_returns"] == [5.0, 5.0]
    envs = gymnasium.make_vec(name, num_envs=2)
    assert ClassicTrainer(small(eval_episodes=1), envs=envs).train()["eval_returns"] == [5.0]


def test_statistics_of_a_normalising_wrapper_are_those_of_the_training_and_stay():
    class Far(Given):
        def observe(self):
            return (100 + self.np_random.normal(size=3)).astype(np.float32)

    far = functools.partial(Far, spaces.Box(-np.inf, np.inf, (3,), np.float32))
    trainer = trainer_of(lambda: NormalizeObservation(far()), rollout_steps=200)
    trainer.collect()
    env = trainer.evaluation_env()
    raw = np.concatenate([env.reset(seed=9)[0][None], *[env.step(0)[0][None] for _ in range(4)]])
    assert abs(raw.mean()) < 1  # it is about 100 without normalization
    assert env.obs_rms.mean == pytest.approx(trainer.envs.envs[0].obs_rms.mean)
    assert env.obs_rms.count == trainer.envs.envs[0].obs_rms.count > 200
    assert env.obs_rms is not trainer.envs.envs[0].obs_rms


# States in checkpoints


class StateOfAnotherMeaning(Given):
    """get_state returns an observation; set_state restarts the clock."""

    def get_state(self):
        return [0.0, 0.0, 0.0]

    def set_state(self, state):
        self.t = 0


def test_get_state_and_set_state_of_others_are_not_called(register, tmp_path):
    name = register("State-v0", StateOfAnotherMeaning)
    options = dict(env=name, total_steps=256, save_every=1, out=str(tmp_path), tensorboard=False)
    assert ClassicTrainer(small(**options)).train()["return"] == 5.0
    assert environment_states(SyncVectorEnv([StateOfAnotherMeaning])) is None


def test_states_are_saved_of_classes_that_declare_it_themselves():
    class Deeper(Maze):
        """Has more state than a Maze; the inherited declaration does not apply to it."""

    assert environment_states(gymnasium.make_vec("ppo_fast/Maze-v0", num_envs=2)) is not None
    assert environment_states(SyncVectorEnv([Deeper])) is None
    assert environment_states(SyncVectorEnv([lambda: TimeLimit(Maze(), 5)])) is None


class OfSimulator(Given):
    """Passes on what it lacks, get_state and set_state among it, to an object of its own."""

    ppo_fast_saves_state = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.simulator = Maze()

    def __getattr__(self, name):
        return getattr(self.__dict__["simulator"], name)


def test_states_are_saved_of_environments_that_pass_on_the_methods():
    envs = SyncVectorEnv([OfSimulator])
    envs.reset(seed=0)
    envs.envs[0].simulator.reset(seed=0)
    state = environment_states(envs)[0]
    assert state == envs.envs[0].simulator.get_state()


# Names


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_modules_in_the_current_folder_are_found_by_the_installed_command(tmp_path, vectorization):
    code = """
    import gymnasium, numpy as np
    from gymnasium import spaces
    class Here(gymnasium.Env):
        metadata = {"render_modes": []}
        observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)
        def __init__(self, render_mode=None): pass
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(3, np.float32), {}
        def step(self, action): return np.zeros(3, np.float32), 1.0, True, False, {}
    class Twice(gymnasium.RewardWrapper):
        def reward(self, reward): return 2 * reward
    gymnasium.register(id="here/Here-v0", entry_point=Here)
    """
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_envs.py").write_text("\n".join(line[4:] for line in code.split("\n")))
    start = "import sys; from ppo_fast.cli.commands import main; sys.exit(main())"
    # -P, as in an installed command: the current folder is not searched
    command = [sys.executable, "-P", "-W", "ignore", "-c", start, "classic", "--env", "my_envs:here/Here-v0"]
    command += ["--wrapper", "my_envs:Twice", "--total-steps", "64", "--num-envs", "2", "--rollout-steps", "16"]
    command += ["--vectorization", vectorization, "--eval-episodes", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path / "mine", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean return 2," in done.stdout


def test_an_unknown_environment_may_belong_to_a_package():
    with pytest.raises(UserError, match=r"doesn't exist\. If another package has it, write PACKAGE:MiniGrid-Empty"):
        ClassicTrainer(small(env="MiniGrid-Empty-5x5-v0"))


def test_a_library_that_an_environment_lacks_is_one_sentence(register):
    def broken(**given):
        raise OSError("libmujoco.so: cannot open shared object file")

    with pytest.raises(UserError, match=r"cannot make the environment Broken-v0: libmujoco\.so: cannot open"):
        ClassicTrainer(small(env=register("Broken-v0", broken)))


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("TimeLimit", "wrapper must be MODULE:NAME"),
        ("no_such_module:TimeLimit", "cannot import the wrapper"),
        ("gymnasium.wrappers:NoLimit", "gymnasium.wrappers has no wrapper 'NoLimit'"),
        ("gymnasium.wrappers:TimeLimit(7)", "arguments must be given by name"),
        ("gymnasium.wrappers:TimeLimit(max_episode_steps=x)", "each value a literal"),
        ("gymnasium.wrappers:TimeLimit(most=3)", "unexpected keyword argument 'most'"),
        ("gymnasium.wrappers:RescaleAction(min_action=0, max_action=1)", "cannot make the environment CartPole-v1"),
    ],
)
def test_a_wrapper_that_cannot_be_used_is_named(wrapper, message):
    with pytest.raises(UserError, match=message):
        ClassicTrainer(small(env="CartPole-v1", wrapper=(wrapper,)))
