"""Argument checks of the public operations: every error names the argument, the expected and the actual value.

Shapes, dtypes, devices and Python values are always checked. Values inside tensors are checked only where that costs
nothing but a little time (`readable`): on a GPU the check would have to wait for the device, and while a graph is
recorded there are no values yet. Valid arguments take little time: a check is one condition, and its message
is composed after it has failed.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ppo_fast.kernels.common import memory
from ppo_fast.kernels.common.memory import jit_tracer, readable, transforms_active
from ppo_fast.kernels.loss.options import LossOptions
from ppo_fast.kernels.reference import AGGREGATIONS, KL_ESTIMATORS

# Options that may be numbers in tensors. They are constants: no operation has a gradient for them.
OPTIONS = frozenset(
    [
        "clip",
        "clip_high",
        "clip_low",
        "critic_lam",
        "denominator",
        "dual_clip",
        "entropy_coef",
        "eps",
        "gamma",
        "kl_coef",
        "lam",
        "log_ratio_clamp",
        "logit_scale",
        "min_std",
        "norm_length",
        "score_clip",
        "softcap",
        "temperature",
        "value_clip",
        "value_coef",
    ]
)


def constants(operation: str, options: Mapping[str, object]) -> None:
    """Raise TypeError for an option that requires a gradient, which it would not get."""
    for name, x in options.items():
        if isinstance(x, Tensor) and name in OPTIONS and x.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{operation}: {name} is a constant and gets no gradient, but the tensor requires one; pass"
                f" {name}.detach() or a number"
            )


def compiled(operation: str, options: Mapping[str, object]) -> None:
    """Check what `resolved` checks, as far as torch.compile can trace it; operators receive resolved tensors anyway.

    Raises:
        NotImplementedError: a level of forward-mode AD is open. Compiled code would lose the tangents.
        TypeError: an option that requires a gradient.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{operation}: forward-mode AD is not supported: call backward")
    constants(operation, options)


def ordinary(args: tuple[object, ...], options: Mapping[str, object]) -> bool:
    """Return whether no argument needs `resolved`: every tensor is plain memory, and no option requires a gradient."""
    if transforms_active() or forward_ad._current_level >= 0 or jit_tracer() is not None:
        return False
    for x in args:
        if isinstance(x, Tensor) and (type(x) not in memory.PLAIN_TYPES or x.is_neg() or x._is_zerotensor()):
            return False
    for name, x in options.items():
        if isinstance(x, Tensor):
            if type(x) not in memory.PLAIN_TYPES or x.is_neg() or x._is_zerotensor():
                return False
            if name in OPTIONS and x.requires_grad:
                return False
    return True


def resolved(
    operation: Callable[..., object], args: tuple[object, ...], options: Mapping[str, object]
) -> inspect.BoundArguments:
    """Return the arguments with every tensor made plain where that is possible.

    After a graph break torch.compile would trace this function separately, without the tangents.

    Raises:
        NotImplementedError: torch.jit.trace is active, a tensor belongs to a transform of torch.func or has a tangent.
        TypeError: a DTensor, or an option that requires a gradient.
    """
    resolve = torch.compiler.disable(_resolved) if "torch._dynamo" in sys.modules else _resolved
    return resolve(operation, args, options)


def _resolved(
    operation: Callable[..., object], args: tuple[object, ...], options: Mapping[str, object]
) -> inspect.BoundArguments:
    bound, name = inspect.signature(operation).bind(*args, **options), operation.__name__
    if jit_tracer() is not None:
        raise NotImplementedError(
            f"{name}: torch.jit.trace is not supported, since its graph would keep the lengths and the masks of this"
            " call; use torch.compile or torch.export"
        )
    for argument, x in bound.arguments.items():
        if isinstance(x, Tensor):
            memory.refuse_transformed(name, argument, x)
            memory.refuse_distributed(name, argument, x)
            bound.arguments[argument] = memory.plain(x)
    constants(name, options)
    return bound


