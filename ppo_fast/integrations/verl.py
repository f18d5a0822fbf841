"""verl: its PPO arithmetic by ppo_fast, instead of verl's own functions, or as a plug-in by name.

verl imports the modules that VERL_USE_EXTERNAL_MODULES names in every process (pass the variable to Ray's workers,
in runtime_env.env_vars):

    VERL_USE_EXTERNAL_MODULES=ppo_fast.integrations.verl_everywhere   all functions below replace verl's
    VERL_USE_EXTERNAL_MODULES=ppo_fast.integrations.verl              only registers names, for
        actor_rollout_ref.actor.policy_loss.loss_mode=ppo_fast

Importing this module registers the policy loss "ppo_fast" and the advantage estimator "gae_ppo_fast". verl 0.9 passes
values to its own estimator "gae" only: for GAE keep algorithm.adv_estimator=gae and use the first line, or `patch()`.

Tested with verl 0.9. Where verl leaves numbers at masked positions, which it masks later, these return 0, and no
value at a masked position, NaN included, reaches a result.
"""

from collections.abc import Mapping
from typing import Literal, Protocol, TypedDict, get_args

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.integrations._patch import Patch, peer

TESTED = ("0.9.",)
_core = peer("verl", "verl.trainer.ppo.core_algos", TESTED)
_functional = peer("verl", "verl.utils.torch_functional", TESTED)
_Mode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
_MODES: dict[str, _Mode] = {mode: mode for mode in get_args(_Mode)}


class _BatchInfo(TypedDict, total=False):
    """Sizes of the batch over all ranks."""

    dp_size: int
    batch_num_tokens: float | Tensor | None
    global_batch_size: float | Tensor | None
    loss_scale_factor: float | None


class _ActorConfig(Protocol):
    """The options of verl's ActorConfig that the policy loss reads."""

    clip_ratio: float
    clip_ratio_low: float | None
    clip_ratio_high: float | None
    global_batch_info: _BatchInfo

    def get(self, key: str, default: float) -> float | None: ...


class _Options(TypedDict, total=False):
    """Options of our losses."""

    aggregation: _Mode
    denominator: float
    norm_length: float


