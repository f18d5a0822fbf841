"""Files of a run on a full disk: one sentence, nothing half-written, and a run that can be resumed.

A limit on the size of files simulates a full disk: writing fails in the middle of a record.
"""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama

from ppo_fast.cli.commands import main
from ppo_fast.common.checkpoint import UNFINISHED, reported, write_file
from ppo_fast.common.errors import UserError
from ppo_fast.common.jsonl import JsonLines
from ppo_fast.common.logger import Events
from ppo_fast.common.plots import can_draw, draw_learning_curves
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.report.evaluation_page import write
from ppo_fast.llm.report.export import save_model
from ppo_fast.llm.report.progress import truncate_logs
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps", "no")]
TIMED = ("seconds", "tokens_per_second", "memory_mib", "learn_tflops", "mfu")


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """Limit the size of each file to this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trainer_of(out: Path, **options) -> PPOTrainer:
    small = dict(
        total_steps=4, prompts_per_step=4, max_new_tokens=5, minibatches=2, epochs=1, lr=1e-3, quiet=True,
        device="cpu", out=str(out), tensorboard=False, save_every=2, show_samples_every=1,
    )  # fmt: skip
    return PPOTrainer(
        PPOConfig(**{**small, **options}),
        tiny_llama(),
        byte_tokenizer(),
        ROWS,
        lambda prompts, completions: [float(len(set(text))) for text in completions],
        eval_rows=ROWS[:2],
    )


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*" + UNFINISHED)]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def numbers_of(file: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows_of(file)]


def test_metrics_on_a_full_disk_keep_whole_lines_and_the_run_is_resumed(tmp_path):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    out = tmp_path / "run"
    trainer = trainer_of(out)

    def fill(trainer, metrics):
        if trainer.steps_done == 3:
            most = (out / "metrics.jsonl").stat().st_size + 30
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with full_disk(2**40), pytest.raises(UserError) as error:
        trainer.train(fill)
    assert str(error.value) == (
        f"{out / 'metrics.jsonl'} could not be written: File too large;"
        f" {out / 'checkpoints' / 'step-2'} is whole, and the run can be resumed from it with --resume"
    )
    assert [row["step"] for row in rows_of(out / "metrics.jsonl")] == [0, 1, 2, 3]
    assert unfinished(out) == []
    again = trainer_of(out)
    assert again.resume()
    again.train()
    assert numbers_of(out / "metrics.jsonl") == numbers_of(tmp_path / "whole" / "metrics.jsonl")
    assert rows_of(out / "samples.jsonl") == rows_of(tmp_path / "whole" / "samples.jsonl")


def test_a_record_that_does_not_fit_leaves_no_part_of_it(tmp_path):
    file = JsonLines(tmp_path / "run" / "x.jsonl")
    file.write_row({"text": "first \ud83d"})
    with full_disk(40), pytest.raises(UserError, match=r"x.jsonl could not be written: .*; there is no checkpoint"):
        file.write_row({"text": "second, which is longer than the limit"})
    file.write_row({"text": "third"})
    file.sync()
    file.close()
    assert [row["text"] for row in rows_of(tmp_path / "run" / "x.jsonl")] == ["first \ud83d", "third"]


def test_a_file_that_does_not_fit_leaves_the_one_before(tmp_path):
    path = tmp_path / "x"
    write_file(path, "old")
    with full_disk(10), pytest.raises(OSError, match="too large"):
        write_file(path, "new" * 10)
    assert path.read_text() == "old"
    assert unfinished(tmp_path) == []


def test_events_on_a_full_disk_end_in_a_sentence_and_can_be_read(tmp_path):
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "ppo_fast[train]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = Events(tmp_path / "tensorboard")

    def fill():
        for step in range(1, 100):
            events.add({"step": step, "score": step / 2, "kl": None})

    with full_disk(500), pytest.raises(UserError, match=r"events.out.tfevents\..* could not be written: File too"):
        fill()
    events.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    scores = [(x.step, x.value) for x in reader.Scalars("score")]
    assert scores == [(n, n / 2) for n in range(1, len(scores) + 1)]
    assert 1 < len(scores) < 99
    assert all(x.value != x.value for x in reader.Scalars("kl"))


def test_a_model_on_a_full_disk_leaves_the_one_before(tmp_path):
    actor, tokenizer = tiny_llama(), byte_tokenizer()
    folder = save_model(actor, tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with full_disk(100_000), pytest.raises(UserError, match=r"the model could not be written to .*model: .*too large"):
        save_model(tiny_llama(seed=1), tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert unfinished(tmp_path) == []


def test_an_error_of_the_disk_that_tokenizers_raises_is_a_sentence(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()

    def fail(*arguments, **options):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"the model could not be written to .*: No space left on device"):
        save_model(tiny_llama(), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), reported("no disk is concerned"):
        1 / 0  # noqa: B018


def test_an_evaluation_on_a_full_disk_is_named(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    evaluation = trainer._evaluation()
    with full_disk(200), pytest.raises(UserError, match=r"the evaluation could not be written to .*eval: File too"):
        write(evaluation, tmp_path / "run" / "eval", trainer.config)
    assert unfinished(tmp_path) == []


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
def test_curves_on_a_full_disk_leave_the_picture_before(tmp_path):
    path = tmp_path / "learning_curves.png"
    draw_learning_curves([{"step": 1, "score": 0.0}, {"step": 2, "score": 1.0}], path, "first")
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    with full_disk(1000), pytest.raises(UserError, match=r"the picture .*learning_curves.png could not be written"):
        draw_learning_curves([{"step": 1, "score": 0.0}, {"step": 2, "score": 1.0}], path, "second")
    assert path.read_bytes() == before
    assert unfinished(tmp_path) == []


def test_the_command_line_prints_one_line_for_a_full_disk(tmp_path, capsys):
    save_tiny_model(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "r.py").write_text("def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    command = ["train", "--model", str(tmp_path / "m"), "--prompts", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    command += ["--reward", f"{tmp_path / 'r.py'}:f", "--total-steps", "2", "--prompts-per-step", "2", "--quiet"]
    command += ["--minibatches", "1", "--max-new-tokens", "4", "--out", str(tmp_path / "run"), "--save-every", "0"]
    with full_disk(100_000):
        assert main(command) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ppo-fast")]
    assert len(lines) == 1
    assert lines[0].startswith(f"ppo-fast: error: the model could not be written to {tmp_path / 'run' / 'model'}: ")
    assert unfinished(tmp_path) == []
    with full_disk(300):
        assert main([*command, "--overwrite"]) == 1
    expected = "ppo-fast: error: the tokenizer could not be written to the temporary folder: File too large"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"score": 1}', '{"step": "2"}', "", 9999 * "["])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_line_that_no_run_wrote_is_named_at_resume(tmp_path, name, line):
    (tmp_path / name).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=rf"{name}, line 2 is not a row that ppo-fast wrote .*: remove this line"):
        truncate_logs(tmp_path, 2)


def test_files_of_others_beside_evaluations_are_kept(tmp_path):
    (tmp_path / "eval").mkdir()
    for name in ("step-1.md", "step-3.md", "step-x.md", "step-3.jsonl" + UNFINISHED):
        (tmp_path / "eval" / name).write_text("")
    truncate_logs(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["step-1.md", "step-x.md"]


def test_files_of_a_classic_run_on_a_full_disk_end_in_a_sentence(tmp_path):
    pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')
    import numpy as np

    from ppo_fast.classic.config import ClassicConfig
    from ppo_fast.classic.envs.vector import write_frames
    from ppo_fast.classic.logger import RunLogger

    config = ClassicConfig(env="CartPole-v1", out=str(tmp_path), quiet=True, tensorboard=False)

    def fill(log: RunLogger) -> None:
        for step in range(1, 100):
            log.log_metrics({"step": step, "entropy": 0.5, "explained_variance": 0.0})

    with RunLogger(config, 0) as log, full_disk(200):
        with pytest.raises(UserError, match=r"metrics.jsonl could not be written: File too large"):
            fill(log)
        with pytest.raises(UserError, match=r"summary.json could not be written: File too large"):
            log.log_summary({"text": 200 * "x"})
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows
    frames = [np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8) for n in range(3)]
    for kind in ("gif", "png"):
        with full_disk(1000), pytest.raises(UserError, match="the frames could not be written to"):
            write_frames(frames, tmp_path, kind, fps=30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl"]
    assert write_frames(frames, tmp_path, "png", fps=30) == tmp_path / "frames"
    assert [path.name for path in sorted((tmp_path / "frames").iterdir())] == ["0000.png", "0001.png", "0002.png"]
