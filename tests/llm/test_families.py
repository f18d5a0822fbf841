"""Model families: each learns by its own log-probabilities, on the fastest path that is right, or is rejected."""

import math
import warnings
from typing import Any

import pytest
import torch
from support import families
from support.every_family import FAST, KINDS, Outcome, build, config_of, outcome_of, own_logprobs
from support.tiny import byte_tokenizer, distinct, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForSequenceClassification,
    CLIPVisionConfig,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.experience import ExperienceMaker
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import GenerateInfo, decoder_of
from ppo_fast.llm.models.policy import packed_mode
from ppo_fast.llm.models.probe import Reach, detect_head, detect_heads, named_lengths
from ppo_fast.llm.packing.pack import make_pack
from ppo_fast.llm.sample import drop_long_prompts
from ppo_fast.llm.trainer import PPOTrainer
from ppo_fast.rewards.fluency import Fluency

# In fp32 the models of this file differ by less than 1e-4 between two orders of summation.
ROUNDING = 1e-3
# Two passes may run through different kernels (Doge: SDPA with a mask that requires a gradient), and then differ by
# rounding.
SAME_PASS = 1e-5
# Rounding grows by more than ROUNDING in the recurrence of these models with random weights; in fp64 the gap of the
# first is 2e-7.
RECURRENT = {"hrm_text": 0.1, "zamba2": 0.1}

# One family for each code path, and what the path is.
PATHS = {
    "llama": Outcome(linear=True, packed=True),
    "mixtral": Outcome(linear=True, packed=True),  # a router of experts
    "gemma3": Outcome(linear=True, packed=True),  # a composite configuration
    "modernbert-decoder": Outcome(linear=False, packed=True),  # an LM head that is no single layer
    "bloom": Outcome(linear=True, packed=False),
    "llama4_text": Outcome(linear=True, packed=False),  # chunks of attention
    "openai-gpt": Outcome(linear=True, packed=False),  # no cache
    "rwkv": Outcome(linear=True, packed=False, left_padding=False),
    "bart": Outcome(linear=True, packed=False, left_padding=False),  # positions that count padding
    "moshi": Outcome(linear=True, packed=True, left_padding=False, cache=False),  # a cache that is wrong by itself
}


def check(kind: str, found: Outcome) -> None:
    if found.error is not None:
        assert kind not in FAST, found.error
        return
    limit = RECURRENT.get(kind, ROUNDING)
    assert found.gap <= limit
    assert found.sampler_gap <= limit
    assert math.isclose(found.ratio, 1.0, abs_tol=SAME_PASS)
    assert kind not in FAST or (found.linear and found.packed), found.warnings


@pytest.mark.families
@pytest.mark.parametrize("kind", KINDS)
def test_a_family_learns_by_its_own_log_probabilities_or_is_rejected(kind):
    model = build(kind)
    if model is None:
        pytest.skip(f"{kind}: every_family.py has no sizes with which a tiny model can be built")
    check(kind, outcome_of(model))


@pytest.mark.parametrize("kind", PATHS)
def test_a_family_takes_the_fastest_correct_path(kind):
    found, expected = outcome_of(build(kind)), PATHS[kind]
    check(kind, found)
    for name in ("error", "linear", "packed", "batched", "left_padding", "cache"):
        assert getattr(found, name) == getattr(expected, name), (name, found.warnings)


def trainer_of(actor: Any, *prompts: str, critic: Critic | None = None, **options: Any) -> PPOTrainer:
    small: dict[str, Any] = {
        "total_steps": 1,
        "prompts_per_step": len(prompts),
        "minibatches": 1,
        "epochs": 1,
        "max_new_tokens": 8,
        "device": "cpu",
        "quiet": True,
        "tensorboard": False,
    }
    reference = options.pop("reference", None)
    rows = [{"prompt": text} for text in prompts]
    config = PPOConfig(**{**small, **options})
    return PPOTrainer(config, actor, byte_tokenizer(), rows, distinct, critic=critic, reference=reference)


