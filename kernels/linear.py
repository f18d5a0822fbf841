"""linear_logprobs and linear_ppo_loss in Triton: what happens to a chunk of logits between the matrix products.

One program owns a row of the chunk. For reference.linear_ppo_loss it reads the row twice: an online softmax
(softmax_rows.py) gives logp and entropy, the scalar loss (loss_terms.py) their gradients g and h, and the second loop
writes d loss / d logits in the dtype of the products' operands. reference.linear_logprobs has one loop for its values,
and another in its backward, over logits that are computed again.

Chunk buffers pad their rows to 128 bytes, so every load and store here is 16 bytes a thread, the last block's too.
Bytes for a row: policy 2 V reads of logits and V writes of dlogits; score V reads; gradient V reads and V writes.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels import loss, loss_launch
from ppo_fast.kernels.launch import REGISTERS, Variant, device_guard, launch_options
from ppo_fast.kernels.linear_chunks import LINE, Head
from ppo_fast.kernels.linear_op import public_functions
from ppo_fast.kernels.linear_scale import scale_gradients
from ppo_fast.kernels.linear_steps import RowMath
from ppo_fast.kernels.loss_launch import KL_ESTIMATORS
from ppo_fast.kernels.loss_op import LossOptions, LossTensors, named_stats, wanted_stats
from ppo_fast.kernels.loss_terms import kl_and_slope, surrogate
from ppo_fast.kernels.softmax_rows import (
    add_block,
    expm1,
    finish_rows,
    logit_gradient,
    start_rows,
    target_gradient,
    token_logprob,
    warp_size,
)


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
    slope = 1.0
    bias_ptr = tl.multiple_of(head[0] + first, 16)
    has_bias = head[1] != 0
    if WHOLE:
        x = tl.load(row_ptr + column).to(tl.float32)
        if TRANSFORMED:
            x, slope = _transform(x, tl.load(bias_ptr + lane, mask=has_bias, other=0.0), head)
    else:
        x = tl.load(row_ptr + column, mask=column < tl.cdiv(V, PAD) * PAD, other=0.0).to(tl.float32)
        if TRANSFORMED:
            inside = column < tl.cdiv(V, 32) * 32  # the bias is padded to 128 bytes, as the logits are
            x, slope = _transform(x, tl.load(bias_ptr + lane, mask=inside & has_bias, other=0.0), head)
        x = tl.where(column < V, x, float("-inf"))
    return x, slope, column


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
    row_max, sums, moments = start_rows(1, LANES)
    for block in range(0, V // BLOCK):
        x, _, _ = _load(row_ptr, block * BLOCK, V, head, TRANSFORMED, PAD, BLOCK, True)
        row_max, sums, moments = add_block(row_max, sums, moments, x, scale, 1, BLOCK, LANES, WITH_ENTROPY)
    if V % BLOCK > 0:
        x, _, _ = _load(row_ptr, V // BLOCK * BLOCK, V, head, TRANSFORMED, PAD, BLOCK, False)
        row_max, sums, moments = add_block(row_max, sums, moments, x, scale, 1, BLOCK, LANES, WITH_ENTROPY)
    log_sum, entropy = finish_rows(sums, moments, 1, LANES)
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
    x, slope, column = _load(row_ptr, first, V, head, TRANSFORMED, PAD, BLOCK, WHOLE)
    at_token, g, h = gradients
    row_max, log_sum, entropy = statistics
    d = logit_gradient(x, column == token, at_token, g, h, row_max, log_sum, entropy, scale, True)
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
    statistics,  # (m, log2 s, H, logp), (1,) each
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
def _place(chosen_ptr, has_chosen, first):
    """The program's place among the counted rows, and its token."""
    row = first + tl.program_id(0)
    token = tl.load(chosen_ptr + row, mask=has_chosen != 0, other=0)
    return row, tl.where(has_chosen != 0, token, row)


@triton.jit
def _get(ptr, index, given, default):
    """(1,) a number of a per-token tensor, or the default where none is given."""
    at = ptr + index + tl.zeros((1,), tl.int64)
    return tl.where(given != 0, tl.load(at, mask=given != 0, other=0.0), default)


@triton.jit
def _put(ptr, index, x, wanted):
    tl.store(ptr + index + tl.zeros((1,), tl.int64), x, mask=wanted != 0)


