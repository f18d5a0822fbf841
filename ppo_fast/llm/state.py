"""What a checkpoint holds of a run: all that the next step depends on, and what shows that it is the same run."""

import dataclasses
import hashlib
import json
import platform
import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ppo_fast.common.checkpoint import Checkpoint
from ppo_fast.common.device import derived_seed, get_rng_state, has_weights, set_rng_state
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import Distributed, copy_from_full, gather_to_main, shard_like
from ppo_fast.llm.optimizer import Optimizer, rate_of_step
from ppo_fast.llm.reward.fingerprint import tokenizer_fingerprint

if TYPE_CHECKING:
    from ppo_fast.llm.trainer import PPOTrainer

# What may change between a run and its continuation: none of it reaches the numbers, or a note says so
RESUMABLE_OPTIONS = {
    "out",
    "quiet",
    "tensorboard",
    "show_samples_every",
    "save_every",
    "keep_checkpoints",
    "merge_adapters",
}
RESUMABLE_OPTIONS |= {
    "eval_every",
    "eval_samples",
    "device",
    "parallel",
    "check_memory",
    "save_dtype",
    "max_sampler_gap",
}
RESUMABLE_OPTIONS |= {"process_timeout", "gather_for_sampling", "threads"}
# What each checkpoint has: in state.json, and as files
PARTS = {"step", "run", "made_with", "kl_coef", "dealt", "random"}
FILES = {"weights", "optimizers", "random"}
SCHEDULED = ("total_steps", "lr_schedule", "warmup_ratio")  # what the learning rate of a step depends on
# What an error of a run may advise to change: a note names it
ADVISED = {"lr", "critic_lr", "max_grad_norm"}


def capture(trainer: "PPOTrainer") -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file, and everything else as JSON: weights, optimizers, schedules, random states, data position.

    Collective: each process takes part, and the first alone has the tensors, whole and on the CPU.
    """
    optimizers = {"actor": trainer.actor_optimizer, "critic": trainer.critic_optimizer}
    names = {x: name for name, x in trainable_state(trainer.policy)}
    moments = gather_to_main(
        (f"{which}/{names[p]}/{key}", value)
        for which, optimizer in optimizers.items()
        for p in optimizer.parameters
        for key, value in optimizer.adamw.state.get(p, {}).items()
    )
    randoms = {"order": trainer.generator.get_state()}
    states = trainer.distributed.all_gather_object(trainer.randoms)
    for rank, (tensors, _) in enumerate(states):
        randoms |= {f"{name}-of-{rank}": x for name, x in tensors.items()}
    state = {
        "run": run_fingerprint(trainer),
        "made_with": environment_info(trainer),
        "kl_coef": trainer.kl_controller.coef,
        "entropy_coef": trainer.entropy_controller.coef,
        "dealt": trainer.prompts.num_drawn,
        "random": [words for _, words in states],
    }
    weights = gather_to_main((name, x.detach()) for name, x in trainable_state(trainer.policy))
    return {"weights": weights, "optimizers": moments, "random": randoms}, state


def random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's generators: torch's as tensors, also that of `device`; Python's and numpy's as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    state = get_rng_state(device)
    if state is not None:
        tensors[device.type] = state
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def restore(trainer: "PPOTrainer", checkpoint: Checkpoint, *, allow_changes: bool = False) -> list[str]:
    """Puts a new trainer in the state of a checkpoint; what people should know of it, in sentences. Collective.

    With `allow_changes` the run continues with other prompts, rewards or another tokenizer, which a sentence names.

    Raises:
        UserError: it is another run's: the message says in what it differs.
    """
    state = checkpoint.state
    lacking = sorted(PARTS - state.keys()) + sorted(FILES - checkpoint.tensors.keys())
    if lacking:
        raise UserError(
            f"{checkpoint.folder} was changed, or is that of a run of another kind: it has no {lacking[0]}; continue"
            " from another checkpoint"
        )
    here, there = run_fingerprint(trainer), state["run"]
    _refuse_another_run(here, there, checkpoint, allow_changes)
    others = [what for name, what in CHANGEABLE.items() if _differ(here, there, name)]
    _load(dict(trainable_state(trainer.policy)), checkpoint.tensors["weights"], checkpoint)
    parameters = dict(trainer.policy.named_parameters())
    for which, optimizer in (("actor", trainer.actor_optimizer), ("critic", trainer.critic_optimizer)):
        _restore_moments(optimizer, parameters, checkpoint.tensors["optimizers"], which)
    trainer.kl_controller.coef = state["kl_coef"]
    trainer.entropy_controller.coef = state.get("entropy_coef", trainer.config.entropy_coef)  # older ones have none
    trainer.prompts.num_drawn = state["dealt"]
    trainer.steps_done = state["step"]
    trainer.generator.set_state(checkpoint.tensors["random"]["order"])
    made_here, made_there = environment_info(trainer), state["made_with"]
    if made_here["processes"] == made_there["processes"]:
        _restore_random(checkpoint, trainer.distributed.rank, trainer.device)
    else:  # no state belongs to this process: new ones, which no earlier step has used
        transformers.set_seed(derived_seed(trainer.config.seed, trainer.distributed.rank, trainer.steps_done))
    trainer.randoms = random_state(trainer.device)
    options, saved = options_as_json(trainer.config), state["run"]["config"]
    changed = [name for name in sorted(ADVISED) if name in saved and options[name] != saved[name]]
    return [
        *(
            f"{name} was {saved[name]}, an option that this ppo_fast does not have"
            for name in sorted(saved.keys() - options.keys())
        ),
        *(f"from here on the {name} is another one than that of {checkpoint.folder}" for name in others),
        *(f"{name} was {saved[name]} and is {options[name]} from here on" for name in changed),
        *_differences(made_here, made_there),
    ]


def trainable_state(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that training changes. Frozen weights come from the start model, again."""
    if isinstance(policy, FSDPModule):
        policy.reshard()  # a pass without a backward leaves its weights gathered
    kept = policy.state_dict(keep_vars=True).keys()
    yield from ((name, p) for name, p in policy.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in policy.named_buffers() if name in kept)


