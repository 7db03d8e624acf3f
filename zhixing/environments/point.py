"""A point in a square: the smallest world in which skills, or goals, can be told apart at a glance."""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.environments.jax_adapter import JaxEnvironment

STEP = 0.1  # the most that a coordinate changes in a step
NEAR = 0.5  # of the corner: there is the reward
ROWS, COLUMNS = 11, 21  # of the picture


class Point(JaxEnvironment):
    """zhixing/Point-v0: a point that starts in the middle of the square [-1, 1]² and moves as it is told.

    The action, in [-1, 1]², is what is added to the position, times 0.1; the walls stop it. The reward is 1 for each
    step that ends within 0.5 of the corner (1, 1), and 0 anywhere else: random steps seldom see it. An episode is
    cut after 50 steps.
    """

    max_episode_steps = 50

    def observation_space(self, params: Any) -> gymnasium.Space:
        return spaces.Box(-1.0, 1.0, (2,), np.float32)

    def action_space(self, params: Any) -> gymnasium.Space:
        return spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        middle = jnp.zeros(2)
        return middle, middle

    def step_env(self, key: jax.Array, state: jax.Array, action: jax.Array, params: Any) -> tuple:
        position = jnp.clip(state + STEP * jnp.clip(action, -1.0, 1.0), -1.0, 1.0)
        reward = jnp.where(jnp.linalg.norm(1.0 - position) <= NEAR, 1.0, 0.0)
        return position, position, reward, jnp.bool_(False), {}

    def render_text(self, state: jax.Array) -> str:
        """The square from above: the point @, the corner G."""
        cells = [["."] * COLUMNS for _ in range(ROWS)]
        cells[0][-1] = "G"
        x, y = (np.asarray(state) + 1) / 2
        cells[ROWS - 1 - round(float(y) * (ROWS - 1))][round(float(x) * (COLUMNS - 1))] = "@"
        return "\n".join(map("".join, cells))
