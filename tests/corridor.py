"""A chain of three states, solved by hand."""

import numpy as np


class Corridor:
    """Three states to the right, reward 1 for each step, then the end: what is remembered can be told by hand."""

    num_envs = 1
    single_action_space = type("Actions", (), {"n": 2})()

    def reset(self, seed=None):
        self.at = 0
        return np.array([0]), {}

    def step(self, action):
        self.at += 1
        done = self.at == 3
        info = {"final_obs": [np.array(3)]} if done else {}
        observed = np.array([0 if done else self.at])
        self.at = 0 if done else self.at
        return observed, np.array([1.0]), np.array([done]), np.array([False]), info
