"""The launches of loss.py: forward (two), backward (one), and every variant of them for the ahead-of-time gate.

The workspace is one buffer of fp32: two scales, padded to PAD elements; up to three gradients, each padded to a
multiple of PAD; one column of partial sums per program. The backward needs all but the last part.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.launch import REGISTERS, Variant, at_most
from ppo_fast.kernels.loss_kernels import (
    PER_STEP,
    _loss_bwd_kernel,
    _loss_flat_kernel,
    _loss_reduce_kernel,
    _loss_strided_kernel,
)
from ppo_fast.kernels.loss_op import ALL_STATS, LossOptions, LossTensors
from ppo_fast.kernels.loss_terms import COLUMNS, PAD

# Steps of a program and its warps. A thread takes 16 bytes of each contiguous input; more than that, or
# than 4 steps of strided rows, or than 2 of a sequence, spill registers on some architecture.
_FLAT = {4: (512, 4), 2: (512, 2)}  # by the bytes of an element
_STRIDED = (512, 4)
_SEQUENCE = (512, 8)
_SCALE = (1024, 4)
_REDUCE = (256, 4)
_GRADIENTS = ("D_LOGPROBS", "D_ENTROPY", "D_VALUES")
_PAD, _COLUMNS = PAD.value, COLUMNS.value


class _Plan(NamedTuple):
    """How an aggregation is computed."""

    counts: str  # what divides the loss: "steps", "sequences" or the given "denominator"
    by_sequence: bool  # a program takes a sequence, not a block of steps
    mean: bool  # a step weighs 1 / length of its sequence


_PLANS = {
    "given": _Plan("denominator", False, False),
    "given mean": _Plan("denominator", True, True),
    "steps": _Plan("steps", False, False),
    "sequences": _Plan("sequences", True, False),
    "sequences mean": _Plan("sequences", True, True),
}


def _plan(o: LossOptions) -> _Plan:
    mean = " mean" if o.aggregation == "seq-mean-token-mean" else ""
    if o.aggregation == "token-sum" or o.denominator is not None:
        return _PLANS["given" + mean]
    return _PLANS["steps" if o.aggregation == "token-mean" else "sequences" + mean]


def _stride(steps: int) -> int:
    """Distance of two stored gradients, in elements."""
    return -(-steps // _PAD) * _PAD


def kept(steps: int, stored: int) -> int:
    """Elements of the workspace that the backward reads: scales and `stored` gradients."""
    return _PAD + stored * _stride(steps)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device. torch.cuda.device takes microseconds, so only where that is another."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _as_rows(
    tensors: list[Tensor | None], T: int, by_sequence: bool, packed: bool
) -> tuple[list[Tensor | None], list[int | None]]:
    """Every tensor as [rows, T] and the strides of rows and steps; copies only what has no such view.

    Packed sequences are contiguous and need no strides. In a loop over a sequence a step stride is 1, given as None,
    and what has another is copied: the offsets of the lanes for eleven different strides would spill registers there.
    """
    if packed:
        return [None if x is None else x.contiguous() for x in tensors], [None, None] * len(tensors)
    views = [None if x is None else x.reshape(-1, T) for x in tensors]
    if not by_sequence:
        return views, [stride for x in views for stride in ((0, 0) if x is None else x.stride())]
    rows = [x if x is None or T == 1 or x.stride(1) == 1 else x.contiguous() for x in views]
    return rows, [stride for x in rows for stride in (0 if x is None else x.stride(0), None)]


def _reduce(
    workspace: Tensor, o: LossOptions, plan: _Plan, T: int, steps: int, programs: int, stored: int
) -> tuple[Tensor, Tensor]:
    """Loss and all statistics, whether they have inputs or not."""
    loss = torch.empty((), dtype=torch.float32, device=workspace.device)
    stats = torch.empty(len(ALL_STATS), dtype=torch.float32, device=workspace.device)
    given = None if o.aggregation == "token-sum" else o.denominator
    norm = 1.0
    if o.aggregation == "seq-mean-token-sum-norm":
        norm = float(max(T, 1) if o.norm_length is None else o.norm_length)
    _loss_reduce_kernel[(1,)](
        workspace,
        loss,
        stats,
        given if isinstance(given, Tensor) else None,
        1.0 if given is None or isinstance(given, Tensor) else float(given),
        norm,
        float(o.entropy_coef),
        float(o.kl_coef),
        float(o.value_coef),
        steps,
        programs,
        stored,
        COUNTS=plan.counts,
        MEAN=plan.mean,
        BLOCK=_REDUCE[0],
        num_warps=_REDUCE[1],
    )
    return loss, stats


def _scalars(o: LossOptions) -> tuple[float | None, ...]:
    """As the kernels take them: never an int, which would be a constant of the kernel where it is 1."""
    return (
        1.0 - o.clip_low,
        1.0 + o.clip_high,
        None if o.dual_clip is None else float(o.dual_clip),
        float(o.log_ratio_clamp),
        float(o.entropy_coef),
        float(o.kl_coef),
        float(o.value_coef),
        None if o.value_clip is None else float(o.value_clip),
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
    steps, T, plan = like.numel(), like.shape[-1], _plan(o)
    tensors = [logprobs, t.old_logprobs, t.advantages, t.weights, entropy, t.ref_logprobs]
    tensors += [values, None if o.value_clip is None else t.old_values, t.returns, t.mask, t.value_mask]
    packed = plan.by_sequence and t.cu_seqlens is not None
    flat = not plan.by_sequence and all(x is None or x.is_contiguous() for x in tensors)
    block, num_warps = _FLAT[like.element_size()] if flat else _SEQUENCE if plan.by_sequence else _STRIDED
    programs = triton.cdiv(steps, block)
    if steps and plan.by_sequence:
        programs = len(t.cu_seqlens) - 1 if packed else steps // T
    size = kept(steps, sum(needs)) + _COLUMNS * programs
    workspace = torch.empty(size, dtype=torch.float32, device=like.device)
    launch = dict(zip(_GRADIENTS, needs, strict=True), KL_ESTIMATOR=o.kl_estimator, BLOCK=block, num_warps=num_warps)
    with _device_of(like):
        if programs and flat:
            _loss_flat_kernel[(programs,)](*tensors, workspace, *_scalars(o), steps, **launch)
        elif programs:
            cu_seqlens = t.cu_seqlens.contiguous() if packed else None
            rows, strides = _as_rows(tensors, T, plan.by_sequence, packed)
            launch |= {"SEQUENCES": plan.by_sequence, "MEAN": plan.mean, **at_most(REGISTERS)}
            _loss_strided_kernel[(programs,)](*rows, workspace, *_scalars(o), steps, cu_seqlens, T, *strides, **launch)
        return *_reduce(workspace, o, plan, T, steps, programs, sum(needs)), workspace


def backward(
    workspace: Tensor, grad_loss: Tensor, likes: list[tuple[torch.Size, torch.dtype] | None]
) -> list[Tensor | None]:
    """The gradients that have a shape and a dtype in `likes`, for logprobs, entropy and values."""
    device = workspace.device
    made = [None if like is None else torch.empty(like[0], dtype=like[1], device=device) for like in likes]
    steps = next(x.numel() for x in made if x is not None)
    if steps:
        block, num_warps = _SCALE
        programs = (triton.cdiv(steps, block),)
        with _device_of(workspace):
            _loss_bwd_kernel[programs](workspace, grad_loss, *made, steps, BLOCK=block, num_warps=num_warps)
    return made


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


_ROWS, _STEPS = tuple(f"{name}_row" for name in PER_STEP), tuple(f"{name}_step" for name in PER_STEP)
_POLICY, _VALUE = PER_STEP[:6], PER_STEP[6:9]
_OPTIONAL = ("weights", "entropy", "ref_logprobs", "mask", "value_mask", "dual_clip", "value_clip", "old_values")
_LAYOUTS = {  # what is passed as None, SEQUENCES, MEAN
    "flat": ((), False, False),
    "strided": (("cu_seqlens",), False, False),
    "rows": ((*_STEPS, "cu_seqlens"), True, False),
    "rows mean": ((*_STEPS, "cu_seqlens"), True, True),
    "packed": (_ROWS + _STEPS, True, False),
    "packed mean": (_ROWS + _STEPS, True, True),
}


def _variant(
    kernel: triton.JITFunction,
    title: str,
    config: tuple[int, int],
    constants: dict[str, Any],
    types: dict[str, str],
    absent: tuple[str, ...],
    *,
    aligned: bool,
) -> Variant:
    """Types go by an argument's name, except those in `types`; what is in `absent` is None."""
    constants = {**constants, "BLOCK": config[0]}
    gone = {name for name in kernel.arg_names if name in absent or name.removesuffix("_ptr") in absent}
    found = {}
    for name in kernel.arg_names:
        is_integer = name in ("steps", "T", "programs", "gradients") or name.endswith(("_row", "_step"))
        default = "*fp32" if name.endswith("_ptr") else "i32" if is_integer else "fp32"
        if name not in gone and name not in constants:
            found[name] = types.get(name, default)
    pointers = tuple(name for name, kind in found.items() if kind.startswith("*"))
    constants = dict.fromkeys(sorted(gone)) | constants
    registers = REGISTERS if kernel is _loss_strided_kernel else None
    return Variant(title, kernel, found, constants, config[1], aligned=pointers if aligned else (), registers=registers)


