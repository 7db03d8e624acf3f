"""K-FAC's factors against explicit blocks of the Fisher matrix, its natural gradient against a dense solution."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from scipy import special

from zhixing.algorithms.a2c import A2C
from zhixing.core import Spec, Transition
from zhixing.errors import UsageError
from zhixing.kfac import Curvature, inverse_plus_identity, layer_inputs, layers_of, output_gradients, with_layers
from zhixing.learned import Vector
from zhixing.networks import ActorCritic

KEY = jax.random.PRNGKey(0)
BOX = spaces.Box(-1, 1, (2,), np.float32)
SPEC = Spec(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4), 4, 1_000)
NETS = {
    "separate": (SPEC, {}),
    "shared": (SPEC, {"shared_trunk": True}),
    "normal": (replace(SPEC, action_space=BOX), {"shared_trunk": True, "initial_log_std": -0.3}),
}


def make_net(name):
    """With parameters that are not the special initial ones."""
    spec, settings = NETS[name]
    net = ActorCritic.create(KEY, spec, A2C(hidden=(4, 4), **settings))
    leaves, treedef = jax.tree.flatten(net)
    keys = jax.random.split(KEY, len(leaves))
    return treedef.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def block(gradient):
    """The gradients of one layer's weight and bias -> those of [W b], [o, i + 1]."""
    weight, bias = gradient
    return np.column_stack([np.float64(weight), np.float64(bias)])


def log_likelihood(net, observation, action, value):
    """log p(a, v|s) of (KFAC.1), but for a constant."""
    return net.policy(observation).log_prob(action) - 0.5 * jnp.square(net.value(observation) - value)


# ------------------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize("name", NETS)
def test_layers(name):
    """Every parameter is in a layer, once; and they can be put back."""
    net = make_net(name)
    assert sum(x.size for x in jax.tree.leaves(layers_of(net))) == Vector.of(net).parameters.size
    doubled = with_layers(net, jax.tree.map(lambda x: 2 * x, layers_of(net)))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(2 * x, y), net, doubled)


@pytest.mark.parametrize("name", ["shared", "normal"])
def test_gradient_of_a_sample_is_a_product(name):
    """∇[W b] log p(a, v|s) = g x̄ᵀ of each layer and each sample, exactly."""
    net, observation = make_net(name), jax.random.normal(KEY, (6, 3))
    inputs, outputs = layer_inputs(net, observation), jax.jit(output_gradients)(net, observation, KEY)
    action_key, value_key = jax.random.split(KEY)
    action = net.policy(observation).sample(action_key)
    value = net.value(observation) + jax.random.normal(value_key, (6,))
    assert len(inputs) == len(outputs) == len(layers_of(net))

    gradients = jax.jit(jax.vmap(jax.grad(log_likelihood), (None, 0, 0, 0)))(net, observation, action, value)
    for sample in range(6):
        layers = layers_of(jax.tree.map(lambda x, i=sample: x[i], gradients))
        for gradient, x, g in zip(layers, inputs, outputs, strict=True):
            np.testing.assert_allclose(np.outer(g[sample], x[sample]), block(gradient), rtol=1e-4, atol=1e-6)


def test_factors_are_those_of_the_explicit_fisher_matrix():
    """At one observation G ⊗ A is the block itself, E over all actions and values of ∇ log p (∇ log p)ᵀ."""
    net, observation = make_net("shared"), jax.random.normal(KEY, (3,))
    copies = 20_000
    repeated = jnp.broadcast_to(observation, (copies, 3))
    curvature = jax.jit(Curvature.create(net).observe)(net, repeated, KEY, 0.99, 0.01)

    # The expectation over v is exact with two values, one standard deviation above and below.
    probabilities = special.softmax(np.float64(net.policy(observation).logits))
    exact = [0.0] * len(layers_of(net))
    gradient = jax.jit(jax.grad(log_likelihood))
    for action, probability in enumerate(probabilities):
        for deviation in (-1.0, 1.0):
            layers = layers_of(gradient(net, observation, jnp.int32(action), net.value(observation) + deviation))
            rows = [block(layer).ravel() for layer in layers]
            exact = [block + 0.5 * probability * np.outer(r, r) for block, r in zip(exact, rows, strict=True)]
    for a, g, expected in zip(curvature.inputs, curvature.outputs, exact, strict=True):
        tolerance = 6 / np.sqrt(copies) * np.abs(expected).max()
        np.testing.assert_allclose(np.kron(g.average, a.average), expected, atol=tolerance)
        assert np.abs(expected).max() > 1e-4


def test_running_averages():
    """The mean at first, later with the given decay; every batch has actions of its own."""
    net, rows = make_net("separate"), jax.random.normal(KEY, (4, 8, 3))
    curvature, keys = Curvature.create(net), jax.random.split(KEY, 4)
    observe = jax.jit(lambda c, x, key: c.observe(net, x, key, 0.6, 0.01))
    gradients = jax.jit(output_gradients)
    expected = 0.0
    for i, keep in enumerate([0.0, 1 / 2, 0.6, 0.6]):
        curvature = observe(curvature, rows[i], keys[i])
        g = np.float64(gradients(net, rows[i], keys[i])[0])
        expected = keep * expected + (1 - keep) * g.T @ g / 8
        np.testing.assert_allclose(curvature.outputs[0].average, expected, rtol=1e-4, atol=1e-6)
    assert int(curvature.batches) == 4


# ----------------------------------------------------------------------------------------------------- natural gradient


