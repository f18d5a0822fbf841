"""TODO docstring."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.common.device import upload
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.models.head import UNRESTRICTED, HeadInfo
from ppo_fast.llm.models.policy import Policy, PolicyOutput
from ppo_fast.llm.models.reference import AdapterReference, FrozenReference, Reference
from ppo_fast.llm.packing.attention import cudnn_attention, packed_attention
from ppo_fast.llm.packing.pack import Pack, make_pack, split_minibatches
from ppo_fast.llm.packing.rollout import Rollout


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


@contextmanager
def packed_mode(policy: Policy, reference: Reference = None) -> Iterator[None]:
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
    distributed: Distributed = SINGLE_PROCESS,
) -> Experience:
    """Log-probabilities of actor and reference, values, rewards, advantages and returns. No reference: no KL.

    Each process judges its packs, and all of them come to know the whole.
    """
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    mask = rollout.answer_mask
    judged_here = torch.zeros(4, *mask.shape, device=mask.device)
    old, ref, values, entropy = judged_here
    after = torch.zeros(len(rollout), device=mask.device)
    filler = dummy_pack(rollout) if distributed.size > 1 else None
    with torch.no_grad(), packed_mode(policy, reference):
        for own in (pack for minibatch in minibatches for pack in distributed.assign_packs(minibatch)):
            pack = own or filler
            assert pack is not None
            judged = policy(pack)
            assert isinstance(judged, PolicyOutput)
            ref_logprobs = None if reference is None else reference_logprobs(policy, reference, pack)
            if own is None:
                continue
            for target, source in ((old, judged.logprobs), (entropy, judged.entropy), (values, judged.values)):
                pack.scatter_(target, source)
            after[pack.sequence_rows] = judged.bootstrap_values
            if ref_logprobs is not None:
                pack.scatter_(ref, ref_logprobs)
    distributed.all_reduce_sum(judged_here)
    distributed.all_reduce_sum(after)
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


def dummy_pack(rollout: Rollout) -> Pack:
    """What a process without a pack of its own runs and does not count, since the others wait for it: little."""
    shortest = min(range(len(rollout)), key=lambda i: rollout.prompt_lengths[i] + rollout.answer_lengths[i])
    return make_pack(rollout, [shortest])


def split_minibatches_of(
    rollout: Rollout,
    order: list[int],
    config: PPOConfig,
    distributed: Distributed = SINGLE_PROCESS,
    head: HeadInfo | None = None,
) -> list[list[Pack]]:
    """`packing.cut` as the options say, with packs for all processes; `head` says which sequences may share one."""
    return split_minibatches(
        rollout,
        order,
        minibatches=config.minibatches,
        multiple_of=distributed.size,
        **(head or UNRESTRICTED).cutting(config.micro_batch_tokens),
    )
