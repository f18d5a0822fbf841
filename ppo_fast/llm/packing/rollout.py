"""The rollout: prompts and their completions, as tensors and as text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


@dataclass
class Rollout:
    """B prompts, padded on the left to P tokens, each followed by its completion, padded on the right to T tokens.

    Tokens and mask are on the CPU, where packs are built, so that reading them never waits for a GPU.
    """

    tokens: Tensor  # [B, P + T] int64, on the CPU
    mask: Tensor  # [B, T] bool, on the CPU: the completion's tokens that learning counts, the end token included
    prompt_lengths: list[int]  # B
    completion_lengths: list[int]  # B; the end token counts
    prompt_index: list[int]  # B; the number of the prompt, among those of the step, that each row completes
    ended: list[bool]  # B; False: cut by max_new_tokens
    completions: list[str]  # B, without special tokens that are no text; one may begin with a space
    columns: dict[str, list]  # the data set's columns, "prompt" among them, B entries each
    logprobs: Tensor | None = None  # [B, T] fp32 on `device`, the sampler's own, where it returns them
    scores: list[float] = field(default_factory=list)  # B; filled by the reward step
    device: torch.device = CPU  # of everything that is computed per token
    raw_completions: list[str] = field(default_factory=list)  # B, with special tokens; not given: as `completions`

    def __post_init__(self) -> None:
        if not self.raw_completions:
            self.raw_completions = list(self.completions)

    @classmethod
    def from_lengths(
        cls, tokens: Tensor, prompt_lengths: list[int], completion_lengths: list[int], *, device: torch.device = CPU
    ) -> "Rollout":
        """A rollout of tokens without texts: row i completes prompt i, and each token of a completion counts."""
        count = len(prompt_lengths)
        return cls(
            tokens=tokens,
            mask=mask_of_lengths(completion_lengths),
            prompt_lengths=prompt_lengths,
            completion_lengths=completion_lengths,
            prompt_index=list(range(count)),
            ended=[True] * count,
            completions=[""] * count,
            columns={"prompt": [""] * count},
            device=device,
        )

    def __len__(self) -> int:
        return len(self.completion_lengths)

    @property
    def completion_width(self) -> int:
        """T."""
        return self.mask.shape[1]

    @property
    def completion_ids(self) -> list[list[int]]:
        """The tokens of each completion, end token included."""
        padded = self.tokens[:, -self.completion_width :].tolist()
        return [ids[:length] for ids, length in zip(padded, self.completion_lengths, strict=True)]

    def to(self, device: torch.device) -> "Rollout":
        """The same rollout for another device."""
        logprobs = None if self.logprobs is None else self.logprobs.to(device)
        return dataclasses.replace(self, logprobs=logprobs, device=device)


def mask_of_lengths(lengths: Sequence[int]) -> Tensor:
    """[B, T] bool on the CPU, True at the first `lengths[i]` of the T = max(lengths) positions of row i."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def join_rollouts(parts: Sequence[Rollout], pad: int) -> Rollout:
    """One rollout from several, with the padding that all of them need."""
    longest_prompt = max(part.tokens.shape[1] - part.completion_width for part in parts)
    longest_completion = max(part.completion_width for part in parts)

    tokens, masks, logprobs = [], [], []
    prompt_index: list[int] = []
    for part in parts:
        left = longest_prompt - (part.tokens.shape[1] - part.completion_width)
        right = longest_completion - part.completion_width
        tokens.append(nn.functional.pad(part.tokens, (left, right), value=pad))
        masks.append(nn.functional.pad(part.mask, (0, right), value=False))
        earlier = max(prompt_index, default=-1) + 1
        prompt_index += [earlier + i for i in part.prompt_index]
        if part.logprobs is not None:
            logprobs.append(nn.functional.pad(part.logprobs, (0, right)))
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return Rollout(
        tokens=torch.cat(tokens),
        mask=torch.cat(masks),
        prompt_lengths=[n for part in parts for n in part.prompt_lengths],
        completion_lengths=[n for part in parts for n in part.completion_lengths],
        prompt_index=prompt_index,
        ended=[x for part in parts for x in part.ended],
        completions=[x for part in parts for x in part.completions],
        columns={n: [x for part in parts for x in part.columns.get(n, [None] * len(part))] for n in names},
        logprobs=torch.cat(logprobs) if logprobs else None,
        scores=[x for part in parts for x in part.scores],
        raw_completions=[x for part in parts for x in part.raw_completions],
    )


def join_scores(parts: Sequence[Rollout], scores: Sequence[Tensor]) -> Tensor:
    """[B], or [B, T] if any process has a score for each token: a score of a whole completion is at its last token."""
    if all(x.ndim == 1 for x in scores):
        return torch.cat(list(scores))
    whole = torch.zeros(sum(map(len, parts)), max(part.completion_width for part in parts))
    row = 0
    for part, x in zip(parts, scores, strict=True):
        if x.ndim == 2:
            whole[row : row + len(part), : x.shape[1]] = x
        else:
            whole[torch.arange(row, row + len(part)), torch.tensor(part.completion_lengths) - 1] = x
        row += len(part)
    return whole
