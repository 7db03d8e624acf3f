"""The replay against a plain NumPy ring, and the law of its samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zhixing.replay import Replay


class Ring:
    """The last `capacity` items, one written after the other."""

    def __init__(self, capacity):
        self.items, self.position, self.size = np.zeros(capacity), 0, 0

    def add(self, items):
        for item in items.ravel():
            self.items[self.position] = item
            self.position = (self.position + 1) % len(self.items)
            self.size = min(self.size + 1, len(self.items))


def numbered(start, length, instances):
    """A rollout of two fields whose items are numbered; the second field has an axis of its own."""
    number = start + np.arange(length * instances, dtype=np.float32).reshape(length, instances)
    return {"number": jnp.asarray(number), "twice": jnp.asarray(np.stack([number, 2 * number], -1))}


def filled(capacity, length, instances, rollouts):
    replay, ring = Replay.create(capacity, numbered(0, length, instances)), Ring(capacity)
    add = jax.jit(Replay.add)
    for i in range(rollouts):
        rollout = numbered(1 + i * length * instances, length, instances)
        replay = add(replay, rollout)
        ring.add(np.asarray(rollout["number"]))
        yield replay, ring


@pytest.mark.parametrize(
    "capacity, length, instances", [(12, 2, 2), (12, 1, 1), (10, 2, 2), (13, 5, 1), (7, 1, 3), (6, 3, 2)]
)
def test_ring(capacity, length, instances):
    """Capacities that the rollouts divide (a slice is written) and others (the write wraps around)."""
    for replay, ring in filled(capacity, length, instances, 3 * capacity // (length * instances) + 2):
        np.testing.assert_array_equal(replay.data["number"], ring.items)
        np.testing.assert_array_equal(replay.data["twice"], np.stack([ring.items, 2 * ring.items], -1))
        assert (int(replay.cursor.position), int(replay.cursor.size)) == (ring.position, ring.size)
    assert int(replay.cursor.size) == capacity == replay.capacity


@pytest.mark.parametrize("capacity, lengths", [(9, (4, 4, 3, 4)), (12, (4, 4, 3, 4, 4)), (8, (4, 2, 2, 4, 3, 4))])
def test_rollouts_of_different_lengths(capacity, lengths):
    """The last rollout of a run may be shorter, and the run may go on: the last two stay, no empty place is drawn."""
    replay, count = Replay.create(capacity, numbered(0, 1, 1)), 0
    for length, before in zip(lengths, (0, *lengths), strict=False):
        replay = replay.add(numbered(1 + count, length, 1))
        count += length
        stored = np.asarray(replay.data["number"])[: int(replay.cursor.size)]
        assert len(set(stored)) == len(stored) and 0.0 not in stored
        assert set(range(count - length - before + 1, count + 1)) <= set(stored.astype(int))


def test_types_are_kept():
    example = {
        "image": np.zeros((1, 2, 4), np.uint8),
        "flag": np.zeros((1, 2), bool),
        "index": np.zeros((1, 2), np.int32),
    }
    replay = Replay.create(4, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, example)))
    assert {name: x.dtype for name, x in replay.add(example).data.items()} == {
        name: x.dtype for name, x in example.items()
    }


def test_samples_only_what_is_stored():
    replay = next(filled(100, 3, 2, 1))[0]
    numbers = np.asarray(replay.sample(jax.random.PRNGKey(0), 2_000)["number"])
    assert set(numbers) == {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}


@pytest.mark.parametrize("rollouts", [3, 9])  # partly filled; wrapped around
def test_samples_uniformly(rollouts):
    *_, (replay, ring) = filled(16, 2, 2, rollouts)
    count = 40_000
    batch = replay.sample(jax.random.PRNGKey(1), count)
    numbers = np.asarray(batch["number"])
    np.testing.assert_array_equal(batch["twice"], np.stack([numbers, 2 * numbers], -1))  # fields stay together

    stored = np.sort(ring.items[: ring.size])
    observed = np.array([(numbers == number).sum() for number in stored])
    assert observed.sum() == count
    expected = count / ring.size
    chi_square = (np.square(observed - expected) / expected).sum()
    degrees = ring.size - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)
    assert np.all(np.abs(observed - expected) < 4 * np.sqrt(expected))


def test_samples_are_independent():
    """Neighbours in a batch are no more often equal than by chance, and another key gives another batch."""
    *_, (replay, _) = filled(16, 2, 2, 5)
    numbers = np.asarray(replay.sample(jax.random.PRNGKey(2), 20_000)["number"])
    equal = (numbers[1:] == numbers[:-1]).mean()
    assert abs(equal - 1 / 16) < 4 * np.sqrt(1 / 16 * 15 / 16 / 20_000)
    assert not np.array_equal(numbers, replay.sample(jax.random.PRNGKey(3), 20_000)["number"])
