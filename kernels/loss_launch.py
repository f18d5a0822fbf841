"""The launches of loss.py: forward (two), backward (one), and every variant of them for the ahead-of-time gate.

The workspace is one buffer of fp32: two scales, padded; up to three gradients, each padded; one column of partial sums
per program. The backward needs all but the last part.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.launch import REGISTERS, Variant, device_guard, launch_options
from ppo_fast.kernels.loss_kernels import (
    _loss_bwd_kernel,
    _loss_flat_kernel,
    _loss_reduce_kernel,
    _loss_rows_kernel,
)
from ppo_fast.kernels.loss_op import ALL_STATS, LossOptions, LossTensors
from ppo_fast.kernels.loss_terms import bit, num_columns, padding

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")  # by the number that the kernels take

# Steps of a program and its warps. A thread takes 16 bytes of each contiguous input; more than that, or than 2 steps
# of a sequence, spill registers on some architecture.
_BLOCK, _SCALE_BLOCK, _REDUCE_BLOCK = 512, 1024, 256
_FLAT = {4: launch_options(4), 2: launch_options(2)}  # by the bytes of an element
_ROWS = {False: launch_options(4, REGISTERS), True: launch_options(8, REGISTERS)}  # by whether they are sequences
_SCALE = launch_options(4)
_REDUCE = launch_options(4)
_PAD, _COLUMNS = padding(), num_columns()
_WANTED = tuple(bit(name) for name in ("d_logprobs", "d_entropy", "d_values"))
_POLICY, _VALUE = bit("policy"), bit("value")
_MASK, _VALUE_MASK = bit("mask"), bit("value_mask")
_WEIGHTS, _ENTROPY, _REF_LOGPROBS = bit("weights"), bit("entropy"), bit("ref_logprobs")
_VALUE_CLIP, _CU_SEQLENS, _MEAN = bit("value_clip"), bit("cu_seqlens"), bit("mean")
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


def _plan(o: LossOptions) -> _Plan:
    mean = o.aggregation == "seq-mean-token-mean"
    if o.aggregation == "token-sum" or o.denominator is not None:
        is_tensor = isinstance(o.denominator, Tensor) and o.aggregation != "token-sum"
        return _Plan(_BY_TENSOR if is_tensor else _BY_NUMBER, mean, mean)
    if o.aggregation == "token-mean":
        return _Plan(_BY_STEPS, False, False)
    return _Plan(_BY_SEQUENCES, True, mean)


def _stride(steps: int) -> int:
    """Distance of two stored gradients, in elements."""
    return -(-steps // _PAD) * _PAD


def kept(steps: int, stored: int) -> int:
    """Elements of the workspace that the backward reads: scales and `stored` gradients."""
    return _PAD + stored * _stride(steps)


@functools.cache
def _unread(dtype: torch.dtype, device: torch.device) -> Tensor:
    """An address of that type for an argument that will not be read."""
    return torch.empty((), dtype=dtype, device=device)


def _in_listed_dtypes(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The per-step floats, those of the value term last but one, converted to fp32 unless _DTYPES has their mixture."""
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) > 1:
        of_values = {x.dtype for x in tensors[6:8] if x is not None}
        others = {x.dtype for i, x in enumerate(tensors) if x is not None and i not in (6, 7)}
        if len(of_values) == len(others) == 1 and (*of_values, *others) in _DTYPES:
            return tensors
    elif dtypes <= _POINTERS.keys():
        return tensors
    return [None if x is None else x.to(torch.float32) for x in tensors]


def _as_rows(x: Tensor, T: int) -> tuple[Tensor, int]:
    """A tensor whose rows of T steps are contiguous, and the stride of the rows; copied if it has no such view."""
    if x.is_contiguous():
        return x, T
    rows = x if x.ndim == 2 else x.reshape(-1, T)
    if T > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _reduce(
    workspace: Tensor, o: LossOptions, plan: _Plan, T: int, steps: int, programs: int, stored: int
) -> tuple[Tensor, Tensor]:
    """Loss and all statistics, whether they have inputs or not."""
    loss = torch.empty((), dtype=torch.float32, device=workspace.device)
    stats = torch.empty(len(ALL_STATS), dtype=torch.float32, device=workspace.device)
    given, number = workspace, 1.0
    if plan.divisor == _BY_TENSOR:
        assert isinstance(o.denominator, Tensor)
        given = o.denominator if o.denominator.dtype in _DENOMINATORS else o.denominator.float()
    elif o.denominator is not None and o.aggregation != "token-sum":
        number = float(o.denominator)
    norm = 1.0
    if o.aggregation == "seq-mean-token-sum-norm":
        norm = float(max(T, 1) if o.norm_length is None else o.norm_length)
    _loss_reduce_kernel[(1,)](
        workspace,
        loss,
        stats,
        given,
        number,
        norm,
        float(o.entropy_coef),
        float(o.kl_coef),
        float(o.value_coef),
        steps,
        programs,
        stored,
        plan.divisor,
        int(plan.mean),
        _REDUCE_BLOCK,
        **_REDUCE,
    )
    return loss, stats


