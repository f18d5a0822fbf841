"""The state of a run in a checkpoint: all that the next step depends on, and what identifies the run.

A checkpoint has three safetensors files (weights, optimizers, random) and one state.json. The parts of a run offer
`state_dict` and `load_state_dict`; here they are written under their names in the files, and read again after a check
that the checkpoint belongs to the same run.
"""

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import transformers
from torch import Tensor, nn

from ppo_fast.common.checkpoint import Checkpoint
from ppo_fast.common.device import derived_seed
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig, options_of
from ppo_fast.llm.distributed import Distributed
from ppo_fast.llm.optimizer import Optimizers, rate_of_step
from ppo_fast.llm.random_state import RandomState
from ppo_fast.llm.sharding import copy_from_full, gather_to_main, reshard

# What may change between a run and its continuation: none of it reaches the numbers, or a note reports it
RESUMABLE_OPTIONS = {"out", "quiet", "tensorboard", "show_samples_every", "save_every", "keep_checkpoints", "threads"}
RESUMABLE_OPTIONS |= {
    "dump_rollouts",
    "merge_adapters",
    "save_dtype",
    "eval_every",
    "eval_samples",
    "device",
    "parallel",
}
RESUMABLE_OPTIONS |= {"check_memory", "max_sampler_gap", "process_timeout", "gather_for_sampling"}
# What each checkpoint has: in state.json, and as files
PARTS = {"step", "run", "made_with", "kl_coef", "dealt", "random"}
FILES = {"weights", "optimizers", "random"}
# What runs had before there was such an option, where that is not its default; and before there were such buffers
BEFORE_OPTION: dict[str, object] = {"normalize_values": False}
BEFORE_BUFFER = {"critic.value_mean": 0.0, "critic.value_std": 1.0}
SCHEDULED = ("total_steps", "lr_schedule", "warmup_ratio")  # what the learning rate of a step depends on
# What an error of a run may advise to change: a note names it
ADVISED = {"lr", "critic_lr", "max_grad_norm"}
# What a user may change on purpose between a run and its continuation, with allow_changes
CHANGEABLE = {
    "prompts": "list of prompts",
    "tokenizer": "tokenizer, chat template or list of end tokens",
    "rewards and their weights": "set of rewards and weights",
    "code of the rewards": "code of the rewards",
}


class Stateful(Protocol):
    """A part of a run whose state is a few numbers: a controller, the position in the prompts."""

    def state_dict(self) -> Mapping[str, float]:
        """The state, by names that no other part uses."""
        ...

    def load_state_dict(self, state: Mapping[str, float], /) -> None:
        """Take over the state; other parts have other names in the same mapping."""
        ...


@dataclass(frozen=True)
class RunState:
    """The parts of a run that a checkpoint holds.

    Args:
        config: the options.
        policy: the weights.
        optimizers: their moments.
        stateful: what goes into state.json.
        generator: of the order within minibatches.
        distributed: the processes of the run.
        fingerprint: what identifies the run, see `run_fingerprint`.
        environment: what may change its last bits, see `environment_info`.
    """

    config: PPOConfig
    policy: nn.Module
    optimizers: Optimizers
    stateful: Sequence[Stateful]
    generator: torch.Generator
    distributed: Distributed
    fingerprint: dict[str, object]
    environment: dict[str, object]


Tensors = dict[str, dict[str, Tensor]]  # by file


def capture(run: RunState, random: RandomState) -> tuple[Tensors, dict[str, object]]:
    """Tensors by file, and everything else as JSON: weights, optimizers, schedules, random states, data position.

    Collective: each process takes part, and only the main one has the tensors, whole and on the CPU.
    """
    moments: dict[str, Tensor] = {}
    for name, optimizer in {"actor": run.optimizers.actor, "critic": run.optimizers.critic}.items():
        moments |= {f"{name}/{name}.{key}": x for key, x in optimizer.state_dict().items()}
    tensors = {"order": run.generator.get_state()}
    states = run.distributed.all_gather_object(random)
    for rank, its in enumerate(states):
        tensors |= {f"{name}-of-{rank}": x for name, x in its.tensors.items()}
    state: dict[str, object] = {"run": run.fingerprint, "made_with": run.environment}
    for part in run.stateful:
        state |= part.state_dict()
    state["random"] = [its.others for its in states]
    weights = gather_to_main((name, x.detach()) for name, x in trainable_state(run.policy))
    return {"weights": weights, "optimizers": moments, "random": tensors}, state


