"""Evaluation: held-out prompts are answered and judged, and one answer of the last step is explained token by token.

Training does not notice: sampling has a random state of its own, the same in every evaluation, so that two of them
differ by the policy alone.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ppo_fast.checkpoint import reported, write_file
from ppo_fast.config import PPOConfig
from ppo_fast.data import as_text
from ppo_fast.decoding import BROKEN, AnswerText
from ppo_fast.device import derived_seed
from ppo_fast.errors import UserError
from ppo_fast.learn import Experience, Reference, as_floats, cut_as, packed
from ppo_fast.learn import evaluate as judge
from ppo_fast.models import vocabulary_of
from ppo_fast.packing import make_pack
from ppo_fast.parallel import ONE, World
from ppo_fast.plots import can_draw, draw_tokens
from ppo_fast.policy import Judgement, Policy
from ppo_fast.progress import SAMPLES_SHOWN, printable, shortened
from ppo_fast.reward import RewardFunction, score
from ppo_fast.rewards.isolation import own_random_state
from ppo_fast.rollout import Rollout
from ppo_fast.sample import Sampler, drop_long_prompts, respond

EVALUATION = 2**32 - 1  # in place of a step: its seeds are not those of training
TOKENS_SHOWN = 30  # in the terminal; the file has them all


@dataclass(frozen=True)
class Explained:
    """One answer of a training step, token by token: why, and how far, the update moved the policy."""

    prompt: str
    answer: str
    score: float
    tokens: list[str]  # T
    numbers: dict[str, list[float]]  # reward, kl (with a reference), value, advantage, ratio; T each


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    step: int
    metrics: dict[str, float]  # eval/score, eval/kl, ...
    rollout: Rollout  # the held-out answers
    kl: list[float] | None  # of each answer, in nats
    explained: Explained | None  # None before the first step


def distinct(answers: list[list[int]], n: int) -> float:
    """Different n-grams of all answers together, divided by their tokens (Li et al. 2016, section 5.2).

    Comparable only between equally many answers: more of them repeat each other more often.

    >>> distinct([[1, 2, 1], [1, 2]], 1), distinct([[1, 2, 1], [1, 2]], 2)  # {1, 2} and {12, 21}, of 5 tokens
    (0.4, 0.4)
    """
    found = {tuple(ids[i : i + n]) for ids in answers for i in range(len(ids) - n + 1)}
    return len(found) / max(1, sum(map(len, answers)))


@dataclass
class Evaluator:
    """Judges the policy on held-out rows, without those that are too long; what else it needs is the trainer's."""

    rows: list[dict[str, Any]]
    trained_on: list[dict[str, Any]]
    config: PPOConfig
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    policy: Policy
    reference: Reference
    sampler: Sampler
    rewards: dict[str, RewardFunction]
    reward_weights: dict[str, float]
    world: World = ONE
    notes: list[str] = field(init=False, default_factory=list)  # what people should know of the rows

    def __post_init__(self) -> None:
        others = (self.policy.critic.backbone, getattr(self.reference, "model", None))
        self.rows, left_out = drop_long_prompts(self.rows, self.tokenizer, self.policy.actor, self.config, *others)
        if len(self.rows) < self.world.size:
            raise UserError(f"{len(self.rows)} held-out prompts are too few for {self.world.size} processes")
        if left_out:
            self.notes.append(f"{left_out} held-out prompts are too long and were left out")
        known = {json.dumps(row["prompt"], default=str) for row in self.trained_on}
        twice = sum(json.dumps(row["prompt"], default=str) in known for row in self.rows)
        if twice:
            self.notes.append(f"{twice} of {len(self.rows)} held-out prompts are among the training prompts, too")

    def due(self, step: int) -> bool:
        """Before the first step, every `eval_every` steps, and after the last."""
        every = self.config.eval_every
        return step in (0, self.config.total_steps) or bool(every and step % every == 0)

    def run(
        self, step: int, kl_coef: float, trained: Rollout | None = None, experience: Experience | None = None
    ) -> Evaluation:
        """Answers to all held-out prompts and their metrics; `trained` and `experience` are the last step's."""
        explained = None
        if trained is not None and experience is not None:
            explained = explain(self.policy, self.tokenizer, trained, experience, with_kl=self.reference is not None)
        config = dataclasses.replace(
            self.config, prompts_per_step=len(self.rows), samples_per_prompt=self.config.eval_samples, minibatches=1
        )
        if config.eval_greedy:
            config = dataclasses.replace(config, top_k=1)  # which every sampler understands
        world = self.world
        with own_random_state(derived_seed(config.seed, world.rank, EVALUATION), self.device):
            vocabulary = vocabulary_of(self.policy.actor)
            rows = world.share(self.rows)
            mine = respond(self.sampler, self.tokenizer, rows, config, self.device, vocabulary=vocabulary)
            scores, reward_means = score(mine, self.rewards, config, self.reward_weights)
        world.meet(f"the rewards of the evaluation after step {step}")  # one process may take much longer than others
        reward_means = world.combined(reward_means, len(mine))
        rollout, scores = world.join(mine, scores, self.tokenizer.pad_token_id)
        minibatches = cut_as(rollout, list(range(len(rollout))), config, world, self.policy.head)
        judged = judge(self.policy, self.reference, rollout, scores, minibatches, config, kl_coef=kl_coef, world=world)
        special = set(self.tokenizer.all_special_ids)
        words = [[i for i in ids if i not in special] for ids in rollout.completion_ids]
        metrics = {
            "score": sum(rollout.scores) / len(rollout),
            **reward_means,
            "answer_tokens": sum(rollout.answer_lengths) / len(rollout),
            "ended": sum(rollout.ended) / len(rollout),
            "distinct_1": distinct(words, 1),
            "distinct_2": distinct(words, 2),
            **as_floats(judged.metrics),
        }
        kl = None if self.reference is None else judged.kl.sum(1).tolist()
        return Evaluation(step, {f"eval/{name}": x for name, x in metrics.items()}, rollout, kl, explained)

    def keep_best(self, evaluation: Evaluation, save: Callable[[str, dict[str, str]], Any]) -> bool:
        """Has the model saved as OUT/best if its score is higher than that of the one there; says whether it was.

        OUT/best/evaluation.json names step and metrics. Before the first step nothing there counts.
        """
        if self.config.out is None:
            return False
        best = Path(self.config.out) / "best"
        known = _score_in(best) if self.world.first and evaluation.step > 0 else float("-inf")
        if self.world.any(known >= evaluation.metrics["eval/score"]):
            return False
        note = {"step": evaluation.step, **evaluation.metrics}
        save(best.name, {"evaluation.json": json.dumps(note, indent=2) + "\n"})
        return True


