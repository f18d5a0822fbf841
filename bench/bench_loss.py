"""ppo_loss beside plain PyTorch and verl's functions: all terms of one PPO step on per-token tensors.

Bytes by design: seven fp32 inputs and a mask read once, two gradients written once.
"""

import pytest
import torch
from peers import peer
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference

SHAPES = {
    "tiny": [(2, 9)],
    "small": [(4, 128)],
    "default": [(8, 2048), (64, 256)],
    "all": [(8, 2048), (64, 256), (256, 2048)],
}
PROVIDERS = ("ppo_fast", "eager", "verl", "torch.compile")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = SHAPES[metafunc.config.getoption("--size")]
    metafunc.parametrize(("B", "T"), shapes, ids=[f"B{b}-T{t}" for b, t in shapes])


def plain(logprobs: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
    return reference.ppo_loss(logprobs, values, *rest)[0]


def provider_of(name: str, device: torch.device, backend: str):
    """A function of the tensors that returns the scalar loss."""
    if name == "ppo_fast":
        return lambda *tensors: ppo.ppo_loss(*tensors, backend=backend).loss
    if name == "eager":
        return plain
    if name == "torch.compile":
        if device.type != "cuda":
            pytest.skip("torch.compile is compared on a GPU")
        return torch.compile(plain)
    core = peer("verl.trainer.ppo.core_algos", "verl")

    def verl(logprobs, values, old_logprobs, old_values, advantages, returns, mask):
        policy, *_ = core.compute_policy_loss(
            old_logprobs, logprobs, advantages, mask, cliprange=0.2, clip_ratio_c=1e9, loss_agg_mode="token-mean"
        )
        value, _ = core.compute_value_loss(values, returns, old_values, mask, cliprange_value=0.2)
        return policy + 0.5 * value

    return verl


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ppo_loss(compare, benchmark, device: torch.device, backend: str, provider: str, B: int, T: int) -> None:
    loss_of = provider_of(provider, device, backend)
    torch.manual_seed(0)
    logprobs, values = (torch.randn(B, T, device=device, requires_grad=True) for _ in range(2))
    old, old_values, advantages, returns = torch.randn(4, B, T, device=device)
    tensors = (logprobs, values, logprobs.detach() + 0.2 * old, old_values, advantages, returns)
    mask = torch.rand(B, T, device=device) < 0.8

    def run() -> Tensor:
        logprobs.grad = values.grad = None
        loss = loss_of(*tensors, mask)
        loss.backward()
        return loss

    def results() -> list[Tensor]:
        return [run().detach(), logprobs.grad, values.grad]

    doubled = [x.detach().double().requires_grad_() for x in tensors]
    truth_loss, _ = reference.ppo_loss(*doubled, mask)
    truth = [truth_loss.detach(), *torch.autograd.grad(truth_loss, doubled[:2])]
    compare(
        run,
        operation="ppo_loss, forward and backward",
        provider=provider,
        shape=f"B={B} T={T}",
        dtype="float32",
        bytes=B * T * (8 * 4 + 1),
        results=results,
        truth=truth,
        leaves=(logprobs, values),
    )
    if device.type == "cuda":
        import measure

        benchmark.extra_info["call_us"] = measure.call_us(run)
        if provider == "ppo_fast":
            benchmark.extra_info["replay_us"] = measure.replay_us(run)
