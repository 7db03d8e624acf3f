"""What the learners on a table share: the table, what they need of a task and of their settings, their step sizes."""

from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import Algorithm, Clock, Spec, brief, require_between, require_positive
from zhixing.errors import UsageError


class Table(NamedTuple):
    """The state of a learner on one table."""

    q: jax.Array  # [states, actions], Q(s, a)
    visits: jax.Array  # [states, actions] int32, how often each pair was updated
    clock: Clock

    @classmethod
    def create(cls, spec: Spec, value: Any) -> "Table":
        """Every Q(s, a) is `value`."""
        shape = (spec.num_states, spec.num_actions)
        return cls(jnp.full(shape, value), jnp.zeros(shape, jnp.int32), Clock.start(spec))


def check_table_settings(algorithm: Algorithm, spec: Spec, instead: str = "DQN") -> None:
    """Raise UsageError unless the task has a table and the settings that all its learners have are possible."""
    require_table(algorithm, spec, instead)
    require_positive(algorithm, "learning_rate", "temperature")
    require_between(algorithm, 0, 1, "discount", "epsilon_start", "epsilon_end", "epsilon_fraction")
    require_between(algorithm, 0, np.inf, "learning_rate_decay")


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
