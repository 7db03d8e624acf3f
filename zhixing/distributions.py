"""Action distributions, as pytrees that are called by the names of the formulas. Leading axes are free."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Categorical(eqx.Module):
    """Over {0, ..., A-1}, by unnormalised log-probabilities."""

    logits: jax.Array  # [..., A]

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, self.logits).astype(jnp.int32)

    @property
    def mode(self) -> jax.Array:
        return self.logits.argmax(-1).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(self.logits)
        # A product with the one-hot action: its gradient is a product too, where indexing would scatter.
        return (log_p * jax.nn.one_hot(action, log_p.shape[-1])).sum(-1)

    def entropy(self) -> jax.Array:
        log_p = jax.nn.log_softmax(self.logits)
        return -(jnp.exp(log_p) * log_p).sum(-1)

    def kl(self, other: "Categorical") -> jax.Array:
        """KL(self ‖ other)."""
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


class DiagonalNormal(eqx.Module):
    """Independent normals over the last axis."""

    mean: jax.Array  # [..., d]
    log_std: jax.Array  # [..., d]

    def sample(self, key: jax.Array) -> jax.Array:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape)

    @property
    def mode(self) -> jax.Array:
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return (-0.5 * jnp.square(z) - self.log_std - HALF_LOG_TWO_PI).sum(-1)

    def entropy(self) -> jax.Array:
        return (self.log_std + 0.5 + HALF_LOG_TWO_PI).sum(-1)

    def kl(self, other: "DiagonalNormal") -> jax.Array:
        """KL(self ‖ other)."""
        variance_ratio = jnp.exp(2 * (self.log_std - other.log_std))
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return 0.5 * (variance_ratio + jnp.square(z) - 1.0).sum(-1) + (other.log_std - self.log_std).sum(-1)
