"""Real but tiny: transformers models from a config, and a byte-level tokenizer that needs no download."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='transformers is not installed: pip install "ppo_fast[train]"')

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.trainer import PPOTrainer

FAMILIES = ("llama", "gpt2")
DTYPES = ("float32", "bfloat16")
PROMPTS = ("hi", "what time is it", "a", "the fox jumps", "no")


def byte_tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte, plus an end token and a pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<end>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_llama(vocab_size: int = 258, *, positions: int = 256, seed: int = 0, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=256 if vocab_size > 256 else None,
        pad_token_id=257 if vocab_size > 257 else None,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(*, positions: int = 256, seed: int = 0, hidden: int = 32) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=258,
        n_embd=hidden,
        n_layer=2,
        n_head=4,
        n_positions=positions,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_actor(family: str, **options: Any) -> PreTrainedModel:
    """A model of one of FAMILIES for `byte_tokenizer`."""
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}[family](**options)


def distinct(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward: how many different characters an answer has."""
    return [float(len(set(text))) for text in completions]


def tiny_trainer(family: str, dtype: str, device: torch.device, **options: Any) -> PPOTrainer:
    """A trainer of a tiny model whose every step has one update, so that its metrics hold the first ratio.

    Attention heads have 32 elements, and answers ragged lengths: FlashAttention supports them where a GPU has it.
    """
    small: dict[str, Any] = {
        "total_steps": 2,
        "prompts_per_step": 6,
        "max_new_tokens": 9,
        "minibatches": 1,
        "epochs": 1,
        "micro_batch_tokens": 60,
        "lr": 1e-3,
        "critic_lr": 1e-3,
        "dtype": dtype,
        "device": str(device),
        "quiet": True,
        "tensorboard": False,
    }
    rows = [{"prompt": text} for text in PROMPTS]
    return PPOTrainer(
        PPOConfig(**{**small, **options}), tiny_actor(family, hidden=128), byte_tokenizer(), rows, distinct
    )


def problems(history: list[dict[str, float]]) -> list[str]:
    """List the faults in the metrics of `tiny_trainer`: numbers that are not finite, a first ratio that is not 1."""
    wrong = [
        f"{name} = {x} in step {row['step']}" for row in history for name, x in row.items() if not math.isfinite(x)
    ]
    ratios = [(row["step"], row["learn/ratio_max"]) for row in history]
    return wrong + [f"the first ratio is {ratio!r} in step {step}" for step, ratio in ratios if ratio != 1.0]


def save_tiny_model(folder: Path, *, pad: bool = True, positions: int = 256) -> Path:
    """A folder as save_pretrained writes it, for the command line."""
    tokenizer = byte_tokenizer(pad=pad)
    tiny_llama(len(tokenizer), positions=positions).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
