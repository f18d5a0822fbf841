"""PPO's scalar losses: reference.policy_loss, reference.value_loss and reference.ppo_loss, one code for all.

Forward: one launch reads every per-token tensor once, writes the gradients (fp32, before normalisation: the number of
counted steps is not known yet) and one column of partial sums per program; a second launch of one program adds the
columns in a fixed order, divides, and writes loss, statistics and the two scales that turn the stored gradients into
real ones. Backward: one launch, gradient = stored * (upstream * scale), cast to the input's dtype.

A program takes a block of steps of the flattened tensors; where the weight of a step depends on its sequence it takes
one sequence (a row, or a piece of cu_seqlens). terms.py computes a block.

Bytes for N steps in fp32, ppo_loss with a mask: 25 N read and 8 N written forward, 8 N read and 8 N written backward.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.loss.terms import (
    block_sums,
    column,
    gradient_addresses,
    gradient_stride,
    has,
    merge,
    num_columns,
    padding,
    sequence_weight,
    write_optional,
)


@triton.jit
def _store_sums(sums, workspace_ptr, steps, given):
    wanted = has(given, "d_logprobs").to(tl.int32) + has(given, "d_entropy").to(tl.int32)
    wanted += has(given, "d_values").to(tl.int32)
    partials_ptr = workspace_ptr + padding() + wanted * gradient_stride(steps) + tl.program_id(0)
    tl.store(partials_ptr + tl.arange(0, num_columns()) * tl.num_programs(0).to(tl.int64), sums)


@triton.jit
def _aligned(ptr, start):
    """A tensor that begins at a multiple of 16 bytes, from a step on that is a multiple of BLOCK."""
    return tl.multiple_of(ptr + start, 16), 0


@triton.jit(do_not_specialize=list(range(23)))
def loss_flat_kernel(
    logprobs_ptr,  # [steps], at a multiple of 16 bytes; so are the next ten
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
    workspace_ptr,  # scales [padding], gradients [0 to 3, steps padded], partial sums [num_columns, programs]
    low: tl.float32,
    high: tl.float32,
    dual_clip: tl.float32,  # infinite if there is none
    log_ratio_clamp: tl.float32,
    entropy_coef: tl.float32,
    kl_coef: tl.float32,
    value_coef: tl.float32,
    value_clip: tl.float32,  # infinite if there is none
    kl_estimator: tl.int32,
    given: tl.int32,  # see terms.bit
    steps: tl.int64,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK steps. Strides have their own kernel, because every argument makes a launch slower."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    policy = (
        _aligned(logprobs_ptr, start),
        _aligned(old_logprobs_ptr, start),
        _aligned(advantages_ptr, start),
        _aligned(weights_ptr, start),
        _aligned(entropy_ptr, start),
        _aligned(ref_logprobs_ptr, start),
    )
    value = (_aligned(values_ptr, start), _aligned(old_values_ptr, start), _aligned(returns_ptr, start))
    masks = (_aligned(mask_ptr, start), _aligned(value_mask_ptr, start))
    scalars = (
        (low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef, kl_estimator),
        (value_coef, value_clip),
    )
    stored_ptr = tl.multiple_of(workspace_ptr + start, 16)
    gradients = gradient_addresses(stored_ptr, lane, steps, given)
    position = (0, lane, lane < steps - start)
    if start + BLOCK <= steps:
        sums = block_sums(policy, value, masks, scalars, position, (1.0, 1.0), gradients, given, True)
    else:
        sums = block_sums(policy, value, masks, scalars, position, (1.0, 1.0), gradients, given, False)
    _store_sums(sums, workspace_ptr, steps, given)


@triton.jit
def _sequence(cu_seqlens_ptr, is_packed, steps, T):
    """Row, first step and end of the program's sequence."""
    program = tl.program_id(0).to(tl.int64)
    # Boundaries on a GPU are not checked: they are clamped, so that no address is outside of the tensors.
    start = tl.maximum(tl.load(cu_seqlens_ptr + program, mask=is_packed, other=0).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + program + 1, mask=is_packed, other=0).to(tl.int64), steps)
    return tl.where(is_packed, 0, program), start, tl.where(is_packed, end, T)


