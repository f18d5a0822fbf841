"""What `bench/on_gpu.sh` measures runs on the test device: a dry run on the CPU cannot mix devices."""

import bench_learn
import choices
import first_minutes
import pytest
import torch


@pytest.mark.parametrize("provider", bench_learn.PROVIDERS)
def test_each_part_of_a_learn_step_runs_on_one_device(provider: str, second_testgpu: torch.device) -> None:
    (shape,) = bench_learn.SHAPES["cpu", "tiny"]
    task = bench_learn.make(shape, second_testgpu, "torch")
    assert task.rollout.device == task.experience.logprobs.device == second_testgpu
    if provider == bench_learn.EAGER:
        parts = bench_learn.eager(task)
    else:
        parts = bench_learn.ours(task, bench_learn.PROVIDERS[provider])
    loss = parts.gradients(parts.advantages())
    assert loss.device == second_testgpu
    assert loss.isfinite()
    parts.backbones()


@pytest.mark.parametrize("heads", first_minutes.HEADS.values(), ids=first_minutes.HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_compared_on_one_device(
    dtype: torch.dtype, heads: tuple[int, int], as_cuda: torch.device, second_testgpu: torch.device, monkeypatch
) -> None:
    monkeypatch.setattr(first_minutes, "kernels_of", lambda run: [run().device.type])
    for window in (None, 5):
        found = first_minutes.compare_attention(first_minutes.packed, second_testgpu, dtype, heads, window)
        assert found["passed"], found
        assert found["kernels"] == ["testgpu"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16 autocast", "bfloat16 weights"])
def test_the_noise_of_the_probe_is_measured_on_one_device(
    kind: str, as_cuda: torch.device, second_testgpu: torch.device
) -> None:
    found = choices.probe_noise(choices.TINY, 2, 32, kind, second_testgpu)
    assert 0 <= found["share_of_bound_packed"] < 1


def test_chunks_of_the_linear_loss_are_measured_on_one_device(second_testgpu: torch.device) -> None:
    assert choices.chunked(choices.TINY, torch.float32, 1, second_testgpu)["median_ms"] > 0
