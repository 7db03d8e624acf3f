"""Returns and advantages: pure functions of a rollout, time-major."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zhixing.shared import cond_of_any
from zhixing.transition import Transition


def state_values(
    value: Callable[[Any, Any], jax.Array], parameters: Any, rollout: Transition
) -> tuple[jax.Array, jax.Array]:
    """-> V(sₜ), and V of the true successor wherever a value follows; [T, N].

    `value` is (parameters, observation [..., *]) -> [...]. Within an episode a successor is the next row's observation,
    whose value is known; only where an episode was cut off in the midst of a rollout is it computed anew.
    """
    present = value(parameters, rollout.observation)
    last = value(parameters, jax.tree.map(lambda x: x[-1:], rollout.next_observation))
    following = jnp.concatenate([present[1:], last])

    def anew(parameters: Any, successor: Any, truncated: jax.Array, following: jax.Array) -> jax.Array:
        return jnp.where(truncated, value(parameters, successor), following)

    def known(parameters: Any, successor: Any, truncated: jax.Array, following: jax.Array) -> jax.Array:
        return following

    operands = parameters, rollout.next_observation, rollout.truncated, following
    return present, cond_of_any(rollout.truncated[:-1].any(), anew, known, *operands)


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


def retrace(
    reward: jax.Array, discount: jax.Array, ended: jax.Array, q: jax.Array, next_value: jax.Array, trace: jax.Array
) -> jax.Array:
    """Retrace: Qʳₜ = rₜ + γ V(sₜ₊₁) + γ cₜ₊₁ (Qʳₜ₊₁ - Q(sₜ₊₁, aₜ₊₁)), the returns of a policy from another one's data.

    All arguments [T, ...]; `discount` is γ, and 0 where the episode terminated; the recursion is cut where it
    `ended`; `q` is Q(sₜ, aₜ) of the action taken, `next_value` V of the true successor, `trace` cₜ: min(1, π/μ) for
    Retrace(1), 1 for the uncorrected Q(λ = 1). Munos et al. 2016, arXiv:1606.02647, eqs. (3) and (4).
    """
    going_on = 1.0 - ended

    def backward(correction: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reward, discount, going_on, q, next_value, trace = step
        q_retrace = reward + discount * (next_value + going_on * correction)
        return trace * (q_retrace - q), q_retrace

    steps = reward, discount, going_on, q, next_value, trace
    _, q_retraces = jax.lax.scan(backward, jnp.zeros_like(q[0]), steps, reverse=True, unroll=16)
    return q_retraces
