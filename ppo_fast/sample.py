"""Sample: the actor answers prompts, and the answers become a rollout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.config import PPOConfig
from ppo_fast.data import columns
from ppo_fast.errors import UserError
from ppo_fast.models import end_tokens


@dataclass
class Rollout:
    """B prompts, padded on the left to P tokens, each followed by its answer, padded on the right to T tokens."""

    tokens: Tensor  # [B, P + T] int64
    prompt_lengths: list[int]  # B
    answer_lengths: list[int]  # B; the end token counts
    ended: list[bool]  # B; False: cut by max_new_tokens
    completions: list[str]  # B, without special tokens
    columns: dict[str, list]  # the data set's columns, "prompt" among them, B entries each
    scores: list[float] = field(default_factory=list)  # B; filled by the reward step

    def __len__(self) -> int:
        return len(self.answer_lengths)

    @property
    def answer_width(self) -> int:
        """T."""
        return max(self.answer_lengths)

    @property
    def answer_mask(self) -> Tensor:
        """[B, T], True at the tokens of the answer, its end token included."""
        lengths = torch.tensor(self.answer_lengths, device=self.tokens.device)
        return torch.arange(self.answer_width, device=self.tokens.device) < lengths.unsqueeze(1)

    @property
    def completion_ids(self) -> list[list[int]]:
        """The answers' tokens, end token included."""
        answers = self.tokens[:, -self.answer_width :].tolist()
        return [ids[:length] for ids, length in zip(answers, self.answer_lengths, strict=True)]


def respond(
    actor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], config: PPOConfig
) -> Rollout:
    """Answers each row's prompt `samples_per_prompt` times."""
    columns_ = columns(rows, config.samples_per_prompt)
    prompts = [tokenizer(text)["input_ids"] for text in columns_["prompt"]]
    answers = []
    for start in range(0, len(prompts), config.sample_batch_size):
        answers += generate(actor, tokenizer, prompts[start : start + config.sample_batch_size], config)
    ends = set(end_tokens(tokenizer, actor))
    P, T = max(map(len, prompts)), max(map(len, answers))
    pad = tokenizer.pad_token_id
    rows_of_ids = [
        [pad] * (P - len(prompt)) + prompt + answer + [pad] * (T - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Rollout(
        tokens=torch.tensor(rows_of_ids, device=actor.device),
        prompt_lengths=list(map(len, prompts)),
        answer_lengths=list(map(len, answers)),
        ended=[answer[-1] in ends for answer in answers],
        completions=tokenizer.batch_decode(answers, skip_special_tokens=True),
        columns=columns_,
    )


@torch.no_grad()
def generate(
    actor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: PPOConfig,
    *,
    greedy: bool = False,
) -> list[list[int]]:
    """The answers' token ids, each up to and with its first end token."""
    P = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (P - len(ids)) + ids for ids in prompts], device=actor.device)
    attention_mask = torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompts], device=actor.device)
    ends = end_tokens(tokenizer, actor)
    how = {} if greedy else {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    generation = GenerationConfig(
        do_sample=not greedy, max_new_tokens=config.max_new_tokens, eos_token_id=ends, pad_token_id=pad, **how
    )
    was_training = actor.training
    actor.eval()
    with _generation_config(actor, generation):
        sequences = actor.generate(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[operator]
    actor.train(was_training)
    return [_until_end(ids, set(ends)) for ids in sequences[:, P:].tolist()]


@contextmanager
def _generation_config(actor: PreTrainedModel, generation: GenerationConfig) -> Iterator[None]:
    """Puts the model's own generation config aside.

    generate() fills what a given config leaves open from the model's: a repetition penalty or top-k saved with the
    model would make samples from another distribution than the one that the loss differentiates.
    """
    own = actor.generation_config
    actor.generation_config = generation
    try:
        yield
    finally:
        actor.generation_config = own


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


def drop_long_prompts(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, actor: PreTrainedModel, config: PPOConfig
) -> tuple[list[dict[str, Any]], int]:
    """The rows whose prompt leaves room for an answer, and how many were left out.

    The limit is max_prompt_tokens, and what the model's positions allow.
    """
    limits = [config.max_prompt_tokens]
    positions = getattr(actor.config, "max_position_embeddings", None)
    if positions is not None:
        limits.append(positions - config.max_new_tokens)
    limit = min((x for x in limits if x is not None), default=None)
    lengths = [len(ids) for ids in tokenizer([row["prompt"] for row in rows])["input_ids"]]
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
