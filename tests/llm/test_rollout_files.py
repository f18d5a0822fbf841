"""OUT/rollouts: the answers of each step as the trainer computed them, in files that are read back to the bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import byte_tokenizer, tiny_llama

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.hashes import vocabulary_hash
from ppo_fast.llm.models.weights import weights_hash
from ppo_fast.llm.rollout_files import RecordedRollout, read_rollouts, write_rollout
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps")]
PER_TOKEN = ("logprobs", "values", "rewards", "advantages")


def different(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(set(text))) for text in completions]


def trainer_of(out: Path | None, **changes: object) -> PPOTrainer:
    options: dict[str, object] = {
        "total_steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 9, "minibatches": 2,
        "epochs": 1, "critic_lr": 1e-3, "quiet": True, "device": "cpu", "tensorboard": False, "save_every": 2,
        "dump_rollouts": True, "score_clip": 5.0, "stop": tuple("abcdefghijklmnopqrstuvwxyz"),
        "out": None if out is None else str(out),
    }  # fmt: skip
    return PPOTrainer(PPOConfig(**options | changes), tiny_llama(), byte_tokenizer(), ROWS, different)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The rollouts of a run of one step."""
    trainer_of(tmp_path / "run", total_steps=1).train()
    return tmp_path / "run" / "rollouts" / "step-1.safetensors"


def test_a_run_records_what_each_step_learned_from(tmp_path: Path):
    trainer, seen = trainer_of(tmp_path), []
    identity = weights_hash(trainer.actor)
    trainer.train(lambda trainer, metrics: seen.append(trainer.last_experience))
    found = read_rollouts(tmp_path / "rollouts")
    assert [x.step for x in found] == [1, 2, 3]
    for recorded, experience in zip(found, seen, strict=True):
        ours, theirs = recorded.rollout, experience.rollout
        assert recorded.model == identity
        assert recorded.tokenizer == vocabulary_hash(byte_tokenizer())
        for name in ("prompt_lengths", "completion_lengths", "completion_ids", "prompt_index", "ended"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert torch.equal(ours.tokens[:, : -ours.completion_width].sum(1), prompt_sums(experience))
        assert torch.equal(ours.mask, theirs.mask)
        assert ours.scores == theirs.scores
        for name in PER_TOKEN:
            assert torch.equal(getattr(recorded, name), getattr(experience, name)), name
    assert found[1].values.abs().max() > 0
    assert found[1].rewards.sum(1).max() < max(found[1].rollout.scores) + 1e-3


def prompt_sums(experience) -> torch.Tensor:
    """The sum of the prompt tokens of each row, without padding."""
    rollout = experience.rollout
    first = rollout.tokens.shape[1] - rollout.completion_width
    rows = zip(rollout.tokens, rollout.prompt_lengths, strict=True)
    return torch.stack([tokens[first - length : first].sum() for tokens, length in rows])


def test_a_file_has_the_documented_size(tmp_path: Path):
    trainer_of(tmp_path, total_steps=1).train()
    file = tmp_path / "rollouts" / "step-1.safetensors"
    tensors = load_file(file)
    prompts, answers, tokens = (len(tensors[name]) for name in ("prompt_ids", "answer_lengths", "answer_ids"))
    counted = 4 * prompts + 4 * len(tensors["prompt_lengths"]) + 13 * answers + 21 * tokens
    assert sum(x.numel() * x.element_size() for x in tensors.values()) == counted
    assert counted < file.stat().st_size <= counted + 4096
    assert len(tensors["prompt_lengths"]) == 4, "each prompt once, though it has two answers"


def test_padding_of_the_rollout_is_not_written(tmp_path: Path, file: Path):
    (recorded,) = read_rollouts(file)
    assert len(set(recorded.rollout.completion_lengths)) > 1
    pad = torch.nn.functional.pad
    left = dataclasses.replace(recorded.rollout, tokens=pad(recorded.rollout.tokens, (7, 0), value=257))
    assert write_rollout(tmp_path, dataclasses.replace(recorded, rollout=left)).read_bytes() == file.read_bytes()


def test_a_resumed_run_leaves_the_same_files(tmp_path: Path):
    trainer_of(tmp_path / "whole", total_steps=4).train()
    trainer_of(tmp_path / "run", total_steps=4).train(lambda trainer, _: trainer.steps_done == 3)
    folder = tmp_path / "run" / "rollouts"
    (folder / "step-9.safetensors").write_bytes(b"of a later branch")
    (folder / "step-3.safetensors.unfinished").write_bytes(b"of a killed process")
    resumed = trainer_of(tmp_path / "run", total_steps=4)
    assert resumed.resume()
    assert resumed.steps_done == 2
    resumed.train()
    files = sorted(folder.iterdir())
    assert [x.name for x in files] == [f"step-{n}.safetensors" for n in (1, 2, 3, 4)]
    for ours in files:
        assert ours.read_bytes() == (tmp_path / "whole" / "rollouts" / ours.name).read_bytes()


def test_a_new_run_in_the_folder_removes_the_files_of_the_earlier_one(tmp_path: Path):
    trainer_of(tmp_path).train()
    trainer_of(tmp_path, total_steps=1, dump_rollouts=False).train()
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_rollouts_need_a_folder():
    with pytest.raises(UserError, match="dump_rollouts needs out"):
        trainer_of(None)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch, file: Path):
    (recorded,) = read_rollouts(file)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"the rollout of step 1 could not be written to .*: No space left"):
        write_rollout(tmp_path / "other", recorded)
    assert list((tmp_path / "other").iterdir()) == []


