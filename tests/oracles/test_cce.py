"""Apple's cut-cross-entropy 25.1.1 as an oracle for linear_logprobs: its PyTorch path, which a CPU can run."""

import pytest
import torch
from oracles.cases import MASKS, B, T, assert_equal, draw, tokens_below

import ppo_fast as ppo

MISSING = "cut-cross-entropy is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("cut_cross_entropy", reason=MISSING)

from cut_cross_entropy import linear_cross_entropy  # noqa: E402

D, V = 16, 67


def evaluate(function, *leaves):
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    logp = function(*leaves)
    up = draw(B, T, seed=90).float()
    return logp.detach(), *torch.autograd.grad((up * logp).sum(), leaves)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linear_logprobs_match_cut_cross_entropy(mask, softcap):
    """Switch: it returns -logp, takes -100 for a masked token, and has no temperature. Both in fp32, uncompiled."""
    hidden, weight = draw(B, T, D, seed=91).float(), draw(V, D, seed=92).float()
    tokens = tokens_below(V, B, T, seed=93)
    labels = tokens.masked_fill(~mask, -100)
    poisoned = torch.where(mask.unsqueeze(-1), hidden, torch.nan)
    ours = evaluate(lambda h, w: ppo.linear_logprobs(h, w, labels, mask, softcap=softcap), poisoned, weight)
    with torch.compiler.set_stance("force_eager"):
        theirs = evaluate(
            lambda h, w: -linear_cross_entropy(h, w, labels, softcap=softcap, reduction="none", impl="torch_compile"),
            *(hidden, weight),
        )
    for name, x, y in zip(("logprobs", "d hidden", "d weight"), ours, theirs, strict=True):
        assert_equal(x, y, name, atol=2e-5)
