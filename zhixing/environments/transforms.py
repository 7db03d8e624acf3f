"""What is done to observations, rewards and actions on their way between environment and algorithm.

A transform is a few pure functions over its own state, which is part of the run: it is saved, resumed and kept
apart for every seed. The functions see one seed, [N, ...]; with `training` false they change no statistics.
The same transforms serve compiled and host environments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing import collective
from zhixing.environments.base import ACTION_MASK, Timestep


class Spaces(NamedTuple):
    observation: gymnasium.Space
    action: gymnasium.Space


@dataclass(frozen=True)
class Transform:
    """Base: changes nothing."""

    can_wait: ClassVar[bool] = False  # observations can be kept as they come, and changed when they are read

    def spaces(self, inner: Spaces) -> Spaces:
        """The spaces behind the transform, as the algorithm sees them."""
        return inner

    def init(self, inner: Spaces, num_environments: int) -> Any:
        """The state of one seed."""
        return ()

    def action(self, inner: Spaces, action: Any) -> Any:
        """The algorithm's action in the environment's units."""
        return action

    def reset(self, state: Any, observation: Any, training: bool) -> tuple[Any, Any]:
        return state, observation

    def step(self, state: Any, timestep: Timestep, training: bool) -> tuple[Any, Timestep]:
        return state, timestep

    def observe(self, state: Any, observation: Any) -> Any:
        """One observation as the policy sees it, with the statistics as they are."""
        return observation

    def reward(self, state: Any, reward: jax.Array) -> jax.Array:
        """Rewards as training tells them to the algorithm, with the statistics as they are."""
        return reward

    def for_evaluation(self, state: Any, inner: Spaces, num_environments: int) -> Any:
        """The training state's statistics with fresh instances."""
        return state


@dataclass(frozen=True)
class RescaleAction(Transform):
    """Bounded continuous actions become [-1, 1], clipped; discrete ones count from 0."""

    def spaces(self, inner: Spaces) -> Spaces:
        match inner.action:
            case spaces.Box() as box if box.is_bounded():
                return inner._replace(action=spaces.Box(-1.0, 1.0, box.shape, np.float32))
            case spaces.Discrete() as discrete:
                return inner._replace(action=spaces.Discrete(int(discrete.n)))
            case _:
                return inner

    def action(self, inner: Spaces, action: Any) -> Any:
        match inner.action:
            case spaces.Box() as box if box.is_bounded():
                low, high = jnp.asarray(box.low, jnp.float32), jnp.asarray(box.high, jnp.float32)
                return low + 0.5 * (jnp.clip(action, -1.0, 1.0) + 1.0) * (high - low)
            case spaces.Discrete() as discrete if discrete.start != 0:
                return action + int(discrete.start)
            case _:
                return action


