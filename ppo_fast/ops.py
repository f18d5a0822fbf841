"""The public operations of ppo_fast: each checks its arguments and calls one backend.

Shared by all: B sequences, T steps, V vocabulary, N tokens, S packed sequences. `mask` is True where a step counts,
and the value at a masked position never reaches a result, not even NaN. Inputs are fp16, bf16, fp32 (the torch backend
also takes fp64) with any strides; arithmetic and results are fp32 (fp64 for fp64), gradients come back in the input's
dtype. `backend` is "auto" (Triton for CUDA tensors, PyTorch elsewhere), "triton" or "torch". No operation waits for
the device, except that linear_logprobs and linear_ppo_loss wait for the count of a mask unless num_counted gives it.

Unusual tensors: a pending negation and efficient zeros are written out first. Under make_fx and FakeTensorMode "auto"
is the torch backend, and "triton" raises an error. torch.jit.trace, transforms of torch.func (vmap, grad, jvp,
functionalize), forward-mode AD, DTensors, and options that require a gradient raise an error.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ppo_fast import checks
from ppo_fast.kernels import eager_advantages, eager_linear, eager_logprobs, eager_loss, memory

Backend = Literal["auto", "triton", "torch"]
Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "k2", "k3", "abs"]

_AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
_KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
_HAS_TRITON = find_spec("triton") is not None
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class LossOutput(NamedTuple):
    """What the losses return: `loss`, a scalar that carries the graph, and `stats`, detached scalars on the device."""

    loss: Tensor
    stats: dict[str, Tensor]


class LinearLossOutput(NamedTuple):
    """What `linear_ppo_loss` returns: a `LossOutput`, and per token the detached `logprobs` and `entropy`."""

    loss: Tensor
    stats: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor


class AdvantageOutput(NamedTuple):
    """What `rlhf_advantages` returns: four tensors [B, T], zero at masked steps, and detached scalars on the device."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor
    stats: dict[str, Tensor]


def uses_triton(backend: Backend, first: Tensor, *others: Tensor | None) -> bool:
    """True if `backend` means the Triton kernels for these tensors; raises an error where it cannot."""
    if backend == "torch" or (backend == "auto" and not (first.is_cuda and _HAS_TRITON)):
        return False
    checks.one_of("backend", backend, ("auto", "triton", "torch"))
    double = first.dtype is torch.float64
    for x in others:
        double = double or (x is not None and x.dtype is torch.float64)
    traced = memory.traced(first, *others)
    if backend == "auto":
        return not double and not traced
    if not _HAS_TRITON:
        raise RuntimeError("backend='triton' needs the triton package, which is not installed; use backend='torch'")
    if double:
        raise TypeError("backend='triton' computes in fp32 and takes no fp64 tensors; use backend='torch'")
    if traced:
        raise RuntimeError(
            "backend='triton' cannot run under make_fx or FakeTensorMode, which do not record the launch of a kernel;"
            " use backend='torch', or torch.compile"
        )
    if not first.is_cuda:
        from ppo_fast.kernels import launch

        if not launch.interpreting():
            raise RuntimeError(
                f"backend='triton' needs CUDA tensors, got {first.device}; use backend='torch', or set"
                " TRITON_INTERPRET=1 before the first import to run the kernels slowly on a CPU"
            )
    return True


