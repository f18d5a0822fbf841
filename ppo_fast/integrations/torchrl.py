"""torchrl: its ClipPPOLoss and its GAE with the arithmetic of ppo_fast, by a change of imports alone.

>>> from torchrl.objectives import ClipPPOLoss  # doctest: +SKIP
>>> from torchrl.objectives.value import GAE  # doctest: +SKIP
>>> from ppo_fast.integrations.torchrl import GAE, ClipPPOLoss  # instead  # doctest: +SKIP

Both inherit from torchrl's: constructor, keys, set_keys, networks, distributions, entropy, masks and target parameters
are its own. `GAE` computes the recursion by `ppo_fast.gae`, exactly, where torchrl's vectorised one drops terms below
1e-7. `ClipPPOLoss` computes its objective by `ppo_fast.policy_loss`, and its critic's error by `ppo_fast.value_loss` if
loss_critic_type is "l2"; torchrl computes "l1" and "smooth_l1", and every loss with reduction="none". What ppo_fast
does not compute is rejected with an error that names it: a lower clip_epsilon outside of [0, 1], gamma or lmbda that
are no single number in [0, 1], and data with steps_to_next_obs. Neither has a second derivative.

Tested with torchrl 0.14.
"""

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.integrations._patch import peer

TESTED = ("0.14.",)
VALUE_KEY = "set torchrl's value_key (set_keys(value=...)) to"
if TYPE_CHECKING:
    from torchrl.objectives import ppo as _ppo
    from torchrl.objectives import utils as _utils
    from torchrl.objectives.value import advantages as _estimators
else:
    _ppo = peer("torchrl", "torchrl.objectives.ppo", TESTED)
    _estimators = peer("torchrl", "torchrl.objectives.value.advantages", TESTED)
    _utils = peer("torchrl", "torchrl.objectives.utils", TESTED)

from tensordict import TensorDict, TensorDictBase  # noqa: E402  (after peer, which says how to install it)
from tensordict.nn import dispatch, set_skip_existing  # noqa: E402

_NO_CLAMP = 1e38  # torchrl has none; finite, since infinity minus itself is NaN
_NETWORKS = tuple(f"{which}_network_params" for which in ("actor", "critic", "target_actor", "target_critic"))


def _summed(td_errors: Tensor, done: Tensor, gamma: float, lam: float, *, time: int) -> Tensor:
    """A_t = td_error_t + gamma lam (1 - done_t) A_{t+1} along the dimension `time`."""
    time_major = time == 0 and td_errors.numel() > len(td_errors)
    errors, ends = (x if time_major else x.movedim(time, -1) for x in (td_errors, done))
    sums, _ = ppo.gae(errors, torch.zeros_like(errors), gamma=gamma, lam=lam, terminated=ends, time_major=time_major)
    return (sums if time_major else sums.movedim(-1, time)).to(td_errors.dtype)


class _Context(Protocol):
    """The context of _Summed."""

    rest: tuple[float, float, int]  # gamma, lam, time

    @property
    def saved_tensors(self) -> tuple[Tensor]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Summed(torch.autograd.Function):
    """`_summed` with a gradient: the same recursion forwards in time, where the end of an episode stops it."""

    @staticmethod
    def forward(ctx: _Context, td_errors: Tensor, done: Tensor, gamma: float, lam: float, time: int) -> Tensor:
        ctx.save_for_backward(done)
        ctx.rest = gamma, lam, time
        return _summed(td_errors, done, gamma, lam, time=time)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (done,) = ctx.saved_tensors
        gamma, lam, time = ctx.rest
        reversed_ends = done.roll(1, time).flip(time)  # what comes around belongs to no step before the first
        gradient = _summed(upstream.flip(time), reversed_ends, gamma, lam, time=time).flip(time)
        return gradient, None, None, None, None