def _score_in(folder: Path) -> float:
    noted = _note_in(folder)
    return float("-inf") if noted is None else noted["eval/score"]


def _note_in(folder: Path) -> dict[str, float] | None:
    """OUT/best/evaluation.json with its step and score, or None where there is none."""
    try:
        noted = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        return {**noted, "step": int(noted["step"]), "eval/score": float(noted["eval/score"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'evaluation.json'} was not written by ppo-fast: remove {folder}") from error


def drop_best_after(folder: Path, step: int) -> None:
    """Removes OUT/best if a later step than `step` left it, or if no step is done: it is of another branch or run."""
    noted = _note_in(folder) if step > 0 else None
    if step == 0 or (noted is not None and noted["step"] > step):
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def explain(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, rollout: Rollout, experience: Experience, *, with_kl: bool
) -> Explained:
    """The answer that pushed the policy hardest (by its sum of |advantages|), and what the step made of it.

    The ratio is p(token) after the step over p(token) when it was sampled.
    """
    row = int(experience.advantages.abs().sum(1).argmax())
    length = rollout.answer_lengths[row]
    prompt = rollout.tokens[row, : -rollout.answer_width].tolist()[-rollout.prompt_lengths[row] :]
    texts = AnswerText(tokenizer, [prompt])
    with packed(policy):
        after = policy(make_pack(rollout, [row]))
    assert isinstance(after, Judgement)
    numbers = {"reward": experience.rewards[row, :length]}
    if with_kl:
        numbers["kl"] = experience.kl[row, :length]
    numbers["value"] = experience.values[row, :length]
    numbers["advantage"] = experience.advantages[row, :length]
    numbers["ratio"] = (after.logprobs - experience.logprobs[row, :length]).exp()
    return Explained(
        prompt=as_text(rollout.columns["prompt"][row]),
        answer=rollout.completions[row],
        score=rollout.scores[row],
        tokens=[visible(texts, i) for i in rollout.completion_ids[row]],
        numbers={name: x.tolist() for name, x in numbers.items()},
    )


def visible(texts: AnswerText, token: int) -> str:
    """A token's text with its spaces visible; the tokenizer's own name for a part of a character."""
    text = texts.token(token)
    if BROKEN in text or not text:
        # an embedding may have more rows than the tokenizer has tokens
        text = str(texts.tokenizer.convert_ids_to_tokens(token) or f"<{token}>")
    return printable(text.replace(" ", "␣"))


def summary(evaluation: Evaluation) -> str:
    """One line: step 10, 64 held-out answers: score 0.53, ..."""
    shown = {
        "score": "score",
        "kl_per_answer": "KL per answer",
        "answer_tokens": "tokens",
        "ended": "ended",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
    }
    m = evaluation.metrics
    numbers = ", ".join(f"{label} {m[f'eval/{name}']:z.4g}" for name, label in shown.items() if f"eval/{name}" in m)
    return f"step {evaluation.step}, {len(evaluation.rollout)} held-out answers: {numbers}"


def samples(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every held-out answer: prompt, answer, score, its tokens and, with a reference, its KL in nats."""
    rollout = evaluation.rollout
    rows = [
        {"prompt": prompt, "answer": answer, "score": points, "tokens": tokens}
        for prompt, answer, points, tokens in zip(
            rollout.columns["prompt"], rollout.completions, rollout.scores, rollout.answer_lengths, strict=True
        )
    ]
    return rows if evaluation.kl is None else [{**row, "kl": kl} for row, kl in zip(rows, evaluation.kl, strict=True)]


def show(evaluation: Evaluation, console: Console, *, tables: bool = True) -> None:
    """In the terminal: the summary, and with `tables` some held-out answers, and the explained answer."""
    console.print(Text(summary(evaluation), style="bold"), soft_wrap=True)
    if not tables:
        return
    rows = samples(evaluation)[:SAMPLES_SHOWN]
    names = ["prompt", "answer", *(name for name in rows[0] if name not in ("prompt", "answer"))]
    table = Table(*names)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        texts = (Text(shortened(text)) for text in (as_text(row["prompt"]), row["answer"]))
        table.add_row(*texts, *(f"{row[name]:z.4g}" for name in names[2:]))
    console.print(table)
    explained = evaluation.explained
    if explained is None:
        return
    title = f"an answer of step {evaluation.step} in training, score {explained.score:z.4g}, to: {explained.prompt}"
    console.print(Text(shortened(title)))
    table = Table("token", *explained.numbers)
    for column in table.columns[1:]:
        column.justify = "right"
    for token, *numbers in list(zip(explained.tokens, *explained.numbers.values(), strict=True))[:TOKENS_SHOWN]:
        table.add_row(Text(token), *(f"{x:z.4f}" for x in numbers))
    if len(explained.tokens) > TOKENS_SHOWN:
        table.add_row("...")
    console.print(table)


def write(evaluation: Evaluation, folder: Path, config: PPOConfig) -> None:
    """step-N.md with tables, step-N.jsonl with every held-out answer, step-N.png with the explained one."""
    name = folder / f"step-{evaluation.step}"
    with reported(f"the evaluation could not be written to {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in samples(evaluation)]
        write_file(name.with_suffix(".jsonl"), "\n".join(lines) + "\n")
        write_file(name.with_suffix(".md"), markdown(evaluation))
    if evaluation.explained is not None and can_draw():
        e = evaluation.explained
        title = f"step {evaluation.step}, score {e.score:z.4g}: {shortened(e.prompt, 100)}"
        draw_tokens(e.tokens, e.numbers, name.with_suffix(".png"), title, clip=(config.clip_low, config.clip_high))


def markdown(evaluation: Evaluation) -> str:
    """The whole evaluation as a page: metrics, some held-out answers, and the explained answer token by token."""
    rows = [{**row, "prompt": as_text(row["prompt"])} for row in samples(evaluation)[:SAMPLES_SHOWN]]
    parts = [
        f"# Evaluation after step {evaluation.step}",
        _table(["metric", "value"], [[name, f"{x:z.6g}"] for name, x in evaluation.metrics.items()]),
        "## Held-out answers",
        _table(list(rows[0]), [[x if isinstance(x, str) else f"{x:z.4g}" for x in row.values()] for row in rows]),
    ]
    if evaluation.explained is not None:
        e = evaluation.explained
        parts += [
            f"## One answer of step {evaluation.step} in training",
            "The answer with the largest sum of |advantage|: score " + f"{e.score:z.4g}" + ". The reward of a token has"
            " the KL penalty in it (and the score at the last token), the value is what the critic expected, and the"
            " ratio is p(token) after the step over p(token) when it was sampled.",
            f"Prompt: {_escaped(e.prompt)}",
            _table(
                ["token", *e.numbers],
                [
                    [token, *(f"{x:z.4f}" for x in numbers)]
                    for token, *numbers in zip(e.tokens, *e.numbers.values(), strict=True)
                ],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *([_escaped(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: str) -> str:
    """Text as Markdown shows it unchanged, in one line."""
    return re.sub(r"([\\`*_\[\]<>#|~$])", r"\\\1", printable(" ".join(text.split())))
