"""The specification itself: numbers worked out by hand, closed forms, identities, finite differences."""

import math

import pytest
import torch

from ppo_fast.kernels import reference

D = torch.float64


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def test_logprob_and_entropy_of_a_fair_coin_and_a_biased_one():
    logits = tensor([0.0, 0.0], [math.log(3), 0.0])
    logp, entropy = reference.token_logprobs(logits, torch.tensor([0, 1]), with_entropy=True)
    torch.testing.assert_close(logp, tensor(math.log(1 / 2), math.log(1 / 4)))
    torch.testing.assert_close(entropy, tensor(math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_a_forbidden_token_adds_nothing_to_the_entropy_and_gets_no_gradient():
    logits = tensor([0.0, 0.0, -torch.inf]).requires_grad_()
    logp, entropy = reference.token_logprobs(logits, torch.tensor([0]), with_entropy=True)
    assert entropy.item() == pytest.approx(math.log(2))
    (logp.sum() + entropy.sum()).backward()
    torch.testing.assert_close(logits.grad, tensor([0.5, -0.5, 0.0]))


def test_temperature_divides_the_logits():
    logits, tokens = torch.randn(4, 9, dtype=D), torch.arange(4)
    hot = reference.token_logprobs(logits, tokens, temperature=2.5)
    torch.testing.assert_close(hot, reference.token_logprobs(logits / 2.5, tokens))


def test_gradient_of_logprob_and_entropy_has_the_closed_form():
    """d/dz_j = g (1[j = token] - p_j) - h p_j (log p_j + H)."""
    z = torch.randn(3, 7, dtype=D, requires_grad=True)
    tokens, g, h = torch.tensor([0, 6, 3]), torch.randn(3, dtype=D), torch.randn(3, dtype=D)
    logp, entropy = reference.token_logprobs(z, tokens, with_entropy=True)
    (g * logp + h * entropy).sum().backward()
    p = z.detach().softmax(-1)
    one_hot = torch.nn.functional.one_hot(tokens, 7)
    expected = g[:, None] * (one_hot - p) - h[:, None] * p * (p.log() + entropy.detach()[:, None])
    torch.testing.assert_close(z.grad, expected)


def test_clipped_loss_by_hand():
    """ratios 1.5, 0.5, 1.5, 0.5 with A = 1, 1, -1, -1: terms -1.2, -0.5, 1.5, 0.8; two of them are clipped."""
    logp = tensor(1.5, 0.5, 1.5, 0.5).log()
    advantages = tensor(1.0, 1.0, -1.0, -1.0)
    loss, stats = reference.policy_loss(logp, torch.zeros_like(logp), advantages)
    assert loss.item() == pytest.approx((-1.2 - 0.5 + 1.5 + 0.8) / 4)
    assert stats["clip_fraction"].item() == 0.5
    assert stats["ratio_mean"].item() == pytest.approx(1.0)
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    assert stats["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.5, 0.5)) / 4)


def test_dual_clip_bounds_the_term_of_a_negative_advantage_by_hand():
    """ratio 5, A = -2: the term is 10, with c = 3 it is 6."""
    loss, stats = reference.policy_loss(tensor(math.log(5)), tensor(0.0), tensor(-2.0), dual_clip=3.0)
    assert loss.item() == pytest.approx(6.0)
    assert stats["dual_clip_fraction"].item() == 1.0


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient():
    logp = torch.randn(5, dtype=D, requires_grad=True)
    advantages = torch.randn(5, dtype=D)
    reference.policy_loss(logp, logp.detach(), advantages)[0].backward()
    torch.testing.assert_close(logp.grad, -advantages / 5)


def test_value_loss_by_hand():
    """old 0, value 1, return 2: moved by at most 0.2, the error is 1.8 instead of 1."""
    loss, stats = reference.value_loss(tensor(1.0), tensor(0.0), tensor(2.0), clip=0.2)
    assert loss.item() == pytest.approx(0.5 * 1.8**2)
    assert stats["value_clip_fraction"].item() == 1.0
    assert reference.value_loss(tensor(1.0), None, tensor(2.0), clip=None)[0].item() == pytest.approx(0.5)


def test_five_aggregations_by_hand():
    """Terms 1, 2, 3 | 4 | nothing counted: the third sequence does not count."""
    logp = torch.zeros(3, 3, dtype=D)
    advantages = -tensor([1, 2, 3], [4, 0, 0], [9, 9, 9])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    expected = {
        "token-mean": 10 / 4,
        "token-sum": 10,
        "seq-mean-token-sum": (6 + 4) / 2,
        "seq-mean-token-mean": (2 + 4) / 2,
        "seq-mean-token-sum-norm": (6 + 4) / 2 / 3,
    }
    assert set(expected) == set(reference.AGGREGATIONS)
    for aggregation, value in expected.items():
        loss, _ = reference.policy_loss(logp, logp, advantages, mask, aggregation=aggregation)
        assert loss.item() == pytest.approx(value), aggregation


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_with_a_common_denominator_splitting_a_batch_changes_nothing(aggregation):
    logp, old, adv = torch.randn(3, 6, 4, dtype=D)
    mask = torch.rand(6, 4) < 0.7
    whole, _ = reference.policy_loss(logp, old, adv, mask, aggregation=aggregation)
    count = mask.sum() if aggregation == "token-mean" else mask.any(-1).sum()
    parts = [
        reference.policy_loss(logp[i], old[i], adv[i], mask[i], aggregation=aggregation, denominator=count)[0]
        for i in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_kl_estimators_by_hand():
    d = tensor(0.5)
    zero = torch.zeros(1, dtype=D)
    values = {kind: reference.kl_estimate(d, zero, kind=kind).item() for kind in reference.KL_ESTIMATORS}
    assert values == pytest.approx({"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 1 + 0.5, "abs": 0.5})


def test_gae_by_hand():
    """r = 1, 2; V = 3, 4; gamma = lam = 0.5: delta_1 = 2 - 4 = -2, delta_0 = 1 + 2 - 3 = 0, A_0 = 0 - 0.5 = -0.5."""
    advantages, returns = reference.gae(tensor(1.0, 2.0), tensor(3.0, 4.0), gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, tensor(-0.5, -2.0))
    torch.testing.assert_close(returns, tensor(2.5, 2.0))


def test_gae_with_lambda_one_is_monte_carlo_and_with_lambda_zero_the_td_error():
    r, v = torch.randn(2, 4, 9, dtype=D)
    _, returns = reference.gae(r, v, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, r.flip(-1).cumsum(-1).flip(-1))
    advantages, _ = reference.gae(r, v, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, r + 0.9 * torch.nn.functional.pad(v[:, 1:], (0, 1)) - v)


def test_gae_skips_masked_steps_as_if_they_were_cut_out():
    r, v = torch.randn(2, 1, 8, dtype=D)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0]]).bool()
    advantages, _ = reference.gae(r, v, gamma=0.9, lam=0.8, mask=mask)
    short, _ = reference.gae(r[mask][None], v[mask][None], gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages[mask], short[0])
    assert not advantages[~mask].any()


def test_gae_uses_zero_after_an_end_and_the_final_value_at_a_cut():
    r, v = tensor(1.0, 5.0), tensor(2.0, 7.0)
    ended, _ = reference.gae(r, v, gamma=0.5, lam=1.0, terminated=torch.tensor([True, False]))
    assert ended[0].item() == 1 - 2
    cut, _ = reference.gae(
        r, v, gamma=0.5, lam=1.0, truncated=torch.tensor([True, False]), final_values=tensor(10.0, 0.0)
    )
    assert cut[0].item() == 1 + 0.5 * 10 - 2
    both, _ = reference.gae(
        r, v, gamma=0.5, terminated=torch.tensor([True, False]), truncated=torch.tensor([True, False]), final_values=v
    )
    assert both[0].item() == ended[0].item()


def test_rewards_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    logp, ref = torch.full((3, 4), -1.0, dtype=D), torch.full((3, 4), -3.0, dtype=D)
    rewards, kl = reference.shape_rewards(tensor(10.0, -10.0, 99.0), logp, ref, mask, kl_coef=0.1, score_clip=5.0)
    torch.testing.assert_close(kl, 2.0 * mask.to(D))
    torch.testing.assert_close(rewards, tensor([-0.2, 4.8, 0, 0], [-0.2, -0.2, -0.2, -5.2], [0, 0, 0, 0]))
    later, _, longer = reference.shape_rewards(
        tensor(10.0, -10.0, 99.0), logp, ref, mask, kl_coef=0.1, score_clip=5.0, reward_at="after_last"
    )
    torch.testing.assert_close(later, tensor([-0.2, -0.2, 5.0, 0], [-0.2, -0.2, -0.2, -5.2], [0, 0, 0, 0]))
    assert longer.tolist() == [[True, True, True, False], [True] * 4, [False] * 4]


def test_returns_of_another_lambda_by_hand():
    """critic_lam 1 gives Monte-Carlo returns; lam 0 gives TD errors: -0.5, and 2 - 0.5 at the end."""
    zero, half = torch.zeros(1, 3, dtype=D), torch.full((1, 3), 0.5, dtype=D)
    mask = torch.tensor([[True, True, False]])
    options = {"gamma": 0.5, "lam": 0.0, "critic_lam": 1.0, "whiten": False}
    advantages, returns, *_ = reference.rlhf_advantages(tensor(2.0), zero, zero, half, mask, **options)
    torch.testing.assert_close(advantages, tensor([0.5 * 0.5 - 0.5, 2 - 0.5, 0]))
    torch.testing.assert_close(returns, tensor([0.5 * 2, 2.0, 0]))


def test_whitening_by_hand():
    x = tensor(1.0, 3.0, 99.0)
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(reference.masked_whiten(x, mask, eps=0.0), tensor(-1.0, 1.0, 0.0) / math.sqrt(2))
    torch.testing.assert_close(reference.masked_whiten(x, mask, unbiased=False, eps=0.0), tensor(-1.0, 1.0, 0.0))
    kept = reference.masked_whiten(x, mask, unbiased=False, eps=0.0, shift_mean=False)
    torch.testing.assert_close(kept, tensor(1.0, 3.0, 0.0))
    for floor in (4.0, tensor(4.0)[0]):  # the standard deviation is 1
        torch.testing.assert_close(reference.masked_whiten(x, mask, min_std=floor), tensor(-0.25, 0.25, 0.0))
    assert torch.equal(reference.masked_whiten(x, mask, min_std=0.5), reference.masked_whiten(x, mask))
    one = torch.tensor([False, True, False])
    assert reference.masked_whiten(x, one).tolist() == [0, 0, 0]
    assert not reference.masked_whiten(x, torch.zeros(3, dtype=torch.bool)).any()


def test_everything_masked_gives_loss_zero_with_a_graph():
    x = torch.randn(2, 3, dtype=D, requires_grad=True)
    loss, stats = reference.policy_loss(x, x.detach(), x.detach(), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert all(value.item() == 0 for value in stats.values())


def test_nan_at_a_masked_position_reaches_no_result():
    nan = torch.full((1, 1), torch.nan, dtype=D)
    mask = torch.tensor([[True, False]])

    def spoiled() -> torch.Tensor:
        return torch.cat([torch.randn(1, 1, dtype=D), nan], 1).requires_grad_()

    logp, values, entropy = spoiled(), spoiled(), spoiled()
    given = [spoiled().detach() for _ in range(4)]
    loss, stats = reference.ppo_loss(
        logp,
        values,
        *given,
        mask,
        entropy=entropy,
        entropy_coef=0.1,
        ref_logprobs=given[0],
        kl_coef=0.1,
        weights=given[1],
    )
    loss.backward()
    assert loss.isfinite()
    assert all(x.isfinite() for x in stats.values())
    for x in (logp, values, entropy):
        assert x.grad.isfinite().all()
        assert x.grad[0, 1] == 0
    assert all(x.isfinite().all() for x in reference.gae(given[0], given[1], mask=mask))
    assert all(x.isfinite().all() for x in reference.shape_rewards(torch.ones(1, dtype=D), *given[:2], mask))


@pytest.mark.parametrize("aggregation", reference.AGGREGATIONS)
def test_gradients_equal_finite_differences(aggregation):
    torch.manual_seed(0)
    logp, values, entropy = (torch.randn(3, 4, dtype=D, requires_grad=True) for _ in range(3))
    old, old_values, adv, returns, ref, weights = torch.randn(6, 3, 4, dtype=D)
    mask = torch.rand(3, 4) < 0.7

    def loss(logp, values, entropy):
        return reference.ppo_loss(
            logp, values, old, old_values, adv, returns, mask, dual_clip=3.0, entropy=entropy, entropy_coef=0.1,
            ref_logprobs=ref, kl_coef=0.2, kl_estimator="k3", weights=weights.abs(), aggregation=aggregation,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (logp, values, entropy))
    logits = torch.randn(3, 4, 6, dtype=D, requires_grad=True)
    tokens = torch.randint(0, 6, (3, 4))
    assert torch.autograd.gradcheck(
        lambda x: reference.token_logprobs(x, tokens, mask, temperature=0.7, with_entropy=True), (logits,)
    )
