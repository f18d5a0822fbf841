"""PPO for Gymnasium's vector environments, in one file that reads from top to bottom.

    ppo-fast classic --env CartPole-v1 --out runs/cartpole

Options, network, environments, sampling, advantages, learning, evaluation, checkpoints, command line: in this order.
"Detail n" marks where each of the 13 core details of Huang et al. 2022, "The 37 Implementation Details of Proximal
Policy Optimization", happens. T steps of N environments make a rollout; tensors are [T, N], time first.

What makes it quick on a CPU, where a small network's time goes into calling operations: a step of the environments
costs one forward pass of the policy and nothing else; the noise of a whole rollout is drawn at once, values and
log-probabilities are computed for all of it after the last step; the gradients of an MLP are written down by hand; and
all weights live in one flat tensor, so that clipping and Adam are a handful of operations.

A run that goes on from a checkpoint gives the same bits as one that was not stopped, if both save at the same updates:
environments with get_state and set_state (ours) go on where they were; all others start new episodes at a checkpoint.
"""

import argparse
import dataclasses
import itertools
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

import ppo_fast as ppo
from ppo_fast import checkpoint
from ppo_fast.classic_log import Log
from ppo_fast.config import check_setting, setting
from ppo_fast.envs.vector import (
    environment_states,
    make_env,
    make_envs,
    parse_arguments,
    resets_in_same_step,
    restore_environments,
    write_frames,
)
from ppo_fast.errors import NonFiniteError, UserError

CHUNK = 8192  # observations in one forward pass without gradients
RECENT = 100  # episodes that the reported return is the mean of
MOST_FRAMES = 500
RUNNING = ("episode_return", "episode_length", "discounted_return")  # arrays [N] of a trainer
# Options that may differ between a run and its continuation
FREE = {"out", "resume", "quiet", "save_every", "tensorboard", "eval_episodes", "record", "total_steps", "threads"}


