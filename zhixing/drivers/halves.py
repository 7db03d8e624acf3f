"""The two halves of a `GradientLearner`'s update, over the seeds of a loop, for drivers that part them."""

from typing import Any

import jax
import jax.numpy as jnp

from zhixing.core import Transition
from zhixing.drivers.loop import Loop, Window, tally
from zhixing.shared import over_seeds, seed_axes


class Halves:
    """A `GradientLearner`'s functions over the seeds of a loop, compiled."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.batches = jax.jit(self._batches)
        self.gradient = jax.jit(self._gradient)
        self.apply = jax.jit(self._apply)
        self.finish = jax.jit(self._finish)

    def _over_seeds(self, function: Any, *arguments: Any, out_axes: Any = 0) -> Any:
        return over_seeds(function, len(self.loop.seeds), *arguments, out_axes=out_axes)

    def _batches(self, algorithm: Any, learner: Any, rollout: Transition, key: jax.Array) -> Any:
        """The rollout [T, S, N, ...] as minibatches [S, M, ...], and their moments [S, M]."""

        def one(learner: Any, rollout: Transition, key: jax.Array) -> Any:
            minibatches = algorithm.batches(learner, rollout, key)
            return minibatches, jax.vmap(algorithm.moments)(minibatches), algorithm.describe(minibatches)

        return self._over_seeds(one, learner, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rollout), key)

    def _gradient(self, algorithm: Any, learner: Any, minibatches: Any, moments: Any, number: Any) -> Any:
        """-> the gradient of minibatch `number` [S, ...], and its metrics [S]."""

        def one(learner: Any, minibatches: Any, moments: Any) -> Any:
            minibatch, of_it = jax.tree.map(lambda x: x[number], (minibatches, moments))
            return algorithm.gradient(learner, algorithm.prepared(minibatch, of_it))

        return self._over_seeds(one, learner, minibatches, moments)

    def _apply(self, algorithm: Any, learner: Any, gradient: Any, metrics: dict) -> Any:
        return self._over_seeds(algorithm.apply, learner, gradient, metrics, out_axes=seed_axes(learner))

    def _finish(self, algorithm: Any, learner: Any, window: Window, of_rollout: dict, metrics: list, steps: Any) -> Any:
        """After the last minibatch; `metrics`: those of each of them -> learner, window."""
        stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *metrics)  # [S, M]
        learner = self._over_seeds(algorithm.finish, learner, stacked, out_axes=seed_axes(learner))
        clock = learner.clock.tick(steps=steps, updates=algorithm.updates_per_iteration)
        means = {name: x.mean(1) for name, x in stacked.items()} | of_rollout
        return learner._replace(clock=clock), tally(window, means, clock)
