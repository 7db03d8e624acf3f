"""Distributions against SciPy and numerical integration, and their samples' moments; exploration's frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from zhixing import exploration
from zhixing.distributions import Categorical, DiagonalNormal

GENERATOR = np.random.default_rng(0)
LOGITS, OTHER_LOGITS = GENERATOR.normal(scale=2.0, size=(2, 4, 5))
MEAN, OTHER_MEAN = GENERATOR.normal(size=(2, 4, 3))
LOG_STD, OTHER_LOG_STD = GENERATOR.uniform(-1.5, 0.5, size=(2, 4, 3))
CATEGORICAL, OTHER_CATEGORICAL = Categorical(jnp.float32(LOGITS)), Categorical(jnp.float32(OTHER_LOGITS))
NORMAL = DiagonalNormal(jnp.float32(MEAN), jnp.float32(LOG_STD))
OTHER_NORMAL = DiagonalNormal(jnp.float32(OTHER_MEAN), jnp.float32(OTHER_LOG_STD))
SAMPLES = 20_000


def assert_frequencies(actions, probabilities):
    """Each within four standard deviations of what is expected; `actions` [samples]."""
    count = len(actions)
    frequencies = np.bincount(np.asarray(actions), minlength=len(probabilities)) / count
    deviation = np.sqrt(probabilities * (1 - probabilities) / count)
    assert np.all(np.abs(frequencies - probabilities) <= 4 * deviation + 1e-12), (frequencies, probabilities)


def test_categorical_log_prob():
    actions = np.array([0, 4, 2, 1])
    expected = special.log_softmax(LOGITS, -1)[np.arange(4), actions]
    np.testing.assert_allclose(CATEGORICAL.log_prob(jnp.asarray(actions)), expected, rtol=1e-5)


def test_categorical_entropy_and_kl():
    p, q = special.softmax(LOGITS, -1), special.softmax(OTHER_LOGITS, -1)
    np.testing.assert_allclose(CATEGORICAL.entropy(), stats.entropy(p, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(CATEGORICAL.kl(OTHER_CATEGORICAL), stats.entropy(p, q, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(CATEGORICAL.kl(CATEGORICAL), 0.0, atol=1e-7)


def test_categorical_mode_and_samples():
    np.testing.assert_array_equal(CATEGORICAL.mode, LOGITS.argmax(-1))
    samples = jax.vmap(CATEGORICAL.sample)(jax.random.split(jax.random.PRNGKey(0), SAMPLES))
    assert samples.dtype == jnp.int32
    for row in range(4):
        assert_frequencies(samples[:, row], special.softmax(LOGITS[row]))


def test_categorical_with_an_impossible_looking_action():
    """Logits far apart: no NaN in values or gradients."""
    logits = jnp.array([0.0, -200.0, 60.0])

    def functions(logits):
        pi = Categorical(logits)
        return pi.log_prob(1) + pi.entropy() + pi.kl(Categorical(jnp.zeros(3)))

    assert np.isfinite(functions(logits))
    assert np.all(np.isfinite(jax.grad(functions)(logits)))


def test_normal_log_prob_and_entropy():
    action = np.random.default_rng(1).normal(size=(4, 3))
    expected = stats.norm.logpdf(action, MEAN, np.exp(LOG_STD)).sum(-1)
    np.testing.assert_allclose(NORMAL.log_prob(jnp.float32(action)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(NORMAL.entropy(), stats.norm.entropy(MEAN, np.exp(LOG_STD)).sum(-1), rtol=1e-5)


def test_normal_kl():
    def one_dimension(mean, std, other_mean, other_std):
        p, q = stats.norm(mean, std), stats.norm(other_mean, other_std)
        return integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean - 12 * std, mean + 12 * std)[0]

    expected = np.vectorize(one_dimension)(MEAN, np.exp(LOG_STD), OTHER_MEAN, np.exp(OTHER_LOG_STD)).sum(-1)
    np.testing.assert_allclose(NORMAL.kl(OTHER_NORMAL), expected, rtol=1e-4)
    np.testing.assert_allclose(NORMAL.kl(NORMAL), 0.0, atol=1e-6)


def test_normal_mode_and_samples():
    np.testing.assert_array_equal(NORMAL.mode, NORMAL.mean)
    samples = np.asarray(jax.vmap(NORMAL.sample)(jax.random.split(jax.random.PRNGKey(1), SAMPLES)), np.float64)
    z = (samples - MEAN) / np.exp(LOG_STD)
    assert np.all(np.abs(z.mean(0)) < 4 / np.sqrt(SAMPLES))
    assert np.all(np.abs(z.var(0) - 1) < 4 * np.sqrt(2 / SAMPLES))
    correlation = np.corrcoef(z.reshape(SAMPLES, -1).T) - np.eye(12)
    assert np.all(np.abs(correlation) < 4.5 / np.sqrt(SAMPLES))  # independent over rows and dimensions


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_frequencies(epsilon):
    action_values = jnp.array([1.0, 3.0, 2.0, -1.0])
    draw = jax.vmap(lambda key: exploration.epsilon_greedy(key, action_values, epsilon))
    expected = np.full(4, epsilon / 4)
    expected[1] += 1 - epsilon
    assert_frequencies(draw(jax.random.split(jax.random.PRNGKey(2), SAMPLES)), expected)


def test_epsilon_greedy_draws_for_each_instance():
    """Instances of one call explore independently of each other."""
    actions = exploration.epsilon_greedy(jax.random.PRNGKey(3), jnp.tile(jnp.array([0.0, 1.0]), (SAMPLES, 1)), 0.5)
    assert actions.dtype == jnp.int32
    assert_frequencies(actions, np.array([0.25, 0.75]))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_softmax_frequencies(temperature):
    action_values = np.array([1.0, 3.0, 2.0, -1.0])
    draw = jax.vmap(lambda key: exploration.softmax(key, jnp.asarray(action_values), temperature))
    expected = special.softmax(action_values / temperature)
    assert_frequencies(draw(jax.random.split(jax.random.PRNGKey(4), SAMPLES)), expected)