def _operation(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A public operation, which receives plain tensors: see `checks.resolved`."""

    @functools.wraps(function)
    def operation(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            checks.compiled(function.__name__, kwargs)
        elif not checks.ordinary(args, kwargs):
            bound = checks.resolved(function, args, kwargs)
            return function(*bound.args, **bound.kwargs)
        return function(*args, **kwargs)

    return operation


@_operation
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token under softmax(logits / temperature), and on request the entropy of that softmax.

    With z = logits / temperature: logp = z[token] - logsumexp(z) and H = logsumexp(z) - sum_j p_j z_j, where a term
    with p_j = 0 adds nothing, so that -inf logits (a masked vocabulary) are fine. Both come from one read of the
    logits; the backward pass reads them once more and writes their gradient.

    Args:
        logits: [..., V], any strides.
        tokens: [...], int32 or int64, of any value at masked positions.
        mask: [...], True where a token counts; the others get 0 and a zero gradient.
        temperature: the sampling temperature, greater than 0.
        with_entropy: also return the entropy, in nats; both can be differentiated.
        inplace_backward: write the gradient over the logits' own memory. It saves one [..., V] tensor; the logits are
            lost, and a second backward pass raises.

    Returns:
        logp [...], or (logp, entropy), fp32 (fp64 for fp64 logits), 0 where masked.

    Raises:
        IndexError: a counted token lies outside [0, V) (on a CPU; on a GPU its row becomes NaN).

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0]])
    >>> logp, entropy = token_logprobs(logits, torch.tensor([1, 2]), with_entropy=True)
    >>> [round(x, 4) for x in logp.tolist() + entropy.tolist()]
    [-0.6931, -0.4076, 0.6931, 0.8324]
    """
    checks.floating("logits", logits)
    shape = logits.shape
    if not shape or not shape[-1]:
        raise ValueError(f"logits must have shape [..., V] with V > 0, got {tuple(shape)}")
    rows, place = shape[:-1], logits.device
    mask = checks.flag("mask", mask, rows, place, "logits without its last dimension")
    checks.token_ids(tokens, mask, rows, place, "logits without its last dimension", shape[-1])
    checks.temperature(temperature)
    kernel = eager_logprobs
    if uses_triton(backend, logits):
        from ppo_fast.kernels import logprobs as kernel  # type: ignore[no-redef]
    return kernel.token_logprobs(
        logits, tokens, mask, temperature=temperature, with_entropy=with_entropy, inplace_backward=inplace_backward
    )


@_operation
def policy_loss(
    logprobs: Tensor,
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
    kl_estimator: KLEstimator = "k2",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """PPO's clipped surrogate objective, negated (Schulman et al. 2017, "Proximal Policy Optimization", eq. 7).

    r = exp(clamp(logp - old_logp, +-log_ratio_clamp)); term = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)).
    loss = agg(weights term) - entropy_coef agg(entropy) + kl_coef agg(kl). The paper maximises min(...); we minimise
    its negative, and allow two clip ranges (Yu et al. 2025, DAPO) and a second bound for A < 0 (Ye et al. 2020, eq. 5).

    Args:
        logprobs, old_logprobs, advantages: [..., T] (or [total] with cu_seqlens). Gradients flow to logprobs and
        entropy. mask: the same shape, True where a token counts.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1; where A < 0 the term is at most -c A.
        log_ratio_clamp: bound of every exponent, in nats.
        entropy, entropy_coef: bonus for a policy that stays random; entropy [..., T] in nats.
        ref_logprobs, kl_coef, kl_estimator: penalty for leaving a reference, with d = logp - ref: k1 = d, k2 = d^2/2,
            k3 = exp(-d) - 1 + d, abs = |d|. As a loss only k2 has the gradient of the true KL; k1's has mean 0.
        weights: [..., T] factors of the term, for instance a truncated importance correction for the sampler.
        aggregation: token-mean, token-sum, seq-mean-token-sum, seq-mean-token-mean, or seq-mean-token-sum-norm (which
            divides each sequence's sum by norm_length, default T). Sequences without a counted token do not count.
        denominator: replaces the number of tokens (token-mean) or sequences (seq-mean-*), so that the loss does not
            depend on how a batch is cut into micro-batches or over ranks.
        cu_seqlens: [S + 1] boundaries of packed sequences.

    Returns:
        loss, and stats: policy_loss, approx_kl = mean(r - 1 - log r), clip_fraction, ratio_mean, ratio_max, and where
        their inputs are given entropy, ref_kl, dual_clip_fraction. Means are over the counted tokens of this call.

    >>> out = policy_loss(torch.tensor([0.0, 0.5]), torch.zeros(2), torch.tensor([1.0, 1.0]))
    >>> round(out.loss.item(), 4), out.stats["clip_fraction"].item()  # -(1 + 1.2) / 2: the second ratio is clipped
    (-1.1, 0.5)
    """
    checks.floating("logprobs", logprobs)
    _check_policy(logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights, entropy_coef, kl_coef)
    check_policy_options(clip_low, clip_high, dual_clip, log_ratio_clamp, kl_estimator)
    check_aggregation(logprobs, "logprobs", aggregation, denominator, norm_length, cu_seqlens)
    mask = checks.flag("mask", mask, logprobs.shape, logprobs.device, "logprobs")
    kernel = eager_loss
    if uses_triton(backend, logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights):
        from ppo_fast.kernels import loss as kernel  # type: ignore[no-redef]
    loss, stats = kernel.policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
        entropy=entropy,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        weights=weights,
        aggregation=aggregation,
        denominator=denominator,
        norm_length=norm_length,
        cu_seqlens=cu_seqlens,
    )
    return LossOutput(loss, stats)


def _check_policy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    entropy_coef: float,
    kl_coef: float,
) -> None:
    """Checks the tensors of the policy loss, and that bonus and penalty have what they need."""
    same = logprobs.shape, logprobs.dtype, logprobs.device
    given = old_logprobs is not None and advantages is not None
    if not given or not checks.alike(*same, old_logprobs, advantages, entropy, ref_logprobs, weights):
        checks.matching("old_logprobs", old_logprobs, logprobs, "logprobs")
        checks.matching("advantages", advantages, logprobs, "logprobs")
        for name, x in (("entropy", entropy), ("ref_logprobs", ref_logprobs), ("weights", weights)):
            if x is not None:
                checks.matching(name, x, logprobs, "logprobs")
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy, which was not given")
    if ref_logprobs is None and kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs, which was not given")


