"""torchrl with our GAE and ClipPPOLoss instead of its own: the same numbers, gradients and training."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from oracles.cases import assert_equal, draw, tokens_below

MISSING = "torchrl is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("torchrl", reason=MISSING)

from tensordict import TensorDict  # noqa: E402
from tensordict.nn import CompositeDistribution, InteractionType, TensorDictModule  # noqa: E402
from tensordict.nn import ProbabilisticTensorDictModule as Sampler  # noqa: E402
from tensordict.nn import ProbabilisticTensorDictSequential as Sequence  # noqa: E402
from torch.distributions import Categorical, Independent, Normal  # noqa: E402
from torchrl import objectives  # noqa: E402
from torchrl.modules import PercentileValueNorm  # noqa: E402
from torchrl.objectives import value as estimators  # noqa: E402
from torchrl.objectives.utils import SoftUpdate, ValueEstimators  # noqa: E402

import ppo_fast as ppo  # noqa: E402
from ppo_fast.examples import with_torchrl  # noqa: E402
from ppo_fast.integrations import torchrl as fast  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("No target network", "You requested advantage", "Creating")
]
D, A = 6, 5
# The vectorised form drops terms whose factor is below 1e-7: it is exact to about 1e-6 times the largest TD error.
TOLERANCE = {False: {}, True: {"rtol": 1e-6, "atol": 1e-5}}
LAYOUTS = {  # batch size, names of dimensions, time_dim, features
    "[T]": ((37,), None, None, 1),
    "[B, T]": ((4, 37), None, None, 1),
    "[B, C, T]": ((3, 2, 21), None, None, 1),
    "[T, B], by argument": ((37, 4), None, 0, 1),
    "[T, B], by name": ((37, 4), ("time", None), None, 1),
    "[B, T, C], negative": ((3, 21, 2), None, -2, 1),
    "[B, T] of three rewards": ((4, 37), None, None, 3),
}


@pytest.fixture(autouse=True)
def fp64_everywhere():
    """torchrl multiplies gamma by an integer tensor, so its discounts have the default dtype, not the input's."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def head(outputs, seed, name):
    layer = torch.nn.Linear(D, outputs)
    layer.weight.data, layer.bias.data = draw(outputs, D, seed=seed), draw(outputs, seed=seed + 1)
    return TensorDictModule(layer, in_keys=["observation"], out_keys=[name])


def discrete(keys="logits"):
    return Sequence(head(A, 1, keys), Sampler(in_keys=["logits"], out_keys=["action"], distribution_class=Categorical))


class _Normal(Independent):
    def __init__(self, loc, log_scale):
        super().__init__(Normal(loc, log_scale.exp()), 1)


def continuous():
    network = TensorDictModule(lambda x: x.chunk(2, -1), in_keys=["both"], out_keys=["loc", "log_scale"])
    sampler = Sampler(in_keys=["loc", "log_scale"], out_keys=["action"], distribution_class=_Normal)
    return Sequence(head(4, 3, "both"), network, sampler)


def critic(features=1, seed=5):
    return head(features, seed, "state_value")


def rollout(shape, names=None, features=1, seed=100, terminated=True):
    """Observations, rewards, and ends of both kinds at random."""
    kind = torch.rand(*shape, 1, generator=torch.Generator().manual_seed(seed)).expand(*shape, features).clone()
    ends = {"terminated": (kind < 0.15), "truncated": kind > 0.85, "done": (kind < 0.15) | (kind > 0.85)}
    data = {"observation": draw(*shape, D, seed=seed + 1), "action": tokens_below(A, *shape, seed=seed + 2)}
    after = {"observation": draw(*shape, D, seed=seed + 3), "reward": draw(*shape, features, seed=seed + 4), **ends}
    if not terminated:
        del after["terminated"]
    return TensorDict({**data, "next": after}, batch_size=shape, names=names)


def both(name, *arguments, **options):
    """torchrl's module, and ours, made alike."""
    theirs = getattr(estimators if name == "GAE" else objectives, name)
    return theirs(*arguments, **options), getattr(fast, name)(*arguments, **options)


def written(module, data, **options):
    out = module(data.clone(), **options)
    return {name: out[name] for name in ("advantage", "value_target")} | {
        str(name): out[name] for name in ("state_value", ("next", "state_value")) if name in out.keys(True)
    }


