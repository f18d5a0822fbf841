"""What sets the weights of the KL penalty and the entropy bonus from step to step."""

import math

from ppo_fast.llm.config import PPOConfig


class KLController:
    """The weight of the KL penalty: fixed, or driven to a target KL per answer (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.coef = config.kl_coef

    def update(self, kl_per_answer: float, answers: int) -> None:
        """After each step: how far the actor's answers were from the reference, in nats, and how many there were."""
        if self.config.kl_controller == "adaptive":
            error = min(max(kl_per_answer / self.config.kl_target - 1, -0.2), 0.2)
            self.coef *= 1 + error * answers / self.config.kl_horizon


class EntropyController:
    """The weight of the entropy bonus: fixed, or a step up while the entropy is below its target and down while it is
    above, never below 0 (He et al. 2025, Skywork-OR1, adaptive entropy control).
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.coef = config.entropy_coef

    def update(self, entropy: float) -> None:
        """After each step: the actor's entropy per token, in nats."""
        target = self.config.entropy_target
        if target is not None:
            self.coef = max(0.0, self.coef + math.copysign(self.config.entropy_step, target - entropy))
