"""Schedules of a hyper-parameter over the run, as functions of the part of the run that is over."""

from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Literal["constant", "linear"]


def linear(start: float, end: float, fraction: float, progress: jax.Array) -> jax.Array:
    """From `start` to `end` in a straight line over the first `fraction` of the run, `end` after that."""
    return start + (end - start) * jnp.minimum(progress / jnp.maximum(fraction, 1e-8), 1.0)


def remaining(schedule: Schedule, progress: jax.Array) -> jax.Array | float:
    """The factor of a scheduled quantity: 1 if constant, falling from 1 to 0 over the run if linear."""
    return 1.0 - progress if schedule == "linear" else 1.0
