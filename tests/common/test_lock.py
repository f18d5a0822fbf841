"""One run per folder, and folders that do not depend on the current folder."""

import os
import subprocess
import sys
import threading

import pytest
from support.tiny import byte_tokenizer, distinct, save_tiny_model, tiny_llama

from ppo_fast.cli.commands import main
from ppo_fast.common.errors import UserError
from ppo_fast.common.lock import HOLDER, locked
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.trainer import PPOTrainer

HOLD = """
import sys, time
from ppo_fast.common.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_gets_an_error_that_names_the_holder(tmp_path, holder):
    message = rf"another run is using .*out: process {holder.pid} on .*, since \d{{4}}-"
    with pytest.raises(UserError, match=message), locked(tmp_path / "out"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "out"):
        assert f"process {os.getpid()}" in (tmp_path / "out" / HOLDER).read_text()
    assert not (tmp_path / "out" / HOLDER).exists()


def test_a_thread_may_enter_again_and_another_may_not(tmp_path):
    found = []

    def other():
        try:
            with locked(tmp_path):
                found.append("entered")
        except UserError as error:
            found.append(str(error))

    with locked(tmp_path), locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in found[0]
    with locked(tmp_path), locked(None):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*out: "), locked(tmp_path / "file" / "out"):
        pass


def test_train_and_the_command_line_reject_a_folder_in_use(tmp_path, holder, capsys):
    save_tiny_model(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "r.py").write_text("def f(prompts, completions):\n    return [0.0] * len(completions)\n")
    given = ["--model", str(tmp_path / "m"), "--prompts", str(tmp_path / "p.jsonl"), "--reward", f"{tmp_path}/r.py:f"]
    assert main(["train", *given, "--out", str(tmp_path / "out"), "--overwrite"]) == 1
    assert f"process {holder.pid} on" in capsys.readouterr().err
    trainer = trainer_of(out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="another run is using"):
        trainer.train()


def trainer_of(reward=distinct, **options) -> PPOTrainer:
    small = {"total_steps": 2, "prompts_per_step": 2, "minibatches": 1, "epochs": 1, "max_new_tokens": 4, "quiet": True}
    config = PPOConfig(**small | {"device": "cpu", "tensorboard": False} | options)
    return PPOTrainer(config, tiny_llama(258), byte_tokenizer(), [{"prompt": "ab"}], reward)


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of(out="run")
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")
    trainer.train()
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert not (tmp_path / "elsewhere" / "run").exists()


def test_checkpoints_and_best_of_an_abandoned_branch_are_removed(tmp_path):
    """A run that continues from an older checkpoint writes its own later ones."""
    options = {"total_steps": 4, "save_every": 1, "keep_checkpoints": 9, "lr": 1e-2, "out": str(tmp_path / "run")}
    trainer_of(**options).train(lambda t, m: t.steps_done == 3)
    folder = tmp_path / "run" / "checkpoints"
    best = tmp_path / "run" / "best"
    best.mkdir()
    (best / "evaluation.json").write_text('{"step": 3, "eval/score": 9.0}')
    assert sorted(x.name for x in folder.iterdir()) == ["step-1", "step-2", "step-3"]
    trainer = trainer_of(**options)
    trainer.resume(folder / "step-1")
    trainer.train(lambda t, m: t.steps_done == 2)
    assert sorted(x.name for x in folder.iterdir()) == ["step-1", "step-2"]
    assert not best.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--resume"], "--resume needs --out"),
        (["--allow-changes", "--out", "o"], "--allow-changes belongs to --resume"),
    ],
)
def test_options_of_a_continued_run_alone_are_rejected(given, message, capsys):
    assert main(["train", "--model", "m", "--prompts", "p", "--reward", "r:f", *given]) == 1
    assert message in capsys.readouterr().err
