"""The host driver: the same loop around environments that are stepped from Python.

Two compiled calls a step: one chooses the action, one takes in what came of it. JAX computes in the background, so
that off-policy learning goes on while the environments make their next step; its price is that an action is chosen
by the policy before the last learning phase. On-policy algorithms wait, and stay exactly on-policy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import Algorithm, Transition
from zhixing.drivers.loop import Driver, Loop, Run, StepKeys, iteration_keys
from zhixing.environments.base import Batch
from zhixing.off_policy import OffPolicy


class HostCollector:
    """Collects rollouts from a batch that is stepped from Python."""

    def __init__(self, loop: Loop, batch: Batch):
        self.loop, self.batch = loop, batch
        self._act = jax.jit(partial(act, loop))
        self._absorb = jax.jit(partial(absorb, loop), donate_argnames="rollout")
        self._shapes: dict[Any, Transition] = {}  # of a rollout, for each algorithm's settings

    def __call__(
        self, algorithm: Algorithm, run: Run, keys: StepKeys, meanwhile: Callable[[Run], Run] = lambda run: run
    ) -> tuple[Run, Transition]:
        """T steps of the behaviour policy, `keys` [T, S, 2] -> the run after them, the rollout [T, S, N, ...].

        `meanwhile` is called once, when the first action is chosen: what it dispatches is computed beside the
        environments' steps.
        """
        rollout = self.empty(algorithm, len(keys.act))
        nothing: Any = ()
        for t in range(len(keys.act)):
            decision, action = self._act(algorithm, run.learner, run._replace(learner=(), memory=()), keys.act[t])
            action = jax.tree.map(np.asarray, action)
            run = meanwhile(run) if t == 0 else run
            _, timestep = self.batch.step((), action, None)
            light = run._replace(learner=nothing, memory=nothing)
            light, rollout = self._absorb(algorithm, light, decision, timestep, keys.carry[t], rollout, t)
            run = light._replace(learner=run.learner, memory=run.memory)
        return run, rollout

    def empty(self, algorithm: Algorithm, rollout_length: int) -> Transition:
        """Room for a rollout [T, S, N, ...]."""
        settings = jax.tree.structure(algorithm)
        if settings not in self._shapes:  # tracing the algorithm takes longer than many steps of most environments
            self._shapes[settings] = self.loop.example(algorithm)
        shapes, count = self._shapes[settings], len(self.loop.seeds)
        return jax.tree.map(lambda x: jnp.zeros((rollout_length, count, *x.shape[1:]), x.dtype), shapes)


class HostDriver(Driver):
    """Runs a `Loop` whose environments are called from Python. Same interface as the compiled driver."""

    saves_state = False

    def __init__(self, loop: Loop, batch: Batch):
        self.loop, self.batch = loop, batch
        self.collect = HostCollector(loop, batch)
        self._start = jax.jit(loop.start)
        self._restart = jax.jit(loop.restart_episodes)
        self._keys = jax.jit(iteration_keys, static_argnames=("rollout_length", "instances"))
        self._learn = jax.jit(partial(learn, loop), donate_argnames=("learner", "memory", "window"))

    def start(self, algorithm: Algorithm) -> Run:
        """A run that has not made a step."""
        return self._start(algorithm, *self.batch.reset(None))

    def restart(self, algorithm: Algorithm, run: Run) -> Run:
        """`run` with new episodes in every environment."""
        return self._restart(algorithm, run, *self.batch.reset(None))

    def close(self) -> None:
        """Release the environments."""
        self.batch.close()

    def advance(self, algorithm: Algorithm, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` times collect `rollout_length` steps and learn from them; `run` is consumed."""
        pending: tuple[Transition, Any] | None = None
        overlap = isinstance(algorithm, OffPolicy)
        step, instances = int(run.learner.clock.steps), self.loop.spec.num_environments

        def learn_pending(run: Run) -> Run:
            nonlocal pending
            if pending is None:
                return run
            parts = run.learner, run.memory, run.window, run.transforms
            learner, memory, window = self._learn(algorithm, *parts, *pending)
            pending = None
            return run._replace(learner=learner, memory=memory, window=window)

        for _ in range(iterations):
            keys, learn_key = self._keys(run.key, step, rollout_length=rollout_length, instances=instances)
            keys, step = jax.tree.map(np.asarray, keys), step + rollout_length * instances
            run, rollout = self.collect(algorithm, run, keys, learn_pending)
            pending = rollout, learn_key
            if not overlap:
                run = learn_pending(run)
        return learn_pending(run)


def act(loop: Loop, algorithm: Algorithm, learner: Any, run: Run, key: jax.Array) -> Any:
    """-> what the policy decided, and its action in the environment's units."""
    decision = loop.act(algorithm, learner, run, key)
    return decision, loop.chain.action(decision[0])


def learn(
    loop: Loop, algorithm: Algorithm, learner: Any, memory: Any, window: Any, transforms: Any, rollout: Any, key: Any
) -> tuple[Any, Any, Any]:
    """`Loop.learn`, of those parts of the run alone that it reads; the first three are consumed."""
    nothing: Any = ()
    run = Run(learner, memory, nothing, transforms, nothing, nothing, nothing, nothing, window)
    run = loop.learn(algorithm, run, rollout, key)
    return run.learner, run.memory, run.window


def absorb(
    loop: Loop, algorithm: Algorithm, run: Run, decision: Any, timestep: Any, key: jax.Array, rollout: Any, t: Any
) -> tuple[Run, Transition]:
    """`Loop.absorb`, with the transition written to place `t` of the rollout."""
    run, transition = loop.absorb(algorithm, run, decision, timestep, key)
    return run, jax.tree.map(lambda buffer, x: buffer.at[t].set(x), rollout, transition)
