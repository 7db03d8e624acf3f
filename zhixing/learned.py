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
        starts = [0, *ends[:-1]]
        leaves = [self.parameters[i:j].reshape(shape) for i, j, shape in zip(starts, ends, shapes, strict=True)]
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

    def minimise(self, loss: Any, optimiser: optax.GradientTransformation) -> tuple["Learned", dict[str, jax.Array]]:
        """One gradient step on `loss(net) -> (scalar, metrics)`; the metrics come back with the gradient's norm."""

        gradients, metrics = jax.grad(loss, has_aux=True)(self.net)
        gradient = Vector.of(gradients).parameters
        step, optimiser_state = optimiser.update(gradient, self.optimiser_state, self.parameters)
        stepped = Vector(optax.apply_updates(self.parameters, step), self.structure)
        return Learned(stepped, optimiser_state), metrics | {"gradient_norm": jnp.linalg.norm(gradient)}
