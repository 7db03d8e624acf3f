"""Convolutions against XLA's own and against sums written out in NumPy; what becomes of image observations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from zhixing.convolution import TORSOS, Convolutions, ImageEncoder, convolve, output_shape
from zhixing.environments.transforms import FrameStack, Spaces
from zhixing.errors import UsageError
from zhixing.learned import Vector

KEY = jax.random.PRNGKey(0)
CASES = [  # leading axes, image, (filters, size, stride)
    ((5,), (10, 10, 4), (16, 3, 1)),
    ((2, 3), (12, 9, 2), (5, 4, 4)),  # a border that no filter reaches
    ((), (11, 8, 3), (7, 4, 2)),
    ((2,), (9, 10, 1), (2, 2, 3)),  # gaps between the filters
    ((3,), (5, 6, 2), (3, 1, 1)),
    ((1, 2), (4, 4, 3), (6, 4, 1)),  # one place only
]
IMAGE, LAYERS = (9, 11, 2), ((4, 3, 2), (5, 2, 1))
create = jax.jit(lambda key, scale: Convolutions.create(key, IMAGE, LAYERS, "relu", scale))


def normal(*shape):
    return jnp.float32(np.random.default_rng(sum(shape)).normal(size=shape))


def xla(x, weight, size, stride):
    """XLA's convolution, with the same weights: [filters, size · size · channels]."""
    *leading, height, width, channels = x.shape
    kernel = weight.reshape(-1, size, size, channels)
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, height, width, channels),
        kernel,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision="highest",
    )
    return y.reshape(*leading, *y.shape[1:])


@pytest.mark.parametrize("leading, image, layer", CASES)
def test_convolve(leading, image, layer):
    """The sum over each patch in float64; XLA's convolution, and its gradients."""
    filters, size, stride = layer
    x, weight = normal(*leading, *image), normal(filters, size * size * image[-1])
    rows, columns, channels = output_shape(image, (layer,))
    assert channels == filters
    direction = normal(*leading, rows, columns, filters)

    @jax.jit
    def both(x, weight):
        results = [jax.vjp(lambda x, w, f=f: f(x, w, size, stride), x, weight) for f in (convolve, xla)]
        return [(y, *pullback(direction)) for y, pullback in results]

    (ours, *gradients), (theirs, *correct) = both(x, weight)
    expected = np.zeros(direction.shape)
    for row, column in np.ndindex(rows, columns):
        y, z = row * stride, column * stride
        patch = np.float64(x)[..., y : y + size, z : z + size, :]
        expected[..., row, column, :] = patch.reshape(*leading, -1) @ np.float64(weight).T
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(theirs, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, correct, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def shifted(net):
    """With biases that are not zero."""
    return jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), net)


