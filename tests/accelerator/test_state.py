"""Checkpoints, resuming and saved models of runs on the test device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator.runs import HELD_OUT, llama, metrics, off_device, trainer, untouched, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ppo_fast.llm.trainer import PPOTrainer

RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "lora": dict(lora_rank=4),
    "bf16": dict(dtype="bfloat16"),
    "evaluation": dict(eval_every=1),
}


def run(device: torch.device | str, out: Path, **options: Any) -> PPOTrainer:
    rows = {"eval_rows": HELD_OUT} if options.get("eval_every") else {}
    few = dict(total_steps=2, save_every=1, keep_checkpoints=9, epochs=1, out=str(out))
    return trainer(device, given=rows, **{**few, **options})


def stop_after(step: int) -> Callable[[PPOTrainer, dict], bool]:
    return lambda made, _: made.steps_done == step


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_on_the_second_device_is_the_whole_run_bit_for_bit(
    name: str, testgpu: torch.device, second_testgpu: torch.device, tmp_path: Path
) -> None:
    whole = run(second_testgpu, tmp_path / "whole", **RUNS[name])
    expected = whole.train()
    run(second_testgpu, tmp_path / "parts", **RUNS[name]).train(stop_after(1))
    resumed = run(second_testgpu, tmp_path / "parts", **RUNS[name])
    torch.manual_seed(99)  # of every generator: only the checkpoint can bring the right states back
    with untouched(testgpu):
        assert resumed.resume()
        found = resumed.train()
    assert metrics(found[-1]) == metrics(expected[-1])
    for key, x in weights(whole).items():
        assert torch.equal(x, weights(resumed)[key]), key
    assert not off_device(resumed)
    assert len(resumed.notes) == 1 + len(whole.notes), resumed.notes  # from where it resumes, and no difference


def test_a_checkpoint_holds_the_generator_of_the_trainers_device(second_testgpu: torch.device, tmp_path: Path) -> None:
    made = run(second_testgpu, tmp_path, total_steps=1)
    made.train()
    state = torch.testgpu.get_rng_state(second_testgpu)
    assert not torch.equal(state, torch.testgpu.get_rng_state(0))
    saved = load_file(tmp_path / "checkpoints" / "step-1" / "random.safetensors")
    assert torch.equal(saved["testgpu-of-0"], state)
    assert {x.device.type for x in saved.values()} == {"cpu"}


@pytest.mark.parametrize(("first", "then"), [("testgpu:1", "cpu"), ("cpu", "testgpu:1"), ("testgpu:0", "testgpu:1")])
def test_a_checkpoint_is_resumed_on_another_device(
    first: str, then: str, testgpu: torch.device, tmp_path: Path
) -> None:
    run(first, tmp_path).train(stop_after(1))
    resumed = run(then, tmp_path)
    assert resumed.resume()
    other_type = first.split(":")[0] != then.split(":")[0]
    assert any(note.startswith("device was") for note in resumed.notes) == other_type, resumed.notes
    saved = load_file(tmp_path / "checkpoints" / "step-1" / "weights.safetensors")
    restored = weights(resumed) | {name: x.cpu() for name, x in resumed.policy.named_buffers()}
    assert {"critic.value_mean", "critic.value_std"} < saved.keys()
    for name, x in saved.items():
        assert torch.equal(x, restored[name]), name
    assert not off_device(resumed)
    assert [row["step"] for row in resumed.train()] == [2]


def logits_of(model: Any, device: torch.device | str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8, device=device)[None]).logits.cpu()


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4, "merge_adapters": True}], ids=["whole", "merged"])
def test_a_saved_model_computes_the_logits_of_the_trained_one(
    options: dict[str, Any], testgpu: torch.device, second_testgpu: torch.device, tmp_path: Path
) -> None:
    made = run(second_testgpu, tmp_path, save_every=0, total_steps=1, **options)
    with untouched(testgpu):
        made.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    # Weights are saved as they are; merged ones are sums rounded to fp32. SDPA takes another path on the CPU.
    torch.testing.assert_close(
        logits_of(loaded, "cpu"), logits_of(made.actor.eval(), second_testgpu), rtol=1e-4, atol=1e-5
    )
    assert not off_device(made)  # saving moves nothing


def test_saved_adapters_compute_the_logits_of_the_trained_ones(second_testgpu: torch.device, tmp_path: Path) -> None:
    from peft import PeftModel

    made = run(second_testgpu, tmp_path, save_every=0, total_steps=1, lora_rank=4)
    made.train()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "model").eval()
    torch.testing.assert_close(
        logits_of(loaded, "cpu"), logits_of(made.actor.eval(), second_testgpu), rtol=1e-4, atol=1e-5
    )