def compare(theirs, ours, **tolerance):
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        assert_equal(ours[name].detach(), theirs[name].detach(), name, **tolerance)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_advantages_match_torchrl(layout, gamma, lam, vectorized):
    shape, names, time_dim, features = layout
    data = rollout(shape, names, features)
    options = {"gamma": gamma, "lmbda": lam, "vectorized": vectorized, "time_dim": time_dim}
    theirs, ours = both("GAE", value_network=critic(features), **options)
    compare(written(theirs, data), written(ours, data), **TOLERANCE[vectorized])
    estimate = ours.value_estimate(data.clone())
    assert_equal(estimate, written(theirs, data)["value_target"], "value_estimate", **TOLERANCE[vectorized])


OPTIONS = {
    "values in the data": {"value_network": None},
    "standardised": {"average_gae": True},
    "standardised in groups": {"average_gae": True, "group_key": "task"},
    "one call of the network": {"shifted": True, "shifted_budget": 3},
    "one call, few places": {"shifted": True, "average_gae": True},
    "lost observations": {"auto_reset_env": True},
    "values in chunks": {"num_chunks": 2},
    "no vmap": {"deactivate_vmap": True},
    "existing values": {"skip_existing": True},
    "differentiable": {"differentiable": True},
    "tensors": {"gamma": torch.tensor(0.97).double(), "lmbda": torch.tensor([0.9]).double()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("terminated", [True, False])
def test_options_of_gae_mean_the_same_as_in_torchrl(options, terminated):
    data = rollout((4, 21), ("env", "time"), terminated=terminated)
    data["task"] = tokens_below(3, 4, 21, seed=7)
    if options.keys() & {"value_network", "skip_existing"}:
        data["state_value"], data["next", "state_value"] = draw(4, 21, 1, seed=8), draw(4, 21, 1, seed=9)
    options = {"gamma": 0.9, "lmbda": 0.8, "value_network": critic(), "vectorized": False} | options
    compare(*(written(module, data) for module in both("GAE", **options)))


def test_parameters_that_are_given_are_used():
    data, network, other = rollout((4, 21)), critic(), critic(seed=50)
    params, target = TensorDict.from_module(network), TensorDict.from_module(other)
    modules = both("GAE", gamma=0.9, lmbda=0.8, value_network=network, vectorized=False)
    for given in ({"params": target}, {"params": params, "target_params": target}, {"time_dim": 0}):
        compare(*(written(module, data, **given) for module in modules))
    estimates = [m.value_estimate(data.clone(), params=params, target_params=target) for m in modules]
    assert_equal(estimates[1], estimates[0], rtol=1e-6, atol=1e-5)  # torchrl's is the vectorised one


def test_other_keys_and_plain_tensors_are_read():
    data = rollout((4, 21)).rename_key_(("next", "reward"), ("next", "score"))
    found = []
    for module in both("GAE", gamma=0.9, lmbda=0.8, value_network=critic(), vectorized=False):
        module.set_keys(advantage="a", value_target="r", reward="score")
        out = module(data.clone())
        found.append({"a": out["a"], "r": out["r"]})
        tensors = {"_".join(("next", x)): data["next", x] for x in ("observation", "score", "done", "terminated")}
        plain = module(observation=data["observation"], **tensors)
        found[-1] |= {str(key): x for key, x in zip(module.out_keys, plain, strict=True)}
    compare(*found)


@pytest.mark.parametrize("time_major", [False, True])
def test_gradients_through_a_differentiable_gae_match_torchrl(time_major):
    shape = (21, 4) if time_major else (4, 21)
    up, up_target = draw(*shape, 1, seed=60), draw(*shape, 1, seed=61)
    found = []
    for module in both(
        "GAE",
        gamma=0.9,
        lmbda=0.8,
        value_network=None,
        differentiable=True,
        vectorized=False,
        time_dim=int(not time_major),
    ):
        data = rollout(shape)
        leaves = [draw(*shape, 1, seed=62 + i).requires_grad_() for i in range(3)]
        data["state_value"], data["next", "state_value"], data["next", "reward"] = leaves
        out = module(data)
        found.append(torch.autograd.grad((out["advantage"] * up + out["value_target"] * up_target).sum(), leaves))
    for name, x, y in zip(("values", "next values", "rewards"), *found, strict=True):
        assert_equal(y, x, name)


@pytest.mark.parametrize("differentiable", [False, True])
def test_no_graph_is_kept_without_need(differentiable):
    """As in torchrl: values get a gradient where asked for, the parameters of the network never."""
    options = {"gamma": 0.9, "lmbda": 0.8, "differentiable": differentiable, "vectorized": False}
    network, data = critic(), rollout((4, 21))
    params = TensorDict.from_module(network)
    for given in ({}, {"params": params}):
        for module in both("GAE", value_network=network, **options):
            assert not module(data.clone(), **given)["advantage"].requires_grad
    data["next", "reward"] = data["next", "reward"].requires_grad_()
    for module in both("GAE", value_network=network, **options):
        assert module(data.clone())["advantage"].requires_grad == differentiable


def test_dtypes_are_those_of_torchrl():
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        data = rollout((4, 21))
        for key in ("state_value", ("next", "state_value")):
            data[key] = draw(4, 21, 1, seed=len(key)).to(dtype)
        data["next", "reward"] = data["next", "reward"].to(dtype)
        theirs, ours = (
            written(m, data) for m in both("GAE", gamma=0.5, lmbda=0.5, value_network=None, vectorized=False)
        )
        compare(theirs, ours, atol={torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype])
        data["next", "reward"] = data["next", "reward"].double()
        compare(theirs, written(fast.GAE(gamma=0.5, lmbda=0.5, value_network=None), data), atol=0.1)


def test_shapes_are_checked():
    data = rollout((4, 21), features=3)
    data["next", "reward"] = data["next", "reward"][..., :1]
    for module in both("GAE", gamma=0.9, lmbda=0.8, value_network=critic(3)):
        with pytest.raises(RuntimeError, match="shape"):
            module(data.clone())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": torch.full((4, 1), 0.9)}, "one number as gamma"),
        ({"lmbda": torch.tensor(0.9, requires_grad=True)}, "one number as lmbda"),
        ({"gamma": 1.01}, r"gamma in \[0, 1\]"),
    ],
)
def test_a_discount_that_ours_cannot_compute_is_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        fast.GAE(**({"gamma": 0.9, "lmbda": 0.9} | options), value_network=None)


