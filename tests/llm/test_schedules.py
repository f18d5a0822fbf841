"""Learning rates, target_kl and controllers: they follow PPO steps, however many updates a step makes."""

import itertools

import pytest
import torch
from support.tiny import byte_tokenizer, tiny_llama

from ppo_fast.common.errors import UserError
from ppo_fast.llm.checks import notes_on_sampling
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.optimizer import rate_of_step
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": "ab"}, {"prompt": "hello"}]


def letters(prompts, completions):
    return [float(len(set(text))) for text in completions]


def trainer_of(**options) -> PPOTrainer:
    small = {"total_steps": 4, "prompts_per_step": 4, "minibatches": 2, "epochs": 2, "max_new_tokens": 8}
    quiet = {"quiet": True, "device": "cpu", "tensorboard": False, "show_samples_every": 0}
    return PPOTrainer(PPOConfig(**small | quiet | options), tiny_llama(258), byte_tokenizer(), ROWS, letters)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("total", "first"), [(1, 0), (8, 0), (8, 3)])
def test_no_step_has_the_rate_0_and_the_schedule_ends_one_step_after_the_last(schedule, warmup, total, first):
    config = PPOConfig(total_steps=total, lr_schedule=schedule, warmup_ratio=warmup)
    rates = [rate_of_step(config, step, first=first) for step in range(first, total)]
    assert all(0 < rate <= 1 for rate in rates)
    rising = round(warmup * (total - first))
    assert rates[:rising] == [(i + 1) / (rising + 1) for i in range(rising)]
    if rising < len(rates):
        assert rates[rising] == 1
        assert rates[rising:] == sorted(rates[rising:], reverse=True)
        end = rate_of_step(config, total, first=first)
        assert end == (1 if schedule == "constant" else pytest.approx(0, abs=1e-12))


