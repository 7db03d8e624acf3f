"""Evaluation, apart from training: the greedy policy in environments and episodes of its own.

Besides the returns it holds against each other what the algorithm predicts and what then comes:

    (E.1)  V(s₀) at the first observation of each episode; for value learners maxₐ Q(s₀, a)
    (E.2)  G(s₀) = Σₜ γᵗ rₜ over the same episode, the rewards as training tells them to the algorithm

Their means differ by the overestimation. van Hasselt, Guez & Silver, "Deep reinforcement learning with double
Q-learning", 2016, figure 3. Start states only: what a time limit of T steps cuts off weighs about γᵀ there, and more
and more for the states that come later.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zhixing import statistics
from zhixing.core import Algorithm
from zhixing.drivers.loop import Loop, where_ended
from zhixing.environments.base import Batch, Environment
from zhixing.shared import over_seeds

EVALUATION_STREAM = 0x5EED  # sets evaluation's random numbers apart from training's with the same seed


class Played(NamedTuple):
    """Episodes that are over; each [S, episodes]."""

    returns: np.ndarray  # undiscounted, the environment's own rewards; of several agents the mean of theirs
    lengths: np.ndarray
    values: np.ndarray  # V(s₀) (E.1); NaN where the algorithm has no discount or no value
    discounted_returns: np.ndarray  # G(s₀) (E.2); NaN there too
    of_agents: np.ndarray  # [S, episodes, A], each agent's return; A is 0 where there is a single one


class Progress(NamedTuple):
    """How far each instance has come; its k episodes are its first k, so that short ones are not preferred."""

    environment: Any
    transforms: Any
    observation: Any  # [S, E, ...]
    carry: Any  # [S, E, ...] of a policy with a memory
    returns: jax.Array  # [S, E, k]
    lengths: jax.Array  # [S, E, k] int32
    values: jax.Array  # [S, E, k]
    discounted_returns: jax.Array  # [S, E, k]
    of_agents: jax.Array  # [S, E, k, A]
    finished: jax.Array  # [S, E] int32, episodes over
    key: jax.Array  # [S, 2]


def predicts(algorithm: Algorithm) -> bool:
    """Whether it says what it expects: a user's own algorithm may have no discount, or no value."""
    return hasattr(algorithm, "discount") and type(algorithm).value is not Algorithm.value


def score(environment: Environment, played: Played) -> dict[str, Any]:
    """The returns of every seed in numbers; of several agents their mean's, and under `agents` each one's own."""
    summary = statistics.summary(played.returns)
    if environment.agents:
        returns = (played.of_agents[..., i] for i in range(len(environment.agents)))
        summary["agents"] = dict(zip(environment.agents, map(statistics.summary, returns), strict=True))
    return summary


