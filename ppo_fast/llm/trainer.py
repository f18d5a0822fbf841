"""The PPO loop: sample, reward, make experience, update, log."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.common import checkpoint
from ppo_fast.common import signals as interrupt
from ppo_fast.common.checkpoint import Checkpoint
from ppo_fast.common.device import derived_seed, ordinary_modes, synchronize
from ppo_fast.common.errors import InvariantError, UserError, print_error
from ppo_fast.common.lock import locked
from ppo_fast.common.peak_rate import peak_rate
from ppo_fast.common.plots import can_draw
from ppo_fast.common.signals import Request, stop_requests, stop_requests_of_several
from ppo_fast.common.threads import threads_note
from ppo_fast.llm import setup
from ppo_fast.llm.checks import notes_on_options, notes_on_sampling, notes_on_unreached, reward_models_of
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import Prompts, as_rows, prompt_ids, prompts_of, tokenizer_notes, with_all_fields
from ppo_fast.llm.distributed import init_distributed
from ppo_fast.llm.experience import Experience
from ppo_fast.llm.flops import LearnFlops
from ppo_fast.llm.generate import GenerateSampler
from ppo_fast.llm.hashes import rows_hash, vocabulary_hash
from ppo_fast.llm.hints import Hints
from ppo_fast.llm.invariants import ROUNDING, check_first_kl, check_ratio, gap_problem, rounding_of
from ppo_fast.llm.learn import Learner, as_floats, means_of
from ppo_fast.llm.models.build import Models, build_models
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import LanguageModel
from ppo_fast.llm.models.loading import vocabulary_of
from ppo_fast.llm.models.probe import Reach
from ppo_fast.llm.models.reference import FrozenReference
from ppo_fast.llm.models.weights import check_separate, weights_hash
from ppo_fast.llm.optimizer import Optimizer, Optimizers
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.random_state import RandomState
from ppo_fast.llm.report.evaluation import Evaluation, Evaluator
from ppo_fast.llm.report.evaluation_page import show, write
from ppo_fast.llm.report.export import check_saving, model_card
from ppo_fast.llm.report.progress import Progress, peak_memory
from ppo_fast.llm.reward.scoring import RewardFunction, check_rewards, check_weights, named_rewards, score
from ppo_fast.llm.rollout_files import RecordedRollout, write_rollout
from ppo_fast.llm.run_folder import COMMON_ERRORS, RunFolder
from ppo_fast.llm.sample import sample_rollout
from ppo_fast.llm.sampler import Sampler
from ppo_fast.llm.state import RunState, capture, environment_info, restore, run_fingerprint

AfterStep = Callable[["PPOTrainer", dict[str, float]], bool | None]


class PPOTrainer:
    """Proximal policy optimisation of a causal language model (Schulman et al. 2017; Ouyang et al. 2022).

    Args:
        config: every option.
        actor: any AutoModelForCausalLM, or a PeftModel around one; trained in place. With lora_rank it gets adapters,
            and its other weights are frozen and stored as config.frozen_dtype says (`widen_frozen` gives them fp32
            again, for instance before peft merges the adapters). Weights that are frozen already are unchanged, unless
            config.frozen_dtype is bfloat16.
        tokenizer: its tokenizer, with a pad token.
        rows: dicts with a "prompt", a text or a list of messages, and any other columns, which reach the reward
            functions; checked as the lines of a file are, and `ppo_fast.llm.data.read_prompts` reads them from one.
        rewards: a function f(prompts, completions, **columns), or several by name, whose numbers are added.
        reward_weights: a factor for each of them by name; 1 if not given.
        critic: if not given, what config.critic says.
        reference: the frozen model of the KL penalty, which is not changed. If not given and kl_coef > 0: the actor
            without its adapters, or with a frozen copy of trained ones; or a copy of the actor, where it has no
            adapters.
        sampler: what completes prompts; the actor's own `generate` if not given.
        eval_rows: held-out rows, as `rows`, to evaluate on.

    >>> trainer = PPOTrainer(config, actor, tokenizer, rows, reward)  # doctest: +SKIP
    >>> history = trainer.train()  # doctest: +SKIP
    """

    @ordinary_modes()
    def __init__(
        self,
        config: PPOConfig,
        actor: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Iterable[Mapping[str, object]],
        rewards: RewardFunction | dict[str, RewardFunction],
        *,
        reward_weights: dict[str, float] | None = None,
        critic: Critic | None = None,
        reference: LanguageModel | None = None,
        sampler: Sampler | None = None,
        eval_rows: Iterable[Mapping[str, object]] | None = None,
    ) -> None:
        models = Models(actor, critic, reference)
        setup.check_arguments(models, tokenizer, config, sampler)
        given, held_out = as_rows(rows), None if eval_rows is None else as_rows(eval_rows, "eval_rows")
        config = setup.prepare_process(config)
        self.distributed = init_distributed(config)
        self.device = self.distributed.device
        self.tokenizer = tokenizer
        setup.check_compiler(config, self.distributed)
        self.config, self.notes = setup.decide_dtype(config, self.distributed)  # the notes are shown at the start
        self.folder = RunFolder(self.config, self.distributed)
        self.rewards = named_rewards(rewards)
        self.reward_weights = check_weights(reward_weights, self.rewards)
        setup.check_processes(self.distributed, models, sampler, given, held_out, self.reward_weights)
        self.hashes, notes = setup.hash_run(self.config, self.distributed, actor, tokenizer, self.rewards)
        self.notes += notes
        kept, self.prompts_left_out = setup.usable_rows(given, tokenizer, models, self.config)
        self._note_options(kept, evaluated=bool(held_out))
        self.notes += setup.check_memory(self.config, self.distributed, models, tokenizer, kept)
        reach = self._reach(models, kept, held_out or [])
        self._build_models(models, reach, own_sampler=sampler is None)
        self._choose_sampler(sampler)
        self.prompts = Prompts(kept, seed=config.seed)
        self._check_rewards(kept)
        self._build_learner()
        self.evaluator = self._build_evaluator(held_out)
        self.hints = Hints(self.config)
        self.run_options: dict[str, object] = {}  # what OUT/config.yaml contains besides: model, data and rewards
        self.steps_done = 0
        self.is_warm = False
        self.last_experience: Experience | None = None
        self.recorded: Sequence[dict[str, float | None]] = []  # after `train`: the rows of metrics.jsonl
        self.stopped_by: str | None = None  # the signal that ended `train` early
        self.random = RandomState.capture(self.device)  # of torch, numpy and random, between two steps

    # Setup

    def _note_options(self, rows: setup.Rows, *, evaluated: bool) -> None:
        self.notes += tokenizer_notes(self.tokenizer, prompts_of(rows))
        if self.config.out is not None and not can_draw():
            self.notes.append("matplotlib is not installed: the run leaves no pictures")
        self.notes += notes_on_sampling(self.config, evaluated=evaluated) + notes_on_options(self.config)

    def _reach(self, models: Models, rows: setup.Rows, eval_rows: setup.Rows) -> Reach:
        def usable() -> setup.Rows:
            return setup.usable_rows(eval_rows, self.tokenizer, models, self.config)[0] if eval_rows else []

        return setup.reach_of(self.config, models, self.tokenizer, rows, usable)

    def _build_models(self, models: Models, reach: Reach, *, own_sampler: bool) -> None:
        actor, critic, reference = models.actor, models.critic, models.reference
        trained = {"the actor": actor, "the critic": critic} if critic is not None else {"the actor": actor}
        check_separate(trained, reward_models_of(self.rewards))
        # one that is given may be any model, or a copy of the actor
        self.reference_is_start = reference is None or self.distributed.run_with_weights(
            lambda: weights_hash(reference) == weights_hash(actor), of=nn.ModuleList([actor, reference])
        )
        self.policy, self.reference = build_models(
            self.config,
            actor,
            critic,
            reference,
            self.device,
            self.distributed,
            tokenizer=self.tokenizer if own_sampler else None,
            reach=reach,
        )
        self.notes += notes_on_unreached(self.policy.unreached)
        self.actor: LanguageModel = self.policy.actor
        self.critic = self.policy.critic
        if self.config.out is not None and self.distributed.is_main:
            self.notes += check_saving(self.actor, self.tokenizer, self.config)

    def _choose_sampler(self, given: Sampler | None) -> None:
        own = setup.own_sampler(self.policy, self.tokenizer, self.config, self.distributed)
        self.sampler: Sampler = own if given is None else given
        if given is not None and isinstance(given, GenerateSampler):
            given.follow(self.config)
        self.uses_generate = given is None
        if self.distributed.size > 1:  # each process samples other completions
            transformers.set_seed(derived_seed(self.config.seed, self.distributed.rank))

    def _check_rewards(self, rows: setup.Rows) -> None:
        check_rewards(self.rewards, rows)
        for function in self.rewards.values():
            follow = getattr(function, "follow_trainer", None)  # of a reward with a model, such as Fluency
            if follow is not None:
                follow(self.device)

    def _build_learner(self) -> None:
        config = self.config
        optimizers = Optimizers(
            actor=Optimizer(self.actor, config.lr, config, first_step=config.critic_warmup_steps),
            critic=Optimizer(self.critic, config.critic_lr, config),
        )
        generator = torch.Generator().manual_seed(config.seed)
        self.learner = Learner(self.policy, self.reference, optimizers, config, self.distributed, generator)
        self.flops = LearnFlops(self.policy)
        dtype: torch.dtype = getattr(torch, config.dtype)
        self.peak_rate = self.distributed.run_on_main(lambda: peak_rate(self.device, dtype))

    def _build_evaluator(self, rows: setup.Rows | None) -> Evaluator | None:
        if not rows:
            if self.config.eval_every:
                raise UserError(
                    f"eval_every = {self.config.eval_every} needs held-out prompts: --eval-prompts FILE on the command"
                    " line, eval_rows=... in Python"
                )
            return None
        rows = with_all_fields(rows)
        check_rewards(self.rewards, rows)
        evaluator = Evaluator(
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
        self.notes += evaluator.notes
        return evaluator

    # A step

    @property
    def last_rollout(self) -> Rollout | None:
        """The rollout of the last step, of all processes."""
        return None if self.last_experience is None else self.last_experience.rollout

    @ordinary_modes()
    def step(self) -> dict[str, float]:
        """One round of sampling, reward, experience and update; returns its metrics. Times are in seconds.

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
        self.random.restore(self.device)
        metrics = self._one_step()
        self.random = RandomState.capture(self.device)
        return metrics

    def _one_step(self) -> dict[str, float]:
        learner, seconds = self.learner, dict[str, float]()
        train_actor = self.steps_done >= self.config.critic_warmup_steps
        rates = learner.optimizers.begin(self.steps_done)
        if not self.is_warm and self.device.type != "cpu":
            self._warm_up()
        with self._timed(seconds, "sample"):
            local = self._sample()
        with self._timed(seconds, "reward"):
            rollout, scores, reward_metrics = self._reward(local)
        with self._timed(seconds, "advantages"):
            experience = learner.make_experience(rollout, scores)
        self._check_first_kl(experience)
        coefficients = {"kl_coef": experience.kl_coef, "entropy_coef": learner.entropy_controller.coef}
        with self._timed(seconds, "learn"):
            history = learner.update(experience, train_actor=train_actor, check_first=self._check_ratio)
        metrics = as_floats(experience.metrics)
        if train_actor:  # else nothing that the controllers set has had an effect
            learner.adapt_coefficients(metrics, len(rollout))
        self.steps_done += 1
        self.last_experience = dataclasses.replace(experience, minibatches=[])  # packs would hold memory of the device
        seconds = self.distributed.max_over_ranks(seconds)
        return {
            "step": self.steps_done,
            "score": sum(rollout.scores) / len(rollout),
            **reward_metrics,
            "answer_tokens": sum(rollout.completion_lengths) / len(rollout),
            "ended": sum(rollout.ended) / len(rollout),
            **metrics,
            **coefficients,
            **{f"learn/{name}": x for name, x in means_of(history).items() if name != "updated"},
            "updates": sum(h["updated"] for h in history),  # of the actor
            **rates,
            **self._speed(rollout, seconds),
            **self._utilization(rollout, history, seconds["learn"]),
            **self.distributed.max_over_ranks(peak_memory(self.device)),
        }

    def _sample(self) -> Rollout:
        """Completions of this process's prompts."""
        rows = self.distributed.local_rows(self.prompts.take(self.config.prompts_per_step))
        return sample_rollout(
            self.sampler,
            self.tokenizer,
            rows,
            self.config,
            self.device,
            vocabulary=vocabulary_of(self.actor),
            seed=derived_seed(self.config.seed, self.distributed.rank, self.steps_done),
        )

    def _reward(self, local: Rollout) -> tuple[Rollout, Tensor, dict[str, float]]:
        """The rollout of all processes with its scores, and the mean of each reward."""
        scores, means = score(local, self.rewards, self.config, self.reward_weights)
        # one process can take much longer than others
        self.distributed.monitored_barrier(f"the rewards of step {self.steps_done + 1}")
        means = self.distributed.reduce_metrics(means, len(local))
        rollout, scores = self.distributed.gather_rollout(local, scores, self.tokenizer.pad_token_id)
        return rollout, scores, means

    def _warm_up(self) -> None:
        """Compile, before the first step on a GPU, the kernels of learning on one short sequence."""
        self.is_warm = True
        (prompt,) = prompt_ids(self.tokenizer, prompts_of(self.prompts.rows[:1]))
        completion = [self.tokenizer.pad_token_id] * min(2, self.config.max_new_tokens)
        tokens = torch.tensor([prompt + completion])
        self.learner.warm_up(Rollout.from_lengths(tokens, [len(prompt)], [len(completion)], device=self.device))

    @contextmanager
    def _timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        """Add the time of a phase, until the device has finished it: the one deliberate wait of each phase."""
        start = time.perf_counter()
        yield
        synchronize(self.device)
        seconds[phase] = time.perf_counter() - start

    @staticmethod
    def _speed(rollout: Rollout, seconds: Mapping[str, float]) -> dict[str, float]:
        return {
            **{f"seconds/{phase}": x for phase, x in seconds.items()},
            "tokens_per_second": sum(rollout.completion_lengths) / sum(seconds.values()),
        }

    def _utilization(self, rollout: Rollout, history: list[dict[str, float]], seconds: float) -> dict[str, float]:
        """How fast each process learns, and its share of what its device can do at most, where that is known."""
        flops = self.flops.of_updates(rollout, history, self.config.minibatches)
        rate = flops / seconds / self.distributed.size
        share = {} if self.peak_rate is None else {"mfu": rate / self.peak_rate}
        return {"learn_tflops": rate / 1e12, **share}

    # What is known in advance

    def _check_ratio(self, stats: Mapping[str, float]) -> None:
        check_ratio(stats, rounding_of(self.config, self.device.type))

    def _check_first_kl(self, experience: Experience) -> None:
        if self.steps_done == 0 and self.reference is not None and self.reference_is_start:
            largest = (experience.logprobs - experience.ref_logprobs).abs().max().item()
            rounded = isinstance(self.reference, FrozenReference) and self.reference.rounded
            check_first_kl(largest, rounding_of(self.config, self.device.type, frozen_rounded=rounded))

    def _check_gap(
        self, metrics: dict[str, float], evaluation: Evaluation | None = None, progress: Progress | None = None
    ) -> None:
        """Warn of a gap between sampler and trainer; raise InvariantError if it is too large, after a checkpoint."""
        # another engine computes in half precision, whatever the trainer does
        rounding = rounding_of(self.config, self.device.type) if self.uses_generate else ROUNDING["bfloat16"]
        found = []
        if metrics.get("step") == 1:
            found.append(gap_problem(metrics, self.config, rounding, where="the first step"))
        if evaluation is not None:
            plain = {name.removeprefix("eval/"): x for name, x in evaluation.metrics.items()}
            where = f"the evaluation after step {evaluation.step}"
            found.append(gap_problem(plain, self.config, rounding, where=where))
        for problem in filter(None, found):
            error = InvariantError(problem)
            if progress is not None:
                self._save_before(error, progress)
            raise error

    # A run

    @ordinary_modes()
    def train(self, after_step: AfterStep | None = None) -> list[dict[str, float]]:
        """Run all remaining steps and return their metrics; `after_step(trainer, metrics)` may return True to stop
        early.

        With an OUT, Ctrl-C, SIGTERM and SIGHUP end it after the current step, with a checkpoint; `stopped_by` names
        the signal.
        """
        with ExitStack() as stack:
            self.distributed.run_on_main(lambda: stack.enter_context(locked(self.config.out)))
            self.folder.is_claimed = True
            return self._train(after_step)

    def _train(self, after_step: AfterStep | None) -> list[dict[str, float]]:
        history: list[dict[str, float]] = []
        self.distributed.run_on_main(lambda: self.folder.clean_up(self.steps_done))
        progress = self._start_progress()
        # signal handlers stay until all else is done: torchrun sends SIGTERM while an error is being reported
        with self._stop_requests(progress) as request, progress, self.folder.errors_name_checkpoints():
            self._evaluate_at_start(progress)
            while self.steps_done < self.config.total_steps and not self._stops(request):
                metrics = self._logged_step(progress)
                history.append(metrics)
                if self.config.save_every and self.steps_done % self.config.save_every == 0:
                    self._checkpoint(progress)
                if after_step is not None and self.distributed.any_rank(self._ask(after_step, metrics, progress)):
                    break
            else:
                if self.steps_done < self.config.total_steps:
                    self.stopped_by = request.name
            self.recorded = progress.rows
            if self.stopped_by is not None:
                self._checkpoint(progress)
            else:
                self._save_model(progress)
        return history

    def _evaluate_at_start(self, progress: Progress) -> None:
        if self.steps_done == 0 and (evaluation := self._evaluation()) is not None:
            progress.log_metrics({"step": 0, **evaluation.metrics})
            self._report(evaluation, progress)
            self._check_gap({}, evaluation, progress)

    def _logged_step(self, progress: Progress) -> dict[str, float]:
        """A step, its evaluation if it is time for one, and all that is logged of both."""
        metrics = self._step_or_save(progress)
        self._dump_rollout()
        evaluation = self._evaluation()
        progress.log_step(metrics | (evaluation.metrics if evaluation is not None else {}), self.last_rollout)
        self._report(evaluation, progress)
        self._check_gap(metrics, evaluation, progress)
        metrics |= evaluation.metrics if evaluation is not None else {}
        for hint in self.hints.after(metrics, self.last_rollout.scores if self.last_rollout else []):
            progress.info(hint)
        return metrics

    def _dump_rollout(self) -> None:
        """Write the answers of this step to OUT/rollouts, if so configured."""
        out, experience = self.config.out, self.last_experience
        if self.config.dump_rollouts and out is not None and experience is not None and self.distributed.is_main:
            recorded = RecordedRollout.from_experience(
                experience,
                step=self.steps_done,
                model=self.hashes.start_model,
                tokenizer=vocabulary_hash(self.tokenizer),
            )
            write_rollout(Path(out) / "rollouts", recorded)

    def _step_or_save(self, progress: Progress) -> dict[str, float]:
        """One step. Where it fails by an error for the user, a checkpoint keeps what was learned before it.

        The step is repeated from its start when the run continues; after a NonFiniteError on the weights that the
        updates before it made. Of several processes all must have the same error.
        """
        position, order = self.prompts.state_dict(), self.learner.generator.get_state()
        scale = self.learner.value_scale
        moments = None if scale is None else scale.snapshot()
        try:
            return self._step()
        except UserError as error:
            if self.distributed.size > 1 and not isinstance(error, COMMON_ERRORS):
                raise
            self.prompts.load_state_dict(position)
            self.learner.generator.set_state(order)
            if scale is not None and moments is not None:
                scale.restore(moments)
            self._save_before(error, progress)
            raise

    def _ask(self, after_step: AfterStep, metrics: dict[str, float], progress: Progress) -> bool:
        """Whether `after_step` ends the run; where it fails, a checkpoint keeps the step."""
        try:
            return bool(after_step(self, metrics))
        except Exception:  # user code: of any class
            if self.distributed.size == 1:  # other processes would wait in vain
                self._checkpoint(progress)
            raise

    def _evaluation(self) -> Evaluation | None:
        """The evaluation on held-out prompts after this step, if one is due."""
        if self.evaluator is None or not self.evaluator.due(self.steps_done):
            return None
        return self.evaluator.run(self.steps_done, self.learner.kl_controller.coef, self.last_experience)

    def _report(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Show and write an evaluation, and keep the best model in OUT/best."""
        if evaluation is None or self.evaluator is None:
            return
        show(evaluation, progress.console, tables=self.config.show_samples_every > 0)
        if self.config.out is not None:
            if self.distributed.is_main:
                write(evaluation, Path(self.config.out) / "eval", self.config)
            self.evaluator.keep_best(evaluation, self._save_best)

    def _start_progress(self) -> Progress:
        config = self.config
        if not self.distributed.is_main:
            config = dataclasses.replace(config, quiet=True, out=None)
        progress = Progress(config, self.prompts_left_out, self.run_options, self.steps_done, self.device)
        for note in (f"{self.device}: {threads_note()}", *self.notes):
            progress.info(note)
        completions = config.prompts_per_step * config.samples_per_prompt
        left = config.total_steps - self.steps_done
        progress.info(f"{left} PPO steps of {completions} answers, from {len(self.prompts.rows)} prompts")
        return progress

    # Signals

    def _stop_requests(self, progress: Progress) -> AbstractContextManager[Request]:
        if self.config.out is None:
            return nullcontext(Request())  # there is nowhere to save: Ctrl-C ends it at once
        if self.distributed.size == 1:
            return stop_requests(progress.info)
        return stop_requests_of_several(progress.info, self._give_up)

    def _stops(self, request: Request) -> bool:
        """Whether a process was asked to stop. All are at the end of a step then, and a checkpoint can be written."""
        name = self.distributed.monitored_barrier(f"step {self.steps_done}", signal=request.name or "")
        if name:
            request.name = name
            request.agreed.set()
        return bool(name)

    def _give_up(self, name: str) -> None:
        """Report, in a process that got a signal, that not all processes reached the end of their step."""
        print_error(
            f"ppo-fast: rank {self.distributed.rank}: {name}, and not all processes reached the end of step"
            f" {self.steps_done + 1} within {interrupt.GRACE:g} s{self.folder.named_newest()}"
        )

    # Checkpoints and models

    @ordinary_modes()
    def resume(self, folder: str | Path | None = None, *, allow_changes: bool = False) -> bool:
        """Continue from the newest checkpoint in OUT, or from the one in `folder`; False: there is none yet.

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
        folder = self.folder.newest_checkpoint() if folder is None else folder
        if folder is None:
            return False
        self.notes += self.load_state_dict(checkpoint.read(Path(folder)), allow_changes=allow_changes)
        self.notes.append(f"continuing after step {self.steps_done}, from {folder}")
        return True

    def state_dict(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
        """What a checkpoint holds: tensors by file, in the main process, and values of JSON; collective."""
        return capture(self._run_state(), self.random)

    def load_state_dict(self, saved: Checkpoint, *, allow_changes: bool = False) -> list[str]:
        """Put a new trainer in the state of a checkpoint and return notes for the user; collective."""
        notes = restore(self._run_state(), saved, allow_changes=allow_changes)
        self.steps_done = saved.state["step"]
        self.random = RandomState.capture(self.device)
        return notes

    def _run_state(self) -> RunState:
        learner = self.learner
        return RunState(
            config=self.config,
            policy=self.policy,
            optimizers=learner.optimizers,
            stateful=[
                *(learner.kl_controller, learner.entropy_controller, learner.loss_scale, self.prompts),
                *([] if learner.value_scale is None else [learner.value_scale]),
            ],
            generator=learner.generator,
            distributed=self.distributed,
            fingerprint=run_fingerprint(
                self.config,
                start_model=self.hashes.start_model,
                prompts=rows_hash(self.prompts.rows),
                tokenizer=self.hashes.tokenizer,
                reward_weights=self.reward_weights,
                reward_code=self.hashes.rewards,
            ),
            environment=environment_info(self.distributed, self.policy.config.chunk_bytes),
        )

    @ordinary_modes()
    def save(self, name: str, texts: dict[str, str] | None = None, history: Sequence[dict] = ()) -> Path | None:
        """Write actor and tokenizer to OUT/name, where `from_pretrained` loads them; nothing without an OUT.

        A model there is replaced. An OUT with files that this project did not write is rejected.
        `texts` are files to add, by name; `history` the metrics to draw beside them.
        """
        return self.folder.save_model(name, self.actor, self.tokenizer, texts, history)

    def _save_best(self, name: str, texts: dict[str, str]) -> None:
        """Write the model to OUT/name and the critic to OUT/name/critic."""
        self.save(name, texts)
        self._save_critic(f"{name}/critic")

    def _save_critic(self, name: str) -> None:
        self.folder.save_critic(name, self.policy.critic, self.actor, self.tokenizer, self.hashes.start_model)

    def _checkpoint(self, progress: Progress) -> Path:
        """Write OUT/checkpoints/step-N, if there is none yet, and return its path."""

        def captured() -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
            progress.sync()
            return self.state_dict()

        return self.folder.write_checkpoint(self.steps_done, captured)

    def _save_model(self, progress: Progress) -> None:
        """Write OUT/model and OUT/critic; where that fails, a checkpoint keeps the last steps."""
        card = model_card(self.config, self.run_options, progress.rows)
        try:
            self.save("model", {"README.md": card}, progress.rows)
            self._save_critic("critic")
        except UserError as error:
            last = self.folder.checkpoint_of(self.steps_done)
            if self.distributed.size == 1 and not last.exists():  # of several processes, the others wait in `save`
                self._save_before(error, progress)
            raise

    def _save_before(self, error: UserError, progress: Progress) -> None:
        """Write a checkpoint before a run ends with the error, and add its name to the message."""
        if self.config.out is not None and self.steps_done > 0:
            try:
                folder = self._checkpoint(progress)
            except UserError as another:  # such as a full disk; the first error is the reason
                error.args = (f"{error}; and {another}",)
            else:
                error.args = (f"{error}; what was learned before is in {folder}",)
