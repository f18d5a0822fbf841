"""reference.gae in PyTorch, for a CPU and any other device.

Backwards in time the scan carries one number per row: s_t = gamma V_t + gamma lam A_t, all that step t - 1 needs of
step t. Then

    A_t = r_t - V_t + s_{t+1},    s_t = [gamma V_t + gamma lam (r_t - V_t)] + gamma lam s_{t+1},

with s_T = gamma bootstrap.

A masked step passes s on unchanged, so the steps before and after it are treated as adjacent; a terminated step takes
0 and a truncated one gamma final_values_t instead of s_{t+1}. On a CPU with numba, the compiled loops of cpu.py are
used. Elsewhere the affine maps are scanned in chunks: all chunks side by side, then the carries between chunks.

Advantages and returns carry no graph: they are data.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.memory import addressable, readable, required
from ppo_fast.kernels.common.numba_loops import numba_works
from ppo_fast.kernels.gae.options import GAEOptions

_CHUNK = 16  # steps that a chunk scans one after the other, all chunks at once
_SHORT = 128  # rows up to this length are not cut in chunks
_BLOCK = 1 << 18  # steps whose intermediate results fit in a core's cache, and in memory that malloc reuses


def float_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors has it, else fp32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _scan_steps(decay: Tensor, gain: Tensor, last: Tensor, *, nan_safe: bool) -> Tensor:
    """_suffix_scan step by step, for [T, rows]."""
    following = torch.empty_like(gain)
    following[-1] = last
    steps = list(zip(decay.unbind(), gain.unbind(), following.unbind(), strict=True))
    for t in reversed(range(1, len(steps))):
        factor, addend, s = steps[t]
        s = s.masked_fill(factor == 0, 0) if nan_safe else s
        torch.addcmul(addend, factor, s, out=steps[t - 1][2])
    return following


def _suffix_scan(
    decay: Tensor, gain: Tensor, last: Tensor, *, time: int, nan_safe: bool, short: int = _SHORT
) -> Tensor:
    """s_t = gain_t + decay_t s_{t+1} along `time` (0 or 1) with s_T = last; returns s_1 ... s_T.

    decay and gain are [T, rows] or [rows, T], last is [rows]. Work O(T), depth O(log T). Where decay is 0, s_{t+1}
    must not contribute: multiplying ensures that for finite numbers, `nan_safe` for NaN and infinity, too.
    """
    T, rows = gain.shape[time], gain.shape[1 - time]
    if short >= T:
        if time == 0:
            return _scan_steps(decay, gain, last, nan_safe=nan_safe)
        return _scan_steps(decay.t().contiguous(), gain.t().contiguous(), last, nan_safe=nan_safe).t().contiguous()
    chunks = -(-T // _CHUNK)
    missing = [0, 0] * (1 - time) + [0, chunks * _CHUNK - T]  # steps past the end, which pass s on unchanged

    def step_first(x: Tensor, past_the_end: float) -> Tensor:
        """[_CHUNK, lanes]: one step of every chunk is one contiguous slice; a lane is (row, chunk) or (chunk, row)."""
        if missing[-1]:
            x = torch.nn.functional.pad(x, missing, value=past_the_end)
        if time:
            return x.reshape(rows * chunks, _CHUNK).t().contiguous()
        return x.reshape(chunks, _CHUNK, rows).transpose(0, 1).reshape(_CHUNK, chunks * rows)

    decay, gain = step_first(decay, 1.0), step_first(gain, 0.0)
    decays, gains = decay.unbind(), gain.unbind()
    for t in reversed(range(_CHUNK - 1)):  # step t becomes the map of steps t to the end of its chunk
        later = gains[t + 1].masked_fill(decays[t] == 0, 0) if nan_safe else gains[t + 1]
        gains[t].addcmul_(decays[t], later)
        decays[t].mul_(decays[t + 1])
    lanes = (rows, chunks) if time else (chunks, rows)
    carry = _suffix_scan(
        decay[0].view(lanes), gain[0].view(lanes), last, time=time, nan_safe=nan_safe, short=_CHUNK
    ).reshape(-1)  # s after each chunk
    entering = carry.expand_as(gain[1:]).masked_fill(decay[1:] == 0, 0) if nan_safe else carry
    gain[1:].addcmul_(decay[1:], entering)
    following = torch.cat([gain[1:], carry.unsqueeze(0)])
    if time:
        return following.t().reshape(rows, chunks * _CHUNK)[:, :T]
    return following.view(_CHUNK, chunks, rows).transpose(0, 1).reshape(chunks * _CHUNK, rows)[:T]


def _gae_vectorised(
    rewards: Tensor,  # [rows, T], or [T, rows] if time is 0; fp32 or fp64
    values: Tensor,
    gamma: float | Tensor,  # a float, or a tensor that broadcasts
    lam: float | Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    after_the_end: Tensor,  # [rows], s_T
    final_values: Tensor | None,
    segment_end: Tensor | None,  # [1, T] for packed rows: the last step of each
    after_the_segment: Tensor | None,  # [1, T], gamma bootstrap of the step's segment
    *,
    advantages: Tensor,  # outputs
    returns: Tensor,
    time: int,
) -> None:
    """Advantages and returns by a scan of affine maps, where the end of a segment is a step that is cut."""
    td_error = torch.sub(rewards, values, out=advantages)
    product = gamma * lam
    if isinstance(product, Tensor):
        decay = product.expand_as(values).clone()
        gain = torch.addcmul(gamma * values, decay, td_error)
    else:
        decay = torch.full_like(values, product)
        gain = torch.add(gamma * values, td_error, alpha=product)
    if mask is not None:
        decay, gain = decay.masked_fill_(~mask, 1), gain.masked_fill_(~mask, 0)
    # Where a step is cut, end_value replaces s_{t+1}; None is 0.
    ends: list[tuple[Tensor, Tensor | None]] = []
    if segment_end is not None:
        ends.append((segment_end.expand_as(values), after_the_segment))
    if truncated is not None:
        ends.append((truncated if mask is None else truncated & mask, gamma * required(final_values)))
    if terminated is not None:
        ends.append((terminated if mask is None else terminated & mask, None))
    cut: Tensor | None = None
    end_value: Tensor | None = None
    for flag, value in ends:
        if value is not None or end_value is not None:
            value = values.new_zeros(()) if value is None else value
            end_value = torch.where(flag, value, 0 if end_value is None else end_value)
        cut = flag if cut is None else cut | flag
    if end_value is not None and cut is not None:
        gain += torch.where(cut, decay * end_value, 0)
    if cut is not None:
        decay.masked_fill_(cut, 0)
    nan_safe = not readable(gain) or not gain.sum().isfinite()
    following = _suffix_scan(decay, gain, after_the_end, time=time, nan_safe=nan_safe)
    if end_value is not None and cut is not None:
        following = torch.where(cut, end_value, following)
    elif cut is not None:
        following.masked_fill_(cut, 0)
    advantages.add_(following)
    torch.add(rewards, following, out=returns)
    if mask is not None:
        advantages.masked_fill_(~mask, 0)
        returns.masked_fill_(~mask, 0)


def _per_row(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A contiguous [rows] tensor from one number, or from one for each row."""
    if x.dtype is dtype and x.ndim == 1 and x.is_contiguous():
        return x.detach()
    x = x.detach().to(dtype)
    return (x.expand(rows) if x.ndim == 0 else x.reshape(rows)).contiguous()


