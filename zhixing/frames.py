"""The observations of a replay with each image kept once.

Consecutive transitions share almost everything: s' is the next transition's s, and a stack of k frames shares k - 1
with the next. Kept as they come, each image is stored 2k times. Mnih et al. 2015 keep it once for the same reason.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from zhixing.transition import Transition


class Frames(eqx.Module):
    """The newest frame of each observation in a ring of `capacity` transitions, a row of N environments at a time.

    Stacks and successors are put together again when they are read. Only where an episode was truncated is the last
    frame no other transition's: these lie in a ring of their own, which has a place for every sixteenth transition.
    """

    frame: jax.Array  # [capacity, ...], the newest frame of sₜ
    step: jax.Array  # [capacity] int32, steps since the episode began
    head: jax.Array  # [N, ...], the newest frame of what followed the newest row
    next_step: jax.Array  # [N] int32, `step` of the next row
    last: jax.Array  # [E, ...], frames that followed truncated transitions
    owner: jax.Array  # [E] int32, whose they are; -1 for nobody's
    slot: jax.Array  # [capacity] int32, where a truncated transition has its last frame
    next_slot: jax.Array  # [] int32
    stack: int = eqx.field(static=True)  # k frames make an observation, along its first axis; 0: it is one by itself

    @classmethod
    def create(cls, capacity: int, example: Any, stack: int) -> "Frames":
        """Empty; `example` [T, N, ...] is an array of observations, or its shape."""
        instances, shape = example.shape[1], example.shape[3 if stack else 2 :]
        extra = max(instances, capacity // 16)

        def images(count: int) -> jax.Array:
            return jnp.zeros((count, *shape), example.dtype)

        def integers(*size: int) -> jax.Array:
            return jnp.zeros(size, jnp.int32)

        return cls(
            images(capacity), integers(capacity), images(instances), integers(instances),
            images(extra), integers(extra) - 1, integers(capacity), jnp.int32(0), stack,
        )  # fmt: skip

    @property
    def history(self) -> int:
        """Rows before a transition's own that its observation is made of."""
        return max(self.stack - 1, 0)

    def newest_frame(self, observation: jax.Array) -> jax.Array:
        """Of observations [T, N, ...]."""
        return observation[:, :, -1] if self.stack else observation

    def write(self, rollout: Transition, index: jax.Array) -> "Frames":
        """Take in `rollout` [T, N, ...], whose places in the ring are `index` [T·N]."""

        def count(step: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.where(ended, 0, step + 1), step

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(-1, *x.shape[2:])

        next_step, steps = jax.lax.scan(count, self.next_step, rollout.ended)
        successor = self.newest_frame(rollout.next_observation)
        truncated = flat(rollout.truncated & ~rollout.terminated)
        slot = (self.next_slot + jnp.cumsum(truncated) - 1) % len(self.last)
        kept = jnp.where(truncated, slot, len(self.last))  # out of bounds, and dropped, for the others
        return Frames(
            self.frame.at[index].set(flat(self.newest_frame(rollout.observation))),
            self.step.at[index].set(flat(steps)),
            successor[-1],
            next_step,
            self.last.at[kept].set(flat(successor), mode="drop"),
            self.owner.at[kept].set(index, mode="drop"),
            self.slot.at[index].set(slot),
            (self.next_slot + truncated.sum()) % len(self.last),
            self.stack,
        )

    def observation(self, index: jax.Array) -> jax.Array:
        """s of the transitions `index` [B]; an episode's first frame stands for those before it."""
        if not self.stack:
            return self.frame[index]
        return self.frame[self.backwards(index, self.step[index], self.stack)]

    def successor(self, index: jax.Array, ended: jax.Array, newest: jax.Array) -> jax.Array:
        """s' of the transitions `index` [B], whatever where they terminated."""
        instances, capacity = len(self.head), len(self.frame)

        def where(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

        following = where(newest, self.head[index % instances], self.frame[(index + instances) % capacity])
        following = where(ended, self.last[self.slot[index]], following)
        if not self.stack:
            return following
        before = self.frame[self.backwards(index, self.step[index], self.stack - 1)]
        return jnp.concatenate([before, following[:, None]], 1)

    def lost(self, index: jax.Array) -> jax.Array:
        """Where a truncated transition's last frame was written over: no target can be made of these."""
        return self.owner[self.slot[index]] != index

    def backwards(self, index: jax.Array, step: jax.Array, count: int) -> jax.Array:
        """The places of the `count` frames up to `index` [B] in its episode, oldest first: [B, count]."""
        back = jnp.minimum(jnp.arange(count - 1, -1, -1), step[:, None])
        return (index[:, None] - back * len(self.head)) % len(self.frame)
