"""The temperature of maximum entropy reinforcement learning: fixed, or learned so that the entropy is as wanted."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax


class Temperature(eqx.Module):
    """α, the weight of the entropy beside the reward.

    Haarnoja et al., arXiv:1812.05905, section 5 and eq. (18).
    """

    log_alpha: jax.Array  # [], log α
    optimiser_state: Any  # None if α is fixed
    target_entropy: jax.Array  # [], H̄

    @classmethod
    def create(
        cls,
        fixed: float | None,
        initial: jax.Array | float,
        target_entropy: jax.Array | float,
        optimiser: optax.GradientTransformation,
    ) -> "Temperature":
        """`fixed`, or, where that is None, learned from `initial` on."""
        log_alpha = jnp.log(jnp.float32(initial if fixed is None else fixed))
        return cls(log_alpha, optimiser.init(log_alpha) if fixed is None else None, jnp.float32(target_entropy))

    @property
    def alpha(self) -> jax.Array:
        return jnp.exp(self.log_alpha)

    def step(self, log_prob: jax.Array, optimiser: optax.GradientTransformation) -> "Temperature":
        """A gradient step on -α (log π + H̄) with respect to log α, by the `log_prob` [B] of the policy's actions."""
        if self.optimiser_state is None:
            return self
        gradient = -self.alpha * (log_prob + self.target_entropy).mean()
        step, optimiser_state = optimiser.update(gradient, self.optimiser_state)
        return Temperature(optax.apply_updates(self.log_alpha, step), optimiser_state, self.target_entropy)
