"""PPO for Gymnasium's vector environments: the whole algorithm, from top to bottom.

    ppo-fast classic --env CartPole-v1 --out runs/cartpole

Environments, network, sampling, advantages, learning: in this order. Around it are classic_config.py (every option),
classic_spaces.py (from observations to inputs, from outputs to actions), classic_network.py (layers, Adam),
classic_policy.py (acting, also with a saved policy), classic_state.py (checkpoints, evaluation) and classic_log.py
(what a run shows).
"Detail n" marks where each of the 13 core details of Huang et al. 2022, "The 37 Implementation Details of Proximal
Policy Optimization", happens. T steps of N environments make a rollout; tensors are [T, N], time first.

What makes it quick on a CPU, where a small network's time goes into calling operations: a step of the environments
costs one forward pass of the policy and nothing else; the noise of a whole rollout is drawn at once, values and
log-probabilities are computed for all of it after the last step; the gradients of an MLP are written down by hand; and
all weights live in one flat tensor, so that clipping and Adam are a handful of operations.

A run that goes on from a checkpoint gives the same bits as one that was not stopped, if both save at the same updates:
environments that save their state (ours) continue where they were; all others start new episodes at a checkpoint.
"""

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import FlattenObservation
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.classic import evaluate
from ppo_fast.classic import state as classic_state
from ppo_fast.classic.config import ClassicConfig, add_arguments
from ppo_fast.classic.envs.vector import environment_states, make_env, make_envs, parse_arguments, resets_in_same_step
from ppo_fast.classic.envs.workers import close
from ppo_fast.classic.envs.wrappers import Wrapper, load_wrappers
from ppo_fast.classic.logger import Log
from ppo_fast.classic.network import Dense
from ppo_fast.classic.normalize import Moments
from ppo_fast.classic.optimizer import Adam
from ppo_fast.classic.policy import Policy, load
from ppo_fast.classic.spaces import COMPOSITE, read_actions, read_observations
from ppo_fast.common import checkpoint
from ppo_fast.common.device import pick_device
from ppo_fast.common.errors import NonFiniteError, UserError
from ppo_fast.common.lock import locked
from ppo_fast.common.signals import GRACE, Request, stop_requests

__all__ = ["Batch", "ClassicConfig", "ClassicTrainer", "Policy", "Stopped", "add_arguments", "load", "main"]

CHUNK = 8192  # observations in one forward pass without gradients
RECENT = 100  # episodes that the reported return is the mean of


class Batch(NamedTuple):
    """The counted steps of a rollout, one after the other."""

    observations: Tensor
    actions: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


