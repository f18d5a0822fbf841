"""shape_rewards and masked_whiten in loops compiled by numba, for fp32 tensors on a CPU.

One traversal for the rewards and three for the whitening, instead of an operation of PyTorch, which takes some
microseconds, for each term. Sums are kept in fp64. The loops are C callbacks, as in gae/cpu.py.

Bytes: shape_rewards reads log-probabilities and mask once and writes rewards and KL once; whitening reads its input
three times, the second time from a cache.
"""

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache, partial

import numba
import torch
from numba import types
from torch import Tensor

from ppo_fast.kernels.advantages.options import ShapingOptions
from ppo_fast.kernels.common.memory import addressable
from ppo_fast.kernels.common.numba_loops import Array, Compiled, c_function
from ppo_fast.kernels.common.numba_threads import in_threads, split_rows
from ppo_fast.kernels.reference import KL_ESTIMATORS

_PIECE = 1 << 16  # elements of one call: three traversals of them stay in the second-level cache
_PER_THREAD = 1 << 19  # elements for which a second thread is worth its start
_BY_TOKEN, _CLIPPED, _AFTER_LAST, _SUMMED = (1 << bit for bit in range(4))
SUMS = ("rows", "tokens", "kl", "rewards", "scores")  # of a row; the first is 1 if anything counts in it
_PER_ROW = len(SUMS)
_ANY_ORDER = {"contract", "reassoc", "nsz"}  # of a sum, but always the same; NaN and infinity keep their meaning


@numba.njit(forceinline=True, fastmath=_ANY_ORDER, error_model="numpy")
def _sum_between(x: Array, mask: Array, masked: int, start: int, stop: int) -> float:
    total = 0.0
    if masked:
        for i in range(start, stop):
            total += x[i] if mask[i] != 0 else 0.0
    else:
        for i in range(start, stop):
            total += x[i]
    return total


@numba.njit(forceinline=True, error_model="numpy")
def _count_between(mask: Array, start: int, stop: int) -> int:
    count = 0
    for i in range(start, stop):
        count += mask[i] != 0
    return count


def _shape(
    logprobs: Array,  # (B, T) each, contiguous
    ref_logprobs: Array,
    mask: Array,
    scores: Array,  # (B,), or (B, T) with _BY_TOKEN
    rewards: Array,  # outputs
    kl: Array,
    longer: Array,  # (B, T) with _AFTER_LAST: the mask with the score's slot
    sums: Array,  # (B, len(SUMS)) fp64 with _SUMMED
    coef: float,
    score_clip: float,
    clamp: float,  # of the log-ratio in k3
    T: int,
    first_row: int,
    last_row: int,
    kind: int,  # index in KL_ESTIMATORS
    flags: int,
) -> None:
    zero, one, half = coef - coef, (coef - coef) + 1, (coef - coef) + 0.5
    for row in range(first_row, last_row):
        start = row * T
        # Short loops with few arrays each: LLVM does not vectorise a loop with too many pointers that may overlap
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
        if flags & _AFTER_LAST:
            for i in range(start, start + T):
                longer[i] = mask[i]
        raw, tokens = 0.0, T  # the scores that count, before they are clipped
        if flags & _SUMMED:
            tokens = _count_between(mask, start, start + T)
        if flags & _BY_TOKEN:
            if flags & _SUMMED:
                raw = _sum_between(scores, mask, 1, start, start + T)
            for i in range(start, start + T):
                score = scores[i]
                if flags & _CLIPPED:
                    score = min(max(score, -score_clip), score_clip) if score == score else score
                rewards[i] += score if mask[i] != 0 else zero
        else:
            slot = start + T - 1
            while slot >= start and mask[slot] == 0:
                slot -= 1
            if slot >= start:  # else nothing counts, nor does the score
                if flags & _AFTER_LAST:
                    slot = min(slot + 1, start + T - 1)
                    longer[slot] = 1
                score = scores[row]
                raw += score
                if flags & _CLIPPED:
                    score = min(max(score, -score_clip), score_clip) if score == score else score
                rewards[slot] += score
        if flags & _SUMMED:
            at = row * _PER_ROW
            sums[at], sums[at + 1], sums[at + 4] = tokens > 0, tokens, raw
            sums[at + 2] = _sum_between(kl, mask, 0, start, start + T)
            sums[at + 3] = _sum_between(rewards, mask, 0, start, start + T)


def _moments(
    x: Array,  # (N,)
    mask: Array,  # (N,), or null
    out: Array,  # (3,) fp64: count, mean, sum of squared deviations
    N: int,
    masked: int,
) -> None:
    count = _count_between(mask, 0, N) if masked else N
    total = _sum_between(x, mask, masked, 0, N)
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
    x: Array,  # (N,)
    mask: Array,
    out: Array,
    mean: float,
    scale: float,
    shift: float,  # added at the end: the mean, if it is kept
    N: int,
    masked: int,
) -> None:
    if masked:
        for i in range(N):
            out[i] = (x[i] - mean) * scale + shift if mask[i] != 0 else 0.0
    else:
        for i in range(N):
            out[i] = (x[i] - mean) * scale + shift


