"""What happens to a run around its steps: modes of the caller, interruptions, output and files that fail, launches."""

import errno
import io
import json
import os
import random
import shutil
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama

from ppo_fast.cli.commands import main
from ppo_fast.common import checkpoint
from ppo_fast.common.checkpoint import check_folders
from ppo_fast.common.console import Output
from ppo_fast.common.device import ordinary_modes
from ppo_fast.common.errors import UserError
from ppo_fast.common.folders import claim
from ppo_fast.common.launched import local_rank, process_count, this_rank
from ppo_fast.common.lock import absolute, locked
from ppo_fast.common.options import read_yaml
from ppo_fast.common.signals import stop_requests
from ppo_fast.llm.config import PPOConfig, options_of
from ppo_fast.llm.distributed import init_distributed
from ppo_fast.llm.report.progress import truncate_logs
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps", "no")]
TIMED = ("seconds", "tokens_per_second", "memory_mib", "learn_tflops", "mfu")


def different(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(set(text))) for text in completions]


def trainer_of(out: Path | None = None, *, rewards=different, eval_rows=None, **changes) -> PPOTrainer:
    small = dict(
        total_steps=3, prompts_per_step=4, max_new_tokens=4, minibatches=2, epochs=1, lr=1e-3, critic_lr=1e-3,
        quiet=True, device="cpu", tensorboard=False, save_every=2, out=None if out is None else str(out),
    )  # fmt: skip
    config = PPOConfig(**{**small, **changes})
    return PPOTrainer(config, tiny_llama(), byte_tokenizer(), ROWS, rewards, eval_rows=eval_rows)


def numbers_of(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in history]


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole() -> list[dict]:
    """The numbers of a run that nothing disturbs."""
    return numbers_of(trainer_of().train())


@pytest.fixture
def stopped(tmp_path) -> Path:
    """OUT of a run that ended after step 2 of 3, with a checkpoint of that step."""
    trainer_of(tmp_path / "run").train(lambda trainer, _: trainer.steps_done == 2)
    return tmp_path / "run"


def resummed(folder: Path) -> None:
    """Write SHA256SUMS anew, as somebody does who edits a checkpoint."""
    files = sorted(f for f in folder.iterdir() if f.name != checkpoint.SUMS)
    (folder / checkpoint.SUMS).write_text("".join(f"{checkpoint.sha256(f)}  {f.name}\n" for f in files))


# Modes and random numbers of the caller


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_default_dtype_of_the_caller_changes_no_number_and_stays(whole, monkeypatch, dtype):
    trainer_models = tiny_llama()
    monkeypatch.setitem(globals(), "tiny_llama", lambda: trainer_models)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert numbers_of(trainer_of().train()) == whole
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


def test_a_default_device_of_the_caller_changes_no_number_and_stays(whole, monkeypatch):
    model = tiny_llama()
    monkeypatch.setitem(globals(), "tiny_llama", lambda: model)
    torch.set_default_device("meta")
    try:
        assert numbers_of(trainer_of().train()) == whole
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_a_mode_around_train_changes_no_number(whole, mode):
    trainer = trainer_of()
    with mode():
        assert numbers_of(trainer.train()) == whole


def test_ordinary_modes_end_with_the_block():
    with torch.no_grad(), torch.autocast("cpu"):
        with ordinary_modes():
            assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (True, False)
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (False, True)


def test_an_actor_made_under_inference_mode_is_rejected():
    with torch.inference_mode(), pytest.raises(UserError, match=r"made under torch\.inference_mode\(\)"):
        trainer_of()


def test_detect_anomaly_and_deterministic_algorithms_change_no_number(whole):
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            assert numbers_of(trainer_of().train()) == whole
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_alternating_trainers_give_the_numbers_of_each_alone(whole):
    first, second = trainer_of(), trainer_of(seed=1)
    steps = [(first.step(), second.step()) for _ in range(3)]
    assert numbers_of([mine for mine, _ in steps]) == whole
    alone = trainer_of(seed=1)
    assert numbers_of([theirs for _, theirs in steps]) == numbers_of([alone.step() for _ in range(3)])


def test_seeds_set_between_steps_have_no_effect(whole):
    def seed_all(trainer, metrics):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)

    trainer = trainer_of()
    seed_all(trainer, {})
    assert numbers_of(trainer.train(seed_all)) == whole


def test_a_trainer_in_a_thread_makes_the_same_numbers(whole, tmp_path):
    trainer, found = trainer_of(tmp_path / "run"), []
    thread = threading.Thread(target=lambda: found.extend(trainer.train()))
    thread.start()
    thread.join()
    assert numbers_of(found) == whole


