"""The loop of PPO: sample, reward, learn."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.common import checkpoint
from ppo_fast.common import signals as interrupt
from ppo_fast.common.device import choose_dtype, derived_seed, has_weights, ordinary_modes, synchronize, total_memory
from ppo_fast.common.errors import InvariantError, NonFiniteError, UserError
from ppo_fast.common.folders import claim
from ppo_fast.common.lock import absolute, locked
from ppo_fast.common.plots import can_draw
from ppo_fast.common.signals import Request, stop_requests, stop_requests_of_several
from ppo_fast.common.threads import set_threads, threads_note
from ppo_fast.llm.checks import (
    notes_on_options,
    notes_on_rewards,
    notes_on_sampling,
    notes_on_unreached,
    reward_models_of,
)
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.controllers import EntropyController, KLController
from ppo_fast.llm.data import Prompts, as_rows, prompt_ids, tokenizer_notes, with_all_fields
from ppo_fast.llm.distributed import full_state_dict, init_distributed, peer_failure
from ppo_fast.llm.experience import Experience, advantages_of, dummy_pack, evaluate, packed_mode, split_minibatches_of
from ppo_fast.llm.hints import Hints
from ppo_fast.llm.invariants import ROUNDING, check_first_kl, check_ratio, gap_problem, rounding_of
from ppo_fast.llm.learn import accumulate_gradients, as_floats, learn, means_of
from ppo_fast.llm.memory import CannotEstimate, check_fits, why_unknown, with_adapters_of
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import unwrap_peft
from ppo_fast.llm.models.loading import check_language_model, check_others, check_tokenizer, end_tokens, vocabulary_of
from ppo_fast.llm.models.modes import gradient_checkpointing
from ppo_fast.llm.models.policy import with_chunk_bytes
from ppo_fast.llm.models.probe import Reach, named_lengths
from ppo_fast.llm.models.reference import is_adapted
from ppo_fast.llm.models.weights import check_separate
from ppo_fast.llm.optimizer import Optimizer
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.report.evaluation import Evaluation, Evaluator, drop_best_after
from ppo_fast.llm.report.evaluation_page import show, write
from ppo_fast.llm.report.export import check_saving, model_card, save_model, saved_dtype
from ppo_fast.llm.report.progress import Progress, peak_memory
from ppo_fast.llm.reward.fingerprint import reward_fingerprint
from ppo_fast.llm.reward.scoring import RewardFunction, check_rewards, check_weights, named_rewards, score
from ppo_fast.llm.sample import GenerateSampler, Sampler, drop_long_prompts, respond
from ppo_fast.llm.state import (
    capture,
    random_state,
    restore,
    restore_random,
    rows_hash,
    tokenizer_hash_of,
    weights_hash,
)

COMMON_ERRORS = (InvariantError, NonFiniteError)  # which all processes raise at the same place, or none


class PPOTrainer:
    """Proximal policy optimisation of a causal language model (Schulman et al. 2017; Ouyang et al. 2022).

    Args:
        config: every option.
        actor: any AutoModelForCausalLM, or a PeftModel around one; trained in place.
        tokenizer: its tokenizer, with a pad token.
        rows: dicts with a "prompt", a text or a list of messages, and any other columns, which reach the reward
            functions; checked as the lines of a file are, and `ppo_fast.llm.data.read_prompts` reads them from one.
        rewards: a function f(prompts, completions, **columns), or several by name, whose numbers are added.
        reward_weights: a factor for each of them by name; 1 if not given.
        critic: if not given, what config.critic says.
        reference: the frozen model of the KL penalty. If not given and kl_coef > 0: the actor without its adapters, or
            with a frozen copy of trained ones; or a copy of the actor, where it has no adapters.
        sampler: what answers prompts; the actor's own `generate` if not given.
        eval_rows: held-out rows, as `rows`, to evaluate on.

    >>> trainer = PPOTrainer(config, actor, tokenizer, rows, reward)  # doctest: +SKIP
    >>> history = trainer.train()  # doctest: +SKIP
    """

    @ordinary_modes()
    def __init__(
        self,
        config: PPOConfig,
        actor: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, Any]],
        rewards: RewardFunction | dict[str, RewardFunction],
        *,
        reward_weights: dict[str, float] | None = None,
        critic: Critic | None = None,
        reference: PreTrainedModel | None = None,
        sampler: Sampler | None = None,
        eval_rows: list[dict[str, Any]] | None = None,
    ) -> None:
        check_language_model(actor)
        check_tokenizer(tokenizer, actor)
        check_others(tokenizer, config, critic, reference)
        if sampler is not None and not callable(getattr(sampler, "sample", None)):
            raise UserError(f"the sampler must have a method sample(prompts, config), which {sampler!r:.60} lacks")
        rows, eval_rows = as_rows(rows), None if eval_rows is None else as_rows(eval_rows, "eval_rows")
        transformers.set_seed(config.seed)  # torch, and numpy and random, which rewards may use
        if config.out is not None:  # a reward that changes the working directory must not move it
            config = dataclasses.replace(config, out=str(absolute(config.out)))
        set_threads(config.threads)
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        self.distributed = init_distributed(config)
        dtype, note = self.distributed.run_on_main(lambda: choose_dtype(config.dtype, self.distributed.device))
        config = dataclasses.replace(config, dtype=dtype)
        self.config = config
        self.rewards = named_rewards(rewards)
        self.reward_weights = check_weights(reward_weights, self.rewards)
        if self.distributed.size > 1:
            self._check_agreement(rows, eval_rows)
            given = {"a critic": critic, "a reference": reference, "a sampler": sampler}
            has = {f"whether there is {name}": x is not None for name, x in given.items()}
            self.distributed.check_equal(has | {"whether the actor has adapters": is_adapted(actor)})
        if not has_weights(actor) and (self.distributed.is_main or self.distributed.strategy != "fsdp"):
            raise UserError(
                "the actor has no weights: load it with weights; under parallel = fsdp all processes but the first can"
                " do without"
            )
        self.notes: list[str] = [note] if note else []  # to be said at the start
        self.start_hash, self.tokenizer_hash, self.reward_hashes = "", "", {}
        if config.out is not None:  # a checkpoint knows what it began with
            self.start_hash = self.distributed.run_with_weights(lambda: weights_hash(actor), of=actor)
        if config.out is not None or self.distributed.size > 1:
            self.tokenizer_hash = tokenizer_hash_of(tokenizer, end_tokens(tokenizer, actor))
            self.reward_hashes = {name: reward_fingerprint(f, weights_hash) for name, f in self.rewards.items()}
            self.distributed.check_equal({"the tokenizer, the chat template or the end tokens": self.tokenizer_hash})
            self.notes += notes_on_rewards(self.distributed.all_gather_object(self.reward_hashes))
        self.tokenizer = tokenizer
        self.device = self.distributed.device
        others = (None if critic is None else critic.backbone, reference)
        kept, self.prompts_left_out = drop_long_prompts(with_all_fields(rows), tokenizer, actor, config, *others)
        self.notes += tokenizer_notes(tokenizer, [row["prompt"] for row in kept])
        if config.out is not None and not can_draw():
            self.notes.append("matplotlib is not installed: the run leaves no pictures")
        self.notes += notes_on_sampling(config, evaluated=bool(eval_rows)) + notes_on_options(config)
        if config.dtype == "bfloat16":
            self.notes.append(
                "dtype = bfloat16: learning computes the LM head in fp32, and sampling in bfloat16; sampler_gap shows"
                " the difference"
            )
        self._check_memory(actor, kept, critic, reference)
        learning = {"the actor": actor, "the critic": critic} if critic is not None else {"the actor": actor}
        check_separate(learning, reward_models_of(self.rewards))
        # one that is given may be any model, or a copy of the actor
        self.reference_is_start = reference is None or self.distributed.run_with_weights(
            lambda: weights_hash(reference) == weights_hash(actor), of=nn.ModuleList([actor, reference])
        )
        reach = self._reach(kept, eval_rows or [], actor, critic, reference)
        self.policy, self.reference = build_models(
            config,
            actor,
            critic,
            reference,
            self.device,
            self.distributed,
            tokenizer=tokenizer if sampler is None else None,
            reach=reach,
        )
        self.notes += notes_on_unreached(self.policy.unreached)
        self.actor: Any = self.policy.actor
        self.critic = self.policy.critic
        if config.out is not None and self.distributed.is_main:
            self.notes += check_saving(self.actor, tokenizer, config)
        own = GenerateSampler(
            self.actor,
            tokenizer,
            distributed=self.distributed,
            call=self.policy.generate,
            sampling=self.policy.sampling,
        )
        self.sampler, self.samples_itself = (own, True) if sampler is None else (sampler, False)
        if self.distributed.size > 1:
            transformers.set_seed(derived_seed(config.seed, self.distributed.rank))  # each samples other answers
        self.prompts = Prompts(kept, seed=config.seed)
        check_rewards(self.rewards, kept)
        for function in self.rewards.values():
            follow = getattr(function, "follow_trainer", None)  # of a reward with a model, such as Fluency
            if follow is not None:
                follow(self.device)
        self.actor_optimizer = Optimizer(self.actor, config.lr, config, first_step=config.critic_warmup_steps)
        self.critic_optimizer = Optimizer(self.critic, config.critic_lr, config)
        self.kl_controller = KLController(config)
        self.entropy_controller = EntropyController(config)
        self.generator = torch.Generator().manual_seed(config.seed)  # the order within minibatches
        self.steps_done = 0
        self.warm = False
        self.last_rollout: Rollout | None = None
        self.last_experience: Experience | None = None
        self.evaluator = self._evaluator(eval_rows)
        self.run_options: dict[str, Any] = {}  # what OUT/config.yaml shall hold besides: model, data and rewards
        self.notes += self.evaluator.notes if self.evaluator is not None else []
        self.recorded: Sequence[dict[str, float | None]] = []  # after `train`: the rows of metrics.jsonl
        self.hints = Hints(config)
        self.owns_out = False  # whether OUT was found to be a folder of this project
        self.stopped_by: str | None = None  # the signal that ended `train` early
        self.randoms = random_state(self.device)  # of torch, numpy and random, between two steps

    @ordinary_modes()
    def train(self, after_step: Callable[["PPOTrainer", dict[str, float]], bool | None] | None = None) -> list[dict]:
        """Runs all steps that are left and returns their metrics; `after_step(trainer, metrics)` may return True to
        stop early.

        With an OUT, Ctrl-C, SIGTERM and SIGHUP end it after the current step, with a checkpoint; `stopped_by` names
        the signal.
        """
        with ExitStack() as stack:
            self.distributed.run_on_main(lambda: stack.enter_context(locked(self.config.out)))
            self.owns_out = True
            return self._train(after_step)

    def _train(self, after_step: Callable[["PPOTrainer", dict[str, float]], bool | None] | None) -> list[dict]:
        history = []
        self.distributed.run_on_main(self._clean_up)
        progress = self._progress()
        # the handlers of signals stay until all else is done: torchrun sends SIGTERM while an error is on its way
        with self._stop_requests(progress) as request, progress, self._lost_processes_named():
            if self.steps_done == 0 and (evaluation := self._evaluation()) is not None:
                progress.record({"step": 0, **evaluation.metrics})
                self._report(evaluation, progress)
                self._check_gap({}, evaluation, progress)
            while self.steps_done < self.config.total_steps and not self._stops(request):
                metrics = self._step_or_save(progress)
                evaluation = self._evaluation()
                progress.show(metrics | (evaluation.metrics if evaluation is not None else {}), self.last_rollout)
                self._report(evaluation, progress)
                self._check_gap(metrics, evaluation, progress)
                metrics |= evaluation.metrics if evaluation is not None else {}
                for hint in self.hints.after(metrics, self.last_rollout.scores if self.last_rollout else []):
                    progress.say(hint)
                history.append(metrics)
                if self.config.save_every and self.steps_done % self.config.save_every == 0:
                    self._checkpoint(progress)
                if after_step is not None and self.distributed.any_rank(self._ask(after_step, metrics, progress)):
                    break
            else:
                if self.steps_done < self.config.total_steps:
                    self.stopped_by = request.name
            self.recorded = progress.recorded
            if self.stopped_by is not None:
                self._checkpoint(progress)
            else:
                self._save_model(progress)
        return history

    def _ask(
        self, after_step: Callable[["PPOTrainer", dict[str, float]], bool | None], metrics: dict, progress: Progress
    ) -> bool:
        """Whether `after_step` ends the run; where it fails, a checkpoint keeps the step."""
        try:
            return bool(after_step(self, metrics))
        except Exception:  # user code: of any class
            if self.distributed.size == 1:  # other processes would wait in vain
                self._checkpoint(progress)
            raise

    def _save_model(self, progress: Progress) -> None:
        """Writes OUT/model; where that fails, a checkpoint keeps the last steps."""
        card = model_card(self.config, self.run_options, progress.recorded)
        try:
            self.save("model", {"README.md": card}, progress.recorded)
        except UserError as error:
            last = Path(self.config.out or "") / "checkpoints" / f"step-{self.steps_done}"
            if self.distributed.size == 1 and not last.exists():  # of several processes, the others wait in `save`
                self._save_before(error, progress)
            raise

    @ordinary_modes()
    def resume(self, folder: str | Path | None = None, *, allow_changes: bool = False) -> bool:
        """Continues from the newest checkpoint in OUT, or from the one in `folder`; False: there is none yet.

        The next `train` makes bit for bit what it would have made without the interruption, on a CPU with as many
        threads. Reward functions and samplers with a state of their own must restore it themselves. Later checkpoints
        in OUT, and a later OUT/best, are removed when training begins.

        Args:
            folder: a checkpoint; the newest one in OUT if not given.
            allow_changes: prompts, rewards and tokenizer may differ from those of the checkpoint; a note names them.

        Raises:
            UserError: the checkpoint is damaged, or another run's; or there is neither an OUT nor a `folder`.
        """
        if folder is None and self.config.out is None:
            raise UserError("resume needs out, the folder of the run to continue, or a checkpoint's folder")
        if folder is None and self.config.out is not None:
            folder = self.distributed.all_gather_object(checkpoint.newest(Path(self.config.out) / "checkpoints"))[0]
        if folder is None:
            return False
        self.notes += restore(self, checkpoint.read(Path(folder)), allow_changes=allow_changes)
        self.notes.append(f"continuing after step {self.steps_done}, from {folder}")
        return True

    @ordinary_modes()
    def step(self) -> dict[str, float]:
        """One round of sample, reward, advantages, learn; its metrics. Times are in seconds.

        Raises:
            InvariantError: the policy that learns is not the one that was sampled, or the reference is not the start.
            NonFiniteError: a loss or gradient is not finite.
            RewardError: a reward function failed.
        """
        metrics = self._step()
        self._check_gap(metrics)
        return metrics

    def _step(self) -> dict[str, float]:
        """A step with the trainer's own random numbers: what other code seeds or draws between steps has no effect."""
        restore_random(*self.randoms, self.device)
        metrics = self._one_step()
        self.randoms = random_state(self.device)
        return metrics

    def _one_step(self) -> dict[str, float]:
        config, distributed = self.config, self.distributed
        rounding = rounding_of(config, self.device.type)
        train_actor = self.steps_done >= config.critic_warmup_steps
        lr, critic_lr = (x.begin(self.steps_done) for x in (self.actor_optimizer, self.critic_optimizer))
        if not self.warm and self.device.type != "cpu":
            self._warm_up()
        seconds: dict[str, float] = {}
        with _timed(seconds, self.device, "sample"):
            rows = distributed.local_rows(self.prompts.take(config.prompts_per_step))
            vocabulary = vocabulary_of(self.actor)
            mine = respond(self.sampler, self.tokenizer, rows, config, self.device, vocabulary=vocabulary)
        with _timed(seconds, self.device, "reward"):
            scores, reward_means = score(mine, self.rewards, config, self.reward_weights)
            distributed.rendezvous(
                f"the rewards of step {self.steps_done + 1}"
            )  # where a process can take much longer than others
            reward_means = distributed.reduce_metrics(reward_means, len(mine))
            rollout, scores = distributed.gather_rollout(mine, scores, self.tokenizer.pad_token_id)
        with _timed(seconds, self.device, "advantages"):
            order = torch.randperm(len(rollout), generator=self.generator).tolist()
            minibatches, kl_coef = (
                split_minibatches_of(rollout, order, config, distributed, self.policy.head),
                self.kl_controller.coef,
            )
            experience = evaluate(
                self.policy,
                self.reference,
                rollout,
                scores,
                minibatches,
                config,
                kl_coef=kl_coef,
                distributed=distributed,
            )
        if self.steps_done == 0 and self.reference is not None and self.reference_is_start:
            check_first_kl((experience.logprobs - experience.ref_logprobs).abs().max().item(), rounding)
        entropy_coef = self.entropy_controller.coef
        with _timed(seconds, self.device, "learn"):
            history = learn(
                self.policy,
                rollout,
                experience,
                minibatches,
                self.actor_optimizer,
                self.critic_optimizer,
                config,
                self.generator,
                kl_coef=kl_coef,
                entropy_coef=entropy_coef,
                train_actor=train_actor,
                distributed=distributed,
                check_first=lambda stats: check_ratio(stats, rounding),
            )
        metrics = as_floats(experience.metrics)
        if train_actor:  # else nothing that the controllers set has had an effect
            self.entropy_controller.update(metrics["entropy"])
            self.kl_controller.update(metrics.get("kl_per_answer", 0.0), len(rollout))
        self.steps_done += 1
        self.last_rollout, self.last_experience = rollout, experience
        seconds = distributed.max_over_ranks(seconds)
        return {
            "step": self.steps_done,
            "score": sum(rollout.scores) / len(rollout),
            **reward_means,
            "answer_tokens": sum(rollout.answer_lengths) / len(rollout),
            "ended": sum(rollout.ended) / len(rollout),
            **metrics,
            "kl_coef": kl_coef,
            "entropy_coef": entropy_coef,
            **{f"learn/{name}": x for name, x in means_of(history).items() if name != "updated"},
            "updates": sum(h["updated"] for h in history),  # of the actor
            "lr": lr,
            "critic_lr": critic_lr,
            **{f"seconds/{name}": x for name, x in seconds.items()},
            "tokens_per_second": sum(rollout.answer_lengths) / sum(seconds.values()),
            **distributed.max_over_ranks(peak_memory(self.device)),
        }

    def _step_or_save(self, progress: Progress) -> dict[str, float]:
        """One step. Where it fails by an error for the user, a checkpoint keeps what was learned before it.

        The step is repeated from its start when the run continues; after a NonFiniteError on the weights that the
        updates before it made. Of several processes all must have the same error.
        """
        dealt, order = self.prompts.num_drawn, self.generator.get_state()
        try:
            return self._step()
        except UserError as error:
            if self.distributed.size > 1 and not isinstance(error, COMMON_ERRORS):
                raise
            self.prompts.num_drawn = dealt
            self.generator.set_state(order)
            self._save_before(error, progress)
            raise

    def _save_before(self, error: UserError, progress: Progress) -> None:
        """Writes a checkpoint before a run ends with the error, and adds its name to the message."""
        if self.config.out is not None and self.steps_done > 0:
            try:
                folder = self._checkpoint(progress)
            except UserError as another:  # such as a full disk; the first error is the reason
                error.args = (f"{error}; and {another}",)
            else:
                error.args = (f"{error}; what was learned before is in {folder}",)

    def _check_gap(
        self, metrics: dict[str, float], evaluation: Evaluation | None = None, progress: Progress | None = None
    ) -> None:
        """Warns of a gap between sampler and trainer; raises InvariantError if it is too large, after a checkpoint."""
        # another engine computes in half precision, whatever the trainer does
        rounding = rounding_of(self.config, self.device.type) if self.samples_itself else ROUNDING["bfloat16"]
        found = []
        if metrics.get("step") == 1:
            found.append(gap_problem(metrics, self.config, rounding, where="the first step"))
        if evaluation is not None:
            plain = {name.removeprefix("eval/"): x for name, x in evaluation.metrics.items()}
            found.append(
                gap_problem(plain, self.config, rounding, where=f"the evaluation after step {evaluation.step}")
            )
        for problem in filter(None, found):
            error = InvariantError(problem)
            if progress is not None:
                self._save_before(error, progress)
            raise error

    def _check_memory(
        self, actor: Any, rows: list[dict[str, Any]], critic: Critic | None, reference: PreTrainedModel | None
    ) -> None:
        """Refuses a run that a GPU has not enough memory for, before the models are moved there.

        A critic or reference that is given, which may be of any size, is not counted.
        """
        capacity = total_memory(self.device)
        if capacity is None or not self.config.check_memory:
            return
        reason = why_unknown(actor)
        if reason is not None:
            self.notes.append(f"the peak memory is not calculated: {reason}")
            return
        weight = actor.get_input_embeddings().weight
        config = with_chunk_bytes(self.config, weight.shape[0], capacity)
        config = config if critic is None else dataclasses.replace(config, critic="shared")
        config = config if reference is None else dataclasses.replace(config, kl_coef=0.0)
        if is_adapted(actor):
            config = with_adapters_of(actor, config)
        longest = max(map(len, prompt_ids(self.tokenizer, [row["prompt"] for row in rows])))
        processes = self.distributed.size if self.distributed.strategy == "fsdp" else 1
        try:
            check_fits(
                unwrap_peft(actor).config,
                config,
                longest,
                capacity,
                parameters=sum(p.numel() for p in actor.parameters()),
                processes=processes,
                dtype=weight.dtype,
            )
        except CannotEstimate as error:
            self.notes.append(str(error))

    def _reach(
        self,
        rows: list[dict[str, Any]],
        eval_rows: list[dict[str, Any]],
        actor: Any,
        critic: Critic | None,
        reference: PreTrainedModel | None,
    ) -> Reach:
        """How long the run's sequences become, and how much a step computes; counted only if a model's configuration
        names a length that sequences may exceed."""
        config = self.config
        models = [x for x in (actor, reference, None if critic is None else critic.backbone) if x is not None]
        if not any(named_lengths(model, sys.maxsize) for model in models):
            return Reach()
        if eval_rows:
            others = (None if critic is None else critic.backbone, reference)
            rows = rows + drop_long_prompts(with_all_fields(eval_rows), self.tokenizer, actor, config, *others)[0]
        prompts = prompt_ids(self.tokenizer, [row["prompt"] for row in rows])
        longest = max(map(len, prompts)) + config.max_new_tokens
        sequences = config.prompts_per_step * config.samples_per_prompt
        # sampling and old log-probabilities are one pass each, an update is three
        return Reach(longest, sequences * longest * (2.0 + 3 * config.epochs))

    def _warm_up(self) -> None:
        """Passes one short sequence through all that learning computes, and drops its gradients.

        Triton compiles its kernels here. In the first step that time would be counted as the step's own.
        """
        self.warm = True
        config, policy = dataclasses.replace(self.config, minibatches=1), self.policy
        (prompt,) = prompt_ids(self.tokenizer, [self.prompts.rows[0]["prompt"]])
        answer = [self.tokenizer.pad_token_id] * min(2, config.max_new_tokens)
        tokens = torch.tensor([prompt + answer])
        rollout = Rollout(tokens, [len(prompt)], [len(answer)], [True], [""], {"prompt": [""]}, device=self.device)
        minibatches = split_minibatches_of(rollout, [0], config, self.distributed, policy.head)
        experience = evaluate(
            policy,
            self.reference,
            rollout,
            torch.zeros(1, device=self.device),
            minibatches,
            config,
            distributed=self.distributed,
        )
        with packed_mode(policy), gradient_checkpointing(policy, enabled=config.gradient_checkpointing):
            accumulate_gradients(
                policy,
                minibatches[0],
                experience,
                config,
                kl_coef=config.kl_coef,
                distributed=self.distributed,
                filler=dummy_pack(rollout),
            )
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.forget()
        for width in {config.max_new_tokens, max(1, config.max_new_tokens - 1)}:  # rows that are aligned, and not
            rows = torch.zeros(config.prompts_per_step * config.samples_per_prompt, width, device=self.device)
            bootstrap = rows[:, 0].contiguous() if config.bootstrap_truncated else None
            advantages_of(rows[:, 0], rows, rows, rows, rows == 0, config, kl_coef=config.kl_coef, bootstrap=bootstrap)

    def _check_agreement(self, rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]] | None) -> None:
        """Refuses processes that differ in what all of them compute with: they would learn something else."""
        self.distributed.check_equal(
            {
                "the prompts or their order": rows_hash(rows),
                "the held-out prompts or their order": rows_hash(eval_rows or []),
                "the rewards": list(self.rewards),
                "the weights of the rewards": self.reward_weights,
            }
        )

    def _evaluator(self, rows: list[dict[str, Any]] | None) -> Evaluator | None:
        if not rows:
            if self.config.eval_every:
                raise UserError(
                    f"eval_every = {self.config.eval_every} needs held-out prompts: --eval-prompts FILE on the command"
                    " line, eval_rows=... in Python"
                )
            return None
        rows = with_all_fields(rows)
        check_rewards(self.rewards, rows)
        return Evaluator(
            rows=rows,
            trained_on=self.prompts.rows,
            config=self.config,
            tokenizer=self.tokenizer,
            device=self.device,
            policy=self.policy,
            reference=self.reference,
            sampler=self.sampler,
            rewards=self.rewards,
            reward_weights=self.reward_weights,
            distributed=self.distributed,
        )

    def _evaluation(self) -> Evaluation | None:
        """What held-out prompts say of the policy, if it is time to ask them."""
        if self.evaluator is None or not self.evaluator.due(self.steps_done):
            return None
        return self.evaluator.run(self.steps_done, self.kl_controller.coef, self.last_rollout, self.last_experience)

    def _report(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Shows and writes an evaluation, and keeps the best model in OUT/best."""
        if evaluation is None or self.evaluator is None:
            return
        show(evaluation, progress.console, tables=self.config.show_samples_every > 0)
        if self.config.out is not None:
            if self.distributed.is_main:
                write(evaluation, Path(self.config.out) / "eval", self.config)
            self.evaluator.keep_best(evaluation, self.save)

    @ordinary_modes()
    def save(self, name: str, texts: dict[str, str] | None = None, history: Sequence[dict] = ()) -> Path | None:
        """Writes actor and tokenizer to OUT/name, where `from_pretrained` loads them; nothing without an OUT.

        A model there is replaced. An OUT with files that this project did not write is rejected.
        `texts` are files to add, by name; `history` the metrics to draw beside them.
        """
        if self.config.out is None:
            return None
        folder = Path(self.config.out) / name
        if not self.owns_out:
            self.distributed.run_on_main(lambda: claim(folder.parent))
        weights = full_state_dict(self.actor) if self.distributed.strategy == "fsdp" else None
        if self.distributed.is_main:
            save_model(
                self.actor,
                self.tokenizer,
                folder,
                merge_adapters=self.config.merge_adapters,
                weights=weights,
                texts=texts,
                history=history,
                dtype=saved_dtype(self.actor, self.config),
            )
        self.distributed.barrier()
        return folder

    def _progress(self) -> Progress:
        config = self.config
        if not self.distributed.is_main:
            config = dataclasses.replace(config, quiet=True, out=None)
        progress = Progress(config, self.prompts_left_out, self.run_options, self.steps_done, self.device)
        for note in (f"{self.device}: {threads_note()}", *self.notes):
            progress.say(note)
        answers = config.prompts_per_step * config.samples_per_prompt
        left = config.total_steps - self.steps_done
        progress.say(f"{left} PPO steps of {answers} answers, from {len(self.prompts.rows)} prompts")
        return progress

    def _stop_requests(self, progress: Progress) -> AbstractContextManager[Request]:
        if self.config.out is None:
            return nullcontext(Request())  # there is nowhere to save: Ctrl-C ends it at once
        return (
            stop_requests(progress.say)
            if self.distributed.size == 1
            else stop_requests_of_several(progress.say, self._give_up)
        )

    def _stops(self, request: Request) -> bool:
        """Whether a process was asked to stop. All are at the end of a step then, and a checkpoint can be written."""
        name = self.distributed.rendezvous(f"step {self.steps_done}", signal=request.name or "")
        if name:
            request.name = name
            request.agreed.set()
        return bool(name)

    def _give_up(self, name: str) -> None:
        """What a process says that got a signal and whose peers did not reach the end of their step."""
        print(
            f"ppo-fast: rank {self.distributed.rank}: {name}, and not all processes reached the end of step"
            f" {self.steps_done + 1} within {interrupt.GRACE:g} s{self._newest()}",
            file=sys.stderr,
            flush=True,
        )

    @contextmanager
    def _lost_processes_named(self) -> Iterator[None]:
        """Of several processes, one whose error the others do not share cannot save: its message names what is saved.

        Where a collective operation failed, the message also names the processes that it waited for.
        """
        try:
            yield
        except UserError as error:
            if self.distributed.size > 1 and not isinstance(error, COMMON_ERRORS):
                error.args = (f"{error}{self._newest()}",)
            raise
        except RuntimeError as error:
            reason = peer_failure(error)
            if not reason:
                raise
            raise UserError(f"{reason}{self._newest()}") from error

    def _newest(self) -> str:
        """Names the newest checkpoint in OUT, which is whole; "" without an OUT."""
        if self.config.out is None:
            return ""
        newest = checkpoint.newest(Path(self.config.out) / "checkpoints")
        return f"; the newest checkpoint is {newest}" if newest is not None else "; there is no checkpoint yet"

    def _clean_up(self) -> None:
        """Removes what an earlier run left in OUT, or a killed one left half done."""
        if self.config.out is None:
            return
        out = Path(self.config.out)
        checkpoint.check_folders(out)
        with checkpoint.reported(f"cannot remove what an earlier run left in {out}", out):
            for name in ("best", "model"):
                checkpoint.recover(out / name)
            checkpoint.sweep(out / "checkpoints")
            checkpoint.drop_after(out / "checkpoints", self.steps_done)
        checkpoint.prune(out / "checkpoints", self.config.keep_checkpoints)
        drop_best_after(out / "best", self.steps_done)

    def _checkpoint(self, progress: Progress) -> Path:
        """Writes OUT/checkpoints/step-N, if there is none yet, and returns its path; nothing without an OUT."""
        parent = Path(self.config.out or "") / "checkpoints"
        folder = parent / f"step-{self.steps_done}"
        written = self.distributed.any_rank(folder.exists())
        if self.config.out is not None and self.steps_done > 0 and not written:
            progress.sync()
            tensors, state = capture(self)
            if self.distributed.is_main:
                checkpoint.write(parent, self.steps_done, tensors, state, keep=self.config.keep_checkpoints)
            self.distributed.barrier()
        return folder


@contextmanager
def _timed(seconds: dict[str, float], device: torch.device, name: str) -> Iterator[None]:
    """Adds the time of a phase, until the device has finished it: the trainer waits here on purpose, once per phase."""
    start = time.perf_counter()
    yield
    synchronize(device)
    seconds[name] = time.perf_counter() - start