@pytest.mark.parametrize("activation, function", [("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)])
def test_layers_follow_each_other(activation, function):
    net = shifted(create(KEY, 1.0))
    chosen = jax.eval_shape(lambda: Convolutions.create(KEY, IMAGE, LAYERS, activation)).activation
    net = Convolutions(net.weights, net.biases, IMAGE, LAYERS, chosen)
    images = normal(2, 3, *IMAGE)
    x = images
    for weight, bias, (_, size, stride) in zip(net.weights, net.biases, LAYERS, strict=True):
        x = function(np.asarray(xla(x, weight, size, stride) + bias))
    features = jax.jit(net.__call__)(images)
    assert features.shape == (2, 3, net.size)
    np.testing.assert_allclose(features, x.reshape(2, 3, -1), rtol=1e-4, atol=1e-4)


def test_many_seeds_are_each_alone_and_products_only():
    nets = [shifted(create(jax.random.PRNGKey(seed), 1.0)) for seed in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
    x = normal(3, 2, *IMAGE)
    gradient = jax.jit(jax.grad(lambda net, x: jnp.square(net(x)).mean()))
    gradients = jax.vmap(gradient)(together, x)
    for seed, net in enumerate(nets):
        for ours, alone in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient(net, x[seed])), strict=True):
            np.testing.assert_allclose(ours[seed], alone, rtol=1e-4, atol=1e-6)
    program = str(jax.make_jaxpr(jax.vmap(gradient))(together, x))
    assert "dot_general" in program and "conv_general_dilated" not in program


@pytest.mark.parametrize(
    "torso, image, size, parameters",
    # Counted by hand from the papers' descriptions.
    [("minatar", (10, 10, 4), 1024, 592), ("minatar", (10, 10, 6), 1024, 880), ("nature", (84, 84, 4), 3136, 77_984)],
)
def test_torsos_have_the_sizes_of_the_papers(torso, image, size, parameters):
    net = jax.eval_shape(lambda: Convolutions.create(KEY, image, TORSOS[torso]))
    assert net.size == size and jax.eval_shape(lambda net: net(jnp.zeros(image)), net).shape == (size,)
    assert sum(leaf.size for leaf in jax.tree.leaves(net)) == parameters


def test_is_a_pytree_of_float_arrays():
    net = shifted(create(KEY, 1.0))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(net))
    x = normal(2, *IMAGE)
    np.testing.assert_array_equal(jax.jit(Vector.of(net).__call__)(x), jax.jit(net.__call__)(x))


def test_starts_orthogonal_with_the_given_gain():
    net = create(KEY, 3**-0.5)
    for weight in net.weights:
        np.testing.assert_allclose(weight @ weight.T, np.eye(len(weight)) / 3, atol=1e-5)
        # The variance of PyTorch's layers, 1 / (3 · inputs).
        np.testing.assert_allclose(np.square(weight).mean(), 1 / (3 * weight.shape[1]), rtol=1e-4)
    assert not np.any(net.biases[0]) and not np.any(net.biases[1])
    again = create(jax.random.PRNGKey(1), 3**-0.5)
    assert not np.allclose(net.weights[0], again.weights[0])


@pytest.mark.parametrize(
    "image, layers, message",
    [
        ((7, 84, 4), TORSOS["nature"], "8 x 8 do not fit into 7 x 84"),
        ((20, 20, 4), TORSOS["nature"], "3 x 3 do not fit into 1 x 1, in images of 20 x 20"),
        ((10, 10, 4), ((16, 3, 0),), "stride 0"),
    ],
)
def test_says_what_does_not_fit(image, layers, message):
    with pytest.raises(UsageError, match=message):
        Convolutions.create(KEY, image, layers)


# --------------------------------------------------------------------------------------------------------- observations


@pytest.mark.parametrize(
    "space, image",
    [
        (spaces.Box(0, 1, (10, 10, 4), bool), lambda o: o),
        (spaces.Box(0, 1, (10, 10, 10), np.float32), lambda o: o),
        (spaces.Box(0, 255, (21, 16, 3), np.uint8), lambda o: o / 255),
        (spaces.Box(0, 255, (8, 9), np.uint8), lambda o: o[:, :, None] / 255),
        (spaces.Box(0, 255, (4, 8, 9), np.uint8), lambda o: np.stack(list(o), -1) / 255),
        (spaces.Box(0, 255, (2, 8, 9, 3), np.uint8), lambda o: np.concatenate(list(o), -1) / 255),
        (spaces.Box(0, 1, (10, 5, 6, 2), np.float32), lambda o: np.concatenate(list(o), -1)),
    ],
)
def test_image_encoder(space, image):
    encoder = ImageEncoder.of(space)
    space.seed(0)
    observation = space.sample()
    expected, found = image(observation), encoder(jnp.asarray(observation))
    assert found.shape == encoder.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    repeated = jnp.broadcast_to(jnp.asarray(observation), (4, 5, *observation.shape))
    np.testing.assert_array_equal(encoder(repeated), np.broadcast_to(found, (4, 5, *found.shape)))


def test_bytes_that_are_zeros_and_ones_stay():
    encoder = ImageEncoder.of(spaces.Box(0, 1, (10, 10, 4), np.uint8))
    np.testing.assert_array_equal(encoder(jnp.ones((10, 10, 4), jnp.uint8)), 1)


def test_image_encoder_reads_what_frame_stack_makes():
    inner = Spaces(spaces.Box(0, 255, (84, 84), np.uint8), spaces.Discrete(4))
    stack = FrameStack(4)
    space = stack.spaces(inner).observation
    encoder = ImageEncoder.of(space)
    assert encoder.shape == (84, 84, 4)
    _, observation = stack.reset(stack.init(inner, 2), jnp.full((2, 84, 84), 51, jnp.uint8), training=True)
    np.testing.assert_allclose(encoder(observation), np.full((2, 84, 84, 4), 0.2), rtol=1e-6)


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (3,)), spaces.Discrete(3), spaces.Box(0, 1, (2, 2, 2, 2, 2)), spaces.Dict()]
)
def test_image_encoder_says_what_is_no_image(space):
    with pytest.raises(UsageError, match=r"set algorithm\.torso to none"):
        ImageEncoder.of(space)
