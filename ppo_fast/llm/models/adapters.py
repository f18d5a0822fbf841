"""The reference of an actor with adapters of peft, which needs no second model."""

from typing import TYPE_CHECKING

from ppo_fast.common.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

ADVICE = "give PPOTrainer a reference of its own (reference=...), merge the adapters first, or set kl_coef to 0"

# What add_adapter of peft raises for a configuration of which it takes only one
CLONING_ERRORS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError)


def has_trained_adapters(actor: "PeftModel") -> bool:
    """Whether the active adapter may change the actor's output; False only if it provably does not.

    A LoRA adapter changes nothing while one of its two matrices is zero, with which each starts. All other kinds, and
    LoRA with more than its two matrices (DoRA, modules_to_save, token indices), count as trained.
    """
    active = actor.active_adapter
    names = [(name, p) for name, p in actor.named_parameters() if active in name.split(".")]
    if not names or not all(".lora_" in name and "_magnitude_" not in name for name, _ in names):
        return True
    return any(bool(p.any()) for name, p in names if ".lora_B." in name or ".lora_embedding_A." in name)


def check_adapters(actor: "PeftModel") -> None:
    """Reject adapters with which log-probabilities of packed rows would be wrong.

    Raises:
        UserError: the adapter puts virtual tokens in front of the prompt.
    """
    config = actor.peft_config[actor.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning and kind != "PREFIX_TUNING":
        raise UserError(
            f"the actor's adapter is of the kind {kind}, whose virtual tokens move every token of a prompt to another"
            " position: use LoRA, or another adapter of the weights"
        )
