"""What a checkpoint holds of a run: all that the next step depends on, and what shows that it is the same run."""

import dataclasses
import hashlib
import json
import platform
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ppo_fast.checkpoint import Checkpoint
from ppo_fast.config import PPOConfig
from ppo_fast.device import get_rng_state, set_rng_state
from ppo_fast.errors import UserError
from ppo_fast.learn import Optimizer
from ppo_fast.parallel import copy_full, full, like

if TYPE_CHECKING:
    from ppo_fast.trainer import PPOTrainer

# What may change between a run and its continuation: none of it reaches the numbers, or a note says so
FREE = {"out", "quiet", "tensorboard", "show_samples_every", "save_every", "keep_checkpoints", "merge_adapters"}
FREE |= {"eval_every", "eval_samples", "device", "parallel", "check_memory", "save_dtype"}


def capture(trainer: "PPOTrainer") -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file, and everything else as JSON: weights, optimizers, schedules, random states, data position.

    Collective: each process takes part, and the first has it all. Tensors are whole, whoever holds them.
    """
    optimizers = {"actor": trainer.actor_optimizer, "critic": trainer.critic_optimizer}
    names = {x: name for name, x in learned(trainer.policy)}
    moments = {
        f"{which}/{names[p]}/{key}": full(value)
        for which, optimizer in optimizers.items()
        for p in optimizer.parameters
        for key, value in optimizer.adamw.state.get(p, {}).items()
    }
    randoms = {"order": trainer.generator.get_state()}
    states = trainer.world.gather(random_state(trainer.device))
    for rank, (tensors, _) in enumerate(states):
        randoms |= {f"{name}-of-{rank}": x for name, x in tensors.items()}
    state = {
        "run": identity(trainer),
        "made_with": made_with(trainer),
        "kl_coef": trainer.kl_controller.coef,
        "entropy_coef": trainer.entropy_controller.coef,
        "dealt": trainer.prompts.dealt,
        "updates": {which: optimizer.schedule.last_epoch for which, optimizer in optimizers.items()},
        "random": [words for _, words in states],
    }
    weights = {name: full(x.detach()) for name, x in learned(trainer.policy)}
    return {"weights": weights, "optimizers": moments, "random": randoms}, state


def random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's generators: torch's as tensors, also that of `device`; Python's and numpy's as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    state = get_rng_state(device)
    if state is not None:
        tensors[device.type] = state
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def restore(trainer: "PPOTrainer", checkpoint: Checkpoint) -> list[str]:
    """Puts a new trainer in the state of a checkpoint; what people should know of it, in sentences. Collective.

    Raises:
        UserError: it is another run's: the message says in what it differs.
    """
    state = checkpoint.state
    _refuse_another_run(identity(trainer), state["run"], checkpoint)
    _load(dict(learned(trainer.policy)), checkpoint.tensors["weights"], checkpoint)
    parameters = dict(trainer.policy.named_parameters())
    for which, optimizer in (("actor", trainer.actor_optimizer), ("critic", trainer.critic_optimizer)):
        _restore_moments(optimizer, parameters, checkpoint.tensors["optimizers"], which)
        _restore_schedule(optimizer, state["updates"][which])
    trainer.kl_controller.coef = state["kl_coef"]
    trainer.entropy_controller.coef = state.get("entropy_coef", trainer.config.entropy_coef)  # older ones have none
    trainer.prompts.dealt = state["dealt"]
    trainer.steps_done = state["step"]
    trainer.generator.set_state(checkpoint.tensors["random"]["order"])
    here, there = made_with(trainer), state["made_with"]
    if here["processes"] == there["processes"]:
        _restore_random(checkpoint, trainer.world.rank, trainer.device)
    else:  # no state belongs to this process: new ones, which no earlier step has used
        transformers.set_seed((trainer.config.seed + 1_000_003 * trainer.steps_done + trainer.world.rank) % 2**32)
    return _differences(here, there)


def learned(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that training changes. Frozen weights come from the start model, again."""
    if isinstance(policy, FSDPModule):
        policy.reshard()  # a pass without a backward leaves its weights gathered
    kept = policy.state_dict(keep_vars=True).keys()
    yield from ((name, p) for name, p in policy.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in policy.named_buffers() if name in kept)


