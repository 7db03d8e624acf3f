"""Networks that learn: all parameters in one vector, with the optimiser's state beside it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Vector(eqx.Module):
    """A network whose parameters lie in one vector. Call it like the network.

    One vector makes every operation on all parameters (optimiser, norm, target network) a single fused one.
    """

    parameters: jax.Array  # [P]
    structure: Any = eqx.field(static=True)  # (tree definition, shapes)

    @classmethod
    def of(cls, net: Any) -> "Vector":
        leaves, treedef = jax.tree.flatten(net)
        vector = jnp.concatenate([jnp.ravel(x) for x in leaves])
        return cls(vector, (treedef, tuple(x.shape for x in leaves)))

    @property
    def net(self) -> Any:
        treedef, shapes = self.structure
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        starts, leading = [0, *ends[:-1]], self.parameters.shape[:-1]  # () but for a vector of every seed
        parts = (self.parameters[..., i:j] for i, j in zip(starts, ends, strict=True))
        leaves = [part.reshape(*leading, *shape) for part, shape in zip(parts, shapes, strict=True)]
        return treedef.unflatten(leaves)

    def __call__(self, *args: Any) -> Any:
        return self.net(*args)


class Learned(Vector):
    """A network in one vector together with its optimiser's state."""

    optimiser_state: Any

    def __init__(self, vector: Vector, optimiser_state: Any):
        self.parameters, self.structure = vector.parameters, vector.structure
        self.optimiser_state = optimiser_state

    @classmethod
    def create(cls, net: Any, optimiser: optax.GradientTransformation) -> "Learned":
        vector = Vector.of(net)
        return cls(vector, optimiser.init(vector.parameters))

    @property
    def frozen(self) -> Vector:
        """The network alone, for a target network."""
        return Vector(self.parameters, self.structure)

    def gradient(self, loss: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Of `loss(net) -> (scalar, metrics)`: a vector [P]; the metrics come back with its norm."""
        gradients, metrics = jax.grad(loss, has_aux=True)(self.net)
        gradient = Vector.of(gradients).parameters
        return gradient, metrics | {"gradient_norm": jnp.linalg.norm(gradient)}

    def step(self, gradient: jax.Array, optimiser: optax.GradientTransformation) -> "Learned":
        """One step of the optimiser down `gradient` [P]."""
        step, optimiser_state = optimiser.update(gradient, self.optimiser_state, self.parameters)
        return Learned(Vector(optax.apply_updates(self.parameters, step), self.structure), optimiser_state)

    def minimise(self, loss: Any, optimiser: optax.GradientTransformation) -> tuple["Learned", dict[str, jax.Array]]:
        """One gradient step on `loss(net) -> (scalar, metrics)`."""
        gradient, metrics = self.gradient(loss)
        return self.step(gradient, optimiser), metrics


class Unpacked(eqx.Module):
    """A network with its parameters cut out of their vector. Call it like the network."""

    net: Any

    def __call__(self, *args: Any) -> Any:
        return self.net(*args)


def unpacked(state: Any) -> Any:
    """`state`, to be read only, with every network unpacked: done once, not at each of a rollout's steps.

    Any leading axes.
    """

    def is_vector(x: Any) -> bool:
        return isinstance(x, Vector)

    return jax.tree.map(lambda x: Unpacked(x.net) if is_vector(x) else x, state, is_leaf=is_vector)
