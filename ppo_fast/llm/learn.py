"""Learning: several epochs of minibatches on the PPO loss over the experience of one rollout.

The rollout is split into packs before the old log-probabilities are computed, and the first epoch uses the same packs
and the same code: its first ratio is exactly 1. Later epochs are split anew.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ppo_fast.common.errors import NonFiniteError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.controllers import EntropyController, KLController
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.experience import Experience, ExperienceMaker, advantages_of, local_packs, monte_carlo_returns
from ppo_fast.llm.loss_scale import LossScale
from ppo_fast.llm.models.embedding import tied_gradient
from ppo_fast.llm.models.modes import gradient_checkpointing
from ppo_fast.llm.models.policy import LossInputs, Policy, packed_mode
from ppo_fast.llm.models.reference import Reference
from ppo_fast.llm.optimizer import Optimizers
from ppo_fast.llm.packing.pack import Pack
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.value_scale import UNSCALED, ValueScale, Whitening


class Learner:
    """Turns rollouts with scores into experience, and experience into updates of actor and critic.

    Args:
        policy: actor and critic.
        reference: the policy of the KL penalty; None: there is no KL.
        optimizers: of actor and critic.
        config: the options of learning.
        distributed: the processes of the run.
        generator: draws the order of rows within minibatches, the same in all processes.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        optimizers: Optimizers,
        config: PPOConfig,
        distributed: Distributed = SINGLE_PROCESS,
        generator: torch.Generator | None = None,
    ) -> None:
        self.policy, self.reference, self.optimizers = policy, reference, optimizers
        self.config, self.distributed = config, distributed
        self.generator = torch.Generator().manual_seed(config.seed) if generator is None else generator
        self.experience_maker = ExperienceMaker(policy, reference, config, distributed)
        self.kl_controller = KLController(config)
        self.entropy_controller = EntropyController(config)
        self.loss_scale = LossScale(config.dtype)
        self.value_scale = ValueScale(policy, optimizers.critic, config) if config.normalize_values else None
        if self.value_scale is None:
            policy.critic.rescale(0.0, 1.0)  # one that is given may have a scale

    def make_experience(self, rollout: Rollout, scores: Tensor) -> Experience:
        """Log-probabilities, values, rewards and advantages of all processes' completions; moves the value scale.

        Args:
            rollout: the same in all processes.
            scores: [B], or [B, T] for a score of each token.
        """
        order = self._draw_order(rollout)
        return self.experience_maker.make(
            rollout, scores, order=order, kl_coef=self.kl_controller.coef, scale=self.value_scale
        )

    def update(
        self,
        experience: Experience,
        *,
        train_actor: bool = True,
        check_first: Callable[[Mapping[str, float]], None] | None = None,
    ) -> list[dict[str, float]]:
        """Run all epochs over one rollout and return the statistics of every minibatch, in order.

        Where the approx_kl of a minibatch is above config.target_kl, the actor is not updated with it, nor with any
        later one of this rollout; the critic is. `updated` is 1.0 where the actor was updated. In float16 a minibatch
        whose gradients overflow updates neither, and lowers the loss scale.

        Args:
            experience: of `make_experience`, with its minibatches for the first epoch.
            train_actor: False: only the critic learns.
            check_first: is called with the statistics of the first minibatch, before its update.

        Raises:
            NonFiniteError: a loss or gradient is not finite; its update was not made. In float16 gradients may be so
                in a few updates in a row.
        """
        history: list[dict[str, float]] = []
        # `PPOTrainer.last_experience` is without its packs
        minibatches = experience.minibatches or self.experience_maker.split_minibatches(
            experience.rollout, self._draw_order(experience.rollout)
        )
        with self._training_mode():
            for epoch in range(self.config.epochs):
                if epoch > 0:
                    order = self._draw_order(experience.rollout)
                    minibatches = self.experience_maker.split_minibatches(experience.rollout, order)
                for minibatch in minibatches:
                    scale = self.loss_scale.scale
                    stats = as_floats(self._clipped_gradients(minibatch, experience, train_actor=train_actor))
                    norms = {name: x for name, x in stats.items() if name.endswith("grad_norm")}
                    skip = self.loss_scale.overflows(norms)
                    if skip:
                        stats = {name: x for name, x in stats.items() if name not in norms}
                    _check_finite(stats, epoch)
                    if check_first is not None and not history:
                        check_first(stats)
                    if train_actor and self.config.target_kl is not None:
                        train_actor = stats["approx_kl"] <= self.config.target_kl
                    if skip:
                        self.optimizers.zero_grad()
                    else:
                        self.optimizers.step(train_actor=train_actor)
                    scaling = {"loss_scale": scale, "skipped": float(skip)} if self.loss_scale.enabled else {}
                    history.append({**stats, **scaling, "updated": float(train_actor and not skip)})
        return history

    def adapt_coefficients(self, metrics: Mapping[str, float], completions: int) -> None:
        """Adapt the weights of the KL penalty and the entropy bonus to the metrics of a step that trained the actor.

        Args:
            metrics: of the experience: `entropy`, and with a reference `kl_per_answer`.
            completions: of the step.
        """
        self.entropy_controller.update(metrics["entropy"])
        self.kl_controller.update(metrics.get("kl_per_answer", 0.0), completions)

    def accumulate_gradients(
        self,
        minibatch: list[Pack],
        experience: Experience,
        *,
        train_actor: bool = True,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> dict[str, Tensor]:
        """Add the gradient of one minibatch to actor and critic and return its statistics.

        The loss is normalised by the count of the whole minibatch: the gradient does not depend on the packs, nor on
        the number of processes, each of which computes its own packs.
        """
        distributed = self.distributed
        tokens = sum(pack.num_tokens for pack in minibatch)
        sequences = sum(len(pack.sequences) for pack in minibatch)
        denominator = float(tokens if self.config.aggregation == "token-mean" else sequences)
        collected = []
        packs = local_packs(experience.rollout, minibatch, distributed)
        for number, (pack, counts) in enumerate(packs, start=1):
            with distributed.sync_gradients(number == len(packs)):
                inputs = self._loss_inputs(pack, experience, denominator)
                loss, stats = distributed.wrapped_module(self.policy)(pack, inputs, train_actor=train_actor)
                # DDP and FSDP2 divide the sum over processes by their number
                backward(loss * (distributed.size if counts else 0.0) if distributed.size > 1 else loss)
            stats = {"loss": loss.detach(), **stats}
            neutral = {name: _neutral_statistic(name, x) for name, x in stats.items()}
            collected.append((pack.num_tokens / tokens, stats) if counts else (0.0, neutral))
        return _reduce_stats(merge_stats(collected), distributed)

    def warm_up(self, rollout: Rollout) -> None:
        """Pass a rollout of one sequence through all that learning computes, and drop its gradients.

        Triton compiles its kernels here; in the first step that time would be counted as the step's own.
        """
        order = range(len(rollout))
        minibatch = [pack for part in self.experience_maker.split_minibatches(rollout, order) for pack in part]
        scores = torch.zeros(len(rollout), device=rollout.device)
        with self._training_mode():
            self.accumulate_gradients(minibatch, self.experience_maker.make(rollout, scores))
        self.optimizers.zero_grad()
        config = self.config
        for width in {config.max_new_tokens, max(1, config.max_new_tokens - 1)}:  # rows that are aligned, and not
            rows = torch.zeros(config.prompts_per_step * config.samples_per_prompt, width, device=rollout.device)
            bootstrap = rows[:, 0].contiguous() if config.bootstrap_truncated else None
            whitening = Whitening() if self.value_scale is None else Whitening(0.0, rows.new_tensor(UNSCALED))
            mask = rows == 0
            advantages_of(
                *(rows[:, 0], rows, rows, rows, mask, config),
                kl_coef=config.kl_coef,
                bootstrap=bootstrap,
                whitening=whitening,
            )
            monte_carlo_returns(rows, mask, config, bootstrap=bootstrap)

    def _draw_order(self, rollout: Rollout) -> list[int]:
        return torch.randperm(len(rollout), generator=self.generator).tolist()

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        enabled = self.config.gradient_checkpointing
        tied = tied_gradient(self.policy.actor, enabled=self.distributed.size == 1)
        with packed_mode(self.policy), gradient_checkpointing(self.policy, enabled=enabled), tied:
            yield

    def _clipped_gradients(
        self, minibatch: list[Pack], experience: Experience, *, train_actor: bool
    ) -> dict[str, Tensor]:
        """Gradients of a minibatch, clipped for actor and critic; its statistics, the norms among them."""
        scale, optimizers = self.loss_scale, self.optimizers
        stats = self.accumulate_gradients(minibatch, experience, train_actor=train_actor, backward=scale.backward)
        scale.unscale([*optimizers.actor.parameters, *optimizers.critic.parameters])
        if train_actor:
            stats["grad_norm"] = self.optimizers.actor.clip()
        stats["critic_grad_norm"] = self.optimizers.critic.clip()
        return stats

    def _loss_inputs(self, pack: Pack, experience: Experience, denominator: float) -> LossInputs:
        kl_in_loss = self.config.kl_in == "loss" and experience.kl_coef > 0
        critic = self.policy.critic
        return LossInputs(
            old_logprobs=pack.gather(experience.logprobs),
            advantages=pack.gather(experience.advantages),
            old_values=critic.normalize(pack.gather(experience.values)),
            returns=critic.normalize(pack.gather(experience.returns)),
            ref_logprobs=pack.gather(experience.ref_logprobs) if kl_in_loss else None,
            weights=None if experience.weights is None else pack.gather(experience.weights),
            denominator=denominator,
            kl_coef=experience.kl_coef,
            entropy_coef=self.entropy_controller.coef,
        )


def means_of(history: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each statistic over the minibatches that have it: the actor's are absent where it does not learn."""
    names = dict.fromkeys(name for values in history for name in values)
    found = {name: [values[name] for values in history if name in values] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def as_floats(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """0-dim tensors as numbers, with one copy for all of them."""
    return dict(zip(stats, torch.stack([x.float() for x in stats.values()]).tolist(), strict=True))


def _neutral_statistic(name: str, x: Tensor) -> Tensor:
    """The value of a statistic that changes neither a sum nor a maximum, for a pack that does not count."""
    return torch.full_like(x, float("-inf") if name.endswith("_max") else 0.0)


def _reduce_stats(stats: dict[str, Tensor], distributed: Distributed) -> dict[str, Tensor]:
    """Return sums, or maxima, over processes."""
    if distributed.size == 1:
        return stats
    for maxima, reduce in ((False, distributed.all_reduce_sum), (True, distributed.all_reduce_max)):
        names = [name for name in stats if name.endswith("_max") is maxima]
        if names:
            stats |= zip(names, reduce(torch.stack([stats[name].float() for name in names])), strict=True)
    return stats


def merge_stats(collected: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Statistics of a minibatch from those of its packs, each with its share of the tokens.

    Losses are already divided by the count of the minibatch, so they are added; the rest are means over tokens, or
    maxima.
    """
    merged = {}
    for name in collected[0][1]:
        values = [stats[name] for _, stats in collected]
        if name == "loss" or name.endswith("_loss"):
            merged[name] = torch.stack(values).sum()
        elif name.endswith("_max"):
            merged[name] = torch.stack(values).amax()
        else:
            merged[name] = torch.stack([share * stats[name] for share, stats in collected]).sum()
    return merged


def _check_finite(stats: Mapping[str, float], epoch: int) -> None:
    """Raise NonFiniteError if a statistic of a minibatch is NaN or infinite."""
    bad = {name: x for name, x in stats.items() if x != x or abs(x) == float("inf")}
    if bad:
        named = ", ".join(f"{name} = {x}" for name, x in bad.items())
        raise NonFiniteError(
            f"{named} in epoch {epoch + 1}: this update was not made and the weights are as before it; a lower learning"
            " rate or max_grad_norm may help"
        )