def check_policy_options(
    clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float, kl_estimator: str
) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must lie in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        checks.not_negative("clip_high", clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}")
    if not log_ratio_clamp > 0:
        checks.positive("log_ratio_clamp", log_ratio_clamp)
    if kl_estimator not in _KL_ESTIMATORS:
        checks.one_of("kl_estimator", kl_estimator, _KL_ESTIMATORS)


def check_aggregation(
    x: Tensor,
    name: str,
    aggregation: str,
    denominator: float | Tensor | None,
    norm_length: float | None,
    cu_seqlens: Tensor | None,
) -> None:
    if aggregation not in _AGGREGATIONS:
        checks.one_of("aggregation", aggregation, _AGGREGATIONS)
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, x, name)
    if denominator is not None:
        checks.denominator(denominator, aggregation, x)
    if norm_length is not None:
        checks.positive("norm_length", norm_length)
        if aggregation != "seq-mean-token-sum-norm":
            raise ValueError(f"norm_length belongs to aggregation='seq-mean-token-sum-norm', got {aggregation!r}")
    elif aggregation == "seq-mean-token-sum-norm" and cu_seqlens is not None:
        raise ValueError("aggregation='seq-mean-token-sum-norm' needs norm_length when cu_seqlens is given")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")


@_operation
def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """The clipped squared error of the critic: 0.5 max((v - R)^2, (old_v + clamp(v - old_v, +-clip) - R)^2).

    With clip=None it is 0.5 (v - R)^2 and old_values may be None. The clipping is that of openai/baselines' ppo2
    (Engstrom et al. 2020, "Implementation Matters", section 3); the paper has the plain square.

    Args:
        values, old_values, returns: [..., T] (or [total] with cu_seqlens). Gradients flow to values.
        mask: the same shape, True where a step counts.
        clip: how far a value may move from old_values before its gradient stops, in units of the return.
        aggregation, denominator, norm_length, cu_seqlens: as in `policy_loss`.

    Returns:
        loss, and stats: value_loss, and with a clip value_clip_fraction.

    >>> loss = value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0])).loss  # 0.5 (0.2 - 2)^2
    >>> round(loss.item(), 4)
    1.62
    """
    checks.floating("values", values)
    _check_value(values, old_values, returns, clip)
    check_aggregation(values, "values", aggregation, denominator, norm_length, cu_seqlens)
    mask = checks.flag("mask", mask, values.shape, values.device, "values")
    kernel = eager_loss
    if uses_triton(backend, values, old_values, returns):
        from ppo_fast.kernels import loss as kernel  # type: ignore[no-redef]
    loss, stats = kernel.value_loss(
        values,
        old_values,
        returns,
        mask,
        clip=clip,
        aggregation=aggregation,
        denominator=denominator,
        norm_length=norm_length,
        cu_seqlens=cu_seqlens,
    )
    return LossOutput(loss, stats)


