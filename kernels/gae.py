"""Generalised advantage estimation in Triton: reference.gae for padded, packed and time-major tensors.

One launch for most shapes: a program processes the spans of a few rows, from the last to the first. Few long rows, and
packed ones, take two: every span is composed to one affine map by a program of its own, then every program chains the
maps behind its span and writes its results. The arithmetic, and so the bits, are the same; see gae_kernels.py.

Bytes for N steps in fp32 with one flag: 9 N read and 8 N written; with two launches another 9 N read, from the second
level cache if they fit.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.gae_kernels import _gae_columns_kernel, _gae_packed_kernel, _gae_rows_kernel
from ppo_fast.kernels.gae_op import public_function
from ppo_fast.kernels.launch import REGISTERS, Variant, device_guard, launch_options

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}  # of rewards and values
_LARGEST = 2**31 - 1  # sizes are int32 in the kernels
_GRID_Y = 65535  # the largest grid of a GPU in its second dimension, which has the spans
MANY_ROWS = 2048  # rows that keep a GPU busy with one program for each four
_MANY_COLUMNS = 16384  # columns that do, with one program for each 128
_WALKED_TILES = 16  # of columns: processed by one program although several would be quicker, as it saves a launch


class Config(NamedTuple):
    """How rows are cut."""

    R: int  # rows in a program
    W: int  # steps in a tile
    tiles: int  # in a span
    num_warps: int

    @property
    def span(self) -> int:
        return self.W * self.tiles


# Of rows, a warp has one row of 128 steps or four of 32. Of columns, it has 128, a thread four of them with all steps.
SHORT, LONG = Config(R=16, W=32, tiles=4, num_warps=4), Config(R=4, W=128, tiles=4, num_warps=4)
_COLUMNS = Config(R=128, W=8, tiles=2, num_warps=1)


def row_config(T: int) -> Config:
    """For rows whose steps are neighbours in memory. It depends on T alone, as bits must not depend on other rows."""
    if T <= SHORT.W:
        return SHORT
    tiles = -(-T // (LONG.W * _GRID_Y))
    return LONG if tiles <= LONG.tiles else LONG._replace(tiles=tiles)


def column_config(T: int) -> Config:
    """For columns: spans are so long that the chain of their maps is a small part of the work."""
    tiles = math.isqrt(T // 32)
    return _COLUMNS if tiles <= _COLUMNS.tiles else _COLUMNS._replace(tiles=tiles)


@functools.cache
def keywords(kernel: triton.JITFunction, config: Config, is_aligned: bool, write: bool) -> dict[str, Any]:
    """Constexprs and options of a launch. The result is shared: do not change it."""
    rows = "C" if kernel is _gae_columns_kernel else "R"
    constexprs: dict[str, Any] = {"WRITE": write, rows: config.R, "W": config.W}
    if kernel is not _gae_packed_kernel:
        constexprs["ALIGNED"] = is_aligned
    return constexprs | launch_options(config.num_warps, REGISTERS)


@functools.cache
def no_flags(device: torch.device) -> Tensor:
    """The address of flags that are not given. It is never read."""
    return torch.zeros(1, dtype=torch.bool, device=device)


def plain(x: Tensor) -> Tensor:
    """x without a pending negation, which a kernel would not see in memory."""
    return x.resolve_neg() if x.is_neg() else x


def as_rows(x: Tensor, rows: int, T: int) -> tuple[Tensor, int]:
    """A tensor that has (rows, T) in memory with neighbouring steps, and its row stride. Copies what has no such view.

    The shape of the tensor may be another one.
    """
    if x.is_contiguous():
        return x, T
    x = x.reshape(rows, T)
    if T != 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def aligned(T: int, tensors: Sequence[Tensor], strides: Sequence[int]) -> bool:
    """Whether four neighbouring steps of every tensor can be moved at once."""
    if T % 4 or any(stride % 4 for stride in strides):
        return False
    return not any(x.data_ptr() % (4 * x.itemsize) for x in tensors)


def per_row(x: float | Tensor | None, rows: int) -> Tensor | None:
    """One fp32 number for each row as a contiguous tensor, or None where a scalar argument serves."""
    if not isinstance(x, Tensor):
        return None
    x = plain(x.expand(rows) if x.ndim == 0 else x.reshape(rows))
    return x.to(torch.float32).contiguous()


def same_dtype(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in their common dtype, or in fp32 if they have several or one that the kernels do not read."""
    dtype = tensors[0].dtype
    if dtype not in POINTERS or any(x.dtype != dtype for x in tensors):
        tensors = [x.to(torch.float32) for x in tensors]
    return [plain(x) for x in tensors]


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
    shape, device = rewards.shape, rewards.device
    outputs = tuple(torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    total = rewards.numel()
    if total == 0:
        return outputs
    packed = cu_seqlens is not None
    rows = len(cu_seqlens) - 1 if packed else total // shape[0 if time_major else -1]
    T = total if packed else total // rows
    if max(rows, T) > _LARGEST:
        raise ValueError(f"gae takes at most {_LARGEST} rows and steps of a row (all steps if packed), got {rows}, {T}")
    unused = no_flags(device)
    floats = [rewards, values] if truncated is None else [rewards, values, final_values]
    rewards, values, *finals = same_dtype(floats)
    flags = [unused if x is None else x for x in (mask, terminated, truncated)]
    tensors = [rewards, values, *flags, *(finals or [values])]
    numbers = [per_row(x, rows) for x in (bootstrap, gamma, lam)]
    present = sum(1 << bit for bit, x in enumerate((mask, terminated, truncated, *numbers)) if x is not None)
    scalars = (
        present,
        0.0 if isinstance(gamma, Tensor) else float(gamma),
        0.0 if isinstance(lam, Tensor) else float(lam),
    )
    numbers = [outputs[0] if x is None else x for x in numbers]
    with device_guard(rewards):
        if packed:
            _launch_packed(tensors, numbers, cu_seqlens, outputs, scalars)
        elif time_major:
            _launch_rows(_gae_columns_kernel, column_config(T), tensors, numbers, outputs, scalars, rows, T)
        else:
            _launch_rows(_gae_rows_kernel, row_config(T), tensors, numbers, outputs, scalars, rows, T)
    return outputs


def _launch_rows(
    kernel: triton.JITFunction,
    config: Config,
    tensors: list[Tensor],  # rewards, values, mask, terminated, truncated, final values
    numbers: list[Tensor],  # bootstrap, gammas, lams
    outputs: tuple[Tensor, ...],
    scalars: tuple[int, float, float],  # present, gamma, lam
    rows: int,
    T: int,
) -> None:
    """One launch where programs that process whole rows fill the device, else two."""
    columns = kernel is _gae_columns_kernel
    outer, inner = (T, rows) if columns else (rows, T)
    views, strides = zip(*[as_rows(x, outer, inner) for x in tensors], strict=True)
    is_aligned = aligned(inner, views, strides)
    spans = -(-T // config.span)
    walks = spans == 1 or rows >= (_MANY_COLUMNS if columns else MANY_ROWS)
    if columns:
        walks |= spans * config.tiles <= _WALKED_TILES
    maps = outputs[0] if walks else torch.empty(2 * spans * rows, dtype=torch.float32, device=outputs[0].device)
    arguments = (*views, *numbers, *outputs, maps, *scalars, rows, T, spans, config.tiles, *strides)
    programs = -(-rows // config.R)
    if not walks:
        kernel[programs, spans - 1](*arguments, **keywords(kernel, config, is_aligned, False))
    kernel[programs, 1 if walks else spans](*arguments, **keywords(kernel, config, is_aligned, True))


def _launch_packed(
    tensors: list[Tensor],
    numbers: list[Tensor],
    cu_seqlens: Tensor,
    outputs: tuple[Tensor, ...],
    scalars: tuple[int, float, float],
) -> None:
    """Two launches: what has one span, too, as lengths are known to the device only."""
    config, total, rows = SHORT, outputs[0].numel(), len(cu_seqlens) - 1
    slots = total // config.span + rows + 2
    maps = outputs[0].new_empty(2 * slots)
    boundaries = cu_seqlens.contiguous()
    if boundaries.dtype == torch.int64:
        boundaries = boundaries.view(torch.int32)  # the lower halves, twice as far apart
    cu_stride = len(boundaries) // len(cu_seqlens)
    arguments = (
        *(x.contiguous() for x in tensors),
        *numbers,
        boundaries,
        *outputs,
        maps,
        *scalars,
        rows,
        total,
        config.tiles,
        (rows + 1).bit_length(),
        cu_stride,
    )
    programs = -(-slots // config.R)
    for write in (False, True):
        _gae_packed_kernel[programs,](*arguments, **keywords(_gae_packed_kernel, config, False, write))


gae = public_function("triton", _gae)


def argument_types(kernel: triton.JITFunction, constexprs: dict[str, Any], pointers: dict[str, str]) -> dict[str, str]:
    """Argument -> type, of a kernel whose pointers are fp32 but for those in `pointers`."""
    scalars = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    names = [name for name in kernel.arg_names if name not in constexprs]
    return {name: scalars.get(name) or pointers.get(name, "*fp32") for name in names}


def variants() -> list[Variant]:
    """Every variant that the launches above can start."""
    layouts = {
        "short rows": (_gae_rows_kernel, SHORT, (False, True)),
        "long rows": (_gae_rows_kernel, LONG, (False, True)),
        "columns": (_gae_columns_kernel, _COLUMNS, (False, True)),
        "packed": (_gae_packed_kernel, SHORT, (False,)),
    }
    flags = dict.fromkeys(("mask_ptr", "terminated_ptr", "truncated_ptr"), "*u1")
    found = []
    for (layout, tiling), (dtype, pointer) in itertools.product(layouts.items(), POINTERS.items()):
        kernel, config, alignments = tiling
        pointers = dict.fromkeys(("rewards_ptr", "values_ptr", "final_ptr"), pointer) | flags | {"cu_ptr": "*i32"}
        for is_aligned, write in itertools.product(alignments, (False, True)):
            if layout == "short rows" and not write:
                continue  # such a row has one span
            wide = " aligned" if dtype == torch.float32 else " vector"
            title = f"gae {layout}{'' if write else ' compose'} {str(dtype)[6:]}{wide * is_aligned}"
            keys = keywords(kernel, config, is_aligned, write)
            constexprs = {name: x for name, x in keys.items() if name in kernel.arg_names}
            types = argument_types(kernel, constexprs, pointers)
            found.append(Variant(title, kernel, types, constexprs, launch_options(config.num_warps, REGISTERS)))
    return found
