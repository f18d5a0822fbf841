"""Hints follow from the numbers of a run, come once, and name what to change."""

from support.tiny import byte_tokenizer, tiny_llama

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.hints import CRITIC_STEPS, Hints
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
    assert given([{"learn/clip_fraction": 0.3, "kl": 1.0, "ended": 0.01}] * 5) == [[]] * 5


def test_a_number_that_is_none_gets_no_hint():
    nan = float("nan")
    assert given([{"learn/clip_fraction": nan, "kl": nan, "explained_variance": nan}] * 3) == [[]] * 3


def test_equal_scores_of_three_steps_in_a_row_get_one_hint():
    even = [0.5, 0.5]
    found = given([{}] * 9, [even, even, [0.5, 0.6], even, even, even, even, [0.0, 1.0], even])
    assert [len(x) for x in found] == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert found[5][0].startswith("hint: all answers of the last 3 steps have the score 0.5, so there is nothing to")
    assert given([{}] * 5, [[1.0]] * 5) == [[]] * 5, "one answer has no other to differ from"


def test_much_clipping_in_the_first_step_of_the_actor_gets_a_hint():
    found = given([{"learn/clip_fraction": 0.41}] * 3, lr=1e-3, epochs=4, minibatches=8)
    assert [len(x) for x in found] == [1, 0, 0]
    assert found[0][0].startswith("hint: 41 % of the tokens were clipped in the actor's first step")
    assert "lower lr (0.001), epochs (4) or minibatches (8)" in found[0][0]
    assert given([{}, {"learn/clip_fraction": 0.9}]) == [[], []], "later it may have other reasons"
    warm = given([{"learn/clip_fraction": 0.0}, {"learn/clip_fraction": 0.5}], critic_warmup_steps=1)
    assert [len(x) for x in warm] == [0, 1]


def test_answers_that_never_end_and_empty_ones_get_a_hint():
    found = given([{"ended": 0.0}] * 2, max_new_tokens=17)
    assert [len(x) for x in found] == [1, 0]
    assert "no answer of the first step ended within 17 tokens" in found[0][0]
    empty = given([{"ended": 1.0, "answer_tokens": 1.0}] * 2)
    assert [len(x) for x in empty] == [1, 0]
    assert "all answers of the first step are empty" in empty[0][0]


def test_a_policy_that_left_its_reference_gets_a_hint():
    found = given([{}, {"kl": 1.234}, {"kl": 5.0}], kl_coef=0.02)
    assert [len(x) for x in found] == [0, 1, 0]
    assert "the KL to the reference is 1.23 nats per token" in found[1][0]
    assert "raise kl_coef (0.02)" in found[1][0]


def test_a_critic_that_explains_nothing_since_the_start_gets_a_hint():
    none = [{"explained_variance": -0.1}] * (CRITIC_STEPS + 5)
    assert [n for n, x in enumerate(given(none), start=1) if x] == [CRITIC_STEPS]
    some = [{"explained_variance": -0.1}, {}, *none]
    assert not any(given(some))


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
    assert "all answers of the last 3 steps have the score 1," in hint
    assert [x for x in trained(capsys, lengths) if "ended" not in x] == []
    assert trained(capsys, constant, quiet=True) == []
