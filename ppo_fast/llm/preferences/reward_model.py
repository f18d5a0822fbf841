"""Preferences: pairs of completions, one of which people (or a rule) preferred, and a reward model trained on them.

The loss is that of Bradley and Terry (1952), as in Christiano et al. 2017 (equation 1) and Ouyang et al. 2022
(equation 1): -log sigmoid(r(prompt, chosen) - r(prompt, rejected)).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.common.checkpoint import reported, write_file
from ppo_fast.common.errors import NonFiniteError, UserError
from ppo_fast.common.jsonl import as_lines
from ppo_fast.llm.data import json_rows
from ppo_fast.llm.models.reward_model import RewardModel
from ppo_fast.llm.models.weights import check_trained_in_fp32


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt."""

    prompt: str
    chosen: str
    rejected: str
    kind: str = "pair"  # of the rejected completion: accuracy is reported for each kind

    def __post_init__(self) -> None:
        for name, text in asdict(self).items():
            if not isinstance(text, str):
                raise UserError(f"{name} must be a text, got {text!r:.80}")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise UserError(f"{name} has a lone surrogate, which UTF-8 cannot encode: {text!r:.80}")
        if self.chosen == self.rejected:
            raise UserError(f"chosen and rejected are the same text: {self.chosen!r:.80}")


def read_pairs(path: str | Path) -> list[Pair]:
    """Read pairs from a JSON Lines file with the fields prompt, chosen, rejected, and optionally kind.

    Raises:
        UserError: the file cannot be read, is empty, or a line is not such a pair; the message names file and line.
    """
    pairs = []
    for where, row in json_rows(path, "pairs"):
        try:
            pairs.append(_pair(row))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not pairs:
        raise UserError(f"{path} has no pairs: it is empty")
    return pairs


def _pair(row: dict[str, object]) -> Pair:
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    if missing:
        raise UserError(f"no field {missing[0]!r}; the fields are {', '.join(map(repr, row)) or 'none'}")
    make: Callable[..., Pair] = Pair  # it checks that all of them are texts
    return make(**{name: row[name] for name in ("prompt", "chosen", "rejected", "kind") if name in row})


def write_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """Write a file for `read_pairs`."""
    text = as_lines(map(asdict, pairs))
    with reported(f"the pairs could not be written to {path}"):
        write_file(Path(path), text)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute the mean of -log sigmoid(chosen - rejected).

    Args:
        chosen: [B] scores of the preferred completions, any float dtype.
        rejected: [B] scores of the others.

    Returns:
        A scalar in the dtype of the scores; log 2 for equal scores.

    >>> bradley_terry_loss(torch.zeros(2), torch.zeros(2))
    tensor(0.6931)
    """
    return -F.logsigmoid(chosen - rejected).mean()


MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    epochs: int = 1,
    batch_size: int = 32,
    lr: float = 1e-4,
    seed: int = 0,
    after_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train a sequence classifier with one output on pairs, in place.

    Args:
        model: an AutoModelForSequenceClassification with num_labels = 1 and a pad token, on its device.
        tokenizer: its tokenizer; prompt and completion go through its chat template, if it has one.
        pairs: in any order.
        epochs: passes over the pairs.
        batch_size: pairs in one optimizer step.
        lr: peak learning rate of AdamW: it rises over the first twentieth of the steps and falls to a tenth.
        seed: of the order of the pairs.
        after_step: is called with the step, the number of steps, and the loss in nats.

    Raises:
        UserError: the model has more than one output, or no pad token; or a setting is out of range.
        NonFiniteError: the loss is not finite; the weights are those before that step.
    """
    check_reward_model(model)
    if not pairs:
        raise UserError("there are no pairs to train on")
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be greater than 0 and finite, got {value}")
    model.requires_grad_(True)
    check_trained_in_fp32(model, "the reward model")
    reader = RewardModel(model, tokenizer, device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    per_epoch = math.ceil(len(pairs) / batch_size)
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 20 * (step + 1) / steps) * (1 - 0.9 * step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        start = step % per_epoch * batch_size
        batch = [pairs[i] for i in order[start : start + batch_size]]
        loss = pair_loss(reader, batch)
        if not math.isfinite(loss.item()):
            raise NonFiniteError(f"the loss of step {step + 1} of {steps} is {loss.item()}; a lower lr may help")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if after_step is not None:
            after_step(step + 1, steps, loss.item())
    model.eval().requires_grad_(False)


def pair_loss(reader: RewardModel, batch: Sequence[Pair]) -> Tensor:
    """Compute the loss of some pairs, with a graph."""
    prompts = [pair.prompt for pair in batch]
    scores = reader.forward([*prompts, *prompts], [p.chosen for p in batch] + [p.rejected for p in batch])
    return bradley_terry_loss(*scores.chunk(2))


def check_reward_model(model: PreTrainedModel) -> None:
    """Reject a classifier without a single score."""
    labels = model.config.num_labels
    if labels != 1:
        raise UserError(f"the reward model has {labels} outputs; one score is expected (num_labels=1)")
    if model.config.get_text_config().pad_token_id is None:
        raise UserError("the reward model has no pad token: set model.config.pad_token_id, which its padding needs")


def calibrate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[str]
) -> float:
    """Shift the scores of the model so that their mean over these completions is 0 (Ouyang et al. 2022, section 3.5).

    The offset is stored in `model.config.score_offset`, which `RewardModel` reads, and returned.
    """
    model.config.score_offset = 0.0
    if not texts:
        raise UserError("there are no answers to calibrate on")
    scores = RewardModel(model, tokenizer, device=model.device)(prompts, texts)
    model.config.score_offset = sum(scores) / len(scores)
    return model.config.score_offset


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the fraction of pairs whose chosen completion has the higher score, by kind of pair, and for all together.

    A tie counts half.
    """
    if not pairs:
        raise UserError("there are no pairs to evaluate on")
    reader = RewardModel(model, tokenizer, device=model.device)
    prompts = [pair.prompt for pair in pairs]
    chosen = reader(prompts, [pair.chosen for pair in pairs])
    rejected = reader(prompts, [pair.rejected for pair in pairs])
    right = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)]
    found = {"all": sum(right) / len(right)}
    for kind in sorted({pair.kind for pair in pairs}):
        of_kind = [x for x, pair in zip(right, pairs, strict=True) if pair.kind == kind]
        found[kind] = sum(of_kind) / len(of_kind)
    return found
