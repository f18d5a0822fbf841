"""Decides at load how an actor's own `generate` is used: with left padding and a KV cache, or without.

A few tokens are sampled as a run samples them, and their log-probabilities are compared with those of the model's own
forward on each sequence alone. Left padding is wrong for a model whose recurrent state reads it (RWKV) or whose learned
positions count it (the decoder of BART).
"""

import dataclasses
import sys
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.generate import GenerateOptions, generate
from ppo_fast.llm.models.head import (
    GenerateInfo,
    LanguageModel,
    input_embedding,
    model_name,
    text_config,
    without_cache,
)
from ppo_fast.llm.models.modes import autocast
from ppo_fast.llm.models.probe import (
    CALL_ERRORS,
    PROBE_LENGTHS,
    Reach,
    affordable,
    exact_products,
    in_full_precision,
    named_lengths,
    rounding_bound,
)
from ppo_fast.llm.sampler import SamplingParams

NEW_TOKENS = 3  # the first from the prompt, the others from the cache
LONG_PROMPT = 32  # beside the short ones, so that these have much padding
SMALLEST_GAP = 2e-5  # nats: rounding in any model
# Nats in fp32, of a model that amplifies rounding: with a cache, and without one, which is the last choice.
LARGEST_GAP, LAST_GAP = 0.005, 0.1
CHOICES = {  # in this order; the consequence of each
    (True, True): "",
    (False, True): "prompts of equal length are sampled together, without padding",
    (False, False): "prompts of equal length are sampled together, without padding and without a cache",
}


@torch.no_grad()
def detect_generate(
    actor: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
    boundaries: tuple[int, ...] = (),
    reach: Reach = Reach(),  # noqa: B008
) -> GenerateInfo:
    """Find out how `generate` samples what the model's own forward computes.

    Args:
        actor: on its device, as it is at the start of the run.
        tokenizer: its tokenizer.
        config: dtype, temperature and strict are read.
        boundaries: of the actor's `HeadInfo`.
        reach: as in `probe.detect_heads`.

    Raises:
        UserError: no way of sampling agrees with the forward; or the first one does not, with config.strict.
    """
    options = dataclasses.replace(config, max_new_tokens=NEW_TOKENS, stop=(), min_p=0.0)
    prompts = _prompts(actor, tokenizer, _lengths(actor, boundaries, reach))
    reason: str | None = None
    for (left_padding, cache), consequence in CHOICES.items():  # noqa: B007
        found = GenerateInfo(left_padding, cache, boundaries)
        problem = _problem(actor, tokenizer, prompts, options, found)
        if problem is None:
            break
        reason = reason or problem
    else:
        raise UserError(
            f"{reason}, and the same without padding and without a cache: this {model_name(actor)} cannot be trained on"
            " what its own generate() samples; give a sampler that samples what its forward computes"
        )
    if reason is not None:
        warn_or_raise(f"{reason}: {consequence}, which takes more time", config)
    for b in boundaries:
        crossing = _prompts(actor, tokenizer, [b - 1])
        if b > 1 and _problem(actor, tokenizer, crossing, options, found) is not None:
            warn_or_raise(
                f"this {model_name(actor)} samples the tokens before and after {b} differently and learns all of a"
                " longer sequence in one way, so that sampler_gap is large for an answer that crosses this length:"
                " importance_cap corrects for it, and lengths on one side avoid it",
                config,
            )
    return found


def _lengths(actor: LanguageModel, boundaries: tuple[int, ...], reach: Reach) -> list[int]:
    """Prompts that end before a length that the configuration names and are answered beyond it, and longer ones. None
    crosses a boundary."""
    checked = affordable(actor, named_lengths(actor, reach.longest), reach, actor.device)
    positions = getattr(text_config(actor), "max_position_embeddings", None)
    limit = sys.maxsize if positions is None or positions <= 0 else positions
    if named_lengths(actor, sys.maxsize):
        limit = min(limit, reach.longest)
    around = {n for b in checked for n in (b - 1, b + 2)} | {min(LONG_PROMPT, limit - NEW_TOKENS)}
    around = {n for n in around if 0 < n <= limit - NEW_TOKENS} - set(PROBE_LENGTHS)
    lengths = [*PROBE_LENGTHS, *sorted(around)]
    return [n for n in lengths if not any(n <= b < n + NEW_TOKENS for b in boundaries)]


def warn_or_raise(reason: str, config: PPOConfig) -> None:
    if config.strict:
        raise UserError(f"{reason} (strict = true makes this an error)")
    warnings.warn(reason, stacklevel=3)


def _prompts(actor: LanguageModel, tokenizer: PreTrainedTokenizerBase, lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths, without special tokens."""
    rows = input_embedding(actor).shape[0]
    special = set(tokenizer.all_special_ids)
    usable = [i for i in ((n * 7919 + 1) % rows for n in range(sum(lengths) + len(special))) if i not in special]
    ids = iter(usable * 2)
    return [[next(ids) for _ in range(n)] for n in lengths]


def _problem(
    actor: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: PPOConfig,
    info: GenerateInfo,
) -> str | None:
    """Why this way of sampling is wrong, in full precision or in the run's; None if it is right."""
    for dtype in dict.fromkeys(("float32", config.dtype)):
        options = dataclasses.replace(config, dtype=dtype)
        try:
            with exact_products():
                gap, bound = _gap(actor, tokenizer, prompts, options, info)
        except CALL_ERRORS as error:
            return f"generate() of this {model_name(actor)} fails ({first_line(error)})"
        if not gap <= bound:
            how = "with left padding and a cache" if info.left_padding else "without padding"
            return (
                f"this {model_name(actor)} samples {how} by other log-probabilities than its forward computes for one"
                f" sequence (they differ by {gap:.2g})"
            )
    return None


def _gap(
    actor: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: PPOConfig,
    info: GenerateInfo,
) -> tuple[float, float]:
    """The largest difference between the sampler's log-probabilities and the forward's, and its bound."""
    sampled: list[float] = []
    sequences: list[tuple[list[int], list[int]]] = []
    params, options = SamplingParams.from_config(config), GenerateOptions.from_config(config, cache=info.cache)
    for batch in info.batches(list(map(len, prompts)), new_tokens=NEW_TOKENS, size=len(prompts)):
        asked = [prompts[i] for i in batch]
        completions = generate(actor, tokenizer, asked, params, options=options, greedy=True, ends=[])
        sampled += [x for row in completions.logprobs or [] for x in row]
        sequences += zip(asked, completions.ids, strict=True)
    with autocast(config.dtype, actor.device):

        def forward() -> Tensor:
            return torch.cat([_logprobs(actor, prompt, answer, config.temperature) for prompt, answer in sequences])

        own = forward()
        bound = rounding_bound(actor, forward, own)
        if in_full_precision(actor):
            bound = min(bound, LARGEST_GAP if info.cache else LAST_GAP)
    return (own.cpu() - torch.tensor(sampled)).abs().max().item(), max(bound, SMALLEST_GAP)


def _logprobs(actor: LanguageModel, prompt: list[int], answer: list[int], temperature: float) -> Tensor:
    """[n] log-probabilities of the completion's tokens, by the model's own forward on this sequence alone."""
    ids = torch.tensor([prompt + answer], device=actor.device)
    logits = actor(input_ids=ids, **without_cache(actor)).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1)
