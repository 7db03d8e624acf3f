"""Bits to be flipped into a wanted pattern: a small world in which rewards alone teach nothing, and hindsight does."""

from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
from gymnasium import spaces

from zhixing.environments.goals import ACHIEVED, DESIRED, OBSERVATION
from zhixing.environments.jax_adapter import JaxEnvironment
from zhixing.errors import UsageError


class Bits(NamedTuple):
    now: jax.Array  # [n] int8, 0 or 1
    desired: jax.Array  # [n] int8


class BitFlipping(JaxEnvironment):
    """zhixing/BitFlipping-v0: n bits, each action flips one; the goal is a pattern drawn anew for each episode.

    Both the first bits and the pattern are uniform. The reward is -1 a step, and 0 for the step that meets the goal,
    which ends the episode; otherwise it is cut after n steps, which always suffice.

    Andrychowicz et al., "Hindsight experience replay", arXiv:1707.01495, section 3.1.

    Args:
        bits: n.

    Raises UsageError unless `bits` is a whole number above 0.
    """

    def __init__(self, bits: int = 15):
        if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
            raise UsageError(f"environment.options.bits is {bits!r}; it must be a whole number, 1 or more")
        self.bits = self.max_episode_steps = bits

    def observation_space(self, params: Any) -> gymnasium.Space:
        return spaces.Dict({part: spaces.MultiBinary(self.bits) for part in (OBSERVATION, ACHIEVED, DESIRED)})

    def action_space(self, params: Any) -> gymnasium.Space:
        return spaces.Discrete(self.bits)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Bits]:
        state = Bits(*jax.random.bernoulli(key, shape=(2, self.bits)).astype(jnp.int8))
        return self.observe(state), state

    def step_env(self, key: jax.Array, state: Bits, action: jax.Array, params: Any) -> tuple[Any, Bits, Any, Any, dict]:
        flipped = jnp.arange(self.bits) == action
        state = state._replace(now=jnp.where(flipped, 1 - state.now, state.now))
        reward = self.compute_reward(state.now, state.desired, params)
        return self.observe(state), state, reward, self.compute_terminated(state.now, state.desired, params), {}

    def observe(self, state: Bits) -> dict[str, jax.Array]:
        return {OBSERVATION: state.now, ACHIEVED: state.now, DESIRED: state.desired}

    def render_text(self, state: Bits) -> str:
        """The bits, and below them the pattern."""
        return "\n".join("".join(map(str, row)) for row in (state.now, state.desired))

    def compute_reward(self, achieved: jax.Array, desired: jax.Array, params: Any) -> jax.Array:
        """`achieved`, `desired` [..., n] -> [...] float32: -1, and 0 where the goal is met."""
        return self.compute_terminated(achieved, desired, params).astype(jnp.float32) - 1.0

    def compute_terminated(self, achieved: jax.Array, desired: jax.Array, params: Any) -> jax.Array:
        """`achieved`, `desired` [..., n] -> [...] bool, whether the goal is met."""
        return (achieved == desired).all(-1)
