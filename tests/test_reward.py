"""Reward functions are somebody else's code: whatever they return is checked, and the sample at fault is named."""

import pytest
import torch

from ppo_fast.config import PPOConfig
from ppo_fast.errors import RewardError
from ppo_fast.reward import score
from ppo_fast.rollout import Rollout

CONFIG = PPOConfig()


def rollout() -> Rollout:
    return Rollout(
        tokens=torch.tensor([[9, 1, 2, 3], [8, 4, 5, 0]]),
        prompt_lengths=[1, 1],
        answer_lengths=[3, 2],
        ended=[False, True],
        completions=["abc", "de"],
        columns={"prompt": ["p", "q"], "answer": ["abc", "x"]},
    )


def test_a_number_for_each_answer_becomes_scores_of_answers():
    scores, means = score(rollout(), {"f": lambda prompts, completions, answer: [1, 2.5]}, CONFIG)
    assert scores.tolist() == [1.0, 2.5]
    assert means == {"reward/f": 1.75}


def test_numbers_for_tokens_and_for_answers_add_up_at_the_last_token():
    per_token = [[0.1, 0.2, 0.3], [0.4, 0.5]]
    functions = {"t": lambda prompts, completions: per_token, "a": lambda prompts, completions: [1.0, 2.0]}
    scores, _ = score(rollout(), functions, CONFIG)
    torch.testing.assert_close(scores, torch.tensor([[0.1, 0.2, 1.3], [0.4, 2.5, 0.0]]))


def test_answers_cut_by_length_pay_the_missing_end_penalty():
    config = PPOConfig(missing_eos_penalty=1.0)
    batch = rollout()
    scores, _ = score(batch, {"f": lambda prompts, completions: [0.0, 0.0]}, config)
    assert scores.tolist() == [-1.0, 0.0]
    assert batch.scores == [-1.0, 0.0]


def test_columns_and_tokens_reach_the_function_by_name():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    score(rollout(), {"f": everything}, CONFIG)
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["abc", "de"],
        "answer": ["abc", "x"],
        "completion_ids": [[1, 2, 3], [4, 5]],
    }


def raises(prompts, completions):
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 values for 2 answers"),
        (None, "must return a list, got NoneType"),
        ([1.0, float("nan")], r"answer 1 \('de'\): expected a finite number, got nan"),
        ([float("inf"), 0.0], r"answer 0 \('abc'\): expected a finite number, got inf"),
        ([1e300, 0.0], r"answer 0 \('abc'\): expected a finite number, got 1e\+300 \(fp32 ends at 3.4e38\)"),
        ([1.0, None], r"answer 1 \('de'\): expected a number, got None"),
        ([1.0, "good"], "expected a number, got 'good'"),
        ([[1.0, 2.0], [1.0, 2.0]], r"answer 0 \('abc'\): 2 values for 3 tokens"),
        ([[1.0, 2.0, None], [1.0, 2.0]], "expected a number, got None"),
    ],
)
def test_a_wrong_result_names_function_sample_and_reason(returned, message):
    with pytest.raises(RewardError, match=message):
        score(rollout(), {"judge": lambda prompts, completions: returned}, CONFIG)


def test_an_exception_in_the_function_is_reported_with_its_place():
    with pytest.raises(RewardError, match=r"'judge' raised KeyError: 'gone' \(.*test_reward.py, line \d+\)"):
        score(rollout(), {"judge": raises}, CONFIG)


def test_tensors_and_numpy_numbers_are_numbers_too():
    scores, _ = score(rollout(), {"f": lambda prompts, completions: torch.tensor([1.0, 2.0])}, CONFIG)
    assert scores.tolist() == [1.0, 2.0]
