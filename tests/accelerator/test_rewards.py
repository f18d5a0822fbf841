"""Reward models, preferences and fluency on the test device give the numbers of the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator.runs import FixedAnswers, assert_same_metrics, classifier, reward_model, trainer, untouched
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama

from ppo_fast.llm.preferences.reward_model import Pair, accuracy, calibrate, train_reward_model
from ppo_fast.rewards.fluency import Fluency

PROMPTS, ANSWERS = ["hi", "what is it", "a"], ["there", "a fox", "bc"]
# One pass in fp32; the two devices take other paths of SDPA, with sums in another order.
RTOL, ATOL = 1e-5, 1e-6


def test_a_reward_model_scores_as_on_the_cpu(testgpu: torch.device, second_testgpu: torch.device) -> None:
    expected = reward_model("cpu")(PROMPTS, ANSWERS)
    judge = reward_model(second_testgpu)
    with untouched(testgpu):
        found = judge(PROMPTS, ANSWERS)
    assert found == pytest.approx(expected, rel=RTOL, abs=ATOL)


def trained(device: torch.device | str) -> tuple[list[float], dict[str, float], float]:
    """Losses, accuracies and offset of a reward model that learned from pairs on this device."""
    model, tokenizer = classifier().to(device), byte_tokenizer()
    pairs = [Pair(prompt=f"p{i}", chosen=f"good {i}", rejected=f"bad {i}", kind="x") for i in range(6)]
    losses: list[float] = []
    train_reward_model(
        model, tokenizer, pairs, epochs=2, batch_size=3, lr=1e-3, after_step=lambda *step: losses.append(step[-1])
    )
    assert {str(x.device) for x in model.parameters()} == {str(device)}
    return losses, accuracy(model, tokenizer, pairs), calibrate(model, tokenizer, PROMPTS, ANSWERS)


def test_preferences_are_learned_as_on_the_cpu(testgpu: torch.device, second_testgpu: torch.device) -> None:
    expected = trained("cpu")
    with untouched(testgpu):
        found = trained(second_testgpu)
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(expected[0], rel=1e-4)  # four updates of Adam later
    assert found[1] == expected[1]
    assert found[2] == pytest.approx(expected[2], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("source", ["folder", "model"])
def test_fluency_is_that_of_the_cpu(
    source: str, testgpu: torch.device, second_testgpu: torch.device, tmp_path: Path
) -> None:
    def judge(device: torch.device | str) -> Any:
        if source == "folder":
            return Fluency(str(save_tiny_model(tmp_path / "model")), device=device)
        return Fluency(tiny_llama(258), byte_tokenizer(), device=device)

    expected = judge("cpu")(PROMPTS, ANSWERS)
    on_device = judge(second_testgpu)
    assert on_device.model.device == second_testgpu
    with untouched(testgpu):
        found = on_device(PROMPTS, ANSWERS)
    assert found == pytest.approx(expected, rel=RTOL)


def test_fluency_of_the_actors_own_tokens_is_that_of_the_cpu(second_testgpu: torch.device) -> None:
    ids = [[3, 5, 256], [9], [1, 2]]
    expected, found = (
        Fluency(tiny_llama(258), byte_tokenizer(), same_tokens=True, device=device)(PROMPTS, ANSWERS, ids)
        for device in ("cpu", second_testgpu)
    )
    assert found == pytest.approx(expected, rel=RTOL)


def test_fluency_from_a_folder_follows_the_trainer(
    testgpu: torch.device, second_testgpu: torch.device, tmp_path: Path
) -> None:
    folder, histories = str(save_tiny_model(tmp_path / "model")), []
    for device in ("cpu", second_testgpu):
        reward = Fluency(folder)
        made = trainer(device, rewards=reward, given={"sampler": FixedAnswers()}, total_steps=1)
        assert reward.model.device == made.device == torch.device(device)
        histories.append(made.train())
    assert_same_metrics(histories[1], histories[0], rtol=1e-4, atol=1e-4)
