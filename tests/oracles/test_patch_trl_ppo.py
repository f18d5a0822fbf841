"""TRL 1.12, the last release with a PPOTrainer, with our functions instead of its own: the same training.

TRL 1.16 and 1.12 exclude each other. Into a folder of its own, beside the environment of peers.txt:

    pip install --no-deps --target /path/to/trl112 trl==1.12.0
    PYTHONPATH=/path/to/trl112 python -m pytest tests/oracles/test_patch_trl_ppo.py
"""

import copy

import numpy as np
import pytest
import torch
from oracles.cases import B, assert_equal, draw, tokens_below

MISSING = "TRL 1.12 is not installed; this file's first lines say how"
pytest.importorskip("trl", reason=MISSING)
pytest.importorskip("trl.experimental.ppo", reason=MISSING)

import against_trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from support.tiny import byte_tokenizer, tiny_llama  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaForSequenceClassification, TrainerCallback  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from ppo_fast.integrations import trl as fast  # noqa: E402

PROMPT = against_trl.PROMPT  # its reward wants prompts of this length


def critic_of(actor):
    critic = LlamaForSequenceClassification(copy.deepcopy(actor.config))
    critic.score = nn.Linear(actor.config.hidden_size, 1)
    critic.model.load_state_dict(actor.model.state_dict())
    torch.manual_seed(1)
    nn.init.normal_(critic.score.weight, std=0.1)
    return critic


def training(folder, **options) -> list[dict[str, float]]:
    """What PPOTrainer logs in three steps. SGD, since Adam makes whole steps of gradients that are mere rounding."""
    rows = []

    class Notes(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            rows.append({key: value for key, value in logs.items() if key != "eps"})  # that is a speed

    actor = tiny_llama()
    with torch.no_grad():
        for weight in actor.parameters():
            weight.mul_(3)
    prompts = {"input_ids": tokens_below(250, 16, PROMPT, seed=1).tolist()}
    config = PPOConfig(
        output_dir=str(folder),
        total_episodes=24,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_mini_batches=1,
        num_ppo_epochs=2,
        response_length=6,
        stop_token="eos",
        missing_eos_penalty=0.5,
        optim="sgd",
        learning_rate=0.05,
        kl_coef=0.1,
        temperature=0.9,
        report_to=[],
        logging_steps=1,
        num_sample_generations=0,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=byte_tokenizer(),
        model=actor,
        ref_model=tiny_llama(seed=2),
        reward_model=against_trl.EvenReward(),
        value_model=critic_of(actor),
        train_dataset=Dataset.from_dict(prompts),
        eval_dataset=Dataset.from_dict(prompts),
        callbacks=[Notes()],
    )
    np.random.seed(0)  # TRL draws its minibatches from it, and does not seed it
    trainer.train()
    return [row for row in rows if "loss/policy_avg" in row]


@pytest.mark.parametrize("options", [{}, {"whiten_rewards": True, "kl_estimator": "k3"}], ids=["plain", "whiten"])
def test_ppo_has_the_same_metrics_with_the_patch(tmp_path, monkeypatch, options):
    calls = {"token_logprobs": 0, "masked_whiten": 0}
    for name in calls:
        original = getattr(fast.ppo, name)

        def count(*a, _name=name, _of=original, **k):
            calls[_name] += 1
            return _of(*a, **k)

        monkeypatch.setattr(fast.ppo, name, count)
    plain = training(tmp_path / "plain", **options)
    assert not any(calls.values())
    with fast.patch(quiet=True):
        patched = training(tmp_path / "patched", **options)
    assert calls["token_logprobs"] == 3 * (2 + 2 * 2)  # rollout: policy and reference; two epochs of two micro-batches
    assert calls["masked_whiten"] == 3 * (1 + len(options) // 2)
    assert len(plain) == len(patched) == 3
    assert plain[2]["policy/approxkl_avg"] > 1e-4, "nothing was learned that could differ"
    for before, after in zip(plain, patched, strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-4)


def queries() -> torch.Tensor:
    ids = tokens_below(250, 3, 14, seed=5)
    ids[1, :4], ids[2, -3:] = 257, 257  # padding in front of a prompt, and behind an answer
    return ids


@pytest.mark.parametrize("with_critic", [False, True])
def test_forward_matches_and_makes_no_logits_of_prompts(with_critic, monkeypatch):
    actor = tiny_llama(seed=3)
    model = ppo_trainer.PolicyAndValueWrapper(actor, critic_of(actor)) if with_critic else actor
    rows = []
    actor.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))

    def found(function):
        out = function(model, queries(), 257)
        output, values = out if with_critic else (out, torch.zeros(3, 14, 1))
        logits = output.logits[:, 8:-1]
        total = logits.square().sum() + values[:, 8:-1].sum()
        gradients = torch.autograd.grad(total, list(actor.model.parameters()))
        mask = (queries() != 257)[:, 8:-1]
        return logits[mask], values[:, 8:-1][mask], *gradients

    theirs = found(ppo_trainer.forward)
    with fast.patch(quiet=True):
        found(ppo_trainer.forward)
        rows.clear()
        ours = found(ppo_trainer.forward)
    assert rows == [5]
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["scaled", "wrapped", "head"])
def test_a_model_that_does_more_keeps_its_own_forward(what):
    actor = tiny_llama(seed=3)
    if what == "scaled":
        actor.register_forward_hook(lambda module, inputs, out: setattr(out, "logits", 2 * out.logits))
    elif what == "wrapped":
        own = actor.forward
        actor.forward = lambda *a, **k: own(*a, **k)  # as accelerate does for mixed precision
    else:
        actor.lm_head = nn.Sequential(actor.lm_head, nn.Tanh())
    expected = ppo_trainer.forward(actor, queries(), 257).logits[:, 8:-1]
    with fast.patch(quiet=True):
        output = ppo_trainer.forward(actor, queries(), 257)
    assert isinstance(output.logits, torch.Tensor), "computed otherwise"
    assert torch.equal(output.logits[:, 8:-1], expected)


