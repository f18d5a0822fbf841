"""The launches of advantages.py.

rlhf_advantages takes two launches, or three where long rows are few: one walks the spans of its rows and writes
rewards, KL, raw advantages and returns, with their moments and sums per program; the last merges those, whitens in
place and writes the statistics. Over a process group the moments are merged to three numbers and gathered in between.

Bytes for N tokens in fp32 with whitening: 13 N read and 16 N written, then 5 N read and 4 N written. For few long rows
another 13 N read, from the second level cache if they fit.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from ppo_fast.kernels.advantages_kernels import APPLY, COMPOSE, WALK, _advantages_kernel, _shape_kernel
from ppo_fast.kernels.gae import _LONG, _MANY_ROWS, _SHORT, NUM_WARPS, _as_rows, _per_row, aligned
from ppo_fast.kernels.gae import row_config as config_of
from ppo_fast.kernels.launch import REGISTERS, Variant, at_most
from ppo_fast.kernels.whiten_kernels import _merge_kernel, _moments_kernel, _whiten_kernel

BLOCK = 1024  # elements in a tile of whitening
_PROGRAMS = 512  # of a launch of whitening, at most: each reads all partial results
_WALKED_SPANS = 4  # that one program walks although programs of their own would be quicker: it saves a launch
_KINDS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}
STATISTICS = ("score_mean", "reward_mean", "kl_mean", "return_mean", "advantage_mean", "advantage_std")
_PLANES = 9  # numbers of each program of the scan: three moments and six sums


class Whitening(NamedTuple):
    """Options of masked_whiten."""

    shift_mean: bool
    unbiased: bool
    eps: float
    group: dist.ProcessGroup | None


class Shaping(NamedTuple):
    """Options of shape_rewards."""

    kl_coef: float
    kl_estimator: str
    score_clip: float | None
    reward_at: str

    def scalars(self) -> tuple[float, float, int, int]:
        """kl_coef, clip, kind and behind of the kernels."""
        clip = math.inf if self.score_clip is None else float(self.score_clip)
        return float(self.kl_coef), clip, _KINDS[self.kl_estimator], int(self.reward_at == "after_last")


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _inputs(scores: Tensor, *others: Tensor) -> tuple[list[Tensor], Tensor, bool]:
    """The [B, T] tensors with neighbouring steps, the scores, and whether they are per token."""
    per_token = scores.ndim == others[0].ndim
    rows = [_as_rows(x, x.shape) for x in others]
    return rows, _as_rows(scores, scores.shape) if per_token else scores.detach(), per_token


def launch_shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, shaping: Shaping
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, KL, and the longer mask (empty for "last")."""
    B, T = mask.shape
    rewards, kl = (torch.empty((B, T), dtype=torch.float32, device=mask.device) for _ in range(2))
    longer = torch.empty((B, T) if shaping.reward_at == "after_last" else (0,), dtype=torch.bool, device=mask.device)
    if mask.numel() == 0:
        return rewards, kl, longer
    (logprobs, refs, mask), scores, per_token = _inputs(scores, logprobs, ref_logprobs, mask)
    config = config_of(T)
    outputs = rewards, kl, longer if longer.numel() else None
    with torch.cuda.device_of(rewards):
        _shape_kernel[(triton.cdiv(B, config.R), triton.cdiv(T, config.span))](
            logprobs,
            refs,
            scores,
            mask,
            *outputs,
            *shaping.scalars(),
            B,
            T,
            *map(_stride, (logprobs, refs, scores, mask, rewards)),
            TOKEN_SCORES=per_token,
            ALIGNED=aligned(T, [logprobs, refs, mask, *outputs, scores if per_token else None]),
            R=config.R,
            W=config.W,
            num_warps=NUM_WARPS,
            **at_most(REGISTERS),
        )
    return rewards, kl, longer