def _check_value(values: Tensor, old_values: Tensor | None, returns: Tensor, clip: float | None) -> None:
    if returns is None or not checks.alike(values.shape, values.dtype, values.device, returns, old_values):
        checks.matching("returns", returns, values, "values")
        if old_values is not None:
            checks.matching("old_values", old_values, values, "values")
    if clip is not None:
        if not clip >= 0:
            checks.not_negative("the value clip", clip)
        if old_values is None:
            raise ValueError(f"a value clip of {clip} needs old_values, which is None")


@_operation
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
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k2",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """Policy and value loss together (Schulman et al. 2017, eq. 9): policy_loss + value_coef value_loss.

    One pass computes the loss, its statistics and all gradients; the backward pass only scales them.

    Args:
        logprobs, old_logprobs, advantages: as in `policy_loss`; the options are those of `policy_loss`.
        values, old_values, returns: as in `value_loss`.
        value_coef: weight of the value loss (c1 in the paper). The entropy bonus is entropy_coef (c2).
        value_clip: `clip` of `value_loss`.
        value_mask: True where a value counts; `mask` if not given. Shape as `mask`. A `denominator` replaces both
        counts.

    Returns:
        loss, and the stats of both losses.

    >>> one = torch.ones(1, 3)
    >>> out = ppo_loss(0 * one, one, 0 * one, one, advantages=one, returns=one, mask=torch.ones(1, 3, dtype=torch.bool))
    >>> out.loss.item(), out.stats["ratio_mean"].item()
    (-1.0, 1.0)
    """
    checks.floating("logprobs", logprobs)
    _check_policy(logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights, entropy_coef, kl_coef)
    check_policy_options(clip_low, clip_high, dual_clip, log_ratio_clamp, kl_estimator)
    check_aggregation(logprobs, "logprobs", aggregation, denominator, norm_length, cu_seqlens)
    mask = checks.flag("mask", mask, logprobs.shape, logprobs.device, "logprobs")
    if not checks.alike(logprobs.shape, logprobs.dtype, logprobs.device, values):
        checks.matching("values", values, logprobs, "logprobs")
    _check_value(values, old_values, returns, value_clip)
    if value_mask is not None:
        value_mask = checks.flag("value_mask", value_mask, values.shape, values.device, "values")
    others = (values, old_logprobs, old_values, advantages, returns, entropy, ref_logprobs, weights)
    kernel = eager_loss
    if uses_triton(backend, logprobs, *others):
        from ppo_fast.kernels import loss as kernel  # type: ignore[no-redef]
    loss, stats = kernel.ppo_loss(
        logprobs,
        values,
        old_logprobs,
        old_values,
        advantages,
        returns,
        mask,
        value_coef=value_coef,
        value_clip=value_clip,
        value_mask=value_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
        entropy=entropy,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        weights=weights,
        aggregation=aggregation,
        denominator=denominator,
        norm_length=norm_length,
        cu_seqlens=cu_seqlens,
    )
    return LossOutput(loss, stats)


@_operation
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    final_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    time_major: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t. r_t is the reward for the
    action taken at step t (the paper's r_t; Gymnasium returns it from the step that follows).

    Args:
        rewards, values: [..., T]; [T, N] if time_major, read in place; [total] with cu_seqlens.
        gamma, lam: floats in [0, 1], or tensors with one for each row ([B], [N] or [S]).
        mask: True where a step counts. A masked step is skipped and returns 0: the steps before and after it are
            treated as adjacent.
        terminated: the episode ended in this step: V_{t+1} is 0 and the trace is cut.
        truncated: the episode was cut here, but would have gone on: V_{t+1} is final_values_t and the trace is cut.
        bootstrap: one value for each row, V of the state after its last counted step; 0 if not given.
        final_values: V of the observation before each reset, the shape of rewards; needed with truncated.
        cu_seqlens: [S + 1] boundaries of packed sequences.
        time_major: the first dimension is time.

    Returns:
        (advantages, returns), the shape of rewards, fp32 (fp64), without a graph.

    >>> advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]]), gamma=1.0, lam=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([[0.5, 0.5, 0.5]], [[1.0, 1.0, 1.0]])
    """
    checks.floating("rewards", rewards)
    shape, place = rewards.shape, rewards.device
    if not shape:
        raise ValueError("rewards must have at least one dimension, got a scalar")
    if values is None or not checks.alike(shape, rewards.dtype, place, values, final_values):
        checks.matching("values", values, rewards, "rewards")
        if final_values is not None:
            checks.matching("final_values", final_values, rewards, "rewards")
    rows: tuple[int, ...] = shape[1:] if time_major else shape[:-1]
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, rewards, "rewards")
        if time_major:
            raise ValueError("time_major and cu_seqlens exclude each other: packed tensors have one dimension")
        rows = (cu_seqlens.shape[0] - 1,)
    if isinstance(gamma, Tensor) or not 0 <= gamma <= 1:
        checks.discount("gamma", gamma, rows, place)
    if isinstance(lam, Tensor) or not 0 <= lam <= 1:
        checks.discount("lam", lam, rows, place)
    if mask is not None:
        mask = checks.flag("mask", mask, shape, place, "rewards")
    if terminated is not None:
        terminated = checks.flag("terminated", terminated, shape, place, "rewards")
    if truncated is not None:
        truncated = checks.flag("truncated", truncated, shape, place, "rewards")
        if final_values is None:
            raise ValueError("truncated needs final_values, the values of the observations before each reset")
    if bootstrap is not None:
        checks.floating("bootstrap", bootstrap)
        checks.shape("bootstrap", bootstrap, rows, "the rows")
        checks.device("bootstrap", bootstrap, place, "rewards")
    kernel = eager_advantages
    if uses_triton(backend, rewards, values, bootstrap, final_values):
        from ppo_fast.kernels import gae as kernel  # type: ignore[no-redef]
    return kernel.gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        mask=mask,
        terminated=terminated,
        truncated=truncated,
        bootstrap=bootstrap,
        final_values=final_values,
        cu_seqlens=cu_seqlens,
        time_major=time_major,
    )


