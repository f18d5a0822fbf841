"""Hashes by which a checkpoint, and the processes of a run, recognise the same rows and the same tokenizer."""

import hashlib
import json
import re

from transformers import PreTrainedTokenizerBase

from ppo_fast.llm.data import template_options
from ppo_fast.llm.reward.fingerprint import tokenizer_fingerprint


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> str:
    """Hash all of a tokenizer that changes tokens or texts, and the tokens that end a completion."""
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    parts: list[object] = [tokenizer_fingerprint(tokenizer), special, ends]
    if options := template_options(tokenizer):  # older checkpoints have none
        parts.append(options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def rows_hash(rows: list[dict[str, object]]) -> str:
    """Hash rows in their order. The address of an object that JSON cannot hold has no effect."""

    def described(x: object) -> object:
        if isinstance(x, set | frozenset):  # whose order differs between processes
            return sorted(map(described, x), key=str)
        return re.sub(r" at 0x[0-9a-f]+", "", repr(x))

    text = json.dumps(rows, sort_keys=True, default=described)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what the ids of a tokenizer stand for. How texts become tokens, and chat templates, have no effect."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
