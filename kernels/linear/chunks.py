"""The matrix products around a chunk of logits: which rows, how many at a time, and the gradients of the LM head.

Tokens are processed a chunk at a time. A chunk's logits h W^T are written to one buffer, an epilogue (steps.py) turns
them into d loss / d logits, and two more products give d hidden and d weight, both accumulated in fp32 (fp64 for
fp64). This file is independent of the loss.

Operands of a product have one dtype. Where the hardware multiplies fp16 and bf16 into fp32 ("native"), that is theirs.
Elsewhere, on a CPU above all, it is the dtype of the arithmetic, and the weight is converted tile by tile of the
vocabulary. A CPU that multiplies bf16 in hardware gets these fp32 operands, too, with oneDNN's precision of fp32
products set to bf16 around each: it rounds the operands, and accumulates and returns fp32.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# A CPU's chunk is small enough to fit a server's last cache together with its dW, and large enough that adding to dW,
# which every chunk does once, stays cheap beside the product. On a GPU that needs 4096 rows.
CPU_CHUNK_BYTES, CPU_CHUNK_ROWS, DEVICE_CHUNK_ROWS = 64 << 20, 256, 4096
LINE = 128  # bytes; rows of a chunk start at multiples of it
_VECTOR_BYTES = 128  # of scalars that a token may take: statistics, and what the loss needs of it
_LOW = (torch.float16, torch.bfloat16)


class Head(NamedTuple):
    """The LM head: logits z are raw = h W^T + bias, scaled, squeezed, divided by the temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V] in the dtype of the arithmetic, a padded_copy
    temperature: float
    softcap: float | None
    logit_scale: float
    logits_dtype: torch.dtype  # what h W^T is rounded to

    @property
    def factor(self) -> float:
        """d z / d raw, without the derivative of the softcap."""
        return self.logit_scale / self.temperature


class Rows(NamedTuple):
    """The counted tokens: all N of them if `indices` is None."""

    indices: Tensor | None  # [n] int64 into the flattened tokens
    total: int  # n
    count_mismatch: (
        Tensor | None
    )  # true if `num_counted` was not what the mask says; only where it could not be checked

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] -> [n], the values at counted tokens."""
        flat = x.detach().reshape(-1)
        return (flat if self.indices is None else flat.index_select(0, self.indices)).to(dtype).contiguous()

    def scatter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[n] -> [...], 0 where masked; NaN everywhere if the rows are not those of the mask."""
        if self.indices is None:
            out = x.reshape(shape).clone()
        else:
            out = x.new_zeros(math.prod(shape)).index_copy_(0, self.indices, x).view(shape)
        return out if self.count_mismatch is None else out.masked_fill_(self.count_mismatch, math.nan)


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
    mixed: bool  # fp32 operands that the product rounds to bf16
    separate: bool  # dlogits have a buffer of their own, in the operand's dtype
    rows: int  # of a chunk
    tile: int  # rows of the weight that are converted at a time


def counted_rows(mask: Tensor | None, num_counted: int | None, N: int) -> Rows:
    """Find the counted tokens. Without `num_counted` a mask on a GPU makes the host wait once for their number."""
    if mask is None:
        if num_counted is not None and num_counted != N:
            raise ValueError(f"num_counted must be {N}, the number of tokens, if no mask is given; got {num_counted}")
        return Rows(None, N, None)
    flat = mask.reshape(-1)
    indices: Tensor | None
    if num_counted is None:
        if flat.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("mask: counting its tokens would wait, which a graph capture cannot: pass num_counted")
        indices = flat.nonzero().squeeze(1)
        return Rows(None if len(indices) == N else indices, len(indices), None)
    count_mismatch = None
    if flat.device.type != "cpu":
        count_mismatch = flat.sum() != num_counted
    elif int(flat.sum()) != num_counted:
        raise ValueError(f"num_counted must be the number of True in mask, {int(flat.sum())}; got {num_counted}")
    indices = None if num_counted == N else torch.nonzero_static(flat, size=num_counted, fill_value=0).squeeze(1)
    return Rows(indices, num_counted, count_mismatch)


