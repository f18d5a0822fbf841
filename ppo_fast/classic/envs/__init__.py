"""Gymnasium environments of this project. Importing the package registers them:

import gymnasium, ppo_fast.classic.envs
gymnasium.make("ppo_fast/TextGeneration-v0"), gymnasium.make("ppo_fast/Maze-v0")
"""

import gymnasium

for _name, _module in (("TextGeneration", "text_generation"), ("Maze", "maze")):
    _id = f"ppo_fast/{_name}-v0"
    if _id not in gymnasium.registry:  # a second import would warn
        gymnasium.register(id=_id, entry_point=f"ppo_fast.classic.envs.{_module}:{_name}")
