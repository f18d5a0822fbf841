"""A Gymnasium environment with given spaces, for tests of classic."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Given(gymnasium.Env):
    """Episodes of `steps` steps with any spaces; observations are samples. Keeps the actions it was given."""

    metadata = {"render_modes": []}  # noqa: RUF012  # Gymnasium's interface

    def __init__(self, observation=None, action=None, steps=5, render_mode=None):
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32) if observation is None else observation
        self.action_space = spaces.Discrete(2) if action is None else action
        self.steps, self.actions = steps, []

    def observe(self):
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.t += 1
        return self.observe(), 1.0, self.t >= self.steps, False, {}