def run_fingerprint(trainer: "PPOTrainer") -> dict[str, Any]:
    """What makes two runs the same run."""
    return {
        "config": options_as_json(trainer.config),
        "start model": trainer.start_hash,
        "prompts": rows_hash(trainer.prompts.rows),
        "tokenizer": trainer.tokenizer_hash,
        "rewards and their weights": trainer.reward_weights,
        "code of the rewards": trainer.reward_hashes,
    }


# What a user may change on purpose between a run and its continuation, with allow_changes
CHANGEABLE = {
    "prompts": "list of prompts",
    "tokenizer": "tokenizer, chat template or list of end tokens",
    "rewards and their weights": "set of rewards and weights",
    "code of the rewards": "code of the rewards",
}


def tokenizer_hash_of(tokenizer: Any, ends: list[int]) -> str:
    """A short name for all of a tokenizer that changes tokens or texts, and for the tokens that end an answer."""
    parts = [tokenizer_fingerprint(tokenizer), sorted(tokenizer.special_tokens_map.items(), key=str), ends]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def rows_hash(rows: list[dict[str, Any]]) -> str:
    """A short name for rows in their order. Of an object that JSON does not know, its address does not count."""

    def described(x: Any) -> Any:
        if isinstance(x, set | frozenset):  # whose order differs between processes
            return sorted(map(described, x))
        return re.sub(r" at 0x[0-9a-f]+", "", repr(x))

    text = json.dumps(rows, sort_keys=True, default=described)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same_weights(distributed: Distributed, models: dict[str, nn.Module | None]) -> None:
    """Raises UserError if a model starts with other weights in another process. One without weights gets them later."""
    if distributed.size > 1:
        present = {name: model for name, model in models.items() if model is not None and has_weights(model)}
        distributed.check_equal({f"the weights of the {name}": weights_hash(model) for name, model in present.items()})


def options_as_json(config: PPOConfig) -> dict[str, Any]:
    """The options as JSON has them: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def weights_hash(model: nn.Module) -> str:
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


def environment_info(trainer: "PPOTrainer") -> dict[str, Any]:
    """What may change the last bits of a run, and does not forbid going on."""
    return {
        "processes": trainer.distributed.size,
        "threads": torch.get_num_threads(),
        "device": trainer.device.type,
        "chunk_bytes": trainer.policy.config.chunk_bytes,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _differ(here: dict[str, Any], there: dict[str, Any], name: str) -> bool:
    return name in there and here[name] != there[name]  # an older checkpoint may lack it


def _refuse_another_run(
    here: dict[str, Any], there: dict[str, Any], checkpoint: Checkpoint, allow_changes: bool
) -> None:
    # an option that is newer than the checkpoint had its default
    options, saved = here["config"], {**options_as_json(PPOConfig()), **there["config"]}
    free = RESUMABLE_OPTIONS | ({"total_steps"} if _same_rates(options, saved) else set())
    changed = [name for name in options if name not in free | ADVISED and options[name] != saved[name]]
    if changed:
        named = ", ".join(f"{name} was {saved[name]} and is {options[name]}" for name in changed)
        raise UserError(
            f"{checkpoint.folder} belongs to a run with other options: {named}; take those of its config.yaml"
        )
    if options["total_steps"] < checkpoint.state["step"]:
        raise UserError(
            f"{checkpoint.folder} is beyond total_steps = {options['total_steps']}: there is nothing to go on with"
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


def _same_rates(options: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether the learning rates of all steps of the shorter run are those of the longer one, too."""
    runs = [PPOConfig(**{name: some[name] for name in SCHEDULED}) for some in (options, saved)]
    firsts, steps = {0, options["critic_warmup_steps"]}, min(run.total_steps for run in runs)
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
                optimizer.adamw.state[parameter][slot] = shard_like(parameter, value)


def _restore_random(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    suffix = f"-of-{rank}"
    saved = checkpoint.tensors["random"].items()
    tensors = {name.removesuffix(suffix): x for name, x in saved if name.endswith(suffix)}
    restore_random(tensors, checkpoint.state["random"][rank], device)


def restore_random(tensors: dict[str, Tensor], others: dict[str, Any], device: torch.device) -> None:
    """Puts this process's generators in a state that `random_state` returned."""
    torch.set_rng_state(tensors["torch"])
    if device.type in tensors:
        set_rng_state(tensors[device.type], device)
    version, keys, gauss = others["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = others["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """The numbers go on, but perhaps not with the same last bits."""
    return [
        f"{name} was {there.get(name)} and is {value} now: the run goes on, but not bit for bit as it would have"
        for name, value in here.items()
        if there.get(name) != value
    ]
