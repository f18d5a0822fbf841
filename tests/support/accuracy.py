"""The bound of errors: a kernel may err at most twice as much as eager PyTorch in the same dtype."""

import torch
from torch import Tensor


def assert_error_at_most_twice_eager(
    actual: Tensor, eager: Tensor, truth: Tensor, *, slack: float = 1e-6, name: str = "result"
) -> None:
    """max|actual - truth| <= 2 max|eager - truth| + slack max(1, |truth|), with the same infinities and NaN.

    actual and eager: the same dtype family; truth: fp64. The slack covers cases where eager happens to be exact.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(truth.shape)}"
    actual, eager, truth = actual.double().cpu(), eager.double().cpu(), truth.double().cpu()
    finite = truth.isfinite()
    torch.testing.assert_close(actual[~finite], truth[~finite], equal_nan=True, rtol=0, atol=0)
    if not finite.any():
        return
    error = (actual - truth)[finite].abs().max().item()
    eager_error = (eager - truth)[finite].nan_to_num(nan=float("inf")).abs().max().item()
    scale = max(1.0, truth[finite].abs().max().item())
    assert error <= 2 * eager_error + slack * scale, f"{name}: error {error:.3g}, eager's is {eager_error:.3g}"
