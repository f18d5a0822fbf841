"""Learn: a rollout and its scores become advantages, and several epochs of minibatches on the PPO loss.

The rollout is cut into packs before the old log-probabilities are computed, and the first epoch uses those very packs
and the same code: its first ratio is exactly 1. Later epochs are cut anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ppo_fast.common.errors import NonFiniteError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.experience import Experience, dummy_pack, packed_mode, split_minibatches_of
from ppo_fast.llm.models.modes import gradient_checkpointing
from ppo_fast.llm.models.policy import LossInputs, Policy
from ppo_fast.llm.optimizer import Optimizer
from ppo_fast.llm.packing.pack import Pack
from ppo_fast.llm.packing.rollout import Rollout


def learn(
    policy: Policy,
    rollout: Rollout,
    experience: Experience,
    minibatches: list[list[Pack]],
    actor_optimizer: Optimizer,
    critic_optimizer: Optimizer,
    config: PPOConfig,
    generator: torch.Generator,
    *,
    kl_coef: float | None = None,
    entropy_coef: float | None = None,
    train_actor: bool = True,
    distributed: Distributed = SINGLE_PROCESS,
    check_first: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """All epochs over one rollout; the statistics of every minibatch, in order.

    `minibatches` are those that `evaluate` used; later epochs draw their order from `generator`. Where a minibatch's
    approx_kl is above config.target_kl, the actor is not updated with it, nor with any later one of this rollout; the
    critic is. `updated` is 1.0 where the actor was updated. `check_first` sees the statistics of the first minibatch
    before its update.

    Raises:
        NonFiniteError: a loss or gradient is not finite; its update was not made.
    """
    history: list[dict[str, float]] = []
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    filler = dummy_pack(rollout) if distributed.size > 1 else None
    with packed_mode(policy), gradient_checkpointing(policy, enabled=config.gradient_checkpointing):
        for epoch in range(config.epochs):
            if epoch > 0:
                order = torch.randperm(len(rollout), generator=generator).tolist()
                minibatches = split_minibatches_of(rollout, order, config, distributed, policy.head)
            for minibatch in minibatches:
                stats = accumulate_gradients(
                    policy,
                    minibatch,
                    experience,
                    config,
                    kl_coef=kl_coef,
                    entropy_coef=entropy_coef,
                    train_actor=train_actor,
                    distributed=distributed,
                    filler=filler,
                )
                if train_actor:
                    stats["grad_norm"] = actor_optimizer.clip()
                stats["critic_grad_norm"] = critic_optimizer.clip()
                values = as_floats(stats)
                _refuse_non_finite(values, epoch)
                if check_first is not None and not history:
                    check_first(values)
                if train_actor and config.target_kl is not None:
                    train_actor = values["approx_kl"] <= config.target_kl
                if train_actor:
                    actor_optimizer.step()
                else:
                    actor_optimizer.forget()
                critic_optimizer.step()
                history.append({**values, "updated": float(train_actor)})
    return history


def means_of(history: list[dict[str, float]]) -> dict[str, float]:
    """Each statistic's mean over the minibatches that have it: the actor's are missing where it does not learn."""
    names = dict.fromkeys(name for values in history for name in values)
    found = {name: [values[name] for values in history if name in values] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def as_floats(stats: dict[str, Tensor]) -> dict[str, float]:
    """0-dim tensors as numbers, with one copy for all of them."""
    return dict(zip(stats, torch.stack([x.float() for x in stats.values()]).tolist(), strict=True))


def accumulate_gradients(
    policy: Policy,
    minibatch: list[Pack],
    experience: Experience,
    config: PPOConfig,
    *,
    kl_coef: float = 0.0,
    entropy_coef: float | None = None,
    train_actor: bool = True,
    backward: Callable[[Tensor], None] = Tensor.backward,
    distributed: Distributed = SINGLE_PROCESS,
    filler: Pack | None = None,
) -> dict[str, Tensor]:
    """Adds one minibatch's gradient to actor and critic and returns its statistics.

    The loss is normalised by the minibatch's own count, so that the gradient does not depend on the packs. Of several
    processes each runs its packs; one that has none left runs `filler`, which counts nothing.
    """
    tokens = sum(pack.num_tokens for pack in minibatch)
    sequences = sum(len(pack.sequences) for pack in minibatch)
    denominator = float(tokens if config.aggregation == "token-mean" else sequences)
    collected = []
    mine = distributed.assign_packs(minibatch)
    for number, own in enumerate(mine, start=1):
        pack = own or filler
        assert pack is not None
        with distributed.sync_gradients(number == len(mine)):
            targets = _targets(pack, experience, config, kl_coef, entropy_coef, denominator)
            loss, stats = distributed.wrapped_module(policy)(pack, targets, train_actor=train_actor)
            # DDP and FSDP2 divide the sum over processes by their number
            backward(loss * (distributed.size if own else 0.0) if distributed.size > 1 else loss)
        stats = {"loss": loss.detach(), **stats}
        collected.append(
            (pack.num_tokens / tokens, stats) if own else (0.0, {name: _nothing(name, stats) for name in stats})
        )
    return _over_processes(merge_stats(collected), distributed)


def _targets(
    pack: Pack,
    experience: Experience,
    config: PPOConfig,
    kl_coef: float,
    entropy_coef: float | None,
    denominator: float,
) -> LossInputs:
    in_loss = config.kl_in == "loss" and kl_coef > 0
    return LossInputs(
        old_logprobs=pack.gather(experience.logprobs),
        advantages=pack.gather(experience.advantages),
        old_values=pack.gather(experience.values),
        returns=pack.gather(experience.returns),
        ref_logprobs=pack.gather(experience.ref_logprobs) if in_loss else None,
        weights=None if experience.weights is None else pack.gather(experience.weights),
        denominator=denominator,
        kl_coef=kl_coef,
        entropy_coef=config.entropy_coef if entropy_coef is None else entropy_coef,
    )


def _nothing(name: str, stats: dict[str, Tensor]) -> Tensor:
    """A filler's part of a statistic."""
    return torch.full_like(stats[name], float("-inf") if name.endswith("_max") else 0.0)


def _over_processes(stats: dict[str, Tensor], distributed: Distributed) -> dict[str, Tensor]:
    if distributed.size == 1:
        return stats
    for maxima, reduce in ((False, distributed.all_reduce_sum), (True, distributed.all_reduce_max)):
        names = [name for name in stats if name.endswith("_max") is maxima]
        if names:
            stats |= zip(names, reduce(torch.stack([stats[name].float() for name in names])), strict=True)
    return stats


def merge_stats(collected: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Statistics of a minibatch from its packs', each with its share of the tokens.

    Losses are already divided by the minibatch's count, so they add up; the rest are means over tokens, or maxima.
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


def _refuse_non_finite(values: dict[str, float], epoch: int) -> None:
    bad = {name: x for name, x in values.items() if x != x or abs(x) == float("inf")}
    if bad:
        named = ", ".join(f"{name} = {x}" for name, x in bad.items())
        raise NonFiniteError(
            f"{named} in epoch {epoch + 1}: this update was not made and the weights are as before it; a lower learning"
            " rate or max_grad_norm may help"
        )