def identity(trainer: "PPOTrainer") -> dict[str, Any]:
    """What makes two runs the same run."""
    rows = json.dumps(trainer.prompts.rows, sort_keys=True, default=repr)
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(trainer.config))),  # tuples become lists, as on the disk
        "start model": trainer.start_digest,
        "prompts": hashlib.sha256(rows.encode()).hexdigest(),
        "rewards and their weights": trainer.reward_weights,
    }


def digest(model: nn.Module) -> str:
    """A short name for the values of all parameters: the same on every device, in any order of summation."""
    found = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = dict(model.named_parameters())
    bits = [p.detach().contiguous().view(integers[p.element_size()]) for p in parameters.values()]
    home = bits[0].device  # where all sums are collected: one copy to the host instead of one for each parameter
    sums = torch.stack([x.sum(dtype=torch.int64).to(home) for x in bits]).tolist()
    for (name, p), total in zip(parameters.items(), sums, strict=True):
        found.update(f"{name} {tuple(p.shape)} {p.dtype} {total}\n".encode())
    return found.hexdigest()[:16]


def made_with(trainer: "PPOTrainer") -> dict[str, Any]:
    """What may change the last bits of a run, and does not forbid going on."""
    return {
        "processes": trainer.world.size,
        "threads": torch.get_num_threads(),
        "device": trainer.device.type,
        "chunk_bytes": trainer.policy.config.chunk_bytes,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _refuse_another_run(here: dict[str, Any], there: dict[str, Any], checkpoint: Checkpoint) -> None:
    # an option that is newer than the checkpoint had its default
    options, saved = here["config"], {**json.loads(json.dumps(dataclasses.asdict(PPOConfig()))), **there["config"]}
    free = FREE | ({"total_steps"} if options["lr_schedule"] == "constant" else set())
    changed = [name for name in options if name not in free and options[name] != saved[name]]
    if changed:
        named = ", ".join(f"{name} was {saved[name]} and is {options[name]}" for name in changed)
        raise UserError(
            f"{checkpoint.folder} belongs to a run with other options: {named}; take those of its config.yaml"
        )
    if options["total_steps"] < checkpoint.state["step"]:
        raise UserError(
            f"{checkpoint.folder} is beyond total_steps = {options['total_steps']}: there is nothing to go on with"
        )
    for name in ("start model", "prompts", "rewards and their weights"):
        if here[name] != there[name]:
            values = f" ({there[name]} there, {here[name]} here)" if name.startswith("rewards") else ""
            raise UserError(f"{checkpoint.folder} belongs to another run: its {name} differ{values}")


def _load(targets: dict[str, Tensor], saved: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    odd = sorted(targets.keys() ^ saved.keys())
    odd += [name for name in targets.keys() & saved.keys() if targets[name].shape != saved[name].shape]
    if odd:
        raise UserError(
            f"{checkpoint.folder} belongs to another model: {odd[0]} is missing, or of another shape, on one side"
        )
    with torch.no_grad():
        for name, target in targets.items():
            copy_full(target, saved[name])


def _restore_moments(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter], saved: dict[str, Tensor], which: str
) -> None:
    optimizer.adamw.state.clear()
    for key, value in saved.items():
        owner, rest = key.split("/", 1)
        name, slot = rest.rsplit("/", 1)
        if owner == which:
            parameter = parameters[name]
            counts = slot == "step" and not optimizer.adamw.defaults["fused"]  # AdamW keeps its step on the CPU then
            if slot == "step":
                optimizer.adamw.state[parameter][slot] = value.clone() if counts else value.to(parameter.device)
            else:
                optimizer.adamw.state[parameter][slot] = like(parameter, value)


def _restore_schedule(optimizer: Optimizer, updates: int) -> None:
    """The learning rate after so many updates."""
    schedule = optimizer.schedule
    schedule.last_epoch = updates
    rates = [base * scale(updates) for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.adamw.param_groups, rates, strict=True):
        group["lr"] = rate


def _restore_random(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    saved, state = checkpoint.tensors["random"], checkpoint.state["random"][rank]
    torch.set_rng_state(saved[f"torch-of-{rank}"])
    if (name := f"{device.type}-of-{rank}") in saved:
        set_rng_state(saved[name], device)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """The numbers go on, but perhaps not with the same last bits."""
    return [
        f"{name} was {there.get(name)} and is {value} now: the run goes on, but not bit for bit as it would have"
        for name, value in here.items()
        if there.get(name) != value
    ]
