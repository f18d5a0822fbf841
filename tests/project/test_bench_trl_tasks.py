"""The task of a real model in the comparison with TRL, on a tiny one: both trainers get the same."""

from types import SimpleNamespace

import pytest
import torch
import trl_tasks
from support.tiny import save_tiny_model, tiny_llama

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.sampler import Completions
from ppo_fast.llm.trainer import PPOTrainer

END, PAD = 256, 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_both_samples_are_cut_at_the_same_places():
    answers, lengths = [[5, 6, 7, 8], [5, END], [9, 9, 9, 9]], [2, 4, 4]
    sampler = SimpleNamespace(
        sample=lambda prompts, params: Completions(ids=answers, ended=[False, True, False], logprobs=[[0.0]] * 3)
    )
    ours = trl_tasks.CutSampler(sampler, lengths, END).sample([[1]] * 3, None)
    assert ours.ids == [[5, END], [5, END], [9, 9, 9, END]]
    assert ours.ended == [True, True, True]
    assert ours.logprobs is None
    rows = torch.tensor([[1, *ids, *[PAD] * (4 - len(ids))] for ids in answers])
    theirs = trl_tasks.cut_rows(rows, 1, [2, 2, 4], end=END, pad=PAD)
    assert theirs.tolist() == [[1, *ids, *[PAD] * (4 - len(ids))] for ids in ours.ids]


def test_a_scorer_starts_from_the_checkpoint_and_its_reward_ignores_padding():
    actor = tiny_llama()
    model = trl_tasks.scorer(actor, torch.float32, seed=1)
    assert all(
        torch.equal(p, q) for p, q in zip(model.base_model.parameters(), actor.base_model.parameters(), strict=True)
    )
    assert not trl_tasks.scorer(actor, torch.float32, seed=None).score.weight.any(), "as our critic's head"
    rewards = trl_tasks.ModelReward(model, lambda text: {"input_ids": list(text.encode())})
    both = rewards(["ab", "c"], ["", ""], [[1, 2, 3], [4]])
    apart = [rewards([p], [""], [c])[0] for p, c in (("ab", [1, 2, 3]), ("c", [4]))]
    assert both == pytest.approx(apart, abs=1e-6)
    assert both[0] != pytest.approx(both[1], abs=1e-4)
    ids = torch.tensor([[97, 98, 1, 2, 3]])
    assert both[0] == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-6)


@pytest.mark.parametrize("workload", ["pretrained", "uneven"])
def test_a_step_has_answers_of_the_task(folder, workload):
    task = trl_tasks.pretrained_task(str(folder), workload, "float32", 0, batch=4, answer=5)
    assert (task.lengths is None) == (workload == "pretrained")
    assert [task.tokenizer(text)["input_ids"] for text in task.texts] == task.prompts
    config = PPOConfig(
        total_steps=1, prompts_per_step=4, max_new_tokens=5, epochs=2, minibatches=2, kl_coef=task.kl_coef, quiet=True
    )
    trainer = PPOTrainer(config, task.actor, task.tokenizer, [{"prompt": x} for x in task.texts], task.rewards)
    if task.lengths is not None:
        trainer.sampler = trl_tasks.CutSampler(trainer.sampler, task.lengths, task.tokenizer.eos_token_id)
    trainer.step()
    lengths = trainer.last_rollout.completion_lengths
    if task.lengths is None:
        assert max(lengths) <= 5
    else:
        assert all(n <= most for n, most in zip(lengths, task.lengths, strict=True))
        assert len(set(task.lengths)) > 1
