"""The matrix products around a chunk of logits: which rows, how many at a time, and the gradients of the LM head.

Tokens are taken a chunk at a time. A chunk's logits h W^T go into one buffer, a backend's row math turns them into
d loss / d logits, and two more products give d hidden and d weight, both accumulated in fp32 (fp64 for fp64). Nothing
here knows what the loss is.

Operands of a product have one dtype. Where the hardware multiplies fp16 and bf16 into fp32 ("native"), that is theirs.
Elsewhere, on a CPU above all, it is the dtype of the arithmetic, and the weight is converted tile by tile of the
vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# A CPU's chunk is small enough to stay beside its dW in a server's last cache, and large enough that adding to dW,
# which every chunk does once, stays cheap beside the product. On a GPU that needs 4096 rows.
CPU_CHUNK_BYTES, CPU_CHUNK_ROWS, DEVICE_CHUNK_ROWS = 64 << 20, 256, 4096
LINE = 128  # bytes; rows of a chunk start at multiples of it
_VECTOR_BYTES = 128  # of scalars that a token may take: statistics, and what the loss needs of it
_LOW = (torch.float16, torch.bfloat16)


class Head(NamedTuple):
    """How hidden states become logits z: raw = h W^T + bias, scaled, squeezed, divided by the temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V] in the dtype of the arithmetic, a padded_copy
    temperature: float
    softcap: float | None
    logit_scale: float
    logits_dtype: torch.dtype  # what h W^T is rounded to

    @property
    def factor(self) -> float:
        """d z / d raw, where no softcap bends it."""
        return self.logit_scale / self.temperature


class Rows(NamedTuple):
    """The counted tokens: all N of them if `chosen` is None."""

    chosen: Tensor | None  # [n] int64 into the flattened tokens
    total: int  # n
    wrong: Tensor | None  # true if `num_counted` was not what the mask says; only where it could not be checked

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] -> [n], what stands at counted tokens."""
        flat = x.detach().reshape(-1)
        return (flat if self.chosen is None else flat.index_select(0, self.chosen)).to(dtype).contiguous()

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[n] -> [...], 0 where masked; NaN everywhere if the rows are not those of the mask."""
        if self.chosen is None:
            out = x.reshape(shape).clone()
        else:
            out = x.new_zeros(math.prod(shape)).index_copy_(0, self.chosen, x).view(shape)
        return out if self.wrong is None else out.masked_fill_(self.wrong, math.nan)


class Gradients(NamedTuple):
    """d loss / d of the counted rows of hidden, of weight and of bias, in the dtype of the arithmetic."""

    hidden: Tensor | None  # [n, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


class Plan(NamedTuple):
    """How the work is cut."""

    arithmetic: torch.dtype
    operand: torch.dtype
    logits: torch.dtype  # of the chunk's buffer
    separate: bool  # dlogits have a buffer of their own, in the operand's dtype
    rows: int  # of a chunk
    tile: int  # rows of the weight that are converted at a time


def counted_rows(mask: Tensor | None, num_counted: int | None, N: int) -> Rows:
    """Finds the counted tokens. Without `num_counted` a mask on a GPU costs one wait for their number."""
    if mask is None:
        if num_counted is not None and num_counted != N:
            raise ValueError(f"num_counted must be {N}, the number of tokens, if no mask is given; got {num_counted}")
        return Rows(None, N, None)
    flat = mask.reshape(-1)
    chosen: Tensor | None
    if num_counted is None:
        if flat.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("mask: counting its tokens would wait, which a graph capture cannot: pass num_counted")
        chosen = flat.nonzero().squeeze(1)
        return Rows(None if len(chosen) == N else chosen, len(chosen), None)
    wrong = None
    if flat.device.type != "cpu":
        wrong = flat.sum() != num_counted
    elif int(flat.sum()) != num_counted:
        raise ValueError(f"num_counted must be the number of True in mask, {int(flat.sum())}; got {num_counted}")
    chosen = None if num_counted == N else torch.nonzero_static(flat, size=num_counted, fill_value=0).squeeze(1)
    return Rows(chosen, num_counted, wrong)


