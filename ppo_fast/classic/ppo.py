"""PPO for Gymnasium's vector environments: the whole algorithm, from top to bottom.

    ppo-fast classic --env CartPole-v1 --out runs/cartpole

Sampling, advantages, learning: in this order. `trainer.py` has a run around it (checkpoints, evaluation, output). The
parts are config.py (every option), envs/ (environments), spaces.py (from observations to inputs, from outputs to
actions), network.py, optimizer.py, normalize.py, and policy.py (acting, also with a saved policy).
"Detail n" marks where each of the 13 core details of Huang et al. 2022, "The 37 Implementation Details of Proximal
Policy Optimization", is implemented. A rollout has T steps of N environments; tensors are [T, N], time first.

A small network on a CPU spends its time in calling operations. Therefore a step of the environments costs one forward
pass of the policy and nothing else; the noise of a whole rollout is sampled at once; values and log-probabilities are
computed for the whole rollout after the last step; the gradient of an MLP is written by hand; and all weights are in
one flat tensor, so that clipping and Adam are a handful of operations.
"""

import math
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.classic.config import ClassicConfig
from ppo_fast.classic.envs.vector import (
    EnvironmentState,
    environment_states,
    resets_in_same_step,
    restore_environments,
)
from ppo_fast.classic.logger import NUM_RECENT
from ppo_fast.classic.network import MLP, Activations
from ppo_fast.classic.normalize import RunningMeanStd
from ppo_fast.classic.optimizer import Adam
from ppo_fast.classic.policy import Policy
from ppo_fast.classic.spaces import action_decoder, observation_encoder
from ppo_fast.classic.state import State
from ppo_fast.common.device import pick_device
from ppo_fast.common.errors import NonFiniteError, UserError

CHUNK = 8192  # observations in one forward pass without gradients


class Batch(NamedTuple):
    """The steps of a rollout that count, one after the other."""

    observations: Tensor
    actions: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


class Episode(NamedTuple):
    """An episode that ended in the last rollout."""

    step: int  # steps of all environments when it ended
    total: float  # its return
    length: int