def restore(run: RunState, checkpoint: Checkpoint, *, allow_changes: bool = False) -> list[str]:
    """Put a new run in the state of a checkpoint and return notes for the user. Collective.

    With `allow_changes` the run continues with other prompts, rewards or another tokenizer, which a note names.

    Raises:
        UserError: the checkpoint belongs to another run; the message names the difference.
    """
    state = checkpoint.state
    lacking = sorted(PARTS - state.keys()) + sorted(FILES - checkpoint.tensors.keys())
    if lacking:
        raise UserError(
            f"{checkpoint.folder} was changed, or is that of a run of another kind: it has no {lacking[0]}; continue"
            " from another checkpoint"
        )
    _check_same_run(run, checkpoint, allow_changes)
    older = {name: torch.tensor(x) for name, x in BEFORE_BUFFER.items()}
    _load(dict(trainable_state(run.policy)), {**older, **checkpoint.tensors["weights"]}, checkpoint)
    for name, optimizer in {"actor": run.optimizers.actor, "critic": run.optimizers.critic}.items():
        prefix, saved = f"{name}/{name}.", checkpoint.tensors["optimizers"]
        optimizer.load_state_dict({k.removeprefix(prefix): x for k, x in saved.items() if k.startswith(prefix)})
    for part in run.stateful:
        part.load_state_dict(state)
    run.generator.set_state(checkpoint.tensors["random"]["order"])
    _restore_random(run, checkpoint)
    return _notes(run, checkpoint)


