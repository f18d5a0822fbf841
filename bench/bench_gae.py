"""gae beside its rivals, with done flags.

Batch-first: torchrl's two functions and verl's loop. Time-major: SB3's numpy buffer and a CleanRL-style torch loop.

Bytes by design: rewards, values and a flag read once, advantages and returns written once: 17 bytes a step.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from peers import peer
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference

GAMMA, LAM = 0.99, 0.95
SHAPES = {  # (rows, T, time-major)
    "tiny": [(2, 9, False), (3, 5, True)],
    "small": [(64, 128, False), (8, 128, True)],
    "default": [
        *((b, t, False) for b, t in ((4096, 128), (256, 2048), (64, 1024), (8, 16384), (1, 2048))),
        *((n, t, True) for t, n in ((2048, 1), (128, 8), (2048, 256), (128, 4096))),
    ],
}
SHAPES["all"] = [*SHAPES["default"], (8192, 2048, False), (64, 32768, False), (16, 65536, False)]
PROVIDERS = ("ppo_fast", "ppo_fast without numba", "torchrl", "torchrl vectorised", "verl", "sb3", "cleanrl loop")

Estimate = Callable[[], tuple[Tensor, Tensor]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = SHAPES[metafunc.config.getoption("--size")]
    names = [f"{'T' if major else 'B'}{t if major else b}x{b if major else t}" for b, t, major in shapes]
    metafunc.parametrize(("rows", "T", "time_major"), shapes, ids=names)


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
    """The loop of CleanRL-style scripts, written anew: one [N] step of torch operations for each t."""

    def run() -> tuple[Tensor, Tensor]:
        advantages, trace, following = torch.zeros_like(r), torch.zeros_like(r[0]), torch.zeros_like(r[0])
        for t in reversed(range(len(r))):
            goes_on = 1.0 - done[t].float()
            trace = r[t] + GAMMA * following * goes_on - v[t] + GAMMA * LAM * goes_on * trace
            advantages[t], following = trace, v[t]
        return advantages, advantages + v

    return run


def verl(r: Tensor, v: Tensor) -> Estimate:
    core = peer("verl.trainer.ppo.core_algos", "verl")
    mask = torch.ones_like(r)
    return lambda: core.compute_gae_advantage_return(r, v, mask, GAMMA, LAM)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_gae(compare, monkeypatch, device, backend, provider: str, rows: int, T: int, time_major: bool) -> None:
    torch.manual_seed(0)
    shape = (T, rows) if time_major else (rows, T)
    r, v = torch.randn(2, *shape, device=device)
    done = torch.rand(shape, device=device) < 0.01
    ours = dict(gamma=GAMMA, lam=LAM, terminated=done, time_major=time_major)
    if provider.startswith("ppo_fast"):
        if provider != "ppo_fast":
            if device.type != "cpu":
                pytest.skip("numba is for a CPU")
            from ppo_fast.kernels import eager_gae

            monkeypatch.setattr(eager_gae, "_numba_is_there", lambda: False)
        run = partial(ppo.gae, r, v, **ours, backend=backend if provider == "ppo_fast" else "torch")
    elif time_major != (provider in ("sb3", "cleanrl loop")):
        pytest.skip(f"{provider} has another layout")
    elif provider == "sb3" and device.type != "cpu":
        pytest.skip("sb3 computes advantages in numpy on a CPU")
    elif provider == "sb3":
        run = sb3(r, v, done)
    elif provider == "cleanrl loop":
        run = cleanrl_loop(r, v, done)
    elif provider == "verl":
        run = verl(r, v)  # has no done flags: the same work without them
    else:
        name = {"torchrl": "generalized_advantage_estimate"}.get(provider, "vec_generalized_advantage_estimate")
        run = torchrl(r, v, done, name)
    flags = dict(ours, terminated=None) if provider == "verl" else ours
    compare(
        run,
        operation="gae",
        provider=provider,
        shape=f"T={T} N={rows}" if time_major else f"B={rows} T={T}",
        dtype="float32",
        bytes=rows * T * 17,
        results=None if provider == "verl" else lambda: list(run()),  # verl whitens its advantages
        truth=list(reference.gae(r.double(), v.double(), **flags)),
    )
