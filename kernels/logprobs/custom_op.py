"""token_logprobs for autograd and torch.compile, in front of launch.py and eager.py.

Both have the same two functions. forward(logits, tokens, mask, temperature, with_entropy) returns logprobs, entropy
(None if it is not wanted) and statistics [4, N], whose content is private to the implementation.
backward(grad_logprobs, grad_entropy, logits, tokens, mask, statistics, temperature, inplace) returns
d loss / d logits.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ppo_fast.kernels.common.autograd import Context, direct_apply
from ppo_fast.kernels.common.scalars import as_tensor
from ppo_fast.kernels.logprobs import eager
from ppo_fast.kernels.logprobs.options import LogprobOptions, allocate


def token_logprobs(
    logits: Tensor,  # [..., V]
    tokens: Tensor,  # [...]
    mask: Tensor | None,  # [...]
    options: LogprobOptions,
    *,
    use_triton: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """logp, or (logp, entropy), with a graph: reference.token_logprobs."""
    temperature, with_entropy, inplace_backward = options
    if torch.compiler.is_compiling():  # which plans the buffers itself: inplace_backward would save nothing
        operator = triton_operator if use_triton else torch_operator
        logprobs, entropy, _ = operator(logits, tokens, mask, as_tensor(temperature), with_entropy)
        return (logprobs, entropy) if with_entropy else logprobs
    functions = _functions(use_triton=use_triton)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _apply(logits, (tokens, mask, float(temperature), with_entropy, inplace_backward, functions))
    logprobs, entropy, _ = functions.forward(logits, tokens, mask, float(temperature), with_entropy)
    return logprobs if entropy is None else (logprobs, entropy)


class _Functions(NamedTuple):
    """The arithmetic of one implementation."""

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor]]
    backward: Callable[..., Tensor]


def _functions(*, use_triton: bool) -> _Functions:
    if use_triton:
        from ppo_fast.kernels.logprobs import launch

        return _Functions(launch.forward, launch.backward)
    return _Functions(eager.forward, eager.backward)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "token_logprobs has no double backward: call backward without create_graph=True, "
            "or use ppo_fast.kernels.reference.token_logprobs"
        )


class _Context(Context[tuple[Tensor, Tensor, Tensor | None, Tensor]], Protocol):
    options: tuple[float, bool, _Functions]  # temperature, whether the gradient overwrites the logits


class _TokenLogprobs(torch.autograd.Function):
    """Its last argument is all that it needs besides the logits, because every argument takes time."""

    @staticmethod
    def forward(
        ctx: _Context, logits: Tensor, call: tuple[Tensor, Tensor | None, float, bool, bool, _Functions]
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens, mask, temperature, with_entropy, inplace_backward, functions = call
        logprobs, entropy, statistics = functions.forward(logits, tokens, mask, temperature, with_entropy)
        ctx.save_for_backward(logits, tokens, mask, statistics)
        ctx.options = temperature, inplace_backward, functions
        ctx.set_materialize_grads(False)
        return logprobs if entropy is None else (logprobs, entropy)

    @staticmethod
    def backward(
        ctx: _Context, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor | None, None]:
        _refuse_double_backward()
        logits, tokens, mask, statistics = ctx.saved_tensors
        temperature, inplace, functions = ctx.options
        if grad_logprobs is None and grad_entropy is None:
            return None, None
        if grad_logprobs is not None and grad_logprobs.is_neg():
            grad_logprobs = grad_logprobs.resolve_neg()
        if grad_entropy is not None and grad_entropy.is_neg():
            grad_entropy = grad_entropy.resolve_neg()
        upstream = grad_logprobs, grad_entropy
        memory = logits.detach() if inplace else logits
        grad = functions.backward(*upstream, memory, tokens, mask, statistics, temperature, inplace)
        if inplace:
            # Autograd then rejects every other use of these saved logits, including a second backward through here.
            torch.autograd.graph.increment_version(logits)
        return grad, None


_apply = direct_apply(_TokenLogprobs)


def _without_none(logprobs: Tensor, entropy: Tensor | None, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For operators, which return no None."""
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, statistics


# Of logits, tokens, mask, statistics and temperature
_OperatorContext = Context[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]]


def _make_operator(name: str, *, use_triton: bool) -> torch.library.CustomOpDef:
    """Register ppo_fast::<name> and ppo_fast::<name>_backward. temperature is a 0-dim CPU tensor there: a float
    would be a constant of the graph, and each new value a compilation."""

    def run_forward(
        logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        forward = _functions(use_triton=use_triton).forward
        return _without_none(*forward(logits, tokens, mask, temperature.item(), with_entropy))

    def run_backward(
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        statistics: Tensor,
        temperature: Tensor,
    ) -> Tensor:
        backward = _functions(use_triton=use_triton).backward
        upstream = grad_logprobs, grad_entropy
        return backward(*upstream, logits, tokens, mask, statistics, temperature.item(), False)

    operator = torch.library.custom_op(
        f"ppo_fast::{name}",
        run_forward,
        mutates_args=(),
        schema="(Tensor logits, Tensor tokens, Tensor? mask, Tensor temperature, bool with_entropy)"
        " -> (Tensor, Tensor, Tensor)",
    )
    operator_backward = torch.library.custom_op(
        f"ppo_fast::{name}_backward",
        run_backward,
        mutates_args=(),
        schema="(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor tokens, Tensor? mask,"
        " Tensor statistics, Tensor temperature) -> Tensor",
    )

    def set_up(
        ctx: _OperatorContext,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, bool],
        output: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        logits, tokens, mask, temperature, _ = inputs
        ctx.save_for_backward(logits, tokens, mask, output[2], temperature)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    def differentiate(
        ctx: _OperatorContext, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        logits, tokens, mask, statistics, temperature = ctx.saved_tensors
        if grad_entropy is not None and grad_entropy.shape != tokens.shape:  # of the empty tensor
            grad_entropy = None
        upstream = grad_logprobs, grad_entropy
        return operator_backward(*upstream, logits, tokens, mask, statistics, temperature), None, None, None, None

    operator.register_fake(
        lambda logits, tokens, mask, temperature, with_entropy: _without_none(*allocate(logits, tokens, with_entropy))
    )
    operator_backward.register_fake(lambda g, h, logits, *_: torch.empty_like(logits))
    operator.register_autograd(differentiate, setup_context=set_up)
    return operator


triton_operator = _make_operator("token_logprobs_triton", use_triton=True)
torch_operator = _make_operator("token_logprobs_torch", use_triton=False)
