"""Learn: a rollout and its scores become advantages, and several epochs of minibatches on the PPO loss.

The rollout is cut into packs before the old log-probabilities are computed, and the first epoch uses those very packs
and the same code: its first ratio is exactly 1. Later epochs are cut anew.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ppo_fast as ppo
from ppo_fast.attention import cudnn_attention, packed_attention
from ppo_fast.config import PPOConfig
from ppo_fast.device import upload
from ppo_fast.errors import NonFiniteError
from ppo_fast.heads import TOGETHER, Head
from ppo_fast.models import AdapterReference, recomputing
from ppo_fast.packing import Pack, cut, make_pack
from ppo_fast.parallel import ONE, World, full
from ppo_fast.policy import FrozenReference, Judgement, Policy, Targets
from ppo_fast.rollout import Rollout


@dataclass
class Experience:
    """What learning needs to know of a rollout, each [B, T] fp32 and 0 outside the answers."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None  # truncated importance weights, if so configured
    metrics: dict[str, Tensor]  # 0-dim, on the device


Reference = FrozenReference | AdapterReference | None


@contextmanager
def packed(policy: Policy, reference: Reference = None) -> Iterator[None]:
    """Actor, critic and reference take packed rows inside this block, if they can."""
    models = policy.packing_models()
    if isinstance(reference, FrozenReference) and reference.head.packed:
        models.append(reference)
    cudnn = policy.config.cudnn_attention
    with packed_attention(*models, cudnn=cudnn) if models else cudnn_attention(enabled=cudnn):
        yield


def evaluate(
    policy: Policy,
    reference: Reference,
    rollout: Rollout,
    scores: Tensor,  # [B] or [B, T]
    minibatches: list[list[Pack]],
    config: PPOConfig,
    *,
    kl_coef: float | None = None,
    world: World = ONE,
) -> Experience:
    """Log-probabilities of actor and reference, values, rewards, advantages and returns. No reference: no KL.

    Each process judges its packs, and all of them come to know the whole.
    """
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    mask = rollout.answer_mask
    judged_here = torch.zeros(4, *mask.shape, device=mask.device)
    old, ref, values, entropy = judged_here
    after = torch.zeros(len(rollout), device=mask.device)
    filler = filler_of(rollout) if world.size > 1 else None
    with torch.no_grad(), packed(policy, reference):
        for own in (pack for minibatch in minibatches for pack in world.deal(minibatch)):
            pack = own or filler
            assert pack is not None
            judged = policy(pack)
            assert isinstance(judged, Judgement)
            ref_logprobs = None if reference is None else reference_logprobs(policy, reference, pack)
            if own is None:
                continue
            for target, source in ((old, judged.logprobs), (entropy, judged.entropy), (values, judged.values)):
                pack.put(target, source)
            after[pack.sequence_rows] = judged.values_after
            if ref_logprobs is not None:
                pack.put(ref, ref_logprobs)
    world.sum(judged_here)
    world.sum(after)
    if reference is None:
        ref = old
    bootstrap = after * ~upload(torch.tensor(rollout.ended), mask.device) if config.bootstrap_truncated else None
    out = advantages_of(scores, old, ref, values, mask, config, kl_coef=kl_coef, bootstrap=bootstrap)
    metrics = _metrics(rollout, mask, values, entropy, out.returns)
    if reference is not None:
        metrics |= {"kl": out.kl.sum() / mask.sum(), "kl_per_answer": out.kl.sum() / len(rollout)}
    weights = None
    if rollout.logprobs is not None:
        weights = _importance(rollout.logprobs, old, mask, config, metrics)
    return Experience(old, ref, values, out.rewards, out.kl, out.advantages, out.returns, weights, metrics)


def advantages_of(
    scores: Tensor,  # [B] or [B, T]
    old: Tensor,  # [B, T] log-probabilities of the actor, and of the reference
    ref: Tensor,
    values: Tensor,
    mask: Tensor,
    config: PPOConfig,
    *,
    kl_coef: float,
    bootstrap: Tensor | None,  # [B], V after the answers
) -> ppo.AdvantageOutput:
    """Rewards, KL, advantages and returns as the options say."""
    return ppo.rlhf_advantages(
        scores,
        old,
        ref,
        values,
        mask,
        kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam,
        bootstrap=bootstrap,
        whiten=config.whiten_advantages,
        backend=config.backend,
    )


