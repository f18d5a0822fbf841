"""What loss_kernels.py computes for one block of steps: terms of PPO's loss, their gradients, sums for the statistics.

reference.policy_loss, reference.value_loss and reference.ppo_loss are the specification. A tensor travels between these
functions as (pointer, row stride, step stride) and a place as (row, column, inside); without strides it is contiguous
and `row` is an offset. A part that is absent is None, and the code for it is never generated.
"""

import triton
import triton.language as tl

PAD = tl.constexpr(16)  # stored gradients start at multiples of this, so that they can be moved 16 bytes at a time

# Columns of partial sums over the counted steps of a program. RATIO_MAX is the only maximum among them.
COUNT = tl.constexpr(0)
TERM = tl.constexpr(1)
APPROX_KL = tl.constexpr(2)
CLIPPED = tl.constexpr(3)
RATIO = tl.constexpr(4)
RATIO_MAX = tl.constexpr(5)
DUAL_CLIPPED = tl.constexpr(6)
ENTROPY = tl.constexpr(7)
KL = tl.constexpr(8)
VALUE_COUNT = tl.constexpr(9)
ERROR = tl.constexpr(10)
VALUE_CLIPPED = tl.constexpr(11)
COLUMNS = tl.constexpr(16)


@triton.jit
def _clamp(x, low, high):
    """torch.clamp, also for NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _exp(x):
    """e^x within 2 ulp: the hardware's base 2 exponential alone loses |x| ulp in the product x log2(e)."""
    x = _clamp(x, -1000.0, 1000.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723e-6  # ln 2 in two parts; the first product is exact
    return tl.exp(r) * tl.exp2(n)


@triton.jit
def _read(tensor, place, WHOLE: tl.constexpr):
    """Steps of a tensor in fp32; a whole block is read without a mask, hence 16 bytes at a time where contiguous."""
    ptr, row_stride, step_stride = tensor
    row, column, inside = place
    if row_stride is None:
        at = ptr + row + column
    elif step_stride is None:
        at = ptr + row * row_stride + column
    else:
        at = ptr + row * row_stride + column * step_stride
    if WHOLE:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=inside, other=0)
    return x.to(tl.float32)


@triton.jit
def _counted(mask, place, WHOLE: tl.constexpr):
    if mask[0] is None:
        counted = place[2]
    else:
        counted = place[2] & (_read(mask, place, WHOLE) != 0)
    return counted


@triton.jit
def _surrogate(logprobs, old, advantages, low, high, dual_clip, log_ratio_clamp):
    """Term, its derivative by the log-probability, log-ratio, ratio, clipped?, dual-clipped?

    Sub-gradients at ties as torch.maximum and torch.minimum (a half each) and torch.clamp (passes at its bounds).
    """
    log_ratio = logprobs - old
    ratio = _exp(_clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp))
    clipped_ratio = _clamp(ratio, low, high)
    unclipped = -advantages * ratio
    clipped = -advantages * clipped_ratio
    is_clipped = clipped > unclipped
    # The maximum is NaN if either is. The derivative of `clipped` is that of `unclipped` where the ratio is in range.
    term = tl.where((unclipped > clipped) | (unclipped != unclipped), unclipped, clipped)
    tie = (unclipped == clipped) & (ratio != clipped_ratio)
    slope = tl.where(is_clipped, 0.0, tl.where(tie, 0.5 * unclipped, unclipped))
    is_dual_clipped = term != term
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_dual_clipped = (advantages < 0) & (term > bound)
        slope = tl.where((advantages < 0) & (term == bound), 0.5 * slope, slope)
        slope = tl.where(is_dual_clipped, 0.0, slope)
        term = tl.where(is_dual_clipped, bound, term)
    slope = tl.where((log_ratio >= -log_ratio_clamp) & (log_ratio <= log_ratio_clamp), slope, 0.0)
    return term, slope, log_ratio, ratio, is_clipped, is_dual_clipped


@triton.jit
def _kl(d, log_ratio_clamp, ESTIMATOR: tl.constexpr):
    """reference.kl_estimate and its derivative by the log-probability."""
    if ESTIMATOR == "k1":
        kl, slope = d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        kl, slope = 0.5 * d * d, d
    elif ESTIMATOR == "k3":
        inverse_ratio = _exp(-_clamp(d, -log_ratio_clamp, log_ratio_clamp))
        in_range = (d >= -log_ratio_clamp) & (d <= log_ratio_clamp)
        kl, slope = inverse_ratio - 1 + d, 1 - tl.where(in_range, inverse_ratio, 0.0)
    else:
        kl, slope = tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    return kl, slope


@triton.jit
def _squared_error(values, old, returns, clip):
    """max((v - R)^2, (clipped v - R)^2), half its derivative by v, clipped?"""
    error = values - returns
    squared, slope = error * error, error
    is_clipped = error != error
    if clip is not None:
        move = values - old
        in_range = (move >= -clip) & (move <= clip)
        # In range old + (v - old) is v: adding it up would make rounding look like clipping.
        clipped_error = tl.where(in_range, values, old + _clamp(move, -clip, clip)) - returns
        clipped_squared = clipped_error * clipped_error
        is_clipped = clipped_squared > squared
        tie = (clipped_squared == squared) & (move == move) & (in_range == 0)
        slope = tl.where(is_clipped, 0.0, tl.where(tie, 0.5 * error, error))
        squared = tl.where((squared > clipped_squared) | (squared != squared), squared, clipped_squared)
    return squared, slope, is_clipped


