"""PPO's scalar losses for autograd and torch.compile, in front of launch.py, eager.py and cpu.py.

Gradients flow to logprobs, entropy and values; every other tensor is a constant, and there is no second derivative.
All implementations compute the gradients in the forward, where they share terms with the loss; the backward multiplies
them by the upstream gradient.

torch.compile traces eager.py, and uses one opaque operator for launch.py, with a backward that the compiler can fuse.
Numbers (clips, coefficients, a denominator) enter the operator in a CPU tensor: as floats they would be constants of
the graph, and each new value a compilation. NaN represents None there.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ppo_fast.kernels.common.autograd import Context, direct_apply
from ppo_fast.kernels.common.memory import required
from ppo_fast.kernels.common.numba_loops import numba_works
from ppo_fast.kernels.common.scalars import number_tensor
from ppo_fast.kernels.loss import eager
from ppo_fast.kernels.loss.options import ALL_STATS, LossOptions, LossTensors, named_stats, wanted_stats

Needs = tuple[bool, bool, bool]  # which gradients are wanted: of logprobs, entropy, values


def compute_loss(
    logprobs: Tensor | None,  # None for value_loss
    entropy: Tensor | None,
    values: Tensor | None,  # None for policy_loss
    tensors: LossTensors,
    options: LossOptions,
    *,
    use_triton: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss with a graph, and detached statistics: reference.policy_loss, reference.value_loss, reference.ppo_loss."""
    compute = _triton_loss if use_triton else _torch_loss
    return compute(logprobs, entropy, values, tensors, options)


