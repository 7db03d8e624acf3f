"""Binary features of observations, for values that are sums of weights: one of each state, or tile coding.

Sutton & Barto, "Reinforcement learning", 2nd ed., section 9.5.4. Several grids ("tilings") lie over the space, each
shifted against the others; an observation is in one tile of each, and these tiles are its features.
"""

from typing import Any, Self

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import brief
from zhixing.errors import UsageError

UNBOUNDED = 4.0  # dimensions without a bound are cut off at ± this
LARGEST = 1_000_000  # features; with more, every step costs milliseconds


class Features(eqx.Module):
    """`features(observation)` -> int32 [..., active], the indices of the features that are 1; all others are 0.

    Holds no arrays. Attributes: `size`, of all features; `active`, how many are 1 at once.
    """

    size: int = eqx.field(static=True)
    active: int = eqx.field(static=True)
    tiles: int = eqx.field(static=True)  # along each dimension
    low: tuple[float, ...] | None = eqx.field(static=True)  # [dimensions]; None: the observation is an index
    high: tuple[float, ...] | None = eqx.field(static=True)

    @classmethod
    def of(cls, space: gymnasium.Space, tilings: int, tiles: int) -> Self:
        """One feature a state of a Discrete `space`; `tilings` grids with `tiles` tiles along each dimension of a Box.

        Raises UsageError for other spaces, and for a Box of so many dimensions that it has too many tiles.
        """
        if isinstance(space, gymnasium.spaces.Discrete):
            return cls(int(space.n), 1, 1, None, None)
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UsageError(f"tiles are laid over vectors, this environment has {brief(space)}; use DQN")
        low, high = (np.asarray(x, np.float64) for x in (space.low, space.high))
        low, high = np.where(np.abs(low) < 1e6, low, -UNBOUNDED), np.where(np.abs(high) < 1e6, high, UNBOUNDED)
        if not np.all(low < high):
            raise UsageError(
                f"tiles need a range, and a dimension of {brief(space)} has none within ±{UNBOUNDED:g}; "
                "set environment.normalize_observation"
            )
        size = tilings * (tiles + 1) ** len(low)
        if size > LARGEST:
            raise UsageError(
                f"{tilings} tilings of {tiles} tiles in {len(low)} dimensions are {float(size):.0e} features, at most "
                f"{LARGEST:,} do; set algorithm.tiles lower, or use DQN"
            )
        return cls(size, tilings, tiles, tuple(low.tolist()), tuple(high.tolist()))

    def __call__(self, observation: Any) -> jax.Array:
        if self.low is None or self.high is None:
            return jnp.asarray(observation, jnp.int32)[..., None]
        dimensions, side = len(self.low), self.tiles + 1  # one more, for a shifted grid sticks out
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        x = (jnp.asarray(observation)[..., None, :] - low) / (high - low)
        cells = jnp.floor(self.tiles * jnp.clip(x, 0.0, 1.0) + self.offsets).astype(jnp.int32)
        strides = side ** np.arange(dimensions)
        return (cells * strides).sum(-1) + np.arange(self.active) * side**dimensions

    @property
    def offsets(self) -> np.ndarray:
        """[active, dimensions] float32 in [0, 1), in tiles: the j-th tiling is shifted by j (1, 3, 5, ...) / tilings.

        These odd displacements leave no diagonal along which all tilings change at once (Miller & Glanz 1996).
        """
        odd = 2 * np.arange(len(self.low or ())) + 1
        return (np.outer(np.arange(self.active), odd) % self.active / self.active).astype(np.float32)
