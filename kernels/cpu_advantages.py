"""shape_rewards and masked_whiten in compiled loops for a CPU: what eager_advantages.py uses for fp32 where numba is.

The same numbers in one traversal for the rewards and three for the whitening, instead of an operation of PyTorch, and
some microseconds, for each term. Sums are kept in fp64. The kernels are C callbacks, as those of cpu.py.

Bytes: shape_rewards reads log-probabilities and mask once and writes rewards and KL once; whitening reads its input
three times, the second time from a cache.
"""

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import torch
from numba import types
from torch import Tensor

from ppo_fast.kernels.cpu import in_threads, shares

_PIECE = 1 << 16  # elements of one call: three traversals of them stay in the second-level cache
_PER_THREAD = 1 << 19  # elements for which a second thread is worth its start
KINDS = ("k1", "k2", "k3", "abs")
_BY_TOKEN, _CLIPPED, _AFTER_LAST = (1 << bit for bit in range(3))


def _shape(
    logprobs: Any,  # (B, T) each, contiguous
    ref_logprobs: Any,
    mask: Any,
    scores: Any,  # (B,), or (B, T) with _BY_TOKEN
    rewards: Any,  # outputs
    kl: Any,
    longer: Any,  # (B, T) with _AFTER_LAST: the mask with the score's slot
    coef: float,
    score_clip: float,
    clamp: float,  # of the log-ratio in k3
    T: int,
    first_row: int,
    last_row: int,
    kind: int,  # index in KINDS
    options: int,
) -> None:
    zero, one, half = coef - coef, (coef - coef) + 1, (coef - coef) + 0.5
    for row in range(first_row, last_row):
        start = row * T
        # Short loops with few arrays each: LLVM gives up vectorising a loop with too many pointers that may overlap
        for i in range(start, start + T):
            kl[i] = logprobs[i] - ref_logprobs[i] if mask[i] != 0 else zero
        if kind == 1:
            for i in range(start, start + T):
                kl[i] = kl[i] * kl[i] * half
        elif kind == 2:
            for i in range(start, start + T):
                d = kl[i]
                exponent = min(max(d, -clamp), clamp) if d == d else d
                kl[i] = (math.exp(-exponent) - one) + d
        elif kind == 3:
            for i in range(start, start + T):
                kl[i] = abs(kl[i])
        for i in range(start, start + T):
            rewards[i] = kl[i] * -coef
        if options & _AFTER_LAST:
            for i in range(start, start + T):
                longer[i] = mask[i]
        if options & _BY_TOKEN:
            for i in range(start, start + T):
                score = scores[i]
                if options & _CLIPPED:
                    score = min(max(score, -score_clip), score_clip) if score == score else score
                rewards[i] += score if mask[i] != 0 else zero
            continue
        slot = start + T - 1
        while slot >= start and mask[slot] == 0:
            slot -= 1
        if slot < start:
            continue  # nothing counts, nor does the score
        if options & _AFTER_LAST:
            slot = min(slot + 1, start + T - 1)
            longer[slot] = 1
        score = scores[row]
        if options & _CLIPPED:
            score = min(max(score, -score_clip), score_clip) if score == score else score
        rewards[slot] += score


def _moments(
    x: Any,  # (N,)
    mask: Any,  # (N,), or null
    out: Any,  # (3,) fp64: count, mean, sum of squared deviations
    N: int,
    masked: int,
) -> None:
    total, count = 0.0, N
    if masked:
        count = 0
        for i in range(N):
            counted = mask[i] != 0
            total += x[i] if counted else 0.0
            count += counted
    else:
        for i in range(N):
            total += x[i]
    mean, squares = total / max(count, 1), 0.0
    if masked:
        for i in range(N):
            d = x[i] - mean if mask[i] != 0 else 0.0
            squares += d * d
    else:
        for i in range(N):
            d = x[i] - mean
            squares += d * d
    out[0], out[1], out[2] = count, mean, squares


def _scale(
    x: Any,  # (N,)
    mask: Any,
    out: Any,
    mean: float,
    scale: float,
    shift: float,  # added at the end: the mean, if it shall stay
    N: int,
    masked: int,
) -> None:
    if masked:
        for i in range(N):
            out[i] = (x[i] - mean) * scale + shift if mask[i] != 0 else 0.0
    else:
        for i in range(N):
            out[i] = (x[i] - mean) * scale + shift


def _count(mask: Any, out: Any, N: int) -> None:
    count = 0
    for i in range(N):
        count += mask[i] != 0
    out[0] = count


def _any(mask: Any, out: Any, rows: int, T: int) -> None:
    for row in range(rows):
        i, stop = row * T, row * T + T
        while i < stop and mask[i] == 0:
            i += 1
        out[row] = i < stop


def _sum(x: Any, out: Any, N: int) -> None:
    total = 0.0
    for i in range(N):
        total += x[i]
    out[0] = total


_FLOATS, _FLAGS, _DOUBLES = (types.CPointer(x) for x in (types.float32, types.uint8, types.float64))
_SIGNATURES = {
    "shape": (_shape, [_FLOATS, _FLOATS, _FLAGS, *[_FLOATS] * 3, _FLAGS, *[types.float32] * 3, *[types.int64] * 5]),
    "moments": (_moments, [_FLOATS, _FLAGS, _DOUBLES, types.int64, types.int64]),
    "count": (_count, [_FLAGS, _DOUBLES, types.int64]),
    "any": (_any, [_FLAGS, _FLAGS, types.int64, types.int64]),
    "sum": (_sum, [_FLOATS, _DOUBLES, types.int64]),
    "scale": (_scale, [_FLOATS, _FLAGS, _FLOATS, *[types.float64] * 3, types.int64, types.int64]),
}


