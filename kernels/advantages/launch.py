"""The launches of shape_rewards, masked_whiten and rlhf_advantages.

rlhf_advantages takes two launches, or three where long rows are few: one scans the spans of its rows and writes
rewards, KL, raw advantages and returns, with their moments and sums per program; the last merges those, whitens in
place and writes the statistics. Over a process group the moments are merged to three numbers and gathered in between.

Bytes for N tokens in fp32 with whitening: 13 N read and 16 N written, then 5 N read and 4 N written. For few long rows
another 13 N read, from the second level cache if they fit. With critic_lam the same kernel carries two numbers per row
through the same tiles: the launches and these bytes stay the same.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast.kernels.advantages.kernel import advantages_kernel, shape_kernel
from ppo_fast.kernels.advantages.options import STATISTICS, AdvantageTensors, ShapingOptions, WhiteningOptions
from ppo_fast.kernels.advantages.whiten_kernel import merge_kernel, moments_kernel, whiten_kernel
from ppo_fast.kernels.common.launch import REGISTERS, Variant, device_guard, launch_options
from ppo_fast.kernels.gae.launch import (
    LARGEST_GRID_Y,
    LAYOUTS,
    MANY_ROWS,
    POINTERS,
    as_rows,
    keywords,
    no_flags,
    row_layout,
    row_numbers,
    same_dtype,
    variant,
)
from ppo_fast.kernels.gae.options import GAEOptions
from ppo_fast.kernels.reference import KL_ESTIMATORS

BLOCK = 1024  # elements in a tile of whitening
NUM_WARPS = 4
_PROGRAMS = 512  # of a launch of whitening, at most: each reads all partial results
_ONE_PASS_SPANS = 4  # that one program processes although several would be quicker: it saves a launch
_PLANES = 9  # numbers of each program of the scan: three moments and six sums


def _scalars(options: ShapingOptions) -> tuple[float, float, int, int]:
    """kl_coef, clip, kind and after_last of the kernels."""
    clip = math.inf if options.score_clip is None else float(options.score_clip)
    return (
        float(options.kl_coef),
        clip,
        KL_ESTIMATORS.index(options.kl_estimator),
        int(options.reward_at == "after_last"),
    )


def _inputs(floats: tuple[Tensor, ...], mask: Tensor, scores: Tensor) -> tuple[list[Tensor], list[int], bool, bool]:
    """The [B, T] floats, mask and scores with neighbouring steps, and their row strides. Then, whether four steps of
    all of them can be moved at once, and whether scores are per token."""
    B, T = mask.shape
    if scores.dtype != torch.float32:
        scores = scores.to(torch.float32)
    per_token = scores.ndim == 2
    tensors, strides, is_aligned = as_rows([*same_dtype(*floats), mask, *([scores] if per_token else [])], B, T)
    if not per_token:
        tensors.append(scores.resolve_neg())
        strides.append(scores.stride(0))
    return tensors, strides, is_aligned, per_token


@functools.cache
def _scan_keywords(layout: str, is_aligned: bool, write: bool, two_lambdas: bool) -> dict[str, int]:
    return {"TWO_LAMBDAS": two_lambdas} | keywords(layout, is_aligned, write)


@functools.cache
def _shape_keywords(is_aligned: bool) -> dict[str, int]:
    R, W, tiles, num_warps = LAYOUTS["long rows"]
    return {"ALIGNED": is_aligned, "R": R, "W": W, "TILES": tiles} | launch_options(num_warps, REGISTERS)


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, shaping: ShapingOptions
) -> tuple[Tensor, ...]:
    """Rewards and KL, and for "after_last" the longer mask."""
    B, T = mask.shape
    rewards = torch.empty_like(mask, dtype=torch.float32, memory_format=torch.contiguous_format)
    kl = torch.empty_like(rewards)
    after_last = shaping.reward_at == "after_last"
    longer = torch.empty_like(mask, memory_format=torch.contiguous_format) if after_last else None
    outputs = (rewards, kl) if longer is None else (rewards, kl, longer)
    if B * T == 0:
        return outputs
    tensors, strides, is_aligned, per_token = _inputs((logprobs, ref_logprobs), mask, scores)
    R, W, tiles, _ = LAYOUTS["long rows"]
    with device_guard(mask):
        shape_kernel.run(
            *tensors,
            rewards,
            kl,
            mask if longer is None else longer,
            *_scalars(shaping),
            int(per_token),
            B,
            T,
            *strides,
            grid=(-(-B // R), -(-T // (W * tiles))),
            warmup=False,
            **_shape_keywords(is_aligned),
        )
    return outputs


@functools.cache
def _tile_keywords(is_aligned: bool, block: int) -> dict[str, int]:
    """Of both launches of whitening."""
    return {"ALIGNED": is_aligned, "BLOCK": block} | launch_options(NUM_WARPS, REGISTERS)


class _Flat(NamedTuple):
    """x and mask as rows of neighbouring elements, as few and as long as possible: one if nothing has gaps."""

    tensors: list[Tensor]  # x and the mask, or any address
    has_mask: int
    rows: int
    T: int
    strides: list[int]  # from row to row, of x and the mask
    programs: int  # of a launch
    keywords: dict[str, int]


def _flat(x: Tensor, mask: Tensor | None) -> _Flat:
    size = x.numel()
    if x.is_contiguous() and (mask is None or mask.is_contiguous()):
        rows, T = min(size, 1), max(size, 1)
    else:
        T = x.shape[-1] if x.ndim and x.shape[-1] >= BLOCK // 4 else size
        rows = size // T
    if x.dtype not in POINTERS:
        x = x.to(torch.float32)
    tensors, strides, is_aligned = as_rows([x] if mask is None else [x, mask], rows, T)
    if mask is None:
        tensors.append(no_flags(x.device))
        strides.append(0)
    programs = min(_PROGRAMS, rows * -(-T // BLOCK)) or 1
    return _Flat(tensors, int(mask is not None), rows, T, strides, programs, _tile_keywords(is_aligned, BLOCK))


def _apply_whitening(
    flat: _Flat,
    rows: int,  # 0 if only the statistics are wanted
    out: Tensor,
    partial: Tensor,  # (3, parts), or (9, parts) with statistics
    stats: Tensor | None,
    whitening: WhiteningOptions,
) -> None:
    """The last launch, and over a group, what comes before it."""
    moments, ranks, parts = partial, 0, partial.shape[1]
    if whitening.group is not None:
        mine = partial.new_empty(3)
        merge_kernel.run(partial, mine, parts, grid=(1,), warmup=False, **launch_options(NUM_WARPS))
        ranks = dist.get_world_size(whitening.group)
        gathered = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(gathered, mine, group=whitening.group)
        moments = torch.stack(gathered, dim=1)
    by_tensor, floor, number = False, partial, 0.0
    if isinstance(whitening.min_std, Tensor):
        by_tensor, floor = True, whitening.min_std.to(torch.float32)
    else:
        number = float(whitening.min_std)
    switches = flat.has_mask | (stats is not None) << 1 | whitening.unbiased << 2 | whitening.shift_mean << 3
    whiten_kernel.run(
        *flat.tensors,
        out,
        moments,
        partial,
        floor,
        partial if stats is None else stats,
        switches | by_tensor << 4 | ranks << 5,
        float(whitening.eps),
        number,
        rows,
        flat.T,
        parts,
        *flat.strides,
        grid=(flat.programs if rows else 1,),
        warmup=False,
        **flat.keywords,
    )


def masked_whiten(x: Tensor, mask: Tensor | None, whitening: WhiteningOptions) -> Tensor:
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    if x.numel() == 0 and whitening.group is None:
        return out
    flat = _flat(x, mask)
    partial = out.new_empty(3, flat.programs)
    with device_guard(x):
        moments_kernel.run(
            *flat.tensors,
            partial,
            flat.has_mask,
            flat.rows,
            flat.T,
            *flat.strides,
            grid=(flat.programs,),
            warmup=False,
            **flat.keywords,
        )
        _apply_whitening(flat, flat.rows, out, partial, None, whitening)
    return out


def _scan(
    tensors: AdvantageTensors,
    outputs: tuple[Tensor, ...],  # advantages, returns, rewards, KL
    shaping: ShapingOptions,
    gae_options: GAEOptions,
) -> Tensor:
    """One launch, or two where rows are long and few. Returns the moments and sums of the programs, (9, programs)."""
    scores, logprobs, refs, values, mask = tensors
    B, T = mask.shape
    if B * T == 0:
        return outputs[0].new_zeros(_PLANES, 1)
    inputs, strides, is_aligned, per_token = _inputs((logprobs, refs, values), mask, scores)
    layout = row_layout(T)
    R, W, tiles, _ = LAYOUTS[layout]
    spans, programs = -(-T // (W * tiles)), -(-B // R)
    one_pass = spans <= _ONE_PASS_SPANS or B >= MANY_ROWS or spans > LARGEST_GRID_Y
    partial = outputs[0].new_empty(_PLANES, programs if one_pass else programs * spans)
    two_lambdas, critic_lam = gae_options.critic_lam is not None, gae_options.critic_lam
    present, numbers, *discounts = row_numbers(
        B, gae_options.bootstrap, gae_options.gamma, gae_options.lam, 0.0 if critic_lam is None else critic_lam
    )
    arguments = (
        *inputs,
        partial if numbers is None else numbers,
        *outputs,
        partial if one_pass else outputs[0].new_empty((4 if two_lambdas else 2) * spans * B),
        partial,
        present | per_token << 4,
        *discounts,
        *_scalars(shaping),
        B,
        T,
        *strides,
    )
    kernel, grid = advantages_kernel, (programs, 1 if one_pass else spans)
    if not one_pass:
        kernel.run(
            *arguments,
            grid=(programs, spans - 1),
            warmup=False,
            **_scan_keywords(layout, is_aligned, False, two_lambdas),
        )
    kernel.run(*arguments, grid=grid, warmup=False, **_scan_keywords(layout, is_aligned, True, two_lambdas))
    return partial


def rlhf_advantages(
    tensors: AdvantageTensors,
    shaping: ShapingOptions,
    gae_options: GAEOptions,  # of which it uses gamma, lam, critic_lam and bootstrap
    whitening: WhiteningOptions,
    *,
    whiten: bool,
) -> tuple[Tensor, ...]:
    """Advantages, returns, rewards, KL, and the statistics as one tensor."""
    mask = tensors.mask
    advantages = torch.empty_like(mask, dtype=torch.float32, memory_format=torch.contiguous_format)
    outputs = advantages, *(torch.empty_like(advantages) for _ in range(3))
    stats = advantages.new_empty(len(STATISTICS))
    with device_guard(mask):
        partial = _scan(tensors, outputs, shaping, gae_options)
        flat = _flat(advantages, mask)
        _apply_whitening(flat, flat.rows if whiten else 0, advantages, partial, stats, whitening)
    return *outputs, stats


def variants() -> list[Variant]:
    """Every variant that the launches above can start."""
    flags = {"mask_ptr": "*u1", "longer_ptr": "*u1"}
    found = [variant("advantages merge", merge_kernel, launch_options(NUM_WARPS), {})]
    for (dtype, pointer), is_aligned in itertools.product(POINTERS.items(), (False, True)):
        name = str(dtype)[6:] + (" aligned" if dtype == torch.float32 else " vector") * is_aligned
        pointers = dict.fromkeys(("logprobs_ptr", "refs_ptr", "values_ptr", "x_ptr"), pointer) | flags
        found.append(variant(f"shape_rewards {name}", shape_kernel, _shape_keywords(is_aligned), pointers))
        layouts = ("short rows", True), ("long rows", False), ("long rows", True)
        for (layout, write), two in itertools.product(layouts, (False, True)):
            title = f"rlhf_advantages {layout}{' two lambdas' * two}{'' if write else ' compose'} {name}"
            found.append(variant(title, advantages_kernel, _scan_keywords(layout, is_aligned, write, two), pointers))
        for title, kernel in (("moments", moments_kernel), ("whiten", whiten_kernel)):
            found.append(variant(f"{title} {name}", kernel, _tile_keywords(is_aligned, BLOCK), pointers))
    return found
