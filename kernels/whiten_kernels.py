"""The device code of whitening in advantages.py: moments of counted elements, merged in a fixed order, and applied.

A first launch leaves one (count, mean, sum of squared deviations) per program; each program of the second merges all
of them, in the same order and so to the same bits, by the formula of Chan, Golub and LeVeque (1979). Sums of squares
would cancel in fp32.
"""

import triton
import triton.language as tl

MERGED = tl.constexpr(512)  # partial results that are merged at once
WHITENING = ["eps", "bessel", "keep_mean", "rows", "T", "parts", "sum_parts", "x_stride", "m_stride"]


@triton.jit
def add_elements(n, mean, m2, x, counted):
    """Welford's update of each lane's moments by one element."""
    n_new = tl.where(counted, n + 1.0, n)
    delta = x - mean
    mean_new = tl.where(counted, mean + delta / tl.maximum(n_new, 1.0), mean)
    return n_new, mean_new, tl.where(counted, tl.fma(delta, x - mean_new, m2), m2)


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
        share = count / tl.maximum(n + count, 1.0)
        m2 += tl.fma(distance * distance, n * share, squares)
        mean = tl.fma(distance, share, mean)
        n += count
    return over_lanes(n, mean, m2)


@triton.jit
def _total(sums_ptr, parts):
    lane = tl.arange(0, MERGED)
    x = tl.zeros([MERGED], tl.float32)
    for first in range(0, parts, MERGED):
        x += tl.load(sums_ptr + first + lane, mask=first + lane < parts, other=0.0)
    return tl.sum(x)


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(moments_ptr, parts, merged_ptr):
    """One process's moments, for the others of its group."""
    n, mean, m2 = _merged(moments_ptr, parts)
    tl.store(merged_ptr, n)
    tl.store(merged_ptr + 1, mean)
    tl.store(merged_ptr + 2, m2)


@triton.jit
def _tile(tile, row_tiles, T, x_stride, m_stride, BLOCK: tl.constexpr):
    """Offsets of a tile's elements in x, the mask and a tensor without gaps, and which of them exist."""
    row = tile // row_tiles
    step = (tile % row_tiles) * BLOCK + tl.arange(0, BLOCK)
    return row * x_stride + step, row * m_stride + step, row * T + step, step < T


@triton.jit(do_not_specialize=["rows", "T", "x_stride", "m_stride"])
def _moments_kernel(
    x_ptr,  # (rows, T)
    mask_ptr,  # or None
    moments_ptr,  # (3, programs)
    rows,
    T,
    x_stride,  # from row to row
    m_stride,
    ALIGNED: tl.constexpr,  # T and both strides are multiples of 4
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        T = T // 4 * 4
        x_stride = x_stride // 4 * 4
        m_stride = m_stride // 4 * 4
    n = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    row_tiles = tl.cdiv(T, BLOCK)
    program = tl.program_id(0)
    for tile in range(program.to(tl.int64), rows.to(tl.int64) * row_tiles, tl.num_programs(0)):
        x_at, mask_at, _, here = _tile(tile, row_tiles, T, x_stride, m_stride, BLOCK)
        counted = here
        if mask_ptr is not None:
            counted = here & (tl.load(mask_ptr + mask_at, mask=here, other=0) != 0)
        x = tl.load(x_ptr + x_at, mask=here, other=0.0).to(tl.float32)
        n, mean, m2 = add_elements(n, mean, m2, x, counted)
    n_all, mean_all, m2_all = over_lanes(n, mean, m2)
    tl.store(moments_ptr + program, n_all)
    tl.store(moments_ptr + tl.num_programs(0) + program, mean_all)
    tl.store(moments_ptr + 2 * tl.num_programs(0) + program, m2_all)


@triton.jit
def _store_statistics(stats_ptr, sums_ptr, parts, count, mean, std):
    """Means over rows, counted tokens and steps, from the sums of the parts of this process."""
    rows = tl.maximum(_total(sums_ptr + 8 * parts, parts), 1.0)
    tokens = tl.maximum(_total(sums_ptr, parts), 1.0)
    steps = tl.maximum(_total(sums_ptr + 6 * parts, parts), 1.0)
    tl.store(stats_ptr, _total(sums_ptr + 7 * parts, parts) / rows)
    tl.store(stats_ptr + 1, _total(sums_ptr + 3 * parts, parts) / rows)
    tl.store(stats_ptr + 2, _total(sums_ptr + 4 * parts, parts) / tokens)
    tl.store(stats_ptr + 3, _total(sums_ptr + 5 * parts, parts) / steps)
    tl.store(stats_ptr + 4, mean)
    tl.store(stats_ptr + 5, std)


@triton.jit(do_not_specialize=WHITENING)
def _whiten_kernel(
    x_ptr,  # (rows, T); may be out
    mask_ptr,  # or None
    out_ptr,  # (rows, T) without gaps
    moments_ptr,  # (3, parts)
    sums_ptr,  # (9, sum_parts) from _advantages_kernel, or None
    stats_ptr,  # (6,), or None
    eps,
    bessel,  # 1 if unbiased
    keep_mean,  # 1 if only the spread is scaled
    rows,  # 0 if only the statistics are wanted
    T,
    parts,
    sum_parts,
    x_stride,  # from row to row
    m_stride,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        T = T // 4 * 4
        x_stride = x_stride // 4 * 4
        m_stride = m_stride // 4 * 4
    count, mean, m2 = _merged(moments_ptr, parts)
    variance = m2 / tl.maximum(count - bessel, 1.0)
    scale = tl.where(count > 1, 1.0 / tl.sqrt(variance + eps), 1.0)
    kept = tl.where(keep_mean != 0, mean, 0.0)
    program = tl.program_id(0)
    if stats_ptr is not None:  # noqa: SIM102 - known when compiling, unlike the next
        if program == 0:
            _store_statistics(stats_ptr, sums_ptr, sum_parts, count, mean, tl.sqrt(variance))
    row_tiles = tl.cdiv(T, BLOCK)
    for tile in range(program.to(tl.int64), rows.to(tl.int64) * row_tiles, tl.num_programs(0)):
        x_at, mask_at, out_at, here = _tile(tile, row_tiles, T, x_stride, m_stride, BLOCK)
        x = tl.load(x_ptr + x_at, mask=here, other=0.0).to(tl.float32)
        whitened = (x - mean) * scale + kept
        if mask_ptr is not None:
            whitened = tl.where(tl.load(mask_ptr + mask_at, mask=here, other=0) != 0, whitened, 0.0)
        tl.store(out_ptr + out_at, whitened, mask=here)
