"""direct_apply: an autograd.Function without the Python of Function.apply."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast.kernels.common.autograd import direct_apply


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * x * grad, None


square = direct_apply(Square)


def test_value_and_gradient_are_those_of_apply():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    out = square(x, 3.0)
    assert out.tolist() == [3.0, 12.0]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [6.0, -12.0]
    assert not square(x.detach(), 3.0).requires_grad


def test_a_transform_of_torch_func_raises_the_error_of_apply():
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: square(x, 3.0).sum())(torch.ones(2))


def test_a_tensor_kept_from_a_transform_is_differentiated():
    kept = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(keep)(torch.ones(2))
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    torch.testing.assert_close(square(kept[0] + x, 3.0), Square.apply(kept[0] + x, 3.0))
    torch.testing.assert_close(square(kept[0], 3.0), Square.apply(kept[0], 3.0))
