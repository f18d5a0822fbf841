"""Hints follow from the numbers of a run, come once, and name what to change."""

from support.tiny import byte_tokenizer, tiny_llama

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.hints import Hints
from ppo_fast.llm.trainer import PPOTrainer

CALM = {"learn/clip_fraction": 0.1, "ended": 0.5, "answer_tokens": 7.0, "kl": 0.01, "explained_variance": 0.4}


def given(steps: list[dict], scores: list[list[float]] | None = None, **options) -> list[list[str]]:
    """The hints of each step, whose metrics are CALM but for what is given."""
    hints = Hints(PPOConfig(**options))
    scores = scores or [[0.0, 1.0]] * len(steps)
    found = []
    for step, (metrics, points) in enumerate(zip(steps, scores, strict=True), start=1):
        found.append(hints.after({"step": step, **CALM, **metrics}, points))
    return found


def test_an_ordinary_run_gets_no_hint():
    assert given([{}] * 30) == [[]] * 30
    assert given([{"learn/clip_fraction": 0.3, "learn/approx_kl": 0.1, "kl": 1.0, "ended": 0.01}] * 5) == [[]] * 5


def test_a_number_that_is_none_gets_no_hint():
    names = ("learn/clip_fraction", "learn/approx_kl", "kl", "score", "entropy", "explained_variance", "ended")
    assert given([dict.fromkeys(names, float("nan"))] * 30, total_steps=30) == [[]] * 30


def test_a_batch_of_equal_scores_gets_one_hint():
    even = [0.5, 0.5]
    found = given([{}] * 5, [[0.5, 0.6], even, even, [0.0, 1.0], even])
    assert [len(x) for x in found] == [0, 1, 0, 0, 0]
    assert found[1][0].startswith("hint: all 2 answers of step 2 have the score 0.5, so there was nothing to learn")
    assert "check that the reward reads the answers right" in found[1][0]
    assert given([{}] * 5, [[1.0]] * 5) == [[]] * 5, "one answer has no other to differ from"


def test_a_step_that_is_too_large_gets_a_hint():
    found = given([{}, {"learn/clip_fraction": 0.41}, {"learn/clip_fraction": 0.9}], lr=1e-3, epochs=4, minibatches=8)
    assert [len(x) for x in found] == [0, 1, 0]
    assert found[1][0].startswith("hint: 41 % of the tokens were clipped in step 2, where 5 to 20 % is usual")
    assert "lower lr (0.001), epochs (4) or minibatches (8), or set target_kl (none)" in found[1][0]
    moved = given([{"learn/approx_kl": 0.53}, {"learn/approx_kl": 0.6}], target_kl=0.2)
    assert [len(x) for x in moved] == [1, 0]
    assert moved[0][0].startswith("hint: step 1 moved the policy by an approx_kl of 0.53 nats per token")
    assert "target_kl (0.2)" in moved[0][0]
    assert given([{"learn/approx_kl": 0.1}]) == [[]]


def test_answers_that_never_end_and_empty_ones_get_a_hint():
    found = given([{"ended": 0.0}] * 4, max_new_tokens=17)
    assert [len(x) for x in found] == [1, 0, 0, 0]
    assert "no answer of the first step ended within 17 tokens" in found[0][0]
    later = given([{}, *[{"ended": 0.0}] * 2, {}, *[{"ended": 0.0}] * 4])
    assert [len(x) for x in later] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert "no answer of the last 3 steps ended within" in later[6][0]
    empty = given([{"ended": 1.0, "answer_tokens": 1.0}] * 2)
    assert [len(x) for x in empty] == [1, 0]
    assert "all answers of the first step are empty" in empty[0][0]


def test_an_entropy_that_collapses_gets_a_hint():
    found = given([{"entropy": x} for x in (1.5, 0.2, 0.09, 0.01)], entropy_coef=0.002)
    assert [len(x) for x in found] == [0, 0, 1, 0]
    assert "the entropy fell from 1.50 to 0.090 nats per token" in found[2][0]
    assert "raise entropy_coef (0.002)" in found[2][0]
    assert not any(given([{"entropy": x} for x in (5.5, 0.4, 0.2)])), "0.2 nats are no collapse"
    assert not any(given([{"entropy": x} for x in (0.08, 0.05, 0.02)])), "nor is a start that has little"


