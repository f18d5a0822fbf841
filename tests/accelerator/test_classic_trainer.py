"""ClassicTrainer on the second test device, while the first is the current one."""

from pathlib import Path
from typing import Any

import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')

from accelerator.runs import untouched  # noqa: E402

from ppo_fast.classic import ClassicConfig, ClassicTrainer  # noqa: E402

TASKS: dict[str, dict[str, Any]] = {
    "two networks": dict(env="CartPole-v1"),
    "shared network": dict(
        env="CartPole-v1", shared=True, activation="relu", entropy_coef=0.01, value_clip=0.2, target_kl=0.02
    ),
    "continuous actions": dict(env="Pendulum-v1", normalize_observations=True, normalize_rewards=True),
    "same-step resets": dict(env="Pendulum-v1", autoreset="same_step", vectorization="sync", rollout_steps=220),
    "one minibatch": dict(env="CartPole-v1", minibatches=1, normalize_advantages=False),
    "images": dict(env="ppo_fast/Maze-v0", network="cnn"),
}


def trainer(device: torch.device | str, **options: Any) -> ClassicTrainer:
    small = dict(total_steps=100_000, num_envs=4, rollout_steps=32, eval_episodes=1, eval_max_steps=30)
    fixed = dict(quiet=True, device=str(device), backend="torch", tensorboard=False)
    return ClassicTrainer(ClassicConfig(**{**small, **fixed, **options}))


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """All but times."""
    return {name: float(x) for name, x in metrics.items() if "second" not in name and x is not None}


@pytest.mark.parametrize("name", TASKS)
def test_updates_give_the_numbers_of_the_cpu(name: str, testgpu: torch.device, second_testgpu: torch.device) -> None:
    expected = trainer("cpu", **TASKS[name])
    on_device = trainer(second_testgpu, **TASKS[name])
    for _ in range(2):
        with untouched(testgpu):
            found = numbers(on_device.step())
        # Convolutions, products and sums of the same kernels; Adam divides small gradients by their own size.
        assert found == pytest.approx(numbers(expected.step()), rel=1e-4, abs=1e-5, nan_ok=True)
    devices = {x.device for x in (*on_device.network.parameters(), *on_device.network.buffers())}
    assert devices == {second_testgpu}
    with untouched(testgpu):
        assert on_device.evaluate(1) == pytest.approx(expected.evaluate(1), rel=1e-6)  # actions are sums in fp32


def test_a_resumed_run_is_the_whole_run_bit_for_bit(
    testgpu: torch.device, second_testgpu: torch.device, tmp_path: Path
) -> None:
    def run(out: str, updates: int, **options: Any) -> ClassicTrainer:
        fixed = dict(env="CartPole-v1", save_every=1, lr_schedule="constant", total_steps=4 * 32 * updates)
        return trainer(second_testgpu, out=str(tmp_path / out), **fixed, **options)

    whole = run("whole", 3)
    whole.train()
    run("parts", 1).train()
    resumed = run("parts", 3, resume=True)
    with untouched(testgpu):
        resumed.train()
    assert whole.updates_done == resumed.updates_done >= 3
    assert resumed.adam.weights.device == second_testgpu
    for ours, theirs in ((resumed.adam.weights, whole.adam.weights), (resumed.adam.square, whole.adam.square)):
        assert torch.equal(ours.cpu(), theirs.cpu())
