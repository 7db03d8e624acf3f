"""Q-learning against a NumPy table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from probes import make_driver
from test_distributions import assert_frequencies

from zhixing.algorithms.q_learning import QLearning
from zhixing.core import Spec, Transition
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.environments.tabular import TabularEnv
from zhixing.errors import UsageError

KEY = jax.random.PRNGKey(0)
STATES, ACTIONS, N = 4, 3, 5
SPEC = Spec(spaces.Discrete(STATES), spaces.Discrete(ACTIONS), N, 1_000)


def random_transitions(count, seed=0):
    """`count` rollouts [1, N]."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        terminated, truncated = generator.random((2, 1, N)) < 0.25
        yield Transition(
            generator.integers(0, STATES, (1, N)),
            generator.integers(0, ACTIONS, (1, N)),
            generator.normal(size=(1, N)),
            generator.integers(0, STATES, (1, N)),
            terminated,
            truncated & ~terminated,
        )


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_update(decay):
    """Instance after instance on one table; the step size of the n-th visit is α n^-ω."""
    algorithm = QLearning(learning_rate=0.3, learning_rate_decay=decay, discount=0.9, initial_value=0.5)
    state = algorithm.init(KEY, SPEC)
    q, visits = np.full((STATES, ACTIONS), 0.5), np.zeros((STATES, ACTIONS), int)
    learn = jax.jit(algorithm.learn)
    for rollout in random_transitions(30):
        state, _, metrics = learn(state, (), jax.tree.map(jnp.asarray, rollout), KEY)
        errors = []
        for s, a, r, following, terminated in zip(*(x[0] for x in rollout[:5]), strict=True):
            target = r if terminated else r + 0.9 * q[following].max()  # goes on where it is truncated
            visits[s, a] += 1
            errors.append(target - q[s, a])
            q[s, a] += 0.3 * visits[s, a] ** -decay * errors[-1]
        np.testing.assert_allclose(state.q, q, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(state.visits, visits)
        np.testing.assert_allclose(metrics["td_error"], np.abs(errors).mean(), rtol=1e-4)
    assert (int(state.clock.steps), int(state.clock.updates)) == (30 * N, 30 * N)


def test_decay_one_is_the_sample_mean():
    """α = 1, ω = 1 on rewards alone: Q is their mean, whatever it started as."""
    algorithm = QLearning(learning_rate=1.0, learning_rate_decay=1.0, discount=0.0, initial_value=100.0)
    rewards = np.random.default_rng(0).normal(size=(1, 50))
    zeros, never = np.zeros((1, 50), int), np.zeros((1, 50), bool)
    rollout = jax.tree.map(jnp.asarray, Transition(zeros, zeros, rewards, zeros, never, never))
    state, _, _ = algorithm.learn(algorithm.init(KEY, SPEC), (), rollout, KEY)
    assert float(state.q[0, 0]) == pytest.approx(rewards.mean(), abs=1e-5)
    assert np.all(np.asarray(state.q).ravel()[1:] == 100.0)


def test_converges_to_the_optimal_values():
    """With falling step sizes (ω = 0.8) and random rewards and successors: Q* of value iteration, in the max-norm."""
    generator, discount = np.random.default_rng(0), 0.8
    table = {
        s: {
            a: [(0.5, int(generator.integers(STATES)), generator.normal(), generator.random() < 0.2) for _ in range(2)]
            for a in range(ACTIONS)
        }
        for s in range(STATES)
    }
    environment = TabularEnv(table, np.full(STATES, 1 / STATES))
    optimal = np.zeros((STATES, ACTIONS))
    for _ in range(200):
        value = environment.rewards + discount * ~environment.terminated * optimal.max(-1)[environment.successors]
        optimal = (environment.probabilities * value).sum(-1)

    settings = {"learning_rate": 1.0, "learning_rate_decay": 0.8, "discount": discount}
    algorithm = QLearning(**settings, epsilon_start=1.0, epsilon_end=1.0)
    driver = make_driver(JaxAdapter("random", environment), (0, 1, 2), 4)
    run = driver.advance(algorithm, driver.start(algorithm), 200_000, 1)
    errors = np.abs(np.asarray(run.learner.q) - optimal).max((1, 2))
    assert np.ptp(optimal) > 1 and np.all(errors < 0.1)


def acted(algorithm, steps, count=20_000):
    state = algorithm.init(KEY, SPEC)
    state = state._replace(q=state.q.at[2].set(jnp.array([0.0, 1.0, 2.0])), clock=state.clock.tick(steps=steps))
    actions, carry, extras = algorithm.act(state, (), jnp.full(count, 2), KEY)
    assert carry == () and extras == ()
    return actions


@pytest.mark.parametrize("steps, epsilon", [(0, 0.8), (250, 0.5), (500, 0.2), (1_000, 0.2)])
def test_epsilon_greedy(steps, epsilon):
    algorithm = QLearning(epsilon_start=0.8, epsilon_end=0.2, epsilon_fraction=0.5)
    expected = np.array([epsilon / 3, epsilon / 3, 1 - epsilon * 2 / 3])
    assert_frequencies(acted(algorithm, steps), expected)


def test_softmax():
    weights = np.exp(np.array([0.0, 1.0, 2.0]) / 0.7)
    assert_frequencies(acted(QLearning(exploration="softmax", temperature=0.7), 0), weights / weights.sum())


def test_policy_and_value():
    algorithm = QLearning()
    state = algorithm.init(KEY, SPEC)._replace(q=jnp.arange(STATES * ACTIONS, dtype=jnp.float32).reshape(STATES, -1))
    observation = jnp.array([[0, 3], [1, 1]])
    np.testing.assert_array_equal(algorithm.value(state, observation), [[2, 11], [5, 5]])
    np.testing.assert_array_equal(algorithm.policy(state, observation), np.full((2, 2), 2))


@pytest.mark.parametrize(
    "settings, observation, action, message",
    [
        ({}, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "use DQN"),
        ({}, spaces.Discrete(3), spaces.Box(-1, 1, (2,)), "use PPO"),
        ({"learning_rate": 0.0}, spaces.Discrete(3), spaces.Discrete(2), "learning_rate"),
        ({"temperature": -1.0}, spaces.Discrete(3), spaces.Discrete(2), "temperature"),
    ],
)
def test_check(settings, observation, action, message):
    with pytest.raises(UsageError, match=message):
        QLearning(**settings).check(Spec(observation, action, 1, 100))
