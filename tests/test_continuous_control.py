"""DDPG, TD3 and SAC in all its forms, step by step against NumPy in double precision, gradients by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces

from zhixing.algorithms.ddpg import DDPG
from zhixing.algorithms.discrete_sac import DiscreteSAC
from zhixing.algorithms.sac import SAC
from zhixing.algorithms.td3 import TD3
from zhixing.continuous import ActionValue
from zhixing.core import CONTINUOUS, Spec, hyperparameters
from zhixing.errors import UsageError
from zhixing.exploration import ornstein_uhlenbeck
from zhixing.learned import Vector
from zhixing.networks import Ensemble
from zhixing.transition import Experience

OBSERVATIONS, ACTIONS, B = 3, 2, 5
SPEC = Spec(spaces.Box(-1, 1, (OBSERVATIONS,), np.float32), spaces.Box(-1, 1, (ACTIONS,), np.float32), 4, 1_000)
DISCRETE_SPEC = Spec(SPEC.observation_space, spaces.Discrete(3), 4, 1_000)
RATE, CRITIC_RATE, POLYAK = 0.05, 0.02, 0.3
KEY = jax.random.PRNGKey(3)


update = jax.jit(lambda algorithm, state, batch, key: algorithm.update(state, batch, key))


class Plain:
    """Gradient steps without Adam: what a step was tells its gradient."""

    def optimiser(self, clock):
        return optax.sgd(self.learning_rate)

    def critic_optimiser(self, clock):
        return optax.sgd(self.critic_learning_rate)


@hyperparameters
class PlainDDPG(Plain, DDPG):
    pass


@hyperparameters
class PlainTD3(Plain, TD3):
    pass


@hyperparameters
class PlainSAC(Plain, SAC):
    pass


@hyperparameters
class PlainDiscreteSAC(Plain, DiscreteSAC):
    pass


def make(cls, spec=SPEC, **settings):
    algorithm = cls(hidden=(4,), learning_rate=RATE, critic_learning_rate=CRITIC_RATE, polyak=POLYAK, **settings)
    return algorithm, moved_targets(algorithm.init(KEY, spec))


def moved_targets(state):
    """`state` with target networks that are not those that learn."""

    def move(vector):
        return Vector(vector.parameters + 0.1 * jax.random.normal(KEY, vector.parameters.shape), vector.structure)

    targets = {name: move(getattr(state, name)) for name in state._fields if "target" in name}
    return state._replace(**targets)


def make_batch():
    rng = np.random.default_rng(0)
    observation, next_observation = rng.normal(size=(2, B, OBSERVATIONS))
    action = rng.uniform(-1, 1, (B, ACTIONS))
    discount = np.array([0.9, 0.9, 0.0, 0.81, 0.9])  # the third episode terminated, the fourth took two steps
    batch = Experience(observation, action, rng.normal(size=B), next_observation, discount, rng.uniform(0.5, 1, B))
    return jax.tree.map(jnp.float32, batch), batch


# ------------------------------------------------------------------------------------------------- in double precision


def double(vector):
    return np.asarray(vector.parameters, np.float64)


def network(parameters, vector):
    """The network of `vector` with other parameters, as NumPy arrays."""
    return Vector(parameters, vector.structure).net


def forward(mlp, x):
    for weight, bias in zip(mlp.weights[:-1], mlp.biases[:-1], strict=True):
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ mlp.weights[-1].T + mlp.biases[-1]


def action_values(ensemble, observation, action):
    """[K, B]."""
    x = np.concatenate([observation, action], -1)
    members = [jax.tree.map(lambda leaf, k=k: leaf[k], ensemble.members) for k in range(ensemble.count)]
    return np.stack([forward(member.mlp, x)[:, 0] for member in members])


def squashed(actor, observation, noise):
    """-> tanh(μ + σ ε), and its log-probability by the change of variables."""
    mean, log_std = np.split(forward(actor.mlp, observation), 2, axis=-1)
    u = mean + np.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (normal - np.log(1 - np.tanh(u) ** 2)).sum(-1)


def gradient(function, parameters, epsilon=1e-6):
    steps = epsilon * np.eye(len(parameters))
    return np.array([(function(parameters + d) - function(parameters - d)) / (2 * epsilon) for d in steps])


def assert_stepped(before, after, rate, loss):
    """`after` is `before` one gradient step of `rate` down `loss` (of the network)."""
    expected = gradient(lambda p: loss(network(p, before)), double(before))
    assert np.abs(expected).max() > 1e-3
    actual = (double(before) - double(after)) / rate
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=2e-5)


def assert_polyak(before, learned, after):
    np.testing.assert_allclose(double(after), (1 - POLYAK) * double(before) + POLYAK * double(learned), atol=1e-6)


def critic_loss(batch, target):
    def loss(ensemble):
        q = action_values(ensemble, batch.observation, batch.action)
        return (batch.weight * (q - target) ** 2).mean(-1).sum()

    return loss


def td_errors(critics, batch, target):
    return np.abs(action_values(network(double(critics), critics), batch.observation, batch.action) - target).mean(0)


# ----------------------------------------------------------------------------------------------------------- DDPG, TD3


def test_ddpg():
    algorithm, state = make(PlainDDPG)
    batch, exact = make_batch()
    new, metrics = update(algorithm, state, batch, KEY)

    next_action = np.tanh(forward(network(double(state.actor_target), state.actor_target).mlp, exact.next_observation))
    target_critics = network(double(state.critics_target), state.critics_target)
    target = exact.reward + exact.discount * action_values(target_critics, exact.next_observation, next_action)[0]
    assert_stepped(state.critics, new.critics, CRITIC_RATE, critic_loss(exact, target))
    np.testing.assert_allclose(metrics["td_error"], td_errors(state.critics, exact, target), rtol=1e-4)

    critics = network(double(new.critics), new.critics)

    def actor_loss(actor):
        action = np.tanh(forward(actor.mlp, exact.observation))
        return -action_values(critics, exact.observation, action)[0].mean()

    assert_stepped(state.actor, new.actor, RATE, actor_loss)
    assert_polyak(state.actor_target, new.actor, new.actor_target)
    assert_polyak(state.critics_target, new.critics, new.critics_target)


def test_td3():
    """Smoothing, the smaller of two critics, and an actor that waits for every second update."""
    algorithm, state = make(PlainTD3, smoothing_std=0.8, smoothing_clip=0.5)
    batch, exact = make_batch()
    first, metrics = update(algorithm, state, batch, KEY)

    smoothing_key, _ = jax.random.split(KEY)
    noise = np.clip(0.8 * np.asarray(jax.random.normal(smoothing_key, (B, ACTIONS)), np.float64), -0.5, 0.5)
    assert np.sum(np.abs(noise) == 0.5) > 0  # some were clipped
    mean = np.tanh(forward(network(double(state.actor_target), state.actor_target).mlp, exact.next_observation))
    next_action = np.clip(mean + noise, -1, 1)
    target_critics = network(double(state.critics_target), state.critics_target)
    next_q = action_values(target_critics, exact.next_observation, next_action)
    assert len(set(next_q.argmin(0))) == 2  # each critic is the smaller one somewhere
    target = exact.reward + exact.discount * next_q.min(0)
    assert_stepped(state.critics, first.critics, CRITIC_RATE, critic_loss(exact, target))
    np.testing.assert_allclose(metrics["td_error"], td_errors(state.critics, exact, target), rtol=1e-4)
    for name in ("actor", "actor_target", "critics_target"):
        np.testing.assert_array_equal(getattr(first, name).parameters, getattr(state, name).parameters)

    waited = first._replace(clock=first.clock.tick(updates=1))
    second, _ = update(algorithm, waited, batch, KEY)
    critics = network(double(second.critics), second.critics)

    def actor_loss(actor):
        action = np.tanh(forward(actor.mlp, exact.observation))
        return -action_values(critics, exact.observation, action)[0].mean()

    assert_stepped(waited.actor, second.actor, RATE, actor_loss)
    assert_polyak(waited.actor_target, second.actor, second.actor_target)
    assert_polyak(waited.critics_target, second.critics, second.critics_target)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_actor_of_td3_moves_every_so_many_updates(delay):
    algorithm, state = make(PlainTD3, policy_delay=delay)
    batch, _ = make_batch()
    moved = []
    for _ in range(6):
        new, _ = update(algorithm, state, batch, KEY)
        moved.append(not np.array_equal(new.actor.parameters, state.actor.parameters))
        state = new._replace(clock=new.clock.tick(updates=1))
    assert moved == [(i + 1) % delay == 0 for i in range(6)]


def test_smoothed_actions():
    """Their noise has the standard deviation that is asked for, within its bounds and those of the actions."""
    algorithm = TD3(smoothing_std=0.1, smoothing_clip=0.25)
    action = algorithm.smoothed(jnp.zeros((20_000, 1)), KEY)
    assert float(jnp.abs(action).max()) == pytest.approx(0.25)
    kept = np.asarray(action)[np.abs(action) < 0.249]
    assert kept.std() == pytest.approx(0.1, rel=0.05)  # a normal cut at 2.5 of its standard deviations: 0.0964
    assert float(algorithm.smoothed(jnp.full((1_000, 1), 0.95), KEY).max()) == 1.0


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_exploration(cls):
    """The actor's action and Gaussian noise, clipped; uniformly random actions before the learning starts."""
    algorithm = cls(hidden=(4,), noise_std=0.2, learning_starts=100)
    state, observation = algorithm.init(KEY, SPEC), jnp.zeros((4_000, OBSERVATIONS))
    action, carry, _ = algorithm.act(state, (), observation, KEY)
    assert carry == () and algorithm.carry(SPEC, KEY) == ()
    assert float(jnp.abs(action.mean())) < 0.03 and float(action.std()) == pytest.approx(3**-0.5, rel=0.03)
    state = state._replace(clock=state.clock.tick(steps=100))
    action, _, _ = algorithm.act(state, (), observation, KEY)
    noise = action - algorithm.policy(state, observation)
    assert float(noise.std()) == pytest.approx(0.2, rel=0.03)
    assert float(jnp.abs(action).max()) <= 1.0


