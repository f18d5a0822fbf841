"""PPO's scalar losses in Triton: reference.policy_loss, reference.value_loss and reference.ppo_loss, one code for all.

Forward: one launch reads every per-token tensor once, writes the gradients (fp32, before normalisation: the number of
counted steps is not known yet) and one column of partial sums per program; a second launch of one program adds the
columns in a fixed order, divides, and writes loss, statistics and the two scales that turn the stored gradients into
real ones. Backward: one launch, gradient = stored * (upstream * scale), cast to the input's dtype.

A program takes a block of steps of the flattened tensors; where the weight of a step depends on its sequence it takes
one sequence (a row, or a piece of cu_seqlens). loss_terms.py computes a block, loss_kernels.py has the kernels,
loss_launch.py the launches, loss_compile.py the operator for torch.compile.

Bytes for N steps in fp32, ppo_loss with a mask: 25 N read and 8 N written forward, 8 N read and 8 N written backward.
"""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.kernels.common.autograd import direct_apply
from ppo_fast.kernels.loss import launch as loss_launch
from ppo_fast.kernels.loss.custom_op import make_compiled
from ppo_fast.kernels.loss.options import (
    LossOptions,
    LossTensors,
    named_stats,
    public_functions,
    refuse_double_backward,
    wanted_stats,
)

_compiled = make_compiled("ppo_loss", loss_launch.forward, loss_launch.kept, loss_launch.stored)


class _Loss(torch.autograd.Function):
    """Its last argument is all that it needs besides the inputs with a gradient: every argument takes time. So does an
    output, which gets a gradient of zeros, too: statistics go to a list."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        call: tuple[LossTensors, LossOptions, tuple[bool, ...], int, list[Tensor]],
    ) -> Tensor:
        t, o, needs, wanted, results = call
        loss, stats, workspace = loss_launch.forward(logprobs, entropy, values, t, o, needs, wanted)
        ctx.save_for_backward(workspace)
        ctx.set_materialize_grads(False)
        shape = (values if logprobs is None else logprobs).shape
        dtypes = (  # of the gradients that are wanted
            logprobs.dtype if needs[0] else None,
            entropy.dtype if needs[1] else None,
            values.dtype if needs[2] else None,
        )
        ctx.like = shape, dtypes
        results.append(stats)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grad_loss is None:
            return None, None, None, None
        if grad_loss.is_neg():
            grad_loss = grad_loss.resolve_neg()
        (workspace,) = ctx.saved_tensors
        return *loss_launch.backward(workspace, grad_loss, *ctx.like), None


_apply = direct_apply(_Loss)


def _loss(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, t: LossTensors, o: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    needs = (False, False, False)
    if torch.is_grad_enabled():
        needs = (
            logprobs is not None and logprobs.requires_grad,
            entropy is not None and entropy.requires_grad,
            values is not None and values.requires_grad,
        )
    wanted, names = wanted_stats(logprobs is not None, entropy is not None, values is not None, t, o)
    if torch.compiler.is_compiling():
        loss, stats = _compiled(logprobs, entropy, values, t, o, needs)
    elif True in needs:
        results: list[Tensor] = []
        loss = _apply(logprobs, entropy, values, (t, o, needs, wanted, results))
        (stats,) = results
    else:
        loss, stats, _ = loss_launch.forward(logprobs, entropy, values, t, o, needs, wanted)
    return loss, named_stats(stats, names)


policy_loss, value_loss, ppo_loss = public_functions(_loss)