def test_multi_step_data_and_missing_values_are_rejected():
    module = fast.GAE(gamma=0.9, lmbda=0.9, value_network=critic())
    data = rollout((4, 21))
    data["steps_to_next_obs"] = torch.full((4, 21, 1), 3)
    with pytest.raises(ValueError, match="steps_to_next_obs"):
        module(data)
    with pytest.raises(ValueError, match="no value network"):
        fast.GAE(gamma=0.9, lmbda=0.9, value_network=None)(rollout((4, 21)))
    with pytest.raises(RuntimeError, match="time dimension"):
        module(TensorDict(batch_size=[]))


def test_lambda_0_or_a_late_reward_fails_as_in_torchrls_vectorised_gae():
    """Ours has the same numbers with vectorized=True and False; torchrl's filter ends where 0.9^k is below 1e-7."""
    data = rollout((1, 181))
    for key in ("state_value", ("next", "state_value"), ("next", "reward")):
        data[key] = torch.zeros(1, 181, 1)
    for key in ("done", "terminated", "truncated"):
        data["next", key] = torch.zeros(1, 181, 1, dtype=torch.bool)
    data["next", "reward"][0, 180] = 1e10
    out = fast.GAE(gamma=0.9, lmbda=1.0, value_network=None, vectorized=True)(data)
    assert out["advantage"][0, 0].item() == pytest.approx(1e10 * 0.9**180, rel=1e-9)
    out = fast.GAE(gamma=0.9, lmbda=0.0, value_network=None, vectorized=True)(data)
    assert torch.equal(out["advantage"], data["next", "reward"])


# ---- ClipPPOLoss ----


def batch(actor, shape=(24,), seed=200):
    """A batch whose ratios lie on both sides of every clip, with advantages and targets."""
    data = rollout(shape, seed=seed)
    with torch.no_grad():
        policy = actor.get_dist(data.clone())
        data["action"] = policy.sample() if not isinstance(policy, Categorical) else data["action"]
        now = policy.log_prob(data["action"])
    data["action_log_prob"] = now + draw(*shape, seed=seed + 10, scale=0.4)
    for i, name in enumerate(("advantage", "value_target", "state_value")):
        data[name] = draw(*shape, 1, seed=seed + 20 + i)
    return data


