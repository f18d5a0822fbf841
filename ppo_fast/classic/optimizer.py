"""TODO docstring."""

import math

import torch
from torch import Tensor


class Adam:
    """Kingma and Ba 2015 on one flat tensor. torch.optim.Adam's step takes 70 us longer, a tenth of CartPole's."""

    def __init__(self, weights: Tensor, eps: float) -> None:
        self.weights, self.eps, self.steps = weights, eps, 0
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)

    def step(self, gradient: Tensor, lr: float) -> None:
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        # The corrections of both means for their start at 0 are in the step size and in epsilon
        correction = math.sqrt(1 - 0.999**self.steps)
        spread = self.square.sqrt().add_(self.eps * correction)
        self.weights.addcdiv_(self.mean, spread, value=-lr * correction / (1 - 0.9**self.steps))
