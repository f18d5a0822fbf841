"""Output folders: no command replaces files of others."""

import os
from pathlib import Path

import pytest
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama

from ppo_fast.cli.commands import main
from ppo_fast.common.errors import UserError
from ppo_fast.common.folders import ENDINGS, MARK, claim
from ppo_fast.examples import arithmetic, sampling
from ppo_fast.examples.rlhf import __main__ as rlhf
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.trainer import PPOTrainer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_made_and_marked_and_belongs_to_its_command(tmp_path):
    out = claim(tmp_path / "a" / "b", "the report")
    assert (out / MARK).read_text() == "the report\n"
    (out / "page.md").write_text("old")
    assert claim(out, "the report") == claim(out) == out
    with pytest.raises(UserError, match=r"b holds the results of the report: choose another --out"):
        claim(out, "the example")
    assert claim(tmp_path / "a" / "empty") == tmp_path / "a" / "empty"


@pytest.mark.parametrize("name", ["notes.md", "metrics.jsonl", ".lock", ".lock.holder"])
def test_a_folder_with_other_files_is_rejected(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds files that ppo_fast did not write, such as {name}: choose a new or"):
        claim(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}
    with pytest.raises(UserError, match=rf"{name} is a file, and the results need a folder: choose another --out"):
        claim(tmp_path / name)
    with pytest.raises(UserError, match=r"cannot write to .*: Not a directory"):
        claim(tmp_path / name / "x")


def test_a_folder_with_folders_of_others_is_rejected(tmp_path):
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match=r"holds files that ppo_fast did not write, such as \.git: choose a new or"):
        claim(tmp_path)


def test_files_that_no_command_could_replace_are_accepted(tmp_path):
    for name in ("log.txt", "slurm-17.out", "run.sh", ".gitignore"):
        (tmp_path / name).write_text("mine")
    claim(tmp_path)
    assert contents(tmp_path).keys() == {"log.txt", "slurm-17.out", "run.sh", ".gitignore", MARK}


def test_the_top_of_a_disk_is_an_output_folder(tmp_path):
    (tmp_path / "lost+found").mkdir()
    assert claim(tmp_path) == tmp_path


