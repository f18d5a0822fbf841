"""OpenRLHF with our functions instead of its own, its GPU packages stubbed: the same numbers and gradients."""

import inspect
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from oracles import openrlhf_stubs
from oracles.cases import (
    MASKS,
    B,
    T,
    assert_equal,
    draw,
    for_ours,
    for_peer,
    policy_inputs,
    tokens_below,
    value_inputs,
    with_gradient,
)

MISSING = "openrlhf is not installed: pip install --no-deps -r tests/oracles/openrlhf.txt in an environment of its own"
pytest.importorskip("openrlhf", reason=MISSING)
openrlhf_stubs.install()

from openrlhf import models  # noqa: E402
from openrlhf.models import actor, utils  # noqa: E402
from openrlhf.models import loss as their_loss  # noqa: E402
from openrlhf.trainer.ppo_utils import experience_maker  # noqa: E402
from openrlhf.trainer.ray import ppo_critic  # noqa: E402

from ppo_fast.integrations import openrlhf as fast  # noqa: E402

V = 23
GLOBAL = [
    {},
    {"dp_size": 4, "batch_num_tokens": 50.0, "global_batch_size": 12.0},
    {"dp_size": 8, "batch_num_tokens": torch.tensor(2.5), "global_batch_size": torch.tensor(0.5)},  # divided by steps
]
CORRECTIONS = {
    "off": {},
    "tis": {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.7, 1.5)},
    "icepop": {"is_correction_level": "token", "is_correction_threshold": (0.7, 1.5)},
    "sequence": {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.2)},
    "kl": {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0, 0.05)},
    "kl of sequences": {
        "is_correction_level": "seq",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (0, 0.08),
    },
    "tv": {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0, 0.1)},
    "tv of sequences": {
        "is_correction_level": "seq",
        "is_correction_gating": "tv",
        "is_correction_threshold": (0, 0.2),
    },
}


