"""ppo_fast: a fast, correct core of PPO for language models and classic RL. `import ppo_fast as ppo`."""

from ppo_fast.ops import (
    AdvantageOutput,
    LinearLossOutput,
    LossOutput,
    gae,
    linear_logprobs,
    linear_ppo_loss,
    masked_whiten,
    policy_loss,
    ppo_loss,
    rlhf_advantages,
    shape_rewards,
    token_logprobs,
    value_loss,
)

__version__ = "0.1.0"

__all__ = [
    "AdvantageOutput",
    "LinearLossOutput",
    "LossOutput",
    "gae",
    "linear_logprobs",
    "linear_ppo_loss",
    "masked_whiten",
    "policy_loss",
    "ppo_loss",
    "rlhf_advantages",
    "shape_rewards",
    "token_logprobs",
    "value_loss",
]