@pytest.mark.parametrize("max_kl", [1e-4, 1e6])
def test_natural_gradient(max_kl):
    """A dense solution, layer by layer, in float64; then the step's predicted KL divergence is at most δ."""
    damping, rate = 0.02, 0.3
    net = make_net("normal")
    curvature = Curvature.create(net)
    observe = jax.jit(lambda c, x: c.observe(net, x, KEY, 0.99, damping))
    for i in range(3):  # each from the last one's inverses
        curvature = observe(curvature, jax.random.normal(jax.random.fold_in(KEY, i), (64, 3)))
    gradient = make_net("normal")
    found = Vector(
        jax.jit(curvature.natural_gradient)(Vector.of(gradient), damping, rate, max_kl), Vector.of(net).structure
    ).net

    steps, fisher = [], 0.0
    for layer, a, g in zip(layers_of(gradient), curvature.inputs, curvature.outputs, strict=True):
        a, g = np.float64(a.average), np.float64(g.average)
        rho = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
        damped = np.kron(g + np.sqrt(damping) / rho * np.eye(len(g)), a + rho * np.sqrt(damping) * np.eye(len(a)))
        step = np.linalg.solve(damped, block(layer).ravel())
        steps.append(step)
        fisher += step @ damped @ step
    scale = min(1.0, np.sqrt(max_kl / (0.5 * rate**2 * fisher)))
    assert (scale < 0.1) if max_kl < 1 else (scale == 1.0)
    for layer, step in zip(layers_of(found), steps, strict=True):
        np.testing.assert_allclose(
            block(layer).ravel(), scale * step, rtol=0.02, atol=0.02 * np.abs(scale * step).max()
        )


def test_the_predicted_divergence_is_the_true_one():
    """At one observation, without much damping: ½ ΔᵀFΔ against KL[π_old, π] + ½ (V_old - V)²."""
    net, observation = make_net("separate"), jnp.broadcast_to(jax.random.normal(KEY, (3,)), (20_000, 3))
    max_kl, rate = 1e-3, 0.5
    curvature = jax.jit(Curvature.create(net).observe)(net, observation, KEY, 0.99, 1e-6)

    def loss(net):
        return net.policy(observation[0]).log_prob(1) + 2 * net.value(observation[0])

    natural = curvature.natural_gradient(Vector.of(jax.grad(loss)(net)), 1e-6, rate, max_kl)
    old = Vector.of(net)
    new = Vector(old.parameters - rate * natural, old.structure).net
    change = net.value(observation[0]) - new.value(observation[0])
    divergence = net.policy(observation[0]).kl(new.policy(observation[0])) + 0.5 * change**2
    # The layers' blocks know nothing of each other: each of the three moves the outputs by as much.
    assert 0.5 * max_kl < divergence < 4 * max_kl


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("guess", ["near", "far", "nan"])
def test_inverse(condition, guess):
    """Many at once, of which some have a guess that is of use."""
    generator = np.random.default_rng(0)
    rotation = np.linalg.qr(generator.normal(size=(5, 12, 12)))[0]
    matrix = (rotation * np.geomspace(condition, 1e-3, 12)) @ np.swapaxes(rotation, 1, 2)
    expected = np.linalg.inv(matrix + np.eye(12))
    guesses = {"near": 1.02 * expected, "far": 100 * expected, "nan": np.full_like(expected, np.nan)}
    start = np.where(np.arange(5)[:, None, None] < 3, guesses[guess], expected)
    found = jax.jit(jax.vmap(inverse_plus_identity))(jnp.float32(matrix), jnp.float32(start))
    np.testing.assert_allclose(found, expected, atol=0.02)


# --------------------------------------------------------------------------------------------------------- with A2C


def test_steps_are_averages_of_natural_gradients():
    """Of all so far at first, later with a decay of 0.9; one step of A2C observes the rollout's states, then steps."""
    algorithm = A2C(optimiser="kfac", hidden=(4, 4), learning_rate=0.3)
    state = algorithm.init(KEY, SPEC)
    observation = jax.random.normal(KEY, (6, 4, 3))
    flags = jnp.zeros((6, 4), bool)
    action = jax.random.randint(KEY, (6, 4), 0, 4)
    rollout = Transition(observation, action, observation[..., 0], observation, flags, flags)
    update, find, apply = jax.jit(algorithm.update), jax.jit(algorithm.gradient), jax.jit(algorithm.apply)
    batches = jax.jit(algorithm.batches)

    curvature = state.curvature.observe(state.actor_critic.net, observation.reshape(24, 3), KEY, 0.99, 0.01)
    average = 0.0
    for step in range(1, 4):
        vector = state.actor_critic.frozen
        minibatch = jax.tree.map(lambda x: x[0], batches(state, rollout, KEY))
        gradient, metrics = find(state, minibatch)
        natural = curvature.natural_gradient(Vector(gradient, vector.structure), 0.01, 0.3, 1e-3)
        average = 0.9 * average + 0.1 * np.float64(natural)
        expected = vector.parameters - 0.3 * average / (1 - 0.9**step)
        state = update(state, rollout, KEY)[0] if step == 1 else apply(state, gradient, metrics)
        np.testing.assert_allclose(state.actor_critic.parameters, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(state.actor_critic.parameters - vector.parameters).max() > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), state.curvature, curvature)


def test_gsde_is_refused():
    algorithm = A2C(optimiser="kfac", gsde_interval=4)
    with pytest.raises(UsageError, match="kfac does not know the noise of gsde_interval"):
        algorithm.check(replace(SPEC, action_space=BOX))
