"""For VERL_USE_EXTERNAL_MODULES: importing this puts ppo_fast in the place of verl's own PPO arithmetic."""

from ppo_fast.integrations.verl import patch

patch()
