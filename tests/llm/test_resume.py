"""What a checkpoint brings back, what is refused, and the folder of the finished model."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppo_fast.cli.commands import main
from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.report.progress import truncate_logs
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps", "no")]
TIMED = ("seconds", "tokens_per_second", "memory_mib", "learn_tflops", "mfu")


def different(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(set(text))) for text in completions]


def options(out: Path, **changes) -> PPOConfig:
    small = dict(
        total_steps=4,
        prompts_per_step=4,
        max_new_tokens=5,
        minibatches=2,
        epochs=2,
        lr=1e-3,
        critic_lr=1e-3,
        quiet=True,
        device="cpu",
        out=str(out),
        tensorboard=False,
        save_every=2,
        keep_checkpoints=2,
    )
    return PPOConfig(**{**small, **changes})


def trainer_of(out: Path, *, rows=ROWS, rewards=different, weights=None, seed: int = 0, **changes) -> PPOTrainer:
    config = options(out, **changes)
    return PPOTrainer(config, tiny_llama(258, seed=seed), byte_tokenizer(), rows, rewards, reward_weights=weights)


def steps_of(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in history]


@pytest.fixture
def saved(tmp_path) -> Path:
    """The checkpoint after step 2 of a run that stopped there."""
    trainer_of(tmp_path / "run").train(lambda trainer, _: trainer.steps_done == 3)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name == "step-2"
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic": "shared", "entropy_coef": 0.01},
        {"critic_warmup_steps": 3},
        {"kl_in": "loss", "kl_controller": "adaptive", "kl_horizon": 20.0},
        {"entropy_target": 9.0, "entropy_step": 0.01},
        {"lr_schedule": "cosine", "warmup_ratio": 0.5},
        {"lora_rank": 2, "gradient_checkpointing": True},
        {"dtype": "bfloat16", "samples_per_prompt": 2},
        {"lam_length_alpha": 0.3, "critic_lam": 1.0},
    ],
    ids=lambda changes: "+".join(changes) or "default",
)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path, changes):
    if "lora_rank" in changes:
        pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    whole = trainer_of(tmp_path / "whole", **changes)
    expected = steps_of(whole.train())
    trainer_of(tmp_path / "run", **changes).train(lambda trainer, _: trainer.steps_done == 3)
    torch.rand(17)  # another state than the one that the run stopped in
    resumed = trainer_of(tmp_path / "run", **changes)
    assert resumed.resume()
    assert resumed.steps_done == 2
    assert steps_of(resumed.train()) == expected[2:]
    for (name, a), b in zip(resumed.policy.state_dict().items(), whole.policy.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_an_option_that_is_newer_than_the_checkpoint_counts_as_its_default(tmp_path, saved):
    older = checkpoint.read(saved)
    for name in ("tf32", "chunk_bytes", "cudnn_attention"):
        del older.state["run"]["config"][name]
    assert trainer_of(tmp_path / "other").load_state_dict(older) == []
    with pytest.raises(UserError, match="chunk_bytes was None and is 1000"):
        trainer_of(tmp_path / "third", chunk_bytes=1000).load_state_dict(older)


def test_a_checkpoint_from_before_critic_lam_and_lam_length_alpha_is_continued(tmp_path, saved):
    older = checkpoint.read(saved)
    config = older.state["run"]["config"]
    assert config["lam"] == 0.95, "the default of lam is saved as a number, as it always was"
    del config["critic_lam"], config["lam_length_alpha"]
    for number, changes in enumerate(({}, {"lam": 0.95})):
        assert trainer_of(tmp_path / str(number), **changes).load_state_dict(older) == []
    with pytest.raises(UserError, match=r"lam was 0.95 and is None, lam_length_alpha was None and is 0.05"):
        trainer_of(tmp_path / "alpha", lam_length_alpha=0.05).load_state_dict(older)
    with pytest.raises(UserError, match=r"critic_lam was None and is 1.0"):
        trainer_of(tmp_path / "critic", critic_lam=1.0).load_state_dict(older)


def test_a_run_without_a_checkpoint_starts_at_step_0(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    assert trainer.resume() is False
    assert trainer.steps_done == 0


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer_of(tmp_path / "run", save_every=1, keep_checkpoints=3, total_steps=5).train()
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-3", "step-4", "step-5"]


def test_step_10_is_newer_than_step_9(tmp_path):
    for step in (9, 10):
        checkpoint.write(tmp_path, step, {"t": {"x": torch.ones(1)}}, {}, keep=5)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "step-10"
    checkpoint.write(tmp_path, 11, {"t": {"x": torch.ones(1)}}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizers.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flipped bit", "cut", "missing"])
def test_a_damaged_checkpoint_is_rejected(tmp_path, saved, name, harm):
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "missing":
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(data if harm == "flipped bit" else data[:-1])
    what = "is missing" if harm == "missing" else "is not as it was written"
    match = rf"the checkpoint .*step-2 is damaged: {name} {what}; there is no other: start again with --overwrite"
    with pytest.raises(UserError, match=match):
        trainer_of(tmp_path / "run").resume()


def test_the_error_of_a_damaged_checkpoint_names_the_one_before(tmp_path):
    trainer_of(tmp_path / "run", save_every=1).train()
    newest = tmp_path / "run" / "checkpoints" / "step-4"
    (newest / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"remove it to continue from .*step-3"):
        trainer_of(tmp_path / "run", save_every=1).resume()
    shutil.rmtree(newest)
    resumed = trainer_of(tmp_path / "run", save_every=1)
    assert resumed.resume()
    assert resumed.steps_done == 3


@pytest.mark.parametrize("text", ["", "x\n", "0" * 64 + "  ../state.json\n", "0" * 64 + "  weights.safetensors\n"])
def test_damaged_sums_are_rejected(tmp_path, saved, text):
    (saved / "SHA256SUMS").write_text(text)
    with pytest.raises(UserError, match="SHA256SUMS is not as it was written"):
        trainer_of(tmp_path / "run").resume()


def test_a_foreign_folder_is_rejected(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="other is not a checkpoint of ppo_fast: no readable SHA256SUMS in it"):
        trainer_of(tmp_path / "run").resume(tmp_path / "other")


def test_a_checkpoint_of_a_later_format_is_rejected(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    with pytest.raises(UserError, match="has format 1; this ppo_fast reads 0"):
        trainer_of(tmp_path / "run").resume()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-3, "gamma": 0.9}, "with other options: gamma was 1.0 and is 0.9; take"),
        ({"total_steps": 9}, "total_steps was 4 and is 9"),
        ({"seed": 1}, "its start model differs from the one given"),
        ({"rows": ROWS[:-1]}, "another run: its list of prompts differs"),
        ({"weights": {"different": 2.0}}, r"its set of rewards and weights differs \(.*1.0.* there, .*2.0.* here\)"),
    ],
    ids=["options", "length of a schedule", "model", "prompts", "rewards"],
)
def test_a_checkpoint_of_another_run_is_rejected(tmp_path, saved, changes, message):
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path / "run", **changes).resume()


def negative(prompts: list[str], completions: list[str]) -> list[float]:
    return [-x for x in different(prompts, completions)]


def padding_with_the_end(actor, tokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def more_ends(actor, tokenizer) -> None:
    actor.generation_config.eos_token_id = [256, 10]


def another_template(actor, tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (negative, "its code of the rewards differs"),
        (padding_with_the_end, "its tokenizer, chat template or list of end tokens differs"),
        (more_ends, "its tokenizer, chat template or list of end tokens differs"),
        (another_template, "its tokenizer, chat template or list of end tokens differs"),
    ],
)
def test_changed_rewards_and_tokenizers_are_rejected_unless_allowed(tmp_path, saved, change, message):
    reward = change if change is negative else different
    actor, tokenizer = tiny_llama(258), byte_tokenizer()
    if change is not negative:
        change(actor, tokenizer)

    def again() -> PPOTrainer:
        return PPOTrainer(options(tmp_path / "run"), actor, tokenizer, ROWS, {"different": reward})

    with pytest.raises(UserError, match=message + ".*--allow-changes"):
        again().resume()
    trainer = again()
    assert trainer.resume(allow_changes=True)
    assert any(note.startswith("from here on the ") for note in trainer.notes)
    assert trainer.steps_done == 2


def test_options_that_do_not_reach_the_numbers_may_change(tmp_path, saved):
    assert trainer_of(tmp_path / "run", save_every=1, keep_checkpoints=7, show_samples_every=1).resume()


def test_a_constant_learning_rate_lets_a_run_continue_for_longer(tmp_path):
    same = {"lr_schedule": "constant"}
    whole = steps_of(trainer_of(tmp_path / "whole", total_steps=6, **same).train())
    trainer_of(tmp_path / "run", **same).train()
    longer = trainer_of(tmp_path / "run", total_steps=6, **same)
    assert longer.resume()
    assert steps_of(longer.train()) == whole[4:]
    with pytest.raises(UserError, match="is beyond total_steps = 3"):
        trainer_of(tmp_path / "run", total_steps=3, **same).resume()


def test_another_thread_count_is_reported(tmp_path, saved):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        trainer = trainer_of(tmp_path / "run")
        assert trainer.resume()
    finally:
        torch.set_num_threads(threads)
    said = f"threads was {threads} and is {threads + 1} now: the run continues, but not bit for bit as it would have"
    assert said in trainer.notes


def test_a_disk_that_fills_up_is_named(tmp_path, saved, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = trainer_of(tmp_path / "run", save_every=1)
    assert trainer.resume()
    monkeypatch.setattr(checkpoint, "save_file", full)
    match = "checkpoint of step 3 could not be written to .*: No space left on device; .*step-2 is whole"
    with pytest.raises(UserError, match=match):
        trainer.train()
    assert [p.name for p in saved.parent.iterdir()] == ["step-2"]


def test_a_replaced_folder_is_recovered_when_the_process_dies_between_the_two_renames(tmp_path, monkeypatch):
    old, new = tmp_path / "model", tmp_path / ("model" + checkpoint.UNFINISHED)
    for folder in (old, new):
        folder.mkdir()
        (folder / "x").write_text(folder.name)

    def die(source, target):
        if Path(source) == new:
            raise KeyboardInterrupt
        return rename(source, target)

    rename = checkpoint.os.rename
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.replace(new, old)
    assert not old.exists()
    checkpoint.recover(old)
    assert (old / "x").read_text() == "model"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_finished_model_has_tokenizer_generation_config_and_card(tmp_path):
    actor = tiny_llama(258)
    actor.generation_config = GenerationConfig(top_k=7, do_sample=True, eos_token_id=256)
    trainer = PPOTrainer(options(tmp_path / "run"), actor, byte_tokenizer(), ROWS, different)
    trainer.run_options = {"model": "/home/someone/llama", "prompts": "/data/p.jsonl", "reward": ["/x/r.py:different"]}
    trainer.train()
    folder = tmp_path / "run" / "model"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (loaded.generation_config.top_k, loaded.generation_config.eos_token_id) == (7, 256)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.actor.parameters(), strict=True))
    assert tokenizer("what")["input_ids"] == byte_tokenizer()("what")["input_ids"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("| model | llama |", "| prompts | p.jsonl |", "| lr | 0.001 |", "| score in training |"):
        assert part in card
    assert "/home" not in card
    assert str(tmp_path) not in card
    assert (folder / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_are_saved_in_the_form_of_the_option(tmp_path, merge):
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    tiny_llama(258).save_pretrained(tmp_path / "start")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    actor = peft.get_peft_model(start, adapter)  # trained adapters: the reference keeps a copy, which is not the model
    config = options(tmp_path / "run", merge_adapters=merge, total_steps=1)
    trainer = PPOTrainer(config, actor, byte_tokenizer(), ROWS, different)
    trainer.train()
    folder = tmp_path / "run" / "model"
    assert (folder / "adapter_config.json").exists() is not merge
    assert not (folder / "ppo_fast_reference").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        gap = (loaded(ids).logits - trainer.actor(ids).logits).abs().max().item()
        moved = (loaded(ids).logits - tiny_llama(258)(ids).logits).abs().max().item()
    assert gap < (1e-4 if merge else 1e-6)  # merging rounds once
    assert moved > 0.1
    assert trainer.actor.peft_config, "the actor itself must keep its adapters"


def test_half_a_line_of_a_killed_run_is_removed(tmp_path):
    rows = [{"step": 1, "score": None}, {"step": 2, "score": 1.0}, {"step": 3, "score": 2.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "sco'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert truncate_logs(tmp_path, 2) == rows[:2]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows[:2])


def test_resume_without_a_folder_reports_what_it_needs():
    trainer = PPOTrainer(PPOConfig(device="cpu", quiet=True), tiny_llama(258), byte_tokenizer(), ROWS, different)
    with pytest.raises(UserError, match="resume needs out, the folder of the run to continue, or a checkpoint's"):
        trainer.resume()


def test_a_resumed_run_keeps_the_dtype_that_auto_chose(tmp_path, monkeypatch, capsys):
    """A second measurement, which other work disturbs, may choose another one."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    (tmp_path / "r.py").write_text("def f(prompts, completions): return [float(len(c)) for c in completions]\n")
    command = ["train", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "p.jsonl"), "--quiet"]
    command += ["--reward", f"{tmp_path / 'r.py'}:f", "--device", "cpu", "--out"]
    command += [str(tmp_path / "run"), "--prompts-per-step", "4", "--max-new-tokens", "3", "--save-every", "1"]
    monkeypatch.setattr("ppo_fast.common.device.bfloat16_cost", lambda device: 0.6)
    assert main([*command, "--lr-schedule", "constant", "--total-steps", "1"]) == 0
    monkeypatch.setattr("ppo_fast.common.device.bfloat16_cost", lambda device: 0.8)
    assert main([*command, "--lr-schedule", "constant", "--total-steps", "2", "--resume"]) == 0, capsys.readouterr().err
    assert "dtype: bfloat16\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    last = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert json.loads((last / "state.json").read_text())["run"]["config"]["dtype"] == "bfloat16"


def test_a_trainer_whose_auto_chooses_another_dtype_names_that_of_the_run(tmp_path, monkeypatch):
    options = dict(device="cpu", quiet=True, out=str(tmp_path / "run"), prompts_per_step=4, max_new_tokens=3)

    def trainer(**more):
        config = PPOConfig(**options, **more, total_steps=1, save_every=1, tensorboard=False)
        return PPOTrainer(config, tiny_llama(258), byte_tokenizer(), ROWS, different)

    monkeypatch.setattr("ppo_fast.common.device.bfloat16_cost", lambda device: 0.2)
    trainer().train()
    monkeypatch.setattr("ppo_fast.common.device.bfloat16_cost", lambda device: 2.0)
    with pytest.raises(
        UserError, match=r"dtype was bfloat16 and is float32 \(dtype = auto may choose another one here"
    ):
        trainer().resume()
    assert trainer(dtype="bfloat16").resume()
