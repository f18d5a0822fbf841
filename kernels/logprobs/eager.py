"""token_logprobs in plain PyTorch, for a CPU and any device without Triton: reference.token_logprobs.

The rows of [..., V] are taken a chunk at a time into a scratch buffer that stays in cache, and all arithmetic happens
there in place, in fp32 (fp64 for fp64). So the logits are read once forward and once backward, the gradient is written
once, and nothing else is larger than a chunk or one row. Per row, forward saves m = max x and log s with
s = sum e^((x-m)/temperature), the entropy and logp: backward's e^((x-m)/temperature) / s then keeps its digits for
logits of 1e4. On a CPU masked rows are not read; elsewhere finding them would wait for the device, so there they are
read and discarded.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.memory import readable
from ppo_fast.kernels.logprobs.options import allocate, compute_dtype

# What a chunk may take; on a CPU so much per thread, since the two chunks of an entropy should stay in its cache.
CHUNK_BYTES, CPU_CHUNK_BYTES = 8 << 20, 1 << 20
# e^-1000 is 0 in fp64 and fp32: exponents are clamped there, since 0 * -inf is NaN.
_NO_MASS = -1000.0


class _Chunk(NamedTuple):
    """Some rows: their indices in [N], or in leading dimensions that do not merge, and which do not count."""

    rows: Tensor | slice
    indices: tuple[Tensor, ...]  # empty if the leading dimensions merge
    uncounted: Tensor | None  # [rows, 1], or None if all count
    size: int
    view: tuple[int | slice, ...] = ()  # of adjacent rows in leading dimensions that do not merge


def _readable(x: Tensor) -> bool:
    """Return whether Python may read values, to skip rows that do not count."""
    return readable(x)


def _row_count(logits: Tensor) -> int:
    """Rows in a chunk: at least one, at most the byte limit, which on a CPU is per thread."""
    limit = CPU_CHUNK_BYTES * torch.get_num_threads() if logits.device.type == "cpu" else CHUNK_BYTES
    return max(1, min(limit, CHUNK_BYTES) // max(1, logits.shape[-1] * compute_dtype(logits).itemsize))


def _mergeable(*tensors: Tensor) -> bool:
    """Whether the leading dimensions of each are one dimension: view(-1, V) without a copy."""
    for x in tensors:
        dims = [(x.shape[i], x.stride(i)) for i in range(x.ndim - 1) if x.shape[i] > 1]
        if any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(dims)):
            return False
    return True


def _unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of an element of a tensor of that shape."""
    indices = []
    for size in reversed(shape):
        position, index = divmod(position, size)
        indices.append(index)
    return tuple(reversed(indices))


