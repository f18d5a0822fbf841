"""The models of PPO on transformers: the actor, its critic and the frozen reference; loading them, and LoRA."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ppo_fast.adapters import AdapterReference as AdapterReference
from ppo_fast.attention import own_config
from ppo_fast.config import PPOConfig
from ppo_fast.device import has_weights
from ppo_fast.errors import UserError
from ppo_fast.flash_calls import first_line
from ppo_fast.heads import bare, decoder_of, model_name, text_config, without_cache
from ppo_fast.loading import check_folder, load_structure, load_tokenizer, load_weights, stored_dtype


def load_model_config(folder: str | Path) -> PreTrainedConfig:
    """The configuration of a model in a folder that `save_pretrained` wrote; weights are not read."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no model in {folder}: it has no config.json; give a folder that save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {Path(folder) / 'config.json'}: {str(error).splitlines()[0]}") from error


def load_actor(
    folder: str | Path, *, pad_token: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in fp32 and its tokenizer, from a folder that `save_pretrained` wrote.

    `pad_token` names a token of the vocabulary for padding where the tokenizer has none; `trust_remote_code` runs
    Python files that lie in the folder. Nothing is downloaded. Without `weights` the model is on the meta device: under
    parallel = fsdp all processes but the first may train such an actor. The dtype in which the weights are stored is
    noted for `source_dtype`.

    Raises:
        UserError: it cannot be loaded, or its weights are not those that its config.json describes (`load_weights`).
    """
    check_folder(folder, "model", trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    actor: Any
    if weights:
        advice = "give a folder to which the save_pretrained of a causal language model, head included, wrote"
        actor = load_weights(AutoModelForCausalLM, folder, "model", advice, **how)
        actor.ppo_fast_source_dtype = stored_dtype(folder)
    else:
        actor = load_structure(AutoModelForCausalLM, folder, "model", **how)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"the pad token {pad_token!r} is not in the vocabulary of the tokenizer in {folder}")
        tokenizer.pad_token = pad_token
    return actor, tokenizer


def source_dtype(actor: nn.Module) -> torch.dtype | None:
    """The dtype of the weights in the folder from which `load_actor` loaded the actor; None for any other actor."""
    return getattr(bare(actor), "ppo_fast_source_dtype", None)


def _embedding(model: Any) -> Tensor:
    """The input embedding [V, D]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, actor: Any) -> None:
    """Refuses what would fail deep inside a step: no pad token, no end token, ids beyond the embedding."""
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no pad token; name one of its tokens (tokenizer.pad_token = ..., or --pad-token on the"
            " command line; the end token will do)"
        )
    if not end_tokens(tokenizer, actor):
        raise UserError("neither the tokenizer nor the generation config has an end token, so no answer could end")
    rows = _embedding(actor).shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding has {rows} rows: they do not belong"
            " together, or model.resize_token_embeddings(len(tokenizer)) is missing"
        )


def end_tokens(tokenizer: PreTrainedTokenizerBase, actor: Any) -> list[int]:
    """Ids of the tokens that end an answer: the generation config's and the tokenizer's."""
    configured = actor.generation_config.eos_token_id if actor.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def check_language_model(actor: nn.Module) -> None:
    """Rejects an actor of another kind than a causal language model.

    Raises:
        UserError: it is an encoder-decoder model, or its configuration names no single part for text.
    """
    name = model_name(actor)
    try:
        config = text_config(actor)
    except ValueError as error:
        raise UserError(f"{name} cannot be trained: {first_line(error)}") from error
    if getattr(bare(actor).config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} is an encoder-decoder model, which PPO does not train here: give a decoder-only model, as"
            " AutoModelForCausalLM loads them"
        )
    if config.model_type == "reformer":
        raise UserError(
            f"{name} cannot be trained: its layers have gradients in training mode only, in which it computes at random"
        )


def _width(decoder: Any) -> int:
    """The size of a decoder's hidden states. It may differ from that of the embeddings (RemBERT, Reformer), which is
    taken for a model without weights."""
    weight = _embedding(decoder)
    if not has_weights(decoder):
        return weight.shape[1]
    ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
    with torch.no_grad():
        return decoder(input_ids=ids, **without_cache(decoder)).last_hidden_state.shape[-1]


