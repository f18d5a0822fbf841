"""Units of the critic: moving moments of returns, rescaling without a change of values, and the floor of whitening."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.learning import learner_of
from support.several import Fixed, assert_close, options, run
from support.several import trainer_of as trainer_of_several
from support.tiny import PROMPTS, byte_tokenizer, tiny_llama
from torch import Tensor

from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.experience import monte_carlo_returns
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.policy import packed_mode
from ppo_fast.llm.sharding import to_full_tensor
from ppo_fast.llm.trainer import PPOTrainer
from ppo_fast.llm.value_scale import FLOOR, FLOOR_OF_EQUAL, UNSCALED, ValueScale, moments_of

CPU = torch.device("cpu")
ROWS = [{"prompt": text} for text in PROMPTS]
CRITICS = ["own", "shared"]


def config(**changes) -> PPOConfig:
    small = dict(
        total_steps=4,
        prompts_per_step=6,
        max_new_tokens=7,
        minibatches=2,
        epochs=2,
        lr=1e-3,
        critic_lr=1e-2,
        lr_schedule="constant",
        warmup_ratio=0.0,
        quiet=True,
        device="cpu",
        tensorboard=False,
    )
    return PPOConfig(**{**small, **changes})


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [
        sum(c.isalpha() for c in text) / 4 + len(prompt) / 8 for prompt, text in zip(prompts, completions, strict=True)
    ]


def trainer_of(rewards: Callable = letters, critic_given: Critic | None = None, **changes) -> PPOTrainer:
    return PPOTrainer(config(**changes), tiny_llama(258), byte_tokenizer(), ROWS, rewards, critic=critic_given)


def scale_of(**changes) -> ValueScale:
    options = config(**changes)
    policy, _ = build_models(options, tiny_llama(258), None, None, CPU)
    return ValueScale(policy, learner_of(policy, options).optimizers.critic, options)


def all_counted(*rows: list[float]) -> tuple[Tensor, Tensor]:
    x = torch.tensor(rows)
    return x, torch.ones_like(x, dtype=torch.bool)


# The critic


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.7), (-250.0, 40.0), (1e-4, 2e-5)])
def test_no_value_changes_with_the_scale(mean, std):
    torch.manual_seed(0)
    critic, hidden = Critic(None, 64), torch.randn(100, 64)
    torch.nn.init.normal_(critic.head.weight)
    torch.nn.init.normal_(critic.head.bias)
    critic.rescale(mean, std)
    before = critic(hidden)
    critic.rescale(1.3 * mean, 0.4 * std)
    largest = max(before.abs().max().item(), abs(mean))  # V is a sum with the mean, which fp32 rounds
    assert (critic(hidden) - before).abs().max() <= 1e-6 * largest
    torch.testing.assert_close(critic.normalized(hidden), (before - 1.3 * mean) / (0.4 * std), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(critic.normalize(before), critic.normalized(hidden), rtol=1e-4, atol=1e-4)


def test_a_rescale_multiplies_the_gradient_of_the_head_by_k_and_that_of_its_input_by_the_square():
    """What the moments of Adam are multiplied by; the loss is 0.5 (v - (R - mu) / sigma)^2."""
    torch.manual_seed(0)
    critic, hidden = Critic(None, 8).double(), torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    critic.rescale(0.5, 2.0)
    torch.nn.init.normal_(critic.head.weight)
    returns, found = torch.randn(20, dtype=torch.float64), []

    def gradients() -> list[Tensor]:
        outputs = critic.head(hidden).squeeze(-1)
        loss = 0.5 * (outputs - critic.normalize(returns)).square().mean()
        return list(torch.autograd.grad(loss, [critic.head.weight, critic.head.bias, hidden]))

    found = [gradients()]
    k = critic.rescale(-1.0, 0.4)
    assert k == pytest.approx(5.0)
    found.append(gradients())
    for power, before, after in zip((1, 1, 2), *found, strict=True):
        torch.testing.assert_close(after, k**power * before, rtol=1e-5, atol=1e-6)


def test_the_moments_of_adam_follow_the_head_alone():
    trainer = trainer_of()
    trainer.step()
    scale, optimizer = trainer.learner.value_scale, trainer.learner.optimizers.critic
    before = copy.deepcopy(optimizer.state_dict())
    old_std = trainer.critic.value_std.item()
    scale.update(*all_counted([3.0, 1.0], [-9.0, 40.0]))
    k = old_std / trainer.critic.value_std.item()
    assert abs(k - 1) > 0.1
    for name, x in optimizer.state_dict().items():
        factor = {"exp_avg": k, "exp_avg_sq": k**2, "step": 1}[name.rsplit("/")[-1]] if name.startswith("head.") else 1
        torch.testing.assert_close(x, factor * before[name], rtol=1e-5, atol=0)


# The moments


def test_each_answer_has_the_same_weight():
    x = torch.tensor([[1.0, 5.0, 9.0], [7.0, 100.0, 100.0], [100.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    found = moments_of(x, mask, torch.float64)
    mean = (5.0 + 7.0) / 2
    assert found.mean.item() == pytest.approx(mean)
    assert found.variance.item() == pytest.approx(((25 + 1 + 9) / 3 + 1) / 2)


def test_the_moments_of_several_rollouts_are_weighted_averages_without_bias():
    scale = scale_of(value_scale_horizon=4.0)
    rollouts = [torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 9.0]]), torch.tensor([[-3.0, 0.0]])]
    for x in rollouts:
        scale.update(x, torch.ones_like(x, dtype=torch.bool))
    weights = torch.tensor([0.75**2, 0.75, 1.0])
    weights /= weights.sum()
    first = sum(w * x.mean() for w, x in zip(weights, rollouts, strict=True))
    second = sum(w * x.square().mean() for w, x in zip(weights, rollouts, strict=True))
    assert scale.critic.value_mean.item() == pytest.approx(first.item())
    assert scale.critic.value_std.item() == pytest.approx(math.sqrt(second - first**2), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.0])
def test_without_a_spread_of_returns_the_mean_is_theirs_and_the_std_is_one(value):
    scale = scale_of()
    scale.update(torch.full((3, 5), value), torch.ones(3, 5, dtype=torch.bool))
    assert scale.critic.value_mean.item() == torch.tensor(value).item()
    assert scale.critic.value_std.item() == 1.0


def test_monte_carlo_returns_are_discounted_sums_to_the_end_of_the_answer():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 0.0]])
    found = monte_carlo_returns(rewards, mask, config(gamma=0.5), bootstrap=torch.tensor([0.0, 32.0]))
    assert found.tolist() == [[1 + 1 + 1, 2 + 2, 4], [8 + 8 + 8, 16 + 16, 0]]


@pytest.mark.parametrize("critic", CRITICS)
def test_the_first_rollout_sets_the_scale_before_its_own_advantages(critic):
    trainer = trainer_of(critic=critic, gamma=0.9, prompts_per_step=5)
    metrics = trainer.step()
    experience = trainer.last_experience
    mask = experience.mask
    returns = monte_carlo_returns(experience.rewards, mask, trainer.config, bootstrap=None)
    rows = [row[m].double() for row, m in zip(returns, mask, strict=True)]
    mean = sum(row.mean() for row in rows) / 5
    std = (sum((row - mean).square().mean() for row in rows) / 5).sqrt()
    assert metrics["value_mean"] == pytest.approx(mean.item())
    assert metrics["value_std"] == pytest.approx(std.item())
    assert metrics["value"] == pytest.approx(mean.item()), "a head of zeros predicts the mean"
    expected, _ = ppo_gae(experience, trainer.config)
    raw = expected[mask]
    torch.testing.assert_close(experience.advantages[mask], (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-4)


def ppo_gae(experience, config: PPOConfig) -> tuple[Tensor, Tensor]:
    import ppo_fast as ppo

    return ppo.gae(experience.rewards, experience.values, gamma=config.gamma, lam=config.lam, mask=experience.mask)


def test_the_first_rollout_leaves_the_values_of_a_given_critic():
    given = Critic.from_actor(tiny_llama(258))
    torch.nn.init.normal_(given.head.weight)
    given.rescale(5.0, 3.0)
    before = copy.deepcopy(given)
    trainer = trainer_of(critic_given=given, critic_lr=0.0)
    trainer.step()
    hidden = torch.randn(9, 32)
    assert trainer.critic.value_std != 3.0
    torch.testing.assert_close(trainer.critic(hidden), before(hidden), rtol=1e-5, atol=1e-5)


def test_a_first_step_that_is_repeated_has_the_same_values():
    """A step that failed leaves the scale that it had set, and a head that may still be zero."""
    first, again = trainer_of(), trainer_of()
    again.critic.value_mean.fill_(7.0)
    first.step()
    again.step()
    here, there = first.last_experience, again.last_experience
    torch.testing.assert_close(here.values, there.values)
    torch.testing.assert_close(here.advantages, there.advantages)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_given_scale_is_not_used_where_values_are_not_normalized(normalize):
    given = Critic.from_actor(tiny_llama(258))
    given.rescale(5.0, 3.0)
    trainer = trainer_of(critic_given=given, normalize_values=normalize)
    if not normalize:
        assert trainer.critic(torch.zeros(1, 32)).item() == pytest.approx(0.0, abs=1e-6), "V is as it was"
        assert (trainer.critic.value_mean.item(), trainer.critic.value_std.item()) == (0.0, 1.0)
        assert "value_std" not in trainer.step()


# Updates


@pytest.mark.parametrize("critic", CRITICS)
def test_values_are_equal_across_a_rescale_and_none_is_clipped_in_the_first_minibatch(critic):
    trainer = trainer_of(critic=critic, value_clip=1e-4, value_scale_horizon=2.0)
    learner, histories, gaps = trainer.learner, [], []
    update = learner.update

    def recorded(experience, **others):
        with torch.no_grad(), packed_mode(trainer.policy):
            for pack in experience.minibatches[0]:
                now = trainer.policy.evaluate(pack).values
                gaps.append(((now - pack.gather(experience.values)).abs() / now.abs().clamp(min=1)).max().item())
        histories.append(update(experience, **others))
        return histories[-1]

    learner.update = recorded
    scales = {row["value_std"] for row in trainer.train()}
    assert len(scales) == 4, "the scale moved in each step"
    assert max(gaps) < 1e-6
    assert [history[0]["value_clip_fraction"] for history in histories] == [0.0] * 4
    assert all(history[1]["value_clip_fraction"] > 0 for history in histories)


def test_the_value_loss_is_in_units_of_the_head():
    trainer = trainer_of(lambda prompts, completions: [1000 * x for x in letters(prompts, completions)], kl_coef=0.0)
    plain = trainer_of(kl_coef=0.0)
    here, there = trainer.step(), plain.step()
    for name in ("learn/value_loss", "explained_variance"):
        assert here[name] == pytest.approx(there[name], rel=1e-3, abs=1e-6)
    for name in ("value", "return", "value_std", "advantage_min_std"):
        assert here[name] == pytest.approx(1000 * there[name], rel=1e-3)


def weights_after(factor: float, **changes) -> dict[str, Tensor]:
    trainer = trainer_of(lambda prompts, completions: [factor * x for x in letters(prompts, completions)], **changes)
    trainer.train()
    return {name: p.detach() for name, p in trainer.policy.named_parameters()}


KL_CASES = [{"kl_coef": 0.0}, {"kl_in": "loss", "kl_coef": 0.1}, {"kl_coef": 0.25}]


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("case", KL_CASES, ids=["no KL", "KL in the loss", "KL in the reward"])
def test_the_unit_of_the_reward_does_not_reach_the_weights(case, critic):
    def of_factor(factor: float) -> dict[str, Tensor]:
        coef = case["kl_coef"] * (factor if "kl_in" not in case else 1)
        return weights_after(factor, **{**case, "kl_coef": coef, "critic": critic})

    expected = of_factor(1.0)
    for factor in (1024.0, 1 / 1024):
        found = of_factor(factor)
        assert all(torch.equal(found[name], x) for name, x in expected.items()), f"times {factor}"
    for factor in (1000.0, 0.001):
        found = of_factor(factor)
        for name, x in expected.items():
            step = 1e-2 if name.startswith("critic.") else 1e-3
            # Adam divides by gradients that may be as small as their rounding
            assert (found[name] - x).abs().mean() < 1e-3 * step, f"{name} times {factor}"


# Whitening


def test_the_floor_rises_with_the_spread_of_scores_at_once_and_falls_slowly():
    scale = scale_of(value_scale_horizon=2.0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    centred = scale.observe_scores(torch.tensor([4.0, 4.0]), mask)
    assert centred.min_std == UNSCALED
    assert centred.factor == UNSCALED
    spreads = []
    for scores in ([1.0, 3.0], [0.0, 20.0], [5.0, 5.0], [5.0, 7.0]):
        whitening = scale.observe_scores(torch.tensor(scores), mask)
        assert whitening.factor == 1.0
        spreads.append(whitening.min_std.item())
    assert spreads == pytest.approx([FLOOR, 10 * FLOOR, 9 * FLOOR_OF_EQUAL, 8.1 * FLOOR])


def test_the_spread_of_token_scores_is_that_of_their_sums_from_a_token_on():
    scores, mask = torch.tensor([[1.0, 2.0, 9.0], [0.0, 4.0, 9.0]]), torch.tensor([[True, True, False]] * 2)
    following = torch.tensor([3.0, 2.0, 4.0, 4.0])
    assert scale_of().observe_scores(scores, mask).min_std.item() == pytest.approx(
        FLOOR * following.std(correction=0).item()
    )


class UntilStep:
    """Letters as scores; from one step on all scores are the mean of the step before."""

    def __init__(self, equal_from: int) -> None:
        self.equal_from, self.step, self.mean = equal_from, 0, 0.5

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        self.step += 1
        if self.step >= self.equal_from:
            return [self.mean] * len(prompts)
        scores = [sum(c.isalpha() for c in text) / 9 for text in completions]
        self.mean = sum(scores) / len(scores)
        return scores


def approx_kl_of(equal_from: int, **changes) -> list[float]:
    rewards = UntilStep(equal_from)
    changes = {"prompts_per_step": 32, "max_new_tokens": 9, "lr": 3e-4, "critic_lr": 1e-3, **changes}
    return [row["learn/approx_kl"] for row in trainer_of(rewards, **changes).train()]


def test_equal_scores_from_the_first_step_leave_the_policy_in_place():
    assert max(approx_kl_of(1, total_steps=8)) < 1e-4
    assert max(approx_kl_of(1, total_steps=8, normalize_values=False)) > 1e-4


@pytest.mark.parametrize("kl_coef", [0.05, 0.0])
def test_equal_scores_after_a_run_that_had_learned_leave_the_policy_in_place(kl_coef, monkeypatch):
    """The critic's errors and the KL are all that is left of the advantages; they are not amplified."""
    options = {"kl_coef": kl_coef, "lr": 3e-4 if kl_coef else 5e-4, "total_steps": 28}
    found = approx_kl_of(20, **options)
    assert max(found[19:]) < 1e-4
    assert max(found[:19]) > 1e-4 or kl_coef, "it learned"
    if kl_coef == 0:
        for name in ("FLOOR", "FLOOR_OF_EQUAL"):
            monkeypatch.setattr(f"ppo_fast.llm.value_scale.{name}", 1e-12)
        assert sum(approx_kl_of(20, **options)[-5:]) > 100 * sum(found[-5:]), "the floor has no effect"