def losses(module, data, names=("loss_objective", "loss_entropy", "loss_critic")):
    """Everything that a loss module returns, and the gradient of each parameter by the weighted sum of its losses."""
    out = module(data.clone())
    total = sum((i + 0.5) * out[name] for i, name in enumerate(names) if name in out.keys())  # noqa: SIM118  (a tensordict)
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    found = dict(out.items()) | {f"gradient of {n}": g for n, g in zip(params, grads, strict=True) if g is not None}
    return dict(sorted(found.items()))


def agree(actor, data, value=None, **options):
    theirs, ours = both("ClipPPOLoss", actor, value or critic(), **options)
    found = [losses(module, data) for module in (theirs, ours)]
    compare(*found)
    assert [k for k in ours.out_keys if "fraction" in k] == [k for k in theirs.out_keys if "fraction" in k]
    return found[1]


@pytest.mark.parametrize("critic_type", ["l2", "l1", "smooth_l1"])
@pytest.mark.parametrize("clip_value", [None, 0.3, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("shape", "kind"), [((24,), discrete), ((4, 6), discrete), ((3, 2, 4), continuous)])
def test_losses_statistics_and_gradients_match_torchrl(shape, kind, reduction, clip_value, critic_type):
    actor = kind()
    options = {"reduction": reduction, "clip_value": clip_value, "loss_critic_type": critic_type}
    found = agree(actor, batch(actor, shape), **options)
    assert 0 < found["clip_fraction"] < 1, "no clip is tested"
    assert found["ESS"].shape == shape[1:]


LOSS_OPTIONS = {
    "asymmetric": {"clip_epsilon": (0.1, 0.4)},
    "upper clip of 1 or more": {"clip_epsilon": (0.2, 1.5)},
    "no lower clip of a pair": {"clip_epsilon": (0.0, 100.0)},
    "importance ratio at most": {"max_importance_ratio": 1.2},
    "all below is kept": {"clip_epsilon": 1.0},
    "no entropy": {"entropy_bonus": False},
    "coefficients": {"entropy_coeff": 0.3, "critic_coeff": 0.2},
    "normalised": {"normalize_advantage": True},
    "normalised along one dimension": {"normalize_advantage": True, "normalize_advantage_exclude_dims": (1,)},
    "no explained variance": {"log_explained_variance": False},
    "not functional": {"functional": False},
    "separate": {"separate_losses": True},
    "no clip of values": {"clip_value": 0.0},
}


@pytest.mark.parametrize("options", LOSS_OPTIONS.values(), ids=LOSS_OPTIONS)
def test_options_of_the_loss_mean_the_same_as_in_torchrl(options):
    agree(discrete(), batch(discrete(), (4, 6)), **({"loss_critic_type": "l2", "clip_value": 0.3} | options))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "kind"), [((24,), discrete), ((3, 2, 4), continuous)])
