"""token_logprobs in plain PyTorch, for a CPU and any device without Triton: reference.token_logprobs, lean.

The rows of [..., V] are taken a chunk at a time into a scratch buffer that stays in cache, and all arithmetic happens
there in place, in fp32 (fp64 for fp64). So the logits are read once forward and once backward, the gradient is written
once, and nothing else is larger than a chunk or one row. Per row, forward saves m = max x and log s with
s = sum e^((x-m)/temperature), the entropy and logp: backward's e^((x-m)/temperature) / s then keeps its digits for
logits of 1e4. On a CPU masked rows are not even read; elsewhere finding them would wait for the device, so there
they are read and thrown away.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.logprobs_op import allocate, compute_dtype, make_backend, run

# What a chunk may take: on a CPU two of them fit the cache of one core, elsewhere launches should not dominate.
CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 1 << 20, 8 << 20
# e^-1000 is 0 in fp64 and fp32: exponents are clamped there, since 0 * -inf is NaN.
_NO_MASS = -1000.0


class _Chunk(NamedTuple):
    """Some rows: which, how to index any [...] tensor and its [N] form with them, and whether they count."""

    index: tuple[Tensor, ...] | tuple[slice]  # into the leading dimensions
    flat: Tensor | slice  # into [N]
    uncounted: Tensor | None  # [rows, 1], or None if all count
    size: int


def _row_count(logits: Tensor) -> int:
    """Rows in a chunk: at least one, at most the byte limit."""
    limit = CPU_CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, limit // max(1, logits.shape[-1] * compute_dtype(logits).itemsize))


def _mergeable(*tensors: Tensor) -> bool:
    """Whether the leading dimensions of each are one dimension: view(-1, V) without a copy."""
    for x in tensors:
        dims = [(x.shape[i], x.stride(i)) for i in range(x.ndim - 1) if x.shape[i] > 1]
        if any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(dims)):
            return False
    return True


def _chunks(logits: Tensor, mask: Tensor | None, merged: bool) -> Iterator[_Chunk]:
    """All rows that have to be looked at, chunk by chunk."""
    step, N = _row_count(logits), logits.shape[:-1].numel()
    skip = mask is not None and logits.device.type == "cpu" and not bool(mask.all())
    flat_mask = None if mask is None or skip else mask.reshape(-1)
    counted = mask.reshape(-1).nonzero().squeeze(1) if skip else None
    if counted is None and not merged:
        counted = torch.arange(N, device=logits.device)
    for start in range(0, N if counted is None else len(counted), step):
        if counted is None:
            rows: Tensor | slice = slice(start, min(start + step, N))
            index, size = (rows,), rows.stop - start
        else:
            rows = counted[start : start + step]
            index, size = (rows,) if merged else torch.unravel_index(rows, logits.shape[:-1]), len(rows)
        ignored = None if flat_mask is None else ~flat_mask[rows].unsqueeze(1)
        yield _Chunk(index, rows, ignored, size)


def _row_sum(x: Tensor) -> Tensor:
    """[rows, V] -> [rows, 1]. A single row is summed as two: PyTorch would split it over threads, to other bits."""
    return x.sum(-1, keepdim=True) if len(x) > 1 else x.expand(2, -1).sum(-1, keepdim=True)[:1]


def _flat(x: Tensor, merged: bool) -> Tensor:
    return x.view(-1, x.shape[-1]) if merged else x


def _read(source: Tensor, chunk: _Chunk, out: Tensor) -> Tensor:
    """The rows of a chunk: a view where they are neighbours, else gathered in `out`."""
    if isinstance(chunk.flat, slice):
        return source[chunk.flat]
    if source.ndim == 2 and source.dtype == out.dtype:
        return torch.index_select(source, 0, chunk.flat, out=out)
    return out.copy_(source[chunk.index])


def _write(target: Tensor, chunk: _Chunk, e: Tensor, factor: Tensor) -> None:
    """target[rows] = e factor, at once where they are neighbours; e is lost."""
    if isinstance(chunk.flat, slice):
        torch.mul(e, factor, out=target[chunk.flat])
    elif target.ndim == 2:
        target.index_copy_(0, chunk.flat, e.mul_(factor).to(target.dtype))
    else:
        target[chunk.index] = e.mul_(factor).to(target.dtype)


def _safe_tokens(tokens: Tensor, mask: Tensor | None, V: int) -> Tensor:
    """[N] int64 indices that a gather can take whatever stands under the mask."""
    flat = tokens.reshape(-1).long()
    return flat.clamp(0, V - 1) if mask is None else torch.where(mask.reshape(-1), flat, 0).clamp(0, V - 1)


def _forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy, statistics = allocate(logits, tokens, with_entropy)
    if tokens.numel() == 0:
        return logprobs, entropy, statistics
    merged, V = _mergeable(logits), logits.shape[-1]
    source = _flat(logits, merged)
    if mask is not None:
        statistics.zero_()
    scratch = [statistics.new_empty(min(_row_count(logits), tokens.numel()), V) for _ in range(1 + with_entropy)]
    chosen = _safe_tokens(tokens, mask, V)
    for chunk in _chunks(logits, mask, merged):
        row_max = statistics.new_empty(chunk.size, 1)
        u = scratch[0][: chunk.size]
        u.copy_(_read(source, chunk, u))
        if chunk.uncounted is not None:
            u.masked_fill_(chunk.uncounted, 0)
        u.sub_(torch.amax(u, -1, keepdim=True, out=row_max))
        if temperature != 1:
            u.mul_(1 / temperature)
        at_token = u.gather(1, chosen[chunk.flat].unsqueeze(1))
        if with_entropy:
            e = torch.exp(u.clamp_(min=_NO_MASS), out=scratch[1][: chunk.size])
            total, moment = _row_sum(e), _row_sum(u.mul_(e))
        else:
            total = _row_sum(u.exp_())
        log_sum = total.log()
        values = [row_max, log_sum, log_sum - moment / total if with_entropy else log_sum, at_token - log_sum]
        if chunk.uncounted is not None:
            values = [x.masked_fill(chunk.uncounted, 0) for x in values]
        statistics[:, chunk.flat] = torch.cat(values, 1).T
    out_of_vocabulary = (chosen != tokens.reshape(-1)) & (True if mask is None else mask.reshape(-1))
    statistics[3].masked_fill_(out_of_vocabulary, float("nan"))
    logprobs.view(-1).copy_(statistics[3])
    if with_entropy:
        entropy.view(-1).copy_(statistics[2])
    return logprobs, entropy, statistics


def _zero_rows(target: Tensor, where: Tensor) -> None:
    if target.ndim == 2:
        target.index_fill_(0, where.reshape(-1).nonzero().squeeze(1), 0)
    else:
        target[where] = 0


def _row_factors(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slope, offset, at_token, e_at_token, [N] each: d_j = e_j (slope u_j + offset), and at_token for the token.

    Without an entropy gradient slope is 0 and at_token = e_at_token offset, which needs one scatter less.
    """

    def upstream(gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return torch.zeros_like(statistics[0])
        flat = gradient.reshape(-1) / temperature
        return flat if mask is None else flat.masked_fill(~mask.reshape(-1), 0)

    _, log_sum, entropy, logprobs = statistics
    g, h = upstream(grad_logprobs), upstream(grad_entropy)
    if grad_logprobs is not None:
        g = torch.where(logprobs.isnan(), logprobs, g)
    # The token's p - 1 comes from logp, since 1 - p would cancel where p is nearly 1.
    p = logprobs.exp()
    at_token = -g * torch.expm1(logprobs) - h * p * (logprobs.clamp(min=_NO_MASS) + entropy)
    inverse_sum = torch.exp(-log_sum)
    offset = -(g + h * (entropy - log_sum)) * inverse_sum
    return -h * inverse_sum, offset, at_token, torch.expm1(logprobs) / inverse_sum


def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    temperature: float,
    inplace: bool,
) -> Tensor:
    grad = logits if inplace else torch.empty_like(logits)
    if grad.numel() == 0:
        return grad
    merged, V = _mergeable(logits, grad), logits.shape[-1]
    source, target = _flat(logits, merged), _flat(grad, merged)
    with_entropy = grad_entropy is not None
    factors = _row_factors(grad_logprobs, grad_entropy, mask, statistics, temperature)
    slope, offset, at_token, e_at_token = (x.unsqueeze(1) for x in factors)
    scratch = [statistics.new_empty(min(_row_count(logits), tokens.numel()), V) for _ in range(1 + with_entropy)]
    chosen = _safe_tokens(tokens, mask, V).unsqueeze(1)
    row_max = statistics[0].unsqueeze(1)
    for chunk in _chunks(logits, mask, merged):
        rows = chunk.flat
        u = scratch[0][: chunk.size]
        torch.sub(_read(source, chunk, u), row_max[rows], out=u)
        if chunk.uncounted is not None:
            u.masked_fill_(chunk.uncounted, 0)
        if temperature != 1:
            u.mul_(1 / temperature)
        if with_entropy:
            e = torch.exp(u.clamp_(min=_NO_MASS), out=scratch[1][: chunk.size])
            factor = u.mul_(slope[rows]).add_(offset[rows]).scatter_(1, chosen[rows], at_token[rows])
            e.scatter_(1, chosen[rows], 1)
        else:
            e, factor = u.exp_().scatter_(1, chosen[rows], e_at_token[rows]), offset[rows]
        _write(target, chunk, e, factor)
    if mask is not None and mask.device.type == "cpu":
        _zero_rows(target, ~mask)
    return grad


_BACKEND = make_backend("token_logprobs_torch", _forward, _backward)


def token_logprobs(
    logits: Tensor,  # [..., V] any float
    tokens: Tensor,  # [...] integers
    mask: Tensor | None = None,  # [...] bool
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """reference.token_logprobs; fp32 out, fp64 for fp64. inplace_backward: see logprobs_op."""
    options = {"temperature": temperature, "with_entropy": with_entropy, "inplace_backward": inplace_backward}
    return run(_BACKEND, logits, tokens, mask, **options)