def test_ornstein_uhlenbeck_noise():
    """The correlation between steps and the standard deviation in the end are those of its formula."""
    theta, sigma, dt = 0.5, 0.3, 0.2
    keys = jax.random.split(KEY, 400)
    noise = jax.lax.scan(lambda x, k: (ornstein_uhlenbeck(k, x, theta, sigma, dt),) * 2, jnp.zeros(2_000), keys)[1][
        100:
    ]
    assert float(noise.std()) == pytest.approx(sigma / np.sqrt(2 * theta - theta**2 * dt), rel=0.02)
    correlation = float((noise[1:] * noise[:-1]).mean() / (noise**2).mean())
    assert correlation == pytest.approx(1 - theta * dt, abs=0.01)


def test_ornstein_uhlenbeck_noise_is_carried():
    algorithm = DDPG(hidden=(4,), noise="ornstein_uhlenbeck", noise_std=0.5, noise_dt=0.1, learning_starts=0)
    state, observation = algorithm.init(KEY, SPEC), jnp.zeros((4, OBSERVATIONS))
    carry = algorithm.carry(SPEC, KEY)
    np.testing.assert_array_equal(carry, np.zeros((4, ACTIONS)))
    action, carry, _ = algorithm.act(state, carry, observation, KEY)
    noise_key, _ = jax.random.split(KEY)
    np.testing.assert_allclose(carry, 0.5 * np.sqrt(0.1) * jax.random.normal(noise_key, carry.shape), rtol=1e-5)
    np.testing.assert_allclose(action, algorithm.policy(state, observation) + carry, atol=1e-6)
    again, after, _ = algorithm.act(state, carry, observation, KEY)
    np.testing.assert_allclose(after, (1 - 0.15 * 0.1) * carry + carry, rtol=1e-5)
    np.testing.assert_allclose(again, np.clip(algorithm.policy(state, observation) + after, -1, 1), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- SAC


def draw(key):
    return np.asarray(jax.random.normal(key, (B, ACTIONS)), np.float64)


@pytest.mark.parametrize("fixed", [None, 0.3])
def test_sac(fixed):
    algorithm, state = make(PlainSAC, temperature=fixed, initial_temperature=0.3)
    batch, exact = make_batch()
    new, metrics = update(algorithm, state, batch, KEY)
    next_key, key, _ = jax.random.split(KEY, 3)

    actor = network(double(state.actor), state.actor)
    next_action, next_log_prob = squashed(actor, exact.next_observation, draw(next_key))
    target_critics = network(double(state.target), state.target)
    next_q = action_values(target_critics, exact.next_observation, next_action).min(0)
    target = exact.reward + exact.discount * (next_q - 0.3 * next_log_prob)
    assert_stepped(state.critics, new.critics, CRITIC_RATE, critic_loss(exact, target))
    np.testing.assert_allclose(metrics["td_error"], td_errors(state.critics, exact, target), rtol=1e-4)
    assert_sac_actor(state, new, exact, draw(key))
    assert_polyak(state.target, new.critics, new.target)

    _, log_prob = squashed(actor, exact.observation, draw(key))
    assert float(metrics["entropy"]) == pytest.approx(-log_prob.mean(), rel=1e-4)
    moved = 0.0 if fixed else RATE * 0.3 * (log_prob - ACTIONS).mean()
    assert float(new.temperature.log_alpha) == pytest.approx(np.log(0.3) + moved, rel=1e-5)


def assert_sac_actor(state, new, batch, noise):
    critics = network(double(new.critics), new.critics)

    def actor_loss(actor):
        action, log_prob = squashed(actor, batch.observation, noise)
        return (0.3 * log_prob - action_values(critics, batch.observation, action).min(0)).mean()

    assert_stepped(state.actor, new.actor, RATE, actor_loss)


def test_first_form_of_sac():
    """Targets come from V's target network, and V learns the soft value of fresh actions."""
    algorithm, state = make(PlainSAC, state_value=True, temperature=0.3)
    batch, exact = make_batch()
    new, _ = update(algorithm, state, batch, KEY)
    _, key, _ = jax.random.split(KEY, 3)

    target_value = forward(network(double(state.target), state.target).mlp, exact.next_observation)[:, 0]
    target = exact.reward + exact.discount * target_value
    assert_stepped(state.critics, new.critics, CRITIC_RATE, critic_loss(exact, target))
    assert_sac_actor(state, new, exact, draw(key))

    action, log_prob = squashed(network(double(state.actor), state.actor), exact.observation, draw(key))
    critics = network(double(new.critics), new.critics)
    soft_value = action_values(critics, exact.observation, action).min(0) - 0.3 * log_prob

    def value_loss(v):
        return ((forward(v.mlp, exact.observation)[:, 0] - soft_value) ** 2).mean()

    assert_stepped(state.state_value, new.state_value, CRITIC_RATE, value_loss)
    assert_polyak(state.target, new.state_value, new.target)


@pytest.mark.parametrize("target_entropy", [0.5, -0.5])
def test_learned_temperature_brings_the_entropy_to_its_target(target_entropy):
    """With episodes of one step and a reward of -2a²."""
    algorithm = SAC(hidden=(16,), learning_rate=1e-2, critic_learning_rate=1e-2, target_entropy=target_entropy)
    observation = jnp.zeros((64, OBSERVATIONS))

    @jax.jit
    def several(state):
        def one(state, key):
            action_key, key = jax.random.split(key)
            action = jax.random.uniform(action_key, (64, ACTIONS), minval=-1.0)
            reward = jnp.sum(-2 * action**2, -1)
            batch = Experience(observation, action, reward, observation, jnp.zeros(64), jnp.ones(64))
            state, metrics = algorithm.update(state, batch, key)
            return state, (metrics["entropy"], metrics["temperature"])

        return jax.lax.scan(one, state, jax.random.split(KEY, 3_000))[1]

    entropy, temperature = several(algorithm.init(KEY, SPEC))
    assert float(entropy[-500:].mean()) == pytest.approx(target_entropy, abs=0.1)
    assert float(temperature[-1]) < 0.9  # it began at 1


def test_actions_of_sac():
    algorithm = SAC(hidden=(4,), learning_starts=100)
    state, observation = algorithm.init(KEY, SPEC), jnp.zeros((4_000, OBSERVATIONS))
    random, _, _ = algorithm.act(state, (), observation, KEY)
    assert float(random.std()) == pytest.approx(3**-0.5, rel=0.03)  # uniform before the learning starts
    state = state._replace(clock=state.clock.tick(steps=100))
    action, _, _ = algorithm.act(state, (), observation, KEY)
    pi = state.actor(observation)
    np.testing.assert_allclose(action, pi.sample(jax.random.split(KEY)[0]), atol=1e-6)
    np.testing.assert_allclose(algorithm.policy(state, observation), jnp.tanh(pi.mean), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- discrete SAC


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def member_values(ensemble, observation):
    """[K, B, A]."""
    members = [jax.tree.map(lambda leaf, k=k: leaf[k], ensemble.members) for k in range(ensemble.count)]
    return np.stack([forward(member.advantage, observation) for member in members])


@pytest.mark.parametrize("fixed", [None, 0.3])
def test_discrete_sac(fixed):
    """Every expectation over actions is a sum."""
    algorithm, state = make(
        PlainDiscreteSAC, DISCRETE_SPEC, temperature=fixed, initial_temperature=0.3, target_entropy_share=0.7
    )
    batch, exact = make_batch()
    action = np.array([0, 2, 1, 1, 2])
    batch, exact = batch._replace(action=jnp.int32(action)), exact._replace(action=action)
    new, metrics = update(algorithm, state, batch, KEY)

    log_p = log_softmax(forward(network(double(state.actor), state.actor).advantage, exact.next_observation))
    next_q = member_values(network(double(state.critics_target), state.critics_target), exact.next_observation).min(0)
    target = exact.reward + exact.discount * (np.exp(log_p) * (next_q - 0.3 * log_p)).sum(-1)

    def critic_loss(ensemble):
        q = member_values(ensemble, exact.observation)[:, np.arange(B), action]
        return (exact.weight * (q - target) ** 2).mean(-1).sum()

    assert_stepped(state.critics, new.critics, CRITIC_RATE, critic_loss)
    q = member_values(network(double(new.critics), new.critics), exact.observation).min(0)

    def actor_loss(actor):
        log_p = log_softmax(forward(actor.advantage, exact.observation))
        return (np.exp(log_p) * (0.3 * log_p - q)).sum(-1).mean()

    assert_stepped(state.actor, new.actor, RATE, actor_loss)
    assert_polyak(state.critics_target, new.critics, new.critics_target)

    log_p = log_softmax(forward(network(double(state.actor), state.actor).advantage, exact.observation))
    entropy = -(np.exp(log_p) * log_p).sum(-1).mean()
    assert float(metrics["entropy"]) == pytest.approx(entropy, rel=1e-4)
    moved = 0.0 if fixed else RATE * 0.3 * (0.7 * np.log(3) - entropy)
    assert float(new.temperature.log_alpha) == pytest.approx(np.log(0.3) + moved, rel=1e-5)


def test_actions_of_discrete_sac():
    algorithm = DiscreteSAC(hidden=(4,), learning_starts=100)
    state, observation = algorithm.init(KEY, DISCRETE_SPEC), jnp.full((6_000, OBSERVATIONS), 4.0)
    random, _, _ = algorithm.act(state, (), observation, KEY)
    np.testing.assert_allclose(np.bincount(random) / 6_000, [1 / 3] * 3, atol=0.03)  # before the learning starts
    state = state._replace(clock=state.clock.tick(steps=100))
    action, _, _ = algorithm.act(state, (), observation, KEY)
    p = jax.nn.softmax(state.actor(observation[0]))
    assert float(jnp.abs(p - 1 / 3).max()) > 0.05
    np.testing.assert_allclose(np.bincount(action, minlength=3) / 6_000, p, atol=0.03)
    assert int(algorithm.policy(state, observation)[0]) == int(p.argmax())


# ------------------------------------------------------------------------------------------------------------ networks


def test_ensemble_is_its_members():
    critics = Ensemble.create(lambda k: ActionValue.create(k, SPEC, SAC(hidden=(8, 8))), KEY, 3)
    observation, action = jnp.ones((B, OBSERVATIONS)), jnp.ones((B, ACTIONS))
    together = critics(observation, action)
    for k in range(3):
        alone = ActionValue.create(jax.random.split(KEY, 3)[k], SPEC, SAC(hidden=(8, 8)))
        np.testing.assert_allclose(together[k], alone(observation, action), rtol=1e-5)
    np.testing.assert_allclose(critics.first(observation, action), together[0], rtol=1e-5)


def test_layer_normalisation():
    net = ActionValue.create(KEY, SPEC, SAC(hidden=(8,), layer_norm=True))
    gain, offset = np.random.default_rng(0).normal(size=(2, 8))
    net.mlp.norms[0] = jnp.float32([gain, offset])
    x = np.random.default_rng(1).normal(size=(B, OBSERVATIONS + ACTIONS))
    hidden = x @ np.asarray(net.mlp.weights[0], np.float64).T
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    expected = np.maximum(gain * hidden + offset, 0) @ np.asarray(net.mlp.weights[1], np.float64).T
    actual = net(jnp.float32(x[:, :OBSERVATIONS]), jnp.float32(x[:, OBSERVATIONS:]))
    np.testing.assert_allclose(actual, expected[:, 0], rtol=1e-3, atol=1e-4)


def test_dropout():
    """Half of the units are left out of an update, the others count double; nothing is left out without a key."""
    net = ActionValue.create(KEY, SPEC, SAC(hidden=(200,), dropout=0.5))
    observation, action = jnp.ones((1, OBSERVATIONS)), jnp.ones((1, ACTIONS))
    x = jnp.concatenate([observation, action], -1)
    whole, dropped = net.mlp.hidden(x), net.mlp.hidden(x, KEY)
    active = np.asarray(whole) > 0
    kept = np.asarray(dropped) > 0
    assert not np.any(kept & ~active)
    assert 0.3 < kept[active].mean() < 0.7
    np.testing.assert_allclose(np.asarray(dropped)[kept], 2 * np.asarray(whole)[kept], rtol=1e-5)
    np.testing.assert_array_equal(net(observation, action), net(observation, action))


def test_dropped_units_change_from_update_to_update():
    algorithm, state = make(PlainSAC, dropout=0.5)
    batch, _ = make_batch()
    losses = {float(update(algorithm, state, batch, k)[1]["q"]) for k in jax.random.split(KEY, 8)}
    assert len(losses) > 2


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("cls", [DDPG, TD3, SAC])
def test_actions_must_be_bounded_boxes(cls):
    observation = spaces.Box(-1, 1, (3,), np.float32)
    assert cls.action_spaces == CONTINUOUS
    with pytest.raises(UsageError, match=rf"^{cls.__name__} needs Box actions, this environment has Discrete\(2\)"):
        cls().check(Spec(observation, spaces.Discrete(2), 1, 100))
    with pytest.raises(UsageError, match=r"must be a Box with one axis and finite bounds; wrap the environment$"):
        cls().check(Spec(observation, spaces.Box(-np.inf, np.inf, (2,), np.float32), 1, 100))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (DDPG(polyak=1.5), "algorithm.polyak is 1.5; it must be from 0 to 1"),
        (DDPG(noise_std=-1.0), "algorithm.noise_std is -1.0; it must be 0 or more"),
        (TD3(policy_delay=0), "algorithm.policy_delay is 0; it must be above 0"),
        (TD3(dropout=1.0), "algorithm.dropout is 1.0; it must be from 0 to 0.99"),
        (SAC(temperature=-0.1), "algorithm.temperature is -0.1; it must be 0 or more"),
        (SAC(critic_learning_rate=0.0), "algorithm.critic_learning_rate is 0.0; it must be above 0"),
    ],
)
def test_bad_settings(algorithm, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        algorithm.check(SPEC)
