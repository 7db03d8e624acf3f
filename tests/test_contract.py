"""What every algorithm promises to the drivers: purity, seeds, one compilation, exact counts.

New algorithms are picked up from the registry.
"""

from dataclasses import fields, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import (
    STRUCTURES,
    CountingEnvironment,
    Recorder,
    make_algorithm,
    make_driver,
    realistic_environment,
    variant,
)

from zhixing.algorithms import ALGORITHMS, algorithm_class, name_of
from zhixing.core import Online
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.off_policy import OffPolicy
from zhixing.shared import Shared

SEEDS = (5, 6, 7)
N = 4
ITERATIONS = 6


# All tests of an algorithm in one worker: they share its compiled program.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in STRUCTURES])
def case(request):
    """An algorithm on a task with random starts, three seeds; its driver is compiled once for all tests."""
    settings = {"learning_starts": 2 * N} if issubclass(algorithm_class(variant(request.param)[0]), OffPolicy) else {}
    if "maddpg" in request.param or "recurrent_mappo" in request.param:
        # Adam makes large what rounding leaves of a gradient that is nearly 0, as of a policy that hardly played.
        settings["learning_rate"] = 1e-3
    algorithm = make_algorithm(request.param, **settings)
    environment = realistic_environment(algorithm)
    driver = make_driver(environment, SEEDS, N)
    run = driver.advance(algorithm, driver.start(algorithm), ITERATIONS, algorithm.steps_per_iteration)
    return SimpleNamespace(
        name=variant(request.param)[0],
        algorithm=algorithm,
        environment=environment,
        driver=driver,
        alone=make_driver(environment, SEEDS[:1], N),
        length=algorithm.steps_per_iteration,
        after=jax.tree.map(np.array, run),  # ITERATIONS iterations from the start
    )


def advanced(case, iterations=ITERATIONS):
    return case.driver.advance(case.algorithm, case.driver.start(case.algorithm), iterations, case.length)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_pure(case):
    """The same inputs give the same outputs, to the bit."""
    assert_equal(advanced(case), case.after)


def test_chunks_do_not_matter(case):
    """Two iterations and four are six, to the bit."""
    run = advanced(case, 2)
    assert_equal(case.driver.advance(case.algorithm, run, 4, case.length), case.after)


def test_compiles_once(case):
    for iterations in (0, 1, 5):
        advanced(case, iterations)
    assert case.driver._advance._cache_size() == 1
    # A hyper-parameter that is a number is an argument of the program.
    other = replace(case.algorithm, learning_rate=2 * case.algorithm.learning_rate)
    run = case.driver.advance(other, case.driver.start(other), ITERATIONS, case.length)
    assert case.driver._advance._cache_size() == 1
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), run.learner, case.after.learner)
    assert not all(jax.tree.leaves(same))


@pytest.mark.parametrize("row", [0, 2])
def test_seeds(case, row):
    """A row of a run of three seeds is the run of that seed alone; batched products may round differently."""
    alone = make_driver(case.environment, SEEDS[row : row + 1], N)
    # What follows the start depends on no seed but through the run, so that both rows share a program.
    run = case.alone.advance(case.algorithm, alone.start(case.algorithm), ITERATIONS, case.length)

    def compare(together, single):
        if isinstance(together, Shared):
            return assert_equal(single, together)
        expected = together[row]
        if np.issubdtype(expected.dtype, np.floating):
            return np.testing.assert_allclose(single[0], expected, rtol=1e-5, atol=1e-5)
        return np.testing.assert_array_equal(single[0], expected)

    jax.tree.map(compare, case.after, run, is_leaf=lambda x: isinstance(x, Shared))


def test_seeds_differ(case):
    """Nothing that a seed draws is another seed's."""
    assert len({tuple(key) for key in case.after.key}) == len(SEEDS)
    learned = jax.tree.leaves(case.after.learner, is_leaf=lambda x: isinstance(x, Shared))
    arrays = [x for x in learned if not isinstance(x, Shared)]
    assert any(not np.array_equal(x[0], x[1]) and not np.array_equal(x[1], x[2]) for x in arrays)


def test_shared_parts_have_no_seeds_axis(case):
    fresh = case.driver.start(case.algorithm)  # Shared nodes keep their type through the driver
    for tree in (fresh.learner, fresh.memory, fresh.window):
        for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Shared)):
            if isinstance(node, Shared):
                assert all(x.shape == () for x in jax.tree.leaves(node)), node
            else:
                assert node.shape[0] == len(SEEDS)
    assert isinstance(fresh.learner.clock, Shared)


