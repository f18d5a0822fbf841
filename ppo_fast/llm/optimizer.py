"""AdamW for actor and critic: the learning rate of each PPO step, clipping, and states that checkpoints hold.

The learning rate is a function of the PPO step, so there is no scheduler whose state a checkpoint would have to hold.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.sharding import gather_to_main, local_part, shard_like, to_full_tensor


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


def _norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together. On a CPU by dot products: they take half of the time of PyTorch's norm, whose
    error grows with the size, since it adds all squares to a few sums in fp32."""
    if not gradients or any(type(x) is not Tensor or x.device.type != "cpu" for x in gradients):
        return nn.utils.get_total_norm(gradients)
    return torch.stack([torch.dot(x.reshape(-1), x.reshape(-1)) for x in gradients]).sum().sqrt()


class Optimizer:
    """AdamW for one model, with the learning rate of each PPO step and the clipping of its gradient.

    Args:
        model: its parameters that require gradients are trained. Weight decay applies to those with at least two
            dimensions: not to biases and the weights of norms.
        lr: the highest learning rate.
        first_step: the PPO step, counted from 0, in which the model begins to learn.
    """

    def __init__(self, model: nn.Module, lr: float, config: PPOConfig, *, first_step: int = 0) -> None:
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        self.config, self.highest, self.first_step = config, lr, first_step
        matrices, others = ([p for p in self.parameters if (p.ndim > 1) is wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=all(p.device.type != "mps" for p in self.parameters),
        )

    def begin(self, step: int) -> float:
        """Set the learning rate of PPO step `step`, counted from 0, and return it; 0 before `first_step`."""
        scale = rate_of_step(self.config, step, first=self.first_step) if step >= self.first_step else 0.0
        for group in self.adamw.param_groups:
            group["lr"] = self.highest * scale
        return self.highest * scale

    def clip(self) -> Tensor:
        """Clip the gradient to max_grad_norm and return the norm it had, a device scalar."""
        limit = self.config.max_grad_norm
        norm = _norm_of([p.grad for p in self.parameters if p.grad is not None])
        whole = to_full_tensor(norm)
        # a CPU knows the norm already, and need not multiply all gradients by 1; a GPU would have to wait for it
        if limit is not None and (whole.device.type != "cpu" or not float(whole) <= limit - 1e-6):
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return whole

    def step(self) -> None:
        """Update the parameters that have a gradient, and drop all gradients."""
        self.adamw.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.adamw.zero_grad()

    @torch.no_grad()
    def scale_moments(self, parameters: Iterable[Tensor], factor: Tensor) -> None:
        """Multiply the first moments of parameters by a factor and the second ones by its square, as if all their
        gradients had been multiplied by it."""
        for p in parameters:
            moments = self.adamw.state.get(p, {})
            for slot, power in (("exp_avg", factor), ("exp_avg_sq", factor.square())):
                if slot in moments:
                    local_part(moments[slot]).mul_(power)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole moments and step counts by "parameter/slot", on the CPU of the main process; collective."""
        return gather_to_main(
            (f"{name}/{slot}", value)
            for p, name in self.names.items()
            for slot, value in self.adamw.state.get(p, {}).items()
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned in the main process; collective, with the same state in all."""
        self.adamw.state.clear()
        parameters = {name: p for p, name in self.names.items()}
        fused = self.adamw.defaults["fused"]  # else AdamW keeps its step on the CPU
        for key, value in state.items():
            name, slot = key.rsplit("/", 1)
            parameter = parameters[name]
            if slot == "step":
                self.adamw.state[parameter][slot] = value.to(parameter.device) if fused else value.clone()
            else:
                self.adamw.state[parameter][slot] = shard_like(parameter, value)


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of a policy."""

    actor: Optimizer
    critic: Optimizer

    def begin(self, step: int) -> dict[str, float]:
        """Set the learning rates of PPO step `step`, counted from 0, and return them by option."""
        return {"lr": self.actor.begin(step), "critic_lr": self.critic.begin(step)}

    def step(self, *, train_actor: bool) -> None:
        """Update critic and, if it is trained, actor, and drop all gradients."""
        if train_actor:
            self.actor.step()
        else:
            self.actor.zero_grad()
        self.critic.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.actor.zero_grad()
        self.critic.zero_grad()
