"""What is computed from a chunk of logits between the matrix products of linear_logprobs and linear_ppo_loss.

A program owns a row of the chunk. linear_policy_kernel (reference.linear_ppo_loss) reads the row twice: an online
softmax (online_softmax.py) gives logp and entropy, the scalar loss (loss/terms.py) their gradients g and h, and the
second loop writes d loss / d logits in the dtype of the products' operands. reference.linear_logprobs has one loop for
its values (linear_score_kernel), and another in its backward, over logits that are computed again
(linear_gradient_kernel).

Chunk buffers pad their rows to 128 bytes, so every load and store is 16 bytes a thread, also in the last block. Bytes
for a row: policy 2 V reads of logits and V writes of dlogits; score V reads; gradient V reads and V writes.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.common.online_softmax import (
    add_block,
    expm1,
    finish_rows,
    logit_gradient,
    start_rows,
    target_gradient,
    token_logprob,
)
from ppo_fast.kernels.loss.terms import kl_and_gradient, surrogate


@triton.jit
def _tanh(x):
    """Without cancellation near 0."""
    y = expm1(-2.0 * tl.abs(x))
    t = -y / (2.0 + y)
    return tl.where(x < 0, -t, t)


@triton.jit
def _transform(
    x,  # (1, BLOCK) fp32: h W^T
    bias,  # (1, BLOCK)
    head,  # (bias_ptr, has_bias, logit_scale, softcap)
):
    """z temperature, and its derivative by x over logit_scale."""
    logit_scale, softcap = head[2], head[3]
    x = (x + bias) * logit_scale
    t = _tanh(x / tl.where(softcap > 0, softcap, 1.0))
    bent = tl.where(x == float("-inf"), x, softcap * t)
    return tl.where(softcap > 0, bent, x), tl.where(softcap > 0, tl.fma(-t, t, 1.0), 1.0)


@triton.jit
def _load(
    row_ptr,  # (V,) logits of the row; it starts at a multiple of 128 bytes and is padded to another
    first,  # column of the block
    V,
    head,  # (bias_ptr, has_bias, logit_scale, softcap)
    TRANSFORMED: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(1, BLOCK) logits z temperature, -inf where the row has ended, their derivative, and their columns."""
    lane = tl.arange(0, BLOCK)[None, :]
    column = first + lane
    derivative = 1.0
    bias_ptr = tl.multiple_of(head[0] + first, 16)
    has_bias = head[1] != 0
    if WHOLE:
        x = tl.load(row_ptr + column).to(tl.float32)
        if TRANSFORMED:
            x, derivative = _transform(x, tl.load(bias_ptr + lane, mask=has_bias, other=0.0), head)
    else:
        x = tl.load(row_ptr + column, mask=column < tl.cdiv(V, PAD) * PAD, other=0.0).to(tl.float32)
        if TRANSFORMED:
            inside = column < tl.cdiv(V, 32) * 32  # the bias is padded to 128 bytes, as the logits are
            x, derivative = _transform(x, tl.load(bias_ptr + lane, mask=inside & has_bias, other=0.0), head)
        x = tl.where(column < V, x, float("-inf"))
    return x, derivative, column