def random_reward(prompts: list[str], completions: list[str]) -> list[float]:
    return [random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in completions]


def test_all_controllers_and_random_rewards_resume_bit_for_bit(tmp_path):
    options = dict(
        rewards=random_reward, critic_warmup_steps=1, entropy_target=3.0, kl_controller="adaptive", kl_horizon=20.0,
        samples_per_prompt=2, target_kl=1e-3, lr=0.02, eval_every=1, eval_rows=ROWS[:2], total_steps=4,
    )  # fmt: skip
    whole = trainer_of(tmp_path / "whole", **options).train()
    trainer_of(tmp_path / "cut", **options).train(lambda trainer, _: trainer.steps_done == 2)
    trainer = trainer_of(tmp_path / "cut", **options)
    torch.manual_seed(77)  # whatever happens before the run continues
    assert trainer.resume()
    torch.manual_seed(78)
    assert numbers_of(trainer.train()) == numbers_of(whole[2:])


# Interruptions


def test_a_second_signal_at_once_counts_as_the_same_request():
    """`timeout` of GNU coreutils sends SIGTERM to the process and to its group."""
    with stop_requests(lambda _: None) as request:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert request.name == "SIGTERM"


def test_a_second_signal_after_a_second_interrupts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with stop_requests(lambda _: None):
        signal.raise_signal(signal.SIGINT)
        now[0] = 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_ends_the_run_with_a_checkpoint(tmp_path, whole):
    def hang_up(trainer, metrics):
        if trainer.steps_done == 1:
            signal.raise_signal(signal.SIGHUP)

    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        trainer = trainer_of(tmp_path / "run", save_every=0)
        trainer.train(hang_up)
        assert (trainer.stopped_by, signal.getsignal(signal.SIGHUP)) == ("SIGHUP", signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, outside)
    trainer = trainer_of(tmp_path / "run")
    assert trainer.resume()
    assert numbers_of(trainer.train()) == whole[1:]


def test_a_run_under_nohup_ignores_a_closed_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests(lambda _: None) as request:
            signal.raise_signal(signal.SIGHUP)
        assert request.name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_model_is_saved_does_not_stop_that(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path / "run")
    save = PPOTrainer.save

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return save(*args, **options)

    monkeypatch.setattr(PPOTrainer, "save", interrupted)
    trainer.train()
    assert trainer.stopped_by is None
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_a_signal_in_the_first_evaluation_stops_before_the_first_step(tmp_path):
    def stop(prompts, completions):
        signal.raise_signal(signal.SIGTERM)
        return different(prompts, completions)

    trainer = trainer_of(tmp_path / "run", rewards=stop, eval_rows=ROWS[:2])
    assert trainer.train() == []
    assert (trainer.stopped_by, trainer.steps_done) == ("SIGTERM", 0)
    assert not trainer_of(tmp_path / "run").resume()


def test_the_last_steps_are_kept_where_the_model_cannot_be_saved(tmp_path, whole, monkeypatch):
    def fail(*args, **options):
        raise UserError("the model could not be written")

    trainer = trainer_of(tmp_path / "run")
    monkeypatch.setattr(trainer, "save", fail)
    with pytest.raises(UserError, match=r"could not be written; what was learned before is in .*step-3"):
        trainer.train()
    trainer = trainer_of(tmp_path / "run")
    assert trainer.resume()
    assert trainer.train() == []  # the checkpoint is that of the last step: no step is made twice, nor one more
    assert (tmp_path / "run/model/model.safetensors").exists()
    assert steps_in(tmp_path / "run/metrics.jsonl") == [1, 2, 3]