def _metrics(rollout: Rollout, mask: Tensor, values: Tensor, entropy: Tensor, returns: Tensor) -> dict[str, Tensor]:
    spread, error = _variance(returns, mask), _variance(returns - values, mask)
    return {
        "entropy": _mean(entropy, mask),
        "explained_variance": torch.where(spread > 0, 1 - error / spread, 0),
        "advantage_std": error.sqrt(),  # before whitening: what whitening divides by
        "value": _mean(values, mask),
        "return": _mean(returns, mask),
    }


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Of what the mask counts. Sums, not x[mask]: the host would wait for a GPU to learn that selection's size."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def _quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """The smallest of the values x >= 0 that the mask counts which is at least as large as the share q of them."""
    rank = mask.numel() - 1 - ((1 - q) * mask.sum()).floor().long()  # what is not counted is -1 and comes first
    return torch.where(mask, x, -1.0).flatten().sort().values.gather(0, rank.view(1))[0]


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    """The biased one."""
    return _mean((x - _mean(x, mask)).square(), mask)


def _importance(
    sampled: Tensor, old: Tensor, mask: Tensor, config: PPOConfig, metrics: dict[str, Tensor]
) -> Tensor | None:
    """min(p_trainer / p_sampler, cap) for each token (Espeholt et al. 2018), and how far the two are apart."""
    gap = torch.where(mask, old - sampled, 0)
    metrics["sampler_gap_mean"] = _mean(gap.abs(), mask)
    metrics["sampler_gap_p99"] = _quantile(gap.abs(), mask, 0.99)
    metrics["sampler_gap_max"] = gap.abs().amax()
    if config.importance_cap is None:
        return None
    return gap.exp().clamp(max=config.importance_cap)


def reference_logprobs(policy: Policy, reference: FrozenReference | AdapterReference, pack: Pack) -> Tensor:
    """Log-probabilities [n] of a pack's answer tokens under the reference."""
    if isinstance(reference, AdapterReference):
        found = policy(pack, reference=reference)
        assert isinstance(found, Tensor)
        return found
    return reference(pack)


def filler_of(rollout: Rollout) -> Pack:
    """What a process without a pack of its own runs and does not count, since the others wait for it: little."""
    shortest = min(range(len(rollout)), key=lambda i: rollout.prompt_lengths[i] + rollout.answer_lengths[i])
    return make_pack(rollout, [shortest])


