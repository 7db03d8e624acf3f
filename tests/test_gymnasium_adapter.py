"""The Gymnasium adapter: reset in the same step, both ends, types, seeds, errors."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from zhixing.environments.gymnasium_adapter import GymnasiumAdapter, instance_seed
from zhixing.errors import UsageError


class Counter(gymnasium.Env):
    """Observes [the seed's draw, the episode, the step]; ends at `length`, by termination or truncation."""

    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, length: int = 3, ending: str = "terminated", fails_at: int = -1) -> None:
        self.length, self.ending, self.fails_at = length, ending, fails_at
        self.episode = -1

    def observe(self) -> np.ndarray:
        return np.array([self.draw, self.episode, self.count], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.draw = float(self.np_random.integers(1 << 20))
        self.episode += 1
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        if self.count == self.fails_at and self.draw % 2 == 0:
            raise ValueError("lost a leg")
        ended, terminates = self.count == self.length, self.ending == "terminated"
        return (
            self.observe(),
            10.0 * action,
            ended and terminates,
            ended and not terminates,
            {},
        )


class GoalCounter(Counter):
    """A `Counter` that observes a dictionary, of uint8 and int64."""

    observation_space = spaces.Dict({"image": spaces.Box(0, 255, (2,), np.uint8), "count": spaces.Discrete(9)})

    def observe(self):
        return {
            "image": np.full(2, 100 + self.count, np.uint8),
            "count": np.int64(self.count),
        }


@pytest.mark.parametrize(
    ("ending", "vectorization"),
    [("terminated", "sync"), ("truncated", "sync"), ("terminated", "async")],
)
def test_the_step_that_ends_an_episode_returns_its_end_and_the_new_start(ending, vectorization):
    batch = GymnasiumAdapter(Counter, vectorization=vectorization, ending=ending).batch([7, 8], 1)
    state, observation = batch.reset(None)
    assert state == () and observation.shape == (2, 1, 3) and observation.dtype == np.float32
    for step in range(1, 8):
        _, timestep = batch.step((), np.array([[1], [2]], np.int32), None)
        ended = step % 3 == 0
        np.testing.assert_array_equal(timestep.next_observation[..., 1], (step - 1) // 3)
        np.testing.assert_array_equal(timestep.next_observation[..., 2], (step - 1) % 3 + 1)
        np.testing.assert_array_equal(timestep.observation[..., 1], step // 3)
        np.testing.assert_array_equal(timestep.observation[..., 2], step % 3)
        np.testing.assert_array_equal(timestep.terminated, np.full((2, 1), ended and ending == "terminated"))
        np.testing.assert_array_equal(timestep.truncated, np.full((2, 1), ended and ending == "truncated"))
        np.testing.assert_array_equal(timestep.reward, [[10.0], [20.0]])
        assert timestep.reward.dtype == timestep.next_observation.dtype == np.float32
    batch.close()
    batch.close()


def test_only_the_ended_instances_restart():
    lengths = iter([9, 2, 5, 3])  # the first is the one that the adapter looks at
    batch = GymnasiumAdapter(lambda: Counter(next(lengths))).batch([0], 3)
    batch.reset(None)
    counts, finals = [], []
    for _ in range(4):
        _, timestep = batch.step((), np.zeros((1, 3), np.int32), None)
        counts.append(timestep.observation[0, :, 2].tolist())
        finals.append(timestep.next_observation[0, :, 2].tolist())
    assert counts == [[1, 1, 1], [0, 2, 2], [1, 3, 0], [0, 4, 1]]
    assert finals == [[1, 1, 1], [2, 2, 2], [1, 3, 3], [2, 4, 1]]


def test_dictionary_observations_keep_small_types():
    environment = GymnasiumAdapter(GoalCounter, length=2)
    batch = environment.batch([0], 2)
    batch.reset(None)
    for _ in range(2):
        _, timestep = batch.step((), np.zeros((1, 2), np.int32), None)
    assert timestep.observation["image"].dtype == np.uint8 and timestep.observation["count"].dtype == np.int32
    np.testing.assert_array_equal(timestep.observation["image"], np.full((1, 2, 2), 100))
    np.testing.assert_array_equal(timestep.next_observation["image"], np.full((1, 2, 2), 102))
    np.testing.assert_array_equal(timestep.next_observation["count"], [[2, 2]])


def test_rows_depend_on_their_own_seed_alone_and_reset_repeats():
    environment = GymnasiumAdapter("CartPole-v1")
    actions = np.random.default_rng(0).integers(2, size=(60, 3, 2)).astype(np.int32)
    trajectories = []
    together = environment.batch([5, 3, 11], 2)
    for row, seed in enumerate([5, 3, 11]):
        alone = environment.batch([seed], 2)
        _, first = together.reset(None)
        _, first_alone = alone.reset(None)
        np.testing.assert_array_equal(first[row], first_alone[0])
        for action in actions:
            _, timestep = together.step((), action, None)
            _, timestep_alone = alone.step((), action[row : row + 1], None)
            for value, value_alone in zip(timestep[:5], timestep_alone[:5], strict=True):
                np.testing.assert_array_equal(value[row], value_alone[0])
        trajectories.append(first)
    np.testing.assert_array_equal(trajectories[0], trajectories[2])
    assert len(np.unique(trajectories[0][..., 0])) == 6


def test_an_instance_is_gymnasium_s_own_with_its_seed():
    batch = GymnasiumAdapter("CartPole-v1", max_episode_steps=9).batch([4], 2)
    peer = gymnasium.make("CartPole-v1", max_episode_steps=9)
    observation, _ = peer.reset(seed=instance_seed(4, 1))
    np.testing.assert_array_equal(batch.reset(None)[1][0, 1], observation)
    ends = 0
    for step in range(40):
        _, timestep = batch.step((), np.full((1, 2), step % 2, np.int32), None)
        observation, _, terminated, truncated, _ = peer.step(step % 2)
        np.testing.assert_array_equal(timestep.next_observation[0, 1], observation)
        assert (timestep.terminated[0, 1], timestep.truncated[0, 1]) == (
            terminated,
            truncated,
        )
        if terminated or truncated:
            ends += truncated
            observation, _ = peer.reset()
        np.testing.assert_array_equal(timestep.observation[0, 1], observation)
    assert ends == 4


def test_limits_and_spaces():
    assert GymnasiumAdapter("CartPole-v1").max_episode_steps == 500
    assert GymnasiumAdapter("CartPole-v1", max_episode_steps=7).max_episode_steps == 7
    assert GymnasiumAdapter(Counter).max_episode_steps is None
    limited = GymnasiumAdapter(Counter, max_episode_steps=2, length=5)
    assert limited.max_episode_steps == 2 and limited.id == "Counter"
    assert limited.observation_space == spaces.Box(-np.inf, np.inf, (3,), np.float32)
    batch = limited.batch([0], 1)
    batch.reset(None)
    flags = [batch.step((), np.zeros((1, 1), np.int32), None)[1].truncated.item() for _ in range(4)]
    assert flags == [False, True, False, True]


@pytest.mark.filterwarnings("ignore:.*ERROR")  # Gymnasium logs what it raises as well
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_instance_that_raises_is_named(vectorization):
    def fails(seed: int, instance: int) -> bool:
        return np.random.default_rng(instance_seed(seed, instance)).integers(1 << 20) % 2 == 0

    seed = next(seed for seed in range(99) if not fails(seed, 0) and fails(seed, 1))
    batch = GymnasiumAdapter(Counter, vectorization=vectorization, fails_at=2).batch([seed], 2)
    batch.reset(None)
    action = np.zeros((1, 2), np.int32)
    batch.step((), action, None)
    message = f"'Counter', environment 1 of seed {seed}: step raised ValueError: lost a leg"
    with pytest.raises(RuntimeError, match=message):
        batch.step((), action, None)
    batch.close()
    batch.close()


def needs_box2d():
    advice = 'run `pip install swig` followed by `pip install "gymnasium[box2d]"`'
    raise gymnasium.error.DependencyNotInstalled(f"Box2D is not installed, you can install it by {advice}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"id_or_factory": "CartPol-v1"},
            "unknown environment 'CartPol-v1'; did you mean 'CartPole-v1'?",
        ),
        (
            {"id_or_factory": "no_such_module:Toy-v0"},
            "no_such_module.*; install that module",
        ),
        (
            {"id_or_factory": needs_box2d},
            r'missing; pip install swig && pip install "gymnasium\[box2d\]"',
        ),
        (
            {"id_or_factory": "CartPole-v1", "gravitas": 1},
            "unexpected keyword argument 'gravitas'.*; check its options",
        ),
        ({"id_or_factory": lambda: 3}, "made int; make it return a gymnasium.Env"),
        ({"id_or_factory": 3}, "3 is no environment; give an id"),
        (
            {"id_or_factory": Counter, "max_episode_steps": 0},
            "max_episode_steps is 0; give at least 1",
        ),
        (
            {"id_or_factory": Counter, "vectorization": "asink"},
            "unknown vectorization 'asink'; did you mean 'async'?",
        ),
    ],
)
def test_slips_are_one_clear_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        GymnasiumAdapter(**arguments)
    assert "\n" not in str(caught.value)
