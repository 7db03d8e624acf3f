"""What the seeds of one run have in common, and how a function of one seed becomes one of all.

Seeds run side by side as a leading axis [S, ...] of everything. Counters are the same for all of them: kept
without that axis, a `cond` on them stays a `cond` under the seeds' vmap, and an index made of them stays a slice.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


class Shared(eqx.Module):
    """Base of the parts of a state that have no seeds axis."""


def is_shared(x: Any) -> bool:
    return isinstance(x, Shared)


def map_seeds(function: Callable, tree: Any) -> Any:
    """`function` of every array in `tree` that has a seeds axis."""
    return jax.tree.map(lambda x: x if is_shared(x) else function(x), tree, is_leaf=is_shared)


def seed_axes(tree: Any) -> Any:
    """The vmap axes of `tree`: 0 everywhere, None for `Shared` parts."""
    return jax.tree.map(lambda x: None if is_shared(x) else 0, tree, is_leaf=is_shared)


def over_seeds(function: Callable, seeds: int, *arguments: Any, out_axes: Any = 0) -> Any:
    """`function` of one seed's arguments, applied to those of `seeds` seeds; `out_axes` as for `jax.vmap`.

    One seed goes the same way: taking its axis off and on again would make XLA copy the replay at each step.
    """
    in_axes = tuple(seed_axes(argument) for argument in arguments)
    return jax.vmap(function, in_axes=in_axes, out_axes=out_axes, axis_size=seeds)(*arguments)
