"""Reward: Python functions and reward models judge the answers, and their numbers become scores."""

import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.config import PPOConfig
from ppo_fast.data import Prompt, columns
from ppo_fast.device import upload
from ppo_fast.errors import RewardError, UserError
from ppo_fast.rewards.spec import arguments_of, check_columns
from ppo_fast.rollout import Rollout

RewardFunction = Callable[..., Sequence[Any]]
"""f(prompts, completions, **columns) -> one float for each answer, or one list of floats (one for each token) each.

`columns` are the data set's other columns, and `completion_ids`, the answers' tokens with their end token. A function
that takes only some of them by name gets just those. A keyword-only argument with a default is an option of its own,
and no column may have its name. `ppo_fast.rewards` has ready ones.
"""


def score(
    rollout: Rollout,
    functions: dict[str, RewardFunction],
    config: PPOConfig,
    weights: dict[str, float] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of all reward functions: scores [B], or [B, T] if one judges tokens; and each one's mean.

    A number for a whole answer stands at the answer's last token. The sums are also noted in `rollout.scores`, the
    means are unweighted. Raises RewardError, which names function and sample.
    """
    results = {name: call(function, name, rollout) for name, function in functions.items()}
    means = {f"reward/{name}": sum(map(_total, values)) / len(values) for name, values in results.items()}
    for name, function in functions.items():
        if (failed := getattr(function, "failed", None)) is not None:  # of a Pool
            means[f"reward_failed/{name}"] = float(failed)
    penalties = [0.0 if ended else -config.missing_eos_penalty for ended in rollout.ended]
    weighted = [_weighted(values, (weights or {}).get(name, 1.0)) for name, values in results.items()]
    everything: list[Sequence[float | list[float]]] = [*weighted, penalties]
    rollout.scores = [sum(_total(values[row]) for values in everything) for row in range(len(rollout))]
    if all(isinstance(value, float) for values in everything for value in values):
        return upload(torch.tensor(everything).sum(0), rollout.device), means
    scores = torch.zeros(len(rollout), rollout.answer_width)
    for values in everything:
        for row, value in enumerate(values):
            if isinstance(value, float):
                scores[row, rollout.answer_lengths[row] - 1] += value
            else:
                scores[row, : len(value)] += torch.tensor(value)
    return upload(scores, rollout.device), means


def call(function: RewardFunction, name: str, rollout: Rollout) -> list[float | list[float]]:
    """One reward function's judgement of every answer, checked."""
    known = {"completion_ids": rollout.completion_ids, **rollout.columns}
    prompts = known.pop("prompt")
    known = arguments_of(function, known)
    try:
        values = function(prompts, rollout.completions, **known)
    except UserError:
        raise
    except Exception as error:  # user code: whatever it raises is reported with the place it came from
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"reward function {name!r} raised {type(error).__name__}: {error} ({frame.filename}, line"
            f" {frame.lineno}){_culprit(function, prompts, rollout.completions, known)}"
        ) from error
    return _checked(values, name, rollout)


def _culprit(function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list]) -> str:
    """Names the first answer for which the function also fails alone."""
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            function([prompt], [completion], **{name: [column[row]] for name, column in columns.items()})
        except Exception:  # as above
            return f", at answer {row} ({completion!r:.80}) to {prompt!r:.80}"
    return ""


def _weighted(values: list[float | list[float]], weight: float) -> list[float | list[float]]:
    return [[weight * x for x in value] if isinstance(value, list) else weight * value for value in values]


def check_rewards(functions: dict[str, RewardFunction], rows: list[dict[str, Any]]) -> None:
    """Refuses rows that lack a column that a reward function asks for: now, not after the first answers."""
    known = columns(rows[:1], 1)
    known.pop("prompt", None)  # whose lack is told elsewhere
    for function in functions.values():
        check_columns(function, {"completion_ids": [], **known})


def check_weights(weights: dict[str, float] | None, functions: dict[str, RewardFunction]) -> dict[str, float]:
    """A weight for each reward function; 1 where none is given."""
    for name, weight in (weights or {}).items():
        if name not in functions:
            raise RewardError(f"reward_weights names {name!r}, but the rewards are {', '.join(map(repr, functions))}")
        if not math.isfinite(weight):
            raise RewardError(f"the weight of reward {name!r} must be finite, got {weight}")
    return dict.fromkeys(functions, 1.0) | (weights or {})


def _checked(values: Any, name: str, rollout: Rollout) -> list[float | list[float]]:
    if isinstance(values, Tensor):
        values = values.tolist()
    try:
        values = list(values)
    except TypeError:
        raise RewardError(f"reward function {name!r} must return a list, got {type(values).__name__}") from None
    if len(values) != len(rollout):
        raise RewardError(f"reward function {name!r} returned {len(values)} values for {len(rollout)} answers")
    checked: list[float | list[float]] = []
    for row, value in enumerate(values):
        where = f"reward function {name!r}, answer {row} ({rollout.completions[row]!r:.80})"
        if isinstance(value, list | tuple | Tensor) and not (isinstance(value, Tensor) and value.ndim == 0):
            expected = rollout.answer_lengths[row]
            if len(value) != expected:
                raise RewardError(
                    f"{where}: {len(value)} values for {expected} tokens; give one number for the answer, or one for"
                    " each of its tokens, the end token included"
                )
            checked.append([_number(x, where) for x in value])
        else:
            checked.append(_number(value, where))
    return checked


def _number(x: Any, where: str) -> float:
    try:
        number = float(x)
    except (TypeError, ValueError):
        raise RewardError(f"{where}: expected a number, got {x!r:.80}") from None
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise RewardError(f"{where}: expected a finite number, got {number} (fp32 ends at 3.4e38)")
    return number


def _total(value: float | list[float]) -> float:
    return value if isinstance(value, float) else sum(value)


class RewardModel:
    """A sequence classifier with one output as a reward function (Ouyang et al. 2022, section 3.5).

    It reads prompt and answer in its own tokens: through its tokenizer's chat template, as the turns of user and
    assistant, where there is one; else one after the other.

    Args:
        model: any AutoModelForSequenceClassification with num_labels = 1.
        tokenizer: its own, not the actor's.
        batch_size: answers scored at once.
        max_length: longer texts lose their beginning, in tokens; None: the model's positions.
        device: where it runs; None: where it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise RewardError("the reward model's tokenizer has no pad token; name one of its tokens")
        model.config.pad_token_id = tokenizer.pad_token_id  # the classifier reads its score at the last other token
        self.model: Any = model.eval() if device is None else model.eval().to(device)  # type: ignore[arg-type]
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or getattr(model.config, "max_position_embeddings", None)
        self.__name__ = "reward_model"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One score for each answer, from which the model's own `config.score_offset` is subtracted, if it has one."""
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            stop = start + self.batch_size
            scores += self.forward(prompts[start:stop], completions[start:stop]).tolist()
        offset = getattr(self.model.config, "score_offset", 0.0)
        return [x - offset for x in scores]

    def forward(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Scores [B] fp32 of one batch, with a graph."""
        ids = [self._ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(self.model.device)
        out = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return out.logits.squeeze(-1).float()

    def _ids(self, prompt: Prompt, completion: str) -> list[int]:
        if self.tokenizer.chat_template is not None:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            turns = [*asked, {"role": "assistant", "content": completion}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written its own
        elif isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            raise RewardError("the prompts are chats, but the reward model's tokenizer has no chat template")
        return ids[-self.max_length :] if self.max_length else ids
