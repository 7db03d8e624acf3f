"""K-FAC: natural gradients of an actor-critic, its Fisher matrix approximated layer by layer.

Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", arXiv:1503.05671;
for actor-critics Wu et al., "Scalable trust-region method for deep reinforcement learning using Kronecker-factored
approximation" (ACKTR), arXiv:1708.05144.

    (KFAC.1)  p(a, v|s) = π(a|s) N(v; V(s), 1) is what the net predicts; a and v are drawn from it
    (KFAC.2)  of a layer [W b] x̄ with inputs x̄ = (x, 1): A ≈ E[x̄ x̄ᵀ], G ≈ E[g gᵀ], g = ∇ log p(a, v|s) with respect
              to the layer's outputs; running averages. The layer's block of the Fisher matrix F is about G ⊗ A
    (KFAC.3)  damped: A + ρ√λ I and G + √λ/ρ I, with ρ² = (tr A / dim A) / (tr G / dim G); divided by what is added,
              so that the inverses are within (0, I]: Â = (A/ρ√λ + I)⁻¹ and Ĝ = (ρG/√λ + I)⁻¹
    (KFAC.4)  the natural gradient Δ: of each layer Ĝ ∇[W b] Â / λ
    (KFAC.5)  M⁻¹ by Newton and Schulz: X ← X (2 I - M X), beginning at the last inverse, which is near
    (KFAC.6)  Δ is scaled down so that a step η Δ has a KL divergence ½ η² Δᵀ F Δ = ½ η² Δᵀ ∇ of at most δ
"""

from dataclasses import replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from zhixing.learned import Vector
from zhixing.networks import MLP, ActorCritic

PARTS = ("trunk", "actor", "critic")
Scalar = jax.Array | float
Layer = tuple[jax.Array, jax.Array]  # weight [o, i], bias [o] or, one for each sample, [B, o]


class Factor(NamedTuple):
    average: jax.Array  # [k, k], A or G
    inverse: jax.Array  # [k, k], Â or Ĝ


class Curvature(NamedTuple):
    """The factors of all layers, in the order of `layers_of`."""

    inputs: list[Factor]  # k = i + 1
    outputs: list[Factor]  # k = o
    batches: jax.Array  # [] int32, how many were seen

    @classmethod
    def create(cls, net: ActorCritic) -> Self:
        def factors(*sizes: int) -> list[Factor]:
            return [Factor(jnp.zeros((k, k)), jnp.eye(k)) for k in sizes]

        outputs, inputs = zip(*(weight.shape for weight, _ in layers_of(net)), strict=True)
        return cls(factors(*(i + 1 for i in inputs)), factors(*outputs), jnp.int32(0))

    def observe(self, net: ActorCritic, observation: Any, key: jax.Array, decay: Scalar, damping: Scalar) -> Self:
        """Take observations [B, ...] into the averages, and invert them anew; `decay` 0.99 remembers 100 batches."""
        keep = jnp.minimum(1 - 1 / (self.batches + 1), decay)

        def average(old: Factor, rows: jax.Array) -> jax.Array:
            return keep * old.average + (1 - keep) * rows.T @ rows / rows.shape[0]

        inputs, outputs = [], []
        rows = zip(layer_inputs(net, observation), output_gradients(net, observation, key), strict=True)
        for (x, g), old_a, old_g in zip(rows, self.inputs, self.outputs, strict=True):
            a, g = average(old_a, x), average(old_g, g)  # (KFAC.2)
            rho = jnp.sqrt(jnp.diag(a).mean() / jnp.maximum(jnp.diag(g).mean(), 1e-8))
            inputs.append(Factor(a, inverse_plus_identity(a / (rho * jnp.sqrt(damping)), old_a.inverse)))  # (KFAC.3)
            outputs.append(Factor(g, inverse_plus_identity(g * rho / jnp.sqrt(damping), old_g.inverse)))
        return self._replace(inputs=inputs, outputs=outputs, batches=self.batches + 1)

    def natural_gradient(self, gradient: Vector, damping: Scalar, rate: Scalar, max_kl: Scalar) -> jax.Array:
        """The gradient [P] of a net -> the natural one [P], scaled down for steps of `rate` to stay within `max_kl`."""
        net, steps = gradient.net, []
        for (weight, bias), a, g in zip(layers_of(net), self.inputs, self.outputs, strict=True):
            step = g.inverse @ jnp.column_stack([weight, bias]) @ a.inverse / damping  # (KFAC.4)
            steps.append((step[:, :-1], step[:, -1]))
        natural = Vector.of(with_layers(net, steps)).parameters
        kl = 0.5 * jnp.square(rate) * natural @ gradient.parameters
        return natural * jnp.minimum(1.0, jnp.sqrt(max_kl / jnp.maximum(kl, 1e-20)))  # (KFAC.6)


