"""The launches of the scalar losses: two forward, one backward.

The workspace is one buffer of fp32: two scales, padded; up to three gradients, each padded; one column of partial sums
per program. The backward needs all but the last part.
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
from ppo_fast.kernels.loss.kernel import (
    loss_bwd_kernel,
    loss_flat_kernel,
    loss_reduce_kernel,
    loss_rows_kernel,
    token_weights_kernel,
)
from ppo_fast.kernels.loss.options import ALL_STATS, LossOptions, LossTensors
from ppo_fast.kernels.loss.terms import bit, num_columns, padding
from ppo_fast.kernels.reference import KL_ESTIMATORS

# Steps of a program and its warps. A thread takes 16 bytes of each contiguous input; more than that, or than 2 steps
# of a sequence, spill registers on some architecture.
_BLOCK, _SCALE_BLOCK, _REDUCE_BLOCK = 512, 1024, 256
_FLAT = {4: launch_options(4), 2: launch_options(2)}  # by the bytes of an element
_ROWS = {False: launch_options(4, REGISTERS), True: launch_options(8, REGISTERS)}  # by whether they are sequences
_SCALE = launch_options(4)
_TOKEN_WEIGHTS = launch_options(4)
_REDUCE = launch_options(4)
_PAD, _COLUMNS = padding(), num_columns()
_EVERY_STATISTIC = 2 ** len(ALL_STATS) - 1
_WANTED = tuple(bit(name) for name in ("d_logprobs", "d_entropy", "d_values"))
_NEEDS = {  # which of the three gradients are wanted -> their bits, and how many they are
    needs: (sum(flag for flag, need in zip(_WANTED, needs, strict=True) if need), sum(needs))
    for needs in itertools.product((False, True), repeat=3)
}
_MASK, _VALUE_MASK, _CU_SEQLENS, _MEAN = (bit(name) for name in ("mask", "value_mask", "cu_seqlens", "mean"))
# Of logprobs, old_logprobs, advantages, weights, entropy, ref_logprobs, values, old_values and returns.
_VALUE_CLIP = bit("value_clip")
_FLAGS = (bit("policy"), 0, 0, bit("weights"), bit("entropy"), bit("ref_logprobs"), bit("value"), _VALUE_CLIP, 0)
_BY_STEPS, _BY_SEQUENCES, _BY_NUMBER, _BY_TENSOR = range(4)  # what divides the loss

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_INDICES = {torch.int32: "*i32", torch.int64: "*i64"}
_DENOMINATORS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}
# The dtype of values and old_values, and that of everything else. Other mixtures are converted to fp32.
_DTYPES = [(x, x) for x in _POINTERS] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


class _Plan(NamedTuple):
    """How an aggregation is computed."""

    divisor: int
    by_sequence: bool  # a program takes a sequence, not a block of steps
    mean: bool  # a step is weighted by 1 / length of its sequence


_PLANS = {
    "token-mean": _Plan(_BY_STEPS, False, False),
    "token-sum": _Plan(_BY_NUMBER, False, False),
    "seq-mean-token-sum": _Plan(_BY_SEQUENCES, True, False),
    "seq-mean-token-mean": _Plan(_BY_SEQUENCES, True, True),
    "seq-mean-token-sum-norm": _Plan(_BY_SEQUENCES, True, False),
}


def _plan(options: LossOptions) -> _Plan:
    plan = _PLANS[options.aggregation]
    if options.denominator is None or plan.divisor == _BY_NUMBER:
        return plan
    return _Plan(_BY_TENSOR if isinstance(options.denominator, Tensor) else _BY_NUMBER, plan.mean, plan.mean)


def _stride(steps: int) -> int:
    """Distance of two stored gradients, in elements."""
    return -(-steps // _PAD) * _PAD


def saved_size(steps: int, num_gradients: int) -> int:
    """Elements of the workspace that the backward reads: scales, and gradients of `num_gradients` inputs."""
    return _PAD + num_gradients * _stride(steps)


@functools.cache
def _unread(dtype: torch.dtype, device: torch.device) -> Tensor:
    """An address of that type for an argument that will not be read."""
    return torch.empty((), dtype=dtype, device=device)


def _in_listed_dtypes(operands: list[Tensor], is_given: list[bool]) -> list[Tensor]:
    """The per-step floats, converted to fp32 unless _DTYPES has their mixture; an absent one is replaced again."""
    of_values = {operands[i].dtype for i in (6, 7) if is_given[i]}
    others = {operands[i].dtype for i in (0, 1, 2, 3, 4, 5, 8) if is_given[i]}
    if len(of_values) == len(others) == 1 and (*of_values, *others) in _DTYPES:
        return operands
    wide = {id(x): x.to(torch.float32) for x in operands}  # one conversion where an input replaces absent ones
    return [wide[id(x)] for x in operands]


def _as_rows(x: Tensor, T: int) -> tuple[Tensor, int]:
    """A tensor whose rows of T steps are contiguous, and the stride of the rows; copied if it has no such view."""
    if x.is_contiguous():
        return x, T
    rows = x if x.ndim == 2 else x.reshape(-1, T)
    if T > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _reduce(
    workspace: Tensor,
    options: LossOptions,
    plan: _Plan,
    T: int,
    steps: int,
    programs: int,
    num_gradients: int,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """Loss and the wanted statistics."""
    given, number, norm = workspace, 1.0, 1.0
    loss = torch.empty_strided((), (), dtype=torch.float32, device=workspace.device)  # quicker than torch.empty(())
    stats = workspace.new_empty(wanted.bit_count())
    if options.denominator is not None:
        if isinstance(options.denominator, Tensor) and plan.divisor == _BY_TENSOR:
            given = options.denominator if options.denominator.dtype in _DENOMINATORS else options.denominator.float()
        elif options.aggregation != "token-sum":
            number = float(options.denominator)
    if options.aggregation == "seq-mean-token-sum-norm":
        norm = float(max(T, 1) if options.norm_length is None else options.norm_length)
    loss_reduce_kernel.run(
        workspace,
        loss,
        stats,
        given,
        number,
        norm,
        float(options.entropy_coef),
        float(options.kl_coef),
        float(options.value_coef),
        steps,
        programs,
        num_gradients | plan.divisor << 2 | plan.mean << 4 | wanted << 5,
        _REDUCE_BLOCK,
        grid=(1,),
        warmup=False,
        **_REDUCE,
    )
    return loss, stats


def _scalars(options: LossOptions) -> tuple[float | int, ...]:
    return (
        1.0 - options.clip_low,
        1.0 + options.clip_high,
        math.inf if options.dual_clip is None else float(options.dual_clip),
        float(options.log_ratio_clamp),
        float(options.entropy_coef),
        float(options.kl_coef),
        float(options.value_coef),
        math.inf if options.value_clip is None else float(options.value_clip),
        KL_ESTIMATORS.index(options.kl_estimator),
    )


def forward(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    tensors: LossTensors,
    options: LossOptions,
    needs: tuple[bool, ...],  # gradients wanted: of logprobs, entropy, values
    wanted: int = _EVERY_STATISTIC,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, the statistics of ALL_STATS whose bits are set in `wanted`, and the workspace for the backward."""
    like = required(values if logprobs is None else logprobs)
    steps, T, plan = like.numel(), like.shape[-1], _plan(options)
    given, num_gradients = _NEEDS[needs]
    cu_seqlens = tensors.cu_seqlens if plan.by_sequence else None
    programs = -(-steps // _BLOCK)
    if steps and plan.by_sequence:
        programs = steps // T if cu_seqlens is None else len(cu_seqlens) - 1
    size = saved_size(steps, num_gradients) + _COLUMNS * programs
    # Without a sequence there is no program that could clear the gradients.
    workspace = (torch.empty if programs else torch.zeros)(size, dtype=torch.float32, device=like.device)
    with device_guard(like):
        if programs:
            present, is_flat, operands = _inputs(logprobs, entropy, values, tensors, options.value_clip is not None)
            given |= present
            if is_flat and not plan.by_sequence:
                arguments = *operands, workspace, *_scalars(options), given, steps, _BLOCK
                compiling = _FLAT[operands[0].element_size()]
                loss_flat_kernel.run(*arguments, grid=(programs,), warmup=False, **compiling)
            else:
                _forward_rows(operands, is_flat, workspace, cu_seqlens, options, plan, given, steps, T, programs)
        loss, stats = _reduce(workspace, options, plan, T, steps, programs, num_gradients, wanted)
    return loss, stats, workspace


def _inputs(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, tensors: LossTensors, has_clip: bool
) -> tuple[int, bool, list[Tensor]]:
    """Return the bits of the given inputs, whether all of them are contiguous and aligned, and the first arguments of
    the kernels, where an address of the same type replaces an absent input."""
    policy = logprobs, tensors.old_logprobs, tensors.advantages, tensors.weights, entropy, tensors.ref_logprobs
    inputs = (*policy, values, tensors.old_values if has_clip else None, tensors.returns)
    other = required(tensors.returns if logprobs is None else logprobs)
    dtype = other.dtype
    present, is_flat, is_listed, addresses, operands = 0, True, dtype in _POINTERS, 0, []
    for x, flag in zip(inputs, _FLAGS, strict=True):
        if x is None:
            operands.append(values if flag == _VALUE_CLIP and values is not None else other)
            continue
        present |= flag
        addresses |= x.data_ptr()
        if x.dtype is not dtype:
            is_listed = False
        if not x.is_contiguous():
            is_flat = False
        operands.append(x)
    if not is_listed:
        operands = _in_listed_dtypes(operands, [x is not None for x in inputs])
        for x in operands:
            addresses |= x.data_ptr()
    for mask, flag in ((tensors.mask, _MASK), (tensors.value_mask, _VALUE_MASK)):
        if mask is None:
            operands.append(_unread(torch.bool, other.device))
        else:
            present |= flag
            addresses |= mask.data_ptr()
            is_flat = is_flat and mask.is_contiguous()
            operands.append(mask)
    return present, is_flat and not addresses & 15, operands


def _forward_rows(
    operands: list[Tensor],
    is_flat: bool,  # all that are read are contiguous
    workspace: Tensor,
    cu_seqlens: Tensor | None,
    options: LossOptions,
    plan: _Plan,
    given: int,
    steps: int,
    T: int,
    programs: int,
) -> None:
    strides = [T] * len(operands)
    if not is_flat:
        views = {id(x): _as_rows(x, T) if x.ndim else (x, 0) for x in operands}
        operands, strides = [views[id(x)][0] for x in operands], [views[id(x)][1] for x in operands]
    given |= 0 if cu_seqlens is None else _CU_SEQLENS
    boundaries = _unread(torch.int32, workspace.device) if cu_seqlens is None else cu_seqlens.contiguous()
    loss_rows_kernel.run(
        *operands,
        workspace,
        *_scalars(options),
        given | (_MEAN if plan.mean else 0),
        steps,
        boundaries,
        T,
        *strides,
        plan.by_sequence,
        _BLOCK,
        grid=(programs,),
        warmup=False,
        **_ROWS[plan.by_sequence],
    )


def token_weights(like: Tensor, tensors: LossTensors) -> Tensor:
    """Return 1 / counted steps of its sequence for each step (seq-mean-token-mean); 0 outside of all sequences."""
    steps, T, device = like.numel(), like.shape[-1], like.device
    cu_seqlens, mask, mask_stride, given = _unread(torch.int32, device), _unread(torch.bool, device), 0, 0
    if tensors.mask is not None:
        (mask, mask_stride), given = _as_rows(tensors.mask, T), _MASK
    programs, packed = steps // max(T, 1), False
    if tensors.cu_seqlens is not None:
        packed = True
        cu_seqlens, given = tensors.cu_seqlens.contiguous(), given | _CU_SEQLENS
        programs = len(cu_seqlens) - 1
    weights = (torch.zeros if packed else torch.empty)(like.shape, dtype=torch.float32, device=device)
    if steps and programs:
        with device_guard(like):
            arguments = mask, cu_seqlens, weights, given, steps, T, mask_stride, _BLOCK
            token_weights_kernel.run(*arguments, grid=(programs,), warmup=False, **_TOKEN_WEIGHTS)
    return weights


@functools.cache
def _gradients(dtypes: tuple[torch.dtype | None, ...]) -> tuple[int, tuple[torch.dtype | None, ...], bool]:
    """The bits of the gradients that have a dtype, their dtypes in the kernel, and whether these are the same."""
    given = sum(flag for flag, dtype in zip(_WANTED, dtypes, strict=True) if dtype is not None)
    *policy, of_values = dtypes
    others: set[torch.dtype | None] = {x for x in policy if x is not None} or {of_values}
    if len(others) == 1 and (of_values or next(iter(others)), *others) in _DTYPES:
        return given, dtypes, True
    return given, tuple(None if x is None else torch.float32 for x in dtypes), False


def backward(
    workspace: Tensor, grad_loss: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype | None, ...]
) -> list[Tensor | None]:
    """Return the gradients of logprobs, entropy and values; None where there is no dtype."""
    given, written, is_listed = _gradients(dtypes)
    device = workspace.device
    # With sizes one by one torch.empty takes half the time that it takes with a torch.Size.
    made = [None if x is None else torch.empty(*shape, dtype=x, device=device) for x in written]
    d_logprobs, d_entropy, d_values = made
    other = required(d_logprobs if d_logprobs is not None else d_values if d_entropy is None else d_entropy)
    steps = other.numel()
    if steps:
        with device_guard(workspace):
            loss_bwd_kernel.run(
                workspace,
                grad_loss,
                other,
                other if d_entropy is None else d_entropy,
                other if d_values is None else d_values,
                given,
                steps,
                _SCALE_BLOCK,
                grid=(-(-steps // _SCALE_BLOCK),),
                warmup=False,
                **_SCALE,
            )
    return made if is_listed else [None if x is None else x.to(y) for x, y in zip(made, dtypes, strict=True)]


def saved_gradients(workspace: Tensor, shapes: list[torch.Size | None]) -> list[tuple[Tensor, Tensor] | None]:
    """Return the gradients in a workspace and their scales, which `backward` multiplies, for torch.compile to fuse."""
    first = _PAD
    found: list[tuple[Tensor, Tensor] | None] = []
    for shape, scale in zip(shapes, (workspace[0], workspace[0], workspace[1]), strict=True):
        if shape is None:
            found.append(None)
            continue
        steps = math.prod(shape)  # shape.numel() would make the size a constant of the graph
        found.append((workspace[first : first + steps].view(shape), scale))
        first += _stride(steps)
    return found


_INTEGERS = {"kl_estimator": "i32", "given": "i32", "programs": "i32", "modes": "i32"}
_INTEGERS |= {"steps": "i64", "T": "i64"}


def _types(kernel: triton.JITFunction, pointers: dict[str, str]) -> dict[str, str]:
    """Argument -> type, from the kernel's own names and those of pointers that are not fp32."""
    types = {}
    for name in kernel.arg_names:
        if name not in ("SEQUENCES", "BLOCK"):
            default = "*fp32" if name.endswith("_ptr") else "i64" if name.endswith("_stride") else "fp32"
            types[name] = pointers.get(name) or _INTEGERS.get(name, default)
    return types


def _dtype_name(of_values: torch.dtype, others: torch.dtype) -> str:
    name = _POINTERS[others][1:]
    return name if of_values == others else f"{name} values {_POINTERS[of_values][1:]}"


def variants() -> list[Variant]:
    """Return every variant that the launches above can start."""
    found = []
    policy = ("logprobs", "old_logprobs", "advantages", "weights", "entropy", "ref_logprobs", "returns")
    for of_values, others in _DTYPES:
        name = _dtype_name(of_values, others)
        pointers = {f"{x}_ptr": _POINTERS[others] for x in policy} | {"mask_ptr": "*u1", "value_mask_ptr": "*u1"}
        pointers |= {f"{x}_ptr": _POINTERS[of_values] for x in ("values", "old_values")}
        kernel, options = loss_flat_kernel, _FLAT[others.itemsize]
        found.append(Variant(f"loss forward flat {name}", kernel, _types(kernel, pointers), {"BLOCK": _BLOCK}, options))
        for sequences, index in ((False, torch.int32), (True, torch.int32), (True, torch.int64)):
            title = f"loss forward {f'sequences {_INDICES[index][1:]}' if sequences else 'rows'} {name}"
            types = _types(loss_rows_kernel, pointers | {"cu_seqlens_ptr": _INDICES[index]})
            constexprs: dict[str, int] = {"SEQUENCES": sequences, "BLOCK": _BLOCK}
            found.append(Variant(title, loss_rows_kernel, types, constexprs, _ROWS[sequences]))
        pointers = {"d_logprobs_ptr": _POINTERS[others], "d_entropy_ptr": _POINTERS[others]}
        types = _types(loss_bwd_kernel, pointers | {"d_values_ptr": _POINTERS[of_values]})
        found.append(Variant(f"loss backward {name}", loss_bwd_kernel, types, {"BLOCK": _SCALE_BLOCK}, _SCALE))
    for pointer in _INDICES.values():
        types = _types(token_weights_kernel, {"mask_ptr": "*u1", "cu_seqlens_ptr": pointer})
        found.append(
            Variant(f"loss shares {pointer[1:]}", token_weights_kernel, types, {"BLOCK": _BLOCK}, _TOKEN_WEIGHTS)
        )
    for pointer in _DENOMINATORS.values():
        types = _types(loss_reduce_kernel, {"denominator_ptr": pointer})
        title = f"loss reduce denominator {pointer[1:]}"
        found.append(Variant(title, loss_reduce_kernel, types, {"BLOCK": _REDUCE_BLOCK}, _REDUCE))
    return found
