"""Distributions against SciPy and numerical integration, and their samples' moments; exploration's frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from zhixing import exploration
from zhixing.distributions import Bernoulli, Categorical, DiagonalNormal, MultiCategorical, SquashedNormal

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


def test_masked_categorical():
    """The distribution given the mask, to the last bit: a masked action has no probability at all."""
    mask = np.array([[1, 1, 0, 1, 1], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 1]], bool)
    pi, other = CATEGORICAL.masked(jnp.asarray(mask)), OTHER_CATEGORICAL.masked(jnp.asarray(mask))
    p, q = (np.where(mask, special.softmax(x, -1), 0) for x in (LOGITS, OTHER_LOGITS))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    for action in range(5):
        found = np.exp(np.asarray(pi.log_prob(jnp.full(4, action))))
        np.testing.assert_allclose(found, p[:, action], rtol=1e-5)
        assert np.all(found[~mask[:, action]] == 0)
    np.testing.assert_allclose(pi.entropy(), stats.entropy(p, axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pi.kl(other), stats.entropy(p, q, axis=-1), rtol=1e-4, atol=1e-6)
    samples = np.asarray(jax.vmap(pi.sample)(jax.random.split(jax.random.PRNGKey(0), SAMPLES)))
    assert np.all(mask[np.arange(4), samples]) and np.all(mask[np.arange(4), np.asarray(pi.mode)])

    def functions(logits):
        masked = Categorical(logits).masked(jnp.asarray(mask))
        return (masked.log_prob(jnp.array([0, 3, 2, 1])) + masked.entropy() + masked.kl(other)).sum()

    gradient = np.asarray(jax.grad(functions)(jnp.float32(LOGITS)))
    assert np.all(np.isfinite(gradient)) and np.all(gradient[~mask] == 0) and np.any(gradient[mask] != 0)


def test_multi_categorical():
    """Two of sizes 2 and 3: the joint distribution over their 6 pairs."""

    def joint(logits):
        return np.einsum("ni,nj->nij", special.softmax(logits[:, :2], -1), special.softmax(logits[:, 2:], -1))

    pi, other = (MultiCategorical(jnp.float32(x), (2, 3)) for x in (LOGITS, OTHER_LOGITS))
    p, q = joint(LOGITS), joint(OTHER_LOGITS)
    actions = np.array([[0, 2], [1, 0], [1, 1], [0, 0]])
    expected = np.log(p[np.arange(4), actions[:, 0], actions[:, 1]])
    np.testing.assert_allclose(pi.log_prob(jnp.asarray(actions)), expected, rtol=1e-5)
    np.testing.assert_allclose(pi.entropy(), stats.entropy(p.reshape(4, 6), axis=-1), rtol=1e-5)
    np.testing.assert_allclose(pi.kl(other), stats.entropy(p.reshape(4, 6), q.reshape(4, 6), axis=-1), rtol=1e-5)
    modes = [np.unravel_index(row.argmax(), (2, 3)) for row in p]
    np.testing.assert_array_equal(pi.mode, modes)
    samples = np.asarray(jax.vmap(pi.sample)(jax.random.split(jax.random.PRNGKey(0), SAMPLES)))
    for row in range(4):
        assert_frequencies(samples[:, row] @ [3, 1], p[row].ravel())
    mask = jnp.array([[1, 0, 0, 1, 1]] * 4, bool)
    samples = jax.vmap(pi.masked(mask).sample)(jax.random.split(jax.random.PRNGKey(0), 1_000))
    assert np.all(samples[..., 0] == 0) and np.all(samples[..., 1] > 0)


def test_bernoulli():
    pi, other = Bernoulli(jnp.float32(LOGITS)), Bernoulli(jnp.float32(OTHER_LOGITS))
    p, q = special.expit(LOGITS), special.expit(OTHER_LOGITS)
    actions = GENERATOR.integers(0, 2, LOGITS.shape)
    expected = stats.bernoulli(p).logpmf(actions).sum(-1)
    np.testing.assert_allclose(pi.log_prob(jnp.asarray(actions)), expected, rtol=1e-5)
    np.testing.assert_allclose(pi.entropy(), stats.bernoulli(p).entropy().sum(-1), rtol=1e-5)
    pairs = np.stack([1 - p, p], -1), np.stack([1 - q, q], -1)
    np.testing.assert_allclose(pi.kl(other), stats.entropy(*pairs, axis=-1).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(pi.mode, p > 0.5)
    samples = jax.vmap(pi.sample)(jax.random.split(jax.random.PRNGKey(0), SAMPLES))
    for index in np.ndindex(4, 5):
        assert_frequencies(samples[:, *index], np.array([1 - p[index], p[index]]))
    far = Bernoulli(jnp.array([-300.0, 300.0]))
    gradient = jax.grad(lambda x: Bernoulli(x).entropy() + Bernoulli(x).log_prob(jnp.array([1, 0])))(far.logits)
    assert np.all(np.isfinite(gradient))


def squashed_log_prob(u):
    """Change of variables, in float64 with as many digits as log1p gives: 1 - tanh² = sech²."""
    log_sech2 = 2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u))))
    return (stats.norm(MEAN, np.exp(LOG_STD)).logpdf(u) - log_sech2).sum(-1)


def test_squashed_normal_log_prob():
    pi = SquashedNormal(jnp.float32(MEAN), jnp.float32(LOG_STD))
    action = np.tanh(MEAN + np.exp(LOG_STD) * GENERATOR.normal(size=MEAN.shape))
    np.testing.assert_allclose(pi.log_prob(jnp.float32(action)), squashed_log_prob(np.arctanh(action)), rtol=1e-4)
    key = jax.random.PRNGKey(0)
    sampled, log_prob = pi.sample_and_log_prob(key)
    u = np.float64(NORMAL.sample(key))
    np.testing.assert_allclose(sampled, np.tanh(u), rtol=1e-6)
    np.testing.assert_allclose(log_prob, squashed_log_prob(u), rtol=1e-5)
    np.testing.assert_array_equal(sampled, pi.sample(key))
    np.testing.assert_allclose(pi.mode, np.tanh(MEAN), rtol=1e-5)


def test_squashed_normal_far_out():
    """Where float32 rounds tanh(u) to 1 the log-probability is still right, and its gradient finite."""
    mean = np.array([8.0, -12.0, 20.0])
    key = jax.random.PRNGKey(1)

    def log_prob(mean):
        return SquashedNormal(mean, jnp.full(3, -1.0)).sample_and_log_prob(key)[1]

    u = np.float64(DiagonalNormal(jnp.float32(mean), jnp.full(3, -1.0)).sample(key))
    normal = stats.norm(mean, np.exp(-1.0)).logpdf(u).sum()
    expected = normal - (2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u))))).sum()
    np.testing.assert_allclose(log_prob(jnp.float32(mean)), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(log_prob)(jnp.float32(mean)), 2 * np.tanh(u), rtol=1e-5)
    at_one = SquashedNormal(jnp.zeros(1), jnp.zeros(1)).log_prob(jnp.ones(1))
    assert np.isfinite(at_one)


def test_squashed_normal_entropy_and_kl():
    """Entropy by adaptive integration of -p log p over u; the KL divergence is that of the normals."""
    pi = SquashedNormal(jnp.float32(MEAN), jnp.float32(LOG_STD))

    def integrand(u, mean, std):
        density = stats.norm(mean, std).pdf(u)
        return -density * (np.log(density) - 2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u)))))

    expected = [
        sum(
            integrate.quad(integrand, m - 12 * s, m + 12 * s, (m, s), limit=200)[0]
            for m, s in zip(mean, std, strict=True)
        )
        for mean, std in zip(MEAN, np.exp(LOG_STD), strict=True)
    ]
    np.testing.assert_allclose(pi.entropy(), expected, atol=1e-4)
    other = SquashedNormal(OTHER_NORMAL.mean, OTHER_NORMAL.log_std)
    np.testing.assert_array_equal(pi.kl(other), NORMAL.kl(OTHER_NORMAL))


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
