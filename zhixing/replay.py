"""Experience replay, shared by every off-policy algorithm.

    storage      what is kept of each transition: all of it, or every image once, see `zhixing.frames`
    priorities   which transitions are drawn: see `zhixing.priorities`
    reading      n steps on from what is drawn, as far as the episode and the ring go

Lin, "Self-improving reactive agents based on reinforcement learning, planning and teaching", 1992.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from zhixing.frames import Frames
from zhixing.hindsight import Hindsight
from zhixing.priorities import Kind, Proportional, Ranked, Uniform, importance_weights, make_priorities
from zhixing.shared import Shared
from zhixing.transition import Experience, Transition


class Cursor(Shared):
    """Where the ring is written next. All seeds write at the same place: see `Shared`."""

    position: jax.Array  # [] int32
    size: jax.Array  # [] int32, transitions stored

    def advance(self, count: int, capacity: int) -> "Cursor":
        return Cursor((self.position + count) % capacity, jnp.minimum(self.size + count, capacity))


class Replay(eqx.Module):
    """A ring of the last `capacity` transitions of N environments, one row of N after the other."""

    data: Transition  # [capacity, ...]; without observations where `frames` keeps them
    priorities: Uniform | Proportional | Ranked
    cursor: Cursor
    frames: Frames | None
    instances: int = eqx.field(static=True)  # N
    hindsight: Hindsight | None = eqx.field(static=True, default=None)  # how goals are replaced, if they are
    agents: bool = eqx.field(static=True, default=False)  # of several agents, whose rewards and ends are [capacity, A]

    @classmethod
    def create(cls, capacity: int, example: Transition, kind: Kind = "uniform", stack: int | None = None) -> "Replay":
        """An empty ring for transitions shaped as `example` [T, N, ...]; `capacity` is rounded down to whole rows.

        With `stack`, each image is kept once: observations are stacks of so many frames, or with 0 single images.
        """
        instances = example.reward.shape[1]
        capacity -= capacity % instances
        frames = None if stack is None else Frames.create(capacity, example.observation, stack)
        if frames is not None:
            example = example._replace(observation=(), next_observation=())
        data = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[2:]), x.dtype), example)
        cursor = Cursor(jnp.int32(0), jnp.int32(0))
        agents = example.reward.ndim == 3
        return cls(data, make_priorities(kind, capacity), cursor, frames, instances, agents=agents)

    @property
    def capacity(self) -> int:
        return len(self.data.reward)

    def add(self, rollout: Transition, exponent: jax.Array | float = 0.0) -> "Replay":
        """Write `rollout` [T, N, ...] over the oldest transitions; `exponent` is prioritised replay's α."""
        length, instances = rollout.reward.shape[:2]
        count = length * instances
        index = (self.cursor.position + jnp.arange(count)) % self.capacity
        cursor = self.cursor.advance(count, self.capacity)

        def write(data: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(count, *data.shape[1:]).astype(data.dtype)
            if length == 1:  # a row never wraps around, and a slice is cheapest
                return jax.lax.dynamic_update_slice_in_dim(data, new, self.cursor.position, 0)
            return data.at[index].set(new)

        frames, priorities = self.frames, self.priorities.insert(index, exponent)
        if frames is not None:
            frames = frames.write(rollout, index)
            rollout = rollout._replace(observation=(), next_observation=())
            # The oldest transitions have lost the frames before them.
            oldest = (cursor.position + jnp.arange(frames.history * instances)) % self.capacity
            priorities = priorities.forget(oldest)
        data = jax.tree.map(write, self.data, rollout)
        return replace(self, data=data, priorities=priorities, cursor=cursor, frames=frames)

    @property
    def readable(self) -> jax.Array:
        """[] transitions that can be drawn: those stored, but for the oldest where these have lost their frames."""
        if self.frames is None:
            return self.cursor.size
        lost = self.frames.history * self.instances
        return jnp.where(self.cursor.size == self.capacity, self.capacity - lost, self.cursor.size)

    def sample(
        self,
        key: jax.Array,
        size: int,
        discount: jax.Array | float,
        n_step: int = 1,
        importance: jax.Array | float = 0.0,
        recent: jax.Array | int | None = None,
    ) -> tuple[Experience, jax.Array]:
        """-> `size` experiences [B, ...] of up to `n_step` steps, and their indices; `importance` is β.

        Without priorities they are drawn from the newest `recent` transitions, or from all.
        """
        if isinstance(self.priorities, Uniform):
            count = self.readable if recent is None else jnp.minimum(self.readable, recent)
            age = jax.random.randint(key, (size,), 0, count)  # 0 is the newest
            index, weight = (self.cursor.position - 1 - age) % self.capacity, jnp.ones(size)
        else:
            index, probability = self.priorities.draw(key, size)
            weight = importance_weights(probability, self.readable, importance)
        return self.read(index, weight, discount, n_step), index

    def read(self, index: jax.Array, weight: jax.Array, discount: jax.Array | float, n_step: int) -> Experience:
        """The experiences that begin at `index` [B]."""
        data, last, power = self.data, index, jnp.full(index.shape, discount)
        reward = data.reward[index]
        goes_on = jnp.full(index.shape, True)
        for _ in range(1, n_step):
            goes_on &= ~data.ended[last] & ~self.newest(last)
            last = jnp.where(goes_on, (last + self.instances) % self.capacity, last)
            reward += jnp.where(goes_on, power * data.reward[last], 0.0)
            power *= jnp.where(goes_on, discount, 1.0)
        first, end = (jax.tree.map(lambda x, i=i: x[i], data) for i in (index, last))
        if self.frames is None:
            observation, next_observation = first.observation, end.next_observation
        else:
            observation = self.frames.observation(index)
            next_observation = self.frames.successor(last, end.ended, self.newest(last))
            weight = jnp.where(end.truncated & ~end.terminated & self.frames.lost(last), 0.0, weight)
        discounts = (power[:, None] if self.agents else power) * end.bootstrap
        return Experience(
            observation, first.action, reward, next_observation, discounts, weight, first.extras, first.active
        )

    def age(self, index: jax.Array) -> jax.Array:
        """How many places of the ring were written after `index`: 0 for the newest transition."""
        return (self.cursor.position - 1 - index) % self.capacity

    def stored(self, index: jax.Array) -> jax.Array:
        """Whether anything has been written at `index` yet."""
        return self.age(index) < self.cursor.size

    def cut(self) -> "Replay":
        """With an end at the newest transitions: what is written next is of other episodes. Any leading axes."""
        places = self.data.truncated.shape[-2 if self.agents else -1]
        newest = (self.cursor.position - 1 - jnp.arange(self.instances)) % places
        where = (..., newest, slice(None)) if self.agents else (..., newest)
        return replace(self, data=self.data._replace(truncated=self.data.truncated.at[where].set(True)))

    def newest(self, index: jax.Array) -> jax.Array:
        """Whether what was written after `index` is not the next step but the oldest one, or nothing."""
        return self.age(index) < self.instances

    def reprioritise(self, index: jax.Array, td_error: jax.Array, exponent: jax.Array | float) -> Any:
        """The priorities after an update with the transitions `index` [B], whose |δ| were `td_error` [B]."""
        priorities: Any = self.priorities
        return priorities.update(index, td_error, self.readable, exponent)


def emphasised(capacity: int, updates: int, emphasis: jax.Array | float, progress: jax.Array) -> jax.Array:
    """c₁, ..., c_K: from how many of the newest transitions each of K `updates` in a row draws, [K].

    Wang & Ross, "Boosting soft actor-critic: emphasizing recent experience without forgetting the past",
    arXiv:1906.04009, section 4: c_k = N ηᵏ¹⁰⁰⁰ᐟᴷ, N the capacity; η rises in a straight line from `emphasis` to 1.
    """
    eta = emphasis + (1.0 - emphasis) * progress
    return capacity * eta ** (jnp.arange(1, updates + 1) * (1000.0 / updates))