@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)
@pytest.mark.parametrize(("dual_clip", "token_level"), list(itertools.product([None, 2.0], [True, False])))
@pytest.mark.parametrize("info", GLOBAL, ids=["local", "global", "accumulated"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_policy_loss_gradient_and_metrics_match(mask, info, dual_clip, token_level, correction):
    """OpenRLHF gets 0 where masked, ours NaN."""
    x = policy_inputs()
    x["rollout"] = x["old_logprobs"] + draw(B, T, seed=30, scale=0.5)
    options = {"clip_eps_high": 0.3, "dual_clip": dual_clip, "token_level_loss": token_level, **correction}

    def found(kind, t):
        def run(p):
            return module(p, t["old_logprobs"], t["advantages"], mask.double(), t["rollout"], **info)

        module = kind(**options)
        return *with_gradient(lambda p: run(p)[0], t["logprobs"]), *run(t["logprobs"])[1:]

    theirs, ours = (
        found(their_loss.PolicyLoss, for_peer(mask, **x)),
        found(fast.PolicyLoss, for_ours(mask, torch.float64, **x)),
    )
    names = ("loss", "gradient", "clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")
    for name, their, our in zip(names, theirs, ours, strict=True):
        assert (our is None) == (their is None), name
        if our is not None:
            assert our.shape == their.shape
            assert_equal(our, their, name, rtol=1e-6 if name in names[2:] else 0.0)
    if correction:
        assert 0 < ours[-1] < 1, "the band is not tested"


@pytest.mark.parametrize(("token_level", "clip"), list(itertools.product([True, False], [None, 0.5])))
@pytest.mark.parametrize("info", GLOBAL, ids=["local", "global", "accumulated"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_value_loss_and_gradient_match(mask, info, token_level, clip):
    x = value_inputs()

    def found(kind, t):
        module = kind(clip, token_level)
        return with_gradient(lambda v: module(v, t["old_values"], t["returns"], mask.double(), **info), t["values"])

    theirs, ours = (
        found(their_loss.ValueLoss, for_peer(mask, **x)),
        found(fast.ValueLoss, for_ours(mask, torch.float64, **x)),
    )
    for name, their, our in zip(("loss", "gradient"), theirs, ours, strict=True):
        assert_equal(our, their, name)


def test_losses_without_a_mask_match():
    x, v = policy_inputs(), value_inputs()
    for kind in (their_loss, fast):
        module = kind.PolicyLoss()
        out = module(x["logprobs"], x["old_logprobs"], x["advantages"])
        assert out[3:] == (None, None)
        found = [*out[:3], kind.ValueLoss(0.2)(v["values"], v["old_values"], v["returns"])]
        if kind is their_loss:
            theirs = found
    for name, their, our in zip(("loss", "clip_ratio", "ppo_kl", "value loss"), theirs, found, strict=True):
        assert_equal(our, their, name, rtol=1e-6)


def test_a_batch_without_a_counted_step_is_nan_as_in_openrlhf():
    mask, x, v = torch.zeros(B, T, dtype=torch.bool), policy_inputs(), value_inputs()
    assert their_loss.PolicyLoss()(x["logprobs"], x["old_logprobs"], x["advantages"], mask)[0].isnan()
    for level in (True, False):
        loss, gradient = with_gradient(
            lambda p, level=level: fast.PolicyLoss(token_level_loss=level)(p, x["old_logprobs"], x["advantages"], mask)[
                0
            ],
            x["logprobs"],
        )
        assert loss == 0
        assert not gradient.any()
        assert fast.ValueLoss(0.2, level)(v["values"], v["old_values"], v["returns"], mask) == 0


@pytest.mark.parametrize("correction", [{}, {"is_correction_level": "token"}])
def test_gspo_is_openrlhfs(correction):
    x, mask = policy_inputs(), MASKS["gaps"]
    arguments = x["old_logprobs"], x["advantages"], mask.double(), x["old_logprobs"] + draw(B, T, seed=30, scale=0.5)
    found = []
    for kind in (their_loss, fast):
        module = kind.PolicyLoss(policy_loss_type="gspo", **correction)
        found.append((*with_gradient(lambda p, m=module: m(p, *arguments)[0], x["logprobs"]),))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy_loss_type": "nonsense"}, ValueError, "must be 'ppo' or 'gspo', got 'nonsense'"),
        ({"clip_eps_low": 1.5}, ValueError, r"clip_eps_low must be in \[0, 1\]"),
        ({"clip_eps_high": -0.1}, ValueError, "clip_eps_high non-negative"),
        ({"dual_clip": 0.5}, AssertionError, "dual_clip"),
        ({"is_correction_level": "batch"}, ValueError, "is_correction_level"),
        (
            {"is_correction_mode": "clip", "is_correction_level": "seq"},
            ValueError,
            "requires is_correction_level=token",
        ),
    ],
)
def test_an_option_that_ours_lacks_is_rejected(options, error, message):
    with pytest.raises(error, match=message):
        fast.PolicyLoss(**options)


def test_a_correction_without_rollout_log_probs_is_rejected():
    x = policy_inputs()
    with pytest.raises(ValueError, match="rollout_log_probs"):
        fast.PolicyLoss(is_correction_level="token")(x["logprobs"], x["old_logprobs"], x["advantages"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(B, T), (B * T,)])
def test_logprobs_entropy_and_gradients_match(shape, temperature):
    """The logits come back divided by the temperature, as OpenRLHF leaves them, and the entropy reads these."""
    logits, labels = draw(*shape, V, seed=1, scale=3), tokens_below(V, *shape, seed=2)
    up, up_entropy = draw(*shape, seed=3), draw(*shape, seed=4)

    def found(functions):
        def total(x):
            scaled = x.clone()
            logp = functions.log_probs_from_logits(scaled, labels, temperature=temperature)
            assert_equal(scaled.detach(), logits / temperature)
            return (logp * up).sum() + (functions.compute_entropy(scaled) * up_entropy).sum()

        with torch.compiler.set_stance("force_eager"):
            return with_gradient(total, logits)

    for name, their, our in zip(("sum", "gradient"), found(utils), found(fast), strict=True):
        assert_equal(our, their, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_openrlhf(dtype):
    logits, labels = draw(B, T, V, seed=1).to(dtype), tokens_below(V, B, T, seed=2)
    theirs, ours = (f.log_probs_from_logits(logits, labels) for f in (utils, fast))
    assert ours.dtype == theirs.dtype == fast.compute_entropy(logits).dtype == dtype
    assert (ours.float() - theirs.float()).abs().max() < {torch.float32: 1e-5}.get(dtype, 0.05)
    mask = MASKS["gaps"]
    values, rewards = (draw(B, T, seed=i).to(dtype) for i in (3, 4))
    theirs, ours = (f(values, rewards, mask, 0.9, 0.8) for f in (their_gae, fast.get_advantages_and_returns))
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == [dtype, dtype]
    shaped = [f.compute_reward(rewards[:, 0].float(), 0.1, values, mask) for f in (utils, fast)]
    assert shaped[0].dtype == shaped[1].dtype == dtype


def test_a_masked_vocabulary_has_no_entropy_as_in_openrlhf():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert fast.compute_entropy(logits).item() == pytest.approx(0.6931472, rel=1e-6)
    with torch.compiler.set_stance("force_eager"):
        assert utils.compute_entropy(logits).isnan()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("unbiased", "old"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("scale", [0.5, 8.0, 200.0])
def test_kl_and_its_gradient_match(estimator, unbiased, old, scale):
    """Up to where each estimate is cut at +-10, and a ratio at 10; the last scale overflows exp in fp32."""
    logprobs, base, up = draw(B, T, seed=10, scale=scale), draw(B, T, seed=11, scale=scale), draw(B, T, seed=12)
    options = {"kl_estimator": estimator, "unbiased_gradient": unbiased}
    options["log_probs_old"] = logprobs + draw(B, T, seed=13, scale=3) if old else None

    def found(function):
        value = function(logprobs, base, **options)
        return value, with_gradient(lambda p: (function(p, base, **options) * up).sum(), logprobs)[1]

    (their, their_gradient), (our, gradient) = found(utils.compute_approx_kl), found(fast.compute_approx_kl)
    assert our.dtype == their.dtype == torch.float32
    rounding = 1e-6 * scale * scale if unbiased else 0.0  # OpenRLHF adds and subtracts d^2/2, which costs its last bits
    assert_equal(our, their, atol=rounding)
    assert_equal(gradient, their_gradient, rtol=1e-5)


def test_an_unknown_estimator_is_rejected():
    with pytest.raises(ValueError, match="Unknown kl_estimator: k4"):
        fast.compute_approx_kl(torch.zeros(1), torch.zeros(1), kl_estimator="k4")


@pytest.mark.parametrize("band", [None, (-10, 10), (-1.0, 0.5)])
@pytest.mark.parametrize("kl_coef", [0.1, 0.0, -1.0])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rewards_match(mask, kl_coef, band):
    """Everywhere, where the KL is 0 at masked steps; so the logged return, the sum of a row, is OpenRLHF's too."""
    r, kl = draw(B, seed=20, scale=8), draw(B, T, seed=21)
    theirs = utils.compute_reward(r, kl_coef, torch.where(mask, kl, 0), mask, band)
    ours = fast.compute_reward(r, kl_coef, torch.where(mask, kl, torch.nan), mask, band)
    assert_equal(ours, theirs)


def test_a_row_without_a_response_has_its_reward_at_the_last_position():
    r, mask = torch.tensor([3.0, 2.0]), torch.tensor([[False] * 4, [True, True, False, False]])
    for functions in (utils, fast):
        reward = functions.compute_reward(r, 0.1, torch.zeros(2, 4), mask, (-2.5, 2.5))
        assert reward.tolist() == [[0, 0, 0, 2.5], [0, 2, 0, 0]]


def test_rewards_without_a_mask_or_of_a_list_are_rejected():
    with pytest.raises(ValueError, match="action_mask"):
        fast.compute_reward(torch.zeros(2), 0.1, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one tensor"):
        fast.compute_reward(torch.zeros(2), 0.1, [torch.zeros(3)] * 2, torch.ones(2, 3))


def their_gae(values, rewards, mask, gamma, lam, kind=experience_maker.RemoteExperienceMaker):
    return kind.__new__(kind).get_advantages_and_returns(values, rewards, mask, gamma, lam)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
@pytest.mark.parametrize("mask", [*MASKS.values(), None], ids=[*MASKS, "none"])
def test_advantages_and_returns_match(mask, gamma, lam):
    """Everywhere: a masked step counts with value and reward 0, and has an advantage, in OpenRLHF."""
    counted = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    x = {"values": draw(B, T, seed=22), "rewards": draw(B, T, seed=23)}
    theirs = their_gae(**for_peer(counted, **x), mask=mask, gamma=gamma, lam=lam)
    for made in (
        fast.get_advantages_and_returns(*for_ours(counted, torch.float64, **x).values(), mask, gamma, lam),
        their_gae(*for_peer(counted, **x).values(), mask, gamma, lam, fast.RemoteExperienceMaker),
    ):
        for name, their, our in zip(("advantages", "returns"), theirs, made, strict=True):
            assert_equal(our, their, name)


def made_experience():
    advantage = SimpleNamespace(estimator="gae", gamma=0.99, lambd=0.95, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=1),
        reward=SimpleNamespace(clip_range=(-10, 10)),
    )
    maker = experience_maker.RemoteExperienceMaker(
        None, None, None, None, SimpleNamespace(value=0.1), SimpleNamespace(args=args), None
    )
    mask = MASKS["right-padded"]
    x = for_peer(mask, logprobs=draw(B, T, seed=41), ref=draw(B, T, seed=42), values=draw(B, T, seed=43))
    experience = experience_maker.Experience(
        action_mask=mask,
        values=x["values"],
        rewards=draw(B, seed=40, scale=8.0),
        kl=experience_maker.compute_approx_kl(x["logprobs"], x["ref"]),
        index=list(range(B)),
    )
    [made] = maker.compute_advantages_and_returns([experience])
    return made.advantages, made.returns, made.info["return"]


class Model(torch.nn.Module):
    def forward(self, sequences, attention_mask=None, position_ids=None):
        return type("Output", (dict,), {})(logits=draw(*sequences.shape, V, seed=44).float())


def action_log_probs():
    sequences, mask = tokens_below(V, B, T, seed=45), MASKS["right-padded"][:, 1:]
    module = actor.Actor(Model(), temperature=0.7)
    module.packing_samples = False  # OpenRLHF sets it for models that it loads itself
    with torch.compiler.set_stance("force_eager"):
        logprobs, output = module(sequences, mask, torch.ones(B, T), return_output=True, return_entropy=True)
    return logprobs, output.entropy


def test_openrlhfs_own_code_makes_the_same_experience_and_logprobs_with_the_patch(monkeypatch):
    calls = []
    plain = *made_experience(), *action_log_probs()
    for name in ("shape_rewards", "gae", "token_logprobs"):
        original = getattr(fast.ppo, name)
        monkeypatch.setattr(fast.ppo, name, lambda *a, n=name, f=original, **k: calls.append(n) or f(*a, **k))
    with fast.patch(quiet=True):
        patched = *made_experience(), *action_log_probs()
    assert calls == ["shape_rewards", "gae", "token_logprobs", "token_logprobs"]
    names = ("advantages", "returns", "info", "log-probabilities", "entropy")
    for name, their, our in zip(names, plain, patched, strict=True):
        assert_equal(our.float(), their.float(), name)


def test_a_patch_replaces_every_place_and_is_undone():
    def places():
        return (
            *(models.PolicyLoss, their_loss.PolicyLoss, models.ValueLoss, ppo_critic.ValueLoss),
            *(utils.log_probs_from_logits, actor.log_probs_from_logits, utils.compute_entropy, actor.compute_entropy),
            *(experience_maker.compute_approx_kl, experience_maker.compute_reward),
            experience_maker.RemoteExperienceMaker,
        )

    before = places()
    assert not any("ppo_fast" in x.__module__ for x in before)
    with fast.patch(quiet=True):
        assert all(x.__module__ == "ppo_fast.integrations.openrlhf" for x in places())
        with pytest.raises(RuntimeError, match="openrlhf is patched already"):
            fast.patch()
    assert places() == before


def test_a_patch_says_what_it_replaces(capsys):
    with fast.patch():
        out = capsys.readouterr().out
        assert out.count("ppo_fast: in openrlhf 0.11") == 1
        assert "PolicyLoss, ValueLoss, log_probs_from_logits, compute_entropy, compute_approx_kl, compute_reward" in out


def test_signatures_are_those_of_openrlhf():
    def parameters(f):
        return {n: (p.kind, p.default) for n, p in inspect.signature(f).parameters.items() if n != "self"}

    makers = (experience_maker.RemoteExperienceMaker, fast.RemoteExperienceMaker)
    pairs = [
        (getattr(utils, n), getattr(fast, n)) for n in ("log_probs_from_logits", "compute_approx_kl", "compute_reward")
    ]
    pairs += [tuple(m.get_advantages_and_returns for m in makers)]
    for name in ("PolicyLoss", "ValueLoss"):
        theirs, ours = getattr(their_loss, name), getattr(fast, name)
        pairs += [(theirs.__init__, ours.__init__), (theirs.forward, ours.forward)]
    for theirs, ours in pairs:
        assert parameters(ours) == parameters(theirs), ours


def test_without_openrlhf_the_error_says_how_to_install_it():
    code = "import sys; sys.modules['openrlhf'] = None; import ppo_fast.integrations.openrlhf"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert 'pip install "openrlhf==0.11.*"' in out.stderr.splitlines()[-1]


def test_the_example_runs_with_the_patch_and_gets_the_same_numbers(capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    if isinstance(transformers, openrlhf_stubs._Stub):
        pytest.skip("transformers is not installed")
    from ppo_fast.examples import with_openrlhf

    calls = []
    for name in ("shape_rewards", "gae", "token_logprobs", "policy_loss", "value_loss"):
        original = getattr(fast.ppo, name)
        monkeypatch.setattr(fast.ppo, name, lambda *a, n=name, f=original, **k: calls.append(n) or f(*a, **k))
    rows = with_openrlhf.compare(3)
    # the first of two runs has one update; the old and the reference's log-probabilities come before the updates
    assert {name: calls.count(name) for name in calls} == {
        **{name: 4 for name in ("shape_rewards", "gae", "policy_loss", "value_loss")},
        "token_logprobs": 4 + 2 * 2,
    }
    assert len({row[0].loss for row in rows}) == 3, "the optimizer does nothing"
    for theirs, ours in rows:
        assert theirs.numbers.numel() > 100_000
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert (
            ours.numbers - theirs.numbers
        ).abs().max() < 1e-4  # of order 10, and the weights drift apart by rounding
    assert with_openrlhf.main(["--updates", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ppo_fast: in openrlhf 0.11")
    assert [len(line.split()) for line in out[2:]] == [6]


def test_the_example_without_openrlhf_says_what_is_missing():
    code = "import sys; sys.modules['openrlhf'] = None; from ppo_fast.examples import with_openrlhf"
    code += "; sys.exit(with_openrlhf.main([]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert out.stderr.startswith(
        'with_openrlhf: error: this integration needs openrlhf: pip install "openrlhf==0.11.*"'
    )
