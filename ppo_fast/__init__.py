"""ppo_fast: a fast, correct core of PPO for language models and classic RL. `import ppo_fast as ppo`.

The operations, and torch with them, are imported at their first use: a command first sets what torch reads when it is
imported (`ppo_fast/common/threads.py`), and reports wrong options at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppo_fast.ops.advantages import AdvantageOutput, gae, masked_whiten, rlhf_advantages, shape_rewards
    from ppo_fast.ops.linear import LinearLossOutput, linear_logprobs, linear_ppo_loss
    from ppo_fast.ops.logprobs import token_logprobs
    from ppo_fast.ops.losses import LossOutput, policy_loss, ppo_loss, value_loss

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


def __getattr__(name: str) -> object:
    if name not in {"ops", *__all__}:
        raise AttributeError(f"module 'ppo_fast' has no attribute {name!r}")
    ops = importlib.import_module("ppo_fast.ops")
    globals().update({public: getattr(ops, public) for public in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
