"""A run in the hands of W workers: what each of them has for itself, and what they have together.

Of the N environments of a seed each worker has N / W, with what goes with them: the first observation to act on, the
carry, the episodes under way, the part of the transforms' state that belongs to them. Learner and statistics are one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from zhixing.drivers.loop import Episodes, Loop, Run, Window, empty_window
from zhixing.environments.transforms import Statistics, union


def worker_loop(loop: Loop, workers: int) -> Loop:
    """The loop of one of them."""
    return replace(loop, spec=replace(loop.spec, num_environments=loop.spec.num_environments // workers))


def own_key(key: jax.Array, worker: int) -> jax.Array:
    """A worker's key, of the run's [S, 2]; the first has the run's."""
    return key if worker == 0 else jax.vmap(lambda k: jax.random.fold_in(k, worker))(key)


def share(run: Run, worker: int, workers: int) -> Run:
    """What `worker` has of `run`, with an empty window; `run.environment` holds a part for each of them."""

    def of(tree: Any) -> Any:
        def cut(x: jax.Array) -> jax.Array:
            size = x.shape[1] // workers
            return x[:, worker * size : (worker + 1) * size]

        return jax.tree.map(cut, tree)

    return run._replace(
        memory=(),
        environment=run.environment[worker],
        transforms=jax.tree.map(lambda x: x if is_statistics(x) else of(x), run.transforms, is_leaf=is_statistics),
        observation=of(run.observation),
        carry=of(run.carry),
        episodes=Episodes(*of(run.episodes)),
        window=empty_window(*run.window.metrics.shape),
    )


def together(run: Run, parts: Sequence[Run]) -> Run:
    """`run` after its workers: their parts side by side, the statistics and the windows of all of them."""

    def beside(*trees: Any) -> Any:
        return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *trees)

    def merge(old: Any, *new: Any) -> Any:
        return union(old, new) if is_statistics(old) else beside(*new)

    return run._replace(
        environment=tuple(part.environment for part in parts),
        transforms=jax.tree.map(merge, run.transforms, *(part.transforms for part in parts), is_leaf=is_statistics),
        observation=beside(*(part.observation for part in parts)),
        carry=beside(*(part.carry for part in parts)),
        episodes=Episodes(*beside(*(part.episodes for part in parts))),
        window=sum_of([run.window, *(part.window for part in parts)]),
    )


def sum_of(windows: Sequence[Window]) -> Window:
    """One window of what happened in all of them."""
    sums: Window = jax.tree.map(lambda *x: sum(x[1:], x[0]), *windows)
    never = jnp.iinfo(jnp.int32).max
    first = jnp.stack([jnp.where(w.first_bad < 0, never, w.first_bad) for w in windows]).min(0)
    return sums._replace(first_bad=jnp.where(first == never, -1, first))


def is_statistics(x: Any) -> bool:
    return isinstance(x, Statistics)
