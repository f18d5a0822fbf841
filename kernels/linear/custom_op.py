"""linear_logprobs and linear_ppo_loss for autograd and torch.compile, in front of steps.py.

In eager mode an autograd.Function runs the steps; without a wanted gradient they run without one. torch.compile uses
opaque operators. Numbers enter an operator in a CPU tensor: a float would be a constant of the graph, and each new
value a compilation. The number of counted tokens is not known before an operator runs, so what is [n] in eager mode is
[N] there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ppo_fast.kernels.common.autograd import Context, direct_apply
from ppo_fast.kernels.common.memory import required
from ppo_fast.kernels.common.scalars import number_tensor
from ppo_fast.kernels.linear import eager
from ppo_fast.kernels.linear.chunks import Gradients, Rows, counted_rows
from ppo_fast.kernels.linear.options import HeadOptions
from ppo_fast.kernels.linear.steps import (
    Epilogue,
    PPOResult,
    ShapeAndDtype,
    differentiate_logprobs,
    logprobs_forward,
    ppo_forward,
    scale_gradients,
    scaled_all,
    shapes_and_dtypes,
)
from ppo_fast.kernels.loss.options import ALL_STATS, LossOptions, LossTensors, named_stats, wanted_stats


def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    tokens: Tensor,  # [...]
    mask: Tensor | None,  # [...]
    head_options: HeadOptions,
    *,
    with_entropy: bool,
    use_triton: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """logp, or (logp, entropy), with a graph: reference.linear_logprobs, a chunk of tokens at a time."""
    needs = _wanted_gradients(hidden, weight, bias)
    if torch.compiler.is_compiling():
        operator = _triton_logprobs if use_triton else _torch_logprobs
        scalars, chunking = _pack_head(head_options), head_options[3:]
        inputs = hidden, weight, bias, tokens, mask, scalars, with_entropy, list(needs)
        logprobs, entropy, _ = operator(*inputs, *chunking)
        return (logprobs, entropy) if with_entropy else logprobs
    epilogue = _epilogue(use_triton=use_triton)
    if True in needs:
        return _apply_logprobs(hidden, weight, bias, _LogprobsCall(tokens, mask, head_options, with_entropy, epilogue))
    out = logprobs_forward(
        epilogue, hidden, weight, bias, tokens, mask, head_options, with_entropy, keep_statistics=False
    )
    return out[0] if out[1] is None else (out[0], out[1])


def linear_ppo_loss(
    hidden: Tensor,  # [..., T, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    tokens: Tensor,  # [..., T]
    tensors: LossTensors,
    options: LossOptions,
    head_options: HeadOptions,
    *,
    use_triton: bool,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Loss with a graph, statistics, logp and entropy: reference.linear_ppo_loss. Gradients are computed here."""
    needs = _wanted_gradients(hidden, weight, bias)
    if torch.compiler.is_compiling():
        operator = _triton_ppo if use_triton else _torch_ppo
        denominator = options.denominator if isinstance(options.denominator, Tensor) else None
        inputs = hidden, weight, bias, tokens, *tensors[:5], tensors.cu_seqlens, denominator
        kinds, chunking = (options.kl_estimator, options.aggregation), head_options[3:]
        out = operator(*inputs, _pack_head(head_options), _pack_options(options), *kinds, list(needs), *chunking)
        loss, packed, logprobs, entropy, *_ = out
        stats = named_stats(packed.detach(), wanted_stats(True, True, False, tensors, options)[1])
        return loss, stats, logprobs.detach(), entropy.detach()
    epilogue = _epilogue(use_triton=use_triton)
    if True in needs:
        results: list[PPOResult] = []
        call = _PPOCall(tokens, tensors, options, head_options, needs, epilogue, results)
        loss = _apply_ppo(hidden, weight, bias, call)
        return loss, results[0].stats, results[0].logprobs, results[0].entropy
    result = ppo_forward(epilogue, hidden, weight, bias, tokens, tensors, options, head_options, needs)
    return result.loss, result.stats, result.logprobs, result.entropy


