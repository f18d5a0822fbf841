"""From a rollout and its scores to advantages: log-probabilities, values, rewards and returns of each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.common.device import upload
from ppo_fast.llm.config import DEFAULT_LAM, PPOConfig
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.models.policy import Policy, packed_mode, reference_logprobs
from ppo_fast.llm.models.reference import Reference
from ppo_fast.llm.packing.pack import Pack, make_pack, split_minibatches
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.value_scale import ValueScale, Whitening


@dataclass
class Experience:
    """A rollout with all that learning needs, each [B, T] fp32 and 0 where the mask is False.

    Values, rewards and returns are in units of the reward.
    """

    rollout: Rollout
    minibatches: list[list[Pack]]  # those of which the old log-probabilities were computed
    kl_coef: float  # the weight of the KL penalty in this step
    mask: Tensor  # [B, T] bool, the rollout's, on its device
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None  # truncated importance weights, if so configured
    metrics: dict[str, Tensor]  # 0-dim, on the device


class ExperienceMaker:
    """Computes experience from rollouts with fixed weights; each rank computes its packs, and all get the whole.

    Args:
        policy: actor and critic.
        reference: the policy of the KL penalty; None: there is no KL.
        config: the options of rewards, advantages and packs.
        distributed: the processes of the run.
    """

    def __init__(
        self, policy: Policy, reference: Reference, config: PPOConfig, distributed: Distributed = SINGLE_PROCESS
    ) -> None:
        self.policy, self.reference, self.config, self.distributed = policy, reference, config, distributed

    def split_minibatches(self, rollout: Rollout, order: Sequence[int]) -> list[list[Pack]]:
        """The rollout's rows in this order, in minibatches of packs, with packs for all processes."""
        config, head = self.config, self.policy.head
        return split_minibatches(
            rollout,
            list(order),
            minibatches=config.minibatches,
            max_tokens=head.tokens_per_pack(config.micro_batch_tokens),
            multiple_of=self.distributed.size,
            regime=head.regime,
        )

    def make(
        self,
        rollout: Rollout,
        scores: Tensor,  # [B] or [B, T]
        *,
        order: Sequence[int] | None = None,
        kl_coef: float | None = None,
        scale: ValueScale | None = None,
    ) -> Experience:
        """Log-probabilities of actor and reference, values, rewards, advantages and returns.

        Args:
            rollout: of all processes, with the same rows in each.
            scores: one number for each completion, or for each of its tokens.
            order: of the rows in the minibatches; as they are if not given.
            kl_coef: the weight of the KL penalty; that of the configuration if not given.
            scale: takes in the scores, and the returns after the advantages are computed; the first rollout's before.
                None: the scale is as it is, and whitening has no least divisor.
        """
        config, mask = self.config, upload(rollout.mask, rollout.device)
        kl_coef = config.kl_coef if kl_coef is None else kl_coef
        minibatches = self.split_minibatches(rollout, range(len(rollout)) if order is None else order)
        (old, ref, values, entropy), after = self._forward_passes(rollout, mask, minibatches)
        if self.reference is None:
            ref = old
        cut = ~upload(torch.tensor(rollout.ended), mask.device) if config.bootstrap_truncated else None
        bootstrap = None if cut is None else after * cut
        whitening = Whitening() if scale is None else scale.observe_scores(scores, mask)

        def advantages() -> ppo.AdvantageOutput:
            return advantages_of(
                scores, old, ref, values, mask, config, kl_coef=kl_coef, bootstrap=bootstrap, whitening=whitening
            )

        out = advantages()
        if scale is not None:
            is_first = scale.is_new
            change = scale.update(monte_carlo_returns(out.rewards, mask, config, bootstrap=bootstrap), mask)
            if is_first:
                values = torch.where(mask, values + change, 0)
                bootstrap = None if cut is None else (after + change) * cut
                out = advantages()
        metrics = _metrics(mask, values, entropy, out)
        if scale is not None:
            metrics |= scale.metrics()
        if self.reference is not None:
            metrics |= {"kl": out.kl.sum() / mask.sum(), "kl_per_answer": out.kl.sum() / len(rollout)}
        weights = None
        if rollout.logprobs is not None:
            weights = importance_weights(rollout.logprobs, old, mask, config, metrics)
        return Experience(
            rollout=rollout,
            minibatches=minibatches,
            kl_coef=kl_coef,
            mask=mask,
            logprobs=old,
            ref_logprobs=ref,
            values=values,
            rewards=out.rewards,
            kl=out.kl,
            advantages=out.advantages,
            returns=out.returns,
            weights=weights,
            metrics=metrics,
        )

    @torch.no_grad()
    def _forward_passes(self, rollout: Rollout, mask: Tensor, minibatches: list[list[Pack]]) -> tuple[Tensor, Tensor]:
        """Old log-probabilities, those of the reference, values and entropies [4, B, T], and the values [B] of the
        states after the completions; the same in all processes."""
        outputs = torch.zeros(4, *mask.shape, device=mask.device)
        old, ref, values, entropy = outputs
        after = torch.zeros(len(rollout), device=mask.device)
        with packed_mode(self.policy, self.reference):
            for minibatch in minibatches:
                for pack, counts in local_packs(rollout, minibatch, self.distributed):
                    output = self.policy.evaluate(pack)
                    ref_logprobs = None
                    if self.reference is not None:
                        ref_logprobs = reference_logprobs(self.policy, self.reference, pack)
                    if not counts:
                        continue
                    pack.scatter_(old, output.logprobs)
                    pack.scatter_(entropy, output.entropy)
                    pack.scatter_(values, output.values)
                    after[pack.sequence_rows] = output.bootstrap_values
                    if ref_logprobs is not None:
                        pack.scatter_(ref, ref_logprobs)
        return self.distributed.all_reduce_sum(outputs), self.distributed.all_reduce_sum(after)


