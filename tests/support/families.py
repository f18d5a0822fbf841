"""Tiny models of seven families, saved and loaded as a user's would be."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason='transformers is not installed: pip install "ppo_fast[train]"')

from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 258
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=257,
)
SPREAD = {"initializer_range": 0.3}  # logits that differ, so that a mix-up of sequences shows


def configs() -> dict[str, PreTrainedConfig]:
    gpt2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None)
    gemma = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=2.0)
    return {
        "llama": LlamaConfig(**SHAPE, **SPREAD),
        "qwen2": Qwen2Config(**SHAPE, **SPREAD, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "qwen3": Qwen3Config(**SHAPE, **SPREAD, head_dim=8),
        "gemma2": Gemma2Config(**SHAPE, **SPREAD, **gemma, final_logit_softcapping=3.0, tie_word_embeddings=True),
        "gpt2": GPT2Config(**gpt2, **SPREAD, eos_token_id=256, pad_token_id=257),
        "cohere": CohereConfig(**SHAPE, **SPREAD, logit_scale=0.25),
        "granite": GraniteConfig(**SHAPE, **SPREAD, logits_scaling=4.0),
    }


NAMES = tuple(configs())


def load(name: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configs()[name]).save_pretrained(folder / name)
    # SDPA knows no softcap of attention scores, and some releases of transformers omit it there without a warning.
    options = {"attn_implementation": "eager"} if name == "gemma2" else {}
    return AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()
