"""What a run of classic.py leaves behind and takes up again: its checkpoints; and how good its policy is."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ppo_fast.classic.envs.vector import environment_states, restore_environments
from ppo_fast.classic.policy import spaces_state
from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError

if TYPE_CHECKING:
    from ppo_fast.classic.ppo import ClassicTrainer

RUNNING = ("episode_return", "episode_length", "discounted_return")  # arrays [N] of a trainer
# Options that may differ between a run and its continuation
FREE = {"out", "resume", "overwrite", "quiet", "save_every", "tensorboard", "total_steps", "threads"}
FREE |= {"eval_episodes", "eval_max_steps", "record"}


def save(trainer: "ClassicTrainer", *, whole: bool = True) -> Path | None:
    """OUT/checkpoints/step-N, N steps of single environments: all that the run is; nothing without an OUT.

    `whole` is False in the middle of a rollout: the environments then start anew.
    """
    c = trainer.config
    if c.out is None:
        return None
    moments = {"observation": trainer.observation_moments, "return": trainer.return_moments}
    arrays = {f"{k}_{name}": np.asarray(getattr(m, name)) for k, m in moments.items() for name in vars(m)}
    arrays |= {name: getattr(trainer, name) for name in ("finished_before", *RUNNING)}
    tensors = {
        "model": {name: x.clone() for name, x in trainer.network.state_dict().items()},
        "adam": {"mean": trainer.adam.mean, "square": trainer.adam.square},
        "run": {
            "generator": trainer.generator.get_state(),
            "observations": trainer.observations[-1].clone(),
            **{name: torch.from_numpy(np.array(x)) for name, x in arrays.items()},
        },
    }
    counts = {"steps": trainer.steps_done, "updates": trainer.updates_done, "episodes": trainer.episodes}
    counts["adam_steps"] = trainer.adam.steps
    state = {"config": dataclasses.asdict(c), "recent": list(trainer.recent), **counts}
    state["environments"] = environment_states(trainer.envs) if whole else None
    state["spaces"], tensors["spaces"] = spaces_state(trainer.policy)
    return checkpoint.write(Path(c.out) / "checkpoints", trainer.steps_done, tensors, state, keep=2)


def load(trainer: "ClassicTrainer", folder: Path) -> None:
    """Continues from a checkpoint that `save` wrote."""
    saved = checkpoint.read(folder)
    if "config" not in saved.state or "run" not in saved.tensors:
        raise UserError(f"{folder} is not a checkpoint of ppo-fast classic: choose another folder")
    config, run = saved.state["config"], saved.tensors["run"]
    for option in dataclasses.fields(trainer.config):
        value, before = getattr(trainer.config, option.name), config.get(option.name, option.default)
        before = tuple(before) if isinstance(before, list) else before
        if option.name not in FREE and before != value:
            raise UserError(
                f"{folder} was made with {option.name} = {before}, not {value}: a run is continued with its own options"
            )
    trainer.network.load_state_dict(saved.tensors["model"])
    for name, x in saved.tensors["adam"].items():
        getattr(trainer.adam, name).copy_(x)
    trainer.adam.steps = saved.state["adam_steps"]
    trainer.generator.set_state(run["generator"])
    trainer.observations[-1] = run["observations"]
    for name in ("finished_before", *RUNNING):
        setattr(trainer, name, run[name].numpy())
    for kind, moments in (("observation", trainer.observation_moments), ("return", trainer.return_moments)):
        for name in vars(moments):
            setattr(moments, name, run[f"{kind}_{name}"].numpy())
    trainer.steps_done, trainer.updates_done = saved.state["steps"], saved.state["updates"]
    trainer.episodes = saved.state["episodes"]
    trainer.recent.extend(saved.state["recent"])
    restart_environments(trainer, saved.state["environments"])


def restart_environments(trainer: "ClassicTrainer", states: list[dict[str, Any]] | None) -> None:
    """After a checkpoint, in the run that wrote it and in the one that reads it: environments that can be put back
    where they were stay there; others start anew, from a seed of this moment, so that both runs see the same."""
    if states is None:
        trainer.start_environments(trainer.config.seed + 1_000_003 * trainer.updates_done)
    else:
        restore_environments(trainer.envs, states, trainer.finished_before)