def test_a_policy_that_left_its_reference_gets_a_hint():
    found = given([{}, {"kl": 1.234}, {"kl": 5.0}], kl_coef=0.02)
    assert [len(x) for x in found] == [0, 1, 0]
    assert "the KL to the reference is 1.23 nats per token" in found[1][0]
    assert "raise kl_coef (0.02)" in found[1][0]


def test_a_growing_kl_without_a_better_score_gets_a_hint():
    growing = [{"kl": 0.01 * 1.15**n, "score": 0.5 - 0.001 * n} for n in range(30)]
    found = given(growing, total_steps=100, kl_coef=0.02)
    (step,) = [n for n, x in enumerate(found, start=1) if x]
    assert step == 20, "two windows of ten steps"
    assert "the KL to the reference grew from 0.020 to 0.082 nats per token within 20 steps" in found[step - 1][0]
    assert "the score did not improve (0.4955 and then 0.4855): raise kl_coef (0.02)" in found[step - 1][0]
    better = [{**row, "score": 0.01 * n} for n, row in enumerate(growing)]
    assert not any(given(better, total_steps=100)), "it is what a better score costs"
    bounded = [{"kl": 0.08, "score": 0.5 - 0.001 * n} for n in range(30)]
    assert not any(given(bounded, total_steps=100))
    small = [{**row, "kl": 0.1 * row["kl"]} for row in growing[:25]]
    assert not any(given(small, total_steps=100))
    short = given(growing[-8:], total_steps=8)
    assert [n for n, x in enumerate(short, start=1) if x] == [6], "two windows of three"


def test_a_critic_that_explains_nothing_after_a_third_of_the_run_gets_a_hint():
    found = given([{"explained_variance": 0.04}] * 60, total_steps=100, critic_lr=1e-5)
    assert [n for n, x in enumerate(found, start=1) if x] == [34]
    assert "after a third of the run (step 34 of 100) the critic explains 0.04 of the variance" in found[33][0]
    assert "raise critic_lr (1e-05)" in found[33][0]
    assert "ppo-fast critic" in found[33][0]
    assert not any(given([{"explained_variance": 0.06}] * 60, total_steps=100))
    late = [{"explained_variance": 0.3}] * 50 + [{"explained_variance": -0.5}] * 10
    assert [n for n, x in enumerate(given(late, total_steps=100), start=1) if x] == [54], "the mean of ten steps"
    equal = given([{"explained_variance": 0.0}] * 60, [[1.0, 1.0]] * 60, total_steps=100)
    assert [n for n, x in enumerate(equal, start=1) if x] == [1], "equal scores leave no variance to explain"
    assert not any(given([{"explained_variance": 0.0}], total_steps=1)), "it has learned nothing before the first step"


def trained(capsys, reward, **options) -> list[str]:
    """The hints that a run of four steps prints."""
    small = dict(total_steps=4, prompts_per_step=4, minibatches=1, epochs=1, max_new_tokens=3, device="cpu")
    rows = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps")]
    PPOTrainer(PPOConfig(**{**small, **options}), tiny_llama(), byte_tokenizer(), rows, reward).train()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint: ")]


def test_a_run_prints_its_hints_once_and_quietly_none(capsys):
    def constant(prompts, completions):
        return [1.0] * len(prompts)

    def lengths(prompts, completions):
        return [float(i) for i in range(len(prompts))]

    (hint,) = [x for x in trained(capsys, constant) if "ended" not in x]
    assert "all 4 answers of step 1 have the score 1," in hint
    (critic,) = [x for x in trained(capsys, lengths, critic_lr=0.0) if "ended" not in x]
    assert "after a third of the run (step 2 of 4) the critic explains 0.00 of the variance" in critic
    large = trained(capsys, lengths, lr=1.0, warmup_ratio=0.0, epochs=3)
    assert any("moved the policy by" in x or "were clipped in step 1" in x for x in large)
    assert trained(capsys, constant, quiet=True) == []
