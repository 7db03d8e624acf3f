"""Transforms against NumPy over the whole stream, and what they do at the end of an episode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from zhixing.environments.base import Timestep
from zhixing.environments.transforms import (
    Chain,
    FrameStack,
    NormalizeObservation,
    RescaleAction,
    ScaleReward,
    Spaces,
    Statistics,
)

N = 3
VECTOR = spaces.Box(-np.inf, np.inf, (2,), np.float32)
SPACES = Spaces(VECTOR, spaces.Discrete(2))


def random_timesteps(count, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        observation = generator.normal(3.0, [5.0, 0.5], (N, 2)).astype(np.float32)
        terminated, truncated = generator.random((2, N)) < 0.15
        ended = terminated | truncated
        successor = np.where(ended[:, None], generator.normal(size=(N, 2)), observation).astype(np.float32)
        yield Timestep(observation, successor, generator.normal(size=N).astype(np.float32), terminated, truncated)


# ------------------------------------------------------------------------------------------------------ observations


def test_statistics_of_a_stream():
    generator = np.random.default_rng(0)
    batches = [generator.normal(100.0, 3.0, (size, 4)) for size in (1, 5, 2, 30, 8)]
    statistics = Statistics.start((4,))
    for batch in batches:
        statistics = statistics.merge(jnp.float32(batch))
    stream = np.concatenate(batches)
    # They start as 1e-4 observations of mean 0 and variance 1.
    weight = 1e-4 / (1e-4 + len(stream))
    mean = (1 - weight) * stream.mean(0)
    square = weight * 1.0 + (1 - weight) * np.square(stream).mean(0)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, square - mean**2, rtol=1e-3)
    np.testing.assert_allclose(statistics.count, len(stream), rtol=1e-5)


def test_statistics_stay_exact_over_many_batches():
    """Two thousand batches of one in float32, far from zero."""
    stream = np.random.default_rng(1).normal(1000.0, 1.0, (2_000, 1))

    def merge(statistics, batch):
        return statistics.merge(batch), None

    statistics, _ = jax.lax.scan(merge, Statistics.start(()), jnp.float32(stream))
    # The first guess (mean 0) has weight 1e-4 / 2000, and so adds 0.05 to the variance at 1000² away.
    np.testing.assert_allclose(statistics.mean, stream.mean(), rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, stream.var() + 1000**2 * 1e-4 / 2000, rtol=0.02)


def test_normalized_observations():
    """Each observation by the statistics that include it; the true successor by the same."""
    transform = NormalizeObservation()
    first = np.random.default_rng(2).normal(3.0, 2.0, (N, 2)).astype(np.float32)
    state, observation = transform.reset(transform.init(SPACES, N), first, training=True)
    stream = [first]
    np.testing.assert_allclose(observation, (first - first.mean(0)) / first.std(0), atol=1e-3)
    for timestep in random_timesteps(40):
        state, seen = transform.step(state, timestep, training=True)
        stream.append(timestep.observation)
        mean, std = np.concatenate(stream).mean(0), np.concatenate(stream).std(0)
        np.testing.assert_allclose(seen.observation, np.clip((timestep.observation - mean) / std, -10, 10), atol=2e-3)
        np.testing.assert_allclose(
            seen.next_observation, np.clip((timestep.next_observation - mean) / std, -10, 10), atol=2e-3
        )
        np.testing.assert_array_equal(seen.reward, timestep.reward)


def test_normalized_observations_are_clipped_and_indices_left_alone():
    transform = NormalizeObservation(limit=2.0)
    state, _ = transform.reset(transform.init(SPACES, N), np.zeros((N, 2), np.float32), training=True)
    np.testing.assert_array_equal(transform.observe(state, jnp.array([1e6, -1e6])), [2.0, -2.0])
    assert transform.spaces(SPACES).observation == spaces.Box(-2, 2, (2,), np.float32)

    tabular = Spaces(spaces.Discrete(4), spaces.Discrete(2))
    state, observation = transform.reset(transform.init(tabular, N), jnp.arange(N), training=True)
    np.testing.assert_array_equal(observation, np.arange(N))
    assert transform.spaces(tabular) == tabular


# ----------------------------------------------------------------------------------------------------------- rewards


def test_scaled_rewards():
    """Against the definition in float64: over the standard deviation of every discounted return so far."""
    transform = ScaleReward(discount=0.9)
    state, _ = transform.reset(transform.init(SPACES, N), np.zeros((N, 2)), training=True)
    returns, stream = np.zeros(N), []
    for i, timestep in enumerate(random_timesteps(60)):
        state, seen = transform.step(state, timestep, training=True)
        returns = 0.9 * returns + timestep.reward
        stream.extend(returns)
        expected = np.clip(timestep.reward / np.std(stream), -10, 10)
        returns = np.where(timestep.terminated | timestep.truncated, 0.0, returns)
        np.testing.assert_allclose(seen.reward, expected, rtol=2e-3, err_msg=f"step {i}")
        np.testing.assert_array_equal(seen.observation, timestep.observation)


def test_scaled_rewards_are_clipped():
    transform = ScaleReward(discount=0.0, limit=1.5)
    state = transform.init(SPACES, N)
    for timestep in random_timesteps(20):
        state, _ = transform.step(state, timestep, training=True)
    _, seen = transform.step(state, timestep._replace(reward=np.float32([100.0, -100.0, 0.0])), training=True)
    assert seen.reward[2] == 0.0 and np.all(np.abs(seen.reward[:2]) <= 1.5)


# ------------------------------------------------------------------------------------------------------------ frames


def test_frame_stack():
    """Against a list; `next_observation` never holds a frame of the new episode."""
    frames = 4
    transform = FrameStack(frames)
    space = spaces.Box(-100, 100, (2,), np.float32)
    seen = transform.spaces(Spaces(space, spaces.Discrete(2))).observation
    assert seen.shape == (frames, 2) and seen.dtype == np.float32
    first = np.random.default_rng(3).normal(size=(N, 2)).astype(np.float32)
    state, stacked = transform.reset(transform.init(Spaces(space, spaces.Discrete(2)), N), first, training=True)
    history = [[first[n]] * frames for n in range(N)]
    np.testing.assert_array_equal(stacked, history)
    ends = 0
    for timestep in random_timesteps(40):
        state, stacked = transform.step(state, timestep, training=True)
        following = [[*history[n][1:], timestep.next_observation[n]] for n in range(N)]
        for n in range(N):
            ended = timestep.terminated[n] or timestep.truncated[n]
            history[n] = [timestep.observation[n]] * frames if ended else following[n]
            ends += ended
        np.testing.assert_array_equal(stacked.next_observation, following)
        np.testing.assert_array_equal(stacked.observation, history)
    assert ends > 10


def test_frame_stack_keeps_the_type():
    images = spaces.Box(0, 255, (5, 5), np.uint8)
    transform = FrameStack(2)
    _, stacked = transform.reset(
        transform.init(Spaces(images, spaces.Discrete(2)), N), np.full((N, 5, 5), 255, np.uint8), training=True
    )
    assert stacked.dtype == jnp.uint8 and stacked.shape == (N, 2, 5, 5)


# ----------------------------------------------------------------------------------------------------------- actions


def test_rescaled_continuous_actions():
    box = spaces.Box(np.float32([-2.0, 0.0]), np.float32([2.0, 10.0]))
    inner = SPACES._replace(action=box)
    transform = RescaleAction()
    assert transform.spaces(inner).action == spaces.Box(-1, 1, (2,), np.float32)
    actions = jnp.array([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [0.5, -0.5], [7.0, -7.0]])
    expected = [[-2.0, 0.0], [0.0, 5.0], [2.0, 10.0], [1.0, 2.5], [2.0, 0.0]]  # the last is clipped
    np.testing.assert_allclose(transform.action(inner, actions), expected, atol=1e-6)


def test_unbounded_actions_are_left_alone():
    inner = SPACES._replace(action=spaces.Box(-np.inf, np.inf, (1,), np.float32))
    assert RescaleAction().spaces(inner) == inner
    np.testing.assert_array_equal(RescaleAction().action(inner, jnp.array([[5.0]])), [[5.0]])


def test_discrete_actions_that_do_not_start_at_zero():
    inner = SPACES._replace(action=spaces.Discrete(3, start=-1))
    assert RescaleAction().spaces(inner).action == spaces.Discrete(3)
    np.testing.assert_array_equal(RescaleAction().action(inner, jnp.array([0, 1, 2])), [-1, 0, 1])


# ------------------------------------------------------------------------------------------------------------- chain


CHAIN = Chain((RescaleAction(), NormalizeObservation(), ScaleReward(discount=0.9), FrameStack(2)), SPACES)


def trained():
    states, _ = CHAIN.reset(CHAIN.init(N), np.ones((N, 2), np.float32), training=True)
    for timestep in random_timesteps(10):
        states, _ = CHAIN.step(states, timestep, training=True)
    return states


def test_chain_is_its_parts_one_after_the_other():
    assert CHAIN.spaces.observation.shape == (2, 2)
    normalize, scale, stack = CHAIN.transforms[1:]
    inner = SPACES._replace(observation=spaces.Box(-10, 10, (2,), np.float32))
    observation = np.ones((N, 2), np.float32)
    a, x = normalize.reset(normalize.init(SPACES, N), observation, training=True)
    b, x = scale.reset(scale.init(inner, N), x, training=True)
    c, x = stack.reset(stack.init(inner, N), x, training=True)
    states, y = CHAIN.reset(CHAIN.init(N), observation, training=True)
    np.testing.assert_array_equal(x, y)
    for timestep in random_timesteps(10):
        states, actual = CHAIN.step(states, timestep, training=True)
        a, expected = normalize.step(a, timestep, training=True)
        b, expected = scale.step(b, expected, training=True)
        c, expected = stack.step(c, expected, training=True)
        jax.tree.map(np.testing.assert_array_equal, tuple(actual), tuple(expected))


def test_evaluation_changes_no_statistics():
    """And gives rewards in the environment's own units, with any number of instances."""
    states = trained()
    before = jax.tree.map(np.array, states)
    fresh = CHAIN.for_evaluation(states, 1)
    fresh, _ = CHAIN.reset(fresh, np.full((1, 2), 50.0, np.float32), training=False)
    for timestep in random_timesteps(10, seed=9):
        timestep = jax.tree.map(lambda x: x[:1], timestep)
        fresh, seen = CHAIN.step(fresh, timestep, training=False)
        np.testing.assert_array_equal(seen.reward, timestep.reward)
        expected = CHAIN.transforms[1].observe(states[1], timestep.next_observation)
        np.testing.assert_array_equal(seen.next_observation[:, -1], expected)
    jax.tree.map(np.testing.assert_array_equal, fresh[1], before[1])  # observations
    jax.tree.map(np.testing.assert_array_equal, fresh[2].statistics, before[2].statistics)  # returns
    jax.tree.map(np.testing.assert_array_equal, states, before)


@pytest.mark.parametrize("training", [True, False])
def test_chain_under_jit(training):
    """The same numbers compiled, and of the same types, so that they can be a loop's carry."""
    states = trained()
    timestep = next(random_timesteps(1, seed=5))
    plain = CHAIN.step(states, timestep, training)
    compiled = jax.jit(CHAIN.step, static_argnums=2)(states, timestep, training)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), plain, compiled)
    assert jax.tree.map(jnp.result_type, compiled[0]) == jax.tree.map(jnp.result_type, states)
