"""Evaluation: episodes with the most likely actions, and pictures of the first one."""

import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.classic.envs.vector import Frame, write_frames
from ppo_fast.common.errors import UserError

MOST_FRAMES = 500
SEED_OFFSET = 1_000_000  # episodes of an evaluation start from other seeds than those of the training


def render_frame(env: gymnasium.Env) -> Frame:
    """Render a picture, uint8 [height, width, 3].

    Raises:
        UserError: the environment renders something else, or cannot render.
    """
    name = env.spec.id if env.spec else str(env)
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise UserError(f"{name} cannot be drawn: it has no render_mode rgb_array")
    try:
        rendered = env.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{name} cannot be drawn: {error}") from error
    frame = np.asarray(rendered)
    if frame.dtype != np.uint8 or frame.ndim != 3:
        what = "no picture" if rendered is None else f"{frame.dtype} {list(frame.shape)}"
        raise UserError(f"{name} cannot be drawn: render gives {what}, not uint8 [height, width, 3]")
    return frame


def evaluate(
    act: Callable[[np.ndarray], np.ndarray],
    env: gymnasium.Env,
    config: ClassicConfig,
    *,
    episodes: int,
    record: str = "none",
    should_stop: Callable[[], bool] = lambda: False,
    on_episode: Callable[[int], None] = lambda episode: None,
) -> list[float]:
    """Run episodes and return their returns.

    Args:
        act: from a batch of observations [B, ...] to actions.
        env: one environment, which the caller closes.
        config: of the run: seed, eval_max_steps, and out for pictures.
        episodes: how many; with 0 only the first picture is tried.
        record: gif or png: write pictures of the first episode to OUT/episode.gif or OUT/frames.
        should_stop: ends the evaluation after a step.
        on_episode: is called with the number of each episode before it starts.
    """
    returns: list[float] = []
    if record != "none":  # an environment that cannot be drawn must fail before the training
        env.reset(seed=0)
        render_frame(env)
    for episode in range(episodes):
        on_episode(episode)
        frames: list[Frame] | None = [] if record != "none" and episode == 0 else None
        returns.append(_run_episode(act, env, config, episode, frames, should_stop))
        if should_stop():
            break
        if frames:
            write_frames(frames, Path(str(config.out)), record, fps=env.metadata.get("render_fps") or 30)
    return returns


def _run_episode(
    act: Callable[[np.ndarray], np.ndarray],
    env: gymnasium.Env,
    config: ClassicConfig,
    episode: int,
    frames: list[Frame] | None,
    should_stop: Callable[[], bool],
) -> float:
    """Run one episode and return its return; pictures are appended to `frames`."""
    observation, _ = env.reset(seed=config.seed + SEED_OFFSET + episode)
    total = 0.0
    for _ in range(config.eval_max_steps):
        if frames is not None and len(frames) < MOST_FRAMES:
            frames.append(render_frame(env))
        observation, reward, terminated, truncated, _ = env.step(act(np.asarray(observation)[None])[0])
        total += float(reward)
        if terminated or truncated or should_stop():
            break
    else:
        message = f"evaluation episode {episode} is cut after {config.eval_max_steps} steps"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    if frames is not None and len(frames) < MOST_FRAMES:
        frames.append(render_frame(env))
    return total