def _check_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_estimator: str,
    score_clip: float | None,
    reward_at: str,
) -> Tensor:
    """Checks what turns scores into rewards; the mask as bool."""
    checks.floating("logprobs", logprobs)
    shape, place = logprobs.shape, logprobs.device
    if len(shape) != 2:
        raise ValueError(f"logprobs must have shape [B, T], got {tuple(shape)}")
    if ref_logprobs is None or not checks.alike(shape, logprobs.dtype, place, ref_logprobs):
        checks.matching("ref_logprobs", ref_logprobs, logprobs, "logprobs")
    checks.floating("scores", scores)
    if scores.shape != shape[:1] and scores.shape != shape:
        raise ValueError(
            f"scores must have shape [B] or [B, T] with [B, T] = {tuple(shape)}; got {tuple(scores.shape)}"
        )
    if scores.device != place:
        checks.device("scores", scores, place, "logprobs")
    if kl_estimator not in _KL_ESTIMATORS:
        checks.one_of("kl_estimator", kl_estimator, _KL_ESTIMATORS)
    if reward_at not in ("last", "after_last"):
        checks.one_of("reward_at", reward_at, ("last", "after_last"))
    if reward_at == "after_last" and scores.ndim == 2:
        raise ValueError("reward_at='after_last' needs one score for each sequence, got scores [B, T]")
    if score_clip is not None:
        checks.not_negative("score_clip", score_clip)
    counted = checks.flag("mask", mask, shape, place, "logprobs")
    if counted is None:
        raise TypeError("mask must be a bool tensor [B, T], got None")
    return counted