def _scalars(o: LossOptions) -> tuple[float | int, ...]:
    return (
        1.0 - o.clip_low,
        1.0 + o.clip_high,
        math.inf if o.dual_clip is None else float(o.dual_clip),
        float(o.log_ratio_clamp),
        float(o.entropy_coef),
        float(o.kl_coef),
        float(o.value_coef),
        math.inf if o.value_clip is None else float(o.value_clip),
        KL_ESTIMATORS.index(o.kl_estimator),
    )


def forward(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    t: LossTensors,
    o: LossOptions,
    needs: tuple[bool, ...],  # gradients wanted: of logprobs, entropy, values
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics (all of them, whether they have inputs or not) and the workspace, which the backward needs."""
    like = values if logprobs is None else logprobs
    assert like is not None
    steps, T, plan, device = like.numel(), like.shape[-1], _plan(o), like.device
    old_values = None if o.value_clip is None else t.old_values
    tensors: list[Tensor | None] = [logprobs, t.old_logprobs, t.advantages, t.weights, entropy, t.ref_logprobs]
    tensors = _in_listed_dtypes([*tensors, values, old_values, t.returns])
    given = sum(wanted for wanted, need in zip(_WANTED, needs, strict=True) if need)
    for flag, x in (
        (_POLICY, logprobs),
        (_VALUE, values),
        (_MASK, t.mask),
        (_VALUE_MASK, t.value_mask),
        (_WEIGHTS, t.weights),
        (_ENTROPY, entropy),
        (_REF_LOGPROBS, t.ref_logprobs),
        (_VALUE_CLIP, old_values),
    ):
        if x is not None:
            given |= flag
    stored = sum(needs)
    programs, packed = triton.cdiv(steps, _BLOCK), False
    if steps and plan.by_sequence:
        packed = t.cu_seqlens is not None
        programs = len(t.cu_seqlens) - 1 if packed else steps // T
    size = kept(steps, stored) + _COLUMNS * programs
    # Without a sequence there is no program that could clear the gradients.
    workspace = (torch.empty if programs else torch.zeros)(size, dtype=torch.float32, device=device)
    with device_guard(like):
        if programs:
            every = _with_stand_ins(tensors, t, device)
            if not plan.by_sequence and _is_flat(every):
                options = _FLAT[every[0].element_size()]
                _loss_flat_kernel[(programs,)](*every, workspace, *_scalars(o), given, steps, _BLOCK, **options)
            else:
                _forward_rows(every, workspace, t, o, plan, given, steps, T, programs, packed)
        return *_reduce(workspace, o, plan, T, steps, programs, stored), workspace


def _with_stand_ins(tensors: list[Tensor | None], t: LossTensors, device: torch.device) -> list[Tensor]:
    """What the kernels take first, with an address of the same type where an input is absent."""
    other = tensors[8] if tensors[0] is None else tensors[0]
    value = other if tensors[6] is None else tensors[6]
    assert other is not None
    assert value is not None
    flag = _unread(torch.bool, device)
    every = [(value if i in (6, 7) else other) if x is None else x for i, x in enumerate(tensors)]
    return [*every, flag if t.mask is None else t.mask, flag if t.value_mask is None else t.value_mask]


def _is_flat(tensors: list[Tensor]) -> bool:
    return all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)


def _forward_rows(
    tensors: list[Tensor],
    workspace: Tensor,
    t: LossTensors,
    o: LossOptions,
    plan: _Plan,
    given: int,
    steps: int,
    T: int,
    programs: int,
    packed: bool,
) -> None:
    rows = [_as_rows(x, T) if x.ndim else (x, 0) for x in tensors]
    cu_seqlens = _unread(torch.int32, workspace.device)
    if packed:
        given |= _CU_SEQLENS
        cu_seqlens = t.cu_seqlens.contiguous()
    _loss_rows_kernel[(programs,)](
        *(x for x, _ in rows),
        workspace,
        *_scalars(o),
        given | (_MEAN if plan.mean else 0),
        steps,
        cu_seqlens,
        T,
        *(stride for _, stride in rows),
        plan.by_sequence,
        _BLOCK,
        **_ROWS[plan.by_sequence],
    )


def backward(
    workspace: Tensor, grad_loss: Tensor, likes: list[tuple[torch.Size, torch.dtype] | None]
) -> list[Tensor | None]:
    """The gradients that have a shape and a dtype in `likes`, for logprobs, entropy and values."""
    device = workspace.device
    dtypes = [None if like is None else like[1] for like in likes]
    others = {x for x in dtypes[:2] if x is not None} or {dtypes[2]}
    value = next(iter(others)) if dtypes[2] is None else dtypes[2]
    listed = len(others) == 1 and (value, *others) in _DTYPES
    made = [
        None if like is None else torch.empty(like[0], dtype=like[1] if listed else torch.float32, device=device)
        for like in likes
    ]
    given = sum(flag for flag, x in zip(_WANTED, made, strict=True) if x is not None)
    d_logprobs, d_entropy, d_values = made
    first = next(x for x in made if x is not None)
    steps = first.numel()
    if steps:
        with device_guard(workspace):
            _loss_bwd_kernel[(triton.cdiv(steps, _SCALE_BLOCK),)](
                workspace,
                grad_loss,
                first if d_logprobs is None else d_logprobs,
                first if d_entropy is None else d_entropy,
                first if d_values is None else d_values,
                given,
                steps,
                _SCALE_BLOCK,
                **_SCALE,
            )
    return made if listed else [None if x is None else x.to(like[1]) for x, like in zip(made, likes, strict=True)]


def stored(workspace: Tensor, shapes: list[torch.Size | None]) -> list[tuple[Tensor, Tensor] | None]:
    """The gradients in a workspace and their scales: what `backward` multiplies, for torch.compile to fuse."""
    first, found = _PAD, []
    for shape, scale in zip(shapes, (workspace[0], workspace[0], workspace[1]), strict=True):
        if shape is None:
            found.append(None)
            continue
        steps = math.prod(shape)  # shape.numel() would make the size a constant of the graph
        found.append((workspace[first : first + steps].view(shape), scale))
        first += _stride(steps)
    return found


_INTEGERS = {"kl_estimator": "i32", "given": "i32", "programs": "i32", "gradients": "i32", "divisor": "i32"}
_INTEGERS |= {"is_mean": "i32", "steps": "i64", "T": "i64"}


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
    """Everything that the launchers above can start."""
    found = []
    policy = ("logprobs", "old_logprobs", "advantages", "weights", "entropy", "ref_logprobs", "returns")
    for of_values, others in _DTYPES:
        name = _dtype_name(of_values, others)
        pointers = {f"{x}_ptr": _POINTERS[others] for x in policy} | {"mask_ptr": "*u1", "value_mask_ptr": "*u1"}
        pointers |= {f"{x}_ptr": _POINTERS[of_values] for x in ("values", "old_values")}
        kernel, options = _loss_flat_kernel, _FLAT[others.itemsize]
        found.append(Variant(f"loss forward flat {name}", kernel, _types(kernel, pointers), {"BLOCK": _BLOCK}, options))
        for sequences, index in ((False, torch.int32), (True, torch.int32), (True, torch.int64)):
            title = f"loss forward {f'sequences {_INDICES[index][1:]}' if sequences else 'rows'} {name}"
            types = _types(_loss_rows_kernel, pointers | {"cu_seqlens_ptr": _INDICES[index]})
            constexprs: dict[str, Any] = {"SEQUENCES": sequences, "BLOCK": _BLOCK}
            found.append(Variant(title, _loss_rows_kernel, types, constexprs, _ROWS[sequences]))
        pointers = {"d_logprobs_ptr": _POINTERS[others], "d_entropy_ptr": _POINTERS[others]}
        types = _types(_loss_bwd_kernel, pointers | {"d_values_ptr": _POINTERS[of_values]})
        found.append(Variant(f"loss backward {name}", _loss_bwd_kernel, types, {"BLOCK": _SCALE_BLOCK}, _SCALE))
    for pointer in _DENOMINATORS.values():
        types = _types(_loss_reduce_kernel, {"denominator_ptr": pointer})
        title = f"loss reduce denominator {pointer[1:]}"
        found.append(Variant(title, _loss_reduce_kernel, types, {"BLOCK": _REDUCE_BLOCK}, _REDUCE))
    return found
