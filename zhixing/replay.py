"""Experience replay, shared by every off-policy algorithm."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from zhixing.shared import Shared


class Cursor(Shared):
    """Where the ring is written next. All seeds write at the same place: see `Shared`."""

    position: jax.Array  # [] int32
    size: jax.Array  # [] int32, transitions stored

    def advance(self, count: int, capacity: int) -> "Cursor":
        end = self.position + count
        return Cursor(end % capacity, jnp.maximum(self.size, jnp.minimum(end, capacity)))

    def start_over(self, count: int, capacity: int) -> "Cursor":
        """Back to the beginning where `count` transitions do not fit before the end."""
        return Cursor(jnp.where(self.position + count > capacity, 0, self.position), self.size)


class Replay(eqx.Module):
    """A ring of the last `capacity` transitions, sampled uniformly with replacement.

    Lin, "Self-improving reactive agents based on reinforcement learning, planning and teaching", 1992.
    """

    data: Any  # [capacity, ...]
    cursor: Cursor

    @classmethod
    def create(cls, capacity: int, example: Any) -> "Replay":
        """An empty ring for transitions shaped as `example` [T, N, ...] (arrays or shapes)."""
        data = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[2:]), x.dtype), example)
        return cls(data, Cursor(jnp.int32(0), jnp.int32(0)))

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.data)[0].shape[0]

    def add(self, rollout: Any) -> "Replay":
        """Write `rollout` [T, N, ...] over the oldest transitions."""
        length, instances = jax.tree.leaves(rollout)[0].shape[:2]
        count = length * instances
        # Where rollouts fill the ring exactly, each is one slice, which is in place and cheapest. One of another
        # length (the last of a run) can bring them out of step: then a slice starts over, and never wraps.
        slices = self.capacity % count == 0
        cursor = self.cursor.start_over(count, self.capacity) if slices else self.cursor

        def write(data: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(count, *data.shape[1:]).astype(data.dtype)
            if slices:
                return jax.lax.dynamic_update_slice_in_dim(data, new, cursor.position, 0)
            return data.at[(cursor.position + jnp.arange(count)) % self.capacity].set(new)

        return Replay(jax.tree.map(write, self.data, rollout), cursor.advance(count, self.capacity))

    def sample(self, key: jax.Array, size: int) -> Any:
        """-> `size` transitions [B, ...], each of those stored equally likely."""
        index = jax.random.randint(key, (size,), 0, self.cursor.size)
        return jax.tree.map(lambda data: data[index], self.data)