def _chunks(logits: Tensor, mask: Tensor | None, merged: bool) -> Iterator[_Chunk]:
    """Yield all rows that must be read, chunk by chunk."""
    step, N = _row_count(logits), logits.shape[:-1].numel()
    flat_mask = None if mask is None else mask.reshape(-1)
    counted = None
    if flat_mask is not None and _readable(logits):
        counted = None if bool(flat_mask.all()) else flat_mask.nonzero().squeeze(1)
        flat_mask = None
    inner = 1 if logits.ndim < 2 else logits.shape[-2]
    if counted is None and not merged and 2 * inner >= min(step, N):  # a slice [:, a:b] has long runs of adjacent rows
        for first in range(0, N, inner):
            outer = _unravel(first // inner, logits.shape[:-2])
            for start in range(0, inner, step):
                size = min(step, inner - start)
                run = slice(first + start, first + start + size)
                uncounted = None if flat_mask is None else ~flat_mask[run].unsqueeze(1)
                yield _Chunk(run, (), uncounted, size, (*outer, slice(start, start + size)))
        return
    if counted is None and not merged:
        counted = torch.arange(N, device=logits.device)
    for start in range(0, N if counted is None else len(counted), step):
        if counted is None:
            size = min(step, N - start)
            rows: Tensor | slice = slice(start, start + size)
            indices: tuple[Tensor, ...] = ()
        else:
            here = counted[start : start + step]
            rows, size = here, len(here)
            indices = () if merged else torch.unravel_index(here, logits.shape[:-1])
        yield _Chunk(rows, indices, None if flat_mask is None else ~flat_mask[rows].unsqueeze(1), size)


def _row_sum(x: Tensor, out: Tensor) -> Tensor:
    """[rows, V] -> [rows, 1]. A single row is summed as two: PyTorch would split it over threads, to other bits."""
    if len(x) > 1:
        return torch.sum(x, -1, keepdim=True, out=out)
    return out.copy_(x.expand(2, -1).sum(-1, keepdim=True)[:1])


def _flat(x: Tensor, merged: bool) -> Tensor:
    return x.view(-1, x.shape[-1]) if merged else x


def _read(source: Tensor, chunk: _Chunk, out: Tensor) -> Tensor:
    """Return the rows of a chunk: a view where they are adjacent, else gathered in `out`."""
    if isinstance(chunk.rows, slice):
        return source[chunk.view or chunk.rows]
    if chunk.indices:
        return out.copy_(source[chunk.indices])
    if source.dtype != out.dtype:
        return out.copy_(source.index_select(0, chunk.rows))
    return torch.index_select(source, 0, chunk.rows, out=out)


def _write(target: Tensor, chunk: _Chunk, e: Tensor, factor: Tensor) -> None:
    """target[rows] = e factor, in one operation where the rows are adjacent; e is overwritten."""
    if isinstance(chunk.rows, slice):
        torch.mul(e, factor, out=target[chunk.view or chunk.rows])
    elif chunk.indices:
        target[chunk.indices] = e.mul_(factor).to(target.dtype)
    else:
        target.index_copy_(0, chunk.rows, e.mul_(factor).to(target.dtype))


def _safe_tokens(tokens: Tensor, mask: Tensor | None, V: int) -> Tensor:
    """[N] int64 indices that are valid for a gather, whatever the values under the mask."""
    flat = tokens.reshape(-1).long()
    return flat.clamp(0, V - 1) if mask is None else torch.where(mask.reshape(-1), flat, 0).clamp(0, V - 1)


def _mark_out_of_vocabulary(logprobs: Tensor, safe_tokens: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
    """Write NaN where a counted token is outside the vocabulary, [N]."""
    replaced = safe_tokens.view(-1) != tokens.reshape(-1)
    logprobs.masked_fill_(replaced if mask is None else replaced & mask.reshape(-1), float("nan"))


def _scratch(like: Tensor, rows: int, V: int, count: int) -> list[Tensor]:
    return [like.new_empty(min(rows, like.shape[1]), V) for _ in range(count)]


def forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    logprobs, entropy, statistics = allocate(logits, tokens, with_entropy)
    if tokens.numel() == 0:
        return logprobs, entropy, statistics
    merged, V = _mergeable(logits), logits.shape[-1]
    source = _flat(logits, merged)
    if mask is not None:
        statistics.zero_()
    scratch = _scratch(statistics, _row_count(logits), V, 1 + with_entropy)
    safe_tokens = _safe_tokens(tokens, mask, V).unsqueeze(1)
    for chunk in _chunks(logits, mask, merged):
        neighbours = isinstance(chunk.rows, slice)
        results = statistics[:, chunk.rows] if neighbours else statistics.new_empty(4, chunk.size)
        row_max, log_sum, row_entropy, row_logp = results.unsqueeze(2)
        u = scratch[0][: chunk.size]
        u.copy_(_read(source, chunk, u))
        if chunk.uncounted is not None:
            u.masked_fill_(chunk.uncounted, 0)
        u.sub_(torch.amax(u, -1, keepdim=True, out=row_max))
        if temperature != 1:
            u.mul_(1 / temperature)
        row_logp.copy_(u.gather(1, safe_tokens[chunk.rows]))
        if with_entropy:
            e = torch.exp(u.clamp_(min=_NO_MASS), out=scratch[1][: chunk.size])
            _row_sum(e, log_sum)
            _row_sum(u.mul_(e), row_entropy).div_(log_sum)
            torch.sub(log_sum.log_(), row_entropy, out=row_entropy)
        else:
            _row_sum(u.exp_(), log_sum).log_()
        row_logp.sub_(log_sum)
        if chunk.uncounted is not None:
            results.masked_fill_(chunk.uncounted.T, 0)
        if not neighbours:
            statistics[:, chunk.rows] = results
    _mark_out_of_vocabulary(statistics[3], safe_tokens, tokens, mask)
    logprobs.view(-1).copy_(statistics[3])
    if entropy is not None:
        entropy.view(-1).copy_(statistics[2])
    return logprobs, entropy, statistics


def _zero_rows(target: Tensor, where: Tensor, merged: bool) -> None:
    if merged:
        target.index_fill_(0, where.reshape(-1).nonzero().squeeze(1), 0)
    else:
        target[where] = 0


def _upstream(gradient: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """The gradient of an output over the temperature, [N, 1]; 0 where masked rows will be visited."""
    flat = gradient.reshape(-1, 1)
    if temperature != 1:
        flat = flat / temperature
    return flat if mask is None or _readable(mask) else flat.masked_fill(~mask.reshape(-1, 1), 0)


def _entropy_factors(g: Tensor | float, h: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """slope, offset, at_token, [N, 1] each: d_j = e_j (slope u_j + offset), but at_token for the token."""
    _, log_sum, entropy, logprobs = statistics.unsqueeze(2)
    inverse_sum = torch.exp(-log_sum)
    offset = -(g + h * (entropy - log_sum)) * inverse_sum
    # The token's p - 1 comes from logp, since p - 1 would cancel where p is nearly 1.
    at_token = -g * torch.expm1(logprobs) - h * logprobs.exp() * (logprobs.clamp(min=_NO_MASS) + entropy)
    return -h * inverse_sum, offset, at_token


def backward(
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
    row_max, log_sum, _, logprobs = statistics.unsqueeze(2)
    g: Tensor | float = 0.0
    if grad_logprobs is not None:
        g = torch.where(logprobs.isnan(), logprobs, _upstream(grad_logprobs, mask, temperature))
    if grad_entropy is not None:
        slope, offset, at_token = _entropy_factors(g, _upstream(grad_entropy, mask, temperature), statistics)
    else:  # at the token g (1 - p) is offset times this
        total = log_sum.exp()
        offset, at_token = -g / total, torch.expm1(logprobs) * total
    scratch = _scratch(statistics, _row_count(logits), V, 1 if grad_entropy is None else 2)
    safe_tokens = _safe_tokens(tokens, mask, V).unsqueeze(1)
    for chunk in _chunks(logits, mask, merged):
        rows = chunk.rows
        u = scratch[0][: chunk.size]
        torch.sub(_read(source, chunk, u), row_max[rows], out=u)
        if chunk.uncounted is not None:
            u.masked_fill_(chunk.uncounted, 0)
        if temperature != 1:
            u.mul_(1 / temperature)
        if grad_entropy is not None:
            e = torch.exp(u.clamp_(min=_NO_MASS), out=scratch[1][: chunk.size])
            factor = u.mul_(slope[rows]).add_(offset[rows]).scatter_(1, safe_tokens[rows], at_token[rows])
            e.scatter_(1, safe_tokens[rows], 1)
        else:
            e, factor = u.exp_().scatter_(1, safe_tokens[rows], at_token[rows]), offset[rows]
        _write(target, chunk, e, factor)
    if mask is not None and _readable(mask):
        _zero_rows(target, ~mask, merged)
    return grad
