"""Fitting a critic before PPO: Monte-Carlo returns of recorded or sampled answers are regressed on their prefixes.

A critic that starts with values of zero gives advantages that are returns, as noisy as those. Fitted to answers of the
start model it explains a part of their variance from the first step on (VC-PPO, Yuan et al. 2025, "What's behind PPO's
collapse in long-CoT?", pretrains the critic in this way).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import ppo_fast as ppo
from ppo_fast.common.device import derived_seed, ordinary_modes, widest_float
from ppo_fast.common.errors import UserError
from ppo_fast.common.folders import MARK
from ppo_fast.common.jsonl import as_lines
from ppo_fast.llm import setup
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import Prompts, as_rows
from ppo_fast.llm.distributed import init_distributed
from ppo_fast.llm.experience import Experience, explained_variance, monte_carlo_returns
from ppo_fast.llm.hashes import vocabulary_hash
from ppo_fast.llm.learn import Learner, means_of
from ppo_fast.llm.models.build import Models, build_models
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.critic_origin import ORIGIN, origin_text
from ppo_fast.llm.models.head import LanguageModel
from ppo_fast.llm.models.loading import vocabulary_of
from ppo_fast.llm.models.policy import packed_mode
from ppo_fast.llm.models.probe import Reach
from ppo_fast.llm.models.value_head import fit_linear
from ppo_fast.llm.models.weights import weights_hash
from ppo_fast.llm.optimizer import Optimizer, Optimizers
from ppo_fast.llm.packing.pack import Pack, split_minibatches
from ppo_fast.llm.packing.rollout import Rollout, join_rollouts
from ppo_fast.llm.report.export import save_critic
from ppo_fast.llm.reward.scoring import RewardFunction, check_rewards, check_weights, named_rewards, score
from ppo_fast.llm.rollout_files import RecordedRollout
from ppo_fast.llm.sample import sample_rollout
from ppo_fast.llm.value_scale import moments_of

FOLDS = 4  # of the training prompts, by which the penalty of least squares is chosen
COMMAND = "ppo-fast critic"  # in the mark of its output folder
REPORT = "fit.jsonl"


@dataclass(frozen=True)
class Answers:
    """B answers with the Monte-Carlo return of each of their prefixes."""

    rollout: Rollout
    mask: Tensor  # [B, T] bool, the rollout's, on its device
    returns: Tensor  # [B, T] fp32, in units of the reward
    batches: int  # rollouts of the size of a PPO step that they are from

    @classmethod
    def join(
        cls, rollouts: Sequence[Rollout], rewards: Sequence[Tensor], config: PPOConfig, device: torch.device, pad: int
    ) -> "Answers":
        """From rollouts and the rewards [B, T] of their tokens, each with another T."""
        rollout = join_rollouts(rollouts, pad).to(device)
        mask = rollout.mask.to(device)
        width = rollout.completion_width
        padded = [torch.nn.functional.pad(x.to(device), (0, width - x.shape[1])) for x in rewards]
        return cls(rollout, mask, monte_carlo_returns(torch.cat(padded), mask, config, bootstrap=None), len(rollouts))

    def prompts(self) -> list[tuple[int, ...]]:
        """The tokens of the prompt of each answer."""
        first = self.rollout.tokens.shape[1] - self.rollout.completion_width
        rows = zip(self.rollout.tokens.tolist(), self.rollout.prompt_lengths, strict=True)
        return [tuple(ids[first - length : first]) for ids, length in rows]


@dataclass(frozen=True)
class FitRow:
    """What is reported after a phase of the fit."""

    phase: str  # "start", "value head", "epoch 1", ...
    explained_variance: float  # of the returns of the held-out answers
    value_loss: float | None = None  # mean over the minibatches of an epoch, in units of the critic's head


class CriticFit:
    """Fits a critic of the start model of a run.

    A critic with a backbone of its own is trained by AdamW for config.epochs passes, in minibatches of the size that
    PPO has with the same options and with the same code: the value loss, without a value clip. A new value head starts
    at the least-squares solution. With config.critic = "shared" the actor is frozen, so that only the value head is
    fitted, by least squares alone: the loss is a quadratic function of the head, whose minimum one pass over the
    answers gives exactly, where AdamW needs a learning rate and computes the same hidden states in each epoch. The
    penalty of least squares is chosen by cross-validation over prompts.

    Args:
        config: the options of models, sampling, rewards and critic. There is no KL penalty: the answers are those of
            the start model, or recorded with their penalty.
        actor: the start model, which is not changed.
        tokenizer: its tokenizer.
        critic: the critic to fit; None: a new one, as config.critic says.
        rows: with a prompt each, to sample answers for; None: answers are recorded ones.
        recorded: recorded answers to fit to, in place of rows.

    Raises:
        UserError: both or none of rows and recorded are given; recorded answers are those of another model or
            tokenizer, or have no score.
    """

    @ordinary_modes()
    def __init__(
        self,
        config: PPOConfig,
        actor: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        critic: Critic | None = None,
        rows: Iterable[Mapping[str, object]] | None = None,
        recorded: Sequence[RecordedRollout] = (),
    ) -> None:
        if (rows is None) == (not recorded):
            raise UserError(
                "a critic is fitted to recorded answers, or to answers sampled to prompts: give recorded or rows"
            )
        config = dataclasses.replace(config, kl_coef=0.0, value_clip=None, dump_rollouts=False)
        models = Models(actor, critic)
        setup.check_arguments(models, tokenizer, config, None)
        config = setup.prepare_process(config)
        self.distributed = init_distributed(config)
        if self.distributed.size > 1:
            raise UserError("a critic is fitted in one process: start ppo-fast critic without torchrun")
        setup.check_compiler(config, self.distributed)
        self.device, self.tokenizer = self.distributed.device, tokenizer
        self.config, self.notes = setup.decide_dtype(config, self.distributed)
        self.start_model = weights_hash(actor)
        _check_recorded(recorded, self.start_model, tokenizer, vocabulary=vocabulary_of(actor))
        self.recorded = recorded
        if rows is not None:
            kept, left_out = setup.usable_rows(as_rows(rows), tokenizer, models, self.config)
            self.notes += [f"{left_out} prompts are too long and were left out"] * (left_out > 0)
            self.notes += setup.check_memory(self.config, self.distributed, models, tokenizer, kept)
            self.prompts: Prompts | None = Prompts(kept, seed=config.seed)
            reach = setup.reach_of(self.config, models, tokenizer, kept, list)
        else:
            self.prompts = None
            reach = _reach_of_recorded(recorded, config.epochs)
        self.is_new = critic is None
        self.policy, _ = build_models(
            self.config,
            *(actor, critic, None),
            self.device,
            tokenizer=tokenizer if rows is not None else None,
            reach=reach,
        )

    @ordinary_modes()
    def answers(
        self,
        rewards: RewardFunction | dict[str, RewardFunction] | None = None,
        *,
        count: int = 1024,
        reward_weights: dict[str, float] | None = None,
        after: Callable[[int], None] | None = None,
    ) -> Answers:
        """The answers to fit to: the recorded ones, or new ones of the start model.

        Args:
            rewards: a function, or several by name, as those of PPOTrainer; recorded answers have their rewards.
            count: number of answers to sample, which is rounded up to whole prompts.
            reward_weights: a factor for each reward by name; 1 if not given.
            after: is called with the number of answers that are sampled so far.
        """
        pad = self.tokenizer.pad_token_id
        if self.prompts is None:
            rollouts, per_token = [x.rollout for x in self.recorded], [x.rewards for x in self.recorded]
            return Answers.join(rollouts, per_token, self.config, self.device, pad)
        if rewards is None:
            raise UserError("answers that are sampled need a reward: give --reward or --reward-model")
        check_count(count)
        functions = named_rewards(rewards)
        check_rewards(functions, self.prompts.rows)
        weights = check_weights(reward_weights, functions)
        rollouts, per_token = list[Rollout](), list[Tensor]()
        for rollout, of_tokens in self._sampled(functions, weights, count):
            rollouts.append(rollout)
            per_token.append(of_tokens)
            if after is not None:
                after(sum(map(len, rollouts)))
        return Answers.join(rollouts, per_token, self.config, self.device, pad)

    def _sampled(
        self, functions: dict[str, RewardFunction], weights: dict[str, float], count: int
    ) -> Iterator[tuple[Rollout, Tensor]]:
        """Rollouts of the size of a PPO step, and the rewards [B, T] of their tokens."""
        config, prompts = self.config, self.prompts
        if prompts is None:
            return
        sampler = setup.own_sampler(self.policy, self.tokenizer, config, self.distributed)
        left, step = math.ceil(count / config.samples_per_prompt), 0
        while left > 0:
            rows = prompts.take(min(left, config.prompts_per_step))
            left, seed = left - len(rows), derived_seed(config.seed, 0, step)
            step += 1
            vocabulary = vocabulary_of(self.policy.actor)
            rollout = sample_rollout(
                sampler, self.tokenizer, rows, config, self.device, vocabulary=vocabulary, seed=seed
            )
            scores, _ = score(rollout, functions, config, weights)
            zeros, mask = torch.zeros(rollout.mask.shape, device=self.device), rollout.mask.to(self.device)
            yield rollout, ppo.shape_rewards(scores, zeros, zeros, mask, kl_coef=0.0, backend=config.backend)[0]

    @ordinary_modes()
    def fit(
        self, answers: Answers, *, held_out: float = 0.1, after: Callable[[FitRow], None] | None = None
    ) -> list[FitRow]:
        """Fit the critic and return what each phase explains of the returns of held-out answers.

        Args:
            answers: of `answers`.
            held_out: the share of the prompts, at least one, whose answers are not trained on.
            after: is called with each row.

        Raises:
            UserError: all answers are to one prompt, or have the same return; or held_out is not between 0 and 1.
            NonFiniteError: a loss or gradient is not finite.
        """
        prompts = answers.prompts()
        kept, held = split_by_prompt(prompts, held_out, seed=self.config.seed)
        critic, config, rows = self.policy.critic, self.config, list[FitRow]()
        moments = moments_of(answers.returns[kept], answers.mask[kept], widest_float(self.device))
        std = moments.std()
        if std.item() == 0:
            raise UserError(
                f"all {len(kept)} answers to train on have the return {moments.mean.item():.4g}, so there is nothing to"
                " fit: check that the reward reads the answers right, or take more answers or other prompts"
            )

        def report(phase: str, value_loss: float | None = None) -> None:
            rows.append(FitRow(phase, self._explained(answers, held), value_loss))
            if after is not None:
                after(rows[-1])

        report("start")
        if config.normalize_values:
            critic.rescale(moments.mean, std)
        if self.is_new or critic.backbone is None:
            self._fit_head(answers, kept, prompts)
            report("value head")
        if critic.backbone is not None:
            for epoch, loss in enumerate(self._epochs(answers, kept), start=1):
                report(f"epoch {epoch}", loss)
        return rows

    def save(self, folder: Path, rows: Sequence[FitRow]) -> Path:
        """Write the critic to a folder that --critic-model of ppo-fast train accepts; an earlier one is replaced.

        The folder also has fit.jsonl, with the rows of `fit`.

        Raises:
            UserError: it cannot be written; an earlier folder is unchanged.
        """
        texts = {
            ORIGIN: origin_text(self.tokenizer, [self.start_model]),
            REPORT: as_lines(map(dataclasses.asdict, rows)),
            MARK: f"{COMMAND}\n",
        }
        return save_critic(self.policy.critic, self.tokenizer, folder, texts=texts)

    @torch.no_grad()
    def states_of(self, answers: Answers, rows: Sequence[int]) -> Iterator[tuple[Pack, Tensor]]:
        """Packs of some answers, and what the value head reads at their counted tokens, [n, D]."""
        head = self.policy.head
        (packs,) = split_minibatches(
            answers.rollout,
            list(rows),
            minibatches=1,
            max_tokens=head.tokens_per_pack(self.config.micro_batch_tokens),
            regime=head.regime,
        )
        with packed_mode(self.policy):
            for pack in packs:
                yield pack, self.policy.value_states(pack)

    def _explained(self, answers: Answers, rows: Sequence[int]) -> float:
        values, mask = torch.zeros_like(answers.returns), torch.zeros_like(answers.mask)
        mask[rows] = answers.mask[rows]
        for pack, states in self.states_of(answers, rows):
            pack.scatter_(values, self.policy.critic(states).detach())
        return explained_variance(values, answers.returns, mask).item()

    @torch.no_grad()
    def _fit_head(self, answers: Answers, rows: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> None:
        """Set the value head to the least-squares solution over the tokens of some answers."""
        critic, fold_of = self.policy.critic, dict[tuple[int, ...], int]()
        for row in rows:
            fold_of.setdefault(prompts[row], len(fold_of) % FOLDS)
        folds = [[row for row in rows if fold_of[prompts[row]] == fold] for fold in range(min(FOLDS, len(fold_of)))]
        weight, bias = fit_linear(
            ((states, critic.normalize(pack.gather(answers.returns))) for pack, states in self.states_of(answers, some))
            for some in folds
        )
        critic.head.weight.copy_(weight.unsqueeze(0))
        critic.head.bias.copy_(bias)

    def _epochs(self, answers: Answers, rows: Sequence[int]) -> Iterator[float]:
        """Train the critic for config.epochs passes; the mean value loss of each."""
        config = self.config
        share = len(rows) / len(answers.rollout)
        minibatches = max(1, min(len(rows), round(config.minibatches * answers.batches * share)))
        epoch_config = dataclasses.replace(
            config,
            total_steps=config.epochs,  # learning rates follow epochs
            epochs=1,
            prompts_per_step=len(rows),
            samples_per_prompt=1,
            minibatches=minibatches,
        )
        optimizers = Optimizers(
            actor=Optimizer(self.policy.actor, config.lr, epoch_config),
            critic=Optimizer(self.policy.critic, config.critic_lr, epoch_config),
        )
        generator = torch.Generator().manual_seed(config.seed)
        learner = Learner(self.policy, None, optimizers, epoch_config, generator=generator)
        zeros = torch.zeros_like(answers.returns)
        for epoch in range(config.epochs):
            optimizers.begin(epoch)
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            experience = Experience(
                rollout=answers.rollout,
                minibatches=learner.experience_maker.split_minibatches(answers.rollout, order),
                kl_coef=0.0,
                mask=answers.mask,
                **dict.fromkeys(("logprobs", "ref_logprobs", "values", "rewards", "kl", "advantages"), zeros),
                returns=answers.returns,
                weights=None,
                metrics={},
            )
            yield means_of(learner.update(experience, train_actor=False))["value_loss"]


def check_held_out(share: float) -> None:
    """Reject a share of held-out prompts that is not between 0 and 1."""
    if not 0 < share < 1:
        raise UserError(f"the share of held-out prompts must be between 0 and 1, got {share}")


def check_count(answers: int) -> None:
    """Reject a number of answers to sample below 1."""
    if answers < 1:
        raise UserError(f"the number of answers must be at least 1, got {answers}")


def split_by_prompt(prompts: Sequence[tuple[int, ...]], share: float, *, seed: int) -> tuple[list[int], list[int]]:
    """The rows to train on, and those to hold out: all answers to a prompt are on one side.

    Args:
        prompts: of each row.
        share: of the prompts that are held out; at least one is, and at least one is not.
        seed: of the choice.

    >>> split_by_prompt([(1,), (2,), (1,), (3,)], 0.1, seed=0)
    ([0, 1, 2], [3])

    Raises:
        UserError: there is one prompt only, or the share is not between 0 and 1.
    """
    check_held_out(share)
    known = list(dict.fromkeys(prompts))
    if len(known) < 2:
        raise UserError(
            f"all {len(prompts)} answers are to one prompt, which leaves none to hold out: give answers to at least two"
            " prompts"
        )
    count = min(len(known) - 1, max(1, round(share * len(known))))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {known[i] for i in order[:count]}
    return [i for i, x in enumerate(prompts) if x not in held], [i for i, x in enumerate(prompts) if x in held]


def _check_recorded(
    recorded: Sequence[RecordedRollout], start_model: str, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int
) -> None:
    """Reject recorded answers of another model or tokenizer, and those without a score."""
    own_tokenizer = vocabulary_hash(tokenizer) if recorded else ""
    for some in recorded:
        where = f"the recorded answers of step {some.step}"
        if some.tokenizer != own_tokenizer:
            raise UserError(f"{where} have tokens of another tokenizer: give the model with which their run started")
        if some.model != start_model:
            raise UserError(f"{where} are of a run that started with another model: give that one as --model")
        highest = int(some.rollout.tokens.max())
        if highest >= vocabulary:
            raise UserError(
                f"{where} are damaged: they have the token {highest}, but the model has the tokens 0 to"
                f" {vocabulary - 1}; record them again"
            )
        scores = some.rollout.scores
        missing = next((row for row, x in enumerate(scores) if not math.isfinite(x)), None if scores else 0)
        if missing is not None:
            raise UserError(
                f"{where} have no score, answer {missing} is the first: give rollouts that a run with dump_rollouts"
                " recorded, or --rollouts sample with a --reward"
            )


def _reach_of_recorded(recorded: Sequence[RecordedRollout], epochs: int) -> Reach:
    lengths = [
        prompt + answer
        for some in recorded
        for prompt, answer in zip(some.rollout.prompt_lengths, some.rollout.completion_lengths, strict=True)
    ]
    return Reach(max(lengths), 3.0 * epochs * sum(lengths))
