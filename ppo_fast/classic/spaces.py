"""Conversion between the spaces of an environment and the network: observations to inputs, outputs to actions.

Both classes contain numbers, strings and arrays only, so that a saved policy needs neither the environment nor
Gymnasium's spaces.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from ppo_fast.classic.normalize import Floats, RunningMeanStd
from ppo_fast.common.errors import UserError

WIDE = 20  # width of a range that is more than ten initial standard deviations to either side
UNBOUNDED = 2**31 - 1  # a bound of integers that is as large as this, or larger, is none in effect
FLATTENABLE = (spaces.Dict, spaces.Tuple, spaces.MultiBinary, spaces.MultiDiscrete)  # by FlattenObservation


@dataclass(frozen=True)
class ObservationEncoder:
    """Conversion of observations to inputs of the network.

    Discrete(n) becomes one-hot. An element of a Box of integers is divided by the largest absolute value that the space
    declares for it: a map of 0 and 1 is unchanged, pixels of 0 to 255 become 0 to 1. Floats are unchanged.
    """

    shape: tuple[int, ...]  # of one input of the network
    categories: int = 0  # n of Discrete(n)
    start: int = 0  # the first of them
    images: bool = False  # uint8 [., ., .]
    scale: npt.NDArray[np.float32] | None = None  # [*shape] or [1, ..., 1]: the factor of integers; None: 1

    def encode(self, raw: np.ndarray, rms: RunningMeanStd | None) -> np.ndarray:
        """Convert observations [B, ...] to inputs [B, *shape]; with `rms`, normalize them by its mean and variance."""
        if self.categories:
            return self._one_hot(np.asarray(raw))
        if rms is not None:
            return np.clip((raw - rms.mean) / np.sqrt(rms.var + 1e-8), -10, 10)
        return raw if self.scale is None else raw * self.scale

    def _one_hot(self, raw: np.ndarray) -> npt.NDArray[np.float32]:
        rows = raw - self.start
        if ((rows < 0) | (rows >= self.categories)).any():
            last = self.start + self.categories - 1
            raise UserError(f"an observation is {raw.tolist()}, outside of its space, {self.start} to {last}")
        out = np.zeros((len(rows), self.categories), np.float32)
        out[np.arange(len(rows)), rows] = 1
        return out


@dataclass(frozen=True)
class ActionDecoder:
    """Conversion of outputs of the network to actions of the environment.

    For a Box the sample of the Gaussian is clipped to the bounds and, for integers, rounded to the nearest. The
    Gaussian starts at 0 with a standard deviation of 1. Therefore an element whose range is finite, and does not
    contain 0 or is wider than WIDE, is measured from the middle of the range in units of half its width; an element
    whose range has one bound and does not contain 0 is measured from that bound.
    """

    kind: str  # discrete, several (MultiDiscrete, MultiBinary) or box
    sizes: tuple[int, ...]  # discrete, several: the number of choices of each; box: the number of elements
    shape: tuple[int, ...]  # of one action of the environment
    dtype: str  # of an action of the environment, as numpy names it
    start: np.ndarray | None = None  # discrete, several: the first choice of each; None: 0
    low: np.ndarray | None = None  # box: [elements]
    high: np.ndarray | None = None
    middle: np.ndarray | None = None  # box: [elements]; None: 0
    width: np.ndarray | None = None  # box: [elements]; None: 1

    @property
    def outputs(self) -> int:
        """Number of outputs of the network: logits, or means."""
        return sum(self.sizes)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions of the network [B] or [B, ...] to actions of the environment; always a copy."""
        if self.kind == "discrete":
            moved = actions if self.start is None else actions + self.start
            return moved.copy() if moved.dtype == np.int64 and self.dtype == "int64" else moved.astype(self.dtype)
        if self.kind == "several":
            moved = actions if self.start is None else actions + self.start
            return moved.reshape(-1, *self.shape).astype(self.dtype)
        if self.middle is not None:
            actions = self.middle + self.width * actions
        if np.dtype(self.dtype).kind != "f":
            actions = np.rint(np.asarray(actions, np.float64))
        return np.clip(actions, self.low, self.high).reshape(-1, *self.shape).astype(self.dtype)


