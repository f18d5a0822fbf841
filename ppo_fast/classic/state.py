"""Checkpoints of a classic run: its state as nested dicts, and how they are laid out in OUT/checkpoints/step-N.

A checkpoint has model.safetensors (weights), adam.safetensors, run.safetensors (generator, observations, arrays),
spaces.safetensors, and state.json (options, counters, environments). Their names do not change when the code does.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.classic.envs.vector import EnvironmentState
from ppo_fast.classic.normalize import RunningState
from ppo_fast.classic.optimizer import AdamState
from ppo_fast.classic.policy import PolicyState, read_policy, read_statistics
from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError


class State(TypedDict):
    """Everything that the next update depends on: `PPO.state_dict`. Arrays are [N], of the open episodes."""

    policy: PolicyState
    adam: AdamState
    observation_rms: RunningState
    return_rms: RunningState
    generator: Tensor
    observations: Tensor
    prev_done: npt.NDArray[np.bool_]
    episode_return: npt.NDArray[np.float64]
    episode_length: npt.NDArray[np.int64]
    discounted_return: npt.NDArray[np.float64]
    global_step: int
    updates_done: int
    episodes: int
    recent_returns: list[float]
    environments: list[EnvironmentState] | None


# Options that may differ between a run and its continuation
RESUMABLE_OPTIONS = {"out", "resume", "overwrite", "quiet", "save_every", "tensorboard", "total_steps", "threads"}
RESUMABLE_OPTIONS |= {"eval_episodes", "eval_max_steps", "record"}
OBSERVATION, RETURN = "observation_", "return_"  # prefixes of the running statistics in a checkpoint


def save(out: Path, config: ClassicConfig, state: State) -> Path:
    """Write a checkpoint, and keep the one before it.

    Args:
        out: the folder of the run.
        config: its options.
        state: what `state_dict` of the trainer returned.

    Returns:
        OUT/checkpoints/step-N, where N counts the steps of all environments.
    """
    arrays: dict[str, npt.ArrayLike] = {
        "finished_before": state["prev_done"],
        "episode_return": state["episode_return"],
        "episode_length": state["episode_length"],
        "discounted_return": state["discounted_return"],
    }
    for prefix, statistics in ((OBSERVATION, state["observation_rms"]), (RETURN, state["return_rms"])):
        arrays |= {prefix + "mean": statistics["mean"], prefix + "var": statistics["var"]}
        arrays[prefix + "count"] = statistics["count"]
    policy, adam = state["policy"], state["adam"]
    tensors = {
        "model": policy["model"],
        "adam": {"mean": adam["mean"], "square": adam["square"]},
        "run": {
            "generator": state["generator"],
            "observations": state["observations"],
            **{name: torch.from_numpy(np.array(x)) for name, x in arrays.items()},
        },
        "spaces": policy["space_arrays"],
    }
    written = {
        "config": dataclasses.asdict(config),
        "recent": state["recent_returns"],
        "steps": state["global_step"],
        "updates": state["updates_done"],
        "episodes": state["episodes"],
        "adam_steps": adam["steps"],
        "environments": state["environments"],
        "spaces": policy["spaces"],
    }
    return checkpoint.write(out / "checkpoints", state["global_step"], tensors, written, keep=2)


def load(folder: Path, config: ClassicConfig) -> State:
    """Read a checkpoint that `save` wrote, for `load_state_dict` of the trainer.

    Raises:
        UserError: it is damaged, was not written by `save`, or its run has other options.
    """
    saved = checkpoint.read(folder)
    if "config" not in saved.state or "run" not in saved.tensors:
        raise UserError(f"{folder} is not a checkpoint of ppo-fast classic: choose another folder")
    _check_options(folder, config, saved.state["config"])
    run = saved.tensors["run"]
    adam = saved.tensors["adam"]
    return {
        "policy": read_policy(saved),
        "adam": {"mean": adam["mean"], "square": adam["square"], "steps": saved.state["adam_steps"]},
        "observation_rms": read_statistics(run, OBSERVATION),
        "return_rms": read_statistics(run, RETURN),
        "generator": run["generator"],
        "observations": run["observations"],
        "prev_done": run["finished_before"].numpy(),
        "episode_return": run["episode_return"].numpy(),
        "episode_length": run["episode_length"].numpy(),
        "discounted_return": run["discounted_return"].numpy(),
        "global_step": saved.state["steps"],
        "updates_done": saved.state["updates"],
        "episodes": saved.state["episodes"],
        "recent_returns": saved.state["recent"],
        "environments": saved.state["environments"],
    }


def _check_options(folder: Path, config: ClassicConfig, saved: Mapping[str, object]) -> None:
    for option in dataclasses.fields(config):
        value, before = getattr(config, option.name), saved.get(option.name, option.default)
        before = tuple(before) if isinstance(before, list) else before
        if option.name not in RESUMABLE_OPTIONS and before != value:
            raise UserError(
                f"{folder} was made with {option.name} = {before}, not {value}: resume a run with its own options"
            )
