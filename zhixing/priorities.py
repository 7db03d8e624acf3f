"""Which transitions a replay draws: all alike, or those it was most wrong about more often.

Schaul, Quan, Antonoglou & Silver, "Prioritized experience replay", ICLR 2016, arXiv:1511.05952.

    (PER.1)  P(i) = pᵢ^α / Σⱼ pⱼ^α                                     section 3.3, eq. (1)
    (PER.2)  proportional: pᵢ = |δᵢ| + ε                               section 3.3
    (PER.3)  rank-based:   pᵢ = 1 / rank(i), by falling |δᵢ|           section 3.3
    (PER.4)  wᵢ = (n P(i))^-β / maxⱼ wⱼ, over the minibatch            section 3.4
    (PER.5)  a new transition has the greatest priority so far         Algorithm 1, line 6

They have the same functions: `insert` new transitions, `forget` some, `draw` a minibatch, `update` what was drawn.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from zhixing.shared import Shared

Kind = Literal["uniform", "proportional", "rank"]


class SumTree(eqx.Module):
    """Masses of `capacity` items, summed up over two levels, so that drawing and setting touch few of them.

    A binary tree would be log₂(capacity) steps of almost no work each; three levels of cube-root width are three
    steps, each one operation on vectors.
    """

    leaves: jax.Array  # [W, W, W], the masses; those beyond the capacity are 0
    branches: jax.Array  # [W, W], their sums
    roots: jax.Array  # [W], the sums of these

    @classmethod
    def create(cls, capacity: int) -> "SumTree":
        width = 1
        while width**3 < capacity:
            width += 1
        width = -(-width // 8) * 8  # whole vector registers
        return cls(jnp.zeros((width, width, width)), jnp.zeros((width, width)), jnp.zeros(width))

    @property
    def total(self) -> jax.Array:
        return self.roots.sum()

    def place(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        width = len(self.roots)
        return index // width**2, index // width % width, index % width

    def set(self, index: jax.Array, mass: jax.Array) -> "SumTree":
        """The items `index` [B] have `mass` [B] now. Sums are made anew, so that no rounding errors add up."""
        i, j, k = self.place(index)
        leaves = self.leaves.at[i, j, k].set(mass)
        branches = self.branches.at[i, j].set(leaves[i, j].sum(-1))
        return SumTree(leaves, branches, self.roots.at[i].set(branches[i].sum(-1)))

    def set_all(self, mass: jax.Array) -> "SumTree":
        """`mass` [capacity]."""
        leaves = jnp.zeros(self.leaves.size).at[: len(mass)].set(mass).reshape(self.leaves.shape)
        branches = leaves.sum(-1)
        return SumTree(leaves, branches, branches.sum(-1))

    def draw(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """-> `count` indices, each drawn by itself with probability mass / total, and these probabilities."""
        u = jax.random.uniform(key, (3, count))
        i = choose(u[0], self.roots)
        j = choose(u[1], self.branches[i])
        k = choose(u[2], self.leaves[i, j])
        width = len(self.roots)
        return (i * width + j) * width + k, self.leaves[i, j, k] / self.total


def choose(u: jax.Array, mass: jax.Array) -> jax.Array:
    """The item that `u` [B] from [0, 1) falls on, of `mass` [W] or [B, W] laid end to end: [B]."""
    width = mass.shape[-1]
    # A running sum is a product with a triangle of ones; as `cumsum` it would be W steps.
    ends = jnp.matmul(mass, jnp.triu(jnp.ones((width, width))), precision=jax.lax.Precision.HIGHEST)
    return (ends <= u[:, None] * ends[..., -1:]).sum(-1)


class Uniform(eqx.Module):
    """Every transition alike: nothing to keep."""

    def insert(self, index: jax.Array, exponent: jax.Array | float) -> "Uniform":
        return self

    def forget(self, index: jax.Array) -> "Uniform":
        return self


class Proportional(eqx.Module):
    """In proportion to (|δ| + ε)^α. (PER.2)"""

    tree: SumTree  # of p^α
    greatest: jax.Array  # [], the greatest p so far
    offset: float = eqx.field(static=True, default=1e-6)  # ε: nothing is never drawn again

    @classmethod
    def create(cls, capacity: int) -> "Proportional":
        return cls(SumTree.create(capacity), jnp.float32(1.0))

    def insert(self, index: jax.Array, exponent: jax.Array | float) -> "Proportional":  # (PER.5)
        mass = jnp.full(index.shape, self.greatest**exponent)
        return Proportional(self.tree.set(index, mass), self.greatest)

    def forget(self, index: jax.Array) -> "Proportional":
        return eqx.tree_at(lambda x: x.tree, self, self.tree.set(index, jnp.zeros(index.shape)))

    def draw(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:  # (PER.1)
        return self.tree.draw(key, count)

    def update(
        self, index: jax.Array, td_error: jax.Array, stored: jax.Array, exponent: jax.Array | float
    ) -> "Proportional":
        priority = td_error + self.offset
        return Proportional(self.tree.set(index, priority**exponent), jnp.maximum(self.greatest, priority.max()))


class Staleness(Shared):
    """What happened since the ranks were last made anew."""

    inserted: jax.Array  # [] int32
    updates: jax.Array  # [] int32


class Ranked(eqx.Module):
    """In proportion to (1 / rank)^α. (PER.3)

    As in the paper (appendix B.2.1) the order is sorted anew only now and then: every so many updates, and whenever
    half of what is stored is new. Between two sorts what is updated takes the rank that its error has in the last
    order, and what is new stands at the top.
    """

    tree: SumTree  # of rank^-α
    error: jax.Array  # [capacity], |δ|
    order: jax.Array  # [capacity], -|δ| as of the last sort, rising; 0 where nothing was stored
    greatest: jax.Array  # [], the greatest |δ| so far
    staleness: Staleness

    @property
    def period(self) -> int:
        """Updates between two sorts: so many that sorting costs the same share of the time at any capacity."""
        return max(100, len(self.error) // 100)

    @classmethod
    def create(cls, capacity: int) -> "Ranked":
        zeros = jnp.zeros(capacity)
        staleness = Staleness(jnp.int32(0), jnp.int32(0))
        return cls(SumTree.create(capacity), zeros, jnp.zeros(capacity), jnp.float32(1.0), staleness)

    def insert(self, index: jax.Array, exponent: jax.Array | float) -> "Ranked":  # (PER.5)
        rank = 1.0 + self.staleness.inserted + jnp.arange(len(index))
        return Ranked(
            self.tree.set(index, rank**-exponent),
            self.error.at[index].set(self.greatest),
            self.order,
            self.greatest,
            Staleness(self.staleness.inserted + len(index), self.staleness.updates),
        )

    def forget(self, index: jax.Array) -> "Ranked":
        return eqx.tree_at(lambda x: x.tree, self, self.tree.set(index, jnp.zeros(index.shape)))

    def draw(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:  # (PER.1)
        return self.tree.draw(key, count)

    def update(self, index: jax.Array, td_error: jax.Array, stored: jax.Array, exponent: jax.Array | float) -> "Ranked":
        rank = 1.0 + jnp.searchsorted(self.order, -td_error)
        updated = Ranked(
            self.tree.set(index, rank**-exponent),
            self.error.at[index].set(td_error),
            self.order,
            jnp.maximum(self.greatest, td_error.max()),
            Staleness(self.staleness.inserted, self.staleness.updates + 1),
        )
        stale = updated.staleness
        due = (stale.updates >= self.period) | (2 * stale.inserted >= stored)
        return jax.lax.cond(due, lambda ranked: ranked.sorted(stored, exponent), lambda ranked: ranked, updated)

    def sorted(self, stored: jax.Array, exponent: jax.Array | float) -> "Ranked":
        """With every rank as it is now."""
        place = jnp.arange(len(self.error))
        known = place < stored
        order, index = jax.lax.sort((jnp.where(known, -self.error, 1.0), place), num_keys=1)
        rank = jnp.zeros(len(place)).at[index].set(1.0 + place)
        mass = jnp.where(known, rank**-exponent, 0.0)
        staleness = Staleness(jnp.int32(0), jnp.int32(0))
        return Ranked(self.tree.set_all(mass), self.error, jnp.minimum(order, 0.0), self.greatest, staleness)


def make_priorities(kind: Kind, capacity: int) -> Uniform | Proportional | Ranked:
    """For a replay of `capacity` transitions."""
    match kind:
        case "uniform":
            return Uniform()
        case "proportional":
            return Proportional.create(capacity)
        case "rank":
            return Ranked.create(capacity)


def importance_weights(probability: jax.Array, stored: jax.Array, exponent: jax.Array | float) -> jax.Array:
    """(PER.4): what makes up for drawing some transitions more often than others, [B]; the greatest is 1."""
    weight = (stored * probability) ** -exponent
    return weight / weight.max()
