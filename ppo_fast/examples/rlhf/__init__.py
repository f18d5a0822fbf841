"""RLHF from end to end on real text: `python -m ppo_fast.examples.rlhf`."""
