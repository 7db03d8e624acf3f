"""The parts of the one loop, collect → learn, that the drivers put together.

Everything that a run is lies in one pytree, `Run`: learner, replay, environments, transforms, random keys and
counters. The functions are pure; every array has the leading axis S of the seeds, but for `Shared` parts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
from gymnasium import spaces

from zhixing.core import Algorithm, Clock, OnPolicy, Spec, Transition
from zhixing.environments.base import Timestep
from zhixing.environments.transforms import Chain
from zhixing.off_policy import OffPolicy
from zhixing.shared import Shared, over_seeds, seed_axes


class Episodes(NamedTuple):
    """The episodes under way."""

    returns: jax.Array  # [S, N] reward so far, undiscounted, as the environment gave it
    lengths: jax.Array  # [S, N] int32


class Tally(Shared):
    iterations: jax.Array  # [] int32, iterations that made at least one update


class Window(NamedTuple):
    """Sums since the last row of the records."""

    episodes: jax.Array  # [S] float32, ended
    returns: jax.Array  # [S] of ended episodes
    lengths: jax.Array  # [S] of ended episodes
    metrics: jax.Array  # [S, M] sums over the iterations that learned
    first_bad: jax.Array  # [S, M] int32, the environment step of the first value that is not finite; -1 if none
    learned: Tally


class Run(NamedTuple):
    """The whole state of a run of S seeds with N environments each."""

    learner: Any  # the algorithm's state
    memory: Any  # its replay
    environment: Any  # the batch's state, () where the environment keeps its own
    transforms: Any
    observation: Any  # [S, N, ...] to act on next
    carry: Any  # [S, N, ...]
    key: jax.Array  # [S, 2]
    episodes: Episodes
    window: Window


class Driver(ABC):
    """Who puts the parts together: in one program, around Python's environments, with many workers, ..."""

    saves_state: bool  # all that the environments are lies in the run, so that a resumed one is exact

    def report(self) -> dict[str, Any]:
        """What the summary says of the workers."""
        return {}

    def recall(self, report: dict[str, Any]) -> None:  # noqa: B027 - most have nothing to report
        """What was reported before the run was stopped."""

    def agreed(self, iterations: int, stop: bool) -> tuple[int, bool]:
        """How many iterations come next and whether to stop, where several processes have to do the same."""
        return iterations, stop

    @abstractmethod
    def start(self, algorithm: Any) -> Run:
        """A run that has not made a step."""

    @abstractmethod
    def restart(self, algorithm: Any, run: Run) -> Run:
        """`run` with new episodes in every environment."""

    @abstractmethod
    def advance(self, algorithm: Any, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` times collect `rollout_length` steps and learn from them; `run` is consumed."""

    @abstractmethod
    def close(self) -> None:
        """Release the environments."""


@dataclass(frozen=True, eq=False)
class Loop:
    """What stays the same through a run: the seeds, the transforms, the task's description."""

    seeds: tuple[int, ...]
    chain: Chain  # as evaluation applies it
    spec: Spec
    keeps_observations: bool = False  # as they come from the environment: those that a replay holds
    driver_metrics: tuple[str, ...] = ()  # what the driver measures besides the algorithm's metrics

    @property
    def collecting(self) -> Chain:
        """The chain, as the loop applies it."""
        return replace(self.chain, wait=self.keeps_observations)

    def keys(self) -> tuple[jax.Array, ...]:
        """Keys [S, 2] for the networks, the carry, the environments and the run, each of its seed alone."""
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.PRNGKey(seed), 4))(jnp.asarray(self.seeds))
        return tuple(keys[:, i] for i in range(4))

    def start(self, algorithm: Algorithm, environment: Any, observation: Any) -> Run:
        """A run that has not made a step, from the environments' state and first observation [S, N, ...]."""
        count, n = len(self.seeds), self.spec.num_environments
        init_key, carry_key, _, key = self.keys()
        transforms = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), self.chain.init(n))
        transforms, observation = over_seeds(
            lambda state, x: self.collecting.reset(state, x, training=True), count, transforms, observation
        )

        # Shapes first: what a vmap gives back needs its axes said beforehand.
        learner_shape, memory_shape, _ = self.shapes(algorithm)
        learner = over_seeds(lambda k: algorithm.init(k, self.spec), count, init_key, out_axes=seed_axes(learner_shape))
        carry = over_seeds(lambda k: algorithm.carry(self.spec, k), count, carry_key)
        memory = over_seeds(
            lambda _: algorithm.memory(self.spec, self.example(algorithm)),
            count,
            key,
            out_axes=seed_axes(memory_shape),
        )
        episodes = Episodes(jnp.zeros((count, n)), jnp.zeros((count, n), jnp.int32))
        window = empty_window(count, len(self.metric_names(algorithm)))
        return Run(learner, memory, environment, transforms, observation, carry, key, episodes, window)

    def restart_episodes(self, algorithm: Algorithm, run: Run, environment: Any, observation: Any) -> Run:
        """`run` with new episodes everywhere, for environments whose state was not saved."""
        count, n = len(self.seeds), self.spec.num_environments
        transforms, observation = over_seeds(
            lambda state, x: self.collecting.reset(state, x, training=False), count, run.transforms, observation
        )
        carry = over_seeds(lambda k: algorithm.carry(self.spec, k), count, self.keys()[1])
        episodes = Episodes(jnp.zeros((count, n)), jnp.zeros((count, n), jnp.int32))
        return run._replace(
            memory=algorithm.forget_episodes(run.memory),
            environment=environment,
            transforms=transforms,
            observation=observation,
            carry=carry,
            episodes=episodes,
        )

    def example(self, algorithm: Algorithm) -> Transition:
        """The shapes of one seed's rollout [T, N]."""
        n, length = self.spec.num_environments, algorithm.steps_per_iteration
        observation = shapes_in(self.chain.spaces.observation, n)

        def one_step(key: jax.Array, observation: Any) -> Transition:
            state, carry = algorithm.init(key, self.spec), algorithm.carry(self.spec, key)
            action, _, extras = algorithm.act(state, carry, observation, key)
            each = (n,) if self.spec.agents is None else (n, self.spec.agents.count)
            flags = jnp.zeros(each, bool)
            active = () if self.spec.agents is None else flags
            return Transition(observation, action, jnp.zeros(each), observation, flags, flags, extras, active)

        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        shapes = jax.eval_shape(one_step, key, observation)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((length, *x.shape), x.dtype), shapes)

    def shapes(self, algorithm: Algorithm) -> tuple[Any, Any, dict]:
        """The shapes of one seed's learner, of its memory and of the metrics of `learn`."""
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        example = self.example(algorithm)
        learner = jax.eval_shape(lambda k: algorithm.init(k, self.spec), key)
        memory = jax.eval_shape(lambda: algorithm.memory(self.spec, example))
        _, _, metrics = jax.eval_shape(algorithm.learn, learner, memory, example, key)
        return learner, memory, metrics

    def metric_names(self, algorithm: Algorithm) -> list[str]:
        """Of the columns of a window's metrics."""
        return sorted([*self.shapes(algorithm)[2], *self.driver_metrics])

    def act(self, algorithm: Algorithm, learner: Any, run: Run, key: jax.Array) -> Any:
        """-> (action, carry, extras) [S, N, ...] of the behaviour policy; `key` [S, 2]."""

        def one(learner: Any, transforms: Any, carry: Any, observation: Any, key: jax.Array) -> Any:
            return algorithm.act(learner, carry, self.collecting.see(transforms, observation), key)

        arguments = learner, run.transforms, run.carry, run.observation, key
        return over_seeds(one, len(self.seeds), *arguments, in_place=not isinstance(algorithm, OnPolicy))

    def absorb(
        self, algorithm: Algorithm, run: Run, decision: tuple[Any, Any, Any], timestep: Timestep, key: jax.Array
    ) -> tuple[Run, Transition]:
        """Take in what the environments answered to `decision`: transforms, episodes, the transition to learn from."""
        action, carry, extras = decision
        ended = timestep.terminated | timestep.truncated
        episodes, window = count_episodes(run.episodes, run.window, timestep.reward, ended)
        transforms, timestep = over_seeds(
            lambda state, t: self.collecting.step(state, t, training=True), len(self.seeds), run.transforms, timestep
        )
        transition = Transition(
            run.observation,
            action,
            timestep.reward,
            timestep.next_observation,
            timestep.terminated,
            timestep.truncated,
            extras,
        )
        if timestep.agents:
            reward, terminated, active = timestep.agents
            truncated = jnp.broadcast_to(timestep.truncated[..., None], terminated.shape)
            transition = transition._replace(reward=reward, terminated=terminated, truncated=truncated, active=active)
        if jax.tree.leaves(carry):
            fresh = over_seeds(lambda k: algorithm.carry(self.spec, k), len(self.seeds), key)
            carry = where_ended(ended, fresh, carry)
        run = run._replace(
            transforms=transforms, observation=timestep.observation, carry=carry, episodes=episodes, window=window
        )
        return run, transition

    def learn(self, algorithm: Algorithm, run: Run, rollout: Transition, key: jax.Array) -> Run:
        """Learn from `rollout` [T, S, N, ...]; `key` [S, 2]."""

        def one(learner: Any, memory: Any, transforms: Any, rollout: Transition, key: jax.Array) -> Any:
            if isinstance(algorithm, OffPolicy):
                return algorithm.learn(learner, memory, rollout, key, partial(self.collecting.see, transforms))
            return algorithm.learn(learner, memory, rollout, key)

        learner, memory, window = run.learner, run.memory, run.window
        new, memory, metrics = over_seeds(
            one,
            len(self.seeds),
            learner,
            memory,
            run.transforms,
            jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rollout),
            key,
            out_axes=(seed_axes(learner), seed_axes(memory), 0),
            in_place=not isinstance(algorithm, OnPolicy) or bool(jax.tree.leaves(memory)),
        )
        window = tally(window, metrics, new.clock, new.clock.updates > learner.clock.updates)
        return run._replace(learner=new, memory=memory, window=window)


class StepKeys(NamedTuple):
    """Random keys of one step of every seed; each is made by itself, so that what nobody uses is not computed."""

    act: jax.Array  # [S, 2]
    environment: jax.Array  # [S, 2]
    carry: jax.Array  # [S, 2]


def iteration_keys(key: jax.Array, step: jax.Array, rollout_length: int, instances: int) -> tuple[StepKeys, jax.Array]:
    """Keys of the iteration that begins at environment step `step`: [T, S, 2] of its steps, [S, 2] to learn with.

    They depend on the run's keys [S, 2] and on the step alone, so that those of many iterations are made at once.
    """
    act, environment, carry, learn = jnp.swapaxes(jax.vmap(lambda k: jax.random.split(k, 4))(key), 0, 1)

    def at(keys: jax.Array, step: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)

    steps = step + instances * jnp.arange(rollout_length)
    of_steps = (jax.vmap(lambda step, k=k: at(k, step))(steps) for k in (act, environment, carry))
    return StepKeys(*of_steps), at(learn, step)


def where_ended(ended: jax.Array, fresh: Any, carry: Any) -> Any:
    """`fresh` where an episode `ended` [S, N], else `carry`; both [S, N, ...]."""
    return jax.tree.map(
        lambda new, old: jnp.where(ended.reshape(ended.shape + (1,) * (old.ndim - 2)), new, old), fresh, carry
    )


def shapes_in(space: gymnasium.Space, count: int) -> Any:
    """The shapes of `count` elements of a space: of each part, if it is made of several."""
    match space:
        case spaces.Dict():
            return {key: shapes_in(part, count) for key, part in space.items()}
        case spaces.Tuple():
            return tuple(shapes_in(part, count) for part in space.spaces)
        case _:
            shape = (count, *(space.shape or ()))
            return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(space.dtype))


def empty_window(seeds: int, metrics: int) -> Window:
    """Each array is one of its own: a run is donated to the program, and no buffer can be donated twice."""
    first_bad = jnp.full((seeds, metrics), -1, jnp.int32)
    sums = jnp.zeros((seeds, metrics))
    return Window(jnp.zeros(seeds), jnp.zeros(seeds), jnp.zeros(seeds), sums, first_bad, Tally(jnp.int32(0)))


def tally(window: Window, metrics: dict, clock: Clock, learned: jax.Array | bool = True) -> Window:
    """Add the metrics [S] of an iteration; `learned`: whether it made an update."""
    values = jnp.stack([metrics[name] for name in sorted(metrics)], axis=-1)  # [S, M]
    new_bad = (window.first_bad < 0) & ~jnp.isfinite(values)
    return window._replace(
        metrics=window.metrics + values,
        first_bad=jnp.where(new_bad, clock.steps, window.first_bad),
        learned=Tally(window.learned.iterations + learned),
    )


def count_episodes(episodes: Episodes, window: Window, reward: jax.Array, ended: jax.Array) -> tuple[Episodes, Window]:
    """Add a step's rewards [S, N]; episodes that ended move into the window."""
    returns, lengths = episodes.returns + reward, episodes.lengths + 1
    window = window._replace(
        episodes=window.episodes + ended.sum(-1),
        returns=window.returns + jnp.where(ended, returns, 0.0).sum(-1),
        lengths=window.lengths + jnp.where(ended, lengths, 0).sum(-1),
    )
    return Episodes(jnp.where(ended, 0.0, returns), jnp.where(ended, 0, lengths)), window