class GAE(_estimators.GAE):
    """torchrl's GAE module: it writes advantage and value_target (Schulman et al. 2016, equation 16).

    Args:
        gamma, lmbda: a number or a tensor with one element, in [0, 1].
        everything else: as in torchrl. `vectorized` makes no difference.

    Raises:
        ValueError: gamma or lmbda is something else, or the data has steps_to_next_obs.
        RuntimeError: values, rewards and ends of episodes differ in shape.
    """

    def __init__(self, *, gamma: float | Tensor, lmbda: float | Tensor, **options: object) -> None:
        for name, x in (("gamma", gamma), ("lmbda", lmbda)):
            if isinstance(x, Tensor) and (x.numel() != 1 or x.requires_grad):
                raise ValueError(f"ppo_fast's GAE takes one number as {name}, without a gradient; got {x}")
            if not 0 <= float(x) <= 1:
                raise ValueError(f"ppo_fast's GAE takes a {name} in [0, 1], got {float(x)}")
        super().__init__(gamma=gamma, lmbda=lmbda, **options)

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Write advantage and value_target [*B, T, *F] to a tensordict [*B, T], and return it."""
        skip = nullcontext() if self.skip_existing is None else set_skip_existing(self.skip_existing)
        with skip, torch.set_grad_enabled(self.differentiable):
            advantages, targets = self._estimate(tensordict, params, target_params, time_dim, self.auto_reset_env)
            valid = tensordict.get("shifted_valid", default=None)
            if self.average_gae:
                advantages = self._normalize_advantage(advantages, valid, groups=self._group_ids(tensordict))
            tensordict.set(self.tensor_keys.advantage, advantages)
            tensordict.set(self.tensor_keys.value_target, targets)
            self._mask_shifted_output(tensordict, valid)
        return tensordict

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
        **_: object,
    ) -> Tensor:
        """value_target alone; as in torchrl without regard to auto_reset_env."""
        return self._estimate(tensordict, params, target_params, time_dim, False)[1]

    def _estimate(
        self,
        data: TensorDictBase,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
        time_dim: int | None,
        auto_reset: bool,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and value targets, in the shape and dtype of the values."""
        if data.batch_dims < 1:
            raise RuntimeError(f"GAE needs a tensordict with a time dimension, got batch_size {data.batch_size}")
        keys = self.tensor_keys
        if data.get(keys.steps_to_next_obs, None) is not None:
            raise ValueError(
                f"ppo_fast's GAE has one gamma for all steps, and the data {keys.steps_to_next_obs!r}: use torchrl's"
            )
        values, next_values = self._values(data, params, target_params)
        time = self._get_time_dim(time_dim, data)
        ends = self._prepare_shifted_tensordict(data, data.get("shifted_valid", default=None), time)
        done = ends.get(("next", keys.done))
        terminated = ends.get(("next", keys.terminated), default=done)
        rewards, done, terminated = self._prepare_signals(ends.get(("next", keys.reward)), done, terminated, values)
        if not values.shape == next_values.shape == rewards.shape == done.shape == terminated.shape:
            shapes = [tuple(x.shape) for x in (values, next_values, rewards, done, terminated)]
            raise RuntimeError(f"values, next values, reward, done and terminated must have one shape, got {shapes}")
        gamma, lam = float(self.gamma), float(self.lmbda)
        if auto_reset:  # the observation after a time limit is lost: the value before it is used instead of its value
            rewards = rewards + gamma * values * data.get(("next", "truncated"))
            terminated = done
        td_errors = rewards + gamma * next_values.masked_fill(terminated, 0) - values
        recursion = _Summed.apply if td_errors.requires_grad else lambda *x: _summed(*x[:-1], time=x[-1])
        advantages = recursion(td_errors, done, gamma, lam, time).to(next_values.dtype)
        return advantages, advantages + values

    def _values(
        self, data: TensorDictBase, params: TensorDictBase | None, target_params: TensorDictBase | None
    ) -> tuple[Tensor, Tensor]:
        """The values of observations and next observations, from the network or from the data."""
        if self.value_network is None:
            key = self.tensor_keys.value
            found = data.get(key, None), data.get(("next", key), None)
            for where, x in zip((key, ("next", key)), found, strict=True):
                if x is None:
                    raise ValueError(f"the data has no {where!r}, and GAE was given no value network to compute it")
            return found
        if params is not None:
            params = params.detach()
            target_params = params.clone(False) if target_params is None else target_params
        given = params is not None or target_params is not None
        with nullcontext() if given else _utils.hold_out_net(self.value_network):
            values, next_values, valid = self._call_value_nets(
                data=data,
                params=params,
                next_params=target_params,
                single_call=self.shifted,
                value_key=self.tensor_keys.value,
                detach_next=True,
                vmap_randomness=self.vmap_randomness,
            )
        if valid is not None:
            data.set("shifted_valid", valid)
        return values, next_values


