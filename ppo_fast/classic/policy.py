"""A policy: from observations to actions, during training and after it was saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.classic.network import Network
from ppo_fast.classic.normalize import RunningMeanStd, RunningState
from ppo_fast.classic.spaces import ActionDecoder, ObservationEncoder, from_parts, to_parts
from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError

ENCODER, DECODER = "observation_", "action_"  # prefixes of the arrays of both in a checkpoint

Code = TypeVar("Code", ObservationEncoder, ActionDecoder)


class PolicyState(TypedDict):
    """The state of a `Policy`: its weights, and its spaces as JSON and arrays."""

    model: dict[str, Tensor]
    spaces: dict[str, dict[str, object]]
    space_arrays: dict[str, Tensor]


class Policy:
    """Actions for observations, both in the format of the environment.

    Args:
        config: options of the run.
        encoder: converts observations to inputs of the network.
        decoder: converts outputs of the network to actions.
        rms: mean and variance of the observations, used where they are normalized; not changed here.
    """

    def __init__(
        self, config: ClassicConfig, encoder: ObservationEncoder, decoder: ActionDecoder, rms: RunningMeanStd
    ) -> None:
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.rms = rms if config.normalize_observations else None
        cnn = config.network == "cnn" or (encoder.images and config.network == "auto")
        if cnn and (len(encoder.shape) != 3 or self.rms is not None):
            raise UserError("network = cnn needs images [H, W, C] or [C, H, W], and no normalize_observations")
        self.cnn, self.in_bytes = cnn, cnn and encoder.images
        self.dtype = torch.uint8 if self.in_bytes else torch.float32
        scale = torch.ones(1, 1, 1) if encoder.scale is None else torch.from_numpy(encoder.scale)
        self.network = Network(
            encoder.shape,
            decoder.sizes,
            config,
            discrete=decoder.kind != "box",
            pixel_scale=(scale if encoder.images else torch.ones(1, 1, 1)) if cnn else None,
        )
        self.weight = next(self.network.parameters())  # all others are on its device
        self.raw_shape = () if encoder.categories else encoder.shape

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Convert observations [B, ...] to inputs of the network; a CNN scales images itself."""
        if self.in_bytes:
            return raw
        return self.encoder.encode(raw, self.rms)

    def as_tensor(self, raw: np.ndarray) -> Tensor:
        """Convert observations [B, ...] to inputs on the device of the network."""
        return torch.as_tensor(self.encode(np.asarray(raw))).to(self.weight.device, self.dtype)

    @torch.no_grad()
    def act(
        self, observation: ArrayLike | dict, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> np.ndarray | np.generic:
        """Choose the most likely action for an observation, or for each in a batch.

        Args:
            observation: one observation of the environment, with the wrappers of the run, or a batch [B, ...]. For a
                Dict or Tuple: the output of gymnasium.wrappers.FlattenObservation.
            sample: sample from the policy instead.
            generator: of PyTorch, on the CPU, for `sample`; None: PyTorch's own.

        Returns:
            The action in the format of the environment, or a batch of actions.

        Raises:
            UserError: the observation has another shape than those of the environment.
        """
        if isinstance(observation, dict | tuple):
            raise UserError(
                "the policy takes what gymnasium.wrappers.FlattenObservation makes of observations of a Dict or Tuple"
            )
        raw, shape = np.asarray(observation), self.raw_shape
        single = raw.shape == shape
        if raw.dtype.kind not in "biuf" or (not single and raw.shape[1:] != shape) or raw.ndim > len(shape) + 1:
            expected = ", ".join(map(str, shape))
            raise UserError(f"the policy takes observations [{expected}] or batches of them, got {list(raw.shape)}")
        out = self.network.policy(self.as_tensor(raw[None] if single else raw)).cpu()
        actions = self.decoder.to_environment(self._choose(out, sample, generator).numpy())
        return actions[0] if single else actions

    def _choose(self, out: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        if self.decoder.kind == "box":
            noise = torch.randn(out.shape, generator=generator) * self.network.log_std.exp().cpu() if sample else 0
            return out + noise
        if sample:  # arg max (logits + Gumbel noise) is a sample of softmax(logits)
            out = out - torch.empty_like(out).exponential_(generator=generator).log_()
        return self.argmax(out)

    def argmax(self, out: Tensor) -> Tensor:
        """Return the most likely choice [B], or that of each component [B, components], from logits [B, A]."""
        if self.decoder.kind == "discrete":
            return out.argmax(-1)
        return torch.stack([part.argmax(-1) for part in out.split(self.decoder.sizes, -1)], -1)

    def state_dict(self) -> PolicyState:
        """Return copies of the weights, and the spaces."""
        spaces: dict[str, dict[str, object]] = {}
        arrays: dict[str, Tensor] = {}
        codes: list[tuple[str, ObservationEncoder | ActionDecoder]] = [(ENCODER, self.encoder), (DECODER, self.decoder)]
        for prefix, code in codes:
            spaces[prefix], parts = to_parts(code)
            arrays |= {prefix + name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parts.items()}
        model = {name: x.clone() for name, x in self.network.state_dict().items()}
        return {"model": model, "spaces": spaces, "space_arrays": arrays}

    def load_state_dict(self, state: PolicyState) -> None:
        """Copy the weights of what `state_dict` returned; the spaces are those of `__init__`."""
        self.network.load_state_dict(state["model"])


def load(folder: str | Path) -> Policy:
    """Load the policy that a run has saved.

    Args:
        folder: OUT of the run, whose newest checkpoint is read; or a checkpoint, OUT/checkpoints/step-N.

    Raises:
        UserError: there is no policy in the folder, or it is damaged; the message names the file and the reason.

    >>> from ppo_fast import classic
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
    rms = RunningMeanStd(())
    try:
        rms.load_state_dict(read_statistics(saved.tensors["run"], ENCODER))
        encoder = _read_code(ObservationEncoder, saved, ENCODER)
        policy = Policy(ClassicConfig(**saved.state["config"]), encoder, _read_code(ActionDecoder, saved, DECODER), rms)
        policy.load_state_dict(read_policy(saved))
    except (KeyError, TypeError, RuntimeError) as error:  # of another version
        raise foreign from error
    return policy


def read_statistics(arrays: Mapping[str, Tensor], prefix: str) -> RunningState:
    """Read running statistics from the arrays of a checkpoint."""
    mean, var, count = (arrays[prefix + name].numpy() for name in ("mean", "var", "count"))
    return {"mean": mean, "var": var, "count": count}


def read_policy(saved: checkpoint.Checkpoint) -> PolicyState:
    """Read the state of the policy from a checkpoint."""
    return {
        "model": saved.tensors["model"],
        "spaces": saved.state["spaces"],
        "space_arrays": saved.tensors["spaces"],
    }


def _read_code(kind: type[Code], saved: checkpoint.Checkpoint, prefix: str) -> Code:
    """Build the encoder or decoder of a checkpoint."""
    arrays = {
        name.removeprefix(prefix): x.numpy() for name, x in saved.tensors["spaces"].items() if name.startswith(prefix)
    }
    return from_parts(kind, saved.state["spaces"][prefix], arrays)
