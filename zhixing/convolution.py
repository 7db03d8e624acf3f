"""Convolutions for observations that are images: each layer gathers its patches and is one matrix product.

A filter is a row of weights as long as a patch, so that a layer is `patches(x) @ weight.T + bias`. Many seeds at once
are then batched matrix products. XLA's own convolution on CPUs needs some 20 to 40 times as long for the gradient of
the filters, and for filters with a seeds axis (which become grouped convolutions) 3 times as long forward as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from zhixing.errors import UsageError
from zhixing.initialisers import orthogonal

Layer = tuple[int, int, int]  # number of filters, their size (height and width), stride
Shape = tuple[int, int, int]  # height, width, channels

TORSOS: dict[str, tuple[Layer, ...]] = {
    # Young & Tian, "MinAtar", arXiv:1903.03176, 2019, and its examples/dqn.py; a hidden layer of 128 units follows.
    "minatar": ((16, 3, 1),),
    # Mnih et al., Nature 518, 2015, Methods, "Model architecture"; a hidden layer of 512 units follows.
    "nature": ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
}


class Convolutions(eqx.Module):
    """Convolutions without padding, each followed by the activation; orthogonal initial weights, zero biases."""

    weights: list[jax.Array]  # [filters, size · size · channels] a layer
    biases: list[jax.Array]  # [filters]
    shape: Shape = eqx.field(static=True)  # of one image
    layers: tuple[Layer, ...] = eqx.field(static=True)
    activation: Callable = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        key: jax.Array,
        shape: Shape,
        layers: tuple[Layer, ...],
        activation: str = "relu",
        scale: float = 2**0.5,
    ) -> "Convolutions":
        """For images of `shape`; all weights have gain `scale`. UsageError where a filter is larger than its input."""
        output_shape(shape, layers)  # says what does not fit
        channels = [shape[-1], *(filters for filters, _, _ in layers)]
        weights = [
            scale * orthogonal(layer_key, size * size * inputs, filters).T
            for layer_key, inputs, (filters, size, _) in zip(
                jax.random.split(key, len(layers)), channels, layers, strict=False
            )
        ]
        biases = [jnp.zeros(filters) for filters, _, _ in layers]
        return cls(weights, biases, shape, layers, getattr(jax.nn, activation))

    @property
    def size(self) -> int:
        """The number of features."""
        return math.prod(output_shape(self.shape, self.layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [..., height, width, channels] -> features [..., size]."""
        for weight, bias, (_, size, stride) in zip(self.weights, self.biases, self.layers, strict=True):
            x = self.activation(convolve(x, weight, size, stride) + bias)
        return x.reshape(*x.shape[:-3], self.size)


def convolve(x: jax.Array, weight: jax.Array, size: int, stride: int) -> jax.Array:
    """[..., height, width, channels] and [filters, size · size · channels] -> [..., rows, columns, filters]."""
    patch = patches(x, size, stride)
    # A plain matrix: its product with several leading axes, and the gradient's, take a fifth longer.
    product = patch.reshape(-1, patch.shape[-1]) @ weight.T
    return product.reshape(*patch.shape[:-1], weight.shape[0])


def patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """[..., height, width, channels] -> [..., rows, columns, size · size · channels], what each filter looks at."""
    *leading, height, width, channels = x.shape
    rows, columns = positions(height, size, stride), positions(width, size, stride)
    y = stride * np.arange(rows)[:, None, None, None] + np.arange(size)[:, None]
    index = y * width + stride * np.arange(columns)[:, None, None] + np.arange(size)  # [rows, columns, size, size]
    # One gather: stacked slices, one for each place within the filter, take up to twice as long.
    pixels = x.reshape(*leading, height * width, channels)[..., index.reshape(-1), :]
    return pixels.reshape(*leading, rows, columns, size * size * channels)


def positions(length: int, size: int, stride: int) -> int:
    """How many filters of `size` lie along `length`."""
    return (length - size) // stride + 1


def output_shape(shape: Shape, layers: tuple[Layer, ...]) -> Shape:
    """The shape that `layers` make of images of `shape`; UsageError where a filter is larger than its input."""
    height, width, channels = shape
    for filters, size, stride in layers:
        if min(filters, size, stride) < 1:
            raise UsageError(f"a layer of {filters} filters of size {size}, stride {stride}; all must be 1 or more")
        if size > min(height, width):
            raise UsageError(
                f"filters of {size} x {size} do not fit into {height} x {width}, in images of {shape[0]} x {shape[1]}; "
                "choose a torso with smaller filters"
            )
        height, width, channels = positions(height, size, stride), positions(width, size, stride), filters
    return height, width, channels


@dataclass(frozen=True)
class ImageEncoder:
    """Turns an observation into the image that `Convolutions` read: float32 [height, width, channels].

    Images are [height, width] or [height, width, channels]; a stack of frames has one axis more, the first, and its
    frames become channels. With three axes, the first is the stack if it is the shortest. Bytes are divided by the
    space's upper bound, which is 255 as a rule; all other numbers stay as they are.
    """

    shape: Shape  # of the image
    observation_shape: tuple[int, ...]
    stacked: bool
    divisor: float

    @classmethod
    def of(cls, space: gymnasium.Space) -> "ImageEncoder":
        """For a Box of two to four axes; UsageError for any other space."""
        if not isinstance(space, gymnasium.spaces.Box) or not 2 <= len(space.shape) <= 4:
            raise UsageError(f"convolutions read images, not observations of {space}; set algorithm.torso to none")
        observed = tuple(int(n) for n in space.shape)
        stacked = len(observed) == 4 or (len(observed) == 3 and observed[0] < min(observed[1:]))
        height, width = observed[1:3] if stacked else observed[:2]
        divisor = float(space.high.max()) if space.dtype == np.uint8 else 1.0
        return cls((height, width, math.prod(observed) // (height * width)), observed, stacked, max(divisor, 1.0))

    def __call__(self, observation: jax.Array) -> jax.Array:
        """`observation` [..., *] -> float32 [..., height, width, channels]."""
        leading = observation.shape[: observation.ndim - len(self.observation_shape)]
        x = observation
        if self.stacked:
            frames, (height, width, channels) = self.observation_shape[0], self.shape
            x = jnp.moveaxis(x.reshape(*leading, frames, height, width, channels // frames), -4, -2)
        return x.reshape(*leading, *self.shape).astype(jnp.float32) / self.divisor