def _discount(name: str, given: float | Tensor | None, config: Mapping[str, float] | None) -> float | Tensor:
    if given is not None:
        return given
    if config is None:
        raise ValueError(f"compute_gae_advantage_return needs {name}, or verl's algorithm config")
    return config[name]


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor | None = None,
    response_mask: Tensor | None = None,
    gamma: float | Tensor | None = None,
    lam: float | Tensor | None = None,
    *,
    config: Mapping[str, float] | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns, [B, T] each; steps that the mask leaves out are skipped.

    Args:
        token_level_rewards, values, response_mask: [B, T].
        gamma, lam: discount per token, and lambda of GAE; config's, if they are not given. Other arguments that
            verl passes to every estimator are not needed.

    Raises:
        ValueError: fewer than two steps count, as in verl; or there are no values, no mask, or no gamma or lam.
    """
    if values is None or response_mask is None:
        raise ValueError(
            "verl hands values to its own estimator only: set algorithm.adv_estimator=gae, and have it computed here by"
            " ppo_fast.integrations.verl.patch() or VERL_USE_EXTERNAL_MODULES=ppo_fast.integrations.verl_everywhere"
        )
    gamma, lam = _discount("gamma", gamma, config), _discount("lam", lam, config)
    with torch.no_grad():
        advantages, returns = ppo.gae(token_level_rewards, values, gamma=gamma, lam=lam, mask=response_mask)
        return masked_whiten(advantages, response_mask), returns


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over the mask.

    Raises:
        ValueError: fewer than two elements count, as in verl.
    """
    counted = int(mask.sum())
    if counted < 2:
        raise ValueError(f"whitening needs two elements or more in the mask, which has {counted}")
    return ppo.masked_whiten(values, mask, shift_mean=shift_mean)


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: _ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's clipped policy loss with its dual clip, and its three metrics.

    Args:
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights: [B, T].
        loss_agg_mode: as `agg_loss`.
        config: an ActorConfig: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, global_batch_info.
    """
    if config is None:
        raise ValueError("compute_policy_loss_vanilla needs verl's actor config")
    low = config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio
    high = config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio
    factor, options = _aggregation(loss_agg_mode, response_mask, **config.global_batch_info)
    out = ppo.policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        clip_low=low,
        clip_high=high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        ref_logprobs=old_log_prob.detach(),  # with weight 0: its k1 is verl's ppo_kl, with the other sign
        kl_coef=0.0,
        kl_estimator="k1",
        weights=rollout_is_weights,
        **options,
    )
    names = {
        "actor/pg_clipfrac": "clip_fraction",
        "actor/ppo_kl": "ref_kl",
        "actor/pg_clipfrac_lower": "dual_clip_fraction",
    }
    numbers = torch.stack([out.stats[name].float() for name in names.values()]).tolist()  # one wait for the GPU
    metrics = dict(zip(names, numbers, strict=True))
    metrics["actor/ppo_kl"] *= -1
    return out.loss * factor, metrics


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's clipped value loss, and the share of tokens whose clipped error is the larger. [B, T] each."""
    factor, options = _aggregation(
        loss_agg_mode, response_mask, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    out = ppo.value_loss(vpreds, values, returns, response_mask, clip=cliprange_value, **options)
    return out.loss * factor, out.stats["value_clip_fraction"]


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """A matrix [B, T] of losses as one number, in verl's five ways."""
    factor, options = _aggregation(
        loss_agg_mode, loss_mask, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    counted = torch.where(loss_mask.bool(), loss_mat, 0) * loss_mask
    if loss_agg_mode in ("token-mean", "token-sum"):
        total, count = counted.sum(), loss_mask.sum()
    else:
        tokens = loss_mask.sum(-1)
        rows = counted.sum(-1)
        if loss_agg_mode == "seq-mean-token-mean":
            rows = rows / (tokens + 1e-8)
        elif loss_agg_mode == "seq-mean-token-sum-norm":
            rows = rows / options["norm_length"]
        total, count = rows.sum(), (tokens > 0).sum()
    if loss_agg_mode == "token-sum":
        return total * factor
    return total / options.get("denominator", count)


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[float, _Options]:
    """A factor of the loss, and our options that mean the same. verl's ranks average, so it multiplies by dp_size."""
    if mode not in _MODES:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    options: _Options = {"aggregation": _MODES[mode]}
    if mode == "token-sum":
        return float(dp_size), options
    name, count = (
        ("batch_num_tokens", batch_num_tokens) if mode == "token-mean" else ("global_batch_size", global_batch_size)
    )
    if count is None and dp_size > 1:
        raise ValueError(f"(global) {name} is required when dp_size > 1")
    if count is not None:
        options["denominator"] = float(count) / dp_size
    if mode == "seq-mean-token-sum-norm":
        options["norm_length"] = float(mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return 1.0, options


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """verl's KL per token: k1 (kl), abs, k2 (mse) or k3 (low_var_kl, capped at 10); with a + the gradient is k2's."""
    name = kl_penalty.removesuffix("+")
    d = logprob - ref_logprob
    if name in ("k1", "kl"):
        value = d
    elif name == "abs":
        value = d.abs()
    elif name in ("k2", "mse"):
        return 0.5 * d.square()
    elif name in ("k3", "low_var_kl"):
        e = (-d).clamp(-20, 20)
        value = (torch.expm1(e) - e).clamp(-10, 10)
    else:
        raise NotImplementedError(f"kl_penalty {kl_penalty!r} is not one of verl's k1, abs, k2, k3")
    if not kl_penalty.endswith("+"):
        return value
    gradient = 0.5 * d.square()
    return gradient - gradient.detach() + value.detach()


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities of labels [...] under logits [..., V], in fp32.

    `inplace_backward`: the gradient overwrites the logits, as verl's own does with flash-attn; not those of a leaf.
    """
    found = ppo.token_logprobs(logits, labels, inplace_backward=inplace_backward and not logits.is_leaf)
    assert isinstance(found, Tensor)
    return found


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy [...] of softmax(logits [..., V]), in nats."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return ppo.token_logprobs(logits, index, with_entropy=True)[1]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: object = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] from hidden states [..., D] and the LM head [V, D], without the logits.

    Raises:
        NotImplementedError: the vocabulary is spread over processes, or another reduction than none.
    """
    if dist_process_group is not None or reduction != "none":
        raise NotImplementedError("ppo_fast has linear_cross_entropy for one process and reduction='none' only")
    found = ppo.linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature, with_entropy=True
    )
    return found[0], found[1]


def register() -> None:
    """Make gae_ppo_fast an advantage estimator of verl, and ppo_fast a policy loss."""
    _core.register_adv_est("gae_ppo_fast")(compute_gae_advantage_return)
    if "ppo_fast" not in _core.POLICY_LOSS_REGISTRY:
        _core.register_policy_loss("ppo_fast")(compute_policy_loss_vanilla)


_patch = Patch(
    "verl",
    {
        **{
            f"verl.trainer.ppo.core_algos:{f.__name__}": f
            for f in (
                compute_gae_advantage_return,
                compute_policy_loss_vanilla,
                compute_value_loss,
                agg_loss,
                kl_penalty,
            )
        },
        **{
            f"verl.utils.torch_functional:{f.__name__}": f
            for f in (masked_whiten, logprobs_from_logits, entropy_from_logits)
        },
    },
)


def patch(*, quiet: bool = False) -> Patch:
    """Replace verl's functions, also those in its registries, by these; also for `with patch(): ...`.

    Raises:
        RuntimeError: it is patched already.
    """
    return _patch.apply(quiet=quiet)


def unpatch() -> None:
    """Restore verl's functions."""
    _patch.undo()


register()
