"""Hindsight: which goals take the place of the desired ones, against a walk through the episodes, and what follows."""

from dataclasses import replace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from probes import train
from scipy import stats

import zhixing as zx
from zhixing import environments
from zhixing.algorithms.dqn import DQN
from zhixing.assembly import build_environment, build_loop
from zhixing.config import from_mapping
from zhixing.core import Spec, hyperparameters
from zhixing.drivers.compiled import CompiledDriver
from zhixing.environments.bit_flipping import BitFlipping
from zhixing.environments.goals import ACHIEVED, DESIRED, Goals, gymnasium_goals
from zhixing.environments.gymnasium_adapter import GymnasiumAdapter
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.errors import UsageError
from zhixing.hindsight import Hindsight
from zhixing.networks import Encoder
from zhixing.replay import Replay
from zhixing.shared import over_seeds
from zhixing.transition import Transition

KEY = jax.random.PRNGKey(0)
STRATEGIES = ("future", "final", "episode", "random")
N, HORIZON, GAMMA = 3, 7, 0.9

# ------------------------------------------------------------------------------------------- a ring of numbered steps


def reached(achieved, desired):
    """Whether a goal is a multiple of another, for which both have to be looked at."""
    return (achieved % jnp.maximum(desired, 1) == 0)[..., 0]


GOALS = Goals(lambda achieved, desired: reached(achieved, desired) - 1.0, reached)
NO_END = Goals(GOALS.reward)


def numbered(start, rows, ended, terminated):
    """A rollout [T, N]: the step with number k achieves the goal k, wants 1000 + k and has the reward k / 8."""
    number = start + np.arange(rows * N).reshape(rows, N)
    goal = np.float32(number)[..., None]
    parts = {
        "observation": np.stack([goal, goal], -1)[..., 0, :],
        "achieved_goal": goal - N,
        "desired_goal": goal + 1000,
    }
    following = parts | {"achieved_goal": goal}
    flags = ended[number], terminated[number]
    step = Transition(parts, number % 4, np.float32(number) / 8, following, flags[0] & flags[1], flags[0] & ~flags[1])
    return jax.tree.map(jnp.asarray, step)


def filled(rows, capacity, strategy="future", kind="uniform", goals=GOALS, seed=0):
    """-> a replay after so many rows, written two at a time, and which numbers ended an episode of HORIZON at most."""
    generator, total = np.random.default_rng(seed), rows * N
    ended, terminated, age = np.zeros(total, bool), generator.random(total) < 0.5, np.zeros(N, int)
    for number in range(total):
        age[number % N] += 1
        ended[number] = generator.random() < 0.25 or age[number % N] == HORIZON
        age[number % N] *= not ended[number]
    replay = Replay.create(capacity, numbered(0, 1, ended, terminated), kind)
    replay = replace(replay, hindsight=Hindsight(goals, strategy, HORIZON))
    for row in range(0, rows, 2):
        replay = compiled_add(replay, numbered(row * N, min(2, rows - row), ended, terminated), 0.6)
    return replay, ended


compiled_add = jax.jit(Replay.add)


def candidates(number, strategy, ended, stored):
    """The steps whose achieved goal `number` may be given (HER.3), found by walking from step to step."""
    if strategy == "random":
        return sorted(stored)
    last = number
    while not ended[last] and last + N in stored:
        last += N
    first = number
    while first - N in stored and not ended[first - N]:
        first -= N
    walk = {"future": range(number, last + 1, N), "final": [last], "episode": range(first, last + 1, N)}
    return list(walk[strategy])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "rows, capacity",
    [(1, 36), (8, 36), (12, 36), (17, 36), (40, 38), (9, 12)],  # partly filled, full, wrapped; less than one episode
)
def test_sources(strategy, rows, capacity):
    """From each stored step exactly the steps that a walk finds, all of them equally often."""
    replay, ended = filled(rows, capacity, strategy)
    stored = set(range(rows * N)[-replay.capacity :])
    index, draws = jnp.asarray([number % replay.capacity for number in sorted(stored)]), 2_000
    keys = jax.random.split(KEY, draws)
    source = jax.jit(jax.vmap(lambda key: replay.hindsight.source(key, replay, index)))(keys)
    found = np.asarray(replay.data.next_observation["achieved_goal"])[np.asarray(source), 0]  # [draws, stored]
    lengths, probabilities = set(), []
    for number, drawn in zip(sorted(stored), found.T, strict=True):
        expected = candidates(number, strategy, ended, stored)
        values, counts = np.unique(drawn, return_counts=True)
        np.testing.assert_array_equal(values, expected)
        lengths.add(len(expected))
        if len(expected) > 1:
            probabilities.append(stats.chisquare(counts).pvalue)
    if probabilities:
        assert min(probabilities) > 1e-3 / len(probabilities)
    if strategy in ("future", "episode") and rows > 8 and capacity > 12:
        assert len(lengths) > 3  # episodes of several lengths were met


