"""What the learners on a table share: what they need of a task, and their step sizes."""

import gymnasium
import jax
import jax.numpy as jnp

from zhixing.core import Algorithm, Spec, brief
from zhixing.errors import UsageError


def require_table(algorithm: Algorithm, spec: Spec, instead: str = "DQN") -> None:
    """Raise UsageError unless the observations are numbered; `instead`: what to use then."""
    if not isinstance(spec.observation_space, gymnasium.spaces.Discrete):
        raise UsageError(
            f"{type(algorithm).__name__} keeps a table and needs discrete observations, this environment has "
            f"{brief(spec.observation_space)}; use {instead}"
        )


def step_size(learning_rate: jax.Array | float, decay: jax.Array | float, visits: jax.Array) -> jax.Array:
    """αₙ = α n^-ω of the n-th update of a pair, `visits` [...] = n; Even-Dar & Mansour, JMLR 5, 2003."""
    # n^-ω as exponential and logarithm, which run on vectors; a power does not.
    return learning_rate * jnp.exp(-decay * jnp.log(jnp.maximum(visits, 1).astype(jnp.float32)))
