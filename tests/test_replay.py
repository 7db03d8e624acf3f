"""The replay against a plain NumPy ring: what is stored, what n steps on from it are, how uniformly it is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zhixing.replay import Replay
from zhixing.transition import Transition

GAMMA = 0.9


def numbered(start, length, instances, ends=()):
    """A rollout [T, N] whose transitions are numbered, row after row; `ends`: number -> "terminated" | "truncated"."""
    number = start + np.arange(length * instances).reshape(length, instances)
    terminated, truncated = (np.isin(number, [n for n in ends if ends[n] == kind]) for kind in KINDS)
    return Transition(
        jnp.float32(number),
        jnp.int32(number % 3),
        jnp.float32(number) / 8,
        jnp.asarray(np.stack([number + 0.5, 2 * number], -1), jnp.float32),  # with an axis of its own
        jnp.asarray(terminated),
        jnp.asarray(truncated),
        jnp.float32(-number),
    )


KINDS = ("terminated", "truncated")


def filled(capacity, lengths, instances, ends=()):
    """A replay after rollouts of such lengths, from number 1 on."""
    replay, count = Replay.create(capacity, numbered(0, 1, instances)), 1
    for length in lengths:
        replay = compiled_add(replay, numbered(count, length, instances, ends))
        count += length * instances
    return replay, count - 1  # the last number


compiled_sample = jax.jit(Replay.sample, static_argnames=("size", "n_step"))
compiled_add = jax.jit(Replay.add)


def sample(replay, count, seed=0, n_step=1):
    return compiled_sample(replay, jax.random.PRNGKey(seed), size=count, discount=GAMMA, n_step=n_step)


@pytest.mark.parametrize(
    "capacity, lengths, instances",
    [
        (12, [2] * 8, 2),  # rollouts that divide the ring
        (12, [1] * 30, 1),
        (10, [2] * 12, 2),  # writes that wrap around
        (13, [5] * 7, 1),
        (7, [1] * 6, 3),  # rounded down to two rows of three
        (9, [4, 4, 3, 4], 1),  # the last rollout of a run may be shorter, and the run may go on
        (12, [4, 4, 3, 4, 4, 1, 4], 1),
    ],
)
def test_ring(capacity, lengths, instances):
    """The last transitions lie where a plain ring has them, all fields of one together."""
    for upto in range(1, len(lengths) + 1):
        replay, last = filled(capacity, lengths[:upto], instances)
        rounded = capacity - capacity % instances
        ring = np.zeros(rounded)
        for number in range(1, last + 1):
            ring[(number - 1) % rounded] = number
        np.testing.assert_array_equal(replay.data.observation, ring)
        np.testing.assert_array_equal(replay.data.extras, -ring)
        stored = ring > 0
        np.testing.assert_array_equal(np.asarray(replay.data.next_observation)[stored, 1], 2 * ring[stored])
        assert (int(replay.cursor.position), int(replay.cursor.size)) == (last % rounded, min(last, rounded))
        assert replay.capacity == rounded


def test_types_are_kept():
    example = numbered(0, 1, 2)._replace(observation=np.zeros((1, 2, 4), np.uint8))
    replay = Replay.create(4, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, example)))
    replay = replay.add(jax.tree.map(jnp.asarray, example))
    assert replay.data.observation.dtype == jnp.uint8 and replay.data.observation.shape == (4, 4)
    assert replay.data.action.dtype == jnp.int32 and replay.data.terminated.dtype == bool


# -------------------------------------------------------------------------------------------------------------- reading


def by_hand(numbers, instances, ends, last, n):
    """-> reward, number of the last step, discount, of up to n steps from each of `numbers`, as one would write it."""
    rewards, finals, discounts = [], [], []
    for number in numbers:
        reward, power, step = number / 8, GAMMA, number
        for _ in range(n - 1):
            if step in ends or step + instances > last:
                break
            step += instances
            reward += power * step / 8
            power *= GAMMA
        rewards.append(reward)
        finals.append(step)
        discounts.append(0.0 if ends.get(step) == "terminated" else power)
    return np.array(rewards), np.array(finals), np.array(discounts)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "capacity, lengths, instances",
    [(12, [2, 2], 2), (12, [2] * 9, 2), (14, [3] * 11, 2), (30, [1] * 100, 3), (11, [4, 4, 4, 3, 4], 1)],
)
def test_n_steps(capacity, lengths, instances, n):
    """Rewards summed up to the end of the episode or of the ring; bootstrapping stops at terminations only."""
    total = sum(lengths) * instances
    ends = {number: KINDS[number // 3 % 2] for number in range(3, total + 1, 3)}
    replay, last = filled(capacity, lengths, instances, ends)
    batch, _ = sample(replay, 300, n_step=n)
    numbers = np.asarray(batch.observation).astype(int)
    reward, final, discount = by_hand(numbers, instances, ends, last, n)
    np.testing.assert_allclose(batch.reward, reward, rtol=1e-5)
    np.testing.assert_allclose(batch.next_observation[:, 0], final + 0.5)
    np.testing.assert_allclose(batch.discount, discount, rtol=1e-5)
    np.testing.assert_array_equal(batch.action, numbers % 3)
    np.testing.assert_array_equal(batch.extras, -numbers)
    np.testing.assert_array_equal(batch.weight, 1.0)
    assert {"terminated", "truncated"} <= {ends.get(int(i)) for i in final}
    assert n == 1 or (final > numbers).any()


# ------------------------------------------------------------------------------------------------------------- sampling


def test_samples_only_what_is_stored():
    replay, _ = filled(100, [3], 2)
    assert set(np.asarray(sample(replay, 2_000)[0].observation)) == {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}


@pytest.mark.parametrize("rollouts", [3, 9])  # partly filled; wrapped around
def test_samples_uniformly(rollouts):
    replay, last = filled(16, [2] * rollouts, 2)
    count, size = 40_000, min(last, 16)
    numbers = np.asarray(sample(replay, count, 1)[0].observation)
    observed = np.array([(numbers == number).sum() for number in range(last - size + 1, last + 1)])
    assert observed.sum() == count
    expected = count / size
    chi_square = (np.square(observed - expected) / expected).sum()
    assert chi_square < size - 1 + 4 * np.sqrt(2 * (size - 1))
    assert np.all(np.abs(observed - expected) < 4 * np.sqrt(expected))


def test_nothing_runs_on_past_a_cut():
    """After `cut` the newest transitions end their episodes, whatever is written next; n steps stop there."""
    replay, last = filled(16, [3], 2)
    cut = compiled_add(replay.cut(), numbered(last + 1, 2, 2))
    batch, _ = sample(cut, 500, n_step=3)
    first, end = np.asarray(batch.observation), np.asarray(batch.next_observation)[:, 0] - 0.5
    assert np.all((end <= last) == (first <= last))
    np.testing.assert_array_equal(end[np.isin(first, [last - 1, last])], first[np.isin(first, [last - 1, last])])
    batch, _ = sample(compiled_add(replay, numbered(last + 1, 2, 2)), 500, n_step=3)
    assert np.any((np.asarray(batch.observation) <= last) & (np.asarray(batch.next_observation)[:, 0] - 0.5 > last))


def test_samples_are_independent():
    """Neighbours in a batch are no more often equal than by chance, and another key gives another batch."""
    replay, _ = filled(16, [2] * 5, 2)
    numbers = np.asarray(sample(replay, 20_000, 2)[0].observation)
    equal = (numbers[1:] == numbers[:-1]).mean()
    assert abs(equal - 1 / 16) < 4 * np.sqrt(1 / 16 * 15 / 16 / 20_000)
    assert not np.array_equal(numbers, sample(replay, 20_000, 3)[0].observation)


def test_indices_are_those_of_the_samples():
    replay, _ = filled(16, [2] * 5, 2)
    batch, index = sample(replay, 100)
    np.testing.assert_array_equal(replay.data.observation[index], batch.observation)


def test_a_million_transitions():
    """Room for 1M transitions of CartPole in less than 100 MB, added to in place."""
    example = Transition(*(jnp.zeros((1, 1, *shape), t) for shape, t in [
        ((4,), jnp.float32), ((), jnp.int32), ((), jnp.float32), ((4,), jnp.float32), ((), bool), ((), bool),
    ]))  # fmt: skip
    replay = Replay.create(1_000_000, example, "proportional")
    assert sum(x.nbytes for x in jax.tree.leaves(replay)) < 100e6
    pointer = replay.data.observation.unsafe_buffer_pointer()
    replay = jax.jit(Replay.add, donate_argnums=0)(replay, example, 0.6)
    assert replay.data.observation.unsafe_buffer_pointer() == pointer
