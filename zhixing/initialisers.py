"""Initial weights."""

import jax
import jax.numpy as jnp


def orthogonal(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """A uniformly random matrix [rows, columns] with orthonormal rows or columns, whichever are fewer.

    It is the polar factor of a Gaussian matrix, by Newton and Schulz's iteration (Björck & Bowie 1971): products
    only. A QR factorisation inside a compiled program can wait for ever on two cores (jax 0.10.2), and compiles
    for longer.
    """
    x = jax.random.normal(key, (max(rows, columns), min(rows, columns)))
    x = jax.lax.fori_loop(0, 40, lambda _, x: 1.5 * x - 0.5 * x @ (x.T @ x), x / jnp.linalg.norm(x))
    return x if rows >= columns else x.T
