"""Real but tiny: transformers models from a config, and a byte-level tokenizer that needs no download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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


def save_tiny_model(folder: Path, *, pad: bool = True, positions: int = 256) -> Path:
    """A folder as save_pretrained writes it, for the command line."""
    tokenizer = byte_tokenizer(pad=pad)
    tiny_llama(len(tokenizer), positions=positions).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