@pytest.mark.parametrize("goals", [GOALS, NO_END])
@pytest.mark.parametrize("kind", ["uniform", "proportional"])
def test_relabel(goals, kind):
    """(HER.4): both goals, the reward and the end of what is relabelled; nothing of the rest, and nothing else."""
    replay, ended = filled(17, 36, "episode", kind, goals)
    index = jnp.tile(jnp.arange(36), 60)
    weight = jnp.linspace(0.1, 1.0, len(index))
    before = replay.read(index, weight, GAMMA, 1)
    relabel = jax.jit(replay.hindsight.relabel)
    after, unchanged = (relabel(KEY, replay, index, before, ratio, GAMMA) for ratio in (0.8, 0.0))
    jax.tree.map(np.testing.assert_array_equal, unchanged, before)  # to the bit
    stored = set(range(17 * N)[-36:])
    own = np.asarray(before.observation["desired_goal"])[:, 0]
    goal = np.asarray(after.observation["desired_goal"])[:, 0]
    achieved = np.asarray(before.next_observation["achieved_goal"])[:, 0]
    changed = goal != own  # no achieved goal is also a desired one
    assert stats.binomtest(int(changed.sum()), len(index), 0.8).pvalue > 1e-3
    for number, new in zip(achieved[changed], goal[changed], strict=True):
        assert new in candidates(int(number), "episode", ended, stored)
    np.testing.assert_array_equal(after.next_observation["desired_goal"], after.observation["desired_goal"])

    met = achieved % np.maximum(goal, 1) == 0
    assert {True, False} == set(met[changed])
    np.testing.assert_array_equal(after.reward, np.where(changed, met - 1.0, before.reward))
    if goals is GOALS:
        np.testing.assert_allclose(after.discount, np.where(changed, GAMMA * ~met, before.discount), rtol=1e-6)
    else:
        np.testing.assert_array_equal(after.discount, before.discount)
    for name in ("action", "weight", "extras"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    for part in ("observation", "achieved_goal"):
        np.testing.assert_array_equal(after.observation[part], before.observation[part])
        np.testing.assert_array_equal(after.next_observation[part], before.next_observation[part])


# ------------------------------------------------------------------------------------------------- inside an algorithm

BITS = JaxAdapter("zhixing/BitFlipping-v0", BitFlipping(4))
SPEC = Spec(BITS.observation_space, BITS.action_space, 2, 1_000, max_episode_steps=4, goals=BITS.goals)


def rollout(key, length=8):
    """Steps of two environments, with random actions."""
    batch = BITS.batch([0], 2)

    def one(carry, key):
        state, observation = carry
        action = jax.random.randint(key, (1, 2), 0, 4)
        state, step = batch.step(state, action, key[None])
        rest = step.reward, step.next_observation, step.terminated, step.truncated
        return (state, step.observation), jax.tree.map(lambda x: x[0], Transition(observation, action, *rest))

    return jax.lax.scan(one, batch.reset(jax.random.split(key, 1)), jax.random.split(key, length))[1]


@pytest.mark.parametrize("kind", ["uniform", "proportional"])
def test_learn(kind):
    """A ratio of 0 is the plain replay; with prioritised replay errors go to what was drawn."""
    settings = {"hidden": (8,), "batch_size": 16, "learning_starts": 0, "replay": kind, "replay_capacity": 16}

    @jax.jit
    def learned(algorithm, key):
        steps = rollout(key)
        return algorithm.learn(algorithm.init(key, SPEC), algorithm.memory(SPEC, steps), steps, key)

    def with_ratio(ratio):
        return learned(DQN(**settings, hindsight="future", hindsight_ratio=ratio), KEY)

    plain, nothing, all_of_it = learned(DQN(**settings), KEY), with_ratio(0.0), with_ratio(1.0)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(nothing), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # two programs round sums differently
    assert not np.array_equal(plain[0].q.parameters, all_of_it[0].q.parameters)
    if kind == "proportional":
        masses, same = (np.asarray(memory.priorities.tree.leaves).ravel()[:16] for _, memory, _ in (all_of_it, plain))
        np.testing.assert_array_equal(masses != 1, same != 1)  # the same ones were drawn
        assert (masses != same).any()  # with other errors


def test_the_achieved_goal_is_not_read():
    space = BITS.observation_space
    q = DQN(hidden=(8,)).init(KEY, SPEC).q
    observation = {name: jnp.zeros((1, 4)) for name in space.spaces}
    values = {name: q(observation | {name: jnp.ones((1, 4))}) for name in space.spaces}
    np.testing.assert_array_equal(values["achieved_goal"], q(observation))
    assert not np.allclose(values["desired_goal"], q(observation))
    assert not np.allclose(values["observation"], q(observation))
    assert Encoder.of(space).size == 8
    assert Encoder.of(spaces.Dict({"achieved_goal": spaces.MultiBinary(4)})).size == 4  # a part like any other


@pytest.mark.parametrize(
    "settings, task, message",
    [
        ({}, {"goals": None}, "needs an environment whose observations have an achieved_goal"),
        ({}, {"max_episode_steps": None}, "set environment.max_episode_steps"),
        ({"n_step": 3}, {}, "set algorithm.n_step to 1"),
        ({"replay_frames": True}, {}, "set algorithm.replay_frames to false"),
        ({"hindsight_ratio": 1.5}, {}, "hindsight_ratio is 1.5; it must be from 0 to 1"),
    ],
)
def test_check(settings, task, message):
    with pytest.raises(UsageError, match=message):
        DQN(hindsight="future", **settings).check(replace(SPEC, **task))


def test_rewards_as_they_are():
    mapping = {"environment": {"id": "zhixing/BitFlipping-v0", "scale_reward": True}, "algorithm": {"name": "dqn"}}
    mapping["algorithm"]["hindsight"] = "future"
    config = from_mapping(mapping)
    with pytest.raises(UsageError, match=r"set environment\.scale_reward to false"):
        build_loop(config, build_environment(config))
    plain = replace(config, algorithm=replace(config.algorithm, hindsight="none"))
    assert build_loop(plain, build_environment(plain)).spec.goals is not None


def test_goals_are_normalised_when_they_are_read():
    """The replay keeps them as they come, so that rewards can be asked for; policy and update see them normalised."""
    seen = []

    class Numbers(BitFlipping):
        def observation_space(self, params):
            return spaces.Dict({name: spaces.Box(0.0, 1.0, (5,)) for name in super().observation_space(params)})

    @hyperparameters
    class Spy(DQN):
        def act(self, state, carry, observation, key):
            jax.debug.callback(lambda x: seen.append(("act", np.asarray(x))), observation[DESIRED])
            return super().act(state, carry, observation, key)

        def update(self, state, batch, key):
            observed = batch.next_observation[ACHIEVED], batch.next_observation[DESIRED], batch.reward
            jax.debug.callback(lambda *x: seen.append(("update", *map(np.asarray, x))), *observed)
            return super().update(state, batch, key)

    algorithm = Spy(hidden=(4,), learning_starts=64, batch_size=64, hindsight="future", replay_capacity=256)
    mapping = {"environment": {"normalize_observation": True}}
    config = from_mapping(mapping | {"algorithm": {"name": "custom"}, "num_environments": 8}, algorithm)
    environment = build_environment(config, Numbers(bits=5))
    loop = build_loop(config, environment)
    driver = CompiledDriver(loop, environment.batch([0], 8), True)
    run = driver.advance(algorithm, driver.start(algorithm), 24, 1)
    jax.block_until_ready(run)
    jax.effects_barrier()

    stored = np.asarray(run.memory.data.next_observation[DESIRED])[0, : 24 * 8]
    assert set(np.unique(stored)) == {0.0, 1.0}
    (statistics,) = [state for state in run.transforms if state != ()]
    low, high = (np.asarray((x - statistics[DESIRED].mean) / np.sqrt(statistics[DESIRED].variance))[0] for x in (0, 1))
    last = [x for x in seen if x[0] == "act"][-1][1]
    assert (
        np.isclose(last, low, atol=0.1).any()
        and (np.isclose(last, low, atol=0.1) | np.isclose(last, high, atol=0.1)).all()
    )
    _, achieved, desired, reward = [x for x in seen if x[0] == "update"][-1]
    reached = (achieved > 0) == (desired > 0)
    assert (np.abs(desired) > 0.5).all() and 0 < (reward == 0).sum() < 64
    np.testing.assert_array_equal(reached.all(-1), reward == 0)


# ----------------------------------------------------------------------------------------------------------- the bits


def test_bit_flipping():
    environment = environments.make("zhixing/BitFlipping-v0", bits=6)
    assert (environment.max_episode_steps, environment.action_space.n, environment.backend) == (6, 6, "jax")
    batch = environment.batch([0], 64)
    state, observation = batch.reset(jax.random.split(KEY, 1))
    bits, goal = (np.asarray(observation[name][0]) for name in ("observation", "desired_goal"))
    assert environment.observation_space.contains(jax.tree.map(lambda x: np.asarray(x)[0, 0], observation))
    assert stats.binomtest(int(bits.sum() + goal.sum()), 2 * 64 * 6).pvalue > 1e-3
    distance, step = (bits != goal).sum(-1), jax.jit(batch.step)
    for t in range(1, 7):  # the first bit that is wrong is flipped; the last one where none is
        wrong = bits != goal
        action = np.where(wrong.any(-1), wrong.argmax(-1), 5)
        state, timestep = step(state, action[None], jax.random.split(jax.random.PRNGKey(t), 1))
        flipped = np.where(np.arange(6) == action[:, None], 1 - bits, bits)
        known = distance >= t  # the others have begun another episode
        for name, expected in (("observation", flipped), ("achieved_goal", flipped), ("desired_goal", goal)):
            np.testing.assert_array_equal(timestep.next_observation[name][0][known], expected[known])
        np.testing.assert_array_equal(timestep.reward[0][known], np.where(distance == t, 0.0, -1.0)[known])
        np.testing.assert_array_equal(timestep.terminated[0][known], (distance == t)[known])
        np.testing.assert_array_equal(timestep.truncated[0][known], t == 6)
        bits, goal = (np.asarray(timestep.observation[name][0]) for name in ("observation", "desired_goal"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 0}, "bits is 0; it must be a whole number"),
        ({"bits": 2.5}, "bits is 2.5; it must be a whole number"),
        ({"bit": 3}, "did you mean 'bits'"),
    ],
)
def test_options_of_bit_flipping(options, message):
    with pytest.raises(UsageError, match=message):
        environments.make("zhixing/BitFlipping-v0", **options)


