"""TRL with our functions instead of its own: the same numbers, and the same GRPO run."""

import re

import pytest
import torch
from oracles.cases import B, T, assert_equal, draw, tokens_below, with_gradient

MISSING = "trl is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("trl", reason=MISSING)

import trl.trainer.grpo_trainer as grpo  # noqa: E402
from support.tiny import byte_tokenizer, save_tiny_model  # noqa: E402
from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

from ppo_fast.examples import with_trl  # noqa: E402
from ppo_fast.integrations import trl as fast  # noqa: E402

V = 31


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_logprobs_entropy_and_gradients_match(temperature, masked):
    logits, index = draw(B, T, V, seed=1, scale=3), tokens_below(V, B, T, seed=2)
    up, up_entropy = draw(B, T, seed=3), draw(B, T, seed=4)
    options = {"temperature": temperature, "row_mask": (draw(B, T, seed=5) > 0).long() if masked else None}

    def both(functions, entropy_requires_grad):
        def total(x):
            found = functions.selective_log_softmax_and_entropy(x, index, entropy_requires_grad, **options)
            assert found[1].requires_grad == (entropy_requires_grad and x.requires_grad)
            return (found[0] * up + found[1] * up_entropy).sum()

        return with_gradient(total, logits)

    for requires_grad in (True, False):
        for theirs, ours in zip(both(utils, requires_grad), both(fast, requires_grad), strict=True):
            assert_equal(ours, theirs)
    for functions in (utils, fast):
        value = functions.selective_log_softmax(logits, index, **options)
        assert_equal(value, utils.selective_log_softmax_and_entropy(logits, index, **options)[0])
    assert_equal(fast.entropy_from_logits(logits), utils.entropy_from_logits(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_trl(dtype):
    logits, index = draw(B, T, V, seed=1).to(dtype), tokens_below(V, B, T, seed=2)
    for name, rest in (("selective_log_softmax", (index,)), ("entropy_from_logits", ())):
        theirs, ours = (getattr(functions, name)(logits, *rest) for functions in (utils, fast))
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).abs().max() < {torch.float32: 1e-5}.get(dtype, 0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_nearer_to_fp64_than_trls(dtype, temperature):
    """What trl.py's docstring states: root mean square errors with 32 000 logits, of results in the logits' dtype."""
    logits, index = draw(64, 32_000, seed=6, scale=3).to(dtype), tokens_below(32_000, 64, seed=7)
    up, up_entropy = draw(64, seed=8), draw(64, seed=9)

    def in_fp64(x, index, *, temperature):
        logprobs = (x / temperature).log_softmax(-1)
        return logprobs.gather(-1, index.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)

    def found(function, x):
        x = x.clone().requires_grad_()
        logprobs, entropy = function(x, index, temperature=temperature)
        total = (logprobs * up.to(x.dtype)).sum() + (entropy * up_entropy.to(x.dtype)).sum()
        return logprobs.detach(), entropy.detach(), torch.autograd.grad(total, x)[0]

    truth = found(in_fp64, logits.double())
    errors = [
        [
            (x.double() - exact).square().mean().sqrt().item()
            for x, exact in zip(found(function, logits), truth, strict=True)
        ]
        for function in (utils.selective_log_softmax_and_entropy, fast.selective_log_softmax_and_entropy)
    ]
    logprobs, entropy, gradient = (theirs / ours for theirs, ours in zip(*errors, strict=True))
    assert 0.95 < logprobs < 1.2
    assert 2 < entropy < 10
    assert 2 < gradient < 10


def test_several_indices_for_each_row_match():
    logits, index = draw(B, T, V, seed=1), tokens_below(V, B, T, 4, seed=2)
    assert torch.equal(fast.selective_log_softmax(logits, index), utils.selective_log_softmax(logits, index))
    with fast.patch(quiet=True):
        assert torch.equal(utils.selective_log_softmax(logits, index), fast.selective_log_softmax(logits, index))


def test_whitening_matches_trls_formula():
    x, mask = draw(B, T, seed=6), draw(B, T, seed=7) > 0
    counted = x[mask]
    expected = (counted - counted.mean()) * torch.rsqrt(counted.var() + 1e-8)
    assert_equal(fast.masked_whiten(x, mask)[mask], expected)
    assert_equal(fast.masked_whiten(x, mask, shift_mean=False)[mask], expected + counted.mean())
    with pytest.raises(ValueError, match="needs two elements"):
        fast.masked_whiten(x, torch.zeros_like(mask))


@pytest.mark.parametrize("outputs", [(), ("log_probs", "entropy"), ("entropy", "is_top1")])
def test_the_fused_head_matches_trl(outputs):
    hidden, weight, bias = draw(B, 8, seed=1).float(), draw(V, 8, seed=2).float(), draw(V, seed=3).float()
    targets, up = tokens_below(V, B, seed=4), draw(B, seed=5).float()

    def found(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        values = function.apply(*leaves, targets, 0.7, 16, 5.0, 1.5, outputs)
        total = (values[0] * up).sum() + (values[1].sum() if "entropy" in outputs else 0)
        return *values, *torch.autograd.grad(total, leaves)

    for theirs, ours in zip(found(ChunkedLogProbFunction), found(fast.ChunkedLogProbFunction), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_equal(ours.double(), theirs.double(), atol=1e-5)


def grpo_losses(tmp_path) -> list[float]:
    from datasets import Dataset

    torch.manual_seed(0)
    options = grpo.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        beta=0.1,
        use_cpu=True,
        seed=0,
        report_to=[],
        save_strategy="no",
        bf16=False,
    )
    trainer = grpo.GRPOTrainer(
        model=str(save_tiny_model(tmp_path / "model")),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=options,
        train_dataset=Dataset.from_dict({"prompt": ["hi", "what", "a fox", "no"] * 4}),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_grpo_run_has_the_same_loss_curve_with_the_patch(tmp_path, monkeypatch):
    calls = []
    plain = grpo_losses(tmp_path)
    original = fast.ppo.linear_logprobs
    monkeypatch.setattr(fast.ppo, "linear_logprobs", lambda *a, **k: calls.append(1) or original(*a, **k))
    with fast.patch(quiet=True):
        patched = grpo_losses(tmp_path)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert calls, "the trainer never called us"
    assert len(plain) == 4
    assert patched == pytest.approx(plain, abs=2e-4)


def test_the_example_runs_and_learns_the_same_with_the_patch(capsys):
    found = []
    for options in ([], ["--plain"]):
        assert with_trl.main(["--steps", "12", *options]) == 0
        output = capsys.readouterr().out
        assert ("ppo_fast: in trl 1.16" in output) == (not options)
        found.append(re.findall(r"([\d.]+) in the (?:first|last) 5", output))
    assert found[0] == found[1]
    assert float(found[0][1]) > float(found[0][0])
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction, "the example left its patch"
