"""The calculated peak memory of a step beside what tensors hold on the test device."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import byte_tokenizer, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
)

from ppo_fast.common.errors import UserError
from ppo_fast.llm import memory, setup
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.lora import add_lora
from ppo_fast.llm.trainer import PPOTrainer

QWEN2 = Qwen2Config(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=257,
)
GPT2 = GPT2Config(vocab_size=258, n_embd=64, n_layer=4, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None)
PROMPT = 16
ROWS = [{"prompt": "x" * PROMPT}] * 16
PHASES = {"sample": ("prompts", "last token"), "score": ("score",), "learn": ("loss", "backward", "update")}


def config(**options: Any) -> PPOConfig:
    small = dict(total_steps=3, prompts_per_step=16, max_new_tokens=16, minibatches=2, epochs=1, quiet=True)
    rest = dict(device="testgpu", backend="torch", tensorboard=False, dtype="bfloat16", micro_batch_tokens=256)
    return PPOConfig(**{**small, **rest, **options})


def peaks(model_config: PreTrainedConfig, options: PPOConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most bytes that the test device held in each phase of the second step, and between steps."""
    torch.manual_seed(0)
    actor = AutoModelForCausalLM.from_config(model_config).eval()
    made = PPOTrainer(options, actor, byte_tokenizer(), ROWS, lambda prompts, completions: [1.0] * len(prompts))
    made.step()
    found: dict[str, int] = {}
    module = torch.get_device_module("testgpu")

    def measured(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **others: Any) -> Any:
            module.reset_peak_memory_stats()
            result = function(*args, **others)
            found[phase] = module.max_memory_allocated()
            return result

        return run

    phases = {
        "sample": (made, "_sample"),
        "score": (made.learner, "make_experience"),
        "learn": (made.learner, "update"),
    }
    for phase, (owner, name) in phases.items():
        monkeypatch.setattr(owner, name, measured(phase, getattr(owner, name)))
    gc.collect()
    found["between"] = module.memory_allocated()
    made.step()
    return found


@pytest.mark.parametrize(
    ("model_config", "options"),
    [
        (QWEN2, {}),
        (QWEN2, {"dtype": "float32"}),
        (QWEN2, {"lora_rank": 4}),
        (QWEN2, {"gradient_checkpointing": True}),
        (QWEN2, {"critic": "shared"}),
        (QWEN2, {"kl_coef": 0.0}),
        (QWEN2, {"micro_batch_tokens": 64}),
        (QWEN2, {"max_new_tokens": 48, "micro_batch_tokens": 512}),
        (GPT2, {}),
    ],
    ids=lambda x: x.model_type if isinstance(x, PreTrainedConfig) else "+".join(x) or "default",
)
def test_the_calculated_peak_is_within_a_tenth_of_what_the_device_held(
    model_config, options, as_cuda, monkeypatch: pytest.MonkeyPatch
):
    """In fp32 and while sampling the device's attention holds scores, which a GPU's kernels do not: a few percent."""
    options = config(**options)
    held = peaks(model_config, options, monkeypatch)
    found = memory.estimate(model_config, options, PROMPT)
    calculated = {name: sum(parts.values()) for name, parts in found.phases.items()}
    ratios = {phase: max(calculated[n] for n in names) / held[phase] for phase, names in PHASES.items()}
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())
    assert found.peak <= memory.at_most(model_config, options, PROMPT, parameters)
    learn = found.phases["update"]
    assert held["between"] == pytest.approx(learn["weights"] + learn["optimizer"], rel=0.01)


def test_the_quick_bound_is_above_the_estimate_at_a_real_size():
    shape = dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)
    heads = dict(num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)
    model_config = Qwen2Config(**shape, **heads)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())
    for changes in ({}, {"dtype": "float32"}, {"micro_batch_tokens": 16384}, {"prompts_per_step": 256, "top_p": 0.9}):
        options = config(**{"max_new_tokens": 512, "prompts_per_step": 64, "micro_batch_tokens": 4096, **changes})
        found = memory.estimate(model_config, options, 256).peak
        assert found <= memory.at_most(model_config, options, 256, parameters) <= 4 * found


def test_nothing_of_a_step_stays_on_the_device(as_cuda):
    """Without a run of the garbage collector: a reference cycle would hold activations until its next one."""
    made = PPOTrainer(config(), tiny_llama(258), byte_tokenizer(), ROWS, lambda prompts, answers: [1.0] * len(prompts))
    made.step()
    module = torch.get_device_module("testgpu")
    gc.collect()
    before = module.memory_allocated()
    gc.disable()
    try:
        made.step()
        assert module.memory_allocated() == pytest.approx(before, abs=20_000)  # the last rollout and its experience
    finally:
        gc.enable()


def test_a_model_that_does_not_fit_is_rejected_before_it_is_moved_with_options_that_help(as_cuda, monkeypatch):
    module = torch.get_device_module("testgpu")
    before = module.memory_allocated()
    monkeypatch.setattr(setup, "total_memory", lambda device: 12 << 20)
    actor = AutoModelForCausalLM.from_config(QWEN2)
    with pytest.raises(UserError, match=r"needs 0\.0 GiB by calculation .* --gradient-checkpointing \(0\.0 GiB\)"):
        PPOTrainer(config(), actor, byte_tokenizer(), ROWS, lambda prompts, completions: [1.0] * len(prompts))
    assert module.memory_allocated() == before
    options = config(check_memory=False)
    made = PPOTrainer(options, actor, byte_tokenizer(), ROWS, lambda prompts, completions: [1.0] * len(prompts))
    assert made.device.type == "testgpu"


