"""Frozen weights in bfloat16: which are stored so, that results are the same, and what is saved."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='transformers is not installed: pip install "ppo_fast[train]"')

from support import families, several
from support.tiny import byte_tokenizer, distinct, save_tiny_model, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from ppo_fast.cli.commands import main
from ppo_fast.common.errors import UserError
from ppo_fast.llm import memory
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import SINGLE_PROCESS
from ppo_fast.llm.invariants import ROUNDING, rounding_of
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.models.frozen import STORED, StoredEmbedding, StoredLinear, is_stored, store_frozen, widen_frozen
from ppo_fast.llm.models.reference import FrozenReference
from ppo_fast.llm.models.reward_model import RewardModel
from ppo_fast.llm.trainer import PPOTrainer

BF16 = torch.bfloat16
ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps")]
SMALL: dict[str, Any] = dict(total_steps=1, prompts_per_step=4, max_new_tokens=6, minibatches=2, epochs=1, lr=1e-3)
SMALL |= dict(device="cpu", quiet=True, tensorboard=False)


def trainer_of(actor: Any = None, *, reference: Any = None, **options: Any) -> PPOTrainer:
    config = PPOConfig(**{**SMALL, **options})
    actor = tiny_llama(258) if actor is None else actor
    return PPOTrainer(config, actor, byte_tokenizer(), ROWS, distinct, reference=reference)


def of_learning(metrics: dict[str, float]) -> dict[str, float]:
    return {
        k: v for k, v in metrics.items() if not k.startswith(("seconds", "tokens_per", "memory", "learn_tflops", "mfu"))
    }


def stored_weights(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if type(m) in STORED]


def logits(model: nn.Module, *, autocast: bool) -> Tensor:
    ids = torch.arange(12).unsqueeze(0) * 7 % 250
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16, enabled=autocast):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", families.NAMES)
def test_stored_weights_give_the_same_bits_under_autocast(name: str, tmp_path: Path):
    model = families.load(name, tmp_path).requires_grad_(False)
    before = logits(model, autocast=True)
    size = sum(p.nbytes for p in model.parameters())
    assert store_frozen(model, BF16)
    assert torch.equal(logits(model, autocast=True), before)
    layers = model.config.num_hidden_layers
    assert len(stored_weights(model)) >= 4 * layers
    assert all(p.dtype == BF16 for p in stored_weights(model))
    others = [p for p in model.parameters() if all(p is not w for w in stored_weights(model))]
    assert all(p.dtype == torch.float32 for p in others)
    assert model.get_input_embeddings().weight.dtype == model.get_output_embeddings().weight.dtype == torch.float32
    saved = sum(p.numel() for p in stored_weights(model)) * 2
    assert sum(p.nbytes for p in model.parameters()) == size - saved


def test_tied_layers_stay_tied_and_trained_ones_are_unchanged():
    model = tiny_llama(258).requires_grad_(False)
    first, second = (layer.mlp.gate_proj for layer in model.model.layers)
    second.weight = first.weight
    trained = model.model.layers[0].self_attn.q_proj
    trained.weight.requires_grad_(True)
    store_frozen(model, BF16)
    assert first.weight is second.weight
    assert first.weight.dtype == BF16
    assert type(trained) is nn.Linear
    assert trained.weight.dtype == torch.float32
    widen_frozen(model)
    assert first.weight is second.weight
    assert first.weight.dtype == torch.float32
    assert not is_stored(model)


def test_nothing_is_rounded_where_the_weights_are_those_of_a_bfloat16_model():
    model = tiny_llama(258).requires_grad_(False)
    kept = tiny_llama(258).bfloat16().float()
    assert not store_frozen(copy.deepcopy(kept).requires_grad_(False), BF16)
    assert store_frozen(model, BF16)
    assert not store_frozen(tiny_llama(258).requires_grad_(False), None)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_without_autocast_a_layer_computes_with_its_rounded_weights(build: Any):
    model = build().requires_grad_(False)
    rounded = copy.deepcopy(model)
    store_frozen(model, BF16)
    with torch.no_grad():
        for mine, its in zip(model.parameters(), rounded.parameters(), strict=True):
            its.copy_(mine)
    torch.testing.assert_close(logits(model, autocast=False), logits(rounded, autocast=False))


@pytest.mark.parametrize("trains_bias", [False, True])
def test_widened_weights_have_the_gradient_of_a_linear_layer_and_are_not_kept(trains_bias: bool):
    plain = nn.Linear(64, 48)
    plain.weight.requires_grad_(False).copy_(plain.weight.bfloat16().float())
    assert plain.bias is not None
    plain.bias.requires_grad_(trains_bias)
    stored = copy.deepcopy(plain)
    stored.weight = nn.Parameter(stored.weight.bfloat16(), requires_grad=False)
    stored.__class__ = StoredLinear
    kept: list[Tensor] = []
    found = []
    for layer in (plain, stored):
        x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = layer(x)
        (out**2).sum().backward()
        found.append((out.detach(), x.grad, layer.bias.grad))
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() == 64 * 48]
    for mine, its in zip(*found, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"lora_rank": 2, "critic": "shared"}], ids=str)
def test_a_step_in_bfloat16_is_the_same_with_frozen_weights_in_bfloat16(options: dict[str, Any]):
    if options:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    wide, narrow = (trainer_of(dtype="bfloat16", frozen_dtype=x, **options) for x in ("float32", "auto"))
    frozen = narrow.actor if options else narrow.reference.model
    assert len(stored_weights(frozen)) == 14
    assert not is_stored(wide.actor)
    assert is_stored(narrow.actor) == bool(options)
    if options.get("critic") != "shared":
        assert is_stored(narrow.critic) == bool(options)
    assert of_learning(wide.step()) == of_learning(narrow.step())


def saved_in_bfloat16() -> PreTrainedModel:
    """A model whose weights are values of bfloat16, and whose LM head is its embedding."""
    model = tiny_llama(258).bfloat16().float()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"lora_rank": 2, "head_dtype": "float32"}], ids=str)
def test_embeddings_and_heads_are_stored_where_no_value_changes(options: dict[str, Any]):
    if options:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    common = dict(dtype="bfloat16", total_steps=2, **options)
    wide, narrow = (trainer_of(saved_in_bfloat16(), frozen_dtype=x, **common) for x in ("float32", "auto"))
    model = narrow.actor.get_base_model() if options else narrow.reference.model
    embedding = model.get_input_embeddings()
    assert type(embedding) is StoredEmbedding
    assert embedding.weight is model.lm_head.weight
    assert embedding.weight.dtype == BF16
    assert type(model.lm_head) is StoredLinear
    assert [of_learning(x) for x in wide.train()] == [of_learning(x) for x in narrow.train()]
    widen_frozen(model)
    assert type(embedding) is nn.Embedding
    assert embedding.weight is model.lm_head.weight
    assert embedding.weight.dtype == torch.float32


def test_a_weight_that_another_kind_of_layer_uses_is_kept():
    model = saved_in_bfloat16().requires_grad_(False)

    class Scaled(nn.Embedding):
        pass

    model.get_input_embeddings().__class__ = Scaled
    store_frozen(model, BF16)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.float32
    assert len(stored_weights(model)) == 14


def test_models_that_the_user_gives_are_unchanged():
    peft = pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    reference = tiny_llama(258)
    trainer = trainer_of(dtype="bfloat16", reference=reference)
    trainer.step()
    assert not is_stored(reference)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    given = peft.get_peft_model(tiny_llama(258), lora)
    trainer_of(given, dtype="bfloat16").step()
    assert not is_stored(given)
    given = peft.get_peft_model(tiny_llama(258), lora)
    with torch.no_grad():
        for name, p in given.named_parameters():
            p.add_(0.01 * ("lora_B" in name))  # trained adapters, of which the reference keeps a copy
    trainer = trainer_of(given, dtype="bfloat16", frozen_dtype="bfloat16")
    assert is_stored(given)
    assert {p.dtype for name, p in given.named_parameters() if "lora" in name} == {torch.float32}
    trainer.step()
    assert torch.equal(trainer.last_experience.logprobs, trainer.last_experience.ref_logprobs)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=str)
def test_frozen_weights_in_bfloat16_with_fp32_compute_pass_the_first_checks(options: dict[str, Any]):
    if options:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    actor = tiny_llama(258)
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(1 + 3 * (p.ndim > 1))  # logits that differ, so that rounding shows
    trainer = trainer_of(actor, dtype="float32", frozen_dtype="bfloat16", **options)
    metrics = trainer.step()
    assert metrics["learn/ratio_max"] > 0
    difference = trainer.last_experience.logprobs - trainer.last_experience.ref_logprobs
    largest = difference.abs().max().item()
    if options:  # the reference is the actor without its adapters, which start at zero
        assert largest <= ROUNDING["float32"].p99
    else:
        assert isinstance(trainer.reference, FrozenReference)
        assert trainer.reference.rounded
        assert ROUNDING["float32"].p99 < largest < ROUNDING["bfloat16"].p99


def test_the_bound_of_the_first_kl_is_wider_only_where_weights_were_rounded():
    config = PPOConfig(dtype="float32", frozen_dtype="bfloat16")
    assert rounding_of(config, "cpu") == ROUNDING["float32"]
    assert rounding_of(config, "cpu", frozen_rounded=True) == ROUNDING["bfloat16"]
    exact = trainer_of(tiny_llama(258).bfloat16().float(), dtype="float32", frozen_dtype="bfloat16")
    assert isinstance(exact.reference, FrozenReference)
    assert is_stored(exact.reference.model)
    assert not exact.reference.rounded
    exact.step()


def test_a_merged_model_has_fp32_weights_with_the_adapters_in_them(tmp_path: Path):
    pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    options = dict(lora_rank=2, merge_adapters=True, out=str(tmp_path), lr=0.1, warmup_ratio=0.0)
    trainer = trainer_of(dtype="bfloat16", **options)
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert all(p.dtype == torch.float32 for p in saved.parameters())
    layer = trainer.actor.get_base_model().model.layers[0].mlp.up_proj
    delta = layer.get_delta_weight("default")
    assert delta.abs().max() > 0
    torch.testing.assert_close(saved.model.layers[0].mlp.up_proj.weight, layer.base_layer.weight.float() + delta)
    assert is_stored(trainer.actor)


def test_a_partly_frozen_model_is_saved_in_one_dtype(tmp_path: Path):
    actor = tiny_llama(258)
    actor.model.layers[0].requires_grad_(False)
    trainer_of(actor, dtype="bfloat16", frozen_dtype="bfloat16", out=str(tmp_path)).train()
    assert len(stored_weights(actor)) == 7
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=str)
def test_a_run_with_stored_weights_is_resumed_bit_for_bit(options: dict[str, Any], tmp_path: Path):
    if options:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    options |= dict(dtype="bfloat16", total_steps=2, lr_schedule="constant", warmup_ratio=0.0)
    whole = trainer_of(**options).train()
    trainer_of(**{**options, "total_steps": 1}, out=str(tmp_path), save_every=1).train()
    again = trainer_of(**options, out=str(tmp_path))
    assert again.resume()
    assert of_learning(again.train()[0]) == of_learning(whole[1])
    other = trainer_of(**options, out=str(tmp_path), frozen_dtype="float32")
    with pytest.raises(UserError, match="frozen_dtype was auto and is float32"):
        other.resume()


def step_of_lora() -> dict[str, float]:
    trainer = several.trainer_of(several.options(dtype="bfloat16", lora_rank=2, total_steps=1))
    assert is_stored(trainer.actor)
    return of_learning(trainer.step())


@pytest.mark.slow
def test_two_processes_store_frozen_weights(tmp_path: Path):
    pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    first, second = several.run(tmp_path, step_of_lora)
    assert first == second


def test_under_fsdp_a_stored_dtype_is_rejected():
    distributed = dataclasses.replace(SINGLE_PROCESS, strategy="fsdp")
    config = PPOConfig(dtype="bfloat16", frozen_dtype="bfloat16")
    with pytest.raises(UserError, match="frozen_dtype = bfloat16 has no effect under fsdp"):
        build_models(config, tiny_llama(258), None, None, torch.device("cpu"), distributed)


def test_a_model_that_reads_weights_of_its_layers_keeps_them():
    pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=8, eos_token_id=256)
    for options in ({}, {"lora_rank": 2, "lora_targets": "in_proj"}):
        with pytest.raises(UserError, match="frozen_dtype = bfloat16 does not work for this Mamba"):
            trainer_of(MambaForCausalLM(config), dtype="float32", frozen_dtype="bfloat16", **options)
    kept = trainer_of(MambaForCausalLM(config), dtype="bfloat16", lora_rank=2, lora_targets="in_proj")
    assert not is_stored(kept.actor)
    kept.step()


def judge() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=1)
    tokens = dict(vocab_size=258, bos_token_id=None, eos_token_id=256, pad_token_id=257)
    return LlamaForSequenceClassification(LlamaConfig(**shape, **tokens, initializer_range=0.3)).eval()


def test_a_reward_model_follows_the_run_and_its_scores_are_not_rounded():
    model: PreTrainedModel = judge().requires_grad_(False)
    reward = RewardModel(model, byte_tokenizer())
    texts = ["ab", "hello", "you", "what is it"], ["c", "dd", "e", "f g"]
    exact = torch.tensor(reward(*texts))
    reward.follow_dtype(PPOConfig(dtype="float32"))
    assert torch.equal(torch.tensor(reward(*texts)), exact)
    reward.follow_dtype(PPOConfig(dtype="bfloat16"))
    assert len(stored_weights(model)) == 14
    assert model.score.weight.dtype == torch.float32
    found = torch.tensor(reward(*texts))
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    assert not torch.equal(found, found.bfloat16().float())


def test_the_command_stores_the_reward_models_that_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_tiny_model(tmp_path / "model")
    judge().save_pretrained(tmp_path / "judge")
    byte_tokenizer().save_pretrained(tmp_path / "judge")
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    made: list[PPOTrainer] = []
    train = PPOTrainer.train
    monkeypatch.setattr(PPOTrainer, "train", lambda self: made.append(self) or train(self))
    given = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "p.jsonl"), "--quiet", "--device", "cpu"]
    given += ["--reward-model", str(tmp_path / "judge"), "--total-steps", "1", "--prompts-per-step", "4"]
    for dtype in ("float32", "bfloat16"):
        assert main(["train", *given, "--max-new-tokens", "3", "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
    wide, narrow = (next(iter(trainer.rewards.values())) for trainer in made)
    assert isinstance(wide, RewardModel)
    assert isinstance(narrow, RewardModel)
    assert not is_stored(wide.model)
    assert len(stored_weights(narrow.model)) == 14
    assert made[0].hashes.rewards
    assert made[0].hashes.rewards == made[1].hashes.rewards  # of the files


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}], ids=str)
def test_the_calculated_memory_has_stored_weights(options: dict[str, Any]):
    if options:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    model_config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    sizes = []
    for frozen in ("float32", "auto"):
        config = PPOConfig(dtype="bfloat16", frozen_dtype=frozen, **options)
        parts = memory.estimate(model_config, config, 16).phases["score"]
        sizes.append(parts["weights"])
    layers = 4 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 128)
    models = 2 if options else 1  # actor and critic; or the reference
    assert sizes[0] - sizes[1] == 2 * layers * models
