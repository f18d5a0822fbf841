"""A real pretrained model, from a .gguf file: it is loaded, sampled, trained for a step, and saved as a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.smollm2 import smollm2

from ppo_fast.cli import main
from ppo_fast.common.errors import UserError
from ppo_fast.llm.models.loading import load_actor, load_model_config
from ppo_fast.llm.models.weights import check_folder

REWARD = """
def digits(prompts, completions):
    return [sum(c.isdigit() for c in text) / len(text) for text in completions]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Calculate: {a} + {99 - a} =", "answer": "99"} for a in range(10, 26)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(REWARD)
    return tmp_path


@pytest.mark.slow
def test_a_real_model_learns_from_a_gguf_file_and_is_saved_as_a_folder(data: Path):
    out = data / "out"
    file = smollm2()
    options = "--total-steps 1 --prompts-per-step 16 --max-new-tokens 5 --minibatches 2 --epochs 1 --lr 1e-5 --quiet"
    options += " --dtype float32"
    given = ["--model", file, "--prompts", data / "sums.jsonl", "--reward", f"{data / 'r.py'}:digits", "--out", out]
    # one process more, because the test process keeps no model of this size
    command = [sys.executable, "-m", "ppo_fast.cli", "train", *map(str, given), *options.split(), "--critic", "shared"]
    done = subprocess.run(
        [*command, "--stop", r"\n"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (step,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 0 < step["score"] < 1
    assert step["kl"] == 0, "the reference starts as the actor"
    assert step["sampler_gap_p99"] < 1e-3
    assert step["learn/grad_norm"] > 0
    assert yaml.safe_load((out / "config.yaml").read_text())["model"] == str(file)
    before, tokenizer = load_actor(file)
    after, its_tokenizer = load_actor(out / "model")  # an ordinary folder
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert its_tokenizer.chat_template == tokenizer.chat_template
    changes = [(a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < max(changes) < 1e-3
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(before(input_ids=ids).logits[0, -1].argmax()) == " Paris"


def test_a_gguf_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = smollm2().read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data[:100_000])
    with pytest.raises(UserError, match=r"cannot load the model in .*damaged\.gguf: "):
        check_folder(damaged, "model")
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(data.replace(b"llama", b"lamma"))
    with pytest.raises(UserError, match=r"cannot load the model in .*unknown\.gguf: .*lamma") as error:
        check_folder(unknown, "model")
    assert "\n" not in str(error.value)
    given = ["--prompts", str(tmp_path), "--reward", "r.py:f"]
    assert main(["memory", "--model", str(tmp_path / "absent.gguf")]) == 1
    assert "absent.gguf: there is no such file" in capsys.readouterr().err
    assert main(["train", "--model", str(unknown), *given]) == 1


def test_the_memory_of_a_gguf_model_is_calculated(capsys: pytest.CaptureFixture[str]):
    assert load_model_config(smollm2()).hidden_size == 576
    assert main(["memory", "--model", str(smollm2())]) == 0
    assert "GiB" in capsys.readouterr().out