def _scale_in_place(
    x: Array,  # (N,)
    mask: Array,
    mean: float,
    scale: float,
    shift: float,
    N: int,
    masked: int,
) -> None:
    """_scale to x itself: LLVM vectorises only pointers that provably do not overlap, even in an inlined function."""
    if masked:
        for i in range(N):
            x[i] = (x[i] - mean) * scale + shift if mask[i] != 0 else 0.0
    else:
        for i in range(N):
            x[i] = (x[i] - mean) * scale + shift


def _sum(x: Array, out: Array, N: int) -> None:
    out[0] = _sum_between(x, x, 0, 0, N)


_FLOATS, _FLAGS, _DOUBLES = (types.CPointer(x) for x in (types.float32, types.uint8, types.float64))
_SIGNATURES: dict[str, tuple[Callable[..., None], list[types.Type]]] = {
    "shape": (
        _shape,
        [_FLOATS, _FLOATS, _FLAGS, *[_FLOATS] * 3, _FLAGS, _DOUBLES, *[types.float32] * 3, *[types.int64] * 5],
    ),
    "moments": (_moments, [_FLOATS, _FLAGS, _DOUBLES, types.int64, types.int64]),
    "sum": (_sum, [_FLOATS, _DOUBLES, types.int64]),
    "scale": (_scale, [_FLOATS, _FLAGS, _FLOATS, *[types.float64] * 3, types.int64, types.int64]),
    "scale in place": (_scale_in_place, [_FLOATS, _FLAGS, *[types.float64] * 3, types.int64, types.int64]),
}


@lru_cache(maxsize=len(_SIGNATURES))
def _compiled(name: str) -> Compiled:
    """The C function, and the numba object that keeps its machine code alive."""
    body, arguments = _SIGNATURES[name]
    fastmath = _ANY_ORDER if name == "moments" else {"contract"}
    return c_function(body, arguments, fastmath)


ALL = [partial(_compiled, name) for name in _SIGNATURES]  # what `ppo-fast compile` compiles


def supports(first: Tensor, *others: Tensor | None) -> bool:
    """Return whether the loops support the tensors: contiguous fp32 or bool, not empty, and readable by address."""
    for x in (first, *others):
        if x is None:
            continue
        if x.dtype not in (torch.float32, torch.bool) or not x.is_contiguous() or x.numel() == 0:
            return False
    return addressable(first, *others)


def shape_rewards(
    scores: Tensor,  # [B] or [B, T] fp32, as all floating tensors here
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    mask: Tensor,
    options: ShapingOptions,
    *,
    clamp: float,
    sums: Tensor | None = None,  # [B, len(SUMS)] fp64, to be written
) -> tuple[Tensor, ...]:
    """eager.shape_rewards for tensors that `supports` accepts."""
    kl_coef, kl_estimator, score_clip, reward_at = options
    rewards, kl = torch.empty_like(logprobs), torch.empty_like(logprobs)
    by_token = scores.ndim == mask.ndim
    longer = torch.empty_like(mask) if reward_at == "after_last" and not by_token else None
    flags = (_BY_TOKEN if by_token else 0) | (0 if score_clip is None else _CLIPPED)
    flags |= (0 if longer is None else _AFTER_LAST) | (0 if sums is None else _SUMMED)
    T = mask.shape[-1]
    rows = mask.numel() // T
    tensors = (logprobs, ref_logprobs, mask, scores, rewards, kl, longer, sums)
    pointers = [0 if x is None else x.data_ptr() for x in tensors]
    scalars = (float(kl_coef), score_clip or 0.0, clamp, T)
    function, _ = _compiled("shape")
    parts = split_rows(rows, mask.numel(), per_thread=_PER_THREAD)

    def work(part: int, _kept: object = tensors) -> None:  # an interrupted caller must not free them
        function(*pointers, *scalars, parts[part], parts[part + 1], KL_ESTIMATORS.index(kl_estimator), flags)

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


def scaled(
    x: Tensor, mask: Tensor | None, *, mean: float, scale: float, shift: float, in_place: bool = False
) -> Tensor:
    """(x - mean) scale + shift where counted, 0 elsewhere."""
    out = x if in_place else torch.empty_like(x)
    function, _ = _compiled("scale in place" if in_place else "scale")
    start, begin, end = x.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr()

    def work(i: int) -> None:
        place = 4 * i * _PIECE
        pointers = (start + place, 0 if mask is None else begin + i * _PIECE, end + place)
        function(*pointers[: 2 if in_place else 3], mean, scale, shift, _size(x, i), mask is not None)

    in_threads(work, _pieces(x), x.numel() // _PER_THREAD)
    return out


def total(x: Tensor) -> float:
    """The sum of all elements, in fp64."""
    out = ctypes.c_double()
    _compiled("sum")[0](x.data_ptr(), ctypes.addressof(out), x.numel())
    return out.value


def _pieces(x: Tensor) -> int:
    return -(-x.numel() // _PIECE)


def _size(x: Tensor, piece: int) -> int:
    return min(_PIECE, x.numel() - piece * _PIECE)
