"""Device functions for rows of logits: the online softmax, entropy, gradient and addresses that kernels share.

Everything is in base 2: `scale` is log2(e)/temperature, and a row is reduced to top, a number near its largest
x scale, s = sum 2^u and w = sum 2^u u with u = x scale - top. One fma makes u, so that logits of 1e4 lose no digits
whatever top was rounded to. top starts at the lowest finite number instead of -inf: a block of -inf needs no case of
its own. All sums are trees over pairs of fixed columns: the bits of a row depend on its values and on the number of
columns only, not on alignment, strides, other rows or how Triton lays the block out.

A caller loops: state = start_rows(); state = add_block(*state, x); then finish_rows.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
LN_2 = tl.constexpr(0.6931471805599453)
# 2^-200 is 0 in fp32, so an exponent may be clamped there: 0 * -inf, which is NaN, cannot arise.
NO_MASS = tl.constexpr(-200.0)


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
    """(ROWS, LANES): columns that are LANES apart added up. They sit in one thread, so this costs no shuffles."""
    for level in tl.static_range(30):
        if (SIZE >> level) > LANES:
            x = tl.sum(tl.reshape(x, (ROWS, 2, SIZE >> (level + 1))), axis=1)
    return x


@triton.jit
def start_rows(
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The state (top, sums, moments) of an online softmax that has seen nothing; sums and moments are partial."""
    return (
        tl.full((ROWS,), LOWEST, tl.float32),
        tl.zeros((ROWS, LANES), tl.float32),
        tl.zeros((ROWS, LANES), tl.float32),
    )


@triton.jit
def add_block(
    top,  # (ROWS,)
    sums,  # (ROWS, LANES)
    moments,  # (ROWS, LANES)
    x,  # (ROWS, BLOCK) fp32 logits, -inf where there is none
    scale,  # log2(e) / temperature
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One step of the online softmax: the state after another block of columns."""
    new_top = tl.maximum(top, tl.max(x, axis=1) * scale)
    shift = tl.maximum(top - new_top, NO_MASS)[:, None]
    shrink = tl.exp2(shift)
    u = tl.fma(x, scale, -new_top[:, None])
    e = tl.exp2(u)
    eu = e * tl.maximum(u, NO_MASS)
    moments = shrink * (moments + sums * shift) + fold_sum(eu, ROWS, BLOCK, LANES)
    sums = shrink * sums + fold_sum(e, ROWS, BLOCK, LANES)
    return new_top, sums, moments


@triton.jit
def finish_rows(
    sums,  # (ROWS, LANES)
    moments,  # (ROWS, LANES)
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """log2 s and the entropy in nats."""
    total, moment = tree_sums(sums, moments, ROWS, LANES)
    log_sum = tl.log2(total)
    return log_sum, (log_sum - moment / total) * LN_2


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 without cancellation: the series near 0, where 1/9! ends it below fp32's resolution."""
    series = 1.0 + x * (1 / 7) * (1.0 + x * (1 / 8))
    series = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * series)
    series = x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * series)))
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
    return -g * expm1(logp) - h * p * (tl.maximum(logp, NO_MASS) + entropy)


@triton.jit
def logit_gradient(
    x,  # (ROWS, BLOCK) fp32 logits
    is_token,  # (ROWS, BLOCK)
    at_token,  # (ROWS,) from target_gradient
    g,  # (ROWS,) d loss / d logp, over temperature
    h,  # (ROWS,) d loss / d H, over temperature
    top,  # (ROWS,)
    log_sum,  # (ROWS,) log2 s
    entropy,  # (ROWS,)
    scale,  # log2(e) / temperature
):
    """g (1[j = token] - p_j) - h p_j (log p_j + H); a term with p_j = 0 is 0, also for z_j = -inf."""
    log2_p = tl.fma(x, scale, -top[:, None]) - log_sum[:, None]
    slope, offset = h * LN_2, g + h * entropy
    d = -tl.exp2(log2_p) * (tl.maximum(log2_p, NO_MASS) * slope[:, None] + offset[:, None])
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
def load_counted(
    mask_ptr,  # (B, T) bool
    row,  # (ROWS,)
    N,
    T,
    stride_b,
    stride_t,
    has_mask,
):
    """Which rows exist and count."""
    exists = row < N
    mask = tl.load(mask_ptr + row_offset(row, T, stride_b, stride_t), mask=exists & (has_mask != 0), other=1)
    return exists & (mask != 0)
