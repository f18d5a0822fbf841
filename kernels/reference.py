"""PPO's arithmetic in plain PyTorch: the specification that every kernel is tested against.

Naive on purpose: any float dtype, autograd for the gradients, a Python loop where the paper has a sum over time.
Speed and memory do not matter here; a reader must be able to check each line against its paper. Give fp64 tensors
to get the truth, and a lower dtype to get what eager PyTorch would answer.

Shapes: B sequences, T steps, V vocabulary, N tokens, S packed sequences. `mask` is True where a step counts, and the
value at a masked position never reaches a result, not even NaN.
"""

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
REWARD_POSITIONS = ("last", "after_last")


def _as_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as bool; all True where none was given."""
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def token_logprobs(
    logits: Tensor,  # [..., V]
    tokens: Tensor,  # [...]
    mask: Tensor | None = None,  # [...]
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """logp = z[token] - logsumexp(z) and H = logsumexp(z) - sum_j p_j z_j with z = logits / temperature; 0 if masked.

    A term with p_j = 0 adds nothing to H, also where z_j is -inf. Any finite logit is fine, up to the largest number of
    its dtype, since both results depend on differences only. V logits of -1e10, or of finfo.min, are a uniform
    distribution: logp = -log V, H = log V. A single logit of 3e38 has p = 1, logp = 0 and H = 0; the others have p = 0,
    logp = (z_j - 3e38) / temperature, which is -inf where fp32 cannot hold it, and gradients of 0. A row with NaN or
    +inf, or with nothing but -inf, is NaN.
    """
    mask = _as_mask(mask, tokens)
    kept = torch.where(mask.unsqueeze(-1), logits, 0)
    z = (kept - kept.detach().amax(-1, keepdim=True)) / temperature  # logsumexp(z) would round away what is below 1 ulp
    lse = torch.logsumexp(z, dim=-1)
    chosen = torch.where(mask, tokens, 0).long().unsqueeze(-1)
    logprobs = torch.where(mask, z.gather(-1, chosen).squeeze(-1) - lse, 0)
    if not with_entropy:
        return logprobs
    finite_z = torch.where(z == -torch.inf, 0, z)
    entropy = lse - (torch.softmax(z, dim=-1) * finite_z).sum(-1)
    return logprobs, torch.where(mask, entropy, 0)


def linear_logits(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:  # [..., V]
    """The LM head: s (h W^T + b), squeezed to +-softcap by tanh if given (Gemma 2). A -inf bias stays -inf."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    if softcap is None:
        return logits
    return torch.where(logits == -torch.inf, logits, softcap * torch.tanh(logits / softcap))


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str, log_ratio_clamp: float = 20.0) -> Tensor:
    """Estimators of KL(policy || reference) per token from one sample, with d = logp - ref.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d| (Schulman 2020, "Approximating KL divergence"). The exponent
    is clamped to +-log_ratio_clamp.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return torch.exp(-d.clamp(-log_ratio_clamp, log_ratio_clamp)) - 1 + d
    if kind == "abs":
        return d.abs()
    raise ValueError(f"kl_estimator must be one of {KL_ESTIMATORS}, got {kind!r}")


def token_weights(
    mask: Tensor,  # [..., T], or [total] with cu_seqlens
    *,
    aggregation: str,
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w with loss = sum_i w_i term_i, 0 where masked: what the five aggregations have in common.

    Sequences are rows of the last dimension, or the pieces that cu_seqlens cuts; one without a counted step does not
    count. `denominator` replaces the number of tokens (token-mean) or of sequences (seq-mean-*).
    """
    mask = mask.to(dtype)
    if aggregation == "token-sum":
        return mask
    if aggregation == "token-mean":
        return mask / (mask.sum().clamp(min=1) if denominator is None else denominator)
    if cu_seqlens is not None:
        sizes = cu_seqlens.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=mask.device), sizes)
        lengths = torch.zeros(len(sizes), dtype=dtype, device=mask.device).index_add(0, owner, mask)
        per_token_length = lengths[owner]
    else:
        lengths = mask.sum(-1)
        per_token_length = lengths.unsqueeze(-1).expand_as(mask)
    sequences = (lengths > 0).sum().clamp(min=1).to(dtype) if denominator is None else denominator
    if aggregation == "seq-mean-token-sum":
        return mask / sequences
    if aggregation == "seq-mean-token-mean":
        return mask / per_token_length.clamp(min=1) / sequences
    if aggregation == "seq-mean-token-sum-norm":
        return mask / (mask.shape[-1] if norm_length is None else norm_length) / sequences
    raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")