def test_losses_without_a_reduction_are_torchrls(shape, kind, masked):
    actor, found = kind(), []
    data = batch(actor, shape)
    if masked:
        data["collector", "mask"] = torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for module in both("ClipPPOLoss", actor, critic(), reduction="none", loss_critic_type="l2", clip_value=0.3):
        out = module(data.clone())
        assert out["loss_objective"].shape == out["loss_critic"].shape == shape
        total = sum((out[name].squeeze() * draw(*shape, seed=90)).sum() for name in ("loss_objective", "loss_critic"))
        gradients = torch.autograd.grad(total, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
        found.append((dict(out.items()), [g for g in gradients if g is not None]))
    compare(found[0][0], found[1][0])
    for theirs, ours in zip(found[0][1], found[1][1], strict=True):
        assert_equal(ours, theirs)


def test_a_loss_without_critic_matches_torchrl():
    found = agree(discrete(), batch(discrete()), critic_coeff=0.0)
    assert "loss_critic" not in found


def test_plain_tensors_give_the_loss_of_torchrl():
    actor = discrete()
    data, modules = batch(actor), both("ClipPPOLoss", actor, critic(), loss_critic_type="l2")
    names = ("observation", "action", "action_log_prob", "advantage", "value_target")
    for module in modules:
        module.in_keys = list(names)
        module.out_keys = ["loss_objective", "loss_critic", "ESS"]
    found = [module(**{name: data[name] for name in names}) for module in modules]
    compare(*(dict(zip(modules[0].out_keys, x, strict=True)) for x in found))


@pytest.mark.parametrize("key", ["auto", None, "kept"])
def test_masked_positions_do_not_reach_the_loss_but_reach_statistics_as_in_torchrl(key):
    """torchrl's losses leave masked positions out, NaN included; its statistics do not."""
    actor = discrete()
    data = batch(actor, (4, 6))
    data["kept"] = draw(4, 6, seed=70) > 0
    data["shifted_valid"], data["collector", "mask"] = draw(4, 6, seed=71) > -1, draw(4, 6, 1, seed=72) > -1
    modules = both("ClipPPOLoss", actor, critic(), loss_critic_type="l2", clip_value=0.3, normalize_advantage=True)
    for reduction in ("mean", "sum"):
        for module in modules:
            module.loss_mask_key, module.reduction = key, reduction
        compare(*(losses(module, data) for module in modules))
    data["kept"][:] = False
    data["advantage"][0] = math.nan
    if key == "kept":
        out = modules[1](data)
        assert out["loss_objective"] == out["loss_critic"] == 0


def test_the_proximal_policy_of_delay_actor_is_used():
    actor = discrete()
    data, modules = batch(actor), both("ClipPPOLoss", actor, critic(), delay_actor=True, loss_critic_type="l2")
    for module in modules:
        SoftUpdate(module, eps=0.5)
        with torch.no_grad():
            for target in module.target_actor_network_params.flatten_keys().values():
                target += draw(*target.shape, seed=80, scale=0.3)
    compare(*(losses(module, data) for module in modules))


def test_two_actions_at_once_match_torchrl():
    kinds = {"a": Categorical, "b": Categorical}
    split = TensorDictModule(
        lambda x: (x[..., :3], x[..., 3:]), in_keys=["both"], out_keys=[("params", k, "logits") for k in kinds]
    )
    sampler = Sampler(
        in_keys=["params"],
        out_keys=list(kinds),
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": kinds},
        default_interaction_type=InteractionType.RANDOM,
    )
    actor = Sequence(head(5, 1, "both"), split, sampler)
    data = rollout((24,))
    data["a"], data["b"] = tokens_below(3, 24, seed=81), tokens_below(2, 24, seed=82)
    for key in ("advantage", "value_target", "state_value"):
        data[key] = draw(24, 1, seed=83)
    with torch.no_grad():
        policy = actor.get_dist(data.clone())
    for key in kinds:
        data[f"{key}_log_prob"] = policy.dists[key].log_prob(data[key]) + draw(24, seed=84, scale=0.3)
    for coefficient in (0.1, {"a_entropy": 0.1, "b_entropy": 0.4}):
        modules = both("ClipPPOLoss", actor, critic(), entropy_coeff=coefficient, loss_critic_type="l2")
        found = []
        for module in modules:
            module.set_keys(action=["a", "b"], sample_log_prob=["a_log_prob", "b_log_prob"])
            out = losses(module, data)
            heads = out.pop("composite_entropy")
            found.append({**out, **{key: heads[key] for key in ("a_entropy", "b_entropy")}})
        compare(*found)


def test_the_loss_makes_the_advantages_of_torchrl():
    """Without advantages in the data, the module's own estimator writes them: ours, with torchrl's defaults."""
    actor = discrete()
    data = batch(actor, (4, 6)).exclude("advantage", "value_target", "state_value")
    for options in ({}, {"gamma": 0.9, "lmbda": 0.5}):
        modules = both("ClipPPOLoss", actor, critic(), loss_critic_type="l2")
        for module in modules:
            if options:
                module.make_value_estimator(ValueEstimators.GAE, **options)
            module.set_keys(advantage="A", value_target="R")
        compare(*(losses(module, data) for module in modules), rtol=1e-6, atol=1e-6)
        assert type(modules[1].value_estimator) is fast.GAE
        modules[1].make_value_estimator("gae")
        assert type(modules[1].value_estimator) is fast.GAE
    modules[1].make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.5)
    assert type(modules[1].value_estimator) is estimators.TDLambdaEstimator


