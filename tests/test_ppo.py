"""PPO's loss against NumPy in float64, its gradient against finite differences, its update step by step."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from probes import successors
from scipy import special, stats
from test_returns import advantages_by_definition

from zhixing.algorithms import ppo
from zhixing.algorithms.ppo import PPO, Acted, Minibatch, shuffled_minibatches
from zhixing.core import Spec, Transition, hyperparameters
from zhixing.distributions import Categorical, DiagonalNormal
from zhixing.errors import UsageError

KEY = jax.random.PRNGKey(0)
B, ACTIONS = 24, 4
T, N = 6, 4
SPEC = Spec(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(ACTIONS), N, 1_000)


@hyperparameters
class PlainPPO(PPO):
    """With plain gradient descent, so that a step shows its gradient."""

    def optimiser(self, clock):
        return optax.sgd(self.learning_rate)


class Table(eqx.Module):
    """In place of a network: what it gives for the samples of one minibatch."""

    distribution: Categorical | DiagonalNormal
    values: jax.Array

    def policy(self, observation):
        return self.distribution

    def value(self, observation):
        return self.values


def random_minibatch(discrete=True, seed=0):
    """-> the present net, a minibatch of an older policy that is near: ratios within ε, above and below."""
    generator = np.random.default_rng(seed)
    if discrete:
        old = generator.normal(size=(B, ACTIONS))
        present, old = Categorical(old + generator.normal(scale=0.3, size=old.shape)), Categorical(old)
        action = generator.integers(0, ACTIONS, B)
    else:
        mean, log_std = generator.normal(size=(2, B, 2))
        old = DiagonalNormal(mean, 0.3 * log_std)
        present = DiagonalNormal(mean + 0.25 * generator.normal(size=mean.shape), 0.3 * log_std + 0.05)
        action = mean + 0.5 * generator.normal(size=mean.shape)
    old_value, advantage, noise = generator.normal(size=(3, B))
    net = Table(present, old_value + 0.4 * generator.normal(size=B))
    batch = Minibatch(np.zeros((B, 1)), action, Acted(None, old), advantage, old_value, old_value + noise)
    net, batch = jax.tree.map(jnp.asarray, (net, batch))
    return net, batch._replace(extras=Acted(old_log_prob(batch), batch.extras.policy))


def old_log_prob(batch):
    return jnp.asarray(numpy_policy(batch.extras.policy, batch.action)[0])


def numpy_policy(pi, action):
    """-> log π(a), entropy; SciPy, float64."""
    if isinstance(pi, Categorical):
        log_p = special.log_softmax(np.float64(pi.logits), -1)
        return log_p[np.arange(B), np.asarray(action, int)], stats.entropy(np.exp(log_p), axis=-1)
    normal = stats.norm(np.float64(pi.mean), np.exp(np.float64(pi.log_std)))
    return normal.logpdf(np.float64(action)).sum(-1), normal.entropy().sum(-1)


def numpy_kl(old, new):
    if isinstance(old, Categorical):
        p, q = special.softmax(np.float64(old.logits), -1), special.softmax(np.float64(new.logits), -1)
        return stats.entropy(p, q, axis=-1)
    mean, other_mean, log_std, other_log_std = map(np.float64, (old.mean, new.mean, old.log_std, new.log_std))
    ratio = np.exp(2 * log_std) / np.exp(2 * other_log_std)
    z = np.square(mean - other_mean) / np.exp(2 * other_log_std)
    return (0.5 * (ratio + z - 1) + other_log_std - log_std).sum(-1)


def numpy_loss(algorithm, net, batch, beta=0.0, epsilon=None):
    epsilon = algorithm.clip if epsilon is None else epsilon
    log_prob, entropy = numpy_policy(net.distribution, batch.action)
    log_ratio = log_prob - np.float64(batch.extras.log_prob)
    ratio, advantage = np.exp(log_ratio), np.float64(batch.advantage)
    if algorithm.normalize_advantage:
        advantage = (advantage - advantage.mean()) / advantage.std()
    clipped = np.clip(ratio, 1 - epsilon, 1 + epsilon)
    objective = np.minimum(ratio * advantage, clipped * advantage).mean()
    value, target, old_value = map(np.float64, (net.values, batch.target, batch.value))
    error = np.square(value - target)
    if algorithm.clip_value:
        error = np.maximum(error, np.square(old_value + np.clip(value - old_value, -epsilon, epsilon) - target))
    kl = numpy_kl(batch.extras.policy, net.distribution) if algorithm.kl_penalty is not None else ratio - 1 - log_ratio
    kl, entropy, value_loss = kl.mean(), entropy.mean(), error.mean()
    loss = -objective + algorithm.value_coefficient * value_loss - algorithm.entropy_coefficient * entropy + beta * kl
    return {
        "loss": loss, "objective": objective, "value_loss": value_loss, "entropy": entropy, "kl": kl,
        "clip_fraction": np.mean(np.abs(ratio - 1) > epsilon),
    }  # fmt: skip


def state_of(algorithm, done=0, beta=None):
    state = algorithm.init(KEY, SPEC)
    state = state._replace(clock=state.clock.tick(steps=done))
    return state if beta is None else state._replace(kl_coefficient=jnp.float32(beta))


def loss_of(algorithm, net, batch, state):
    """The loss of a whole minibatch, its advantages normalised where the settings say so."""
    moments = algorithm.pooled(algorithm.moments(batch), lambda x: x)
    return algorithm.loss(net, algorithm.prepared(batch, moments), state)


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_value": True, "entropy_coefficient": 0.02, "value_coefficient": 0.7},
        {"normalize_advantage": False, "clip": 0.1},
        {"kl_penalty": 0.3},
    ],
)
def test_loss(discrete, settings):
    algorithm = PPO(hidden=(4,), **settings)
    net, batch = random_minibatch(discrete)
    beta = settings.get("kl_penalty", 0.0)
    loss, metrics = loss_of(algorithm, net, batch, state_of(algorithm))
    expected = numpy_loss(algorithm, net, batch, beta)
    assert 0 < expected["clip_fraction"] < 1 and expected["kl"] > 0
    assert loss == metrics["loss"] and set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=name)


def test_value_clipping_makes_a_difference():
    net, batch = random_minibatch()
    plain, clipped = (PPO(hidden=(4,), clip_value=clip).loss(net, batch, state_of(PPO()))[1] for clip in (False, True))
    assert clipped["value_loss"] > plain["value_loss"]


def test_rlax():
    rlax = pytest.importorskip("rlax")
    net, batch = random_minibatch()
    algorithm = PPO(hidden=(4,), normalize_advantage=False)
    _, metrics = algorithm.loss(net, batch, state_of(algorithm))
    ratio = jnp.exp(net.distribution.log_prob(batch.action) - batch.extras.log_prob)
    expected = -rlax.clipped_surrogate_pg_loss(ratio, batch.advantage, 0.2)
    np.testing.assert_allclose(metrics["objective"], expected, rtol=1e-5)


def test_clip_schedule():
    """Half of the run over: half of ε."""
    net, batch = random_minibatch()
    algorithm = PPO(hidden=(4,), clip=0.4, clip_schedule="linear", clip_value=True)
    for done, epsilon in ((0, 0.4), (500, 0.2), (900, 0.04)):
        _, metrics = loss_of(algorithm, net, batch, state_of(algorithm, done))
        expected = numpy_loss(algorithm, net, batch, epsilon=epsilon)
        for name in ("loss", "clip_fraction"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_value": True, "entropy_coefficient": 0.1}, {"kl_penalty": 2.0, "normalize_advantage": False}],
)
def test_gradient_is_that_of_finite_differences(settings):
    """With respect to the logits and the values, in float64."""
    with jax.enable_x64(True):
        algorithm = PPO(hidden=(4,), **settings)
        net, batch = random_minibatch()
        beta = settings.get("kl_penalty", 0.0)
        state = state_of(PPO(hidden=(4,)))._replace(kl_coefficient=jnp.float64(beta))
        gradient, _ = jax.grad(lambda net: loss_of(algorithm, net, batch, state), has_aux=True)(net)
    logits, values, h = np.asarray(net.distribution.logits), np.asarray(net.values), 1e-6
    assert logits.dtype == values.dtype == np.float64

    def slope(logits_step, values_step):
        ends = (Table(Categorical(logits + sign * logits_step), values + sign * values_step) for sign in (1, -1))
        above, below = (numpy_loss(algorithm, net, batch, beta)["loss"] for net in ends)
        return (above - below) / (2 * h)

    for index in np.ndindex(B, ACTIONS):
        step = np.zeros_like(logits)
        step[index] = h
        np.testing.assert_allclose(gradient.distribution.logits[index], slope(step, 0.0), rtol=1e-5, atol=1e-8)
    for i in range(B):
        np.testing.assert_allclose(gradient.values[i], slope(0.0, h * np.eye(B)[i]), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "ratio, advantage, has_gradient",
    [(1.3, 1.0, False), (0.7, -1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_where_the_clip_is_active_the_gradient_is_zero(ratio, advantage, has_gradient):
    """Exactly; and where it is not, it is -Â r ∇ log π."""
    algorithm = PPO(hidden=(4,), normalize_advantage=False, value_coefficient=0.0)
    logits, action = jnp.array([[0.3, -0.2, 0.5, 0.1]]), jnp.array([1])
    log_p = jax.nn.log_softmax(logits)
    one = jnp.zeros(1)
    acted = Acted(log_p[:, 1] - jnp.log(ratio), ())
    batch = Minibatch(one, action, acted, one + advantage, one, one)

    def loss(logits):
        return algorithm.loss(Table(Categorical(logits), one), batch, state_of(algorithm))[0]

    expected = -advantage * ratio * (np.eye(4)[[1]] - np.exp(log_p)) if has_gradient else np.zeros((1, 4))
    gradient = np.asarray(jax.grad(loss)(logits))
    if has_gradient:
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    else:
        np.testing.assert_array_equal(gradient, expected)


# ---------------------------------------------------------------------------------------------------------- minibatches


def numbered_batch(length, instances):
    """Every field of a sample says its number."""
    number = jnp.arange(length * instances).reshape(length, instances)
    pair = jnp.stack([number, number], -1)
    return Minibatch(pair, number, Acted(number, Categorical(pair)), number, number, number)


def test_every_epoch_is_a_permutation():
    epochs, minibatches = 5, 3
    batch = shuffled_minibatches(numbered_batch(T, N), KEY, epochs, minibatches)
    assert batch.advantage.shape == (epochs * minibatches, T * N // minibatches)
    orders = np.asarray(batch.advantage).reshape(epochs, T * N)
    np.testing.assert_array_equal(np.sort(orders, -1), np.broadcast_to(np.arange(T * N), orders.shape))
    assert len({tuple(order) for order in orders}) == epochs
    for x in jax.tree.leaves(batch):  # what belongs together stays together
        pairs = np.broadcast_to(batch.advantage.reshape(batch.advantage.shape + (1,) * (x.ndim - 2)), x.shape)
        np.testing.assert_array_equal(x, pairs)
    other = shuffled_minibatches(numbered_batch(T, N), jax.random.PRNGKey(1), epochs, minibatches)
    assert not np.array_equal(other.advantage, batch.advantage)


def test_every_place_is_equally_likely():
    """Sample 0 falls into each of three minibatches a third of the time."""
    epochs = 3_000
    batch = shuffled_minibatches(numbered_batch(3, 2), KEY, epochs, 3)
    holds = np.asarray(batch.advantage == 0).any(-1).reshape(epochs, 3)
    assert np.all(holds.sum(-1) == 1)
    assert np.all(np.abs(holds.mean(0) - 1 / 3) < 4 * np.sqrt(2 / 9 / epochs))


@pytest.mark.parametrize("length, instances, minibatches, shape", [(5, 2, 4, (4, 2)), (1, 2, 4, (2, 1))])
def test_a_rollout_that_does_not_divide(length, instances, minibatches, shape):
    batch = shuffled_minibatches(numbered_batch(length, instances), KEY, 3, minibatches)
    assert batch.advantage.shape == (3 * shape[0], shape[1])
    for epoch in np.asarray(batch.advantage).reshape(3, -1):
        assert len(set(epoch)) == len(epoch)


# --------------------------------------------------------------------------------------------------------------- update


def random_rollout(algorithm, state, seed=0):
    generator = np.random.default_rng(seed)
    observation, next_observation = generator.normal(size=(2, T, N, 3)).astype(np.float32)
    action, _, extras = algorithm.act(state, (), jnp.asarray(observation), KEY)
    terminated = generator.random((T, N)) < 0.2
    truncated = (generator.random((T, N)) < 0.2) & ~terminated
    reward = generator.normal(size=(T, N)).astype(np.float32)
    next_observation = successors(observation, next_observation, terminated | truncated)
    rollout = Transition(observation, action, reward, next_observation, terminated, truncated, extras)
    return jax.tree.map(jnp.asarray, rollout)


def batch_of(algorithm, state, rollout):
    """What `update` makes minibatches of, with advantages by definition (PPO.2)."""
    net = state.actor_critic.net
    value, next_value = net.value(rollout.observation), net.value(rollout.next_observation)
    arguments = rollout.reward, value, next_value, rollout.terminated, rollout.truncated
    advantage = advantages_by_definition(*map(np.asarray, arguments), algorithm.discount, algorithm.gae_lambda)
    advantage = jnp.float32(advantage)
    return Minibatch(rollout.observation, rollout.action, rollout.extras, advantage, value, advantage + value)


@pytest.mark.parametrize("stop_kl", [None, 0.02])
def test_update(stop_kl):
    """Epochs and minibatches one by one, up to where the KL divergence first is above `stop_kl`."""
    algorithm = PlainPPO(hidden=(8,), learning_rate=0.3, epochs=4, minibatches=3, discount=0.9, stop_kl=stop_kl)
    state = algorithm.init(KEY, SPEC)
    rollout = random_rollout(algorithm, state)
    batch = batch_of(algorithm, state, rollout)
    pieces = shuffled_minibatches(batch, KEY, 4, 3)

    learned, kls = state.actor_critic, []
    step = jax.jit(
        lambda learned, piece: learned.minimise(lambda n: loss_of(algorithm, n, piece, state), optax.sgd(0.3))
    )
    for i in range(12):
        new, metrics = step(learned, jax.tree.map(lambda x, i=i: x[i], pieces))
        kls.append(float(metrics["kl"]))
        if stop_kl is not None and kls[-1] > stop_kl:
            break
        learned = new
    assert len(kls) == 12 if stop_kl is None else 2 < len(kls) < 12

    found, metrics = jax.jit(algorithm.update)(state, rollout, KEY)
    np.testing.assert_allclose(found.actor_critic.parameters, learned.parameters, rtol=1e-3, atol=1e-5)
    moved = np.abs(found.actor_critic.parameters - state.actor_critic.parameters).max()
    assert moved > 0.01
    if stop_kl is None:
        np.testing.assert_allclose(metrics["kl"], np.mean(kls), rtol=1e-3)
    target, value = np.float64(batch.target), np.float64(batch.value)
    expected = 1 - np.var(target - value) / np.var(target)
    np.testing.assert_allclose(metrics["explained_variance"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["value"], value.mean(), rtol=1e-4, atol=1e-6)


def test_early_stop_freezes_everything(monkeypatch):
    """After the stop, minibatches of nonsense leave parameters and optimiser as they are, to the bit."""
    algorithm = PPO(hidden=(8,), learning_rate=0.05, epochs=3, minibatches=2, stop_kl=1e-4)
    state = algorithm.init(KEY, SPEC)
    rollout = random_rollout(algorithm, state)
    results = []
    for factor in (1.0, 100.0):

        def spoiled(batch, key, epochs, minibatches, factor=factor):
            pieces = shuffled_minibatches(batch, key, epochs, minibatches)
            late = jnp.arange(epochs * minibatches) >= 2  # the second shows a KL above the limit, and is not taken
            return jax.tree.map(
                lambda x: jnp.where(late.reshape(-1, *[1] * (x.ndim - 1)), (factor * x).astype(x.dtype), x), pieces
            )

        monkeypatch.setattr(ppo, "shuffled_minibatches", spoiled)
        new, metrics = jax.jit(algorithm.update)(state, rollout, KEY)
        results.append(new.actor_critic)
        assert metrics["kl"] > 1e-4
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    count = optax.tree.get(results[0].optimiser_state, "count")
    assert int(count) == 1


def test_adaptive_kl_coefficient():
    """(PPO.7): β doubles where KL > 1.5 x target, halves where KL < target / 1.5, and else stays."""
    algorithm = PPO(hidden=(8,), learning_rate=0.01, epochs=3, minibatches=1, kl_penalty=0.7)
    state = algorithm.init(KEY, SPEC)
    rollout = random_rollout(algorithm, state)

    # What β is judged by: the KL divergence in the last epoch.
    learned = state.actor_critic
    pieces = shuffled_minibatches(batch_of(algorithm, state, rollout), KEY, 3, 1)
    for i in range(3):
        piece = jax.tree.map(lambda x, i=i: x[i], pieces)
        kl = numpy_kl(piece.extras.policy, learned.net.policy(piece.observation)).mean()
        learned, _ = learned.minimise(
            lambda n, p=piece: loss_of(algorithm, n, p, state), algorithm.optimiser(state.clock)
        )
    assert kl > 1e-4

    update = jax.jit(lambda kl_target: replace(algorithm, kl_target=kl_target).update(state, rollout, KEY)[0])
    for factor, expected in ((1 / 1.6, 1.4), (1 / 1.4, 0.7), (1.0, 0.7), (1.4, 0.7), (1.6, 0.35)):
        assert float(update(factor * kl).kl_coefficient) == pytest.approx(expected)


def test_gradient_clipping():
    """Adam's first moment after one step is a tenth of the clipped gradient."""
    algorithm = PPO(hidden=(8,), epochs=1, minibatches=1)
    state = algorithm.init(KEY, SPEC)
    rollout = random_rollout(algorithm, state)
    norms = []
    for limit in (0.25, 1e6):
        new, metrics = replace(algorithm, max_gradient_norm=limit).update(state, rollout, KEY)
        moment = np.linalg.norm(optax.tree.get(new.actor_critic.optimiser_state, "mu"))
        norms.append(metrics["gradient_norm"])
        np.testing.assert_allclose(moment, 0.1 * min(limit, norms[-1]), rtol=1e-4)
    assert norms[0] == norms[1] > 0.25