def _forward_variant(
    layout: str,
    dtype: str = "fp32",
    kl_estimator: str = "k3",
    absent: tuple[str, ...] = (),
    needs: tuple[bool, ...] = (True, True, True),
) -> Variant:
    title = f"loss forward {layout} {dtype} {kl_estimator} {sum(needs)} gradients"
    title += f" without {' '.join(absent)}" if absent else ""
    types = {f"{name}_ptr": f"*{dtype}" for name in PER_STEP}
    types |= {"mask_ptr": "*i1", "value_mask_ptr": "*i1", "cu_seqlens_ptr": "*i32"}
    constants: dict[str, Any] = dict(zip(_GRADIENTS, needs, strict=True), KL_ESTIMATOR=kl_estimator)
    if layout == "flat":
        config = _FLAT[4 if dtype == "fp32" else 2]
        return _variant(_loss_flat_kernel, title, config, constants, types, absent, aligned=True)
    more, by_sequence, mean = _LAYOUTS[layout]
    constants |= {"SEQUENCES": by_sequence, "MEAN": mean}
    config = _SEQUENCE if by_sequence else _STRIDED
    return _variant(_loss_strided_kernel, title, config, constants, types, absent + more, aligned=False)


def variants() -> list[Variant]:
    """What the launchers above start. An absent input only removes code: each layout is here with everything present,
    in every dtype and with every estimator, and with the least."""
    found = []
    for layout in _LAYOUTS:
        found += [_forward_variant(layout, dtype) for dtype in ("fp32", "bf16", "fp16")]
        found += [_forward_variant(layout, kl_estimator=kind) for kind in ("k1", "k2", "abs")]
        found.append(_forward_variant(layout, needs=(False, False, False)))
        found.append(_forward_variant(layout, absent=_OPTIONAL, needs=(True, False, True)))
        found.append(_forward_variant(layout, absent=_OPTIONAL + _VALUE, needs=(True, False, False)))
        found.append(_forward_variant(layout, absent=_OPTIONAL + _POLICY, needs=(False, False, True)))
    for name, plan in _PLANS.items():
        constants = {"COUNTS": plan.counts, "MEAN": plan.mean}
        for kind in ("*fp32", "*fp64", "*i64", "*i32", "") if plan.counts == "denominator" else ("",):
            title = f"loss reduce {name} denominator {kind or 'by value'}"
            types: dict[str, str] = {"denominator_ptr": kind}
            absent: tuple[str, ...] = () if kind else ("denominator_ptr",)
            found.append(_variant(_loss_reduce_kernel, title, _REDUCE, constants, types, absent, aligned=False))
    names = ("d_logprobs_ptr", "d_entropy_ptr", "d_values_ptr")
    for dtype in ("fp32", "bf16", "fp16"):
        for absent in ((), names[1:], names[:2], names[1:2]):
            title = f"loss backward {dtype} {' '.join(name for name in names if name not in absent)}"
            types = dict.fromkeys(names, f"*{dtype}")
            found.append(_variant(_loss_bwd_kernel, title, _SCALE, {}, types, absent, aligned=True))
    return found
