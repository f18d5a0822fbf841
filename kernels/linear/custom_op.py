"""linear_logprobs and linear_ppo_loss as opaque operators, for torch.compile: packing and shapes, no arithmetic.

Numbers enter in a CPU tensor: a float would be a constant of the graph, and each new value a compilation. An operator
does not know how many tokens count before it runs, so what is [n] in eager mode is [N] here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.kernels.linear.chunks import Gradients, counted_rows
from ppo_fast.kernels.linear.function import (
    RowMath,
    Settings,
    differentiate_logprobs,
    likes,
    logprobs_forward,
    ppo_forward,
    refuse_double_backward,
    scaled_all,
)
from ppo_fast.kernels.loss.options import ALL_STATS, LossOptions, LossTensors

_SETTINGS = ("temperature", "softcap", "logit_scale")
_RATIO_OPTIONS = ("clip_low", "clip_high", "dual_clip", "log_ratio_clamp")
_OPTIONS = (*_RATIO_OPTIONS, "entropy_coef", "kl_coef", "denominator", "norm_length")
_CHUNKS = "SymInt? chunk_bytes, ScalarType? logits_dtype, SymInt? num_counted"
_STATS = ALL_STATS[:8]  # those of the policy; an absent one is 0


def _pack(numbers: list[Any]) -> Tensor:
    """Numbers as a CPU tensor, NaN for None and for tensors. torch.tensor would make them constants of the graph."""
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + (math.nan if x is None or isinstance(x, Tensor) else x) for x in numbers])


def _unpack(scalars: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    numbers = scalars.tolist()[: len(names)]
    return {name: None if math.isnan(x) else x for name, x in zip(names, numbers, strict=True)}


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only."""
    return like.new_empty(0) if x is None else x


def _settings(
    scalars: Tensor, chunk_bytes: int | None, logits_dtype: torch.dtype | None, num_counted: int | None
) -> Settings:
    chunks: dict[str, Any] = {"chunk_bytes": chunk_bytes, "logits_dtype": logits_dtype, "num_counted": num_counted}
    return Settings(**_unpack(scalars, _SETTINGS), **chunks)


