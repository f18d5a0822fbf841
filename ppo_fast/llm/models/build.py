"""Building the models of a run: actor, critic and reference, checked, probed and ready for training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.common.device import has_weights, total_memory
from ppo_fast.common.errors import UserError
from ppo_fast.llm.checks import check_models, check_reached, unreached_parameters
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.models.adapters import check_adapters, has_trained_adapters
from ppo_fast.llm.models.critic import Critic, hidden_size_of
from ppo_fast.llm.models.frozen import check_widened, frozen_dtype_of, store_frozen, widen_frozen
from ppo_fast.llm.models.head import GenerateInfo, HeadInfo, LanguageModel, decoder_of, input_embedding
from ppo_fast.llm.models.lora import with_lora
from ppo_fast.llm.models.modes import prepare, warn_if_not_compiled, warn_if_not_recomputed
from ppo_fast.llm.models.policy import Policy, with_chunk_bytes
from ppo_fast.llm.models.probe import Reach, detect_heads
from ppo_fast.llm.models.reference import AdapterReference, FrozenReference, Reference, frozen_copy, is_adapted
from ppo_fast.llm.models.weights import weights_hash
from ppo_fast.llm.probe_sampling import detect_generate
from ppo_fast.llm.sharding import shard, wrap

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class Models:
    """The models that a run is given or makes; None: there is no such model."""

    actor: LanguageModel
    critic: Critic | None = None
    reference: LanguageModel | None = None

    def given(self) -> nn.ModuleList:
        """Those that exist."""
        return nn.ModuleList([x for x in (self.actor, self.critic, self.reference) if x is not None])

    def critic_backbone(self) -> nn.Module | None:
        """The critic's own backbone."""
        return None if self.critic is None else self.critic.backbone


def build_models(
    config: PPOConfig,
    actor: LanguageModel,
    critic: Critic | None,
    reference: LanguageModel | None,
    device: torch.device,
    distributed: Distributed = SINGLE_PROCESS,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reach: Reach = Reach(),  # noqa: B008
) -> tuple[Policy, Reference]:
    """Actor and critic, ready to learn, and the reference, as the options say; in several processes if so.

    Args:
        config: the options.
        actor: the language model.
        critic: one that the user gives; None: as config.critic says.
        reference: one that the user gives; None: as config.kl_coef and the actor's adapters say.
        device: where the run computes.
        distributed: the processes of the run.
        tokenizer: of the actor; None: the actor's own `generate` is not probed, since another sampler is used.
        reach: how long sequences become, and how much a step computes.
    """
    _check_options(config, actor, critic, distributed)
    actor, critic = _with_adapters(config, actor, critic)
    if distributed.strategy != "fsdp":  # whose groups have weights of one dtype
        _store_frozen(config, actor, critic)  # before they are moved: the device may have no room for more
    models = Models(actor, critic, reference)
    distributed.run_with_weights(lambda: check_models(actor, critic, reference), of=models.given())
    # under FSDP2 the whole weights are never on one GPU
    load_device = torch.device("cpu") if distributed.strategy == "fsdp" else device
    prepare(actor, load_device)
    prepare(critic, load_device)
    config = with_chunk_bytes(config, input_embedding(actor).shape[0], total_memory(device))
    needs_reference = reference is None and config.kl_coef > 0
    adapted = actor if needs_reference and is_adapted(actor) else None  # it becomes its own reference
    if reference is not None:
        prepare(reference, load_device)
    elif needs_reference and adapted is None:
        models.reference = frozen_copy(actor)
    if config.gradient_checkpointing:
        warn_if_not_recomputed(actor, critic.backbone)
    heads = distributed.run_with_weights(
        lambda: detect_heads(
            actor,
            critic.backbone,
            models.reference,
            strict=config.strict,
            dtype=config.dtype,
            device=device,
            reach=reach,
        ),
        of=models.given(),
    )
    info = GenerateInfo()
    if tokenizer is not None:
        boundaries = heads.actor.boundaries
        info = distributed.run_with_weights(
            lambda: detect_generate(actor, tokenizer, config, boundaries, reach), of=actor
        )
    found = None if adapted is None else _adapter_reference(adapted, distributed)
    _check_same_weights(distributed, {"actor": actor, "critic": critic, "reference": models.reference})
    if models.reference is not None and heads.reference is not None:
        found = _frozen_reference(models.reference, heads.reference, config, distributed)
    if reference is None and isinstance(found, FrozenReference) and distributed.strategy != "fsdp":
        found.rounded = store_frozen(found.model, frozen_dtype_of(config))
        if config.dtype == "float32":
            check_widened(found.model)
    policy = Policy(actor, critic, heads.actor, config, critic_head=heads.critic, generate_info=info)
    if config.compile_layers:
        warn_if_not_compiled(actor, critic.backbone, packed=policy.packing_models())
    policy.unreached = distributed.run_with_weights(
        lambda: unreached_parameters(policy, config, load_device, distributed), of=policy
    )
    check_reached(policy)
    wrap(policy, distributed, dtype=config.dtype, unused_parameters=_has_unused_parameters(policy, config))
    return policy, found