@_operation
def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: KLEstimator = "k1",
    score_clip: float | None = None,
    reward_at: Literal["last", "after_last"] = "last",
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """Rewards of RLHF: -kl_coef kl_t at every counted token, plus the score at the last one.

    The KL-shaped reward of Ziegler et al. 2019 and Stiennon et al. 2020 (section 3.4), token by token.

    Args:
        scores: [B], one for each answer, or [B, T], one for each token.
        logprobs, ref_logprobs: [B, T] of the policy that sampled, and of the reference.
        mask: [B, T], True at the answer's tokens.
        kl_coef, kl_estimator: weight and estimator of the KL, as in `policy_loss`.
        score_clip: scores are clamped to +-score_clip first.
        reward_at: "last" puts the score at the last counted token; "after_last" one slot later (at most T - 1), where
            OpenAI's code and TRL's have it, and then also returns the mask with that slot, for `gae`.

    Returns:
        (rewards [B, T], kl [B, T]) and, for "after_last", the longer mask; no graph.

    >>> mask = torch.tensor([[True, True, False]])
    >>> rewards, kl = shape_rewards(torch.tensor([1.0]), torch.zeros(1, 3), torch.zeros(1, 3), mask)
    >>> (rewards + 0.0).tolist()
    [[0.0, 1.0, 0.0]]
    """
    mask = _check_rewards(scores, logprobs, ref_logprobs, mask, kl_estimator, score_clip, reward_at)
    kernel = eager_advantages
    if uses_triton(backend, scores, logprobs, ref_logprobs):
        from ppo_fast.kernels import advantages as kernel  # type: ignore[no-redef]

    return kernel.shape_rewards(
        scores,
        logprobs,
        ref_logprobs,
        mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        score_clip=score_clip,
        reward_at=reward_at,
    )