def policy_loss(
    logprobs: Tensor,  # [..., T]
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (Schulman et al. 2017, eq. 7), negated, with its usual companions.

    r = exp(clamp(logp - old, +-log_ratio_clamp)); term = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)), for A < 0
    at most -A dual_clip (Ye et al. 2020, eq. 5), times `weights`. loss = agg(term) - entropy_coef agg(H) + kl_coef
    agg(kl).
    """
    mask = _as_mask(mask, logprobs)

    def select(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0)

    token_weight = token_weights(
        mask,
        aggregation=aggregation,
        denominator=denominator,
        norm_length=norm_length,
        cu_seqlens=cu_seqlens,
        dtype=logprobs.dtype,
    )
    logp, old, adv = select(logprobs), select(old_logprobs), select(advantages)
    log_ratio = logp - old
    ratio = torch.exp(log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp))
    unclipped, clipped = -adv * ratio, -adv * ratio.clamp(1 - clip_low, 1 + clip_high)
    term = torch.maximum(unclipped, clipped)
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        bound = -adv * dual_clip
        dual_clipped = (adv < 0) & (term > bound)
        term = torch.where(adv < 0, torch.minimum(term, bound), term)
    if weights is not None:
        term = term * select(weights)

    count = mask.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return (select(x).sum() / count).detach()

    policy = (token_weight * term).sum()
    loss = policy
    stats = {
        "policy_loss": policy.detach(),
        "approx_kl": mean(ratio - 1 - log_ratio),
        "clip_fraction": mean((clipped > unclipped).to(logp.dtype)),
        "ratio_mean": mean(ratio),
        "ratio_max": select(ratio).amax().detach() if ratio.numel() else ratio.new_zeros(()),
    }
    if dual_clip is not None:
        stats["dual_clip_fraction"] = mean(dual_clipped.to(logp.dtype))
    if entropy is not None:
        h = select(entropy)
        loss = loss - entropy_coef * (token_weight * h).sum()
        stats["entropy"] = mean(h)
    if ref_logprobs is not None:
        kl = kl_estimate(logp, select(ref_logprobs), kind=kl_estimator, log_ratio_clamp=log_ratio_clamp)
        loss = loss + kl_coef * (token_weight * kl).sum()
        stats["ref_kl"] = mean(kl)
    return loss, stats


def value_loss(
    values: Tensor,  # [..., T]
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 max((v - R)^2, (old + clamp(v - old, +-clip) - R)^2): the value clipping of openai/baselines' ppo2."""
    mask = _as_mask(mask, values)
    token_weight = token_weights(
        mask,
        aggregation=aggregation,
        denominator=denominator,
        norm_length=norm_length,
        cu_seqlens=cu_seqlens,
        dtype=values.dtype,
    )
    v, target = torch.where(mask, values, 0), torch.where(mask, returns, 0)
    error = (v - target).square()
    stats = {}
    if clip is not None:
        if old_values is None:
            raise ValueError(f"a value clip of {clip} needs old_values, which is None")
        old = torch.where(mask, old_values, 0)
        clipped_error = (old + (v - old).clamp(-clip, clip) - target).square()
        clipped = ((clipped_error > error) & mask).to(v.dtype)
        stats["value_clip_fraction"] = clipped.sum() / mask.sum().clamp(min=1)
        error = torch.maximum(error, clipped_error)
    loss = (token_weight * 0.5 * error).sum()
    return loss, {"value_loss": loss.detach(), **stats}


def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor | None,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    value_coef: float = 0.5,
    value_clip: float | None = 0.2,
    value_mask: Tensor | None = None,
    **policy_options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """policy_loss + value_coef value_loss (Schulman et al. 2017, eq. 9); `value_mask` is `mask` if not given.

    Aggregation, denominator, norm_length and cu_seqlens are those of both terms.
    """
    shared = ("aggregation", "denominator", "norm_length", "cu_seqlens")
    policy, policy_stats = policy_loss(logprobs, old_logprobs, advantages, mask, **policy_options)
    value, value_stats = value_loss(
        values,
        old_values,
        returns,
        mask if value_mask is None else value_mask,
        clip=value_clip,
        **{name: policy_options[name] for name in shared if name in policy_options},
    )
    return policy + value_coef * value, policy_stats | value_stats


