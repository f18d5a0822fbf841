"""The launches of advantages.py.

rlhf_advantages takes two launches, or three where long rows are few: one walks the spans of its rows and writes
rewards, KL, raw advantages and returns, with their moments and sums per program; the last merges those, whitens in
place and writes the statistics. Over a process group the moments are merged to three numbers and gathered in between.

Bytes for N tokens in fp32 with whitening: 13 N read and 16 N written, then 5 N read and 4 N written. For few long rows
another 13 N read, from the second level cache if they fit.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from ppo_fast.kernels.advantages_kernels import _advantages_kernel, _shape_kernel
from ppo_fast.kernels.gae import (
    LONG,
    MANY_ROWS,
    POINTERS,
    SHORT,
    aligned,
    argument_types,
    as_rows,
    keywords,
    no_flags,
    per_row,
    plain,
    row_config,
    same_dtype,
)
from ppo_fast.kernels.launch import REGISTERS, Variant, device_guard, launch_options
from ppo_fast.kernels.whiten_kernels import _merge_kernel, _moments_kernel, _whiten_kernel

BLOCK = 1024  # elements in a tile of whitening
NUM_WARPS = 4
_PROGRAMS = 512  # of a launch of whitening, at most: each reads all partial results
_WALKED_SPANS = 4  # that one program processes although several would be quicker: it saves a launch
_KINDS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}
STATISTICS = ("score_mean", "reward_mean", "kl_mean", "return_mean", "advantage_mean", "advantage_std")
_PLANES = 9  # numbers of each program of the scan: three moments and six sums


class Whitening(NamedTuple):
    """Options of masked_whiten."""

    shift_mean: bool
    unbiased: bool
    eps: float
    group: dist.ProcessGroup | None


class Shaping(NamedTuple):
    """Options of shape_rewards."""

    kl_coef: float
    kl_estimator: str
    score_clip: float | None
    reward_at: str

    def scalars(self) -> tuple[float, float, int, int]:
        """kl_coef, clip, kind and behind of the kernels."""
        clip = math.inf if self.score_clip is None else float(self.score_clip)
        return float(self.kl_coef), clip, _KINDS[self.kl_estimator], int(self.reward_at == "after_last")


def _inputs(floats: list[Tensor], mask: Tensor, scores: Tensor) -> tuple[list[Tensor], list[int], bool, bool]:
    """The [B, T] floats, mask and scores with neighbouring steps, and their row strides. Then, whether four steps of
    all of them can be moved at once, and whether scores are per token."""
    B, T = mask.shape
    scores = plain(scores.to(torch.float32))
    per_token = scores.ndim == 2
    views = [as_rows(x, B, T) for x in (*same_dtype(floats), mask, *([scores] if per_token else []))]
    tensors, strides = [x for x, _ in views], [stride for _, stride in views]
    is_aligned = aligned(T, tensors, strides)
    if not per_token:
        tensors.append(scores)
        strides.append(scores.stride(0))
    return tensors, strides, is_aligned, per_token


@functools.cache
def _shape_keywords(is_aligned: bool) -> dict[str, Any]:
    constexprs = {"ALIGNED": is_aligned, "R": LONG.R, "W": LONG.W, "TILES": LONG.tiles}
    return constexprs | launch_options(LONG.num_warps, REGISTERS)


def launch_shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, shaping: Shaping
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, KL, and the longer mask (empty for "last")."""
    B, T = mask.shape
    device = mask.device
    rewards = torch.empty((B, T), dtype=torch.float32, device=device)
    kl = torch.empty((B, T), dtype=torch.float32, device=device)
    behind = shaping.reward_at == "after_last"
    longer = torch.empty((B, T) if behind else (0,), dtype=torch.bool, device=device)
    if B * T == 0:
        return rewards, kl, longer
    tensors, strides, is_aligned, per_token = _inputs([logprobs, ref_logprobs], mask, scores)
    with device_guard(mask):
        _shape_kernel[-(-B // LONG.R), -(-T // LONG.span)](
            *tensors,
            rewards,
            kl,
            longer if behind else no_flags(device),
            *shaping.scalars(),
            int(per_token),
            B,
            T,
            *strides,
            **_shape_keywords(is_aligned),
        )
    return rewards, kl, longer


class _Flat(NamedTuple):
    """x and mask as rows of neighbouring elements, as few and as long as possible: one if nothing has gaps."""

    x: Tensor
    mask: Tensor | None
    rows: int
    T: int
    strides: tuple[int, int]  # from row to row, of x and mask
    is_aligned: bool

    @property
    def programs(self) -> int:
        return max(1, min(_PROGRAMS, self.rows * -(-self.T // BLOCK)))


def _flat(x: Tensor, mask: Tensor | None) -> _Flat:
    size = x.numel()
    if x.is_contiguous() and (mask is None or mask.is_contiguous()):
        rows, T = min(size, 1), max(size, 1)
    else:
        T = x.shape[-1] if x.ndim and x.shape[-1] >= BLOCK // 4 else size
        rows = size // T
    (x,) = same_dtype([x])
    x, x_stride = as_rows(x, rows, T)
    mask, m_stride = (None, 0) if mask is None else as_rows(mask, rows, T)
    tensors = [x] if mask is None else [x, mask]
    return _Flat(x, mask, rows, T, (x_stride, m_stride), aligned(T, tensors, [x_stride, m_stride]))


@functools.cache
def _tile_keywords(is_aligned: bool, block: int) -> dict[str, Any]:
    """Of both launches of whitening."""
    return {"ALIGNED": is_aligned, "BLOCK": block} | launch_options(NUM_WARPS, REGISTERS)


def _apply_whitening(
    flat: _Flat,
    rows: int,  # 0 if only the statistics are wanted
    out: Tensor,
    partial: Tensor,  # (3, parts), or (9, parts) with statistics
    stats: Tensor | None,
    whitening: Whitening,
) -> None:
    """The last launch, and over a group, what comes before it."""
    moments, parts = partial, partial.shape[1]
    if whitening.group is not None:
        mine = partial.new_empty(3)
        _merge_kernel[(1,)](partial, mine, parts, **launch_options(NUM_WARPS))
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(whitening.group))]
        dist.all_gather(ranks, mine, group=whitening.group)
        moments = torch.stack(ranks, dim=1)
    _whiten_kernel[(flat.programs if rows else 1,)](
        flat.x,
        no_flags(out.device) if flat.mask is None else flat.mask,
        out,
        moments,
        partial,
        partial if stats is None else stats,
        int(flat.mask is not None),
        int(stats is not None),
        int(whitening.unbiased),
        int(whitening.shift_mean),
        float(whitening.eps),
        rows,
        flat.T,
        moments.shape[1],
        parts,
        *flat.strides,
        **_tile_keywords(flat.is_aligned, BLOCK),
    )


def launch_masked_whiten(x: Tensor, mask: Tensor | None, whitening: Whitening) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0 and whitening.group is None:
        return out
    flat = _flat(x, mask)
    programs = flat.programs
    partial = torch.empty((3, programs), dtype=torch.float32, device=x.device)
    with device_guard(x):
        _moments_kernel[(programs,)](
            flat.x,
            no_flags(x.device) if flat.mask is None else flat.mask,
            partial,
            int(flat.mask is not None),
            flat.rows,
            flat.T,
            *flat.strides,
            **_tile_keywords(flat.is_aligned, BLOCK),
        )
        _apply_whitening(flat, flat.rows, out, partial, None, whitening)
    return out


def _scan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # scores, logprobs, ref_logprobs, values, mask
    outputs: tuple[Tensor, ...],  # advantages, returns, rewards, KL
    shaping: Shaping,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
) -> Tensor:
    """One launch, or two where rows are long and few. Returns the moments and sums of the programs, (9, programs)."""
    B, T = outputs[0].shape
    if B * T == 0:
        return outputs[0].new_zeros(_PLANES, 1)
    scores, logprobs, refs, values, mask = tensors
    inputs, strides, is_aligned, per_token = _inputs([logprobs, refs, values], mask, scores)
    numbers = [per_row(x, B) for x in (bootstrap, gamma, lam)]
    present = sum(1 << bit for bit, x in enumerate(numbers) if x is not None) + 8 * per_token
    config = row_config(T)
    spans = -(-T // config.span)
    walks = spans <= _WALKED_SPANS or B >= MANY_ROWS
    programs = -(-B // config.R), 1 if walks else spans
    partial = outputs[0].new_empty(_PLANES, programs[0] * programs[1])
    arguments = (
        *inputs,
        *(partial if x is None else x for x in numbers),
        *outputs,
        partial if walks else outputs[0].new_empty(2 * spans * B),
        partial,
        present,
        0.0 if isinstance(gamma, Tensor) else float(gamma),
        0.0 if isinstance(lam, Tensor) else float(lam),
        *shaping.scalars(),
        B,
        T,
        spans,
        config.tiles,
        *strides,
    )
    if not walks:
        keys = keywords(_advantages_kernel, config, is_aligned, False)
        _advantages_kernel[programs[0], spans - 1](*arguments, **keys)
    _advantages_kernel[programs](*arguments, **keywords(_advantages_kernel, config, is_aligned, True))
    return partial


def launch_rlhf_advantages(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # scores, logprobs, ref_logprobs, values, mask
    shaping: Shaping,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
    whiten: bool,
    whitening: Whitening,
) -> tuple[Tensor, ...]:
    """Advantages, returns, rewards, KL, and the statistics as one tensor."""
    mask = tensors[4]
    shape, device = mask.shape, mask.device
    outputs = tuple(torch.empty(shape, dtype=torch.float32, device=device) for _ in range(4))
    stats = torch.empty(len(STATISTICS), dtype=torch.float32, device=device)
    with device_guard(mask):
        partial = _scan(tensors, outputs, shaping, gamma, lam, bootstrap)
        flat = _flat(outputs[0], mask)
        _apply_whitening(flat, flat.rows if whiten else 0, flat.x, partial, stats, whitening)
    return *outputs, stats


def variants() -> list[Variant]:
    """Every variant that the launches above can start."""
    found = []

    def add(title: str, kernel: triton.JITFunction, keys: dict[str, Any], pointers: dict[str, str]) -> None:
        constexprs = {name: x for name, x in keys.items() if name in kernel.arg_names}
        options = {name: x for name, x in keys.items() if name not in kernel.arg_names}
        types = argument_types(kernel, constexprs, {"mask_ptr": "*u1", "longer_ptr": "*u1"} | pointers)
        found.append(Variant(title, kernel, types, constexprs, options))

    add("advantages merge", _merge_kernel, launch_options(NUM_WARPS), {})
    for (dtype, pointer), is_aligned in itertools.product(POINTERS.items(), (False, True)):
        name = str(dtype)[6:] + (" aligned" if dtype == torch.float32 else " vector") * is_aligned
        floats = dict.fromkeys(("logprobs_ptr", "refs_ptr", "values_ptr", "x_ptr"), pointer)
        add(f"shape_rewards {name}", _shape_kernel, _shape_keywords(is_aligned), floats)
        for title, config, write in (
            ("short rows", SHORT, True),
            ("long rows compose", LONG, False),
            ("long rows", LONG, True),
        ):
            keys = keywords(_advantages_kernel, config, is_aligned, write)
            add(f"rlhf_advantages {title} {name}", _advantages_kernel, keys, floats)
        add(f"moments {name}", _moments_kernel, _tile_keywords(is_aligned, BLOCK), floats)
        add(f"whiten {name}", _whiten_kernel, _tile_keywords(is_aligned, BLOCK), floats)
    return found