class _Block(NamedTuple):
    """A block of rows for _gae_vectorised."""

    rewards: Tensor
    values: Tensor
    mask: Tensor | None
    terminated: Tensor | None
    truncated: Tensor | None
    final_values: Tensor | None
    advantages: Tensor
    returns: Tensor
    gamma: float | Tensor
    lam: float | Tensor
    after_the_end: Tensor


def _gae_torch(
    rewards: Tensor,
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    bootstrap: Tensor | None,
    final_values: Tensor | None,
    cu_seqlens: Tensor | None,
    time: int,
) -> None:
    """_gae_vectorised on a block of rows after the other, with the numbers per row in the shape of the steps."""
    ends: tuple[Tensor | None, Tensor | None] = None, None
    flags = (mask, terminated, truncated)
    mask, terminated, truncated = (x if x is None or x.dtype == torch.bool else x != 0 for x in flags)
    per_step = rewards, values, mask, terminated, truncated, final_values, advantages, returns
    if cu_seqlens is not None:
        steps = torch.arange(rewards.shape[1], device=rewards.device)
        segment = torch.searchsorted(cu_seqlens[1:], steps, right=True).clamp_(max=len(cu_seqlens) - 2)
        gamma, lam = (x[segment].unsqueeze(0) if isinstance(x, Tensor) else x for x in (gamma, lam))
        bootstrap = None if bootstrap is None else bootstrap[segment].unsqueeze(0)
        after_rows = values.new_zeros(1, 1).expand_as(values) if bootstrap is None else gamma * bootstrap
        ends = (steps + 1 == cu_seqlens[1:][segment]).unsqueeze(0), after_rows
        blocks = [_Block(*per_step, gamma, lam, values.new_zeros(1))]
    else:
        rows, T = rewards.shape[1 - time], rewards.shape[time]
        after_rows = values.new_zeros(rows) if bootstrap is None else gamma * bootstrap
        size = max(1, _BLOCK // T) if values.is_cpu else rows
        columns = (x.unsqueeze(time) if isinstance(x, Tensor) else x for x in (gamma, lam))
        parts = [
            x.split(size, dim) if isinstance(x, Tensor) else [x] * -(-rows // size)
            for x, dim in (*((x, 1 - time) for x in (*per_step, *columns)), (after_rows, 0))
        ]
        blocks = [_Block._make(part) for part in zip(*parts, strict=True)]
    for r, v, m, e, c, f, a, q, g, decay, s in blocks:
        _gae_vectorised(r, v, g, decay, m, e, c, s, f, *ends, advantages=a, returns=q, time=time)


def _gae_of_two_lambdas(
    rewards: Tensor, values: Tensor, options: GAEOptions, critic_lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages with lam, and returns with critic_lam: in one pass where numba compiles loops, else in two."""
    mask, numbers = required(options.mask), (options.gamma, options.lam, critic_lam)
    by_row = [x for x in (*numbers, options.bootstrap) if isinstance(x, Tensor)]
    if values.numel() and numba_works() and addressable(rewards, values, mask, *by_row):
        from ppo_fast.kernels.gae import cpu

        dtype, rows = float_dtype(rewards, values), len(values)
        rewards, values = (x.detach().to(dtype).contiguous() for x in (rewards, values))
        gamma, lam, critic_lam = (_per_row(x, rows, dtype) if isinstance(x, Tensor) else float(x) for x in numbers)
        bootstrap = None if options.bootstrap is None else _per_row(options.bootstrap, rows, dtype)
        return cpu.gae_of_two_lambdas(rewards, values, mask.contiguous(), gamma, lam, critic_lam, bootstrap)
    advantages, _ = gae(rewards, values, options._replace(critic_lam=None))
    _, returns = gae(rewards, values, options._replace(lam=critic_lam, critic_lam=None))
    return advantages, returns


def gae(rewards: Tensor, values: Tensor, options: GAEOptions) -> tuple[Tensor, Tensor]:
    """Advantages and returns of reference.gae, in fp32, or in fp64 if an input is."""
    if options.critic_lam is not None:
        return _gae_of_two_lambdas(rewards, values, options, options.critic_lam)
    gamma, lam, mask, terminated, truncated, bootstrap, final_values, cu_seqlens, time_major, _ = options
    shape, steps = values.shape, values.numel()
    dtype = values.dtype if values.dtype is rewards.dtype is torch.float32 else float_dtype(rewards, values)
    if steps == 0:
        return torch.empty_like(values, dtype=dtype), torch.empty_like(values, dtype=dtype)
    T = shape[0 if time_major else -1]
    rows = steps // T if cu_seqlens is None else len(cu_seqlens) - 1
    if truncated is None:
        final_values = None
    if len(shape) != 2:
        flat = (T, steps // T) if time_major else (steps // T, T)
        flags = (x if x is None else x.reshape(flat) for x in (mask, terminated, truncated, final_values))
        mask, terminated, truncated, final_values = flags
        rewards, values = rewards.reshape(flat), values.reshape(flat)
    if rewards.dtype is not dtype:
        rewards = rewards.detach().to(dtype)
    if values.dtype is not dtype:
        values = values.detach().to(dtype)
    if final_values is not None:
        final_values = final_values.detach().to(dtype)
    gamma = _per_row(gamma, rows, dtype) if isinstance(gamma, Tensor) else float(gamma)
    lam = _per_row(lam, rows, dtype) if isinstance(lam, Tensor) else float(lam)
    if bootstrap is not None:
        bootstrap = _per_row(bootstrap, rows, dtype)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long().contiguous()
    advantages, returns = torch.empty_like(values), torch.empty_like(values)  # with its strides: time-major stays so
    optional = mask, terminated, truncated, bootstrap, final_values, cu_seqlens
    rest = gamma, lam, *optional, 0 if time_major else 1
    by_row = [x for x in (gamma, lam) if isinstance(x, Tensor)]
    if numba_works() and addressable(rewards, values, *optional, *by_row):
        from ppo_fast.kernels.gae import cpu

        cpu.gae(rewards, values, advantages, returns, *rest)
    else:
        with torch.no_grad():
            _gae_torch(rewards.detach(), values.detach(), advantages, returns, *rest)
    return (advantages, returns) if len(shape) == 2 else (advantages.reshape(shape), returns.reshape(shape))