def test_hindsight_learns():
    """Eight bits: whatever the bits and the goal, the greedy action flips one that is wrong."""
    environment = environments.make("zhixing/BitFlipping-v0", bits=8)
    settings = {"hidden": (128,), "discount": 0.98, "target_update": "polyak", "polyak": 0.05, "batch_size": 64}
    settings |= {"rollout_length": 4, "gradient_steps": 8, "learning_starts": 200, "replay_capacity": 5_000}
    run = train(DQN(hindsight="future", **settings), environment, 4_000)
    bits, goal = jax.random.bernoulli(KEY, shape=(2, 1_000, 8)).astype(jnp.int8)
    bits = bits.at[:, 0].set(1 - goal[:, 0])  # at least one is wrong
    observation = {"observation": bits, "achieved_goal": bits, "desired_goal": goal}
    policy = DQN(**settings).policy
    action = over_seeds(policy, 2, run.learner, jax.tree.map(lambda x: jnp.stack([x, x]), observation))
    flips_a_wrong_one = jnp.take_along_axis(jnp.stack([bits != goal] * 2), action[..., None], -1)
    assert flips_a_wrong_one.mean((1, 2)).min() > 0.99


# ---------------------------------------------------------------------------------------------------- from Python


class Line(gymnasium.Env):
    """A point on a line that seeks another one; goals are vectors."""

    observation_space = spaces.Dict(
        {name: spaces.Box(-9, 9, (2,), np.float64) for name in ("observation", "achieved_goal", "desired_goal")}
    )
    action_space = spaces.Discrete(4)
    asked: list[tuple] = []  # the shapes of what `compute_reward` was asked for

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.integers(-2, 3, (2, 2)).astype(np.float64)
        return self.observation(), {}

    def step(self, action):
        self.place = self.place + [(0, 1), (1, 0), (0, -1), (-1, 0)][action]
        reward = float(self.compute_reward(self.place, self.goal, {}))
        return self.observation(), reward, reward == 0, False, {}

    def observation(self):
        return {"observation": self.place, "achieved_goal": self.place, "desired_goal": self.goal}

    def compute_reward(self, achieved, desired, info):
        self.asked.append(np.shape(achieved))
        return -(np.linalg.norm(achieved - desired, axis=-1) > 0.5).astype(np.float64)