@pytest.mark.parametrize("separate", [False, True])
def test_a_shared_trunk_gets_the_gradient_of_torchrl(separate):
    trunk, logits = head(4, 1, "hidden"), TensorDictModule(torch.nn.Linear(4, A), ["hidden"], ["logits"])
    actor = Sequence(trunk, logits, discrete()[-1])
    value = TensorDictModule(torch.nn.Linear(4, 1), ["hidden"], ["state_value"])
    options = {"separate_losses": separate, "loss_critic_type": "l2", "clip_value": 0.3}
    data = batch(actor)
    found = [losses(m, data, names=("loss_critic",)) for m in both("ClipPPOLoss", actor, value, **options)]
    compare(*found)
    assert any("hidden" in n or "actor" in n for n in found[1]) != separate


def test_the_running_norm_of_advantages_is_updated():
    actor = discrete()
    data = batch(actor, (4, 6)).exclude("advantage", "value_target", "state_value")
    found = []
    for kind in (objectives.ClipPPOLoss, fast.ClipPPOLoss):
        norm = PercentileValueNorm(shape=1, rate=1.0)
        module = kind(actor, critic(), advantage_norm=norm, loss_critic_type="l2")
        found.append(losses(module, data) | {"norm": norm.scale()})
    compare(*found, rtol=1e-6, atol=1e-6)
    assert found[0]["norm"] != 1


def test_targets_of_another_shape_are_rejected():
    data = batch(discrete(), (4, 6))
    data["value_target"] = data["value_target"].squeeze(-1)
    for module in both("ClipPPOLoss", discrete(), critic(), loss_critic_type="l2"):
        with pytest.raises(RuntimeError, match="shape"):
            module(data)


def test_a_changed_coefficient_is_used():
    actor = discrete()
    data, modules = batch(actor), both("ClipPPOLoss", actor, critic(), loss_critic_type="l2", clip_value=0.3)
    for step, module in itertools.product(range(2), modules):
        losses(module, data)
        module.clip_epsilon, module.clip_value, module.entropy_coeff = 0.05, 0.1, 0.5
        if step:
            module.load_state_dict({**module.state_dict(), "clip_epsilon": torch.tensor(0.3)})
    compare(*(losses(module, data) for module in modules))
    with pytest.raises(AttributeError, match="symmetric"):
        modules[1].clip_epsilon_low = 0.1


def test_an_action_that_became_impossible_gives_nan():
    """A log-ratio of -inf: ratio 0, no gradient, as in torchrl."""
    actor = discrete()
    data = batch(actor)
    found = []
    for module in both("ClipPPOLoss", actor, critic(), entropy_bonus=False, loss_critic_type="l2"):
        ratio = torch.tensor([[-math.inf], [0.1], [math.inf]], requires_grad=True)
        module._log_weight = lambda *_, ratio=ratio, **__: (ratio, None, -ratio, None)
        rows = data[:3].clone()
        rows["advantage"] = torch.tensor([[1.0], [-1.0], [2.0]])
        loss = module(rows)["loss_objective"]
        found.append((loss, torch.autograd.grad(loss, ratio)[0]))
    assert torch.equal(found[0][0].isfinite(), found[1][0].isfinite())
    assert_equal(found[1][0].detach(), found[0][0].detach())
    assert_equal(found[1][1][:2], found[0][1][:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "median"}, "reduction='none', 'mean' or 'sum', got 'median'"),
        ({"max_importance_ratio": 0.0}, "max_importance_ratio must be > 0"),
        ({"clip_epsilon": 1.5}, r"clip_epsilon must be at most 1, .*got 1.5: give a pair, such as \(0.2, 1.5\)"),
        ({"clip_epsilon": -0.1}, "clip_epsilon must be non-negative"),
        ({"clip_epsilon": (-0.1, 0.2)}, "clip_epsilon values must be non-negative"),
        ({"clip_epsilon": (1.0, 0.2)}, "clip_epsilon low must be < 1"),
    ],
)
def test_an_option_of_the_loss_that_ours_lacks_is_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        fast.ClipPPOLoss(discrete(), critic(), **options)


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        ("value_target", "GAE"),
        ("state_value", "value_key"),
    ],
)
def test_a_missing_entry_is_named_with_the_keys_option(missing, hint):
    for module in both("ClipPPOLoss", discrete(), critic(), loss_critic_type="l2", clip_value=0.2):
        with pytest.raises(KeyError, match=rf"the key {missing} was not found in the input tensordict.*{hint}"):
            module(batch(discrete()).exclude(missing))


