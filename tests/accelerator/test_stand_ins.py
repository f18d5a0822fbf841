"""The stand-ins for CUDA's operations compute exact results and reject what the kernels would reject."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerator.stand_ins import varlen_calls
from accelerator.waits import record_waits
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

LENGTHS = (5, 1, 3)


def attention_inputs(device: torch.device, *, heads: int = 4, groups: int = 2) -> tuple[Tensor, ...]:
    """query [9, H, 8], key and value [9, G, 8] in bf16, and the ends of the sequences."""
    g = torch.Generator().manual_seed(0)
    shapes = ((9, heads, 8), (9, groups, 8), (9, groups, 8))
    parts = [torch.randn(shape, generator=g).to(device, torch.bfloat16) for shape in shapes]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    return *parts, ends


def expected(query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scale: float | None) -> Tensor:
    """The same by SDPA in fp64, one sequence after another."""
    parts = []
    for q, k, v in zip(*(x.double().split(LENGTHS) for x in (query, key, value)), strict=True):
        seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(-window)
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_varlen_attention_and_its_gradients_are_exact(
    window: int | None, scale: float | None, testgpu: torch.device
) -> None:
    *parts, ends = attention_inputs(testgpu)
    leaves = [x.requires_grad_() for x in parts]
    options = {"scale": scale, "window_size": (-1 if window is None else window, 0), "enable_gqa": True}
    with record_waits() as waits:
        out = varlen_attn(*leaves, ends, ends, 5, 5, **options)
        grad = torch.linspace(-1, 1, out.numel(), device=testgpu).view_as(out).to(out.dtype)
        out.backward(grad)
    assert not waits, str(waits)  # it stands for one kernel
    exact = [x.detach().cpu().double().requires_grad_() for x in parts]
    reference = expected(*exact, window=window, scale=scale)
    reference.backward(grad.cpu().double())
    pairs = [(out, reference), *((x.grad, y.grad) for x, y in zip(leaves, exact, strict=True))]
    for ours, theirs in pairs:
        assert ours.device == testgpu
        # Rounded once, to bf16: 2^-9 of the value. Cancellation in the gradients leaves an absolute error of fp32.
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2**-8, atol=1e-6)
    assert [(x.query, x.key, x.longest, x.window) for x in varlen_calls] == [
        ((9, 4, 8), (9, 2, 8), 5, options["window_size"])
    ]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "fp32": (lambda x: {"query": x["query"].float()}, "only supports fp16 and bf16"),
    "mixed dtypes": (lambda x: {"value": x["value"].half()}, "same dtype"),
    "int64 ends": (lambda x: {"cu_seq_q": x["cu_seq_q"].long()}, "int32"),
    "ends on the cpu": (lambda x: {"cu_seq_k": x["cu_seq_k"].cpu()}, "device|contiguous on"),
    "key on the second device": (lambda x: {"key": x["key"].to("testgpu:1")}, "is on testgpu:1|device"),
    "head size": (lambda x: {n: x[n][..., :6].contiguous() for n in ("query", "key", "value")}, "multiple of 8"),
    "large head": (lambda x: {n: x[n].repeat(1, 1, 33) for n in ("query", "key", "value")}, "at most 256"),
    "strided": (lambda x: {"query": x["query"].repeat_interleave(2, -1)[..., ::2]}, "contiguous last dimension"),
    "groups": (lambda x: {"enable_gqa": False}, "enable_gqa"),
    "heads": (lambda x: {"query": x["query"][:, :3]}, "multiple of"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_varlen_attention_rejects_what_the_kernel_rejects(
    change: Callable, message: str, testgpu: torch.device
) -> None:
    query, key, value, ends = attention_inputs(testgpu)
    right: dict[str, Any] = {"query": query, "key": key, "value": value, "cu_seq_q": ends, "cu_seq_k": ends}
    right |= {"max_q": 5, "max_k": 5, "enable_gqa": True}
    varlen_attn(**right)
    with pytest.raises((RuntimeError, ValueError), match=message):
        varlen_attn(**{**right, **change(right)})


def test_products_of_bf16_in_fp32_are_not_rounded_to_bf16(testgpu: torch.device) -> None:
    a, b = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (3, 4))
    exact = a.double() @ b.double().T
    on_device = a.to(testgpu), b.T.to(testgpu)
    out = torch.full((3, 4), 2.0, device=testgpu)
    results = [
        (torch.mm(*on_device, out_dtype=torch.float32), exact),
        (torch.mm(*on_device, out_dtype=torch.float32, out=torch.empty(3, 4, device=testgpu)), exact),
        (torch.addmm(out, *on_device, out_dtype=torch.float32, out=out), exact + 2),
    ]
    for ours, theirs in results:
        # Sums of 16 products of 8 bits each in fp32: an error of a few 2^-24, far below bf16's 2^-9.
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-6, atol=1e-5)
        assert ours.dtype == torch.float32


def test_products_reject_other_dtypes(testgpu: torch.device) -> None:
    a = torch.zeros(4, 4, device=testgpu, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="fp32 for fp16 and bf16"):
        torch.mm(a, a, out_dtype=torch.float64)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(a, a.half(), out_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype of out"):
        torch.mm(a, a, out_dtype=torch.float32, out=a.clone())
    with pytest.raises(RuntimeError, match="same device"):
        torch.mm(a, a.to("testgpu:1"), out_dtype=torch.float32)
