"""What seeds have in common: branches that stay branches under their vmap, and a single seed without its axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zhixing.core import Clock
from zhixing.returns import state_values
from zhixing.shared import cond_of_any, over_seeds
from zhixing.transition import Transition


def doubled_where(predicate, x):
    """Twice x where the predicate holds; elsewhere either branch would do, so that both must be right."""
    return cond_of_any(predicate, lambda x: jnp.where(x > 0, 2 * x, x), lambda x: x, x)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_cond_of_any(axes):
    x = jnp.array([-1.0, 3.0, 2.0])
    for holds in (True, False):
        predicate = jnp.full(3, holds) if axes[0] == 0 else jnp.bool_(holds)
        found = jax.vmap(doubled_where, in_axes=axes)(predicate, x if axes[1] == 0 else x[1])
        expected = np.where(holds & (x > 0), 2 * x, x) if axes[1] == 0 else np.full(3, 6.0 if holds else 3.0)
        np.testing.assert_array_equal(found, expected)
    assert float(jax.jit(doubled_where)(jnp.bool_(True), x[1])) == 6.0


def test_cond_of_any_stays_a_branch():
    """One row that needs it is enough, and none means that it is not computed: no select in the program."""
    predicates, x = jnp.array([False, True, False]), jnp.array([[1.0], [2.0], [0.0]])
    nested = jax.vmap(jax.vmap(doubled_where, in_axes=(None, 0)))
    program = str(jax.make_jaxpr(nested)(predicates, x))
    assert "cond[" in program and "select_n" not in program.split("cond[")[0]
    np.testing.assert_array_equal(nested(predicates, x), [[2.0], [4.0], [0.0]])
    np.testing.assert_array_equal(nested(jnp.zeros(3, bool), x), x)


@pytest.mark.parametrize("truncations", [0.0, 0.3])
def test_state_values(truncations):
    """The value of every true successor, wherever a value follows."""
    generator = np.random.default_rng(0)
    seeds, length, instances = 2, 7, 3
    shape = seeds, length, instances
    terminated = generator.random(shape) < 0.2
    truncated = (generator.random(shape) < truncations) & ~terminated
    ended = (terminated | truncated)[..., None]
    observation = generator.normal(size=(seeds, length + 1, instances, 2)).astype(np.float32)
    last = generator.normal(size=(*shape, 2)).astype(np.float32)  # of the episodes that end
    successor = np.where(ended, last, observation[:, 1:])
    rollout = Transition(observation[:, :-1], 0, 0, successor, terminated, truncated)
    rollout = jax.tree.map(jnp.asarray, rollout)._replace(action=(), reward=())

    def value(weight, observation):
        return jnp.tanh(observation @ weight)

    weight = jnp.array([[1.0, -2.0], [0.5, 0.3]])
    present, following = jax.vmap(lambda w, r: state_values(value, w, r))(weight, rollout)
    for seed in range(seeds):
        np.testing.assert_allclose(present[seed], np.tanh(rollout.observation[seed] @ weight[seed]), rtol=1e-5)
        expected = np.tanh(successor[seed] @ np.asarray(weight[seed]))
        known = ~terminated[seed]
        np.testing.assert_allclose(following[seed][known], expected[known], rtol=1e-5)
    assert np.all(np.isfinite(following))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("seeds", [1, 3])
def test_over_seeds(seeds, in_place):
    """Shared parts come without the axis and leave without it; all else has it, a single seed's too."""
    clock, x = Clock(jnp.int32(3), jnp.int32(0), jnp.int32(10)), jnp.arange(2.0 * seeds).reshape(seeds, 2)
    shapes = []

    def function(clock, x):
        shapes.append(x.shape)
        return clock.tick(steps=2), x.sum()

    out_axes = Clock(None, None, None), 0
    clock, total = over_seeds(function, seeds, clock, x, out_axes=out_axes, in_place=in_place)
    assert shapes == [(2,)] and int(clock.steps) == 5 and clock.steps.shape == ()
    np.testing.assert_array_equal(total, np.asarray(x).sum(-1))
