"""A short run of the example: it learns, and it leaves what it promises."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.examples import arithmetic


@pytest.fixture
def one_thread():
    """So small a model gains little from a second thread, and waits for it when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_ten_steps_of_the_example_raise_the_reward_and_leave_every_promised_file(tmp_path, capsys):
    """The share of right answers among the samples rises from about 0.55 by at least 0.08."""
    assert arithmetic.main(["--seed", "0", "--out", str(tmp_path), "--ppo-steps", "10"]) == 0
    scores = [json.loads(line)["score"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(scores) == 10
    assert sum(scores[-3:]) / 3 > sum(scores[:2]) / 2 + 0.08
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.2 <= summary["exact_match_before"] <= 0.6
    assert summary["exact_match_after"] > summary["exact_match_before"]
    assert summary["test_problems"] >= 1000
    assert summary["seconds"] > 0
    assert (tmp_path / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    answer = model.generate(**tokenizer(["11+22="], return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(answer[0], skip_special_tokens=True) == "11+22=33"
    assert "before PPO" in capsys.readouterr().out


def test_neither_phase_sees_a_test_problem_and_every_test_problem_is_honest_addition():
    test, validation, training = arithmetic.make_problems(3)
    prompts = [{p["prompt"] for p in part} for part in (test, validation, training)]
    assert sum(map(len, prompts)) == 6075 == len(set().union(*prompts))
    for problem in test:
        a, b = map(int, problem["prompt"].rstrip("=").split("+"))
        assert min(a, b) >= 10
        assert problem["answer"] == str(a + b)


def test_the_reward_is_one_for_right_and_zero_for_wrong():
    assert arithmetic.right_or_wrong(["1+1="] * 4, ["46", "36", "046", ""], ["46"] * 4) == [1.0, 0.0, 0.0, 0.0]