@triton.jit(do_not_specialize=list(range(19)))
def _linear_score_kernel(
    logits_ptr,  # (rows, V)
    tokens_ptr,  # (N,) int64
    chosen_ptr,  # (n,) int64: the counted tokens; any address if not has_chosen, which means all
    bias_ptr,  # (V,) fp32 at a multiple of 16 bytes, padded to 128; any address if not has_bias
    logprobs_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32; any address if not has_entropy
    statistics_ptr,  # (4, n) fp32: m, log2 s, H, logp, see softmax_rows.py; any address if not has_statistics
    has_chosen: tl.int32,
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
    TRANSFORMED: tl.constexpr,  # there is a bias, a softcap or a scale that is not positive
    PAD: tl.constexpr,  # rows of logits are padded to a multiple of it
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    row, index = _place(chosen_ptr, has_chosen, first)
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
def _linear_policy_kernel(
    logits_ptr,  # (rows, V)
    dlogits_ptr,  # (rows, V)
    tokens_ptr,  # (N,) int64
    chosen_ptr,  # (n,) int64: the counted tokens; any address if not has_chosen, which means all
    bias_ptr,  # (V,) fp32 at a multiple of 16 bytes, padded to 128; any address if not has_bias
    old_ptr,  # (N,) fp32; this and the next four: any address if there is none
    advantages_ptr,  # (N,) fp32, always there
    weights_ptr,  # (N,) fp32
    ref_ptr,  # (N,) fp32
    share_ptr,  # (N,) fp32
    logprobs_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32
    has_chosen: tl.int32,
    has_bias: tl.int32,
    has_old: tl.int32,
    has_weights: tl.int32,
    has_ref: tl.int32,
    has_share: tl.int32,
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
    TRANSFORMED: tl.constexpr,  # there is a bias, a softcap or a scale that is not positive
    PAD: tl.constexpr,  # rows of logits are padded to a multiple of it
    D_PAD: tl.constexpr,  # rows of dlogits
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    _, index = _place(chosen_ptr, has_chosen, first)
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
    _, slope, _, _, _, _ = surrogate(logp, old, advantage, low, high, dual_clip, log_ratio_clamp)
    _, kl_slope = kl_and_slope(logp - _get(ref_ptr, index, has_ref, logp), log_ratio_clamp, kl_estimator)
    g = slope * _get(weights_ptr, index, has_weights, 1.0) + kl_coef * kl_slope
    share = _get(share_ptr, index, has_share, 1.0)
    slopes = (g * share, -entropy_coef * share)
    statistics = (row_max, log_sum, entropy, logp)
    d_ptr = _row(dlogits_ptr, dlogits_stride)
    _write(d_ptr, row_ptr, V, token, head, scale, factor, slopes, statistics, TRANSFORMED, PAD, D_PAD, BLOCK)


@triton.jit(do_not_specialize=list(range(21)))
def _linear_gradient_kernel(
    logits_ptr,  # (rows, V)
    dlogits_ptr,  # (rows, V)
    tokens_ptr,  # (N,) int64
    chosen_ptr,  # (n,) int64: the counted tokens; any address if not has_chosen, which means all
    bias_ptr,  # (V,) fp32 at a multiple of 16 bytes, padded to 128; any address if not has_bias
    g_ptr,  # (N,) fp32: d loss / d logp; any address if not has_g
    h_ptr,  # (N,) fp32: d loss / d H; any address if not has_h
    statistics_ptr,  # (4, n) fp32: m, log2 s, H, logp, see softmax_rows.py
    has_chosen: tl.int32,
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
    TRANSFORMED: tl.constexpr,  # there is a bias, a softcap or a scale that is not positive
    PAD: tl.constexpr,  # rows of logits are padded to a multiple of it
    D_PAD: tl.constexpr,  # rows of dlogits
    BLOCK: tl.constexpr,
):
    row, index = _place(chosen_ptr, has_chosen, first)
    token = tl.load(tokens_ptr + index)
    head = (bias_ptr, has_bias, logit_scale, softcap)
    row_max = _get(statistics_ptr, row, 1, 0.0)
    log_sum = _get(statistics_ptr, row + n, 1, 0.0)
    entropy = _get(statistics_ptr, row + n * 2, has_h, 0.0)
    logp = _get(statistics_ptr, row + n * 3, 1, 0.0)
    slopes = (_get(g_ptr, index, has_g, 0.0), _get(h_ptr, index, has_h, 0.0))
    statistics = (row_max, log_sum, entropy, logp)
    row_ptr, d_ptr = _row(logits_ptr, logits_stride), _row(dlogits_ptr, dlogits_stride)
    _write(d_ptr, row_ptr, V, token, head, scale, factor, slopes, statistics, TRANSFORMED, PAD, D_PAD, BLOCK)


class _Tile(NamedTuple):
    BLOCK: int
    LANES: int  # partial sums kept per row: those of one thread, whether 32 or 64 of them execute together
    threads: int


_POLICY_REGISTERS = 128  # two blocks of the larger tile on a multiprocessor
# One for all V, so that a row's bits depend on nothing but the row. Smaller where tanh needs registers.
_TILES = {False: _Tile(8192, 2048, 256), True: _Tile(2048, 1024, 128)}


def _kernel(kind: str) -> triton.JITFunction:
    return {"score": _linear_score_kernel, "policy": _linear_policy_kernel, "gradient": _linear_gradient_kernel}[kind]


@functools.cache
def _config(
    kind: str,  # "score", "policy" or "gradient"
    transformed: bool,
    logits: torch.dtype,
    dlogits: torch.dtype,
    with_entropy: bool,
    threads_per_warp: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexprs of a launch and its options. Where tanh costs more, the entropy is always computed."""
    kernel = _kernel(kind)
    values: dict[str, Any] = _TILES[transformed]._asdict() | {"TRANSFORMED": transformed}
    values |= {"PAD": LINE // logits.itemsize, "D_PAD": LINE // dlogits.itemsize}
    values["WITH_ENTROPY"] = with_entropy or transformed
    registers = {"score": None, "policy": _POLICY_REGISTERS, "gradient": REGISTERS}[kind]
    options = launch_options(_TILES[transformed].threads // threads_per_warp, registers)
    return {name: values[name] for name in kernel.arg_names if name in values}, options


_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# (logits, dlogits): operands of 2 bytes, whose products may be 4 bytes; or all 4 bytes.
_DTYPES = [(logits, low) for low in (torch.float16, torch.bfloat16) for logits in (torch.float32, low)]
_DTYPES += [(torch.float32, torch.float32)]


@functools.cache
def _keywords(*key: Any) -> dict[str, Any]:
    """Both in one. Do not change the result: it is shared."""
    constexprs, options = _config(*key)
    return constexprs | options


def variants(threads_per_warp: int = 32) -> list[Variant]:
    """Everything that the launchers below can start on a GPU with such warps."""
    found = []
    for transformed in (False, True):
        for logits, dlogits in _DTYPES:
            name = f"aligned {str(logits)[6:]} {str(dlogits)[6:]}{' transformed' if transformed else ''}"
            for kind in ("policy", "gradient"):
                config = _config(kind, transformed, logits, dlogits, True, threads_per_warp)
                types = _types(_kernel(kind), logits, dlogits)
                found.append(Variant(f"linear {kind} {name}", _kernel(kind), types, *config))
        kernel = _linear_score_kernel
        for logits in _POINTERS:
            for with_entropy in (True,) if transformed else (False, True):
                name = f"linear score aligned {str(logits)[6:]}{' transformed' if transformed else ''}"
                name += "" if with_entropy else " without entropy"
                config = _config("score", transformed, logits, logits, with_entropy, threads_per_warp)
                found.append(Variant(name, kernel, _types(kernel, logits, logits), *config))
    return found


def _types(kernel: triton.JITFunction, logits: torch.dtype, dlogits: torch.dtype) -> dict[str, str]:
    """Argument -> type, from the kernel's own names."""
    special = {"logits_ptr": _POINTERS[logits], "dlogits_ptr": _POINTERS[dlogits]}
    special |= {"tokens_ptr": "*i64", "chosen_ptr": "*i64", "first": "i64", "n": "i64"}
    types = {}
    for name in kernel.arg_names:
        if name.islower() or name == "V":
            is_integer = name.startswith("has_") or name in ("V", "kl_estimator")
            default = "i64" if name.endswith("_stride") else "i32" if is_integer else "fp32"
            types[name] = special.get(name, "*fp32" if name.endswith("_ptr") else default)
    return types


class _HeadScalars(NamedTuple):
    """The head as the kernels take it."""

    transformed: bool
    bias: Tensor | None
    has_bias: int
    logit_scale: float
    softcap: float
    z_scale: float
    scale: float
    factor: float


def _scalars(head: Head) -> _HeadScalars:
    transformed = head.bias is not None or head.softcap is not None or head.logit_scale <= 0
    z_scale = 1.0 / head.temperature if transformed else head.factor
    softcap = 0.0 if head.softcap is None else float(head.softcap)
    numbers = float(head.logit_scale), softcap, z_scale, math.log2(math.e) * z_scale, head.factor
    return _HeadScalars(transformed, head.bias, int(head.bias is not None), *numbers)


def _or(x: Tensor | None, address: Tensor) -> Tensor:
    """A tensor, or an address of the same type that will not be read."""
    return address if x is None else x


Where = tuple[Tensor | None, int]  # the counted tokens (None: all), and the place of a chunk's first row among them


def _score(
    logits: Tensor,
    tokens: Tensor,
    where: Where,
    head: Head,
    logprobs: Tensor,
    entropy: Tensor | None,
    statistics: Tensor | None,
) -> None:
    s, (rows, V), dtype, (chosen, first) = _scalars(head), logits.shape, logits.dtype, where
    with_entropy = entropy is not None
    keywords = _keywords("score", s.transformed, dtype, dtype, with_entropy, warp_size(logits.device))
    with device_guard(logits):
        _linear_score_kernel.run(
            logits,
            tokens,
            _or(chosen, tokens),
            _or(s.bias, logprobs),
            logprobs,
            _or(entropy, logprobs),
            _or(statistics, logprobs),
            int(chosen is not None),
            s.has_bias,
            int(with_entropy),
            int(statistics is not None),
            s.logit_scale,
            s.softcap,
            s.z_scale,
            s.scale,
            first,
            0 if statistics is None else statistics.stride(0),
            V,
            logits.stride(0),
            grid=(rows,),
            warmup=False,
            **keywords,
        )


def _policy(
    logits: Tensor,
    dlogits: Tensor,
    per_token: tuple[Tensor | None, ...],  # tokens, old_logprobs, advantages, weights, ref_logprobs, share
    where: Where,
    o: LossOptions,
    head: Head,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    s, (rows, V), (chosen, first) = _scalars(head), logits.shape, where
    tokens, old, advantages, weights, ref, share = per_token
    with_kl = ref is not None and o.kl_coef != 0
    keywords = _keywords("policy", s.transformed, logits.dtype, dlogits.dtype, True, warp_size(logits.device))
    with device_guard(logits):
        _linear_policy_kernel.run(
            logits,
            dlogits,
            tokens,
            _or(chosen, tokens),
            _or(s.bias, logprobs),
            _or(old, logprobs),
            advantages,
            _or(weights, logprobs),
            _or(ref, logprobs),
            _or(share, logprobs),
            logprobs,
            entropy,
            int(chosen is not None),
            s.has_bias,
            int(old is not None),
            int(weights is not None),
            int(with_kl),
            int(share is not None),
            s.logit_scale,
            s.softcap,
            s.z_scale,
            s.scale,
            s.factor,
            1.0 - o.clip_low,
            1.0 + o.clip_high,
            math.inf if o.dual_clip is None else float(o.dual_clip),
            float(o.log_ratio_clamp),
            float(o.entropy_coef),
            float(o.kl_coef) if with_kl else 0.0,
            KL_ESTIMATORS.index(o.kl_estimator),
            first,
            V,
            logits.stride(0),
            dlogits.stride(0),
            grid=(rows,),
            warmup=False,
            **keywords,
        )


def _gradient(
    logits: Tensor,
    dlogits: Tensor,
    tokens: Tensor,
    where: Where,
    g: Tensor | None,  # d loss / d logp
    h: Tensor | None,  # d loss / d H
    head: Head,
    statistics: Tensor,
) -> None:
    s, (rows, V), (chosen, first) = _scalars(head), logits.shape, where
    keywords = _keywords("gradient", s.transformed, logits.dtype, dlogits.dtype, True, warp_size(logits.device))
    with device_guard(logits):
        _linear_gradient_kernel.run(
            logits,
            dlogits,
            tokens,
            _or(chosen, tokens),
            _or(s.bias, statistics),
            _or(g, statistics),
            _or(h, statistics),
            statistics,
            int(chosen is not None),
            s.has_bias,
            int(g is not None),
            int(h is not None),
            s.logit_scale,
            s.softcap,
            s.scale,
            s.factor,
            first,
            statistics.stride(0),
            V,
            logits.stride(0),
            dlogits.stride(0),
            grid=(rows,),
            warmup=False,
            **keywords,
        )


def _loss(
    logprobs: Tensor, entropy: Tensor, t: LossTensors, o: LossOptions
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, statistics and 1 / divisor of the loss."""
    if t.old_logprobs is None:
        t = t._replace(old_logprobs=logprobs)
    wanted, names = wanted_stats(True, True, False, t, o)
    loss, stats, workspace = loss_launch.forward(logprobs, entropy, None, t, o, (False, False, False), wanted)
    return loss, named_stats(stats, names), workspace[0]


_MATH = RowMath(
    name="triton",
    native=lambda device: True,
    in_place=False,
    scratch_bytes=lambda weight, softcap: 0,
    score=_score,
    policy=_policy,
    gradient=_gradient,
    policy_loss=loss.policy_loss,
    indexed=True,
    loss=_loss,
    shares=loss_launch.token_shares,
    scale_gradients=scale_gradients,
)

linear_logprobs, linear_ppo_loss = public_functions(_MATH)