def trainable_state(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that training changes. Frozen weights come from the start model, again."""
    reshard(policy)
    kept = policy.state_dict(keep_vars=True).keys()
    yield from ((name, p) for name, p in policy.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in policy.named_buffers() if name in kept)


def run_fingerprint(
    config: PPOConfig,
    *,
    start_model: str,
    prompts: str,
    tokenizer: str,
    reward_weights: dict[str, float],
    reward_code: dict[str, str],
) -> dict[str, object]:
    """What makes two runs the same run: the options, and hashes of all else that its numbers depend on."""
    return {
        "config": options_as_json(config),
        "start model": start_model,
        "prompts": prompts,
        "tokenizer": tokenizer,
        "rewards and their weights": reward_weights,
        "code of the rewards": reward_code,
    }


def environment_info(distributed: Distributed, chunk_bytes: int | None) -> dict[str, object]:
    """What may change the last bits of a run, and does not prevent its continuation."""
    return {
        "processes": distributed.size,
        "threads": torch.get_num_threads(),
        "device": distributed.device.type,
        "chunk_bytes": chunk_bytes,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def options_as_json(config: PPOConfig) -> dict[str, object]:
    """The options as JSON has them: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _differ(here: Mapping[str, object], there: Mapping[str, object], name: str) -> bool:
    return name in there and here[name] != there[name]  # an older checkpoint may lack it


def _check_same_run(run: RunState, checkpoint: Checkpoint, allow_changes: bool) -> None:
    here, there = run.fingerprint, checkpoint.state["run"]
    # an option that is newer than the checkpoint had its default
    options, saved = options_as_json(run.config), {**options_as_json(PPOConfig()), **BEFORE_OPTION, **there["config"]}
    free = RESUMABLE_OPTIONS | ({"total_steps"} if _same_rates(run.config, saved) else set())
    changed = [name for name in options if name not in free | ADVISED and options[name] != saved[name]]
    if changed:
        named = ", ".join(f"{name} was {saved[name]} and is {options[name]}" for name in changed)
        measured = " (dtype = auto may choose another one here)" if "dtype" in changed else ""
        newer = [name for name in changed if name in BEFORE_OPTION and name not in there["config"]]
        if newer:
            raise UserError(
                f"{checkpoint.folder} is of a ppo_fast without {newer[0]}: continue with {newer[0]} ="
                f" {saved[newer[0]]} (on the command line --no-{newer[0].replace('_', '-')})"
            )
        raise UserError(
            f"{checkpoint.folder} belongs to a run with other options: {named}{measured}; take those of its config.yaml"
        )
    if run.config.total_steps < checkpoint.state["step"]:
        raise UserError(
            f"{checkpoint.folder} is beyond total_steps = {run.config.total_steps}: there is nothing to continue with"
        )
    if _differ(here, there, "start model"):
        raise UserError(f"{checkpoint.folder} belongs to another run: its start model differs from the one given")
    for name, what in CHANGEABLE.items():
        if not allow_changes and _differ(here, there, name):
            values = f" ({there[name]} there, {here[name]} here)" if name.startswith("rewards") else ""
            raise UserError(
                f"{checkpoint.folder} belongs to another run: its {what} differs{values}; to continue with what is"
                " here, use --allow-changes (in Python resume(allow_changes=True))"
            )


def _same_rates(config: PPOConfig, saved: Mapping[str, object]) -> bool:
    """Whether the learning rates of all steps of the shorter run are those of the longer one, too."""
    runs = [config, options_of({name: saved[name] for name in SCHEDULED})]
    firsts, steps = {0, config.critic_warmup_steps}, min(run.total_steps for run in runs)
    return all(
        len({rate_of_step(run, step, first=first) for run in runs}) == 1
        for first in firsts
        for step in range(first, steps)
    )


def _load(targets: dict[str, Tensor], saved: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    odd = sorted(targets.keys() ^ saved.keys())
    odd += [name for name in targets.keys() & saved.keys() if targets[name].shape != saved[name].shape]
    if odd:
        raise UserError(
            f"{checkpoint.folder} belongs to another model: {odd[0]} is missing, or of another shape, on one side"
        )
    with torch.no_grad():
        for name, target in targets.items():
            copy_from_full(target, saved[name])


def _restore_random(run: RunState, checkpoint: Checkpoint) -> None:
    """Restore this rank's generators; with another number of processes, seed them as no earlier step did."""
    rank, state = run.distributed.rank, checkpoint.state
    if run.environment["processes"] != state["made_with"]["processes"]:
        transformers.set_seed(derived_seed(run.config.seed, rank, state["step"]))
        return
    suffix = f"-of-{rank}"
    saved = checkpoint.tensors["random"].items()
    tensors = {name.removesuffix(suffix): x for name, x in saved if name.endswith(suffix)}
    RandomState(tensors, state["random"][rank]).restore(run.distributed.device)


def _notes(run: RunState, checkpoint: Checkpoint) -> list[str]:
    """What differs between the run of the checkpoint and this one, in sentences."""
    here, there = run.fingerprint, checkpoint.state["run"]
    options, saved = options_as_json(run.config), there["config"]
    others = [what for name, what in CHANGEABLE.items() if _differ(here, there, name)]
    changed = [name for name in sorted(ADVISED) if name in saved and options[name] != saved[name]]
    before = checkpoint.state["made_with"]
    return [
        *(
            f"{name} was {saved[name]}, an option that this ppo_fast does not have"
            for name in sorted(saved.keys() - options.keys())
        ),
        *(f"from here on the {name} is another one than that of {checkpoint.folder}" for name in others),
        *(f"{name} was {saved[name]} and is {options[name]} from here on" for name in changed),
        *(
            f"{name} was {before.get(name)} and is {value} now: the run continues, but not bit for bit as it would have"
            for name, value in run.environment.items()
            if before.get(name) != value
        ),
    ]