@triton.jit
def _row_statistics(
    row_ptr,  # (V,) logits
    token,  # int64
    V,
    head,  # (bias_ptr, has_bias, logit_scale, softcap)
    z_scale,  # 1 / temperature, times logit_scale unless TRANSFORMED
    scale,  # log2(e) z_scale
    TRANSFORMED: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """(1,) each: m, log2 s, H, logp."""
    row_max, sums, weighted_sum = start_rows(1, LANES)
    for block in range(0, V // BLOCK):
        x, _, _ = _load(row_ptr, block * BLOCK, V, head, TRANSFORMED, PAD, BLOCK, True)
        row_max, sums, weighted_sum = add_block(row_max, sums, weighted_sum, x, scale, 1, BLOCK, LANES, WITH_ENTROPY)
    if V % BLOCK > 0:
        x, _, _ = _load(row_ptr, V // BLOCK * BLOCK, V, head, TRANSFORMED, PAD, BLOCK, False)
        row_max, sums, weighted_sum = add_block(row_max, sums, weighted_sum, x, scale, 1, BLOCK, LANES, WITH_ENTROPY)
    log_sum, entropy = finish_rows(sums, weighted_sum, 1, LANES)
    at = token + tl.zeros((1,), tl.int64)
    exists = (at >= 0) & (at < V)
    at_token = tl.load(row_ptr + at, mask=exists, other=float("nan")).to(tl.float32)
    if TRANSFORMED:
        at_token, _ = _transform(at_token, tl.load(head[0] + at, mask=exists & (head[1] != 0), other=0.0), head)
    return row_max, log_sum, entropy, token_logprob(at_token, row_max, log_sum, z_scale)


@triton.jit
def _write_block(
    d_ptr,  # (V,) padded like the logits
    row_ptr,
    first,
    V,
    token,
    head,
    scale,
    gradients,  # (at_token, g, h), (1,) each
    statistics,  # (m, log2 s, H), (1,) each
    TRANSFORMED: tl.constexpr,
    PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    x, derivative, column = _load(row_ptr, first, V, head, TRANSFORMED, PAD, BLOCK, WHOLE)
    at_token, g, h = gradients
    row_max, log_sum, entropy = statistics
    d = logit_gradient(x, column == token, at_token, g, h, row_max, log_sum, entropy, scale, True)
    if TRANSFORMED:
        d = d * derivative
    d = d.to(d_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(d_ptr + column, d)
    else:
        tl.store(d_ptr + column, d, mask=column < tl.cdiv(V, D_PAD) * D_PAD)


@triton.jit
def _write(
    d_ptr,
    row_ptr,
    V,
    token,
    head,
    scale,
    factor,
    upstream,  # (g, h): d loss / d logp and H, (1,) each
    statistics,  # (m, log2 s, H, logp), (1,) each
    TRANSFORMED: tl.constexpr,
    PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d (h W^T) of the row."""
    row_max, log_sum, entropy, logp = statistics
    g = tl.where(logp != logp, logp, upstream[0]) * factor
    h = upstream[1] * factor
    gradients = (target_gradient(g, h, logp, entropy), g, h)
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)  # int32: half the comparison
    known = (row_max, log_sum, entropy)
    for block in range(0, V // BLOCK):
        first = block * BLOCK
        _write_block(
            d_ptr, row_ptr, first, V, token, head, scale, gradients, known, TRANSFORMED, PAD, D_PAD, BLOCK, True
        )
    if V % BLOCK > 0:
        first = V // BLOCK * BLOCK
        _write_block(
            d_ptr, row_ptr, first, V, token, head, scale, gradients, known, TRANSFORMED, PAD, D_PAD, BLOCK, False
        )


@triton.jit
def _row(ptr, stride):
    """The program's row of a chunk buffer; rows start at multiples of 128 bytes."""
    return tl.multiple_of(ptr + tl.program_id(0).to(tl.int64) * stride, 16)


@triton.jit
def _row_and_index(indices_ptr, has_indices, first):
    """The program's place among the counted rows, and its token."""
    row = first + tl.program_id(0)
    token = tl.load(indices_ptr + row, mask=has_indices != 0, other=0)
    return row, tl.where(has_indices != 0, token, row)


@triton.jit
def _get(ptr, index, given, default):
    """(1,) a number of a per-token tensor, or the default where none is given."""
    at = ptr + index + tl.zeros((1,), tl.int64)
    return tl.where(given != 0, tl.load(at, mask=given != 0, other=0.0), default)


@triton.jit
def _put(ptr, index, x, wanted):
    tl.store(ptr + index + tl.zeros((1,), tl.int64), x, mask=wanted != 0)


@triton.jit(do_not_specialize=list(range(19)))
def linear_score_kernel(
    logits_ptr,  # (rows, V)
    tokens_ptr,  # (N,) int64
    indices_ptr,  # (n,) int64: the counted tokens; any address if not has_indices, which means all
    bias_ptr,  # (V,) fp32 at a multiple of 16 bytes, padded to 128; any address if not has_bias
    logprobs_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32; any address if not has_entropy
    statistics_ptr,  # (4, n) fp32: m, log2 s, H, logp, see online_softmax.py; any address if not has_statistics
    has_indices: tl.int32,
    has_bias: tl.int32,
    has_entropy: tl.int32,
    has_statistics: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,  # 0 if there is none
    z_scale: tl.float32,  # 1 / temperature, times logit_scale unless TRANSFORMED
    scale: tl.float32,  # log2(e) z_scale
    first: tl.int64,  # the place of the first row among the counted ones
    n: tl.int64,
    V: tl.int32,
    logits_stride: tl.int64,
    TRANSFORMED: tl.constexpr,  # there is a bias or a softcap
    PAD: tl.constexpr,  # rows of logits are padded to a multiple of it
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    row, index = _row_and_index(indices_ptr, has_indices, first)
    token = tl.load(tokens_ptr + index)
    head = (bias_ptr, has_bias, logit_scale, softcap)
    row_ptr = _row(logits_ptr, logits_stride)
    row_max, log_sum, entropy, logp = _row_statistics(
        row_ptr, token, V, head, z_scale, scale, TRANSFORMED, PAD, BLOCK, LANES, WITH_ENTROPY
    )
    _put(logprobs_ptr, index, logp, 1)
    _put(entropy_ptr, index, entropy, has_entropy)
    _put(statistics_ptr, row, row_max, has_statistics)
    _put(statistics_ptr, row + n, log_sum, has_statistics)
    _put(statistics_ptr, row + n * 2, entropy, has_statistics)
    _put(statistics_ptr, row + n * 3, logp, has_statistics)


@triton.jit(do_not_specialize=list(range(34)))
def linear_policy_kernel(
    logits_ptr,  # (rows, V)
    dlogits_ptr,  # (rows, V)
    tokens_ptr,  # (N,) int64
    indices_ptr,  # (n,) int64: the counted tokens; any address if not has_indices, which means all
    bias_ptr,  # (V,) fp32 at a multiple of 16 bytes, padded to 128; any address if not has_bias
    old_ptr,  # (N,) fp32; this and the next four: any address if there is none
    advantages_ptr,  # (N,) fp32, always there
    weights_ptr,  # (N,) fp32
    ref_ptr,  # (N,) fp32
    token_weight_ptr,  # (N,) fp32
    logprobs_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32
    has_indices: tl.int32,
    has_bias: tl.int32,
    has_old: tl.int32,
    has_weights: tl.int32,
    has_ref: tl.int32,
    has_token_weight: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,  # 0 if there is none
    z_scale: tl.float32,  # 1 / temperature, times logit_scale unless TRANSFORMED
    scale: tl.float32,  # log2(e) z_scale
    factor: tl.float32,  # logit_scale / temperature
    low: tl.float32,  # the ratio is clipped to [low, high]
    high: tl.float32,
    dual_clip: tl.float32,  # infinite if there is none
    log_ratio_clamp: tl.float32,
    entropy_coef: tl.float32,
    kl_coef: tl.float32,
    kl_estimator: tl.int32,
    first: tl.int64,  # the place of the first row among the counted ones
    V: tl.int32,
    logits_stride: tl.int64,
    dlogits_stride: tl.int64,
    TRANSFORMED: tl.constexpr,  # there is a bias or a softcap
    PAD: tl.constexpr,  # rows of logits are padded to a multiple of it
    D_PAD: tl.constexpr,  # rows of dlogits
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    _, index = _row_and_index(indices_ptr, has_indices, first)
    token = tl.load(tokens_ptr + index)
    head = (bias_ptr, has_bias, logit_scale, softcap)
    row_ptr = _row(logits_ptr, logits_stride)
    row_max, log_sum, entropy, logp = _row_statistics(
        row_ptr, token, V, head, z_scale, scale, TRANSFORMED, PAD, BLOCK, LANES, True
    )
    _put(logprobs_ptr, index, logp, 1)
    _put(entropy_ptr, index, entropy, 1)
    old = _get(old_ptr, index, has_old, logp)
    advantage = _get(advantages_ptr, index, 1, 0.0)
    _, grad_logprob, _, _, _, _ = surrogate(logp, old, advantage, low, high, dual_clip, log_ratio_clamp)
    _, kl_gradient = kl_and_gradient(logp - _get(ref_ptr, index, has_ref, logp), log_ratio_clamp, kl_estimator)
    g = grad_logprob * _get(weights_ptr, index, has_weights, 1.0) + kl_coef * kl_gradient
    token_weight = _get(token_weight_ptr, index, has_token_weight, 1.0)
    upstream = (g * token_weight, -entropy_coef * token_weight)
    statistics = (row_max, log_sum, entropy, logp)
    d_ptr = _row(dlogits_ptr, dlogits_stride)
    _write(d_ptr, row_ptr, V, token, head, scale, factor, upstream, statistics, TRANSFORMED, PAD, D_PAD, BLOCK)


@triton.jit(do_not_specialize=list(range(21)))
def linear_gradient_kernel(
    logits_ptr,  # (rows, V)
    dlogits_ptr,  # (rows, V)
    tokens_ptr,  # (N,) int64
    indices_ptr,  # (n,) int64: the counted tokens; any address if not has_indices, which means all
    bias_ptr,  # (V,) fp32 at a multiple of 16 bytes, padded to 128; any address if not has_bias
    g_ptr,  # (N,) fp32: d loss / d logp; any address if not has_g
    h_ptr,  # (N,) fp32: d loss / d H; any address if not has_h
    statistics_ptr,  # (4, n) fp32: m, log2 s, H, logp, see online_softmax.py
    has_indices: tl.int32,
    has_bias: tl.int32,
    has_g: tl.int32,
    has_h: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,  # 0 if there is none
    scale: tl.float32,  # log2(e) / temperature, times logit_scale unless TRANSFORMED
    factor: tl.float32,  # logit_scale / temperature
    first: tl.int64,  # the place of the first row among the counted ones
    n: tl.int64,
    V: tl.int32,
    logits_stride: tl.int64,
    dlogits_stride: tl.int64,
    TRANSFORMED: tl.constexpr,  # there is a bias or a softcap
    PAD: tl.constexpr,  # rows of logits are padded to a multiple of it
    D_PAD: tl.constexpr,  # rows of dlogits
    BLOCK: tl.constexpr,
):
    row, index = _row_and_index(indices_ptr, has_indices, first)
    token = tl.load(tokens_ptr + index)
    head = (bias_ptr, has_bias, logit_scale, softcap)
    row_max = _get(statistics_ptr, row, 1, 0.0)
    log_sum = _get(statistics_ptr, row + n, 1, 0.0)
    entropy = _get(statistics_ptr, row + n * 2, has_h, 0.0)
    logp = _get(statistics_ptr, row + n * 3, 1, 0.0)
    upstream = (_get(g_ptr, index, has_g, 0.0), _get(h_ptr, index, has_h, 0.0))
    statistics = (row_max, log_sum, entropy, logp)
    row_ptr, d_ptr = _row(logits_ptr, logits_stride), _row(dlogits_ptr, dlogits_stride)
    _write(d_ptr, row_ptr, V, token, head, scale, factor, upstream, statistics, TRANSFORMED, PAD, D_PAD, BLOCK)
