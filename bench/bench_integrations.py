"""Other projects' functions and their replacements: the same call, theirs and ours.

Each group is one function of one project; a project that is not installed is skipped with its name. Only the function
is timed, on a CPU or, where there is one, a GPU: the gain in a whole step of that project is smaller.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peers import peer, peer_without_its_cluster

SIZES = {"tiny": 1, "small": 4, "default": 16, "all": 64}  # rows of 512 tokens, or 128 steps of 16 times as many envs
TOKENS = {"tiny": 16, "small": 128, "default": 512, "all": 512}
VOCABULARY = {"tiny": 64, "small": 2048, "default": 32000, "all": 32000}
CASES = (
    "sb3 buffer",
    "torchrl gae",
    "torchrl vectorised gae",
    "torchrl clipped loss",
    "openrlhf gae",
    "openrlhf policy loss",
    "openrlhf value loss",
    "openrlhf logprobs",
    "verl gae",
    "verl policy loss",
    "verl value loss",
    "verl logprobs",
    "trl logprobs",
    "trl entropy",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(("case", "provider"), [(c, p) for c in CASES for p in ("theirs", "ppo_fast")])


def sb3_buffer(provider: str, rows: int, tokens: int) -> Callable[[], Any]:
    theirs = peer("stable_baselines3.common.buffers", "stable-baselines3")
    from gymnasium import spaces

    from ppo_fast.integrations import sb3

    kind = sb3.RolloutBuffer if provider == "ppo_fast" else theirs.RolloutBuffer
    box = spaces.Box(-1, 1, (1,))
    buffer = kind(tokens, box, box, device="cpu", gae_lambda=0.95, gamma=0.99, n_envs=rows)
    draw = np.random.default_rng(0)
    buffer.rewards, buffer.values = (draw.normal(size=(tokens, rows)).astype(np.float32) for _ in range(2))
    buffer.episode_starts = (draw.random((tokens, rows)) < 0.02).astype(np.float32)

    def run() -> torch.Tensor:
        buffer.compute_returns_and_advantage(torch.zeros(rows), np.zeros(rows, dtype=bool))
        return torch.from_numpy(buffer.advantages)

    return run


def torchrl(name: str, provider: str, envs: int, steps: int) -> Callable[[], Any]:
    """torchrl's two ways of GAE, and ClipPPOLoss with its gradient over linear networks."""
    loss, estimators = peer("torchrl.objectives", "torchrl"), peer("torchrl.objectives.value", "torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule

    if provider == "ppo_fast":
        from ppo_fast.integrations import torchrl as ours

        loss = estimators = ours
    draw = torch.Generator().manual_seed(0)
    shape = (envs, steps)
    done = torch.rand(*shape, 1, generator=draw) < 0.02
    keys = (*(("next", key) for key in ("state_value", "reward")), "state_value", "advantage", "value_target")
    data = TensorDict({key: torch.randn(*shape, 1, generator=draw) for key in keys}, batch_size=shape)
    data["next", "done"], data["next", "terminated"] = done, done & (torch.rand(done.shape, generator=draw) < 0.5)
    if name != "clipped loss":
        module = estimators.GAE(gamma=0.99, lmbda=0.95, value_network=None, vectorized=name != "gae")
        return lambda: module(data)["advantage"]
    data["observation"] = torch.randn(*shape, 4, generator=draw)
    data["action"], data["action_log_prob"] = (
        torch.randint(2, shape, generator=draw),
        torch.randn(shape, generator=draw),
    )
    torch.manual_seed(0)
    sampler = {"out_keys": ["action"], "distribution_class": torch.distributions.Categorical}
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(torch.nn.Linear(4, 2), in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(in_keys=["logits"], **sampler),
    )
    critic = TensorDictModule(torch.nn.Linear(4, 1), in_keys=["observation"], out_keys=["state_value"])
    module = loss.ClipPPOLoss(actor, critic, loss_critic_type="l2", clip_value=0.2, normalize_advantage=True)

    def run() -> torch.Tensor:
        out = module(data)
        total = out["loss_objective"] + out["loss_entropy"] + out["loss_critic"]
        return torch.cat([x.flatten() for x in torch.autograd.grad(total, list(module.parameters()))])

    return run


def openrlhf(name: str, provider: str, *, rows: int, tokens: int, vocabulary: int) -> Callable[[], Any]:
    maker = peer_without_its_cluster("openrlhf.trainer.ppo_utils.experience_maker", "openrlhf")
    loss = peer_without_its_cluster("openrlhf.models.loss", "openrlhf")
    utils = peer_without_its_cluster("openrlhf.models.utils", "openrlhf")
    if provider == "ppo_fast":
        from ppo_fast.integrations import openrlhf as ours

        maker = loss = utils = ours
    draw = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(rows, tokens, generator=draw) for _ in range(4))
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=draw)
    if name == "gae":
        method = maker.RemoteExperienceMaker.get_advantages_and_returns  # it reads no attribute of its object
        return lambda: method(None, a, b, mask, 0.99, 0.95)[1]
    if name == "value loss":
        return _with_gradient(lambda x: loss.ValueLoss(0.2)(x, b, c, mask), a)
    if name == "policy loss":
        return _with_gradient(lambda x: loss.PolicyLoss()(x, a + 0.1 * d, c, mask)[0], a)
    logits = torch.randn(rows * tokens // 4, vocabulary, generator=draw)
    labels = torch.randint(vocabulary, logits.shape[:1], generator=draw)
    return _with_gradient(lambda x: utils.log_probs_from_logits(x, labels).sum(), logits)


def verl(name: str, provider: str, *, rows: int, tokens: int, vocabulary: int) -> Callable[[], Any]:
    core = peer_without_its_cluster("verl.trainer.ppo.core_algos", "verl")
    functional = peer_without_its_cluster("verl.utils.torch_functional", "verl")
    if provider == "ppo_fast":
        from ppo_fast.integrations import verl as ours

        core = functional = ours
    draw = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(rows, tokens, generator=draw) for _ in range(4))
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=draw)
    if name == "gae":
        return lambda: core.compute_gae_advantage_return(a, b, mask.float(), 0.99, 0.95)[1] * mask
    if name == "value loss":
        return _with_gradient(lambda x: core.compute_value_loss(x, b, c, mask, 0.2)[0], a)
    if name == "policy loss":
        from verl.workers.config import ActorConfig

        config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
        old = a + 0.1 * d
        return _with_gradient(lambda x: core.compute_policy_loss_vanilla(old, x, c, mask, "token-mean", config)[0], a)
    logits = torch.randn(rows * tokens // 4, vocabulary, generator=draw)
    labels = torch.randint(vocabulary, logits.shape[:1], generator=draw)
    return _with_gradient(lambda x: core_logprobs(functional, x, labels), logits)


def core_logprobs(functional: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.logprobs_from_logits(x, labels, inplace_backward=False).sum()


def trl(name: str, provider: str, *, rows: int, tokens: int, vocabulary: int) -> Callable[[], Any]:
    functions = peer("trl.trainer.utils", "trl")
    if provider == "ppo_fast":
        from ppo_fast.integrations import trl as functions  # type: ignore[no-redef]
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, tokens // 4, vocabulary, generator=draw)
    index = torch.randint(vocabulary, logits.shape[:2], generator=draw)
    if name == "entropy":
        return lambda: functions.entropy_from_logits(logits)
    return _with_gradient(lambda x: functions.selective_log_softmax_and_entropy(x, index)[0].sum(), logits)


def _with_gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    return run


def test_integration(compare: Any, request: pytest.FixtureRequest, case: str, provider: str) -> None:
    size = request.config.getoption("--size")
    project, name = case.split(" ", 1)
    rows, tokens, vocabulary = SIZES[size], TOKENS[size], VOCABULARY[size]
    makers: dict[str, Callable[..., Callable[[], Any]]] = {
        "sb3": lambda who: sb3_buffer(who, 16 * rows, 128),
        "torchrl": lambda who: torchrl(name, who, 16 * rows, 128),
        "openrlhf": partial(openrlhf, name, rows=rows, tokens=tokens, vocabulary=vocabulary),
        "verl": partial(verl, name, rows=rows, tokens=tokens, vocabulary=vocabulary),
        "trl": partial(trl, name, rows=rows, tokens=tokens, vocabulary=vocabulary),
    }
    run = makers[project](provider)
    logits = rows * tokens // 4 * vocabulary * 4
    games = project in ("sb3", "torchrl")
    by_case = {"logprobs": 3 * logits, "entropy": logits}  # else 17 bytes a token
    compare(
        run,
        operation=f"in {project}: {name}",
        provider=provider if provider == "ppo_fast" else project,
        shape=f"T=128 N={16 * rows}" if games else f"B={rows} T={tokens}",
        dtype="float32",
        bytes=by_case.get(name, 17 * (16 * rows * 128 if games else rows * tokens)),
        results=lambda: [run()],
        truth=[makers[project]("theirs")().double()],
    )
