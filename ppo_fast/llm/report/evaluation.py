"""Evaluation: completions of held-out prompts are scored, and one completion of the last step is explained.

It does not change the training: sampling has its own random state, the same in every evaluation, so that two
evaluations differ by the policy alone.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ppo_fast.common.device import derived_seed
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.experience import Experience, ExperienceMaker
from ppo_fast.llm.learn import as_floats
from ppo_fast.llm.models.loading import vocabulary_of
from ppo_fast.llm.models.policy import Policy
from ppo_fast.llm.models.reference import Reference
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.report.explanation import TokenExplanation, explain
from ppo_fast.llm.reward.isolation import own_random_state
from ppo_fast.llm.reward.scoring import RewardFunction, score
from ppo_fast.llm.sample import drop_long_prompts, sample_rollout
from ppo_fast.llm.sampler import Sampler

EVALUATION = 2**32 - 1  # instead of a step: its seeds differ from those of training


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation."""

    step: int
    metrics: dict[str, float]  # eval/score, eval/kl, ...
    rollout: Rollout  # the held-out completions
    kl: list[float] | None  # of each completion, in nats
    explained: TokenExplanation | None  # None before the first step


def distinct(answers: list[list[int]], n: int) -> float:
    """Return the number of different n-grams of all completions, divided by their tokens (Li et al. 2016, section 5.2).

    It can be compared only between equal numbers of completions: with more of them, more n-grams repeat.

    >>> distinct([[1, 2, 1], [1, 2]], 1), distinct([[1, 2, 1], [1, 2]], 2)  # {1, 2} and {12, 21}, of 5 tokens
    (0.4, 0.4)
    """
    found = {tuple(ids[i : i + n]) for ids in answers for i in range(len(ids) - n + 1)}
    return len(found) / max(1, sum(map(len, answers)))


@dataclass
class Evaluator:
    """Evaluation of the policy on held-out rows, without those that are too long; it uses the trainer's models."""

    rows: list[dict[str, object]]
    trained_on: list[dict[str, object]]
    config: PPOConfig
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    policy: Policy
    reference: Reference
    sampler: Sampler
    rewards: dict[str, RewardFunction]
    reward_weights: dict[str, float]
    distributed: Distributed = SINGLE_PROCESS
    notes: list[str] = field(init=False, default_factory=list)  # sentences about the rows for the user

    def __post_init__(self) -> None:
        others = (self.policy.critic.backbone, getattr(self.reference, "model", None))
        self.rows, left_out = drop_long_prompts(self.rows, self.tokenizer, self.policy.actor, self.config, *others)
        if len(self.rows) < self.distributed.size:
            raise UserError(f"{len(self.rows)} held-out prompts are too few for {self.distributed.size} processes")
        if left_out:
            self.notes.append(f"{left_out} held-out prompts are too long and were left out")
        known = {json.dumps(row["prompt"], default=str) for row in self.trained_on}
        twice = sum(json.dumps(row["prompt"], default=str) in known for row in self.rows)
        if twice:
            self.notes.append(f"{twice} of {len(self.rows)} held-out prompts are among the training prompts, too")

    def due(self, step: int) -> bool:
        """Return True before the first step, every `eval_every` steps, and after the last step."""
        every = self.config.eval_every
        return step in (0, self.config.total_steps) or bool(every and step % every == 0)

    def run(self, step: int, kl_coef: float, trained: Experience | None = None) -> Evaluation:
        """Evaluate on all held-out prompts, and explain one completion of the last step (`trained`)."""
        explained = None
        if trained is not None:
            explained = explain(self.policy, self.tokenizer, trained, with_kl=self.reference is not None)
        config = dataclasses.replace(
            self.config, prompts_per_step=len(self.rows), samples_per_prompt=self.config.eval_samples, minibatches=1
        )
        if config.eval_greedy:
            config = dataclasses.replace(config, top_k=1)  # which every sampler understands
        distributed = self.distributed
        with own_random_state(derived_seed(config.seed, distributed.rank, EVALUATION), self.device):
            vocabulary = vocabulary_of(self.policy.actor)
            rows = distributed.local_rows(self.rows)
            seed = derived_seed(config.seed, distributed.rank, EVALUATION)
            local = sample_rollout(
                self.sampler, self.tokenizer, rows, config, self.device, vocabulary=vocabulary, seed=seed
            )
            scores, reward_means = score(local, self.rewards, config, self.reward_weights)
        # one process can take much longer than others
        distributed.monitored_barrier(f"the rewards of the evaluation after step {step}")
        reward_means = distributed.reduce_metrics(reward_means, len(local))
        rollout, scores = distributed.gather_rollout(local, scores, self.tokenizer.pad_token_id)
        maker = ExperienceMaker(self.policy, self.reference, config, distributed)
        experience = maker.make(rollout, scores, kl_coef=kl_coef)
        special = set(self.tokenizer.all_special_ids)
        words = [[i for i in ids if i not in special] for ids in rollout.completion_ids]
        metrics = {
            "score": sum(rollout.scores) / len(rollout),
            **reward_means,
            "answer_tokens": sum(rollout.completion_lengths) / len(rollout),
            "ended": sum(rollout.ended) / len(rollout),
            "distinct_1": distinct(words, 1),
            "distinct_2": distinct(words, 2),
            **as_floats(experience.metrics),
        }
        kl = None if self.reference is None else experience.kl.sum(1).tolist()
        return Evaluation(step, {f"eval/{name}": x for name, x in metrics.items()}, rollout, kl, explained)

    def keep_best(self, evaluation: Evaluation, save: Callable[[str, dict[str, str]], object]) -> bool:
        """Save the model as OUT/best if its score is higher than that of OUT/best; return True if it was saved.

        OUT/best/evaluation.json has step and metrics. Before the first step an earlier OUT/best is ignored.
        """
        if self.config.out is None:
            return False
        best = Path(self.config.out) / "best"
        known = _score_in(best) if self.distributed.is_main and evaluation.step > 0 else float("-inf")
        if self.distributed.any_rank(known >= evaluation.metrics["eval/score"]):
            return False
        note = {"step": evaluation.step, **evaluation.metrics}
        save(best.name, {"evaluation.json": json.dumps(note, indent=2) + "\n"})
        return True


def _score_in(folder: Path) -> float:
    noted = _note_in(folder)
    return float("-inf") if noted is None else noted["eval/score"]


def _note_in(folder: Path) -> dict[str, float] | None:
    """Read OUT/best/evaluation.json with its step and score; None if there is none."""
    try:
        noted = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        return {**noted, "step": int(noted["step"]), "eval/score": float(noted["eval/score"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'evaluation.json'} was not written by ppo-fast: remove {folder}") from error


def drop_best_after(folder: Path, step: int) -> None:
    """Remove OUT/best if a step after `step` saved it, or if no step is done: it belongs to another branch or run."""
    noted = _note_in(folder) if step > 0 else None
    if step == 0 or (noted is not None and noted["step"] > step):
        shutil.rmtree(folder, ignore_errors=True)