@dataclass
class ClassicConfig:
    """Options of `ClassicTrainer`. Defaults follow CleanRL's ppo.py where nothing else is named.

    >>> ClassicConfig(env="CartPole-v1").gamma
    0.99
    >>> ClassicConfig(gamma=1.5)
    Traceback (most recent call last):
    ppo_fast.errors.UserError: gamma must lie in [0, 1], got 1.5
    """

    # The environments
    env: str = setting("CartPole-v1", "Gymnasium's name of the environment, or module:Name-v0")
    env_kwargs: str = setting("{}", 'arguments of the environment as JSON, such as {"size": 9}')
    num_envs: int = setting(8, "environments that run side by side (N)", 1)
    vectorization: str = setting(
        "auto",
        "auto: the environment's own vector form if it has one, else sync",
        choices=("auto", "vector_entry_point", "sync", "async"),
    )
    autoreset: str = setting(
        "next_step",
        "when a finished environment starts anew; same_step needs Gymnasium 1.1 and sync or async",
        choices=("next_step", "same_step"),
    )
    normalize_observations: bool = setting(False, "observations to running mean 0 and variance 1, clipped to +-10")
    normalize_rewards: bool = setting(False, "rewards divided by the running spread of the return, clipped to +-10")

    # The loop
    total_steps: int = setting(100_000, "steps of single environments in all", 1)
    rollout_steps: int = setting(128, "steps of each environment between two updates (T)", 1)
    seed: int = setting(0, "seed of everything random: weights, environments, actions, minibatches", 0)

    # The network
    network: str = setting("auto", "auto: cnn for images, mlp for the rest", choices=("auto", "mlp", "cnn"))
    shared: bool = setting(False, "policy and value share all layers but the last (else: separate networks)")
    hidden_size: int = setting(64, "width of hidden layers", 1)
    hidden_layers: int = setting(2, "number of hidden layers of an mlp", 0)
    activation: str = setting("tanh", "of an mlp", choices=("tanh", "relu"))
    log_std_init: float = setting(0.0, "continuous actions: natural logarithm of the first standard deviation")

    # Advantages and loss
    gamma: float = setting(0.99, "discount per step", 0.0, 1.0)
    lam: float = setting(0.95, "lambda of GAE (Schulman et al. 2016)", 0.0, 1.0)
    normalize_advantages: bool = setting(True, "advantages of each minibatch to mean 0 and variance 1")
    epochs: int = setting(4, "passes over each rollout", 1)
    minibatches: int = setting(4, "optimizer steps in each epoch", 1)
    clip: float = setting(0.2, "ratio clipped to 1 +- this", 0.0, 1.0)
    clip_schedule: str = setting("constant", "clip over the run", choices=("constant", "linear"))
    value_clip: float | None = setting(None, "how far a value moves per rollout before its gradient stops", 0.0)
    value_coef: float = setting(0.5, "weight of the value loss, 0.5 (v - R)^2", 0.0)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus, per nat", 0.0)
    target_kl: float | None = setting(None, "a minibatch with a larger approx_kl (nats) ends the update", 0.0)
    lr: float = setting(2.5e-4, "Adam's learning rate", 0.0)
    lr_schedule: str = setting("linear", "learning rate over the run", choices=("constant", "linear"))
    adam_eps: float = setting(1e-5, "Adam's epsilon", 0.0)
    max_grad_norm: float = setting(0.5, "the gradient of all weights is clipped to this norm", 0.0)

    # Machine and output
    device: str = setting("cpu", "of the network: cpu, cuda, ...; small networks are fastest on a cpu")
    threads: int = setting(1, "PyTorch's threads; small networks are fastest with 1; 0: as they are", 0)
    backend: str = setting("auto", "arithmetic of the losses", choices=("auto", "triton", "torch"))
    eval_episodes: int = setting(10, "episodes of the evaluation after the last update, likeliest actions", 0)
    record: str = setting(
        "none", "pictures of the first evaluation episode, at most 500", choices=("none", "gif", "png")
    )
    out: str | None = setting(None, "folder for metrics, TensorBoard events, checkpoints and pictures")
    tensorboard: bool = setting(True, "write TensorBoard events to OUT/tensorboard")
    save_every: int = setting(
        0,
        "checkpoint every n updates; 0: only at the end. Environments that cannot save their state start anew then",
        0,
    )
    resume: bool = setting(False, "go on from the newest checkpoint in OUT")
    quiet: bool = setting(False, "print nothing but errors")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            check_setting(option.name, getattr(self, option.name), option)
        if self.num_envs * self.rollout_steps < self.minibatches:
            rollout = self.num_envs * self.rollout_steps
            raise UserError(f"minibatches must be at most num_envs * rollout_steps = {rollout}, got {self.minibatches}")
        if self.autoreset == "same_step" and self.vectorization == "vector_entry_point":
            raise UserError("autoreset = same_step needs vectorization = sync or async: an environment's own vector")
        if self.out is None and (self.resume or self.record != "none"):
            raise UserError("resume and record need out, the folder to read and write")
        if self.record != "none" and not self.eval_episodes:
            raise UserError(f"record = {self.record} needs eval_episodes of at least 1: it draws the first of them")


class Dense(nn.Module):
    """Linear layers, weights [in, out], each with the activation (tanh, relu or none) after it.

    The gradient can be had from autograd, or by hand, which is a fifth quicker in a small network: `forward` then keeps
    each layer's input and the output on a tape, and `backward` writes the weights' gradients to `gradients`.
    """

    def __init__(self, sizes: list[int], gain: float, generator: torch.Generator, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        # Detail 2: orthogonal weights, zero biases
        weights = [nn.init.orthogonal_(torch.empty(x), gain, generator=generator) for x in itertools.pairwise(sizes)]
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList([torch.zeros(n) for n in sizes[1:]])
        self.layers = list(zip(self.weights, self.biases, strict=True))
        self.gradients: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, tape: list[Tensor] | None = None) -> Tensor:
        x = x.flatten(1) if x.ndim > 2 else x
        for weight, bias in self.layers:
            if tape is not None:
                tape.append(x)
            x = torch.addmm(bias, x, weight)
            if self.activation != "none":
                x = torch.tanh_(x) if self.activation == "tanh" else torch.relu_(x)
        if tape is not None:
            tape.append(x)
        return x

    def backward(self, gradient: Tensor, tape: list[Tensor], *, to_input: bool) -> Tensor:
        """From the loss's gradient by the output to those by the weights and, on request, by the input."""
        for i in reversed(range(len(self.layers))):
            if self.activation == "tanh":
                gradient = torch.ops.aten.tanh_backward(gradient, tape[i + 1])
            elif self.activation == "relu":
                gradient = gradient * (tape[i + 1] > 0)
            torch.mm(tape[i].T, gradient, out=self.gradients[i][0])
            torch.sum(gradient, 0, out=self.gradients[i][1])
            if i or to_input:
                gradient = gradient @ self.layers[i][0].T
        return gradient


