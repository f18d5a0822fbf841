"""The rollout: prompts and their answers, as tensors and as text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ppo_fast.common.device import upload

CPU = torch.device("cpu")


@dataclass
class Rollout:
    """B prompts, padded on the left to P tokens, each followed by its answer, padded on the right to T tokens.

    Tokens are kept on the CPU, where packs are built, so that reading them never waits for a GPU.
    """

    tokens: Tensor  # [B, P + T] int64, on the CPU
    prompt_lengths: list[int]  # B
    answer_lengths: list[int]  # B; the end token counts
    ended: list[bool]  # B; False: cut by max_new_tokens
    completions: list[str]  # B, without special tokens that are no text; one may begin with a space
    columns: dict[str, list]  # the data set's columns, "prompt" among them, B entries each
    logprobs: Tensor | None = None  # [B, T] fp32 on `device`, the sampler's own, where it tells them
    scores: list[float] = field(default_factory=list)  # B; filled by the reward step
    device: torch.device = CPU  # of everything that is computed per token
    raw_completions: list[str] = field(default_factory=list)  # B, with special tokens; not given: as `completions`

    def __post_init__(self) -> None:
        if not self.raw_completions:
            self.raw_completions = list(self.completions)

    def __len__(self) -> int:
        return len(self.answer_lengths)

    @property
    def answer_width(self) -> int:
        """T."""
        return max(self.answer_lengths)

    @cached_property
    def answer_mask(self) -> Tensor:
        """[B, T] on `device`, True at the tokens of the answer, its end token included."""
        lengths = torch.tensor(self.answer_lengths)
        return upload(torch.arange(self.answer_width) < lengths.unsqueeze(1), self.device)

    @property
    def completion_ids(self) -> list[list[int]]:
        """The answers' tokens, end token included."""
        answers = self.tokens[:, -self.answer_width :].tolist()
        return [ids[:length] for ids, length in zip(answers, self.answer_lengths, strict=True)]

    def to(self, device: torch.device) -> "Rollout":
        """The same rollout for another device."""
        logprobs = None if self.logprobs is None else self.logprobs.to(device)
        return dataclasses.replace(self, logprobs=logprobs, device=device)


def join_rollouts(parts: Sequence[Rollout], pad: int) -> Rollout:
    """One rollout from several, with the padding that all of them need."""
    longest_prompt = max(part.tokens.shape[1] - part.answer_width for part in parts)
    longest_answer = max(part.answer_width for part in parts)

    tokens, logprobs = [], []
    for part in parts:
        left = longest_prompt - (part.tokens.shape[1] - part.answer_width)
        right = longest_answer - part.answer_width
        tokens.append(nn.functional.pad(part.tokens, (left, right), value=pad))
        if part.logprobs is not None:
            logprobs.append(nn.functional.pad(part.logprobs, (0, right)))
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return Rollout(
        tokens=torch.cat(tokens),
        prompt_lengths=[n for part in parts for n in part.prompt_lengths],
        answer_lengths=[n for part in parts for n in part.answer_lengths],
        ended=[x for part in parts for x in part.ended],
        completions=[x for part in parts for x in part.completions],
        columns={n: [x for part in parts for x in part.columns.get(n, [None] * len(part))] for n in names},
        logprobs=torch.cat(logprobs) if logprobs else None,
        scores=[x for part in parts for x in part.scores],
        raw_completions=[x for part in parts for x in part.raw_completions],
    )


def join_scores(parts: Sequence[Rollout], scores: Sequence[Tensor]) -> Tensor:
    """[B], or [B, T] if any process has a score for each token: those for whole answers stand at their last."""
    if all(x.ndim == 1 for x in scores):
        return torch.cat(list(scores))
    whole = torch.zeros(sum(map(len, parts)), max(part.answer_width for part in parts))
    row = 0
    for part, x in zip(parts, scores, strict=True):
        if x.ndim == 2:
            whole[row : row + len(part), : x.shape[1]] = x
        else:
            whole[torch.arange(row, row + len(part)), torch.tensor(part.answer_lengths) - 1] = x
        row += len(part)
    return whole
