"""Stand-ins for FlashAttention on the CPU: exact attention behind the signatures and argument checks of each version.

Signatures of flash-attn 2 are those of its tags v2.4.1 to v2.8.3 (flash_attn/flash_attn_interface.py), of flash-attn 3
those of hopper/flash_attn_interface.py from early 2025 to August 2026; the checks of arguments are those of
csrc/flash_attn/flash_api.cpp and hopper/flash_api.cpp. `torch_2_11` and `torch_2_12` are torch.nn.attention.varlen of
PyTorch 2.11, and of 2.12 and 2.13. They show that calls are right, not that kernels are, nor what kernels cost.
"""

import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast.common import device as devices
from ppo_fast.llm.packing import flash
from ppo_fast.llm.packing.flash_calls import TRIAL_LENGTHS

CALLS: list[tuple[str, dict[str, Any]]] = []  # name and arguments of each call, trials included
FAULT: list[str] = []  # a fault to compute with: "leak", "window", "scale", "raises" or "backward"
TRIAL = sum(TRIAL_LENGTHS)  # rows of a trial, which a fault "... after the trial" spares


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Record every call with its arguments by name, including defaults."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        CALLS.append((function.__name__, dict(bound.arguments)))
        return function(*args, **options)

    return call


def faulty(name: str, rows: int) -> bool:
    """Check whether to compute with the fault."""
    return name in FAULT or (f"{name} after the trial" in FAULT and rows != TRIAL)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def exact(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None, window: tuple[int, int], softcap: float
) -> Tensor:
    """[total, H, d]: softmax attention of each sequence, in fp32 inside, where `window` is (left, right), -1: open."""
    if faulty("window", len(q)) and window[0] >= 0:
        window = (window[0] + 1, window[1])
    scale = q.shape[-1] ** -0.5 if scale is None or faulty("scale", len(q)) else scale
    ends = [0, int(cu_seqlens[-1])] if faulty("leak", len(q)) else cu_seqlens.tolist()
    parts = []
    for start, end in itertools.pairwise(ends):
        keys, values = (
            x[start:end].float().repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (k, v)
        )
        scores = q[start:end].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        place = torch.arange(end - start, device=q.device)
        distance = place.unsqueeze(1) - place  # from a query back to a key
        seen = torch.ones_like(distance, dtype=torch.bool)
        if window[0] >= 0:
            seen &= distance <= window[0]
        if window[1] >= 0:
            seen &= -distance <= window[1]
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts).to(q.dtype)