# Several processes, checkpoints


def scaled_run(config: PPOConfig) -> tuple[dict[str, Tensor], list[dict[str, float]], dict[str, float]]:
    """What three steps leave: weights, scale and moments of the head; the scales of each step; the state."""
    trainer = trainer_of_several(config, sampler=Fixed())
    history, optimizer, head = trainer.train(), trainer.learner.optimizers.critic, trainer.critic.head
    tensors = {name: to_full_tensor(p.detach()) for name, p in trainer.policy.named_parameters()}
    tensors |= {"value_mean": trainer.critic.value_mean, "value_std": trainer.critic.value_std}
    for p in (head.weight, head.bias):
        moments = optimizer.adamw.state[p]
        tensors |= {f"{optimizer.names[p]}/{slot}": to_full_tensor(moments[slot]) for slot in ("exp_avg", "exp_avg_sq")}
    names = ("value_mean", "value_std", "advantage_min_std", "value", "explained_variance")
    return tensors, [{name: row[name] for name in names} for row in history], trainer.learner.value_scale.state_dict()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("critic", CRITICS)
def test_the_scale_of_two_processes_is_that_of_one(tmp_path, parallel, critic):
    changes = {"critic": critic, "value_scale_horizon": 2.0, "bootstrap_truncated": True}
    tensors, history, state = scaled_run(options(**changes))
    assert len({row["value_std"] for row in history}) == 3
    for its_tensors, its_history, its_state in run(tmp_path, scaled_run, options(**changes, parallel=parallel)):
        assert_close(its_tensors, tensors)
        assert_close(its_state, state)
        for here, there in zip(its_history, history, strict=True):
            assert_close(here, there)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_resumed_run_has_the_scale_of_the_whole_run(tmp_path, critic):
    changes = {"critic": critic, "save_every": 2, "value_scale_horizon": 2.0}
    whole = trainer_of(**changes, out=str(tmp_path / "whole"))
    whole.train()
    trainer_of(**changes, out=str(tmp_path / "run")).train(lambda trainer, _: trainer.steps_done == 3)
    resumed = trainer_of(**changes, out=str(tmp_path / "run"))
    assert resumed.resume()
    assert resumed.learner.value_scale.state_dict()["value_scale_updates"] == 2
    resumed.train()
    assert resumed.learner.value_scale.state_dict() == whole.learner.value_scale.state_dict()
    for (name, x), y in zip(resumed.policy.state_dict().items(), whole.policy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def without_scale(folder: Path) -> checkpoint.Checkpoint:
    """The checkpoint as it was before there was a scale."""
    older = checkpoint.read(folder)
    for name in ("normalize_values", "value_scale_horizon"):
        del older.state["run"]["config"][name]
    for name in ("critic.value_mean", "critic.value_std"):
        del older.tensors["weights"][name]
    return older


def test_an_older_checkpoint_resumes_without_normalized_values(tmp_path):
    changes = {"normalize_values": False, "save_every": 2}
    whole = trainer_of(**changes, out=str(tmp_path))
    whole.train(lambda trainer, _: trainer.steps_done == 2)
    folder = tmp_path / "checkpoints" / "step-2"
    resumed = trainer_of(**changes, out=str(tmp_path / "other"))
    assert resumed.load_state_dict(without_scale(folder)) == []
    expected, found = whole.step(), resumed.step()
    assert found["learn/loss"] == expected["learn/loss"]
    with pytest.raises(
        UserError, match=r"ppo_fast without normalize_values: continue with normalize_values = False .*--no-"
    ):
        trainer_of(out=str(tmp_path / "third")).load_state_dict(without_scale(folder))


def test_a_rollout_whose_step_fails_is_not_in_the_moments_of_the_checkpoint(tmp_path):
    trainer = trainer_of(out=str(tmp_path), save_every=0)

    def failing(*arguments: object, **others: object) -> None:
        raise UserError("a failure after the experience was made")

    def stop_working(trainer: PPOTrainer, _: dict) -> None:
        if trainer.steps_done == 2:
            trainer.learner.update = failing

    with pytest.raises(UserError, match="a failure after"):
        trainer.train(stop_working)
    saved = checkpoint.read(tmp_path / "checkpoints" / "step-2")
    assert saved.state["value_scale_updates"] == 2
