"""A run acts on a ratio, a KL and a sampler gap that are not what they must be."""

import copy
import json
import warnings

import pytest
import torch
from support.tiny import byte_tokenizer, distinct, tiny_llama

from ppo_fast.common.errors import InvariantError, NonFiniteError, RewardError, UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.generate import GenerateSampler
from ppo_fast.llm.invariants import ROUNDING, Bound, check_first_kl, check_ratio, gap_problem, rounding_of
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": "ab"}, {"prompt": "hello"}]


def trainer_of(reward=distinct, actor=None, sampler=None, eval_rows=None, **options) -> PPOTrainer:
    small = {"total_steps": 3, "prompts_per_step": 4, "minibatches": 1, "epochs": 1, "max_new_tokens": 8}
    quiet = {"quiet": True, "device": "cpu", "tensorboard": False, "show_samples_every": 0, "lr": 1e-3}
    actor = tiny_llama(258) if actor is None else actor
    trainer = PPOTrainer(
        PPOConfig(**small | quiet | options),
        actor,
        byte_tokenizer(),
        ROWS,
        reward,
        sampler=sampler,
        eval_rows=eval_rows,
    )
    return trainer


class Shifted:
    """The actor's own sampler, whose log-probabilities are off by `shift` in a share of the answers."""

    def __init__(self, shift: float, share: float = 1.0) -> None:
        self.own, self.shift, self.share = None, shift, share

    def sample(self, prompts, params):
        answers = self.own.sample(prompts, params)
        for row in range(round(self.share * len(prompts))):
            answers.logprobs[row] = [x - self.shift for x in answers.logprobs[row]]
        return answers


def shifted(shift: float, share: float = 1.0, **options) -> PPOTrainer:
    sampler = Shifted(shift, share)
    trainer = trainer_of(sampler=sampler, **options)
    sampler.own = GenerateSampler(trainer.actor, trainer.tokenizer)
    return trainer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_ordinary_run_gives_no_warning(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = trainer_of(eval_rows=ROWS, dtype=dtype).train()
    assert metrics[0]["sampler_gap_mean"] <= metrics[0]["sampler_gap_p99"] <= metrics[0]["sampler_gap_max"]
    assert metrics[0]["sampler_gap_p99"] < ROUNDING[dtype].p99


def test_a_gap_above_rounding_is_a_warning_that_names_the_causes():
    with pytest.warns(
        RuntimeWarning, match=r"differ from the trainer's by 0\.1 nats .* in the first step.*left.*dtype.*top"
    ):
        metrics = shifted(0.1, max_sampler_gap=0.5).step()
    assert metrics["sampler_gap_mean"] == pytest.approx(0.1, abs=1e-3)


def test_no_warning_where_the_gap_of_another_engine_is_that_of_half_precision():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shifted(0.02).step()


def test_a_large_gap_ends_the_run_after_a_checkpoint(tmp_path):
    trainer = shifted(0.5, out=str(tmp_path / "run"), max_sampler_gap=0.4)
    with pytest.raises(InvariantError, match=r"max_sampler_gap is 0\.4 .* is in .*step-1"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "state.json").is_file()
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]
    again = shifted(0.5, out=str(tmp_path / "run"), max_sampler_gap=None)
    assert again.resume()
    assert [m["step"] for m in again.train()] == [2, 3]


def test_the_99th_percentile_has_a_bound_of_its_own():
    config = PPOConfig(max_sampler_gap=0.2)
    few = {"sampler_gap_mean": 0.02, "sampler_gap_p99": 1.0}
    assert "max_sampler_gap is 0.2 (1 at the 99th percentile)" in str(
        gap_problem(few, config, ROUNDING["bfloat16"], where="x")
    )
    with pytest.warns(RuntimeWarning):
        assert gap_problem(few | {"sampler_gap_p99": 0.9}, config, ROUNDING["bfloat16"], where="x") is None
    nan = {"sampler_gap_mean": float("nan"), "sampler_gap_p99": float("nan")}
    assert gap_problem(nan, config, ROUNDING["bfloat16"], where="x") is not None


def test_an_evaluation_checks_the_gap_too(tmp_path):
    """A gap that begins after the first step."""
    trainer = shifted(0.0, out=str(tmp_path / "run"), eval_every=2, eval_rows=ROWS)

    def spoil(trainer, metrics):
        trainer.sampler.shift = 1.0

    with pytest.raises(InvariantError, match=r"in the evaluation after step 2.*step-2"):
        trainer.train(spoil)


def test_the_percentile_is_that_of_numpy_without_interpolation():
    import numpy as np

    from ppo_fast.llm.experience import _quantile

    torch.manual_seed(0)
    for tokens in (1, 7, 100, 101, 250, 1000):
        x = torch.rand(2, tokens)
        mask = torch.zeros(2, tokens, dtype=torch.bool)
        mask.view(-1)[torch.randperm(2 * tokens)[:tokens]] = True
        expected = np.quantile(x[mask].numpy(), 0.99, method="inverted_cdf")
        assert _quantile(x, mask, 0.99).item() == expected