def _padded(V: int, dtype: torch.dtype) -> int:
    """Elements from one row of a chunk to the next."""
    line = LINE // dtype.itemsize
    return -(-V // line) * line


def padded_copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[V] that starts at a multiple of 128 bytes, with zeros up to another behind its end."""
    return torch.zeros(_padded(len(x), dtype), dtype=dtype, device=x.device)[: len(x)].copy_(x)


def _widens(device: torch.device) -> bool:
    """Whether a product of fp16 or bf16 can be written in fp32."""
    return device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)


def _dtypes(
    hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None, native: bool
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the arithmetic, of the products' operands, and of the chunk's buffer."""
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    arithmetic = torch.float64 if promoted == torch.float64 else torch.float32
    native = native and hidden.dtype == weight.dtype and hidden.dtype in _LOW
    # Without such products the logits are rounded afterwards, which only a CPU does.
    allowed = (None, arithmetic, hidden.dtype) if native or hidden.device.type == "cpu" else (None, arithmetic)
    if logits_dtype not in allowed:
        raise ValueError(f"logits_dtype must be one of {allowed}, got {logits_dtype}")
    if not native:
        return arithmetic, arithmetic, arithmetic
    return arithmetic, hidden.dtype, (logits_dtype or arithmetic) if _widens(hidden.device) else hidden.dtype


def make_plan(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    rows: Rows,
    *,
    native: bool,
    in_place: bool,  # the row math may write dlogits over the logits
    chunk_bytes: int | None,
    logits_dtype: torch.dtype | None,
    needs: tuple[bool, ...],  # gradients wanted: of hidden, weight, bias
    scratch_bytes: int,  # of the row math
) -> Plan:
    """Cuts the rows so that all memory beyond inputs and gradients fits `chunk_bytes`, but at least one row at a time.

    Only the fp32 accumulator of d weight comes on top, where there is more than one chunk and the weight is not fp32.
    Left to itself the plan takes 4096 rows (on a CPU 64 MiB, or 256 rows), and all at once where that needs no more
    memory. It depends on shapes and dtypes only, and then not even on the gradients wanted: products of as many rows
    give the same bits, so log-probabilities scored without gradients are those that the loss computes.
    """
    (V, D), n, cpu = weight.shape, rows.total, hidden.device.type == "cpu"
    arithmetic, operand, logits = _dtypes(hidden, weight, logits_dtype, native)
    shares_memory = in_place and logits == operand
    separate = any(needs) and not shares_memory
    if chunk_bytes is None:
        needs = (True, True, True)
    logits_row = _padded(V, logits) * logits.itemsize
    apart = any(needs) and not shares_memory
    other_row = _padded(V, operand) * operand.itemsize if apart else 0
    if rows.chosen is not None or hidden.dtype != operand:
        other_row += D * operand.itemsize
    if in_place and needs[1]:
        other_row += D * operand.itemsize  # rows of hidden times their factors
    fixed = scratch_bytes + n * (_VECTOR_BYTES + (D * (arithmetic.itemsize - hidden.itemsize) if needs[0] else 0))
    gradient, accumulator = (V * D * x.itemsize if needs[1] else 0 for x in (weight.dtype, arithmetic))

    least = (CPU_CHUNK_ROWS if cpu else DEVICE_CHUNK_ROWS) * (logits_row + other_row)
    budget = max(least, CPU_CHUNK_BYTES * cpu) + fixed if chunk_bytes is None else chunk_bytes
    tile = V
    if weight.dtype != operand:
        tile = min(V, max(1, budget // 4 // max(1, D * operand.itemsize)))
        fixed += tile * D * operand.itemsize
    # Where dlogits have a buffer of their own, the only chunk's logits are gone before d weight is made.
    alone = (max(n * logits_row, accumulator) if apart else n * logits_row + accumulator) - gradient
    room = budget + (accumulator - gradient if chunk_bytes is None else 0)
    size = n if fixed + n * other_row + alone <= room else max(1, (budget - fixed) // (logits_row + other_row))
    chunks = max(1, -(-n // max(1, size)))
    return Plan(arithmetic, operand, logits, separate, max(1, -(-n // chunks)), tile)


def _mm(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b. fp16 and bf16 go into fp32 without rounding in between where `_widens`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type == "cpu" or not _widens(a.device):
        wide = out.dtype if a.device.type == "cpu" else a.dtype
        product = torch.mm(a.to(wide), b.to(wide))
        out.add_(product) if add else out.copy_(product)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _tiles(weight: Tensor, plan: Plan) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the operand's dtype, piece by piece where it has to be converted."""
    if weight.dtype == plan.operand:
        yield slice(0, len(weight)), weight
        return
    buffer = torch.empty(plan.tile, weight.shape[1], dtype=plan.operand, device=weight.device)
    for start in range(0, len(weight), plan.tile):
        piece = weight[start : start + plan.tile]
        yield slice(start, start + len(piece)), buffer[: len(piece)].copy_(piece)


def _hidden_chunk(hidden: Tensor, rows: Rows, part: slice, plan: Plan) -> Tensor:
    chunk = hidden[part] if rows.chosen is None else hidden.index_select(0, rows.chosen[part])
    return chunk.to(plan.operand)


def _buffer(plan: Plan, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(plan.rows, _padded(V, dtype), dtype=dtype, device=device)[:, :V]


def _parts(rows: Rows, plan: Plan) -> Iterator[slice]:
    for start in range(0, rows.total, plan.rows):
        yield slice(start, min(start + plan.rows, rows.total))


def for_each_chunk(
    hidden: Tensor,  # [N, D]
    head: Head,
    rows: Rows,
    plan: Plan,
    row_math: Callable[[Tensor, slice], None],  # of logits [rows, V], and which of the counted rows they are
) -> None:
    """Logits, chunk by chunk; one product."""
    logits = _buffer(plan, len(head.weight), plan.logits, hidden.device) if rows.total else hidden
    for part in _parts(rows, plan):
        chunk, h = logits[: part.stop - part.start], _hidden_chunk(hidden, rows, part, plan)
        for columns, tile in _tiles(head.weight, plan):
            _mm(h, tile.T, chunk[:, columns])
        row_math(chunk, part)


def differentiate(
    hidden: Tensor,  # [N, D]
    head: Head,
    rows: Rows,
    plan: Plan,
    needs: tuple[bool, ...],  # gradients wanted: of hidden, weight, bias
    row_math: Callable[[Tensor, Tensor, slice], Tensor | None],
) -> Gradients:
    """Logits, chunk by chunk, and what their gradients say about hidden, weight and bias; up to three products.

    row_math(logits [rows, V], d, part) writes d loss / d logits to d, which may be the logits' own memory. A factor per
    row that it left out is what it returns: multiplying hidden's rows is cheaper than multiplying the chunk's.
    """
    (V, D), device = head.weight.shape, hidden.device
    d_hidden = hidden.new_empty(rows.total, D, dtype=plan.arithmetic) if needs[0] else None
    d_bias = hidden.new_zeros(V, dtype=plan.arithmetic) if needs[2] else None
    d_weight = hidden.new_zeros(V, D, dtype=plan.arithmetic) if needs[1] and not rows.total else None
    if not rows.total:
        return Gradients(d_hidden, d_weight, d_bias)
    logits = _buffer(plan, V, plan.logits, device)
    dlogits = _buffer(plan, V, plan.operand, device) if plan.separate else logits
    for part in _parts(rows, plan):
        size, h = part.stop - part.start, _hidden_chunk(hidden, rows, part, plan)
        for columns, tile in _tiles(head.weight, plan):
            _mm(h, tile.T, logits[:size, columns])
        d = dlogits[:size]
        factor = row_math(logits[:size], d, part)
        if part.stop == rows.total:
            del logits  # the last chunk's logits are not needed any more, and d weight may still have to be made
        if d_hidden is not None:
            for columns, tile in _tiles(head.weight, plan):
                _mm(d[:, columns], tile, d_hidden[part], add=columns.start > 0)
            if factor is not None:
                d_hidden[part].mul_(factor.unsqueeze(1))
        if needs[1]:
            scaled_h = h if factor is None else h * factor.unsqueeze(1)
            if d_weight is None:
                d_weight = hidden.new_empty(V, D, dtype=plan.arithmetic)
                _mm(d.T, scaled_h, d_weight)
            else:
                _mm(d.T, scaled_h, d_weight, add=True)
        if d_bias is not None:
            d_bias += d.sum(0, dtype=plan.arithmetic) if factor is None else d.T.mv(factor)
    return Gradients(d_hidden, d_weight, d_bias)


def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x * scale, rounded once to `dtype`; on a CPU a piece at a time, since PyTorch would convert all of it first."""
    if scale is None:
        return x.to(dtype)
    if x.dtype == dtype:
        return x * scale
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    step = max(1, (1 << 20) // max(1, x[:1].numel())) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x), step):
        torch.mul(x[start : start + step], scale, out=out[start : start + step])
    return out
