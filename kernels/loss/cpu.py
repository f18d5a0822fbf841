"""PPO's scalar losses in one loop compiled by numba, for small fp32 tensors on a CPU.

The terms, gradients and statistics of eager.py, in one traversal instead of about forty: at 256 steps, as in classic
RL, an operation of PyTorch takes some microseconds whatever its size. Sums are kept in fp64. The loop is a C callback,
as in gae/cpu.py. It does not support packed sequences or a mask of the value loss alone.

Bytes: every input is read once, the mask twice or three times, and every gradient is written once.
"""

import math
from functools import lru_cache

import numba
import torch
from numba import types
from torch import Tensor

from ppo_fast.kernels.common.memory import addressable, required
from ppo_fast.kernels.common.numba_loops import Array, Compiled, c_function
from ppo_fast.kernels.loss.options import LossOptions, LossTensors
from ppo_fast.kernels.reference import KL_ESTIMATORS

_POLICY, _VALUE, _MASK, _ENTROPY, _VALUE_CLIP = (1 << bit for bit in range(5))
_DUAL_CLIP, _WEIGHTS, _REFERENCE, _SEQUENCES, _ROW_MEANS = (1 << bit for bit in range(5, 10))
MOST = 1 << 15  # steps; with more, PyTorch's threads are faster

# In the helpers `zero`, `one` and `half` are computed from an argument: numba makes a literal fp64, and its results.


@numba.njit(forceinline=True, error_model="numpy")
def _surrogate(
    d: float, advantage: float, low: float, high: float, clamp: float, dual_clip: float, flags: int
) -> tuple[float, float, float, bool, bool]:
    """Ratio, objective to maximise and its derivative by the log-probability; clipped, and below the dual bound.

    A tie of minimum or maximum halves the derivative: `order` is 1, 0 or -1 as in eager.py.
    """
    zero, one, half = low - low, (low - low) + 1, (low - low) + 0.5
    exponent = min(max(d, -clamp), clamp) if d == d else d
    ratio = math.exp(exponent)
    inside = min(max(ratio, low), high) if ratio == ratio else ratio
    plain, clipped_objective = advantage * ratio, advantage * inside
    order = one if clipped_objective > plain else (-one if clipped_objective < plain else zero)
    objective, gradient = clipped_objective if clipped_objective < plain else plain, plain
    if ratio != inside:
        gradient = gradient * (one - half * (one - order))
    if d != exponent:
        gradient = gradient * zero
    bounded = False
    if flags & _DUAL_CLIP:
        bound = (advantage if advantage < zero else zero) * dual_clip
        bounded = objective < bound
        order = -one if bounded else (one if objective > bound else zero)
        gradient = gradient * (half + half * order)
        objective = bound if bounded else objective
    return ratio, objective, gradient, clipped_objective < plain, bounded


@numba.njit(forceinline=True, error_model="numpy")
def _kl(d: float, clamp: float, kind: int) -> tuple[float, float]:
    """reference.kl_estimate and its derivative by the log-probability; `kind` is an index in KL_ESTIMATORS."""
    zero, one, half = clamp - clamp, (clamp - clamp) + 1, (clamp - clamp) + 0.5
    if kind == 0:
        return d, one
    if kind == 1:
        return half * d * d, d
    if kind == 3:
        return abs(d), one if d > zero else (-one if d < zero else zero)
    exponent = min(max(d, -clamp), clamp) if d == d else d
    inverse_ratio = math.exp(-exponent)
    return (inverse_ratio - one) + d, one - inverse_ratio * (one if d == exponent else zero)


@numba.njit(forceinline=True, error_model="numpy")
def _squared_error(v: float, old: float, r: float, clip: float, clipped: int) -> tuple[float, float, bool]:
    """(v - r)^2 and half of its derivative by v, and whether the clipped error is the larger."""
    zero, one, half = v - v, (v - v) + 1, (v - v) + 0.5
    gradient = v - r
    squared = gradient * gradient
    if not clipped:
        return squared, gradient, False
    inside = min(max(v, old - clip), old + clip) if v == v and old == old else v + old  # NaN stays
    clipped_squared = (inside - r) * (inside - r)
    order = one if squared > clipped_squared else (-one if squared < clipped_squared else zero)
    if v != inside:
        gradient = gradient * (one - half * (one - order))
    return squared if squared >= clipped_squared else clipped_squared, gradient, squared < clipped_squared


