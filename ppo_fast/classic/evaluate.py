"""TODO docstring."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from ppo_fast.classic.envs.vector import OneOfVector, make_env, make_envs, write_frames
from ppo_fast.classic.envs.wrappers import Wrapper
from ppo_fast.common.errors import UserError

if TYPE_CHECKING:
    from ppo_fast.classic.ppo import ClassicTrainer


MOST_FRAMES = 500


def picture(env: gymnasium.Env) -> np.ndarray:
    """What `env` draws; UserError if that is no picture."""
    name = env.spec.id if env.spec else str(env)
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise UserError(f"{name} cannot be drawn: it has no render_mode rgb_array")
    try:
        drawn = env.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{name} cannot be drawn: {error}") from error
    frame = np.asarray(drawn)
    if frame.dtype != np.uint8 or frame.ndim != 3:
        what = "no picture" if drawn is None else f"{frame.dtype} {list(frame.shape)}"
        raise UserError(f"{name} cannot be drawn: render gives {what}, not uint8 [height, width, 3]")
    return frame


def check_alike(trainer: "ClassicTrainer", env: gymnasium.Env) -> None:
    """Refuses environments to evaluate in that are not those that the trainer was given."""
    ours = (trainer.envs.single_observation_space, trainer.envs.single_action_space)
    for mine, other in zip(ours, (env.observation_space, env.action_space), strict=True):
        if mine != other:
            raise UserError(
                f"the environment to evaluate in has {other} where the training has {mine}: pass eval_env, a function"
                " that makes one like those of the training, or set eval_episodes = 0"
            )


def evaluation_env(trainer: "ClassicTrainer", *, drawn: bool) -> gymnasium.Env:
    """One environment like those of the training, with their wrappers, and with their statistics, which stay as they
    are; it must be closed.

    Raises:
        UserError: it cannot be made from what the trainer was given.
    """
    more = {"render_mode": "rgb_array"} if drawn else {}
    if trainer.eval_env is not None:
        return trainer.eval_env()
    env = _one_like(trainer, more)
    try:
        _freeze_statistics(env, trainer.envs)
    except UserError:
        env.close()
        raise
    return env


def _one_like(trainer: "ClassicTrainer", more: dict[str, Any]) -> gymnasium.Env:
    """An environment as those of the training."""
    if trainer.own_envs:
        return _one_form(trainer.envs, trainer.config.env, trainer.env_kwargs, more, trainer.wrappers)
    layer: Any = trainer.envs
    while isinstance(layer, RecordEpisodeStatistics):  # changes nothing
        layer = layer.env
    if type(layer) in (SyncVectorEnv, AsyncVectorEnv):
        return layer.env_fns[0]()
    spec = layer.spec
    if layer is layer.unwrapped and spec is not None and spec.vector_entry_point is not None:  # of make_vec
        of_vectors = ("num_envs", "vectorization_mode", "vector_kwargs", "wrappers")
        return _one_form(layer, spec.id, {k: x for k, x in spec.kwargs.items() if k not in of_vectors}, more)
    raise UserError(
        f"one environment like those in {type(layer).__name__} cannot be made: pass eval_env, a function that makes one"
        " to evaluate in, with the same wrappers, or set eval_episodes = 0"
    )


def _one_form(
    envs: VectorEnv, name: str, arguments: dict[str, Any], more: dict[str, Any], wrappers: Sequence[Wrapper] = ()
) -> gymnasium.Env:
    """One environment, or the vector form of one, where that has the spaces of `envs` and the single form has not."""
    env = make_env(name, {**arguments, **more}, wrappers)
    base = envs.unwrapped
    alike = (env.observation_space, env.action_space) == (base.single_observation_space, base.single_action_space)
    if alike or type(base) in (SyncVectorEnv, AsyncVectorEnv):
        return env
    env.close()
    return OneOfVector(make_envs(name, arguments, count=1, vectorization="vector_entry_point"))


def _freeze_statistics(env: gymnasium.Env, envs: VectorEnv) -> None:
    """Gives wrappers that normalise by running statistics those of the training's first environment."""
    layers = [x for x in _layers(env) if hasattr(x, "update_running_mean")]
    if not layers:
        return
    base = envs.unwrapped
    if not isinstance(base, SyncVectorEnv):
        raise UserError(
            f"{type(layers[0]).__name__} has statistics that an evaluation cannot read from {type(base).__name__}: use"
            " normalize_observations and normalize_rewards instead of it, or pass eval_env, or set eval_episodes = 0"
        )
    theirs = [x for x in _layers(base.envs[0]) if hasattr(x, "update_running_mean")]
    for mine, other in zip(layers, theirs, strict=True):
        for name in ("obs_rms", "return_rms"):
            if hasattr(other, name):
                setattr(mine, name, copy.deepcopy(getattr(other, name)))
        mine.update_running_mean = False


def _layers(env: gymnasium.Env) -> list[Any]:
    """The environment and all that it is wrapped around."""
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def evaluate(trainer: "ClassicTrainer", episodes: int, *, record: str = "none") -> list[float]:
    """Returns of episodes with the likeliest actions; pictures of the first go to OUT/episode.gif or OUT/frames."""
    more, returns = record != "none", []
    env = evaluation_env(trainer, drawn=more)
    try:
        check_alike(trainer, env)
        if more:  # what cannot be drawn must fail at once
            env.reset(seed=0)
            picture(env)
        for episode in range(episodes):
            raw, _ = env.reset(seed=trainer.config.seed + 1_000_000 + episode)
            trainer.evaluated = episode
            total, frames = 0.0, [picture(env)] if more and episode == 0 else []
            for _ in range(trainer.config.eval_max_steps):
                raw, reward, terminated, truncated, _ = env.step(trainer.act(np.asarray(raw)[None])[0])
                total += float(reward)
                if frames and len(frames) < MOST_FRAMES:
                    frames.append(picture(env))
                if terminated or truncated or trainer.request.name is not None:
                    break
            else:
                message = f"evaluation episode {episode} is cut after {trainer.config.eval_max_steps} steps"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            returns.append(total)
            if trainer.request.name is not None:
                break
            if frames:
                write_frames(frames, Path(str(trainer.config.out)), record, fps=env.metadata.get("render_fps") or 30)
    finally:
        env.close()
    return returns