def _flat(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As few and as long rows as there are: one if nothing has gaps."""
    together = x.is_contiguous() and (mask is None or mask.is_contiguous())
    T = x.shape[-1] if x.ndim and x.numel() and not together and x.shape[-1] >= BLOCK // 4 else max(1, x.numel())
    shape = (x.numel() // T, T)
    rows = _as_rows(x, shape)
    assert rows is not None
    return rows, _as_rows(mask, shape)


def _programs(x: Tensor) -> int:
    return max(1, min(_PROGRAMS, x.shape[0] * triton.cdiv(x.shape[1], BLOCK)))


def _apply_whitening(
    x: Tensor,  # (rows, T)
    mask: Tensor | None,
    out: Tensor,
    partial: Tensor,  # (3, parts), or (9, parts) with statistics
    stats: Tensor | None,
    whitening: Whitening,
    programs: int,
) -> None:
    """The last launch, and over a group, what comes before it."""
    moments = partial
    if whitening.group is not None:
        mine = partial.new_empty(3)
        _merge_kernel[(1,)](partial, partial.shape[1], mine, num_warps=NUM_WARPS)
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(whitening.group))]
        dist.all_gather(ranks, mine, group=whitening.group)
        moments = torch.stack(ranks, dim=1)
    rows, T = x.shape
    _whiten_kernel[(programs,)](
        x,
        mask,
        out,
        moments,
        None if stats is None else partial,
        stats,
        float(whitening.eps),
        int(whitening.unbiased),
        int(not whitening.shift_mean),
        rows,
        T,
        moments.shape[1],
        partial.shape[1],
        _stride(x),
        _stride(mask),
        ALIGNED=aligned(T, [x, mask, out]),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def launch_masked_whiten(x: Tensor, mask: Tensor | None, whitening: Whitening) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0 and whitening.group is None:
        return out
    rows, flags = _flat(x, mask)
    programs = _programs(rows)
    partial = torch.empty((3, programs), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _moments_kernel[(programs,)](
            rows,
            flags,
            partial,
            *rows.shape,
            _stride(rows),
            _stride(flags),
            ALIGNED=aligned(rows.shape[1], [rows, flags]),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            **at_most(REGISTERS),
        )
        _apply_whitening(rows, flags, out.view(rows.shape), partial, None, whitening, programs)
    return out


def _scan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # scores, logprobs, ref_logprobs, values, mask
    outputs: tuple[Tensor, ...],  # advantages, returns, rewards, KL
    shaping: Shaping,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
) -> Tensor:
    """One launch, or two where rows are long and few. Returns the programs' moments and sums, (9, programs)."""
    B, T = outputs[0].shape
    if B * T == 0:
        return outputs[0].new_zeros(_PLANES, 1)
    (logprobs, refs, values, mask), scores, per_token = _inputs(*tensors)
    config = config_of(T)
    spans = triton.cdiv(T, config.span)
    walks = spans <= _WALKED_SPANS or B >= _MANY_ROWS
    grid = triton.cdiv(B, config.R), 1 if walks else spans
    partial = outputs[0].new_empty(_PLANES, grid[0] * grid[1])
    maps = outputs[0].new_empty(0 if walks else 2 * spans * B)
    is_aligned = aligned(T, [logprobs, refs, values, mask, *outputs, scores if per_token else None])
    for mode in (WALK,) if walks else (COMPOSE, APPLY):
        _advantages_kernel[grid](
            logprobs,
            refs,
            scores,
            values,
            mask,
            *(_per_row(x, B) for x in (bootstrap, gamma, lam)),
            *outputs,
            maps,
            partial,
            *(0.0 if isinstance(x, Tensor) else float(x) for x in (gamma, lam)),
            *shaping.scalars(),
            B,
            T,
            spans,
            *map(_stride, (logprobs, refs, scores, values, mask, outputs[0])),
            MODE=mode.value,
            TOKEN_SCORES=per_token,
            ALIGNED=is_aligned,
            R=config.R,
            W=config.W,
            num_warps=NUM_WARPS,
            **at_most(REGISTERS),
        )
    return partial


def launch_rlhf_advantages(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # scores, logprobs, ref_logprobs, values, mask
    shaping: Shaping,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
    whiten: bool,
    whitening: Whitening,
) -> tuple[Tensor, ...]:
    """Advantages, returns, rewards, KL, and the statistics as one tensor."""
    mask = tensors[4]
    outputs = tuple(torch.empty(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(4))
    stats = torch.empty(len(STATISTICS), dtype=torch.float32, device=mask.device)
    with torch.cuda.device_of(mask):
        partial = _scan(tensors, outputs, shaping, gamma, lam, bootstrap)
        x, flags = _flat(outputs[0], mask)
        if not whiten:
            x = x[:0]  # the last launch then only makes statistics
        _apply_whitening(x, flags, x, partial, stats, whitening, _programs(x))
    return *outputs, stats


_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def _types(kernel: Any, pointers: dict[str, str], absent: tuple[str, ...] = ()) -> tuple[dict[str, str], dict]:
    """Argument types by name, and the pointers that are None."""
    floats = ("gamma", "lam", "kl_coef", "clip", "eps")
    types = {
        name: pointers.get(name, "fp32" if name in floats else "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if (not name.isupper() or name == "T") and name not in absent
    }
    return types, dict.fromkeys(absent)


def _variant(name: str, kernel: Any, pointers: dict[str, str], absent: tuple[str, ...], **constexprs: Any) -> Variant:
    """`aligned`: the pointers of inputs are, so that fp32 is read 16 bytes at a time."""
    types, none = _types(kernel, pointers, absent)
    on = constexprs.get("ALIGNED", False)
    name += (" aligned" if "*fp32" in pointers.values() else " vector") * on
    divisible = tuple(n for n, t in types.items() if on and t.startswith("*"))
    registers = REGISTERS if kernel in (_shape_kernel, _advantages_kernel, _moments_kernel) else None
    return Variant(name, kernel, types, constexprs | none, NUM_WARPS, aligned=divisible, registers=registers)


def variants() -> list[Variant]:
    """Launches for the ahead-of-time gate: every tiling, mode and dtype, with no optional tensor and with all."""
    found = [_variant("advantages merge", _merge_kernel, {}, ())]
    for (dtype, pointer), is_aligned in itertools.product(_POINTERS.items(), (False, True)):
        inputs = dict.fromkeys(("logprobs_ptr", "refs_ptr", "scores_ptr", "values_ptr"), pointer)
        inputs |= {"mask_ptr": "*i1", "longer_ptr": "*i1"}
        for (layout, config), per_token in itertools.product({"short": _SHORT, "long": _LONG}.items(), (False, True)):
            name = f"{layout} rows {dtype}{' token scores' * per_token}"
            sizes = {"TOKEN_SCORES": per_token, "ALIGNED": is_aligned, "R": config.R, "W": config.W}
            absent = ("longer_ptr",) if per_token else ()
            found.append(_variant(f"shape_rewards {name}", _shape_kernel, inputs, absent, **sizes))
            modes = {"walk": WALK} | ({"compose": COMPOSE, "apply": APPLY} if layout == "long" else {})
            for mode, number in modes.items():
                absent = ("bootstrap_ptr", "gammas_ptr", "lams_ptr") if per_token else ()
                title = f"rlhf_advantages {mode} {name}"
                found.append(_variant(title, _advantages_kernel, inputs, absent, MODE=number.value, **sizes))
        for masked in (False, True):
            x = {"x_ptr": pointer, "mask_ptr": "*i1"}
            absent, name = ((), " masked") if masked else (("mask_ptr",), "")
            sizes = {"ALIGNED": is_aligned, "BLOCK": BLOCK}
            found.append(_variant(f"moments {dtype}{name}", _moments_kernel, x, absent, **sizes))
            no_stats = (*absent, "sums_ptr", "stats_ptr")
            found.append(_variant(f"whiten {dtype}{name}", _whiten_kernel, x, no_stats, **sizes))
    for is_aligned in (False, True):
        x = {"x_ptr": "*fp32", "mask_ptr": "*i1"}
        sizes = {"ALIGNED": is_aligned, "BLOCK": BLOCK}
        found.append(_variant("whiten with statistics", _whiten_kernel, x, (), **sizes))
    return found
