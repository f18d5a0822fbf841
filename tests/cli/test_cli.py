"""The command line on real files: it trains, and each bad input gets one clear line instead of a traceback."""

import json
import warnings
from pathlib import Path

import pytest
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MixtralConfig,
    T5Config,
    ViTConfig,
)

from ppo_fast.cli.commands import main
from ppo_fast.common.errors import plain_warnings

ROOT = Path(__file__).parents[2]

REWARDS = """
def length(prompts, completions, answer):
    assert all(isinstance(a, str) for a in answer)
    return [float(len(c)) for c in completions]

def broken(prompts, completions):
    return 1 / 0

def too_few(prompts, completions):
    return [0.0]

def nan(prompts, completions):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"question": f"What is {i} + {i}?" * (1 + i % 3), "answer": str(2 * i)} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(folder: Path, *more: str, **changed: str) -> list[str]:
    options = {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.jsonl"),
        "prompt-field": "question",
        "reward": f"{folder / 'rewards.py'}:length",
        "out": str(folder / "out"),
        "total-steps": "2",
        "prompts-per-step": "4",
        "max-new-tokens": "6",
        "minibatches": "2",
        "epochs": "1",
        "device": "cpu",
    }
    options.update(changed)
    return ["train", *(part for name, value in options.items() for part in (f"--{name}", value)), *more]


def test_train_on_a_jsonl_file_leaves_model_metrics_and_picture(folder, capsys):
    assert main(command(folder)) == 0
    out = folder / "out"
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in steps] == [1, 2]
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.vocab_size == 258
    assert (out / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "step 2/2" in shown
    assert "answers in step 1" in shown
    assert "learn" in shown


def test_reward_models_weights_and_a_critic_model_are_read(folder):
    model = tiny_llama(258)
    model.config.num_labels = 1
    LlamaForSequenceClassification(model.config).save_pretrained(folder / "judge")
    byte_tokenizer().save_pretrained(folder / "judge")
    judge = str(folder / "judge")
    options = ["--reward-model", judge, "--reward-weight", "0", "1", "--critic-model", judge]
    assert main([*command(folder), *options]) == 0
    first, *_ = (json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines())
    assert first["score"] == pytest.approx(first[f"reward/{judge}"], abs=1e-6)
    assert first["value"] != 0
    assert main([*command(folder, out=str(folder / "other")), "--reward-weight", "1", "2"]) == 1


def test_quiet_prints_nothing(folder, capfd):
    assert main(command(folder, "--quiet")) == 0
    assert capfd.readouterr() == ("", "")


def write(folder: Path, text: str) -> dict[str, str]:
    (folder / "bad.jsonl").write_text(text)
    return {"prompts": str(folder / "bad.jsonl")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"prompts": str(f / "absent.jsonl")}, "absent.jsonl: No such file"),
        (lambda f: {"prompt-field": "text"}, "line 1: no field 'text'; the fields are 'question', 'answer'"),
        (lambda f: write(f, '{"question": "a", "answer": "b"}\n{"question": }\n'), "bad.jsonl, line 2: malformed JSON"),
        (lambda f: write(f, '{"question": ""}\n'), "bad.jsonl, line 1: the prompt is empty"),
        (lambda f: {"model": str(f / "nowhere")}, "no config.json"),
        (lambda f: {"reward": "no_such_module:f"}, "cannot import the reward 'no_such_module:f'"),
        (lambda f: {"reward": f"{f / 'rewards.py'}:absent"}, "has no function 'absent'"),
        (lambda f: {"reward": "rewards"}, "must be MODULE:FUNCTION"),
        (lambda f: {"reward": f"{f / 'rewards.py'}:broken"}, "raised ZeroDivisionError: division by zero ("),
        (lambda f: {"reward": f"{f / 'rewards.py'}:too_few"}, "returned 1 values for 4 answers"),
        (lambda f: {"reward": f"{f / 'rewards.py'}:nan"}, "expected a finite number, got nan"),
        (lambda f: {"model": str(save_tiny_model(f / "nopad", pad=False))}, "has no pad token"),
        (lambda f: {"gamma": "2"}, "gamma must be in [0, 1], got 2.0"),
        (
            lambda f: {"reward": "ppo_fast.rewards:f1(reference=solution)"},
            "ppo-fast: error: the data has no column 'solution', which the reward 'f1' asks for; it has answer\n",
        ),
        (
            lambda f: {"reward": "ppo_fast.rewards:f1"},
            "ppo-fast: error: the data has no column 'reference', which the reward 'f1' asks for; it has answer;"
            " to take another: f1(reference=COLUMN)\n",
        ),
        (
            lambda f: {"reward": "ppo_fast.rewards:f1(reference=answers)"},
            "no column 'answers', which the reward 'f1' asks for; did you mean answer?; it has answer\n",
        ),
        (
            lambda f: write(f, '{"question": "a"}\n') | {"reward": "ppo_fast.rewards:f1(reference=answer)"},
            "no column 'answer', which the reward 'f1' asks for; it has none besides the prompt\n",
        ),
        (lambda f: {"device": "cuda:99"}, "device 'cuda:99'"),
        (lambda f: {"out": str(f / "prompts.jsonl" / "x")}, "cannot write to"),
    ],
)
def test_bad_input_gets_one_clear_line(folder, capsys, change, message):
    arguments = command(folder, **change(folder))
    capsys.readouterr()  # remove what was printed while the input was made
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ppo-fast: error: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_a_missing_column_is_reported_before_sampling(folder, capsys, monkeypatch):
    def sample(*arguments, **options):
        raise AssertionError("answers were sampled")

    monkeypatch.setattr("ppo_fast.llm.trainer.sample_rollout", sample)
    pool = folder / "pool.py"
    judge = "Pool('ppo_fast.rewards:f1(reference=solution)', timeout=1.0, fallback=0.0)"
    pool.write_text(f"from ppo_fast.rewards import Pool\njudge = {judge}\n")
    assert main(command(folder, reward=f"{pool}:judge")) == 1
    assert "no column 'solution'" in capsys.readouterr().err
    (folder / "held_out.jsonl").write_text('{"question": "What?"}\n')
    with_reference = {"reward": "ppo_fast.rewards:f1(reference=answer)"}
    more = {"eval-prompts": str(folder / "held_out.jsonl"), "eval-every": "1"}
    assert main(command(folder, **with_reference, **more)) == 1
    assert "no column 'answer'" in capsys.readouterr().err


def test_a_column_that_some_rows_lack_is_none_there(folder):
    rows = [{"question": f"What is {i}?", **({"hint": "yes"} if i == 0 else {})} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hints.py").write_text("def hints(prompts, completions, hint): return [float(x is None) for x in hint]\n")
    assert main(command(folder, **{"reward": f"{folder / 'hints.py'}:hints", "total-steps": "3"})) == 0
    scores = [json.loads(line)["score"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(scores) == [0.75, 1.0, 1.0]


def test_triton_without_a_gpu_is_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr("ppo_fast.kernels.common.launch.interpreting", lambda: False)
    assert main(command(folder, backend="triton")) == 1
    assert "backend='triton' needs" in capsys.readouterr().err


def test_an_unknown_option_names_the_nearest(folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(command(folder, "--epoch", "3"))
    assert exit_.value.code == 2
    assert "unknown option --epoch; did you mean --epochs?" in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten_unless_asked(folder, capsys):
    assert main(command(folder)) == 0
    assert main(command(folder)) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(command(folder, "--overwrite")) == 0


def test_a_pad_token_can_be_named(folder):
    model = str(save_tiny_model(folder / "nopad", pad=False))
    assert main([*command(folder, model=model), "--pad-token", "<end>"]) == 0


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for option in ("--total-steps", "--kl-coef", "--missing-eos-penalty", "--clip-high", "--no-whiten-advantages"):
        assert option in shown
    assert "default: 0.05" in shown


def test_memory_prints_a_table_and_whether_it_fits(folder, capsys):
    model = str(folder / "model")
    assert main(["memory", "--model", model, "--gpu-gib", "24", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    heading = [cell.strip() for cell in shown.splitlines()[0].split("|")]
    assert heading[1:-1] == ["GiB", "prompts", "last token", "score", "loss", "backward", "update"]
    assert "it fits a GPU with 24.0 GiB" in shown
    assert main(["memory", "--model", model, "--gpu-gib", "1e-6"]) == 0
    assert "it does not fit a GPU with 0.0 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-tokens", "0"], "prompt_tokens must be at least 1, got 0"),
        (["--prompt-tokens", "-1"], "prompt_tokens must be at least 1, got -1"),
        (["--gpu-gib", "0"], "--gpu-gib must be a number above 0, got 0.0"),
        (["--gpu-gib", "nan"], "--gpu-gib must be a number above 0, got nan"),
    ],
)
def test_memory_rejects_impossible_sizes(options, message, folder, capsys):
    assert main(["memory", "--model", str(folder / "model"), *options]) == 1
    assert capsys.readouterr().err == f"ppo-fast: error: {message}\n"


@pytest.mark.parametrize(
    "model_config",
    [
        T5Config(vocab_size=99, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8),
        ViTConfig(),
        MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2),
        MixtralConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        ),
    ],
    ids=lambda x: x.model_type,
)
def test_memory_names_a_model_that_it_cannot_calculate(model_config, tmp_path, caplog, capsys):
    model_config.save_pretrained(tmp_path)
    assert main(["memory", "--model", str(tmp_path)]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ppo-fast")]
    assert f"the peak memory of a model of type {model_config.model_type!r} cannot be calculated" in line
    assert not [x for x in caplog.records if x.name.startswith("torch")]


def test_warnings_of_this_project_are_one_line_without_a_place_and_others_stay(monkeypatch, capsys):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    plain_warnings()
    plain_warnings()  # as each command does
    place = (str(ROOT / "ppo_fast" / "invariants.py"), 7)
    assert warnings.formatwarning("the gap", RuntimeWarning, *place) == "ppo-fast: warning: the gap\n"
    assert warnings.formatwarning("x", UserWarning, "/elsewhere/a.py", 7, "").startswith("/elsewhere/a.py:7: UserWarn")
