"""What `bench/on_gpu.sh` measures runs on the test device: a dry run on the CPU cannot mix devices."""

import bench_learn
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
