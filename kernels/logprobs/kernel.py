"""reference.token_logprobs for rows of logits, forward and backward.

Forward: a program owns a few rows and reads them in blocks of columns with an online softmax (online_softmax.py); at
the end logp and H follow from m, s and w. Saved for the backward, per row: logsumexp as the pair m, log2 s, so that
logits of 1e4 keep their digits, H and logp. Backward: a program owns a row, or a few short ones, and a block of
columns.

Bytes: forward reads the logits once; backward reads them once and writes the gradient once. A masked row is not read.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.common.online_softmax import (
    add_block,
    column_offset,
    finish_rows,
    load_mask,
    logit_gradient,
    row_offset,
    start_rows,
    target_gradient,
    token_logprob,
)


@triton.jit(do_not_specialize=list(range(20)))
def token_logprobs_fwd_kernel(
    logits_ptr,  # (B, T, V), N = B T
    tokens_ptr,  # (B, T) int64
    mask_ptr,  # (B, T) bool; any address if not has_mask
    logprobs_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32; any address if not has_entropy
    statistics_ptr,  # (4, N) fp32: m, log2 s, H, logp
    has_mask: tl.int32,
    has_entropy: tl.int32,
    scale: tl.float32,  # log2(e) / temperature
    inverse_temperature: tl.float32,
    N: tl.int32,
    T: tl.int32,
    V: tl.int32,
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    logits_stride_v: tl.int64,
    tokens_stride_b: tl.int64,
    tokens_stride_t: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    UNIT: tl.constexpr,  # the layout, see _Layout
    ALIGN: tl.constexpr,
    V_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    V = V // V_MULTIPLE * V_MULTIPLE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = load_mask(mask_ptr, row, N, T, mask_stride_b, mask_stride_t, has_mask)
    row_ptr = tl.multiple_of(logits_ptr + row_offset(row, T, logits_stride_b, logits_stride_t), ALIGN)
    token = tl.load(tokens_ptr + row_offset(row, T, tokens_stride_b, tokens_stride_t), mask=mask, other=0)
    in_vocabulary = mask & (token >= 0) & (token < V)
    at_token = tl.load(row_ptr + token * logits_stride_v, mask=in_vocabulary, other=float("nan")).to(tl.float32)

    columns = tl.arange(0, BLOCK)[None, :]
    row_max, sums, weighted_sum = start_rows(ROWS, LANES)
    whole_blocks = tl.where(tl.max(mask.to(tl.int32), axis=0) > 0, V // BLOCK, 0)
    for block in range(0, whole_blocks):
        column_ptr = row_ptr[:, None] + column_offset(block * BLOCK + columns, logits_stride_v, UNIT)
        if ROWS == 1:
            x = tl.load(column_ptr).to(tl.float32)
        else:
            x = tl.load(column_ptr, mask=mask[:, None], other=float("-inf")).to(tl.float32)
        row_max, sums, weighted_sum = add_block(row_max, sums, weighted_sum, x, scale, ROWS, BLOCK, LANES, WITH_ENTROPY)
    if V % BLOCK > 0:
        tail = V // BLOCK * BLOCK + columns
        column_ptr = row_ptr[:, None] + column_offset(tail, logits_stride_v, UNIT)
        x = tl.load(column_ptr, mask=mask[:, None] & (tail < V), other=float("-inf")).to(tl.float32)
        row_max, sums, weighted_sum = add_block(row_max, sums, weighted_sum, x, scale, ROWS, BLOCK, LANES, WITH_ENTROPY)

    log_sum, entropy = finish_rows(sums, weighted_sum, ROWS, LANES)
    logprobs = token_logprob(at_token, row_max, log_sum, inverse_temperature)
    tl.store(logprobs_ptr + row, tl.where(mask, logprobs, 0.0), mask=row < N)
    tl.store(entropy_ptr + row, tl.where(mask, entropy, 0.0), mask=(row < N) & (has_entropy != 0))
    row = row.to(tl.int64)
    tl.store(statistics_ptr + row, row_max, mask=mask)
    tl.store(statistics_ptr + row + N, log_sum, mask=mask)
    tl.store(statistics_ptr + row + tl.cast(N, tl.int64) * 2, entropy, mask=mask)
    tl.store(statistics_ptr + row + tl.cast(N, tl.int64) * 3, logprobs, mask=mask)


@triton.jit(do_not_specialize=list(range(25)))
def token_logprobs_bwd_kernel(
    grad_logprobs_ptr,  # (N,) fp32; any address if not has_grad_logprobs
    grad_entropy_ptr,  # (N,) fp32; any address if not has_grad_entropy
    logits_ptr,  # (B, T, V), N = B T
    grad_ptr,  # (B, T, V); may be logits_ptr
    tokens_ptr,  # (B, T) int64
    mask_ptr,  # (B, T) bool; any address if not has_mask
    statistics_ptr,  # (4, N) fp32: m, log2 s, H, logp
    has_grad_logprobs: tl.int32,
    has_grad_entropy: tl.int32,
    has_mask: tl.int32,
    scale: tl.float32,  # log2(e) / temperature
    inverse_temperature: tl.float32,
    N: tl.int32,
    T: tl.int32,
    V: tl.int32,
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    logits_stride_v: tl.int64,
    grad_stride_b: tl.int64,
    grad_stride_t: tl.int64,
    grad_stride_v: tl.int64,
    tokens_stride_b: tl.int64,
    tokens_stride_t: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    UNIT: tl.constexpr,  # the layout, see _Layout
    ALIGN: tl.constexpr,
    V_MULTIPLE: tl.constexpr,
    PEEL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    V = V // V_MULTIPLE * V_MULTIPLE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = load_mask(mask_ptr, row, N, T, mask_stride_b, mask_stride_t, has_mask)
    token = tl.load(tokens_ptr + row_offset(row, T, tokens_stride_b, tokens_stride_t), mask=mask, other=0)
    g = tl.load(grad_logprobs_ptr + row, mask=mask & (has_grad_logprobs != 0), other=0.0) * inverse_temperature
    h = tl.load(grad_entropy_ptr + row, mask=mask & (has_grad_entropy != 0), other=0.0) * inverse_temperature
    out_of_vocabulary = (token < 0) | (token >= V)
    g = tl.where(out_of_vocabulary & (has_grad_logprobs != 0), float("nan"), g)
    statistic = statistics_ptr + row.to(tl.int64)
    row_max = tl.load(statistic, mask=mask, other=0.0)
    log_sum = tl.load(statistic + N, mask=mask, other=0.0)
    entropy = tl.load(statistic + tl.cast(N, tl.int64) * 2, mask=mask, other=0.0)
    logprobs = tl.load(statistic + tl.cast(N, tl.int64) * 3, mask=mask, other=0.0)
    at_token = target_gradient(g, h, logprobs, entropy)

    start = tl.program_id(1) * BLOCK
    lane = start + tl.arange(0, BLOCK)[None, :]
    logits_offset = row_offset(row, T, logits_stride_b, logits_stride_t)
    grad_offset = row_offset(row, T, grad_stride_b, grad_stride_t)
    column = lane
    if PEEL > 1:
        gap = logits_offset % PEEL  # the same for both: the launcher checks it
        logits_offset -= gap
        grad_offset -= gap
        column = lane - gap.to(tl.int32)[:, None]
    x_ptr = tl.multiple_of(logits_ptr + logits_offset, ALIGN)[:, None] + column_offset(lane, logits_stride_v, UNIT)
    d_ptr = tl.multiple_of(grad_ptr + grad_offset, ALIGN)[:, None] + column_offset(lane, grad_stride_v, UNIT)
    is_token = column == tl.where(out_of_vocabulary, -1, token).to(tl.int32)[:, None]  # int32: half the comparison
    if ROWS == 1 and (start >= PEEL - 1 and start + BLOCK <= V):
        x = tl.load(x_ptr, mask=mask[:, None], other=0.0).to(tl.float32)
        d = logit_gradient(x, is_token, at_token, g, h, row_max, log_sum, entropy, scale, WITH_ENTROPY)
        tl.store(d_ptr, d.to(grad_ptr.dtype.element_ty))
    else:
        inside = (column >= 0) & (column < V) & (row < N)[:, None]
        x = tl.load(x_ptr, mask=inside & mask[:, None], other=0.0).to(tl.float32)
        d = logit_gradient(x, is_token, at_token, g, h, row_max, log_sum, entropy, scale, WITH_ENTROPY)
        tl.store(d_ptr, d.to(grad_ptr.dtype.element_ty), mask=inside)
