"""Gymnasium environments: how to make them, how they reset, their states in checkpoints, and their pictures."""

import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeGuard

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from ppo_fast.classic.envs.workers import defer_signals
from ppo_fast.classic.envs.wrappers import Wrapper, search_here
from ppo_fast.common.checkpoint import UNFINISHED, replace, reported, write_file
from ppo_fast.common.errors import UserError

Frame = npt.NDArray[np.uint8]  # RGB, [height, width, 3]
EnvironmentState = dict[str, object]  # JSON, as `get_state` of an environment returns it


class Stateful(Protocol):
    """An environment whose whole state can be saved and restored."""

    def get_state(self) -> EnvironmentState: ...
    def set_state(self, state: EnvironmentState) -> None: ...


def make_env(name: str, arguments: Mapping[str, object], wrappers: Sequence[Wrapper] = ()) -> gymnasium.Env:
    """Make one environment; a UserError names what is wrong with the name, the arguments or the wrappers."""
    make: Callable[..., gymnasium.Env] = gymnasium.make  # with arguments of the environment, of any types
    with _reported(name):
        env = make(name, **arguments)
        for wrapper in wrappers:
            env = wrapper(env)
        return env


def make_envs(
    name: str,
    arguments: Mapping[str, object],
    *,
    count: int,
    vectorization: str = "auto",
    autoreset: str = "next_step",
    wrappers: Sequence[Wrapper] = (),
) -> VectorEnv:
    """Make `count` environments that step together.

    With vectorization = auto they are the environment's own vector form if it has one and there are no wrappers, else
    environments that step one after the other.
    """
    more: dict[str, object] = {}
    if wrappers and vectorization == "auto":
        vectorization = "sync"
    if autoreset == "same_step":
        try:
            from gymnasium.vector import AutoresetMode
        except ImportError as error:
            raise UserError(f"autoreset = same_step needs Gymnasium 1.1, this is {gymnasium.__version__}") from error
        more["vector_kwargs"] = {"autoreset_mode": AutoresetMode.SAME_STEP}
        vectorization = "sync" if vectorization == "auto" else vectorization
    mode = None if vectorization == "auto" else vectorization
    if mode == "async":
        wrappers = [*wrappers, functools.partial(defer_signals, trainer=os.getpid())]
    if wrappers:
        more["wrappers"] = wrappers
    make: Callable[..., VectorEnv] = gymnasium.make_vec  # as in `make_env`
    with _reported(name):
        return make(name, **{**arguments, **more, "num_envs": count, "vectorization_mode": mode})


