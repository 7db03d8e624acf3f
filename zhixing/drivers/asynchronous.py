"""The asynchronous driver: worker threads that learn together without waiting for each other.

Mnih et al., "Asynchronous methods for deep reinforcement learning", arXiv:1602.01783, Algorithm S3. Each worker

    copies the shared parameters θ
    collects a rollout in its own environments, and computes a gradient of its loss
    applies it to θ, as θ is by then; what the optimiser remembers is shared too

It is really asynchronous: while JAX computes, it holds no lock of the interpreter. A gradient's staleness is how many
others were applied between the copy and it. Workers wait for each other only where the driver hands the run back, to
be recorded or saved: there the run is whole.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import Algorithm
from zhixing.drivers.compiled import CompiledCollector
from zhixing.drivers.halves import Halves
from zhixing.drivers.host import HostCollector
from zhixing.drivers.loop import Driver, Loop, Run, iteration_keys
from zhixing.drivers.workers import own_key, share, together, worker_loop
from zhixing.environments.base import Batch
from zhixing.gradients import GradientLearner


class AsynchronousDriver(Driver):
    """Runs a `Loop` in as many threads as there are batches. Same interface as the compiled driver."""

    def __init__(self, loop: Loop, batches: Sequence[Batch], is_compiled: bool, saves_state: bool):
        self.loop, self.batches, self.saves_state = loop, batches, saves_state
        self.workers = len(batches)
        self.part = worker_loop(loop, self.workers)
        kind: Any = CompiledCollector if is_compiled else HostCollector
        self.collect = [kind(self.part, batch) for batch in batches]
        self.halves = Halves(self.part)
        self.resets = [jax.jit(batch.reset) if saves_state else batch.reset for batch in batches]
        self._start, self._restart = jax.jit(loop.start), jax.jit(loop.restart_episodes)
        self._keys = jax.jit(iteration_keys, static_argnames=("rollout_length", "instances"))
        self._share = jax.jit(share, static_argnums=(1, 2))
        self._together = jax.jit(together)
        self.staleness: Counter[int] = Counter()  # how often a gradient had each

    def report(self) -> dict:
        """What the summary says of the workers."""
        return staleness_report(self.staleness)

    def recall(self, report: dict) -> None:
        """What was reported before the run was stopped."""
        self.staleness = recalled(report)

    def reset(self) -> tuple[Any, Any]:
        """New episodes: each worker's state of its environments, and the first observation [S, N, ...]."""
        states, observations = zip(
            *(reset(own_key(self.loop.keys()[2], w)) for w, reset in enumerate(self.resets)), strict=True
        )
        return states, jax.tree.map(lambda *x: jnp.concatenate(x, 1), *observations)

    def start(self, algorithm: Algorithm) -> Run:
        """A run that has not made a step."""
        return self._start(algorithm, *self.reset())

    def restart(self, algorithm: Algorithm, run: Run) -> Run:
        """`run` with new episodes in every environment."""
        return self._restart(algorithm, run, *self.reset())

    def close(self) -> None:
        """Release the environments."""
        for batch in self.batches:
            batch.close()

    def advance(self, algorithm: GradientLearner, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` rollouts for each worker, made by whoever is free; `run` is consumed."""
        parts = [self._share(run, w, self.workers) for w in range(self.workers)]
        if not iterations:  # only to compile, where what was done can be thrown away
            if self.saves_state:
                self.work(algorithm, Shared(run, 1), list(parts), 0, rollout_length)
            return run
        shared = Shared(run, iterations * self.workers)
        threads = [
            threading.Thread(target=self.work, args=(algorithm, shared, parts, w, rollout_length), daemon=True)
            for w in range(self.workers)
        ]
        for thread in threads[1:]:
            thread.start()
        self.work(algorithm, shared, parts, 0, rollout_length)
        for thread in threads[1:]:
            thread.join()
        if shared.failure is not None:
            raise shared.failure
        self.staleness += shared.staleness
        return self._together(run._replace(learner=shared.learner, window=shared.window), parts)

    def work(self, algorithm: Any, shared: "Shared", parts: list[Run], worker: int, rollout_length: int) -> None:
        """Rollout after rollout, until all of them are made."""
        instances = self.part.spec.num_environments
        step, run_key = shared.first_step, own_key(parts[worker].key, worker)
        try:
            while (copied := shared.take()) is not None:
                learner, version = copied
                keys, learn_key = self._keys(run_key, step, rollout_length=rollout_length, instances=instances)
                step += rollout_length * instances
                part, rollout = self.collect[worker](algorithm, parts[worker]._replace(learner=learner), keys)
                parts[worker] = part._replace(learner=())
                minibatches, moments, of_rollout = self.halves.batches(algorithm, learner, rollout, learn_key)
                count, all_metrics = algorithm.updates_per_iteration, []
                for number in range(count):
                    if number:
                        learner, version = shared.copy()
                    gradient, metrics = self.halves.gradient(algorithm, learner, minibatches, moments, number)
                    jax.block_until_ready(gradient)
                    metrics["staleness"] = np.zeros(len(self.loop.seeds), np.float32)
                    all_metrics.append(metrics)
                    with shared.lock:
                        stale = shared.version - version
                        metrics["staleness"] += stale
                        shared.staleness[stale] += 1
                        shared.version += 1
                        shared.learner = self.halves.apply(algorithm, shared.learner, gradient, metrics)
                        if number == count - 1:
                            arguments = shared.learner, shared.window, of_rollout, all_metrics
                            steps = rollout_length * instances
                            shared.learner, shared.window = self.halves.finish(algorithm, *arguments, steps)
        except BaseException as error:
            shared.fail(error)


class Shared:
    """What the threads share; `learner` and `window` are replaced as a whole, under the lock."""

    def __init__(self, run: Run, rollouts: int):
        self.lock = threading.Lock()
        self.learner, self.version = run.learner, 0  # version: how many gradients were applied to it
        self.first_step = int(run.learner.clock.steps)
        self.rollouts = rollouts  # that nobody has taken on
        self.staleness: Counter[int] = Counter()
        self.window = run.window
        self.failure: BaseException | None = None

    def take(self) -> tuple[Any, int] | None:
        """Take on a rollout: a copy of the learner and its version; None if there is nothing left to do."""
        with self.lock:
            if not self.rollouts or self.failure:
                return None
            self.rollouts -= 1
            return self.learner, self.version

    def copy(self) -> tuple[Any, int]:
        with self.lock:
            return self.learner, self.version

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self.failure = self.failure or error


def staleness_report(staleness: Counter[int]) -> dict:
    """How many gradients were how stale."""
    return {"staleness": {str(stale): staleness[stale] for stale in sorted(staleness)}}


def recalled(report: dict) -> Counter[int]:
    """The inverse of `staleness_report`."""
    return Counter({int(stale): count for stale, count in report.get("staleness", {}).items()})
