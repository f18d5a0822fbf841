"""Scores: Python functions and reward models evaluate the completions, and their values are weighted and checked."""

import copy
import hashlib
import inspect
import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from ppo_fast.common.device import upload
from ppo_fast.common.errors import RewardError, UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import Prompt, columns
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.reward.function import arguments_of, check_columns
from ppo_fast.llm.reward.isolation import isolated

RewardFunction = Callable[..., Sequence[object]]
"""f(prompts, completions, **columns) -> one float for each answer, or one list of floats (one for each token) each.

    prompts: [B] texts or chats, as they are in the data
    completions: [B] texts, without end token, padding and marks of the chat template; special tokens
        that are content, such as <think>, are in it; one may begin with a space, as the model wrote it

`columns` are the data set's other columns, and

    raw_completions: [B] texts with all special tokens, also the end token
    completion_ids: [B] lists of tokens, with the end token
    ended: [B] bools; False: the completion was cut by max_new_tokens

A function that takes only some of them by name gets only those. A keyword-only argument with a default is an option of
its own, and no column may have its name. `ppo_fast.rewards` has ready ones.

A function gets copies, which it may change; an object that cannot be copied is passed itself. Its random numbers
(torch, numpy, random) differ from call to call and repeat with the seed of the run. What it changes in the process
(random states, settings of torch, the working directory, signal handlers, ...) is restored after the call, and a
changed setting is reported once (`ppo_fast.llm.reward.isolation`). Environment variables are not restored.
"""


