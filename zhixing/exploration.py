"""Behaviour policies of the value learners."""

import jax
import jax.numpy as jnp


def epsilon_greedy(key: jax.Array, action_values: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """With probability ε a uniformly random action, else the greedy one; `action_values` [..., A] -> [...] int32."""
    explore_key, action_key = jax.random.split(key)
    shape = action_values.shape[:-1]
    explore = jax.random.uniform(explore_key, shape) < epsilon
    random = jax.random.randint(action_key, shape, 0, action_values.shape[-1])
    return jnp.where(explore, random, action_values.argmax(-1).astype(jnp.int32))


def softmax(key: jax.Array, action_values: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """An action with probability proportional to exp(Q / temperature); `action_values` [..., A] -> [...] int32."""
    return jax.random.categorical(key, action_values / temperature).astype(jnp.int32)
