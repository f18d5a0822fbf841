"""shape_rewards, masked_whiten and rlhf_advantages compared with plain PyTorch, torch.compile, verl and OpenRLHF.

rlhf_advantages is everything between scores and whitened advantages: KL penalty, score at the last token, GAE,
whitening. "ppo_fast in three calls" is our own shape_rewards, gae and masked_whiten one after the other, which shows
the gain of their fusion. verl whitens inside its GAE. OpenRLHF whitens a replay buffer, elsewhere; its function for one
row at a time is included, so only its returns are compared. The same with critic_lam has returns of another lambda; it
is to take the time of one lambda, and its baseline is two calls of eager.

Bytes by design, per token: rewards read two log-probabilities and a mask and write rewards and KL (17); whitening reads
x and a mask, then both again, and writes (14: its mean has to be known first); all of it reads three tensors and a
mask, writes rewards, KL, advantages and returns, and whitens advantages in place (41).
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
    "small": [(8, 128)],
    "default": [(64, 256), (64, 1024), (64, 4096)],
}
SHAPES["all"] = [*SHAPES["default"], (1024, 1024), (8, 32768)]
PROVIDERS = ("ppo_fast", "eager", "torch.compile", "verl", "openrlhf")
TWO_LAMBDAS = "rlhf_advantages, critic_lam"
BYTES = {"shape_rewards": 17, "masked_whiten": 14, "rlhf_advantages": 41, TWO_LAMBDAS: 41}
KL_COEF, GAMMA, LAM, CRITIC_LAM = 0.05, 0.99, 0.95, 1.0

Step = Callable[[], list[Tensor]]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # scores [B], logprobs, ref_logprobs, values, mask [B, T]


def providers_of(operation: str) -> tuple[str, ...]:
    if operation == TWO_LAMBDAS:
        return "ppo_fast", "eager"
    return (*PROVIDERS, "ppo_fast in three calls") if operation == "rlhf_advantages" else PROVIDERS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = SHAPES[metafunc.config.getoption("--size")]
    cases = [
        pytest.param(operation, provider, b, t, id=f"{operation}-B{b}-T{t}-{provider}")
        for operation in BYTES
        for b, t in shapes
        for provider in providers_of(operation)
    ]
    metafunc.parametrize(("operation", "provider", "B", "T"), cases)


def make(B: int, T: int, device: torch.device) -> Inputs:
    """Answers of ragged lengths, the longest of length T, padded with zeros, as by trainers."""
    torch.manual_seed(0)
    lengths = torch.randint(1, T + 1, (B, 1), device=device).clamp(min=T // 4)
    lengths[0] = T
    mask = torch.arange(T, device=device) < lengths
    logprobs, noise, values = torch.randn(3, B, T, device=device) * mask
    return torch.randn(B, device=device), logprobs, logprobs + 0.1 * noise, values, mask


def of(module: object, operation: str, x: Inputs, **options: str) -> Step:
    """Our public operations, and the reference, which has the same signatures."""
    scores, logprobs, ref, values, mask = x
    function = getattr(module, operation.partition(",")[0])
    if operation == "shape_rewards":
        return lambda: list(function(scores, logprobs, ref, mask, kl_coef=KL_COEF, **options))
    if operation == "masked_whiten":
        return lambda: [function(values, mask, **options)]
    critic_lam = CRITIC_LAM if operation == TWO_LAMBDAS else None
    settings = dict(kl_coef=KL_COEF, gamma=GAMMA, lam=LAM, critic_lam=critic_lam, **options)
    return lambda: list(function(scores, logprobs, ref, values, mask, **settings))[:2]


def in_three_calls(x: Inputs, backend: str) -> Step:
    scores, logprobs, ref, values, mask = x

    def run() -> list[Tensor]:
        rewards, _ = ppo.shape_rewards(scores, logprobs, ref, mask, kl_coef=KL_COEF, backend=backend)
        advantages, returns = ppo.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, backend=backend)
        return [ppo.masked_whiten(advantages, mask, backend=backend), returns]

    return run


def verl(operation: str, x: Inputs) -> Step:
    core = peer_without_its_cluster("verl.trainer.ppo.core_algos", "verl")
    whiten = peer_without_its_cluster("verl.utils.torch_functional", "verl").masked_whiten
    scores, logprobs, ref, values, mask = x
    last, mask = mask.sum(1, keepdim=True) - 1, mask.float()

    def rewards() -> list[Tensor]:
        placed = torch.zeros_like(logprobs).scatter_(1, last, scores.unsqueeze(1))
        kl = core.kl_penalty(logprobs, ref, "kl") * mask
        return [placed - KL_COEF * kl, kl]

    def everything() -> list[Tensor]:
        return list(core.compute_gae_advantage_return(rewards()[0], values, mask, GAMMA, LAM))

    steps = {"shape_rewards": rewards, "masked_whiten": lambda: [whiten(values, mask)], "rlhf_advantages": everything}
    return steps[operation]


def openrlhf(operation: str, x: Inputs) -> Step:
    utils = peer_without_its_cluster("openrlhf.models.utils", "openrlhf")
    module = peer_without_its_cluster("openrlhf.trainer.ppo_utils.experience_maker", "openrlhf")
    maker = module.RemoteExperienceMaker.__new__(module.RemoteExperienceMaker)  # no attribute of it is read
    scores, logprobs, ref, values, mask = *x[:4], x[4].float()

    def rewards() -> list[Tensor]:
        kl = utils.compute_approx_kl(logprobs, ref, kl_estimator="k1")
        return [utils.compute_reward(scores, KL_COEF, kl, mask), kl]

    def everything() -> list[Tensor]:
        advantages, returns = maker.get_advantages_and_returns(values, rewards()[0], mask, GAMMA, LAM)
        return [utils.masked_normalize(advantages, mask), returns]

    if operation == "masked_whiten":
        pytest.skip("openrlhf has no whitening over a batch")
    return {"shape_rewards": rewards, "rlhf_advantages": everything}[operation]


def provider_of(name: str, operation: str, x: Inputs, device: torch.device, backend: str) -> Step:
    """A function that returns the results; a skip names what is missing."""
    if name == "ppo_fast":
        return of(ppo, operation, x, backend=backend)
    if name == "ppo_fast in three calls":
        return in_three_calls(x, backend)
    if name == "eager":
        return of(reference, operation, x)
    if name == "torch.compile":
        if device.type != "cuda":
            pytest.skip("torch.compile is compared on a GPU")
        if operation == "rlhf_advantages":
            pytest.skip("torch.compile unrolls the loop over T")
        return torch.compile(of(reference, operation, x))
    return {"verl": verl, "openrlhf": openrlhf}[name](operation, x)


def test_advantages(compare, device: torch.device, backend: str, operation: str, provider: str, B: int, T: int) -> None:
    x = make(B, T, device)
    run = provider_of(provider, operation, x, device, backend)
    mask = x[-1]
    doubled = tuple(t.double() if t.is_floating_point() else t for t in x)
    truth = of(reference, operation, doubled)()
    compared = slice(1, None) if (provider, operation) == ("openrlhf", "rlhf_advantages") else slice(None)
    compare(
        run,
        operation=operation,
        provider=provider,
        shape=f"B={B} T={T}",
        dtype="float32",
        bytes=BYTES[operation] * B * T,
        results=lambda: [t[mask] for t in run()[compared]],  # the others write numbers at masked steps
        truth=[t[mask] for t in truth[compared]],
        small=True,
        replay=provider.startswith("ppo_fast"),
    )
