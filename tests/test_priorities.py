"""Prioritised sampling against a plain NumPy implementation: probabilities, weights, order, wrap-around."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from zhixing.priorities import Proportional, Ranked, SumTree, Uniform, importance_weights, make_priorities
from zhixing.shared import over_seeds, seed_axes

KINDS = ("proportional", "rank")
KEY = jax.random.PRNGKey(0)


def assert_law(index, probability, count):
    """χ²: the `count` indices follow `probability` [items]; none is drawn that has none."""
    observed = np.bincount(np.asarray(index), minlength=len(probability))
    assert len(observed) == len(probability) and observed.sum() == count
    assert not observed[probability == 0].any()
    likely = probability > 0
    expected = count * probability[likely]
    assert expected.min() > 3
    chi_square = (np.square(observed[likely] - expected) / expected).sum()
    assert 1e-4 < stats.chi2.sf(chi_square, likely.sum() - 1) < 1 - 1e-4  # too good a fit is wrong too


insert = jax.jit(lambda priorities, index, exponent: priorities.insert(index, exponent))
update = jax.jit(lambda priorities, *arguments: priorities.update(*arguments))
sort = jax.jit(Ranked.sorted)
draw = jax.jit(lambda priorities, count: priorities.draw(KEY, count), static_argnums=1)


# ------------------------------------------------------------------------------------------------------------- the tree


@pytest.mark.parametrize("capacity", [1, 7, 512, 513, 5_000])
def test_sums(capacity):
    """Whatever is set, in whatever order: each sum is that of its leaves."""
    generator, masses, tree = np.random.default_rng(0), np.zeros(capacity), SumTree.create(capacity)
    for _ in range(20):
        index = generator.choice(capacity, min(capacity, 32), replace=False)
        masses[index] = generator.exponential(size=len(index))
        tree = tree.set(jnp.asarray(index), jnp.asarray(masses[index], jnp.float32))
    np.testing.assert_allclose(tree.leaves.ravel()[:capacity], masses, rtol=1e-6)
    assert not tree.leaves.ravel()[capacity:].any()
    np.testing.assert_allclose(tree.branches, tree.leaves.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(tree.roots, tree.branches.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(tree.total, masses.sum(), rtol=1e-5)
    whole = SumTree.create(capacity).set_all(jnp.asarray(masses, jnp.float32))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), tree, whole)


@pytest.mark.parametrize("items", [3, 60, 600])
def test_draws_follow_the_masses(items):
    """Over four decades, a third of them zero."""
    generator = np.random.default_rng(items)
    masses = 10 ** generator.uniform(-2, 2, items) * (np.arange(items) % 3 > 0)
    masses = np.where((masses > 0) & (masses < masses.sum() * 1e-5), 0, masses)
    tree = SumTree.create(items).set_all(jnp.asarray(masses, jnp.float32))
    index, probability = tree.draw(KEY, 1_000_000)
    law = masses / masses.sum()
    np.testing.assert_allclose(probability, law[np.asarray(index)], rtol=1e-5)
    assert_law(index, law, 1_000_000)


def test_never_draws_nothing():
    """One item among many: drawn always, whatever is rounded."""
    for place in (0, 511, 700, 998):
        tree = SumTree.create(1_000).set(jnp.array([place]), jnp.array([1e-20]))
        index, probability = tree.draw(KEY, 10_000)
        assert np.all(np.asarray(index) == place) and np.all(np.asarray(probability) == 1)


# ----------------------------------------------------------------------------------------------- probabilities, weights


def some_errors(count, seed=0):
    return np.abs(np.random.default_rng(seed).standard_cauchy(count)).clip(1e-3, 30)


def with_errors(kind, errors, exponent, capacity=None):
    """Priorities after all of `errors` [n] were seen once, with ranks as they are now."""
    count = len(errors)
    priorities = insert(make_priorities(kind, capacity or count), jnp.arange(count), exponent)
    priorities = update(priorities, jnp.arange(count), jnp.asarray(errors, jnp.float32), jnp.int32(count), exponent)
    return sort(priorities, jnp.int32(count), exponent) if kind == "rank" else priorities


def theory(kind, errors, exponent):
    """(PER.1) to (PER.3)"""
    p = errors + 1e-6 if kind == "proportional" else 1 / stats.rankdata(-errors, method="ordinal")
    return p**exponent / (p**exponent).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.7, 1.0])
def test_probabilities(kind, exponent):
    errors = some_errors(300)
    law = theory(kind, errors, exponent)
    index, probability = draw(with_errors(kind, errors, exponent, 1_000), 500_000)
    np.testing.assert_allclose(probability, law[np.asarray(index)], rtol=1e-4)
    assert_law(index, law, 500_000)


@pytest.mark.parametrize("kind", KINDS)
def test_exponent_zero_is_uniform(kind):
    """Exactly: every mass is 1, every probability the same, every weight 1, whatever the errors."""
    priorities = with_errors(kind, some_errors(200), 0.0, 300)
    masses = np.asarray(priorities.tree.leaves).ravel()
    np.testing.assert_array_equal(masses[:200], 1.0)
    assert not masses[200:].any()
    _, probability = draw(priorities, 1_000)
    np.testing.assert_array_equal(probability, np.float32(1 / 200))
    np.testing.assert_array_equal(importance_weights(probability, jnp.int32(200), 0.4), 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_importance_weights(beta):  # (PER.4)
    probability = np.random.default_rng(0).dirichlet(np.ones(50))
    weight = (50 * probability) ** -beta
    found = importance_weights(jnp.asarray(probability, jnp.float32), jnp.int32(50), beta)
    np.testing.assert_allclose(found, weight / weight.max(), rtol=1e-5)
    assert float(found.max()) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_full_correction_is_unbiased(kind):
    """With β = 1 the weighted mean over prioritised samples is the mean over all, but for one factor."""
    errors = some_errors(100)
    index, probability = draw(with_errors(kind, errors, 0.6), 400_000)
    weight = np.asarray(importance_weights(probability, jnp.int32(100), 1.0), np.float64)
    x = np.random.default_rng(1).normal(5.0, 1.0, 100)
    assert (weight * x[np.asarray(index)]).sum() / weight.sum() == pytest.approx(x.mean(), rel=0.01)


# -------------------------------------------------------------------------------------------------- what comes and goes


@pytest.mark.parametrize("kind", KINDS)
def test_new_ones_have_the_greatest_priority(kind):  # (PER.5)
    priorities = with_errors(kind, np.array([0.5, 4.0, 0.1]), 0.5, capacity=8)
    priorities = insert(priorities, jnp.array([3]), 0.5)
    masses = np.asarray(priorities.tree.leaves).ravel()
    assert masses[3] == masses[:4].max() and masses[0] > masses[2] and not masses[4:].any()


def test_proportional_remembers_the_greatest():
    priorities = with_errors("proportional", np.array([9.0, 1.0]), 0.5, capacity=4)
    priorities = update(priorities, jnp.array([0]), jnp.array([0.25]), jnp.int32(2), 0.5)
    priorities = insert(priorities, jnp.array([2]), 0.5)
    np.testing.assert_allclose(priorities.tree.leaves.ravel()[:4], [0.5, 1.0, 3.0, 0.0], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_over_is_forgotten(kind):
    """The ring wraps around: the new transition does not inherit the old one's priority."""
    priorities = with_errors(kind, np.array([5.0, 0.1, 0.2, 0.3]), 1.0)
    before = np.asarray(priorities.tree.leaves).ravel()[:4]
    priorities = insert(priorities, jnp.array([1]), 1.0)
    after = np.asarray(priorities.tree.leaves).ravel()[:4]
    assert after[1] == pytest.approx(before.max(), rel=1e-5)
    np.testing.assert_array_equal(np.delete(after, 1), np.delete(before, 1))


