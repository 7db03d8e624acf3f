"""Train on an environment of your own, written in JAX, so that it is compiled together with the learning.

Run it with: python examples/own_jax_environment.py
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box

import zhixing as zx


class Parking(zx.JaxEnvironment):
    """Push a cart on a rail to the mark at 0 and stop there; the state is [position, speed]."""

    max_episode_steps = 100

    def reset_env(self, key, params):
        state = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
        return state, state  # observation, state

    def step_env(self, key, state, action, params):
        speed = state[1] + 0.1 * action[0]
        state = jnp.stack([state[0] + 0.1 * speed, speed])
        reward = -(state[0] ** 2) - 0.1 * state[1] ** 2
        return state, state, reward, False, {}  # observation, state, reward, terminated, info

    def observation_space(self, params):
        return Box(-np.inf, np.inf, (2,), np.float32)

    def action_space(self, params):
        return Box(-1.0, 1.0, (1,), np.float32)


with tempfile.TemporaryDirectory() as folder:
    run = zx.train("ppo", Parking(), total_steps=200_000, seeds=4, run_dir=folder, quiet=True)
    per_seed = ", ".join(f"{score:.1f}" for score in run.summary["evaluation"]["per_seed"])
    print(f"return of each of 4 seeds: {per_seed}; {run.summary['steps_per_second']:.0f} steps a second")
    for position in (-1.0, 0.0, 1.0):
        force = run.policy(np.float32([position, 0.0]))
        print(f"standing at {position:+.0f}: push with {force[0]:+.2f}; worth {run.value([position, 0.0]):.1f}")
