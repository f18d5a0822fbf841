"""linear_ppo_loss and linear_logprobs and their baselines: from hidden states to gradients, or to log-probabilities.

FLOPs by design: 6 N D V for a step, 2 N D V for log-probabilities; bytes: hidden, weight and their gradients. The floor
is those FLOPs at the rate of one library GEMM of the same shape; "three GEMMs" are the products of one step, h W^T, d W
and d^T h, each as a whole, as by such a library. Baselines that recompute the logits (TRL, Liger, verl, CCE) need
8 N D V. "whole logits" are eager's GEMM and our token_logprobs: also 6 N D V, with the memory of whole logits. torch's
own chunked cross entropy needs 6, too, but is not PPO. Liger's GRPO loss takes one advantage for a sequence, here that
of its first token, so its value differs.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import peer, peer_without_its_cluster
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference
from ppo_fast.ops.backend import Backend

SHAPES = {  # (N, D, V) by --size, for a CPU and for a GPU
    ("cpu", "tiny"): [(2, 16, 130)],
    ("cpu", "small"): [(256, 128, 8192)],
    ("cpu", "default"): [(n, 256, 16384) for n in (256, 512, 1024)]
    + [(512, 256, 4096), (512, 256, 50257), (4096, 512, 50257)],
    ("cpu", "all"): [(4096, 512, 50257), (1024, 1024, 151936)],
    ("cuda", "tiny"): [(8, 16, 130)],
    ("cuda", "small"): [(1024, 1024, 32000)],
    ("cuda", "default"): [(n, 4096, 128256) for n in (8192, 2048, 16384)] + [(8192, 4096, v) for v in (32000, 151936)],
    ("cuda", "all"): [(n, 4096, v) for n in (1024, 8192, 16384) for v in (32000, 128256, 151936)],
}
OURS = ("ppo_fast", "ppo_fast, low logits")
BASELINES = ("ppo_fast, whole logits", "eager", "trl", "liger scaled ce", "cce", "verl")
STEP = (*OURS, "three GEMMs", *BASELINES, "liger", "torch chunked cross entropy")
SCORE = (*OURS, "one GEMM", *BASELINES)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # hidden, weight, tokens, old_logprobs, advantages


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES[kind, metafunc.config.getoption("--size")]
    metafunc.parametrize(("N", "D", "V"), shapes, ids=[f"N{n}-D{d}-V{v}" for n, d, v in shapes])


def make(N: int, D: int, V: int, device: torch.device, trained: bool) -> Inputs:
    """Logits with a spread of about 1, ratios with one of 0.2."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(N, D, device=device, dtype=dtype).requires_grad_(trained)
    weight = torch.randn(V, D, device=device, dtype=dtype).mul_(D**-0.5).requires_grad_(trained)
    tokens = torch.randint(0, V, (N,), device=device)
    noise, advantages = torch.randn(2, N, device=device)
    old = logprobs_of(hidden.detach(), weight.detach(), tokens, backend="torch") + 0.2 * noise
    return hidden, weight, tokens, old, advantages


