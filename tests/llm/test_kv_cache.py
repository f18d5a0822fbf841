"""Sampling under autocast keeps keys and values in autocast's dtype, and samples what it sampled before."""

from typing import Any

import pytest
import torch
from support import families
from support.tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig

import ppo_fast
from ppo_fast.llm import generate as generating
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.generate import GenerateOptions, generate
from ppo_fast.llm.models.modes import autocast, head_in
from ppo_fast.llm.sampler import Completions, SamplingParams

PROMPTS = [[72, 105], [84] * 11, [5]]


def config(**options: Any) -> PPOConfig:
    return PPOConfig(**{"dtype": "bfloat16", "max_new_tokens": 12, "device": "cpu", **options})


def answers(model: Any, options: PPOConfig, *, greedy: bool = False) -> Completions:
    torch.manual_seed(3)
    params, how = SamplingParams.from_config(options), GenerateOptions.from_config(options)
    return generate(model, byte_tokenizer(), PROMPTS, params, options=how, greedy=greedy)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[DynamicCache]:
    """Every cache that is made, by this project or by transformers."""
    made: list[DynamicCache] = []
    init = DynamicCache.__init__

    def noted(self: DynamicCache, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(DynamicCache, "__init__", noted)
    return made


def held(cache: DynamicCache) -> tuple[set[torch.dtype], int]:
    """Dtypes and bytes of the keys and values."""
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return {x.dtype for x in tensors}, sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", families.NAMES)
def test_the_cache_is_in_bf16_and_samples_are_the_same_bits(name, greedy, tmp_path, caches, monkeypatch):
    model = families.load(name, tmp_path)
    ours, (cache,) = answers(model, config(), greedy=greedy), caches
    monkeypatch.setattr(generating, "cache_options", lambda actor, dtype: {})
    before, (_, own) = answers(model, config(), greedy=greedy), caches
    assert type(cache) is generating.HalfCache
    assert type(own) is DynamicCache
    assert (ours.ids, ours.logprobs, ours.ended) == (before.ids, before.logprobs, before.ended)
    assert [type(x) for x in cache.layers] == [type(x) for x in own.layers]  # sliding windows stay
    assert held(cache)[0] == {torch.bfloat16}
    if name in ("gpt2", "cohere"):  # learned positions, and rotary ones that are rounded again
        assert held(own) == held(cache)
    else:
        assert held(own)[0] == {torch.float32}  # rotary embeddings make keys fp32, and the cache values with them
        assert held(own)[1] == 2 * held(cache)[1]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_run_without_autocast_keeps_its_own_cache(weights, tmp_path, caches):
    model = families.load("llama", tmp_path).to(weights)
    answers(model, config(dtype="float32"))
    assert [type(x) for x in caches] == [DynamicCache]
    assert held(caches[0])[0] == {weights}


def test_a_model_with_a_cache_of_its_own_keeps_it():
    torch.manual_seed(0)
    shape = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=None)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**shape, eos_token_id=256, pad_token_id=257)).eval()
    assert generating.cache_options(mamba, "bfloat16") == {}
    assert all(len(ids) >= 1 for ids in answers(mamba, config()).ids)


def test_adapters_that_fill_the_cache_keep_theirs(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    model = families.load("llama", tmp_path)
    prefix = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert generating.cache_options(prefix, "bfloat16") == {}
    lora = peft.get_peft_model(families.load("llama", tmp_path), peft.LoraConfig(task_type="CAUSAL_LM")).eval()
    assert set(generating.cache_options(lora, "bfloat16")) == {"past_key_values"}
    assert all(len(ids) >= 1 for ids in answers(lora, config()).ids)


@pytest.mark.parametrize("allowed", [False, True])
def test_cudnn_is_left_out_of_sampling_unless_asked_for(allowed, tmp_path):
    model, seen = families.load("llama", tmp_path), set()
    model.register_forward_pre_hook(lambda *_: seen.add(torch.backends.cuda.cudnn_sdp_enabled()))
    answers(model, config(cudnn_attention=allowed))
    assert seen == {allowed}
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_the_sampler_computes_the_head_as_the_loss_does(head_dtype):
    """The logits of one forward pass inside `head_in` are those of `linear_logprobs` in that dtype, to fp32's rounding;
    autocast alone rounds them to bf16."""
    torch.manual_seed(0)
    actor, dtype = tiny_llama(), getattr(torch, head_dtype)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad(), autocast("bfloat16", torch.device("cpu")):
        hidden = actor.model(input_ids=ids).last_hidden_state[0, :-1]
        expected = ppo_fast.linear_logprobs(hidden, actor.lm_head.weight, ids[0, 1:], compute_dtype=dtype)
        for keep in (True, False):
            with head_in(actor, dtype, keep=keep):
                logits = actor(input_ids=ids).logits[0, :-1]
            assert logits.dtype == torch.float32
            torch.testing.assert_close(ppo_fast.token_logprobs(logits, ids[0, 1:]), expected, atol=1e-5, rtol=1e-5)
        assert actor(input_ids=ids).logits.dtype == torch.bfloat16
    assert "forward" not in vars(actor.lm_head)