class Statistics(NamedTuple):
    """Running mean and variance, merged batch by batch. Chan, Golub & LeVeque 1979."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array  # type: ignore[assignment]  # [] float32; hides the method of tuples

    @classmethod
    def start(cls, shape: tuple[int, ...]) -> "Statistics":
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.float32(1e-4))

    def merge(self, batch: jax.Array) -> "Statistics":
        """Take in `batch` [N, ...], and those of the other shards where there are any."""
        size = batch.shape[0] * collective.size()
        batch_mean = collective.mean(batch.mean(0))
        batch_variance = collective.mean(batch.var(0) + jnp.square(batch.mean(0) - batch_mean))
        count = self.count + size
        delta = batch_mean - self.mean
        mean = self.mean + delta * (size / count)
        weights = self.count / count, size / count
        variance = self.variance * weights[0] + batch_variance * weights[1] + delta**2 * weights[0] * weights[1]
        return Statistics(mean, variance, count)


def union(old: Statistics, parts: Sequence[Statistics]) -> Statistics:
    """The statistics `old` and of all that each of `parts` has taken in besides; any leading axes."""
    if len(parts) == 1:
        return parts[0]

    def wide(count: jax.Array, like: jax.Array) -> jax.Array:
        return count.reshape(count.shape + (1,) * (like.ndim - count.ndim))

    mean, total, count = old.mean, old.variance * wide(old.count, old.mean), old.count  # total: of squared deviations
    for part in parts:
        # What is new in it, by Chan's rule read backwards ...
        new = part.count - old.count
        n_new, n_old, n_part = (wide(n, mean) for n in (new, old.count, part.count))
        safe = jnp.maximum(n_new, 1e-9)
        new_mean = old.mean + (part.mean - old.mean) * n_part / safe
        between = jnp.square(new_mean - old.mean) * n_old * n_new / n_part
        new_total = jnp.maximum(part.variance * n_part - old.variance * n_old - between, 0.0)
        # ... and then forwards.
        n = wide(count, mean)
        delta = jnp.where(n_new > 0, new_mean - mean, 0.0)
        mean = mean + delta * n_new / (n + n_new)
        total = total + jnp.where(n_new > 0, new_total, 0.0) + jnp.square(delta) * n * n_new / (n + n_new)
        count = count + new
    return Statistics(mean, total / wide(count, mean), count)


@dataclass(frozen=True)
class NormalizeObservation(Transform):
    """Observations less their running mean, over their running standard deviation, clipped to [-10, 10].

    Of a dictionary, each part that holds numbers; never the mask of the actions.
    """

    can_wait: ClassVar[bool] = True

    limit: float = 10.0

    def spaces(self, inner: Spaces) -> Spaces:
        return inner._replace(observation=self.normalized(inner.observation))

    def normalized(self, space: gymnasium.Space) -> gymnasium.Space:
        match space:
            case spaces.Box():
                return spaces.Box(-self.limit, self.limit, space.shape, np.float32)
            case spaces.Dict():
                return spaces.Dict({k: s if k == ACTION_MASK else self.normalized(s) for k, s in space.items()})
            case _:
                return space

    def init(self, inner: Spaces, num_environments: int) -> Any:
        def start(space: gymnasium.Space) -> Any:
            if isinstance(space, spaces.Dict):
                return {key: () if key == ACTION_MASK else start(part) for key, part in space.items()}
            return Statistics.start(space.shape) if isinstance(space, spaces.Box) else ()

        return start(inner.observation)

    def merge(self, state: Any, observation: Any) -> Any:
        if isinstance(state, dict):
            return {key: self.merge(part, observation[key]) for key, part in state.items()}
        return state if state == () else state.merge(observation)

    def reset(self, state: Any, observation: Any, training: bool) -> tuple[Any, Any]:
        state = self.merge(state, observation) if training else state
        return state, self.observe(state, observation)

    def step(self, state: Any, timestep: Timestep, training: bool) -> tuple[Any, Timestep]:
        state = self.merge(state, timestep.observation) if training else state
        return state, timestep._replace(
            observation=self.observe(state, timestep.observation),
            next_observation=self.observe(state, timestep.next_observation),
        )

    def observe(self, state: Any, observation: Any) -> Any:
        if isinstance(state, dict):
            return {key: self.observe(part, observation[key]) for key, part in state.items()}
        if state == ():
            return observation
        normalized = (observation - state.mean) * jax.lax.rsqrt(state.variance + 1e-8)
        return jnp.clip(normalized, -self.limit, self.limit)


class RewardState(NamedTuple):
    statistics: Statistics  # of the discounted return so far, []
    discounted_return: jax.Array  # [N]


@dataclass(frozen=True)
class ScaleReward(Transform):
    """Rewards over the running standard deviation of the discounted return, clipped to [-10, 10]; in training only.

    Engstrom et al., "Implementation matters in deep RL", 2020, section 2.
    """

    discount: float
    limit: float = 10.0

    def init(self, inner: Spaces, num_environments: int) -> RewardState:
        return RewardState(Statistics.start(()), jnp.zeros(num_environments))

    def reset(self, state: RewardState, observation: Any, training: bool) -> tuple[RewardState, Any]:
        return state._replace(discounted_return=jnp.zeros_like(state.discounted_return)), observation

    def step(self, state: RewardState, timestep: Timestep, training: bool) -> tuple[RewardState, Timestep]:
        if not training:
            return state, timestep
        discounted_return = self.discount * state.discounted_return + timestep.reward
        ended = timestep.terminated | timestep.truncated
        state = RewardState(state.statistics.merge(discounted_return), jnp.where(ended, 0.0, discounted_return))
        timestep = timestep._replace(reward=self.reward(state, timestep.reward))
        if timestep.agents:
            agents = timestep.agents._replace(reward=self.reward(state, timestep.agents.reward))
            timestep = timestep._replace(agents=agents)
        return state, timestep

    def reward(self, state: RewardState, reward: jax.Array) -> jax.Array:
        return jnp.clip(reward * jax.lax.rsqrt(state.statistics.variance + 1e-8), -self.limit, self.limit)


@dataclass(frozen=True)
class FrameStack(Transform):
    """The last `frames` observations along a new first axis; an episode starts with its first one repeated."""

    frames: int

    def spaces(self, inner: Spaces) -> Spaces:
        box: Any = inner.observation
        low, high = (np.repeat(bound[None], self.frames, 0) for bound in (box.low, box.high))
        return inner._replace(observation=spaces.Box(low, high, dtype=box.dtype))

    def init(self, inner: Spaces, num_environments: int) -> jax.Array:
        box: Any = inner.observation
        return jnp.zeros((num_environments, self.frames, *box.shape), box.dtype)

    def reset(self, state: jax.Array, observation: Any, training: bool) -> tuple[Any, Any]:
        state = jnp.repeat(observation[:, None], self.frames, 1).astype(state.dtype)
        return state, state

    def step(self, state: jax.Array, timestep: Timestep, training: bool) -> tuple[Any, Timestep]:
        following = jnp.concatenate([state[:, 1:], timestep.next_observation[:, None].astype(state.dtype)], 1)
        fresh, _ = self.reset(state, timestep.observation, training)
        ended = (timestep.terminated | timestep.truncated).reshape(-1, *[1] * (state.ndim - 1))
        state = jnp.where(ended, fresh, following)
        return state, timestep._replace(observation=state, next_observation=following)

    def for_evaluation(self, state: Any, inner: Spaces, num_environments: int) -> Any:
        return self.init(inner, num_environments)


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other, the environment's side first.

    With `wait`, what can wait is left for `see`: a replay keeps observations as they come, and they are read with the
    statistics of the moment.
    """

    transforms: tuple[Transform, ...]
    environment_spaces: Spaces
    wait: bool = False

    def _inner(self) -> list[Spaces]:
        """What each transform finds on its environment's side, and last what the algorithm sees."""
        seen = [self.environment_spaces]
        for transform in self.transforms:
            seen.append(transform.spaces(seen[-1]))
        return seen

    @property
    def spaces(self) -> Spaces:
        return self._inner()[-1]

    def init(self, num_environments: int) -> tuple:
        return tuple(t.init(inner, num_environments) for t, inner in zip(self.transforms, self._inner(), strict=False))

    def for_evaluation(self, states: tuple, num_environments: int) -> tuple:
        parts = zip(self.transforms, states, self._inner(), strict=False)
        return tuple(t.for_evaluation(state, inner, num_environments) for t, state, inner in parts)

    def action(self, action: Any) -> Any:
        for transform, inner in reversed(list(zip(self.transforms, self._inner(), strict=False))):
            action = transform.action(inner, action)
        return action

    def reset(self, states: tuple, observation: Any, training: bool) -> tuple[tuple, Any]:
        new = []
        for transform, state in zip(self.transforms, states, strict=True):
            state, seen = transform.reset(state, observation, training)
            observation = observation if self.wait and transform.can_wait else seen
            new.append(state)
        return tuple(new), observation

    def step(self, states: tuple, timestep: Timestep, training: bool) -> tuple[tuple, Timestep]:
        new = []
        for transform, state in zip(self.transforms, states, strict=True):
            state, seen = transform.step(state, timestep, training)
            timestep = timestep if self.wait and transform.can_wait else seen
            new.append(state)
        return tuple(new), timestep

    def see(self, states: tuple, observation: Any) -> Any:
        """An observation [..., *] for which transforms have waited, as the algorithm reads it."""
        for transform, state in zip(self.transforms, states, strict=True):
            if self.wait and transform.can_wait:
                observation = transform.observe(state, observation)
        return observation

    def observe(self, states: tuple, observation: Any) -> Any:
        for transform, state in zip(self.transforms, states, strict=True):
            observation = transform.observe(state, observation)
        return observation

    def reward(self, states: tuple, reward: jax.Array) -> jax.Array:
        for transform, state in zip(self.transforms, states, strict=True):
            reward = transform.reward(state, reward)
        return reward