def test_scores_may_be_missing(tmp_path: Path, file: Path):
    (recorded,) = read_rollouts(file)
    without = dataclasses.replace(recorded, rollout=dataclasses.replace(recorded.rollout, scores=[]))
    (found,) = read_rollouts(write_rollout(tmp_path, without))
    assert isinstance(found, RecordedRollout)
    assert found.rollout.scores == []


def test_what_is_no_file_of_rollouts_is_named(tmp_path: Path, file: Path):
    (tmp_path / "text").write_text(json.dumps({"prompt": "x"}))
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights", {"format": "pt"})
    (tmp_path / "empty").mkdir()
    messages = {
        "text": "text is not a file of rollouts: give one that a run with dump_rollouts wrote",
        "weights": "weights is not a file of rollouts: give one that a run with dump_rollouts wrote",
        "absent": "there is no such file or folder",
        "empty": r"empty has no rollouts, which are files step-N\.safetensors: give OUT/rollouts",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as error:
            read_rollouts(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_damaged_file_is_named(tmp_path: Path, file: Path):
    good, metadata = load_file(file), metadata_of(file)
    answers = len(good["ended"])
    damaged = {
        "it has no values": {n: x for n, x in good.items() if n != "values"},
        "scores has 1 numbers": good | {"scores": torch.zeros(1)},
        "answer_ids has .* numbers, but": good | {"answer_lengths": good["answer_lengths"] + 1},
        "prompt_index has numbers outside 0 to 3": good | {"prompt_index": good["prompt_index"] + 1},
        "advantages has NaN": good | {"advantages": good["advantages"] * torch.nan},
        "has no tokens": good | {"answer_lengths": torch.zeros(answers, dtype=torch.int32)},
        "a token has a negative number": good | {"answer_ids": good["answer_ids"] - 300},
        "no token counts": good | {"mask": torch.zeros_like(good["mask"])},
        "ended is torch.float32": good | {"ended": good["ended"].float()},
    }
    for message, tensors in damaged.items():
        save_file(tensors, tmp_path / "damaged", metadata)
        with pytest.raises(UserError, match=f"damaged is damaged: .*{message}"):
            read_rollouts(tmp_path / "damaged")
    (name,), about = metadata, json.loads(*metadata.values())
    save_file(good, tmp_path / "damaged", {name: json.dumps(about | {"step": "x"})})
    with pytest.raises(UserError, match="its metadata have no step"):
        read_rollouts(tmp_path / "damaged")
    save_file(good, tmp_path / "newer", {name: json.dumps(about | {"version": 2})})
    with pytest.raises(UserError, match="newer has version 2 of rollouts; this ppo_fast reads 1"):
        read_rollouts(tmp_path / "newer")
    (tmp_path / "short").write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="short is not a file of rollouts"):
        read_rollouts(tmp_path / "short")