def _loop(
    logprobs: Array,  # (rows, T) each
    old_logprobs: Array,
    advantages: Array,
    weights: Array,
    ref_logprobs: Array,
    entropy: Array,
    values: Array,
    old_values: Array,
    returns: Array,
    d_logprobs: Array,  # outputs
    d_values: Array,
    d_entropy: Array,
    loss: Array,  # (1,)
    stats: Array,  # in the order of options.wanted_stats
    mask: Array,
    low: float,  # 1 - clip_low
    high: float,
    clamp: float,
    dual_clip: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    denominator: float,  # 0: the counted steps, or with _SEQUENCES the rows that have any
    norm: float,
    rows: int,
    T: int,
    kind: int,
    flags: int,
) -> None:
    count, sequences = rows * T, rows
    if flags & _MASK:
        count, sequences = 0, 0
        for row in range(rows):
            before = count
            for i in range(row * T, row * T + T):
                count += mask[i] != 0
            sequences += count > before
    if denominator == 0:
        denominator = 1.0 * max(sequences if flags & _SEQUENCES else count, 1)
    policy, bonus, value, ratio_sum, ratio_max, kl_sum, entropy_sum, ref_sum = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    clipped_count, dual_count, value_count = 0, 0, 0
    for row in range(rows):
        scale = 1.0 / (denominator * norm)
        if flags & _ROW_MEANS:
            length = T
            if flags & _MASK:
                length = 0
                for i in range(row * T, row * T + T):
                    length += mask[i] != 0
            scale /= max(length, 1)
        for i in range(row * T, row * T + T):
            if flags & _MASK:  # noqa: SIM102
                if mask[i] == 0:
                    if flags & _POLICY:
                        d_logprobs[i] = 0.0
                    if flags & _ENTROPY:
                        d_entropy[i] = 0.0
                    if flags & _VALUE:
                        d_values[i] = 0.0
                    continue
            if flags & _POLICY:
                d = logprobs[i] - old_logprobs[i]
                ratio, objective, gradient, clipped, bounded = _surrogate(
                    d, advantages[i], low, high, clamp, dual_clip, flags
                )
                clipped_count += clipped
                dual_count += bounded
                kl_sum += (ratio - 1.0) - d
                ratio_sum += ratio
                if ratio > ratio_max or ratio != ratio:
                    ratio_max = ratio
                if flags & _WEIGHTS:
                    objective, gradient = objective * weights[i], gradient * weights[i]
                policy -= objective * scale
                gradient = -gradient
                if flags & _REFERENCE:
                    ref_kl, kl_gradient = _kl(logprobs[i] - ref_logprobs[i], clamp, kind)
                    ref_sum += ref_kl
                    bonus += kl_coef * ref_kl * scale
                    gradient += kl_coef * kl_gradient
                d_logprobs[i] = gradient * scale
                if flags & _ENTROPY:
                    entropy_sum += entropy[i]
                    bonus -= entropy_coef * entropy[i] * scale
                    d_entropy[i] = -entropy_coef * scale
            if flags & _VALUE:
                old = old_values[i] if flags & _VALUE_CLIP else values[i]
                squared, gradient, clipped = _squared_error(values[i], old, returns[i], value_clip, flags & _VALUE_CLIP)
                value_count += clipped
                value += 0.5 * squared * scale
                d_values[i] = value_coef * gradient * scale
    count, k = max(count, 1), 0
    loss[0] = policy + bonus + value_coef * value
    if flags & _POLICY:
        stats[0], stats[1], stats[2] = policy, kl_sum / count, clipped_count / count
        stats[3], stats[4], k = ratio_sum / count, ratio_max, 5
    if flags & _DUAL_CLIP:
        stats[k], k = dual_count / count, k + 1
    if flags & _ENTROPY:
        stats[k], k = entropy_sum / count, k + 1
    if flags & _REFERENCE:
        stats[k], k = ref_sum / count, k + 1
    if flags & _VALUE:
        stats[k], k = value, k + 1
    if flags & _VALUE_CLIP:
        stats[k] = value_count / count


