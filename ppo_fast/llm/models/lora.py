"""LoRA adapters through peft."""

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig

if TYPE_CHECKING:
    from peft import PeftModel

Model = TypeVar("Model", bound=nn.Module)


def add_lora(model: nn.Module, *, rank: int, alpha: int, targets: str, language_model: bool) -> "PeftModel":
    """Add LoRA adapters (Hu et al. 2021) through peft, and freeze all other weights.

    `targets`: "all-linear", or comma-separated names of modules. The LM head gets an adapter only if it is named. The
    names are those of a language model; a critic may lack some of them.

    Raises:
        UserError: the model lacks a module of that name.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("lora_rank > 0 needs peft: pip install peft, or the extra ppo_fast[peft]") from error
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets if targets == "all-linear" else _targets(model, targets, language_model=language_model),
        task_type="CAUSAL_LM" if language_model else "FEATURE_EXTRACTION",
    )
    return peft.get_peft_model(model, config)


def _targets(model: nn.Module, targets: str, *, language_model: bool) -> list[str]:
    """Split names of modules, each of which the model must have: peft ignores a missing one beside others."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    names = [name.strip() for name in targets.split(",")]
    found = [name for name in names if name and any(module.endswith(f".{name}") for module in modules)]
    missing = [name for name in names if name not in found]
    if missing and (language_model or not found):
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        advice = "" if language_model else "; critic = shared needs no adapters of its own"
        raise UserError(
            f"lora_targets names {missing[0]!r}, which the {'actor' if language_model else 'critic'} lacks; its linear"
            f" layers are {', '.join(sorted(linear))}{advice}"
        )
    return found


def with_lora(model: Model, config: PPOConfig, *, language_model: bool) -> "Model | PeftModel":
    """Return the model with the adapters that the options name; unchanged if they name none."""
    if not config.lora_rank:
        return model
    return add_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.lora_targets,
        language_model=language_model,
    )
