"""Checks of models before training, and notes on options that have an unexpected effect."""

import dataclasses

import torch
from torch import nn

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import Distributed
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.policy import LossInputs, Policy, packed_mode
from ppo_fast.llm.models.reference import is_adapted
from ppo_fast.llm.models.weights import check_finite, check_separate, check_trained_in_fp32
from ppo_fast.llm.packing.pack import make_pack
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.reward.scoring import RewardFunction


def notes_on_sampling(config: PPOConfig, *, evaluated: bool) -> list[str]:
    """Return notes on the consequences of sampling that leaves out tokens."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    given = {name: getattr(config, name) for name in off}
    named = " and ".join(f"{name} = {x:g}" for name, x in given.items() if x != off[name])
    if not named:
        return []
    notes = [
        f"{named}: answers are sampled from the likeliest tokens only, but ratio, KL and entropy are of the full"
        " distribution, which gives the other tokens a share that no sample corrects"
    ]
    return notes + [f"held-out answers are sampled with {named}, too"] * evaluated


def notes_on_options(config: PPOConfig) -> list[str]:
    """Return notes on options that keep others from having an effect."""
    notes = []
    if config.critic_warmup_steps >= config.total_steps:
        notes.append(
            f"critic_warmup_steps = {config.critic_warmup_steps} and total_steps = {config.total_steps}: the actor does"
            " not learn in this run"
        )
    if config.kl_controller == "adaptive" and config.kl_coef == 0:
        notes.append("kl_controller = adaptive has no effect with kl_coef = 0, which keeps no reference")
    return notes


def reward_models_of(rewards: dict[str, RewardFunction]) -> dict[str, nn.Module]:
    """The models that reward functions hold as attributes, by their roles."""
    return {
        f"the {attribute} of the reward {name}": x
        for name, function in rewards.items()
        for attribute, x in getattr(function, "__dict__", {}).items()
        if isinstance(x, nn.Module)
    }


def check_models(actor: nn.Module, critic: Critic, reference: nn.Module | None) -> None:
    """Reject weights that are not finite or not trained in fp32, and models that share trained weights."""
    if not any(p.requires_grad for p in actor.parameters()):
        raise UserError(
            "all weights of the actor are frozen: call .requires_grad_(True) on it, or load adapters with"
            " PeftModel.from_pretrained(..., is_trainable=True)"
        )
    if any(p.is_inference() for p in actor.parameters()):
        raise UserError(
            "the actor was made under torch.inference_mode(), whose tensors cannot be trained: load it outside of it"
        )
    if getattr(actor, "is_quantized", False) and not is_adapted(actor):
        raise UserError("the actor's weights are quantised and cannot be trained: train adapters (lora_rank = 16)")
    learning = {"the actor": actor, "the critic": critic}
    others = {"the reference": reference} if reference is not None else {}
    for what, model in {**learning, **others}.items():
        check_finite(model, what)
    for what, model in learning.items():
        check_trained_in_fp32(model, what)
    check_separate(learning, others)


def _unreached(policy: Policy, config: PPOConfig, device: torch.device) -> list[str]:
    """Names of parameters that would be trained, but on which the loss of a short sequence does not depend.

    `device` is where the weights are: under FSDP2 the CPU, where the backend that trains may not run.
    """
    pack = make_pack(Rollout.from_lengths(torch.tensor([[1, 2, 1]]), [1], [2], device=device), [0])
    zeros = torch.zeros(pack.num_tokens, device=device)
    inputs = LossInputs(zeros, zeros, zeros, zeros, None, None, 1.0, 0.0, config.entropy_coef)
    given, policy.config = policy.config, dataclasses.replace(policy.config, backend="auto")
    try:
        with packed_mode(policy):
            loss, _ = policy(pack, inputs)
    finally:
        policy.config = given
    left, found = [loss.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    reached = {getattr(node, "variable", None) for node in found}
    return [name for name, p in policy.named_parameters() if p.requires_grad and p not in reached]


def unreached_parameters(
    policy: Policy, config: PPOConfig, load_device: torch.device, distributed: Distributed
) -> list[str]:
    """Names of trained parameters that the loss does not reach; none under FSDP2 for a model that needs a GPU."""
    try:
        return _unreached(policy, config, load_device)
    except RuntimeError:
        if distributed.strategy != "fsdp":
            raise
        return []


def notes_on_rewards(fingerprints: list[dict[str, str]]) -> list[str]:
    """Return notes on rewards whose code or options differ between processes, which may be intended: each process may
    use a server of its own."""
    return [
        f"the code or the options of the reward {name!r} differ between processes"
        for name, first in fingerprints[0].items()
        if any(theirs[name] != first for theirs in fingerprints)
    ]


def check_reached(policy: Policy) -> None:
    """Reject an actor of which the loss reaches no weight that would be trained."""
    trained = {f"actor.{name}" for name, p in policy.actor.named_parameters() if p.requires_grad}
    if trained <= set(policy.unreached):
        raise UserError(
            f"the loss reaches none of the {len(trained)} trained weights of the actor, so it would not learn: adapters"
            " that are merged or switched off (unmerge_adapter() and enable_adapter_layers() of peft undo this), or"
            " weights that its forward does not use"
        )


def notes_on_unreached(names: list[str]) -> list[str]:
    """A note on weights that stay as they are, because the loss does not depend on them.

    Experts of a mixture do not count: a short sequence reaches only some of them.
    """
    named = [name for name in names if "expert" not in name]
    if not named:
        return []
    return [
        f"{len(named)} weights are not trained, because the loss does not reach them: {named[0]} and others like it"
    ]
