"""The last step of the linear operations' backward: gradients times their scale, in the dtypes of their tensors.

d hidden has the counted rows only; the others become 0. A program takes a block of a row of hidden and searches the
row among the counted ones, or a block of what has all of its elements. Bytes: each stored gradient is read once, and
each result is written once.
"""

import triton
import triton.language as tl


@triton.jit
def _find(indices_ptr, row, n, N):
    """The position of a row among n of N rows, which are in order, if it is one of them."""
    low, high = tl.maximum(row - (N - n), 0), tl.minimum(row, n - 1)
    while low < high:
        middle = (low + high) // 2
        is_before = tl.load(indices_ptr + middle) < row
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
    indices_ptr,  # (n,) int64, in order; any address if not has_indices, where n = N
    upstream_ptr,  # []; any address if not has_upstream, which means 1
    inverse_ptr,  # []; the same
    has_indices: tl.int32,
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
    elif has_indices == 0:
        _scale_block(d_hidden_ptr, to_hidden_ptr, scale, program, N * D, BLOCK)
    else:
        row_programs = tl.cdiv(D, BLOCK)
        row, first = program // row_programs, program % row_programs * BLOCK
        position = _find(indices_ptr, row, n, N)
        is_counted = tl.load(indices_ptr + position) == row
        lane = tl.arange(0, BLOCK)
        inside = lane < tl.multiple_of(D - first, 8)  # the launcher checks it
        d_ptr = tl.multiple_of(d_hidden_ptr + position * D + first, 16)
        to_ptr = tl.multiple_of(to_hidden_ptr + row * D + first, 16)
        x = tl.load(d_ptr + lane, mask=inside & is_counted, other=0.0)
        # NaN where the rows are not those of the mask, and what was searched is out of order.
        elsewhere = tl.where(inverse == inverse, 0.0, inverse)
        x = tl.where(is_counted, x * scale, elsewhere)
        tl.store(to_ptr + lane, x.to(to_ptr.dtype.element_ty), mask=inside)
