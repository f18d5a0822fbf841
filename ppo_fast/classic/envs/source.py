"""How the environments of a run are made: those to train in, and one more like them to evaluate in."""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import gymnasium
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.classic.envs.vector import OneOfVector, make_env, make_envs
from ppo_fast.classic.envs.workers import close
from ppo_fast.classic.envs.wrappers import Wrapper
from ppo_fast.classic.spaces import FLATTENABLE, observation_encoder
from ppo_fast.common.errors import UserError


@dataclass
class EnvironmentSource:
    """Makes environments from a name, arguments and wrappers.

    Args:
        name: Gymnasium's name.
        kwargs: arguments of the environment.
        wrappers: around each environment, the innermost first; `make_training_envs` adds FlattenObservation where it is
            needed.
        eval_env: makes an environment to evaluate in; None: one like those of the training.
    """

    name: str
    kwargs: dict[str, object]
    wrappers: list[Wrapper]
    eval_env: Callable[[], gymnasium.Env] | None = None

    def make_training_envs(self, config: ClassicConfig) -> VectorEnv:
        """Make the environments to train in; spaces of several parts are flattened."""
        envs = None
        if config.vectorization == "async":  # its shared memory supports fewer spaces than FlattenObservation
            with contextlib.closing(make_env(self.name, self.kwargs, self.wrappers)) as env:
                space = env.observation_space
        else:
            envs = self._make_envs(config)
            space = envs.single_observation_space
        if isinstance(space, FLATTENABLE):
            if envs is not None:
                close(envs)
                envs = None
            self.wrappers.append(FlattenObservation)
        else:
            observation_encoder(self.name, space)
        if envs is None:
            try:
                envs = self._make_envs(config)
            except NotImplementedError:  # a part of the space has a class of the package
                observation_encoder(self.name, space)
                raise
        return envs

    def _make_envs(self, config: ClassicConfig) -> VectorEnv:
        return make_envs(
            self.name,
            self.kwargs,
            count=config.num_envs,
            vectorization=config.vectorization,
            autoreset=config.autoreset,
            wrappers=self.wrappers,
        )

    def make_evaluation_env(self, envs: VectorEnv, *, made_here: bool, render: bool) -> gymnasium.Env:
        """Make one environment like those of the training; the caller must close it.

        It has their wrappers, and a copy of the statistics of normalizing wrappers, which are not updated.

        Args:
            envs: the environments of the training.
            made_here: `make_training_envs` made them.
            render: the environment must return pictures.

        Raises:
            UserError: it cannot be made, or has other spaces.
        """
        if self.eval_env is not None:
            env = self.eval_env()
        else:
            env = self._make_similar(envs, {"render_mode": "rgb_array"} if render else {}, made_here)
        try:
            if self.eval_env is None:
                _freeze_statistics(env, envs)
            _check_spaces(env, envs)
        except UserError:
            env.close()
            raise
        return env

    def _make_similar(self, envs: VectorEnv, render: Mapping[str, object], made_here: bool) -> gymnasium.Env:
        if made_here:
            return _make_single(envs, self.name, self.kwargs, render, self.wrappers)
        layer = envs
        while isinstance(layer, RecordEpisodeStatistics):  # changes no observation, action or reward
            layer = layer.env
        if isinstance(layer, SyncVectorEnv | AsyncVectorEnv) and type(layer) in (SyncVectorEnv, AsyncVectorEnv):
            return layer.env_fns[0]()
        spec = layer.spec
        if layer is layer.unwrapped and spec is not None and spec.vector_entry_point is not None:  # of make_vec
            of_vectors = ("num_envs", "vectorization_mode", "vector_kwargs", "wrappers")
            kwargs = {name: x for name, x in spec.kwargs.items() if name not in of_vectors}
            return _make_single(layer, spec.id, kwargs, render)
        raise UserError(
            f"one environment like those in {type(layer).__name__} cannot be made: pass eval_env, a function that makes"
            " one to evaluate in, with the same wrappers, or set eval_episodes = 0"
        )


def _make_single(
    envs: VectorEnv,
    name: str,
    kwargs: Mapping[str, object],
    render: Mapping[str, object],
    wrappers: Sequence[Wrapper] = (),
) -> gymnasium.Env:
    """Make one environment, or the vector form of one where only that has the spaces of `envs`."""
    env = make_env(name, {**kwargs, **render}, wrappers)
    base = envs.unwrapped
    alike = (env.observation_space, env.action_space) == (base.single_observation_space, base.single_action_space)
    if alike or type(base) in (SyncVectorEnv, AsyncVectorEnv):
        return env
    env.close()
    return OneOfVector(make_envs(name, kwargs, count=1, vectorization="vector_entry_point"))


def _check_spaces(env: gymnasium.Env, envs: VectorEnv) -> None:
    """Reject an environment to evaluate in whose spaces differ from those of the training."""
    pairs = (
        (envs.single_observation_space, env.observation_space),
        (envs.single_action_space, env.action_space),
    )
    for expected, actual in pairs:
        if expected != actual:
            raise UserError(
                f"the environment to evaluate in has {actual} where the training has {expected}: pass eval_env, a"
                " function that makes one like those of the training, or set eval_episodes = 0"
            )


@runtime_checkable
class Normalizing(Protocol):
    """A wrapper with running statistics, such as NormalizeObservation."""

    update_running_mean: bool


def _freeze_statistics(env: gymnasium.Env, envs: VectorEnv) -> None:
    """Copy running statistics of normalizing wrappers from the first environment of the training, and keep them."""
    layers = [x for x in _layers(env) if isinstance(x, Normalizing)]
    if not layers:
        return
    base = envs.unwrapped
    if not isinstance(base, SyncVectorEnv):
        raise UserError(
            f"{type(layers[0]).__name__} has statistics that an evaluation cannot read from {type(base).__name__}: use"
            " normalize_observations and normalize_rewards instead of it, or pass eval_env, or set eval_episodes = 0"
        )
    trained = [x for x in _layers(base.envs[0]) if isinstance(x, Normalizing)]
    for layer, source in zip(layers, trained, strict=True):
        for name in ("obs_rms", "return_rms"):
            if hasattr(source, name):
                setattr(layer, name, copy.deepcopy(getattr(source, name)))
        layer.update_running_mean = False


def _layers(env: gymnasium.Env) -> list[gymnasium.Env]:
    """Return an environment and all environments inside it, from the outermost to the innermost."""
    layers = [env]
    while isinstance(env, gymnasium.Wrapper):
        env = env.env
        layers.append(env)
    return layers