def floating(name: str, x: Tensor | None) -> Tensor:
    """Check a floating tensor, and return it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point (fp16, bf16, fp32 or fp64), got {x.dtype}")
    return x


def shape(name: str, x: Tensor, expected: tuple[int, ...], like: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have the shape of {like}, {tuple(expected)}; got {tuple(x.shape)}")


def device(name: str, x: Tensor, expected: torch.device, like: str) -> None:
    if x.device != expected:
        raise ValueError(f"{name} must be on the device of {like}, {expected}; got {x.device}")


def matching(name: str, x: Tensor | None, like: Tensor, like_name: str) -> None:
    """Check a floating tensor for the shape and the device of another."""
    x = floating(name, x)
    shape(name, x, like.shape, like_name)
    device(name, x, like.device, like_name)


def alike(shape: tuple[int, ...], dtype: torch.dtype, place: torch.device, *tensors: Tensor | None) -> bool:
    """Return whether all tensors have that shape, dtype and device; if not, `matching` decides about an error."""
    try:
        for x in tensors:
            if x is not None and not (x.dtype is dtype and x.shape == shape and x.device == place):
                return False
    except AttributeError:  # not a tensor
        return False
    return True


def flag(name: str, x: Tensor | None, expected: tuple[int, ...], place: torch.device, like: str) -> Tensor | None:
    """Check a mask or another 0/1 tensor and return it as bool; numbers are converted."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(x).__name__}")
    if x.shape != expected:
        shape(name, x, expected, like)
    if x.device != place:
        device(name, x, place, like)
    if x.dtype is torch.bool:
        return x
    if readable(x) and not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(f"{name} must be bool, or hold only 0 and 1; got other values in a {x.dtype} tensor")
    return x != 0


