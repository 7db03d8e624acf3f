"""Linear equations whose matrix is only known by its products with vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

TOLERANCE = 1e-6  # of ‖b - A x‖ / ‖b‖: float32 has no more to give


def conjugate_gradient(
    product: Callable[[jax.Array], jax.Array], b: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """x ≈ A⁻¹ b and what is left, b - A x, for a positive definite A.

    `product` is v ↦ A v, b [P]. It is called `steps` times, however near the solution is: of many seeds in one program
    none waits for another. Once the residual is within rounding of zero the answer stays as it is.
    Nocedal & Wright, "Numerical optimization", 2nd ed., algorithm 5.2.
    """

    def step(_: int, now: tuple) -> tuple:
        x, residual, direction, square = now
        image = product(direction)
        curvature = direction @ image
        going_on = (square > limit) & (curvature > 0)
        length = square / jnp.where(going_on, curvature, 1.0)
        x, residual = x + length * direction, residual - length * image
        following = residual @ residual
        new = x, residual, residual + following / jnp.where(going_on, square, 1.0) * direction, following
        return jax.tree.map(lambda new, old: jnp.where(going_on, new, old), new, now)

    limit = TOLERANCE**2 * (b @ b)
    x, residual, _, _ = jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(b), b, b, b @ b))
    return x, residual
