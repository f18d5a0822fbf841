"""Classic RL: PPO for Gymnasium's environments. `ClassicTrainer` trains a policy, and `load` reads a saved one.

The parts are imported at their first use, as in `ppo_fast`, so that a command can report wrong options at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppo_fast.classic.config import ClassicConfig
    from ppo_fast.classic.policy import Policy, load
    from ppo_fast.classic.trainer import ClassicTrainer, Stopped

__all__ = ["ClassicConfig", "ClassicTrainer", "Policy", "Stopped", "load"]

_MODULES = {
    "ClassicConfig": "config",
    "ClassicTrainer": "trainer",
    "Policy": "policy",
    "Stopped": "trainer",
    "load": "policy",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'ppo_fast.classic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ppo_fast.classic.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
