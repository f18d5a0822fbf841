"""verl 0.9.1, the most complete PPO for language models, as an oracle. Install tests/oracles/verl.txt to run this."""

import pytest
import torch
from oracles.cases import (
    BACKENDS,
    DTYPES,
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

import ppo_fast as ppo

MISSING = "verl is not installed: pip install -r tests/oracles/verl.txt in an environment of its own"
pytest.importorskip("verl", reason=MISSING)

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils import torch_functional as verl_torch  # noqa: E402
from verl.utils.experimental import torch_functional as verl_fused  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_NAMES = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def verl_policy_loss(x, mask, *, aggregation, weights=None, low=0.2, high=0.3, dual_clip=3.0, batch_info=None):
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual_clip,
    )
    config.global_batch_info.update(batch_info or {})
    return core_algos.compute_policy_loss_vanilla(
        x["old_logprobs"], x["logprobs"], x["advantages"], mask.double(), aggregation, config, weights
    )


def our_policy_loss(x, mask, **options):
    """Loss and its gradient with respect to the log-probabilities."""
    rest = {name: t for name, t in x.items() if name != "logprobs"}
    return with_gradient(lambda p: ppo.policy_loss(p, mask=mask, **rest, **options).loss, x["logprobs"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_policy_loss_matches_verl(mask, aggregation, backend):
    """Switch: dual_clip=3.0, which verl always has and we do not."""
    x = policy_inputs()
    options = dict(clip_low=0.2, clip_high=0.3, dual_clip=3.0, aggregation=aggregation, backend=backend)
    given = for_ours(mask, DTYPES[backend], **x)
    loss, grad = our_policy_loss(given, mask, **options)

    peer = for_peer(mask, **x)
    peer_loss, peer_grad = with_gradient(
        lambda p: verl_policy_loss(peer | {"logprobs": p}, mask, aggregation=aggregation)[0], peer["logprobs"]
    )
    assert_equal(loss, peer_loss, "loss")
    assert_equal(grad, peer_grad, "gradient")

    stats = ppo.policy_loss(mask=mask, **given, **options).stats
    metrics = verl_policy_loss(peer, mask, aggregation=aggregation)[1]
    assert stats["clip_fraction"].item() == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-6)
    assert stats["dual_clip_fraction"].item() == pytest.approx(metrics["actor/pg_clipfrac_lower"], rel=1e-6)
    if mask.all():
        assert min(stats["clip_fraction"], stats["dual_clip_fraction"]) > 0, "the inputs must reach both clips"


@pytest.mark.parametrize("log_ratio", [-40.0, -20.5, 20.5, 40.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_log_ratio_beyond_20_gets_the_ratio_and_gradient_of_verl(log_ratio, advantage):
    """Both clamp the exponent to +-20 and stop the gradient there; nothing to switch."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    one = torch.ones(1, 1, dtype=torch.float64)
    x = {"logprobs": log_ratio * one, "old_logprobs": 0 * one, "advantages": advantage * one}
    loss, grad = our_policy_loss(x, mask, clip_high=0.3, dual_clip=1e12)
    peer_loss, peer_grad = with_gradient(
        lambda p: verl_policy_loss(x | {"logprobs": p}, mask, aggregation="token-mean", dual_clip=1e12)[0],
        x["logprobs"],
    )
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rollout_weights_scale_as_in_verl(mask):
    x, weights = policy_inputs(), draw(B, T, seed=7).exp().clamp(max=2.0)
    loss, grad = our_policy_loss(
        for_ours(mask, torch.float64, **x, weights=weights), mask, clip_high=0.3, dual_clip=3.0
    )
    peer = for_peer(mask, **x)
    peer_loss, peer_grad = with_gradient(
        lambda p: verl_policy_loss(peer | {"logprobs": p}, mask, aggregation="token-mean", weights=weights)[0],
        peer["logprobs"],
    )
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)


GLOBAL = {  # verl's arguments, and our denominator that means the same: global count / number of ranks
    "token-mean": (dict(dp_size=4, batch_num_tokens=200), dict(denominator=50.0)),
    "seq-mean-token-sum": (dict(dp_size=4, global_batch_size=32), dict(denominator=8.0)),
    "seq-mean-token-mean": (dict(dp_size=4, global_batch_size=32), dict(denominator=8.0)),
    "seq-mean-token-sum-norm": (
        dict(dp_size=4, global_batch_size=32, loss_scale_factor=12),
        dict(denominator=8.0, norm_length=12.0),
    ),
}


@pytest.mark.parametrize("aggregation", GLOBAL)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_global_denominator_has_the_scale_of_verls_global_batch(mask, aggregation):
    """Switch: denominator = verl's global count divided by dp_size, since verl undoes the ranks' average itself."""
    batch_info, options = GLOBAL[aggregation]
    x = policy_inputs()
    ours = our_policy_loss(
        for_ours(mask, torch.float64, **x), mask, clip_high=0.3, dual_clip=3.0, aggregation=aggregation, **options
    )
    peer = for_peer(mask, **x)
    theirs = with_gradient(
        lambda p: verl_policy_loss(peer | {"logprobs": p}, mask, aggregation=aggregation, batch_info=batch_info)[0],
        peer["logprobs"],
    )
    assert_equal(ours[0], theirs[0], "loss")
    assert_equal(ours[1], theirs[1], "gradient")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_aggregation_weighs_steps_as_agg_loss(mask, aggregation):
    """With every ratio 1 and advantages -loss, our policy term is any matrix that agg_loss may get."""
    matrix, zero = draw(B, T, seed=8), torch.zeros(B, T, dtype=torch.float64)
    x = for_ours(mask, torch.float64, logprobs=zero, old_logprobs=zero, advantages=-matrix)
    loss, grad = our_policy_loss(x, mask, aggregation=aggregation)
    peer_loss, weight = with_gradient(
        lambda m: core_algos.agg_loss(m, mask.double(), aggregation), torch.where(mask, matrix, 0.0)
    )
    assert_equal(loss, peer_loss)
    assert_equal(grad, weight * matrix, "weight of each step")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_value_loss_matches_verl(mask, aggregation, backend):
    x = value_inputs()
    ours = for_ours(mask, DTYPES[backend], **x)
    options = dict(clip=0.5, aggregation=aggregation, backend=backend)
    loss, grad = with_gradient(
        lambda v: ppo.value_loss(v, ours["old_values"], ours["returns"], mask, **options).loss, ours["values"]
    )
    peer = for_peer(mask, **x)
    arguments = (peer["returns"], peer["old_values"], mask.double(), 0.5, aggregation)
    peer_loss, peer_grad = with_gradient(lambda v: core_algos.compute_value_loss(v, *arguments)[0], peer["values"])
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)
    share = ppo.value_loss(mask=mask, **ours, **options).stats["value_clip_fraction"].item()
    assert share == pytest.approx(core_algos.compute_value_loss(peer["values"], *arguments)[1].item(), rel=1e-6)


def our_kl(logprobs, ref, mask, estimator, backend="torch"):
    """Per step the estimate, from the rewards, and its gradient, from a loss that consists of the KL alone."""
    zero = torch.zeros_like(logprobs)
    kl = ppo.shape_rewards(zero[:, 0], logprobs, ref, mask, kl_coef=1.0, kl_estimator=estimator)[1]
    options = dict(kl_coef=1.0, kl_estimator=estimator, aggregation="token-sum", backend=backend)
    _, grad = with_gradient(
        lambda p: ppo.policy_loss(p, p.detach(), zero, mask, ref_logprobs=ref, **options).loss, logprobs
    )
    return kl, grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KL_NAMES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_kl_estimator_matches_verl(mask, name, backend):
    """No switch while |d| is at most 2: verl's cap of k3 at 10 begins at d = -2.47."""
    logprobs, d = draw(B, T, seed=9), draw(B, T, seed=10).clamp(-2, 2)
    x = {"logprobs": logprobs, "ref": (logprobs - d).float().double()}
    ours = for_ours(mask, DTYPES[backend], **x)
    kl, grad = our_kl(ours["logprobs"], ours["ref"], mask, KL_NAMES[name], backend)
    peer = for_peer(mask, **x)
    estimates = core_algos.kl_penalty(peer["logprobs"], peer["ref"], name)
    _, peer_grad = with_gradient(lambda p: (core_algos.kl_penalty(p, peer["ref"], name) * mask).sum(), peer["logprobs"])
    assert_equal(kl, estimates * mask)
    assert_equal(grad, peer_grad)


def test_k3_of_a_large_ratio_is_capped_at_10_without_a_gradient_as_in_verl():
    """verl caps k3 at 10 and thereby loses the gradient that pulls a runaway token back; e^5 - 1 - 5 = 142.4."""
    logprobs, ref = torch.tensor([[-5.0]]).double(), torch.tensor([[0.0]]).double()
    kl, grad = our_kl(logprobs, ref, torch.ones(1, 1, dtype=torch.bool), "k3")
    assert kl.item() == pytest.approx(142.4131591, rel=1e-8)
    assert grad.item() == pytest.approx(1 - 148.4131591, rel=1e-8)
    capped, gone = with_gradient(lambda p: core_algos.kl_penalty(p, ref, "k3").sum(), logprobs)
    assert capped.item() == 10.0
    assert gone.item() == 0.0


def test_k2_has_the_gradient_of_verls_straight_through_k3():
    """verl's "k3+" is k3 in value and k2 in gradient. Ours: kl_estimator="k2" for the loss, k3 for reading."""
    logprobs, ref = draw(B, T, seed=11), draw(B, T, seed=12)
    mask = MASKS["gaps"]
    _, peer_grad = with_gradient(lambda p: (core_algos.kl_penalty(p, ref, "k3+") * mask).sum(), logprobs)
    assert_equal(our_kl(logprobs, ref, mask, "k2")[1], peer_grad)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_token_level_rewards_match_verl(mask):
    """Switch: scores [B, T], since verl's reward manager has placed them already."""
    x = {"scores": draw(B, T, seed=13), "logprobs": draw(B, T, seed=14), "ref": draw(B, T, seed=15)}
    ours = for_ours(mask, torch.float64, **x)
    rewards, _ = ppo.shape_rewards(ours["scores"], ours["logprobs"], ours["ref"], mask, kl_coef=0.1)
    peer = for_peer(mask, **x)
    assert_equal(rewards, core_algos.compute_rewards(peer["scores"], peer["logprobs"], peer["ref"], 0.1))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_whitening_matches_verl(mask, shift_mean):
    """Switch: compare counted steps only, since verl leaves numbers at masked ones and we return 0 there."""
    x = draw(B, T, seed=16) + 3
    ours = ppo.masked_whiten(torch.where(mask, x, torch.nan), mask, shift_mean=shift_mean)
    peer = verl_torch.masked_whiten(torch.where(mask, x, 0.0), mask.double(), shift_mean=shift_mean)
    assert_equal(ours[mask], peer[mask])
    assert not ours[~mask].any()


def test_whitening_one_step_raises_as_in_verl():
    """verl raises ValueError where one step counts; ours centres it, so that a tiny batch does not end a run."""
    x, mask = torch.tensor([[4.0, 7.0]]), torch.tensor([[True, False]])
    assert ppo.masked_whiten(x, mask).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="mask"):
        verl_torch.masked_whiten(x, mask.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gae_matches_verl_in_a_gap(mask, gamma, lam, backend):
    """Tool tokens are skipped by both. Switch: whiten afterwards, as verl does inside, and compare counted steps."""
    x = {"rewards": draw(B, T, seed=17), "values": draw(B, T, seed=18)}
    advantages, returns = ppo.gae(
        **for_ours(mask, DTYPES[backend], **x), gamma=gamma, lam=lam, mask=mask, backend=backend
    )
    peer = for_peer(mask, **x)
    peer_advantages, peer_returns = core_algos.compute_gae_advantage_return(
        peer["rewards"], peer["values"], mask.double(), gamma, lam
    )
    assert_equal(returns[mask], peer_returns[mask], "returns")
    assert_equal(ppo.masked_whiten(advantages, mask)[mask], peer_advantages[mask], "whitened advantages")


def test_nan_at_a_masked_step_spreads_over_the_row_as_in_verls_gae():
    """verl multiplies by the mask, so a NaN at padding reaches every step before it; ours adds 1 and 2."""
    rewards, values = torch.tensor([[1.0, 2.0, torch.nan]]), torch.tensor([[0.5, 0.25, torch.nan]])
    mask = torch.tensor([[True, True, False]])
    _, returns = ppo.gae(rewards, values, gamma=1.0, lam=1.0, mask=mask)
    assert returns.tolist() == [[3.0, 2.0, 0.0]]
    _, peer_returns = core_algos.compute_gae_advantage_return(rewards, values, mask.float(), 1.0, 1.0)
    assert peer_returns[0, :2].isnan().all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nan_advantage_at_a_masked_step_reaches_the_gradient_as_in_verl(aggregation):
    mask, x = MASKS["right-padded"], policy_inputs()
    x["advantages"] = torch.where(mask, x["advantages"], torch.nan)
    loss, grad = our_policy_loss(x, mask, clip_high=0.3, dual_clip=3.0, aggregation=aggregation)
    assert loss.isfinite()
    assert grad.isfinite().all()
    _, peer_grad = with_gradient(
        lambda p: verl_policy_loss(x | {"logprobs": p}, mask, aggregation=aggregation)[0], x["logprobs"]
    )
    assert peer_grad[~mask].isnan().any()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_a_batch_without_a_counted_step_is_nan_as_in_verl(aggregation):
    """verl divides by the count, 0; ours is 0 and keeps the graph, so that a rank without tokens can take part."""
    mask, x = torch.zeros(B, T, dtype=torch.bool), policy_inputs()
    loss, grad = our_policy_loss(x, mask, aggregation=aggregation)
    assert loss.item() == 0
    assert not grad.any()
    assert verl_policy_loss(x, mask, aggregation=aggregation)[0].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_match_verl(temperature, backend):
    """Switch: verl divides the logits by the temperature before it calls."""
    V = 67
    logits, tokens = draw(B, T, V, seed=19, scale=3.0), tokens_below(V, B, T, seed=20)
    up, up_entropy = draw(B, T, seed=21), draw(B, T, seed=22)

    def ours(x):
        logp, entropy = ppo.token_logprobs(x, tokens, temperature=temperature, with_entropy=True, backend=backend)
        return (up.to(x.dtype) * logp).sum() + (up_entropy.to(x.dtype) * entropy).sum()

    def theirs(x):
        logp = verl_torch.logprobs_from_logits(x / temperature, tokens, inplace_backward=False)
        return (up * logp).sum() + (up_entropy * verl_torch.entropy_from_logits(x / temperature)).sum()

    loss, grad = with_gradient(ours, logits.to(DTYPES[backend]))
    peer_loss, peer_grad = with_gradient(theirs, logits)
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad, atol=1e-5 if backend == "triton" else 0.0)


def test_entropy_of_a_masked_vocabulary_is_nan_as_in_verl():
    """0 times -inf: verl's entropy is NaN as soon as one logit is -inf; two equal logits are log 2 nats."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    _, entropy = ppo.token_logprobs(logits, torch.tensor([0]), with_entropy=True)
    assert entropy.item() == pytest.approx(0.6931472, rel=1e-6)
    assert verl_torch.entropy_from_logits(logits).isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linear_logprobs_match_verls_fused_linear(mask, temperature):
    """verl's head has no mask: its upstream gradients are zeroed instead. Both in fp32, as verl's always is."""
    D, V = 16, 67
    hidden, weight = draw(B, T, D, seed=23).float(), draw(V, D, seed=24).float()
    tokens = tokens_below(V, B, T, seed=25)
    up, up_entropy = draw(B, T, seed=26).float() * mask, draw(B, T, seed=27).float() * mask

    def evaluate(function, hidden):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = function(*leaves)
        grads = torch.autograd.grad((up * logp).sum() + (up_entropy * entropy).sum(), leaves)
        return logp.detach() * mask, entropy.detach() * mask, *grads

    poisoned = torch.where(mask.unsqueeze(-1), hidden, torch.nan)
    ours = evaluate(
        lambda h, w: ppo.linear_logprobs(h, w, tokens, mask, temperature=temperature, with_entropy=True), poisoned
    )
    fused = verl_fused.FusedLinearForPPO(chunk_size=4)
    theirs = evaluate(lambda h, w: fused(h, w, tokens, temperature=temperature), hidden)
    for name, x, y in zip(("logprobs", "entropy", "d hidden", "d weight"), ours, theirs, strict=True):
        assert_equal(x, y, name, atol=2e-5)
