"""The rollout: prompts and their answers, as tensors and as text."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ppo_fast.device import upload

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