def test_a_checkpoint_that_fails_after_an_error_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(*args, **options):
        raise UserError("the disk is full")

    def fails_later(prompts, completions, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError("no")
        return different(prompts, completions)

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(UserError, match=r"raised ZeroDivisionError.*; and the disk is full"):
        trainer_of(tmp_path / "run", rewards=fails_later).train()


# Output


class Broken(io.StringIO):
    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_run_whose_output_is_closed_continues_and_reports_it_once(tmp_path, capsys, monkeypatch, whole):
    trainer = trainer_of(tmp_path / "run", quiet=False, show_samples_every=1)
    monkeypatch.setattr(sys, "stdout", Broken())
    assert numbers_of(trainer.train()) == whole
    assert capsys.readouterr().err == "ppo-fast: cannot print (Broken pipe); the run continues without output\n"


def test_an_ascii_output_gets_escapes(tmp_path):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Output(stream).write("hé → ␣\n")
    assert raw.getvalue() == b"h\\xe9 \\u2192 \\u2423\n"


def test_a_run_without_an_output_stream_trains(monkeypatch, whole):
    monkeypatch.setattr(sys, "stdout", None)
    assert numbers_of(trainer_of(quiet=False).train()) == whole


# Files


def test_an_out_that_is_removed_during_the_run_is_made_again(tmp_path, whole, capsys):
    out = tmp_path / "run"

    def remove(trainer, metrics):
        if trainer.steps_done == 1:
            shutil.rmtree(out)

    trainer_of(out, quiet=False, tensorboard=True).train(remove)
    assert steps_in(out / "metrics.jsonl") == [1, 2, 3]
    assert {"config.yaml", "model", "samples.jsonl", "tensorboard"} <= {path.name for path in out.iterdir()}
    assert f"{out} was removed or renamed during the run" in capsys.readouterr().out
    trainer = trainer_of(out)
    assert trainer.resume()
    assert trainer.steps_done == 2


def test_an_out_that_is_renamed_during_the_run_keeps_what_it_had(tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    trainer_of(out).train(lambda trainer, _: (trainer.steps_done == 1 and out.rename(other)) and None)
    assert (steps_in(other / "metrics.jsonl"), steps_in(out / "metrics.jsonl")) == ([1], [1, 2, 3])


@pytest.mark.parametrize("name", ["model", "best", "checkpoints", "eval"])
def test_a_name_that_the_run_cannot_replace_is_rejected_before_the_first_step(tmp_path, name):
    trainer = trainer_of(tmp_path / "run")
    (claim(tmp_path / "run") / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is a file, and the run needs a folder there"):
        trainer.train()
    assert trainer.steps_done == 0


def test_links_are_rejected_where_they_would_not_lead_to_the_new_folder(tmp_path):
    for name in ("elsewhere", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/checkpoints").symlink_to(tmp_path / "elsewhere")
    check_folders(tmp_path / "out")
    (tmp_path / "out/model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model is a link"):
        check_folders(tmp_path / "out")


def test_an_out_that_the_tokenizer_cannot_write_to_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"run-\\udcc3\\udcbc is not ASCII.*PYTHONUTF8=1"):
        check_folders(tmp_path / "run-\udcc3\udcbc")  # "ü" in an argument of a process whose encoding is ASCII


@pytest.mark.parametrize("name", ["a b ü %s {x} [bold] 日本", "run[1]*", "a\nb"])
def test_any_name_of_out_can_be_resumed(tmp_path, whole, name):
    trainer_of(tmp_path / name).train(lambda trainer, _: trainer.steps_done == 2)
    trainer = trainer_of(tmp_path / name)
    assert trainer.resume()
    assert numbers_of(trainer.train()) == whole[2:]


def test_a_checkpoint_copied_elsewhere_continues_in_another_out(stopped, tmp_path, whole):
    shutil.copytree(stopped / "checkpoints/step-2", tmp_path / "copy of a checkpoint")
    trainer = trainer_of(tmp_path / "new")
    assert trainer.resume(tmp_path / "copy of a checkpoint")
    assert numbers_of(trainer.train()) == whole[2:]


def test_a_file_named_like_a_checkpoint_is_no_checkpoint(stopped):
    (stopped / "checkpoints/step-9").write_text("notes")
    trainer = trainer_of(stopped)
    assert trainer.resume()
    trainer.train()
    assert (stopped / "checkpoints/step-9").read_text() == "notes"


def test_an_unfinished_copy_of_a_checkpoint_gets_advice(stopped):
    (stopped / "checkpoints/step-9").mkdir()
    with pytest.raises(UserError, match=r"step-9 is not a checkpoint.*; remove it to continue from .*step-2"):
        trainer_of(stopped).resume()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), "state.json is not JSON"),
        (lambda folder: (folder / "state.json").write_text('{"format": 1, "step": 2}'), "it has no dealt"),
        (lambda folder: (folder / "optimizers.safetensors").unlink(), "it has no optimizers"),
    ],
)
def test_an_edited_checkpoint_is_rejected_with_one_sentence(stopped, edit, message):
    edit(stopped / "checkpoints/step-2")
    resummed(stopped / "checkpoints/step-2")
    with pytest.raises(UserError, match=message):
        trainer_of(stopped).resume()


