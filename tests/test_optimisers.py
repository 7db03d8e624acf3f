"""The clipped gradient, against Optax's."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zhixing.optimisers import clip_by_norm


@pytest.mark.parametrize("limit", [0.5, 5.0, 500.0])
def test_clipped_gradient_is_that_of_optax(limit):
    gradient = {"a": jnp.float32([3.0, -4.0]), "b": jnp.float32([[12.0]])}  # its norm is 13
    ours, theirs = clip_by_norm(limit), optax.clip_by_global_norm(limit)
    clipped, _ = ours.update(gradient, ours.init(gradient))
    expected, _ = theirs.update(gradient, theirs.init(gradient))
    for name in gradient:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-6)
    assert float(optax.tree.norm(clipped)) == pytest.approx(min(limit, 13.0), rel=1e-6)


def test_gradient_of_zero_stays_zero():
    clip = clip_by_norm(0.5)
    clipped, _ = clip.update(jnp.zeros(3), clip.init(jnp.zeros(3)))
    np.testing.assert_array_equal(clipped, np.zeros(3))