def own_of_rollout(model: Any, trainer: PPOTrainer) -> list[torch.Tensor]:
    """Log-probabilities of each answer's tokens, by the model's own forward on its sequence alone."""
    rollout = trainer.last_rollout
    assert rollout is not None
    first = rollout.tokens.shape[1] - rollout.completion_width
    asked = [first - n for n in rollout.prompt_lengths]
    answers = rollout.completion_lengths
    sequences = [rollout.tokens[i, start : first + n] for i, (start, n) in enumerate(zip(asked, answers, strict=True))]
    return [own_logprobs(model, ids, n) for ids, n in zip(sequences, answers, strict=True)]


# Lengths at which a model changes how it computes


def longrope() -> PreTrainedModel:
    """Take other frequencies for a batch whose longest sequence has more than 64 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0, 16.0, 32.0, 64.0]}
    options = {**families.SHAPE, **families.SPREAD, "original_max_position_embeddings": 64, "rope_parameters": rope}
    return AutoModelForCausalLM.from_config(Phi3Config(**options)).eval()


def test_log_probabilities_under_longrope_do_not_depend_on_longer_sequences():
    with pytest.warns(UserWarning, match="sequences of at most 64 tokens are packed separately") as caught:
        trainer = trainer_of(longrope(), "short one", "another", "a long prompt, " * 6, "fourth", lr=0.0)
    assert sum("packed separately" in str(x.message) for x in caught) == 1  # for actor, critic and reference together
    metrics = trainer.step()
    assert trainer.policy.head.packed
    assert trainer.policy.head.boundaries == trainer.policy.generate_info.boundaries == (64,)
    assert metrics["sampler_gap_max"] < 1e-4
    assert metrics["learn/ratio_max"] == 1.0
    assert trainer.last_experience is not None
    for row, own in enumerate(own_of_rollout(trainer.actor, trainer)):
        assert (own - trainer.last_experience.logprobs[row, : len(own)]).abs().max() < 1e-5


def test_a_pack_that_was_cut_without_the_boundaries_is_computed_one_sequence_at_a_time():
    with pytest.warns(UserWarning, match="separately"):
        trainer = trainer_of(longrope(), "short one", "a long prompt, " * 6, lr=0.0)
    trainer.step()
    rollout, experience = trainer.last_rollout, trainer.last_experience
    assert rollout is not None
    assert experience is not None
    pack = make_pack(rollout, [0, 1])
    with torch.no_grad(), packed_mode(trainer.policy):
        logprobs = trainer.policy.evaluate(pack).logprobs
    assert (logprobs - pack.gather(experience.logprobs)).abs().max() < 1e-5


def test_a_run_that_stays_below_a_length_keeps_the_fast_path():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = trainer_of(longrope(), "short one", "another")
    assert trainer.policy.head.packed
    assert trainer.policy.head.boundaries == ()


def test_an_answer_that_crosses_the_original_length_is_announced():
    with pytest.warns(UserWarning, match="samples the tokens before and after 64 differently"):
        trainer_of(longrope(), "x" * 60, "short")


def test_lengths_that_the_configuration_names_are_found_as_far_as_the_run_reaches():
    model = AutoModelForCausalLM.from_config(families.configs()["qwen2"])
    assert named_lengths(model, 6) == []
    assert named_lengths(model, 7) == [6]  # the sliding window
    assert named_lengths(longrope(), 100) == [64]


def test_lengths_without_time_to_check_run_on_the_models_own_forward(monkeypatch):
    monkeypatch.setattr("ppo_fast.llm.models.probe.RATES", {"cpu": 1.0})
    with pytest.warns(UserWarning, match="more than 64 tokens differently, and the probe has no time") as caught:
        head = detect_head(longrope(), reach=Reach(longest=100))
    assert len(caught) == 1
    assert not head.batched
    assert not head.packed


def test_prompts_share_a_batch_only_where_that_is_correct():
    lengths, how = [3, 60, 3, 70, 5, 60, 80], {"new_tokens": 8, "size": 10}
    assert GenerateInfo().batches(lengths, **how) == [[0, 1, 2, 3, 4, 5, 6]]
    assert GenerateInfo().batches(lengths, new_tokens=8, size=4) == [[0, 1, 2, 3], [4, 5, 6]]
    assert GenerateInfo(left_padding=False).batches(lengths, **how) == [[0, 2], [1, 5], [3], [4], [6]]
    assert GenerateInfo(boundaries=(64,)).batches(lengths, **how) == [[0, 2, 4], [1, 5], [3, 6]]


def test_the_fluency_of_a_text_does_not_depend_on_longer_ones_in_its_batch():
    fluency = Fluency(longrope(), byte_tokenizer())
    prompts, answers = ["ab", "cd"], ["short", "a long answer, " * 6]
    together = fluency(prompts, answers)
    alone = [fluency([prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)


# Several families in one run


def values_of(trainer: PPOTrainer, tokens: int) -> torch.Tensor:
    rollout = trainer.last_rollout
    assert rollout is not None
    values = torch.zeros(rollout.mask.shape)
    config = PPOConfig(micro_batch_tokens=tokens, minibatches=1)
    with torch.no_grad(), packed_mode(trainer.policy):
        for pack in ExperienceMaker(trainer.policy, None, config).split_minibatches(rollout, range(len(rollout)))[0]:
            pack.scatter_(values, trainer.policy.evaluate(pack).values)
    return values


def test_a_critic_of_another_family_is_computed_by_its_own_rows():
    torch.manual_seed(0)
    shape = dict(vocab_size=258, hidden_size=32, n_layer=2, n_head=4, num_labels=1, initializer_range=0.3)
    reward_model = BloomForSequenceClassification(BloomConfig(**shape, pad_token_id=257, eos_token_id=256)).eval()
    with pytest.warns(UserWarning, match="BloomModel .* learns from padded rows"):
        trainer = trainer_of(
            tiny_llama(), "ab", "x" * 30, "hello", critic=Critic.from_reward_model(reward_model), lr=0.0, critic_lr=0.0
        )
    assert trainer.policy.head.packed
    assert not trainer.policy.critic_head.packed
    trainer.step()
    torch.testing.assert_close(values_of(trainer, 4096), values_of(trainer, 1), rtol=0, atol=1e-5)


def test_a_reference_of_another_family_has_its_own_softcap_and_rows():
    reference = AutoModelForCausalLM.from_config(families.configs()["gemma2"], attn_implementation="eager").eval()
    assert isinstance(reference, Gemma2ForCausalLM)
    trainer = trainer_of(tiny_llama(), "ab", "x" * 30, "hello", reference=reference, lr=0.0, kl_coef=0.1)
    trainer.step()
    assert trainer.last_experience is not None
    for row, own in enumerate(own_of_rollout(reference, trainer)):
        assert (own - trainer.last_experience.ref_logprobs[row, : len(own)]).abs().max() < 1e-4


def test_boundaries_are_common_to_all_models_of_a_run():
    with pytest.warns(UserWarning, match="separately"):
        heads = detect_heads(tiny_llama(), decoder_of(longrope()), None, reach=Reach(longest=100))
    assert heads.critic is not None
    assert heads.actor.boundaries == heads.critic.boundaries == (64,)
    assert heads.actor.packed


# Rejected models


@pytest.mark.parametrize("kind", ["bert", "cpmant"])
def test_a_model_that_sees_later_tokens_is_rejected(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, is_decoder=False)).eval()
    found = outcome_of(model)
    assert found.error is not None
    assert "is not causal: its values for a token depend on later tokens" in found.error


def test_attention_that_selects_tokens_is_rejected_only_for_longer_sequences():
    """Which of several equal scores are selected depends on the batch."""
    model = build("glm_moe_dsa")
    assert model is not None
    assert outcome_of(model).error is None
    model.config.index_topk = 8
    with pytest.raises(UserError, match="at most 8 tokens together, not 10; lower max_prompt_tokens"):
        trainer_of(model, "ab")


def test_an_encoder_decoder_model_is_rejected():
    shape = dict(vocab_size=258, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=257)
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        trainer_of(T5ForConditionalGeneration(T5Config(**shape)), "a")


# Composite models


def qwen_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    special = dict(image_token_id=255, video_token_id=254, vision_start_token_id=253)
    text = {**families.SHAPE, **families.SPREAD, "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))


def llava() -> PreTrainedModel:
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision_config = CLIPVisionConfig(**vision, image_size=28, patch_size=14)
    text_config = LlamaConfig(**families.SHAPE, **families.SPREAD)
    config = LlavaConfig(text_config=text_config, vision_config=vision_config, image_token_index=255)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [qwen_vl, llava])
def test_a_composite_model_learns_from_text(make):
    torch.manual_seed(0)
    found = outcome_of(make().eval())
    check("composite", found)
    assert (found.error, found.linear, found.packed, found.warnings) == (None, True, True, ())


def test_the_positions_of_a_composite_model_are_those_of_its_text_part():
    model = build("gemma3")
    assert model is not None
    rows = [{"prompt": "a"}, {"prompt": "x" * 500}]
    assert drop_long_prompts(rows, byte_tokenizer(), model, PPOConfig(max_new_tokens=8)) == (rows[:1], 1)


def test_the_decoder_shares_the_input_embeddings():
    """get_decoder() of Llama 4 returns the model itself, that of ModernBERT's decoder its output layer."""
    for kind in ("llama4_text", "modernbert-decoder", "gemma3", "bart"):
        model = build(kind)
        assert model is not None
        decoder = decoder_of(model)
        assert decoder is not model
        assert isinstance(decoder, PreTrainedModel)
        assert decoder.get_input_embeddings() is model.get_input_embeddings()