def score(
    rollout: Rollout,
    functions: dict[str, RewardFunction],
    config: PPOConfig,
    weights: dict[str, float] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the weighted sum of all reward functions, and their means.

    The scores are [B], or [B, T] if one of the functions scores tokens.

    A value for a whole completion is at its last token. The sums are clipped to +-config.score_clip, and then the
    penalty of a completion that did not end is subtracted. The values in `rollout.scores` are not clipped, and the
    means are unweighted. `reward_failed/NAME` counts the completions for which a Pool, or an object with an integer
    `failed`, has no value.

    Raises:
        RewardError: the message names function and sample.
    """
    # the stream of all rewards: Python's generator is part of checkpoints, and sampling does not use it
    stream = random.getrandbits(64)
    results = {
        name: run_reward_function(function, name, rollout, _seed(stream, name)) for name, function in functions.items()
    }
    means = {f"reward/{name}": sum(map(_total, values)) / len(values) for name, values in results.items()}
    for name, function in functions.items():
        failed = getattr(function, "failed", None)  # of a Pool, or of an object with the same counter
        if type(failed) is int:
            means[f"reward_failed/{name}"] = float(failed)
    penalties = [0.0 if ended else -config.missing_eos_penalty for ended in rollout.ended]
    weighted = [_weighted(values, (weights or {}).get(name, 1.0)) for name, values in results.items()]
    rollout.scores = [sum(_total(values[row]) for values in weighted) + x for row, x in enumerate(penalties)]
    limit = math.inf if config.score_clip is None else config.score_clip
    if all(isinstance(value, float) for values in weighted for value in values):
        scores = torch.tensor(weighted, dtype=torch.float64).sum(0).clamp_(-limit, limit)
        return upload(_fp32(scores + torch.tensor(penalties), rollout), rollout.device), means
    scores = torch.zeros(len(rollout), rollout.completion_width, dtype=torch.float64)
    last = torch.tensor(rollout.completion_lengths) - 1
    for values in weighted:
        for row, value in enumerate(values):
            if isinstance(value, float):
                scores[row, last[row]] += value
            else:
                scores[row, : len(value)] += torch.tensor(value, dtype=torch.float64)
    scores.clamp_(-limit, limit)[torch.arange(len(rollout)), last] += torch.tensor(penalties, dtype=torch.float64)
    return upload(_fp32(scores, rollout), rollout.device), means


LARGEST_SCORE = 1e15  # the sum of the squares of a rollout's returns must be a number of fp32


def _fp32(scores: Tensor, rollout: Rollout) -> Tensor:
    """Convert scores [B] or [B, T] from fp64 to fp32. Raises RewardError for a score that is too large to train on."""
    outside = ~(scores.abs() <= LARGEST_SCORE)  # NaN, too, of infinities
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise RewardError(
            f"answer {row} ({rollout.completions[row]!r:.80}) has the score {scores[outside][0].item():g}, but only"
            f" scores up to {LARGEST_SCORE:g} can be squared in fp32: scale the rewards (reward weights), or set"
            " score_clip"
        )
    return scores.float()


def run_reward_function(function: RewardFunction, name: str, rollout: Rollout, seed: int) -> list[float | list[float]]:
    """Return the checked values of one reward function for all completions; its random numbers start from `seed`."""
    known = {
        **rollout.columns,
        "raw_completions": rollout.raw_completions,
        "ended": rollout.ended,
        "completion_ids": [],
    }
    prompts = known.pop("prompt")
    known = arguments_of(function, known)
    if "completion_ids" in known:  # most functions do not take them, and many tokens need time
        known["completion_ids"] = rollout.completion_ids
    try:
        values = _call_isolated(function, name, prompts, rollout.completions, known, seed, rollout.device)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # user code: whatever it raises is reported with its place, also exit() and timeouts
        frame = _place(error)
        what = f"called exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {_told(error)}"
        culprit = _failing_row(function, name, prompts, rollout, known, seed)
        raise RewardError(
            f"reward function {name!r} {what} ({frame.filename}, line {frame.lineno}){culprit}"
        ) from error
    return _checked(values, name, rollout)


def _call_isolated(
    function: RewardFunction,
    name: str,
    prompts: list[Prompt],
    completions: list[str],
    columns: dict[str, list],
    seed: int,
    device: torch.device,
) -> object:
    """Call the function with copies of its arguments."""
    copies = {key: list(map(_copy, column)) for key, column in columns.items()}
    with isolated(name, seed, device):
        values = function(list(map(_copy, prompts)), list(completions), **copies)
        return list(values) if isinstance(values, Iterator) else values  # a generator runs its code here


_CONSTANTS = {str, int, float, bool, bytes, type(None)}


def _copy(x: object) -> object:
    """Copy the value of one row, for JSON's types faster than deepcopy; a value that cannot be copied is returned."""
    if type(x) is list:
        return [item if type(item) in _CONSTANTS else _copy(item) for item in x]
    if type(x) is dict:
        return {key: item if type(item) in _CONSTANTS else _copy(item) for key, item in x.items()}
    if type(x) in _CONSTANTS:
        return x
    try:
        return copy.deepcopy(x)
    except Exception:  # user code: any object may be in a column
        return x


def _seed(stream: int, name: str) -> int:
    """Derive a seed of 63 bits for each function."""
    return int.from_bytes(hashlib.sha256(f"{stream} {name}".encode()).digest()[:8]) >> 1


def _place(error: BaseException) -> traceback.FrameSummary:
    """Return the place where an error was raised; for exit(), where it was called."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((x for x in reversed(frames) if "_sitebuiltins" not in x.filename), frames[-1])


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _failing_row(
    function: RewardFunction,
    name: str,
    prompts: list[Prompt],
    rollout: Rollout,
    columns: dict[str, list],
    seed: int,
) -> str:
    """Name the first completion for which the function also fails alone."""
    for row, (prompt, completion) in enumerate(zip(prompts, rollout.completions, strict=True)):
        alone = {key: [column[row]] for key, column in columns.items()}
        try:
            _call_isolated(function, name, [prompt], [completion], alone, seed, rollout.device)
        except KeyboardInterrupt:
            raise
        except BaseException:  # as above
            return f", at answer {row} ({completion!r:.80}) to {prompt!r:.80}"
    return ""


def _weighted(values: list[float | list[float]], weight: float) -> list[float | list[float]]:
    return [[weight * x for x in value] if isinstance(value, list) else weight * value for value in values]


def check_rewards(functions: dict[str, RewardFunction], rows: list[dict[str, object]]) -> None:
    """Reject rows without a column that a reward function needs, before the first completions are sampled."""
    known = columns(rows[:1], 1)
    known.pop("prompt", None)  # a missing prompt is reported elsewhere
    for function in functions.values():
        check_columns(function, {**known, "raw_completions": [], "completion_ids": [], "ended": []})


def named_rewards(rewards: RewardFunction | dict[str, RewardFunction]) -> dict[str, RewardFunction]:
    """Return reward functions by name; a single one gets its own name. Raises RewardError for other objects."""
    functions = rewards if isinstance(rewards, dict) else {name_of(rewards): rewards}
    if not functions:
        raise RewardError("there is no reward: give a function, or a dict of functions by name")
    for name, function in functions.items():
        if not callable(function):
            raise RewardError(
                f"the reward {name!r} must be a function, got {type(function).__name__}; several rewards are a dict of"
                " functions by name"
            )
    return functions


def name_of(function: RewardFunction) -> str:
    """Return the name of a reward function in metrics and messages."""
    return getattr(function, "__name__", type(function).__name__)


def check_weights(weights: dict[str, float] | None, functions: dict[str, RewardFunction]) -> dict[str, float]:
    """Return a weight for each reward function; 1 where none is given."""
    if weights is not None and not isinstance(weights, Mapping):
        raise RewardError(f"reward_weights must be a dict of numbers by reward, got {type(weights).__name__}")
    for name, weight in (weights or {}).items():
        if name not in functions:
            raise RewardError(f"reward_weights names {name!r}, but the rewards are {', '.join(map(repr, functions))}")
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RewardError(f"the weight of reward {name!r} must be finite, got {weight}")
    return dict.fromkeys(functions, 1.0) | (weights or {})


def _checked(values: object, name: str, rollout: Rollout) -> list[float | list[float]]:
    values = _listed(values, name)
    if len(values) != len(rollout):
        raise RewardError(f"reward function {name!r} returned {len(values)} values for {len(rollout)} answers")
    checked: list[float | list[float]] = []
    for row, value in enumerate(values):
        where = f"reward function {name!r}, answer {row} ({rollout.completions[row]!r:.80})"
        value = _plain(value)
        if isinstance(value, list | tuple):
            expected = rollout.completion_lengths[row]
            if len(value) != expected:
                raise RewardError(
                    f"{where}: {len(value)} values for {expected} tokens; give one number for the answer, or one for"
                    " each of its tokens, the end token included"
                )
            checked.append([_number(x, where) for x in value])
        else:
            checked.append(_number(value, where))
    return checked


def _listed(values: object, name: str) -> list:
    """Return the result of a reward function as a list; a string, dict, set or coroutine is an error."""
    if inspect.iscoroutine(values):
        values.close()  # Python would warn that it was never awaited
    try:
        if not isinstance(values, str | bytes | Mapping | Set):
            return list(_plain(values))
    except TypeError:
        pass
    except Exception as error:  # a tensor without values, or code of the user's own class
        raise RewardError(f"the values of reward function {name!r} cannot be read: {_told(error)}") from error
    raise RewardError(f"reward function {name!r} must return a list, got {type(values).__name__}")


def _plain(x: object) -> Any:  # of user code: `list` and `float` tell whether they can read it
    """Convert a tensor or an array to Python numbers."""
    return x.tolist() if hasattr(x, "tolist") else x


def _number(x: SupportsFloat | SupportsIndex | str, where: str) -> float:
    try:
        number = float(x)
    except OverflowError:  # an integer or a fraction that is larger than any float
        number = math.inf
    except Exception:  # code of the user's own class
        raise RewardError(f"{where}: expected a number, got {x!r:.80}") from None
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise RewardError(f"{where}: expected a finite number, got {number} (fp32 ends at 3.4e38)")
    return number


def _total(value: float | list[float]) -> float:
    return value if isinstance(value, float) else sum(value)
