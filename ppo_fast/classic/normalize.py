"""TODO docstring."""

import numpy as np


class Moments:
    """Running mean and variance of [n, ...] arrays in float64 (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), np.zeros(())

    def update(self, x: np.ndarray) -> None:
        if len(x):
            x = np.asarray(x, np.float64)
            delta, total = x.mean(0) - self.mean, self.count + len(x)
            self.var = (self.var * self.count + x.var(0) * len(x) + delta**2 * self.count * len(x) / total) / total
            self.mean, self.count = self.mean + delta * len(x) / total, total
