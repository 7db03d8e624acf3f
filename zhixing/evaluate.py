"""Evaluation, apart from training: the greedy policy in environments and episodes of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import Algorithm
from zhixing.environments.base import Batch, Environment
from zhixing.environments.transforms import Chain
from zhixing.shared import over_seeds

EVALUATION_STREAM = 0x5EED  # sets evaluation's random numbers apart from training's with the same seed


class Progress(NamedTuple):
    """How far each instance has come; its k episodes are its first k, so that short ones are not preferred."""

    environment: Any
    transforms: Any
    observation: Any  # [S, E, ...]
    returns: jax.Array  # [S, E, k]
    lengths: jax.Array  # [S, E, k] int32
    finished: jax.Array  # [S, E] int32, episodes over
    key: jax.Array  # [S, 2]


class Evaluator:
    """Plays `episodes` greedy episodes with each seed's policy; the returns are the environment's own, undiscounted.

    Each of the instances of one seed plays the same number of episodes.
    """

    def __init__(
        self, environment: Environment, chain: Chain, seeds: tuple[int, ...], episodes: int, max_instances: int
    ):
        self.seeds, self.chain, self.episodes = seeds, chain, episodes
        self.instances = max(n for n in range(1, min(episodes, max_instances) + 1) if episodes % n == 0)
        self.each = episodes // self.instances
        apart = [int(np.random.SeedSequence((seed, EVALUATION_STREAM)).generate_state(1)[0] >> 1) for seed in seeds]
        self.batch: Batch = environment.batch(apart, self.instances)
        self._reset = jax.jit(self.batch.reset) if environment.saves_state else self.batch.reset
        self._begin = jax.jit(self.begin)
        self._act = jax.jit(self.act)
        self._count = jax.jit(self.count)
        self._play = jax.jit(self.play)
        self.compiled = environment.compiled

    def __call__(self, algorithm: Algorithm, learner: Any, transforms: Any, step: int) -> tuple[Any, Any]:
        """-> returns and lengths [S, episodes] of episodes that depend on the seeds and `step` alone."""
        keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(seed), EVALUATION_STREAM) for seed in self.seeds])
        keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, step)))(keys)
        environment, observation = self._reset(keys[:, 0])
        progress = self._begin(environment, transforms, observation, keys[:, 1])
        if self.compiled:
            progress = self._play(algorithm, learner, progress)
        else:
            while np.asarray(progress.finished).min() < self.each:
                key, action = self._act(algorithm, learner, progress)
                environment, timestep = self.batch.step(progress.environment, np.asarray(action), None)
                progress = self._count(progress._replace(environment=environment, key=key), timestep)
        shape = (len(self.seeds), self.episodes)
        return np.asarray(progress.returns).reshape(shape), np.asarray(progress.lengths).reshape(shape)

    def begin(self, environment: Any, transforms: Any, observation: Any, key: jax.Array) -> Progress:
        count = len(self.seeds)
        transforms = over_seeds(lambda state: self.chain.for_evaluation(state, self.instances), count, transforms)
        transforms, observation = over_seeds(
            lambda state, x: self.chain.reset(state, x, training=False), count, transforms, observation
        )
        zeros = jnp.zeros((count, self.instances, self.each))
        finished = jnp.zeros((count, self.instances), jnp.int32)
        return Progress(environment, transforms, observation, zeros, zeros.astype(jnp.int32), finished, key)

    def act(self, algorithm: Algorithm, learner: Any, progress: Progress) -> tuple[jax.Array, Any]:
        """-> the next key, the greedy action in the environment's units [S, E, ...]."""
        action = over_seeds(algorithm.policy, len(self.seeds), learner, progress.observation)
        return jax.vmap(lambda key: jax.random.split(key)[0])(progress.key), self.chain.action(action)

    def count(self, progress: Progress, timestep: Any) -> Progress:
        """Book one step into the slot of the episode under way; beyond the last slot it is dropped."""
        slot = jnp.arange(self.each) == progress.finished[..., None]
        returns = progress.returns + jnp.where(slot, timestep.reward[..., None], 0.0)
        lengths = progress.lengths + slot
        finished = progress.finished + (timestep.terminated | timestep.truncated)
        transforms, timestep = over_seeds(
            lambda state, t: self.chain.step(state, t, training=False), len(self.seeds), progress.transforms, timestep
        )
        return progress._replace(
            transforms=transforms,
            observation=timestep.observation,
            returns=returns,
            lengths=lengths,
            finished=finished,
        )

    def play(self, algorithm: Algorithm, learner: Any, progress: Progress) -> Progress:
        """The whole evaluation as one program."""

        def unfinished(progress: Progress) -> jax.Array:
            return jnp.any(progress.finished < self.each)

        def one_step(progress: Progress) -> Progress:
            environment_key = jax.vmap(lambda key: jax.random.split(key)[1])(progress.key)
            key, action = self.act(algorithm, learner, progress)
            environment, timestep = self.batch.step(progress.environment, action, environment_key)
            return self.count(progress._replace(environment=environment, key=key), timestep)

        return jax.lax.while_loop(unfinished, one_step, progress)

    def close(self) -> None:
        self.batch.close()