class PPO:
    """PPO (Schulman et al. 2017) on a Gymnasium vector environment.

    Args:
        config: every option.
        envs: N environments.
    """

    def __init__(self, config: ClassicConfig, envs: VectorEnv) -> None:
        self.config = config
        self.device = pick_device(config.device, config.backend)
        # Detail 1: N environments step together
        self.envs = envs
        self.same_step = resets_in_same_step(envs)
        self._make_policy()
        self._flatten_weights()
        self._make_buffers()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.return_rms = RunningMeanStd(())
        self.global_step = self.updates_done = self.episodes = 0
        self.rollout_step = 0  # within the current rollout
        self.collecting = False
        self.recent_returns: deque[float] = deque(maxlen=NUM_RECENT)
        self.finished: list[Episode] = []
        self.reset_envs(config.seed)

    def _make_policy(self) -> None:
        c, observation, action = self.config, self.envs.single_observation_space, self.envs.single_action_space
        encoder, decoder = observation_encoder(c.env, observation), action_decoder(c.env, action)
        if encoder.categories and c.normalize_observations:
            raise UserError(f"{c.env} has the observation space {observation}: there is nothing to normalize")
        self.observation_shape, self.discrete = encoder.shape, decoder.kind != "box"
        self.decoder, self.num_outputs = decoder, decoder.outputs
        self.observation_rms = RunningMeanStd(encoder.shape)
        # Detail 13: policy and value are two networks, or one with two heads. Detail 2: orthogonal weights, times
        # sqrt(2) in hidden layers, 0.01 in the policy's last one, 1 in the value's; biases are 0
        self.policy = Policy(c, encoder, decoder, self.observation_rms)

    def _flatten_weights(self) -> None:
        """Make the weights of the network views of one flat tensor, and Adam for that tensor."""
        self.network = self.policy.network.to(self.device)
        self.weights = list(self.network.parameters())
        flat, sizes = torch.cat([w.detach().flatten() for w in self.weights]), [w.numel() for w in self.weights]
        self.gradient = torch.zeros_like(flat)
        gradients = dict(zip(self.weights, self.gradient.split(sizes), strict=True))
        for weight, part in zip(self.weights, flat.split(sizes), strict=True):
            weight.data = part.view_as(weight)
        for module in self.network.modules():
            if isinstance(module, MLP):
                module.gradients = [(gradients[w].view_as(w), gradients[b].view_as(b)) for w, b in module.layers]
        self.std_gradient = None if self.discrete else gradients[self.network.log_std]
        self.adam = Adam(flat, self.config.adam_eps)  # Detail 3: epsilon is 1e-5, not 1e-8

    def _make_buffers(self) -> None:
        T, N = self.config.rollout_steps, self.envs.num_envs
        self.observations = torch.zeros(T + 1, N, *self.observation_shape, dtype=self.policy.dtype)
        self.observation_array = self.observations.numpy()
        self.noise = torch.zeros(T, N, self.num_outputs)
        components = () if self.decoder.kind == "discrete" else (len(self.decoder.sizes),)
        self.actions = (
            torch.zeros(T, N, *components, dtype=torch.int64) if self.discrete else torch.zeros_like(self.noise)
        )
        self.rewards = torch.zeros(T, N)
        self.terminated, self.truncated, self.mask = (torch.zeros(T, N, dtype=torch.bool) for _ in range(3))
        self.final_observations: list[tuple[int, int, np.ndarray]] = []  # same_step: (t, environment, observation)

    def reset_envs(self, seed: int) -> None:
        """Start new episodes in all environments."""
        N = self.envs.num_envs
        self.prev_done: npt.NDArray[np.bool_] = np.zeros(N, dtype=bool)  # the last step ended an episode
        self.episode_return: npt.NDArray[np.float64] = np.zeros(N)
        self.episode_length: npt.NDArray[np.int64] = np.zeros(N, int)
        self.discounted_return: npt.NDArray[np.float64] = np.zeros(N)
        self._store_observation(self.envs.reset(seed=seed)[0], -2)

    def _store_observation(self, raw: np.ndarray, t: int) -> None:
        """Store the observations of step t in row t + 1.

        With NEXT_STEP those after the last step of an episode do not count: they are not in the running statistics,
        and after a termination, where none is needed, they are replaced by zeros.
        """
        if self.config.normalize_observations:
            self.observation_rms.update(raw if self.same_step else raw[~self.prev_done])
        self.observation_array[t + 1] = self.policy.encode(raw)
        if not self.same_step and np.count_nonzero(self.prev_done):  # quicker than any()
            self.observation_array[t + 1, self.terminated.numpy()[t]] = 0  # it may be NaN

    @torch.no_grad()
    def collect(self) -> None:
        """Fill the buffers with T steps of every environment.

        With autoreset NEXT_STEP the step after the last one of an episode only resets: its action is ignored, its
        reward is 0, and its observation is the last one of the old episode. `mask` is False for such a step.
        """
        to_device, policy = self.device.type != "cpu", self.network.policy
        std = self._sample_noise()
        self.final_observations.clear()
        self.observations[0] = self.observations[-1]
        actions = self.actions.numpy()
        rewards, terminated, truncated, mask = (
            x.numpy() for x in (self.rewards, self.terminated, self.truncated, self.mask)
        )
        rows = zip(self.observations.unbind(0), self.noise.unbind(0), self.actions.unbind(0), strict=False)
        for t, (observation, noise, action) in enumerate(rows):
            out = policy(observation.to(self.device)).cpu() if to_device else policy(observation)
            self._choose_actions(out, noise, std, action)
            step = self.envs.step(self.decoder.to_environment(actions[t]))
            raw, rewards[t], terminated[t], truncated[t], infos = step
            self.rollout_step = t + 1
            self._on_step()
            if not self.same_step:
                np.logical_not(self.prev_done, out=mask[t])
                self.prev_done = terminated[t] | truncated[t]
            self._store_observation(raw, t)
            if self.same_step and truncated[t].any():  # raw is already the first of the next episode
                for i in np.flatnonzero(truncated[t]):
                    last = self.policy.encode(np.array(infos["final_obs"][i])[None])[0]
                    self.final_observations.append((t, int(i), last))
        if self.same_step:
            mask[:] = True
        self._finish_rollout()
        self.rollout_step = 0

    def _on_step(self) -> None:
        """Do nothing; `ClassicTrainer` stops here after a signal that has waited for too long."""

    def _sample_noise(self) -> Tensor | None:
        """Sample the noise of the whole rollout; the standard deviation of a Gaussian policy, which has one."""
        if self.discrete:  # arg max (logits + Gumbel noise) is a sample of softmax(logits)
            self.noise.exponential_(generator=self.generator).log_().neg_()
            return None
        self.noise.normal_(generator=self.generator)
        return self.network.log_std.exp().cpu()

    def _choose_actions(self, out: Tensor, noise: Tensor, std: Tensor | None, actions: Tensor) -> None:
        """Write the actions [N, ...] of one step to `actions`."""
        if std is not None:
            torch.addcmul(out, std, noise, out=actions)
        elif self.decoder.kind == "discrete":
            torch.argmax(out.add_(noise), -1, out=actions)
        else:
            actions.copy_(self.policy.argmax(out.add_(noise)))

    def _finish_rollout(self) -> None:
        """Count steps and episodes, and normalize the rewards."""
        c, self.finished = self.config, []
        rewards, mask = self.rewards.numpy(), self.mask.numpy()
        done = (self.terminated | self.truncated).numpy() & mask
        rewards *= mask
        steps = self.global_step + mask.sum(1).cumsum()
        for t in range(len(rewards)):
            self.episode_return += rewards[t]
            self.episode_length += mask[t]
            if c.normalize_rewards:
                live = mask[t]
                self.discounted_return[live] = self.discounted_return[live] * c.gamma + rewards[t][live]
                self.return_rms.update(self.discounted_return[live])
                rewards[t] = np.clip(rewards[t] / np.sqrt(self.return_rms.var + 1e-8), -10, 10)
            for i in np.flatnonzero(done[t]):
                self.finished.append(Episode(int(steps[t]), float(self.episode_return[i]), int(self.episode_length[i])))
                self.episode_return[i] = self.episode_length[i] = self.discounted_return[i] = 0
        self.recent_returns.extend(episode.total for episode in self.finished)
        self.episodes += len(self.finished)
        self.global_step = int(steps[-1])

    @torch.no_grad()
    def advantages(self) -> tuple[Batch, dict[str, float]]:
        """Return the steps that count, with advantages and returns, and statistics of the rollout."""
        c, (T, N) = self.config, self.rewards.shape
        observations = self.observations.to(self.device).flatten(0, 1)
        outputs = [self.network(part) for part in observations.split(CHUNK)]
        policy, values = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        values = values.view(T + 1, N)
        rewards, terminated, truncated, mask, actions = (
            x.to(self.device) for x in (self.rewards, self.terminated, self.truncated, self.mask, self.actions)
        )
        # Detail 5: generalised advantage estimation, delta_t = r_t + gamma V(s_t+1) - V(s_t) and
        # A_t = delta_t + gamma lam A_t+1, with V = 0 after a termination and no A_t+1 after any end of an episode.
        # After the last step of the rollout, the value of the state is used. The returns are A_t + V(s_t)
        advantages, returns = ppo.gae(
            rewards,
            values[:-1],
            gamma=c.gamma,
            lam=c.lam,
            mask=mask,
            terminated=terminated,
            truncated=truncated,
            bootstrap=values[-1],
            final_values=self._final_values(values),
            time_major=True,
            backend=c.backend,
        )
        actions = actions.flatten(0, 1)
        logp, entropy = self.network.logprobs(policy[: T * N], actions, with_entropy=True)
        columns = [observations[: T * N], actions, logp, values[:-1].flatten(), advantages.flatten(), returns.flatten()]
        if not bool(mask.all()):
            rows = mask.flatten().nonzero()[:, 0]
            columns, entropy = [x[rows] for x in columns], entropy[rows]
        batch = Batch(*columns)
        self._check_returns(batch)
        if not len(batch.actions):
            return batch, {"entropy": math.nan, "explained_variance": math.nan}
        unexplained = (batch.returns - batch.old_values).var(correction=0) / batch.returns.var(correction=0)
        return batch, {"entropy": entropy.mean().item(), "explained_variance": 1 - unexplained.item()}

    def _final_values(self, values: Tensor) -> Tensor:
        """Return the value [T, N] of the observation after each step, from those of all observations [T + 1, N].

        Where an episode was cut, that is the value of its final observation. With NEXT_STEP it is the next row.
        """
        final_values = values[1:]
        if self.final_observations:
            final_values = final_values.clone()
            at, environments, last = zip(*self.final_observations, strict=True)
            observations = torch.as_tensor(np.stack(last), dtype=self.policy.dtype, device=self.device)
            final_values[at, environments] = self.network.value(observations)
        return final_values

    def _check_returns(self, batch: Batch) -> None:
        if not bool(batch.returns.isfinite().all()):
            raise NonFiniteError(
                f"a return of rollout {self.updates_done + 1} is not finite: a reward or an observation of"
                f" {self.config.env} is not, or the values of the network are not; try a lower lr"
            )

    def _minibatches(self, batch: Batch) -> list[Batch]:
        """Detail 6: every epoch splits the steps, in a new random order, into minibatches of (nearly) one size."""
        c = self.config
        parts = [batch]
        if c.minibatches > 1:
            order = torch.randperm(len(batch.actions), generator=self.generator).to(self.device)
            parts = [Batch(*x) for x in zip(*(x[order].tensor_split(c.minibatches) for x in batch), strict=True)]
        parts = [part for part in parts if len(part.actions)]  # fewer steps than minibatches
        if not c.normalize_advantages:
            return parts
        # Detail 7: advantages are normalized in each minibatch separately
        return [part._replace(advantages=ppo.masked_whiten(part.advantages)) for part in parts]

    def learn(self, batch: Batch, *, lr: float, clip: float) -> dict[str, float]:
        """Run several epochs of clipped updates, and return the means of their statistics."""
        c, history, norms, stopped = self.config, [], [], False
        if not len(batch.actions):  # every environment was only reset
            return {}
        parts = self._minibatches(batch)
        for epoch in range(c.epochs):
            if epoch and c.minibatches > 1:  # a single minibatch has no order
                parts = self._minibatches(batch)
            for part in parts:
                activations = None
                if self.policy.cnn:
                    policy, values = self.network(part.observations)
                else:
                    policy, values, activations = self.network.forward_with_cache(part.observations)
                loss, stats = self._loss(part, policy, values, clip)
                history.append(stats)
                stopped = c.target_kl is not None and stats["approx_kl"].item() > c.target_kl
                if stopped:
                    break
                self.backward(loss, policy, values, activations)
                norms.append(self.optimizer_step(lr))
            if stopped:
                break
        # Detail 12: what to look at when it does not learn: both losses, approx_kl, clip_fraction, grad_norm; entropy
        # and explained_variance come from `advantages`
        table = torch.stack([x for stats in history for x in stats.values()]).view(len(history), -1)
        means = dict(zip(history[0], table.mean(0).tolist(), strict=True))
        means["grad_norm"] = sum(norms) / max(len(norms), 1)
        return {**means, "minibatches": len(norms), "lr": lr, "clip": clip}

    def _loss(self, part: Batch, policy: Tensor, values: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and statistics of a minibatch from the outputs of the network."""
        c = self.config
        logp, entropy = self.network.logprobs(policy, part.actions, with_entropy=c.entropy_coef > 0)
        # Detail 8: clipped surrogate objective, -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with
        # ratio = exp(logp - old_logp). Detail 9: clipped value loss, on request, since it rarely helps.
        # Detail 10: one loss, policy + value_coef value - entropy_coef entropy
        return ppo.ppo_loss(
            logp,
            values,
            part.old_logprobs,
            part.old_values,
            part.advantages,
            part.returns,
            value_coef=c.value_coef,
            value_clip=c.value_clip,
            clip_low=clip,
            clip_high=clip,
            entropy=entropy,
            entropy_coef=c.entropy_coef,
            backend=c.backend,
        )

    def backward(self, loss: Tensor, policy: Tensor, values: Tensor, activations: list[Activations] | None) -> None:
        """Compute the gradient of the loss by all weights into `gradient`; by autograd without `activations`."""
        if activations is None:
            gradients = torch.autograd.grad(loss, self.weights)
            torch.cat([g.flatten() for g in gradients], out=self.gradient)
            return
        outputs = [policy, values] if self.std_gradient is None else [policy, values, self.network.log_std]
        policy_grad, value_grad, *std_grad = torch.autograd.grad(loss, outputs)
        self.network.backward(policy_grad, value_grad, activations)
        if self.std_gradient is not None:
            self.std_gradient.copy_(std_grad[0])

    def optimizer_step(self, lr: float) -> float:
        """Clip the gradient and update the weights; return the norm of the gradient before clipping."""
        norm = torch.linalg.vector_norm(self.gradient).item()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of update {self.updates_done + 1} is {norm}; try normalize_rewards,"
                " normalize_observations, or a lower lr"
            )
        # Detail 11: the gradient of all weights together is clipped
        if self.config.max_grad_norm is not None and norm > self.config.max_grad_norm:
            self.gradient *= self.config.max_grad_norm / (norm + 1e-6)
        self.adam.step(self.gradient, lr)
        return norm

    def step(self) -> dict[str, float]:
        """Run one rollout and its update, and return the metrics. Times are in seconds."""
        c, before, start = self.config, self.global_step, time.perf_counter()
        left = max(0.0, 1 - before / c.total_steps)
        self.collecting = True
        self.collect()
        self.collecting = False
        collected = time.perf_counter()
        batch, metrics = self.advantages()
        # Detail 4: the learning rate falls linearly to 0, and optionally the clip range, too
        lr = c.lr * (left if c.lr_schedule == "linear" else 1.0)
        clip = c.clip * (left if c.clip_schedule == "linear" else 1.0)
        metrics |= self.learn(batch, lr=lr, clip=clip)
        self.updates_done += 1
        end = time.perf_counter()
        if self.recent_returns:
            metrics |= {"return": sum(self.recent_returns) / len(self.recent_returns)}
        if self.finished:
            metrics |= {"episode_length": sum(episode.length for episode in self.finished) / len(self.finished)}
        return {
            "step": self.global_step,
            "update": self.updates_done,
            "episodes": self.episodes,
            **metrics,
            "seconds/collect": collected - start,
            "seconds/learn": end - collected,
            "steps_per_second": (self.global_step - before) / (end - start),
        }

    @torch.no_grad()
    def values(self, raw: np.ndarray) -> np.ndarray:
        """Return the value [B] of each raw observation [B, ...], in units of the (normalized) rewards."""
        return self.network.value(self.policy.as_tensor(raw)).cpu().numpy()

    def act(self, raw: np.ndarray) -> np.ndarray:
        """Return the most likely action for each raw observation [B, ...], in the format of the environment."""
        return np.asarray(self.policy.act(raw))

    def state_dict(self, *, with_environments: bool = True) -> State:
        """Return everything that the next update depends on.

        Args:
            with_environments: False in the middle of a rollout: the environments then start new episodes.
        """
        return {
            "policy": self.policy.state_dict(),
            "adam": self.adam.state_dict(),
            "observation_rms": self.observation_rms.state_dict(),
            "return_rms": self.return_rms.state_dict(),
            "generator": self.generator.get_state(),
            "observations": self.observations[-1].clone(),
            "prev_done": self.prev_done.copy(),
            "episode_return": self.episode_return.copy(),
            "episode_length": self.episode_length.copy(),
            "discounted_return": self.discounted_return.copy(),
            "global_step": self.global_step,
            "updates_done": self.updates_done,
            "episodes": self.episodes,
            "recent_returns": list(self.recent_returns),
            "environments": environment_states(self.envs) if with_environments else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        self.policy.load_state_dict(state["policy"])
        self.adam.load_state_dict(state["adam"])
        self.observation_rms.load_state_dict(state["observation_rms"])
        self.return_rms.load_state_dict(state["return_rms"])
        self.generator.set_state(state["generator"])
        self.observations[-1] = state["observations"]
        self.prev_done = state["prev_done"].copy()
        self.episode_return = state["episode_return"].copy()
        self.episode_length = state["episode_length"].copy()
        self.discounted_return = state["discounted_return"].copy()
        self.global_step, self.updates_done = state["global_step"], state["updates_done"]
        self.episodes = state["episodes"]
        self.recent_returns.extend(state["recent_returns"])
        self.reset_or_restore_envs(state["environments"])

    def reset_or_restore_envs(self, states: list[EnvironmentState] | None) -> None:
        """Continue after a checkpoint, both in the run that wrote it and in one that reads it.

        Environments whose states were saved continue from there. All others start new episodes, from a seed that
        depends on the update, so that both runs have the same bits.
        """
        if states is None:
            self.reset_envs(self.config.seed + 1_000_003 * self.updates_done)
        else:
            restore_environments(self.envs, states, self.prev_done)
