"""On-policy learning by gradients, in halves that can lie in different places.

Where there is one worker, `update` is

    for each minibatch of the rollout:  gradient, then apply

A3C computes gradients in many threads and applies them to one copy of the parameters as they come; DPPO lets many
workers each compute the gradient of a part of every minibatch and applies the mean; `shard_map` does the same on many
devices. They are the same functions in other places, so that an algorithm that is written in them can do all three.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zhixing import collective
from zhixing.core import OnPolicy, Transition, hyperparameters


@hyperparameters
class GradientLearner(OnPolicy):
    """Eats a rollout [T, N] of its own present policy, minibatch after minibatch, M of them."""

    def batches(self, state: Any, rollout: Transition, key: jax.Array) -> Any:
        """`rollout` [T, N] -> what its gradients are of, in their order: [M, ...]."""
        return jax.tree.map(lambda x: x[None], rollout)

    def describe(self, minibatches: Any) -> dict:
        """Metrics of the rollout."""
        return {}

    def moments(self, minibatch: Any) -> Any:
        """What is to be known of a minibatch as a whole before the gradient of a part of it can be computed."""
        return ()

    def pooled(self, moments: Any, average: Callable[[jax.Array], jax.Array]) -> Any:
        """The moments of a whole minibatch from those of its parts, all of the same size."""
        return moments

    def prepared(self, minibatch: Any, moments: Any) -> Any:
        """A minibatch, or a part of it, as `gradient` wants it."""
        return minibatch

    def gradient(self, state: Any, minibatch: Any) -> tuple[Any, dict]:
        """-> the loss's gradient and metrics; both are means over the minibatch."""
        raise NotImplementedError

    def apply(self, state: Any, gradient: Any, metrics: dict) -> Any:
        """A step of the optimiser down `gradient`, which may come from an older copy of the parameters."""
        raise NotImplementedError

    def finish(self, state: Any, metrics: dict) -> Any:
        """After the last minibatch, `metrics` [M] of all of them."""
        return state

    def update(self, state: Any, rollout: Transition, key: jax.Array) -> tuple[Any, dict]:
        minibatches = self.batches(state, rollout, key)

        def step(state: Any, minibatch: Any) -> tuple[Any, dict]:
            moments = self.pooled(self.moments(minibatch), collective.mean)
            gradient, metrics = collective.mean(self.gradient(state, self.prepared(minibatch, moments)))
            return self.apply(state, gradient, metrics), metrics

        state, metrics = jax.lax.scan(step, state, minibatches)
        of_rollout = collective.mean(self.describe(minibatches))
        return self.finish(state, metrics), jax.tree.map(jnp.mean, metrics) | of_rollout


class Moments(NamedTuple):
    """Of the advantages of a minibatch; each []."""

    mean: jax.Array
    variance: jax.Array


@hyperparameters
class AdvantageLearner(GradientLearner):
    """One whose minibatches are tuples with an `advantage`, a `value` and its `target`, the sum of the two."""

    normalize_advantage: bool = False  # to mean 0 and standard deviation 1 in each minibatch

    def moments(self, minibatch: Any) -> Moments:
        return Moments(minibatch.advantage.mean(), minibatch.advantage.var())

    def pooled(self, moments: Moments, average: Callable[[jax.Array], jax.Array]) -> Moments:
        mean = average(moments.mean)
        return Moments(mean, average(moments.variance + jnp.square(moments.mean - mean)))

    def prepared(self, minibatch: Any, moments: Moments) -> Any:
        if not self.normalize_advantage:
            return minibatch
        normalized = (minibatch.advantage - moments.mean) / (jnp.sqrt(moments.variance) + 1e-8)
        return minibatch._replace(advantage=normalized)

    def describe(self, minibatches: Any) -> dict:
        return {
            "explained_variance": 1 - jnp.var(minibatches.advantage) / (jnp.var(minibatches.target) + 1e-8),
            "value": minibatches.value.mean(),
        }
