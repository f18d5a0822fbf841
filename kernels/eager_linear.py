"""linear_logprobs and linear_ppo_loss in plain PyTorch, for a CPU and any device without Triton.

linear_chunks.py makes the logits of a chunk; here they become log-probabilities, entropies and d loss / d logits. A few
rows at a time, so that they stay in cache, everything happens in place in the chunk's own buffer, with one more buffer
for e^u, u = z - max z: the chunk travels from and to memory once.

With a softcap a further buffer keeps t = tanh(raw / softcap): d z / d raw = logit_scale / temperature (1 - t^2).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels import eager_loss
from ppo_fast.kernels.eager_logprobs import _NO_MASS, _row_factors, _row_sum
from ppo_fast.kernels.linear_chunks import Head
from ppo_fast.kernels.linear_op import public_functions
from ppo_fast.kernels.linear_steps import RowMath
from ppo_fast.kernels.loss_op import LossOptions, LossTensors

# What is worked on at a time: on a CPU this and e^u fit its caches, elsewhere launches should not dominate.
CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES = 2 << 20, 32 << 20


def _block_rows(V: int, device: torch.device, itemsize: int) -> int:
    return max(1, (CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES) // (V * itemsize))


def _scratch_bytes(weight: Tensor, softcap: float | None) -> int:
    itemsize, V = max(4, weight.dtype.itemsize), len(weight)
    return (1 if softcap is None else 2) * _block_rows(V, weight.device, itemsize) * V * itemsize


class _Block(NamedTuple):
    """Some rows of a chunk: which, and memory for them."""

    part: slice
    z: Tensor  # [rows, V] fp32; the chunk itself where that is fp32
    e: Tensor
    t: Tensor | None  # with a softcap only


def _blocks(logits: Tensor, head: Head) -> Iterator[_Block]:
    """The rows of a chunk, and in `z` their logits after bias, scale, softcap and temperature."""
    wide, (size, V) = torch.promote_types(logits.dtype, torch.float32), logits.shape
    rows = min(size, _block_rows(V, logits.device, wide.itemsize))
    e, t, copy = (
        torch.empty(rows, V, dtype=wide, device=logits.device) if wanted else None
        for wanted in (True, head.softcap is not None, logits.dtype != wide)
    )
    for start in range(0, size, rows):
        part = slice(start, min(start + rows, size))
        x, length = logits[part], part.stop - start
        if copy is not None:
            x = copy[:length].copy_(x)
        block = _Block(part, x, e[:length], None if t is None else t[:length])
        _finish_logits(block, head)
        yield block


def _finish_logits(block: _Block, head: Head) -> None:
    x = block.z
    if head.logits_dtype != x.dtype:
        x.copy_(x.to(head.logits_dtype))
    if head.bias is not None:
        x.add_(head.bias)
    if block.t is None:
        if head.factor != 1:
            x.mul_(head.factor)
        return
    dropped = None if head.bias is None else x == -torch.inf
    torch.mul(x, head.logit_scale / head.softcap, out=block.t).tanh_()
    torch.mul(block.t, head.softcap / head.temperature, out=x)
    if dropped is not None:
        x.masked_fill_(dropped, -torch.inf)


def _exponentials(block: _Block, head: Head, row_max: Tensor) -> None:
    """z becomes u = z - max z, and e becomes e^u."""
    block.z.sub_(row_max)
    if head.bias is not None:
        block.z.clamp_(min=_NO_MASS)  # a bias may be -inf, and 0 * -inf is NaN
    torch.exp(block.z, out=block.e)


def _statistics(block: _Block, head: Head, tokens: Tensor, with_entropy: bool, out: Tensor) -> None:
    """max z, log sum e, H and logp go to `out` [4, rows]; z becomes u, or u e^u with entropy."""
    row_max = block.z.amax(-1, keepdim=True)
    _exponentials(block, head, row_max)
    at_token = _at_tokens(block.z, tokens)
    total = _row_sum(block.e)
    log_sum = total.log()
    entropy = log_sum
    if with_entropy:
        entropy = log_sum - _row_sum(block.z.mul_(block.e)) / total
    out.copy_(torch.cat((row_max, log_sum, entropy, at_token - log_sum), 1).T)


def _at_tokens(u: Tensor, tokens: Tensor) -> Tensor:
    """[rows, 1]; NaN for a token outside the vocabulary, which a CPU has refused before."""
    V = u.shape[1]
    if u.device.type == "cpu":
        return u.gather(1, tokens.unsqueeze(1))
    chosen = tokens.clamp(0, V - 1)
    return u.gather(1, chosen.unsqueeze(1)).masked_fill_((chosen != tokens).unsqueeze(1), torch.nan)


def _write_gradient(
    block: _Block, head: Head, tokens: Tensor, g: Tensor, h: Tensor | None, statistics: Tensor, dlogits: Tensor
) -> None:
    """d loss / d raw logits from e^u, u e^u in z (with h; else anything), g = d loss / d logp and h = d loss / d H."""
    upstream = g * head.factor, None if h is None else h * head.factor
    slope, offset, at_token, _ = _row_factors(*upstream, None, statistics, 1.0)
    d = block.z
    if h is None:
        torch.mul(block.e, offset.unsqueeze(1), out=d)
    else:
        d.mul_(slope.unsqueeze(1)).addcmul_(block.e, offset.unsqueeze(1))
    d.scatter_(1, tokens.clamp(0, d.shape[1] - 1).unsqueeze(1), at_token.unsqueeze(1))
    if block.t is not None:
        d.addcmul_(d, block.t.square_(), value=-1)
    if d.data_ptr() != dlogits.data_ptr():
        dlogits.copy_(d)


def _score(logits: Tensor, tokens: Tensor, head: Head, statistics: Tensor, with_entropy: bool) -> None:
    for block in _blocks(logits, head):
        _statistics(block, head, tokens[block.part], with_entropy, statistics[:, block.part])


def _policy_slopes(
    logprobs: Tensor, t: LossTensors, share: Tensor | None, o: LossOptions
) -> tuple[Tensor, Tensor | None]:
    """d loss / d logp and d loss / d H of some rows, without the divisor of the loss."""
    if t.old_logprobs is None:
        t = t._replace(old_logprobs=logprobs)
    _, slope = eager_loss._surrogate(logprobs, t, o, {}, logprobs.dtype, True)
    g = -slope
    if t.ref_logprobs is not None and o.kl_coef:
        _, kl_slope = eager_loss._kl_and_slope(logprobs - t.ref_logprobs, o.kl_estimator, o.log_ratio_clamp)
        g = g + o.kl_coef * kl_slope
    g = torch.where(logprobs.isnan(), logprobs, g)
    h = torch.full_like(logprobs, -o.entropy_coef) if o.entropy_coef else None
    return (g, h) if share is None else (g * share, None if h is None else h * share)


def _policy(
    logits: Tensor,
    dlogits: Tensor,
    tokens: Tensor,
    t: LossTensors,
    share: Tensor | None,
    o: LossOptions,
    head: Head,
    statistics: Tensor,
) -> None:
    for block in _blocks(logits, head):
        rows = block.part
        _statistics(block, head, tokens[rows], True, statistics[:, rows])
        here = LossTensors(*(None if x is None else x[rows] for x in t))
        g, h = _policy_slopes(statistics[3, rows], here, None if share is None else share[rows], o)
        _write_gradient(block, head, tokens[rows], g, h, statistics[:, rows], dlogits[rows])


def _gradient(
    logits: Tensor,
    dlogits: Tensor,
    tokens: Tensor,
    g: Tensor,
    h: Tensor | None,
    head: Head,
    statistics: Tensor,
) -> None:
    for block in _blocks(logits, head):
        rows = block.part
        _exponentials(block, head, statistics[0, rows].unsqueeze(1))
        if h is not None:
            block.z.mul_(block.e)
        slopes = g[rows], None if h is None else h[rows]
        _write_gradient(block, head, tokens[rows], *slopes, statistics[:, rows], dlogits[rows])


_MATH = RowMath(
    name="torch",
    native=lambda device: device.type != "cpu",
    in_place=True,
    scratch_bytes=_scratch_bytes,
    score=_score,
    policy=_policy,
    gradient=_gradient,
    policy_loss=eager_loss.policy_loss,
)

linear_logprobs, linear_ppo_loss = public_functions(_MATH)
