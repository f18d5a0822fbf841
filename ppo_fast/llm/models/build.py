"""TODO docstring."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.common.device import total_memory
from ppo_fast.common.errors import UserError
from ppo_fast.llm.checks import check_models, check_reached, unreached_parameters
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed, shard
from ppo_fast.llm.models.adapters import check_adapters, has_trained_adapters
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import Sampling
from ppo_fast.llm.models.lora import with_lora
from ppo_fast.llm.models.modes import prepare, warn_if_not_recomputed
from ppo_fast.llm.models.policy import Policy, with_chunk_bytes
from ppo_fast.llm.models.probe import Reach, detect_heads
from ppo_fast.llm.models.reference import AdapterReference, FrozenReference, Reference, frozen_copy, is_adapted
from ppo_fast.llm.probe_sampling import probe_sampling
from ppo_fast.llm.state import check_same_weights


def build_models(
    config: PPOConfig,
    actor: Any,
    critic: Critic | None,
    reference: PreTrainedModel | None,
    device: torch.device,
    distributed: Distributed = SINGLE_PROCESS,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reach: Reach = Reach(),  # noqa: B008
) -> tuple[Policy, Reference]:
    """Actor and critic, ready to learn, and the reference, as the options say; in several processes if so. Without a
    tokenizer the actor's own sampling is not probed."""
    if config.lora_rank and is_adapted(actor):
        raise UserError("lora_rank > 0, but the actor already has adapters: leave one of the two out")
    if config.merge_adapters and distributed.strategy == "fsdp":
        raise UserError("merge_adapters needs whole weights, which no process has under fsdp: merge them afterwards")
    if is_adapted(actor):
        check_adapters(actor)
    if critic is None:
        critic = Critic.shared(actor) if config.critic == "shared" else Critic.from_actor(actor)
    elif config.critic == "shared" and critic.backbone is not None:
        raise UserError("critic = shared, but a critic with a backbone of its own is given: leave one of the two out")
    if critic.backbone is not None and not is_adapted(critic.backbone):
        critic.backbone = with_lora(critic.backbone, config, language_model=False)
    if config.lora_rank:
        actor = with_lora(actor, config, language_model=True)
    given = nn.ModuleList([x for x in (actor, critic, reference) if x is not None])
    distributed.run_with_weights(lambda: check_models(actor, critic, reference), of=given)
    home = (
        torch.device("cpu") if distributed.strategy == "fsdp" else device
    )  # whole weights never meet on one GPU under FSDP2
    prepare(actor, home)
    prepare(critic, home)
    config = with_chunk_bytes(config, actor.get_input_embeddings().weight.shape[0], total_memory(device))
    adapters = reference is None and config.kl_coef > 0 and is_adapted(actor)
    frozen = None
    if reference is not None:
        frozen = prepare(reference, home)
    elif config.kl_coef > 0 and not adapters:
        frozen = frozen_copy(actor)
    if config.gradient_checkpointing:
        warn_if_not_recomputed(actor, critic.backbone)
    how: dict[str, Any] = {"strict": config.strict, "dtype": config.dtype, "device": device, "reach": reach}
    heads = distributed.run_with_weights(
        lambda: detect_heads(actor, critic.backbone, frozen, **how),
        of=torch.nn.ModuleList([x for x in (actor, critic, frozen) if x is not None]),
    )
    sampling = Sampling()
    if tokenizer is not None:
        boundaries = heads.actor.boundaries
        sampling = distributed.run_with_weights(
            lambda: probe_sampling(actor, tokenizer, config, boundaries, reach), of=actor
        )
    found: Reference = None
    if adapters:
        starts_trained = distributed.run_with_weights(lambda: has_trained_adapters(actor), of=actor)
        found = AdapterReference(actor, starts_trained=starts_trained)
        distributed.run_with_weights(found.check, of=actor)
    check_same_weights(distributed, {"actor": actor, "critic": critic, "reference": frozen})
    if frozen is not None:
        assert heads.reference is not None
        found = FrozenReference(frozen, heads.reference, config)
        if distributed.strategy == "fsdp":
            shard(found, distributed, config.dtype)
    policy = Policy(actor, critic, heads.actor, config, critic_head=heads.critic, sampling=sampling)
    policy.unreached = distributed.run_with_weights(
        lambda: unreached_parameters(policy, config, home, distributed), of=policy
    )
    check_reached(policy)
    # some losses are the critic's alone, and not each batch reaches all experts of a mixture
    partly = config.critic_warmup_steps > 0 or config.target_kl is not None
    partly |= any("expert" in name for name, p in policy.named_parameters() if p.requires_grad)
    distributed.wrap(policy, dtype=config.dtype, unused_parameters=partly or bool(policy.unreached))
    return policy, found
