"""Controllers: the weights of the KL penalty and of the entropy bonus, adapted after each step."""

import math
from collections.abc import Mapping

from ppo_fast.llm.config import PPOConfig


class KLController:
    """The weight of the KL penalty: fixed, or adapted to a target KL per completion (Ziegler et al. 2019, 2.2)."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.coef = config.kl_coef

    def update(self, kl_per_completion: float, completions: int) -> None:
        """Adapt the weight after a step, in which `completions` had this mean KL to the reference, in nats."""
        if self.config.kl_controller == "adaptive":
            error = min(max(kl_per_completion / self.config.kl_target - 1, -0.2), 0.2)
            self.coef *= 1 + error * completions / self.config.kl_horizon

    def state_dict(self) -> dict[str, float]:
        """The present weight."""
        return {"kl_coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the weight of a checkpoint."""
        self.coef = state["kl_coef"]


class EntropyController:
    """The weight of the entropy bonus: fixed, or one step up where the entropy is below its target and one step down
    where it is above, never below 0 (He et al. 2025, Skywork-OR1, adaptive entropy control).
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.coef = config.entropy_coef

    def update(self, entropy: float) -> None:
        """Adapt the weight after a step, in which the actor had this entropy per token, in nats."""
        target = self.config.entropy_target
        if target is not None:
            self.coef = max(0.0, self.coef + math.copysign(self.config.entropy_step, target - entropy))

    def state_dict(self) -> dict[str, float]:
        """The present weight."""
        return {"entropy_coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the weight of a checkpoint; older ones have none, and then it is that of the configuration."""
        self.coef = state.get("entropy_coef", self.config.entropy_coef)
