"""The Triton losses under torch.compile: one opaque operator, and a backward that the compiler can fuse.

Numbers (clips, coefficients, a given denominator) enter the operator in a CPU tensor, as floats they would be constants
of the graph and each new value a compilation. NaN stands for None there.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.kernels.loss.options import ALL_STATS, LossOptions, LossTensors

_NUMBERS = tuple(name for name in LossOptions._fields if name not in ("kl_estimator", "aggregation"))
_TENSORS = ("logprobs", "entropy", "values", *LossTensors._fields, "denominator")
_SCHEMA = "({}, Tensor numbers, str kl_estimator, str aggregation, bool[] needs) -> (Tensor, Tensor, Tensor)"


def _pack(o: LossOptions) -> tuple[Tensor | None, Tensor]:
    """A denominator that is a tensor, and every number."""
    given = o.denominator if isinstance(o.denominator, Tensor) else None
    numbers = [math.nan if x is None or isinstance(x, Tensor) else x for x in (getattr(o, name) for name in _NUMBERS)]
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return given, torch.stack([zero + x for x in numbers])  # torch.full and torch.tensor would make x a constant


def _unpack(given: Tensor | None, numbers: Tensor, kl_estimator: str, aggregation: str) -> LossOptions:
    values = [None if math.isnan(x) else x for x in numbers.tolist()]
    o = LossOptions(**dict(zip(_NUMBERS, values, strict=True)), kl_estimator=kl_estimator, aggregation=aggregation)
    return o if given is None else o._replace(denominator=given)


def make_compiled(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],  # (..., needs) -> loss, statistics, workspace
    kept: Callable[[int, int], int],  # (steps, gradients) -> what the backward needs of the workspace
    stored: Callable[..., list[tuple[Tensor, Tensor] | None]],  # (workspace, shapes) -> gradients and their scales
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers ppo_fast::<name>; gives run(logprobs, entropy, values, tensors, options, needs) -> loss, statistics."""

    def launch(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy, values, *tensors, given, numbers, kl_estimator, aggregation, needs = args
        o = _unpack(given, numbers, kl_estimator, aggregation)
        loss, stats, workspace = forward(logprobs, entropy, values, LossTensors(*tensors), o, tuple(needs))
        steps = (values if logprobs is None else logprobs).numel()
        return loss, stats, workspace[: kept(steps, sum(needs))]

    def shapes(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        like = args[2] if args[0] is None else args[0]
        options = {"dtype": torch.float32, "device": like.device}
        workspace = torch.empty(kept(like.numel(), sum(args[-1])), **options)
        return torch.empty((), **options), torch.empty(len(ALL_STATS), **options), workspace

    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        wanted = [x if need else None for x, need in zip(inputs[:3], inputs[-1], strict=True)]
        ctx.shapes = [None if x is None else x.shape for x in wanted]
        ctx.dtypes = [None if x is None else x.dtype for x in wanted]
        ctx.absent = [None] * (len(inputs) - 3)
        ctx.save_for_backward(output[2])
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, *ctx.absent
        found = stored(ctx.saved_tensors[0], ctx.shapes)
        pairs = zip(found, ctx.dtypes, strict=True)
        made = [None if x is None else (x[0] * (grad_loss * x[1])).to(dtype) for x, dtype in pairs]
        return *made, *ctx.absent

    schema = _SCHEMA.format(", ".join(f"Tensor? {tensor}" for tensor in _TENSORS))
    operator = torch.library.custom_op(f"ppo_fast::{name}", launch, mutates_args=(), schema=schema)
    operator.register_fake(shapes)
    operator.register_autograd(backward, setup_context=setup)

    def run(
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        t: LossTensors,
        o: LossOptions,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor]:
        given, numbers = _pack(o)
        inputs = (logprobs, entropy, values, *t, given, numbers)
        loss, stats, _ = operator(*inputs, o.kl_estimator, o.aggregation, list(needs))
        return loss, stats.detach()

    return run