class OneByOne(Line):
    """Answers for one goal alone, as a few of Gymnasium-Robotics' environments do."""

    def compute_terminated(self, achieved, desired, info):
        return bool(np.linalg.norm(achieved - desired) <= 0.5)


@pytest.mark.parametrize("kind", [Line, OneByOne])
def test_goals_of_a_gymnasium_environment(kind):
    """The wrapped environment's own functions, from inside a vmapped program."""
    goals = gymnasium_goals(gymnasium.wrappers.TimeLimit(kind(), 10))
    generator = np.random.default_rng(0)
    achieved, desired = np.float32(generator.integers(0, 2, (2, 5, 3, 2)))
    met = (achieved == desired).all(-1)
    assert {True, False} == set(met.ravel())
    reward = jax.jit(jax.vmap(goals.reward))(achieved, desired)
    np.testing.assert_array_equal(reward, met - 1.0)
    assert reward.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(goals.reward)(achieved[0], desired[0]), met[0] - 1.0)
    if kind is Line:
        assert goals.terminated is None
    else:
        np.testing.assert_array_equal(jax.jit(jax.vmap(goals.terminated))(achieved, desired), met)


def test_no_goals():
    assert environments.make("CartPole-v1").goals is None
    assert GymnasiumAdapter("CartPole-v1").goals is None
    assert gymnasium_goals(gymnasium.wrappers.FlattenObservation(Line())) is None


def test_training_from_python(tmp_path):
    """Two seeds learn side by side; the rewards of whole minibatches are asked for at once."""
    Line.asked.clear()
    settings = {"total_steps": 160, "seeds": 2, "num_environments": 2, "record": {"tensorboard": False}}
    settings["algorithm"] = {"hindsight": "future", "learning_starts": 60, "hidden": [16], "replay_capacity": 500}
    settings["algorithm"]["batch_size"] = 256
    settings["evaluation"] = {"every": 160, "episodes": 2, "final_episodes": 2}
    environment = {"max_episode_steps": 8}
    run = zx.train("dqn", Line, environment=environment, run_dir=tmp_path / "run", quiet=True, **settings)
    assert Line.asked.count((512, 2)) >= 50  # once an update
    assert np.isfinite(run.evaluate(2)["mean"])
    observation = {name: np.zeros(2) for name in Line.observation_space.spaces}
    assert run.policy(observation) in range(4)