class Pixels(nn.Module):
    """Images [B, H, W, C] or [B, C, H, W], whose shorter end is the channels, to [B, C, H, W] times `scale`."""

    def __init__(self, shape: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.last, self.scale, self.channels = shape[-1] <= shape[0], scale, min(shape[0], shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return (x.permute(0, 3, 1, 2) if self.last else x).float() * self.scale


def make_trunk(
    shape: tuple[int, ...], config: "ClassicConfig", pixel_scale: float | None, generator: torch.Generator
) -> nn.Module:
    """Observations [B, *shape] to features [B, hidden_size]: a small CNN, or with pixel_scale=None an MLP."""
    gain = math.sqrt(2)
    if pixel_scale is None:
        sizes = [math.prod(shape), *[config.hidden_size] * config.hidden_layers]
        return Dense(sizes, gain, generator, config.activation)
    pixels = Pixels(shape, pixel_scale)
    layers: list[nn.Module] = [pixels]
    for inputs, outputs in itertools.pairwise((pixels.channels, 16, 32, 32)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)  # halves height and width, whatever they are
        nn.init.orthogonal_(convolution.weight, gain, generator=generator)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        layers += [convolution, nn.ReLU()]
    body = nn.Sequential(*layers)
    with torch.no_grad():
        features = body(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*body, Dense([features, config.hidden_size], gain, generator, "relu"))


class Network(nn.Module):
    """Policy and value of an observation. Detail 13: two networks, or one with two heads."""

    def __init__(
        self,
        shape: tuple[int, ...],
        actions: int,
        config: "ClassicConfig",
        *,
        discrete: bool,
        pixel_scale: float | None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        self.discrete, self.shared = discrete, config.shared
        self.policy_trunk = make_trunk(shape, config, pixel_scale, generator)
        self.value_trunk = self.policy_trunk if config.shared else make_trunk(shape, config, pixel_scale, generator)
        width = math.prod(shape) if pixel_scale is None and not config.hidden_layers else config.hidden_size
        self.policy_head = Dense([width, actions], 0.01, generator)  # first actions are nearly uniform
        self.value_head = Dense([width, 1], 1.0, generator)
        if not discrete:  # the spread does not depend on the observation
            self.log_std = nn.Parameter(torch.full((actions,), float(config.log_std_init)))

    def policy(self, x: Tensor) -> Tensor:
        """[B, *shape] to logits or means [B, A]."""
        return self.policy_head.forward(self.policy_trunk.forward(x))  # nn.Module's __call__ takes as long as a layer

    def value(self, x: Tensor) -> Tensor:
        """[B, *shape] to [B]."""
        return self.value_head.forward(self.value_trunk.forward(x)).view(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shared:
            return self.policy(x), self.value(x)
        features = self.policy_trunk(x)
        return self.policy_head(features), self.value_head(features).view(-1)

    @torch.no_grad()
    def taped(self, x: Tensor) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """`forward` of MLPs and the tapes for `backward`; policy and values are leaves to autograd."""
        tapes: list[list[Tensor]] = [[], [], [], []]
        features = self.policy_trunk.forward(x, tapes[0])
        others = features if self.shared else self.value_trunk.forward(x, tapes[1])
        policy = self.policy_head.forward(features, tapes[2])
        values = self.value_head.forward(others, tapes[3]).view(-1)
        return policy.requires_grad_(), values.requires_grad_(), tapes

    @torch.no_grad()
    def backward(self, by_policy: Tensor, by_values: Tensor, tapes: list[list[Tensor]]) -> None:
        """The gradients of all layers, from the loss's gradients by policy and values."""
        left = self.policy_head.backward(by_policy, tapes[2], to_input=True)
        right = self.value_head.backward(by_values[:, None], tapes[3], to_input=True)
        if self.shared:
            self.policy_trunk.backward(left + right, tapes[0], to_input=False)  # type: ignore[operator]
        else:
            self.policy_trunk.backward(left, tapes[0], to_input=False)  # type: ignore[operator]
            self.value_trunk.backward(right, tapes[1], to_input=False)  # type: ignore[operator]

    def logprobs(self, policy: Tensor, actions: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each action [B] and on request the entropy [B], in nats, from what `policy` returned."""
        if not self.discrete:
            z = (actions - policy) * torch.exp(-self.log_std)
            constant = self.log_std.sum() + 0.5 * len(self.log_std) * math.log(2 * math.pi)
            logp = -0.5 * z.square().sum(-1) - constant
            return logp, (constant + 0.5 * len(self.log_std)).expand_as(logp) if with_entropy else None
        if not with_entropy:
            return -F.cross_entropy(policy, actions, reduction="none"), None
        table = torch.log_softmax(policy, -1)  # ppo.token_logprobs is made for vocabularies, not for a few actions
        return table.gather(1, actions[:, None])[:, 0], -(table.exp() * table).sum(-1)


class Adam:
    """Kingma and Ba 2015 on one flat tensor. torch.optim.Adam's step takes 70 us longer, a tenth of CartPole's."""

    def __init__(self, weights: Tensor, eps: float) -> None:
        self.weights, self.eps, self.steps = weights, eps, 0
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)

    def step(self, gradient: Tensor, lr: float) -> None:
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        # The corrections of both means for their start at 0 are in the step size and in epsilon. Detail 3: epsilon is
        # 1e-5, not 1e-8
        correction = math.sqrt(1 - 0.999**self.steps)
        spread = self.square.sqrt().add_(self.eps * correction)
        self.weights.addcdiv_(self.mean, spread, value=-lr * correction / (1 - 0.9**self.steps))


class Moments:
    """Running mean and variance of [n, ...] arrays (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), np.full((), 1e-4)

    def update(self, x: np.ndarray) -> None:
        if len(x):
            delta, total = x.mean(0) - self.mean, self.count + len(x)
            self.var = (self.var * self.count + x.var(0) * len(x) + delta**2 * self.count * len(x) / total) / total
            self.mean, self.count = self.mean + delta * len(x) / total, total


def pick_device(name: str) -> torch.device:
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, no such GPU, a PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"device = {name} cannot be used: {reason}; use cpu") from error


class Batch(NamedTuple):
    """The counted steps of a rollout, one after the other."""

    observations: Tensor
    actions: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


class ClassicTrainer:
    """PPO (Schulman et al. 2017) on a Gymnasium vector environment.

    Args:
        config: every option.
        env_kwargs: more arguments of the environment, such as functions, which JSON cannot hold.
        envs: the environments, if they are not to be made from `config`; `evaluate` then makes its own all the same.

    >>> trainer = ClassicTrainer(ClassicConfig(env="CartPole-v1", total_steps=2048, quiet=True))
    >>> trainer.train()["steps"] >= 2048
    True
    """

    def __init__(
        self, config: ClassicConfig, *, env_kwargs: dict[str, Any] | None = None, envs: VectorEnv | None = None
    ) -> None:
        self.config, self.env_kwargs = config, parse_arguments(config.env_kwargs) | (env_kwargs or {})
        self.device = pick_device(config.device)
        choice = {"vectorization": config.vectorization, "autoreset": config.autoreset}
        # Detail 1: N environments step together
        self.envs = envs or make_envs(config.env, self.env_kwargs, count=config.num_envs, **choice)
        self.same_step = resets_in_same_step(self.envs)
        self._read_spaces()
        self._make_network()
        self._make_buffers()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.observation_moments, self.return_moments = Moments(self.shape), Moments(())
        self.steps_done = self.updates_done = 0
        self.episodes = 0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.finished: list[tuple[int, float, int]] = []  # of the last rollout: steps done by then, return, length
        self._start_environments(config.seed)

    def _read_spaces(self) -> None:
        action, observation = self.envs.single_action_space, self.envs.single_observation_space
        if not isinstance(action, spaces.Discrete) and not (isinstance(action, spaces.Box) and len(action.shape) == 1):
            raise UserError(f"{self.config.env} has the action space {action}; this PPO takes Discrete and Box(n,)")
        if not isinstance(observation, spaces.Box | spaces.Discrete):
            raise UserError(
                f"{self.config.env} has the observation space {observation}; this PPO takes Box and Discrete:"
                " put gymnasium.wrappers.FlattenObservation around the environment"
            )
        self.discrete = isinstance(action, spaces.Discrete)
        self.first_action = int(getattr(action, "start", 0))
        self.num_actions = int(action.n) if isinstance(action, spaces.Discrete) else action.shape[0]
        self.categories = int(observation.n) if isinstance(observation, spaces.Discrete) else 0  # become one-hot
        self.shape = (self.categories,) if self.categories else tuple(observation.shape or ())
        pixels = len(self.shape) == 3 and observation.dtype == np.uint8
        cnn = self.config.network == "cnn" or (pixels and self.config.network == "auto")
        if cnn and (len(self.shape) != 3 or self.config.normalize_observations):
            raise UserError("network = cnn needs images [H, W, C] or [C, H, W], and no normalize_observations")
        self.pixel_scale = (1 / 255 if pixels else 1.0) if cnn else None
        self.dtype = torch.uint8 if cnn and pixels else torch.float32

    def _make_network(self) -> None:
        """The network, its weights as views of one flat tensor, and Adam on that."""
        c = self.config
        network = Network(self.shape, self.num_actions, c, discrete=self.discrete, pixel_scale=self.pixel_scale)
        self.network = network.to(self.device)
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
        self.adam = Adam(flat, c.adam_eps)

    def _make_buffers(self) -> None:
        T, N = self.config.rollout_steps, self.envs.num_envs
        self.observations = torch.zeros(T + 1, N, *self.shape, dtype=self.dtype)
        self.noise = torch.zeros(T, N, self.num_actions)
        self.actions = torch.zeros(T, N, dtype=torch.int64) if self.discrete else torch.zeros(T, N, self.num_actions)
        self.rewards = torch.zeros(T, N)
        self.terminated, self.truncated, self.counted = (torch.zeros(T, N, dtype=torch.bool) for _ in range(3))
        self.final_observations: list[tuple[int, int, np.ndarray]] = []  # same_step: (t, environment, observation)

    def _start_environments(self, seed: int) -> None:
        N = self.envs.num_envs
        self.finished_before = np.zeros(N, dtype=bool)  # the last step ended an episode
        self.episode_return, self.episode_length, self.discounted_return = np.zeros(N), np.zeros(N, int), np.zeros(N)
        self._observe(self.envs.reset(seed=seed)[0], -1)

    def _encoded(self, raw: np.ndarray) -> np.ndarray:
        """Observations as the network takes them."""
        if self.categories:
            first = self.envs.single_observation_space.start  # type: ignore[attr-defined]
            return np.eye(self.categories, dtype=np.float32)[np.asarray(raw) - first]
        if not self.config.normalize_observations:
            return raw
        moments = self.observation_moments
        return np.clip((raw - moments.mean) / np.sqrt(moments.var + 1e-8), -10, 10)

    def _observe(self, raw: np.ndarray, t: int) -> None:
        if self.config.normalize_observations:
            self.observation_moments.update(raw)
        self.observations.numpy()[t] = self._encoded(raw)

    def _to_environment(self, actions: np.ndarray) -> np.ndarray:
        if self.discrete:
            return actions + self.first_action if self.first_action else actions
        space = self.envs.single_action_space
        return np.clip(actions, space.low, space.high).astype(space.dtype)  # type: ignore[attr-defined]

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
        before, actions = self.finished_before, self.actions.numpy()
        columns = [x.numpy() for x in (self.rewards, self.terminated, self.truncated, self.counted)]
        rewards, terminated, truncated, counted = columns
        rows = zip(self.observations.unbind(0), self.noise.unbind(0), self.actions.unbind(0), strict=False)
        for t, (observation, noise, action) in enumerate(rows):
            out = policy(observation.to(self.device)).cpu() if to_device else policy(observation)
            if self.discrete:
                torch.argmax(out.add_(noise), -1, out=action)
            else:
                torch.addcmul(out, std, noise, out=action)
            raw, rewards[t], terminated[t], truncated[t], infos = self.envs.step(self._to_environment(actions[t]))
            if not self.same_step:
                np.logical_not(before, out=counted[t])
                before = terminated[t] | truncated[t]
            self._observe(raw, t + 1)
            if self.same_step and truncated[t].any():  # raw is already the first of the next episode
                for i in np.flatnonzero(truncated[t]):
                    last = self._encoded(np.asarray(infos["final_obs"][i])[None])[0]
                    self.final_observations.append((t, int(i), last))
        self.finished_before = before
        if self.same_step:
            counted[:] = True
        self._count_episodes()

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
            last_ones = torch.as_tensor(np.stack(last), dtype=self.dtype, device=self.device)
            final_values[at, environments] = self.network.value(last_ones)
        rewards, terminated, truncated, counted, actions = (
            x.to(self.device) for x in (self.rewards, self.terminated, self.truncated, self.counted, self.actions)
        )
        # Detail 5: generalised advantage estimation; what lies beyond the rollout is worth the value of its state
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
                if self.pixel_scale is None:
                    policy, values, tapes = self.network.taped(part.observations)
                else:
                    policy, values = self.network(part.observations)
                logp, entropy = self.network.logprobs(policy, part.actions, with_entropy=c.entropy_coef > 0)
                # Detail 8: clipped surrogate objective. Detail 9: clipped value loss, on request, since it rarely
                # helps. Detail 10: one loss, policy + value_coef value - entropy_coef entropy
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
        # Detail 12: what to look at when it does not learn
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
        if size > self.config.max_grad_norm:
            self.gradient *= self.config.max_grad_norm / (size + 1e-6)
        self.adam.step(self.gradient, lr)
        return size

    def step(self) -> dict[str, float]:
        """One rollout and its update; the metrics. Times are in seconds."""
        c, before, start = self.config, self.steps_done, time.perf_counter()
        left = max(0.0, 1 - before / c.total_steps)
        self.collect()
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

    def _as_tensor(self, raw: np.ndarray) -> Tensor:
        return torch.as_tensor(self._encoded(np.asarray(raw))).to(self.device, self.dtype)

    @torch.no_grad()
    def values(self, raw: np.ndarray) -> np.ndarray:
        """The value [B] of each raw observation [B, ...], in units of the rewards that are learned from."""
        return self.network.value(self._as_tensor(raw)).cpu().numpy()

    @torch.no_grad()
    def act(self, raw: np.ndarray) -> np.ndarray:
        """The likeliest action for each raw observation [B, ...], as the environment takes it."""
        policy = self.network.policy(self._as_tensor(raw))
        return self._to_environment((policy.argmax(-1) if self.discrete else policy).cpu().numpy())

    def evaluate(self, episodes: int, *, record: str = "none") -> list[float]:
        """Returns of episodes with the likeliest actions; pictures of the first go to OUT/episode.gif or OUT/frames."""
        more = {"render_mode": "rgb_array"} if record != "none" else {}
        env, returns = make_env(self.config.env, {**self.env_kwargs, **more}), []
        try:
            if more:  # what cannot be drawn shall fail at once
                env.reset(seed=0)
                env.render()
            for episode in range(episodes):
                raw, _ = env.reset(seed=self.config.seed + 1_000_000 + episode)
                total, done, frames = 0.0, False, [env.render()] if more and episode == 0 else []
                while not done:
                    raw, reward, terminated, truncated, _ = env.step(self.act(np.asarray(raw)[None])[0])
                    total, done = total + float(reward), terminated or truncated
                    if frames and len(frames) < MOST_FRAMES:
                        frames.append(env.render())
                returns.append(total)
                if frames:
                    fps = env.metadata.get("render_fps", 30)
                    write_frames([np.asarray(x) for x in frames], Path(str(self.config.out)), record, fps=fps)
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"{self.config.env} cannot be drawn: {error}") from error
        finally:
            env.close()
        return returns

    def save(self) -> Path | None:
        """OUT/checkpoints/step-U, U updates: all that the run is; nothing without an OUT."""
        c = self.config
        if c.out is None:
            return None
        moments = {"observation": self.observation_moments, "return": self.return_moments}
        arrays = {f"{k}_{name}": np.asarray(getattr(m, name)) for k, m in moments.items() for name in vars(m)}
        arrays |= {name: getattr(self, name) for name in ("finished_before", *RUNNING)}
        tensors = {
            "model": {name: x.clone() for name, x in self.network.state_dict().items()},
            "adam": {"mean": self.adam.mean, "square": self.adam.square},
            "run": {
                "generator": self.generator.get_state(),
                "observations": self.observations[-1].clone(),
                **{name: torch.from_numpy(np.array(x)) for name, x in arrays.items()},
            },
        }
        counts = {"steps": self.steps_done, "updates": self.updates_done, "episodes": self.episodes}
        counts["adam_steps"] = self.adam.steps
        state = {"config": dataclasses.asdict(c), "recent": list(self.recent), **counts}
        state["environments"] = environment_states(self.envs)
        return checkpoint.write(Path(c.out) / "checkpoints", self.updates_done, tensors, state, keep=2)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint that `save` wrote."""
        saved = checkpoint.read(folder)
        config, run = saved.state["config"], saved.tensors["run"]
        for name, value in dataclasses.asdict(self.config).items():
            if name not in FREE and config.get(name) != value:
                raise UserError(
                    f"{folder} was made with {name} = {config.get(name)}, not {value}: a run goes on as it was"
                )
        self.network.load_state_dict(saved.tensors["model"])
        for name, x in saved.tensors["adam"].items():
            getattr(self.adam, name).copy_(x)
        self.adam.steps = saved.state["adam_steps"]
        self.generator.set_state(run["generator"])
        self.observations[-1] = run["observations"]
        for name in ("finished_before", *RUNNING):
            setattr(self, name, run[name].numpy())
        for kind, moments in (("observation", self.observation_moments), ("return", self.return_moments)):
            for name in vars(moments):
                setattr(moments, name, run[f"{kind}_{name}"].numpy())
        self.steps_done, self.updates_done = saved.state["steps"], saved.state["updates"]
        self.episodes = saved.state["episodes"]
        self.recent.extend(saved.state["recent"])
        self.go_on(saved.state["environments"])

    def go_on(self, states: list[dict[str, Any]] | None) -> None:
        """After a checkpoint, in the run that wrote it and in the one that reads it: environments that can be put back
        where they were stay there; others start anew, from a seed of this moment, so that both runs see the same."""
        if states is None:
            self._start_environments(self.config.seed + 1_000_003 * self.updates_done)
        else:
            restore_environments(self.envs, states, self.finished_before)

    def train(self) -> dict[str, Any]:
        """Runs to the end, evaluates, and returns a summary, which is also written to OUT/summary.json."""
        c, parent = self.config, Path(self.config.out or "") / "checkpoints"
        if c.resume:
            newest = checkpoint.newest(parent)
            if newest is None:
                raise UserError(f"nothing to resume: there is no checkpoint in {parent}")
            self.load(newest)
        if c.record != "none":
            self.evaluate(0, record=c.record)
        start, began = time.perf_counter(), self.steps_done
        with Log(c, self.steps_done, RECENT) as log:
            while self.steps_done < c.total_steps:
                log.record(self.step())
                if c.save_every and self.updates_done % c.save_every == 0 and self.save():
                    self.go_on(environment_states(self.envs))
            seconds = time.perf_counter() - start
            self.save()
            returns = self.evaluate(c.eval_episodes, record=c.record) if c.eval_episodes else []
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of ClassicConfig as options of a command line."""
    for option in dataclasses.fields(ClassicConfig):
        flag, kind, metadata = "--" + option.name.replace("_", "-"), str(option.type), option.metadata
        default: Any = option.default
        if "bool" in kind:
            text = f"{metadata['help']} (default: {'yes' if default else 'no'})"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
            continue
        low, high = metadata["low"], metadata["high"]
        bounds = "" if low is None else f"; at least {low:g}" if high is None else f"; {low:g} to {high:g}"
        text = f"{metadata['help']} (default: {'none' if default is None else default}{bounds})".replace("%", "%%")
        name = next(x for x in ("int", "float", "str") if x in kind)
        parser.add_argument(
            flag,
            type={"int": int, "float": float, "str": str}[name],
            default=default,
            choices=metadata["choices"] or None,
            metavar=None if metadata["choices"] else name.upper(),
            help=text,
        )


def main(arguments: argparse.Namespace) -> int:
    """Trains as the options of `add_arguments` say; bad input raises UserError."""
    config = ClassicConfig(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ClassicConfig)}
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = ClassicTrainer(config)
    try:
        trainer.train()
    finally:
        trainer.envs.close()
    return 0
