"""TODO docstring."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import to_full_tensor
from ppo_fast.llm.experience import packed_mode, split_minibatches_of
from ppo_fast.llm.models.policy import LossInputs, Policy
from ppo_fast.llm.packing.rollout import Rollout


def rate_of_step(config: PPOConfig, step: int, *, first: int = 0) -> float:
    """The factor of the learning rate in PPO step `step`, counted from 0, of a schedule that begins at step `first`.

    It rises over the share `warmup_ratio` of these steps, and then falls so that it would reach 0 one step after the
    last: no step has the rate 0, however many updates a step makes.

    >>> [rate_of_step(PPOConfig(total_steps=4, warmup_ratio=0.25), step) for step in range(5)]
    [0.5, 1.0, 0.6666666666666666, 0.3333333333333333, 0.0]
    """
    steps, step = config.total_steps - first, step - first
    rising = round(config.warmup_ratio * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = 1.0 if config.lr_schedule == "constant" else (steps - step) / (steps - rising)
    return 0.5 - 0.5 * math.cos(math.pi * left) if config.lr_schedule == "cosine" else left


def unreached(policy: Policy, config: PPOConfig, device: torch.device) -> list[str]:
    """Names of parameters that would be trained, but on which the loss of a short sequence does not depend.

    `device` is where the weights are: under FSDP2 the CPU, where the backend that trains may not run.
    """
    rollout = Rollout(torch.tensor([[1, 2, 1]]), [1], [2], [True], [""], {"prompt": [""]}, device=device)
    ((pack,),) = split_minibatches_of(rollout, [0], dataclasses.replace(config, minibatches=1))
    zeros = torch.zeros(pack.num_tokens, device=device)
    targets = LossInputs(zeros, zeros, zeros, zeros, None, None, 1.0, 0.0, config.entropy_coef)
    given, policy.config = policy.config, dataclasses.replace(policy.config, backend="auto")
    try:
        with packed_mode(policy):
            loss, _ = policy(pack, targets)
    finally:
        policy.config = given
    left, found = [loss.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    reached = {getattr(node, "variable", None) for node in found}
    return [name for name, p in policy.named_parameters() if p.requires_grad and p not in reached]


class Optimizer:
    """AdamW for one model, with the learning rate of each PPO step and the clipping of its gradient.

    Args:
        model: its parameters that require gradients are trained. Weight decay applies to those with at least two
            dimensions: not to biases and the weights of norms.
        lr: the highest learning rate.
        first_step: the PPO step, counted from 0, in which the model begins to learn.
    """

    def __init__(self, model: nn.Module, lr: float, config: PPOConfig, *, first_step: int = 0) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.config, self.highest, self.first_step = config, lr, first_step
        matrices, others = ([p for p in self.parameters if (p.ndim > 1) is wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=all(p.device.type not in ("cpu", "mps") for p in self.parameters),
        )

    def begin(self, step: int) -> float:
        """Sets the learning rate of PPO step `step`, counted from 0, and returns it; 0 before `first_step`."""
        scale = rate_of_step(self.config, step, first=self.first_step) if step >= self.first_step else 0.0
        for group in self.adamw.param_groups:
            group["lr"] = self.highest * scale
        return self.highest * scale

    def clip(self) -> Tensor:
        """Clips the gradient to max_grad_norm and returns the norm it had, a device scalar."""
        limit = self.config.max_grad_norm
        return to_full_tensor(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))

    def step(self) -> None:
        """One update. Parameters that have no gradient stay as they are."""
        self.adamw.step()
        self.forget()

    def forget(self) -> None:
        """Drops all gradients."""
        self.adamw.zero_grad()
