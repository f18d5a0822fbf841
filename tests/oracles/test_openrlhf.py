"""OpenRLHF 0.11 as an oracle: its losses, KL, reward shaping, GAE and whitening, with its GPU packages stubbed."""

from types import SimpleNamespace

import pytest
import torch
from oracles import openrlhf_stubs
from oracles.cases import (
    BACKENDS,
    DTYPES,
    MASKS,
    WITHOUT_GAPS,
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

import ppo_fast as ppo

MISSING = "openrlhf is not installed: pip install --no-deps -r tests/oracles/openrlhf.txt in an environment of its own"
pytest.importorskip("openrlhf", reason=MISSING)
openrlhf_stubs.install()

from openrlhf.models import loss as their_loss  # noqa: E402
from openrlhf.models import utils as their_utils  # noqa: E402
from openrlhf.trainer.ppo_utils import experience_maker  # noqa: E402

LEVELS = {"token-mean": True, "seq-mean-token-mean": False}  # our aggregation, and OpenRLHF's token_level_loss
GAPLESS = {name: MASKS[name] for name in (*WITHOUT_GAPS, "empty-row")}


def their_policy_loss(x, mask, *, rollout=None, batch_info=None, **options):
    module = their_loss.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.3, **options)
    return module(x["logprobs"], x["old_logprobs"], x["advantages"], mask.double(), rollout, **(batch_info or {}))


