"""ppo_fast inside other trainers: drop-in functions with each project's own names, arguments and return values.

Nothing of the other project is imported before one of these modules is: `ppo_fast.integrations.verl`, `.trl`, `.sb3`,
`.torchrl`, `.openrlhf`.
"""
