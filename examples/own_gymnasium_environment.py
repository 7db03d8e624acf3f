"""Train on an environment of your own, written as a Gymnasium class: a heater that keeps a room at 20 degrees.

Run it with: python examples/own_gymnasium_environment.py
"""

import tempfile

import gymnasium
import numpy as np

import zhixing as zx


class Thermostat(gymnasium.Env):
    """Switch a heater on or off once a minute; the reward is minus the distance from 20 degrees."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)  # [room - 20, outdoors] / 10 degrees
    action_space = gymnasium.spaces.Discrete(2)  # off, on

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.room, self.outdoors = self.np_random.uniform(5, 30), self.np_random.uniform(-5, 10)
        self.minutes = 0
        return self.observe(), {}

    def step(self, action):
        self.room += 0.1 * (self.outdoors - self.room) + 3.0 * action
        self.minutes += 1
        return self.observe(), -abs(self.room - 20), False, self.minutes >= 60, {}

    def observe(self):
        return np.array([self.room - 20, self.outdoors], np.float32) / 10


with tempfile.TemporaryDirectory() as folder:
    algorithm = zx.PPO(rollout_length=125, discount=0.9)
    run = zx.train(algorithm, Thermostat, total_steps=30_000, run_dir=folder, quiet=True)
    returns = run.metrics["evaluation/return"]
    returns = returns[~np.isnan(returns)]
    print(f"an hour's return before training {returns[0]:.0f}, after it {returns[-1]:.0f}")
    for room in (15, 18, 22, 25):
        print(f"at {room} degrees, 0 outdoors: heater {'on' if run.policy(np.float32([room - 20, 0]) / 10) else 'off'}")