def gae(
    rewards: Tensor,  # [..., T]; [T, ...] if time_major; [total] with cu_seqlens
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,  # or one per row
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap: Tensor | None = None,  # one per row
    final_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    time_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), backwards in time; advantages and returns.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t. A masked step is skipped:
    the steps before and after it are treated as adjacent. terminated: V_{t+1} = 0 and A_{t+1} = 0. truncated:
    V_{t+1} = final_values_t and A_{t+1} = 0.
    """
    if cu_seqlens is not None:
        return _gae_packed(
            rewards, values, gamma, lam, mask, terminated, truncated, bootstrap, final_values, cu_seqlens
        )
    time = 0 if time_major else -1
    r, v = rewards.movedim(time, 0), values.movedim(time, 0)
    mask = _as_mask(mask, rewards).movedim(time, 0)
    never = torch.zeros_like(mask)
    ends = never if terminated is None else terminated.bool().movedim(time, 0)
    cuts = never if truncated is None else truncated.bool().movedim(time, 0) & ~ends
    final = torch.zeros_like(v) if final_values is None else final_values.movedim(time, 0)
    advantages, returns = torch.zeros_like(v), torch.zeros_like(v)
    trace = torch.zeros(v.shape[1:], dtype=v.dtype, device=v.device)
    next_value = trace if bootstrap is None else bootstrap.to(v.dtype)
    for t in reversed(range(len(v))):
        v_next = torch.where(ends[t], 0, torch.where(cuts[t], final[t], next_value))
        advantage = r[t] + gamma * v_next - v[t] + torch.where(ends[t] | cuts[t], 0, gamma * lam * trace)
        advantages[t] = torch.where(mask[t], advantage, 0)
        returns[t] = torch.where(mask[t], advantage + v[t], 0)
        trace = torch.where(mask[t], advantage, trace)
        next_value = torch.where(mask[t], v[t], next_value)
    return advantages.movedim(0, time), returns.movedim(0, time)


def _gae_packed(
    rewards: Tensor,
    values: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    bootstrap: Tensor | None,
    final_values: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for s in range(len(cu_seqlens) - 1):
        piece = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        advantages[piece], returns[piece] = gae(
            rewards[piece],
            values[piece],
            gamma=gamma[s] if isinstance(gamma, Tensor) and gamma.ndim else gamma,
            lam=lam[s] if isinstance(lam, Tensor) and lam.ndim else lam,
            bootstrap=None if bootstrap is None else bootstrap[s],
            mask=None if mask is None else mask[piece],
            terminated=None if terminated is None else terminated[piece],
            truncated=None if truncated is None else truncated[piece],
            final_values=None if final_values is None else final_values[piece],
        )
    return advantages, returns


def shape_rewards(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    reward_at: str = "last",
) -> tuple[Tensor, ...]:
    """r_t = -kl_coef kl_t + score at the last counted step (Ziegler et al. 2019; Stiennon et al. 2020, section 3.4).

    Scores [B, T] are added step by step. "after_last" puts a score [B] one slot later (at most T - 1) and also
    returns the mask extended by that slot.
    """
    mask = mask.bool()
    d = torch.where(mask, logprobs, 0), torch.where(mask, ref_logprobs, 0)
    kl = torch.where(mask, kl_estimate(*d, kind=kl_estimator), 0)
    score = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    rewards = -kl_coef * kl
    if scores.ndim == mask.ndim:
        return rewards + torch.where(mask, score, 0), kl
    T = mask.shape[-1]
    steps = torch.arange(T, device=mask.device)
    last = torch.where(mask, steps, -1).amax(-1, keepdim=True)
    slot = last if reward_at == "last" else torch.where(last >= 0, (last + 1).clamp(max=T - 1), -1)
    here = steps == slot
    rewards = torch.where(here, rewards + score.unsqueeze(-1), rewards)
    return (rewards, kl) if reward_at == "last" else (rewards, kl, mask | here)


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    min_std: float | Tensor = 0.0,
) -> Tensor:
    """(x - mean) / max(sqrt(var + eps), min_std) over the counted elements, 0 elsewhere.

    The mean stays unless `shift_mean`. One counted element or none: centred, not scaled.
    """
    mask = _as_mask(mask, x)
    kept = torch.where(mask, x, 0)
    count = mask.sum()
    mean = kept.sum() / count.clamp(min=1)
    squares = torch.where(mask, kept - mean, 0).square().sum()
    variance = squares / (count - int(unbiased)).clamp(min=1)
    largest = 1 / torch.as_tensor(min_std, dtype=variance.dtype, device=variance.device)  # without a floor: infinity
    scale = torch.where(count > 1, torch.minimum(torch.rsqrt(variance + eps), largest), 1)
    whitened = (kept - mean) * scale + (0 if shift_mean else mean)
    return torch.where(mask, whitened, 0)


def rlhf_advantages(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    reward_at: str = "last",
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    critic_lam: float | Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = True,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    min_std: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """shape_rewards, gae and masked_whiten in a row: advantages, returns, rewards, KL, and statistics.

    With "after_last" the score's slot counts as a step of gae and so has a return, but no token was chosen there: it is
    no part of the whitening, and its advantage is 0. score_mean and reward_mean: per sequence that has a counted step,
    scores before the clip, rewards summed over its steps. kl_mean: per counted token. return_mean: per step of gae.
    advantage_mean and advantage_std (unbiased or not, as asked): per counted token, before whitening.

    With critic_lam the returns are R_t = A_t^(critic_lam) + V_t, and the advantages stay those of lam: decoupled GAE
    (VC-PPO, Yuan et al. 2025, arXiv 2503.01491; VAPO, arXiv 2504.05118).
    """
    rewards, kl, *longer = shape_rewards(
        scores,
        logprobs,
        ref_logprobs,
        mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        score_clip=score_clip,
        reward_at=reward_at,
    )
    mask = mask.bool()
    steps = longer[0] if longer else mask
    raw, returns = gae(rewards, values, gamma=gamma, lam=lam, mask=steps, bootstrap=bootstrap)
    if critic_lam is not None:
        _, returns = gae(rewards, values, gamma=gamma, lam=critic_lam, mask=steps, bootstrap=bootstrap)
    raw = torch.where(mask, raw, 0)
    advantages = raw
    if whiten:
        advantages = masked_whiten(raw, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps, min_std=min_std)
    count, rows = mask.sum().clamp(min=1), mask.any(-1)
    mean = raw.sum() / count
    squares = torch.where(mask, raw - mean, 0).square().sum()
    score = torch.where(rows if scores.ndim == 1 else mask, scores, 0)
    stats = {
        "score_mean": score.sum() / rows.sum().clamp(min=1),
        "reward_mean": rewards.sum() / rows.sum().clamp(min=1),
        "kl_mean": kl.sum() / count,
        "return_mean": returns.sum() / steps.sum().clamp(min=1),
        "advantage_mean": mean,
        "advantage_std": (squares / (mask.sum() - int(unbiased)).clamp(min=1)).sqrt(),
    }
    return advantages, returns, rewards, kl, stats


def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...]
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """token_logprobs of linear_logits. Masked rows of `hidden` are zeroed before the product: 0 * NaN is NaN."""
    mask = _as_mask(mask, tokens)
    kept = torch.where(mask.unsqueeze(-1), hidden, 0)
    logits = linear_logits(kept, weight, bias, softcap=softcap, logit_scale=logit_scale)
    return token_logprobs(logits, tokens, mask, temperature=temperature, with_entropy=with_entropy)


def linear_ppo_loss(
    hidden: Tensor,  # [..., T, D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [..., T]
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **policy_options,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """policy_loss of linear_logprobs: loss, statistics, and per token log-probability and entropy, detached.

    old_logprobs=None: the log-probabilities themselves, detached, so that every ratio is 1.
    """
    logprobs, entropy = linear_logprobs(
        hidden,
        weight,
        tokens,
        mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        with_entropy=True,
    )
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    loss, stats = policy_loss(logprobs, old, advantages, mask, entropy=entropy, **policy_options)
    return loss, stats, logprobs.detach(), entropy.detach()
