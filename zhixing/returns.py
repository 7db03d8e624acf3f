"""Returns and advantages: pure functions of a rollout, time-major."""

import jax
import jax.numpy as jnp


def generalized_advantages(
    reward: jax.Array, discount: jax.Array, ended: jax.Array, value: jax.Array, next_value: jax.Array, gae_lambda: float
) -> jax.Array:
    """Generalised advantage estimation: Âₜ = δₜ + γλ Âₜ₊₁ with δₜ = rₜ + γ V(sₜ₊₁) - V(sₜ).

    All arguments [T, ...]; `discount` is γ, and 0 where the episode terminated; the recursion is cut where it
    `ended`; `next_value` is V of the true successor. Schulman et al. 2016, arXiv:1506.02438, eqs. (11)-(16).
    """
    delta = reward + discount * next_value - value
    decay = discount * gae_lambda * (1.0 - ended)

    def backward(advantage: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, decay = step
        advantage = delta + decay * advantage
        return advantage, advantage

    # Unrolled: a step of this recursion is two operations, far less than what a loop costs.
    _, advantages = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, decay), reverse=True, unroll=16)
    return advantages