def test_ranks_between_two_sorts():
    """An updated transition takes the rank of its error in the last order."""
    errors = np.arange(10.0, 0.0, -1.0)  # rank 1, 2, ...
    priorities = with_errors("rank", errors, 1.0, capacity=1_000)
    assert priorities.period > 1
    updated = update(priorities, jnp.array([9, 0]), jnp.array([7.5, 0.5]), jnp.int32(10), 1.0)
    masses = np.asarray(updated.tree.leaves).ravel()[:10]
    np.testing.assert_allclose(1 / masses, [11, 2, 3, 4, 5, 6, 7, 8, 9, 4], rtol=1e-6)


def test_sorts_when_due():
    """Every `period` updates, and when half of what is stored is new."""
    priorities = with_errors("rank", some_errors(50), 1.0, capacity=1_000)
    for i in range(priorities.period):
        assert int(priorities.staleness.updates) == i
        errors = jnp.asarray(some_errors(3, i), jnp.float32)
        priorities = update(priorities, jnp.arange(3), errors, jnp.int32(50), 1.0)
    assert int(priorities.staleness.updates) == 0
    ranks = 1 / np.asarray(priorities.tree.leaves).ravel()[:50]
    np.testing.assert_allclose(ranks, stats.rankdata(-np.asarray(priorities.error)[:50], method="ordinal"), rtol=1e-5)

    priorities = insert(priorities, jnp.arange(50, 110), 1.0)
    assert int(priorities.staleness.inserted) == 60
    priorities = update(priorities, jnp.array([0]), jnp.array([1.0]), jnp.int32(110), 1.0)
    assert int(priorities.staleness.inserted) == 0
    np.testing.assert_allclose(
        np.sort(1 / np.asarray(priorities.tree.leaves).ravel()[:110]), np.arange(1, 111), rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_side_by_side(kind):
    """Each seed's priorities are its own, and what they share stays shared."""
    errors = np.stack([some_errors(40, seed) for seed in range(3)])
    made = make_priorities(kind, 64)
    stacked = jax.tree.map(lambda axis, x: x if axis is None else jnp.stack([x] * 3), seed_axes(made), made,
                           is_leaf=lambda x: x is None)  # fmt: skip

    def one(priorities, error):
        priorities = priorities.insert(jnp.arange(40), 0.7)
        return priorities.update(jnp.arange(40), error, jnp.int32(40), 0.7)

    together = over_seeds(one, 3, stacked, jnp.asarray(errors, jnp.float32), out_axes=seed_axes(made))
    for row in range(3):
        alone = one(made, jnp.asarray(errors[row], jnp.float32))
        np.testing.assert_allclose(together.tree.leaves[row], alone.tree.leaves, rtol=1e-6)


def test_kinds():
    assert isinstance(make_priorities("uniform", 4), Uniform)
    assert isinstance(make_priorities("proportional", 4), Proportional)
    assert isinstance(make_priorities("rank", 4), Ranked)
