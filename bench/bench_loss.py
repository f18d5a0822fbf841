"""policy_loss, value_loss and ppo_loss on per-token tensors, beside plain PyTorch, torch.compile, verl and OpenRLHF.

Bytes by design: each fp32 input and the mask read once, each gradient written once. Of the baselines only verl
and OpenRLHF have functions for all terms; theirs are added, value_coef = 0.5.
"""

from collections.abc import Callable

import pytest
import torch
from peers import peer_without_its_cluster
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference

SHAPES = {
    "tiny": [(2, 9)],
    "small": [(4, 128)],
    "default": [(8, 256), (8, 2048), (8, 8192), (64, 256)],
}
SHAPES["all"] = [*SHAPES["default"], (256, 2048)]
PROVIDERS = ("ppo_fast", "eager", "torch.compile", "verl", "openrlhf")
INPUTS = {  # operation -> its tensors; those before the bar get gradients
    "policy_loss": ("logprobs", "|", "old_logprobs", "advantages"),
    "value_loss": ("values", "|", "old_values", "returns"),
    "ppo_loss": ("logprobs", "values", "|", "old_logprobs", "old_values", "advantages", "returns"),
}

Loss = Callable[..., Tensor]  # (*tensors, mask) -> scalar


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = SHAPES[metafunc.config.getoption("--size")]
    metafunc.parametrize(("B", "T"), shapes, ids=[f"B{b}-T{t}" for b, t in shapes])


def both(policy_loss: Loss, value_loss: Loss) -> dict[str, Loss]:
    """ppo_loss of a baseline that has its two terms."""

    def ppo_loss(logprobs, values, old_logprobs, old_values, advantages, returns, mask):
        policy = policy_loss(logprobs, old_logprobs, advantages, mask)
        return policy + 0.5 * value_loss(values, old_values, returns, mask)

    return {"policy_loss": policy_loss, "value_loss": value_loss, "ppo_loss": ppo_loss}


def verl() -> dict[str, Loss]:
    core = peer_without_its_cluster("verl.trainer.ppo.core_algos", "verl")

    def policy_loss(logprobs, old, advantages, mask):
        return core.compute_policy_loss(old, logprobs, advantages, mask, cliprange=0.2, clip_ratio_c=1e9)[0]

    def value_loss(values, old, returns, mask):
        return core.compute_value_loss(values, returns, old, mask, cliprange_value=0.2)[0]

    return both(policy_loss, value_loss)


def openrlhf() -> dict[str, Loss]:
    module = peer_without_its_cluster("openrlhf.models.loss", "openrlhf")
    policy, value = module.PolicyLoss(0.2, 0.2), module.ValueLoss(0.2)

    def policy_loss(logprobs, old, advantages, mask):
        return policy(logprobs, old, advantages, mask)[0]

    return both(policy_loss, lambda values, old, returns, mask: value(values, old, returns, mask))


def provider_of(name: str, operation: str, device: torch.device, backend: str) -> Loss:
    """A function of the tensors that returns the scalar loss; a skip names what is missing."""
    if name == "ppo_fast":
        function = getattr(ppo, operation)
        return lambda *tensors: function(*tensors, backend=backend).loss
    plain = getattr(reference, operation)
    if name == "eager":
        return lambda *tensors: plain(*tensors)[0]
    if name == "torch.compile":
        if device.type != "cuda":
            pytest.skip("torch.compile is compared on a GPU")
        return torch.compile(lambda *tensors: plain(*tensors)[0])
    return {"verl": verl, "openrlhf": openrlhf}[name]()[operation]


def make(B: int, T: int, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    names = ("logprobs", "values", "old_logprobs", "old_values", "advantages", "returns")
    tensors = dict(zip(names, torch.randn(6, B, T, device=device).unbind(), strict=True))
    tensors["old_logprobs"] = tensors["logprobs"] + 0.2 * tensors["old_logprobs"]
    return tensors


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("operation", INPUTS)
def test_loss(compare, device: torch.device, backend: str, operation: str, provider: str, B: int, T: int) -> None:
    loss_of = provider_of(provider, operation, device, backend)
    trained = INPUTS[operation].index("|")
    drawn = make(B, T, device)
    tensors = [drawn[name].clone() for name in INPUTS[operation] if name != "|"]
    leaves = [x.requires_grad_() for x in tensors[:trained]]
    mask = torch.rand(B, T, device=device) < 0.8

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(*tensors, mask)
        loss.backward()
        return loss

    def results() -> list[Tensor]:
        return [run().detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    doubled = [x.detach().double().requires_grad_() for x in tensors]
    truth = getattr(reference, operation)(*doubled, mask)[0]
    compare(
        run,
        operation=f"{operation}, forward and backward",
        provider=provider,
        shape=f"B={B} T={T}",
        dtype="float32",
        bytes=B * T * (4 * (len(tensors) + trained) + 1),
        results=results,
        truth=[truth.detach(), *torch.autograd.grad(truth, doubled[:trained])],
        leaves=leaves,
        small=True,
        replay=provider in ("ppo_fast", "eager"),
    )
