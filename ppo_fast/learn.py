"""Learn: a rollout and its scores become advantages, and several epochs of minibatches on the PPO loss.

The rollout is cut into micro-batches before the old log-probabilities are computed, and the first epoch uses those very
micro-batches and the same code: its ratios start at exactly 1. Later epochs are cut anew.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

import ppo_fast as ppo
from ppo_fast.config import PPOConfig
from ppo_fast.errors import NonFiniteError
from ppo_fast.models import Critic, answer_logprobs
from ppo_fast.sample import Rollout


@dataclass
class MicroBatch:
    """Some rows of a rollout, trimmed to the longest prompt and answer among them: b rows, P + T tokens."""

    rows: Tensor  # [b] int64, rows of the rollout
    input_ids: Tensor  # [b, P + T] int64
    attention_mask: Tensor  # [b, P + T] int64
    position_ids: Tensor  # [b, P + T] int64
    mask: Tensor  # [b, T] bool, True at the answer's tokens
    tokens: int  # counted tokens

    @property
    def width(self) -> int:
        """T."""
        return self.mask.shape[1]

    def of(self, per_token: Tensor) -> Tensor:
        """This micro-batch's part [b, T] of a tensor over the rollout [B, T]."""
        return per_token[self.rows, : self.width]


def cut(rollout: Rollout, order: list[int], config: PPOConfig) -> list[list[MicroBatch]]:
    """Rows in the given order, cut into minibatches of equal size, each cut into micro-batches."""
    whole = torch.tensor(order).tensor_split(config.minibatches)
    return [
        [_micro_batch(rollout, rows.tolist()) for rows in minibatch.split(config.micro_batch_size)]
        for minibatch in whole
    ]


def _micro_batch(rollout: Rollout, rows: list[int]) -> MicroBatch:
    prompts = [rollout.prompt_lengths[row] for row in rows]
    answers = [rollout.answer_lengths[row] for row in rows]
    P, T, device = max(prompts), max(answers), rollout.tokens.device
    start = rollout.tokens.shape[1] - rollout.answer_width - P
    lengths = torch.tensor([prompts, answers], device=device).unsqueeze(-1)  # [2, b, 1]
    columns = torch.arange(-P, T, device=device)  # 0 is the first token of each answer
    attended = (columns >= -lengths[0]) & (columns < lengths[1])
    index = torch.tensor(rows, device=device)
    return MicroBatch(
        rows=index,
        input_ids=rollout.tokens[index, start : start + P + T],
        attention_mask=attended.long(),
        position_ids=(columns + lengths[0]).clamp(min=0),
        mask=attended[:, P:],
        tokens=sum(answers),
    )


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
    metrics: dict[str, Tensor]  # 0-dim, on the device


def evaluate(
    actor: PreTrainedModel,
    critic: Critic,
    reference: PreTrainedModel | None,
    rollout: Rollout,
    scores: Tensor,  # [B] or [B, T]
    minibatches: list[list[MicroBatch]],
    config: PPOConfig,
) -> Experience:
    """Log-probabilities of actor and reference, values, rewards, advantages and returns. No reference: no KL."""
    mask = rollout.answer_mask
    old, ref, values, entropy = (torch.zeros(mask.shape, device=mask.device) for _ in range(4))
    with torch.no_grad():
        for batch in (batch for minibatch in minibatches for batch in minibatch):
            here = batch.rows.unsqueeze(1), torch.arange(batch.width, device=mask.device)
            old[here], entropy[here] = logprobs_of(actor, batch, config)
            values[here] = values_of(critic, batch) * batch.mask
            if reference is not None:
                ref[here] = logprobs_of(reference, batch, config)[0]
    if reference is None:
        ref = old
    rewards, kl = ppo.shape_rewards(
        scores,
        old,
        ref,
        mask,
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        score_clip=config.score_clip,
        backend=config.backend,
    )
    advantages, returns = ppo.gae(
        rewards, values, gamma=config.gamma, lam=config.lam, mask=mask, backend=config.backend
    )
    counted = returns[mask]
    spread, error = counted.var(correction=0), (counted - values[mask]).var(correction=0)
    metrics = {
        "entropy": entropy.sum() / mask.sum(),
        "explained_variance": torch.where(spread > 0, 1 - error / spread, 0),
        "value": values[mask].mean(),
        "return": counted.mean(),
    }
    if reference is not None:
        metrics |= {"kl": kl.sum() / mask.sum(), "kl_per_answer": kl.sum() / len(rollout)}
    if config.whiten_advantages:
        advantages = ppo.masked_whiten(advantages, mask, backend=config.backend)
    return Experience(old, ref, values, rewards, kl, advantages, returns, metrics)