def refuse_double_backward() -> None:
    """Raise RuntimeError in a backward that autograd runs with gradients enabled, to differentiate it again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "policy_loss, value_loss and ppo_loss have no double backward: call backward without create_graph=True, "
            "or use ppo_fast.kernels.reference"
        )


def _wanted_gradients(logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None) -> Needs:
    if not torch.is_grad_enabled():
        return False, False, False
    return (
        logprobs is not None and logprobs.requires_grad,
        entropy is not None and entropy.requires_grad,
        values is not None and values.requires_grad,
    )


# Triton


class _TritonContext(Context[tuple[Tensor]], Protocol):
    launch_backward: Callable[[Tensor, Tensor, torch.Size, tuple[torch.dtype | None, ...]], list[Tensor | None]]
    shape: torch.Size
    dtypes: tuple[torch.dtype | None, ...]


class _TritonLoss(torch.autograd.Function):
    """Its last argument is all that it needs besides the inputs with a gradient, because every argument takes time.
    An output takes time, too, and gets a gradient of zeros: the statistics are appended to a list instead."""

    @staticmethod
    def forward(
        ctx: _TritonContext,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        call: tuple[LossTensors, LossOptions, Needs, int, list[Tensor]],
    ) -> Tensor:
        from ppo_fast.kernels.loss import launch

        tensors, options, needs, wanted, results = call
        loss, stats, workspace = launch.forward(logprobs, entropy, values, tensors, options, needs, wanted)
        ctx.save_for_backward(workspace)
        ctx.launch_backward = launch.backward  # an import in the backward would take another microsecond
        ctx.set_materialize_grads(False)
        ctx.shape = required(values if logprobs is None else logprobs).shape
        ctx.dtypes = (
            logprobs.dtype if needs[0] and logprobs is not None else None,
            entropy.dtype if needs[1] and entropy is not None else None,
            values.dtype if needs[2] and values is not None else None,
        )
        results.append(stats)
        return loss

    @staticmethod
    def backward(ctx: _TritonContext, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grad_loss is None:
            return None, None, None, None
        if grad_loss.is_neg():
            grad_loss = grad_loss.resolve_neg()
        (workspace,) = ctx.saved_tensors
        return *ctx.launch_backward(workspace, grad_loss, ctx.shape, ctx.dtypes), None


_apply_triton = direct_apply(_TritonLoss)


def _triton_loss(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    tensors: LossTensors,
    options: LossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    needs = _wanted_gradients(logprobs, entropy, values)
    wanted, names = wanted_stats(logprobs is not None, entropy is not None, values is not None, tensors, options)
    if torch.compiler.is_compiling():
        denominator, numbers = _pack(options)
        inputs = (logprobs, entropy, values, *tensors, denominator, numbers)
        loss, stats, _ = _operator(*inputs, options.kl_estimator, options.aggregation, list(needs))
        return loss, named_stats(stats.detach(), names)
    if True in needs:
        results: list[Tensor] = []
        loss = _apply_triton(logprobs, entropy, values, (tensors, options, needs, wanted, results))
        return loss, named_stats(results[0], names)
    from ppo_fast.kernels.loss import launch

    loss, stats, _ = launch.forward(logprobs, entropy, values, tensors, options, needs, wanted)
    return loss, named_stats(stats, names)


# Triton under torch.compile

_NUMBERS = tuple(name for name in LossOptions._fields if name not in ("kl_estimator", "aggregation"))
_TENSORS = ("logprobs", "entropy", "values", *LossTensors._fields, "denominator")
_SCHEMA = "({}, Tensor numbers, str kl_estimator, str aggregation, bool[] needs) -> (Tensor, Tensor, Tensor)"


def _pack(options: LossOptions) -> tuple[Tensor | None, Tensor]:
    """A denominator that is a tensor, and every number."""
    denominator = options.denominator if isinstance(options.denominator, Tensor) else None
    given = options if denominator is None else options._replace(denominator=None)
    return denominator, torch.stack([number_tensor(getattr(given, name)) for name in _NUMBERS])


def _unpack(denominator: Tensor | None, numbers: Tensor, kl_estimator: str, aggregation: str) -> LossOptions:
    values = [None if math.isnan(x) else x for x in numbers.tolist()]
    named: dict[str, float | str | None] = dict(zip(_NUMBERS, values, strict=True))
    named |= {"kl_estimator": kl_estimator, "aggregation": aggregation}
    options = LossOptions._make(named[name] for name in LossOptions._fields)
    return options if denominator is None else options._replace(denominator=denominator)


_Optional = Tensor | None
# _TENSORS, numbers, kl_estimator, aggregation, needs
_Inputs = tuple[_Optional, _Optional, _Optional, *tuple[_Optional, ...], Tensor, str, str, list[bool]]


def _run_operator(*inputs: *_Inputs) -> tuple[Tensor, Tensor, Tensor]:
    from ppo_fast.kernels.loss import launch

    logprobs, entropy, values, *others, numbers, kl_estimator, aggregation, needs = inputs
    *tensors, denominator = others
    options = _unpack(denominator, numbers, kl_estimator, aggregation)
    out = launch.forward(logprobs, entropy, values, LossTensors(*tensors), options, tuple(needs))
    loss, stats, workspace = out
    steps = required(values if logprobs is None else logprobs).numel()
    return loss, stats, workspace[: launch.saved_size(steps, sum(needs))]


def _operator_shapes(*inputs: *_Inputs) -> tuple[Tensor, Tensor, Tensor]:
    from ppo_fast.kernels.loss import launch

    like = required(inputs[2] if inputs[0] is None else inputs[0])
    stats = torch.empty(len(ALL_STATS), dtype=torch.float32, device=like.device)
    workspace = stats.new_empty(launch.saved_size(like.numel(), sum(inputs[-1])))
    return stats.new_empty(()), stats, workspace


class _OperatorContext(Context[tuple[Tensor]], Protocol):
    shapes: list[torch.Size | None]
    dtypes: list[torch.dtype | None]
    absent: list[None]  # the gradients of constants


def _set_up_operator(ctx: _OperatorContext, inputs: _Inputs, output: tuple[Tensor, Tensor, Tensor]) -> None:
    wanted = [x if need else None for x, need in zip(inputs[:3], inputs[-1], strict=True)]
    ctx.shapes = [None if x is None else x.shape for x in wanted]
    ctx.dtypes = [None if x is None else x.dtype for x in wanted]
    ctx.absent = [None] * (len(inputs) - 3)
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _differentiate_operator(ctx: _OperatorContext, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    from ppo_fast.kernels.loss import launch

    if grad_loss is None:
        return None, None, None, *ctx.absent
    saved = launch.saved_gradients(ctx.saved_tensors[0], ctx.shapes)
    pairs = zip(saved, ctx.dtypes, strict=True)
    gradients = [None if x is None else (x[0] * (grad_loss * x[1])).to(dtype) for x, dtype in pairs]
    return *gradients, *ctx.absent


_operator = torch.library.custom_op(
    "ppo_fast::ppo_loss",
    _run_operator,
    mutates_args=(),
    schema=_SCHEMA.format(", ".join(f"Tensor? {tensor}" for tensor in _TENSORS)),
)
_operator.register_fake(_operator_shapes)
_operator.register_autograd(_differentiate_operator, setup_context=_set_up_operator)


# PyTorch, and numba where it is installed


class _EagerContext(Context[tuple[Tensor | None, ...]], Protocol):
    """Three gradients are saved, and those of their divisors that are tensors."""

    divisors: list[float | None]
    dtypes: list[torch.dtype | None]


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _EagerContext,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        tensors: LossTensors,
        options: LossOptions,
        needs: Needs,
        names: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        loss, stats, gradients, divisors = eager.forward(logprobs, entropy, values, tensors, options, needs)
        on_device = [x if isinstance(x, Tensor) else None for x in divisors]
        ctx.save_for_backward(*gradients, *on_device)
        ctx.divisors = [None if isinstance(x, Tensor) else x for x in divisors]
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, values)]
        ordered = [stats[name] for name in names]
        ctx.mark_non_differentiable(*ordered)
        ctx.set_materialize_grads(False)
        return loss, *ordered

    @staticmethod
    def backward(ctx: _EagerContext, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grad_loss is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        out: list[Tensor | None] = [None, None, None]
        for i in range(3):
            gradient, on_device = saved[i], saved[3 + i]
            divisor = ctx.divisors[i] if on_device is None else on_device
            if gradient is not None and divisor is not None:
                out[i] = (gradient * (grad_loss / divisor)).to(dtype=ctx.dtypes[i])
        return *out, None, None, None, None


class _NumbaContext(Context[tuple[()]], Protocol):
    gradients: tuple[Tensor | None, ...]


class _NumbaLoss(torch.autograd.Function):
    """The same in one compiled loop. The statistics are one tensor, because each output of a Function takes time."""

    @staticmethod
    def forward(
        ctx: _NumbaContext,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        tensors: LossTensors,
        options: LossOptions,
        num_stats: int,
    ) -> tuple[Tensor, Tensor]:
        from ppo_fast.kernels.loss import cpu

        loss, stats, ctx.gradients = cpu.forward(logprobs, entropy, values, tensors, options, num_stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: _NumbaContext, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grad_loss is None:
            return (None,) * 6
        return *(None if x is None else x * grad_loss for x in ctx.gradients), None, None, None


def numba_supports(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    tensors: LossTensors,
    options: LossOptions,
) -> bool:
    """Return whether one compiled loop can compute this loss."""
    first = values if logprobs is None else logprobs
    if first is None or not first.is_cpu or torch.compiler.is_compiling() or not numba_works():
        return False
    from ppo_fast.kernels.loss import cpu

    return cpu.supports(logprobs, entropy, values, tensors, options)


def _traceable(options: LossOptions, device: torch.device) -> LossOptions:
    """The numbers as tensors: torch.compile would make a float a constant, and compile again for the next value."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return LossOptions._make(zero + x if isinstance(x, (int, float)) else x for x in options)


def _torch_loss(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    tensors: LossTensors,
    options: LossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    _, names = wanted_stats(logprobs is not None, entropy is not None, values is not None, tensors, options)
    if numba_supports(logprobs, entropy, values, tensors, options):
        loss, stats = _NumbaLoss.apply(logprobs, entropy, values, tensors, options, len(names))
        return loss, dict(zip(names, stats.unbind(), strict=True))
    if torch.compiler.is_compiling():
        options = _traceable(options, required(values if logprobs is None else logprobs).device)
    needs = _wanted_gradients(logprobs, entropy, values)
    if True in needs:
        loss, *ordered = _EagerLoss.apply(logprobs, entropy, values, tensors, options, needs, names)
        if torch.compiler.is_compiling():  # torch 2.11 ignores mark_non_differentiable there
            ordered = [x.detach() for x in ordered]
        return loss, dict(zip(names, ordered, strict=True))
    with torch.no_grad():  # a constant that requires a gradient gets none here either
        loss, named, _, _ = eager.forward(logprobs, entropy, values, tensors, options, needs)
    return loss, {name: named[name] for name in names}