def _padded(V: int, dtype: torch.dtype) -> int:
    """Elements from one row of a chunk to the next."""
    line = LINE // dtype.itemsize
    return -(-V // line) * line


def padded_copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[V] that starts at a multiple of 128 bytes, with zeros up to another after its end."""
    return torch.zeros(_padded(len(x), dtype), dtype=dtype, device=x.device)[: len(x)].copy_(x)


@functools.cache
def _multiplies_into_fp32(device: torch.device, dtype: torch.dtype, *_switches: bool) -> bool:
    """Try products of fp16 or bf16 that are written in fp32: ROCm has none, and TunableOp and fp16 accumulation
    reject them. A function of PyTorch's global switches, too."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(a, a, out_dtype=out.dtype, out=out)
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except (RuntimeError, TypeError):  # TypeError: a PyTorch without out_dtype
        return False
    return True


class _Precision(Protocol):
    """A backend of PyTorch whose products of fp32 matrices have a precision."""

    fp32_precision: str


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16: AMX, or those of AVX-512."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextlib.contextmanager
def mixed_products() -> Iterator[None]:
    """Products of fp32 matrices on a CPU round their operands to bf16 inside this block, and accumulate in fp32."""
    setting: _Precision = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 (the module makes it on import)
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def product_path(device: torch.device, dtype: torch.dtype) -> str:
    """How products of operands of `dtype` with fp32 results are computed on a device, for ppo_fast.doctor.

    "exact": operands are fp32 or fp64 already. "widening": fp16 or bf16 operands, fp32 results. "mixed": operands are
    converted to fp32, and the product rounds them to bf16. "converted": operands are converted to fp32 first.
    "rounded": results are rounded to `dtype`, then converted.
    """
    if dtype not in _LOW:
        return "exact"
    if device.type == "cpu":
        return "mixed" if dtype == torch.bfloat16 and cpu_multiplies_bf16() else "converted"
    if device.type != "cuda" or torch.version.hip is not None:
        return "rounded"
    switches = torch.cuda.tunable.is_enabled(), bool(torch.backends.cuda.matmul.allow_fp16_accumulation)
    return "widening" if _multiplies_into_fp32(device, dtype, *switches) else "rounded"


def _dtypes(
    hidden: torch.dtype,
    weight: torch.dtype,
    logits_dtype: torch.dtype | None,
    compute: torch.dtype,
    native: bool,
    path: str,
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the arithmetic, of the products' operands, and of the chunk's buffer; `path` is that of dtype `compute`."""
    promoted = torch.promote_types(hidden, weight)
    arithmetic = torch.float64 if promoted == torch.float64 else torch.float32
    native = native and compute in _LOW
    # Without such products the logits are rounded afterwards, which only a CPU does.
    allowed = (None, arithmetic, compute) if native or path in ("converted", "mixed") else (None, arithmetic)
    if logits_dtype not in allowed:
        raise ValueError(f"logits_dtype must be one of {allowed}, got {logits_dtype}")
    if not native or (path == "rounded" and logits_dtype == arithmetic):
        return arithmetic, arithmetic, arithmetic  # slower, but the fp32 that was asked for
    return arithmetic, compute, compute if path == "rounded" else logits_dtype or arithmetic


def make_plan(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    rows: Rows,
    *,
    native: bool,
    in_place: bool,  # the epilogue may write dlogits over the logits
    chunk_bytes: int | None,
    logits_dtype: torch.dtype | None,
    needs: tuple[bool, ...],  # gradients wanted: of hidden, weight, bias
    scratch_bytes: int,  # of the epilogue
    compute_dtype: torch.dtype | None = None,  # that operands are rounded to; None: that of hidden and weight
) -> Plan:
    """Cut the rows so that all memory beyond inputs and gradients fits `chunk_bytes`, but at least one row at a time.

    Only the fp32 accumulator of d weight comes on top, where there is more than one chunk and the weight is not fp32.
    By default the plan takes 4096 rows (on a CPU 64 MiB, or 256 rows), and all at once where that needs no more
    memory. It depends on shapes, dtypes and chunk_bytes only, not on the gradients wanted: products of as many rows
    give the same bits, so log-probabilities scored without gradients are those that the loss computes.
    """
    compute = torch.promote_types(hidden.dtype, weight.dtype) if compute_dtype is None else compute_dtype
    return compute_plan(
        (int(weight.shape[0]), int(weight.shape[1]), int(rows.total), rows.indices is not None),  # int: not symbolic
        (hidden.dtype, weight.dtype, logits_dtype, compute),
        product_path(hidden.device, compute),
        (CPU_CHUNK_ROWS, CPU_CHUNK_BYTES) if hidden.device.type == "cpu" else (DEVICE_CHUNK_ROWS, 0),
        native,
        in_place,
        chunk_bytes,
        needs,
        scratch_bytes,
    )


@functools.lru_cache(maxsize=256)
def compute_plan(
    sizes: tuple[int, int, int, bool],  # V, D, n, whether the rows of hidden are gathered
    # of hidden, of weight, asked for logits, and that operands are rounded to
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None, torch.dtype],
    path: str,
    least: tuple[int, int],  # rows of a chunk, and bytes of all rows
    native: bool,
    in_place: bool,
    chunk_bytes: int | None,
    needs: tuple[bool, ...],
    scratch_bytes: int,
) -> Plan:
    (V, D, n, gathers), (hidden, weight, logits_dtype, compute) = sizes, dtypes
    arithmetic, operand, logits = _dtypes(hidden, weight, logits_dtype, compute, native, path)
    mixed = path == "mixed" and operand == torch.float32
    shares_memory = in_place and logits == operand
    separate = any(needs) and not shares_memory
    needs = (True, True, True)
    logits_row = _padded(V, logits) * logits.itemsize
    apart = any(needs) and not shares_memory
    other_row = _padded(V, operand) * operand.itemsize if apart else 0
    if gathers or hidden != operand:
        other_row += D * operand.itemsize
    if in_place and needs[1]:
        other_row += D * operand.itemsize  # rows of hidden times their factors
    fixed = scratch_bytes + n * (_VECTOR_BYTES + (D * (arithmetic.itemsize - hidden.itemsize) if needs[0] else 0))
    gradient, accumulator = (V * D * x.itemsize if needs[1] else 0 for x in (weight, arithmetic))
    if path == "rounded" and operand in _LOW:  # the product, before it is added to its accumulator
        fixed += V * D * operand.itemsize if needs[1] else 0
        other_row += D * operand.itemsize if needs[0] else 0

    budget = max(least[0] * (logits_row + other_row), least[1]) + fixed if chunk_bytes is None else chunk_bytes
    tile = V
    if weight != operand:
        tile = min(V, max(1, budget // 4 // max(1, D * operand.itemsize)))
        fixed += tile * D * operand.itemsize
    # Where dlogits have a buffer of their own, the only chunk's logits are gone before d weight is made.
    alone = (max(n * logits_row, accumulator) if apart else n * logits_row + accumulator) - gradient
    room = budget + (accumulator - gradient if chunk_bytes is None else 0)
    size = n if fixed + n * other_row + alone <= room else max(1, (budget - fixed) // (logits_row + other_row))
    chunks = max(1, -(-n // max(1, size)))
    return Plan(arithmetic, operand, logits, mixed, separate, max(1, -(-n // chunks)), tile)


def _mm(a: Tensor, b: Tensor, out: Tensor, *, mixed: bool, add: bool = False) -> None:
    """out = a b, or out += a b; see product_path."""
    if a.dtype == out.dtype:
        with mixed_products() if mixed else contextlib.nullcontext():
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
        return
    path = product_path(a.device, a.dtype)
    if path == "widening":
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    wide = a.dtype if path == "rounded" else out.dtype
    product = torch.mm(a.to(wide), b.to(wide))
    out.add_(product) if add else out.copy_(product)


def operand_dtype(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """The dtype of the operands of `linear_product`."""
    return compute if product_path(device, compute) == "widening" else torch.float32


def linear_product(hidden: Tensor, weight: Tensor, compute: torch.dtype) -> Tensor:
    """[..., D] and [V, D] -> h W^T [..., V] in fp32, from operands rounded to `compute`."""
    path, operand = product_path(hidden.device, compute), operand_dtype(hidden.device, compute)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(operand)
    out = torch.empty(len(rows), len(weight), dtype=torch.float32, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        _mm(rows, weight.to(operand).t(), out, mixed=path == "mixed")
    return out.view(*hidden.shape[:-1], len(weight))


def _tiles(weight: Tensor, plan: Plan) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the operand's dtype, piece by piece where it has to be converted."""
    if weight.dtype == plan.operand:
        yield slice(None), weight
        return
    buffer = torch.empty(plan.tile, weight.shape[1], dtype=plan.operand, device=weight.device)
    for start in range(0, len(weight), plan.tile):
        piece = weight[start : start + plan.tile]
        yield slice(start, start + len(piece)), buffer[: len(piece)].copy_(piece)


def _columns(x: Tensor, columns: slice) -> Tensor:
    return x if columns.start is None else x[:, columns]


def _rows_of(x: Tensor, part: slice) -> Tensor:
    return x if part.start == 0 and part.stop == len(x) else x[part]


def _hidden_chunk(hidden: Tensor, rows: Rows, part: slice, plan: Plan) -> Tensor:
    if rows.indices is None:
        chunk = _rows_of(hidden, part)
    else:
        chunk = hidden.index_select(0, _rows_of(rows.indices, part))
    return chunk if chunk.dtype == plan.operand else chunk.to(plan.operand)


def chunk_buffer(plan: Plan, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A chunk. Row kernels load the padding after each of its rows, too, and ignore what is there; oneDNN's products of
    bf16 with AMX multiply it by 0, so that it must be finite."""
    padded = _padded(V, dtype)
    make = torch.zeros if device.type != "cuda" and dtype in _LOW else torch.empty
    buffer = make(plan.rows, padded, dtype=dtype, device=device)
    return buffer if padded == V else buffer[:, :V]


def _parts(rows: Rows, plan: Plan) -> Iterator[slice]:
    for start in range(0, rows.total, plan.rows):
        yield slice(start, min(start + plan.rows, rows.total))


def for_each_chunk(
    hidden: Tensor,  # [N, D]
    head: Head,
    rows: Rows,
    plan: Plan,
    apply_epilogue: Callable[[Tensor, slice], None],  # of logits [rows, V], and which of the counted rows they are
) -> None:
    """Logits, chunk by chunk; one product."""
    logits = chunk_buffer(plan, len(head.weight), plan.logits, hidden.device) if rows.total else hidden
    for part in _parts(rows, plan):
        chunk, h = _rows_of(logits, slice(0, part.stop - part.start)), _hidden_chunk(hidden, rows, part, plan)
        for columns, tile in _tiles(head.weight, plan):
            _mm(h, tile.t(), _columns(chunk, columns), mixed=plan.mixed)
        apply_epilogue(chunk, part)


def differentiate(
    hidden: Tensor,  # [N, D]
    head: Head,
    rows: Rows,
    plan: Plan,
    needs: tuple[bool, ...],  # gradients wanted: of hidden, weight, bias
    apply_epilogue: Callable[[Tensor, Tensor, slice], Tensor | None],
) -> Gradients:
    """Logits, chunk by chunk, and the gradients of hidden, weight and bias from theirs; up to three products.

    apply_epilogue(logits [rows, V], d, part) writes d loss / d logits to d, which may be the logits' own memory. It
    returns a missing factor per row, or None: multiplying hidden's rows is cheaper than multiplying the chunk's.
    """
    (V, D), device, wide = head.weight.shape, hidden.device, plan.arithmetic
    d_hidden = torch.empty(rows.total, D, dtype=wide, device=device) if needs[0] else None
    d_bias = torch.zeros(V, dtype=wide, device=device) if needs[2] else None
    d_weight = torch.zeros(V, D, dtype=wide, device=device) if needs[1] and not rows.total else None
    if not rows.total:
        return Gradients(d_hidden, d_weight, d_bias)
    logits = chunk_buffer(plan, V, plan.logits, device)
    dlogits = chunk_buffer(plan, V, plan.operand, device) if plan.separate else logits
    for part in _parts(rows, plan):
        here, h = slice(0, part.stop - part.start), _hidden_chunk(hidden, rows, part, plan)
        chunk, d = _rows_of(logits, here), _rows_of(dlogits, here)
        for columns, tile in _tiles(head.weight, plan):
            _mm(h, tile.t(), _columns(chunk, columns), mixed=plan.mixed)
        factor = apply_epilogue(chunk, d, part)
        if part.stop == rows.total:
            del logits, chunk  # the last chunk's logits are not needed any more, and d weight may still have to be made
        if d_hidden is not None:
            target = _rows_of(d_hidden, part)
            for columns, tile in _tiles(head.weight, plan):
                _mm(_columns(d, columns), tile, target, mixed=plan.mixed, add=bool(columns.start))
            if factor is not None:
                target.mul_(factor.unsqueeze(1))
        if needs[1]:
            scaled_h = h if factor is None else h * factor.unsqueeze(1)
            if d_weight is None:
                d_weight = torch.empty(V, D, dtype=wide, device=device)
                _mm(d.t(), scaled_h, d_weight, mixed=plan.mixed)
            else:
                _mm(d.t(), scaled_h, d_weight, mixed=plan.mixed, add=True)
        if d_bias is not None:
            d_bias += d.sum(0, dtype=wide) if factor is None else d.t().mv(factor)
    return Gradients(d_hidden, d_weight, d_bias)


def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x * scale, rounded once to `dtype`; on a CPU a piece at a time, since PyTorch would convert all of it first."""
    if scale is None:
        return x.to(dtype)
    if x.dtype == dtype:
        return x * scale
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    step = max(1, (1 << 20) // max(1, x[:1].numel())) if x.device.type == "cpu" else len(x)
    if len(x) <= step:
        return torch.mul(x, scale, out=out)
    for start in range(0, len(x), step):
        torch.mul(x[start : start + step], scale, out=out[start : start + step])
    return out