@lru_cache(maxsize=1)
def _compiled() -> Compiled:
    """The C function, and the numba object that keeps its machine code alive."""
    pointers = (*[types.CPointer(types.float32)] * 14, types.CPointer(types.uint8))
    return c_function(_loop, [*pointers, *[types.float32] * 8, *[types.float64] * 2, *[types.int64] * 4])


ALL = [_compiled]  # what `ppo-fast compile` compiles


def supports(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, tensors: LossTensors, options: LossOptions
) -> bool:
    """Return whether `forward` can compute it: small contiguous fp32 tensors that may be read by address."""
    first = required(values if logprobs is None else logprobs)
    if not 0 < first.numel() <= MOST or tensors.value_mask is not None or tensors.cu_seqlens is not None:
        return False
    given = [x for x in (logprobs, entropy, values, *tensors) if x is not None]
    for x in given:
        if not ((x.dtype is torch.float32 or x is tensors.mask) and x.is_contiguous()):
            return False
    return addressable(*given, options.denominator if isinstance(options.denominator, Tensor) else None)


def _aggregation(options: LossOptions, T: int) -> tuple[float, float, int]:
    """denominator, norm and flags of the loop."""
    if options.aggregation == "token-sum":
        return 1.0, 1.0, 0
    given = options.denominator.detach() if isinstance(options.denominator, Tensor) else options.denominator
    denominator = 0.0 if given is None else float(given)
    if options.aggregation == "token-mean":
        return denominator, 1.0, 0
    norm = 1.0
    if options.aggregation == "seq-mean-token-sum-norm":
        norm = float(T if options.norm_length is None else options.norm_length)
    return denominator, norm, _SEQUENCES | (_ROW_MEANS if options.aggregation == "seq-mean-token-mean" else 0)


def forward(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    tensors: LossTensors,
    options: LossOptions,
    num_stats: int,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """loss, statistics in the order of options.wanted_stats, and the gradients by logprobs, entropy and values."""
    first = required(values if logprobs is None else logprobs)
    T = first.shape[-1] if first.ndim else 1
    denominator, norm, flags = _aggregation(options, T)
    given = (
        (_POLICY, logprobs),
        (_VALUE, values),
        (_MASK, tensors.mask),
        (_ENTROPY, entropy),
        (_VALUE_CLIP, options.value_clip),
    )
    more = ((_DUAL_CLIP, options.dual_clip), (_WEIGHTS, tensors.weights), (_REFERENCE, tensors.ref_logprobs))
    flags |= sum(bit for bit, x in (*given, *more) if x is not None)
    inputs = [logprobs, tensors.old_logprobs, tensors.advantages, tensors.weights, tensors.ref_logprobs, entropy]
    inputs += [values, tensors.old_values, tensors.returns]
    gradients = tuple(None if x is None else torch.empty_like(x) for x in (logprobs, values, entropy))
    loss, stats = first.new_empty(()), first.new_empty(num_stats)
    pointers = [0 if x is None else x.data_ptr() for x in (*inputs, *gradients, loss, stats, tensors.mask)]
    scalars = [
        1 - options.clip_low,
        1 + options.clip_high,
        options.log_ratio_clamp,
        options.dual_clip or 0.0,
        options.value_clip or 0.0,
    ]
    scalars += [options.value_coef, options.entropy_coef, options.kl_coef, denominator, norm]
    _compiled()[0](*pointers, *scalars, first.numel() // T, T, KL_ESTIMATORS.index(options.kl_estimator), flags)
    return loss, stats, (gradients[0], gradients[2], gradients[1])
