"""token_logprobs and its baselines: eager PyTorch, TRL, verl, and on a GPU TRL's kernel, Liger and torch.compile.

Bytes by design: forward reads the logits once, backward reads them once and writes their gradient once. Liger's cross
entropy has no entropy: it is the same work without it.
"""

from collections.abc import Callable

import pytest
import torch
from peers import peer, peer_without_its_cluster
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference

SHAPES = {  # (N, V) by --size, for a CPU and for a GPU
    ("cpu", "tiny"): [(3, 300)],
    ("cpu", "small"): [(64, 4096)],
    ("cpu", "default"): [(n, 32000) for n in (64, 256, 1024)] + [(256, 8192), (256, 50257), (1024, 50257)],
    ("cpu", "all"): [(1024, 50257), (2048, 151936)],
    ("cuda", "tiny"): [(3, 300)],
    ("cuda", "small"): [(1024, 32000)],
    ("cuda", "default"): [(16384, v) for v in (32000, 50257, 128256, 151936)] + [(n, 128256) for n in (1024, 4096)],
    ("cuda", "all"): [(n, v) for n in (1024, 4096, 16384) for v in (32000, 50257, 128256, 151936)],
}
PROVIDERS = ("ppo_fast", "eager", "trl", "verl", "trl fused", "liger", "torch.compile")

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES[kind, metafunc.config.getoption("--size")]
    metafunc.parametrize(("N", "V"), shapes, ids=[f"N{n}-V{v}" for n, v in shapes])


def provider_of(name: str, device: torch.device, backend: str) -> Score:
    """A function (logits, tokens) -> (logp, entropy); a skip names what is missing."""
    if name == "ppo_fast":
        return lambda logits, tokens: ppo.token_logprobs(logits, tokens, with_entropy=True, backend=backend)
    if name == "eager":
        return eager
    if name == "torch.compile":
        if device.type != "cuda":
            pytest.skip("torch.compile is compared on a GPU")
        return torch.compile(eager)
    if name == "trl":
        utils = peer("trl.trainer.utils", "trl")
        return lambda logits, tokens: (
            utils.selective_log_softmax(logits, tokens),
            utils.entropy_from_logits(logits),
        )
    if name == "verl":
        verl = peer_without_its_cluster("verl.utils.torch_functional", "verl")
        return lambda logits, tokens: (
            verl.logprobs_from_logits(logits, tokens, inplace_backward=False),
            verl.entropy_from_logits(logits),
        )
    if device.type != "cuda":
        pytest.skip(f"{name} runs on a GPU only")
    if name == "trl fused":
        utils = peer("trl.trainer.utils", "trl")
        return lambda logits, tokens: utils.selective_log_softmax_and_entropy(logits, tokens)
    liger = peer("liger_kernel.transformers.functional", "liger-kernel")
    return lambda logits, tokens: (-liger.liger_cross_entropy(logits, tokens, reduction="none"), logits.new_zeros(()))


def eager(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities as in most PPO code: log_softmax in fp32, gather, and an entropy from the same tensor."""
    logp = torch.log_softmax(logits.float(), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward and backward"])
def test_token_logprobs(compare, device: torch.device, backend: str, provider: str, mode: str, N: int, V: int) -> None:
    score = provider_of(provider, device, backend)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    logits = torch.randn(N, V, device=device, dtype=dtype).mul_(3).requires_grad_(mode != "forward")
    tokens = torch.randint(0, V, (N,), device=device)
    upstream = torch.randn(2, N, device=device)

    def run() -> tuple[Tensor, Tensor]:
        logits.grad = None
        logp, entropy = score(logits, tokens)
        if mode != "forward":
            torch.autograd.backward([logp, entropy] if entropy.ndim else [logp], list(upstream[: 1 + entropy.ndim]))
        return logp, entropy

    few = slice(0, 64)
    truth = reference.token_logprobs(logits[few].detach().double(), tokens[few], with_entropy=True)
    width = logits.element_size()
    compare(
        run,
        operation=f"token_logprobs and entropy, {mode}",
        provider=provider,
        shape=f"N={N} V={V}",
        dtype=str(dtype).removeprefix("torch."),
        bytes=N * V * width * (1 if mode == "forward" else 3),
        results=lambda: [x[few].detach() for x in run()] if provider != "liger" else [run()[0][few].detach()],
        truth=list(truth) if provider != "liger" else [truth[0]],
        leaves=(logits,),
    )