@lru_cache(maxsize=len(_SIGNATURES))
def _compiled(name: str) -> tuple[Callable[..., None], Any]:
    """The C function, and the numba object that keeps its machine code alive."""
    body, arguments = _SIGNATURES[name]
    # NaN and infinity keep their meaning; sums are taken in another order than written, but always in the same
    fastmath = {"contract", "reassoc", "nsz"} if name in ("moments", "sum") else {"contract"}
    options = {"nopython": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        code = numba.cfunc(types.void(*arguments), cache=True, **options)(body)
    except (RuntimeError, OSError):  # no directory that numba could write its cache to
        code = numba.cfunc(types.void(*arguments), **options)(body)
    c_types = {types.float32: ctypes.c_float, types.float64: ctypes.c_double, types.int64: ctypes.c_int64}
    return ctypes.CFUNCTYPE(None, *(c_types.get(x, ctypes.c_void_p) for x in arguments))(code.address), code


def takes(*tensors: Tensor | None) -> bool:
    """Whether the loops can do it: plain contiguous fp32 tensors and bool masks on a CPU, with something in them."""
    return all(
        x is None
        or (
            type(x) in (Tensor, torch.nn.Parameter)  # not fake, not sharded
            and x.is_cpu
            and x.dtype in (torch.float32, torch.bool)
            and x.is_contiguous()
            and x.numel() > 0
        )
        for x in tensors
    )


def shape_rewards(
    scores: Tensor,  # [B] or [B, T] fp32, as all floating tensors here
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str,
    score_clip: float | None,
    reward_at: str,
    clamp: float,
) -> tuple[Tensor, ...]:
    """eager_advantages.shape_rewards for what `takes` allows."""
    rewards, kl = torch.empty_like(logprobs), torch.empty_like(logprobs)
    by_token = scores.ndim == mask.ndim
    longer = torch.empty_like(mask) if reward_at == "after_last" and not by_token else None
    options = (_BY_TOKEN if by_token else 0) | (0 if score_clip is None else _CLIPPED)
    options |= 0 if longer is None else _AFTER_LAST
    T = mask.shape[-1]
    rows = mask.numel() // T
    tensors = (logprobs, ref_logprobs, mask, scores, rewards, kl, longer)
    pointers = [0 if x is None else x.data_ptr() for x in tensors]
    scalars = (float(kl_coef), score_clip or 0.0, clamp, T)
    function, _ = _compiled("shape")
    parts = shares(rows, mask.numel(), per_thread=_PER_THREAD)

    def work(part: int, _kept: object = tensors) -> None:  # an interrupted caller must not free what it reads
        function(*pointers, *scalars, parts[part], parts[part + 1], KINDS.index(kl_estimator), options)

    in_threads(work, len(parts) - 1, len(parts) - 1)
    return (rewards, kl) if longer is None else (rewards, kl, longer)


def moments(x: Tensor, mask: Tensor | None) -> tuple[float, float, float]:
    """Count, mean and sum of squared deviations of the counted elements.

    Pieces of one size, merged in order (Chan, Golub and LeVeque 1979): the bits don't depend on the number of threads.
    """
    pieces = _pieces(x)
    out = (ctypes.c_double * (3 * pieces))()
    function, _ = _compiled("moments")
    start, begin = x.data_ptr(), 0 if mask is None else mask.data_ptr()

    def work(i: int) -> None:
        flags = 0 if mask is None else begin + i * _PIECE
        function(start + 4 * i * _PIECE, flags, ctypes.addressof(out) + 24 * i, _size(x, i), mask is not None)

    in_threads(work, pieces, x.numel() // _PER_THREAD)
    count, mean, m2 = 0.0, 0.0, 0.0
    for i in range(pieces):
        n, its_mean, its_m2 = out[3 * i : 3 * i + 3]
        if n:
            d = its_mean - mean
            mean += d * n / (count + n)
            m2 += its_m2 + d * d * count * n / (count + n)
            count += n
    return count, mean, m2


def scaled(x: Tensor, mask: Tensor | None, *, mean: float, scale: float, shift: float) -> Tensor:
    """(x - mean) scale + shift where counted, 0 elsewhere."""
    out = torch.empty_like(x)
    function, _ = _compiled("scale")
    begin = 0 if mask is None else mask.data_ptr()

    def work(i: int) -> None:
        flags, place = 0 if mask is None else begin + i * _PIECE, 4 * i * _PIECE
        function(x.data_ptr() + place, flags, out.data_ptr() + place, mean, scale, shift, _size(x, i), mask is not None)

    in_threads(work, _pieces(x), x.numel() // _PER_THREAD)
    return out


def sums(mask: Tensor, *others: Tensor) -> tuple[float, ...]:
    """The number of counted elements, and the sum of each of the other tensors, which have the mask's size."""
    out = (ctypes.c_double * (1 + len(others)))()
    place, total = ctypes.addressof(out), _compiled("sum")[0]
    _compiled("count")[0](mask.data_ptr(), place, mask.numel())
    for k, x in enumerate(others, start=1):  # threads would wait for each other between such short calls
        total(x.data_ptr(), place + 8 * k, x.numel())
    return tuple(out)


def any_of_row(mask: Tensor) -> Tensor:
    """mask.any(-1), by far quicker."""
    out = mask.new_empty(mask.shape[:-1])
    _compiled("any")[0](mask.data_ptr(), out.data_ptr(), out.numel(), mask.shape[-1])
    return out


def _pieces(x: Tensor) -> int:
    return -(-x.numel() // _PIECE)


def _size(x: Tensor, piece: int) -> int:
    return min(_PIECE, x.numel() - piece * _PIECE)
