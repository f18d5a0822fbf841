"""reference.masked_whiten: moments of counted elements, merged in a fixed order, and applied.

A first launch stores one (count, mean, sum of squared deviations) per program; each program of the second merges all
of them, in the same order and so to the same bits, by the formula of Chan, Golub and LeVeque (1979). Sums of squares
would cancel in fp32.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.gae.kernel import is_given, pointers

MERGED = tl.constexpr(512)  # partial results that are merged at once


@triton.jit
def add_elements(n, mean, m2, x, mask):
    """Welford's update of each lane's moments by one element.

    The first element is its own mean: x / 1 in the approximate division of a GPU may be off by two roundings, which is
    much for |mean| >> spread.
    """
    n_new = tl.where(mask, n + 1.0, n)
    delta = x - mean
    updated = tl.where(n == 0, x, mean + delta / tl.maximum(n_new, 1.0))
    mean_new = tl.where(mask, updated, mean)
    return n_new, mean_new, tl.where(mask, tl.fma(delta, x - mean_new, m2), m2)


@triton.jit
def over_lanes(n, mean, m2):
    """Chan's formula over all lanes at once; the mean is corrected once, to its last bit, for |mean| >> spread."""
    total = tl.sum(n)
    divisor = tl.maximum(total, 1.0)
    rough = tl.sum(n * mean) / divisor
    centre = rough + tl.sum(n * (mean - rough)) / divisor
    distance = mean - centre
    return total, centre, tl.sum(m2 + n * distance * distance)


@triton.jit
def _merged(moments_ptr, parts):
    """(count, mean, sum of squared deviations) of everything, from those of the parts, (3, parts)."""
    lane = tl.arange(0, MERGED)
    n = tl.zeros([MERGED], tl.float32)
    mean = tl.zeros([MERGED], tl.float32)
    m2 = tl.zeros([MERGED], tl.float32)
    for first in range(0, parts, MERGED):
        at = moments_ptr + first + lane
        there = first + lane < parts
        count = tl.load(at, mask=there, other=0.0)
        distance = tl.load(at + parts, mask=there, other=0.0) - mean
        squares = tl.load(at + 2 * parts, mask=there, other=0.0)
        share = tl.where(n == 0, 1.0, count / tl.maximum(n + count, 1.0))  # exact for the first part, as above
        m2 += tl.fma(distance * distance, n * share, squares)
        mean = tl.fma(distance, share, mean)
        n += count
    return over_lanes(n, mean, m2)


@triton.jit(do_not_specialize=[0, 1, 2])
def merge_kernel(
    moments_ptr,  # (3, parts), perhaps with more after it
    merged_ptr,  # (3,)
    parts: tl.int32,
):
    """The moments of one process, for the others of its group."""
    n, mean, m2 = _merged(moments_ptr, parts)
    tl.store(merged_ptr, n)
    tl.store(merged_ptr + 1, mean)
    tl.store(merged_ptr + 2, m2)