def test_clock(case):
    """Environment steps and updates are counted exactly."""
    clock, algorithm = case.after.learner.clock, case.algorithm
    assert int(clock.steps) == ITERATIONS * case.length * N
    if isinstance(algorithm, Online):
        updates = ITERATIONS * N
    elif isinstance(algorithm, OffPolicy):
        idle = -(-algorithm.learning_starts // (case.length * N)) - 1  # iterations that only collect
        updates = (ITERATIONS - idle) * algorithm.updates_per_iteration
        assert 0 < idle < ITERATIONS
        assert int(case.after.window.learned.iterations) == ITERATIONS - idle
    else:
        updates = ITERATIONS * algorithm.updates_per_iteration
        assert int(case.after.window.learned.iterations) == ITERATIONS
    assert int(clock.updates) == updates
    assert int(clock.total_steps) == case.driver.loop.spec.total_steps
    assert float(clock.progress) == pytest.approx(ITERATIONS * case.length * N / 10_000)


def test_metrics_are_finite(case):
    assert np.all(case.after.window.first_bad == -1)
    assert np.all(np.isfinite(case.after.window.metrics)) and case.after.window.metrics.shape[1] > 0


def test_no_host_callbacks(case):
    def text(function, *arguments, **more):
        return function.lower(*arguments, **more).as_text()

    run = case.driver.start(case.algorithm)
    program = text(case.driver._advance, case.algorithm, run, jnp.int32(1), rollout_length=case.length)
    assert "callback" not in program
    printing = jax.jit(lambda x: jax.debug.print("{}", x))
    assert "callback" in text(printing, 1.0)  # that is how one would show


def test_buffers_are_donated(case):
    """The replay and the networks are updated in place: nothing of the run that is consumed remains."""
    run = case.driver.start(case.algorithm)
    case.driver.advance(case.algorithm, run, 1, case.length)
    assert all(x.is_deleted() for x in jax.tree.leaves(run))


def test_floats_are_leaves(case):
    floats = {field.name for field in fields(case.algorithm) if field.type in (float, "float")}
    assert "learning_rate" in floats
    assert len(jax.tree.leaves(case.algorithm)) == len(floats)


def test_vmap_over_a_hyperparameter(case):
    """A sweep: `init` and `learn` of three learning rates at once are those of each alone."""
    loop, key = case.driver.loop, jax.random.PRNGKey(0)
    shapes = loop.example(case.algorithm)
    rollout = jax.tree.map(lambda x: jax.random.randint(key, x.shape, 0, 2).astype(x.dtype), shapes)

    @jax.jit
    def one(learning_rate):
        algorithm = replace(case.algorithm, learning_rate=learning_rate)
        state, memory = algorithm.init(key, loop.spec), algorithm.memory(loop.spec, shapes)
        # Past `learning_starts`, and then TD3's actor waits for the second update.
        for i in range(3 if isinstance(algorithm, OffPolicy) else 2):
            state, memory, metrics = algorithm.learn(state, memory, rollout, jax.random.fold_in(key, i))
        return state, metrics

    rates = jnp.array([1e-3, 1e-2, 1e-1])
    together = jax.jit(jax.vmap(one))(rates)
    for i, rate in enumerate(rates):
        alone = one(rate)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-3, atol=1e-4), together, alone)
    moved = [x for x in jax.tree.leaves(together[0]) if x.ndim > 1]
    assert any(not np.array_equal(x[0], x[2]) for x in moved)


def test_name_and_documentation(case):
    assert name_of(case.algorithm) == case.name
    # One level deep: PPO with a memory, TD3 and DIAYN say only what differs from PPO, DDPG and SAC. IPPO is MAPPO with
    # another default, and no code; in MAPPO with a memory two of them meet.
    known = {algorithm_class(name) for name in ALGORITHMS if name != "ippo"}
    levels = 4 if case.name == "recurrent_mappo" else 2
    assert len(known & set(type(case.algorithm).__mro__)) <= levels
    assert type(case.algorithm).__doc__


# ------------------------------------------------------------------------------------------------------------- carries


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_carry_starts_anew_with_each_episode(seeds):
    """The recorder's carry counts the steps of the episode, and so does the observation."""
    algorithm = Recorder()
    driver = make_driver(JaxAdapter("counting", CountingEnvironment()), seeds)
    run, resets = driver.start(algorithm), 0
    for _ in range(3):
        run = driver.advance(algorithm, run, 1, algorithm.rollout_length)
        rollout = run.learner.rollout
        steps = np.asarray(rollout.observation[..., 1])
        np.testing.assert_array_equal(rollout.extras, steps)
        resets += (steps == 0).sum()
    np.testing.assert_array_equal(run.carry, run.observation[..., 1])
    assert resets > 4 * N * len(seeds)
