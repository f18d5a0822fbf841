"""PPO's scalar losses in one compiled loop for a CPU: what eager_loss.py uses for small fp32 tensors where numba is.

Same terms, gradients and statistics as eager_loss.py, in one traversal instead of about forty: at 256 steps, as in
classic RL, an operation of PyTorch costs some microseconds whatever its size. Sums are kept in fp64. The kernel is a
C callback, as those of cpu.py.

Bytes: every input is read once and every gradient is written once.
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

from ppo_fast.kernels.loss_op import LossOptions, LossTensors

_POLICY, _VALUE, _MASK, _ENTROPY, _VALUE_CLIP = (1 << bit for bit in range(5))
# Sums that the loop makes, in this order
_SUMS = ("count", "objective", "clipped", "kl", "ratio", "ratio_max", "entropy", "squared", "value_clipped")
MOST = 1 << 15  # steps; beyond, PyTorch's threads pay


def _loop(
    logprobs: Any,  # (N,) each
    old_logprobs: Any,
    advantages: Any,
    entropy: Any,
    values: Any,
    old_values: Any,
    returns: Any,
    mask: Any,
    d_logprobs: Any,  # outputs
    d_values: Any,
    d_entropy: Any,
    sums: Any,  # (9,) fp64, see _SUMS
    low: float,  # 1 - clip_low
    high: float,
    clamp: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    normaliser: float,  # 0 stands for the count
    N: int,
    options: int,
) -> None:
    zero, one, half = low - low, (low - low) + 1, (low - low) + 0.5
    divisor = normaliser
    if normaliser == zero:
        number = N
        if options & _MASK:
            number = 0
            for i in range(N):
                number += 1 if mask[i] != 0 else 0
        divisor = one * max(number, 1)
    count, objective_sum, clipped_count, kl_sum = 0, 0.0, 0, 0.0
    ratio_sum, ratio_max, entropy_sum, squared_sum, value_clipped = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(N):
        if options & _MASK:  # noqa: SIM102
            if mask[i] == 0:
                if options & _POLICY:
                    d_logprobs[i] = zero
                if options & _ENTROPY:
                    d_entropy[i] = zero
                if options & _VALUE:
                    d_values[i] = zero
                continue
        count += 1
        if options & _POLICY:
            d, advantage = logprobs[i] - old_logprobs[i], advantages[i]
            exponent = min(max(d, -clamp), clamp) if d == d else d
            ratio = math.exp(exponent)
            inside = min(max(ratio, low), high) if ratio == ratio else ratio
            plain, clipped = advantage * ratio, advantage * inside
            order = one if clipped > plain else (-one if clipped < plain else zero)
            objective_sum += clipped if clipped < plain else plain
            clipped_count += 1 if clipped < plain else 0
            slope = plain
            if ratio != inside:
                slope = slope * (one - half * (one - order))
            if d != exponent:
                slope = slope * zero
            d_logprobs[i] = -slope / divisor
            kl_sum += (ratio - one) - d
            ratio_sum += ratio
            if ratio > ratio_max or ratio != ratio:
                ratio_max = ratio
            if options & _ENTROPY:
                entropy_sum += entropy[i]
                d_entropy[i] = -entropy_coef / divisor
        if options & _VALUE:
            v, r = values[i], returns[i]
            error = v - r
            squared, slope = error * error, error
            if options & _VALUE_CLIP:
                bottom, top = old_values[i] - value_clip, old_values[i] + value_clip
                inside = min(max(v, bottom), top) if v == v else v
                other = (inside - r) * (inside - r)
                order = one if squared > other else (-one if squared < other else zero)
                value_clipped += 1 if squared < other else 0
                if v != inside:
                    slope = slope * (one - half * (one - order))
                squared = other if squared < other else squared
            squared_sum += squared
            d_values[i] = value_coef * slope / divisor
    sums[0], sums[1], sums[2], sums[3], sums[4] = count, objective_sum, clipped_count, kl_sum, ratio_sum
    sums[5], sums[6], sums[7], sums[8] = ratio_max, entropy_sum, squared_sum, value_clipped


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable[..., None], Any]:
    """The C function, and the numba object that keeps its machine code alive."""
    floats = types.CPointer(types.float32)
    pointers = (*[floats] * 7, types.CPointer(types.uint8), *[floats] * 3, types.CPointer(types.float64))
    signature = types.void(*pointers, *[types.float32] * 7, types.int64, types.int64)
    options = {"nopython": True, "error_model": "numpy"}
    try:
        code = numba.cfunc(signature, cache=True, **options)(_loop)
    except (RuntimeError, OSError):  # no directory that numba could write its cache to
        code = numba.cfunc(signature, **options)(_loop)
    c_types = [ctypes.c_void_p] * 12 + [ctypes.c_float] * 7 + [ctypes.c_int64] * 2
    return ctypes.CFUNCTYPE(None, *c_types)(code.address), code


def takes(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, t: LossTensors, o: LossOptions
) -> bool:
    """Whether `forward` can do it: small contiguous fp32 tensors on a CPU, and the plain options."""
    first = values if logprobs is None else logprobs
    assert first is not None
    if not first.is_cpu or not 0 < first.numel() <= MOST:
        return False
    if o.aggregation != "token-mean" or o.dual_clip is not None or isinstance(o.denominator, Tensor):
        return False
    if t.weights is not None or t.ref_logprobs is not None or t.value_mask is not None or t.cu_seqlens is not None:
        return False
    floats = (logprobs, entropy, values, t.old_logprobs, t.advantages, t.old_values, t.returns)
    plain = all(type(x) in (Tensor, torch.nn.Parameter, type(None)) for x in (*floats, t.mask))  # not fake, not sharded
    return plain and all(
        x is None or (x.is_contiguous() and x.dtype in (torch.float32, torch.bool)) for x in (*floats, t.mask)
    )


def forward(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    t: LossTensors,
    o: LossOptions,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """loss, statistics in the order of loss_op.stat_names, and the gradients by logprobs, entropy and values."""
    inputs = (logprobs, t.old_logprobs, t.advantages, entropy, values, t.old_values, t.returns, t.mask)
    outputs = [None if x is None else torch.empty_like(x) for x in (logprobs, values, entropy)]
    sums = (ctypes.c_double * len(_SUMS))()
    options = (_POLICY if logprobs is not None else 0) | (_VALUE if values is not None else 0)
    options |= (_MASK if t.mask is not None else 0) | (_ENTROPY if entropy is not None else 0)
    options |= _VALUE_CLIP if o.value_clip is not None else 0
    first = values if logprobs is None else logprobs
    pointers = [0 if x is None else x.data_ptr() for x in (*inputs, *outputs)]
    scalars = (1 - o.clip_low, 1 + o.clip_high, o.log_ratio_clamp, o.value_clip or 0.0, o.value_coef, o.entropy_coef)
    scalars = (*scalars, 0.0 if o.denominator is None else float(o.denominator))
    _compiled()[0](*pointers, ctypes.addressof(sums), *scalars, first.numel(), options)  # type: ignore[union-attr]
    count = max(sums[0], 1.0)
    normaliser = count if o.denominator is None else float(o.denominator)
    policy, value, loss = -sums[1] / normaliser, 0.5 * sums[7] / normaliser, 0.0
    stats: dict[str, float] = {}
    if logprobs is not None:
        loss = policy
        stats = {"policy_loss": policy, "approx_kl": sums[3] / count, "clip_fraction": sums[2] / count}
        stats |= {"ratio_mean": sums[4] / count, "ratio_max": sums[5]}
    if entropy is not None:
        loss -= o.entropy_coef * sums[6] / normaliser
        stats["entropy"] = sums[6] / count
    if values is not None:
        loss += o.value_coef * value
        stats["value_loss"] = value
        if o.value_clip is not None:
            stats["value_clip_fraction"] = sums[8] / count
    return torch.tensor(loss), torch.tensor(list(stats.values())), (outputs[0], outputs[2], outputs[1])
