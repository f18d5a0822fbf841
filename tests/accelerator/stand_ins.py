"""Operations that only CUDA has, on the test device: exact results, and the checks that CUDA makes of arguments."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerator.waits import record_waits
from torch import Tensor

_LOW = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_library = torch.library.Library("aten", "IMPL")  # its registrations last as long as it does


def register() -> None:
    """Called once, when the device is registered."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("testgpu", _varlen_forward)
    varlen._varlen_attn_backward.register_kernel("testgpu", _varlen_backward)
    for name, function in (("mm.dtype", _mm), ("mm.dtype_out", _mm_out), ("addmm.dtype_out", _addmm_out)):
        _library.impl(name, function, "PrivateUse1")


class VarlenCall(NamedTuple):
    """What a model passed to torch.nn.attention.varlen."""

    dtype: torch.dtype
    query: tuple[int, ...]  # [total, H, d]
    key: tuple[int, ...]  # [total, G, d]
    longest: int
    causal: bool
    scale: float | None
    window: tuple[int, int]


varlen_calls: list[VarlenCall] = []  # forward calls since the fixture cleared it


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_attention_arguments(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: object) -> None:
    """Raise what FlashAttention's kernels would raise, or would read wrongly."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        _require(x.dtype in _LOW, f"FlashAttention only supports fp16 and bf16, but {name} is {x.dtype}")
        _require(x.dtype == query.dtype, f"query and {name} must have the same dtype")
        _require(x.device.type == "testgpu" and x.device == query.device, f"{name} is on {x.device}")
        _require(x.stride(-1) == 1, f"{name} must have a contiguous last dimension")
        _require(x.shape[-1] % 8 == 0, f"head size must be a multiple of 8, got {x.shape[-1]}")
        _require(x.shape[-1] <= _LARGEST_HEAD, f"head size must be at most {_LARGEST_HEAD}, got {x.shape[-1]}")
    _require(ends.dtype == torch.int32, f"cu_seqlens must be int32, got {ends.dtype}")
    _require(ends.device == query.device and ends.is_contiguous(), f"cu_seqlens must be contiguous on {query.device}")
    _require(type(longest) is int, f"the longest sequence must be an int, got {type(longest)}")
    _require(query.shape[1] % key.shape[1] == 0, "the heads of query must be a multiple of those of key")


def exact_attention(
    query: Tensor,  # [total, H, d]
    key: Tensor,  # [total, G, d]
    value: Tensor,
    ends: Tensor,  # [S + 1]
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """[total, H, d] in fp32, one sequence after another, rounded to the dtype of query at the end."""
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    limits = ends.tolist()
    for start, end in itertools.pairwise(limits):
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.transpose(-1, -2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores.masked_fill(~_visible(end - start, causal, window, query.device), -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts).to(query.dtype)


def _visible(length: int, causal: bool, window: tuple[int, int], device: torch.device) -> Tensor:
    """[L, L], True where a query (row) attends to a key (column). A window of -1 has no limit on that side."""
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    seen = seen if right < 0 else seen.tril(right)
    return seen if left < 0 else seen.triu(-left)


@contextmanager
def as_one_kernel() -> Iterator[None]:
    """Keep what a stand-in does inside out of the waits: on CUDA it is one kernel."""
    with record_waits():
        yield


def gradients_of(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of function(*inputs) by autograd, for a backward that runs below autograd's dispatch keys."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradPrivateUse1, keys.ADInplaceOrView):
        excluded = excluded - torch._C.DispatchKeySet(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, excluded):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad)


def _options(causal: bool, scale: float | None, window: Any) -> dict[str, Any]:
    return {"causal": causal, "scale": scale, "window": tuple(window or (-1, -1))}


def _varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator behind varlen_attn; later versions of PyTorch have more arguments at the end."""
    check_attention_arguments(query, key, value, cu_seq_q, max_q)
    check_attention_arguments(query, key, value, cu_seq_k, max_k)
    _require(query.shape[1] == key.shape[1] or enable_gqa, "fewer heads of keys than of queries need enable_gqa")
    options = _options(is_causal, scale, window_size)
    call = VarlenCall(query.dtype, tuple(query.shape), tuple(key.shape), max_q, is_causal, scale, options["window"])
    varlen_calls.append(call)
    with as_one_kernel(), torch.no_grad():
        out = exact_attention(query, key, value, cu_seq_q, **options)
    logsumexp = torch.empty(query.shape[1], query.shape[0], device=query.device)  # only the real backward reads it
    return out, logsumexp, torch.zeros(2, dtype=torch.uint64, device=query.device)


def _varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, ...]:
    options = _options(is_causal, scale, window_size)
    with as_one_kernel():
        return gradients_of(lambda *x: exact_attention(*x, cu_seq_q, **options), (query, key, value), grad_out)


def _check_product(a: Tensor, b: Tensor, out_dtype: torch.dtype, *others: Tensor) -> None:
    for x in (b, *others):
        _require(x.device == a.device, f"Expected all tensors to be on the same device, found {a.device}, {x.device}")
    _require(a.dtype == b.dtype, "expected mat1 and mat2 to have the same dtype")
    widens = out_dtype == torch.float32 and a.dtype in _LOW
    _require(widens or out_dtype == a.dtype, "out_dtype must be the dtype of the inputs, or fp32 for fp16 and bf16")


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check_product(a, b, out_dtype)
    return a.to(out_dtype) @ b.to(out_dtype)


def _mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    _check_product(a, b, out_dtype, out)
    _require(out.dtype == out_dtype, "out_dtype must be the dtype of out")
    return out.copy_(_mm(a, b, out_dtype))


def _addmm_out(
    c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    _check_product(a, b, out_dtype, c, out)
    _require(out.dtype == out_dtype, "out_dtype must be the dtype of out")
    _require(c.dtype in (out_dtype, a.dtype), "self must have out_dtype or the dtype of mat1")
    return out.copy_(beta * c.to(out_dtype) + alpha * _mm(a, b, out_dtype))
