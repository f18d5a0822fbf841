"""The public operations: documented examples run, and each bad argument is named with what was expected."""

import doctest
import math

import pytest
import torch

import ppo_fast as ppo
from ppo_fast.kernels.common import launch
from ppo_fast.llm import config, data
from ppo_fast.ops import advantages, linear, logprobs, losses

F = torch.zeros(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
LOGITS = torch.zeros(2, 3, 5)
TOKENS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("module", [advantages, linear, logprobs, losses, config, data], ids=lambda m: m.__name__)
def test_documented_examples_give_the_documented_results(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_operation_documents_an_example_arguments_and_source():
    for name in ppo.__all__:
        assert getattr(ppo, name).__doc__, name
    for name in (name for name in ppo.__all__ if name[0].islower()):
        assert ">>>" in getattr(ppo, name).__doc__, name
        assert "Args:" in getattr(ppo, name).__doc__, name


def loss(**changes):
    given = dict(logprobs=F, old_logprobs=F, advantages=F, mask=MASK)
    return ppo.policy_loss(**{**given, **changes})


def reward(**changes):
    given = dict(scores=torch.zeros(2), logprobs=F, ref_logprobs=F, mask=MASK)
    return ppo.shape_rewards(**{**given, **changes})


CU = torch.tensor([0, 2, 6])
FLAT = torch.zeros(6)

BAD = {
    "integer logits": (lambda: ppo.token_logprobs(LOGITS.long(), TOKENS), TypeError, "logits must be floating point"),
    "a number for logits": (lambda: ppo.token_logprobs(3.0, TOKENS), TypeError, "logits must be a tensor, got float"),
    "no vocabulary": (lambda: ppo.token_logprobs(LOGITS[..., :0], TOKENS), ValueError, "with V > 0"),
    "float tokens": (lambda: ppo.token_logprobs(LOGITS, F), TypeError, "tokens must be an int32 or int64 tensor"),
    "tokens of another shape": (
        lambda: ppo.token_logprobs(LOGITS, TOKENS[:1]),
        ValueError,
        r"tokens must have the shape of logits without its last dimension, \(2, 3\); got \(1, 3\)",
    ),
    "token beyond V": (lambda: ppo.token_logprobs(LOGITS, TOKENS + 5), IndexError, r"must be in \[0, 5\).*got 5"),
    "negative token": (lambda: ppo.token_logprobs(LOGITS, TOKENS - 100), IndexError, "got -100"),
    "temperature 0": (lambda: ppo.token_logprobs(LOGITS, TOKENS, temperature=0.0), ValueError, "positive, got 0.0"),
    "temperature nan": (lambda: ppo.token_logprobs(LOGITS, TOKENS, temperature=float("nan")), ValueError, "positive"),
    "another device": (
        lambda: ppo.token_logprobs(LOGITS, TOKENS.to("meta")),
        ValueError,
        "tokens must be on the device of logits.*, cpu; got meta",
    ),
    "unknown backend": (lambda: ppo.token_logprobs(LOGITS, TOKENS, backend="cuda"), ValueError, "auto, triton, torch"),
    "mask with other numbers": (lambda: loss(mask=F + 2), ValueError, "mask must be bool, or hold only 0 and 1"),
    "mask of another shape": (lambda: loss(mask=MASK[:, :2]), ValueError, r"mask must have the shape of logprobs"),
    "mask a list": (lambda: loss(mask=[True]), TypeError, "mask must be a bool tensor, got list"),
    "advantages per sequence": (lambda: loss(advantages=F[:, 0]), ValueError, r"advantages must have the shape"),
    "integer advantages": (lambda: loss(advantages=TOKENS), TypeError, "advantages must be floating point"),
    "entropy_coef alone": (lambda: loss(entropy_coef=0.1), ValueError, "entropy_coef=0.1 needs entropy"),
    "kl_coef alone": (lambda: loss(kl_coef=0.1), ValueError, "kl_coef=0.1 needs ref_logprobs"),
    "unknown aggregation": (lambda: loss(aggregation="mean"), ValueError, "aggregation must be one of token-mean"),
    "unknown estimator": (lambda: loss(kl_estimator="k4"), ValueError, "kl_estimator must be one of k1, k2, k3, abs"),
    "dual clip of 1": (lambda: loss(dual_clip=1.0), ValueError, "dual_clip must be greater than 1"),
    "clip_low above 1": (lambda: loss(clip_low=1.2), ValueError, r"clip_low must be in \[0, 1\]"),
    "negative clip_high": (lambda: loss(clip_high=-0.1), ValueError, "clip_high must not be negative"),
    "denominator 0": (lambda: loss(denominator=0.0), ValueError, "denominator must be at least 1"),
    "denominator a vector": (lambda: loss(denominator=torch.ones(2)), ValueError, "0-dim tensor"),
    "denominator of a sum": (lambda: loss(denominator=2.0, aggregation="token-sum"), ValueError, "no meaning"),
    "norm_length elsewhere": (lambda: loss(norm_length=3.0), ValueError, "norm_length belongs to"),
    "norm_length missing": (
        lambda: ppo.policy_loss(FLAT, FLAT, FLAT, cu_seqlens=CU, aggregation="seq-mean-token-sum-norm"),
        ValueError,
        "needs norm_length when cu_seqlens is given",
    ),
    "value clip alone": (lambda: ppo.value_loss(F, None, F), ValueError, "needs old_values, which is None"),
    "gamma above 1": (lambda: ppo.gae(F, F, gamma=1.1), ValueError, r"gamma must be in \[0, 1\], got 1.1"),
    "lam below 0": (lambda: ppo.gae(F, F, lam=torch.tensor([0.5, -0.5])), ValueError, r"lam must be in \[0, 1\]"),
    "gamma for each step": (lambda: ppo.gae(F, F, gamma=torch.ones(3)), ValueError, "gamma must have the shape"),
    "truncated alone": (lambda: ppo.gae(F, F, truncated=MASK), ValueError, "truncated needs final_values"),
    "bootstrap [B, 1]": (lambda: ppo.gae(F, F, bootstrap=F[:, :1]), ValueError, "bootstrap must have the shape"),
    "cu_seqlens not from 0": (lambda: ppo.gae(FLAT, FLAT, cu_seqlens=CU + 1), ValueError, "must start at 0, got 1"),
    "cu_seqlens too short": (lambda: ppo.gae(FLAT, FLAT, cu_seqlens=CU[:2]), ValueError, "must end at 6"),
    "cu_seqlens falling": (
        lambda: ppo.gae(FLAT, FLAT, cu_seqlens=torch.tensor([0, 4, 2, 6])),
        ValueError,
        "must not fall",
    ),
    "cu_seqlens of floats": (lambda: ppo.gae(FLAT, FLAT, cu_seqlens=CU.float()), TypeError, "int32 or int64"),
    "cu_seqlens with rows": (lambda: ppo.gae(F, F, cu_seqlens=CU), ValueError, "one dimension when cu_seqlens"),
    "time-major and packed": (lambda: ppo.gae(FLAT, FLAT, cu_seqlens=CU, time_major=True), ValueError, "exclude"),
    "rewards a scalar": (lambda: ppo.gae(F[0, 0], F[0, 0]), ValueError, "at least one dimension"),
    "scores of other shape": (lambda: reward(scores=torch.zeros(3)), ValueError, r"scores must have shape \[B\] or"),
    "no mask for rewards": (lambda: reward(mask=None), TypeError, "mask must be a bool tensor"),
    "token scores after the end": (lambda: reward(scores=F, reward_at="after_last"), ValueError, "one score for each"),
    "negative eps": (lambda: ppo.masked_whiten(F, MASK, eps=-1.0), ValueError, "eps must not be negative"),
    "negative min_std": (lambda: ppo.masked_whiten(F, MASK, min_std=-1.0), ValueError, "min_std must be a finite"),
    "infinite min_std": (lambda: ppo.masked_whiten(F, min_std=torch.inf), ValueError, "not negative, got inf"),
    "min_std NaN in a tensor": (
        lambda: ppo.rlhf_advantages(torch.zeros(2), F, F, F, MASK, min_std=torch.tensor(torch.nan)),
        ValueError,
        "min_std must be a finite number and not negative, got nan",
    ),
    "min_std for each row": (lambda: ppo.masked_whiten(F, min_std=torch.ones(2)), ValueError, r"0-dim.*\(2,\)"),
    "min_std an integer": (lambda: ppo.masked_whiten(F, min_std=torch.tensor(1)), TypeError, "min_std must be float"),
    "critic_lam above 1": (
        lambda: ppo.rlhf_advantages(torch.zeros(2), F, F, F, MASK, critic_lam=1.5),
        ValueError,
        r"critic_lam must be in \[0, 1\], got 1.5",
    ),
    "critic_lam NaN": (
        lambda: ppo.rlhf_advantages(torch.zeros(2), F, F, F, MASK, critic_lam=torch.tensor([0.5, torch.nan])),
        ValueError,
        r"critic_lam must be in \[0, 1\]",
    ),
    "critic_lam for each step": (
        lambda: ppo.rlhf_advantages(torch.zeros(2), F, F, F, MASK, critic_lam=torch.ones(3)),
        ValueError,
        "critic_lam must have the shape of the rows",
    ),
    "values per sequence": (
        lambda: ppo.rlhf_advantages(torch.zeros(2), F, F, F[:, 0], MASK),
        ValueError,
        "values must have the shape of logprobs",
    ),
    "weight of another width": (
        lambda: ppo.linear_logprobs(F, torch.zeros(5, 4), TOKENS[:, 0]),
        ValueError,
        r"hidden must have shape \[..., D\] and weight \[V, D\]",
    ),
    "weight of another dtype": (
        lambda: ppo.linear_logprobs(F, torch.zeros(5, 3).half(), TOKENS[:, 0]),
        TypeError,
        "must have one dtype",
    ),
    "token beyond the head": (
        lambda: ppo.linear_ppo_loss(F, torch.zeros(5, 3), TOKENS[:, 0] + 7, None, F[:, 0]),
        IndexError,
        r"must be in \[0, 5\).*got 7",
    ),
    "wrong number of counted tokens": (
        lambda: ppo.linear_logprobs(F, torch.zeros(5, 3), TOKENS[:, 0], MASK[:, 0], num_counted=1),
        ValueError,
        "num_counted must be the number of counted tokens, 2; got 1",
    ),
    "fp64 for Triton": (
        lambda: ppo.token_logprobs(LOGITS.double(), TOKENS, backend="triton"),
        TypeError,
        "takes no fp64 tensors",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_argument_is_named_with_what_was_expected(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_triton_on_a_cpu_without_the_interpreter_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors, got cpu; use backend='torch'"):
        ppo.token_logprobs(LOGITS, TOKENS, backend="triton")


def test_a_mask_of_zeros_and_ones_counts_like_a_bool_one():
    x = torch.randn(2, 3)
    ones = torch.tensor([[1, 0, 1], [0, 1, 1]])
    for mask in (ones, ones.float(), ones.to(torch.uint8)):
        assert torch.equal(ppo.masked_whiten(x, mask), ppo.masked_whiten(x, ones.bool()))


def test_a_token_outside_the_vocabulary_is_allowed_where_masked():
    tokens = torch.tensor([[0, 1, -100], [2, -100, 99]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert ppo.token_logprobs(LOGITS, tokens, mask)[~mask].eq(0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, 1e60, 1e-39])
def test_a_temperature_that_fp32_cannot_invert_is_rejected(temperature):
    for call in (
        lambda: ppo.token_logprobs(LOGITS, TOKENS, temperature=temperature),
        lambda: ppo.linear_logprobs(
            torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3).long(), temperature=temperature
        ),
    ):
        with pytest.raises(ValueError, match="temperature must"):
            call()


def test_a_wrong_tensor_is_named_before_a_mask_that_has_the_shape_of_the_others():
    right, wrong, mask = torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="old_logprobs must have the shape of logprobs"):
        ppo.policy_loss(wrong, right, right, mask)
    with pytest.raises(ValueError, match="returns must have the shape of values"):
        ppo.value_loss(wrong, None, right, mask, clip=None)
    with pytest.raises(ValueError, match="value_mask must have the shape of values"):
        ppo.ppo_loss(right, right, right, right, right, right, mask, value_mask=torch.ones(2, 4, dtype=torch.bool))
