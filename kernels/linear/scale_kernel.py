"""The last step of a backward of linear.py in one launch: gradients times their scale, in the dtypes of their tensors.

d hidden has the counted rows only; the others become 0. A program takes a block of a row of hidden and searches the
row among the counted ones, or a block of what has all of its elements. Bytes: each stored gradient is read once, and
each result is written once.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels.common.launch import Variant, device_guard, launch_options
from ppo_fast.kernels.linear.chunks import Gradients

_BLOCK = 2048  # 64 bytes of fp32 for a thread
_OPTIONS = launch_options(4)
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_UNIT = 8  # elements; rows whose length is a multiple of it start at multiples of 16 bytes


@triton.jit
def _find(chosen_ptr, row, n, N):
    """The place of a row among n of N rows, which are in order, if it is there."""
    low, high = tl.maximum(row - (N - n), 0), tl.minimum(row, n - 1)
    while low < high:
        middle = (low + high) // 2
        is_before = tl.load(chosen_ptr + middle) < row
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _scale_block(from_ptr, to_ptr, scale, block, size, BLOCK: tl.constexpr):
    start = block.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    from_ptr, to_ptr = tl.multiple_of(from_ptr + start, 16) + lane, tl.multiple_of(to_ptr + start, 16) + lane
    if start + BLOCK <= size:  # without a mask, since a mask of any size would make 4 loads of one of 16 bytes
        tl.store(to_ptr, (tl.load(from_ptr) * scale).to(to_ptr.dtype.element_ty))
    else:
        x = tl.load(from_ptr, mask=lane < size - start, other=0.0)
        tl.store(to_ptr, (x * scale).to(to_ptr.dtype.element_ty), mask=lane < size - start)


@triton.jit(do_not_specialize=list(range(18)))
def linear_scale_kernel(
    d_hidden_ptr,  # (n, D) fp32; this and the other gradients: any address of the type if there is none
    d_weight_ptr,  # (weight_size,) fp32
    d_bias_ptr,  # (bias_size,) fp32
    to_hidden_ptr,  # (N, D)
    to_weight_ptr,
    to_bias_ptr,
    chosen_ptr,  # (n,) int64, in order; any address if not has_chosen, where n = N
    upstream_ptr,  # []; any address if not has_upstream, which means 1
    inverse_ptr,  # []; the same
    has_chosen: tl.int32,
    has_upstream: tl.int32,
    has_inverse: tl.int32,
    n: tl.int64,
    N: tl.int64,
    D: tl.int64,
    weight_size: tl.int64,
    bias_size: tl.int64,
    hidden_programs: tl.int32,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    inverse = tl.load(inverse_ptr, mask=has_inverse != 0, other=1.0)
    scale = tl.load(upstream_ptr, mask=has_upstream != 0, other=1.0) * inverse
    weight_programs = tl.cdiv(weight_size, BLOCK).to(tl.int32)
    if program >= hidden_programs + weight_programs:
        _scale_block(d_bias_ptr, to_bias_ptr, scale, program - hidden_programs - weight_programs, bias_size, BLOCK)
    elif program >= hidden_programs:
        _scale_block(d_weight_ptr, to_weight_ptr, scale, program - hidden_programs, weight_size, BLOCK)
    elif has_chosen == 0:
        _scale_block(d_hidden_ptr, to_hidden_ptr, scale, program, N * D, BLOCK)
    else:
        row_programs = tl.cdiv(D, BLOCK)
        row, first = program // row_programs, program % row_programs * BLOCK
        place = _find(chosen_ptr, row, n, N)
        is_counted = tl.load(chosen_ptr + place) == row
        lane = tl.arange(0, BLOCK)
        inside = lane < tl.multiple_of(D - first, 8)  # see _UNIT
        d_ptr = tl.multiple_of(d_hidden_ptr + place * D + first, 16)
        to_ptr = tl.multiple_of(to_hidden_ptr + row * D + first, 16)
        x = tl.load(d_ptr + lane, mask=inside & is_counted, other=0.0)
        # NaN where the rows are not those of the mask, and what was searched is out of order.
        elsewhere = tl.where(inverse == inverse, 0.0, inverse)
        x = tl.where(is_counted, x * scale, elsewhere)
        tl.store(to_ptr + lane, x.to(to_ptr.dtype.element_ty), mask=inside)


def scale_gradients(
    d: Gradients,
    upstream: Tensor | None,  # []; so is the next one, and the gradients are multiplied by both
    inverse: Tensor | None,
    chosen: Tensor | None,  # the rows in d.hidden, None for all
    likes: list[Any],  # shapes and dtypes of hidden, weight and bias
) -> list[Tensor | None] | None:
    """The gradients of hidden, weight and bias; None for what the kernel does not take or need not do."""
    dtype = next(like[1] for x, like in zip(d, likes, strict=True) if x is not None)
    if dtype not in _POINTERS or (upstream is not None and upstream.dtype is not torch.float32):
        return None
    if upstream is None and inverse is None and chosen is None and dtype is torch.float32:
        return None
    made: list[Tensor | None] = [None, None, None]
    sizes, source, target = [0, 0, 0], None, None
    for i, x in enumerate(d):
        if x is None:
            continue
        shape, like = likes[i]
        if like is not dtype or x.dtype is not torch.float32 or not x.is_contiguous() or x.data_ptr() & 15:
            return None
        source, target = x, torch.empty(*shape, dtype=dtype, device=x.device)
        made[i], sizes[i] = target, target.numel()
    assert source is not None
    assert target is not None
    n = N = D = 0
    hidden_programs = -(-sizes[0] // _BLOCK)
    if d.hidden is not None:
        n, D = d.hidden.shape
        N = sizes[0] // D if D else 0
        if chosen is not None:
            if D % _UNIT or not n:
                return None
            hidden_programs = N * -(-D // _BLOCK)
    programs = hidden_programs - (-sizes[1] // _BLOCK) - (-sizes[2] // _BLOCK)
    if programs:
        with device_guard(source):
            linear_scale_kernel.run(
                *(source if x is None else x for x in d),
                *(target if x is None else x for x in made),
                _any_index(source.device) if chosen is None else chosen,
                source if upstream is None else upstream,
                source if inverse is None else inverse,
                int(chosen is not None),
                int(upstream is not None),
                int(inverse is not None),
                n,
                N,
                D,
                sizes[1],
                sizes[2],
                hidden_programs,
                _BLOCK,
                grid=(programs,),
                warmup=False,
                **_OPTIONS,
            )
    return made


@functools.cache
def _any_index(device: torch.device) -> Tensor:
    """An address that will not be read."""
    return torch.empty((), dtype=torch.int64, device=device)


def variants() -> list[Variant]:
    """Everything that the launcher above can start."""
    found = []
    for dtype, pointer in _POINTERS.items():
        types = {}
        for name in linear_scale_kernel.arg_names[:-1]:
            scalar = "i32" if name.startswith("has_") or name == "hidden_programs" else "i64"
            default = pointer if name.startswith("to_") else "*fp32" if name.endswith("_ptr") else scalar
            types[name] = "*i64" if name == "chosen_ptr" else default
        title = f"linear scale aligned {str(dtype)[6:]}"
        found.append(Variant(title, linear_scale_kernel, types, {"BLOCK": _BLOCK}, _OPTIONS))
    return found
