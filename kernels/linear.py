"""linear_logprobs and linear_ppo_loss in Triton: what happens to a chunk of logits between the matrix products.

One program owns a row of the chunk. For reference.linear_ppo_loss it walks the row twice: an online softmax
(softmax_rows.py) gives logp and entropy, the scalar loss (loss_kernels.py) their gradients g and h, and the second walk
writes d loss / d logits in the dtype of the products' operands. reference.linear_logprobs walks once for its values,
and once more in its backward, over logits made again.

Chunk buffers pad their rows to 128 bytes, so every load and store here is 16 bytes a thread, the last block's too.
Bytes for a row: policy 2 V reads of logits and V writes of dlogits; score V reads; gradient V reads and V writes.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels import loss
from ppo_fast.kernels.launch import Variant
from ppo_fast.kernels.linear_chunks import LINE, Head
from ppo_fast.kernels.linear_op import public_functions
from ppo_fast.kernels.linear_steps import RowMath
from ppo_fast.kernels.loss_kernels import _kl, _surrogate
from ppo_fast.kernels.loss_op import LossOptions, LossTensors
from ppo_fast.kernels.softmax_rows import (
    LN_2,
    add_block,
    expm1,
    finish_rows,
    logit_gradient,
    start_rows,
    target_gradient,
)

_KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
# No argument is specialised on its value or alignment: what the code may assume is said by the constexprs alone.
_SCORE_ARGUMENTS, _POLICY_ARGUMENTS, _GRADIENT_ARGUMENTS = list(range(13)), list(range(28)), list(range(18))


@triton.jit
def _tanh(x):
    """Without cancellation near 0."""
    y = expm1(-2.0 * tl.abs(x))
    t = -y / (2.0 + y)
    return tl.where(x < 0, -t, t)


@triton.jit
def _transform(
    x,  # (1, BLOCK) fp32: h W^T
    column,  # (1, BLOCK)
    exists,  # (1, BLOCK) or 1
    bias_ptr,  # (V,) fp32; any address if not has_bias
    has_bias,
    logit_scale,
    softcap,  # 0 if there is none
):
    """z temperature, and its derivative by x over logit_scale."""
    x = (x + tl.load(bias_ptr + column, mask=exists & (has_bias != 0), other=0.0)) * logit_scale
    t = _tanh(x / tl.where(softcap > 0, softcap, 1.0))
    bent = tl.where(x == float("-inf"), x, softcap * t)
    return tl.where(softcap > 0, bent, x), tl.where(softcap > 0, 1.0 - t * t, 1.0)


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
    column = first + tl.arange(0, BLOCK)[None, :]
    slope = 1.0
    if WHOLE:
        x = tl.load(row_ptr + column).to(tl.float32)
        if TRANSFORMED:
            x, slope = _transform(x, column, 1, head[0], head[1], head[2], head[3])
    else:
        exists = column < V
        x = tl.load(row_ptr + column, mask=column < tl.cdiv(V, PAD) * PAD, other=0.0).to(tl.float32)
        if TRANSFORMED:
            x, slope = _transform(x, column, exists, head[0], head[1], head[2], head[3])
        x = tl.where(exists, x, float("-inf"))
    return x, slope, column


@triton.jit
def _measure(
    row_ptr,  # (V,) logits
    token,  # int64
    V,
    head,  # (bias_ptr, has_bias, logit_scale, softcap)
    scale,  # log2(e) / temperature, times logit_scale unless TRANSFORMED
    TRANSFORMED: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """(1,) each: max z temperature, log2 s, H, logp."""
    row_max, sums, moments = start_rows(1, LANES)
    for block in range(0, V // BLOCK):
        x, _, _ = _load(row_ptr, block * BLOCK, V, head, TRANSFORMED, PAD, BLOCK, True)
        row_max, sums, moments = add_block(row_max, sums, moments, x, scale, 1, BLOCK, LANES)
    if V % BLOCK > 0:
        x, _, _ = _load(row_ptr, V // BLOCK * BLOCK, V, head, TRANSFORMED, PAD, BLOCK, False)
        row_max, sums, moments = add_block(row_max, sums, moments, x, scale, 1, BLOCK, LANES)
    log_sum, entropy = finish_rows(sums, moments, 1, LANES)
    at = token + tl.zeros((1,), tl.int64)
    exists = (at >= 0) & (at < V)
    at_token = tl.load(row_ptr + at, mask=exists, other=float("nan")).to(tl.float32)
    if TRANSFORMED:
        at_token, _ = _transform(at_token, at, exists, head[0], head[1], head[2], head[3])
    return row_max, log_sum, entropy, ((at_token - row_max) * scale - log_sum) * LN_2


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
    statistics,  # (row_max, log_sum, entropy), (1,) each
    TRANSFORMED: tl.constexpr,
    PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    x, slope, column = _load(row_ptr, first, V, head, TRANSFORMED, PAD, BLOCK, WHOLE)
    at_token, g, h = gradients
    row_max, log_sum, entropy = statistics
    d = logit_gradient(x, column == token, at_token, g, h, row_max, log_sum, entropy, scale)
    if TRANSFORMED:
        d = d * slope
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
    slopes,  # (g, h): d loss / d logp and H, (1,) each
    statistics,  # (row_max, log_sum, entropy, logp), (1,) each
    TRANSFORMED: tl.constexpr,
    PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d (h W^T) of the row."""
    row_max, log_sum, entropy, logp = statistics
    g = tl.where(logp != logp, logp, slopes[0]) * factor
    h = slopes[1] * factor
    gradients = (target_gradient(g, h, logp, entropy), g, h)
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
def _put(statistics_ptr, stride, row_max, log_sum, entropy, logp):
    at = statistics_ptr + tl.program_id(0) + tl.zeros((1,), tl.int64)
    tl.store(at, row_max)
    tl.store(at + stride, log_sum)
    tl.store(at + stride * 2, entropy)
    tl.store(at + stride * 3, logp)


@triton.jit
def _get(ptr, given, default):
    """(1,) the row's number in a per-token tensor, or the default where none is given."""
    at = ptr + tl.program_id(0) + tl.zeros((1,), tl.int64)
    return tl.where(given != 0, tl.load(at, mask=given != 0, other=0.0).to(tl.float32), default)


@triton.jit(do_not_specialize=_SCORE_ARGUMENTS)
def _linear_score_kernel(
    logits_ptr,  # (rows, V)
    tokens_ptr,  # (rows,) int64
    bias_ptr,  # (V,) fp32; any address if not has_bias
    statistics_ptr,  # (4, rows) fp32: max z temperature, log2 s, H, logp
    has_bias: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,  # 0 if there is none
    scale: tl.float32,  # log2(e) / temperature, times logit_scale unless TRANSFORMED
    V: tl.int32,
    logits_stride: tl.int64,
    statistics_stride: tl.int64,
    TRANSFORMED: tl.constexpr,  # there is a bias, a softcap or a scale that is not positive
    PAD: tl.constexpr,  # rows of logits are padded to a multiple of it
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    token = tl.load(tokens_ptr + tl.program_id(0))
    head = (bias_ptr, has_bias, logit_scale, softcap)
    row_ptr = _row(logits_ptr, logits_stride)
    row_max, log_sum, entropy, logp = _measure(row_ptr, token, V, head, scale, TRANSFORMED, PAD, BLOCK, LANES)
    _put(statistics_ptr, statistics_stride, row_max, log_sum, entropy, logp)
