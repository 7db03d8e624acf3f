"""Emphasising recent experience: how many transitions each update draws from, and that it draws from no other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from zhixing.algorithms.dqn import DQN
from zhixing.core import Clock, Spec, Transition, hyperparameters
from zhixing.errors import UsageError
from zhixing.off_policy import OffPolicy
from zhixing.replay import Replay, emphasised

SPEC = Spec(spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2), 1, 1_000)


def rollout(first, length):
    """A rollout [T, 1] whose observations are its transitions' numbers."""
    number = jnp.arange(first, first + length, dtype=jnp.float32)[:, None]
    no = jnp.zeros(number.shape, bool)
    return Transition(number[..., None], jnp.zeros(number.shape, jnp.int32), number, number[..., None], no, no)


@pytest.mark.parametrize("updates", [1, 7, 200])
@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_numbers_of_transitions(updates, progress):
    """Wang & Ross 2019, section 4, with η on its way to 1."""
    eta = 0.996 + 0.004 * progress
    expected = [50_000 * eta ** (k * 1000 / updates) for k in range(1, updates + 1)]
    np.testing.assert_allclose(emphasised(50_000, updates, 0.996, jnp.float32(progress)), expected, rtol=1e-3)


def test_no_emphasis_is_the_whole_replay():
    np.testing.assert_array_equal(emphasised(50_000, 3, 1.0, jnp.float32(0.1)), [50_000] * 3)


@pytest.mark.parametrize("recent", [1, 3, 10, 99])
def test_only_the_newest_are_drawn(recent):
    replay = Replay.create(16, rollout(0, 1)).add(rollout(0, 10)).add(rollout(10, 10))  # wraps around
    batch, _ = replay.sample(jax.random.PRNGKey(0), 500, 0.9, recent=recent)
    drawn = set(np.asarray(batch.observation)[:, 0].tolist())
    assert drawn == set(range(20 - min(recent, 16), 20))


class State(NamedTuple):
    oldest: jax.Array  # [], the least number in the last minibatch
    clock: Clock


@hyperparameters
class Oldest(OffPolicy):
    """Keeps what it was shown."""

    def init(self, key, spec):
        return State(jnp.float32(0), Clock.start(spec))

    def update(self, state, batch, key):
        return state._replace(oldest=batch.observation.min()), {"oldest": batch.observation.min()}


@pytest.mark.parametrize("emphasis, minimum, expected", [(1.0, 5, 0), (0.99, 5, 95), (0.99, 20, 80)])
def test_learning_draws_the_newest(emphasis, minimum, expected):
    """The last of K updates at the start of the run: 100 x 0.99¹⁰⁰⁰ is less than the minimum, which counts then."""
    algorithm = Oldest(
        replay_capacity=100, batch_size=500, learning_starts=0, gradient_steps=4, emphasis=emphasis,
        emphasis_minimum=minimum,
    )  # fmt: skip
    state, memory = algorithm.init(jax.random.PRNGKey(0), SPEC), algorithm.memory(SPEC, rollout(0, 1))
    state, memory, metrics = algorithm.learn(state, memory, rollout(0, 100), jax.random.PRNGKey(1))
    # The clock says that 100 steps of 1,000 are over: η = 0.99 + 0.01 x 0.1.
    assert float(state.oldest) == expected
    counts = np.maximum(100 * (0.991 ** (250.0 * np.arange(1, 5)) if emphasis < 1 else np.ones(4)), minimum)
    assert float(metrics["oldest"]) == pytest.approx(np.mean(100 - np.floor(counts)), abs=1.0)


def test_bad_settings():
    with pytest.raises(UsageError, match=r"^algorithm.emphasis is 1.1; it must be from 0 to 1$"):
        DQN(emphasis=1.1).check(SPEC)
    with pytest.raises(UsageError, match=r"^algorithm.emphasis_minimum is 0; it must be above 0$"):
        DQN(emphasis_minimum=0).check(SPEC)
    with pytest.raises(UsageError, match=r"are drawn; set emphasis to 1 or replay to uniform$"):
        DQN(emphasis=0.99, replay="rank").check(SPEC)
