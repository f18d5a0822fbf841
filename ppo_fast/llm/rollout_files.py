"""Recorded rollouts: OUT/rollouts/step-N.safetensors, which a run with dump_rollouts writes in each step.

A file has the answers of one PPO step, B answers to Q prompts. Nothing is padded: the tokens of all prompts (P
together), and those of all answers (N together, end tokens included), follow each other.

| tensor | shape and dtype | |
|---|---|---|
| `prompt_ids` | [P] int32 | tokens of the prompts, each prompt once |
| `prompt_lengths` | [Q] int32 | tokens of each prompt |
| `prompt_index` | [B] int32 | the prompt that each answer completes, from 0 |
| `answer_ids` | [N] int32 | tokens of the answers |
| `answer_lengths` | [B] int32 | tokens of each answer |
| `ended` | [B] bool | False: cut by max_new_tokens |
| `scores` | [B] fp32 | sum of all rewards, minus missing_eos_penalty; not clipped, without KL |
| `mask` | [N] bool | True: the token counts |
| `logprobs` | [N] fp32 | of the actor that sampled, in nats; as the three below 0 where the mask is False |
| `values` | [N] fp32 | V of the prefix before the token, in units of the reward |
| `rewards` | [N] fp32 | of which returns are sums: scores, clipped by score_clip, minus the KL penalty in the reward |
| `advantages` | [N] fp32 | that the actor learned from, whitened if so configured |

The metadata have one entry, `ppo_fast.rollouts`, which is a JSON object of `version` (1), `step`, and what identifies
the start model of the run (`model`: `weights_hash` of it in fp32) and its tokenizer (`tokenizer`: `vocabulary_hash`).

A file has at most 4 P + 4 Q + 13 B + 21 N bytes and 4 KiB. With prompts of at most L tokens that is at most
`prompts_per_step` (4 L + 4 + `samples_per_prompt` (13 + 21 `max_new_tokens`)) bytes and 4 KiB.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ppo_fast.common.checkpoint import UNFINISHED, reported, write_file
from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.experience import Experience
from ppo_fast.llm.packing.rollout import Rollout, mask_of_lengths

FORMAT, VERSION = "ppo_fast.rollouts", 1
ENDING = ".safetensors"
PER_ANSWER = {"prompt_index": torch.int32, "answer_lengths": torch.int32, "ended": torch.bool}
PER_TOKEN = {"answer_ids": torch.int32, "mask": torch.bool} | dict.fromkeys(
    ("logprobs", "values", "rewards", "advantages"), torch.float32
)
DTYPES = {"prompt_ids": torch.int32, "prompt_lengths": torch.int32, "scores": torch.float32} | PER_ANSWER | PER_TOKEN


@dataclass(frozen=True)
class RecordedRollout:
    """The answers of one PPO step: a rollout without texts and columns, and per token [B, T] fp32 on the CPU."""

    step: int
    model: str  # hash of the weights with which the run started
    tokenizer: str  # hash of its vocabulary
    rollout: Rollout  # its `scores` are empty if the file has none
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor

    @classmethod
    def from_experience(cls, experience: Experience, *, step: int, model: str, tokenizer: str) -> "RecordedRollout":
        """What a step of the trainer leaves."""
        per_token = (experience.logprobs, experience.values, experience.rewards, experience.advantages)
        return cls(step, model, tokenizer, experience.rollout, *(x.cpu() for x in per_token))


def write_rollout(folder: Path, recorded: RecordedRollout) -> Path:
    """Write folder/step-N.safetensors completely or not at all, and return its path; an earlier one is replaced.

    Raises:
        UserError: it cannot be written.
    """
    rollout, path = recorded.rollout, folder / f"step-{recorded.step}{ENDING}"
    first = rollout.tokens.shape[1] - rollout.completion_width  # column where answers begin
    row_of: dict[int, int] = {}  # the first row of each prompt
    for row, index in enumerate(rollout.prompt_index):
        row_of.setdefault(index, row)
    place = {index: at for at, index in enumerate(row_of)}
    prompts = [rollout.tokens[row, first - rollout.prompt_lengths[row] : first] for row in row_of.values()]
    there = mask_of_lengths(rollout.completion_lengths)
    per_token = {
        "answer_ids": rollout.tokens[:, first:],
        "mask": rollout.mask,
        "logprobs": recorded.logprobs,
        "values": recorded.values,
        "rewards": recorded.rewards,
        "advantages": recorded.advantages,
    }
    tensors = {
        "prompt_ids": torch.cat(prompts),
        "prompt_lengths": torch.tensor(list(map(len, prompts))),
        "prompt_index": torch.tensor([place[index] for index in rollout.prompt_index]),
        "answer_lengths": torch.tensor(rollout.completion_lengths),
        "ended": torch.tensor(rollout.ended),
        **{name: x[there] for name, x in per_token.items()},
    }
    if rollout.scores:
        tensors["scores"] = torch.tensor(rollout.scores)
    about = {"version": VERSION, "step": recorded.step, "model": recorded.model, "tokenizer": recorded.tokenizer}
    # one entry: safetensors writes several in an order that changes from file to file
    data = save({name: x.to(DTYPES[name]).contiguous() for name, x in tensors.items()}, {FORMAT: json.dumps(about)})
    with reported(f"the rollout of step {recorded.step} could not be written to {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    return path


def read_rollouts(path: str | Path) -> list[RecordedRollout]:
    """Read a file that a run with dump_rollouts wrote, or all files of a folder, in the order of their steps.

    >>> [(x.step, len(x.rollout)) for x in read_rollouts("runs/first/rollouts")]  # doctest: +SKIP
    [(1, 64), (2, 64)]

    Raises:
        UserError: there is no such file; it is not a file of rollouts, or a damaged one; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for _, file in sorted(_files_of(path))]
        if not files:
            raise UserError(
                f"{path} has no rollouts, which are files step-N{ENDING}: give OUT/rollouts of a run with dump_rollouts"
            )
        return [_read(file) for file in files]
    if not path.is_file():
        raise UserError(f"no rollouts in {path}: there is no such file or folder; a run with dump_rollouts writes them")
    return [_read(path)]


