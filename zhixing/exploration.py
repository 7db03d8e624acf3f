"""Behaviour policies of the value learners, and the noise of the deterministic actors."""

from typing import Any, Literal, Protocol

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


ActionNoise = Literal["none", "gaussian", "ornstein_uhlenbeck"]


def ornstein_uhlenbeck(
    key: jax.Array, noise: jax.Array, theta: jax.Array | float, sigma: jax.Array | float, dt: jax.Array | float
) -> jax.Array:
    """The next value of a noise that is correlated in time: x ← x - θ x Δt + σ √Δt N(0, 1); any shape.

    Uhlenbeck & Ornstein 1930; Lillicrap et al., arXiv:1509.02971, section 7. It forgets in 1/θΔt steps, and has the
    standard deviation σ/√(2θ - θ²Δt) in the end.
    """
    return noise - theta * dt * noise + sigma * jnp.sqrt(dt) * jax.random.normal(key, noise.shape)


class ActionNoiseSettings(Protocol):
    """The hyper-parameters of an algorithm whose actions get a noise."""

    @property
    def noise(self) -> ActionNoise: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def noise_theta(self) -> float: ...
    @property
    def noise_dt(self) -> float: ...


def first_noise(settings: ActionNoiseSettings, *shape: int) -> Any:
    """What is carried from step to step, as at an episode's start: the Ornstein-Uhlenbeck noise, zero."""
    return jnp.zeros(shape) if settings.noise == "ornstein_uhlenbeck" else ()


def noisy(
    settings: ActionNoiseSettings, carry: Any, action: jax.Array, random: jax.Array | bool, key: jax.Array
) -> tuple[jax.Array, Any]:
    """`action` [N, d] with its noise, within [-1, 1], and the next carry; uniformly random actions where `random`."""
    noise_key, random_key = jax.random.split(key)
    if settings.noise == "ornstein_uhlenbeck":
        carry = ornstein_uhlenbeck(noise_key, carry, settings.noise_theta, settings.noise_std, settings.noise_dt)
        action = jnp.clip(action + carry, -1.0, 1.0)
    elif settings.noise == "gaussian":
        action = jnp.clip(action + settings.noise_std * jax.random.normal(noise_key, action.shape), -1.0, 1.0)
    return jnp.where(random, jax.random.uniform(random_key, action.shape, minval=-1.0), action), carry
