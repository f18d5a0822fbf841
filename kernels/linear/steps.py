"""The steps of linear_logprobs and linear_ppo_loss, for every implementation; autograd is in custom_op.py.

linear_ppo_loss computes the gradients in its forward: a row's d loss / d logits depends on that row's log-probability
and entropy and on what is known beforehand, except for the loss's divisor. So gradients are computed without it, and
the backward multiplies them by (upstream gradient / divisor) on the device, out of place. linear_logprobs accepts any
upstream gradient, and so its backward computes the logits again: four products instead of three.

An implementation is its Epilogue: what is computed from a chunk of logits. chunks.py cuts the chunks and multiplies
matrices; eager.py and launch.py have the epilogues.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.memory import required
from ppo_fast.kernels.linear.chunks import (
    Gradients,
    Head,
    Plan,
    Rows,
    counted_rows,
    differentiate,
    for_each_chunk,
    make_plan,
    padded_copy,
    scaled,
)
from ppo_fast.kernels.linear.options import HeadOptions
from ppo_fast.kernels.loss.custom_op import compute_loss
from ppo_fast.kernels.loss.eager import loss_scale
from ppo_fast.kernels.loss.options import LossOptions, LossTensors

ShapeAndDtype = tuple[torch.Size, torch.dtype]

# |d loss / d logits| / p where fp16 holds it: 2^12 below the largest number, for ratios and rare KL terms.
_FP16_TARGET = 16.0


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is computed from a chunk of logits [rows, V], between the matrix products.

    Per-token tensors are those of the chunk's rows. statistics [4, rows] are private, but for H [2] and logp [3].
    """

    name: str
    native: Callable[[torch.device], bool]  # whether operands stay in fp16 or bf16
    in_place: bool  # whether dlogits may be written over the logits
    scratch_bytes: Callable[[Tensor, float | None], int]  # for a weight and a softcap
    score: Callable[..., None]  # (logits, tokens, head, statistics, with_entropy)
    policy: Callable[..., Tensor | None]  # (logits, dlogits, tokens, tensors, token_weight, options, head, statistics)
    gradient: Callable[..., Tensor | None]  # (logits, dlogits, tokens, g, h or None, head, statistics)


@dataclasses.dataclass(frozen=True)
class IndexedEpilogue(Epilogue):
    """An epilogue that gets whole per-token tensors, the indices of the counted rows and the chunk's first row among
    them, and writes its results at their tokens. See launch.py for the arguments of score, policy and gradient."""

    # (logprobs, entropy, tensors, options) -> loss, statistics, 1 / divisor of the loss
    loss: Callable[[Tensor, Tensor, LossTensors, LossOptions], tuple[Tensor, dict[str, Tensor], Tensor]]
    token_weights: Callable[[Tensor, LossTensors], Tensor]  # for each step 1 / counted steps of its sequence
    # scale_gradients below in one launch, or None for what it does not support
    scale_gradients: Callable[..., list[Tensor | None] | None]


class _Work(NamedTuple):
    """What every pass over the chunks needs."""

    hidden: Tensor  # [N, D]
    head: Head
    rows: Rows
    plan: Plan
    tokens: Tensor  # [n], or [N] for an IndexedEpilogue


def _prepare(
    epilogue: Epilogue,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Rows,
    head_options: HeadOptions,
    needs: tuple[bool, ...],
) -> _Work:
    hidden, weight = hidden.detach(), weight.detach()
    if hidden.ndim != 2:
        hidden = hidden.reshape(tokens.numel(), weight.shape[1])
    plan = make_plan(
        hidden,
        weight,
        rows,
        native=epilogue.native(hidden.device),
        in_place=epilogue.in_place,
        chunk_bytes=head_options.chunk_bytes,
        logits_dtype=head_options.logits_dtype,
        compute_dtype=head_options.compute_dtype,
        needs=needs,
        scratch_bytes=epilogue.scratch_bytes(weight, head_options.softcap),
    )
    bias = None if bias is None else padded_copy(bias.detach(), plan.arithmetic)
    head = Head(
        weight,
        bias,
        head_options.temperature,
        head_options.softcap,
        head_options.logit_scale,
        head_options.logits_dtype or plan.logits,
    )
    return _Work(hidden, head, rows, plan, _per_token(epilogue, rows, tokens, torch.int64))


