"""Tile coding: one tile of each tiling, shifted grids, neighbours that share tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from zhixing.errors import UsageError
from zhixing.features import UNBOUNDED, Features

LOW, HIGH = np.float32([-1.2, -0.07]), np.float32([0.6, 0.07])  # of MountainCar
BOX = spaces.Box(LOW, HIGH)


def points(count: int) -> np.ndarray:
    return np.float32(np.random.default_rng(0).uniform(LOW, HIGH, (count, 2)))


@pytest.mark.parametrize("tilings, tiles", [(1, 4), (8, 8), (5, 3)])
def test_one_tile_of_each_tiling(tilings, tiles):
    features = Features.of(BOX, tilings, tiles)
    assert (features.size, features.active) == (tilings * (tiles + 1) ** 2, tilings)
    corners = np.float32([[x, y] for x in (LOW[0], HIGH[0]) for y in (LOW[1], HIGH[1])])
    indices = np.asarray(features(np.concatenate([points(2_000), corners])))
    assert indices.shape == (2_004, tilings) and indices.dtype == np.int32
    np.testing.assert_array_equal(indices // (tiles + 1) ** 2, np.tile(np.arange(tilings), (2_004, 1)))


def test_against_the_grids_one_by_one():
    tilings, tiles = 8, 4
    features = Features.of(BOX, tilings, tiles)
    width = (HIGH - LOW).astype(float) / tiles
    for point in points(200).astype(float):
        expected = []
        for j in range(tilings):
            shift = np.array([j * 1 % tilings, j * 3 % tilings]) / tilings * width  # displacement vector (1, 3)
            column, row = np.floor((point - LOW + shift) / width + 1e-7).astype(int)
            expected.append(j * (tiles + 1) ** 2 + row * (tiles + 1) + column)
        actual = np.asarray(features(np.float32(point)))
        assert (actual != expected).sum() <= 1  # a point may lie on an edge, up to rounding


def test_neighbours_share_tiles():
    """A step of a tile's width / tilings leaves one tile of the tilings; a whole width leaves all."""
    tilings, tiles = 8, 8
    features, width = Features.of(BOX, tilings, tiles), (HIGH - LOW) / tiles
    inside = points(500) * 0.5 + 0.25 * (LOW + HIGH)

    def shared(step):
        return (np.asarray(features(inside)) == np.asarray(features(np.float32(inside + step)))).sum(-1)

    assert np.all(shared([0.0, 0.0]) == tilings)
    for axis in np.eye(2):
        counts = [shared(axis * width * k / tilings) for k in range(1, tilings)]
        for k, count in enumerate(counts, 1):
            assert np.all(np.abs(count - (tilings - k)) <= 1)  # on an edge rounding may move one
            assert count.mean() == pytest.approx(tilings - k, abs=0.1)
        assert np.all(shared(axis * width * 1.001) == 0)


def test_odd_displacements():
    """Every tiling is shifted by another fraction in every dimension, by the odd multiples of the first one's."""
    space = spaces.Box(0, 1, (3,))
    offsets = Features.of(space, 16, 4).offsets
    for i, odd in enumerate((1, 3, 5)):
        np.testing.assert_array_equal(offsets[:, i], np.float32(np.arange(16) * odd % 16) / 16)
        assert len(set(offsets[:, i])) == 16


def test_any_leading_axes_inside_a_program():
    features = Features.of(BOX, 4, 4)
    batch = points(24).reshape(2, 3, 4, 2)
    indices = jax.jit(features)(batch)
    assert indices.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(indices[1, 2, 3], features(batch[1, 2, 3]))
    assert jax.tree.leaves(features) == []  # nothing of it is learned, copied or saved


def test_states_are_their_own_features():
    features = Features.of(spaces.Discrete(7), 8, 8)
    assert (features.size, features.active) == (7, 1)
    np.testing.assert_array_equal(features(jnp.array([[0, 6]])), [[[0], [6]]])


def test_unbounded_dimensions_are_cut_off():
    features = Features.of(spaces.Box(np.float32([-1, -np.inf]), np.float32([1, np.inf])), 1, 8)
    far, edge, below = (np.asarray(features(np.float32([0, y]))) for y in (100.0, UNBOUNDED, UNBOUNDED - 1.01))
    assert np.array_equal(far, edge) and not np.array_equal(edge, below)


@pytest.mark.parametrize(
    "space, message",
    [
        (spaces.Box(-1, 1, (9,)), "8 tilings of 8 tiles in 9 dimensions are 3e.09 features, at most 1,000,000 do"),
        (spaces.Box(0, 255, (84, 84)), "tiles are laid over vectors"),
        (spaces.MultiDiscrete([2, 2]), "tiles are laid over vectors"),
        (spaces.Box(np.float32([10]), np.float32([np.inf])), "set environment.normalize_observation"),
    ],
)
def test_refuses(space, message):
    with pytest.raises(UsageError, match=message):
        Features.of(space, 8, 8)