class OneOfVector(gymnasium.Env):
    """One environment in the vector form of its package, for packages whose single form differs."""

    def __init__(self, envs: VectorEnv) -> None:
        self.envs, self.metadata, self.spec = envs, {**envs.metadata, "render_modes": []}, envs.spec
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[object, dict[str, object]]:
        observations, _ = self.envs.reset(seed=seed, options=options)
        return observations[0], {}

    def step(self, action: npt.ArrayLike) -> tuple[object, float, bool, bool, dict[str, object]]:
        observations, rewards, terminated, truncated, _ = self.envs.step(np.asarray(action)[None])
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), {}

    def close(self) -> None:
        self.envs.close()


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Turn an error of making the environment `name` inside this block into a UserError."""
    if ":" in name:  # module:Name-v0
        search_here()
    try:
        yield
    except gymnasium.error.UnregisteredEnv as error:
        hint = "" if ":" in name else f" If another package has it, write PACKAGE:{name}"
        raise UserError(f"cannot make the environment {name}: {' '.join(str(error).split())}{hint}") from error
    except (gymnasium.error.Error, ImportError, OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot make the environment {name}: {' '.join(str(error).split())}") from error
    except (
        AssertionError,
        LookupError,
    ) as error:  # such as KeyError('9x9'), whose message is useless without its class
        raise UserError(f"cannot make the environment {name}: {error!r}") from error


def resets_in_same_step(envs: VectorEnv) -> bool:
    """Return True for SAME_STEP and False for NEXT_STEP.

    Raises:
        UserError: the environments do not declare how they reset, or declare another mode.
    """
    mode = _autoreset_mode(envs)
    if mode not in ("NextStep", "SameStep"):
        raise UserError(f"the environments have autoreset mode {mode}; PPO needs NextStep or SameStep")
    return mode == "SameStep"


def _autoreset_mode(envs: VectorEnv) -> str:
    """Return the mode of the outermost layer that declares one."""
    layer = envs
    while (mode := _declared(layer)) is None and isinstance(layer, VectorWrapper):
        layer = layer.env
    if mode is not None:
        return str(getattr(mode, "value", mode))  # a member of AutoresetMode, or its text
    # Gymnasium 1.0 has this mode only. make_vec warns, and Gymnasium's wrappers assume this mode, too
    gymnasiums = isinstance(layer, SyncVectorEnv | AsyncVectorEnv) or type(layer).__module__.startswith("gymnasium.")
    if layer.spec is not None or (gymnasiums and not hasattr(gymnasium.vector, "AutoresetMode")):
        return "NextStep"
    raise UserError(
        f'{type(layer).__name__} does not declare when it resets environments: set its metadata["autoreset_mode"] to'
        " gymnasium.vector.AutoresetMode.NEXT_STEP or SAME_STEP"
    )


def _declared(layer: VectorEnv) -> object:
    """Return the autoreset mode in a layer's own metadata, or None."""
    if type(layer) in (SyncVectorEnv, AsyncVectorEnv) and hasattr(layer, "autoreset_mode"):
        return layer.autoreset_mode  # in Gymnasium 1.1 all vectors of one class of environments share their metadata
    if isinstance(layer, VectorWrapper) and layer.metadata is layer.env.metadata:
        return None
    return layer.metadata.get("autoreset_mode")


def environment_states(envs: VectorEnv) -> list[EnvironmentState] | None:
    """Return the state of each environment, or None where it cannot be saved.

    It can be saved if each class declares that get_state and set_state cover all of it, by `ppo_fast_saves_state =
    True`, and no wrapper has a state of its own, as TimeLimit has.
    """
    base = envs.unwrapped
    if type(base) is not SyncVectorEnv or not all(_saves_state(env) for env in base.envs):
        return None
    return [_stateful(env).get_state() for env in base.envs]


def _stateful(env: gymnasium.Env) -> Stateful:
    if not _is_stateful(env.unwrapped):
        raise TypeError(f"{type(env.unwrapped).__name__} has ppo_fast_saves_state, but no get_state and set_state")
    return env.unwrapped


def _is_stateful(env: object) -> TypeGuard[Stateful]:
    """Check by hasattr: since Python 3.12 isinstance does not see what `__getattr__` finds."""
    return hasattr(env, "get_state") and hasattr(env, "set_state")


def _saves_state(env: gymnasium.Env) -> bool:
    while isinstance(env, OrderEnforcing | PassiveEnvChecker):  # gymnasium.make puts these around all
        env = env.env
    # of the class itself: a class derived from it may have more state
    return env is env.unwrapped and vars(type(env)).get("ppo_fast_saves_state") is True


def restore_environments(envs: VectorEnv, states: list[EnvironmentState], done: npt.NDArray[np.bool_]) -> None:
    """Restore the states of environments; `done` [N] marks those that the next step must reset."""
    base = envs.unwrapped
    assert isinstance(base, SyncVectorEnv)  # else `environment_states` has returned None
    for env, state in zip(base.envs, states, strict=True):
        _stateful(env).set_state(state)
    base._autoreset_envs = done.copy()


def write_frames(frames: list[Frame], folder: Path, kind: str, *, fps: float) -> Path:
    """Write RGB frames to an animated FOLDER/episode.gif, or to numbered PNG files in FOLDER/frames.

    Returns:
        The file or folder.
    """
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