def _per_token(epilogue: Epilogue, rows: Rows, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-token tensor as the epilogue gets it: contiguous, in that dtype, and of the counted rows if not indexed."""
    if not isinstance(epilogue, IndexedEpilogue):
        return rows.gather(x, dtype)
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _outputs(work: _Work, shape: torch.Size, count: int) -> list[Tensor]:
    """Per-token results that an indexed epilogue writes at the counted rows; 0 elsewhere."""
    make = torch.empty if work.rows.indices is None else torch.zeros
    return [make(shape, dtype=work.plan.arithmetic, device=work.hidden.device) for _ in range(count)]


def _fill_nan(rows: Rows, *outputs: Tensor) -> None:
    """Write NaN everywhere if the rows are not those of the mask."""
    if rows.count_mismatch is not None:
        for x in outputs:
            x.masked_fill_(rows.count_mismatch, math.nan)


def _score_gathered(epilogue: Epilogue, work: _Work, with_entropy: bool) -> Tensor:
    """Statistics [4, n]; one product."""
    statistics = torch.empty(4, work.rows.total, dtype=work.plan.arithmetic, device=work.hidden.device)

    def apply_epilogue(logits: Tensor, part: slice) -> None:
        epilogue.score(logits, work.tokens[part], work.head, statistics[:, part], with_entropy)

    for_each_chunk(work.hidden, work.head, work.rows, work.plan, apply_epilogue)
    return statistics


def _score_indexed(
    epilogue: Epilogue, work: _Work, logprobs: Tensor, entropy: Tensor | None, statistics: Tensor | None
) -> None:
    """The same, with the results at their tokens."""

    def apply_epilogue(logits: Tensor, part: slice) -> None:
        chunk_rows = work.rows.indices, part.start
        epilogue.score(logits, work.tokens, chunk_rows, work.head, logprobs, entropy, statistics)

    for_each_chunk(work.hidden, work.head, work.rows, work.plan, apply_epilogue)
    _fill_nan(work.rows, logprobs, *(() if entropy is None else (entropy,)))


def _power_of_two(bound: Tensor) -> Tensor:
    """What brings a number of the size of `bound` near _FP16_TARGET, without rounding anything."""
    return torch.exp2(torch.log2(_FP16_TARGET / bound.clamp(min=1e-30)).floor())


def _fp16_factor(work: _Work, tensors: LossTensors, options: LossOptions, token_weight: Tensor | None) -> Tensor:
    """A power of two that brings d loss / d logits into the range of fp16; `token_weight` is of the counted rows."""
    rows, dtype = work.rows, work.plan.arithmetic
    size = rows.gather(required(tensors.advantages), dtype)
    size = size if tensors.weights is None else size * rows.gather(tensors.weights, dtype)
    size = size.abs() + (abs(options.entropy_coef) * math.log(len(work.head.weight)) + abs(options.kl_coef))
    return _power_of_two((size if token_weight is None else size * token_weight).amax())


def _weighting(work: _Work, tensors: LossTensors, options: LossOptions) -> tuple[Tensor | None, Tensor]:
    """Factors [n] of the terms, or None for 1, of the order of 1; and 1 / divisor of the loss that goes with them."""
    dtype, device = work.plan.arithmetic, work.hidden.device
    if not work.rows.total:
        return None, torch.ones((), dtype=dtype, device=device)
    advantages = required(tensors.advantages)
    scale = loss_scale(tensors.mask, advantages, tensors.cu_seqlens, options, dtype)
    inverse = torch.ones((), dtype=dtype, device=device) / scale.normaliser
    token_weight = None
    if isinstance(scale.token_weight, Tensor):
        token_weight = work.rows.gather(scale.token_weight.expand(advantages.shape), dtype)
        mean = token_weight.mean()
        token_weight, inverse = token_weight / mean, inverse * mean
    elif scale.token_weight is not None:
        inverse = inverse * scale.token_weight
    if work.plan.operand == torch.float16:
        factor = _fp16_factor(work, tensors, options, token_weight)
        token_weight = factor.expand(work.rows.total) if token_weight is None else token_weight * factor
        inverse = inverse / factor
    if work.rows.count_mismatch is not None:
        inverse = inverse.masked_fill(work.rows.count_mismatch, math.nan)
    return (None if token_weight is None else token_weight.contiguous()), inverse


class PPOResult(NamedTuple):
    loss: Tensor
    stats: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor
    gradients: Gradients
    inverse: Tensor | None  # what the gradients lack
    indices: Tensor | None  # the rows in gradients.hidden


def ppo_forward(
    epilogue: Epilogue,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    tensors: LossTensors,
    options: LossOptions,
    head_options: HeadOptions,
    needs: tuple[bool, ...],
) -> PPOResult:
    """Everything of linear_ppo_loss but the graph."""
    with in_given_dtypes(hidden):
        rows = counted_rows(tensors.mask, head_options.num_counted, tokens.numel())
        work = _prepare(epilogue, hidden, weight, bias, tokens, rows, head_options, needs)
        if isinstance(epilogue, IndexedEpilogue):
            return _ppo_indexed(epilogue, work, tokens.shape, tensors, options, needs)
        return _ppo_gathered(epilogue, work, tokens.shape, tensors, options, needs)


def _ppo_gathered(
    epilogue: Epilogue,
    work: _Work,
    shape: torch.Size,
    tensors: LossTensors,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> PPOResult:
    rows = work.rows
    gradients, inverse = Gradients(None, None, None), None
    if any(needs):
        token_weight, inverse = _weighting(work, tensors, options)
        statistics = torch.empty(4, rows.total, dtype=work.plan.arithmetic, device=work.hidden.device)
        given = {name: getattr(tensors, name) for name in _PER_TOKEN}
        vectors = {name: rows.gather(x, work.plan.arithmetic) for name, x in given.items() if x is not None}

        def apply_epilogue(logits: Tensor, dlogits: Tensor, part: slice) -> Tensor | None:
            here = LossTensors(**{name: x[part] for name, x in vectors.items()})
            factors = None if token_weight is None else token_weight[part]
            return epilogue.policy(
                logits, dlogits, work.tokens[part], here, factors, options, work.head, statistics[:, part]
            )

        gradients = differentiate(work.hidden, work.head, rows, work.plan, needs, apply_epilogue)
    else:
        statistics = _score_gathered(epilogue, work, True)
    entropy, logprobs = (rows.scatter(x, shape) for x in statistics[2:])
    old_logprobs = logprobs if tensors.old_logprobs is None else tensors.old_logprobs
    loss, stats = compute_loss(
        logprobs, entropy, None, tensors._replace(old_logprobs=old_logprobs), options, use_triton=False
    )
    return PPOResult(loss, stats, logprobs, entropy, gradients, inverse, rows.indices)


_PER_TOKEN = ("old_logprobs", "advantages", "weights", "ref_logprobs")


def _ppo_indexed(
    epilogue: IndexedEpilogue,
    work: _Work,
    shape: torch.Size,
    tensors: LossTensors,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> PPOResult:
    rows, dtype = work.rows, work.plan.arithmetic
    logprobs, entropy = _outputs(work, shape, 2)
    gradients, factor = Gradients(None, None, None), None
    if any(needs):
        token_weight = None
        if options.aggregation == "seq-mean-token-mean" and rows.total:
            token_weight = epilogue.token_weights(required(tensors.advantages), tensors)
        if work.plan.operand == torch.float16 and rows.total:
            factor = _fp16_factor(
                work, tensors, options, None if token_weight is None else rows.gather(token_weight, dtype)
            )
            token_weight = factor.expand(shape).contiguous() if token_weight is None else token_weight * factor
        vectors = (
            None if x is None else _per_token(epilogue, rows, x, dtype)
            for x in (getattr(tensors, n) for n in _PER_TOKEN)
        )
        per_token = (work.tokens, *vectors, token_weight)

        def apply_epilogue(logits: Tensor, dlogits: Tensor, part: slice) -> None:
            chunk_rows = rows.indices, part.start
            epilogue.policy(logits, dlogits, per_token, chunk_rows, options, work.head, logprobs, entropy)

        gradients = differentiate(work.hidden, work.head, rows, work.plan, needs, apply_epilogue)
        _fill_nan(rows, logprobs, entropy)
    else:
        _score_indexed(epilogue, work, logprobs, entropy, None)
    loss, stats, inverse = epilogue.loss(logprobs, entropy, tensors, options)
    if factor is not None:
        inverse = inverse / factor
    if rows.count_mismatch is not None:
        inverse = inverse.masked_fill(rows.count_mismatch, math.nan)
    return PPOResult(loss, stats, logprobs, entropy, gradients, inverse, rows.indices)


def _hidden_gradient(
    d: Tensor, scale: Tensor | None, index: Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    if index is None:
        gradient = scaled(d, scale, dtype)
        return gradient if gradient.shape == shape else gradient.view(shape)
    out = torch.zeros(shape, dtype=dtype, device=d.device)
    out.view(-1, shape[-1]).index_copy_(0, index, scaled(d, scale, dtype))
    return out


def scaled_all(
    d: Gradients, scale: Tensor | None, index: Tensor | None, shapes_and_dtypes: list[ShapeAndDtype | None]
) -> list[Tensor | None]:
    """The gradients of hidden, weight and bias, of the shapes and dtypes of their tensors."""
    out: list[Tensor | None] = [None, None, None]
    for i, (gradient, shape_and_dtype) in enumerate(zip(d, shapes_and_dtypes, strict=True)):
        if gradient is not None and shape_and_dtype is not None:
            shape, dtype = shape_and_dtype
            is_hidden = i == 0
            out[i] = (
                _hidden_gradient(gradient, scale, index, shape, dtype) if is_hidden else scaled(gradient, scale, dtype)
            )
    return out


def scale_gradients(
    epilogue: Epilogue,
    d: Gradients,
    upstream: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    shapes_and_dtypes: list[ShapeAndDtype | None],
) -> list[Tensor | None]:
    """The same for upstream * scale, where None is 1, in one launch if the backend has one for these gradients."""
    if isinstance(epilogue, IndexedEpilogue):
        made = epilogue.scale_gradients(d, upstream, scale, index, shapes_and_dtypes)
        if made is not None:
            return made
    if upstream is not None:
        scale = upstream if scale is None else upstream * scale
    return scaled_all(d, scale, index, shapes_and_dtypes)


def shapes_and_dtypes(*tensors: Tensor | None) -> list[ShapeAndDtype | None]:
    return [None if x is None else (x.shape, x.dtype) for x in tensors]


def in_given_dtypes(x: Tensor) -> contextlib.AbstractContextManager:
    """The products below choose their dtypes themselves; autocast would cast their operands again."""
    if not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def differentiate_logprobs(
    epilogue: Epilogue,
    upstream: tuple[Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Rows,
    statistics: Tensor,
    head_options: HeadOptions,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """d loss / d hidden, weight and bias, from the gradients of logp and entropy."""
    work = _prepare(epilogue, hidden, weight, bias, tokens, rows, head_options, needs)
    dtype = work.plan.arithmetic
    g, h = (None if x is None else _per_token(epilogue, rows, x, dtype) for x in upstream)
    if g is None and not isinstance(epilogue, IndexedEpilogue):
        g = torch.zeros_like(statistics[0])
    scale = None
    if work.plan.operand == torch.float16 and rows.total:
        sizes = [None if x is None else rows.gather(x, dtype).abs().amax() for x in upstream]
        given = [
            size
            for size in (sizes[0], None if sizes[1] is None else sizes[1] * math.log(len(weight)))
            if size is not None
        ]
        factor = _power_of_two(given[0] if len(given) == 1 else given[0] + given[1])
        g, h = (None if x is None else x * factor for x in (g, h))
        scale = 1 / factor
    if rows.count_mismatch is not None:
        scale = torch.where(rows.count_mismatch, math.nan, 1.0 if scale is None else scale)

    def apply_epilogue(logits: Tensor, dlogits: Tensor, part: slice) -> Tensor | None:
        if isinstance(epilogue, IndexedEpilogue):
            return epilogue.gradient(
                logits, dlogits, work.tokens, (rows.indices, part.start), g, h, work.head, statistics
            )
        at_part = required(g)[part], None if h is None else h[part]
        return epilogue.gradient(logits, dlogits, work.tokens[part], *at_part, work.head, statistics[:, part])

    with in_given_dtypes(hidden):
        gradients = differentiate(work.hidden, work.head, rows, work.plan, needs, apply_epilogue)
    return scale_gradients(epilogue, gradients, None, scale, rows.indices, shapes_and_dtypes(hidden, weight, bias))


def logprobs_forward(
    epilogue: Epilogue,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    head_options: HeadOptions,
    with_entropy: bool,
    *,
    keep_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Rows]:
    """logp, entropy, statistics [4, n] for a backward if they are to be kept, and the rows that these belong to."""
    with in_given_dtypes(hidden):
        rows = counted_rows(mask, head_options.num_counted, tokens.numel())
        work = _prepare(epilogue, hidden, weight, bias, tokens, rows, head_options, (False,) * 3)
        if isinstance(epilogue, IndexedEpilogue):
            logprobs, *entropies = _outputs(work, tokens.shape, 1 + with_entropy)
            statistics, entropy = None, entropies[0] if with_entropy else None
            if keep_statistics:
                statistics = torch.empty(4, rows.total, dtype=work.plan.arithmetic, device=hidden.device)
            _score_indexed(epilogue, work, logprobs, entropy, statistics)
            return logprobs, entropy, statistics, rows
        statistics = _score_gathered(epilogue, work, with_entropy)
        entropy = rows.scatter(statistics[2], tokens.shape) if with_entropy else None
        return rows.scatter(statistics[3], tokens.shape), entropy, statistics, rows
