"""The optimisers that an algorithm lets its user choose between."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Optimiser = Literal["rmsprop", "adam", "kfac"]


def make_optimiser(
    name: Optimiser, learning_rate: jax.Array | float, max_gradient_norm: jax.Array | float, epsilon: jax.Array | float
) -> optax.GradientTransformation:
    """A step of the optimiser called `name`; the gradient's norm is clipped to `max_gradient_norm` before.

    RMSProp is that of Mnih et al., arXiv:1602.01783, eqs. (8) and (9): g ← 0.99 g + 0.01 Δθ², and a step of
    η Δθ / √(g + ε). With ε under the root, a parameter whose gradient is below √ε takes steps in proportion to it;
    PyTorch's √g + ε is that only below ε.
    K-FAC has natural gradients with a bound of their own (zhixing/kfac.py): the step is a running average of these.
    """
    if name == "kfac":
        return optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(learning_rate))
    clip = clip_by_norm(max_gradient_norm)
    if name == "adam":
        return optax.chain(clip, optax.adam(learning_rate, eps=epsilon))
    return optax.chain(clip, optax.rmsprop(learning_rate, decay=0.99, eps=epsilon, eps_in_sqrt=True))


def clip_by_norm(limit: jax.Array | float) -> optax.GradientTransformation:
    """The gradient, scaled down to the norm `limit` where it is longer.

    By one factor: Optax's `clip_by_global_norm` divides number by number, a twentieth of PPO's time on CartPole.
    """

    def update(gradient: Any, state: optax.EmptyState, parameters: Any = None) -> tuple[Any, optax.EmptyState]:
        scale = jnp.minimum(1.0, limit / optax.tree.norm(gradient))
        return jax.tree.map(lambda x: scale * x, gradient), state

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)