def local_packs(rollout: Rollout, minibatch: list[Pack], distributed: Distributed) -> list[tuple[Pack, bool]]:
    """This rank's packs of a minibatch, as many as in every other rank, and whether each counts.

    A rank that has none left runs a short pack that does not count, since the others wait for it in each pass.
    """
    packs = distributed.assign_packs(minibatch)
    dummy = [_dummy_pack(rollout)] if None in packs else []
    return [(pack, True) if pack is not None else (dummy[0], False) for pack in packs]


def _dummy_pack(rollout: Rollout) -> Pack:
    """The shortest sequence of a rollout."""
    lengths = [p + c for p, c in zip(rollout.prompt_lengths, rollout.completion_lengths, strict=True)]
    return make_pack(rollout, [lengths.index(min(lengths))])


def advantages_of(
    scores: Tensor,  # [B] or [B, T]
    old: Tensor,  # [B, T] log-probabilities of the actor, and of the reference
    ref: Tensor,
    values: Tensor,
    mask: Tensor,
    config: PPOConfig,
    *,
    kl_coef: float,
    bootstrap: Tensor | None,  # [B], V after the completions
    whitening: Whitening = Whitening(),  # noqa: B008
) -> ppo.AdvantageOutput:
    """Rewards, KL, advantages and returns as the options say.

    With lam_length_alpha the lambda of an answer is max(0, 1 - 1 / (lam_length_alpha * length)), with its length in
    sampled tokens (VAPO, arXiv 2504.05118).
    """
    lam: float | Tensor = DEFAULT_LAM if config.lam is None else config.lam
    if config.lam_length_alpha is not None:
        lengths = mask.sum(-1, dtype=torch.float32).clamp_(min=1.0)  # an answer without tokens has no advantages
        lam = (1 - 1 / (config.lam_length_alpha * lengths)).clamp_(min=0.0)
    out = ppo.rlhf_advantages(
        scores,
        old,
        ref,
        values,
        mask,
        kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=lam,
        critic_lam=config.critic_lam,
        bootstrap=bootstrap,
        whiten=config.whiten_advantages,
        eps=whitening.eps,
        min_std=whitening.min_std,
        backend=config.backend,
    )
    if whitening.factor is None or not config.whiten_advantages:
        return out
    return out._replace(advantages=out.advantages * whitening.factor)


def monte_carlo_returns(rewards: Tensor, mask: Tensor, config: PPOConfig, *, bootstrap: Tensor | None) -> Tensor:
    """The discounted sum [B, T] of the rewards from each token on, and of the bootstrap value after the last."""
    _, returns = ppo.gae(
        rewards,
        torch.zeros_like(rewards),
        gamma=config.gamma,
        lam=1.0,
        mask=mask,
        bootstrap=bootstrap,
        backend=config.backend,
    )
    return returns


def importance_weights(
    sampled: Tensor, old: Tensor, mask: Tensor, config: PPOConfig, metrics: dict[str, Tensor]
) -> Tensor | None:
    """min(p_trainer / p_sampler, cap) for each token (Espeholt et al. 2018); adds the gap of both to the metrics."""
    gap = torch.where(mask, old - sampled, 0)
    metrics["sampler_gap_mean"] = _mean(gap.abs(), mask)
    metrics["sampler_gap_p99"] = _quantile(gap.abs(), mask, 0.99)
    metrics["sampler_gap_max"] = gap.abs().amax()
    if config.importance_cap is None:
        return None
    return gap.exp().clamp(max=config.importance_cap)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask, a device scalar; 0 where the returns are all equal."""
    spread = _variance(returns, mask)
    return torch.where(spread > 0, 1 - _variance(returns - values, mask) / spread, 0)


def _metrics(mask: Tensor, values: Tensor, entropy: Tensor, out: ppo.AdvantageOutput) -> dict[str, Tensor]:
    return {
        "entropy": _mean(entropy, mask),
        "explained_variance": explained_variance(values, out.returns, mask),
        # before whitening: what whitening divides by, above its least divisor; returns have the lambda of the critic
        "advantage_std": out.stats["advantage_std"],
        "value": _mean(values, mask),
        "return": _mean(out.returns, mask),
    }


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over the mask. Sums, not x[mask]: the host would wait for a GPU to return the size of a selection."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def _quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """The smallest value of x >= 0 in the mask that is at least as large as the share q of the values in the mask."""
    rank = mask.numel() - 1 - ((1 - q) * mask.sum()).floor().long()  # values outside the mask are -1 and come first
    return torch.where(mask, x, -1.0).flatten().sort().values.gather(0, rank.view(1))[0]


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    """The biased variance over the mask."""
    return _mean((x - _mean(x, mask)).square(), mask)
