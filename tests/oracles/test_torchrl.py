"""torchrl 0.14.1 as an oracle: GAE with terminated and truncated episodes, and ClipPPOLoss."""

import pytest
import torch
from oracles.cases import BACKENDS, DTYPES, assert_equal, draw, tokens_below

import ppo_fast as ppo

MISSING = "torchrl is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("torchrl", reason=MISSING)

from tensordict import TensorDict  # noqa: E402
from tensordict.nn import ProbabilisticTensorDictModule as ProbModule  # noqa: E402
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule  # noqa: E402
from torchrl.objectives import ClipPPOLoss  # noqa: E402
from torchrl.objectives.value.functional import (  # noqa: E402
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
)

FUNCTIONS = {"loop": generalized_advantage_estimate, "vectorised": vec_generalized_advantage_estimate}
GAMMA_LAM = [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0)]
# The vectorised form drops terms whose factor is below 1e-7: it is exact to about 1e-6 times the largest TD error.
TOLERANCE = {"loop": {}, "vectorised": {"rtol": 1e-6, "atol": 1e-5}}


@pytest.fixture(autouse=True)
def fp64_discounts():
    """torchrl multiplies gamma by an integer tensor, so its discounts have the default dtype, not the input's."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def episodes(B, T, seed):
    """Rewards, values, ends of both kinds at random, V before each reset, and V after the last step."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.rand(B, T, generator=g)
    names = ("rewards", "values", "final_values")
    x = {name: draw(B, T, seed=seed + i + 1) for i, name in enumerate(names)}
    return x | {"terminated": kind < 0.15, "truncated": kind > 0.85, "bootstrap": draw(B, seed=seed + 4)}


def torchrl_gae(function, x, gamma, lam):
    """torchrl takes V of every next state: ours from final_values at a truncation, from bootstrap at the end."""
    following = torch.cat([x["values"][:, 1:], x["bootstrap"].unsqueeze(-1)], -1)
    following = torch.where(x["truncated"], x["final_values"], following)
    done = x["terminated"] | x["truncated"]
    columns = (t.unsqueeze(-1) for t in (x["values"], following, x["rewards"], done, x["terminated"]))
    return tuple(t.squeeze(-1) for t in function(gamma, lam, *columns))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(("gamma", "lam"), GAMMA_LAM)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 130)])
def test_gae_matches_torchrl_where_an_episode_ends(shape, gamma, lam, kind, backend):
    """Switch: torchrl's done is terminated or truncated; its next_state_value holds our final_values and bootstrap."""
    x = episodes(*shape, seed=100)
    ours = {name: t if t.dtype == torch.bool else t.to(DTYPES[backend]) for name, t in x.items()}
    advantages, returns = ppo.gae(**ours, gamma=gamma, lam=lam, backend=backend)
    peer_advantages, peer_returns = torchrl_gae(FUNCTIONS[kind], x, gamma, lam)
    tolerance = TOLERANCE[kind] or ({"atol": 1e-5} if backend == "triton" else {})
    assert_equal(advantages, peer_advantages, **tolerance)
    assert_equal(returns, peer_returns, **tolerance)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gae_without_ends_matches_torchrls_time_major(kind):
    """Switch: torchrl names the time dimension, we only say time_major."""
    x = {name: t for name, t in episodes(4, 33, seed=110).items() if name in ("rewards", "values", "bootstrap")}
    major = {name: t.T if t.ndim == 2 else t for name, t in x.items()}
    advantages, _ = ppo.gae(**major, gamma=0.99, lam=0.9, time_major=True)
    following = torch.cat([x["values"][:, 1:], x["bootstrap"].unsqueeze(-1)], -1).T.unsqueeze(-1)
    done = torch.zeros_like(following, dtype=torch.bool)
    peer, _ = FUNCTIONS[kind](
        0.99, 0.9, major["values"].unsqueeze(-1), following, major["rewards"].unsqueeze(-1), done, done, time_dim=0
    )
    assert_equal(advantages, peer.squeeze(-1), **TOLERANCE[kind])


def test_lambda_0_fails_as_in_torchrls_vectorised_gae():
    """With lambda = 0 the advantage is the TD error, here 1 + 0.5 * 4 - 2 = 1; torchrl's series has a wrong shape."""
    x = {name: torch.tensor([[value]]) for name, value in {"rewards": 1.0, "values": 2.0, "final_values": 0.0}.items()}
    x["bootstrap"] = torch.tensor([4.0])
    advantages, _ = ppo.gae(x["rewards"], x["values"], gamma=0.5, lam=0.0, bootstrap=x["bootstrap"])
    never = torch.zeros(1, 1, dtype=torch.bool)
    x |= {"terminated": never, "truncated": never}
    assert advantages.item() == torchrl_gae(generalized_advantage_estimate, x, 0.5, 0.0)[0].item() == 1.0
    with pytest.raises(IndexError):
        torchrl_gae(vec_generalized_advantage_estimate, x, 0.5, 0.0)


