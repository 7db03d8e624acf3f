"""Networks against NumPy in float64, and the gradient step against Optax on the plain pytree."""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from scipy import special

from zhixing import schedules
from zhixing.core import Spec
from zhixing.distributions import Bernoulli, Categorical, DiagonalNormal, MultiCategorical
from zhixing.errors import UsageError
from zhixing.learned import Learned, Vector
from zhixing.networks import MLP, ActorCritic, Encoder, QNetwork

KEY = jax.random.PRNGKey(0)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
ACTIVATIONS = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}


def numpy_mlp(mlp, x, activation):
    layers = [(np.float64(w.T), np.float64(b)) for w, b in zip(mlp.weights, mlp.biases, strict=True)]
    for weight, bias in layers[:-1]:
        x = activation(x @ weight + bias)
    return x @ layers[-1][0] + layers[-1][1]


def shifted(net):
    """With parameters that are not the special initial ones."""
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), net)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4)])
def test_mlp(activation, leading):
    mlp = shifted(MLP.create(KEY, 3, 16, 8, 2, activation=activation))
    x = np.random.default_rng(0).normal(size=(*leading, 3))
    expected = numpy_mlp(mlp, x, ACTIVATIONS[activation])
    assert expected.shape == (*leading, 2)
    np.testing.assert_allclose(mlp(jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)


def test_mlp_starts_orthogonal():
    mlp = MLP.create(KEY, 16, 16, 16, output_scale=0.01)
    for weight, scale in zip(mlp.weights, (2**0.5, 0.01), strict=True):
        np.testing.assert_allclose(weight.T @ weight, scale**2 * np.eye(16), atol=1e-5 * scale)
    assert all(not np.any(bias) for bias in mlp.biases)


@pytest.mark.parametrize(
    "space, observation, expected",
    [
        (spaces.Box(-1, 1, (2, 2), np.float32), [[1.0, 2.0], [3.0, 4.0]], [1, 2, 3, 4]),
        (spaces.Box(0, 255, (2,), np.uint8), np.uint8([7, 255]), [7, 255]),
        (spaces.Box(-1, 1, (), np.float32), 0.5, [0.5]),
        (spaces.MultiBinary(3), np.int8([1, 0, 1]), [1, 0, 1]),
        (spaces.Discrete(3), 2, [0, 0, 1]),
        (spaces.MultiDiscrete([2, 3]), [1, 0], [0, 1, 1, 0, 0]),
    ],
)
def test_encoder(space, observation, expected):
    encoder = Encoder.of(space)
    assert encoder.size == len(expected)
    np.testing.assert_array_equal(encoder(jnp.asarray(observation)), expected)
    repeated = jnp.broadcast_to(jnp.asarray(observation), (4, 5, *np.shape(observation)))
    np.testing.assert_array_equal(encoder(repeated), np.broadcast_to(expected, (4, 5, len(expected))))
    assert encoder(repeated).dtype == jnp.float32


def test_encoder_of_several_parts():
    """One after the other, without the mask of the actions."""
    space = spaces.Dict({"b": spaces.Discrete(2), "a": VECTOR, "action_mask": spaces.MultiBinary(5)})
    observation = {"a": jnp.ones((4, 3)), "b": jnp.ones(4, jnp.int32), "action_mask": jnp.ones((4, 5))}
    encoder = Encoder.of(space)
    assert encoder.size == 5
    np.testing.assert_array_equal(encoder(observation), [[1, 1, 1, 0, 1]] * 4)
    pair = Encoder.of(spaces.Tuple((VECTOR, spaces.Discrete(2))))
    np.testing.assert_array_equal(pair((jnp.zeros(3), jnp.int32(0))), [0, 0, 0, 1, 0])


def test_encoder_says_what_it_cannot_read():
    with pytest.raises(UsageError, match="FlattenObservation"):
        Encoder.of(spaces.Text(5))


def test_q_network():
    net = shifted(QNetwork.create(KEY, VECTOR, 4, (8,)))
    x = np.random.default_rng(0).normal(size=(5, 3))
    expected = numpy_mlp(net.advantage, x, ACTIVATIONS["relu"])
    np.testing.assert_allclose(net(jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [(8,), (16, 8), (16, 12, 8)])
@pytest.mark.parametrize("dueling, centre", [("mean", np.mean), ("max", np.max)])
def test_dueling(dueling, centre, hidden):
    """Q = V + A - centre of A; the streams share all layers but their own last two."""
    relu = ACTIVATIONS["relu"]
    net = shifted(QNetwork.create(KEY, VECTOR, 4, hidden, dueling=dueling))
    x = np.random.default_rng(0).normal(size=(5, 3))
    features = relu(numpy_mlp(net.trunk, x, relu)) if len(hidden) > 1 else x
    value, advantage = numpy_mlp(net.state_value, features, relu), numpy_mlp(net.advantage, features, relu)
    assert value.shape == (5, 1) and advantage.shape == (5, 4)
    q = np.asarray(net(jnp.float32(x)))
    np.testing.assert_allclose(q, value + advantage - centre(advantage, -1, keepdims=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(centre(q, -1), value[:, 0], rtol=1e-4, atol=1e-5)  # V is what it should be


@dataclass(frozen=True)
class Settings:
    """What an algorithm says about its actor-critic."""

    hidden: tuple[int, ...] = (8,)
    activation: str = "tanh"
    shared_trunk: bool = False
    state_dependent_std: bool = False
    initial_log_std: float = 0.0
    gsde_interval: int | None = None


def actor_critic(action_space, observation_space=VECTOR, **settings):
    return ActorCritic.create(KEY, Spec(observation_space, action_space, 5, 1), Settings(**settings))


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_actor_critic_discrete(shared_trunk):
    net = shifted(actor_critic(spaces.Discrete(4), hidden=(8, 6), shared_trunk=shared_trunk))
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    features = np.tanh(numpy_mlp(net.trunk, x, np.tanh)) if shared_trunk else x
    policy = net.policy(jnp.float32(x))
    assert isinstance(policy, Categorical) and net.log_std is None
    np.testing.assert_allclose(policy.logits, numpy_mlp(net.actor, features, np.tanh), rtol=1e-4, atol=1e-5)
    value = numpy_mlp(net.critic, features, np.tanh)[..., 0]
    np.testing.assert_allclose(net.value(jnp.float32(x)), value, rtol=1e-4, atol=1e-5)
    sizes = [3, 8, 6] if shared_trunk else [3, 8, 6, 4]
    found = (net.trunk if shared_trunk else net.actor).weights
    assert [w.shape[::-1] for w in found] == list(pairwise(sizes))


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_actor_critic_continuous(shared_trunk, state_dependent_std):
    settings = {"shared_trunk": shared_trunk, "state_dependent_std": state_dependent_std, "initial_log_std": -0.7}
    net = actor_critic(spaces.Box(-1, 1, (2,), np.float32), **settings)
    x = jnp.float32(np.random.default_rng(0).normal(size=(5, 3)))
    policy = net.policy(x)
    assert isinstance(policy, DiagonalNormal) and policy.mean.shape == policy.log_std.shape == (5, 2)
    np.testing.assert_allclose(policy.log_std, -0.7, atol=0.05)
    assert np.all(np.abs(policy.mean) < 0.1)  # the output layer starts small: all actions alike
    rows = np.ptp(np.asarray(shifted(net).policy(x).log_std), axis=0)
    assert np.all(rows > 1e-3) if state_dependent_std else np.all(rows == 0)


def test_actor_critic_of_several_indices():
    space = spaces.MultiDiscrete([2, 3])
    x = jnp.ones((5, 3))
    policy = shifted(actor_critic(space)).policy(x)
    assert isinstance(policy, MultiCategorical) and policy.sizes == (2, 3) and policy.logits.shape == (5, 5)
    assert all(space.contains(np.int64(action)) for action in policy.sample(KEY))
    space = spaces.MultiBinary(3)
    policy = shifted(actor_critic(space)).policy(x)
    assert isinstance(policy, Bernoulli) and policy.logits.shape == (5, 3)
    assert all(space.contains(np.asarray(action)) for action in policy.sample(KEY))
    for unfit in (spaces.Text(5), spaces.Box(-1, 1, (2, 2))):
        with pytest.raises(UsageError, match="flatten it"):
            actor_critic(unfit)


def test_action_mask():
    """The policy, its mode and its samples are those given that the action is allowed."""
    space = spaces.Dict({"observation": VECTOR, "action_mask": spaces.MultiBinary(4)})
    net = shifted(actor_critic(spaces.Discrete(4), space))
    x, mask = jnp.ones((5, 3)), np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]])
    policy = net.policy({"observation": x, "action_mask": jnp.int8(mask)})
    free = special.softmax(np.float64(net.actor(x)), -1) * mask
    np.testing.assert_allclose(np.exp(jax.nn.log_softmax(policy.logits)), free / free.sum(-1, keepdims=True), rtol=1e-5)
    samples = np.asarray(jax.vmap(policy.sample)(jax.random.split(KEY, 2_000)))
    assert np.all(mask[np.arange(5), samples])
    assert np.all(mask[np.arange(5), np.asarray(policy.mode)])


def test_gsde():
    """(SDE.1) with the noise of the carry, which is renewed every second step; (SDE.2) is its variance."""
    space = spaces.Box(-1, 1, (2,), np.float32)
    settings = Settings(gsde_interval=2, initial_log_std=-0.5)
    net = shifted(ActorCritic.create(KEY, Spec(VECTOR, space, 5, 1), settings))
    x = jax.random.normal(KEY, (5, 3))
    features = np.tanh(np.float64(x) @ np.float64(net.actor.weights[0].T) + np.float64(net.actor.biases[0]))
    std = np.exp(np.float64(net.log_std))
    policy = net.policy(x)
    np.testing.assert_allclose(np.exp(2 * policy.log_std), features**2 @ std**2, rtol=1e-4, atol=1e-5)

    carry, seen = ActorCritic.carry(KEY, Spec(VECTOR, space, 5, 1), settings), []
    for step in range(4):
        action, carry, pi = net.act(carry, x, jax.random.PRNGKey(step))
        expected = np.einsum("nh,nhd->nd", features, std * np.float64(carry.noise))
        np.testing.assert_allclose(action - pi.mode, expected, rtol=1e-3, atol=1e-5)
        seen.append(np.asarray(carry.noise))
    assert np.array_equal(seen[0], seen[1]) and np.array_equal(seen[2], seen[3]) and not np.any(seen[1] == seen[2])
    draws = jax.vmap(lambda key: net.act(ActorCritic.carry(key, Spec(VECTOR, space, 5, 1), settings), x, key)[0])
    actions = np.asarray(draws(jax.random.split(KEY, 4_000)))
    np.testing.assert_allclose(actions.std(0), np.exp(policy.log_std), rtol=0.1)
    assert ActorCritic.carry(KEY, Spec(VECTOR, spaces.Discrete(2), 5, 1), settings) == ()


def test_gsde_moves_only_its_scale():
    """The variance's gradient stops at the features: they learn from the mean alone."""
    net = shifted(actor_critic(spaces.Box(-1, 1, (2,), np.float32), gsde_interval=2))
    gradient = jax.grad(lambda net: net.policy(jnp.ones((5, 3))).entropy().sum())(net)
    assert np.all(gradient.log_std != 0)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient.actor))