class Evaluator:
    """Plays `episodes` greedy episodes with each seed's policy.

    Each of the instances of one seed plays the same number of episodes.
    """

    def __init__(self, environment: Environment, loop: Loop, episodes: int, max_instances: int):
        self.seeds, self.chain, self.episodes = loop.seeds, loop.chain, episodes
        seeds = loop.seeds
        self.instances = max(n for n in range(1, min(episodes, max_instances) + 1) if episodes % n == 0)
        self.each = episodes // self.instances
        apart = [int(np.random.SeedSequence((seed, EVALUATION_STREAM)).generate_state(1)[0] >> 1) for seed in seeds]
        self.batch: Batch = environment.batch(apart, self.instances)
        self.spec = replace(loop.spec, num_environments=self.instances)
        self._reset = jax.jit(self.batch.reset) if environment.saves_state else self.batch.reset
        self._begin = jax.jit(self.begin)
        self._act = jax.jit(self.act)
        self._count = jax.jit(self.count)
        self._play = jax.jit(self.play)
        self.compiled = environment.compiled

    def __call__(self, algorithm: Algorithm, learner: Any, transforms: Any, step: int) -> Played:
        """Episodes that depend on the seeds and `step` alone."""
        keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(seed), EVALUATION_STREAM) for seed in self.seeds])
        keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, step)))(keys)
        environment, observation = self._reset(keys[:, 0])
        progress = self._begin(algorithm, environment, transforms, observation, keys[:, 1])
        if self.compiled:
            progress = self._play(algorithm, learner, progress)
        else:
            while np.asarray(progress.finished).min() < self.each:
                progress, action = self._act(algorithm, learner, progress)
                environment, timestep = self.batch.step(progress.environment, jax.tree.map(np.asarray, action), None)
                progress = progress._replace(environment=environment)
                progress = self._count(algorithm, progress, timestep)
        played = progress.returns, progress.lengths, progress.values, progress.discounted_returns, progress.of_agents
        return Played(*(np.asarray(x).reshape(len(self.seeds), self.episodes, *x.shape[3:]) for x in played))

    def begin(
        self, algorithm: Algorithm, environment: Any, transforms: Any, observation: Any, key: jax.Array
    ) -> Progress:
        count = len(self.seeds)
        transforms = over_seeds(lambda state: self.chain.for_evaluation(state, self.instances), count, transforms)
        transforms, observation = over_seeds(
            lambda state, x: self.chain.reset(state, x, training=False), count, transforms, observation
        )
        zeros = jnp.zeros((count, self.instances, self.each))
        lengths, unknown = zeros.astype(jnp.int32), jnp.full_like(zeros, jnp.nan)
        finished = jnp.zeros((count, self.instances), jnp.int32)
        of_agents = jnp.zeros((*zeros.shape, 0 if self.spec.agents is None else self.spec.agents.count))
        carry = self.fresh_carry(algorithm, key)
        return Progress(
            environment, transforms, observation, carry, zeros, lengths, unknown, zeros, of_agents, finished, key
        )

    def fresh_carry(self, algorithm: Algorithm, key: jax.Array) -> Any:
        """As at the start of an episode [S, E, ...]; () but for a policy with a memory: noise is for training only."""
        if type(algorithm).play is Algorithm.play:
            return ()
        return over_seeds(lambda k: algorithm.carry(self.spec, k), len(self.seeds), key)

    def act(self, algorithm: Algorithm, learner: Any, progress: Progress) -> tuple[Progress, Any]:
        """-> with the values of episodes that begin, the next carry and key; the greedy action [S, E, ...]."""
        values = self.predict(algorithm, learner, progress) if predicts(algorithm) else progress.values
        action, carry = over_seeds(algorithm.play, len(self.seeds), learner, progress.carry, progress.observation)
        key = jax.vmap(lambda key: jax.random.split(key)[0])(progress.key)
        # The action is in the environment's units.
        return progress._replace(values=values, carry=carry, key=key), self.chain.action(action)

    def predict(self, algorithm: Algorithm, learner: Any, progress: Progress) -> jax.Array:
        """Book V(s₀) of the episodes that begin (E.1); at other steps nothing is computed."""
        begins = self.slot(progress) & (progress.lengths == 0)

        def at_start(values: jax.Array) -> jax.Array:
            value = over_seeds(algorithm.value, len(self.seeds), learner, progress.observation)
            value = value if self.spec.agents is None else value.mean(-1)
            return jnp.where(begins, value[..., None], values)

        return jax.lax.cond(begins.any(), at_start, lambda values: values, progress.values)

    def slot(self, progress: Progress) -> jax.Array:
        """[S, E, k], true at the place of the episode under way; nowhere once the last one is over."""
        return jnp.arange(self.each) == progress.finished[..., None]

    def count(self, algorithm: Algorithm, progress: Progress, timestep: Any) -> Progress:
        """Book one step into the slot of the episode under way; beyond the last slot it is dropped."""
        slot = self.slot(progress)
        returns = progress.returns + jnp.where(slot, timestep.reward[..., None], 0.0)
        told = over_seeds(self.chain.reward, len(self.seeds), progress.transforms, timestep.reward)
        of_agents = progress.of_agents
        if timestep.agents:
            of_agents += jnp.where(slot[..., None], timestep.agents.reward[..., None, :], 0.0)
        discount: Any = getattr(algorithm, "discount", None)
        discounted = discount**progress.lengths * told[..., None] if predicts(algorithm) else jnp.nan  # (E.2)
        discounted_returns = progress.discounted_returns + jnp.where(slot, discounted, 0.0)
        lengths = progress.lengths + slot
        ended = timestep.terminated | timestep.truncated
        carry = where_ended(ended, self.fresh_carry(algorithm, progress.key), progress.carry)
        transforms, timestep = over_seeds(
            lambda state, t: self.chain.step(state, t, training=False), len(self.seeds), progress.transforms, timestep
        )
        return progress._replace(
            transforms=transforms,
            observation=timestep.observation,
            returns=returns,
            lengths=lengths,
            carry=carry,
            discounted_returns=discounted_returns,
            of_agents=of_agents,
            finished=progress.finished + ended,
        )

    def play(self, algorithm: Algorithm, learner: Any, progress: Progress) -> Progress:
        """The whole evaluation as one program."""

        def unfinished(progress: Progress) -> jax.Array:
            return jnp.any(progress.finished < self.each)

        def one_step(progress: Progress) -> Progress:
            environment_key = jax.vmap(lambda key: jax.random.split(key)[1])(progress.key)
            progress, action = self.act(algorithm, learner, progress)
            environment, timestep = self.batch.step(progress.environment, action, environment_key)
            progress = progress._replace(environment=environment)
            return self.count(algorithm, progress, timestep)

        return jax.lax.while_loop(unfinished, one_step, progress)

    def close(self) -> None:
        self.batch.close()