class ClipPPOLoss(_ppo.ClipPPOLoss):
    """torchrl's ClipPPOLoss (Schulman et al. 2017, equation 7): the same losses, statistics and gradients.

    make_value_estimator makes `GAE` where torchrl makes its own.

    Args:
        clip_epsilon: a number in [0, 1], or (low, high) with low in [0, 1) and any high that is not negative.
        reduction: "mean" or "sum"; "none" is computed by torchrl.
        everything else: as in torchrl.

    Raises:
        ValueError: another reduction, or a clip_epsilon out of range.
    """

    def __init__(
        self,
        actor_network: object = None,
        critic_network: object = None,
        *,
        clip_epsilon: float | tuple[float, float] = 0.2,
        reduction: str | None = None,
        **options: object,
    ) -> None:
        if reduction not in (None, "none", "mean", "sum"):
            raise ValueError(f"ClipPPOLoss takes reduction='none', 'mean' or 'sum', got {reduction!r}")
        if not isinstance(clip_epsilon, (tuple, list)):  # torchrl checks a pair, but no single number
            if float(clip_epsilon) < 0:
                raise ValueError(f"clip_epsilon must be non-negative, got {clip_epsilon}")
            if float(clip_epsilon) > 1:
                raise ValueError(
                    f"clip_epsilon must be at most 1, because 1 - clip_epsilon bounds the ratio from below, got"
                    f" {clip_epsilon}: give a pair, such as (0.2, {clip_epsilon}), for a larger upper bound"
                )
        super().__init__(actor_network, critic_network, clip_epsilon=clip_epsilon, reduction=reduction, **options)
        self._known: dict[str, tuple[Tensor, int, float]] = {}

    def make_value_estimator(self, value_type: object = None, **hyperparams: object) -> object:
        """As torchrl's; for ValueEstimators.GAE, the default, the estimator is ppo_fast's."""
        value_type = self.default_value_estimator if value_type is None else value_type
        gae = _utils.ValueEstimators.GAE
        if value_type is not gae and not (isinstance(value_type, str) and value_type.lower() == "gae"):
            return super().make_value_estimator(value_type, **hyperparams)
        self.value_type = gae
        self._value_estimator = GAE.for_loss(self, **{**_utils.default_value_kwargs(gae), **hyperparams})
        self._forward_value_estimator_keys()
        return None

    def _number(self, name: str) -> float:
        """A buffer as a number, read from the device only when it has changed."""
        x = getattr(self, name)
        known = self._known.get(name)
        if known is None or known[0] is not x or known[1] != x._version:
            known = self._known[name] = (x, x._version, float(x))
        return known[2]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses (loss_objective, loss_entropy, loss_critic) and statistics of a batch with advantage and targets."""
        if self.reduction == "none":
            return super().forward(tensordict)
        data = tensordict.clone(False)
        advantages = self._advantages(data)
        log_ratio, policy, kl, log_weights = self._log_weight(data, adv_shape=advantages.shape[:-1])
        if advantages.shape != log_ratio.shape:
            advantages = _ppo._broadcast_advantage_to_log_weight(advantages, log_ratio)
            _ppo._check_advantage_broadcast(advantages, log_ratio)
        out, statistics = self._objective(data, log_ratio, log_weights, advantages)
        out.set("kl_approx", kl.detach().mean())
        if self.entropy_bonus:
            entropy = self._get_entropy(policy, adv_shape=advantages.shape[:-1])
            total = entropy
            if not isinstance(entropy, Tensor):
                out.set("composite_entropy", entropy.detach())
                total = entropy.sum(dim="feature", reduce=True)
            out.set("entropy", total.detach().mean())
            out.set("loss_entropy", self._reduce_loss(self._weighted_loss_entropy(entropy), data))
        if self._has_critic:
            for name, x in self._critic(data).items():
                out.set(name, x)
        for name, x in statistics.items():
            out.set(name, x)
        self._clear_weakrefs(data, out, *_NETWORKS)
        return out

    def _advantages(self, data: TensorDictBase) -> Tensor:
        """The advantages of the data, or of the value estimator, normalised on request."""
        advantages = data.get(self.tensor_keys.advantage, None, as_padded_tensor=True)
        missing = advantages is None
        if missing:
            if self.critic_network is None:
                raise RuntimeError(
                    "ClipPPOLoss has no critic network that could give the advantages: pass critic_network, or write"
                    " advantages to the data first"
                )
            self.value_estimator(
                data,
                params=self._cached_critic_network_params_detached,
                target_params=self.target_critic_network_params,
            )
            advantages = data.get(self.tensor_keys.advantage)
        return self._maybe_normalize_advantage(_constant("advantage", advantages), data, update_norm=missing)

    def _counted(self, data: TensorDictBase, like: Tensor) -> Tensor | None:
        """The positions that torchrl's masks count."""
        mask = None
        for key in self._loss_mask_keys():
            given = data.get(key, default=None)
            if given is not None:
                given = self._expand_loss_mask(given, like)
                mask = given if mask is None else mask & given
        return mask

    def _objective(
        self, data: TensorDictBase, log_ratio: Tensor, log_weights: Tensor | None, advantages: Tensor
    ) -> tuple[TensorDict, dict[str, Tensor]]:
        """loss_objective with clip_fraction, and the statistics of the ratio, over all positions as in torchrl."""
        names = ("clip_epsilon_low", "clip_epsilon_high") if self._asymmetric_clip else ("clip_epsilon",) * 2
        low, high = (self._number(name) for name in names)
        ratios, gains = log_ratio, advantages
        if ratios.shape != gains.shape:
            ratios, gains = torch.broadcast_tensors(ratios, gains)
        weights = None if log_weights is None else log_weights.exp().expand_as(ratios).flatten()
        mask = self._counted(data, ratios)
        found = ppo.policy_loss(
            ratios.flatten(),
            torch.zeros_like(ratios).flatten(),
            gains.flatten(),
            None if mask is None else mask.flatten(),
            clip_low=low,
            clip_high=high,
            log_ratio_clamp=_NO_CLAMP,
            weights=weights,
            aggregation="token-mean" if self.reduction == "mean" else "token-sum",
        )
        with torch.no_grad():
            clipped = log_ratio != log_ratio.clamp(math.log1p(-low) if low < 1 else -math.inf, math.log1p(high))
            rows = (log_ratio if log_weights is None else log_ratio + log_weights).squeeze(-1)
            top = rows.amax(0)
            shifted = (rows - top).exp()
            effective = shifted.sum(0).square() / shifted.square().sum(0) / len(rows)
            mean = found.stats["ratio_mean"] if mask is None and weights is None else rows.exp().mean()
            statistics = {"ESS": effective, "max_ratio": top.exp().amax(), "mean_ratio": mean}
        dtype = log_ratio.dtype
        losses = {"loss_objective": found.loss.to(dtype), "clip_fraction": clipped.to(dtype).mean()}
        return TensorDict(losses), {name: x.to(dtype) for name, x in statistics.items()}

    def _critic(self, data: TensorDictBase) -> dict[str, Tensor]:
        """loss_critic and its statistics."""
        if self.loss_critic_type != "l2":
            loss, fraction, explained = self.loss_critic(data)
            loss = self._reduce_loss(loss, data)
        else:
            loss, fraction, explained = self._squared_error(data)
        found = {"loss_critic": loss, "value_clip_fraction": fraction, "explained_variance": explained}
        return {name: x for name, x in found.items() if x is not None}

    def _squared_error(self, data: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """critic_coeff times the squared error, the share of clipped values, and the explained variance."""
        clip = None if self.clip_value is None else self._number("clip_value") or None
        inputs = data.detach() if self.separate_losses else data
        target = _entry(
            inputs,
            self.tensor_keys.value_target,
            "in the input tensordict: call GAE, or another value estimator, first, or name the entry of the returns by"
            " set_keys(value_target=...)",
        )
        old = None
        if clip is not None:
            where = f"in the input tensordict, for clip_value={clip}: {VALUE_KEY} that of the rollout's values"
            old = _entry(inputs, self.tensor_keys.value, where)
        run_with = self.critic_network_params.to_module if self.functional else lambda *_, **__: nullcontext()
        with run_with(self.critic_network, preserve_module_state=False):
            where = f"in the critic output tensordict: {VALUE_KEY} the critic's out_key"
            value = _entry(self.critic_network(inputs), self.tensor_keys.value, where)
        target, value, old = self._critic_loss_inputs(_constant("value_target", target), value, old)
        if target.shape != value.shape:
            raise RuntimeError(f"value_target {tuple(target.shape)} and values {tuple(value.shape)} differ in shape")
        mask = self._counted(data, value)
        found = ppo.value_loss(
            value.flatten(),
            None if old is None else old.flatten(),
            target.flatten(),
            None if mask is None else mask.flatten(),
            clip=clip,
            aggregation="token-mean" if self.reduction == "mean" else "token-sum",
        )
        fraction = explained = None
        with torch.no_grad():
            if old is not None:
                fraction = ((value - old).abs() > clip).to(value.dtype).mean()
            if self.log_explained_variance:
                left, whole = (torch.var(x, correction=0, dim=0) for x in (target - value, target))
                explained = 1 - left / (whole + torch.finfo(target.dtype).eps)
        return 2 * self.critic_coeff * found.loss.to(value.dtype), fraction, explained  # torchrl's has no factor 0.5


def _entry(data: TensorDictBase, key: object, where: str) -> Tensor:
    """An entry; where it is missing, torchrl's error."""
    x = data.get(key, None)
    if x is None:
        raise KeyError(f"the key {key} was not found {where}")
    return x


def _constant(name: str, x: Tensor) -> Tensor:
    if x.requires_grad:
        raise ValueError(f"ppo_fast's ClipPPOLoss hands no gradient to the {name}: detach it, or use torchrl's")
    return x