@_operation
def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: torch.distributed.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the counted elements, 0 elsewhere.

    One counted element, or none: centred, not scaled. With `group`, mean and variance are those of all ranks'
    elements, merged in rank order (Chan et al. 1979), so that the result does not depend on how a batch is spread.

    Args:
        x: any shape. mask: the same shape, True where an element counts.
        shift_mean: False keeps the mean and only scales the spread.
        unbiased: Bessel's correction, n - 1.
        eps: added to the variance.
        group: a torch.distributed process group; None for this process alone.

    >>> masked_whiten(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])).tolist()
    [-0.7071067690849304, 0.7071067690849304, 0.0]
    """
    checks.floating("x", x)
    mask = checks.flag("mask", mask, x.shape, x.device, "x")
    if not eps >= 0:
        checks.not_negative("eps", eps)
    kernel = eager_advantages
    if uses_triton(backend, x):
        from ppo_fast.kernels import advantages as kernel  # type: ignore[no-redef]

    return kernel.masked_whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps, group=group)


@_operation
def rlhf_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: KLEstimator = "k1",
    score_clip: float | None = None,
    reward_at: Literal["last", "after_last"] = "last",
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    whiten: bool = True,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: torch.distributed.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> AdvantageOutput:
    """From scores to whitened advantages: `shape_rewards`, `gae` and `masked_whiten` in a row.

    With "after_last" the score's slot is a step of gae and has a return, but no token was chosen there: its advantage
    is 0 and it takes no part in the whitening.

    Args:
        scores, logprobs, ref_logprobs, mask, kl_coef, kl_estimator, score_clip, reward_at: as in `shape_rewards`.
        values: [B, T]. gamma, lam, bootstrap: as in `gae`.
        whiten: False leaves the advantages as they are. shift_mean, unbiased, eps, group: as in `masked_whiten`.

    Returns:
        advantages, returns, rewards, kl, and stats: score_mean and reward_mean per sequence, kl_mean per token,
        return_mean, and advantage_mean and advantage_std before whitening.

    >>> one = torch.ones(2, 3)
    >>> out = rlhf_advantages(torch.tensor([1.0, 2.0]), -one, -one, 0 * one, one, gamma=1.0, lam=1.0, whiten=False)
    >>> out.advantages.tolist(), out.stats["score_mean"].item()
    ([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], 1.5)
    """
    counted = _check_rewards(scores, logprobs, ref_logprobs, mask, kl_estimator, score_clip, reward_at)
    checks.matching("values", values, logprobs, "logprobs")
    rows, place = scores.shape[:1], scores.device
    if isinstance(gamma, Tensor) or not 0 <= gamma <= 1:
        checks.discount("gamma", gamma, rows, place)
    if isinstance(lam, Tensor) or not 0 <= lam <= 1:
        checks.discount("lam", lam, rows, place)
    if bootstrap is not None:
        checks.floating("bootstrap", bootstrap)
        checks.shape("bootstrap", bootstrap, rows, "the rows")
        checks.device("bootstrap", bootstrap, place, "logprobs")
    if not eps >= 0:
        checks.not_negative("eps", eps)
    kernel = eager_advantages
    if uses_triton(backend, scores, logprobs, ref_logprobs, values, bootstrap):
        from ppo_fast.kernels import advantages as kernel  # type: ignore[no-redef]
    return AdvantageOutput(
        *kernel.rlhf_advantages(
            scores,
            logprobs,
            ref_logprobs,
            values,
            counted,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            score_clip=score_clip,
            reward_at=reward_at,
            gamma=gamma,
            lam=lam,
            bootstrap=bootstrap,
            whiten=whiten,
            shift_mean=shift_mean,
            unbiased=unbiased,
            eps=eps,
            group=group,
        )
    )


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    logits_dtype: torch.dtype | None,
    num_counted: int | None,
) -> Tensor | None:
    """Checks what the operations on hidden states share; the mask as bool."""
    checks.floating("hidden", hidden)
    checks.floating("weight", weight)
    shape, head = hidden.shape, weight.shape
    if not shape or len(head) != 2 or head[1] != shape[-1] or not head[0]:
        raise ValueError(
            f"hidden must have shape [..., D] and weight [V, D] with V > 0, got {tuple(shape)} and {tuple(head)}"
        )
    if hidden.dtype is not weight.dtype:
        raise TypeError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    place = hidden.device
    if weight.device != place:
        checks.device("weight", weight, place, "hidden")
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, head[:1], "weight's rows")
        checks.device("bias", bias, place, "hidden")
    rows = shape[:-1]
    mask = checks.flag("mask", mask, rows, place, "hidden without its last dimension")
    checks.token_ids(tokens, mask, rows, place, "hidden without its last dimension", head[0])
    checks.temperature(temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    if not logit_scale > 0:
        checks.positive("logit_scale", logit_scale)
    if chunk_bytes is not None:
        checks.positive("chunk_bytes", chunk_bytes)
    if logits_dtype is not None and logits_dtype not in (torch.float32, hidden.dtype):
        raise ValueError(
            f"logits_dtype must be torch.float32 or the dtype of hidden, {hidden.dtype}; got {logits_dtype}"
        )
    if mask is not None and memory.traced(hidden, mask):
        raise NotImplementedError(
            "mask is not supported under make_fx and FakeTensorMode, since the number of rows would depend on its"
            " values; use torch.compile, or drop the masked rows first"
        )
    if num_counted is not None:
        if mask is None:
            raise ValueError(f"num_counted={num_counted} belongs to a mask, which was not given")
        if checks.readable(mask) and int(mask.sum()) != num_counted:
            raise ValueError(f"num_counted must be the number of counted tokens, {int(mask.sum())}; got {num_counted}")
    return mask


@_operation
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    num_counted: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` straight from hidden states: the logits exist only a chunk of tokens at a time.

    z = softcap tanh(logit_scale (h W^T + b) / softcap) / temperature, without softcap logit_scale (h W^T + b) /
    temperature. Without gradients this is one GEMM; the backward pass recomputes each chunk (four GEMMs in all), so
    that any gradient per token may come. For PPO's own loss see `linear_ppo_loss`, which needs three.

    Args:
        hidden: [..., D]; weight: [V, D], the LM head; bias: [V] or None.
        tokens, mask: [...]; rows that do not count are dropped before the first GEMM. On a GPU a mask costs one wait
            for its count, unless num_counted gives it.
        softcap: of Gemma 2; logit_scale: of Cohere.
        chunk_bytes: what the chunk buffers may take; the default depends on shapes and dtypes only.
        logits_dtype: fp32, or the dtype of hidden for less traffic and less exact log-probabilities.

    Returns:
        logp [...], or (logp, entropy), fp32 (fp64 for fp64), 0 where masked.

    >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    >>> logp = linear_logprobs(hidden, weight, torch.tensor([0, 2]))
    >>> [round(x, 4) for x in logp.tolist()]
    [-0.5514, -0.2395]
    """
    head = bias, temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted
    mask = _check_head(hidden, weight, tokens, mask, *head)
    kernel = eager_linear
    if uses_triton(backend, hidden, weight, bias):
        from ppo_fast.kernels import linear as kernel  # type: ignore[no-redef]
    return kernel.linear_logprobs(
        hidden,
        weight,
        tokens,
        mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        with_entropy=with_entropy,
        chunk_bytes=chunk_bytes,
        logits_dtype=logits_dtype,
        num_counted=num_counted,
    )