def _arithmetic(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def logprobs_operator(math_: RowMath) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """ppo_fast::linear_logprobs_<backend> and its backward; statistics are [4, N] here, since n is not known."""

    def forward(
        hidden, weight, bias, tokens, mask, scalars, with_entropy, needs, chunk_bytes, logits_dtype, num_counted
    ):
        s = _settings(scalars, chunk_bytes, logits_dtype, num_counted)
        out = logprobs_forward(math_, hidden, weight, bias, tokens, mask, s, with_entropy, keep_statistics=True)
        logprobs, entropy, statistics, rows = out
        if rows.chosen is not None:
            statistics = statistics.new_zeros(4, tokens.numel()).index_copy_(1, rows.chosen, statistics)
        return logprobs, _or_empty(entropy, logprobs), statistics

    def backward(
        g, h, hidden, weight, bias, tokens, mask, statistics, scalars, needs, chunk_bytes, logits_dtype, num_counted
    ):
        s = _settings(scalars, chunk_bytes, logits_dtype, num_counted)
        rows = counted_rows(mask, num_counted, tokens.numel())
        if rows.chosen is not None:
            statistics = statistics.index_select(1, rows.chosen)
        out = differentiate_logprobs(math_, (g, h), hidden, weight, bias, tokens, rows, statistics, s, tuple(needs))
        return tuple(_or_empty(x, statistics) for x in out)

    tensors = "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask"
    operator = torch.library.custom_op(
        f"ppo_fast::linear_logprobs_{math_.name}",
        forward,
        mutates_args=(),
        schema=f"({tensors}, Tensor scalars, bool with_entropy, bool[] needs, {_CHUNKS}) -> (Tensor, Tensor, Tensor)",
    )
    operator_backward = torch.library.custom_op(
        f"ppo_fast::linear_logprobs_{math_.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor? g, Tensor? h, {tensors}, Tensor statistics, Tensor scalars, bool[] needs, {_CHUNKS})"
        " -> (Tensor, Tensor, Tensor)",
    )

    def shapes(hidden, weight, bias, tokens, mask, scalars, with_entropy, *_):
        wide = {"dtype": _arithmetic(hidden, weight), "device": hidden.device}
        entropy = torch.empty(tokens.shape if with_entropy else (0,), **wide)
        return torch.empty(tokens.shape, **wide), entropy, torch.empty((4, math.prod(tokens.shape)), **wide)

    def backward_shapes(g, h, hidden, weight, bias, tokens, mask, statistics, scalars, needs, *_):
        wanted = zip((hidden, weight, bias), needs, strict=True)
        return tuple(x.new_empty(x.shape) if need else statistics.new_empty(0) for x, need in wanted)

    def setup_context(ctx, inputs, output):
        hidden, weight, bias, tokens, mask, scalars, with_entropy, *ctx.options = inputs
        ctx.save_for_backward(hidden, weight, bias, tokens, mask, output[2], scalars)
        ctx.with_entropy = with_entropy
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    def differentiate(ctx, g, h, _):
        refuse_double_backward("linear_logprobs")
        out = operator_backward(g, h if ctx.with_entropy else None, *ctx.saved_tensors, *ctx.options)
        return *(x if need else None for x, need in zip(out, ctx.options[0], strict=True)), *[None] * 8

    operator.register_fake(shapes)
    operator_backward.register_fake(backward_shapes)
    operator.register_autograd(differentiate, setup_context=setup_context)
    return operator


def ppo_operator(math_: RowMath) -> Callable[..., tuple[Tensor, ...]]:
    """ppo_fast::linear_ppo_loss_<backend>: loss, statistics, logp, entropy, and for the backward three gradients
    without the divisor of the loss, and 1 / that divisor."""

    def forward(*inputs):
        hidden, weight, bias, tokens, old, advantages, mask, weights, ref, cu_seqlens, denominator, *rest = inputs
        scalars, kl_estimator, aggregation, needs, *chunks = rest
        t = LossTensors(old, advantages, mask, weights, ref, cu_seqlens=cu_seqlens)
        options = _unpack(scalars[len(_SETTINGS) :], _OPTIONS)
        o = LossOptions(**options, kl_estimator=kl_estimator, aggregation=aggregation)
        o = o if denominator is None else o._replace(denominator=denominator)
        out = ppo_forward(math_, hidden, weight, bias, tokens, t, o, _settings(scalars, *chunks), tuple(needs))
        d_hidden, d_weight, d_bias = out.gradients
        if d_hidden is not None and out.chosen is not None:
            d_hidden = d_hidden.new_zeros(tokens.numel(), d_hidden.shape[1]).index_copy_(0, out.chosen, d_hidden)
        stats = torch.stack([out.stats.get(name, torch.zeros_like(out.loss)) for name in _STATS])
        made = (_or_empty(x, out.logprobs) for x in (d_hidden, d_weight, d_bias, out.inverse))
        return out.loss, stats, out.logprobs, out.entropy, *made

    def shapes(*inputs):
        hidden, weight, bias, tokens, *_ = inputs
        needs, wide = inputs[-4], {"dtype": _arithmetic(hidden, weight), "device": hidden.device}
        sizes = [(math.prod(tokens.shape), hidden.shape[-1]), weight.shape, None if bias is None else bias.shape]
        made = (torch.empty(size if need else (0,), **wide) for size, need in zip(sizes, needs, strict=True))
        tokenwise = (torch.empty(tokens.shape, **wide) for _ in range(2))
        inverse = torch.empty(() if any(needs) else (0,), **wide)
        loss_dtype = torch.result_type(torch.empty((), **wide), torch.empty((), dtype=torch.float32))
        return (
            torch.empty((), **wide | {"dtype": loss_dtype}),
            torch.empty(len(_STATS), **wide),
            *tokenwise,
            *made,
            inverse,
        )

    def setup_context(ctx, inputs, output):
        ctx.likes, ctx.needs = likes(*inputs[:3]), inputs[-4]
        ctx.save_for_backward(*output[4:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_loss, *_):
        refuse_double_backward("linear_ppo_loss")
        if grad_loss is None:
            return (None,) * 18
        *made, inverse = ctx.saved_tensors
        gradients = Gradients(*(x if need else None for x, need in zip(made, ctx.needs, strict=True)))
        return *scaled_all(gradients, grad_loss * inverse, None, ctx.likes), *[None] * 15

    tensors = "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? old_logprobs, Tensor advantages"
    tensors += ", Tensor? mask, Tensor? weights, Tensor? ref_logprobs, Tensor? cu_seqlens, Tensor? denominator"
    operator = torch.library.custom_op(
        f"ppo_fast::linear_ppo_loss_{math_.name}",
        forward,
        mutates_args=(),
        schema=f"({tensors}, Tensor scalars, str kl_estimator, str aggregation, bool[] needs, {_CHUNKS})"
        f" -> ({', '.join(['Tensor'] * 8)})",
    )
    operator.register_fake(shapes)
    operator.register_autograd(differentiate, setup_context=setup_context)
    return operator


def pack_options(s: Settings, o: LossOptions) -> Tensor:
    return _pack([getattr(s, name) for name in _SETTINGS] + [getattr(o, name) for name in _OPTIONS])


def pack_settings(s: Settings) -> Tensor:
    return _pack([getattr(s, name) for name in _SETTINGS])
