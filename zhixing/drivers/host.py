"""The host driver: the same loop around environments that are stepped from Python.

Two compiled calls a step: one chooses the action, one takes in what came of it. JAX computes in the background, so
that off-policy learning goes on while the environments make their next step; its price is that an action is chosen
by the policy before the last learning phase. On-policy algorithms wait, and stay exactly on-policy.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import Algorithm, Transition
from zhixing.drivers.loop import Loop, Run, iteration_keys
from zhixing.environments.base import Batch
from zhixing.off_policy import OffPolicy


class HostDriver:
    """Runs a `Loop` whose environments are called from Python. Same interface as the compiled driver."""

    def __init__(self, loop: Loop, batch: Batch):
        self.loop, self.batch = loop, batch
        self._start = jax.jit(loop.start)
        self._restart = jax.jit(loop.restart_episodes)
        self._keys = jax.jit(iteration_keys, static_argnames=("rollout_length", "instances"))
        self._act = jax.jit(partial(act, loop))
        self._absorb = jax.jit(partial(absorb, loop), donate_argnames="rollout")
        self._learn = jax.jit(partial(learn, loop), donate_argnames=("learner", "memory", "window"))

    def start(self, algorithm: Algorithm) -> Run:
        """A run that has not made a step."""
        return self._start(algorithm, *self.batch.reset(None))

    def restart(self, algorithm: Algorithm, run: Run) -> Run:
        """`run` with new episodes in every environment."""
        return self._restart(algorithm, run, *self.batch.reset(None))

    def advance(self, algorithm: Algorithm, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` times collect `rollout_length` steps and learn from them; `run` is consumed."""
        pending: tuple[Transition, Any] | None = None
        overlap = isinstance(algorithm, OffPolicy)
        step, instances = int(run.learner.clock.steps), self.loop.spec.num_environments

        def learn_pending(run: Run) -> Run:
            if pending is None:
                return run
            parts = run.learner, run.memory, run.window, run.transforms
            learner, memory, window = self._learn(algorithm, *parts, *pending)
            return run._replace(learner=learner, memory=memory, window=window)

        for _ in range(iterations):
            keys, learn_key = self._keys(run.key, step, rollout_length=rollout_length, instances=instances)
            keys, step = jax.tree.map(np.asarray, keys), step + rollout_length * instances
            rollout = self.empty_rollout(algorithm, rollout_length)
            for t in range(rollout_length):
                decision, action = self._act(algorithm, run.learner, run._replace(learner=(), memory=()), keys.act[t])
                action = np.asarray(action)
                # The policy has answered: what is dispatched from here on is computed beside the environments' step.
                run, pending = learn_pending(run), None
                _, timestep = self.batch.step((), action, None)
                light = run._replace(learner=(), memory=())
                light, rollout = self._absorb(algorithm, light, decision, timestep, keys.carry[t], rollout, t)
                run = light._replace(learner=run.learner, memory=run.memory)
            pending = rollout, learn_key
            if not overlap:
                run, pending = learn_pending(run), None
        return learn_pending(run)

    def empty_rollout(self, algorithm: Algorithm, rollout_length: int) -> Transition:
        """Room for a rollout [T, S, N, ...]."""
        shapes, count = self.loop.example(algorithm), len(self.loop.seeds)
        return jax.tree.map(lambda x: jnp.zeros((rollout_length, count, *x.shape[1:]), x.dtype), shapes)


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
