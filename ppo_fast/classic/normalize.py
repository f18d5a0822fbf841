"""Running mean and variance, to normalize observations and rewards."""

from typing import TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class RunningState(TypedDict):
    """The state of `RunningMeanStd`."""

    mean: Floats
    var: Floats
    count: Floats


class RunningMeanStd:
    """Running mean and variance of arrays [n, *shape] in float64 (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean: Floats = np.zeros(shape)
        self.var: Floats = np.ones(shape)
        self.count: Floats = np.zeros(())

    def update(self, x: np.ndarray) -> None:
        """Include the rows of `x`, perhaps none."""
        if len(x):
            x = np.asarray(x, np.float64)
            delta, total = x.mean(0) - self.mean, self.count + len(x)
            self.var = (self.var * self.count + x.var(0) * len(x) + delta**2 * self.count * len(x) / total) / total
            self.mean, self.count = self.mean + delta * len(x) / total, total

    def state_dict(self) -> RunningState:
        """Return mean, variance and count; they are not changed by later updates."""
        return {"mean": self.mean, "var": self.var, "count": np.asarray(self.count)}

    def load_state_dict(self, state: RunningState) -> None:
        """Restore what `state_dict` returned."""
        self.mean, self.var, self.count = state["mean"], state["var"], state["count"]
