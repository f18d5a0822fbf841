"""Packs: sequences of a rollout, concatenated in one row within a budget of tokens."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_fast.common.device import upload_together
from ppo_fast.llm.packing.attention import Layout
from ppo_fast.llm.packing.rollout import CPU, Rollout


@dataclass(frozen=True)
class Pack:
    """S sequences, prompt and completion each, in one row of `total` tokens; n of these are tokens that count."""

    input_ids: Tensor  # [1, total] int64
    position_ids: Tensor  # [1, total] int64, from 0 in each sequence
    layout: Layout
    logit_positions: Tensor  # [n] int64: the token before each counted token, whose hidden state gives its logits
    last: Tensor  # [S] int64: the last token of each sequence
    tokens: Tensor  # [n] int64: the counted tokens, of the completions
    rows: Tensor  # [n] int64: the rollout's row of each
    columns: Tensor  # [n] int64: its column in [B, T]
    sequences: list[int]  # the rollout's rows, in the order of the pack
    sequence_rows: Tensor  # [S] int64: the same
    cu_completions: Tensor  # [S + 1] int64: the boundaries of the completions in n
    lengths: list[int]  # S: tokens of each sequence, prompt and completion

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.tokens)

    def gather(self, per_token: Tensor) -> Tensor:
        """Select this pack's values [n] of a tensor over the rollout [B, T]."""
        return per_token[self.rows, self.columns]

    def scatter_(self, per_token: Tensor, values: Tensor) -> None:
        """Write values [n] to their positions in [B, T], in place."""
        per_token[self.rows, self.columns] = values.to(per_token.dtype)


def make_packs(rollout: Rollout, groups: Sequence[Sequence[int]]) -> list[Pack]:
    """A pack of each group of the rollout's rows. All of them go to the rollout's device with one copy."""
    return _upload([_build(rollout, list(rows)) for rows in groups], rollout.device)


def make_pack(rollout: Rollout, sequences: list[int]) -> Pack:
    """Pack the given rows of a rollout."""
    return make_packs(rollout, [sequences])[0]


def _build(rollout: Rollout, sequences: list[int]) -> Pack:
    """A pack on the CPU."""
    prompts = torch.tensor([rollout.prompt_lengths[i] for i in sequences])
    completions = torch.tensor([rollout.completion_lengths[i] for i in sequences])
    lengths, rows = prompts + completions, torch.tensor(sequences)
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    first = rollout.tokens.shape[1] - rollout.completion_width  # column of the rollout where completions begin
    source = (first - prompts).repeat_interleave(lengths) + position
    input_ids = rollout.tokens[rows.repeat_interleave(lengths), source]
    mask = rollout.mask[rows]
    sequence, column = mask.nonzero(as_tuple=True)
    counted = (starts + prompts)[sequence] + column
    return Pack(
        input_ids=input_ids.unsqueeze(0),
        position_ids=position.unsqueeze(0),
        layout=Layout.from_lengths(lengths.tolist(), CPU),
        logit_positions=counted - 1,
        last=starts + lengths - 1,
        tokens=input_ids[counted],
        rows=rows[sequence],
        columns=column,
        sequences=sequences,
        sequence_rows=rows,
        cu_completions=torch.cat([rows.new_zeros(1), mask.sum(1).cumsum(0)]),
        lengths=lengths.tolist(),
    )


def _upload(packs: list[Pack], device: torch.device) -> list[Pack]:
    """The packs on the device: one copy for all their tensors, since each copy of its own would cost a launch."""
    tensors = [
        x for pack in packs for part in (pack, pack.layout) for x in vars(part).values() if isinstance(x, Tensor)
    ]
    moved = upload_together([x.long() for x in tensors], device)
    on_device = {id(x): y.to(x.dtype) for x, y in zip(tensors, moved, strict=True)}
    return [_replaced(pack, lambda x: on_device[id(x)]) for pack in packs]


def _replaced(pack: Pack, move: Callable[[Tensor], Tensor]) -> Pack:
    """The pack with each of its tensors moved."""
    layout = dataclasses.replace(
        pack.layout,
        cu_seqlens=move(pack.layout.cu_seqlens),
        token_of_slot=None if pack.layout.token_of_slot is None else move(pack.layout.token_of_slot),
        slot_of_token=move(pack.layout.slot_of_token),
    )
    return dataclasses.replace(
        pack,
        input_ids=move(pack.input_ids),
        position_ids=move(pack.position_ids),
        layout=layout,
        logit_positions=move(pack.logit_positions),
        last=move(pack.last),
        tokens=move(pack.tokens),
        rows=move(pack.rows),
        columns=move(pack.columns),
        sequence_rows=move(pack.sequence_rows),
        cu_completions=move(pack.cu_completions),
    )


def split_minibatches(
    rollout: Rollout,
    order: list[int],
    *,
    minibatches: int,
    max_tokens: int,
    multiple_of: int = 1,
    regime: Callable[[int], int] | None = None,
) -> list[list[Pack]]:
    """Split rows, in the given order, into minibatches of almost equal numbers of sequences, each into packs.

    A pack holds at most `max_tokens` tokens, or one sequence that is longer. The packs of a minibatch are balanced:
    each sequence, the longest first, is added to the pack with the fewest tokens. Their number is a multiple of
    `multiple_of`, if there are enough sequences. Sequences share a pack only if `regime` is equal for their lengths.
    """
    parts = torch.tensor(order).tensor_split(minibatches)
    lengths = [p + a for p, a in zip(rollout.prompt_lengths, rollout.completion_lengths, strict=True)]
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
    """Group sequences into as few packs of `max_tokens` as their sum needs, or more where they do not fit."""
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
