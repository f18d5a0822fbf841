"""The reference of an actor with adapters is the model that the run starts from, whatever kind of adapter it has."""

import pytest
import torch
from support.tiny import byte_tokenizer, tiny_llama

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.adapters import has_trained_adapters
from ppo_fast.llm.models.reference import AdapterReference
from ppo_fast.llm.trainer import PPOTrainer

peft = pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")

ROWS = [{"prompt": "ab"}, {"prompt": "cdefgh"}]
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def trainer_of(actor, **options) -> PPOTrainer:
    small = dict(total_steps=9, prompts_per_step=4, minibatches=1, epochs=1, max_new_tokens=8, quiet=True, device="cpu")
    return PPOTrainer(
        PPOConfig(**{**small, "warmup_ratio": 0.0, **options}),
        actor,
        byte_tokenizer(),
        ROWS,
        lambda prompts, completions: [float(len(set(text))) for text in completions],
    )


def adapted(config, *, trained: bool = True, model=None):
    """A model with adapters, as after a training of them, or as peft makes them."""
    torch.manual_seed(0)
    actor = peft.get_peft_model(tiny_llama() if model is None else model, config)
    if trained:
        with torch.no_grad():
            for p in actor.parameters():
                if p.requires_grad:
                    p += 0.3 * torch.randn_like(p)
    return actor.eval()


KINDS = {
    "lora": peft.LoraConfig(**LORA),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "dropout": peft.LoraConfig(**LORA, lora_dropout=0.5),
    "head": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices=[97, 98]),
    "embedding": peft.LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "lokr": peft.LoKrConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_trained_adapters_of_any_kind_are_the_reference(kind):
    trainer = trainer_of(adapted(KINDS[kind]), lr=1e-2)
    assert trainer.reference.starts_trained
    start = {name: p.detach().clone() for name, p in trainer.actor.named_parameters()}
    first = trainer.step()
    gap = trainer.last_experience.ref_logprobs - trainer.last_experience.logprobs
    assert gap.abs().max() == 0, "before the first update actor and reference are the same"
    assert first["sampler_gap_max"] < 1e-4
    moved = {name for name, p in trainer.actor.named_parameters() if not torch.equal(p, start[name])}
    assert moved
    assert not [name for name in moved if AdapterReference.NAME in name]
    assert trainer.step()["kl_per_answer"] != 0
    assert not [name for name, x in trainer.actor.named_modules() if x.training], "dropout would be active"


def test_new_adapters_of_lora_are_switched_off_in_the_reference():
    actor = adapted(peft.LoraConfig(**LORA), trained=False)
    assert not has_trained_adapters(actor)
    trainer = trainer_of(actor)
    assert not trainer.reference.starts_trained
    assert not [name for name, _ in actor.named_parameters() if AdapterReference.NAME in name]
    on_embedding = adapted(peft.LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}), trained=False)
    assert not has_trained_adapters(on_embedding), "its first matrix is zero, not its second"


def test_an_adapter_that_puts_tokens_in_front_of_the_prompt_is_rejected():
    actor = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="of the kind PROMPT_TUNING, whose virtual tokens move every token"):
        trainer_of(actor, kl_coef=0.0)


def test_trained_weights_that_the_reference_would_share_are_rejected():
    actor = adapted(peft.LoraConfig(**LORA))
    actor.base_model.model.lm_head.weight.requires_grad_(True)
    message = r"training changes base_model.model.lm_head.weight, which is not the adapter's own"
    with pytest.raises(UserError, match=message):
        trainer_of(actor)
    trainer_of(actor, kl_coef=0.0)


def test_an_adapter_of_which_peft_keeps_one_only_is_rejected():
    with pytest.raises(UserError, match="peft cannot keep a frozen copy of the actor's adapter") as error:
        trainer_of(adapted(peft.LoraConfig(**LORA, bias="lora_only")))
    assert "give PPOTrainer a reference of its own" in str(error.value)


def test_a_copy_that_computes_other_logits_than_its_adapter_is_rejected(monkeypatch):
    monkeypatch.setattr(AdapterReference, "_copy_weights", lambda self: None)
    with pytest.raises(UserError, match="the frozen copy of the actor's adapter gives other logits"):
        trainer_of(adapted(peft.LoraConfig(**LORA)))


def test_adapters_that_were_loaded_frozen_are_rejected(tmp_path):
    adapted(peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    actor = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(UserError, match=r"all weights of the actor are frozen: .*is_trainable=True"):
        trainer_of(actor)
    trainer_of(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)).step()
