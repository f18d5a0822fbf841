"""Liger 0.8.5 as an oracle: its GRPO loss, in PyTorch and in Triton, and its scaled cross entropy.

Liger's advantages are one number per sequence; ours, repeated over the steps, are then the same.
"""

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
    tokens_below,
    with_gradient,
)

import ppo_fast as ppo

MISSING = "liger-kernel is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("liger_kernel", reason=MISSING)

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: E402
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction  # noqa: E402
from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # noqa: E402
    LigerFusedLinearScaledCrossEntropyFunction,
)
from liger_kernel.transformers.grpo_loss import triton_grpo_loss  # noqa: E402

D, V = 16, 67
# Liger's loss_type, and what it is in our words: it divides by all sequences, also by those without a counted step.
LOSS_TYPES = {
    "dapo": dict(aggregation="token-mean"),
    "bnpo": dict(aggregation="token-mean"),
    "grpo": dict(aggregation="seq-mean-token-mean", denominator=float(B)),
    "dr_grpo": dict(aggregation="seq-mean-token-sum-norm", denominator=float(B), norm_length=12.0),
}


def inputs():
    old = -draw(B, T, seed=70).abs() - 1
    x = {"old_logprobs": old, "ref_logprobs": old + draw(B, T, seed=71, scale=0.5)}
    x["logprobs"] = old + draw(B, T, seed=72, scale=0.8)
    return {name: t.float().double() for name, t in x.items()}, draw(B, seed=73)


def liger_loss(logprobs, x, advantages, mask, *, weights=None, beta=0.1, **options):
    """Liger's per-step arithmetic, without its linear layer."""
    given = dict(ref_per_token_logps=x["ref_logprobs"], old_per_token_logps=x["old_logprobs"], vllm_is_ratio=weights)
    given |= dict(epsilon_low=0.2, epsilon_high=0.3, beta=beta, max_completion_length=12)
    mask = mask.double()
    return LigerFusedLinearGRPOFunction.ppo_loss_fn(logprobs, mask, advantages, mask, **given, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta", [None, 1.6])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_policy_loss_matches_ligers_grpo(mask, loss_type, delta, backend):
    """Switches: kl_estimator="k3", kl_coef=beta; delta is our dual_clip, if above 1 + clip_high."""
    x, advantages = inputs()
    weights = draw(B, T, seed=74).exp().clamp(max=2.0)
    ours = for_ours(mask, DTYPES[backend], **x, weights=weights, advantages=advantages.unsqueeze(-1).expand(B, T))
    options = dict(clip_high=0.3, dual_clip=delta, kl_coef=0.1, kl_estimator="k3", backend=backend)
    options |= LOSS_TYPES[loss_type]
    logprobs = ours.pop("logprobs")
    loss, grad = with_gradient(lambda p: ppo.policy_loss(p, mask=mask, **ours, **options).loss, logprobs)

    peer = for_peer(mask, **x)
    choice = dict(loss_type=loss_type, delta=delta, weights=weights)
    peer_loss, peer_grad = with_gradient(lambda p: liger_loss(p, peer, advantages, mask, **choice)[0], peer["logprobs"])
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)
    stats = ppo.policy_loss(logprobs, mask=mask, **ours, **options).stats
    kl, clipped = liger_loss(peer["logprobs"], peer, advantages, mask, **choice)[1]
    assert_equal(stats["ref_kl"], kl, "KL")
    assert stats["clip_fraction"].item() == pytest.approx(clipped.item(), rel=1e-6)


def linear_inputs(mask):
    hidden, weight = draw(B, T, D, seed=75).float(), draw(V, D, seed=76, scale=0.5).float()
    tokens = tokens_below(V, B, T, seed=77)
    plain = ppo.linear_logprobs(hidden, weight, tokens, temperature=0.9).detach()
    old, ref = plain + draw(B, T, seed=78, scale=0.8).float(), plain + draw(B, T, seed=79, scale=0.5).float()
    poisoned = torch.where(mask.unsqueeze(-1), hidden, torch.nan)
    return hidden, poisoned, weight, draw(V, seed=80).float() * 0.1, tokens, old, ref, draw(B, seed=81).float()


