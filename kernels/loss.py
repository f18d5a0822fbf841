"""PPO's scalar losses in Triton: reference.policy_loss, reference.value_loss and reference.ppo_loss, one code for all.

Forward: one launch reads every per-token tensor once, writes the gradients (fp32, before normalisation: the number of
counted steps is not known yet) and one column of partial sums per program; a second launch of one program adds the
columns in a fixed order, divides, and writes loss, statistics and the two scales that turn the stored gradients into
real ones. Backward: one launch, gradient = stored * (upstream * scale), cast to the input's dtype.

A program takes BLOCK steps of the flattened tensors; where the weight of a step depends on its sequence it takes one
sequence (a row, or a piece of cu_seqlens). Gradients flow to logprobs, entropy and values; the rest is constant.

Bytes for N steps in fp32, ppo_loss with a mask: 25 N read and 8 N written forward, 8 N read and 8 N written backward.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.launch import Variant
from ppo_fast.kernels.loss_compile import make_compiled
from ppo_fast.kernels.loss_kernels import (
    COLUMNS,
    PAD,
    PER_STEP,
    _loss_bwd_kernel,
    _loss_fwd_kernel,
    _loss_reduce_kernel,
)
from ppo_fast.kernels.loss_op import ALL_STATS, LossOptions, LossTensors, public_functions, stat_names

# 4 steps to a thread, 2 in a loop over a sequence: with twice as many some architecture spills registers.
BLOCK, NUM_WARPS = 512, 4
SEQUENCE_BLOCK, SEQUENCE_WARPS = 512, 8
REDUCE_BLOCK = 256
_PAD, _COLUMNS = PAD.value, COLUMNS.value


def _stride(steps: int) -> int:
    """Distance of two stored gradients, in elements."""
    return -(-steps // _PAD) * _PAD


def _kept(steps: int, stored: int) -> int:
    """Elements of the workspace that the backward reads: scales and `stored` gradients."""
    return _PAD + stored * _stride(steps)


def _layout(
    tensors: list[Tensor | None], T: int, by_sequence: bool, packed: bool
) -> tuple[list[Tensor | None], list[int | None]]:
    """Every tensor as [rows, T], and the strides that the kernel needs: of rows and steps, of rows, or none.

    Copies what has no such view, and in a loop over a sequence what has no unit step: lane offsets for eleven different
    steps would spill registers there.
    """
    if packed or (not by_sequence and all(x is None or x.is_contiguous() for x in tensors)):
        return [None if x is None else x.contiguous() for x in tensors], [None, None] * len(tensors)
    views = [None if x is None else x.reshape(-1, T) for x in tensors]
    if not by_sequence:
        return views, [stride for x in views for stride in ((0, 0) if x is None else x.stride())]
    rows = [x if x is None or T == 1 or x.stride(1) == 1 else x.contiguous() for x in views]
    return rows, [stride for x in rows for stride in (0 if x is None else x.stride(0), None)]


class _Plan(NamedTuple):
    """How an aggregation is computed."""

    counts: str  # what divides the loss: "steps", "sequences" or the given "denominator"
    by_sequence: bool  # a program takes a sequence, not BLOCK steps
    mean: bool  # a step weighs 1 / length of its sequence

    @property
    def num_warps(self) -> int:
        return SEQUENCE_WARPS if self.by_sequence else NUM_WARPS

    def constants(self, kl_estimator: str, needs: tuple[bool, ...]) -> dict[str, Any]:
        """Of _loss_fwd_kernel."""
        gradients = dict(zip(("D_LOGPROBS", "D_ENTROPY", "D_VALUES"), needs, strict=True))
        block = SEQUENCE_BLOCK if self.by_sequence else BLOCK
        launch = {"KL_ESTIMATOR": kl_estimator, "SEQUENCES": self.by_sequence, "MEAN": self.mean, "BLOCK": block}
        return launch | gradients


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
        BLOCK=REDUCE_BLOCK,
        num_warps=NUM_WARPS,
    )
    return loss, stats


def _forward(
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
    t: LossTensors,
    o: LossOptions,
    needs: tuple[bool, ...],  # gradients wanted: of logprobs, entropy, values
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and the workspace, which the backward needs."""
    like = values if logprobs is None else logprobs
    steps, T = like.numel(), like.shape[-1]
    plan = _plan(o)
    tensors = [logprobs, t.old_logprobs, t.advantages, t.weights, entropy, t.ref_logprobs]
    tensors += [values, None if o.value_clip is None else t.old_values, t.returns, t.mask, t.value_mask]
    packed = plan.by_sequence and t.cu_seqlens is not None
    programs = triton.cdiv(steps, BLOCK)
    if steps and plan.by_sequence:
        programs = len(t.cu_seqlens) - 1 if packed else steps // T
    if programs:
        tensors, strides = _layout(tensors, T, plan.by_sequence, packed)
    stored = sum(needs)
    size = _kept(steps, stored) + _COLUMNS * programs
    workspace = torch.empty(size, dtype=torch.float32, device=like.device)
    with torch.cuda.device_of(like):
        if programs:
            _loss_fwd_kernel[(programs,)](
                *tensors,
                t.cu_seqlens.contiguous() if packed else None,
                workspace,
                1.0 - o.clip_low,
                1.0 + o.clip_high,
                None if o.dual_clip is None else float(o.dual_clip),
                float(o.log_ratio_clamp),
                float(o.entropy_coef),
                float(o.kl_coef),
                float(o.value_coef),
                None if o.value_clip is None else float(o.value_clip),
                steps,
                T,
                *strides,
                **plan.constants(o.kl_estimator, needs),
                num_warps=plan.num_warps,
            )
        loss, stats = _reduce(workspace, o, plan, T, steps, programs, stored)
    return loss, stats, workspace


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        t: LossTensors,
        o: LossOptions,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor]:
        loss, stats, workspace = _forward(logprobs, entropy, values, t, o, needs)
        ctx.save_for_backward(workspace)
        wanted = zip((logprobs, entropy, values), needs, strict=True)
        ctx.likes = [(x.shape, x.dtype) if need else None for x, need in wanted]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: policy_loss, value_loss and ppo_loss have no second derivative")
        (workspace,) = ctx.saved_tensors
        made = [
            None if like is None else torch.empty(like[0], dtype=like[1], device=workspace.device) for like in ctx.likes
        ]
        steps = next(x.numel() for x in made if x is not None)
        if steps:
            _loss_bwd_kernel[(triton.cdiv(steps, BLOCK),)](
                workspace, grad_loss, *made, steps, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
        return *made, None, None, None


def _stored(workspace: Tensor, shapes: list[torch.Size | None]) -> list[tuple[Tensor, Tensor] | None]:
    """The gradients in a workspace and their scales, for the backward that torch.compile fuses."""
    first, found = _PAD, []
    for shape, scale in zip(shapes, (workspace[0], workspace[0], workspace[1]), strict=True):
        if shape is None:
            found.append(None)
            continue
        steps = math.prod(shape)  # shape.numel() would make the size a constant of the graph
        found.append((workspace[first : first + steps].view(shape), scale))
        first += _stride(steps)
    return found


_compiled = make_compiled("ppo_loss", _forward, _kept, _stored)


def _loss(
    logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, t: LossTensors, o: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (logprobs, entropy, values))
    if torch.compiler.is_compiling():
        loss, stats = _compiled(logprobs, entropy, values, t, o, needs)
    elif any(needs):
        loss, stats = _Loss.apply(logprobs, entropy, values, t, o, needs)
    else:
        loss, stats, _ = _forward(logprobs, entropy, values, t, o, needs)
    named = dict(zip(ALL_STATS, stats.unbind(), strict=True))
    names = stat_names(logprobs is not None, entropy is not None, values is not None, t, o)
    return loss, {name: named[name] for name in names}


policy_loss, value_loss, ppo_loss = public_functions(_loss)


_ROWS, _STEPS = tuple(f"{name}_row" for name in PER_STEP), tuple(f"{name}_step" for name in PER_STEP)
_OPTIONAL = ("weights", "entropy", "ref_logprobs", "value_mask", "dual_clip", "value_clip", "old_values")
_POLICY = tuple(name for name in PER_STEP[:6])
_VALUE = tuple(name for name in PER_STEP[6:9])
_ALL, _NONE = (True, True, True), (False, False, False)


def _variant(
    kernel: triton.JITFunction,
    title: str,
    constants: dict[str, Any],
    types: dict[str, str],
    absent: tuple[str, ...],
    num_warps: int = NUM_WARPS,
) -> Variant:
    """A variant whose arguments are typed by name; `types` has the exceptions, `absent` what is passed as None."""
    found = {}
    gone = {name for name in kernel.arg_names if name in absent or name.removesuffix("_ptr") in absent}
    for name in kernel.arg_names:
        is_integer = name in ("steps", "T", "programs", "gradients") or name.endswith(("_row", "_step"))
        default = "*fp32" if name.endswith("_ptr") else "i32" if is_integer else "fp32"
        if name not in gone and name not in constants:
            found[name] = types.get(name, default)
    aligned = tuple(name for name, kind in found.items() if kind.startswith("*"))
    return Variant(title, kernel, found, constants | dict.fromkeys(sorted(gone)), num_warps, aligned=aligned)


def _forward_variant(
    plan: str,
    layout: str,
    dtype: str = "fp32",
    kl_estimator: str = "k3",
    absent: tuple[str, ...] = (),
    needs: tuple[bool, ...] = _ALL,
) -> Variant:
    title = f"loss forward, {plan}, {layout}, {dtype}, {kl_estimator}, {sum(needs)} gradients"
    title += f", without {' '.join(absent)}" if absent else ""
    types = {f"{name}_ptr": f"*{dtype}" for name in PER_STEP}
    types |= {"mask_ptr": "*i1", "value_mask_ptr": "*i1", "cu_seqlens_ptr": "*i32"}
    absent += {"flat": _ROWS + _STEPS, "packed": _ROWS + _STEPS, "rows": _STEPS, "strided": ()}[layout]
    absent += () if layout == "packed" else ("cu_seqlens",)
    constants = _PLANS[plan].constants(kl_estimator, needs)
    return _variant(_loss_fwd_kernel, title, constants, types, absent, _PLANS[plan].num_warps)


def variants() -> list[Variant]:
    """What the launchers start. An absent input only removes code: each plan and layout stands with everything present,
    with the least, and with every estimator; a dtype changes loads and stores."""
    layouts = {"given": ("flat", "strided"), "steps": ("flat", "strided")}
    found = []
    for plan in _PLANS:
        for layout in layouts.get(plan, ("rows", "packed")):
            found += [_forward_variant(plan, layout, dtype) for dtype in ("fp32", "bf16", "fp16")]
            found += [_forward_variant(plan, layout, kl_estimator=kind) for kind in ("k1", "k2", "abs")]
            found.append(_forward_variant(plan, layout, absent=(*_OPTIONAL, "mask"), needs=(True, False, True)))
            found.append(_forward_variant(plan, layout, absent=(*_OPTIONAL, *_VALUE), needs=(True, False, False)))
            found.append(_forward_variant(plan, layout, absent=(*_OPTIONAL, *_POLICY), needs=(False, False, True)))
            found.append(_forward_variant(plan, layout, needs=_NONE))
    for name, plan in _PLANS.items():
        constants = {"COUNTS": plan.counts, "MEAN": plan.mean, "BLOCK": REDUCE_BLOCK}
        for kind in ("*fp32", "*fp64", "*i64", "*i32", "") if plan.counts == "denominator" else ("",):
            absent = () if kind else ("denominator_ptr",)
            title = f"loss reduce, {name}, denominator {kind or 'by value'}"
            found.append(_variant(_loss_reduce_kernel, title, constants, {"denominator_ptr": kind}, absent))
    names = ("d_logprobs_ptr", "d_entropy_ptr", "d_values_ptr")
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(names, f"*{dtype}")
        for absent in ((), names[1:], names[:2], names[1:2]):
            title = f"loss backward, {dtype}, without {' '.join(absent)}"
            found.append(_variant(_loss_bwd_kernel, title, {"BLOCK": BLOCK}, types, absent))
    return found