def test_a_copy_without_the_mark_gets_an_error_that_names_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"a copy of an output folder needs its hidden file \.ppo_fast, too$"):
        claim(tmp_path)
    (tmp_path / MARK).write_text("ppo_fast\n")
    assert claim(tmp_path) == tmp_path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of another program, with file names of our commands, and beside it the files that a run needs."""
    save_tiny_model(tmp_path / "start")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    (tmp_path / "r.py").write_text("def f(prompts, completions): return [float(len(c)) for c in completions]\n")
    folder = tmp_path / "Other program"
    names = ["model/weights", "best/x", "checkpoints/step-1/state.json", "metrics.jsonl", "config.yaml", "summary.json"]
    names += ["learning_curves.png", "sampling.png", "settings.json", "report.md", "supervised/x", "README.md"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def commands(folder: Path, out: str) -> dict[str, tuple]:
    start, prompts = str(folder / "start"), str(folder / "prompts.jsonl")
    train = ["train", "--model", start, "--prompts", prompts, "--reward", f"{folder / 'r.py'}:f", "--device", "cpu"]
    return {
        "train": (main, [*train, "--out", out]),
        "train --overwrite": (main, [*train, "--out", out, "--overwrite"]),
        "train --resume": (main, [*train, "--out", out, "--resume"]),
        "arithmetic": (arithmetic.main, ["--out", out]),
        "rlhf": (rlhf.main, ["--out", out]),
        "sampling": (sampling.main, ["--out", out, "--model", start, "--prompts", prompts]),
    }


@pytest.mark.parametrize("name", commands(Path(), ""))
def test_no_command_writes_to_a_folder_with_other_files(foreign, name, capsys):
    before = contents(foreign)
    for out, said in (
        (foreign, "holds files that ppo_fast did not write, such as README.md: choose a new or empty folder"),
        (foreign / "metrics.jsonl", "is a file, and the results need a folder: choose another --out"),
    ):
        command, arguments = commands(foreign.parent, str(out))[name]
        capsys.readouterr()
        assert command(arguments) == 1
        assert said in capsys.readouterr().err
        assert contents(foreign) == before


def test_classic_does_not_write_to_a_folder_with_other_files(foreign, capsys):
    pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')
    before = contents(foreign)
    for out in (foreign, foreign / "metrics.jsonl"):
        for more in ([], ["--resume"]):
            assert main(["classic", "--env", "CartPole-v1", "--out", str(out), *more]) == 1
            assert "choose" in capsys.readouterr().err
            assert contents(foreign) == before


def test_a_trainer_from_python_does_not_write_to_a_folder_with_other_files(foreign):
    before = contents(foreign)
    options = PPOConfig(out=str(foreign), device="cpu", quiet=True, total_steps=1, prompts_per_step=4, max_new_tokens=3)
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    trainer = PPOTrainer(
        options, tiny_llama(), byte_tokenizer(), rows, lambda prompts, completions: [0.0] * len(prompts)
    )
    for call in (trainer.train, lambda: trainer.save("model")):
        with pytest.raises(UserError, match="holds files that ppo_fast did not write"):
            call()
    assert contents(foreign) == before


def test_one_example_does_not_replace_the_results_of_another(tmp_path, capsys):
    claim(tmp_path / "out", "the sampling example")
    for command in (arithmetic.main, rlhf.main):
        assert command(["--out", str(tmp_path / "out")]) == 1
        assert "holds the results of the sampling example: choose another --out" in capsys.readouterr().err


def test_a_recipe_follows_no_link_and_names_its_folder(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "mine" / "recipe.yaml")
    assert main(["recipe", "dialogue", str(tmp_path / "mine")]) == 1
    assert not (tmp_path / "elsewhere").exists()
    capsys.readouterr()
    assert main(["recipe", "dialogue", str(tmp_path / "new")]) == 0
    said = f"recipe.yaml, prompts.jsonl, held_out.jsonl are in {tmp_path / 'new'}; ppo-fast train"
    assert capsys.readouterr().out.startswith(said)


def endings_in(folder: Path) -> set[str]:
    return {x.suffix or x.name for x in folder.iterdir() if x.is_file() and x.name != MARK}


def test_every_file_at_the_top_of_an_output_folder_has_a_known_ending(tmp_path):
    options = PPOConfig(
        out=str(tmp_path / "llm"), device="cpu", quiet=True, total_steps=2, prompts_per_step=4, max_new_tokens=3
    )
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    PPOTrainer(
        options,
        tiny_llama(),
        byte_tokenizer(),
        rows,
        lambda prompts, completions: [float(len(x)) for x in completions],
        eval_rows=[{"prompt": "c"}],
    ).train()
    assert {".jsonl", ".yaml"} <= endings_in(tmp_path / "llm") <= ENDINGS


def test_every_file_that_classic_writes_has_a_known_ending(tmp_path):
    pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')
    command = ["classic", "--env", "ppo_fast/Maze-v0", "--total-steps", "300", "--record", "gif", "--quiet"]
    assert main([*command, "--eval-episodes", "1", "--eval-max-steps", "5", "--out", str(tmp_path / "maze")]) == 0
    assert {".jsonl", ".json", ".gif"} <= endings_in(tmp_path / "maze") <= ENDINGS


def unlocked(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if ".lock" not in name}


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_train_and_classic_do_not_replace_a_run_of_the_other(foreign, tmp_path, capsys, more):
    pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')
    (command, arguments), out = commands(foreign.parent, str(tmp_path / "out"))["train"], tmp_path / "out"
    for name, owner in (("config.yaml", "train"), ("config.json", "classic")):
        claim(out)
        (out / "config.yaml").unlink(missing_ok=True)
        (out / name).write_text("of a run")
        (out / "metrics.jsonl").write_text('{"step": 1}\n')
        before = unlocked(out)
        other = (command, arguments) if owner == "classic" else (main, ["classic", "--out", str(out)])
        assert other[0]([*other[1], *more]) == 1
        said = capsys.readouterr().err
        if owner == "classic" or more != ["--resume"]:  # which finds no checkpoint
            assert f"holds a run of `ppo-fast {owner}`: choose another --out" in said
        assert unlocked(out) == before
