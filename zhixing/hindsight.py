"""Hindsight experience replay (HER): what was reached, taken for what had been wanted.

Andrychowicz et al., "Hindsight experience replay", arXiv:1707.01495, Algorithm 1 and section 4.5.

    (HER.1)  π(a|s, g), Q(s, a, g): policy and values read the desired goal g beside the state
    (HER.2)  r(s, a, g) = R(φ(s'), g): the environment says what reaching φ(s'), the achieved goal, is worth for any g
    (HER.3)  g' = φ(sⱼ₊₁): the goal achieved by step j, where for a transition of step t of an episode that ends at T
             future: j ~ U{t, ..., T}    final: j = T    episode: j ~ U{0, ..., T}    random: j any step of the replay
    (HER.4)  with probability `hindsight_ratio` replace (s, g), a, r, (s', g) by (s, g'), a, R(φ(s'), g'), (s', g')

Departure: goals are replaced when a transition is sampled, and not in k copies that are stored beside it. With a ratio
of k / (k + 1) the minibatch is made of the same mixture, the replay is k + 1 times smaller, and a transition is given
another goal each time. The official code does the same.

Only what is relabelled is judged again: what the environment said of the goal that it had itself set is already right.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from zhixing.environments.goals import ACHIEVED, DESIRED, Goals
from zhixing.transition import Experience

if TYPE_CHECKING:
    from zhixing.replay import Replay

Strategy = Literal["none", "future", "final", "episode", "random"]


@dataclass(frozen=True)
class Hindsight:
    """How a replay's goals are replaced; it holds no arrays. The replay's steps are those of N environments in turn."""

    goals: Goals
    strategy: Strategy
    horizon: int  # steps; no episode is longer

    def relabel(
        self,
        key: jax.Array,
        replay: "Replay",
        index: jax.Array,
        batch: Experience,
        ratio: jax.Array | float,
        discount: jax.Array | float,
    ) -> Experience:
        """`batch` [B], the one-step experiences at `index` [B], of which the part `ratio` gets other goals (HER.4)."""
        which_key, goal_key = jax.random.split(key)
        relabelled = jax.random.bernoulli(which_key, ratio, index.shape)
        achieved = batch.next_observation[ACHIEVED]
        other = replay.data.next_observation[ACHIEVED][self.source(goal_key, replay, index)]  # (HER.3)
        reward = self.goals.reward(achieved, other)  # (HER.2)
        discounts = batch.discount
        if self.goals.terminated is not None:
            discounts = jnp.where(self.goals.terminated(achieved, other), 0.0, discount)

        def wanting(observation: dict[str, Any]) -> dict[str, Any]:
            own = observation[DESIRED]
            chosen = relabelled.reshape(-1, *(1,) * (own.ndim - 1))
            return {**observation, DESIRED: jnp.where(chosen, other.astype(own.dtype), own)}

        return batch._replace(
            observation=wanting(batch.observation),
            next_observation=wanting(batch.next_observation),
            reward=jnp.where(relabelled, reward, batch.reward),
            discount=jnp.where(relabelled, discounts, batch.discount),
        )

    def source(self, key: jax.Array, replay: "Replay", index: jax.Array) -> jax.Array:
        """Where the steps j of (HER.3) lie for the transitions `index` [B] of step t; [B]."""
        if self.strategy == "random":
            age = jax.random.randint(key, index.shape, 0, replay.cursor.size)  # 0 is the newest
            return (replay.cursor.position - 1 - age) % replay.capacity
        later = steps_after(replay, index, self.horizon)
        earlier = steps_before(replay, index, self.horizon) if self.strategy == "episode" else 0
        drawn = jax.random.randint(key, index.shape, -earlier, later + 1)
        offset = later if self.strategy == "final" else drawn
        return (index + offset * replay.instances) % replay.capacity


def steps_after(replay: "Replay", index: jax.Array, horizon: int) -> jax.Array:
    """How many of the next `horizon` - 1 steps belong to the episode of `index` [B] and are stored; [B]."""
    step = along(replay, index, jnp.arange(horizon - 1))
    return unbroken(~ended(replay, step) & ~replay.newest(step))


def steps_before(replay: "Replay", index: jax.Array, horizon: int) -> jax.Array:
    """How many of the `horizon` - 1 steps before belong to the episode of `index` [B] and are stored; [B]."""
    step = along(replay, index, -1 - jnp.arange(horizon - 1))
    return unbroken(~ended(replay, step) & ~replay.newest(step) & replay.stored(step))


def along(replay: "Replay", index: jax.Array, offsets: jax.Array) -> jax.Array:
    """The places of the steps that are `offsets` [K] steps of the same environment away from `index` [B]: [B, K]."""
    return (index[:, None] + offsets * replay.instances) % replay.capacity


def ended(replay: "Replay", step: jax.Array) -> jax.Array:
    """Whether the steps at `step` ended an episode. Looked up flag by flag: `data.ended` is made for the whole ring."""
    return replay.data.terminated[step] | replay.data.truncated[step]


def unbroken(condition: jax.Array) -> jax.Array:
    """[B, K] -> [B], for how long `condition` holds from the first column on."""
    return jnp.cumprod(condition, -1, dtype=jnp.int32).sum(-1)