def logprobs_of(hidden: Tensor, weight: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    out = ppo.linear_logprobs(hidden, weight, tokens, **options)
    assert isinstance(out, Tensor)
    return out


@functools.lru_cache(maxsize=1)
def truth_of(N: int, D: int, V: int, device: torch.device) -> Tensor:
    """Log-probabilities in fp64 of what `make` draws, a few rows at a time."""
    hidden, weight, tokens, *_ = make(N, D, V, device, trained=False)
    rows, w = zip(hidden.split(256), tokens.split(256), strict=True), weight.double()
    logits = (((h.double() @ w.T).log_softmax(-1), t.unsqueeze(1)) for h, t in rows)
    return torch.cat([x.gather(1, t).squeeze(1) for x, t in logits])


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The loss of the log-probabilities of every baseline."""
    ratio = torch.exp(logprobs - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()


def scorer(name: str, device: torch.device, backend: Backend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function (hidden, weight, tokens) -> log-probabilities; a skip names what is missing."""
    if name in OURS:
        low = name != "ppo_fast"
        return lambda h, w, t: logprobs_of(h, w, t, logits_dtype=h.dtype if low else None, backend=backend)
    if name == "ppo_fast, whole logits":
        return lambda h, w, t: ppo.token_logprobs(h @ w.T, t, backend=backend)
    if name == "eager":
        return lambda h, w, t: (h @ w.T).float().log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1)
    if name == "trl":
        function = peer("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction
        return lambda h, w, t: function.apply(h, w, None, t, 1.0, 32768, None, 1.0, ("entropy",))[0]
    if name == "liger scaled ce":  # on an H100 or H200 with CuTe-DSL its own kernel, else chunks in PyTorch
        ops = peer("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel >= 0.8")
        scaled = ops.LigerFusedLinearScaledCrossEntropyFunction
        return lambda h, w, t: -scaled.apply(h, w, t, 1.0, -100, 1, True)[0]
    if device.type != "cuda":
        pytest.skip(f"{name} runs on a GPU only")
    if name == "cce":
        cce = peer("cut_cross_entropy", "cut-cross-entropy")
        return lambda h, w, t: -cce.linear_cross_entropy(h, w, t, reduction="none")
    verl = peer_without_its_cluster("verl.utils.kernel.linear_cross_entropy", "verl")
    return lambda h, w, t: verl.linear_cross_entropy(h, w, t, 1.0)[0]


def stepper(name: str, device: torch.device, backend: Backend) -> Callable[..., Tensor]:
    """A function of the inputs that returns a scalar loss."""
    if name in OURS:
        low = name != "ppo_fast"

        def ours(hidden: Tensor, *rest: Tensor) -> Tensor:
            logits_dtype = hidden.dtype if low else None
            return ppo.linear_ppo_loss(hidden, *rest, logits_dtype=logits_dtype, backend=backend).loss

        return ours
    if name == "torch chunked cross entropy":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            pytest.skip("torch < 2.13 has no linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda h, w, t, *_: torch.nn.functional.linear_cross_entropy(h, w, t, options=options)
    if name == "liger":
        module = peer("liger_kernel.chunked_loss.grpo_loss", "liger-kernel").LigerFusedLinearGRPOLoss

        def liger(h: Tensor, w: Tensor, t: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
            B = 8 if len(h) % 8 == 0 else 1
            loss_of = module(beta=0.0, compiled=False, use_ref_model=False, chunk_size=B, loss_type="bnpo")
            rows = [x.view(B, -1, *x.shape[1:]) for x in (h, t, torch.ones_like(old), advantages, old)]
            h, t, mask, advantages, old = rows
            return loss_of(h, w, t, mask, advantages[:, 0].contiguous(), old_per_token_logps=old)[0]

        return liger
    score = scorer(name, device, backend)
    return lambda h, w, t, old, advantages: clipped(score(h, w, t), old, advantages)


def products(hidden: Tensor, weight: Tensor, count: int) -> Callable[[], Tensor]:
    """The matrix products of a step and nothing else."""
    h, w = hidden.detach(), weight.detach()
    logits = h @ w.T

    def run() -> Tensor:
        out = torch.mm(h, w.T, out=logits)
        if count == 3:
            torch.mm(out, w)
            torch.mm(out.T, h)
        return out

    return run


@pytest.mark.parametrize("provider", STEP)
def test_step(compare, device: torch.device, backend: Backend, provider: str, N: int, D: int, V: int) -> None:
    inputs = make(N, D, V, device, trained=True)
    hidden, weight = inputs[:2]
    shared: dict[str, Any] = {
        "operation": "linear_ppo_loss, forward and backward",
        "provider": provider,
        "shape": f"N={N} D={D} V={V}",
        "dtype": str(hidden.dtype).removeprefix("torch."),
        "bytes": 2 * (N + V) * D * hidden.element_size(),
        "flops": 6 * N * D * V,
        "gemm": (N, V, D),
        "leaves": (hidden, weight),
    }
    if provider == "three GEMMs":
        compare(products(hidden, weight, 3), **shared)
        return
    loss_of = stepper(provider, device, backend)

    def run() -> Tensor:
        hidden.grad = weight.grad = None
        loss = loss_of(*inputs)
        loss.backward()
        return loss

    if provider in ("liger", "torch chunked cross entropy"):  # another loss, which has no reference to compare with
        compare(run, **shared)
        return

    few = min(8, N)

    def results() -> list[Tensor]:
        loss = run().detach()
        assert hidden.grad is not None
        return [loss, hidden.grad[:few] * N]

    h, _, *rest = (x[:few].detach() for x in inputs)
    rest = [x.double() if x.is_floating_point() else x for x in rest]
    h = h.double().requires_grad_()
    gradient = torch.autograd.grad(few * reference.linear_ppo_loss(h, weight.detach().double(), *rest)[0], h)[0]
    logprobs = truth_of(N, D, V, device)
    truth = [clipped(logprobs, inputs[3].double(), inputs[4].double()), gradient]
    compare(run, results=results, truth=truth, **shared)


@pytest.mark.parametrize("provider", SCORE)
def test_score(compare, device: torch.device, backend: Backend, provider: str, N: int, D: int, V: int) -> None:
    hidden, weight, tokens, *_ = make(N, D, V, device, trained=False)
    shared: dict[str, Any] = {
        "operation": "linear_logprobs, forward without gradients",
        "provider": provider,
        "shape": f"N={N} D={D} V={V}",
        "dtype": str(hidden.dtype).removeprefix("torch."),
        "bytes": (N + V) * D * hidden.element_size(),
        "flops": 2 * N * D * V,
        "gemm": (N, V, D),
    }
    if provider == "one GEMM":
        compare(products(hidden, weight, 1), **shared)
        return
    score = scorer(provider, device, backend)

    def run() -> Tensor:
        with torch.no_grad():
            return score(hidden, weight, tokens)

    compare(run, results=lambda: [run()], truth=[truth_of(N, D, V, device)], **shared)