def drop_rollouts_after(folder: Path, step: int) -> None:
    """Remove the files of steps after `step`, and those that a killed process has written in part.

    Raises:
        OSError: one cannot be removed.
    """
    for file in [*folder.glob("*" + UNFINISHED), *(file for number, file in _files_of(folder) if number > step)]:
        file.unlink()


def _files_of(folder: Path) -> list[tuple[int, Path]]:
    """List the files of steps, with their steps."""
    found = ((re.fullmatch(r"step-(\d+)", file.stem), file) for file in folder.glob(f"step-*{ENDING}"))
    return [(int(match[1]), file) for match, file in found if match is not None]


def _read(file: Path) -> RecordedRollout:
    other = f"{file} is not a file of rollouts: give one that a run with dump_rollouts wrote (OUT/rollouts)"
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})[FORMAT])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except KeyError:
        raise UserError(other) from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{other} ({first_line(error)})") from error
    if not isinstance(about, dict):
        raise UserError(other)
    if about.get("version") != VERSION:
        raise UserError(f"{file} has version {about.get('version')} of rollouts; this ppo_fast reads {VERSION}")
    kinds = {"step": int, "model": str, "tokenizer": str}
    missing = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    wrong = f"its metadata have no {missing[0]}" if missing else _problem(tensors)
    if wrong:
        raise UserError(f"{file} is damaged: {wrong}")
    return _recorded(tensors, **{name: about[name] for name in kinds})


def _problem(tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with the tensors of a file; "" if nothing is."""
    for name, dtype in DTYPES.items():
        if name not in tensors and name != "scores":
            return f"it has no {name}"
        if name in tensors and (tensors[name].ndim != 1 or tensors[name].dtype != dtype):
            return f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, not a list of {dtype}"
    prompts, answers = tensors["prompt_lengths"], tensors["answer_lengths"]
    if not len(answers) or not len(prompts) or min(prompts.min(), answers.min()) < 1:
        return "a prompt or an answer has no tokens"
    counts = {"prompt_ids": int(prompts.sum())}
    counts |= dict.fromkeys(PER_ANSWER, len(answers)) | dict.fromkeys(PER_TOKEN, int(answers.sum()))
    counts |= {"scores": len(answers)} if "scores" in tensors else {}
    for name, count in counts.items():
        if len(tensors[name]) != count:
            return f"{name} has {len(tensors[name])} numbers, but {count} are expected"
    index = tensors["prompt_index"]
    if index.min() < 0 or index.max() >= len(prompts):
        return f"prompt_index has numbers outside 0 to {len(prompts) - 1}"
    if min(tensors["prompt_ids"].min(), tensors["answer_ids"].min()) < 0:
        return "a token has a negative number"
    if not tensors["mask"].any():
        return "no token counts: mask is False everywhere"
    for name in ("logprobs", "values", "rewards", "advantages"):
        if not tensors[name].isfinite().all():
            return f"{name} has NaN or infinite values"
    return ""


def _recorded(tensors: Mapping[str, Tensor], *, step: int, model: str, tokenizer: str) -> RecordedRollout:
    index, lengths = tensors["prompt_index"].tolist(), tensors["answer_lengths"].tolist()
    prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
    there = mask_of_lengths(lengths)

    def padded(name: str) -> Tensor:
        x = torch.zeros(there.shape, dtype=tensors[name].dtype)
        x[there] = tensors[name]
        return x

    width = max(len(prompts[i]) for i in index)
    before = torch.zeros(len(index), width, dtype=torch.int64)
    for row, i in enumerate(index):
        before[row, width - len(prompts[i]) :] = prompts[i]
    rollout = Rollout(
        tokens=torch.cat([before, padded("answer_ids").long()], dim=1),
        mask=padded("mask"),
        prompt_lengths=[len(prompts[i]) for i in index],
        completion_lengths=lengths,
        prompt_index=index,
        ended=tensors["ended"].tolist(),
        completions=[""] * len(index),
        columns={"prompt": [""] * len(index)},
        scores=tensors["scores"].tolist() if "scores" in tensors else [],
    )
    per_token = (padded(name) for name in ("logprobs", "values", "rewards", "advantages"))
    return RecordedRollout(step, model, tokenizer, rollout, *per_token)
