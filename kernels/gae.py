"""Generalised advantage estimation in Triton: reference.gae for padded, packed and time-major tensors.

One launch for most shapes: a program walks the spans of a few rows, from the last to the first. Few long rows, and
packed ones, take two: every span is composed to one affine map by a program of its own, then every program chains the
maps behind its span and writes its results. The arithmetic, and so the bits, are the same; see gae_kernels.py.

Bytes for N steps in fp32 with one flag: 9 N read and 8 N written; with two launches another 9 N read, from the second
level cache if they fit.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.gae_kernels import APPLY, COMPOSE, TILES, WALK, _gae_kernel
from ppo_fast.kernels.gae_op import public_function
from ppo_fast.kernels.launch import REGISTERS, Variant, at_most

NUM_WARPS = 4
_MANY_ROWS = 2048  # rows, or columns, that keep a GPU busy with one program walking each
_WALK, _COMPOSE, _APPLY = WALK.value, COMPOSE.value, APPLY.value


class Config(NamedTuple):
    """How rows are cut. It depends on T alone, as a row's bits must not depend on the other rows."""

    R: int  # rows in a program
    W: int  # steps in a tile

    @property
    def span(self) -> int:
        return self.W * TILES.value


_COLUMNS, _SHORT, _LONG = Config(R=128, W=16), Config(R=16, W=32), Config(R=4, W=128)


def row_config(T: int) -> Config:
    """For rows whose steps are neighbours in memory."""
    return _SHORT if T <= _SHORT.W else _LONG


def _as_rows(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Two dimensions, the inner one contiguous; copies only where there is no such view."""
    if x is None:
        return None
    x = x.detach().reshape(shape)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def aligned(T: int, tensors: list[Tensor | None]) -> bool:
    """Whether four neighbouring steps of every tensor can be moved at once."""
    given = [x for x in tensors if x is not None]
    return T % 4 == 0 and all(x.stride(0) % 4 == 0 and x.data_ptr() % 16 == 0 for x in given)


def _per_row(x: float | Tensor | None, rows: int) -> Tensor | None:
    """One number per row as a contiguous tensor, or None where a scalar argument serves."""
    if not isinstance(x, Tensor):
        return None
    return (x.detach().expand(rows) if x.ndim == 0 else x.detach().reshape(rows)).contiguous()


def _launch(
    tensors: list[Tensor | None],  # rewards, values, mask, terminated, truncated, final values
    outputs: tuple[Tensor, Tensor],
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    T: int,
    config: Config,
    *,
    columns: bool,
) -> None:
    """One launch where programs that walk whole rows fill the device, else two."""
    packed = cu_seqlens is not None
    spans = T // config.span + rows if packed else triton.cdiv(T, config.span)
    walks = not packed and (spans == 1 or rows >= _MANY_ROWS)
    maps = outputs[0].new_empty(0 if walks else (2 * spans if packed else 2 * spans * rows))
    strides = [0 if x is None or packed else x.stride(0) for x in (*tensors, outputs[0])]
    per_row = [_per_row(x, rows) for x in (bootstrap, gamma, lam)]
    scalars = [0.0 if isinstance(x, Tensor) else float(x) for x in (gamma, lam)]
    is_aligned = not packed and aligned(T, [*tensors, *outputs])
    grid = (triton.cdiv(spans if packed else rows, config.R), 1 if walks or packed else spans)
    for mode in (_WALK,) if walks else (_COMPOSE, _APPLY):
        _gae_kernel[grid](
            *tensors,
            *per_row,
            cu_seqlens,
            *outputs,
            maps,
            *scalars,
            rows,
            T,
            spans,
            max(rows - 1, 0).bit_length() if packed else 0,
            *strides,
            MODE=mode,
            COLUMNS=columns,
            ALIGNED=is_aligned,
            R=config.R,
            W=config.W,
            num_warps=NUM_WARPS,
            **at_most(REGISTERS),
        )


def _gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    bootstrap: Tensor | None,
    final_values: Tensor | None,
    cu_seqlens: Tensor | None,
    time_major: bool,
) -> tuple[Tensor, Tensor]:
    """The launcher; what it returns is contiguous."""
    advantages, returns = (torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))
    total = rewards.numel()
    if total == 0:
        return advantages, returns
    per_step = [rewards, values, mask, terminated, truncated, None if truncated is None else final_values]
    if cu_seqlens is not None:
        rows, T, config, shape = len(cu_seqlens) - 1, total, _SHORT, (1, total)
    elif time_major:
        T = rewards.shape[0]
        rows, config, shape = total // T, _COLUMNS, (T, total // T)
    else:
        T = rewards.shape[-1]
        rows, config, shape = total // T, row_config(T), (total // T, T)
    tensors = [_as_rows(x, shape) for x in per_step]
    outputs = advantages.view(shape), returns.view(shape)
    boundaries = None if cu_seqlens is None else cu_seqlens.contiguous()
    with torch.cuda.device_of(rewards):
        _launch(tensors, outputs, gamma, lam, bootstrap, boundaries, rows, T, config, columns=time_major)
    return advantages, returns


gae = public_function("triton", _gae)


_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def variants() -> list[Variant]:
    """Launches for the ahead-of-time gate: every tiling, mode and dtype, with no optional tensor and with all."""
    found = []
    tilings = {"columns": _COLUMNS, "short rows": _SHORT, "long rows": _LONG, "packed": _SHORT}
    for layout, config in tilings.items():
        modes = {"compose": _COMPOSE, "apply": _APPLY} | ({} if layout == "packed" else {"walk": _WALK})
        for (mode, number), dtype, everything, aligned_ in (
            (mode, dtype, everything, aligned_)
            for mode in modes.items()
            for dtype in _POINTERS
            for everything in (False, True)
            for aligned_ in ((False,) if layout == "packed" else (False, True))
        ):
            constexprs = {"MODE": number, "COLUMNS": layout == "columns", "ALIGNED": aligned_}
            constexprs |= {"R": config.R, "W": config.W}
            types, absent = _types(_POINTERS[dtype], everything=everything, packed=layout == "packed")
            name = f"gae {layout} {mode} {dtype}{' all options' * everything}{' vector' * aligned_}"
            found.append(Variant(name, _gae_kernel, types, constexprs | absent, NUM_WARPS, registers=REGISTERS))
    return found


def _types(pointer: str, *, everything: bool, packed: bool) -> tuple[dict[str, str], dict[str, None]]:
    """Argument types by name, and the pointers that are None."""
    flags = ("mask_ptr", "terminated_ptr", "truncated_ptr")
    special = dict.fromkeys(("rewards_ptr", "values_ptr", "final_ptr"), pointer) | dict.fromkeys(flags, "*i1")
    special |= {"cu_ptr": "*i64", "gamma": "fp32", "lam": "fp32"}
    optional = () if everything else (*flags, "final_ptr", "bootstrap_ptr", "gammas_ptr", "lams_ptr")
    absent = {name: None for name in (*optional, *(() if packed else ("cu_ptr",)))}
    types = {
        name: special.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in _gae_kernel.arg_names
        if (not name.isupper() or name == "T") and name not in absent
    }
    return types, absent
