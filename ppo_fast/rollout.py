"""The rollout: prompts and their answers, as tensors and as text."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Rollout:
    """B prompts, padded on the left to P tokens, each followed by its answer, padded on the right to T tokens."""

    tokens: Tensor  # [B, P + T] int64
    prompt_lengths: list[int]  # B
    answer_lengths: list[int]  # B; the end token counts
    ended: list[bool]  # B; False: cut by max_new_tokens
    completions: list[str]  # B, without special tokens
    columns: dict[str, list]  # the data set's columns, "prompt" among them, B entries each
    logprobs: Tensor | None = None  # [B, T], the sampler's own, where it tells them
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

    def to(self, device: torch.device) -> "Rollout":
        """The same rollout with its tensors on a device."""
        logprobs = None if self.logprobs is None else self.logprobs.to(device)
        return dataclasses.replace(self, tokens=self.tokens.to(device), logprobs=logprobs)
