"""Networks against NumPy in float64, and the gradient step against Optax on the plain pytree."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces

from zhixing import schedules
from zhixing.distributions import Categorical, DiagonalNormal
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


def test_encoder_says_what_it_cannot_read():
    with pytest.raises(UsageError, match="FlattenObservation"):
        Encoder.of(spaces.Dict({"x": VECTOR}))


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


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_actor_critic_discrete(shared_trunk):
    net = shifted(ActorCritic.create(KEY, VECTOR, spaces.Discrete(4), (8, 6), shared_trunk=shared_trunk))
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
    net = ActorCritic.create(
        KEY,
        VECTOR,
        spaces.Box(-1, 1, (2,), np.float32),
        (8,),
        shared_trunk=shared_trunk,
        state_dependent_std=state_dependent_std,
        initial_log_std=-0.7,
    )
    x = jnp.float32(np.random.default_rng(0).normal(size=(5, 3)))
    policy = net.policy(x)
    assert isinstance(policy, DiagonalNormal) and policy.mean.shape == policy.log_std.shape == (5, 2)
    np.testing.assert_allclose(policy.log_std, -0.7, atol=0.05)
    assert np.all(np.abs(policy.mean) < 0.1)  # the output layer starts small: all actions alike
    rows = np.ptp(np.asarray(shifted(net).policy(x).log_std), axis=0)
    assert np.all(rows > 1e-3) if state_dependent_std else np.all(rows == 0)


# ------------------------------------------------------------------------------------------------ vector and optimiser


def test_vector_is_the_network():
    net = shifted(ActorCritic.create(KEY, VECTOR, spaces.Discrete(4), (8,)))
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