def our_policy_loss(x, mask, **options):
    rest = {name: t for name, t in x.items() if name != "logprobs"}
    return with_gradient(lambda p: ppo.policy_loss(p, mask=mask, clip_high=0.3, **rest, **options).loss, x["logprobs"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dual_clip", [None, 2.0])
@pytest.mark.parametrize("aggregation", LEVELS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_policy_loss_matches_openrlhf(mask, aggregation, dual_clip, backend):
    """No switch: dual clip is an option of both; token_level_loss chooses between two of our aggregations."""
    x = policy_inputs()
    ours = for_ours(mask, DTYPES[backend], **x)
    options = dict(dual_clip=dual_clip, aggregation=aggregation, backend=backend)
    loss, grad = our_policy_loss(ours, mask, **options)
    peer = for_peer(mask, **x)
    choice = dict(dual_clip=dual_clip, token_level_loss=LEVELS[aggregation])
    peer_loss, peer_grad = with_gradient(
        lambda p: their_policy_loss(peer | {"logprobs": p}, mask, **choice)[0], peer["logprobs"]
    )
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)
    share = ppo.policy_loss(mask=mask, clip_high=0.3, **ours, **options).stats["clip_fraction"].item()
    assert share == pytest.approx(their_policy_loss(peer, mask, **choice)[1].item(), rel=1e-6)


@pytest.mark.parametrize("aggregation", LEVELS)
def test_a_global_denominator_has_the_scale_of_openrlhf(aggregation):
    """Switch: denominator = OpenRLHF's global count divided by dp_size."""
    mask, x = MASKS["right-padded"], policy_inputs()
    loss, grad = our_policy_loss(x, mask, aggregation=aggregation, denominator=12.5)
    info = dict(dp_size=4, batch_num_tokens=50.0, global_batch_size=50.0)
    peer_loss, peer_grad = with_gradient(
        lambda p: their_policy_loss(x | {"logprobs": p}, mask, token_level_loss=LEVELS[aggregation], batch_info=info)[
            0
        ],
        x["logprobs"],
    )
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)


@pytest.mark.parametrize("mode", ["clip", "mask"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rollout_weights_scale_as_openrlhfs_correction(mask, mode):
    """Switch: we take the weights; TIS clamps pi_old / pi_rollout to a band, IcePop drops what lies outside of it."""
    x = policy_inputs()
    rollout = x["old_logprobs"] + draw(B, T, seed=30, scale=0.8)
    ratio = (x["old_logprobs"] - rollout).exp()
    inside = (ratio >= 0.5) & (ratio <= 2.0)
    weights = ratio.clamp(0.5, 2.0) if mode == "clip" else torch.where(inside, ratio, 0.0)
    loss, grad = our_policy_loss(for_ours(mask, torch.float64, **x, weights=weights), mask)
    peer = for_peer(mask, **x, rollout=rollout)
    choice = dict(is_correction_level="token", is_correction_mode=mode, is_correction_threshold=(0.5, 2.0))
    peer_loss, peer_grad = with_gradient(
        lambda p: their_policy_loss(peer | {"logprobs": p}, mask, rollout=peer["rollout"], **choice)[0],
        peer["logprobs"],
    )
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("aggregation", LEVELS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_value_loss_matches_openrlhf(mask, aggregation, clip, backend):
    x = value_inputs()
    ours = for_ours(mask, DTYPES[backend], **x)
    options = dict(clip=clip, aggregation=aggregation, backend=backend)
    loss, grad = with_gradient(
        lambda v: ppo.value_loss(v, ours["old_values"], ours["returns"], mask, **options).loss, ours["values"]
    )
    peer = for_peer(mask, **x)
    module = their_loss.ValueLoss(clip_eps=clip, token_level_loss=LEVELS[aggregation])
    peer_loss, peer_grad = with_gradient(
        lambda v: module(v, peer["old_values"], peer["returns"], mask.double()), peer["values"]
    )
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)


def our_kl(logprobs, ref, mask, estimator):
    """Per step the estimate, from the rewards, and its gradient, from a loss that consists of the KL alone."""
    zero = torch.zeros_like(logprobs)
    kl = ppo.shape_rewards(zero[:, 0], logprobs, ref, mask, kl_coef=1.0, kl_estimator=estimator)[1]
    options = dict(kl_coef=1.0, kl_estimator=estimator, aggregation="token-sum")
    loss = with_gradient(
        lambda p: ppo.policy_loss(p, p.detach(), zero, mask, ref_logprobs=ref, **options).loss, logprobs
    )
    return kl, loss[1]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_kl_estimator_matches_openrlhf(mask, estimator):
    """No switch while |d| is at most 2: OpenRLHF cuts every estimate at +-10. It computes in fp32, so ours does."""
    x = {"logprobs": draw(B, T, seed=31), "d": draw(B, T, seed=32).clamp(-2, 2)}
    x = {"logprobs": x["logprobs"], "ref": (x["logprobs"] - x["d"]).float().double()}
    ours = for_ours(mask, torch.float32, **x)
    kl, grad = our_kl(ours["logprobs"], ours["ref"], mask, estimator)
    peer = for_peer(mask, **x)
    estimates, peer_grad = with_gradient(
        lambda p: (their_utils.compute_approx_kl(p, peer["ref"], kl_estimator=estimator) * mask).sum(), peer["logprobs"]
    )
    assert_equal(kl.sum(), estimates)
    assert_equal(kl, their_utils.compute_approx_kl(peer["logprobs"], peer["ref"], kl_estimator=estimator) * mask)
    assert_equal(grad, peer_grad)


@pytest.mark.parametrize(("estimator", "d", "ours"), [("k1", 12.0, 12.0), ("k2", 6.0, 18.0), ("k3", -4.0, 49.59815)])
def test_a_large_kl_is_cut_at_10_without_a_gradient_as_in_openrlhf(estimator, d, ours):
    logprobs, ref = torch.tensor([[d]]), torch.zeros(1, 1)
    kl, grad = our_kl(logprobs, ref, torch.ones(1, 1, dtype=torch.bool), estimator)
    assert kl.item() == pytest.approx(ours, rel=1e-6)
    assert grad.item() != 0
    cut, gone = with_gradient(lambda p: their_utils.compute_approx_kl(p, ref, kl_estimator=estimator).sum(), logprobs)
    assert cut.item() == 10.0
    assert gone.item() == 0.0


def test_k2_has_the_gradient_of_openrlhfs_unbiased_estimators():
    """OpenRLHF's unbiased_gradient keeps the value of any estimator and gives it k2's gradient, as ours has for k2."""
    logprobs, ref, mask = draw(B, T, seed=33).float(), draw(B, T, seed=34).float(), MASKS["gaps"]
    _, peer_grad = with_gradient(
        lambda p: (their_utils.compute_approx_kl(p, ref, kl_estimator="k3", unbiased_gradient=True) * mask).sum(),
        logprobs,
    )
    assert_equal(our_kl(logprobs, ref, mask, "k2")[1], peer_grad)


@pytest.mark.parametrize("score_clip", [None, 1.0])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_score_is_at_the_position_of_openrlhfs_reward(mask, score_clip):
    """Switch: compare counted steps, since OpenRLHF drops the others (and an empty row's score) only in its GAE."""
    scores = draw(B, seed=35, scale=2.0)
    x = {"logprobs": draw(B, T, seed=36), "ref": draw(B, T, seed=37)}
    ours = for_ours(mask, torch.float64, **x)
    rewards, _ = ppo.shape_rewards(scores, ours["logprobs"], ours["ref"], mask, kl_coef=0.1, score_clip=score_clip)
    peer = for_peer(mask, **x)
    band = None if score_clip is None else (-score_clip, score_clip)
    theirs = their_utils.compute_reward(scores, 0.1, peer["logprobs"] - peer["ref"], mask, reward_clip_range=band)
    assert_equal(rewards[mask], theirs[mask])


def their_gae(rewards, values, mask, gamma, lam):
    maker = experience_maker.RemoteExperienceMaker.__new__(experience_maker.RemoteExperienceMaker)
    return maker.get_advantages_and_returns(values, rewards, mask.double(), gamma, lam)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
@pytest.mark.parametrize("mask", GAPLESS.values(), ids=GAPLESS)
def test_gae_matches_openrlhf(mask, gamma, lam, backend):
    """Switch: no gaps in the mask, and counted steps only: left padding gets numbers from OpenRLHF."""
    x = {"rewards": draw(B, T, seed=38), "values": draw(B, T, seed=39)}
    advantages, returns = ppo.gae(
        **for_ours(mask, DTYPES[backend], **x), gamma=gamma, lam=lam, mask=mask, backend=backend
    )
    peer_advantages, peer_returns = their_gae(**for_peer(mask, **x), mask=mask, gamma=gamma, lam=lam)
    assert_equal(advantages[mask], peer_advantages[mask])
    assert_equal(returns[mask], peer_returns[mask])


def test_a_tool_token_discounts_the_reward_once_more_as_in_openrlhf():
    """Reward 1 at step 2, a tool token at step 1, all values 0, lambda 1: the first action sees 0.5, not 0.5^2."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
    mask = torch.tensor([[True, False, True]])
    advantages, _ = ppo.gae(rewards, values, gamma=0.5, lam=1.0, mask=mask)
    assert advantages.tolist() == [[0.5, 0.0, 1.0]]
    assert their_gae(rewards, values, mask, 0.5, 1.0)[0][0, 0].item() == 0.25


@pytest.mark.parametrize("mask", GAPLESS.values(), ids=GAPLESS)
def test_scores_to_whitened_advantages_match_openrlhf(mask):
    """Switches: unbiased=False, eps=0 (OpenRLHF bounds the variance below by 1e-8), score_clip=10, no gaps."""
    scores = draw(B, seed=40, scale=8.0)
    x = {"logprobs": draw(B, T, seed=41), "ref": draw(B, T, seed=42), "values": draw(B, T, seed=43)}
    ours = for_ours(mask, torch.float32, **x)
    out = ppo.rlhf_advantages(
        scores.float(),
        ours["logprobs"],
        ours["ref"],
        ours["values"],
        mask,
        kl_coef=0.1,
        score_clip=10.0,
        gamma=0.99,
        lam=0.95,
        unbiased=False,
        eps=0.0,
    )
    peer = for_peer(mask, **x)
    advantage = SimpleNamespace(estimator="gae", gamma=0.99, lambd=0.95, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=1),
        reward=SimpleNamespace(clip_range=(-10, 10)),
    )
    maker = experience_maker.RemoteExperienceMaker(
        None, None, None, None, SimpleNamespace(value=0.1), SimpleNamespace(args=args), None
    )
    experience = experience_maker.Experience(
        action_mask=mask,
        values=peer["values"],
        rewards=scores,
        kl=their_utils.compute_approx_kl(peer["logprobs"], peer["ref"]),
        index=list(range(B)),
    )
    [made] = maker.compute_advantages_and_returns([experience])
    assert_equal(out.returns[mask], made.returns[mask], "returns")
    assert_equal(out.advantages[mask], made.advantages[mask], "whitened advantages")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_match_openrlhf(temperature, backend):
    """Switch: OpenRLHF divides the logits in place inside log_probs_from_logits, and its entropy then reads them."""
    V = 67
    logits, tokens = draw(B, T, V, seed=44, scale=3.0), tokens_below(V, B, T, seed=45)
    up, up_entropy = draw(B, T, seed=46), draw(B, T, seed=47)

    def ours(x):
        logp, entropy = ppo.token_logprobs(x, tokens, temperature=temperature, with_entropy=True, backend=backend)
        return (up.to(x.dtype) * logp).sum() + (up_entropy.to(x.dtype) * entropy).sum()

    def theirs(x):
        scaled = x.clone()
        logp = their_utils.log_probs_from_logits(scaled, tokens, temperature=temperature)
        return (up * logp).sum() + (up_entropy * their_utils.compute_entropy(scaled)).sum()

    loss, grad = with_gradient(ours, logits.to(DTYPES[backend]))
    with torch.compiler.set_stance("force_eager"):
        peer_loss, peer_grad = with_gradient(theirs, logits)
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad, atol=1e-5 if backend == "triton" else 0.0)


def test_entropy_of_a_masked_vocabulary_is_nan_as_in_openrlhf():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    _, entropy = ppo.token_logprobs(logits, torch.tensor([0]), with_entropy=True)
    assert entropy.item() == pytest.approx(0.6931472, rel=1e-6)
    with torch.compiler.set_stance("force_eager"):
        assert their_utils.compute_entropy(logits).isnan().all()


def test_a_batch_without_a_counted_step_is_nan_as_in_openrlhf():
    mask, x = torch.zeros(B, T, dtype=torch.bool), policy_inputs()
    loss, grad = our_policy_loss(x, mask)
    assert loss.item() == 0
    assert not grad.any()
    assert their_policy_loss(x, mask)[0].isnan()


def test_nan_at_a_masked_step_reaches_the_loss_as_in_openrlhf():
    mask, x = MASKS["right-padded"], policy_inputs()
    poisoned = for_ours(mask, torch.float64, **x)
    loss, grad = our_policy_loss(poisoned, mask)
    assert_equal(loss, their_policy_loss(for_peer(mask, **x), mask)[0])
    assert grad.isfinite().all()
    assert their_policy_loss(poisoned, mask)[0].isnan()
