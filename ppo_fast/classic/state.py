"""Checkpoints of a classic run: its state as nested dicts, and how they are laid out in OUT/checkpoints/step-N.

A checkpoint has model.safetensors (weights), adam.safetensors, run.safetensors (generator, observations, arrays),
spaces.safetensors, and state.json (options, counters, environments). Their names do not change when the code does.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError

State = dict[str, Any]  # nested, as that of torch.nn.Module

# Options that may differ between a run and its continuation
RESUMABLE_OPTIONS = {"out", "resume", "overwrite", "quiet", "save_every", "tensorboard", "total_steps", "threads"}
RESUMABLE_OPTIONS |= {"eval_episodes", "eval_max_steps", "record"}
# Names in a state, and in a checkpoint
ARRAYS = {"prev_done": "finished_before"}
ARRAYS |= {name: name for name in ("episode_return", "episode_length", "discounted_return")}
COUNTERS = {"global_step": "steps", "updates_done": "updates", "episodes": "episodes"}
RUNNING_STATISTICS = {"observation_rms": "observation_", "return_rms": "return_"}


def save(out: Path, config: ClassicConfig, state: State) -> Path:
    """Write a checkpoint, and keep the one before it.

    Args:
        out: the folder of the run.
        config: its options.
        state: what `state_dict` of the trainer returned.

    Returns:
        OUT/checkpoints/step-N, where N counts the steps of all environments.
    """
    arrays = {on_disk: state[name] for name, on_disk in ARRAYS.items()}
    for name, prefix in RUNNING_STATISTICS.items():
        arrays |= {prefix + part: x for part, x in state[name].items()}
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
        **{on_disk: state[name] for name, on_disk in COUNTERS.items()},
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
    state: State = {
        "policy": {"model": saved.tensors["model"]},
        "adam": {**saved.tensors["adam"], "steps": saved.state["adam_steps"]},
        "generator": run["generator"],
        "observations": run["observations"],
        "recent_returns": saved.state["recent"],
        "environments": saved.state["environments"],
    }
    state |= {name: run[on_disk].numpy() for name, on_disk in ARRAYS.items()}
    state |= {name: saved.state[on_disk] for name, on_disk in COUNTERS.items()}
    for name, prefix in RUNNING_STATISTICS.items():
        state[name] = {part: run[prefix + part].numpy() for part in ("mean", "var", "count")}
    return state


def _check_options(folder: Path, config: ClassicConfig, saved: dict[str, Any]) -> None:
    for option in dataclasses.fields(config):
        value, before = getattr(config, option.name), saved.get(option.name, option.default)
        before = tuple(before) if isinstance(before, list) else before
        if option.name not in RESUMABLE_OPTIONS and before != value:
            raise UserError(
                f"{folder} was made with {option.name} = {before}, not {value}: resume a run with its own options"
            )