def _epilogue(*, use_triton: bool) -> Epilogue:
    if use_triton:
        from ppo_fast.kernels.linear import launch

        return launch.EPILOGUE
    return eager.EPILOGUE


def _wanted_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple([enabled and x is not None and x.requires_grad for x in tensors])


def _refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"create_graph=True: {name} has no second derivative; that of ppo_fast.kernels.reference.{name} has"
        )


# Eager mode


class _LogprobsCall(NamedTuple):
    """What _LinearLogprobs needs besides the inputs with a gradient, in one argument: every argument takes time."""

    tokens: Tensor
    mask: Tensor | None
    head_options: HeadOptions
    with_entropy: bool
    epilogue: Epilogue


_Optional = Tensor | None


class _LogprobsContext(Context[tuple[Tensor, Tensor, _Optional, Tensor, _Optional, _Optional, Tensor]], Protocol):
    options: tuple[HeadOptions, Epilogue, int]  # and the number of counted rows


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LogprobsContext, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _LogprobsCall
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens, mask, head_options, with_entropy, epilogue = call
        logprobs, entropy, statistics, rows = logprobs_forward(
            epilogue, hidden, weight, bias, tokens, mask, head_options, with_entropy, keep_statistics=True
        )
        ctx.save_for_backward(hidden, weight, bias, tokens, rows.indices, rows.count_mismatch, statistics)
        ctx.options = head_options, epilogue, rows.total
        ctx.set_materialize_grads(False)
        return logprobs if entropy is None else (logprobs, entropy)

    @staticmethod
    def backward(
        ctx: _LogprobsContext, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        _refuse_double_backward("linear_logprobs")
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        hidden, weight, bias, tokens, indices, count_mismatch, statistics = ctx.saved_tensors
        head_options, epilogue, total = ctx.options
        rows, needs = Rows(indices, total, count_mismatch), tuple(ctx.needs_input_grad[:3])
        upstream = (
            None if grad_logprobs is None else grad_logprobs.resolve_neg(),
            None if grad_entropy is None else grad_entropy.resolve_neg(),
        )
        gradients = differentiate_logprobs(
            epilogue, upstream, hidden, weight, bias, tokens, rows, statistics, head_options, needs
        )
        return *gradients, None


class _PPOCall(NamedTuple):
    """The same for _LinearPPO."""

    tokens: Tensor
    tensors: LossTensors
    options: LossOptions
    head_options: HeadOptions
    needs: tuple[bool, ...]
    epilogue: Epilogue
    results: list[PPOResult]  # gets what has no graph: every output takes time, too, and gets a gradient of zeros


class _PPOContext(Context[tuple[_Optional, _Optional, _Optional, _Optional, _Optional]], Protocol):
    rest: tuple[Epilogue, list[ShapeAndDtype | None]]


class _LinearPPO(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _PPOContext, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _PPOCall) -> Tensor:
        tokens, tensors, options, head_options, needs, epilogue, results = call
        out = ppo_forward(epilogue, hidden, weight, bias, tokens, tensors, options, head_options, needs)
        ctx.save_for_backward(*out.gradients, out.inverse, out.indices)
        ctx.set_materialize_grads(False)
        ctx.rest = epilogue, shapes_and_dtypes(hidden, weight, bias)
        results.append(out._replace(gradients=Gradients(None, None, None), inverse=None, indices=None))
        return out.loss

    @staticmethod
    def backward(ctx: _PPOContext, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward("linear_ppo_loss")
        if grad_loss is None:
            return None, None, None, None
        *gradients, inverse, indices = ctx.saved_tensors
        if grad_loss.is_neg():
            grad_loss = grad_loss.resolve_neg()
        epilogue, like = ctx.rest
        return *scale_gradients(epilogue, Gradients(*gradients), grad_loss, inverse, indices, like), None


_apply_logprobs, _apply_ppo = direct_apply(_LinearLogprobs), direct_apply(_LinearPPO)


# torch.compile

_RATIO_OPTIONS = ("clip_low", "clip_high", "dual_clip", "log_ratio_clamp")
_NUMBERS = (*_RATIO_OPTIONS, "entropy_coef", "kl_coef", "denominator", "norm_length")
_CHUNKING = "SymInt? chunk_bytes, ScalarType? logits_dtype, SymInt? num_counted, ScalarType? compute_dtype"
_STATS = ALL_STATS[:8]  # those of the policy; an absent one is 0


def _pack(numbers: Sequence[float | Tensor | None]) -> Tensor:
    """Numbers, or numbers in tensors, as a CPU tensor; NaN for None. torch.tensor would make them constants."""
    return torch.stack([number_tensor(x) for x in numbers])


def _pack_head(head_options: HeadOptions) -> Tensor:
    return _pack(head_options[:3])


def _pack_options(options: LossOptions) -> Tensor:
    given = {name: getattr(options, name) for name in _NUMBERS}
    if isinstance(given["denominator"], Tensor):  # it is an argument of the operator
        given["denominator"] = None
    return _pack(list(given.values()))


def _unpack(scalars: Tensor) -> list[float | None]:
    return [None if math.isnan(x) else x for x in scalars.tolist()]


_Chunking = int | torch.dtype | None  # the arguments of _CHUNKING


def _unpack_head(scalars: Tensor, *chunking: _Chunking) -> HeadOptions:
    return HeadOptions._make((*_unpack(scalars), *chunking))


def _unpack_options(scalars: Tensor, kl_estimator: str, aggregation: str, denominator: Tensor | None) -> LossOptions:
    named: dict[str, float | str | Tensor | None] = dict(zip(_NUMBERS, _unpack(scalars), strict=True))
    named |= {"kl_estimator": kl_estimator, "aggregation": aggregation}
    if denominator is not None:
        named["denominator"] = denominator
    return LossOptions._make((LossOptions._field_defaults | named).values())


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only."""
    return like.new_empty(0) if x is None else x


def _new_empty(size: Sequence[int], hidden: Tensor, weight: Tensor) -> Tensor:
    """A tensor in the dtype of the arithmetic."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return torch.empty(size, dtype=dtype, device=hidden.device)


class _LogprobsOperatorContext(Context[tuple[Tensor, Tensor, _Optional, Tensor, _Optional, Tensor, Tensor]], Protocol):
    with_entropy: bool
    needs: list[bool]
    chunking: list[_Chunking]


# hidden, weight, bias, tokens, mask, scalars, with_entropy, needs, and those of _CHUNKING
_LogprobsInputs = tuple[
    Tensor, Tensor, _Optional, Tensor, _Optional, Tensor, bool, list[bool],
    int | None, torch.dtype | None, int | None, torch.dtype | None,
]  # fmt: skip


def _logprobs_operator(name: str, *, use_triton: bool) -> torch.library.CustomOpDef:
    """Register ppo_fast::<name> and ppo_fast::<name>_backward; statistics are [4, N], since n is not known."""

    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        scalars: Tensor,
        with_entropy: bool,
        needs: list[bool],
        *chunking: _Chunking,
    ) -> tuple[Tensor, Tensor, Tensor]:
        epilogue, head_options = _epilogue(use_triton=use_triton), _unpack_head(scalars, *chunking)
        logprobs, entropy, statistics, rows = logprobs_forward(
            epilogue, hidden, weight, bias, tokens, mask, head_options, with_entropy, keep_statistics=True
        )
        statistics = required(statistics)
        if rows.indices is not None:
            statistics = statistics.new_zeros(4, tokens.numel()).index_copy_(1, rows.indices, statistics)
        return logprobs, _or_empty(entropy, logprobs), statistics

    def backward(
        g: Tensor | None,
        h: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        statistics: Tensor,
        scalars: Tensor,
        needs: list[bool],
        *chunking: _Chunking,
    ) -> tuple[Tensor, ...]:
        epilogue, head_options = _epilogue(use_triton=use_triton), _unpack_head(scalars, *chunking)
        rows = counted_rows(mask, head_options.num_counted, tokens.numel())
        if rows.indices is not None:
            statistics = statistics.index_select(1, rows.indices)
        gradients = differentiate_logprobs(
            epilogue, (g, h), hidden, weight, bias, tokens, rows, statistics, head_options, tuple(needs)
        )
        return tuple(_or_empty(x, statistics) for x in gradients)

    tensors = "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask"
    operator = torch.library.custom_op(
        f"ppo_fast::{name}",
        forward,
        mutates_args=(),
        schema=f"({tensors}, Tensor scalars, bool with_entropy, bool[] needs, {_CHUNKING}) -> (Tensor, Tensor, Tensor)",
    )
    operator_backward = torch.library.custom_op(
        f"ppo_fast::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor? g, Tensor? h, {tensors}, Tensor statistics, Tensor scalars, bool[] needs, {_CHUNKING})"
        " -> (Tensor, Tensor, Tensor)",
    )

    def shapes(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        scalars: Tensor,
        with_entropy: bool,
        *_: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = tokens.shape, tokens.shape if with_entropy else (0,), (4, math.prod(tokens.shape))
        logprobs, entropy, statistics = (_new_empty(size, hidden, weight) for size in sizes)
        return logprobs, entropy, statistics

    def backward_shapes(
        g: Tensor | None,
        h: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        statistics: Tensor,
        scalars: Tensor,
        needs: list[bool],
        *_: object,
    ) -> tuple[Tensor, ...]:
        wanted = zip((hidden, weight, bias), needs, strict=True)
        return tuple(x.new_empty(x.shape) if need else statistics.new_empty(0) for x, need in wanted)

    def set_up(ctx: _LogprobsOperatorContext, inputs: _LogprobsInputs, output: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, weight, bias, tokens, mask, scalars, ctx.with_entropy, ctx.needs, *ctx.chunking = inputs
        ctx.save_for_backward(hidden, weight, bias, tokens, mask, output[2], scalars)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    def differentiate(
        ctx: _LogprobsOperatorContext, g: Tensor | None, h: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        _refuse_double_backward("linear_logprobs")
        out = operator_backward(g, h if ctx.with_entropy else None, *ctx.saved_tensors, ctx.needs, *ctx.chunking)
        return *(x if need else None for x, need in zip(out, ctx.needs, strict=True)), *[None] * 9

    operator.register_fake(shapes)
    operator_backward.register_fake(backward_shapes)
    operator.register_autograd(differentiate, setup_context=set_up)
    return operator


class _PPOOperatorContext(Context[tuple[Tensor, Tensor, Tensor, Tensor]], Protocol):
    like: list[ShapeAndDtype | None]
    needs: list[bool]
    absent: list[None]  # the gradients of constants


_PPOInputs = tuple[
    # hidden, weight, bias, tokens
    Tensor, Tensor, _Optional, Tensor,
    # old_logprobs, advantages, mask, weights, ref_logprobs, cu_seqlens, denominator
    _Optional, Tensor, _Optional, _Optional, _Optional, _Optional, _Optional,
    # head_scalars, scalars, kl_estimator, aggregation, needs
    Tensor, Tensor, str, str, list[bool],
    # chunk_bytes, logits_dtype, num_counted, compute_dtype
    int | None, torch.dtype | None, int | None, torch.dtype | None,
]  # fmt: skip


def _ppo_operator(name: str, *, use_triton: bool) -> torch.library.CustomOpDef:
    """Register ppo_fast::<name>: loss, statistics, logp, entropy, and for the backward three gradients without the
    divisor of the loss, and 1 / that divisor."""

    def forward(*inputs: *_PPOInputs) -> tuple[Tensor, ...]:
        hidden, weight, bias, tokens = inputs[:4]
        old, advantages, mask, weights, ref, cu_seqlens, denominator = inputs[4:11]
        head_scalars, scalars, kl_estimator, aggregation, needs, *chunking = inputs[11:]
        tensors = LossTensors(old, advantages, mask, weights, ref, cu_seqlens=cu_seqlens)
        options = _unpack_options(scalars, kl_estimator, aggregation, denominator)
        epilogue, head_options = _epilogue(use_triton=use_triton), _unpack_head(head_scalars, *chunking)
        out = ppo_forward(epilogue, hidden, weight, bias, tokens, tensors, options, head_options, tuple(needs))
        d_hidden, d_weight, d_bias = out.gradients
        if d_hidden is not None and out.indices is not None:
            d_hidden = d_hidden.new_zeros(tokens.numel(), d_hidden.shape[1]).index_copy_(0, out.indices, d_hidden)
        stats = torch.stack([out.stats.get(name, torch.zeros_like(out.loss)) for name in _STATS])
        saved = (_or_empty(x, out.logprobs) for x in (d_hidden, d_weight, d_bias, out.inverse))
        return out.loss, stats, out.logprobs, out.entropy, *saved

    def shapes(*inputs: *_PPOInputs) -> tuple[Tensor, ...]:
        hidden, weight, bias, tokens = inputs[:4]
        needs = inputs[-5]
        gradients = [(math.prod(tokens.shape), hidden.shape[-1]), weight.shape, () if bias is None else bias.shape]
        gradients = [size if need else (0,) for size, need in zip(gradients, needs, strict=True)]
        inverse = () if any(needs) else (0,)
        sizes = (len(_STATS),), tokens.shape, tokens.shape, *gradients, inverse
        stats, *others = (_new_empty(size, hidden, weight) for size in sizes)
        loss_dtype = torch.result_type(stats.new_empty(()), torch.empty((), dtype=torch.float32))
        return stats.new_empty((), dtype=loss_dtype), stats, *others

    def set_up(ctx: _PPOOperatorContext, inputs: _PPOInputs, output: tuple[Tensor, ...]) -> None:
        ctx.like, ctx.needs, ctx.absent = shapes_and_dtypes(*inputs[:3]), inputs[-5], [None] * (len(inputs) - 3)
        ctx.save_for_backward(*output[4:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: _PPOOperatorContext, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward("linear_ppo_loss")
        if grad_loss is None:
            return None, None, None, *ctx.absent
        *saved, inverse = ctx.saved_tensors
        gradients = Gradients(*(x if need else None for x, need in zip(saved, ctx.needs, strict=True)))
        return *scaled_all(gradients, grad_loss * inverse, None, ctx.like), *ctx.absent

    tensors = "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? old_logprobs, Tensor advantages"
    tensors += ", Tensor? mask, Tensor? weights, Tensor? ref_logprobs, Tensor? cu_seqlens, Tensor? denominator"
    scalars = "Tensor head_scalars, Tensor scalars, str kl_estimator, str aggregation, bool[] needs"
    operator = torch.library.custom_op(
        f"ppo_fast::{name}",
        forward,
        mutates_args=(),
        schema=f"({tensors}, {scalars}, {_CHUNKING}) -> ({', '.join(['Tensor'] * 8)})",
    )
    operator.register_fake(shapes)
    operator.register_autograd(differentiate, setup_context=set_up)
    return operator


_triton_logprobs = _logprobs_operator("linear_logprobs_triton", use_triton=True)
_torch_logprobs = _logprobs_operator("linear_logprobs_torch", use_triton=False)
_triton_ppo = _ppo_operator("linear_ppo_loss_triton", use_triton=True)
_torch_ppo = _ppo_operator("linear_ppo_loss_torch", use_triton=False)
