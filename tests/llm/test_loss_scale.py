"""The loss scale of float16: the algorithm of PyTorch's GradScaler, updates that are skipped, and resuming."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='transformers is not installed: pip install "ppo_fast[train]"')

from support import several
from support.tiny import byte_tokenizer, distinct, tiny_llama
from torch import Tensor, nn

from ppo_fast.common.errors import NonFiniteError
from ppo_fast.llm import loss_scale
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.loss_scale import MAX_SKIPPED, START, LossScale
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps")]
SMALL: dict[str, Any] = dict(total_steps=2, prompts_per_step=4, max_new_tokens=6, minibatches=2, epochs=1, lr=1e-3)
SMALL |= dict(device="cpu", quiet=True, tensorboard=False, dtype="float16", lr_schedule="constant", warmup_ratio=0.0)


def trainer_of(**options: Any) -> PPOTrainer:
    config = PPOConfig(**{**SMALL, **options})
    return PPOTrainer(config, tiny_llama(258), byte_tokenizer(), ROWS, distinct)


def of_learning(metrics: dict[str, float]) -> dict[str, float]:
    return {
        k: v for k, v in metrics.items() if not k.startswith(("seconds", "tokens_per", "memory", "learn_tflops", "mfu"))
    }


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def test_the_scale_is_that_of_gradscaler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    scaler, scale = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=3), LossScale("float16")
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for factor in (1.0, math.inf, 2.0, 1.0, 3.0, math.nan, math.inf, 1.0, 1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((factor * parameter).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        parameter.grad = None
        scale.backward((factor * parameter).sum())
        scale.unscale([parameter])
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.full((2,), factor)) or not math.isfinite(factor)
        assert scale.overflows({"grad_norm": parameter.grad.norm().item()}) is not math.isfinite(factor)
        assert scale.scale == scaler.get_scale()


def test_without_float16_nothing_is_scaled():
    for dtype in ("float32", "bfloat16"):
        scale = LossScale(dtype)
        assert (scale.scale, scale.state_dict(), scale.overflows({"grad_norm": math.inf})) == (1.0, {}, False)


def test_small_gradients_survive_by_the_scale():
    parameter = nn.Parameter(torch.ones(2))
    scale = LossScale("float16")
    scale.backward((parameter.half().float() * 1e-9).sum())
    scale.unscale([parameter])
    torch.testing.assert_close(parameter.grad, torch.full((2,), 1e-9), rtol=1e-3, atol=0)
    parameter.grad = None
    (parameter.half().float() * 1e-9).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.abs().max() == 0


def test_a_step_in_float16_is_close_to_one_in_fp32():
    half, full = (trainer_of(dtype=dtype, minibatches=1) for dtype in ("float16", "float32"))
    found, expected = half.step(), full.step()
    assert half.notes != full.notes
    assert found["learn/ratio_max"] == 1.0
    assert found["learn/loss_scale"] == START
    assert found["learn/skipped"] == 0
    assert "learn/loss_scale" not in expected
    assert found["entropy"] == pytest.approx(expected["entropy"], rel=1e-3)
    assert found["sampler_gap_mean"] < 0.01
    assert found["updates"] == 1


def spoil(monkeypatch: pytest.MonkeyPatch, trainer: PPOTrainer, limit: float) -> None:
    """Gradients overflow at a loss scale above `limit`."""
    learner = trainer.learner
    backward = learner.loss_scale.backward

    def overflowing(loss: Tensor) -> None:
        backward(loss * (math.inf if learner.loss_scale.scale > limit else 1.0))

    monkeypatch.setattr(learner.loss_scale, "backward", overflowing)


def test_an_overflow_lowers_the_scale_and_makes_no_update(monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(epochs=2)
    spoil(monkeypatch, trainer, START / 8)
    before = weights(trainer)
    updates = []
    critic = trainer.learner.optimizers.critic
    step = critic.step
    monkeypatch.setattr(critic, "step", lambda: updates.append(step()))
    metrics = trainer.step()
    assert trainer.learner.loss_scale.scale == START / 8
    assert (len(updates), metrics["updates"], metrics["learn/skipped"]) == (1, 1, 0.75)
    assert metrics["learn/loss_scale"] == START * (1 + 1 / 2 + 1 / 4 + 1 / 8) / 4
    assert math.isfinite(metrics["learn/grad_norm"])
    after = weights(trainer)
    assert all(torch.isfinite(x).all() for x in after.values())
    assert any(not torch.equal(after[name], x) for name, x in before.items())


def test_a_step_whose_updates_are_all_skipped_changes_no_weight(monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of()
    spoil(monkeypatch, trainer, 0.0)
    before = weights(trainer)
    metrics = trainer.step()
    assert metrics["updates"] == 0
    assert metrics["learn/skipped"] == 1
    assert all(torch.equal(x, before[name]) for name, x in weights(trainer).items())
    assert all(p.grad is None for p in trainer.policy.parameters())


def test_updates_are_not_skipped_for_ever(monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(epochs=MAX_SKIPPED)
    spoil(monkeypatch, trainer, 0.0)
    expected = (
        rf"grad_norm overflowed in float16 in {MAX_SKIPPED + 1} updates in a row, the last with a loss scale of 1:"
    )
    with pytest.raises(NonFiniteError, match=expected):
        trainer.step()


def test_a_loss_that_is_not_finite_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of()
    with torch.no_grad():
        trainer.critic.head.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="nan"):
        trainer.step()


def test_a_resumed_run_has_the_scale_of_its_checkpoint(tmp_path: Path):
    def run(steps: int, out: Path | None = None) -> PPOTrainer:
        trainer = trainer_of(total_steps=steps, out=None if out is None else str(out), save_every=1)
        trainer.learner.loss_scale.scale /= 4
        return trainer

    whole = run(2)
    history = whole.train()
    first = run(1, tmp_path)
    first.train()
    again = trainer_of(out=str(tmp_path), save_every=1)
    assert again.resume()
    assert again.learner.loss_scale.state_dict() == first.learner.loss_scale.state_dict()
    assert again.learner.loss_scale.scale == START / 4
    assert of_learning(again.train()[0]) == of_learning(history[1])
    assert again.learner.loss_scale.state_dict() == whole.learner.loss_scale.state_dict()


def step_of_two(parallel: str) -> dict[str, float]:
    config = several.options(dtype="float16", parallel=parallel, total_steps=1)
    trainer = several.trainer_of(config, sampler=several.Fixed())
    trainer.learner.loss_scale.scale = 1024.0
    trainer.learner.loss_scale.backward = functools.partial(infinite_once, trainer.learner.loss_scale, [])
    return of_learning(trainer.step())


def infinite_once(scale: LossScale, calls: list[int], loss: Tensor) -> None:
    """Overflow in the gradient of the first pack of one process alone."""
    calls.append(1)
    factor = math.inf if len(calls) == 1 and torch.distributed.get_rank() == 1 else 1.0
    (loss * scale.scale * factor).backward()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_skip_an_update_together(tmp_path: Path, parallel: str):
    first, second = several.run(tmp_path, step_of_two, parallel)
    assert first == second
    assert first["learn/skipped"] == 1 / 4  # two minibatches in each of two epochs
    assert first["learn/loss_scale"] == 1024 * (1 + 3 / 2) / 4
    assert first["updates"] == 3
    assert math.isfinite(first["learn/grad_norm"])
