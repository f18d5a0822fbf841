"""The kernels of loss.py: forward by blocks of steps or by sequences, reduction, backward.

loss_terms.py computes a block. Every forward program leaves one column of partial sums, which the reduction adds in a
fixed order.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.loss_terms import (
    APPROX_KL,
    CLIPPED,
    COLUMNS,
    COUNT,
    DUAL_CLIPPED,
    ENTROPY,
    ERROR,
    KL,
    PAD,
    RATIO,
    RATIO_MAX,
    TERM,
    VALUE_CLIPPED,
    VALUE_COUNT,
    block_sums,
    gradient_places,
    merge,
    sequence_share,
)

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
def _store_sums(sums, workspace_ptr, steps, wanted):
    gradients = (wanted[0] + wanted[1] + wanted[2]) * tl.cdiv(steps, PAD).to(tl.int64) * PAD
    partials_ptr = workspace_ptr + PAD + gradients + tl.program_id(0)
    tl.store(partials_ptr + tl.arange(0, COLUMNS) * tl.num_programs(0).to(tl.int64), sums)


@triton.jit(do_not_specialize=["steps"])
def _loss_flat_kernel(
    logprobs_ptr,  # [steps]; so are the next ten
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
    workspace_ptr,  # scales [PAD], gradients [0 to 3, steps up to a multiple of PAD], partial sums [COLUMNS, programs]
    low,
    high,
    dual_clip,
    log_ratio_clamp,
    entropy_coef,
    kl_coef,
    value_coef,
    value_clip,
    steps,
    KL_ESTIMATOR: tl.constexpr,
    D_LOGPROBS: tl.constexpr,  # which gradients to store
    D_ENTROPY: tl.constexpr,
    D_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK steps. Strides have a kernel of their own, since every argument makes a launch slower."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    policy = (
        (logprobs_ptr, None, None),
        (old_logprobs_ptr, None, None),
        (advantages_ptr, None, None),
        (weights_ptr, None, None),
        (entropy_ptr, None, None),
        (ref_logprobs_ptr, None, None),
    )
    value = ((values_ptr, None, None), (old_values_ptr, None, None), (returns_ptr, None, None))
    masks = ((mask_ptr, None, None), (value_mask_ptr, None, None))
    scalars = ((low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef), (value_coef, value_clip))
    wanted = (D_LOGPROBS, D_ENTROPY, D_VALUES)
    at = gradient_places(workspace_ptr + start, lane, steps, wanted)
    place = (start, lane, lane < steps - start)
    if start + BLOCK <= steps:
        sums = block_sums(policy, value, masks, scalars, place, (1.0, 1.0), at, wanted, KL_ESTIMATOR, True)
    else:
        sums = block_sums(policy, value, masks, scalars, place, (1.0, 1.0), at, wanted, KL_ESTIMATOR, False)
    _store_sums(sums, workspace_ptr, steps, wanted)


@triton.jit(do_not_specialize=_INTEGERS)
def _loss_strided_kernel(
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
    workspace_ptr,  # as above
    low,
    high,
    dual_clip,
    log_ratio_clamp,
    entropy_coef,
    kl_coef,
    value_coef,
    value_clip,
    steps,  # of all rows together
    cu_seqlens_ptr,  # [S + 1], or None
    T,
    logprobs_row,  # strides; all None with cu_seqlens, and each step None where it is 1
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
            policy_share = sequence_share(masks[0], row, start, end, BLOCK)
            value_share = policy_share
            if value_mask_ptr is not None:
                value_share = sequence_share(masks[1], row, start, end, BLOCK)
            shares = (policy_share, value_share)
        sums = tl.zeros((COLUMNS,), tl.float32)
        for first in range(start, end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            at = gradient_places(workspace_ptr, row * T + column, steps, wanted)
            place = (row, column, column < end)
            block = block_sums(policy, value, masks, scalars, place, shares, at, wanted, KL_ESTIMATOR, False)
            sums = merge(sums, block, tl.arange(0, COLUMNS))
    else:
        index = program * BLOCK + tl.arange(0, BLOCK)
        at = gradient_places(workspace_ptr, index, steps, wanted)
        place = (index // T, index % T, index < steps)
        sums = block_sums(policy, value, masks, scalars, place, (1.0, 1.0), at, wanted, KL_ESTIMATOR, False)
    _store_sums(sums, workspace_ptr, steps, wanted)


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
        totals = merge(totals, tile, column)
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
    scale = tl.arange(0, PAD)
    tl.store(workspace_ptr + scale, 1.0 / tl.where(scale == 1, value_normaliser, normaliser))
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
    stored = gradient_places(workspace_ptr, index, steps, wanted)
    upstream = tl.load(grad_loss_ptr).to(tl.float32)
    scale = upstream * tl.load(workspace_ptr)
    scales = (scale, scale, upstream * tl.load(workspace_ptr + 1))
    if (program + 1) * BLOCK <= steps:
        _scale_all(stored, out, scales, index, index < steps, True)
    else:
        _scale_all(stored, out, scales, index, index < steps, False)
