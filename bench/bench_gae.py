"""gae and its baselines, with done flags.

Batch-first: torchrl's two functions, the loops of verl and OpenRLHF (which have no flags and do the same work without
them), and on a GPU rl-triton's kernel. Time-major: SB3's numpy buffer and a CleanRL-style torch loop.

Bytes by design: rewards, values and a flag read once, advantages and returns written once: 17 bytes a step.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from peers import peer, peer_without_its_cluster
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference

GAMMA, LAM = 0.99, 0.95
SHAPES = {  # (rows, T, time-major)
    "tiny": [(2, 9, False), (1, 3, True)],
    "small": [(64, 128, False), (8, 128, True)],
    "default": [
        *(
            (b, t, False)
            for b, t in ((4096, 128), (256, 128), (256, 512), (256, 2048), (64, 1024), (8, 16384), (1, 2048))
        ),
        *((n, t, True) for t, n in ((2048, 1), (128, 8), (128, 256), (2048, 256), (128, 4096))),
    ],
}
SHAPES["all"] = [*SHAPES["default"], (8192, 2048, False), (64, 32768, False), (16, 65536, False)]
OURS = ("ppo_fast", "ppo_fast without numba")
BATCH_FIRST = ("torchrl", "torchrl vectorised", "verl", "openrlhf", "rl-triton")
TIME_MAJOR = ("sb3", "cleanrl loop")
WITHOUT_FLAGS = ("verl", "openrlhf")

Estimate = Callable[[], tuple[Tensor, Tensor]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        pytest.param(
            provider, b, t, major, id=f"{'T' if major else 'B'}{t if major else b}x{b if major else t}-{provider}"
        )
        for b, t, major in SHAPES[metafunc.config.getoption("--size")]
        for provider in (*OURS, *(TIME_MAJOR if major else BATCH_FIRST))
    ]
    metafunc.parametrize(("provider", "rows", "T", "time_major"), cases)


def torchrl(r: Tensor, v: Tensor, done: Tensor, name: str) -> Estimate:
    function = getattr(peer("torchrl.objectives.value.functional", "torchrl"), name)
    next_values = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1).unsqueeze(-1)
    r, v, done = (x.unsqueeze(-1) for x in (r, v, done))
    return lambda: tuple(x.squeeze(-1) for x in function(GAMMA, LAM, v, next_values, r, done, done))


def sb3(r: Tensor, v: Tensor, done: Tensor) -> Estimate:
    spaces = peer("gymnasium.spaces", "gymnasium")
    buffers = peer("stable_baselines3.common.buffers", "stable-baselines3")
    T, N = r.shape
    box = spaces.Box(-1, 1, (1,))
    buffer = buffers.RolloutBuffer(T, box, box, gae_lambda=LAM, gamma=GAMMA, n_envs=N)
    buffer.rewards, buffer.values = r.numpy().copy(), v.numpy().copy()
    starts = np.zeros((T, N), np.float32)  # SB3 marks the step after an end
    starts[1:] = done[:-1].numpy()
    buffer.episode_starts = starts
    last_values, last_dones = torch.zeros(N), done[-1].numpy()

    def run() -> tuple[Tensor, Tensor]:
        buffer.compute_returns_and_advantage(last_values, last_dones)
        return torch.from_numpy(buffer.advantages), torch.from_numpy(buffer.returns)

    return run


def cleanrl_loop(r: Tensor, v: Tensor, done: Tensor) -> Estimate:
    """The loop of CleanRL-style scripts, reimplemented: one [N] step of torch operations for each t."""

    def run() -> tuple[Tensor, Tensor]:
        advantages, trace, following = torch.zeros_like(r), torch.zeros_like(r[0]), torch.zeros_like(r[0])
        for t in reversed(range(len(r))):
            goes_on = 1.0 - done[t].float()
            trace = r[t] + GAMMA * following * goes_on - v[t] + GAMMA * LAM * goes_on * trace
            advantages[t], following = trace, v[t]
        return advantages, advantages + v

    return run


def verl(r: Tensor, v: Tensor, done: Tensor) -> Estimate:
    core = peer_without_its_cluster("verl.trainer.ppo.core_algos", "verl")
    mask = torch.ones_like(r)
    return lambda: core.compute_gae_advantage_return(r, v, mask, GAMMA, LAM)


def openrlhf(r: Tensor, v: Tensor, done: Tensor) -> Estimate:
    module = peer_without_its_cluster("openrlhf.trainer.ppo_utils.experience_maker", "openrlhf")
    maker = module.RemoteExperienceMaker.__new__(module.RemoteExperienceMaker)  # no attribute of it is read
    mask = torch.ones_like(r)
    return lambda: maker.get_advantages_and_returns(v, r, mask, GAMMA, LAM)


def rl_triton(r: Tensor, v: Tensor, done: Tensor) -> Estimate:
    compute = peer("rl_triton.ops.gae", "rl-triton").compute_gae
    ends = done.float()

    def run() -> tuple[Tensor, Tensor]:
        advantages = compute(r, v, ends, gamma=GAMMA, lambda_=LAM)
        return advantages, advantages + v

    return run


def baseline(name: str, device: torch.device, r: Tensor, v: Tensor, done: Tensor) -> Estimate:
    """A function that returns advantages and returns; a skip names what is missing."""
    if name == "sb3" and device.type != "cpu":
        pytest.skip("sb3 computes advantages in numpy on a CPU")
    if name == "rl-triton" and device.type != "cuda":
        pytest.skip("rl-triton runs on a GPU only")
    if name == "torchrl":
        return torchrl(r, v, done, "generalized_advantage_estimate")
    if name == "torchrl vectorised":
        return torchrl(r, v, done, "vec_generalized_advantage_estimate")
    makers = {"sb3": sb3, "cleanrl loop": cleanrl_loop, "verl": verl, "openrlhf": openrlhf, "rl-triton": rl_triton}
    return makers[name](r, v, done)


def test_gae(compare, monkeypatch, device, backend, provider: str, rows: int, T: int, time_major: bool) -> None:
    torch.manual_seed(0)
    shape = (T, rows) if time_major else (rows, T)
    r, v = torch.randn(2, *shape, device=device)
    done = torch.rand(shape, device=device) < 0.01
    ours = dict(gamma=GAMMA, lam=LAM, terminated=done, time_major=time_major)
    if provider == "ppo_fast":
        run = partial(ppo.gae, r, v, **ours, backend=backend)
    elif provider in OURS:
        if device.type != "cpu":
            pytest.skip("numba is for a CPU")
        from ppo_fast.kernels.gae import eager as eager_gae

        monkeypatch.setattr(eager_gae, "numba_works", lambda: False)
        run = partial(ppo.gae, r, v, **ours, backend="torch")
    else:
        run = baseline(provider, device, r, v, done)
    flags = dict(ours, terminated=None) if provider in WITHOUT_FLAGS else ours
    compare(
        run,
        operation="gae, time-major" if time_major else "gae",
        provider=provider,
        shape=f"T={T} N={rows}" if time_major else f"B={rows} T={T}",
        dtype="float32",
        bytes=rows * T * 17,
        results=None if provider == "verl" else lambda: list(run()),  # verl whitens its advantages
        truth=list(reference.gae(r.double(), v.double(), **flags)),
        small=True,
        replay=provider in ("ppo_fast", "rl-triton"),
    )
