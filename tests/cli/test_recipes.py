"""Recipes are copied completely, run unchanged, and have prompts that match their rewards."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from support.tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from ppo_fast import recipes
from ppo_fast.cli.commands import main
from ppo_fast.examples import sampling
from ppo_fast.llm.data import read_prompts
from ppo_fast.rewards import load_reward


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_trains_a_tiny_model_as_it_is(name, tmp_path: Path, capsys):
    for package in ("rouge_score", "sacrebleu"):
        pytest.importorskip(package)
    folder = tmp_path / "it's: a #folder"  # it must not break the YAML
    assert main(["recipe", name, str(folder)]) == 0
    assert "ppo-fast train --config" in capsys.readouterr().out
    save_tiny_model(tmp_path / "model", positions=1024)
    options = ["--total-steps", "2", "--prompts-per-step", "4", "--samples-per-prompt", "2", "--eval-every", "1"]
    out = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--quiet", "--max-new-tokens", "8"]
    assert main(["train", "--config", str(folder / "recipe.yaml"), *options, *out]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    configured = yaml.safe_load((folder / "recipe.yaml").read_text())
    for spec in configured["reward"]:
        short = spec.partition("(")[0].rpartition(":")[2]
        assert f"reward/{short}" in metrics[-1]
    assert metrics[-1]["step"] == 2


@pytest.mark.parametrize("name", ["question_answering", "summarisation", "translation", "classification"])
def test_the_right_answers_of_a_recipe_get_the_highest_score(name, tmp_path: Path):
    for package in ("rouge_score", "sacrebleu"):
        pytest.importorskip(package)
    config, *files = recipes.copy(name, tmp_path)
    for file in files:
        rows = read_prompts(file)
        right = [row["reference"] if isinstance(row["reference"], str) else row["reference"][0] for row in rows]
        for spec in yaml.safe_load(config.read_text())["reward"]:
            judge = load_reward(spec)
            reference = [row["reference"] for row in rows]
            takes = (
                {} if spec.partition("(")[0].endswith(("length_band", "no_repetition")) else {"reference": reference}
            )
            assert judge([row["prompt"] for row in rows], right, **takes) == pytest.approx([1.0] * len(rows)), spec


@pytest.mark.parametrize("name", recipes.NAMES)
def test_no_held_out_prompt_is_among_those_to_train_on(name, tmp_path: Path):
    _, prompts, held_out = recipes.copy(name, tmp_path)
    training = {json.dumps(row["prompt"]) for row in read_prompts(prompts)}
    assert len(training) >= 8
    assert not training & {json.dumps(row["prompt"]) for row in read_prompts(held_out)}


def test_recipes_are_listed(capsys):
    assert main(["recipe"]) == 0
    shown = capsys.readouterr().out
    for name in recipes.NAMES:
        assert name in shown


def test_the_command_that_follows_a_recipe_quotes_a_blank(tmp_path: Path, capsys):
    assert main(["recipe", "dialogue", str(tmp_path / "my chats")]) == 0
    assert shlex.split(capsys.readouterr().out)[-5] == str(tmp_path / "my chats" / "recipe.yaml")


def test_existing_files_are_not_overwritten_and_a_wrong_name_gets_the_nearest(tmp_path: Path, capsys):
    assert main(["recipe", "dialogue", str(tmp_path)]) == 0
    assert main(["recipe", "dialogue", str(tmp_path)]) == 1
    assert "is there already: choose another folder" in capsys.readouterr().err
    assert main(["recipe", "dialog", str(tmp_path)]) == 1
    assert "there is no recipe 'dialog'; did you mean dialogue?" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["recipe", "dialogue", str(tmp_path / "file" / "x")]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_an_unknown_key_in_a_recipe_is_named_before_anything_is_loaded(tmp_path: Path, capsys):
    config, *_ = recipes.copy("dialogue", tmp_path)
    config.write_text(config.read_text() + "max_new_token: 8\n")
    assert main(["train", "--config", str(config), "--model", "nowhere"]) == 1
    assert "unknown option max_new_token; did you mean max_new_tokens?" in capsys.readouterr().err


def test_the_same_reward_twice_is_rejected(tmp_path: Path, capsys):
    config, *_ = recipes.copy("dialogue", tmp_path)
    spec = ["--reward", "ppo_fast.rewards:no_echo"]
    assert main(["train", "--config", str(config), "--model", "nowhere", *spec, *spec]) == 1
    assert "is given twice" in capsys.readouterr().err


def test_the_ways_of_sampling_are_compared_in_a_table_and_a_picture(tmp_path: Path, capsys):
    save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.lm_head.weight.data *= 20  # else the distribution is nearly uniform
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "new"), "--max-new-tokens", "8"]
    assert sampling.main([*options, "--prompts", str(tmp_path / "prompts.jsonl")]) == 0
    assert (tmp_path / "new" / "sampling.png").read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    numbers = {name: line.split("│")[2:6] for line in lines for name in sampling.WAYS if f"│ {name} " in line}
    assert set(numbers) == set(sampling.WAYS)
    assert float(numbers["greedy"][1]) == 0.0, "greedy answers to one prompt are all the same"
    assert float(numbers["greedy"][0]) > float(numbers["temperature 1"][0]) > float(numbers["temperature 1.3"][0])
    assert sampling.main([*options, "--prompts", "nowhere.jsonl"]) == 1
    assert "cannot read the prompts" in capsys.readouterr().err