# Gradient checkpointing

DROPOUT: dict[str, dict[str, Any]] = {
    "opt": {"dropout": 0.1},
    "xglm": {"dropout": 0.1},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "biogpt": {"hidden_dropout_prob": 0.1},
    "bart": {"dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1},
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_off_under_gradient_checkpointing(kind):
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        config = config_of(kind, num_hidden_layers=2, head_dim=None, **DROPOUT[kind])
        model = AutoModelForCausalLM.from_config(config).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = trainer_of(model, "ab", "hello", "x", gradient_checkpointing=enabled, lr=1e-3)
            found.append(trainer.step())
        for name, value in DROPOUT[kind].items():
            assert getattr(trainer.actor.config, name) == value  # config.json keeps them
    plain, recomputed = found
    assert recomputed["learn/ratio_max"] == 1.0
    assert recomputed["learn/grad_norm"] == pytest.approx(plain["learn/grad_norm"], rel=1e-4)


def test_gradient_checkpointing_without_layers_that_support_it_is_announced():
    model = build("ctrl")
    with pytest.warns(UserWarning, match="gradient_checkpointing does nothing for CTRLLMHeadModel and CTRLModel"):
        trainer_of(model, "ab", gradient_checkpointing=True)


def test_compiled_layers_of_a_model_without_packed_rows_are_announced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "true")  # nothing is compiled
    with pytest.warns(UserWarning, match="compile_layers does nothing for CTRLLMHeadModel and CTRLModel"):
        trainer_of(build("ctrl"), "ab", compile_layers=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer_of(build("llama"), "ab", compile_layers=True)
    assert not [x for x in found if "compile_layers" in str(x.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_half_precision_are_sampled_with_padding_and_a_cache(dtype):
    """Frozen weights, that is: trained ones are fp32."""
    trainer = trainer_of(tiny_llama().to(dtype), "ab", "x" * 30, lora_rank=2)
    assert trainer.policy.generate_info == GenerateInfo()