@triton.jit
def _clear(gradients_ptr, first, last, step, steps, given, BLOCK: tl.constexpr):
    """Zeros in the stored gradients of the steps from first to last, in every `step`-th block."""
    for start in range(first, last, step):
        index = start + tl.arange(0, BLOCK)
        at = gradient_addresses(gradients_ptr, index, steps, given)
        zero = tl.zeros((BLOCK,), tl.float32)
        write_optional(at[0], zero, index < last, has(given, "d_logprobs"), False)
        write_optional(at[1], zero, index < last, has(given, "d_entropy"), False)
        write_optional(at[2], zero, index < last, has(given, "d_values"), False)


@triton.jit(do_not_specialize=list(range(36)))
def loss_rows_kernel(
    logprobs_ptr,  # [rows, T]; so are the next ten, each with a row stride of its own
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
    workspace_ptr,  # as above
    low: tl.float32,
    high: tl.float32,
    dual_clip: tl.float32,
    log_ratio_clamp: tl.float32,
    entropy_coef: tl.float32,
    kl_coef: tl.float32,
    value_coef: tl.float32,
    value_clip: tl.float32,
    kl_estimator: tl.int32,
    given: tl.int32,
    steps: tl.int64,  # of all rows together
    cu_seqlens_ptr,  # [programs + 1]
    T: tl.int64,
    logprobs_stride: tl.int64,
    old_logprobs_stride: tl.int64,
    advantages_stride: tl.int64,
    weights_stride: tl.int64,
    entropy_stride: tl.int64,
    ref_logprobs_stride: tl.int64,
    values_stride: tl.int64,
    old_values_stride: tl.int64,
    returns_stride: tl.int64,
    mask_stride: tl.int64,
    value_mask_stride: tl.int64,
    SEQUENCES: tl.constexpr,  # a program takes a sequence, not a block of steps
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    policy = (
        (logprobs_ptr, logprobs_stride),
        (old_logprobs_ptr, old_logprobs_stride),
        (advantages_ptr, advantages_stride),
        (weights_ptr, weights_stride),
        (entropy_ptr, entropy_stride),
        (ref_logprobs_ptr, ref_logprobs_stride),
    )
    value = (
        (values_ptr, values_stride),
        (old_values_ptr, old_values_stride),
        (returns_ptr, returns_stride),
    )
    masks = ((mask_ptr, mask_stride), (value_mask_ptr, value_mask_stride))
    scalars = (
        (low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef, kl_estimator),
        (value_coef, value_clip),
    )
    if SEQUENCES:
        is_packed = has(given, "cu_seqlens")
        row, start, end = _sequence(cu_seqlens_ptr, is_packed, steps, T)
        policy_weight = tl.full((), 1.0, tl.float32)
        value_weight = policy_weight
        if has(given, "mean"):
            policy_weight = sequence_weight(masks[0], row, start, end, has(given, "mask"), BLOCK)
            value_weight = policy_weight
            if has(given, "value_mask"):
                value_weight = sequence_weight(masks[1], row, start, end, has(given, "value_mask"), BLOCK)
        token_weights = (policy_weight, value_weight)
        sums = tl.zeros((num_columns(),), tl.float32)
        for first in range(start, end, BLOCK):
            step = first + tl.arange(0, BLOCK)
            gradients = gradient_addresses(workspace_ptr, row * T + step, steps, given)
            position = (row, step, step < end)
            block = block_sums(policy, value, masks, scalars, position, token_weights, gradients, given, False)
            sums = merge(sums, block, tl.arange(0, num_columns()))
        if is_packed:  # steps before the first and after the last sequence: no program has them
            programs = tl.num_programs(0).to(tl.int64)
            before = tl.minimum(tl.load(cu_seqlens_ptr).to(tl.int64), steps)
            after = tl.maximum(tl.load(cu_seqlens_ptr + programs).to(tl.int64), 0)
            _clear(workspace_ptr, program * BLOCK, before, programs * BLOCK, steps, given, BLOCK)
            _clear(workspace_ptr, after + program * BLOCK, steps, programs * BLOCK, steps, given, BLOCK)
    else:
        index = program * BLOCK + tl.arange(0, BLOCK)
        gradients = gradient_addresses(workspace_ptr, index, steps, given)
        position = (index // T, index % T, index < steps)
        sums = block_sums(policy, value, masks, scalars, position, (1.0, 1.0), gradients, given, False)
    _store_sums(sums, workspace_ptr, steps, given)


@triton.jit(do_not_specialize=list(range(7)))
def token_weights_kernel(
    mask_ptr,  # [rows, T]
    cu_seqlens_ptr,  # [programs + 1]
    weights_ptr,  # [steps]
    given: tl.int32,
    steps: tl.int64,
    T: tl.int64,
    mask_stride: tl.int64,
    BLOCK: tl.constexpr,
):
    """For each step 1 / number of counted steps of its sequence; a program takes a sequence."""
    row, start, end = _sequence(cu_seqlens_ptr, has(given, "cu_seqlens"), steps, T)
    weight = sequence_weight((mask_ptr, mask_stride), row, start, end, has(given, "mask"), BLOCK)
    for first in range(start, end, BLOCK):
        step = first + tl.arange(0, BLOCK)
        tl.store(weights_ptr + row * T + step, tl.zeros((BLOCK,), tl.float32) + weight, mask=step < end)


@triton.jit
def _sum_of(sums, NAME: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, num_columns()) == column(NAME), sums, 0.0))