def observation_encoder(env: str, space: spaces.Space) -> ObservationEncoder:
    """Make the encoder of a space; `env` is the name of the environment for messages."""
    if isinstance(space, spaces.Discrete):
        return ObservationEncoder((int(space.n),), categories=int(space.n), start=int(space.start))
    if not isinstance(space, spaces.Box) or not space.shape or not math.prod(space.shape):
        raise UserError(
            f"{env} has the observation space {space}; this PPO takes Box(n, ...), Discrete and what FlattenObservation"
            " converts to one of these: give a wrapper that selects a part, as in wrapper ="
            " minigrid.wrappers:ImgObsWrapper"
        )
    images = len(space.shape) == 3 and space.dtype == np.uint8
    return ObservationEncoder(space.shape, images=images, scale=_scale(space))


def _scale(space: spaces.Box) -> npt.NDArray[np.float32] | None:
    if space.dtype is None or space.dtype.kind not in "iub":
        return None
    largest = np.maximum(np.abs(space.low.astype(np.float64)), np.abs(space.high.astype(np.float64)))
    largest[(largest == 0) | (largest >= UNBOUNDED)] = 1
    if (largest == 1).all():
        return None
    scale = (1 / largest).astype(np.float32)
    return scale.flat[:1].reshape([1] * scale.ndim) if (scale == scale.flat[0]).all() else scale


def action_decoder(env: str, space: spaces.Space) -> ActionDecoder:
    """Make the decoder of a space; `env` is the name of the environment for messages."""
    if isinstance(space, spaces.Discrete):
        start = np.array([space.start]) if space.start else None
        return ActionDecoder("discrete", (int(space.n),), (), str(space.dtype), start)
    count = math.prod(space.shape or ())
    if isinstance(space, spaces.MultiBinary) and count:
        return ActionDecoder("several", (2,) * count, space.shape, str(space.dtype))
    if isinstance(space, spaces.MultiDiscrete) and count:
        start = np.asarray(getattr(space, "start", 0 * space.nvec)).flatten()  # not in Gymnasium 1.0
        sizes = tuple(space.nvec.flatten().tolist())
        return ActionDecoder("several", sizes, space.shape, str(space.dtype), start if start.any() else None)
    if not isinstance(space, spaces.Box) or not count:
        raise UserError(
            f"{env} has the action space {space}; this PPO takes Discrete, MultiDiscrete, MultiBinary and Box(n, ...):"
            " give a wrapper that converts it to one of these, as in wrapper = my_wrappers:Buttons"
        )
    integers = space.dtype is not None and space.dtype.kind != "f"
    low, high = (_float_bounds(x.flatten(), to=to, integers=integers) for x, to in ((space.low, 1), (space.high, -1)))
    middle, width = _from_middle(low.astype(np.float64), high.astype(np.float64))
    moved = {"middle": middle, "width": width} if middle.any() or (width != 1).any() else {}
    return ActionDecoder("box", (low.size,), space.shape, str(space.dtype), low=low, high=high, **moved)


def _from_middle(low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Return middle and half width of each range that lacks 0 or is wider than WIDE, and 0 and 1 for the others."""
    with np.errstate(over="ignore", invalid="ignore"):
        bounded = high - low < UNBOUNDED
        middle = np.where(bounded, (low + high) / 2, np.where(low > 0, low, high))
        far = (low > 0) | (high < 0) | (bounded & (high - low > WIDE))
        return np.where(far, middle, 0.0), np.where(far & bounded, np.maximum((high - low) / 2, 1e-8), 1.0)


def _float_bounds(bounds: np.ndarray, *, to: int, integers: bool) -> np.ndarray:
    """Convert bounds to float64; an integer that it lacks, such as 2^63 - 1, becomes the nearest inside the range."""
    if not integers:
        return bounds if bounds.dtype == np.float32 else bounds.astype(np.float64)
    found = [float(int(x)) for x in bounds]
    return np.array([
        math.nextafter(y, math.inf * to) if (int(y) < int(x) if to > 0 else int(y) > int(x)) else y
        for x, y in zip(bounds, found, strict=True)
    ])  # fmt: skip


Code = TypeVar("Code", ObservationEncoder, ActionDecoder)


def to_parts(code: ObservationEncoder | ActionDecoder) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Split an encoder or decoder into what JSON can represent, and its arrays."""
    fields = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    return {name: value for name, value in fields.items() if name not in arrays}, arrays


def from_parts(kind: type[Code], plain: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> Code:
    """Build an encoder or decoder from what `to_parts` returned; lists, as of JSON, become tuples."""
    make: Callable[..., Code] = kind  # by names of fields, which only `to_parts` knows
    return make(**{name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}, **arrays)
