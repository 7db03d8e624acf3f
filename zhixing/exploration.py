"""Behaviour policies of the value learners."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from zhixing import schedules


def epsilon_greedy(key: jax.Array, action_values: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """With probability ε a uniformly random action, else the greedy one; `action_values` [..., A] -> [...] int32."""
    # Two random numbers from one key: on a table, splitting keys would be most of the work.
    explore, action = jax.random.uniform(key, (2, *action_values.shape[:-1]))
    random = (action * action_values.shape[-1]).astype(jnp.int32)
    return jnp.where(explore < epsilon, random, action_values.argmax(-1).astype(jnp.int32))


def softmax(key: jax.Array, action_values: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """An action with probability proportional to exp(Q / temperature); `action_values` [..., A] -> [...] int32."""
    return jax.random.categorical(key, action_values / temperature).astype(jnp.int32)


Exploration = Literal["epsilon", "softmax"]


def probabilities(
    kind: Exploration, action_values: jax.Array, epsilon: jax.Array | float, temperature: jax.Array | float
) -> jax.Array:
    """π(a | s) of the behaviour policy; `action_values` [..., A] -> [..., A]."""
    if kind == "softmax":
        return jax.nn.softmax(action_values / temperature)
    actions = action_values.shape[-1]
    return epsilon / actions + (1.0 - epsilon) * jax.nn.one_hot(action_values.argmax(-1), actions)


def behaviour(algorithm: Any, action_values: jax.Array, progress: jax.Array) -> jax.Array:
    """`probabilities` with the exploration settings of a learner on a table, at `progress` of the run."""
    epsilon = schedules.linear(algorithm.epsilon_start, algorithm.epsilon_end, algorithm.epsilon_fraction, progress)
    return probabilities(algorithm.exploration, action_values, epsilon, algorithm.temperature)


def sample(key: jax.Array, probabilities: jax.Array) -> jax.Array:
    """An action from `probabilities` [..., A] -> [...] int32, by one random number each: its place in their sums."""
    uniform = jax.random.uniform(key, (*probabilities.shape[:-1], 1))
    return jnp.sum(uniform >= jnp.cumsum(probabilities[..., :-1], -1), -1, dtype=jnp.int32)