@triton.jit
def _store_wanted(to_ptr, wanted, i, x):
    """Store the i-th statistic if it is wanted; return the address of the next one."""
    bit = (wanted >> i) & 1
    tl.store(to_ptr, x, mask=bit != 0)
    return to_ptr + bit


@triton.jit(do_not_specialize=list(range(12)))
def loss_reduce_kernel(
    workspace_ptr,  # as above
    loss_ptr,  # []
    stats_ptr,  # the wanted statistics, in the order of ALL_STATS
    denominator_ptr,  # []
    denominator: tl.float32,
    norm_length: tl.float32,
    entropy_coef: tl.float32,
    kl_coef: tl.float32,
    value_coef: tl.float32,
    steps: tl.int64,
    programs: tl.int32,
    modes: tl.int32,  # four numbers in one argument, as each takes time to launch
    BLOCK: tl.constexpr,
):
    gradients = modes & 3  # how many are stored
    divisor = (modes >> 2) & 3  # 0 the steps, 1 the sequences, 2 `denominator`, 3 what denominator_ptr points to
    is_mean = (modes >> 4) & 1  # a step is weighted by 1 / length of its sequence
    wanted = modes >> 5  # bits of ALL_STATS
    index = tl.arange(0, num_columns())[:, None]
    partials_ptr = workspace_ptr + padding() + gradients * gradient_stride(steps)
    stride = programs.to(tl.int64)
    totals = tl.zeros((num_columns(), BLOCK), tl.float32)
    weighted = tl.zeros((num_columns(), BLOCK), tl.float32)
    sequences = tl.zeros((BLOCK,), tl.float32)
    value_sequences = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        inside = program < programs
        tile = tl.load(partials_ptr + index * stride + program[None, :], mask=inside[None, :], other=0.0)
        totals = merge(totals, tile, index)
        count = tl.load(partials_ptr + column("COUNT") * stride + program, mask=inside, other=0.0)
        value_count = tl.load(partials_ptr + column("VALUE_COUNT") * stride + program, mask=inside, other=0.0)
        sequences += (count > 0).to(tl.float32)
        value_sequences += (value_count > 0).to(tl.float32)
        if is_mean != 0:
            length = tl.where(index == column("ERROR"), value_count[None, :], count[None, :])
            weighted += tile / tl.maximum(length, 1.0)
    sums = tl.where(tl.arange(0, num_columns()) == column("RATIO_MAX"), tl.max(totals, 1), tl.sum(totals, 1))
    terms = tl.where(is_mean != 0, tl.sum(weighted, 1), sums)
    count = tl.maximum(_sum_of(sums, "COUNT"), 1.0)
    value_count = tl.maximum(_sum_of(sums, "VALUE_COUNT"), 1.0)
    from_device = tl.load(denominator_ptr, mask=divisor == 3, other=0).to(tl.float32)
    own = tl.where(divisor == 3, from_device, denominator)
    by_sequence = tl.maximum(tl.sum(sequences), 1.0), tl.maximum(tl.sum(value_sequences), 1.0)
    normaliser = tl.where(divisor == 0, count, tl.where(divisor == 1, by_sequence[0], own)) * norm_length
    value_normaliser = tl.where(divisor == 0, value_count, tl.where(divisor == 1, by_sequence[1], own)) * norm_length
    scale = tl.arange(0, padding())
    # div_rn: the mean of ratios of 1 is exactly 1, which a GPU's approximate division does not promise.
    tl.store(workspace_ptr + scale, tl.div_rn(1.0, tl.where(scale == 1, value_normaliser, normaliser)))
    policy = tl.div_rn(_sum_of(terms, "TERM"), normaliser)
    value = tl.div_rn(_sum_of(terms, "ERROR"), value_normaliser)
    companions = kl_coef * _sum_of(terms, "KL") - entropy_coef * _sum_of(terms, "ENTROPY")
    tl.store(loss_ptr, policy + tl.div_rn(companions, normaliser) + value_coef * value)
    ratio = _sum_of(sums, "RATIO")
    ratio_max = tl.where(ratio == ratio, _sum_of(sums, "RATIO_MAX"), ratio)  # maxima drop NaN, sums keep it
    to_ptr = _store_wanted(stats_ptr, wanted, 0, policy)
    to_ptr = _store_wanted(to_ptr, wanted, 1, tl.div_rn(_sum_of(sums, "APPROX_KL"), count))
    to_ptr = _store_wanted(to_ptr, wanted, 2, tl.div_rn(_sum_of(sums, "CLIPPED"), count))
    to_ptr = _store_wanted(to_ptr, wanted, 3, tl.div_rn(ratio, count))
    to_ptr = _store_wanted(to_ptr, wanted, 4, ratio_max)
    to_ptr = _store_wanted(to_ptr, wanted, 5, tl.div_rn(_sum_of(sums, "DUAL_CLIPPED"), count))
    to_ptr = _store_wanted(to_ptr, wanted, 6, tl.div_rn(_sum_of(sums, "ENTROPY"), count))
    to_ptr = _store_wanted(to_ptr, wanted, 7, tl.div_rn(_sum_of(sums, "KL"), count))
    to_ptr = _store_wanted(to_ptr, wanted, 8, value)
    _store_wanted(to_ptr, wanted, 9, tl.div_rn(_sum_of(sums, "VALUE_CLIPPED"), value_count))


