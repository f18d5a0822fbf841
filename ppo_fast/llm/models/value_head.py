"""Least squares for a value head, from sums over tokens: the hidden states are not kept."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ppo_fast.common.device import widest_float

PENALTIES = tuple(10.0**power for power in range(-6, 4))  # of ridge regression, in units of the variance of an input


def fit_linear(folds: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Fit y = w x + b by ridge regression on standardised inputs: minimise mean (y - w x - b)^2 + p sum (s_j w_j)^2.

    s_j is the standard deviation of input j. The penalty p is the one of PENALTIES with the least squared error on the
    folds that a fit has not seen (cross-validation); with a single fold it is the median of them.

    Args:
        folds: parts of the data, each as batches of inputs [n, D] and targets [n], which are read once.

    Returns:
        w [D] and b [1], fp32 on the CPU.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> w, b = fit_linear([[(x[:2], 2 * x[:2, 0] + 1)], [(x[2:], 2 * x[2:, 0] + 1)]])
    >>> [round(v, 4) for v in (*w.tolist(), *b.tolist())]
    [2.0, 1.0]
    """
    products = [_products(fold) for fold in folds]
    total = sum(products[1:], products[0])
    penalty = PENALTIES[len(PENALTIES) // 2]
    if len(products) > 1:
        errors = [sum(_error(part, _solve(total - part, p)) for part in products) for p in PENALTIES]
        penalty = PENALTIES[min(range(len(PENALTIES)), key=lambda i: errors[i])]
    solution = _solve(total, penalty).float()
    return solution[:-1], solution[-1:]


def _products(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of z z^T over z = (x, 1, y), [D + 2, D + 2] fp64: all that least squares needs of the data."""
    found: Tensor | None = None
    for x, y in batches:
        dtype = widest_float(x.device)
        z = torch.cat([x.to(dtype), torch.ones_like(y, dtype=dtype)[:, None], y.to(dtype)[:, None]], dim=1)
        found = z.T @ z if found is None else found.addmm_(z.T, z)
    if found is None:
        raise ValueError("a fold has no data")
    return found.cpu().double()


def _solve(products: Tensor, penalty: float) -> Tensor:
    """w and b [D + 1] of a penalty."""
    width = len(products) - 2
    means = products[:, width] / products[width, width]  # of x, 1 and y
    covariance = products / products[width, width] - means.outer(means)
    variance = covariance.diagonal()[:width]
    # an input that is constant but for rounding gets no weight
    varies = variance > 1e-12 * means[:width].square()
    scale = torch.where(varies, variance, 1.0).sqrt()
    correlation = covariance[:width, :width] / scale.outer(scale) * varies.outer(varies)
    target = covariance[:width, -1] / scale * varies
    identity = torch.eye(width, dtype=products.dtype)
    weight = torch.linalg.solve(correlation + penalty * identity, target) / scale
    return torch.cat([weight, (means[-1] - weight @ means[:width])[None]])


def _error(products: Tensor, solution: Tensor) -> float:
    """The sum of (y - w x - b)^2."""
    residual = torch.cat([solution, -torch.ones(1, dtype=solution.dtype)])
    return float(residual @ products @ residual)