@triton.jit
def _tile(tile, row_tiles, T, x_stride, m_stride, BLOCK: tl.constexpr):
    """Offsets of a tile's elements in x, the mask and a tensor without gaps, and which of them exist."""
    row = (tile // row_tiles).to(tl.int64)
    step = (tile % row_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row * x_stride + step, row * m_stride + step, row * T + step, step < T


@triton.jit(do_not_specialize=list(range(8)))
def moments_kernel(
    x_ptr,  # (rows, T)
    mask_ptr,  # (rows, T); any address if not has_mask
    moments_ptr,  # (3, programs)
    has_mask: tl.int32,
    rows: tl.int32,
    T: tl.int64,
    x_stride: tl.int64,  # from row to row
    m_stride: tl.int64,
    ALIGNED: tl.constexpr,  # T is a multiple of 4, and each row starts at a multiple of 4 elements
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        T = T // 4 * 4
    n = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    row_tiles = tl.cdiv(T, BLOCK).to(tl.int32)
    program = tl.program_id(0)
    for tile in range(program, rows * row_tiles, tl.num_programs(0)):
        x_at, mask_at, _, here = _tile(tile, row_tiles, T, x_stride, m_stride, BLOCK)
        x = tl.load(pointers(x_ptr, x_at, ALIGNED), mask=here, other=0.0).to(tl.float32)
        mask = here & (tl.load(pointers(mask_ptr, mask_at, ALIGNED), mask=here & (has_mask != 0), other=1) != 0)
        n, mean, m2 = add_elements(n, mean, m2, x, mask)
    n_all, mean_all, m2_all = over_lanes(n, mean, m2)
    tl.store(moments_ptr + program, n_all)
    tl.store(moments_ptr + tl.num_programs(0) + program, mean_all)
    tl.store(moments_ptr + 2 * tl.num_programs(0) + program, m2_all)


@triton.jit
def _store_statistics(stats_ptr, sums_ptr, parts, mean, std):
    """Scores and rewards per row, KL per token, returns per step: sums of this process's parts, in one pass."""
    statistic = tl.arange(0, 4)[:, None]
    divisor = tl.where(statistic < 2, 7, tl.where(statistic == 2, 0, 8))  # the plane of rows, tokens or steps
    lane = tl.arange(0, MERGED)[None, :]
    x = tl.zeros([4, MERGED], tl.float32)
    n = tl.zeros([4, MERGED], tl.float32)
    for first in range(0, parts, MERGED):
        at = sums_ptr + first + lane
        there = first + lane < parts
        x += tl.load(at + (3 + statistic) * parts, mask=there, other=0.0)
        n += tl.load(at + divisor * parts, mask=there, other=0.0)
    tl.store(stats_ptr + tl.arange(0, 4), tl.sum(x, 1) / tl.maximum(tl.sum(n, 1), 1.0))
    tl.store(stats_ptr + 4, mean)
    tl.store(stats_ptr + 5, std)


@triton.jit(do_not_specialize=list(range(15)))
def whiten_kernel(
    x_ptr,  # (rows, T); may be out
    mask_ptr,  # (rows, T); any address if not given
    out_ptr,  # (rows, T) without gaps
    moments_ptr,  # (3, parts), or (3, ranks) of a group
    sums_ptr,  # (9, parts) from advantages_kernel; any address without statistics
    min_std_ptr,  # []; any address if it is a number
    stats_ptr,  # (6,); any address without statistics
    switches: tl.int32,  # bits 0 to 4: has mask, statistics, unbiased, shift_mean, has min_std_ptr; from 5 on: ranks
    eps: tl.float32,
    min_std: tl.float32,
    rows: tl.int32,  # 0 if only the statistics are wanted
    T: tl.int64,
    parts: tl.int32,  # programs before this launch
    x_stride: tl.int64,  # from row to row
    m_stride: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        T = T // 4 * 4
    ranks = switches >> 5
    count, mean, m2 = _merged(moments_ptr, tl.where(ranks > 0, ranks, parts))
    variance = m2 / tl.maximum(count - tl.where(is_given(switches, 2), 1.0, 0.0), 1.0)
    floor = tl.where(is_given(switches, 4), tl.load(min_std_ptr, mask=is_given(switches, 4), other=0.0), min_std)
    spread = tl.sqrt(variance + eps)
    spread = tl.where(spread < floor, floor, spread)  # a NaN stays
    scale = tl.where(count > 1, 1.0 / spread, 1.0)
    kept = tl.where(is_given(switches, 3), 0.0, mean)
    program = tl.program_id(0)
    if (program == 0) & is_given(switches, 1):
        _store_statistics(stats_ptr, sums_ptr, parts, mean, tl.sqrt(variance))
    row_tiles = tl.cdiv(T, BLOCK).to(tl.int32)
    for tile in range(program, rows * row_tiles, tl.num_programs(0)):
        x_at, mask_at, out_at, here = _tile(tile, row_tiles, T, x_stride, m_stride, BLOCK)
        x = tl.load(pointers(x_ptr, x_at, ALIGNED), mask=here, other=0.0).to(tl.float32)
        mask = tl.load(pointers(mask_ptr, mask_at, ALIGNED), mask=here & is_given(switches, 0), other=1) != 0
        whitened = tl.where(mask, tl.fma(x - mean, scale, kept), 0.0)
        tl.store(pointers(out_ptr, out_at, ALIGNED), whitened, mask=here)