class Critic(nn.Module):
    """V(s) of each prefix: a linear value head on hidden states, of its own backbone or, without one, of the actor's.

    The head starts at zero (openai/lm-human-preferences): the first values are 0 instead of noise.
    """

    def __init__(self, backbone: nn.Module | None, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_actor(cls, actor: nn.Module) -> "Critic":
        """A critic whose backbone starts as a copy of the actor's."""
        return cls(copy.deepcopy(decoder_of(actor)), _width(decoder_of(actor))).to(_embedding(actor).device)

    @classmethod
    def shared(cls, actor: nn.Module) -> "Critic":
        """A value head alone: it reads the actor's hidden states, and its loss trains the actor's backbone, too."""
        return cls(None, _width(decoder_of(actor))).to(_embedding(actor).device)

    @classmethod
    def from_reward_model(cls, model: PreTrainedModel, *, keep_head: bool = True) -> "Critic":
        """A critic that starts as a reward model: its backbone, and its scoring layer as the value head, calibrated as
        `preferences.calibrate` left it.

        The backbone is that of the model, not a copy; in half precision it is a copy in fp32, since it is trained.
        """
        if getattr(model, "is_quantized", False):
            raise UserError("the reward model that the critic starts from is quantised: give one that is not")
        backbone: nn.Module = model.base_model
        if any(p.dtype != torch.float32 for p in backbone.parameters()):
            backbone = copy.deepcopy(backbone).float()
        critic = cls(backbone, _width(backbone)).to(_embedding(model).device)
        score = getattr(model, "score", None)
        if keep_head and isinstance(score, nn.Linear) and score.out_features == 1:
            with torch.no_grad():
                critic.head.weight.copy_(score.weight)
                if score.bias is not None:
                    critic.head.bias.copy_(score.bias)
                critic.head.bias.sub_(getattr(model.config, "score_offset", 0.0))
        return critic.requires_grad_(True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, D] hidden states -> [n] values. In fp32 under autocast, too: returns are regressed on them."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()


def load_reward_model(
    folder: str | Path, *, weights: bool = True, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen sequence classifier with one output, and its tokenizer, from a folder that `save_pretrained` wrote.

    Without `weights` it is on the meta device, as in `load_actor`. `dtype`: of the weights; None: as they are stored.

    Raises:
        UserError: it cannot be loaded, has no scoring layer, or has more than one output.
    """
    what = "reward model"
    check_folder(folder, what)
    tokenizer = load_tokenizer(folder)
    kind = AutoModelForSequenceClassification
    if weights:
        advice = (
            "give a folder of a sequence classifier with one output, trained on preferences, not of a language model"
        )
        model = load_weights(kind, folder, what, advice, dtype=dtype)
    else:
        model = load_structure(kind, folder, what, dtype=dtype)
    if model.config.num_labels != 1:
        raise UserError(f"the reward model in {folder} has {model.config.num_labels} outputs; one score is expected")
    return model.eval().requires_grad_(False), tokenizer


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that never trains: the reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def is_adapted(model: nn.Module) -> bool:
    """Whether peft has put adapters into it."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def add_lora(model: nn.Module, *, rank: int, alpha: int, targets: str, language_model: bool) -> nn.Module:
    """LoRA adapters (Hu et al. 2021) through peft: everything else is frozen.

    `targets`: "all-linear", or names of modules with commas between. The LM head stays as it is.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("lora_rank > 0 needs peft: pip install peft, or the extra ppo_fast[peft]") from error
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM" if language_model else "FEATURE_EXTRACTION",
    )
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def with_lora(model: Any, config: PPOConfig, *, language_model: bool) -> Any:
    """The model with the adapters that the options name; as it is, if they name none."""
    if not config.lora_rank:
        return model
    return add_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.lora_targets,
        language_model=language_model,
    )


def recomputed_layers(model: nn.Module) -> list[Any]:
    """The layers that gradient checkpointing recomputes: those of models that support it."""
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.supports_gradient_checkpointing]
    layers = {id(m): m for part in models for m in part.modules() if isinstance(m, GradientCheckpointingLayer)}
    return list(layers.values())


def warn_if_not_recomputed(*models: nn.Module | None) -> None:
    """Warns once of models for which gradient checkpointing does nothing."""
    without = [model_name(model) for model in models if model is not None and not recomputed_layers(model)]
    if without:
        warnings.warn(
            f"gradient_checkpointing does nothing for {' and '.join(without)}: no layer of such a model supports it, so"
            " the run needs as much memory as without it",
            stacklevel=2,
        )


def _in_evaluation_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint function whose layer runs in evaluation mode, both in forward and when it is recomputed."""

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        def quiet(*given: Any) -> Any:
            before, layer.training = layer.training, False
            try:
                return function(*given)
            finally:
                layer.training = before

        return checkpoint(quiet, *arguments)

    return run


@contextmanager
def recomputing(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing: inside this block layers recompute in backward what they did in forward.

    transformers does so for layers in training mode. A layer has that mode only until its forward begins: dropout stays
    off, also where a layer calls it as a function of its own mode. Sampling, outside, keeps its cache.
    """
    layers = recomputed_layers(model) if enabled else []
    if layers:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
                # transformers 5.2x renamed it
                switch = getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)
                switch({"use_reentrant": False})
    for layer in layers:
        layer._gradient_checkpointing_func = _in_evaluation_mode(layer, layer._gradient_checkpointing_func)
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def compute_in(dtype: str, device: torch.device) -> AbstractContextManager:
    """Autocast to bf16, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def prepare(model: nn.Module, device: torch.device) -> nn.Module:
    """On its device, without dropout, and with a config object of its own; without weights it stays on meta."""
    own_config(model)
    return model.to(device).eval() if has_weights(model) else model.eval()
