"""Action distributions, as pytrees that are called by the names of the formulas. Leading axes are free."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
NEVER = -1e9  # the logit of a masked action: its probability is 0 to the last bit
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(64)  # of integrals over a standard normal


class Categorical(eqx.Module):
    """Over {0, ..., A-1}, by unnormalised log-probabilities."""

    logits: jax.Array  # [..., A]

    def masked(self, mask: jax.Array) -> "Categorical":
        """The same given that the action is one of those that `mask` [..., A] allows; one must be."""
        return Categorical(jnp.where(mask, self.logits, NEVER))

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


class MultiCategorical(eqx.Module):
    """Several independent categoricals of given sizes; an action is a vector of indices."""

    logits: jax.Array  # [..., the sum of the sizes], one categorical after the other
    sizes: tuple[int, ...] = eqx.field(static=True)

    def masked(self, mask: jax.Array) -> "MultiCategorical":
        """The same given what `mask` [..., the sum of the sizes] allows; of each index one value must be."""
        return MultiCategorical(jnp.where(mask, self.logits, NEVER), self.sizes)

    @property
    def parts(self) -> list[Categorical]:
        ends = list(np.cumsum(self.sizes)[:-1])
        return [Categorical(logits) for logits in jnp.split(self.logits, ends, axis=-1)]

    def sample(self, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(self.sizes))
        return jnp.stack([part.sample(k) for part, k in zip(self.parts, keys, strict=True)], -1)

    @property
    def mode(self) -> jax.Array:
        return jnp.stack([part.mode for part in self.parts], -1)

    def log_prob(self, action: jax.Array) -> jax.Array:
        return jnp.stack([part.log_prob(action[..., i]) for i, part in enumerate(self.parts)]).sum(0)

    def entropy(self) -> jax.Array:
        return jnp.stack([part.entropy() for part in self.parts]).sum(0)

    def kl(self, other: "MultiCategorical") -> jax.Array:
        """KL(self ‖ other)."""
        return jnp.stack([p.kl(q) for p, q in zip(self.parts, other.parts, strict=True)]).sum(0)


class Bernoulli(eqx.Module):
    """Independent coins over the last axis; an action is a vector of zeros and ones."""

    logits: jax.Array  # [..., d], log p/(1 - p)

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, jax.nn.sigmoid(self.logits)).astype(jnp.int8)

    @property
    def mode(self) -> jax.Array:
        return (self.logits > 0).astype(jnp.int8)

    def log_prob(self, action: jax.Array) -> jax.Array:
        return -jax.nn.softplus(jnp.where(action == 1, -self.logits, self.logits)).sum(-1)

    def entropy(self) -> jax.Array:
        p = jax.nn.sigmoid(self.logits)
        return (p * jax.nn.softplus(-self.logits) + (1 - p) * jax.nn.softplus(self.logits)).sum(-1)

    def kl(self, other: "Bernoulli") -> jax.Array:
        """KL(self ‖ other)."""
        p = jax.nn.sigmoid(self.logits)
        ones = jax.nn.softplus(-other.logits) - jax.nn.softplus(-self.logits)
        zeros = jax.nn.softplus(other.logits) - jax.nn.softplus(self.logits)
        return (p * ones + (1 - p) * zeros).sum(-1)


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


class SquashedNormal(eqx.Module):
    """tanh(u) of a diagonal normal u: actions within (-1, 1).

    Haarnoja et al., "Soft actor-critic", arXiv:1812.05905, appendix C.
    """

    mean: jax.Array  # [..., d], of u
    log_std: jax.Array  # [..., d], of u

    @property
    def normal(self) -> DiagonalNormal:
        return DiagonalNormal(self.mean, self.log_std)

    def sample(self, key: jax.Array) -> jax.Array:
        return jnp.tanh(self.normal.sample(key))

    def sample_and_log_prob(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-> an action [..., d] and its log-probability [...], exact however near to ±1 the action is."""
        u = self.normal.sample(key)
        return jnp.tanh(u), self.normal.log_prob(u) - log_derivative_of_tanh(u).sum(-1)

    @property
    def mode(self) -> jax.Array:
        """tanh of u's mode: the median, not where the density is highest."""
        return jnp.tanh(self.mean)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Of an action within (-1, 1); one that has been rounded to ±1 is taken as the nearest number inside."""
        u = jnp.arctanh(jnp.clip(action, -1 + 1e-7, 1 - 1e-7))
        return self.normal.log_prob(u) - log_derivative_of_tanh(u).sum(-1)

    def entropy(self) -> jax.Array:
        """H[u] + E[log tanh'(u)], the mean by Gauss-Hermite quadrature: there is no closed form."""
        u = self.mean[..., None] + jnp.exp(self.log_std)[..., None] * NODES
        mean = (log_derivative_of_tanh(u) * (WEIGHTS / WEIGHTS.sum())).sum(-1)
        return self.normal.entropy() + mean.sum(-1)

    def kl(self, other: "SquashedNormal") -> jax.Array:
        """KL(self ‖ other): that of the normals, since tanh is one-to-one."""
        return self.normal.kl(other.normal)


def log_derivative_of_tanh(u: jax.Array) -> jax.Array:
    """log(1 - tanh²(u)) without the difference, which would round to zero."""
    return 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))


Distribution = Categorical | MultiCategorical | Bernoulli | DiagonalNormal | SquashedNormal
