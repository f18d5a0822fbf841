"""linear_logprobs and linear_ppo_loss in plain PyTorch, for a CPU and any device without Triton.

chunks.py computes the logits z of a chunk; this file turns them into log-probabilities, entropies and
d loss / d logits, a few rows at a time, so that they stay in cache, and in place in the chunk's own buffer, with one
more buffer for u = z - max z or e^u. The chunk is written once: without an entropy bonus
d loss / d z_j = f (e^u_j - s 1[j = token]) with s = sum e^u, and hidden is multiplied by the factor f = -g / s, which
depends on the loss. With the bonus a second pass over the chunk computes d loss / d z.

With a softcap, another buffer keeps t = tanh(raw / softcap): d z / d raw = logit_scale / temperature (1 - t^2).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.memory import required
from ppo_fast.kernels.linear.chunks import Head
from ppo_fast.kernels.linear.steps import Epilogue
from ppo_fast.kernels.loss import eager as eager_loss
from ppo_fast.kernels.loss.options import LossOptions, LossTensors

# What is worked on at a time: on a CPU this and its copy fit the caches, elsewhere launches must not dominate.
CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES = 1 << 20, 32 << 20
# e^-1000 is 0 in fp64 and fp32: exponents are clamped there, since 0 * -inf is NaN.
_NO_MASS = -1000.0


def _in_place(logits: Tensor, dlogits: Tensor, statistics: Tensor) -> bool:
    """Whether a chunk can hold all steps up to d loss / d logits. One of fp16 or bf16, as products give it where they
    cannot widen, cannot: e^u summed over a vocabulary exceeds fp16, and out= takes no other dtype."""
    return logits.data_ptr() == dlogits.data_ptr() and logits.dtype == statistics.dtype


def _block_rows(V: int, device: torch.device, itemsize: int) -> int:
    return max(2, (CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES) // (V * itemsize))


def _scratch_bytes(weight: Tensor, softcap: float | None) -> int:
    itemsize, V, native = max(4, weight.dtype.itemsize), len(weight), weight.device.type != "cpu"
    return (1 + native + (softcap is not None)) * _block_rows(V, weight.device, itemsize) * V * itemsize


class _Block(NamedTuple):
    """Some rows of a chunk: which, and memory for them, [rows, V] in the dtype of the arithmetic."""

    part: slice
    x: Tensor  # the chunk itself, or a copy
    spare: Tensor
    tanh: Tensor | None  # with a softcap only


def _blocks(logits: Tensor, head: Head, *, copy: bool) -> Iterator[_Block]:
    wide, (size, V) = torch.promote_types(logits.dtype, torch.float32), logits.shape
    rows = min(size, _block_rows(V, logits.device, wide.itemsize))
    spare = torch.empty(rows, V, dtype=wide, device=logits.device)
    tanh = None if head.softcap is None else torch.empty_like(spare)
    x_copy = torch.empty_like(spare) if copy else None
    for start in range(0, size, rows):
        part = slice(start, min(start + rows, size))
        length = part.stop - start
        x = logits[part] if x_copy is None else x_copy[:length].copy_(logits[part])
        yield _Block(part, x, spare[:length], None if tanh is None else tanh[:length])


def _finish_logits(block: _Block, head: Head) -> None:
    """x becomes z: h W^T after bias, scale, softcap and temperature."""
    x = block.x
    if head.logits_dtype != x.dtype:
        x.copy_(x.to(head.logits_dtype))
    if head.bias is not None:
        x.add_(head.bias)
    if head.softcap is None or block.tanh is None:
        if head.factor != 1:
            x.mul_(head.factor)
        return
    dropped = None if head.bias is None else x == -torch.inf
    torch.mul(x, head.logit_scale / head.softcap, out=block.tanh).tanh_()
    torch.mul(block.tanh, head.softcap / head.temperature, out=x)
    if dropped is not None:
        x.masked_fill_(dropped, -torch.inf)


def _row_sum(x: Tensor) -> Tensor:
    """[rows, V] -> [rows]. A single row is summed as two: PyTorch would split it over threads, to other bits."""
    return x.sum(-1) if len(x) > 1 else x.expand(2, -1).sum(-1)[:1]


def _shift(block: _Block, row_max: Tensor, out: Tensor) -> None:
    """u = z - max z."""
    torch.sub(block.x, row_max.unsqueeze(1), out=out)


def _clamp(u: Tensor, head: Head) -> None:
    """A bias may be -inf, and 0 * -inf is NaN."""
    if head.bias is not None:
        u.clamp_(min=_NO_MASS)


def _bend(d: Tensor, block: _Block) -> None:
    """Multiply d loss / d z by the derivative of the softcap."""
    if block.tanh is not None:
        d.addcmul_(d, block.tanh.square_(), value=-1)


def _at_tokens(u: Tensor, tokens: Tensor) -> Tensor:
    """[rows]; NaN for a token outside the vocabulary, which is an error on a CPU already."""
    safe_tokens = tokens.clamp(0, u.shape[1] - 1)
    values = u.gather(1, safe_tokens.unsqueeze(1)).squeeze(1)
    return values if u.device.type == "cpu" else values.masked_fill_(safe_tokens != tokens, torch.nan)


def _put_at_tokens(x: Tensor, tokens: Tensor, values: Tensor) -> None:
    x.scatter_(1, tokens.clamp(0, x.shape[1] - 1).unsqueeze(1), values.unsqueeze(1))


def _row_statistics(
    logits: Tensor,
    tokens: Tensor,
    head: Head,
    statistics: Tensor,  # [4, rows]: max z, log s, H, logp
    *,
    with_entropy: bool,
    copy: bool,
    exponentials: bool,
) -> None:
    """The statistics. The chunk becomes u, or e^u - s 1[j = token] if `exponentials`; or stays as it is if `copy`."""
    row_max, total, weighted_sum, at_token = statistics
    for block in _blocks(logits, head, copy=copy):
        rows = block.part
        _finish_logits(block, head)
        torch.amax(block.x, -1, out=row_max[rows])
        u, e = (block.spare, block.x) if exponentials else (block.x, block.spare)
        _shift(block, row_max[rows], u)
        at_token[rows] = _at_tokens(u, tokens[rows])
        _clamp(u, head)
        torch.exp(u, out=e)
        total[rows] = _row_sum(e)
        if with_entropy:
            product = block.spare.mul_(block.x)
            weighted_sum[rows] = _row_sum(product)
        if exponentials:
            _put_at_tokens(e, tokens[rows], at_token[rows].exp() - total[rows])
            _bend(e, block)
    log_sum = total.log()
    if with_entropy:
        torch.sub(log_sum, weighted_sum / total, out=weighted_sum)
    at_token.sub_(log_sum)
    total.copy_(log_sum)


def _score(logits: Tensor, tokens: Tensor, head: Head, statistics: Tensor, with_entropy: bool) -> None:
    copy = logits.dtype != statistics.dtype
    _row_statistics(logits, tokens, head, statistics, with_entropy=with_entropy, copy=copy, exponentials=False)


def _gradient(
    logits: Tensor,
    dlogits: Tensor,
    tokens: Tensor,
    g: Tensor,  # d loss / d logp
    h: Tensor | None,  # d loss / d H
    head: Head,
    statistics: Tensor,
) -> Tensor | None:
    """d loss / d logits from logits, with statistics that are known."""
    in_place = _in_place(logits, dlogits, statistics)
    for block in _blocks(logits, head, copy=not in_place):
        _finish_logits(block, head)
        _shift(block, statistics[0, block.part], block.x)
        _clamp(block.x, head)
        if h is None and in_place:
            torch.exp(block.x, out=block.x)
            _put_at_tokens(block.x, tokens[block.part], _less_sum(statistics[:, block.part]))
            _bend(block.x, block)
        else:
            _differentiate(block, tokens, g, h, head, statistics)
        if not in_place:
            dlogits[block.part].copy_(block.x)
    return _factor(g, head, statistics) if h is None and in_place else None


def _less_sum(statistics: Tensor) -> Tensor:
    """e^u - s at the token, as s (p - 1): from logp, since the difference would cancel where p is nearly 1."""
    return statistics[1].exp() * statistics[3].expm1()


def _factor(g: Tensor, head: Head, statistics: Tensor) -> Tensor:
    return -head.factor * g * torch.exp(-statistics[1])


def _differentiate(block: _Block, tokens: Tensor, g: Tensor, h: Tensor | None, head: Head, statistics: Tensor) -> None:
    """x = u becomes d loss / d raw logits, which is g (1[j = token] - p_j) - h p_j (log p_j + H) times head.factor."""
    rows = block.part
    _, log_sum, entropy, logprobs = statistics[:, rows]
    g = g[rows] * head.factor
    # The token's p - 1 comes from logp, since 1 - p would cancel where p is nearly 1.
    at_token = -g * logprobs.expm1()
    e = torch.exp(block.x, out=block.spare)
    if h is None:
        torch.mul(e, (-g * torch.exp(-log_sum)).unsqueeze(1), out=block.x)
    else:
        h = h[rows] * head.factor
        at_token -= h * logprobs.exp() * (logprobs.clamp(min=_NO_MASS) + entropy)
        slope, offset = (x * torch.exp(-log_sum) for x in (-h, h * (log_sum - entropy) - g))
        block.x.mul_(slope.unsqueeze(1)).add_(offset.unsqueeze(1)).mul_(e)
    _put_at_tokens(block.x, tokens[rows], at_token)
    _bend(block.x, block)


def _policy_gradients(
    logprobs: Tensor, entropy: Tensor, tensors: LossTensors, token_weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor | None]:
    """d loss / d logp and d loss / d H, without the divisor of the loss."""
    if tensors.old_logprobs is None:
        tensors = tensors._replace(old_logprobs=logprobs)
    bonus = options.entropy_coef != 0
    options = options._replace(aggregation="token-sum", denominator=None)
    _, _, (g, h, _), _ = eager_loss.forward(logprobs, entropy, None, tensors, options, (True, bonus, False))
    g = required(g)
    g = torch.where(logprobs.isnan(), logprobs, g)
    h = h if bonus else None
    return (g, h) if token_weight is None else (g * token_weight, None if h is None else h * token_weight)


def _policy(
    logits: Tensor,
    dlogits: Tensor,
    tokens: Tensor,
    tensors: LossTensors,
    token_weight: Tensor | None,
    options: LossOptions,
    head: Head,
    statistics: Tensor,
) -> Tensor | None:
    """Statistics and d loss / d logits, from one read of the logits where there is no entropy bonus."""
    in_place, bonus = _in_place(logits, dlogits, statistics), options.entropy_coef != 0
    how = {"copy": not in_place, "exponentials": in_place and not bonus}
    _row_statistics(logits, tokens, head, statistics, with_entropy=True, **how)
    g, h = _policy_gradients(statistics[3], statistics[2], tensors, token_weight, options)
    if not in_place:
        return _gradient(logits, dlogits, tokens, g, h, head, statistics)
    if not bonus:
        return _factor(g, head, statistics)
    for block in _blocks(logits, head, copy=False):
        if head.softcap is not None and block.tanh is not None:  # t from z = u + max z
            torch.add(block.x, statistics[0, block.part].unsqueeze(1), out=block.tanh)
            block.tanh.mul_(head.temperature / head.softcap)
        _differentiate(block, tokens, g, h, head, statistics)
    return None


EPILOGUE = Epilogue(
    name="torch",
    native=lambda device: device.type != "cpu",
    in_place=True,
    scratch_bytes=_scratch_bytes,
    score=_score,
    policy=_policy,
    gradient=_gradient,
)
