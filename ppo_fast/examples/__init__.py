"""Runnable scripts: python -m ppo_fast.examples.<name>."""

from ppo_fast.common.threads import wait_passively

wait_passively()  # before an example imports torch
