"""Device functions for rows of logits: online softmax, entropy, gradient and addresses.

With m the largest x of a row and scale = log2(e)/temperature, a row is reduced to m, s = sum 2^u and w = sum 2^u u with
u = (x - m) scale. Subtracting first costs one instruction more than a fused multiply-add of x scale - m scale, but it
is right for every finite x: near m the difference is exact, so logits of 1e4 lose no digits, and no product overflows
or leaves a rounding residual, so that -1e10 or the lowest finite number may be used instead of -inf. m starts at the
lowest finite number: a block of -inf needs no case of its own.

All sums are trees over pairs of fixed columns: the bits of a row depend on its values and on the number of columns
only, not on alignment, strides, other rows or how Triton lays the block out.

A caller loops: state = start_rows(); state = add_block(*state, x); then finish_rows.
"""

import functools

import torch
import triton
import triton.language as tl

# Constants are written inside functions: Triton compares each global constant of a kernel again in every launch.


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads that execute together: 64 on AMD's data center GPUs, 32 elsewhere."""
    if device.type != "cuda" or not torch.version.hip:
        return 32
    return torch.cuda.get_device_properties(device).warp_size


@triton.jit
def with_mass(u):
    """u, but not below -200: 2^-200 is 0 in fp32, so nothing changes, and 0 * -inf, which is NaN, cannot arise."""
    return tl.maximum(u, -200.0)


@triton.jit
def to_nats(x):
    return x * 0.6931471805599453


@triton.jit
def tree_sums(
    x,  # (ROWS, SIZE)
    y,  # (ROWS, SIZE)
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Both sums over the second axis, neighbours first: the same bits in whatever layout x and y have."""
    both = tl.join(x, y)
    for level in tl.static_range(30):
        if (SIZE >> level) > 1:
            both = tl.sum(tl.reshape(both, (ROWS, SIZE >> (level + 1), 2, 2)), axis=2)
    return tl.split(tl.reshape(both, (ROWS, 2)))


@triton.jit
def fold_sum(
    x,  # (ROWS, SIZE)
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    """(ROWS, LANES): columns that are LANES apart added up. They are in one thread, so this needs no shuffles."""
    for level in tl.static_range(30):
        if (SIZE >> level) > LANES:
            x = tl.sum(tl.reshape(x, (ROWS, 2, SIZE >> (level + 1))), axis=1)
    return x


@triton.jit
def start_rows(
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The state (m, sums, weighted sums) of an online softmax before the first block; the sums are partial."""
    return (
        tl.full((ROWS,), -3.4028234663852886e38, tl.float32),
        tl.zeros((ROWS, LANES), tl.float32),
        tl.zeros((ROWS, LANES), tl.float32),
    )


@triton.jit
def add_block(
    row_max,  # (ROWS,)
    sums,  # (ROWS, LANES)
    weighted_sum,  # (ROWS, LANES); untouched unless WITH_ENTROPY
    x,  # (ROWS, BLOCK) fp32 logits, -inf where there is none
    scale,  # log2(e) / temperature
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """The state of the online softmax after another block of columns."""
    new_max = tl.maximum(row_max, tl.max(x, axis=1))
    shift = with_mass((row_max - new_max) * scale)[:, None]
    shrink = tl.exp2(shift)
    u = (x - new_max[:, None]) * scale
    e = tl.exp2(u)
    if WITH_ENTROPY:
        weighted_sum = tl.fma(shrink, tl.fma(sums, shift, weighted_sum), fold_sum(e * with_mass(u), ROWS, BLOCK, LANES))
    sums = tl.fma(shrink, sums, fold_sum(e, ROWS, BLOCK, LANES))
    return new_max, sums, weighted_sum


@triton.jit
def finish_rows(
    sums,  # (ROWS, LANES)
    weighted_sum,  # (ROWS, LANES)
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """log2 s, and the entropy in nats, which has no meaning if the weighted sums were left out."""
    total, weighted_total = tree_sums(sums, weighted_sum, ROWS, LANES)
    log_sum = tl.log2(total)
    return log_sum, to_nats(log_sum - weighted_total / total)


@triton.jit
def token_logprob(
    x,  # (ROWS,) the logit of the token
    row_max,  # (ROWS,)
    log_sum,  # (ROWS,) log2 s
    inverse_temperature,
):
    """z - log sum e^z in nats: a difference of 3e38 fits fp32 in nats, but not in base 2."""
    return tl.fma(x - row_max, inverse_temperature, -to_nats(log_sum))


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 without cancellation: the series near 0, where 1/9! ends it below fp32's resolution."""
    series = tl.fma(x, 1 / 40320, 1 / 5040)
    series = tl.fma(x, tl.fma(x, series, 1 / 720), 1 / 120)
    series = tl.fma(x, tl.fma(x, series, 1 / 24), 1 / 6)
    series = x * tl.fma(x, tl.fma(x, series, 1 / 2), 1.0)
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def target_gradient(
    g,  # (ROWS,) d loss / d logp, over temperature
    h,  # (ROWS,) d loss / d H, over temperature
    logp,  # (ROWS,)
    entropy,  # (ROWS,)
):
    """The gradient at the token itself, where p - 1 would cancel: g (1 - p) - h p (logp + H)."""
    p = tl.exp(logp)
    return -g * expm1(logp) - h * p * (with_mass(logp) + entropy)


@triton.jit
def logit_gradient(
    x,  # (ROWS, BLOCK) fp32 logits
    is_token,  # (ROWS, BLOCK)
    at_token,  # (ROWS,) from target_gradient
    g,  # (ROWS,) d loss / d logp, over temperature
    h,  # (ROWS,) d loss / d H, over temperature; 0 unless WITH_ENTROPY
    row_max,  # (ROWS,)
    log_sum,  # (ROWS,) log2 s
    entropy,  # (ROWS,)
    scale,  # log2(e) / temperature
    WITH_ENTROPY: tl.constexpr,
):
    """g (1[j = token] - p_j) - h p_j (log p_j + H); a term with p_j = 0 is 0, also for z_j = -inf."""
    log2_p = tl.fma(x - row_max[:, None], scale, -log_sum[:, None])
    p = tl.exp2(log2_p)
    if WITH_ENTROPY:
        d = -p * tl.fma(with_mass(log2_p), to_nats(h)[:, None], tl.fma(h, entropy, g)[:, None])
    else:
        d = p * -g[:, None]
    return tl.where(is_token, at_token[:, None], d)


@triton.jit
def row_offset(
    row,  # int32, scalar or (ROWS,)
    T,
    stride_b,
    stride_t,
):
    """Where row b T + t starts, in elements: int64, since N V passes 2^31."""
    return (row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t


@triton.jit
def column_offset(
    column,  # int32
    stride_v,
    UNIT: tl.constexpr,
):
    """The offset of a column in its row; with unit stride it stays int32, and neighbours are known to be neighbours."""
    if UNIT:
        return column
    else:
        return column.to(tl.int64) * stride_v


@triton.jit
def load_mask(
    mask_ptr,  # (B, T) bool
    row,  # (ROWS,)
    N,
    T,
    stride_b,
    stride_t,
    has_mask,
):
    """Whether each row exists and counts."""
    exists = row < N
    mask = tl.load(mask_ptr + row_offset(row, T, stride_b, stride_t), mask=exists & (has_mask != 0), other=1)
    return exists & (mask != 0)
