"""The launches of gae, for padded, packed and time-major tensors.

One launch for most shapes: a program processes the spans of a few rows, from the last to the first. Few long rows or
columns, and packed rows, take two: every span is composed to one affine map by a program of its own, then every program
chains the maps after its span and writes its results. The arithmetic, and so the bits, are the same; see
kernel.py.

Bytes for N steps in fp32 with one flag: 9 N read and 8 N written; with two launches another 9 N read, from the second
level cache if they fit.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.common.launch import REGISTERS, Variant, device_guard, launch_options
from ppo_fast.kernels.common.memory import required
from ppo_fast.kernels.gae.kernel import gae_columns_kernel, gae_packed_kernel, gae_rows_kernel
from ppo_fast.kernels.gae.options import GAEOptions

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}  # of rewards and values
MANY_ROWS = 2048  # rows that keep a GPU busy with one program for each four
_MANY_COLUMNS = 16384  # columns that do, with one program for each 128
_ONE_PASS_TILES = 16  # of columns: processed by one program although several would be quicker, as it saves a launch
_LARGEST = 2**30  # sizes, and sums of two, are int32 in the kernels
LARGEST_GRID_Y = 65535  # of a GPU, in its second dimension, which has the spans


class Layout(NamedTuple):
    """How a program divides rows. Spans depend on the layout and T alone, so that a row's bits do not on other rows."""

    R: int  # rows in a program
    W: int  # steps in a tile
    tiles: int  # in a span; of columns, at least
    num_warps: int


LAYOUTS = {
    "short rows": Layout(R=16, W=32, tiles=4, num_warps=4),  # a warp has four rows at once
    "long rows": Layout(R=4, W=128, tiles=4, num_warps=4),  # a warp has 128 steps of one row
    "columns": Layout(R=128, W=8, tiles=2, num_warps=1),  # a thread has all steps of four columns
    "packed": Layout(R=16, W=32, tiles=4, num_warps=4),
}


def row_layout(T: int) -> str:
    """For rows whose steps are neighbours in memory."""
    return "short rows" if T <= LAYOUTS["short rows"].W else "long rows"