def loss_and_gradients(function, *leaves):
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(3.0 * loss, leaves)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linear_ppo_loss_matches_ligers_fused_linear_grpo(mask, loss_type):
    """From hidden states to gradients, in fp32. Switches as above; Liger runs uncompiled, one sequence at a time."""
    hidden, poisoned, weight, bias, tokens, old, ref, advantages = linear_inputs(mask)
    per_step = advantages.unsqueeze(-1).expand(B, T)
    options = dict(clip_high=0.3, kl_coef=0.1, kl_estimator="k3", ref_logprobs=ref, temperature=0.9)
    options |= LOSS_TYPES[loss_type]
    ours = loss_and_gradients(
        lambda h, w, b: ppo.linear_ppo_loss(h, w, tokens, old, per_step, mask, bias=b, **options).loss,
        *(poisoned, weight, bias),
    )
    module = LigerFusedLinearGRPOLoss(
        beta=0.1, compiled=False, epsilon_high=0.3, loss_type=loss_type, max_completion_length=12, temperature=0.9
    )
    theirs = loss_and_gradients(
        lambda h, w, b: module(h, w, tokens, mask.float(), advantages, b, ref, old)[0], *(hidden, weight, bias)
    )
    for name, x, y in zip(("loss", "d hidden", "d weight", "d bias"), ours, theirs, strict=True):
        assert_equal(x, y, name, atol=5e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Liger's kernel on CPU tensors")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_logits_to_loss_matches_ligers_triton_kernel(mask):
    """token_logprobs and policy_loss in a row against Liger's one kernel. Switch: inplace=False keeps the logits."""
    _, _, _, _, tokens, _, _, advantages = linear_inputs(mask)
    logits = draw(B, T + 1, V, seed=82, scale=2.0).float()  # Liger drops the last position, which predicts nothing
    plain = ppo.token_logprobs(logits[:, :-1], tokens, temperature=0.9)
    old, ref = plain + draw(B, T, seed=83, scale=0.8).float(), plain + draw(B, T, seed=84, scale=0.5).float()

    def ours(x):
        logp = ppo.token_logprobs(x[:, :-1], tokens, mask, temperature=0.9, backend="triton")
        per_step = advantages.unsqueeze(-1).expand(B, T)
        options = dict(clip_high=0.3, kl_coef=0.1, kl_estimator="k3", ref_logprobs=ref)
        return ppo.policy_loss(logp, old, per_step, mask, **options, backend="triton").loss

    def theirs(x):
        options = dict(temperature=0.9, beta=0.1, eps_low=0.2, eps_high=0.3, inplace=False, loss_type="dapo")
        return triton_grpo_loss(x, old, ref, tokens, advantages, mask.float(), **options, reduce=True)[0]

    loss, grad = with_gradient(ours, logits)
    peer_loss, peer_grad = with_gradient(theirs, logits)
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linear_logprobs_match_ligers_scaled_cross_entropy(mask):
    """Switch: Liger returns -logp and takes -100 for a masked token; on a CPU its PyTorch fallback answers, in fp32."""
    hidden, poisoned, weight, _, tokens, _, _, _ = linear_inputs(mask)
    up, up_entropy = draw(B, T, seed=85).float(), draw(B, T, seed=86).float()

    def evaluate(function, *leaves):
        leaves = tuple(x.clone().requires_grad_() for x in leaves)
        logp, entropy = function(*leaves)
        grads = torch.autograd.grad((up * logp).sum() + (up_entropy * entropy).sum(), leaves)
        return logp.detach(), entropy.detach(), *grads

    def theirs(h, w):
        labels = tokens.masked_fill(~mask, -100).flatten()
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(h.flatten(0, 1), w, labels, 0.9, -100, 1, True)
        return -nll.view(B, T), entropy.view(B, T)

    ours = evaluate(
        lambda h, w: ppo.linear_logprobs(h, w, tokens, mask, temperature=0.9, with_entropy=True), *(poisoned, weight)
    )
    for name, x, y in zip(
        ("logprobs", "entropy", "d hidden", "d weight"), ours, evaluate(theirs, hidden, weight), strict=True
    ):
        assert_equal(x, y, name, atol=2e-5)


def test_one_runaway_ratio_is_finite_unlike_in_liger():
    """Liger has no clamp: exp(800) is infinite, and with A < 0 the loss as well. Ours stops at e^20 = 485165195."""
    logprobs, advantages, mask = torch.zeros(1, 1).double(), torch.tensor([-1.0]).double(), torch.ones(1, 1).bool()
    x = {"old_logprobs": logprobs - 800, "ref_logprobs": logprobs}
    loss = ppo.policy_loss(logprobs, x["old_logprobs"], advantages.unsqueeze(-1), mask).loss
    assert loss.item() == pytest.approx(485165195.4, rel=1e-9)
    assert liger_loss(logprobs, x, advantages, mask, beta=0.0)[0].isinf()


def test_nan_at_a_masked_step_reaches_the_loss_as_in_liger():
    mask, (x, advantages) = MASKS["right-padded"], inputs()
    poisoned = for_ours(mask, torch.float64, **x)
    per_step = advantages.unsqueeze(-1).expand(B, T)
    options = dict(clip_high=0.3, kl_coef=0.1, kl_estimator="k3")
    loss = ppo.policy_loss(**poisoned, advantages=per_step, mask=mask, **options).loss
    assert_equal(loss, liger_loss(x["logprobs"], x, advantages, mask)[0])
    assert liger_loss(poisoned["logprobs"], poisoned, advantages, mask)[0].isnan()
