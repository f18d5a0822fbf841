"""For VERL_USE_EXTERNAL_MODULES: importing this module replaces verl's own PPO arithmetic by ppo_fast's."""

from ppo_fast.integrations.verl import patch

patch()