def column_tiles(T: int) -> int:
    """The tiles in a span of columns, so many that the chain of the spans' maps is a small part of the work."""
    return max(LAYOUTS["columns"].tiles, math.isqrt(T // 32))


@functools.cache
def keywords(layout: str, is_aligned: bool, write: bool) -> dict[str, int]:
    """Constexprs and options of a launch. Do not change the result: it is shared."""
    R, W, tiles, num_warps = LAYOUTS[layout]
    constexprs = {"WRITE": write, "W": W}
    constexprs |= {"C": R} if layout == "columns" else {"R": R, "TILES": tiles}
    if layout != "packed":  # whose rows start anywhere
        constexprs["ALIGNED"] = is_aligned
    return constexprs | launch_options(num_warps, REGISTERS)


@functools.cache
def no_flags(device: torch.device) -> Tensor:
    """The address of flags that are not given. It is never read."""
    return torch.zeros(1, dtype=torch.bool, device=device)


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, or in fp32 if they have several or one that the kernels do not read."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype != dtype or dtype not in POINTERS:
            return tuple(x.to(torch.float32) for x in tensors)
    return tensors


def row_numbers(
    rows: int, bootstrap: Tensor | None, gamma: float | Tensor, lam: float | Tensor, critic_lam: float | Tensor = 0.0
) -> tuple[int, Tensor | None, float, float, float]:
    """What a kernel needs of them: which are tensors (bits 0 to 3), those as one of fp32, and the others."""
    if bootstrap is None and type(gamma) is float and type(lam) is float and type(critic_lam) is float:
        return 0, None, gamma, lam, critic_lam
    present, given = 0, []
    for bit, x in enumerate((bootstrap, gamma, lam, critic_lam)):
        if isinstance(x, Tensor):
            present |= 1 << bit
            x = x.expand(rows) if x.ndim == 0 else x.reshape(rows)
            given.append(x.to(torch.float32).resolve_neg().contiguous())
    numbers = None if not given else given[0] if len(given) == 1 else torch.stack(given)
    gamma, lam, critic_lam = (0.0 if isinstance(x, Tensor) else float(x) for x in (gamma, lam, critic_lam))
    return present, numbers, gamma, lam, critic_lam


def as_rows(tensors: list[Tensor], rows: int, T: int) -> tuple[list[Tensor], list[int], bool]:
    """Tensors that have (rows, T) in memory with neighbouring steps, their row strides, and whether four neighbouring
    steps of each can be moved at once. Copies what has no such view. The shape of a tensor may be another one."""
    found, strides, multiple = [], [], T
    for x in tensors:
        if x.is_neg():
            x = x.resolve_neg()  # a pending negation is not in memory
        stride = T
        if not x.is_contiguous():
            x = x.reshape(rows, T)
            if T != 1 and x.stride(1) != 1:
                x = x.contiguous()
            stride = x.stride(0)
        found.append(x)
        strides.append(stride)
        multiple |= stride | (x.data_ptr() // x.itemsize)
    return found, strides, multiple % 4 == 0


def _flags(flags: list[Tensor | None], rows: int, T: int, *, device: torch.device) -> tuple[list[Tensor], int, bool]:
    """The flags with neighbouring steps, their common row stride, and whether four of them can be moved at once."""
    given = [x for x in flags if x is not None]
    if not given:
        return [no_flags(device)] * 3, 0, True
    tensors, strides, is_aligned = as_rows(given, rows, T)
    if len(given) > 1 and any(stride != strides[0] for stride in strides):
        tensors, strides, is_aligned = as_rows([x.contiguous() for x in given], rows, T)
    rest = iter(tensors)
    unused = tensors[0]
    return [unused if x is None else next(rest) for x in flags], strides[0], is_aligned


def gae(rewards: Tensor, values: Tensor, options: GAEOptions) -> tuple[Tensor, Tensor]:
    """Advantages and returns of reference.gae, contiguous, in fp32."""
    gamma, lam, mask, terminated, truncated, bootstrap, final_values, cu_seqlens, time_major, critic_lam = options
    if critic_lam is not None:
        raise NotImplementedError("the kernels of gae have one lambda; those of rlhf_advantages have critic_lam")
    advantages = torch.empty_like(rewards, dtype=torch.float32, memory_format=torch.contiguous_format)
    returns = torch.empty_like(advantages)
    total = rewards.numel()
    if total == 0:
        return advantages, returns
    T = rewards.shape[0 if time_major else -1]
    rows = total // T if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows > _LARGEST or T > _LARGEST:
        raise ValueError(f"gae takes at most {_LARGEST} rows and steps of a row (all steps if packed), got {rows}, {T}")
    if truncated is None:
        rewards, values = same_dtype(rewards, values)
        floats = [rewards, values]
    else:
        floats = [*same_dtype(rewards, values, required(final_values))]

    present, numbers, gamma, lam, _ = row_numbers(rows, bootstrap, gamma, lam)
    present = present << 3 | (mask is not None) | (terminated is not None) << 1 | (truncated is not None) << 2
    scalars = present, gamma, lam
    shape = (1, T) if cu_seqlens is not None else (T, rows) if time_major else (rows, T)
    floats, strides, floats_aligned = as_rows(floats, *shape)
    flags, flag_stride, flags_aligned = _flags([mask, terminated, truncated], *shape, device=rewards.device)
    tensors = *floats[:2], floats[-1], *flags, advantages if numbers is None else numbers
    with device_guard(rewards):
        if cu_seqlens is not None:
            _launch_packed(tensors, cu_seqlens, (advantages, returns), scalars)
        else:
            _launch_rows(
                tensors, (advantages, returns), scalars, rows, T, (*strides[:2], strides[-1], flag_stride),
                columns=time_major, is_aligned=floats_aligned and flags_aligned,
            )  # fmt: skip
    return advantages, returns


def _launch_rows(
    tensors: tuple[Tensor, ...],  # all inputs of the kernel
    outputs: tuple[Tensor, Tensor],
    scalars: tuple[int, float, float],  # present, gamma, lam
    rows: int,
    T: int,
    strides: tuple[int, ...],
    *,
    columns: bool,
    is_aligned: bool,
) -> None:
    """One launch where programs that process whole rows fill the device, else two."""
    layout = "columns" if columns else row_layout(T)
    R, W, tiles, _ = LAYOUTS[layout]
    if columns:
        kernel, tiles = gae_columns_kernel, column_tiles(T)
        spans = -(-T // (W * tiles))
        one_pass = spans * tiles <= _ONE_PASS_TILES or rows >= _MANY_COLUMNS
        sizes: tuple[int, ...] = rows, T, tiles
    else:
        kernel, sizes = gae_rows_kernel, (rows, T)
        spans = -(-T // (W * tiles))
        one_pass = spans == 1 or rows >= MANY_ROWS or spans > LARGEST_GRID_Y
    maps = outputs[0] if one_pass else outputs[0].new_empty(2 * spans * rows)
    arguments = *tensors, *outputs, maps, *scalars, *sizes, *strides
    programs = -(-rows // R)
    if not one_pass:
        kernel.run(*arguments, grid=(programs, spans - 1), warmup=False, **keywords(layout, is_aligned, False))
    grid = programs, 1 if one_pass else spans
    kernel.run(*arguments, grid=grid, warmup=False, **keywords(layout, is_aligned, True))


def _launch_packed(
    tensors: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    outputs: tuple[Tensor, Tensor],
    scalars: tuple[int, float, float],
) -> None:
    """Two launches, also for what has one span, because the lengths are on the device."""
    R, W, tiles, _ = LAYOUTS["packed"]
    total, rows = outputs[0].numel(), cu_seqlens.shape[0] - 1
    slots = total // (W * tiles) + rows + 2
    cu_seqlens = cu_seqlens.contiguous()
    present, gamma, lam = scalars
    if cu_seqlens.dtype == torch.int64:
        present, cu_seqlens = present | 1 << 6, cu_seqlens.view(torch.int32)
    maps = outputs[0].new_empty(2 * slots)
    arguments = *tensors, cu_seqlens, *outputs, maps, present, gamma, lam, rows, total
    grid = (-(-slots // R),)
    gae_packed_kernel.run(*arguments, grid=grid, warmup=False, **keywords("packed", False, False))
    gae_packed_kernel.run(*arguments, grid=grid, warmup=False, **keywords("packed", False, True))


def argument_types(kernel: triton.JITFunction, constexprs: dict[str, int], pointers: dict[str, str]) -> dict[str, str]:
    """Argument -> type, of a kernel whose pointers are fp32 but for those in `pointers`."""
    scalars = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    names = [name for name in kernel.arg_names if name not in constexprs]
    return {name: scalars.get(name) or pointers.get(name, "*fp32") for name in names}


def variant(title: str, kernel: triton.JITFunction, keys: dict[str, int], pointers: dict[str, str]) -> Variant:
    """The variant that a launch with these keywords starts."""
    constexprs = {name: x for name, x in keys.items() if name in kernel.arg_names}
    options = {name: x for name, x in keys.items() if name not in kernel.arg_names}
    return Variant(title, kernel, argument_types(kernel, constexprs, pointers), constexprs, options)


def variants() -> list[Variant]:
    """Return every variant that the launches above can start."""
    kernels = {"columns": gae_columns_kernel, "packed": gae_packed_kernel}
    flags = dict.fromkeys(("mask_ptr", "terminated_ptr", "truncated_ptr"), "*u1")
    found = []
    for layout, (dtype, pointer), is_aligned, write in itertools.product(
        LAYOUTS, POINTERS.items(), (False, True), (False, True)
    ):
        if (layout == "packed" and is_aligned) or (layout == "short rows" and not write):
            continue  # packed rows start anywhere; a short row has one span
        pointers = dict.fromkeys(("rewards_ptr", "values_ptr", "final_ptr"), pointer) | flags | {"cu_ptr": "*i32"}
        wide = " aligned" if dtype == torch.float32 else " vector"
        title = f"gae {layout}{'' if write else ' compose'} {str(dtype)[6:]}{wide * is_aligned}"
        kernel = kernels.get(layout, gae_rows_kernel)
        found.append(variant(title, kernel, keywords(layout, is_aligned, write), pointers))
    return found
