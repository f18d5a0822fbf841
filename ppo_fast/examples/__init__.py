"""Runnable scripts: python -m ppo_fast.examples.<name>."""
