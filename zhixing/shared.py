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


def cond_of_any(predicate: jax.Array, true: Callable, false: Callable, *operands: Any) -> Any:
    """`jax.lax.cond` that stays a branch under vmap: `true` for all rows where `predicate` holds for any of them.

    A vmapped `cond` computes both branches in every row and selects. Here a row whose own `predicate` is false may get
    either answer, so that the two must be equal there. Not to be differentiated.
    """

    @jax.custom_batching.custom_vmap
    def branch(predicate: jax.Array, *operands: Any) -> Any:
        return jax.lax.cond(predicate, true, false, *operands)

    @branch.def_vmap
    def rule(axis_size: int, batched: tuple, predicate: jax.Array, *operands: Any) -> tuple[Any, Any]:
        axes = tuple(jax.tree.map(lambda b: 0 if b else None, part) for part in batched[1:])
        rows = [jax.vmap(f, in_axes=axes, axis_size=axis_size) for f in (true, false)]
        out = cond_of_any(predicate.any() if batched[0] else predicate, *rows, *operands)
        return out, jax.tree.map(lambda _: True, out)

    return branch(predicate, *operands)


def over_seeds(function: Callable, seeds: int, *arguments: Any, out_axes: Any = 0, in_place: bool = False) -> Any:
    """`function` of one seed's arguments, applied to those of `seeds` seeds; `out_axes` as for `jax.vmap`.

    A single seed goes without the axis, which leaves XLA more to simplify; but where it writes `in_place` to something
    large, taking the axis off and on again would make XLA copy a whole replay at each step.
    """
    if seeds == 1 and not in_place:
        alone = (map_seeds(lambda x: x[0], argument) for argument in arguments)
        return map_seeds(lambda x: x[None], function(*alone))
    in_axes = tuple(seed_axes(argument) for argument in arguments)
    return jax.vmap(function, in_axes=in_axes, out_axes=out_axes, axis_size=seeds)(*arguments)
