"""Sampling: prompts are completed by a sampler, checked, and become a rollout."""

import math
import operator
import traceback
from collections.abc import Iterable
from typing import SupportsIndex

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
)

from ppo_fast.common.device import upload
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import columns, prompt_ids, prompts_of
from ppo_fast.llm.decoding import CompletionText
from ppo_fast.llm.generate import GenerateSampler
from ppo_fast.llm.models.head import LanguageModel, text_config
from ppo_fast.llm.packing.rollout import Rollout, mask_of_lengths
from ppo_fast.llm.sampler import Completions, Sampler, SamplingParams


def _token_ids(ids: Iterable[SupportsIndex], row: int, vocabulary: int | None) -> list[int]:
    """The tokens of a completion, given as a list, an array or a tensor."""
    try:
        found = [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError as error:
        raise UserError(
            f"the sampler returned {ids!r:.60} for prompt {row}: a list of token ids is expected"
        ) from error
    outside = [i for i in found if i < 0 or (vocabulary is not None and i >= vocabulary)]
    if outside:
        last = "" if vocabulary is None else f"; the model's are 0 to {vocabulary - 1}"
        raise UserError(f"the sampler returned the token id {outside[0]} for prompt {row}{last}")
    return found


LARGEST_LOGPROB = 1e-3  # rounding


def _logprobs(values: Iterable[float | None], row: int) -> list[float]:
    """The log-probabilities of a completion. vLLM reports None or NaN for a token that it could not score."""
    found = []
    for place, x in enumerate(values.tolist() if hasattr(values, "tolist") else values):
        if x is None or not -math.inf < float(x) <= LARGEST_LOGPROB:
            raise UserError(
                f"the sampler returned {x!r} as log-probability of token {place} of the answer to prompt {row}: a"
                " finite number of at most 0 is expected; logprobs = None, if the engine cannot score each token"
            )
        found.append(float(x))
    return found


def _checked(
    given: Completions, prompts: list[list[int]], params: SamplingParams, vocabulary: int | None
) -> Completions:
    """The completions in Python's lists and numbers. Rejects the mistakes of other engines."""
    counts = {"ids": len(given.ids), "ended": len(given.ended)}
    if given.logprobs is not None:
        counts["logprobs"] = len(given.logprobs)
    for name, count in counts.items():
        if count != len(prompts):
            raise UserError(f"the sampler returned {count} {name} for {len(prompts)} prompts")
    checked = Completions(
        ids=[_token_ids(ids, row, vocabulary) for row, ids in enumerate(given.ids)],
        ended=[bool(x) for x in given.ended],
        logprobs=None if given.logprobs is None else [_logprobs(x, row) for row, x in enumerate(given.logprobs)],
    )
    for row, ids in enumerate(checked.ids):
        if not 1 <= len(ids) <= params.max_new_tokens:
            raise UserError(
                f"the sampler returned {len(ids)} tokens for prompt {row}; 1 to max_new_tokens={params.max_new_tokens}"
                " are expected"
            )
        if checked.logprobs is not None and len(checked.logprobs[row]) != len(ids):
            raise UserError(
                f"the sampler returned {len(checked.logprobs[row])} logprobs for the {len(ids)} tokens of prompt {row}"
            )
    return checked


def _call_sampler(sampler: Sampler, prompts: list[list[int]], params: SamplingParams) -> Completions:
    """The sampler's completions. An error of a sampler from outside is reported with its place."""
    if isinstance(sampler, GenerateSampler):
        return sampler.sample(prompts, params)
    try:
        completions = sampler.sample(prompts, params)
    except UserError:
        raise
    except Exception as error:  # user code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
        raise UserError(f"the sampler raised {type(error).__name__}: {error} ({place})") from error
    if not isinstance(completions, Completions):
        raise UserError(f"the sampler must return ppo_fast.llm.sampler.Completions, got {type(completions).__name__}")
    return completions


def sample_rollout(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, object]],
    config: PPOConfig,
    device: torch.device,
    *,
    vocabulary: int | None = None,
    seed: int | None = None,
) -> Rollout:
    """Complete the prompt of each row `samples_per_prompt` times.

    Args:
        sampler: what completes the prompts.
        tokenizer: the actor's.
        rows: with a "prompt" each.
        config: the options of sampling.
        device: of the rollout.
        vocabulary: the sampler's tokens must be below it.
        seed: of the sampling parameters.
    """
    columns_ = columns(rows, config.samples_per_prompt)
    prompts = prompt_ids(tokenizer, columns_["prompt"])
    params = SamplingParams.from_config(config, seed=seed)
    completions = _call_sampler(sampler, [list(ids) for ids in prompts], params)
    if completions.logprobs is None and config.importance_cap is not None:
        raise UserError(
            "importance_cap needs the sampler's log-probabilities (Completions.logprobs), which are missing"
        )
    completions = _checked(completions, prompts, params, vocabulary)
    texts = CompletionText(tokenizer, prompts)
    lengths = list(map(len, completions.ids))
    P, T = max(map(len, prompts)), max(lengths)
    pad = tokenizer.pad_token_id
    padded = [
        [pad] * (P - len(prompt)) + prompt + ids + [pad] * (T - len(ids))
        for prompt, ids in zip(prompts, completions.ids, strict=True)
    ]
    logprobs = None
    if completions.logprobs is not None:
        logprobs = upload(torch.tensor([row + [0.0] * (T - len(row)) for row in completions.logprobs]), device)
    return Rollout(
        tokens=torch.tensor(padded),
        mask=mask_of_lengths(lengths),
        prompt_lengths=list(map(len, prompts)),
        completion_lengths=lengths,
        prompt_index=[i for i in range(len(rows)) for _ in range(config.samples_per_prompt)],
        ended=completions.ended,
        completions=texts.decode(completions.ids),
        raw_completions=texts.decode(completions.ids, clean=False),
        columns=columns_,
        logprobs=logprobs,
        device=device,
    )


def drop_long_prompts(
    rows: list[dict[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    actor: LanguageModel,
    config: PPOConfig,
    *others: nn.Module | None,
) -> tuple[list[dict[str, object]], int]:
    """The rows whose prompt leaves room for a completion, and how many were left out.

    The limit is max_prompt_tokens, and what the positions of the models allow: `others` are critic and reference.
    """
    limits = [config.max_prompt_tokens]
    known = [getattr(text_config(x), "max_position_embeddings", None) for x in (actor, *others) if x is not None]
    positions = min((x for x in known if x is not None and x > 0), default=None)  # XLNet, which has no limit, says -1
    if positions is not None:
        limits.append(positions - config.max_new_tokens)
    limit = min((x for x in limits if x is not None), default=None)
    lengths = [len(ids) for ids in prompt_ids(tokenizer, prompts_of(rows))]
    for row, length in zip(rows, lengths, strict=True):
        if length == 0:
            raise UserError(f"the tokenizer turns the prompt {row['prompt']!r} into no token at all")
    if limit is None:
        return rows, 0
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    if not kept:
        raise UserError(
            f"every prompt is longer than {limit} tokens (the shortest has {min(lengths)}): raise max_prompt_tokens, or"
            f" lower max_new_tokens={config.max_new_tokens} (the model has {positions} positions)"
        )
    return kept, len(rows) - len(kept)