@triton.jit
def _scale_gradient(stored_at, to_ptr, start, lane, scale, inside, is_wanted, WHOLE: tl.constexpr):
    at = tl.multiple_of(to_ptr + start, 16) + lane
    if WHOLE:
        x = tl.load(stored_at, mask=is_wanted, other=0.0)
    else:
        x = tl.load(stored_at, mask=inside & is_wanted, other=0.0)
    write_optional(at, x * scale, inside, is_wanted, WHOLE)


@triton.jit(do_not_specialize=list(range(7)))
def loss_bwd_kernel(
    workspace_ptr,  # as above
    grad_loss_ptr,  # []
    d_logprobs_ptr,  # [steps]; so are the next two
    d_entropy_ptr,
    d_values_ptr,
    given: tl.int32,
    steps: tl.int64,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < steps - start
    stored = gradient_addresses(tl.multiple_of(workspace_ptr + start, 16), lane, steps, given)
    upstream = tl.load(grad_loss_ptr)
    scale = upstream * tl.load(workspace_ptr)
    value_scale = upstream * tl.load(workspace_ptr + 1)
    logprobs, entropy, values = has(given, "d_logprobs"), has(given, "d_entropy"), has(given, "d_values")
    if start + BLOCK <= steps:
        _scale_gradient(stored[0], d_logprobs_ptr, start, lane, scale, inside, logprobs, True)
        _scale_gradient(stored[1], d_entropy_ptr, start, lane, scale, inside, entropy, True)
        _scale_gradient(stored[2], d_values_ptr, start, lane, value_scale, inside, values, True)
    else:
        _scale_gradient(stored[0], d_logprobs_ptr, start, lane, scale, inside, logprobs, False)
        _scale_gradient(stored[1], d_entropy_ptr, start, lane, scale, inside, entropy, False)
        _scale_gradient(stored[2], d_values_ptr, start, lane, value_scale, inside, values, False)
