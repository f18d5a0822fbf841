"""A policy of classic.py in use: from observations to actions, while it learns and after it was saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.classic.network import Network
from ppo_fast.classic.normalize import Moments
from ppo_fast.classic.spaces import Actions, Observations, from_parts, parts
from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError

PREFIXES = ("observation_", "action_")  # of the arrays of Observations and Actions in a checkpoint


class Policy:
    """Actions for observations, both as the environment has them.

    Args:
        config: options of the run.
        observations, actions: what the network takes, and what its outputs mean.
        moments: of the observations, if they are normalised; not changed here.
    """

    def __init__(self, config: ClassicConfig, observations: Observations, actions: Actions, moments: Moments) -> None:
        self.config, self.observations, self.actions = config, observations, actions
        self.moments = moments if config.normalize_observations else None
        cnn = config.network == "cnn" or (observations.images and config.network == "auto")
        if cnn and (len(observations.shape) != 3 or self.moments is not None):
            raise UserError("network = cnn needs images [H, W, C] or [C, H, W], and no normalize_observations")
        self.cnn, self.in_bytes = cnn, cnn and observations.images
        self.dtype = torch.uint8 if self.in_bytes else torch.float32
        scale = torch.ones(1, 1, 1) if observations.scale is None else torch.from_numpy(observations.scale)
        self.network = Network(
            observations.shape,
            actions.sizes,
            config,
            discrete=actions.kind != "box",
            pixel_scale=(scale if observations.images else torch.ones(1, 1, 1)) if cnn else None,
        )
        self.weight = next(self.network.parameters())  # where it is, the others are
        self.raw_shape = () if observations.categories else observations.shape

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Observations [B, ...] as the network takes them; those of a CNN are scaled inside it."""
        if self.in_bytes:
            return raw
        return self.observations.encode(raw, self.moments)

    def as_tensor(self, raw: np.ndarray) -> Tensor:
        """The same, on the device of the network."""
        return torch.as_tensor(self.encode(np.asarray(raw))).to(self.weight.device, self.dtype)

    @torch.no_grad()
    def act(
        self, observation: Any, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> np.ndarray | np.generic:
        """The likeliest action for an observation, or for each in a batch.

        Args:
            observation: as the environment gives it, with the wrappers of the run, or a batch [B, ...] of such. Of a
                Dict or Tuple: what gymnasium.wrappers.FlattenObservation makes of it.
            sample: draw from the policy instead.
            generator: of PyTorch, on the CPU, for `sample`; None: PyTorch's own.

        Raises:
            UserError: the observation has another shape than those of the environment.

        Returns:
            The action as the environment takes it, or a batch of actions.
        """
        if isinstance(observation, dict | tuple):
            raise UserError(
                "the policy takes what gymnasium.wrappers.FlattenObservation makes of observations of a Dict or Tuple"
            )
        raw, shape = np.asarray(observation), self.raw_shape
        single = raw.shape == shape
        if raw.dtype.kind not in "biuf" or (not single and raw.shape[1:] != shape) or raw.ndim > len(shape) + 1:
            wanted = ", ".join(map(str, shape))
            raise UserError(f"the policy takes observations [{wanted}] or batches of them, got {list(raw.shape)}")
        out = self.network.policy(self.as_tensor(raw[None] if single else raw)).cpu()
        chosen = self.actions.to_environment(self._chosen(out, sample, generator).numpy())
        return chosen[0] if single else chosen

    def _chosen(self, out: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        if self.actions.kind == "box":
            noise = torch.randn(out.shape, generator=generator) * self.network.log_std.exp().cpu() if sample else 0
            return out + noise
        if sample:  # arg max (logits + Gumbel noise) is a sample of softmax(logits)
            out = out - torch.empty_like(out).exponential_(generator=generator).log_()
        return self.argmax(out)

    def argmax(self, out: Tensor) -> Tensor:
        """The likeliest of each choice: [B], or [B, choices]."""
        if self.actions.kind == "discrete":
            return out.argmax(-1)
        return torch.stack([part.argmax(-1) for part in out.split(self.actions.sizes, -1)], -1)


def spaces_state(policy: Policy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint keeps of the spaces: for JSON, and arrays."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    codes: list[Observations | Actions] = [policy.observations, policy.actions]
    for prefix, code in zip(PREFIXES, codes, strict=True):
        plain[prefix], arrays = parts(code)
        tensors |= {prefix + name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return plain, tensors


def moments_of(tensors: dict[str, Tensor]) -> Moments:
    """The moments of observations from the arrays of a checkpoint."""
    moments = Moments(())
    for name in vars(moments):
        setattr(moments, name, tensors[f"observation_{name}"].numpy())
    return moments


def load(folder: str | Path) -> Policy:
    """The policy that a run has saved.

    Args:
        folder: OUT of the run, whose newest checkpoint is read; or a checkpoint, OUT/checkpoints/step-N.

    Raises:
        UserError: there is no policy in the folder, or it is damaged; the message says which file and why.

    >>> from ppo_fast.classic import ppo as classic
    >>> policy = classic.load("runs/cartpole")  # doctest: +SKIP
    >>> action = policy.act(observation)  # doctest: +SKIP
    """
    path = Path(folder)
    if not (path / checkpoint.SUMS).exists():
        newest = checkpoint.newest(path / "checkpoints") or checkpoint.newest(path)
        if newest is None:
            raise UserError(f"{folder} holds no policy of ppo-fast classic: give OUT of a run, or a checkpoint in it")
        path = newest
    saved = checkpoint.read(path)
    foreign = UserError(f"{path} is not a checkpoint that this version of ppo-fast classic wrote: it holds no policy")
    if not {"config", "spaces"} <= set(saved.state) or not {"model", "run", "spaces"} <= set(saved.tensors):
        raise foreign
    try:
        seen, done = _code(Observations, saved, PREFIXES[0]), _code(Actions, saved, PREFIXES[1])
        policy = Policy(ClassicConfig(**saved.state["config"]), seen, done, moments_of(saved.tensors["run"]))
        policy.network.load_state_dict(saved.tensors["model"])
    except (KeyError, TypeError, RuntimeError) as error:  # of another version
        raise foreign from error
    return policy


def _code(kind: Callable[..., Any], saved: checkpoint.Checkpoint, prefix: str) -> Any:
    arrays = {
        name.removeprefix(prefix): x.numpy() for name, x in saved.tensors["spaces"].items() if name.startswith(prefix)
    }
    return from_parts(kind, saved.state["spaces"][prefix], arrays)
