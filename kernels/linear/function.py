"""linear_logprobs and linear_ppo_loss around their two backends: the order of the work, and autograd.

linear_ppo_loss computes the gradients in its forward: a row's d loss / d logits depends on that row's log-probability
and entropy and on what is known beforehand, except for the loss's divisor. So gradients are computed without it, and
backward multiplies them by (upstream gradient / divisor) on the device, out of place. linear_logprobs accepts any
upstream gradient, and so its backward computes the logits again: four products instead of three.

A backend is its RowMath: what happens to a chunk of logits. linear_chunks.py cuts the chunks and multiplies matrices,
linear_op.py has the public functions.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from ppo_fast.kernels.loss.eager import loss_scale
from ppo_fast.kernels.loss.options import LossOptions, LossTensors

# |d loss / d logits| / p where fp16 holds it: 2^12 below the largest number, for ratios and rare KL terms.
_FP16_TARGET = 16.0


class RowMath(NamedTuple):
    """What a backend does with a chunk of logits [rows, V]. statistics [4, rows]: private, but H [2] and logp [3].

    The functions of an `indexed` backend get whole per-token tensors, the counted rows and the place of the chunk among
    them instead of what is written below; see linear.py.
    """

    name: str
    native: Callable[[torch.device], bool]  # whether operands stay in fp16 or bf16
    in_place: bool  # whether dlogits may be written over the logits
    scratch_bytes: Callable[[Tensor, float | None], int]  # for a weight and a softcap
    score: Callable[..., None]  # (logits, tokens, head, statistics, with_entropy)
    policy: Callable[..., Tensor | None]  # (logits, dlogits, tokens, tensors, share, options, head, statistics)
    gradient: Callable[..., Tensor | None]  # (logits, dlogits, tokens, g, h or None, head, statistics)
    policy_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    indexed: bool = False
    # If indexed, (logprobs, entropy, tensors, options) -> loss, statistics, 1 / divisor of the loss:
    loss: Callable[..., tuple[Tensor, dict[str, Tensor], Tensor]] | None = None
    # and (like, tensors) -> 1 / counted steps of its sequence for each step:
    shares: Callable[..., Tensor] | None = None
    # scaled_all in one launch, or None for what it does not take:
    scale_gradients: Callable[..., list[Tensor | None] | None] | None = None


class Settings(NamedTuple):
    """The options that both operations have."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    num_counted: int | None = None


class _Work(NamedTuple):
    """What every pass over the chunks needs."""

    hidden: Tensor  # [N, D]
    head: Head
    rows: Rows
    plan: Plan
    tokens: Tensor  # [n], or [N] where the backend is indexed


def _prepare(
    math_: RowMath,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Rows,
    s: Settings,
    needs: tuple[bool, ...],
) -> _Work:
    hidden, weight = hidden.detach(), weight.detach()
    if hidden.ndim != 2:
        hidden = hidden.reshape(tokens.numel(), weight.shape[1])
    plan = make_plan(
        hidden,
        weight,
        rows,
        native=math_.native(hidden.device),
        in_place=math_.in_place,
        chunk_bytes=s.chunk_bytes,
        logits_dtype=s.logits_dtype,
        needs=needs,
        scratch_bytes=math_.scratch_bytes(weight, s.softcap),
    )
    bias = None if bias is None else padded_copy(bias.detach(), plan.arithmetic)
    head = Head(weight, bias, s.temperature, s.softcap, s.logit_scale, s.logits_dtype or plan.logits)
    return _Work(hidden, head, rows, plan, _per_token(math_, rows, tokens, torch.int64))


