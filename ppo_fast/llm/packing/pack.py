"""Packs: sequences of a rollout side by side in one row, cut once per rollout by a budget of tokens."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_fast.common.device import upload_together
from ppo_fast.llm.packing.attention import Layout
from ppo_fast.llm.packing.rollout import CPU, Rollout


@dataclass(frozen=True)
class Pack:
    """S sequences, prompt and answer each, in one row of `total` tokens; n of these are answers."""

    input_ids: Tensor  # [1, total] int64
    position_ids: Tensor  # [1, total] int64, from 0 in each sequence
    layout: Layout
    logit_positions: Tensor  # [n] int64: the token before each answer token, whose hidden state chooses it
    last: Tensor  # [S] int64: the last token of each sequence
    tokens: Tensor  # [n] int64: the answer tokens themselves
    rows: Tensor  # [n] int64: the rollout's row of each
    columns: Tensor  # [n] int64: its column in [B, T]
    sequences: list[int]  # the rollout's rows, in the order of the pack
    sequence_rows: Tensor  # [S] int64: the same
    cu_answers: Tensor  # [S + 1] int64: the answers' boundaries in n
    lengths: list[int]  # S: tokens of each sequence, prompt and answer

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.tokens)

    def gather(self, per_token: Tensor) -> Tensor:
        """[n], this pack's part of a tensor over the rollout [B, T]."""
        return per_token[self.rows, self.columns]

    def scatter_(self, per_token: Tensor, values: Tensor) -> None:
        """Writes values [n] to their places in [B, T]."""
        per_token[self.rows, self.columns] = values.to(per_token.dtype)


def make_packs(rollout: Rollout, groups: Sequence[Sequence[int]]) -> list[Pack]:
    """A pack of each group of the rollout's rows. All of them go to the rollout's device with one copy."""
    return _upload([_build(rollout, list(rows)) for rows in groups], rollout.device)


def make_pack(rollout: Rollout, sequences: list[int]) -> Pack:
    """Packs the given rows of a rollout."""
    return make_packs(rollout, [sequences])[0]


def _build(rollout: Rollout, sequences: list[int]) -> Pack:
    """A pack on the CPU."""
    prompts = torch.tensor([rollout.prompt_lengths[i] for i in sequences])
    answers = torch.tensor([rollout.answer_lengths[i] for i in sequences])
    lengths, rows = prompts + answers, torch.tensor(sequences)
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    first = rollout.tokens.shape[1] - rollout.answer_width  # column of the rollout where answers begin
    source = (first - prompts).repeat_interleave(lengths) + position
    cu_answers = torch.cat([answers.new_zeros(1), answers.cumsum(0)])
    column = torch.arange(int(cu_answers[-1])) - cu_answers[:-1].repeat_interleave(answers)
    answer_tokens = (starts + prompts).repeat_interleave(answers) + column
    input_ids = rollout.tokens[rows.repeat_interleave(lengths), source]
    return Pack(
        input_ids=input_ids.unsqueeze(0),
        position_ids=position.unsqueeze(0),
        layout=Layout.from_lengths(lengths.tolist(), CPU),
        logit_positions=answer_tokens - 1,
        last=starts + lengths - 1,
        tokens=input_ids[answer_tokens],
        rows=rows.repeat_interleave(answers),
        columns=column,
        sequences=sequences,
        sequence_rows=rows,
        cu_answers=cu_answers,
        lengths=lengths.tolist(),
    )


def _upload(packs: list[Pack], device: torch.device) -> list[Pack]:
    """The packs on the device: one copy for all their tensors, since each copy of its own would cost a launch."""
    parts = [part for pack in packs for part in (pack, pack.layout)]
    fields = [(part, name) for part in parts for name, x in vars(part).items() if isinstance(x, Tensor)]
    moved = upload_together([getattr(part, name).long() for part, name in fields], device)
    found: dict[int, dict[str, Any]] = {id(part): {} for part in parts}
    for (part, name), x in zip(fields, moved, strict=True):
        found[id(part)][name] = x.to(getattr(part, name).dtype)
    return [
        dataclasses.replace(pack, layout=dataclasses.replace(pack.layout, **found[id(pack.layout)]), **found[id(pack)])
        for pack in packs
    ]


def split_minibatches(
    rollout: Rollout,
    order: list[int],
    *,
    minibatches: int,
    max_tokens: int,
    multiple_of: int = 1,
    regime: Callable[[int], int] | None = None,
) -> list[list[Pack]]:
    """Rows in the given order, cut into minibatches of as equal a number of sequences as can be, each into packs.

    A pack holds at most `max_tokens` tokens, or one sequence that is longer. A minibatch's packs are balanced: the
    longest sequences are dealt first, each to the emptiest pack. Their number is a multiple of `multiple_of`, if there
    are sequences enough. Sequences share a pack only if `regime` gives the same number for their lengths.
    """
    parts = torch.tensor(order).tensor_split(minibatches)
    lengths = [p + a for p, a in zip(rollout.prompt_lengths, rollout.answer_lengths, strict=True)]
    groups = []
    for part in parts:
        apart: dict[int, list[int]] = {}
        for i in part.tolist():
            apart.setdefault(0 if regime is None else regime(lengths[i]), []).append(i)
        groups.append(
            [rows for alike in apart.values() for rows in balance_packs(alike, lengths, max_tokens, multiple_of)]
        )
    packs = iter(make_packs(rollout, [rows for part in groups for rows in part]))
    return [[next(packs) for _ in part] for part in groups]


def balance_packs(sequences: list[int], lengths: list[int], max_tokens: int, multiple_of: int = 1) -> list[list[int]]:
    """Sequences in as few groups as their tokens need at best, or in more where they do not fit."""
    longest_first = sorted(sequences, key=lambda i: -lengths[i])  # stable: equal lengths keep their order
    count = max(1, -(-sum(lengths[i] for i in sequences) // max_tokens))
    while True:
        count = -(-count // multiple_of) * multiple_of
        groups: list[list[int]] = [[] for _ in range(min(count, len(sequences)))]
        filled = [0] * len(groups)
        for i in longest_first:
            emptiest = filled.index(min(filled))
            groups[emptiest].append(i)
            filled[emptiest] += lengths[i]
        if all(n <= max_tokens or len(g) == 1 for n, g in zip(filled, groups, strict=True)):
            place = {i: at for at, i in enumerate(sequences)}
            return [sorted(group, key=place.__getitem__) for group in groups]
        count += 1