def _check_options(config: PPOConfig, actor: LanguageModel, critic: Critic | None, distributed: Distributed) -> None:
    """Reject options that contradict the given models."""
    if config.lora_rank and is_adapted(actor):
        raise UserError("lora_rank > 0, but the actor already has adapters: leave one of the two out")
    if config.frozen_dtype == "bfloat16" and distributed.strategy == "fsdp":
        raise UserError("frozen_dtype = bfloat16 has no effect under fsdp, which keeps one dtype: leave it out")
    if config.merge_adapters and distributed.strategy == "fsdp":
        raise UserError("merge_adapters needs whole weights, which no process has under fsdp: merge them afterwards")
    if is_adapted(actor):
        check_adapters(actor)
    if critic is not None and config.critic == "shared" and critic.backbone is not None:
        raise UserError("critic = shared, but a critic with a backbone of its own is given: leave one of the two out")
    if critic is not None and config.critic == "own" and critic.backbone is None:
        raise UserError("the given critic is a value head without a backbone: it needs critic = shared")
    if critic is not None and critic.backbone is None and has_weights(actor):
        width = hidden_size_of(decoder_of(actor))
        if critic.head.in_features != width:
            raise UserError(
                f"the given value head reads {critic.head.in_features} numbers, but a hidden state of the actor has"
                f" {width}"
            )


def _with_adapters(config: PPOConfig, actor: LanguageModel, critic: Critic | None) -> tuple[LanguageModel, Critic]:
    """Actor and critic, one made if none is given, with new adapters if the options ask for them."""
    if critic is None:
        critic = Critic.shared(actor) if config.critic == "shared" else Critic.from_actor(actor)
    if critic.backbone is not None and not is_adapted(critic.backbone):
        critic.backbone = with_lora(critic.backbone, config, language_model=False)
    if config.lora_rank:
        actor = with_lora(actor, config, language_model=True)
    return actor, critic


def _adapter_reference(actor: "PeftModel", distributed: Distributed) -> Reference:
    starts_trained = distributed.run_with_weights(lambda: has_trained_adapters(actor), of=actor)
    found = AdapterReference(actor, starts_trained=starts_trained)
    distributed.run_with_weights(found.check, of=actor)
    return found


def _frozen_reference(
    model: LanguageModel, head: HeadInfo, config: PPOConfig, distributed: Distributed
) -> FrozenReference:
    found = FrozenReference(model, head, config)
    if distributed.strategy == "fsdp":
        shard(found, distributed, config.dtype)
    return found


def _store_frozen(config: PPOConfig, actor: LanguageModel, critic: Critic) -> None:
    """Store what the options freeze, beside the adapters that they make, as `frozen_dtype` says.

    Models that come with frozen weights may be in use elsewhere: they are converted only where the option names the
    dtype. A model that cannot compute with stored weights keeps its own under auto.
    """
    for model in (actor, critic.backbone):
        if model is not None and (config.lora_rank or config.frozen_dtype != "auto"):
            store_frozen(model, frozen_dtype_of(config))
            try:
                check_widened(model)
            except UserError:
                if config.frozen_dtype != "auto":
                    raise
                widen_frozen(model)


def _check_same_weights(distributed: Distributed, models: dict[str, nn.Module | None]) -> None:
    """Raise UserError if a model starts with other weights in another process. One without weights gets them later."""
    if distributed.size > 1:
        present = {name: model for name, model in models.items() if model is not None and has_weights(model)}
        distributed.check_equal({f"the weights of the {name}": weights_hash(model) for name, model in present.items()})


def _has_unused_parameters(policy: Policy, config: PPOConfig) -> bool:
    """Whether some losses are the critic's alone, or not each batch reaches all experts of a mixture."""
    if config.critic_warmup_steps > 0 or config.target_kl is not None or policy.unreached:
        return True
    return any("expert" in name for name, p in policy.named_parameters() if p.requires_grad)
