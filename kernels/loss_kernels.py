"""The device code of loss.py: the terms of PPO's loss, their gradients and statistics, for one block of steps.

reference.policy_loss, reference.value_loss and reference.ppo_loss say what is computed; loss.py says in which launches.
A tensor travels between the functions as (pointer, row stride, step stride), a place as (row, column, inside); a part
that is absent is None, and the code for it is never generated.
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
PER_STEP = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "weights",
    "entropy",
    "ref_logprobs",
    "values",
    "old_values",
    "returns",
    "mask",
    "value_mask",
)
_INTEGERS = ["steps", "T", *(f"{name}_{axis}" for name in PER_STEP for axis in ("row", "step"))]


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
        at = ptr + column
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
def _merge(a, b, column):
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
def _block(
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
def _gradient_places(workspace_ptr, index, steps, wanted):
    """Where the stored gradients of these steps are: after the scales, one after the other, those that are wanted."""
    stride = tl.cdiv(steps, PAD).to(tl.int64) * PAD
    at = workspace_ptr + PAD + index
    return at, at + wanted[0] * stride, at + (wanted[0] + wanted[1]) * stride


@triton.jit
def _share(mask, row, start, end, BLOCK: tl.constexpr):
    """1 / number of counted steps of a sequence."""
    count = (end - start).to(tl.float32)
    if mask[0] is not None:
        counts = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            counts += _counted(mask, (row, column, column < end), False).to(tl.float32)
        count = tl.sum(counts)
    return 1.0 / tl.maximum(count, 1.0)


@triton.jit(do_not_specialize=_INTEGERS)
def _loss_fwd_kernel(
    logprobs_ptr,  # [rows, T]; so are the next ten, each with its own two strides
    old_logprobs_ptr,
    advantages_ptr,
    weights_ptr,
    entropy_ptr,
    ref_logprobs_ptr,
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,
    value_mask_ptr,
    cu_seqlens_ptr,  # [S + 1], or None
    workspace_ptr,  # scales [PAD], gradients [0 to 3, steps up to a multiple of PAD], partial sums [COLUMNS, programs]
    low,
    high,
    dual_clip,
    log_ratio_clamp,
    entropy_coef,
    kl_coef,
    value_coef,
    value_clip,
    steps,  # of all rows together
    T,
    logprobs_row,  # strides: None for all rows where every tensor is contiguous, for all steps where each is 1
    logprobs_step,
    old_logprobs_row,
    old_logprobs_step,
    advantages_row,
    advantages_step,
    weights_row,
    weights_step,
    entropy_row,
    entropy_step,
    ref_logprobs_row,
    ref_logprobs_step,
    values_row,
    values_step,
    old_values_row,
    old_values_step,
    returns_row,
    returns_step,
    mask_row,
    mask_step,
    value_mask_row,
    value_mask_step,
    KL_ESTIMATOR: tl.constexpr,
    SEQUENCES: tl.constexpr,  # a program takes a sequence
    MEAN: tl.constexpr,  # steps are weighted by 1 / length of their sequence
    D_LOGPROBS: tl.constexpr,  # which gradients to store
    D_ENTROPY: tl.constexpr,
    D_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    policy = (
        (logprobs_ptr, logprobs_row, logprobs_step),
        (old_logprobs_ptr, old_logprobs_row, old_logprobs_step),
        (advantages_ptr, advantages_row, advantages_step),
        (weights_ptr, weights_row, weights_step),
        (entropy_ptr, entropy_row, entropy_step),
        (ref_logprobs_ptr, ref_logprobs_row, ref_logprobs_step),
    )
    value = (
        (values_ptr, values_row, values_step),
        (old_values_ptr, old_values_row, old_values_step),
        (returns_ptr, returns_row, returns_step),
    )
    masks = ((mask_ptr, mask_row, mask_step), (value_mask_ptr, value_mask_row, value_mask_step))
    scalars = ((low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef), (value_coef, value_clip))
    wanted = (D_LOGPROBS, D_ENTROPY, D_VALUES)
    if SEQUENCES:
        row, start, end = program, program * 0, program * 0 + T
        if cu_seqlens_ptr is not None:
            start = tl.maximum(tl.load(cu_seqlens_ptr + program).to(tl.int64), 0)
            end = tl.minimum(tl.load(cu_seqlens_ptr + program + 1).to(tl.int64), steps)
            row = program * 0
        shares = (1.0, 1.0)
        if MEAN:
            policy_share = _share(masks[0], row, start, end, BLOCK)
            value_share = policy_share
            if value_mask_ptr is not None:
                value_share = _share(masks[1], row, start, end, BLOCK)
            shares = (policy_share, value_share)
        sums = tl.zeros((COLUMNS,), tl.float32)
        for first in range(start, end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            at = _gradient_places(workspace_ptr, row * T + column, steps, wanted)
            place = (row, column, column < end)
            block = _block(policy, value, masks, scalars, place, shares, at, wanted, KL_ESTIMATOR, False)
            sums = _merge(sums, block, tl.arange(0, COLUMNS))
    else:
        index = program * BLOCK + tl.arange(0, BLOCK)
        at = _gradient_places(workspace_ptr, index, steps, wanted)
        if logprobs_row is None and values_row is None:
            place = (0, index, index < steps)
            if (program + 1) * BLOCK <= steps:
                sums = _block(policy, value, masks, scalars, place, (1.0, 1.0), at, wanted, KL_ESTIMATOR, True)
            else:
                sums = _block(policy, value, masks, scalars, place, (1.0, 1.0), at, wanted, KL_ESTIMATOR, False)
        else:
            place = (index // T, index % T, index < steps)
            sums = _block(policy, value, masks, scalars, place, (1.0, 1.0), at, wanted, KL_ESTIMATOR, False)
    gradients = (D_LOGPROBS + D_ENTROPY + D_VALUES) * tl.cdiv(steps, PAD).to(tl.int64) * PAD
    partials_ptr = workspace_ptr + PAD + gradients + program
    tl.store(partials_ptr + tl.arange(0, COLUMNS) * tl.num_programs(0).to(tl.int64), sums)


@triton.jit
def _get(sums, COLUMN: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, COLUMNS) == COLUMN, sums, 0.0))


@triton.jit(do_not_specialize=["steps", "programs", "gradients"])
def _loss_reduce_kernel(
    workspace_ptr,  # as above
    loss_ptr,  # []
    stats_ptr,  # [STATS], in the order of stat_names with none left out
    denominator_ptr,  # [], or None
    denominator,
    norm_length,
    entropy_coef,
    kl_coef,
    value_coef,
    steps,
    programs,
    gradients,  # how many are stored
    COUNTS: tl.constexpr,  # what the loss is divided by: "steps", "sequences" or the given "denominator"
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[:, None]
    partials_ptr = workspace_ptr + PAD + gradients * tl.cdiv(steps, PAD).to(tl.int64) * PAD
    totals = tl.zeros((COLUMNS, BLOCK), tl.float32)
    shared = tl.zeros((COLUMNS, BLOCK), tl.float32)
    sequences = tl.zeros((BLOCK,), tl.float32)
    value_sequences = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = program < programs
        tile = tl.load(
            partials_ptr + column * programs.to(tl.int64) + program[None, :], mask=inside[None, :], other=0.0
        )
        totals = _merge(totals, tile, column)
        if COUNTS == "sequences" or MEAN:
            count = tl.load(partials_ptr + COUNT * programs.to(tl.int64) + program, mask=inside, other=0.0)
            value_count = tl.load(partials_ptr + VALUE_COUNT * programs.to(tl.int64) + program, mask=inside, other=0.0)
            sequences += (count > 0).to(tl.float32)
            value_sequences += (value_count > 0).to(tl.float32)
            if MEAN:
                length = tl.where(column == ERROR, value_count[None, :], count[None, :])
                shared += tile / tl.maximum(length, 1.0)
    sums = tl.where(tl.arange(0, COLUMNS) == RATIO_MAX, tl.max(totals, 1), tl.sum(totals, 1))
    terms = sums
    if MEAN:
        terms = tl.sum(shared, 1)
    count = tl.maximum(_get(sums, COUNT), 1.0)
    value_count = tl.maximum(_get(sums, VALUE_COUNT), 1.0)
    normaliser, value_normaliser = count, value_count
    if COUNTS == "sequences":
        normaliser = tl.maximum(tl.sum(sequences), 1.0)
        value_normaliser = tl.maximum(tl.sum(value_sequences), 1.0)
    elif COUNTS == "denominator":
        normaliser = denominator
        if denominator_ptr is not None:
            normaliser = tl.load(denominator_ptr).to(tl.float32)
        value_normaliser = normaliser
    normaliser, value_normaliser = normaliser * norm_length, value_normaliser * norm_length
    tl.store(workspace_ptr, 1.0 / normaliser)
    tl.store(workspace_ptr + 1, 1.0 / value_normaliser)
    policy = _get(terms, TERM) / normaliser
    value = _get(terms, ERROR) / value_normaliser
    companions = kl_coef * _get(terms, KL) - entropy_coef * _get(terms, ENTROPY)
    tl.store(loss_ptr, policy + companions / normaliser + value_coef * value)
    ratio = _get(sums, RATIO)
    tl.store(stats_ptr, policy)
    tl.store(stats_ptr + 1, _get(sums, APPROX_KL) / count)
    tl.store(stats_ptr + 2, _get(sums, CLIPPED) / count)
    tl.store(stats_ptr + 3, ratio / count)
    tl.store(stats_ptr + 4, tl.where(ratio == ratio, _get(sums, RATIO_MAX), ratio))  # maxima drop NaN, sums keep it
    tl.store(stats_ptr + 5, _get(sums, DUAL_CLIPPED) / count)
    tl.store(stats_ptr + 6, _get(sums, ENTROPY) / count)
    tl.store(stats_ptr + 7, _get(sums, KL) / count)
    tl.store(stats_ptr + 8, value)
    tl.store(stats_ptr + 9, _get(sums, VALUE_CLIPPED) / value_count)


@triton.jit
def _scale(from_at, to_at, scale, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(to_at, tl.load(from_at) * scale)
    else:
        tl.store(to_at, tl.load(from_at, mask=inside) * scale, mask=inside)


@triton.jit
def _scale_all(stored, out, scales, index, inside, WHOLE: tl.constexpr):
    for i in tl.static_range(3):
        if out[i] is not None:
            _scale(stored[i], out[i] + index, scales[i], inside, WHOLE)


@triton.jit(do_not_specialize=["steps"])
def _loss_bwd_kernel(
    workspace_ptr,  # as above
    grad_loss_ptr,  # []
    d_logprobs_ptr,  # [steps], or None; so are the next two
    d_entropy_ptr,
    d_values_ptr,
    steps,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    out = (d_logprobs_ptr, d_entropy_ptr, d_values_ptr)
    wanted = (d_logprobs_ptr is not None, d_entropy_ptr is not None, d_values_ptr is not None)
    stored = _gradient_places(workspace_ptr, index, steps, wanted)
    upstream = tl.load(grad_loss_ptr).to(tl.float32)
    scale = upstream * tl.load(workspace_ptr)
    scales = (scale, scale, upstream * tl.load(workspace_ptr + 1))
    if (program + 1) * BLOCK <= steps:
        _scale_all(stored, out, scales, index, index < steps, True)
    else:
        _scale_all(stored, out, scales, index, index < steps, False)