def test_a_critic_that_returns_another_key_is_an_error_with_the_keys_option():
    for module in both("ClipPPOLoss", discrete(), critic(), loss_critic_type="l2"):
        module.set_keys(value="other")
        with pytest.raises(KeyError, match=r"the key other was not found in the critic output.*value_key"):
            module(batch(discrete()))


@pytest.mark.parametrize("name", ["advantage", "value_target"])
def test_gradients_through_the_targets_are_kept(name):
    data = batch(discrete())
    data[name] = data[name].requires_grad_()
    module = fast.ClipPPOLoss(discrete(), critic(), loss_critic_type="l2")
    with pytest.raises(ValueError, match=f"no gradient to the {name}"):
        module(data)


def test_a_flat_advantage_gives_a_scalar_loss_as_in_torchrl():
    data = batch(discrete())
    data["advantage"] = data["advantage"].expand(24, 3)
    for module in both("ClipPPOLoss", discrete(), critic()):
        out = module(data.clone())
        assert out["loss_objective"].ndim == 0
    agree(discrete(), data)


# ---- a whole script ----


def curve(GAE, ClipPPOLoss) -> list[list[float]]:
    """A PPO script as in torchrl's tutorial; only the two classes come from outside."""
    from torchrl.collectors import Collector
    from torchrl.envs import GymEnv
    from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, ValueOperator

    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1")
    env.set_seed(0)
    network = TensorDictModule(MLP(in_features=4, out_features=2, num_cells=[32]), ["observation"], ["logits"])
    policy = ProbabilisticActor(
        network, in_keys=["logits"], spec=env.action_spec, distribution_class=OneHotCategorical, return_log_prob=True
    )
    value = ValueOperator(MLP(in_features=4, out_features=1, num_cells=[32]), in_keys=["observation"])
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=value, average_gae=True)
    loss = ClipPPOLoss(policy, value, clip_epsilon=0.2, entropy_coeff=0.01, loss_critic_type="l2", clip_value=0.2)
    adam = torch.optim.Adam(loss.parameters(), lr=3e-3)
    options = {"frames_per_batch": 128, "total_frames": 512, "auto_register_policy_transforms": True}
    found = []
    collector = Collector(env, policy, **options)
    for data in collector:
        for _ in range(3):
            advantage(data)
            for rows in torch.randperm(128).split(32):
                out = loss(data[rows])
                sum(out[name] for name in ("loss_objective", "loss_entropy", "loss_critic")).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                adam.step()
                adam.zero_grad()
                found.append([out[name].item() for name in ("loss_objective", "loss_entropy", "loss_critic", "ESS")])
    collector.shutdown()
    return found


def test_a_script_has_the_same_loss_curve_with_ours(monkeypatch):
    calls = []
    plain = curve(estimators.GAE, objectives.ClipPPOLoss)
    for name in ("gae", "policy_loss", "value_loss"):
        original = getattr(fast.ppo, name)
        monkeypatch.setattr(fast.ppo, name, lambda *a, n=name, f=original, **k: calls.append(n) or f(*a, **k))
    ours = curve(fast.GAE, fast.ClipPPOLoss)
    assert len(plain) == 48
    assert {name: calls.count(name) for name in set(calls)} == {"gae": 12, "policy_loss": 48, "value_loss": 48}
    for theirs, mine in zip(plain, ours, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert ppo.gae is fast.ppo.gae


def test_the_example_runs(capsys):
    torch.set_default_dtype(torch.float32)
    assert with_torchrl.main(["--steps", "1024"]) == 0
    assert "mean return of 10 episodes" in capsys.readouterr().out


def test_without_torchrl_the_error_says_how_to_install_it():
    code = "import sys; sys.modules['torchrl'] = None; import ppo_fast.integrations.torchrl"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert 'pip install "torchrl==0.14.*"' in out.stderr.splitlines()[-1]
