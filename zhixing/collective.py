"""Means over the shards of a run, wherever a shard is one of several.

An algorithm takes the mean of its gradients, a transform that of its statistics, without knowing whether there is
anybody to share them with: outside `over` there is not, and a mean is what it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax

_axis: ContextVar[tuple[Any, int] | None] = ContextVar("axis", default=None)

T = TypeVar("T")


@contextmanager
def over(names: Any, size: int) -> Iterator[None]:
    """What is traced within it is one of `size` shards, along the axes `names` of a `shard_map` or a `vmap`."""
    token = _axis.set((names, size))
    try:
        yield
    finally:
        _axis.reset(token)


def mean(tree: T) -> T:
    """The mean of every array in `tree` over all shards, in which its size is the same."""
    axis = _axis.get()
    return tree if axis is None else jax.lax.pmean(tree, axis[0])


def size() -> int:
    """How many shards there are."""
    axis = _axis.get()
    return 1 if axis is None else axis[1]