@triton.jit
def _put(sums, COLUMN: tl.constexpr, x):
    """The partial sums with the sum of x in COLUMN."""
    return tl.where(tl.arange(0, COLUMNS) == COLUMN, tl.sum(x.to(tl.float32)), sums)


@triton.jit
def merge(a, b, column):
    return tl.where(column == RATIO_MAX, tl.maximum(a, b), a + b)


@triton.jit
def _write(gradient_at, x, place, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(gradient_at, x)
    else:
        tl.store(gradient_at, x, mask=place[2])


@triton.jit
def _policy_block(
    sums,
    tensors,
    scalars,
    place,
    counted,
    share,
    gradients,
    wanted,
    KL_ESTIMATOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Adds a block's policy term to the partial sums and writes its gradients."""
    logprobs_, old_, advantages_, weights_, entropy_, ref_ = tensors
    low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef = scalars
    logprobs = _read(logprobs_, place, WHOLE)
    old = _read(old_, place, WHOLE)
    advantages = _read(advantages_, place, WHOLE)
    term, slope, log_ratio, ratio, is_clipped, is_dual_clipped = _surrogate(
        logprobs, old, advantages, low, high, dual_clip, log_ratio_clamp
    )
    if weights_[0] is not None:
        weights = _read(weights_, place, WHOLE)
        term, slope = term * weights, slope * weights
    sums = _put(sums, TERM, tl.where(counted, term, 0.0))
    sums = _put(sums, APPROX_KL, tl.where(counted, ratio - 1 - log_ratio, 0.0))
    sums = _put(sums, CLIPPED, is_clipped & counted)
    sums = _put(sums, RATIO, tl.where(counted, ratio, 0.0))
    sums = tl.where(tl.arange(0, COLUMNS) == RATIO_MAX, tl.max(tl.where(counted, ratio, 0.0)), sums)
    if dual_clip is not None:
        sums = _put(sums, DUAL_CLIPPED, is_dual_clipped & counted)
    if entropy_[0] is not None:
        sums = _put(sums, ENTROPY, tl.where(counted, _read(entropy_, place, WHOLE), 0.0))
    if wanted[1]:
        _write(gradients[1], tl.where(counted, -entropy_coef * share, 0.0), place, WHOLE)
    if ref_[0] is not None:
        kl, kl_slope = _kl(logprobs - _read(ref_, place, WHOLE), log_ratio_clamp, KL_ESTIMATOR)
        sums = _put(sums, KL, tl.where(counted, kl, 0.0))
        slope += kl_coef * kl_slope
    if wanted[0]:
        _write(gradients[0], tl.where(counted, slope * share, 0.0), place, WHOLE)
    return sums


@triton.jit
def _value_block(sums, tensors, scalars, place, counted, share, gradients, wanted, WHOLE: tl.constexpr):
    """Adds a block's value term to the partial sums and writes its gradient."""
    values_, old_, returns_ = tensors
    value_coef, value_clip = scalars
    values = _read(values_, place, WHOLE)
    returns = _read(returns_, place, WHOLE)
    old = values
    if value_clip is not None:
        old = _read(old_, place, WHOLE)
    squared, slope, is_clipped = _squared_error(values, old, returns, value_clip)
    sums = _put(sums, ERROR, tl.where(counted, 0.5 * squared, 0.0))
    if value_clip is not None:
        sums = _put(sums, VALUE_CLIPPED, is_clipped & counted)
    if wanted[2]:
        _write(gradients[2], tl.where(counted, value_coef * slope * share, 0.0), place, WHOLE)
    return sums


@triton.jit
def block_sums(
    policy, value, masks, scalars, place, shares, gradients, wanted, KL_ESTIMATOR: tl.constexpr, WHOLE: tl.constexpr
):
    """Partial sums of a block of steps, one per column; the gradients go to memory."""
    sums = tl.zeros((COLUMNS,), tl.float32)
    counted = _counted(masks[0], place, WHOLE)
    value_counted = counted
    if masks[1][0] is not None:
        value_counted = _counted(masks[1], place, WHOLE)
    sums = _put(sums, COUNT, counted)
    sums = _put(sums, VALUE_COUNT, value_counted)
    if policy[0][0] is not None:
        sums = _policy_block(
            sums, policy, scalars[0], place, counted, shares[0], gradients, wanted, KL_ESTIMATOR, WHOLE
        )
    if value[0][0] is not None:
        sums = _value_block(sums, value, scalars[1], place, value_counted, shares[1], gradients, wanted, WHOLE)
    return sums


@triton.jit
def gradient_places(workspace_ptr, index, steps, wanted):
    """Where the stored gradients of these steps are: after the scales, one after the other, those that are wanted."""
    stride = tl.cdiv(steps, PAD).to(tl.int64) * PAD
    at = workspace_ptr + PAD + index
    return at, at + wanted[0] * stride, at + (wanted[0] + wanted[1]) * stride


@triton.jit
def sequence_share(mask, row, start, end, BLOCK: tl.constexpr):
    """1 / number of counted steps of a sequence."""
    count = (end - start).to(tl.float32)
    if mask[0] is not None:
        counts = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            counts += _counted(mask, (row, column, column < end), False).to(tl.float32)
        count = tl.sum(counts)
    return 1.0 / tl.maximum(count, 1.0)