def _per_token(math_: RowMath, rows: Rows, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-token tensor as a backend takes it: contiguous, in that dtype, and of the counted rows if not indexed."""
    if not math_.indexed:
        return rows.take(x, dtype)
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _outputs(work: _Work, shape: torch.Size, count: int) -> list[Tensor]:
    """Per-token results that an indexed backend fills at the counted rows; 0 elsewhere."""
    make = torch.empty if work.rows.chosen is None else torch.zeros
    return [make(shape, dtype=work.plan.arithmetic, device=work.hidden.device) for _ in range(count)]


def _spoil(rows: Rows, *outputs: Tensor) -> None:
    """NaN everywhere if the rows are not those of the mask."""
    if rows.wrong is not None:
        for x in outputs:
            x.masked_fill_(rows.wrong, math.nan)


def _score(math_: RowMath, work: _Work, with_entropy: bool) -> Tensor:
    """Statistics [4, n]; one product."""
    statistics = torch.empty(4, work.rows.total, dtype=work.plan.arithmetic, device=work.hidden.device)

    def row_math(logits: Tensor, part: slice) -> None:
        math_.score(logits, work.tokens[part], work.head, statistics[:, part], with_entropy)

    for_each_chunk(work.hidden, work.head, work.rows, work.plan, row_math)
    return statistics


def _score_indexed(
    math_: RowMath, work: _Work, logprobs: Tensor, entropy: Tensor | None, statistics: Tensor | None
) -> None:
    """The same, with the results at their tokens."""

    def row_math(logits: Tensor, part: slice) -> None:
        where = work.rows.chosen, part.start
        math_.score(logits, work.tokens, where, work.head, logprobs, entropy, statistics)

    for_each_chunk(work.hidden, work.head, work.rows, work.plan, row_math)
    _spoil(work.rows, logprobs, *(() if entropy is None else (entropy,)))


def _power_of_two(bound: Tensor) -> Tensor:
    """What brings a number of the size of `bound` near _FP16_TARGET, without rounding anything."""
    return torch.exp2(torch.log2(_FP16_TARGET / bound.clamp(min=1e-30)).floor())


def _fp16_factor(work: _Work, t: LossTensors, o: LossOptions, share: Tensor | None) -> Tensor:
    """A power of two that brings d loss / d logits into the range of fp16; `share` is of the counted rows."""
    rows, dtype = work.rows, work.plan.arithmetic
    assert t.advantages is not None
    size = rows.take(t.advantages, dtype)
    size = size if t.weights is None else size * rows.take(t.weights, dtype)
    size = size.abs() + (abs(o.entropy_coef) * math.log(len(work.head.weight)) + abs(o.kl_coef))
    return _power_of_two((size if share is None else size * share).amax())


def _weighting(work: _Work, t: LossTensors, o: LossOptions) -> tuple[Tensor | None, Tensor]:
    """Factors [n] of the terms, or None for 1, of the order of 1; and 1 / divisor of the loss that goes with them."""
    dtype, device = work.plan.arithmetic, work.hidden.device
    if not work.rows.total:
        return None, torch.ones((), dtype=dtype, device=device)
    advantages = t.advantages
    assert advantages is not None
    scale = loss_scale(t.mask, advantages, t.cu_seqlens, o, dtype)
    inverse = torch.ones((), dtype=dtype, device=device) / scale.normaliser
    share = None
    if isinstance(scale.share, Tensor):
        share = work.rows.take(scale.share.expand(advantages.shape), dtype)
        mean = share.mean()
        share, inverse = share / mean, inverse * mean
    elif scale.share is not None:
        inverse = inverse * scale.share
    if work.plan.operand == torch.float16:
        factor = _fp16_factor(work, t, o, share)
        share = factor.expand(work.rows.total) if share is None else share * factor
        inverse = inverse / factor
    if work.rows.wrong is not None:
        inverse = inverse.masked_fill(work.rows.wrong, math.nan)
    return (None if share is None else share.contiguous()), inverse


class PPOResult(NamedTuple):
    loss: Tensor
    stats: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor
    gradients: Gradients
    inverse: Tensor | None  # what the gradients lack
    chosen: Tensor | None  # the rows in gradients.hidden


def ppo_forward(
    math_: RowMath,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    t: LossTensors,
    o: LossOptions,
    s: Settings,
    needs: tuple[bool, ...],
) -> PPOResult:
    """Everything of linear_ppo_loss but the graph."""
    with in_given_dtypes(hidden):
        rows = counted_rows(t.mask, s.num_counted, tokens.numel())
        work = _prepare(math_, hidden, weight, bias, tokens, rows, s, needs)
        return (_ppo_indexed if math_.indexed else _ppo_taken)(math_, work, tokens.shape, t, o, needs)


def _ppo_taken(
    math_: RowMath, work: _Work, shape: torch.Size, t: LossTensors, o: LossOptions, needs: tuple[bool, ...]
) -> PPOResult:
    rows = work.rows
    gradients, inverse = Gradients(None, None, None), None
    if any(needs):
        share, inverse = _weighting(work, t, o)
        statistics = torch.empty(4, rows.total, dtype=work.plan.arithmetic, device=work.hidden.device)
        given = {name: getattr(t, name) for name in _PER_TOKEN}
        vectors = {name: rows.take(x, work.plan.arithmetic) for name, x in given.items() if x is not None}

        def row_math(logits: Tensor, dlogits: Tensor, part: slice) -> Tensor | None:
            here = LossTensors(**{name: x[part] for name, x in vectors.items()})
            factors = None if share is None else share[part]
            return math_.policy(logits, dlogits, work.tokens[part], here, factors, o, work.head, statistics[:, part])

        gradients = differentiate(work.hidden, work.head, rows, work.plan, needs, row_math)
    else:
        statistics = _score(math_, work, True)
    entropy, logprobs = (rows.spread(x, shape) for x in statistics[2:])
    options = {name: x for name, x in o._asdict().items() if name not in ("value_coef", "value_clip")}
    loss, stats = math_.policy_loss(
        logprobs,
        logprobs if t.old_logprobs is None else t.old_logprobs,
        t.advantages,
        t.mask,
        entropy=entropy,
        ref_logprobs=t.ref_logprobs,
        weights=t.weights,
        cu_seqlens=t.cu_seqlens,
        **options,
    )
    return PPOResult(loss, stats, logprobs, entropy, gradients, inverse, rows.chosen)


_PER_TOKEN = ("old_logprobs", "advantages", "weights", "ref_logprobs")


def _ppo_indexed(
    math_: RowMath, work: _Work, shape: torch.Size, t: LossTensors, o: LossOptions, needs: tuple[bool, ...]
) -> PPOResult:
    rows, dtype = work.rows, work.plan.arithmetic
    logprobs, entropy = _outputs(work, shape, 2)
    gradients, factor = Gradients(None, None, None), None
    assert t.advantages is not None
    assert math_.loss is not None
    assert math_.shares is not None
    if any(needs):
        share = None
        if o.aggregation == "seq-mean-token-mean" and rows.total:
            share = math_.shares(t.advantages, t)
        if work.plan.operand == torch.float16 and rows.total:
            factor = _fp16_factor(work, t, o, None if share is None else rows.take(share, dtype))
            share = factor.expand(shape).contiguous() if share is None else share * factor
        vectors = (
            None if x is None else _per_token(math_, rows, x, dtype) for x in (getattr(t, n) for n in _PER_TOKEN)
        )
        per_token = (work.tokens, *vectors, share)

        def row_math(logits: Tensor, dlogits: Tensor, part: slice) -> None:
            where = rows.chosen, part.start
            math_.policy(logits, dlogits, per_token, where, o, work.head, logprobs, entropy)

        gradients = differentiate(work.hidden, work.head, rows, work.plan, needs, row_math)
        _spoil(rows, logprobs, entropy)
    else:
        _score_indexed(math_, work, logprobs, entropy, None)
    loss, stats, inverse = math_.loss(logprobs, entropy, t, o)
    if factor is not None:
        inverse = inverse / factor
    if rows.wrong is not None:
        inverse = inverse.masked_fill(rows.wrong, math.nan)
    return PPOResult(loss, stats, logprobs, entropy, gradients, inverse, rows.chosen)


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
    d: Gradients, scale: Tensor | None, index: Tensor | None, likes: list[tuple[torch.Size, torch.dtype]]
) -> list[Tensor | None]:
    """The gradients of hidden, weight and bias, of the shapes and dtypes of their tensors."""
    out: list[Tensor | None] = [None, None, None]
    if d.hidden is not None:
        out[0] = _hidden_gradient(d.hidden, scale, index, *likes[0])
    for i, gradient in ((1, d.weight), (2, d.bias)):
        if gradient is not None:
            out[i] = scaled(gradient, scale, likes[i][1])
    return out


def _scaled_by_backend(
    math_: RowMath,
    d: Gradients,
    upstream: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    likes: list[tuple[torch.Size, torch.dtype]],
) -> list[Tensor | None]:
    """The same for upstream * scale, where None is 1, in one launch if the backend has one for these gradients."""
    if math_.scale_gradients is not None:
        made = math_.scale_gradients(d, upstream, scale, index, likes)
        if made is not None:
            return made
    if upstream is not None:
        scale = upstream if scale is None else upstream * scale
    return scaled_all(d, scale, index, likes)


def refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"create_graph=True: {name} has no second derivative; that of ppo_fast.kernels.reference.{name} has"
        )


def likes(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else (x.shape, x.dtype) for x in tensors]


def in_given_dtypes(x: Tensor) -> contextlib.AbstractContextManager:
    """The products below choose their dtypes themselves; autocast would cast their operands again."""
    if not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class PPOCall(NamedTuple):
    """What LinearPPO needs besides the inputs with a gradient: every argument of an autograd function takes time."""

    tokens: Tensor
    tensors: LossTensors
    options: LossOptions
    settings: Settings
    needs: tuple[bool, ...]
    math_: RowMath
    results: list[PPOResult]  # gets what has no graph: every output takes time, too, and gets a gradient of zeros


class LinearPPO(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: PPOCall) -> Tensor:
        tokens, t, o, s, needs, math_, results = call
        out = ppo_forward(math_, hidden, weight, bias, tokens, t, o, s, needs)
        ctx.save_for_backward(*out.gradients, out.inverse, out.chosen)
        ctx.set_materialize_grads(False)
        ctx.rest = math_, likes(hidden, weight, bias)
        results.append(out._replace(gradients=Gradients(None, None, None), inverse=None, chosen=None))
        return out.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_ppo_loss")
        if grad_loss is None:
            return None, None, None, None
        *gradients, inverse, index = ctx.saved_tensors
        if grad_loss.is_neg():
            grad_loss = grad_loss.resolve_neg()
        math_, shapes = ctx.rest
        return *_scaled_by_backend(math_, Gradients(*gradients), grad_loss, inverse, index, shapes), None


def differentiate_logprobs(
    math_: RowMath,
    upstream: tuple[Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Rows,
    statistics: Tensor,
    s: Settings,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """d loss / d hidden, weight and bias, from the gradients of logp and entropy."""
    work = _prepare(math_, hidden, weight, bias, tokens, rows, s, needs)
    dtype = work.plan.arithmetic
    g, h = (None if x is None else _per_token(math_, rows, x, dtype) for x in upstream)
    if g is None and not math_.indexed:
        g = torch.zeros_like(statistics[0])
    scale = None
    if work.plan.operand == torch.float16 and rows.total:
        sizes = [None if x is None else rows.take(x, dtype).abs().amax() for x in upstream]
        bound = 0 if sizes[0] is None else sizes[0]
        factor = _power_of_two(bound if sizes[1] is None else bound + sizes[1] * math.log(len(weight)))
        g, h = (None if x is None else x * factor for x in (g, h))
        scale = 1 / factor
    if rows.wrong is not None:
        scale = torch.where(rows.wrong, math.nan, 1.0 if scale is None else scale)

    def row_math(logits: Tensor, dlogits: Tensor, part: slice) -> Tensor | None:
        if math_.indexed:
            return math_.gradient(logits, dlogits, work.tokens, (rows.chosen, part.start), g, h, work.head, statistics)
        slopes = g[part], None if h is None else h[part]
        return math_.gradient(logits, dlogits, work.tokens[part], *slopes, work.head, statistics[:, part])

    with in_given_dtypes(hidden):
        gradients = differentiate(work.hidden, work.head, rows, work.plan, needs, row_math)
    return _scaled_by_backend(math_, gradients, None, scale, rows.chosen, likes(hidden, weight, bias))


def logprobs_forward(
    math_: RowMath,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    s: Settings,
    with_entropy: bool,
    *,
    keep_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Rows]:
    """logp, entropy, statistics [4, n] for a backward if they are to be kept, and the rows that these belong to."""
    with in_given_dtypes(hidden):
        rows = counted_rows(mask, s.num_counted, tokens.numel())
        work = _prepare(math_, hidden, weight, bias, tokens, rows, s, (False,) * 3)
        if math_.indexed:
            logprobs, *entropies = _outputs(work, tokens.shape, 1 + with_entropy)
            statistics, entropy = None, entropies[0] if with_entropy else None
            if keep_statistics:
                statistics = torch.empty(4, rows.total, dtype=work.plan.arithmetic, device=hidden.device)
            _score_indexed(math_, work, logprobs, entropy, statistics)
            return logprobs, entropy, statistics, rows
        statistics = _score(math_, work, with_entropy)
        entropy = rows.spread(statistics[2], tokens.shape) if with_entropy else None
        return rows.spread(statistics[3], tokens.shape), entropy, statistics, rows


class LogprobsCall(NamedTuple):
    """The same for LinearLogprobs."""

    tokens: Tensor
    mask: Tensor | None
    settings: Settings
    with_entropy: bool
    math_: RowMath


class LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LogprobsCall
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens, mask, s, with_entropy, math_ = call
        out = logprobs_forward(math_, hidden, weight, bias, tokens, mask, s, with_entropy, keep_statistics=True)
        logprobs, entropy, statistics, rows = out
        ctx.save_for_backward(hidden, weight, bias, tokens, rows.chosen, rows.wrong, statistics)
        ctx.options = s, math_, rows.total
        ctx.set_materialize_grads(False)
        return logprobs if entropy is None else (logprobs, entropy)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None) -> tuple:
        refuse_double_backward("linear_logprobs")
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        hidden, weight, bias, tokens, index, wrong, statistics = ctx.saved_tensors
        s, math_, count = ctx.options
        rows, needs = Rows(index, count, wrong), tuple(ctx.needs_input_grad[:3])
        upstream = tuple(None if x is None else x.resolve_neg() for x in (grad_logprobs, grad_entropy))
        out = differentiate_logprobs(math_, upstream, hidden, weight, bias, tokens, rows, statistics, s, needs)
        return *out, None