def test_the_fused_head_matches_with_the_same_number_of_results():
    hidden, weight = draw(B, 8, seed=1).float(), draw(31, 8, seed=2).float()
    targets, up = tokens_below(31, B, seed=3), draw(B, seed=4).float()

    def found(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        logprobs, entropy = function.apply(*leaves, targets, 0.7, 16, 5.0, 1.5)
        return logprobs, entropy, *torch.autograd.grad((logprobs * up).sum() + entropy.sum(), leaves)

    theirs = found(utils._ChunkedLogProbFunction)
    with fast.patch(quiet=True):
        assert utils._ChunkedLogProbFunction is fast.ChunkedLogProbFunction112
        ours = found(utils._ChunkedLogProbFunction)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a.double(), b.double(), atol=1e-5)


def test_logprobs_entropies_and_whitening_match():
    logits, index = draw(3, 9, 31, seed=1, scale=3).float()[:, 2:-1], tokens_below(31, 3, 6, seed=2)
    x, mask = draw(3, 6, seed=3), draw(3, 6, seed=4) > 0
    before = (
        utils.selective_log_softmax(logits, index),
        utils.entropy_from_logits(logits),
        ppo_trainer.masked_whiten(x, mask)[mask],
        ppo_trainer.masked_whiten(x, mask, shift_mean=False)[mask],
    )
    with fast.patch(quiet=True):
        assert ppo_trainer.selective_log_softmax is fast.selective_log_softmax
        after = (
            ppo_trainer.selective_log_softmax(logits, index),
            utils.entropy_from_logits(logits),
            ppo_trainer.masked_whiten(x, mask)[mask],
            ppo_trainer.masked_whiten(x, mask, shift_mean=False)[mask],
        )
    for ours, theirs in zip(after, before, strict=True):
        assert_equal(ours, theirs)
    assert ppo_trainer.selective_log_softmax is utils.selective_log_softmax is not fast.selective_log_softmax