def test_an_option_that_this_version_lacks_is_named(stopped):
    file = stopped / "checkpoints/step-2/state.json"
    state = json.loads(file.read_text())
    state["run"]["config"]["ptx_coef"] = 0.1
    file.write_text(json.dumps(state))
    resummed(file.parent)
    trainer = trainer_of(stopped)
    trainer.resume()
    assert "ptx_coef was 0.1, an option that this ppo_fast does not have" in trainer.notes


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_row_without_an_end_of_line_is_kept(stopped, end):
    file = stopped / "metrics.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n").replace(b"\n", end.encode() or b"\n") + end.encode())
    assert [row["step"] for row in truncate_logs(stopped, 2)] == [1, 2]


def test_a_longer_run_may_not_change_the_rates_of_a_warm_up(tmp_path):
    options = {"lr_schedule": "constant", "warmup_ratio": 0.5, "total_steps": 4}
    trainer_of(tmp_path / "run", **options).train(lambda trainer, _: trainer.steps_done == 2)
    with pytest.raises(UserError, match="total_steps was 4 and is 40"):
        trainer_of(tmp_path / "run", **{**options, "total_steps": 40}).resume()
    options["warmup_ratio"] = 0.0
    trainer_of(tmp_path / "run", **options).train(lambda trainer, _: trainer.steps_done == 2)
    assert trainer_of(tmp_path / "run", **{**options, "total_steps": 40}).resume()


def test_checkpoints_without_metrics_are_not_overwritten_unless_asked(tmp_path, capsys):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    (claim(tmp_path / "out") / "checkpoints" / "step-2").mkdir(parents=True)
    paths = {name: str(tmp_path / name) for name in ("model", "out")}
    options = [x for name, path in paths.items() for x in (f"--{name}", path)]
    assert main(["train", *options, "--prompts", str(tmp_path / "prompts.jsonl"), "--reward", "x:y"]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_an_out_without_a_step_can_be_used_again(tmp_path, monkeypatch):
    from ppo_fast.cli.train import _holds_run

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(UserError, match="tensorboard is not installed"):
        trainer_of(tmp_path / "run", tensorboard=True).train()
    assert not _holds_run(tmp_path / "run")


def test_a_file_system_that_does_not_sync_folders_gets_checkpoints(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    checkpoint.write(tmp_path, 1, {"t": {"x": torch.ones(1)}}, {}, keep=1)
    assert checkpoint.read(tmp_path / "step-1").tensors["t"]["x"].item() == 1.0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl", reason="this system has no fcntl")

    def none(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_relative_out_in_a_removed_folder_is_rejected_with_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="out is relative to the current folder, which was removed"):
        absolute("out")


def test_a_step_is_kept_where_after_step_fails(tmp_path, whole):
    def fail(trainer, metrics):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer_of(tmp_path / "run").train(fail)
    trainer = trainer_of(tmp_path / "run")
    assert trainer.resume()
    assert numbers_of(trainer.train()) == whole[1:]


# Configuration and launch


@pytest.mark.parametrize("line", ["seed: 010", "total_steps: 0100", "seed: -010", "seed: 1:30"])
def test_numbers_that_yaml_reads_as_other_numbers_are_rejected(tmp_path, line):
    (tmp_path / "c.yaml").write_text(line + "\n")
    with pytest.raises(UserError, match=r"is -?\d+ in YAML 1\.1.*: write a decimal number"):
        read_yaml(tmp_path / "c.yaml", ["seed", "total_steps"])


def test_other_forms_of_integers_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 0\ntop_k: 1_000\nepochs: 0x10\n")
    assert read_yaml(tmp_path / "c.yaml", ["seed", "top_k", "epochs"]) == {"seed": 0, "top_k": 1000, "epochs": 16}


def test_none_in_a_file_switches_off_as_on_the_command_line():
    assert options_of({"max_grad_norm": "none", "value_clip": "none"}).max_grad_norm is None
    with pytest.raises(UserError, match="lr must be of type float, got 'none'"):
        options_of({"lr": "none"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' must be an integer"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0 must be at least 1"),
        ({"WORLD_SIZE": "2"}, "RANK is not: start all processes with torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2 must be .* below"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK = 'x' must be an integer"),
    ],
)
def test_variables_that_torchrun_did_not_set_are_named(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        init_distributed(PPOConfig(device="cpu"))


def test_what_torchrun_sets_is_read(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (process_count(), this_rank(2), local_rank()) == (2, 1, 0)


def test_the_error_of_a_process_that_waits_in_vain_names_the_address(monkeypatch):
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"did not meet at localhost:1 .* within 0\.5 s"):
        init_distributed(PPOConfig(device="cpu", process_timeout=0.5))