def logprobs_of(actor: PreTrainedModel, batch: MicroBatch, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [b, T]: the one code path of the old pass and of learning."""
    return answer_logprobs(
        actor,
        batch.input_ids,
        batch.attention_mask,
        batch.position_ids,
        batch.mask,
        temperature=config.temperature,
        backend=config.backend,
    )


def values_of(critic: Critic, batch: MicroBatch) -> Tensor:
    """V(s) [b, T]; not yet masked."""
    return critic(batch.input_ids, batch.attention_mask, batch.position_ids, batch.width)


class Optimizer:
    """AdamW for one model, with its learning-rate schedule and the clipping of its gradient."""

    def __init__(self, model: nn.Module, lr: float, config: PPOConfig) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, eps=config.adam_eps, weight_decay=config.weight_decay)
        updates = config.total_steps * config.epochs * config.minibatches
        self.schedule = get_scheduler(
            config.lr_schedule,
            self.adamw,
            num_warmup_steps=round(config.warmup_ratio * updates),
            num_training_steps=updates,
        )

    def clip(self) -> Tensor:
        """Clips the gradient to max_grad_norm and returns the norm it had, a device scalar."""
        return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)

    def step(self) -> None:
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


def learn(
    actor: PreTrainedModel,
    critic: Critic,
    rollout: Rollout,
    experience: Experience,
    minibatches: list[list[MicroBatch]],
    actor_optimizer: Optimizer,
    critic_optimizer: Optimizer,
    config: PPOConfig,
    generator: torch.Generator,
) -> list[dict[str, float]]:
    """All epochs over one rollout; the statistics of every minibatch, in order.

    `minibatches` are those that `evaluate` used; later epochs draw their order from `generator`. Raises NonFiniteError
    before an optimizer step whose loss or gradient is not finite.
    """
    history = []
    for epoch in range(config.epochs):
        if epoch > 0:
            minibatches = cut(rollout, torch.randperm(len(rollout), generator=generator).tolist(), config)
        for minibatch in minibatches:
            stats = accumulate_gradients(actor, critic, minibatch, experience, config)
            stats["grad_norm"] = actor_optimizer.clip()
            stats["critic_grad_norm"] = critic_optimizer.clip()
            values = dict(zip(stats, torch.stack([x.float() for x in stats.values()]).tolist(), strict=True))
            _refuse_non_finite(values, epoch)
            actor_optimizer.step()
            critic_optimizer.step()
            history.append(values)
    return history


def accumulate_gradients(
    actor: PreTrainedModel,
    critic: Critic,
    minibatch: list[MicroBatch],
    experience: Experience,
    config: PPOConfig,
) -> dict[str, Tensor]:
    """Adds one minibatch's gradient to actor and critic and returns its statistics.

    The loss is normalised by the minibatch's own count, so that the gradient does not depend on the micro-batches.
    """
    tokens = sum(batch.tokens for batch in minibatch)
    sequences = sum(len(batch.rows) for batch in minibatch)
    collected = []
    for batch in minibatch:
        logprobs, entropy = logprobs_of(actor, batch, config)
        out = ppo.ppo_loss(
            logprobs,
            values_of(critic, batch),
            batch.of(experience.logprobs),
            batch.of(experience.values),
            batch.of(experience.advantages),
            batch.of(experience.returns),
            batch.mask,
            value_coef=config.value_coef,
            value_clip=config.value_clip,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            entropy=entropy,
            entropy_coef=config.entropy_coef,
            aggregation=config.aggregation,
            denominator=float(tokens if config.aggregation == "token-mean" else sequences),
            norm_length=float(config.max_new_tokens) if config.aggregation == "seq-mean-token-sum-norm" else None,
            backend=config.backend,
        )
        out.loss.backward()
        collected.append((batch.tokens / tokens, {"loss": out.loss.detach(), **out.stats}))
    return merge_stats(collected)


def merge_stats(collected: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Statistics of a minibatch from its micro-batches', each with its share of the tokens.

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