def check_rows(q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, ...], longest: tuple[Any, ...]) -> None:
    """The checks that all kernels have in common."""
    check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == q.dtype, "query and key must have the same dtype")
    check(v.dtype == q.dtype, "query and value must have the same dtype")
    for x in (q, k, v):
        check(x.ndim == 3, "expected [total, heads, head size]")
        check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    for x in ends:
        check(x.dtype == torch.int32, "cu_seqlens must have dtype int32")
        check(x.is_contiguous() and x.device == q.device, "cu_seqlens must be contiguous and on the device")
    check(k.shape == v.shape and k.shape[2] == q.shape[2], "wrong shape of keys or values")
    check(q.shape[1] % k.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")
    check(q.shape[2] <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(q.shape[2] % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    for n in longest:
        if type(n) is not int:
            raise TypeError(f"incompatible function arguments: {type(n).__name__} is not int")
    if int(ends[0].diff().max()) != longest[0] or int(ends[0][-1]) != len(q):
        raise RuntimeError("the lengths do not belong to the rows")  # a kernel would read out of bounds
    if faulty("raises", len(q)):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def check_options(window_size: Any, softcap: Any, softmax_scale: Any, causal: Any, deterministic: Any) -> None:
    """Check options: pybind11 and torch.library reject None for a number."""
    if not (isinstance(window_size, tuple) and [type(x) for x in window_size] == [int, int]):
        raise TypeError(f"window_size: {window_size!r}")
    if type(softcap) not in (float, int) or type(softmax_scale) not in (float, type(None)):
        raise TypeError(f"softcap {softcap!r}, softmax_scale {softmax_scale!r}")
    if type(causal) is not bool or type(deterministic) is not bool:
        raise TypeError(f"causal {causal!r}, deterministic {deterministic!r}")


def without_backward(out: Tensor, message: str) -> Tensor:
    def fail(_: Tensor) -> None:
        raise RuntimeError(message)

    if out.requires_grad:
        out.register_hook(fail)
    return out


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: tuple[Tensor, Tensor],
    longest: tuple[Any, Any],
    *,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    deterministic: Any,
) -> Tensor:
    check_rows(q, k, v, ends, longest)
    check_options(window_size, softcap, softmax_scale, causal, deterministic)
    window = (window_size[0], 0) if causal else window_size
    out = exact(q, k, v, ends[0], softmax_scale, window, softcap)
    if faulty("backward", len(q)):
        return without_backward(out, "This flash attention build does not support backward.")
    return out


@recorded
def flash_attn_2_4(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    return compute(q, k, v, ends, longest, softcap=0.0, deterministic=deterministic, **options)


def _flash_attn_2_6(version: tuple[int, ...]) -> Callable[..., Any]:
    @recorded
    def flash_attn_2_6(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        major = (devices.compute_capability(q.device) or (0, 0))[0]
        known = major in (8, 9) if version < (2, 7, 3) else major >= 8
        check(known, "FlashAttention only supports Ampere GPUs or newer.")
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
        return compute(q, k, v, ends, longest, softcap=softcap, deterministic=deterministic, **options)

    return flash_attn_2_6


flash_attn_2_7_0 = _flash_attn_2_6((2, 7, 0))
flash_attn_2_6 = _flash_attn_2_6((2, 7, 3))  # to 2.8


@recorded
def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    out = compute(q, k, v, ends, longest, softcap=softcap, deterministic=deterministic, **options)
    if deterministic and q.shape[2] > 192:
        return without_backward(out, "Deterministic backward not supported for hdim 256.")
    return out


@recorded
def flash_attn_3_early(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    """From early to July 2025: with the logsumexp."""
    ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    out = compute(q, k, v, ends, longest, softcap=softcap, deterministic=deterministic, **options)
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32)


def _varlen(q: Any, k: Any, v: Any, cu: Any, cu_k: Any, max_q: Any, max_k: Any, scale: Any, window_size: Any) -> Tensor:
    check_rows(q, k, v, (cu, cu_k), (max_q, max_k))
    check_options(window_size, 0.0, scale, True, True)
    # aten takes the right side of the window as it is, and causal for exactly (-1, 0)
    return exact(q, k, v, cu, scale, window_size, 0.0)


@recorded
def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    check(query.shape[1] == key.shape[1], "expected as many heads of keys as of queries")
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@recorded
def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def write_package(folder: Path, version: str, code: str) -> None:
    """An installed distribution, as importlib sees it: flash-attn, or flash-attn 3 with its own module."""
    module, name = ("flash_attn_interface", "flash_attn_3") if version.startswith("3") else ("flash_attn", "flash_attn")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(f'__version__ = "{version}"\n{code}\n')
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "top_level.txt").write_text(f"{module}\n")


FUNCTIONS = {
    "2.4.1": "flash_attn_2_4",
    "2.5.9": "flash_attn_2_4",
    "2.6.3": "flash_attn_2_6",
    "2.7.0": "flash_attn_2_7_0",
    "2.7.4": "flash_attn_2_6",
    "2.8.3": "flash_attn_2_6",
    "3.0.0": "flash_attn_3",
    "3.0.0b1": "flash_attn_3_early",
}


@contextmanager
def machine(
    folder: Path,
    *versions: str,  # of FUNCTIONS; or a version and the code of its module, as (version, code)
    capability: tuple[int, int] | None = (9, 0),
    varlen: Callable[..., Any] | None = None,  # PyTorch's own; None: as it is, which fails on the CPU
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Make CPU tensors take the path of GPU tensors, with these packages installed; return the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "compute_capability", lambda device: capability)
        if varlen is not None:
            patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
        for version in versions:
            code = f"from support.flash_attn_stand_in import {FUNCTIONS[version]} as flash_attn_varlen_func"
            write_package(folder, version, code)
        patch.syspath_prepend(folder)
        _clean()
        try:
            yield CALLS
        finally:
            _clean()
    importlib.invalidate_caches()


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Make the stand-ins compute with a fault inside this block."""
    FAULT.append(name)
    try:
        yield
    finally:
        FAULT.remove(name)


def _clean() -> None:
    for name in [x for x in sys.modules if x.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]
    CALLS.clear()
    flash.reset()
