"""The launches of token_logprobs: one forward, one backward. kernel.py describes what they compute."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.common.launch import REGISTERS, Variant, device_guard, launch_options
from ppo_fast.kernels.common.online_softmax import warp_size
from ppo_fast.kernels.logprobs.kernel import token_logprobs_bwd_kernel, token_logprobs_fwd_kernel
from ppo_fast.kernels.logprobs.options import allocate


class _Layout(NamedTuple):
    """What a launch may assume of addresses: constexprs of both kernels."""

    UNIT: bool  # the stride of columns is 1
    ALIGN: int  # bytes; every row starts at a multiple of it
    V_MULTIPLE: int  # V is a multiple of it
    PEEL: int = 1  # the backward starts at a multiple of this many elements, so that odd rows move 16 bytes, too


class _Tile(NamedTuple):
    ROWS: int
    BLOCK: int
    LANES: int  # partial sums kept per row
    threads: int


# By the largest V: some rows of a tiny vocabulary to a program, or one row of a larger one, forward in a loop. Chosen
# by V only, so that a row's bits do not depend on N. Each gives a thread at least 16 bytes to load; partial sums that
# are LANES apart then belong to one thread, whether 32 or 64 of them execute together.
_TILES = {
    64: _Tile(8, 64, 64, 64),
    1024: _Tile(1, 1024, 512, 64),
    2**31: _Tile(1, 4096, 1024, 128),
}


def _tile(V: int) -> _Tile:
    for largest, tile in _TILES.items():
        if largest >= V:
            return tile
    raise ValueError(f"V must be at most 2^31, got {V}")


@functools.cache
def _layouts(itemsize: int, tile: _Tile, backward: bool) -> dict[str, _Layout]:
    """Return every layout that a launch with this tile may choose, by name."""
    vector = 16 // itemsize
    layouts = {"strided": _Layout(False, itemsize, 1), "aligned": _Layout(True, 16, vector)}
    if tile.BLOCK > 1024:  # for less, fewer variants count more than the last address computation
        layouts |= {"unit": _Layout(True, itemsize, 1), "rows_aligned": _Layout(True, 16, 1)}
        if backward:
            layouts["peeled_aligned"] = _Layout(True, 16, 1, vector)
    return layouts


def _choose_layout(
    tile: _Tile, V: int, itemsize: int, backward: bool, starts_aligned: bool, rows_aligned: bool, same_rows: bool
) -> _Layout:
    """Return the layout for columns that are adjacent in memory."""
    layouts = _layouts(itemsize, tile, backward)
    unit = layouts.get("unit", layouts["strided"])
    if not starts_aligned:
        return unit
    if rows_aligned:
        return layouts["aligned"] if not V * itemsize & 15 else layouts.get("rows_aligned", unit)
    return layouts.get("peeled_aligned", unit) if same_rows else unit


def _layout(tile: _Tile, V: int, operands: Sequence[tuple[Tensor, tuple[int, ...]]]) -> _Layout:
    """Return the layout of logits and, in backward, their gradient, each with its row strides."""
    itemsize, row_strides = operands[0][0].element_size(), operands[0][1]
    backward = len(operands) == 2
    starts_aligned = rows_aligned = same_rows = True
    for x, strides in operands:
        if V > 1 and x.stride(-1) != 1:
            return _layouts(itemsize, tile, backward)["strided"]
        starts_aligned = starts_aligned and not x.data_ptr() & 15
        rows_aligned = rows_aligned and not (strides[0] | strides[1]) * itemsize & 15
        same_rows = same_rows and strides == row_strides
    return _choose_layout(tile, V, itemsize, backward, starts_aligned, rows_aligned, same_rows)


_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@functools.cache
def _config(
    backward: bool, tile: _Tile, layout: _Layout, with_entropy: bool, threads_per_warp: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The constexprs of a launch and its options. A row of one block always gets its entropy: it costs little there,
    and every constexpr doubles the variants."""
    kernel = token_logprobs_bwd_kernel if backward else token_logprobs_fwd_kernel
    values = tile._asdict() | layout._asdict() | {"WITH_ENTROPY": with_entropy or tile.BLOCK <= 1024}
    constexprs = {name: values[name] for name in kernel.arg_names if name in values}
    return constexprs, launch_options(tile.threads // threads_per_warp, REGISTERS if backward else None)


@functools.cache
def _keywords(
    backward: bool, tile: _Tile, layout: _Layout, with_entropy: bool, threads_per_warp: int
) -> dict[str, int]:
    """Both in one dict. Do not change the result: it is shared."""
    constexprs, options = _config(backward, tile, layout, with_entropy, threads_per_warp)
    return constexprs | options


def variants(threads_per_warp: int = 32) -> list[Variant]:
    """Return every variant that the launches below can start on a GPU with such warps."""
    found = []
    for dtype, pointer in _POINTERS.items():
        for tile in _TILES.values():
            for kind, kernel in (("fwd", token_logprobs_fwd_kernel), ("bwd", token_logprobs_bwd_kernel)):
                for name, layout in _layouts(dtype.itemsize, tile, kind == "bwd").items():
                    for with_entropy in (False, True) if tile.BLOCK > 1024 else (True,):
                        title = f"token_logprobs {kind} {str(dtype)[6:]} {tile.ROWS}x{tile.BLOCK} {name}"
                        title += "" if with_entropy else " without entropy"
                        config = _config(kind == "bwd", tile, layout, with_entropy, threads_per_warp)
                        found.append(Variant(title, kernel, _types(kernel, pointer), *config))
    return found


def _types(kernel: triton.JITFunction, logits_pointer: str) -> dict[str, str]:
    """Argument -> type, from the kernel's own names."""
    special = {"logits_ptr": logits_pointer, "grad_ptr": logits_pointer, "tokens_ptr": "*i64", "mask_ptr": "*u1"}
    special |= {"scale": "fp32", "inverse_temperature": "fp32"}
    types = {}
    for name in kernel.arg_names:
        if name.islower() or name in ("N", "T", "V"):
            default = "*fp32" if name.endswith("_ptr") else "i64" if "_stride_" in name else "i32"
            types[name] = special.get(name, default)
    return types


class _Rows(NamedTuple):
    """The operands of a launch, whose leading dimensions merge into two, [B, T]."""

    tensors: tuple[Tensor, ...]
    T: int
    strides: list[tuple[int, int]]  # of b and t, per operand


def _merge(shape: torch.Size, strides: list[tuple[int, ...]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Merge leading dimensions as far as every operand allows: sizes, and per dimension each operand's stride."""
    sizes: list[int] = []
    merged: list[tuple[int, ...]] = []
    for i, size in enumerate(shape):
        here = tuple(stride[i] for stride in strides)
        if size == 1:
            continue
        if sizes and all(before == now * size for before, now in zip(merged[-1], here, strict=True)):
            sizes[-1], merged[-1] = sizes[-1] * size, here
        else:
            sizes, merged = [*sizes, size], [*merged, here]
    return sizes, merged


@functools.cache
def _no_mask(device: torch.device) -> Tensor:
    """An address that will not be read."""
    return torch.empty((), dtype=torch.bool, device=device)


def _rows(logits: Tensor, tokens: Tensor, mask: Tensor | None, *grad: Tensor) -> _Rows:
    """View the operands as [B, T] rows. Copy only logits with three unmergeable leading dimensions."""
    flags = _no_mask(logits.device) if mask is None else mask
    tensors, copied = (logits, tokens, flags, *grad), 0
    if mask is None:
        tensors = (logits, tokens, flags.expand(tokens.shape), *grad)
    while True:
        sizes, merged = _merge(tokens.shape, [x.stride()[: tokens.ndim] for x in tensors])
        if len(sizes) <= 2:
            break
        copied += 1
        tensors = tuple(x.contiguous() if copied == 2 or i in (1, 2) else x for i, x in enumerate(tensors))
    sizes, merged = [1, 1, *sizes][-2:], [(0,) * len(tensors)] * (2 - len(sizes)) + merged
    return _Rows(tensors, sizes[1], list(zip(*merged, strict=True)))


@functools.lru_cache(maxsize=256)
def _contiguous_setup(
    backward: bool, V: int, itemsize: int, is_aligned: bool, with_entropy: bool, threads_per_warp: int
) -> tuple[tuple[int, ...], _Tile, _Layout, dict[str, int]]:
    """Strides, tile, layout and keywords where nothing has gaps: the usual case, so it is cached."""
    tile = _tile(V)
    layout = _choose_layout(tile, V, itemsize, backward, is_aligned, not V * itemsize & 15, True)
    strides = (0, V, 1) * (1 + backward) + (0, 1) * 2
    return strides, tile, layout, _keywords(backward, tile, layout, with_entropy, threads_per_warp)


def _setup(
    with_entropy: bool, logits: Tensor, tokens: Tensor, mask: Tensor | None, *grad: Tensor
) -> tuple[tuple[Tensor, ...], int, tuple[int, ...], _Tile, _Layout, dict[str, int]]:
    """Prepare a launch: logits, tokens, mask and gradient as the kernel takes them, T, the kernel's strides, tile,
    layout, and keywords."""
    V, device, backward = logits.shape[-1], logits.device, bool(grad)
    if tokens.dtype is not torch.int64:
        tokens = tokens.to(torch.int64)
    if logits.is_contiguous() and tokens.is_contiguous():
        flags = _no_mask(device) if mask is None else mask
        address = logits.data_ptr() | (grad[0].data_ptr() if grad else 0)
        if flags.is_contiguous() and (not grad or grad[0].is_contiguous()):
            key = backward, V, logits.element_size(), not address & 15, with_entropy, warp_size(device)
            return (logits, tokens, flags, *grad), tokens.numel(), *_contiguous_setup(*key)
    rows = _rows(logits, tokens, mask, *grad)
    columns: tuple[int, ...] = ()
    logits, tile = rows.tensors[0], _tile(V)
    of_logits, of_tokens, of_mask, *of_grad = rows.strides
    operands = [(logits, of_logits), *zip(rows.tensors[3:], of_grad, strict=True)]
    for x, strides in operands:
        columns = *columns, *strides, x.stride(-1)
    layout = _layout(tile, V, operands)
    keywords = _keywords(backward, tile, layout, with_entropy, warp_size(device))
    return rows.tensors, rows.T, (*columns, *of_tokens, *of_mask), tile, layout, keywords


def forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    logprobs, entropy, statistics = allocate(logits, tokens, with_entropy)
    N, V = tokens.numel(), logits.shape[-1]
    if N == 0:
        return logprobs, entropy, statistics
    tensors, T, strides, tile, _, keywords = _setup(with_entropy, logits, tokens, mask)
    with device_guard(logits):
        token_logprobs_fwd_kernel.run(
            *tensors,
            logprobs,
            logprobs if entropy is None else entropy,
            statistics,
            int(mask is not None),
            int(with_entropy),
            math.log2(math.e) / temperature,
            1 / temperature,
            N,
            T,
            V,
            *strides,
            grid=(-(-N // tile.ROWS),),
            warmup=False,
            **keywords,
        )
    return logprobs, entropy, statistics


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
    N, V = tokens.numel(), logits.shape[-1]
    if grad.numel() == 0:
        return grad
    tensors, T, strides, tile, layout, keywords = _setup(grad_entropy is not None, logits, tokens, mask, grad)
    logits, tokens, flags, target = tensors
    with device_guard(logits):
        token_logprobs_bwd_kernel.run(
            statistics if grad_logprobs is None else grad_logprobs.contiguous(),
            statistics if grad_entropy is None else grad_entropy.contiguous(),
            logits,
            target,
            tokens,
            flags,
            statistics,
            int(grad_logprobs is not None),
            int(grad_entropy is not None),
            int(mask is not None),
            math.log2(math.e) / temperature,
            1 / temperature,
            N,
            T,
            V,
            *strides,
            grid=(-(-N // tile.ROWS), -(-(V + layout.PEEL - 1) // tile.BLOCK)),
            warmup=False,
            **keywords,
        )
    return grad if target is grad else grad.copy_(target)
