"""The loop of PPO: sample, reward, learn."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast import checkpoint
from ppo_fast.config import PPOConfig
from ppo_fast.controllers import EntropyController, KLController
from ppo_fast.data import Prompts, prompt_ids, with_all_fields
from ppo_fast.device import has_weights, synchronize, total_memory
from ppo_fast.errors import UserError
from ppo_fast.evaluate import Evaluation, Evaluator, show, write
from ppo_fast.export import model_card, save_model
from ppo_fast.heads import Sampling, bare
from ppo_fast.interrupt import Request, stop_requests
from ppo_fast.learn import (
    Experience,
    Optimizer,
    Reference,
    accumulate_gradients,
    advantages_of,
    as_floats,
    cut_as,
    evaluate,
    filler_of,
    learn,
    packed,
)
from ppo_fast.memory import CannotEstimate, check_fits, why_unknown, with_adapters_of
from ppo_fast.models import (
    AdapterReference,
    Critic,
    check_language_model,
    check_tokenizer,
    frozen_copy,
    has_trained_adapters,
    is_adapted,
    prepare,
    recomputing,
    warn_if_not_recomputed,
    with_lora,
)
from ppo_fast.parallel import ONE, World, shard, start, whole_state
from ppo_fast.plots import can_draw
from ppo_fast.policy import FrozenReference, Policy, with_chunk_bytes
from ppo_fast.probe import Reach, named_lengths, probe_all
from ppo_fast.probe_sampling import probe_sampling
from ppo_fast.progress import Progress
from ppo_fast.reward import RewardFunction, check_rewards, check_weights, score
from ppo_fast.rollout import Rollout
from ppo_fast.run_state import capture, digest, restore
from ppo_fast.sample import GenerateSampler, Sampler, drop_long_prompts, respond


class PPOTrainer:
    """Proximal policy optimisation of a causal language model (Schulman et al. 2017; Ouyang et al. 2022).

    Args:
        config: every option.
        actor: any AutoModelForCausalLM, or a PeftModel around one; trained in place.
        tokenizer: its tokenizer, with a pad token.
        rows: dicts with a "prompt" and any other columns, which reach the reward functions.
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
        transformers.set_seed(config.seed)  # torch, and numpy and random, which rewards may use
        self.config = config
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        self.world = start(config)
        if not has_weights(actor) and (self.world.first or self.world.kind != "fsdp"):
            raise UserError(
                "the actor has no weights: load it with weights; under parallel = fsdp all processes but the first can"
                " do without"
            )
        self.start_digest = ""
        if config.out is not None:  # a checkpoint knows what it began with
            self.start_digest = self.world.find(lambda: digest(actor), of=actor)
        self.tokenizer = tokenizer
        self.device = self.world.device
        kept, self.prompts_left_out = drop_long_prompts(with_all_fields(rows), tokenizer, actor, config)
        self.notes: list[str] = []  # to be said at the start
        if config.out is not None and not can_draw():
            self.notes.append("matplotlib is not installed: the run leaves no pictures")
        self._check_memory(actor, kept, critic, reference)
        reach = self._reach(kept, eval_rows or [], actor, critic, reference)
        self.policy, self.reference = build_models(
            config,
            actor,
            critic,
            reference,
            self.device,
            self.world,
            tokenizer=tokenizer if sampler is None else None,
            reach=reach,
        )
        self.actor: Any = self.policy.actor
        self.critic = self.policy.critic
        own = GenerateSampler(
            self.actor, tokenizer, world=self.world, call=self.policy.generate, sampling=self.policy.sampling
        )
        self.sampler = own if sampler is None else sampler
        if self.world.size > 1:
            transformers.set_seed(config.seed + self.world.rank)  # each samples other answers; all else is agreed on
        self.prompts = Prompts(kept, seed=config.seed)
        self.rewards = rewards if isinstance(rewards, dict) else {_name(rewards): rewards}
        check_rewards(self.rewards, kept)
        for function in self.rewards.values():
            if (place := getattr(function, "place", None)) is not None:  # a model of its own, with no device named
                place(self.device)
        self.reward_weights = check_weights(reward_weights, self.rewards)
        self.actor_optimizer = Optimizer(self.actor, config.lr, config)
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
        self.stopped_by: str | None = None  # the signal that ended `train` early

    def train(self, after_step: Callable[["PPOTrainer", dict[str, float]], bool | None] | None = None) -> list[dict]:
        """Runs all steps that are left and returns their metrics; `after_step(trainer, metrics)` may return True to
        stop early.

        With an OUT, Ctrl-C and SIGTERM end it after the current step, with a checkpoint (`stopped_by` names them).
        """
        history = []
        self.world.run_on_first(self._clean_up)
        with self._progress() as progress, self._stop_requests(progress) as request:
            if self.steps_done == 0 and (evaluation := self._evaluation()) is not None:
                progress.record({"step": 0, **evaluation.metrics})
                self._report(evaluation, progress)
            while self.steps_done < self.config.total_steps and not self.world.any(request.name is not None):
                metrics = self.step()
                evaluation = self._evaluation()
                metrics |= evaluation.metrics if evaluation is not None else {}
                history.append(metrics)
                progress.show(metrics, self.last_rollout)
                self._report(evaluation, progress)
                if self.config.save_every and self.steps_done % self.config.save_every == 0:
                    self._checkpoint(progress)
                if after_step is not None and self.world.any(bool(after_step(self, metrics))):
                    break
            else:
                if self.steps_done < self.config.total_steps:
                    self.stopped_by = request.name or "SIGINT"  # which perhaps came to another process
            if self.stopped_by is not None:
                self._checkpoint(progress)
        if self.stopped_by is None:
            card = model_card(self.config, self.run_options, progress.recorded)
            self.save("model", {"README.md": card}, progress.recorded)
        return history

    def resume(self, folder: str | Path | None = None) -> bool:
        """Goes on from the newest checkpoint in OUT, or from the one in `folder`; False: there is none yet.

        The next `train` makes bit for bit what it would have made without the interruption, on a CPU with as many
        threads. Reward functions and samplers with a state of their own must bring it back themselves.

        Raises:
            UserError: the checkpoint is damaged, or another run's.
        """
        if folder is None and self.config.out is not None:
            folder = self.world.gather(checkpoint.newest(Path(self.config.out) / "checkpoints"))[0]
        if folder is None:
            return False
        self.notes += restore(self, checkpoint.read(Path(folder)))
        self.notes.append(f"going on after step {self.steps_done}, from {folder}")
        return True

    def step(self) -> dict[str, float]:
        """One round of sample, reward, advantages, learn; its metrics. Times are in seconds."""
        config, world = self.config, self.world
        if not self.warm and self.device.type != "cpu":
            self._warm_up()
        seconds: dict[str, float] = {}
        with _timed(seconds, self.device, "sample"):
            rows = world.share(self.prompts.take(config.prompts_per_step))
            mine = respond(self.sampler, self.tokenizer, rows, config, self.device)
        with _timed(seconds, self.device, "reward"):
            scores, reward_means = score(mine, self.rewards, config, self.reward_weights)
            reward_means = world.mean(reward_means, len(mine))
            rollout, scores = world.join(mine, scores, self.tokenizer.pad_token_id)
        with _timed(seconds, self.device, "advantages"):
            order = torch.randperm(len(rollout), generator=self.generator).tolist()
            minibatches, kl_coef = cut_as(rollout, order, config, world, self.policy.head), self.kl_controller.coef
            experience = evaluate(
                self.policy, self.reference, rollout, scores, minibatches, config, kl_coef=kl_coef, world=world
            )
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
                train_actor=self.steps_done >= config.critic_warmup_steps,
                world=world,
            )
        metrics = as_floats(experience.metrics)
        self.entropy_controller.update(metrics["entropy"])
        self.kl_controller.update(metrics.get("kl_per_answer", 0.0), len(rollout))
        self.steps_done += 1
        self.last_rollout, self.last_experience = rollout, experience
        return {
            "step": self.steps_done,
            "score": sum(rollout.scores) / len(rollout),
            **reward_means,
            "answer_tokens": sum(rollout.answer_lengths) / len(rollout),
            "ended": sum(rollout.ended) / len(rollout),
            **metrics,
            "kl_coef": kl_coef,
            "entropy_coef": entropy_coef,
            **{f"learn/{name}": sum(h[name] for h in history) / len(history) for name in history[0]},
            "updates": len(history) - history[-1]["stopped"],
            "lr": self.actor_optimizer.schedule.get_last_lr()[0],
            **{f"seconds/{name}": x for name, x in seconds.items()},
            "tokens_per_second": sum(rollout.answer_lengths) / sum(seconds.values()),
        }

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
        processes = self.world.size if self.world.kind == "fsdp" else 1
        try:
            check_fits(
                bare(actor).config,
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
            rows = rows + drop_long_prompts(with_all_fields(eval_rows), self.tokenizer, actor, config)[0]
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
        minibatches = cut_as(rollout, [0], config, self.world, policy.head)
        experience = evaluate(
            policy, self.reference, rollout, torch.zeros(1, device=self.device), minibatches, config, world=self.world
        )
        with packed(policy), recomputing(policy, enabled=config.gradient_checkpointing):
            accumulate_gradients(
                policy,
                minibatches[0],
                experience,
                config,
                kl_coef=config.kl_coef,
                world=self.world,
                filler=filler_of(rollout),
            )
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.adamw.zero_grad()
        for width in {config.max_new_tokens, max(1, config.max_new_tokens - 1)}:  # rows that are aligned, and not
            rows = torch.zeros(config.prompts_per_step * config.samples_per_prompt, width, device=self.device)
            bootstrap = rows[:, 0].contiguous() if config.bootstrap_truncated else None
            advantages_of(rows[:, 0], rows, rows, rows, rows == 0, config, kl_coef=config.kl_coef, bootstrap=bootstrap)

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
            world=self.world,
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
            if self.world.first:
                write(evaluation, Path(self.config.out) / "eval", self.config)
            self.evaluator.keep_best(evaluation, self.save)

    def save(self, name: str, texts: dict[str, str] | None = None, history: Sequence[dict] = ()) -> Path | None:
        """Writes actor and tokenizer to OUT/name, where `from_pretrained` loads them; nothing without an OUT.

        `texts` are files to add, by name; `history` the metrics to draw beside them.
        """
        if self.config.out is None:
            return None
        folder = Path(self.config.out) / name
        weights = whole_state(self.actor) if self.world.kind == "fsdp" else None
        if self.world.first:
            save_model(
                self.actor,
                self.tokenizer,
                folder,
                merge_adapters=self.config.merge_adapters,
                weights=weights,
                texts=texts,
                history=history,
            )
        self.world.barrier()
        return folder

    def _progress(self) -> Progress:
        config = self.config
        if not self.world.first:
            config = dataclasses.replace(config, quiet=True, out=None)
        progress = Progress(config, self.prompts_left_out, self.run_options, self.steps_done, self.device)
        for note in self.notes:
            progress.say(note)
        return progress

    def _stop_requests(self, progress: Progress) -> AbstractContextManager[Request]:
        if self.config.out is None:
            return nullcontext(Request())  # there is nowhere to save: Ctrl-C ends it at once
        return stop_requests(progress.say, alone=self.world.size == 1)

    def _clean_up(self) -> None:
        """Removes what an earlier run left in OUT, or a killed one left half done."""
        if self.config.out is None:
            return
        out = Path(self.config.out)
        for name in ("best", "model"):
            checkpoint.recover(out / name)
        checkpoint.sweep(out / "checkpoints")
        checkpoint.prune(out / "checkpoints", self.config.keep_checkpoints)
        if self.steps_done == 0:
            for name in ("best", "checkpoints"):
                shutil.rmtree(out / name, ignore_errors=True)

    def _checkpoint(self, progress: Progress) -> None:
        parent = Path(self.config.out or "") / "checkpoints"
        written = self.world.any((parent / f"step-{self.steps_done}").exists())
        if self.config.out is not None and self.steps_done > 0 and not written:
            progress.sync()
            tensors, state = capture(self)
            if self.world.first:
                checkpoint.write(parent, self.steps_done, tensors, state, keep=self.config.keep_checkpoints)
            self.world.barrier()


@contextmanager
def _timed(seconds: dict[str, float], device: torch.device, name: str) -> Iterator[None]:
    """Adds the time of a phase, until the device has finished it: the trainer waits here on purpose, once per phase."""
    start = time.perf_counter()
    yield
    synchronize(device)
    seconds[name] = time.perf_counter() - start


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def build_models(
    config: PPOConfig,
    actor: Any,
    critic: Critic | None,
    reference: PreTrainedModel | None,
    device: torch.device,
    world: World = ONE,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reach: Reach = Reach(),  # noqa: B008
) -> tuple[Policy, Reference]:
    """Actor and critic, ready to learn, and the reference, as the options say; in several processes if so. Without a
    tokenizer the actor's own sampling is not probed."""
    if config.lora_rank and is_adapted(actor):
        raise UserError("lora_rank > 0, but the actor already has adapters: leave one of the two out")
    if config.merge_adapters and world.kind == "fsdp":
        raise UserError("merge_adapters needs whole weights, which no process has under fsdp: merge them afterwards")
    if critic is None:
        critic = Critic.shared(actor) if config.critic == "shared" else Critic.from_actor(actor)
        if config.critic == "own" and config.lora_rank:
            critic.backbone = with_lora(critic.backbone, config, language_model=False)
    if config.lora_rank:
        actor = with_lora(actor, config, language_model=True)
    home = torch.device("cpu") if world.kind == "fsdp" else device  # whole weights never meet on one GPU under FSDP2
    prepare(actor, home)
    prepare(critic, home)
    config = with_chunk_bytes(config, actor.get_input_embeddings().weight.shape[0], total_memory(device))
    adapters = reference is None and config.kl_coef > 0 and is_adapted(actor)
    frozen = None
    if reference is not None:
        frozen = prepare(reference, home)
    elif config.kl_coef > 0 and not adapters:
        frozen = frozen_copy(actor)
    if config.gradient_checkpointing:
        warn_if_not_recomputed(actor, critic.backbone)
    how: dict[str, Any] = {"strict": config.strict, "dtype": config.dtype, "device": device, "reach": reach}
    heads = world.find(
        lambda: probe_all(actor, critic.backbone, frozen, **how),
        of=torch.nn.ModuleList([x for x in (actor, critic, frozen) if x is not None]),
    )
    sampling = Sampling()
    if tokenizer is not None:
        boundaries = heads.actor.boundaries
        sampling = world.find(lambda: probe_sampling(actor, tokenizer, config, boundaries, reach), of=actor)
    found: Reference = None
    if adapters:
        starts_trained = world.find(lambda: has_trained_adapters(actor), of=actor)
        found = AdapterReference(actor, starts_trained=starts_trained)
    if frozen is not None:
        assert heads.reference is not None
        found = FrozenReference(frozen, heads.reference, config)
        if world.kind == "fsdp":
            shard(found, world, config.dtype)
    policy = Policy(actor, critic, heads.actor, config, critic_head=heads.critic, sampling=sampling)
    world.wrap(policy, dtype=config.dtype, unused_parameters=config.critic_warmup_steps > 0)
    return policy, found