class Stopped(KeyboardInterrupt):
    """A signal has stopped the run after an update; the message names the checkpoint."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.number = signal.Signals[name].value


class ClassicTrainer:
    """PPO (Schulman et al. 2017) on a Gymnasium vector environment.

    Args:
        config: every option.
        env_kwargs: more arguments of the environment, such as functions, which JSON cannot hold.
        wrappers: functions from an environment to a wrapped one, the innermost first, after those of `config`.
        envs: the environments, if they are not to be made from `config`.
        eval_env: makes an environment to evaluate in. None: one that is made, and wrapped, as those of the training.

    >>> trainer = ClassicTrainer(ClassicConfig(env="CartPole-v1", total_steps=2048, quiet=True))
    >>> trainer.train()["steps"] >= 2048
    True
    """

    def __init__(
        self,
        config: ClassicConfig,
        *,
        env_kwargs: dict[str, Any] | None = None,
        wrappers: list[Wrapper] | None = None,
        envs: VectorEnv | None = None,
        eval_env: Callable[[], gymnasium.Env] | None = None,
    ) -> None:
        self.config, self.env_kwargs = config, parse_arguments(config.env_kwargs) | (env_kwargs or {})
        self.device = pick_device(config.device, config.backend)  # type: ignore[arg-type]
        self.wrappers: list[Wrapper] = [*load_wrappers(config.wrapper), *(wrappers or [])]
        self.own_envs, self.eval_env = envs is None, eval_env
        if envs is not None and self.wrappers:
            raise UserError("wrappers belong to the environments that config names: put them around those in envs")
        # Detail 1: N environments step together
        self.envs = self._make_envs() if envs is None else envs
        self.same_step = resets_in_same_step(self.envs)
        self._read_spaces()
        self._make_network()
        self._make_buffers()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.return_moments = Moments(())
        self.steps_done = self.updates_done = 0
        self.position = self.evaluated = 0  # steps of the current rollout, and episodes, for the progress line
        self.collecting = False
        self.request, self.asked = Request(), 0.0
        self.episodes = 0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.finished: list[tuple[int, float, int]] = []  # of the last rollout: steps done by then, return, length
        self.start_environments(config.seed)

    def _make_envs(self) -> VectorEnv:
        c = self.config

        def make() -> VectorEnv:
            choice = {"vectorization": c.vectorization, "autoreset": c.autoreset}
            return make_envs(c.env, self.env_kwargs, count=c.num_envs, wrappers=self.wrappers, **choice)

        if c.vectorization == "async":  # its shared memory takes fewer spaces than FlattenObservation
            with contextlib.closing(make_env(c.env, self.env_kwargs, self.wrappers)) as env:
                space, envs = env.observation_space, None
        else:
            envs = make()
            space = envs.single_observation_space
        if isinstance(space, COMPOSITE):
            if envs is not None:
                close(envs)
            self.wrappers.append(FlattenObservation)
        else:
            read_observations(c.env, space)
        if envs is None or isinstance(space, COMPOSITE):
            try:
                envs = make()
            except NotImplementedError:  # a part is of the package's own kind
                read_observations(c.env, space)
                raise
        weakref.finalize(self, close, envs)  # before multiprocessing ends, with SIGTERM, the processes of async ones
        return envs

    def _read_spaces(self) -> None:
        c, observation, action = self.config, self.envs.single_observation_space, self.envs.single_action_space
        seen, done = read_observations(c.env, observation), read_actions(c.env, action)
        if seen.categories and c.normalize_observations:
            raise UserError(f"{c.env} has the observation space {observation}: there is nothing to normalize")
        self.shape, self.discrete, self.num_actions = seen.shape, done.kind != "box", done.outputs
        self.actions_of, self._to_environment = done, done.to_environment
        self.observation_moments = Moments(self.shape)
        # Detail 13: policy and value are two networks, or one with two heads. Detail 2: orthogonal weights, times
        # sqrt(2) in hidden layers, 0.01 in the policy's last one, 1 in the value's; biases are 0
        self.policy = Policy(c, seen, done, self.observation_moments)

    def _make_network(self) -> None:
        """The weights of the network as views of one flat tensor, and Adam on that."""
        self.network = self.policy.network.to(self.device)
        self.weights = list(self.network.parameters())
        flat, sizes = torch.cat([w.detach().flatten() for w in self.weights]), [w.numel() for w in self.weights]
        self.gradient = torch.zeros_like(flat)
        gradients = dict(zip(self.weights, self.gradient.split(sizes), strict=True))
        for weight, part in zip(self.weights, flat.split(sizes), strict=True):
            weight.data = part.view_as(weight)
        for module in self.network.modules():
            if isinstance(module, Dense):
                module.gradients = [tuple(gradients[w].view_as(w) for w in layer) for layer in module.layers]
        self.std_gradient = None if self.discrete else gradients[self.network.log_std]
        self.adam = Adam(flat, self.config.adam_eps)  # Detail 3: epsilon is 1e-5, not 1e-8

    def _make_buffers(self) -> None:
        T, N = self.config.rollout_steps, self.envs.num_envs
        self.observations = torch.zeros(T + 1, N, *self.shape, dtype=self.policy.dtype)
        self.rows = self.observations.numpy()
        self.noise = torch.zeros(T, N, self.num_actions)
        choices = () if self.actions_of.kind == "discrete" else (len(self.actions_of.sizes),)
        self.actions = torch.zeros(T, N, *choices, dtype=torch.int64) if self.discrete else torch.zeros_like(self.noise)
        self.rewards = torch.zeros(T, N)
        self.terminated, self.truncated, self.counted = (torch.zeros(T, N, dtype=torch.bool) for _ in range(3))
        self.final_observations: list[tuple[int, int, np.ndarray]] = []  # same_step: (t, environment, observation)

    def start_environments(self, seed: int) -> None:
        N = self.envs.num_envs
        self.finished_before = np.zeros(N, dtype=bool)  # the last step ended an episode
        self.episode_return, self.episode_length, self.discounted_return = np.zeros(N), np.zeros(N, int), np.zeros(N)
        self._observe(self.envs.reset(seed=seed)[0], -2)

    def _observe(self, raw: np.ndarray, t: int) -> None:
        """Observations of step t into row t + 1. With NEXT_STEP those after an episode's last step do not count: they
        are not in the moments, and after a termination, where none is needed, it is replaced by zeros."""
        if self.config.normalize_observations:
            self.observation_moments.update(raw if self.same_step else raw[~self.finished_before])
        self.rows[t + 1] = self.policy.encode(raw)
        if not self.same_step and np.count_nonzero(self.finished_before):  # quicker than any()
            self.rows[t + 1, self.terminated.numpy()[t]] = 0  # it may be NaN

    @torch.no_grad()
    def collect(self) -> None:
        """T steps of every environment into the buffers.

        With autoreset NEXT_STEP the step after an episode's last one only resets: its action is ignored, its reward is
        0, and its observation is the last one of the old episode. Such a step is not `counted`.
        """
        to_device, policy = self.device.type != "cpu", self.network.policy
        # Noise for the whole rollout: arg max (logits + Gumbel noise) is a sample of softmax(logits)
        if self.discrete:
            self.noise.exponential_(generator=self.generator).log_().neg_()
        else:
            self.noise.normal_(generator=self.generator)
            std = self.network.log_std.exp().cpu()
        self.final_observations.clear()
        self.observations[0] = self.observations[-1]
        actions, several = self.actions.numpy(), self.actions_of.kind == "several"
        columns = [x.numpy() for x in (self.rewards, self.terminated, self.truncated, self.counted)]
        rewards, terminated, truncated, counted = columns
        rows = zip(self.observations.unbind(0), self.noise.unbind(0), self.actions.unbind(0), strict=False)
        for t, (observation, noise, action) in enumerate(rows):
            out = policy(observation.to(self.device)).cpu() if to_device else policy(observation)
            if several:
                action.copy_(self.policy.argmax(out.add_(noise)))
            elif self.discrete:
                torch.argmax(out.add_(noise), -1, out=action)
            else:
                torch.addcmul(out, std, noise, out=action)
            raw, rewards[t], terminated[t], truncated[t], infos = self.envs.step(self._to_environment(actions[t]))
            self.position = t + 1
            if self.request.name is not None and self._waited_long():
                raise Stopped(self.request.name, f"stopped in update {self.updates_done + 1}")
            if not self.same_step:
                np.logical_not(self.finished_before, out=counted[t])
                self.finished_before = terminated[t] | truncated[t]
            self._observe(raw, t)
            if self.same_step and truncated[t].any():  # raw is already the first of the next episode
                for i in np.flatnonzero(truncated[t]):
                    last = self.policy.encode(np.array(infos["final_obs"][i])[None])[0]
                    self.final_observations.append((t, int(i), last))
        if self.same_step:
            counted[:] = True
        self._count_episodes()
        self.position = 0

    def _waited_long(self) -> bool:
        """Whether a request to stop is older than a scheduler may wait before it kills the process."""
        self.asked = self.asked or time.monotonic()
        return time.monotonic() - self.asked > GRACE

    def _count_episodes(self) -> None:
        """Notes episodes that ended, and turns rewards into those that are learned from."""
        c, self.finished = self.config, []
        rewards, counted = self.rewards.numpy(), self.counted.numpy()
        done = (self.terminated | self.truncated).numpy() & counted
        rewards *= counted
        steps = self.steps_done + counted.sum(1).cumsum()
        for t in range(len(rewards)):
            self.episode_return += rewards[t]
            self.episode_length += counted[t]
            if c.normalize_rewards:
                live = counted[t]
                self.discounted_return[live] = self.discounted_return[live] * c.gamma + rewards[t][live]
                self.return_moments.update(self.discounted_return[live])
                rewards[t] = np.clip(rewards[t] / np.sqrt(self.return_moments.var + 1e-8), -10, 10)
            for i in np.flatnonzero(done[t]):
                self.finished.append((int(steps[t]), float(self.episode_return[i]), int(self.episode_length[i])))
                self.episode_return[i] = self.episode_length[i] = self.discounted_return[i] = 0
        self.recent.extend(total for _, total, _ in self.finished)
        self.episodes += len(self.finished)
        self.steps_done = int(steps[-1])

    @torch.no_grad()
    def advantages(self) -> tuple[Batch, dict[str, float]]:
        """The counted steps of the buffers with advantages and returns, and statistics of the rollout."""
        c, (T, N) = self.config, self.rewards.shape
        observations = self.observations.to(self.device).flatten(0, 1)
        outputs = [self.network(part) for part in observations.split(CHUNK)]
        policy, values = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        values = values.view(T + 1, N)
        # Where the episode was cut, it goes on from the final observation: with NEXT_STEP that is the next row's
        final_values = values[1:]
        if self.final_observations:
            final_values = final_values.clone()
            at, environments, last = zip(*self.final_observations, strict=True)
            last_ones = torch.as_tensor(np.stack(last), dtype=self.policy.dtype, device=self.device)
            final_values[at, environments] = self.network.value(last_ones)
        rewards, terminated, truncated, counted, actions = (
            x.to(self.device) for x in (self.rewards, self.terminated, self.truncated, self.counted, self.actions)
        )
        # Detail 5: generalised advantage estimation, delta_t = r_t + gamma V(s_t+1) - V(s_t) and
        # A_t = delta_t + gamma lam A_t+1, with V = 0 after a termination and no A_t+1 after any end of an episode.
        # What lies beyond the rollout is worth the value of its state. The returns are A_t + V(s_t)
        advantages, returns = ppo.gae(
            rewards,
            values[:-1],
            gamma=c.gamma,
            lam=c.lam,
            mask=counted,
            terminated=terminated,
            truncated=truncated,
            bootstrap=values[-1],
            final_values=final_values,
            time_major=True,
            backend=c.backend,  # type: ignore[arg-type]
        )
        actions = actions.flatten(0, 1)
        logp, entropy = self.network.logprobs(policy[: T * N], actions, with_entropy=True)
        assert entropy is not None
        columns = [observations[: T * N], actions, logp, values[:-1].flatten(), advantages.flatten(), returns.flatten()]
        if not bool(counted.all()):
            rows = counted.flatten().nonzero()[:, 0]
            columns, entropy = [x[rows] for x in columns], entropy[rows]
        batch = Batch(*columns)
        if not bool(batch.returns.isfinite().all()):
            raise NonFiniteError(
                f"a return of rollout {self.updates_done + 1} is not finite: a reward or an observation of"
                f" {c.env} is not, or the values of the network are not; try a lower lr"
            )
        if not len(batch.actions):
            return batch, {"entropy": math.nan, "explained_variance": math.nan}
        unexplained = (batch.returns - batch.old_values).var(correction=0) / batch.returns.var(correction=0)
        return batch, {"entropy": entropy.mean().item(), "explained_variance": 1 - unexplained.item()}

    def _minibatches(self, batch: Batch) -> list[Batch]:
        """Detail 6: every epoch cuts the steps, in a new random order, into minibatches of (nearly) one size."""
        c = self.config
        parts = [batch]
        if c.minibatches > 1:
            order = torch.randperm(len(batch.actions), generator=self.generator).to(self.device)
            parts = [Batch(*x) for x in zip(*(x[order].tensor_split(c.minibatches) for x in batch), strict=True)]
        parts = [part for part in parts if len(part.actions)]  # fewer steps than minibatches
        if not c.normalize_advantages:
            return parts
        # Detail 7: advantages are normalised, in each minibatch by itself
        return [part._replace(advantages=ppo.masked_whiten(part.advantages)) for part in parts]

    def learn(self, batch: Batch, *, lr: float, clip: float) -> dict[str, float]:
        """Several epochs of clipped updates; the means of their statistics."""
        c, history, norms, stopped = self.config, [], [], False
        if not len(batch.actions):  # every environment was only reset
            return {}
        parts = self._minibatches(batch)
        for epoch in range(c.epochs):
            if epoch and c.minibatches > 1:  # a single minibatch has no order
                parts = self._minibatches(batch)
            for part in parts:
                tapes = None
                if not self.policy.cnn:
                    policy, values, tapes = self.network.taped(part.observations)
                else:
                    policy, values = self.network(part.observations)
                logp, entropy = self.network.logprobs(policy, part.actions, with_entropy=c.entropy_coef > 0)
                # Detail 8: clipped surrogate objective, -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with
                # ratio = exp(logp - old_logp). Detail 9: clipped value loss, on request, since it rarely helps.
                # Detail 10: one loss, policy + value_coef value - entropy_coef entropy
                loss, stats = ppo.ppo_loss(
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
                    backend=c.backend,  # type: ignore[arg-type]
                )
                history.append(stats)
                stopped = c.target_kl is not None and stats["approx_kl"].item() > c.target_kl
                if stopped:
                    break
                self._differentiate(loss, policy, values, tapes)
                norms.append(self._descend(lr))
            if stopped:
                break
        # Detail 12: what to look at when it does not learn: both losses, approx_kl, clip_fraction, grad_norm; entropy
        # and explained_variance come from `advantages`
        table = torch.stack([x for stats in history for x in stats.values()]).view(len(history), -1)
        means = dict(zip(history[0], table.mean(0).tolist(), strict=True))
        means["grad_norm"] = sum(norms) / max(len(norms), 1)
        return {**means, "minibatches": len(norms), "lr": lr, "clip": clip}

    def _differentiate(self, loss: Tensor, policy: Tensor, values: Tensor, tapes: list[list[Tensor]] | None) -> None:
        """The gradient of the loss by all weights, to `self.gradient`."""
        if tapes is None:
            gradients = torch.autograd.grad(loss, self.weights)
            torch.cat([g.flatten() for g in gradients], out=self.gradient)
            return
        outputs = [policy, values] if self.std_gradient is None else [policy, values, self.network.log_std]
        by_policy, by_values, *by_std = torch.autograd.grad(loss, outputs)
        self.network.backward(by_policy, by_values, tapes)
        if self.std_gradient is not None:
            self.std_gradient.copy_(by_std[0])

    def _descend(self, lr: float) -> float:
        """One optimizer step; the norm of the gradient before it was clipped."""
        size = torch.linalg.vector_norm(self.gradient).item()
        if not math.isfinite(size):
            raise NonFiniteError(
                f"the gradient of update {self.updates_done + 1} is {size}; try normalize_rewards,"
                " normalize_observations, or a lower lr"
            )
        # Detail 11: the gradient of all weights together is clipped
        if self.config.max_grad_norm is not None and size > self.config.max_grad_norm:
            self.gradient *= self.config.max_grad_norm / (size + 1e-6)
        self.adam.step(self.gradient, lr)
        return size

    def step(self) -> dict[str, float]:
        """One rollout and its update; the metrics. Times are in seconds."""
        c, before, start = self.config, self.steps_done, time.perf_counter()
        left = max(0.0, 1 - before / c.total_steps)
        self.collecting = True
        self.collect()
        self.collecting = False
        collected = time.perf_counter()
        batch, metrics = self.advantages()
        # Detail 4: the learning rate falls linearly to 0, and so may the clip range
        lr = c.lr * (left if c.lr_schedule == "linear" else 1.0)
        clip = c.clip * (left if c.clip_schedule == "linear" else 1.0)
        metrics |= self.learn(batch, lr=lr, clip=clip)
        self.updates_done += 1
        end = time.perf_counter()
        if self.recent:
            metrics |= {"return": sum(self.recent) / len(self.recent)}
        if self.finished:
            metrics |= {"episode_length": sum(length for _, _, length in self.finished) / len(self.finished)}
        return {
            "step": self.steps_done,
            "update": self.updates_done,
            "episodes": self.episodes,
            **metrics,
            "seconds/collect": collected - start,
            "seconds/learn": end - collected,
            "steps_per_second": (self.steps_done - before) / (end - start),
        }

    @torch.no_grad()
    def values(self, raw: np.ndarray) -> np.ndarray:
        """The value [B] of each raw observation [B, ...], in units of the rewards that are learned from."""
        return self.network.value(self.policy.as_tensor(raw)).cpu().numpy()

    def act(self, raw: np.ndarray) -> np.ndarray:
        """The likeliest action for each raw observation [B, ...], as the environment takes it."""
        return np.asarray(self.policy.act(raw))

    def evaluate(self, episodes: int, *, record: str = "none") -> list[float]:
        """Returns of episodes with the likeliest actions; pictures of the first go to OUT/episode.gif or OUT/frames."""
        return evaluate.evaluate(self, episodes, record=record)

    def _run(self, log: Log) -> Path | None:
        """Updates up to the last one, with checkpoints; the last of these. A signal ends the run after an update, and
        an error of the environments at once: what was learned until then is saved."""
        c, failure = self.config, None
        saved = checkpoint.newest(Path(c.out) / "checkpoints") if c.out and c.resume else None
        saved_at = self.updates_done if c.resume else None
        while self.steps_done < c.total_steps and self.request.name is None:
            try:
                log.record(self.step())
            except (Exception, KeyboardInterrupt) as error:  # of any kind: user code
                if not self.collecting or c.out is None:
                    raise
                failure = error
                time.sleep(0.1)  # a signal that has ended a process of the environments may be on its way to this one
                break
            if c.save_every and self.updates_done % c.save_every == 0 and (folder := classic_state.save(self)):
                saved, saved_at = folder, self.updates_done
                classic_state.restart_environments(self, environment_states(self.envs))
        # Stopped between two checkpoints, a run whose environments would start anew here, unlike in one that was not
        # stopped, continues from the last of them
        stopped = failure is not None or self.request.name is not None
        anew = failure is not None or environment_states(self.envs) is None
        if saved_at != self.updates_done and not (stopped and anew and c.save_every and saved):
            saved, saved_at = classic_state.save(self, whole=failure is None), self.updates_done
        if self.request.name is not None:
            where = "nothing was saved, because out is not set"
            if saved is not None:
                where = f"{saved} is the checkpoint of update {saved_at}, from which --resume continues"
            raise Stopped(self.request.name, f"stopped after update {self.updates_done}; {where}") from failure
        if failure is not None:
            log.say(f"the environments failed in update {self.updates_done + 1}; {saved} has what was learned before")
            raise failure
        return saved

    def train(self) -> dict[str, Any]:
        """Runs to the end, evaluates, and returns a summary, which is also written to OUT/summary.json.

        Raises:
            Stopped: a KeyboardInterrupt. After Ctrl-C, SIGTERM or SIGHUP an update comes to its end, and with an OUT
                the run is saved; `resume` continues it.
        """
        with locked(self.config.out):
            return self._train()

    def _train(self) -> dict[str, Any]:
        c, parent = self.config, Path(self.config.out or "") / "checkpoints"
        if c.resume:
            newest = checkpoint.newest(parent)
            if newest is None:
                raise UserError(f"nothing to resume: there is no checkpoint in {parent}; start anew in another folder")
            classic_state.load(self, newest)
        if c.eval_episodes:  # what cannot be evaluated, or drawn, must fail at once
            self.evaluate(0, record=c.record)
        start, began = time.perf_counter(), self.steps_done
        with (
            Log(c, self.steps_done, RECENT, lambda: self.steps_done + self.position * self.envs.num_envs) as log,
            stop_requests(lambda text: log.say(text) if c.out else None) as self.request,
        ):
            log.say(self._description())
            saved = self._run(log)
            seconds = time.perf_counter() - start
            log.doing = lambda: f"evaluation: {self.evaluated} of {c.eval_episodes} episodes"
            returns = self.evaluate(c.eval_episodes, record=c.record) if c.eval_episodes else []
            if self.request.name is not None:
                raise Stopped(self.request.name, f"stopped in the evaluation; the training is complete, {saved}")
            summary = {
                "env": c.env,
                "steps": self.steps_done,
                "episodes": self.episodes,
                "seconds": seconds,
                "steps_per_second": (self.steps_done - began) / max(seconds, 1e-9),
                "return": sum(self.recent) / len(self.recent) if self.recent else None,
                "eval_returns": returns,
                "eval_return": sum(returns) / len(returns) if returns else None,
            }
            log.close_with(summary)
        return summary

    def _description(self) -> str:
        """What learns, in one line."""
        c, space = self.config, self.envs.single_action_space
        network = "CNN" if self.policy.cnn else f"MLP of {c.hidden_layers} layers of {c.hidden_size}"
        kind = f"one {network} with two heads" if c.shared else f"policy and value: one {network} each"
        seen = f"{'x'.join(map(str, self.shape))} numbers"
        return f"observations: {seen}; actions: {space}; {kind}, {self.adam.weights.numel()} weights on {self.device}"


def main(arguments: argparse.Namespace) -> int:
    """Trains as the options of `add_arguments` say and returns the exit status, 128 + signal after a signal; bad input
    raises UserError."""
    config = ClassicConfig(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ClassicConfig)}
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.quiet:
        threads = torch.get_num_threads()
        print(
            f"PPO on {config.env}: {config.total_steps} steps of {config.num_envs} environments;"
            f" PyTorch uses {threads} thread{'s' * (threads > 1)}",
            flush=True,
        )
    trainer = ClassicTrainer(config)
    try:
        trainer.train()
    except Stopped as stopped:
        print(f"ppo-fast: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    finally:
        close(trainer.envs)
    return 0
