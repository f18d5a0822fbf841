"""The command line: `ppo-fast` and `python -m ppo_fast.cli`."""
