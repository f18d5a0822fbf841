"""Around Gymnasium's environments: making them, telling how they reset, keeping their state, writing their pictures."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from ppo_fast.checkpoint import UNFINISHED, replace, reported, write_file
from ppo_fast.errors import UserError


def make_env(name: str, arguments: dict[str, Any]) -> gymnasium.Env:
    """One environment; UserError says what is wrong with the name or the arguments."""
    return _made(gymnasium.make, name, arguments)


def make_envs(
    name: str, arguments: dict[str, Any], *, count: int, vectorization: str = "auto", autoreset: str = "next_step"
) -> VectorEnv:
    """`count` environments that step together: the environment's own vector form if it has one, else one by one."""
    more: dict[str, Any] = {}
    if autoreset == "same_step":
        try:
            from gymnasium.vector import AutoresetMode
        except ImportError as error:
            raise UserError(f"autoreset = same_step needs Gymnasium 1.1, this is {gymnasium.__version__}") from error
        more["vector_kwargs"] = {"autoreset_mode": AutoresetMode.SAME_STEP}
        vectorization = "sync" if vectorization == "auto" else vectorization
    mode = None if vectorization == "auto" else vectorization
    return _made(gymnasium.make_vec, name, {**arguments, **more, "num_envs": count, "vectorization_mode": mode})


def parse_arguments(text: str) -> dict[str, Any]:
    """Arguments of an environment from JSON."""
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"env_kwargs is not JSON: {text}: {error}") from error
    if not isinstance(arguments, dict):
        raise UserError(f'env_kwargs must be a JSON object such as {{"size": 9}}, got {text}')
    return arguments


def _made(make: Callable[..., Any], name: str, arguments: dict[str, Any]) -> Any:
    try:
        return make(name, **arguments)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise UserError(f"cannot make the environment {name}: {' '.join(str(error).split())}") from error
    except (AssertionError, LookupError) as error:  # such as KeyError('9x9'), which says little without its name
        raise UserError(f"cannot make the environment {name}: {error!r}") from error


def resets_in_same_step(envs: VectorEnv) -> bool:
    """True for SAME_STEP, False for NEXT_STEP, which is all that Gymnasium 1.0 has."""
    mode = getattr(envs.metadata.get("autoreset_mode"), "value", "NextStep")
    if mode not in ("NextStep", "SameStep"):
        raise UserError(f"the environments have autoreset mode {mode}; PPO needs NextStep or SameStep")
    return mode == "SameStep"


def environment_states(envs: VectorEnv) -> list[dict[str, Any]] | None:
    """The state of each environment, where all have get_state and set_state, of what JSON holds, as ours do, and no
    wrapper that has a state of its own, as TimeLimit has; None for others."""
    base = envs.unwrapped
    if not isinstance(base, SyncVectorEnv) or not all(_keeps_state(env) for env in base.envs):
        return None
    states = [env.unwrapped.get_state() for env in base.envs]  # type: ignore[attr-defined]
    try:
        json.dumps(states)
    except TypeError:
        return None
    return states


def _keeps_state(env: gymnasium.Env) -> bool:
    while isinstance(env, OrderEnforcing | PassiveEnvChecker):  # gymnasium.make puts these around all
        env = env.env
    return env is env.unwrapped and hasattr(env, "get_state") and hasattr(env, "set_state")


def restore_environments(envs: VectorEnv, states: list[dict[str, Any]], finished: np.ndarray) -> None:
    """Puts environments back where they were; `finished` [N] are those that the next step shall reset."""
    base = envs.unwrapped
    assert isinstance(base, SyncVectorEnv)
    for env, state in zip(base.envs, states, strict=True):
        env.unwrapped.set_state(state)  # type: ignore[attr-defined]
    base._autoreset_envs = finished.copy()


def write_frames(frames: list[np.ndarray], folder: Path, kind: str, *, fps: float) -> Path:
    """RGB frames as an animated FOLDER/episode.gif, or as numbered PNG files in FOLDER/frames; the file or folder."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    new = folder / ("frames" + UNFINISHED)
    try:
        with reported(f"the frames could not be written to {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "gif":
                duration = max(20, round(1000 / fps))  # ms; viewers slow down what is quicker
                buffer = io.BytesIO()
                images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
                write_file(folder / "episode.gif", buffer.getvalue())
                return folder / "episode.gif"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            for number, image in enumerate(images):
                image.save(new / f"{number:04}.png")
            replace(new, folder / "frames")
    except UserError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return folder / "frames"