# ------------------------------------------------------------------------------------------------ vector and optimiser


def test_vector_is_the_network():
    net = shifted(actor_critic(spaces.Discrete(4)))
    vector = Vector.of(net)
    assert vector.parameters.shape == (sum(x.size for x in jax.tree.leaves(net)),)
    jax.tree.map(np.testing.assert_array_equal, vector.net, net)


def test_minimise_is_optax_on_the_pytree():
    optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    net = shifted(MLP.create(KEY, 3, 8, 2))
    x, y = jax.random.normal(KEY, (10, 3)), jnp.ones((10, 2))

    def loss(net):
        error = jnp.square(net(x) - y).mean()
        return error, {"error": error}

    learned, plain, plain_state = Learned.create(net, optimiser), net, optimiser.init(net)
    for _ in range(4):
        gradient, expected = jax.grad(loss, has_aux=True)(plain)
        step, plain_state = optimiser.update(gradient, plain_state, plain)
        plain = optax.apply_updates(plain, step)
        learned, metrics = learned.minimise(loss, optimiser)
        np.testing.assert_allclose(metrics["error"], expected["error"], rtol=1e-5)
        norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), learned.net, plain)
    np.testing.assert_array_equal(learned(x), learned.frozen(x))


# ----------------------------------------------------------------------------------------------------------- schedules


def test_linear_schedule():
    progress = jnp.array([0.0, 0.1, 0.2, 0.4, 0.9, 1.0])
    np.testing.assert_allclose(schedules.linear(1.0, 0.2, 0.4, progress), [1.0, 0.8, 0.6, 0.2, 0.2, 0.2], rtol=1e-6)
    assert schedules.linear(1.0, 0.2, 0.0, jnp.float32(0.1)) == pytest.approx(0.2)  # no annealing at all


def test_remaining():
    assert schedules.remaining("linear", jnp.float32(0.25)) == 0.75
    assert schedules.remaining("constant", jnp.float32(0.25)) == 1.0