def token_ids(
    tokens: Tensor, mask: Tensor | None, expected: tuple[int, ...], place: torch.device, like: str, size: int
) -> None:
    """Check int32 or int64 ids of the given shape; on a CPU each counted one must be in [0, size)."""
    if not isinstance(tokens, Tensor) or (tokens.dtype is not torch.int64 and tokens.dtype is not torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int32 or int64 tensor, got {got}")
    if tokens.shape != expected:
        shape("tokens", tokens, expected, like)
    if tokens.device != place:
        device("tokens", tokens, place, like)
    if not readable(tokens) or not tokens.numel():
        return
    outside = (tokens < 0) | (tokens >= size)
    if mask is not None:
        outside = outside & mask
    if outside.any():
        raise IndexError(
            f"tokens must be in [0, {size}) wherever the mask counts, got {int(tokens[outside][0])}"
            f" (and {int(outside.sum()) - 1} more)"
        )


def positive(name: str, x: float) -> None:
    if not x > 0:
        raise ValueError(f"{name} must be positive, got {x!r}")


def temperature(x: float) -> None:
    """Check a sampling temperature: positive, and such that it and its inverse are normal fp32 numbers."""
    if not 1e-37 <= x <= 1e37:
        positive("temperature", x)
        raise ValueError(f"temperature must be between 1e-37 and 1e37, got {x!r}")


def not_negative(name: str, x: float) -> None:
    if not x >= 0:
        raise ValueError(f"{name} must not be negative, got {x!r}")


def one_of(name: str, x: str, allowed: tuple[str, ...]) -> None:
    if x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {x!r}")


def discount(name: str, x: float | Tensor, rows: tuple[int, ...], place: torch.device) -> None:
    """Check gamma or lam: a float in [0, 1], or a tensor of them, one for each row."""
    if isinstance(x, Tensor):
        floating(name, x)
        if x.ndim:
            shape(name, x, rows, "the rows")
        device(name, x, place, "rewards")
        inside = not readable(x) or x.numel() == 0
        if not inside:
            lowest, highest = x.aminmax()  # NaN if there is one
            inside = lowest.item() >= 0 and highest.item() <= 1
    else:
        inside = 0 <= x <= 1
    if not inside:
        raise ValueError(f"{name} must be in [0, 1], got {x}")


def cu_seqlens(x: Tensor | None, packed: Tensor, name: str) -> None:
    """Check [S + 1] int32 or int64 boundaries, from 0 to the length of the packed dimension, never falling."""
    if x is None:
        return
    if packed.ndim != 1:
        raise ValueError(f"{name} must have one dimension when cu_seqlens is given, got shape {tuple(packed.shape)}")
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 1 or not x.shape[0]:
        raise ValueError(f"cu_seqlens must have shape [S + 1], got {tuple(x.shape)}")
    if x.device != packed.device:
        device("cu_seqlens", x, packed.device, name)
    if readable(x):
        if int(x[0]) != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {int(x[0])}")
        if int(x[-1]) != len(packed):
            raise ValueError(f"cu_seqlens must end at {len(packed)}, the length of {name}; got {int(x[-1])}")
        if bool((x.diff() < 0).any()):
            raise ValueError("cu_seqlens must not fall")


def denominator(x: float | Tensor | None, aggregation: str, like: Tensor) -> None:
    """Check a count of tokens or sequences: a number or a 0-dim tensor, at least 1."""
    if x is None:
        return
    if aggregation == "token-sum":
        raise ValueError("denominator has no meaning with aggregation='token-sum', which divides by nothing")
    if isinstance(x, Tensor):
        if x.ndim:
            raise ValueError(f"denominator must be a number or a 0-dim tensor, got shape {tuple(x.shape)}")
        if x.device.type != "cpu":
            device("denominator", x, like.device, "the losses' inputs")
        if not readable(x):
            return
    if not x >= 1:
        raise ValueError(f"denominator must be at least 1, got {x}")


def min_std(x: float | Tensor, place: torch.device, like: str) -> float | Tensor:
    """Check a lower bound of a standard deviation; return it as a number where it can be read without waiting."""
    if isinstance(x, Tensor):
        floating("min_std", x)
        if x.ndim:
            raise ValueError(f"min_std must be a number or a 0-dim tensor, got shape {tuple(x.shape)}")
        if x.device.type != "cpu":
            device("min_std", x, place, like)
        if not readable(x):
            return x
        x = x.item()
    if not 0 <= x < math.inf:
        raise ValueError(f"min_std must be a finite number and not negative, got {x}")
    return x


Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


KLEstimator = Literal["k1", "k2", "k3", "abs"]


_Arguments = ParamSpec("_Arguments")


_Result = TypeVar("_Result")


def public_operation(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function a public operation, which receives plain tensors: see `resolved`."""

    @functools.wraps(function)
    def operation(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            compiled(function.__name__, kwargs)
        elif not ordinary(args, kwargs):
            bound = resolved(function, args, kwargs)
            return function(*bound.args, **bound.kwargs)
        return function(*args, **kwargs)

    return operation


def policy_options(options: LossOptions) -> None:
    """Check the options of the policy term."""
    clip_low, clip_high, dual_clip, log_ratio_clamp, _, _, kl_estimator, *_ = options
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        not_negative("clip_high", clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}")
    if not log_ratio_clamp > 0:
        positive("log_ratio_clamp", log_ratio_clamp)
    if kl_estimator not in KL_ESTIMATORS:
        one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)


def loss_aggregation(name: str, x: Tensor, options: LossOptions, boundaries: Tensor | None) -> None:
    """Check how the terms of the loss are averaged; x is what the loss is computed from."""
    aggregation, given, norm_length = options[-3:]
    if aggregation not in AGGREGATIONS:
        one_of("aggregation", aggregation, AGGREGATIONS)
    if boundaries is not None:
        cu_seqlens(boundaries, x, name)
    if given is not None:
        denominator(given, aggregation, x)
    if norm_length is not None:
        positive("norm_length", norm_length)
        if aggregation != "seq-mean-token-sum-norm":
            raise ValueError(f"norm_length belongs to aggregation='seq-mean-token-sum-norm', got {aggregation!r}")
    elif aggregation == "seq-mean-token-sum-norm" and boundaries is not None:
        raise ValueError("aggregation='seq-mean-token-sum-norm' needs norm_length when cu_seqlens is given")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")


def may_overlap(x: Tensor) -> bool:
    """Whether two elements of x may have one address, as in expanded and sliding-window views."""
    reach = 0
    for stride, size in sorted((x.stride(i), x.shape[i]) for i in range(x.ndim) if x.shape[i] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
