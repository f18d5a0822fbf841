"""TRL 1.16 as an oracle: log-probabilities and entropy from logits and from hidden states.

TRL removed PPO in 1.13, so its GAE and its reward layout (the score one slot after the answer, our
reward_at="after_last") cannot be compared with an installed TRL; tests/kernels/test_advantages.py works them by hand.
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
    tokens_below,
    with_gradient,
)

import ppo_fast as ppo

pytest.importorskip("trl", reason="trl is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt")

from trl.kernels import selective_log_softmax_and_entropy as trl_kernel
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

D, V = 16, 67


def weighted(function, with_entropy, mask, seed=50):
    """logits -> a sum of both outputs with random weights, so that every step's gradient is seen."""
    up, up_entropy = draw(B, T, seed=seed) * mask, draw(B, T, seed=seed + 1) * mask * with_entropy

    def scalar(x):
        logp, entropy = function(x)
        return (up.to(x.dtype) * logp).sum() + (up_entropy.to(x.dtype) * entropy).sum()

    return scalar


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_logprobs_and_entropy_match_trl(mask, temperature, with_entropy, backend):
    """No switch: TRL has the same temperature and, as row_mask, the same mask; but its masked rows must be finite."""
    logits, tokens = draw(B, T, V, seed=52, scale=3.0), tokens_below(V, B, T, seed=53)
    poisoned = torch.where(mask.unsqueeze(-1), logits, torch.nan).to(DTYPES[backend])
    ours = weighted(
        lambda x: ppo.token_logprobs(x, tokens, mask, temperature=temperature, with_entropy=True, backend=backend),
        with_entropy,
        mask,
    )
    theirs = weighted(
        lambda x: trl_utils.selective_log_softmax_and_entropy(x, tokens, temperature=temperature, row_mask=mask),
        with_entropy,
        mask,
    )
    loss, grad = with_gradient(ours, poisoned)
    peer_loss, peer_grad = with_gradient(theirs, logits)
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad, atol=1e-5 if backend == "triton" else 0.0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7,)])
def test_selected_logprobs_and_entropy_of_one_step_match_trl(shape):
    """The two functions that trainers import by name, without a mask; entropy in chunks of two rows."""
    logits, tokens = draw(*shape, V, seed=54, scale=5.0), tokens_below(V, *shape, seed=55)
    logp, entropy = ppo.token_logprobs(logits, tokens, with_entropy=True)
    assert_equal(logp, trl_utils.selective_log_softmax(logits, tokens))
    assert_equal(entropy, trl_utils.entropy_from_logits(logits, chunk_size=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs TRL's kernel on CPU tensors")
def test_our_kernel_matches_trls_kernel():
    """Both Triton kernels, fp32, V larger than TRL's block of 1024."""
    logits, tokens = draw(2, 3, 1100, seed=56, scale=3.0).float(), tokens_below(1100, 2, 3, seed=57)
    up = draw(2, 3, seed=58).float()

    def scalar(logp, entropy):
        return (up * logp).sum() + (up.flip(-1) * entropy).sum()

    loss, grad = with_gradient(
        lambda x: scalar(*ppo.token_logprobs(x, tokens, temperature=0.9, with_entropy=True, backend="triton")), logits
    )
    peer_loss, peer_grad = with_gradient(lambda x: scalar(*trl_kernel(x, tokens, temperature=0.9)), logits)
    assert_equal(loss, peer_loss)
    assert_equal(grad, peer_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_of_a_masked_vocabulary_is_nan_as_in_trl(backend):
    """0 times -inf, in TRL's PyTorch path: NaN entropy, and NaN in the whole row of the gradient.

    Logits 0, 0, -inf: log 2 nats, and by symmetry no gradient.
    """
    logits, tokens = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0])
    entropy, grad = with_gradient(
        lambda x: ppo.token_logprobs(x, tokens, with_entropy=True, backend=backend)[1].sum(), logits
    )
    assert entropy.item() == pytest.approx(0.6931472, rel=1e-6)
    assert grad.tolist() == [[pytest.approx(0, abs=1e-7)] * 3]
    peer, peer_grad = with_gradient(lambda x: trl_utils.entropy_from_logits(x).sum(), logits)
    assert peer.isnan()
    assert peer_grad.isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs TRL's kernel on CPU tensors")
def test_our_kernel_gives_nan_for_one_minus_infinity_as_trls_kernel_does():
    logits, tokens = draw(1, 2, 50, seed=59).float(), torch.tensor([[3, 4]])
    logits[0, 0, 7] = -torch.inf
    truth = torch.distributions.Categorical(logits=logits[0, 0, logits[0, 0].isfinite()].double()).entropy()
    _, entropy = ppo.token_logprobs(logits, tokens, with_entropy=True, backend="triton")
    assert_equal(entropy[0, 0], truth)
    assert trl_kernel(logits, tokens)[1][0, 0].isnan()


def linear_case(mask):
    hidden, weight, bias = draw(B, T, D, seed=60).float(), draw(V, D, seed=61).float(), draw(V, seed=62).float()
    return torch.where(mask.unsqueeze(-1), hidden, torch.nan), hidden, weight, bias, tokens_below(V, B, T, seed=63)


def outputs_and_gradients(function, mask, *leaves):
    """Both outputs where counted, and the gradients of all leaves for random upstream gradients."""
    up, up_entropy = draw(B, T, seed=64).float(), draw(B, T, seed=65).float()
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    logp, entropy = (x.view(B, T) for x in function(*leaves))
    scalar = (up * logp)[mask].sum() + (up_entropy * entropy)[mask].sum()
    return logp.detach()[mask], entropy.detach()[mask], *torch.autograd.grad(scalar, leaves)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linear_logprobs_match_trls_chunked_function(mask, temperature, softcap):
    """Switches: TRL takes rows [N, D] and has no mask; final_logit_softcapping is our softcap. Both in fp32."""
    poisoned, hidden, weight, bias, tokens = linear_case(mask)
    ours = outputs_and_gradients(
        lambda h, w, b: ppo.linear_logprobs(
            h, w, tokens, mask, bias=b, temperature=temperature, softcap=softcap, logit_scale=1.5, with_entropy=True
        ),
        mask,
        *(poisoned, weight, bias),
    )
    theirs = outputs_and_gradients(
        lambda h, w, b: ChunkedLogProbFunction.apply(
            h.flatten(0, 1), w, b, tokens.flatten(), temperature, 32, softcap, 1.5, ("entropy",)
        )[:2],
        mask,
        *(hidden, weight, bias),
    )
    names = ("logprobs", "entropy", "d hidden", "d weight", "d bias")
    for name, x, y in zip(names, ours, theirs, strict=True):
        assert_equal(x, y, name, atol=5e-5)


def test_minus_infinity_in_the_bias_gives_nan_entropy_as_in_trls_chunked_function():
    """A padded vocabulary masked through the bias; the truth is the entropy over the other tokens."""
    mask = MASKS["full"]
    _, hidden, weight, bias, tokens = linear_case(mask)
    bias[40:] = -torch.inf
    tokens %= 40
    _, entropy = ppo.linear_logprobs(hidden, weight, tokens, bias=bias, with_entropy=True)
    kept = hidden.double() @ weight[:40].double().T + bias[:40].double()
    assert_equal(entropy, torch.distributions.Categorical(logits=kept).entropy(), atol=2e-5)
    peer = ChunkedLogProbFunction.apply(hidden.flatten(0, 1), weight, bias, tokens.flatten(), 1.0, 64)[1]
    assert peer.isnan().all()
