"""The compiled driver: the whole loop, environments included, is one XLA program."""

from functools import partial

import jax
import jax.numpy as jnp

from zhixing.core import Algorithm, Transition
from zhixing.drivers.loop import Driver, Loop, Run, StepKeys, iteration_keys
from zhixing.environments.base import Batch
from zhixing.learned import unpacked

KEYS_AT_ONCE = 64  # steps


class CompiledDriver(Driver):
    """Runs a `Loop` around a batch that can be traced."""

    def __init__(self, loop: Loop, batch: Batch, pure_reset: bool):
        self.loop, self.batch = loop, batch
        self.saves_state = pure_reset
        self.reset = jax.jit(batch.reset) if pure_reset else batch.reset
        self._start = jax.jit(loop.start)
        self._restart = jax.jit(loop.restart_episodes)
        self._advance = jax.jit(partial(advance, loop, batch), static_argnames="rollout_length", donate_argnames="run")

    def start(self, algorithm: Algorithm) -> Run:
        """A run that has not made a step."""
        return self._start(algorithm, *self.reset(self.loop.keys()[2]))

    def restart(self, algorithm: Algorithm, run: Run) -> Run:
        """`run` with new episodes in every environment."""
        return self._restart(algorithm, run, *self.reset(self.loop.keys()[2]))

    def close(self) -> None:
        """Release the environments."""
        self.batch.close()

    def advance(self, algorithm: Algorithm, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` times collect `rollout_length` steps and learn from them; `run` is consumed."""
        return self._advance(algorithm, run, jnp.int32(iterations), rollout_length=rollout_length)


def collect(loop: Loop, batch: Batch, algorithm: Algorithm, run: Run, keys: StepKeys) -> tuple[Run, Transition]:
    """T steps of the behaviour policy, `keys` [T, S, 2] -> the run after them, the rollout [T, S, N, ...]."""
    learner = unpacked(run.learner)

    def step(run: Run, key: StepKeys) -> tuple[Run, Transition]:
        decision = loop.act(algorithm, learner, run, key.act)
        environment, timestep = batch.step(run.environment, loop.chain.action(decision[0]), key.environment)
        return loop.absorb(algorithm, run._replace(environment=environment), decision, timestep, key.carry)

    return jax.lax.scan(step, run, keys)


def advance(
    loop: Loop, batch: Batch, algorithm: Algorithm, run: Run, iterations: jax.Array, rollout_length: int
) -> Run:
    """The program. The number of iterations is an argument of it, so that any chunk is the same program."""
    instances = loop.spec.num_environments

    def iteration(run: Run, step_keys: StepKeys, learn_key: jax.Array) -> Run:
        run, rollout = collect(loop, batch, algorithm, run, step_keys)
        return loop.learn(algorithm, run, rollout, learn_key)

    # A tabular step takes less time than making its keys: these are made for many iterations at once.
    block = max(1, KEYS_AT_ONCE // rollout_length)

    def several(number: jax.Array, run: Run) -> Run:
        begins = run.learner.clock.steps + rollout_length * instances * jnp.arange(block)
        keys = jax.vmap(lambda begin: iteration_keys(run.key, begin, rollout_length, instances))(begins)
        count = jnp.minimum(block, iterations - number * block)
        return jax.lax.fori_loop(0, count, lambda i, run: iteration(run, *jax.tree.map(lambda x: x[i], keys)), run)

    return jax.lax.fori_loop(0, -(-iterations // block), several, run)


class CompiledCollector:
    """Collects rollouts from a batch that can be traced."""

    def __init__(self, loop: Loop, batch: Batch):
        self._collect = jax.jit(lambda *arguments: collect(loop, batch, *arguments))

    def __call__(self, algorithm: Algorithm, run: Run, keys: StepKeys) -> tuple[Run, Transition]:
        return self._collect(algorithm, run, keys)