def rate_of_step(config: PPOConfig, step: int, *, first: int = 0) -> float:
    """The factor of the learning rate in PPO step `step`, counted from 0, of a schedule that begins at step `first`.

    It rises over the share `warmup_ratio` of these steps, and then falls so that it would reach 0 one step after the
    last: no step has the rate 0, however many updates a step makes.

    >>> [rate_of_step(PPOConfig(total_steps=4, warmup_ratio=0.25), step) for step in range(5)]
    [0.5, 1.0, 0.6666666666666666, 0.3333333333333333, 0.0]
    """
    steps, step = config.total_steps - first, step - first
    rising = round(config.warmup_ratio * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = 1.0 if config.lr_schedule == "constant" else (steps - step) / (steps - rising)
    return 0.5 - 0.5 * math.cos(math.pi * left) if config.lr_schedule == "cosine" else left


def unreached(policy: Policy, config: PPOConfig, device: torch.device) -> list[str]:
    """Names of parameters that would be trained, but on which the loss of a short sequence does not depend.

    `device` is where the weights are: under FSDP2 the CPU, where the backend that trains may not run.
    """
    rollout = Rollout(torch.tensor([[1, 2, 1]]), [1], [2], [True], [""], {"prompt": [""]}, device=device)
    ((pack,),) = cut_as(rollout, [0], dataclasses.replace(config, minibatches=1))
    zeros = torch.zeros(pack.size, device=device)
    targets = Targets(zeros, zeros, zeros, zeros, None, None, 1.0, 0.0, config.entropy_coef)
    given, policy.config = policy.config, dataclasses.replace(policy.config, backend="auto")
    try:
        with packed(policy):
            loss, _ = policy(pack, targets)
    finally:
        policy.config = given
    left, found = [loss.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    reached = {getattr(node, "variable", None) for node in found}
    return [name for name, p in policy.named_parameters() if p.requires_grad and p not in reached]


class Optimizer:
    """AdamW for one model, with the learning rate of each PPO step and the clipping of its gradient.

    Args:
        model: its parameters that require gradients are trained. Weight decay applies to those with at least two
            dimensions: not to biases and the weights of norms.
        lr: the highest learning rate.
        first_step: the PPO step, counted from 0, in which the model begins to learn.
    """

    def __init__(self, model: nn.Module, lr: float, config: PPOConfig, *, first_step: int = 0) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.config, self.highest, self.first_step = config, lr, first_step
        matrices, others = ([p for p in self.parameters if (p.ndim > 1) is wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=all(p.device.type not in ("cpu", "mps") for p in self.parameters),
        )

    def begin(self, step: int) -> float:
        """Sets the learning rate of PPO step `step`, counted from 0, and returns it; 0 before `first_step`."""
        scale = rate_of_step(self.config, step, first=self.first_step) if step >= self.first_step else 0.0
        for group in self.adamw.param_groups:
            group["lr"] = self.highest * scale
        return self.highest * scale

    def clip(self) -> Tensor:
        """Clips the gradient to max_grad_norm and returns the norm it had, a device scalar."""
        limit = self.config.max_grad_norm
        return full(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))

    def step(self) -> None:
        """One update. Parameters that have no gradient stay as they are."""
        self.adamw.step()
        self.forget()

    def forget(self) -> None:
        """Drops all gradients."""
        self.adamw.zero_grad()


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
    world: World = ONE,
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
    filler = filler_of(rollout) if world.size > 1 else None
    with packed(policy), recomputing(policy, enabled=config.gradient_checkpointing):
        for epoch in range(config.epochs):
            if epoch > 0:
                order = torch.randperm(len(rollout), generator=generator).tolist()
                minibatches = cut_as(rollout, order, config, world, policy.head)
            for minibatch in minibatches:
                stats = accumulate_gradients(
                    policy,
                    minibatch,
                    experience,
                    config,
                    kl_coef=kl_coef,
                    entropy_coef=entropy_coef,
                    train_actor=train_actor,
                    world=world,
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


def cut_as(
    rollout: Rollout, order: list[int], config: PPOConfig, world: World = ONE, head: Head | None = None
) -> list[list[Pack]]:
    """`packing.cut` as the options say, with packs for all processes; `head` says which sequences may share one."""
    return cut(
        rollout,
        order,
        minibatches=config.minibatches,
        multiple_of=world.size,
        **(head or TOGETHER).cutting(config.micro_batch_tokens),
    )


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
    world: World = ONE,
    filler: Pack | None = None,
) -> dict[str, Tensor]:
    """Adds one minibatch's gradient to actor and critic and returns its statistics.

    The loss is normalised by the minibatch's own count, so that the gradient does not depend on the packs. Of several
    processes each runs its packs; one that has none left runs `filler`, which counts nothing.
    """
    tokens = sum(pack.size for pack in minibatch)
    sequences = sum(len(pack.sequences) for pack in minibatch)
    denominator = float(tokens if config.aggregation == "token-mean" else sequences)
    collected = []
    mine = world.deal(minibatch)
    for number, own in enumerate(mine, start=1):
        pack = own or filler
        assert pack is not None
        with world.last_only(number == len(mine)):
            targets = _targets(pack, experience, config, kl_coef, entropy_coef, denominator)
            loss, stats = world.module(policy)(pack, targets, train_actor=train_actor)
            # DDP and FSDP2 divide the sum over processes by their number
            backward(loss * (world.size if own else 0.0) if world.size > 1 else loss)
        stats = {"loss": loss.detach(), **stats}
        collected.append((pack.size / tokens, stats) if own else (0.0, {name: _nothing(name, stats) for name in stats}))
    return _over_processes(merge_stats(collected), world)


def _targets(
    pack: Pack,
    experience: Experience,
    config: PPOConfig,
    kl_coef: float,
    entropy_coef: float | None,
    denominator: float,
) -> Targets:
    in_loss = config.kl_in == "loss" and kl_coef > 0
    return Targets(
        old_logprobs=pack.of(experience.logprobs),
        advantages=pack.of(experience.advantages),
        old_values=pack.of(experience.values),
        returns=pack.of(experience.returns),
        ref_logprobs=pack.of(experience.ref_logprobs) if in_loss else None,
        weights=None if experience.weights is None else pack.of(experience.weights),
        denominator=denominator,
        kl_coef=kl_coef,
        entropy_coef=config.entropy_coef if entropy_coef is None else entropy_coef,
    )


def _nothing(name: str, stats: dict[str, Tensor]) -> Tensor:
    """A filler's part of a statistic."""
    return torch.full_like(stats[name], float("-inf") if name.endswith("_max") else 0.0)


def _over_processes(stats: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    if world.size == 1:
        return stats
    for maxima, reduce in ((False, world.sum), (True, world.largest)):
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
