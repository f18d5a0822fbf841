"""How often a PPO step makes the host wait for the device; each wait leaves a GPU without work."""

import dataclasses
from typing import Any

import pytest
import torch
from accelerator import runs
from accelerator.waits import Waits, record_waits

from ppo_fast.llm.packing.pack import split_minibatches
from ppo_fast.llm.trainer import PPOTrainer

PHASES = 4  # sample, reward, advantages, learn: each ends with a synchronisation, for its time
SAMPLED = 2  # tokens and log-probabilities of a batch of answers
METRICS = 1


def trainer(device: torch.device, **options: Any) -> PPOTrainer:
    """Six answers of seven tokens: with the options of `runs`, two epochs of two minibatches."""
    made = runs.trainer(device, **options)
    made.step()  # the optimizer's state is made in the first
    return made


def waits_of_a_step(made: PPOTrainer) -> Waits:
    with record_waits() as waits:
        made.step()
    return waits


def test_a_step_has_one_wait_for_each_update_and_seven_others(testgpu: torch.device):
    for epochs, minibatches in ((2, 2), (1, 1), (3, 2)):
        waits = waits_of_a_step(trainer(testgpu, epochs=epochs, minibatches=minibatches))
        assert len(waits.of("ppo_fast")) == PHASES + SAMPLED + METRICS + epochs * minibatches, str(waits)


def test_the_step_of_six_packs_and_four_updates_stays_below_its_bounds(testgpu: torch.device):
    """It had 121 waits before packs were copied together."""
    made = trainer(testgpu, micro_batch_tokens=1)
    waits = waits_of_a_step(made)
    assert made.last_rollout is not None
    packs = split_minibatches(made.last_rollout, list(range(6)), minibatches=2, max_tokens=1)
    assert sum(map(len, packs)) == 6
    assert len(waits) <= 35, str(waits)
    assert len(waits.of("ppo_fast")) <= 11, str(waits)


def test_the_number_of_packs_adds_no_wait(testgpu: torch.device):
    counts = {len(waits_of_a_step(trainer(testgpu, micro_batch_tokens=n))) for n in (20, 40, 1000)}
    assert len(counts) == 1


def test_a_sampled_token_adds_only_the_two_waits_of_transformers(testgpu: torch.device):
    short, long = (waits_of_a_step(trainer(testgpu, max_new_tokens=n)) for n in (7, 12))
    assert len(short.of("ppo_fast")) == len(long.of("ppo_fast"))
    assert len(long) - len(short) == 2 * (12 - 7), str(long)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_rank": 4},
        {"critic": "shared"},
        {"dtype": "bfloat16", "gradient_checkpointing": True},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"bootstrap_truncated": True, "importance_cap": 2.0, "score_clip": 1.0, "missing_eos_penalty": 0.5},
        {"kl_in": "loss", "kl_controller": "adaptive"},
        {"aggregation": "seq-mean-token-mean"},
        {"target_kl": 0.5, "entropy_target": 2.0},
    ],
    ids="+".join,
)
def test_options_add_no_wait(testgpu: torch.device, options: dict[str, Any]):
    waits = waits_of_a_step(trainer(testgpu, **options))
    assert len(waits.of("ppo_fast")) == PHASES + SAMPLED + METRICS + 4, str(waits)


def test_padded_rows_add_no_wait(testgpu: torch.device):
    made = trainer(testgpu)
    for module in (made.policy, made.reference):
        assert isinstance(module, torch.nn.Module)
        module.head = dataclasses.replace(module.head, packed=False)
    waits = waits_of_a_step(made)
    assert len(waits.of("ppo_fast")) == PHASES + SAMPLED + METRICS + 4, str(waits)