def layers_of(net: ActorCritic) -> list[Layer]:
    """All layers; a log standard deviation that is a parameter counts as one without inputs."""
    mlps = [getattr(net, part) for part in PARTS if getattr(net, part) is not None]
    found = [layer for mlp in mlps for layer in zip(mlp.weights, mlp.biases, strict=True)]
    return found if net.log_std is None else [*found, (jnp.zeros((net.log_std.shape[-1], 0)), net.log_std)]


def with_layers(net: ActorCritic, layers: list[Layer]) -> ActorCritic:
    """`net` with other layers, in the order of `layers_of`."""
    rest = iter(layers)
    changes: dict[str, Any] = {}
    for part in PARTS:
        if (mlp := getattr(net, part)) is not None:
            weights, biases = zip(*(next(rest) for _ in mlp.weights), strict=True)
            changes[part] = MLP(list(weights), list(biases), mlp.norms, mlp.activation)
    if net.log_std is not None:
        changes["log_std"] = next(rest)[1]
    return replace(net, **changes)


def layer_inputs(net: ActorCritic, observation: Any) -> list[jax.Array]:
    """x̄ of each layer, [B, i + 1] each."""
    found: list[jax.Array] = []

    def through(mlp: MLP, x: jax.Array) -> jax.Array:
        for weight, bias in zip(mlp.weights, mlp.biases, strict=True):
            found.append(x)
            x = mlp.activation(x @ weight.T + bias)
        return x

    features = net.encoder(observation)
    if net.trunk is not None:
        features = through(net.trunk, features)
    through(net.actor, features)
    through(net.critic, features)
    if net.log_std is not None:
        found.append(features[:, :0])
    return [jnp.concatenate([x, jnp.ones((len(x), 1))], -1) for x in found]


def output_gradients(net: ActorCritic, observation: Any, key: jax.Array) -> list[jax.Array]:
    """g of each layer, [B, o] each."""
    action_key, value_key = jax.random.split(key)
    action, value = net.policy(observation).sample(action_key), net.value(observation)
    value += jax.random.normal(value_key, value.shape)  # (KFAC.1)

    def log_likelihood(biases: list[jax.Array]) -> jax.Array:
        own = with_layers(net, [(weight, bias) for (weight, _), bias in zip(layers_of(net), biases, strict=True)])
        return (own.policy(observation).log_prob(action) - 0.5 * jnp.square(own.value(observation) - value)).sum()

    # A bias for each sample: its gradient is that of the layer's output.
    return jax.grad(log_likelihood)([jnp.broadcast_to(bias, (len(value), len(bias))) for _, bias in layers_of(net)])


def inverse_plus_identity(matrix: jax.Array, guess: jax.Array) -> jax.Array:
    """(matrix + I)⁻¹ of a positive semi-definite matrix, by products alone (KFAC.5).

    LAPACK's factorisations can wait for ever inside a vmapped program on two cores (jax 0.10.2).
    """
    identity = jnp.eye(len(matrix))
    m = matrix + identity

    def error(x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(identity - m @ x)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, _, number = carry
        x = x @ (2 * identity - m @ x)
        return x, error(x), number + 1

    # Each step squares the error. I / tr M always leads there, in some log₂ of M's condition number steps more.
    x = jnp.where(error(guess) < 0.9, guess, identity / jnp.trace(m))
    return jax.lax.while_loop(lambda c: (c[1] > 1e-2) & (c[2] < 40), step, (x, error(x), jnp.int32(0)))[0]
