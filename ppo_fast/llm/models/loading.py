"""Loading an actor and its tokenizer from a folder or a .gguf file, and checks of the models of a run."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.critic import Critic, hidden_size_of
from ppo_fast.llm.models.head import LanguageModel, head_of, input_embedding, model_name, text_config, unwrap_peft
from ppo_fast.llm.models.reference import is_adapted
from ppo_fast.llm.models.weights import (
    check_folder,
    load_structure,
    load_tokenizer,
    load_weights,
    source_arguments,
    stored_dtype,
)

SOURCE_DTYPE = "ppo_fast_source_dtype"  # an attribute of an actor from `load_actor`


def load_model_config(folder: str | Path) -> PreTrainedConfig:
    """Load the configuration of a model in a folder or a .gguf file, without the weights."""
    place, gguf = source_arguments(folder)
    file = Path(folder) if gguf else Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"no model in {folder}: it has no config.json; give a folder that save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(place, local_files_only=True, **gguf)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error


def load_actor(
    folder: str | Path, *, pad_token: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in fp32 and its tokenizer from a folder of `save_pretrained`, or a .gguf file.

    `pad_token` names a token of the vocabulary for padding where the tokenizer has none; `trust_remote_code` runs the
    Python files in the folder. Nothing is downloaded. Without `weights` the model is on the meta device: under parallel
    = fsdp all processes but the first may train such an actor. The dtype of the stored weights is noted for
    `source_dtype`.

    Raises:
        UserError: it cannot be loaded, or its weights are not those that its config.json describes (`load_weights`).
    """
    check_folder(folder, "model", trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    kind, dtype = AutoModelForCausalLM, torch.float32
    if weights:
        advice = "give a folder to which the save_pretrained of a causal language model, head included, wrote"
        actor = load_weights(kind, folder, "model", advice, dtype=dtype, trust_remote_code=trust_remote_code)
        setattr(actor, SOURCE_DTYPE, stored_dtype(folder))
    else:
        actor = load_structure(kind, folder, "model", dtype=dtype, trust_remote_code=trust_remote_code)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"the pad token {pad_token!r} is not in the vocabulary of the tokenizer in {folder}")
        tokenizer.pad_token = pad_token
    return actor, tokenizer


def source_dtype(actor: nn.Module) -> torch.dtype | None:
    """Return the dtype of the weights in the folder of an actor from `load_actor`; None for other actors."""
    return getattr(unwrap_peft(actor), SOURCE_DTYPE, None)


def vocabulary_of(model: nn.Module) -> int:
    """Return V, the number of tokens for which the model has embeddings."""
    return input_embedding(model).shape[0]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, actor: LanguageModel) -> None:
    """Reject a tokenizer that would fail in a step: no pad token, no end token, ids beyond the embedding."""
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no pad token; name one of its tokens (tokenizer.pad_token = ..., or --pad-token on the"
            " command line; the end token will do)"
        )
    if tokenizer.pad_token_id not in {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}:
        raise UserError(
            f"the pad token {tokenizer.pad_token!r} is an ordinary part of texts: in the saved model the tokenizer"
            " would treat it as a special token and split words at it; name a special token (the end token will do)"
        )
    if not end_tokens(tokenizer, actor):
        raise UserError("neither the tokenizer nor the generation config has an end token, so no answer could end")
    check_embedding(tokenizer, actor, "the model")


def check_embedding(tokenizer: PreTrainedTokenizerBase, model: nn.Module, what: str) -> None:
    """Reject a model without an embedding for some tokens. Ids may have gaps: the largest one counts.

    Raises:
        UserError: names the model as `what`.
    """
    rows, largest = input_embedding(model).shape[0], max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens with ids up to {largest} but the embedding of {what} has {rows}"
            " rows: they do not belong together, or model.resize_token_embeddings(len(tokenizer)) is missing"
        )


def check_others(
    tokenizer: PreTrainedTokenizerBase, config: PPOConfig, critic: "Critic | None", reference: nn.Module | None
) -> None:
    """Reject a critic or reference that cannot read the tokens of the actor.

    Raises:
        UserError: names the model and the difference.
    """
    if critic is not None and critic.backbone is not None:
        check_embedding(tokenizer, critic.backbone, "the critic")
        width = hidden_size_of(critic.backbone)
        if critic.head.in_features != width:
            raise UserError(
                f"the critic's head reads {critic.head.in_features} numbers, but its backbone gives {width}:"
                f" Critic(backbone, {width})"
            )
    if reference is None:
        return
    if not isinstance(reference, PreTrainedModel) and not is_adapted(reference):
        raise UserError(f"the reference must be a model of transformers, got {type(reference).__name__}")
    check_embedding(tokenizer, reference, "the reference")
    kinds = {str(p.dtype).removeprefix("torch.") for p in (input_embedding(reference), *_head_weights(reference))}
    if len(kinds) > 1:
        raise UserError(
            f"the reference has its embedding and LM head in {' and '.join(sorted(kinds))}: load it in one dtype"
        )
    if config.dtype == "bfloat16" and kinds == {"float16"}:
        raise UserError("the reference is in float16, but dtype = bfloat16: load it in float32 or bfloat16")


def _head_weights(model: nn.Module) -> list[nn.Parameter]:
    head = head_of(model)
    return list(head.parameters()) if isinstance(head, nn.Linear) else []


def end_tokens(tokenizer: PreTrainedTokenizerBase, actor: LanguageModel) -> list[int]:
    """Return the ids of the tokens that end a completion, of the generation config and of the tokenizer."""
    configured = actor.generation_config.eos_token_id if actor.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def check_language_model(actor: nn.Module) -> None:
    """Reject an actor other than a causal language model.

    Raises:
        UserError: it is an encoder-decoder model, or its configuration names no single part for text.
    """
    if not isinstance(actor.get_base_model() if is_adapted(actor) else actor, PreTrainedModel):
        raise UserError(
            f"the actor must be a model of transformers, or a PeftModel around one, got {type(actor).__name__}: give"
            " the model itself, not a name or a wrapper; ppo_fast.llm.models.loading.load_actor(folder) loads one"
        )
    name = model_name(actor)
    if not is_adapted(actor) and getattr(actor, "peft_config", None):
        raise UserError(
            f"this {name} has adapters in its layers, which an earlier run or peft put there: give the PeftModel around"
            " it, or load the model again"
        )
    if not getattr(unwrap_peft(actor).config, "return_dict", True):
        raise UserError(f"the configuration of this {name} has return_dict = false: set it to true")
    try:
        config = text_config(actor)
    except ValueError as error:
        raise UserError(f"{name} cannot be trained: {first_line(error)}") from error
    if getattr(unwrap_peft(actor).config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} is an encoder-decoder model, which PPO does not train here: give a decoder-only model, as"
            " AutoModelForCausalLM loads them"
        )
    if config.model_type == "reformer":
        raise UserError(
            f"{name} cannot be trained: its layers have gradients in training mode only, in which it computes at random"
        )