class OwnConfig(LlamaConfig):
    """A configuration that transformers does not know, as a user's own model has."""

    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


def give_memory(monkeypatch: pytest.MonkeyPatch, mib: float) -> None:
    monkeypatch.setattr(setup, "total_memory", lambda device: round(mib * 2**20))


def test_a_model_that_transformers_does_not_know_is_trained_with_a_note(as_cuda, monkeypatch):
    give_memory(monkeypatch, 1.0)
    shape = {k: v for k, v in tiny_llama(258).config.to_dict().items() if k != "model_type"}
    actor = OwnModel(OwnConfig(**shape))
    made = PPOTrainer(config(), actor, byte_tokenizer(), ROWS, lambda prompts, completions: [1.0] * len(prompts))
    assert any("the peak memory of a model of type 'own' cannot be calculated" in note for note in made.notes)


def test_an_actor_in_half_precision_is_calculated_with_its_own_dtype(as_cuda, monkeypatch):
    options = config(max_new_tokens=1, prompts_per_step=1, minibatches=1, frozen_dtype="float32")
    half, whole = (
        memory.estimate(QWEN2, options, PROMPT, dtype=dtype).phases["update"]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half["weights"] == pytest.approx(whole["weights"] / 2, rel=0.01)
    assert half["optimizer"] == pytest.approx(whole["optimizer"] / 2, rel=0.01)
    assert half["gradients"] == pytest.approx(whole["gradients"] / 2, rel=0.02)  # 512 bytes of each small one
    needed = sum(whole.values()) / 2**20
    give_memory(monkeypatch, 0.9 * needed)
    actor = AutoModelForCausalLM.from_config(QWEN2).bfloat16()
    with pytest.raises(UserError, match="would be trained in bfloat16"):  # and not: needs too much memory
        PPOTrainer(options, actor, byte_tokenizer(), ROWS[:1], lambda prompts, completions: [1.0] * len(prompts))


@pytest.mark.parametrize("given", ["critic", "reference"])
def test_models_that_are_given_do_not_count_as_large_as_the_actor(given, as_cuda, monkeypatch):
    options = config(max_new_tokens=1, prompts_per_step=1, minibatches=1)
    small = tiny_llama(258, hidden=8)
    argument: Any = {"critic": Critic(small.model, 8), "reference": small}[given]
    without = dataclasses.replace(options, **{"critic": {"critic": "shared"}, "reference": {"kl_coef": 0.0}}[given])
    whole, part = (memory.estimate(QWEN2, x, PROMPT).peak for x in (options, without))
    give_memory(monkeypatch, (whole + part) / 2 / 2**20)
    actor, reward = AutoModelForCausalLM.from_config(QWEN2), lambda prompts, completions: [1.0] * len(prompts)
    made = PPOTrainer(options, actor, byte_tokenizer(), ROWS[:1], reward, **{given: argument})
    assert not [note for note in made.notes if "memory" in note]
    with pytest.raises(UserError, match="by calculation"):
        PPOTrainer(options, AutoModelForCausalLM.from_config(QWEN2), byte_tokenizer(), ROWS[:1], reward)


@pytest.mark.parametrize("kind", ["frozen", "quantised"])
def test_actors_whose_memory_is_unknown_are_trained_with_a_note(kind, as_cuda, monkeypatch):
    give_memory(monkeypatch, 2**-10)
    actor = AutoModelForCausalLM.from_config(QWEN2)
    if kind == "frozen":
        actor.get_input_embeddings().requires_grad_(False)
    else:
        actor.config.quantization_config = {"load_in_4bit": True}
    made = PPOTrainer(config(), actor, byte_tokenizer(), ROWS, lambda prompts, completions: [1.0] * len(prompts))
    assert any("the peak memory is not calculated" in note and kind in note for note in made.notes)


def test_a_part_that_is_smaller_in_each_deeper_model_is_extrapolated_from_the_deepest(monkeypatch):
    def phases(shallow: Any, *_: Any) -> dict[str, dict[str, int]]:
        layers = shallow.num_hidden_layers
        return {"update": {"weights": 100 * layers, "logits": 100 - layers}}

    monkeypatch.setattr(memory, "_phases", phases)
    deep = Qwen2Config(**{**QWEN2.to_dict(), "num_hidden_layers": 32, "layer_types": None})
    assert memory.estimate(deep, config(), PROMPT).phases == {"update": {"weights": 3200, "logits": 68}}


def test_adapters_that_the_actor_brings_are_calculated_as_they_are():
    kept = dict(lora_rank=4, frozen_dtype="float32")  # its own frozen weights are as they are
    options = config(lora_targets="q_proj,v_proj", **kept)
    adapters = dict(rank=4, alpha=8, language_model=True)
    actor = add_lora(AutoModelForCausalLM.from_config(QWEN2), targets="v_proj,q_proj", **adapters)
    assert memory.with_adapters_of(actor, config()) == options
    every = add_lora(AutoModelForCausalLM.from_config(QWEN2), targets="all-linear", **adapters)
    found, expected = (
        memory.estimate(QWEN2, x, PROMPT) for x in (memory.with_adapters_of(every, config()), config(**kept))
    )
    assert found == expected


def test_merging_adapters_takes_no_memory_of_the_device(testgpu: torch.device):
    from ppo_fast.llm.models.lora import add_lora
    from ppo_fast.llm.report.export import merged

    actor = add_lora(tiny_llama(258), rank=4, alpha=8, targets="all-linear", language_model=True).to(testgpu)
    module = torch.get_device_module(testgpu)
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    found = merged(actor)
    assert module.max_memory_allocated() == before
    assert {p.device.type for p in found.parameters()} == {"cpu"}
