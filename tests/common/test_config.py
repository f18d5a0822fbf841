"""Options from a file and from the command line: precedence, errors, and a run repeated from its own file."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from support.tiny import save_tiny_model

from ppo_fast.cli.commands import build_parser, main
from ppo_fast.cli.train import RUN_OPTIONS, RunOptions, resolve
from ppo_fast.common.errors import UserError
from ppo_fast.common.options import options, read_yaml
from ppo_fast.llm.config import PPOConfig, options_of, yaml_text

FIELDS = [option.name for option in dataclasses.fields(PPOConfig)]
NEEDED = "model: m\nprompts: p.jsonl\n"


def resolved(tmp_path: Path, text: str, *arguments: str):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    parser, train = build_parser()
    return resolve(parser.parse_args(["train", "--config", str(tmp_path / "c.yaml"), *arguments]), train)


def test_the_command_line_has_precedence_over_the_file(tmp_path):
    text = NEEDED + "lr: 1.0e-3\nepochs: 2\nkl-coef: 0.5\nvalue_clip: 0.3\nwhiten_advantages: false\nstop: [a, b]\n"
    config, run = resolved(tmp_path, text, "--lr", "0.01", "--model", "other", "--value-clip", "none")
    assert (config.lr, config.epochs, config.kl_coef, config.value_clip) == (0.01, 2, 0.5, None)
    assert (config.whiten_advantages, config.stop) == (False, ("a", "b"))
    assert (run.model, run.prompts, run.prompt_field) == ("other", "p.jsonl", "prompt")
    assert resolved(tmp_path, text, "--whiten-advantages", "--stop", "c")[0].stop == ("c",)
    assert resolved(tmp_path, text, "--whiten-advantages")[0].whiten_advantages is True
    assert config.lam == PPOConfig().lam


def test_rewards_of_the_command_line_are_added_to_those_of_the_file(tmp_path):
    text = NEEDED + "reward: [a:f, b:g]\nreward_weight: [1, 0.5]\nreward_model: r\n"
    _, run = resolved(tmp_path, text)
    assert (run.reward, run.reward_weight, run.reward_model) == (["a:f", "b:g"], [1, 0.5], ["r"])
    _, run = resolved(tmp_path, text, "--reward", "c:h", "--reward-weight", "2", "3")
    assert (run.reward, run.reward_weight) == (["c:h"], [2.0, 3.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "c.yaml: unknown option epoch; did you mean epochs?"),
        ("promts: x\n", "c.yaml: unknown option promts; did you mean prompts?"),
        ("overwrite: true\n", "c.yaml: unknown option overwrite"),
        ("qqq: 3\n", "c.yaml: unknown option qqq"),
        ("lr: 1\nlr: 2\n", "c.yaml: the option lr occurs twice"),
        ("kl-coef: 1\nkl_coef: 2\n", "c.yaml: the option kl_coef occurs twice"),
        ("- lr\n", "c.yaml must hold lines like `lr: 1.0e-6`, got list"),
        ("lr: [1\n", "c.yaml is not YAML: "),
        ("gamma: 1.5\n", "gamma must be in [0, 1], got 1.5"),
        ("total_steps: 0\n", "total_steps must be at least 1, got 0"),
        ("eval_every: -1\n", "eval_every must be at least 0, got -1"),
        ("eval_samples: 0\n", "eval_samples must be at least 1, got 0"),
        ("epochs: two\n", "epochs must be of type int, got 'two'"),
        ("lr: fast\n", "lr must be of type float, got 'fast'"),
        ("quiet: 1\n", "quiet must be of type bool, got 1"),
        ("lr: null\n", "lr must be of type float, got None"),
        ("critic: both\n", "critic must be one of own, shared; got 'both'"),
        ("reward: [1]\n", "c.yaml: reward must be of type str or a list of such, got 1"),
        ("chat: 1\n", "c.yaml: chat must be of type bool, got 1"),
        ("prompt_field: [a]\n", "c.yaml: prompt_field must be of type str, got ['a']"),
    ],
)
def test_a_bad_option_in_the_file_is_named(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        resolved(tmp_path, NEEDED + text if not text.startswith("-") else text)
    assert message in str(error.value)


def test_a_missing_file_is_an_error_and_an_empty_one_is_not(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration: .*absent.yaml: No such file"):
        read_yaml(tmp_path / "absent.yaml", FIELDS)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml", FIELDS) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: " + 3000 * "[", "is nested too deeply: it must hold lines like `lr: 1.0e-6`"),
        ("lr: 2001-99-99\n", "is not YAML: month must be in 1..12"),
        ("seed: " + 5000 * "9" + "\n", "is not YAML: Exceeds the limit"),
    ],
)
def test_yaml_that_python_cannot_read_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(tmp_path / "c.yaml", FIELDS)
    assert f"{tmp_path / 'c.yaml'} {message}" in str(error.value)


def test_a_seed_has_at_most_32_bits():
    assert PPOConfig(seed=2**32 - 1).seed == 4294967295
    with pytest.raises(UserError, match=r"seed must be in \[0, 4294967295\], got 4294967296"):
        PPOConfig(seed=2**32)


def test_1e_6_without_a_point_is_converted_from_the_string_that_yaml_reads():
    assert yaml.safe_load("lr: 1e-6")["lr"] == "1e-6", "YAML 1.1 has changed: options_of need not convert it"
    assert options_of({"lr": "1e-6", "score_clip": "5e0"}) == PPOConfig(lr=1e-6, score_clip=5.0)


def test_a_missing_model_or_prompts_option_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        resolved(tmp_path, "model: m\n")
    assert exit_.value.code == 2
    assert "--prompts is missing (on the command line, or as `prompts:` in the file of --config)" in (
        capsys.readouterr().err
    )


def test_the_resolved_configuration_can_be_read_again(tmp_path):
    changed = PPOConfig(
        lr=3e-7, stop=("\n\n", "é: #"), value_clip=None, dual_clip=2.0, quiet=True, out="runs/x", lora_targets="a,b"
    )
    run = RunOptions(model="m", prompts="p", reward=["a:f"], reward_weight=[0.5], chat=True)
    (tmp_path / "config.yaml").write_text(yaml_text(changed, dataclasses.asdict(run)), encoding="utf-8")
    parser, train = build_parser()
    arguments = parser.parse_args(["train", "--config", str(tmp_path / "config.yaml")])
    assert resolve(arguments, train) == (changed, run)
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == {*RUN_OPTIONS, *FIELDS}


@pytest.mark.parametrize(
    ("given", "lam"),
    [({}, 0.95), ({"lam": None}, 0.95), ({"lam": 0.5}, 0.5), ({"lam_length_alpha": 0.05}, None)],
    ids=str,
)
def test_lam_is_0_95_unless_it_is_set_or_depends_on_the_length(tmp_path, given, lam):
    config = PPOConfig(**given)
    assert config.lam == lam
    (tmp_path / "config.yaml").write_text(yaml_text(config, {"model": "m", "prompts": "p"}), encoding="utf-8")
    assert resolved(tmp_path, (tmp_path / "config.yaml").read_text())[0] == config
    assert dataclasses.replace(config, lam=None, lam_length_alpha=0.1).lam is None
    assert dataclasses.replace(config, lam=0.3, lam_length_alpha=None).lam == 0.3


def test_lam_and_lam_length_alpha_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match=r"^lam is 0.95 for all answers, but lam_length_alpha = 0.05 computes a lambda"):
        PPOConfig(lam=0.95, lam_length_alpha=0.05)
    with pytest.raises(UserError, match="set one of them to none"):
        resolved(tmp_path, NEEDED + "lam: 0.9\n", "--lam-length-alpha", "0.05")
    config, _ = resolved(tmp_path, NEEDED + "lam: 0.9\ncritic-lam: 1\n", "--lam-length-alpha", "0.05", "--lam", "none")
    assert (config.lam, config.lam_length_alpha, config.critic_lam) == (None, 0.05, 1.0)
    with pytest.raises(UserError, match="set one of them to none"):
        config.lam = 0.9
    assert config.lam is None


def test_help_has_every_option_with_default_and_range():
    _, train = build_parser()
    actions = {action.dest: action for action in train._actions}
    for option in options(PPOConfig).values():
        text = str(actions[option.name].help)
        assert "(default: " in text, option.name
        assert len(text.split(" (default")[0]) >= 15, f"{option.name} is not explained"
        if option.low is not None:
            assert "at least " in text or " to " in text.split("(default")[-1], option.name
    for name in RUN_OPTIONS:
        assert "default" in str(actions[name].help), name


def test_every_field_of_the_configuration_has_a_command_line_option():
    _, train = build_parser()
    assert {*RUN_OPTIONS, *FIELDS} <= {action.dest for action in train._actions}
    assert all(a.default is argparse.SUPPRESS for a in train._actions if a.dest in {*RUN_OPTIONS, *FIELDS}), (
        "a default of argparse's would win over the file"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, completions):\n    return [len(c) for c in completions]\n"
    )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i} and"}) + "\n" for i in range(4)))
    (tmp_path / "c.yaml").write_text(
        f"model: {tmp_path / 'model'}\nprompts: {tmp_path / 'p.jsonl'}\nreward: {tmp_path / 'rewards.py'}:length\n"
        "total_steps: 1\nprompts_per_step: 4\nmax_new_tokens: 5\nminibatches: 1\nepochs: 1\ndevice: cpu\n"
        "tensorboard: false\n"
    )
    return tmp_path


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("second", "memory", "tflops", "mfu")
    return [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in rows]


def test_a_run_from_the_file_of_another_run_repeats_it(folder):
    assert main(["train", "--config", str(folder / "c.yaml"), "--out", str(folder / "a"), "--seed", "3"]) == 0
    again = ["train", "--config", str(folder / "a" / "config.yaml")]
    assert main(again) == 1  # its OUT already holds a run
    assert main([*again, "--out", str(folder / "b")]) == 0
    assert metrics(folder / "a") == metrics(folder / "b")
    assert main([*again, "--out", str(folder / "c"), "--seed", "4"]) == 0
    assert metrics(folder / "a") != metrics(folder / "c")


def test_eval_every_without_held_out_prompts_is_an_error(folder, capsys):
    assert main(["train", "--config", str(folder / "c.yaml"), "--eval-every", "2"]) == 1
    assert "eval_every = 2 needs held-out prompts: --eval-prompts FILE on the command line" in capsys.readouterr().err
