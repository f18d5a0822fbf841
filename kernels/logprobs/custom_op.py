"""token_logprobs around its two backends: autograd, torch.compile and in-place gradients. No arithmetic.

A backend is two functions. forward(logits, tokens, mask, temperature, with_entropy) returns (logprobs, entropy,
statistics); backward(grad_logprobs, grad_entropy, logits, tokens, mask, statistics, temperature, inplace) returns
d loss / d logits. statistics is (4, N), private to the backend; entropy is None where it is not wanted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.autograd import direct_apply


class Backend(NamedTuple):
    """The arithmetic of token_logprobs, eager and as two opaque operators that torch.compile can trace."""

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor]]
    backward: Callable[..., Tensor]
    operator: Callable[..., tuple[Tensor, Tensor | None, Tensor]]


def compute_dtype(logits: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def allocate(logits: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Uninitialised (logprobs, entropy, statistics)."""
    dtype = compute_dtype(logits)
    logprobs = torch.empty_like(tokens, dtype=dtype, memory_format=torch.contiguous_format)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    return logprobs, entropy, torch.empty(4, tokens.numel(), dtype=dtype, device=logits.device)


def _tensors(logprobs: Tensor, entropy: Tensor | None, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For operators, which return no None."""
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, statistics


def may_overlap(x: Tensor) -> bool:
    """Whether two elements of x may share an address: expanded and sliding-window views."""
    reach = 0
    for stride, size in sorted((x.stride(i), x.shape[i]) for i in range(x.ndim) if x.shape[i] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "token_logprobs has no double backward: call backward without create_graph=True, "
            "or use ppo_fast.kernels.reference.token_logprobs"
        )


class _TokenLogprobs(torch.autograd.Function):
    """Its last argument is all that it needs besides the logits: every argument takes time."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, call: tuple[Tensor, Tensor | None, float, bool, bool, Backend]
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens, mask, temperature, with_entropy, inplace_backward, backend = call
        logprobs, entropy, statistics = backend.forward(logits, tokens, mask, temperature, with_entropy)
        ctx.save_for_backward(logits, tokens, mask, statistics)
        ctx.options = temperature, inplace_backward, backend
        ctx.set_materialize_grads(False)
        return logprobs if entropy is None else (logprobs, entropy)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None) -> tuple:
        _refuse_double_backward()
        logits, tokens, mask, statistics = ctx.saved_tensors
        temperature, inplace, backend = ctx.options
        if grad_logprobs is None and grad_entropy is None:
            return None, None
        if grad_logprobs is not None and grad_logprobs.is_neg():
            grad_logprobs = grad_logprobs.resolve_neg()
        if grad_entropy is not None and grad_entropy.is_neg():
            grad_entropy = grad_entropy.resolve_neg()
        upstream = grad_logprobs, grad_entropy
        memory = logits.detach() if inplace else logits
        grad = backend.backward(*upstream, memory, tokens, mask, statistics, temperature, inplace)
        if inplace:
            # Autograd now refuses whatever else has saved these logits, a second backward through here included.
            torch.autograd.graph.increment_version(logits)
        return grad, None


_apply = direct_apply(_TokenLogprobs)


def make_backend(
    name: str, forward: Callable[..., tuple[Tensor, Tensor | None, Tensor]], backward: Callable
) -> Backend:
    """Registers ppo_fast::<name> and ppo_fast::<name>_backward. temperature is a 0-dim CPU tensor there: a float
    would be a constant of the graph, and each new value a compilation."""

    def run_forward(logits, tokens, mask, temperature, with_entropy):
        return _tensors(*forward(logits, tokens, mask, temperature.item(), with_entropy))

    def run_backward(grad_logprobs, grad_entropy, logits, tokens, mask, statistics, temperature):
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

    def setup_context(ctx, inputs, output):
        logits, tokens, mask, temperature, _ = inputs
        ctx.save_for_backward(logits, tokens, mask, output[2], temperature)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    def differentiate(ctx, grad_logprobs, grad_entropy, _):
        _refuse_double_backward()
        logits, tokens, mask, statistics, temperature = ctx.saved_tensors
        entropy_gradient = None if grad_entropy is None or grad_entropy.shape != tokens.shape else grad_entropy
        upstream = grad_logprobs, entropy_gradient
        return operator_backward(*upstream, logits, tokens, mask, statistics, temperature), None, None, None, None

    operator.register_fake(
        lambda logits, tokens, mask, temperature, with_entropy: _tensors(*allocate(logits, tokens, with_entropy))
    )
    operator_backward.register_fake(lambda g, h, logits, *_: torch.empty_like(logits))
    operator.register_autograd(differentiate, setup_context=setup_context)
    return Backend(forward, backward, operator)


def run(
    backend: Backend,
    logits: Tensor,  # [..., V]
    tokens: Tensor,  # [...]
    mask: Tensor | None,  # [...]
    temperature: float,
    with_entropy: bool,
    inplace_backward: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The public token_logprobs with a backend's arithmetic."""
    if inplace_backward and may_overlap(logits):
        raise ValueError(
            "token_logprobs: inplace_backward=True needs logits whose elements have addresses of their own, "
            f"got shape {tuple(logits.shape)} with strides {logits.stride()}; pass logits.contiguous()"
        )
    if torch.compiler.is_compiling():
        # The compiler plans the buffers itself, so inplace_backward has nothing to add there. The scalar is a sum
        # because torch.full and torch.tensor would make a constant of it, and of every new value a compilation.
        scalar = torch.zeros((), dtype=torch.float64, device="cpu") + temperature
        logprobs, entropy, _ = backend.operator(logits, tokens, mask, scalar, with_entropy)
        return (logprobs, entropy) if with_entropy else logprobs
    if torch.is_grad_enabled() and logits.requires_grad:
        return _apply(logits, (tokens, mask, float(temperature), with_entropy, inplace_backward, backend))
    logprobs, entropy, _ = backend.forward(logits, tokens, mask, float(temperature), with_entropy)
    return logprobs if entropy is None else (logprobs, entropy)
