"""How each FlashAttention is called on packed rows, and the trial that each has to pass first.

The trial compares forward and backward of three short sequences with attention by its definition: it finds a build
without backward, a GPU that a build was not compiled for, a signature that differs, and wrong numbers.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ppo_fast.common.text import first_line

TRIAL_LENGTHS = (33, 5, 1)
TRIAL_WINDOW = 4
TRIAL_BOUND = 16  # units in the last place of the largest value; a leak or a wrong window is off by hundreds in fp16
CALL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, ImportError)


# of one of the libraries, whose keyword arguments differ; some return more than the output
Attention: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Request:
    """What an attention layer needs."""

    device: torch.device
    dtype: torch.dtype  # of the computation: autocast's where it is on
    head_size: int  # of queries and keys
    value_size: int
    grouped: bool = False  # fewer heads of keys than of queries
    window: bool = False
    softcap: bool = False
    sinks: bool = False


@dataclass(frozen=True)
class Rows:
    """A layer's packed rows, and how they attend."""

    query: Tensor  # [total, H, d]
    key: Tensor  # [total, G, d], H a multiple of G
    value: Tensor
    cu_seqlens: Tensor  # [S + 1] int32
    longest: int
    scaling: float | None  # None: d ** -0.5
    window: int | None  # tokens, the query's own included
    softcap: float | None


def _call_flash_attn(function: Attention, rows: Rows) -> Tensor:
    """`flash_attn_varlen_func` of flash-attn 2 and 3: these keywords are common to both."""
    options: dict[str, object] = {} if rows.softcap is None else {"softcap": rows.softcap}  # 2.4 and 2.5 do not have it
    out = function(
        *(_dense(x) for x in (rows.query, rows.key, rows.value)),
        cu_seqlens_q=rows.cu_seqlens,
        cu_seqlens_k=rows.cu_seqlens,
        max_seqlen_q=rows.longest,
        max_seqlen_k=rows.longest,
        softmax_scale=rows.scaling,
        causal=True,
        window_size=(-1, -1) if rows.window is None else (rows.window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )
    return out[0] if isinstance(out, tuple) else out  # flash-attn 3 before July 2025 returns the logsumexp, too


@functools.cache
def _takes_groups(function: Attention) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


def _call_torch_varlen(function: Attention, rows: Rows) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: causal means a window without a right side."""
    assert rows.softcap is None
    q, k, v = (_dense(x) for x in (rows.query, rows.key, rows.value))
    window = (-1 if rows.window is None else rows.window - 1, 0)
    options: dict[str, object] = {"scale": rows.scaling, "window_size": window}
    if q.shape[1] != k.shape[1]:
        if _takes_groups(function):
            options["enable_gqa"] = True
        else:  # PyTorch 2.11
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = function(q, k, v, rows.cu_seqlens, rows.cu_seqlens, rows.longest, rows.longest, **options)
    return out[0] if isinstance(out, tuple) else out


def _dense(x: Tensor) -> Tensor:
    """The kernels read a head's entries side by side; other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


CALLS: dict[str, Callable[[Attention, Rows], Tensor]] = {
    "flash-attn 3": _call_flash_attn,
    "flash-attn 2": _call_flash_attn,
    "torch varlen": _call_torch_varlen,
}


def trial(path: str, function: Attention, request: Request) -> str | None:
    """Compare forward and backward on short sequences with plain attention in fp32; the problem, or None."""
    generator = torch.Generator("cpu").manual_seed(0)
    total = sum(TRIAL_LENGTHS)

    def normal(heads: int) -> Tensor:
        x = torch.randn(total, heads, request.head_size, generator=generator, device="cpu")
        return x.to(request.device, request.dtype)

    rows = Rows(
        query=normal(4).requires_grad_(),
        key=normal(2 if request.grouped else 4).requires_grad_(),
        value=normal(2 if request.grouped else 4).requires_grad_(),
        cu_seqlens=torch.tensor([0, *TRIAL_LENGTHS], device="cpu").cumsum(0).to(request.device, torch.int32),
        longest=max(TRIAL_LENGTHS),
        scaling=0.4,
        window=TRIAL_WINDOW if request.window else None,
        softcap=2.0 if request.softcap else None,
    )
    upstream = normal(4)
    try:
        out = CALLS[path](function, rows)
        actual = [out, *torch.autograd.grad(out, (rows.query, rows.key, rows.value), upstream)]
        errors = [_error(a, e) for a, e in zip(actual, _exact(rows, upstream), strict=True)]
    except CALL_ERRORS as error:
        return first_line(error)
    bound = TRIAL_BOUND * torch.finfo(request.dtype).eps
    names = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")
    wrong = [f"{name} off by {error:.2g}" for name, error in zip(names, errors, strict=True) if not error <= bound]
    return f"wrong numbers: {', '.join(wrong)} of the largest" if wrong else None


def _error(actual: Tensor, exact: Tensor) -> float:
    """The largest error as a share of the largest value."""
    return ((actual.float() - exact).abs().max() / exact.abs().max()).item()


def _exact(rows: Rows, upstream: Tensor) -> list[Tensor]:
    """Output and gradients by the definition of attention, a sequence at a time."""
    wide = [x.detach().float().requires_grad_() for x in (rows.query, rows.key, rows.value)]
    parts = zip(*(x.split(TRIAL_LENGTHS) for x in wide), strict=True)
    out = torch.cat([_plain(q, k, v, rows) for q, k, v in parts])
    return [out.detach(), *torch.autograd.grad(out, wide, upstream.float())]


def _plain(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Causal attention of one sequence by its definition."""
    scaling = q.shape[-1] ** -0.5 if rows.scaling is None else rows.scaling
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scaling
    if rows.softcap is not None:
        scores = rows.softcap * torch.tanh(scores / rows.softcap)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
    if rows.window is not None:
        seen = seen.triu(1 - rows.window)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