def test_a_late_large_reward_is_kept_unlike_in_torchrls_vectorised_gae():
    """torchrl's convolution ends where 0.9^k falls below 1e-7, at k = 153; 1e10 at step 180 is worth 57.8."""
    rewards, zero = torch.zeros(1, 181, dtype=torch.float64), torch.zeros(1, 181, dtype=torch.float64)
    rewards[0, 180] = 1e10
    truth = 1e10 * 0.9**180
    advantages, _ = ppo.gae(rewards, zero, gamma=0.9, lam=1.0)
    assert advantages[0, 0].item() == pytest.approx(truth, rel=1e-9)
    never = torch.zeros_like(rewards, dtype=torch.bool)
    x = {"rewards": rewards, "values": zero, "final_values": zero, "bootstrap": zero[:, 0]}
    lost, _ = torchrl_gae(vec_generalized_advantage_estimate, x | {"terminated": never, "truncated": never}, 0.9, 1.0)
    assert lost[0, 0].item() == pytest.approx(0, abs=1e-3)


def networks(weight, value_weight):
    """A linear softmax policy and a linear critic whose parameters are the two given matrices."""
    policy = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    critic = torch.nn.Linear(weight.shape[1], 1, bias=False)
    policy.weight = torch.nn.Parameter(weight.clone())
    critic.weight = torch.nn.Parameter(value_weight.clone())
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(policy, in_keys=["observation"], out_keys=["logits"]),
        ProbModule(in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical),
    )
    return actor, TensorDictModule(critic, in_keys=["observation"], out_keys=["state_value"])


@pytest.mark.parametrize("clip", [0.2, (0.1, 0.4)], ids=["symmetric", "asymmetric"])
def test_ppo_loss_matches_torchrls_clip_ppo_loss(clip):
    """Switches: loss_critic_type="l2" has no factor 0.5, so value_coef is twice critic_coeff; torchrl has no mask."""
    N, D, A = 40, 6, 5
    observation, actions = draw(N, D, seed=120), tokens_below(A, N, seed=121)
    weight, value_weight = draw(A, D, seed=122), draw(1, D, seed=123)
    x = {name: draw(N, seed=124 + i) for i, name in enumerate(("advantages", "returns", "old_values"))}
    with torch.no_grad():
        now = ppo.token_logprobs(observation @ weight.T, actions)
    old_logprobs = now + draw(N, seed=127, scale=0.5)

    actor, critic = networks(weight, value_weight)
    loss_module = ClipPPOLoss(
        *(actor, critic),
        clip_epsilon=clip,
        entropy_coeff=0.03,
        critic_coeff=0.4,
        loss_critic_type="l2",
        clip_value=0.2,
    )
    batch = TensorDict(
        {
            "observation": observation,
            "action": actions,
            "action_log_prob": old_logprobs,
            "advantage": x["advantages"].unsqueeze(-1),
            "value_target": x["returns"].unsqueeze(-1),
            "state_value": x["old_values"].unsqueeze(-1),
        },
        batch_size=[N],
    )
    out = loss_module(batch)
    peer_loss = out["loss_objective"] + out["loss_entropy"] + out["loss_critic"]
    peer_grads = torch.autograd.grad(peer_loss, list(loss_module.parameters()))

    leaves = weight.clone().requires_grad_(), value_weight.clone().requires_grad_()
    logp, entropy = ppo.token_logprobs(observation @ leaves[0].T, actions, with_entropy=True)
    low, high = (clip, clip) if isinstance(clip, float) else clip
    ours = ppo.ppo_loss(
        logp,
        (observation @ leaves[1].T).squeeze(-1),
        old_logprobs,
        x["old_values"],
        x["advantages"],
        x["returns"],
        clip_low=low,
        clip_high=high,
        entropy=entropy,
        entropy_coef=0.03,
        value_coef=0.8,
        value_clip=0.2,
    )
    assert_equal(ours.loss.detach(), peer_loss.detach(), "loss")
    assert_equal(ours.stats["entropy"], out["entropy"], "entropy")
    for name, x, y in zip(("policy", "critic"), torch.autograd.grad(ours.loss, leaves), peer_grads, strict=True):
        assert_equal(x, y, f"gradient of the {name}")
