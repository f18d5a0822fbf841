"""ppo_fast: a fast, correct core of PPO for language models and classic RL. `import ppo_fast as ppo`."""

from ppo_fast.ops import (
    AdvantageOutput,
    LossOutput,
    gae,
    masked_whiten,
    policy_loss,
    ppo_loss,
    shape_rewards,
    token_logprobs,
    value_loss,
)

__version__ = "0.1.0"

__all__ = [
    "AdvantageOutput",
    "LossOutput",
    "gae",
    "masked_whiten",
    "policy_loss",
    "ppo_loss",
    "shape_rewards",
    "token_logprobs",
    "value_loss",
]