@_operation
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k2",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    num_counted: int | None = None,
    backend: Backend = "auto",
) -> LinearLossOutput:
    """`policy_loss` straight from hidden states, with all gradients made in the forward pass: three GEMMs.

    The gradient of a token's loss with respect to its logits depends on that row alone, so each chunk of tokens goes
    from logits to the gradients of hidden states and weight at once, and nothing of it is kept. The entropy of each
    token is computed inside, so entropy_coef needs no argument of its own. There is no value term.

    Args:
        hidden, weight, tokens, mask, bias, temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted:
            as in `linear_logprobs`.
        old_logprobs: [...], or None for this pass's own, detached: every ratio is then 1.
        advantages: [...], one for each token. All other options: as in `policy_loss`.

    Returns:
        loss, stats as of `policy_loss` with entropy, and logprobs and entropy per token, detached.

    >>> hidden, weight = torch.eye(2), torch.zeros(3, 2, requires_grad=True)
    >>> out = linear_ppo_loss(hidden, weight, torch.tensor([0, 2]), None, torch.tensor([1.0, -1.0]))
    >>> out.stats["ratio_mean"].item(), round(out.entropy[0].item(), 4)
    (1.0, 1.0986)
    """
    head = bias, temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted
    mask = _check_head(hidden, weight, tokens, mask, *head)
    checks.floating("advantages", advantages)
    checks.shape("advantages", advantages, tokens.shape, "tokens")
    checks.device("advantages", advantages, hidden.device, "hidden")
    same = advantages.shape, advantages.dtype, advantages.device
    if not checks.alike(*same, old_logprobs, ref_logprobs, weights):
        for name, x in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("weights", weights)):
            if x is not None:
                checks.matching(name, x, advantages, "advantages")
    if ref_logprobs is None and kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs, which was not given")
    check_policy_options(clip_low, clip_high, dual_clip, log_ratio_clamp, kl_estimator)
    check_aggregation(advantages, "advantages", aggregation, denominator, norm_length, cu_seqlens)
    kernel = eager_linear
    if uses_triton(backend, hidden, weight, bias, old_logprobs, advantages, ref_logprobs, weights):
        from ppo_fast.kernels import linear as kernel  # type: ignore[no-redef]
    return LinearLossOutput(
        *kernel.linear_ppo_loss(
            hidden,
            weight,
            tokens,
            old_logprobs,
            advantages,
            mask,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            log_ratio_clamp=log_ratio_clamp,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            weights=weights,
            aggregation=aggregation,
            denominator=denominator,
            norm_length=norm_length,
            cu_seqlens=cu_seqlens,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            chunk_bytes=chunk_bytes,
            logits_dtype=logits_dtype,
            num_counted=num_counted,
        )
    )