def test_learning_rate_schedule():
    """Half of the run over: half the step, of Adam's first."""
    steps = []
    algorithm = PPO(hidden=(8,), epochs=1, minibatches=1, learning_rate_schedule="linear")
    for done in (0, 500):
        state = state_of(algorithm, done)
        new, _ = algorithm.update(state, random_rollout(algorithm, state), KEY)
        steps.append(np.asarray(new.actor_critic.parameters - state.actor_critic.parameters))
    np.testing.assert_allclose(steps[1], steps[0] / 2, rtol=1e-2, atol=1e-7)


# --------------------------------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize("action_space", [spaces.Discrete(ACTIONS), spaces.Box(-1, 1, (2,), np.float32)])
@pytest.mark.parametrize("kl_penalty", [None, 0.5])
def test_act_records_its_probability(action_space, kl_penalty):
    algorithm = PPO(hidden=(8,), kl_penalty=kl_penalty)
    state = algorithm.init(KEY, replace(SPEC, action_space=action_space))
    observation = jax.random.normal(KEY, (B, 3))
    action, carry, extras = algorithm.act(state, (), observation, KEY)
    pi = state.actor_critic.net.policy(observation)
    assert carry == () and action.shape[0] == B
    np.testing.assert_allclose(extras.log_prob, numpy_policy(pi, action)[0], rtol=1e-4)
    if kl_penalty is None:
        assert extras.policy == ()
    else:
        np.testing.assert_allclose(extras.policy.kl(pi), 0.0, atol=1e-6)
    np.testing.assert_array_equal(algorithm.policy(state, observation), pi.mode)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"minibatches": 5}, "does not divide into 5 minibatches"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"rollout_length": 0}, "rollout_length"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=message):
        PPO(**settings).check(SPEC)