def test_a_first_ratio_that_is_not_1_ends_the_step_before_its_update():
    """A layer that computes something else in the pass that learns."""
    trainer = trainer_of()
    layer = trainer.actor.model.layers[0].mlp
    layer.register_forward_hook(lambda m, a, out: out * 1.5 if torch.is_grad_enabled() else out)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    with pytest.raises(InvariantError, match=r"the first ratio of this step is 1\.\d+ with approx_kl"):
        trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())


def test_a_reference_that_is_not_the_start_ends_the_first_step():
    trainer = trainer_of()
    with torch.no_grad():
        trainer.reference.model.lm_head.weight.mul_(1.01)
    with pytest.raises(InvariantError, match="the reference starts as the actor, but a log-probability"):
        trainer.step()


def test_a_copy_of_the_actor_that_is_given_as_reference_is_checked_too():
    actor = tiny_llama(258)
    copied = copy.deepcopy(actor).requires_grad_(False)
    trainer = PPOTrainer(trainer_of().config, actor, byte_tokenizer(), ROWS, distinct, reference=copied)
    assert trainer.reference_is_start
    with torch.no_grad():
        trainer.reference.model.lm_head.weight.mul_(1.01)
    with pytest.raises(InvariantError, match="the reference starts as the actor"):
        trainer.step()


def test_another_reference_may_differ():
    other = tiny_llama(258, seed=1)
    trainer = PPOTrainer(
        trainer_of().config, tiny_llama(258), byte_tokenizer(), ROWS, distinct, reference=other.requires_grad_(False)
    )
    assert abs(trainer.step()["kl"]) > 0


def test_bounds_depend_on_what_multiplies_matrices():
    assert rounding_of(PPOConfig(dtype="float32"), "cuda") == ROUNDING["float32"]
    assert rounding_of(PPOConfig(tf32=True, dtype="float32"), "cuda") == ROUNDING["tf32"]
    assert rounding_of(PPOConfig(tf32=True, dtype="float32"), "cpu") == ROUNDING["float32"]
    assert rounding_of(PPOConfig(tf32=True, dtype="bfloat16"), "cuda") == ROUNDING["bfloat16"]


def test_each_check_accepts_its_bound_and_rejects_what_is_beyond():
    bound = Bound(0.001, 0.01)
    check_ratio({}, bound)
    check_ratio({"ratio_max": 1.0, "approx_kl": 0.0}, bound)
    with pytest.warns(RuntimeWarning, match=r"the first ratio of this step is 1\.005"):
        check_ratio({"ratio_max": 1.005, "approx_kl": 0.0}, bound)
    for stats in ({"ratio_max": 1.02, "approx_kl": 0.0}, {"ratio_max": 1.0, "approx_kl": 1e-3}):
        with pytest.raises(InvariantError):
            check_ratio(stats, bound)
    check_first_kl(0.0, bound)
    for wrong in (0.02, float("nan")):
        with pytest.raises(InvariantError):
            check_first_kl(wrong, bound)


def test_a_step_that_fails_leaves_a_checkpoint_of_those_before_it(tmp_path):
    """An error of a reward: the run continues from the step that failed, as one that was not interrupted."""

    def failing(prompts, completions):
        if trainer.steps_done == 2:
            raise ValueError("no licence")
        return distinct(prompts, completions)

    trainer = trainer_of(failing, out=str(tmp_path / "run"))
    with pytest.raises(RewardError, match=r"no licence.*what was learned before is in .*step-2"):
        trainer.train()
    again = trainer_of({"failing": distinct}, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"its code of the rewards differs; .* use --allow-changes"):
        again.resume()
    assert again.resume(allow_changes=True)
    assert any("from here on the code of the rewards is another one than that of" in note for note in again.notes)
    history = again.train()
    whole = trainer_of(distinct).train()
    assert {k: v for k, v in history[0].items() if k in ("score", "kl", "return", "learn/grad_norm")} == {
        k: v for k, v in whole[2].items() if k in ("score", "kl", "return", "learn/grad_norm")
    }


def test_the_advice_of_a_non_finite_loss_can_be_followed(tmp_path):
    trainer = trainer_of(out=str(tmp_path / "run"), total_steps=4)

    def spoil(trainer, metrics):
        if trainer.steps_done == 3:
            next(trainer.critic.backbone.parameters()).register_hook(lambda g: g * float("nan"))

    with pytest.raises(NonFiniteError, match=r"a lower learning rate or max_grad_norm may help.*step-3"):
        trainer.train(spoil)
    again = trainer_of(out=str(tmp_path / "run"), total_steps=4, lr=5e-4, max_grad_norm=0.5)
    assert again.resume()
    assert "lr was 0.001 and is 0.0005 from here on" in again.notes
    assert [m["step"] for m in again.train()] == [4]