def test_values_of_a_cosine():
    config = PPOConfig(total_steps=4, lr_schedule="cosine", warmup_ratio=0.0)
    expected = [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    assert [rate_of_step(config, step) for step in range(4)] == pytest.approx(expected)


def test_the_rate_of_a_step_depends_on_no_number_of_updates():
    """Of critic warm-up, of target_kl and of epochs: the last step has the last rate in every run."""
    plain = [trainer.step()["lr"] for trainer in [trainer_of(warmup_ratio=0.0, lr=1e-3)] for _ in range(4)]
    assert plain == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    stopped = trainer_of(warmup_ratio=0.0, lr=3e-2, target_kl=1e-9, epochs=3)
    found = [stopped.step() for _ in range(4)]
    assert [m["lr"] for m in found] == pytest.approx([30 * x for x in plain])
    assert all(m["updates"] < 6 for m in found)


def test_the_actor_schedule_begins_when_the_actor_begins_to_learn():
    trainer = trainer_of(total_steps=5, critic_warmup_steps=2, warmup_ratio=0.34, lr=1e-3, critic_lr=1e-3)
    found = [trainer.step() for _ in range(5)]
    assert [m["lr"] for m in found] == pytest.approx([0, 0, 0.5e-3, 1e-3, 0.5e-3])
    assert [m["critic_lr"] for m in found] == pytest.approx([x * 1e-3 for x in (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)])


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_target_kl_stops_the_actor_alone(critic):
    trainer = trainer_of(target_kl=1e-4, lr=3e-2, lr_schedule="constant", critic=critic, epochs=3)
    updates = {"actor": 0, "critic": 0}
    for name, optimizer in (("actor", trainer.learner.optimizers.actor), ("critic", trainer.learner.optimizers.critic)):
        step = optimizer.step

        def counted(name=name, step=step):
            updates[name] += 1
            step()

        optimizer.step = counted
    metrics = trainer.step()
    assert updates["critic"] == 6
    assert 1 <= updates["actor"] < 6
    assert metrics["updates"] == updates["actor"]
    assert all(p.grad is None for p in trainer.policy.parameters())


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_after_the_stop_the_actor_stays_as_it_is_and_the_critic_learns(monkeypatch, critic):
    trainer = trainer_of(target_kl=1e-9, lr=3e-2, epochs=4, minibatches=1, critic=critic)
    start, actors, critics = snapshot(trainer.actor), [], []
    step = trainer.learner.optimizers.critic.step

    def watched():
        step()
        actors.append(snapshot(trainer.actor))
        critics.append(snapshot(trainer.critic))

    monkeypatch.setattr(trainer.learner.optimizers.critic, "step", watched)
    assert trainer.step()["updates"] == 1
    assert changed(trainer.actor, start)
    assert all(torch.equal(actors[0][name], actors[-1][name]) for name in actors[0])
    for before, after in itertools.pairwise(critics):
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_critic_warm_up_computes_no_hidden_states_of_the_actor():
    trainer = trainer_of(critic_warmup_steps=1, epochs=2, minibatches=1)
    calls = []
    trainer.actor.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    sampled = trainer.sampler.sample

    def sample(prompts, params):
        answers = sampled(prompts, params)
        calls.clear()
        return answers

    trainer.sampler.sample = sample
    trainer.step()
    assert len(calls) == 1, "only the old log-probabilities need the actor"


def test_controllers_wait_for_the_actor():
    trainer = trainer_of(
        critic_warmup_steps=2, kl_controller="adaptive", kl_horizon=10.0, entropy_target=1.0, entropy_step=0.125
    )
    found = [trainer.step() for _ in range(4)]
    assert [m["kl_coef"] for m in found[:3]] == [0.05] * 3
    assert [m["entropy_coef"] for m in found[:3]] == [0.0] * 3
    assert trainer.learner.kl_controller.coef != 0.05
    assert found[3]["kl_coef"] != 0.05


def test_weight_decay_leaves_norms_and_biases_alone():
    """A huge epsilon stops Adam, so that decay alone moves the weights."""
    off = {"normalize_values": False, "lr_schedule": "constant", "warmup_ratio": 0}  # a rescale moves the head
    trainer = trainer_of(lr=0.5, critic_lr=0.5, weight_decay=0.5, adam_eps=1e12, **off)
    with torch.no_grad():
        trainer.critic.head.bias.fill_(1.0)
    before = snapshot(trainer.policy)
    trainer.step()
    for name, p in trainer.policy.named_parameters():
        factor = 0.75**4 if p.ndim > 1 else 1.0
        torch.testing.assert_close(p, before[name] * factor, rtol=1e-5, atol=1e-9, msg=name)


def test_adam_takes_its_constants_from_the_options():
    assert PPOConfig().adam_eps == 1e-8
    adamw = trainer_of(adam_eps=1e-3, adam_beta1=0.5, adam_beta2=0.75).learner.optimizers.actor.adamw
    assert (adamw.defaults["eps"], adamw.defaults["betas"]) == (1e-3, (0.5, 0.75))


def test_without_a_limit_gradients_are_not_clipped():
    """None leaves the gradient as it is; its norm is still recorded."""
    gradients = []
    for limit in (None, 1e-3):
        trainer = trainer_of(max_grad_norm=limit, epochs=1, minibatches=1)
        trainer.learner.optimizers.actor.step = lambda: None
        metrics = trainer.step()
        assert metrics["learn/grad_norm"] > 1e-2
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.actor.parameters()]).norm().item())
    assert gradients[0] == pytest.approx(metrics["learn/grad_norm"], rel=1e-4)
    assert gradients[1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["max_grad_norm", "score_clip", "importance_cap", "target_kl", "value_clip"])
def test_zero_is_rejected_where_none_switches_off(name):
    with pytest.raises(UserError, match=f"{name} must be above 0, got 0.*none switches it off"):
        PPOConfig(**{name: 0.0})
    assert getattr(PPOConfig(**{name: None}), name) is None


@pytest.mark.parametrize(
    "name",
    ["lr", "kl_coef", "temperature", "weight_decay", "value_coef", "clip_high", "target_kl", "missing_eos_penalty"],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400], ids=["inf", "nan", "10^400"])
def test_options_that_are_not_finite_are_rejected(name, value):
    with pytest.raises(UserError, match=f"{name} must be a finite number"):
        PPOConfig(**{name: value})


def test_a_seed_fits_every_generator():
    with pytest.raises(UserError, match=r"seed must be in \[0, 4294967295\], got 4294967296"):
        PPOConfig(seed=2**32)
    assert trainer_of(seed=2**32 - 1, total_steps=1).step()["step"] == 1


def test_truncated_sampling_is_reported():
    trainer = trainer_of(top_p=0.5, min_p=0.1)
    assert any("top_p = 0.5 and min_p = 0.1: answers are sampled from the likeliest tokens" in x for x in trainer.notes)
    assert not any("likeliest" in note for note in trainer_of().notes)
    assert (
        notes_on_sampling(PPOConfig(top_k=5), evaluated=True)[-1] == "held-out answers are sampled with top_k = 5, too"
    )
