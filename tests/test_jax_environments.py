"""JAX environments: parity with Gymnasium, tables, and what the adapter does at the end of an episode."""

from functools import cache

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zhixing.environments.classic_control import CLASSIC_CONTROL
from zhixing.environments.jax_adapter import JaxAdapter, JaxEnvironment
from zhixing.environments.tabular import TabularEnv
from zhixing.environments.teaching import TEACHING, Maze4x4, TMaze, TreasureLine
from zhixing.errors import UsageError

PI = np.pi
IDS = list(CLASSIC_CONTROL)
# What to draw test states from, wider than where episodes start, and actions beyond their bounds where allowed.
STATE_BOUNDS = {
    "CartPole-v1": [2.6, 3, 0.23, 3],
    "MountainCar-v0": [0.9, 0.07],
    "MountainCarContinuous-v0": [0.9, 0.07],
    "Pendulum-v1": [20, 8],
    "Acrobot-v1": [PI, PI, 4 * PI, 9 * PI],
}
STATE_CENTRES = {"MountainCar-v0": [-0.3, 0], "MountainCarContinuous-v0": [-0.3, 0]}
# The bounds that Gymnasium's source states for the reset, low and high of each part of the state.
RESET_BOUNDS = {
    "CartPole-v1": [(-0.05, 0.05)] * 4,
    "MountainCar-v0": [(-0.6, -0.4), (0, 0)],
    "MountainCarContinuous-v0": [(-0.6, -0.4), (0, 0)],
    "Pendulum-v1": [(-PI, PI), (-1, 1)],
    "Acrobot-v1": [(-0.1, 0.1)] * 4,
}


def random_states_and_actions(id, count=400):
    generator = np.random.default_rng(0)
    bound = np.array(STATE_BOUNDS[id])
    states = generator.uniform(-bound, bound, (count, len(bound))) + STATE_CENTRES.get(id, 0)
    if "MountainCar" in id:
        states[:20] = [-1.19, -0.06]  # into the wall
        states[20:40] = [0.49, 0.03]  # over the goal
    space = gymnasium.make(id).action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return states.astype(np.float32), generator.integers(space.n, size=count).astype(np.int32)
    return states.astype(np.float32), generator.uniform(-2 * space.high, 2 * space.high, (count, 1)).astype(np.float32)


def runner(adapter, policy, length, num_environments=2):
    """Act for `length` steps with `policy(observation, key)`: keys [S] -> timesteps [length, S, N, ...], compiled."""
    batch = adapter.batch([0], num_environments)

    def scan(keys):
        def body(carry, t):
            state, observation = carry
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            state, timestep = batch.step(state, policy(observation, step_keys), step_keys)
            return (state, timestep.observation), timestep

        return jax.lax.scan(body, batch.reset(keys), jnp.arange(length))[1]

    return jax.jit(scan)


def run(adapter, keys, policy, length, num_environments=2):
    return runner(adapter, policy, length, num_environments)(keys)


def constant(action):
    action = jnp.asarray(action)
    return lambda observation, keys: jnp.broadcast_to(action, jax.tree.leaves(observation)[0].shape[:2] + action.shape)


def uniform_actions(num_actions):
    def policy(observation, keys):
        shape = observation.shape[1:2]
        return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 99), shape, 0, num_actions))(keys)

    return policy


# --- parity with Gymnasium ---------------------------------------------------------------------------------


@pytest.mark.parametrize("id", IDS)
def test_one_step_equals_gymnasium(id):
    states, actions = random_states_and_actions(id)
    ours = CLASSIC_CONTROL[id]()
    kind = type(ours.reset_env(jax.random.key(0), ours.default_params)[1])
    step = jax.jit(jax.vmap(lambda state, action: ours.step_env(None, kind(*state), action, ours.default_params)[:4]))
    observation, new_state, reward, terminated = jax.tree.map(np.asarray, step(states, actions))

    theirs = gymnasium.make(id).unwrapped
    theirs.reset(seed=0)
    expected = []
    for state, action in zip(states, actions, strict=True):
        theirs.state = np.array(state, np.float64)
        theirs.steps_beyond_terminated = None
        expected.append((*theirs.step(action)[:3], np.array(theirs.state, np.float32)))
    their_observation, their_reward, their_terminated, their_state = map(np.array, zip(*expected, strict=True))

    np.testing.assert_array_equal(terminated, their_terminated)
    assert 0 < terminated.sum() < len(states) or id == "Pendulum-v1"
    tolerance = {"rtol": 1e-4, "atol": 2e-4} if id == "Acrobot-v1" else {"rtol": 1e-5, "atol": 2e-6}
    np.testing.assert_allclose(observation, their_observation, **tolerance)
    np.testing.assert_allclose(reward, their_reward, rtol=1e-5, atol=2e-5)
    turned = np.stack(new_state, -1) - their_state
    if id == "Acrobot-v1":  # pi and -pi are one angle
        turned[:, :2] -= 2 * PI * np.round(turned[:, :2] / (2 * PI))
    np.testing.assert_allclose(turned, 0, atol=5e-4 if id == "Acrobot-v1" else 1e-5)


@pytest.mark.parametrize("id", IDS)
def test_spaces_and_limit_equal_gymnasium(id):
    ours, theirs = JaxAdapter(id, CLASSIC_CONTROL[id]()), gymnasium.make(id)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.max_episode_steps == theirs.spec.max_episode_steps


@pytest.mark.parametrize("id", IDS)
def test_reset_distribution(id):
    ours = CLASSIC_CONTROL[id]()
    reset = jax.jit(jax.vmap(lambda key: ours.reset_env(key, ours.default_params)))
    observation, state = reset(jax.random.split(jax.random.key(0), 10_000))
    drawn = np.stack(state, -1)
    theirs = gymnasium.make(id)
    theirs.reset(seed=0)
    their_drawn = np.array([(theirs.reset(), theirs.unwrapped.state)[1] for _ in range(300)])

    low, high = np.array(RESET_BOUNDS[id]).T
    width = high - low
    for sample in (drawn, their_drawn):
        assert (sample >= low - 1e-6).all() and (sample <= high + 1e-6).all()
        assert (np.abs(sample.min(0) - low) <= 0.05 * width).all() and (
            np.abs(sample.max(0) - high) <= 0.05 * width
        ).all()
    # A uniform's mean and standard deviation; their own errors are width / sqrt(12 n) and smaller.
    np.testing.assert_array_less(np.abs(drawn.mean(0) - (low + high) / 2), 5 * width / np.sqrt(12 * 10_000) + 1e-6)
    np.testing.assert_array_less(np.abs(drawn.std(0) - width / np.sqrt(12)), 0.02 * width + 1e-6)
    correlation = np.corrcoef(drawn[:, width > 0].T)
    assert np.abs(correlation - np.eye(len(np.atleast_2d(correlation)))).max() < 0.05
    assert all(theirs.observation_space.contains(first) for first in np.asarray(observation[:20]))


BALANCE = np.array([0.1, 0.2, 2.0, 0.6], np.float32)
LIMIT_POLICIES = {  # policies under which no episode terminates
    "CartPole-v1": lambda observation: (observation @ BALANCE > 0).astype(np.int32),
    "MountainCar-v0": lambda observation: 1 + 0 * observation[..., 0].astype(np.int32),
    "MountainCarContinuous-v0": lambda observation: 0 * observation[..., :1],
    "Pendulum-v1": lambda observation: 0 * observation[..., :1],
    "Acrobot-v1": lambda observation: 1 + 0 * observation[..., 0].astype(np.int32),
}


@pytest.mark.parametrize("id", IDS)
def test_time_limit_truncates_where_gymnasium_does(id):
    policy, limit = LIMIT_POLICIES[id], gymnasium.make(id).spec.max_episode_steps
    keys = jax.random.split(jax.random.key(1), 1)
    steps = run(JaxAdapter(id, CLASSIC_CONTROL[id]()), keys, lambda observation, _: policy(observation), 2 * limit + 1)
    assert not steps.terminated.any()
    where = np.flatnonzero(np.asarray(steps.truncated)[:, 0, 0])
    np.testing.assert_array_equal(where, [limit - 1, 2 * limit - 1])  # and the counter starts again

    theirs = gymnasium.make(id)
    observation, _ = theirs.reset(seed=0)
    for step in range(1, limit + 1):
        action = policy(observation)
        observation, _, terminated, truncated, _ = theirs.step(int(action) if action.ndim == 0 else action)
        assert not terminated and truncated == (step == limit)


def test_termination_at_the_limit_is_also_truncation():
    theirs = gymnasium.make("CartPole-v1")
    theirs.reset(seed=0)
    length = 1
    while not theirs.step(1)[2]:
        length += 1
    theirs = gymnasium.make("CartPole-v1", max_episode_steps=length)
    theirs.reset(seed=0)
    assert [theirs.step(1)[2:4] for _ in range(length)][-1] == (True, True)

    # `test_end_of_an_episode` holds ours to the same where its limit is 3


def test_no_limit_never_truncates():
    adapter = JaxAdapter("zhixing/TreasureLine-v0", TreasureLine(), max_episode_steps=None)
    steps = run(adapter, jax.random.split(jax.random.key(0), 1), constant(0), 150)
    assert adapter.max_episode_steps is None
    assert not steps.truncated.any() and not steps.terminated.any()


# --- tables ------------------------------------------------------------------------------------------------

TABLES = [
    ("FrozenLake-v1", {}),
    ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}),
    ("FrozenLake8x8-v1", {}),
    ("CliffWalking-v1", {}),
    ("CliffWalkingSlippery-v1", {}),
    ("Taxi-v4", {}),
    ("Taxi-v4", {"is_rainy": True}),
]


@cache
def slippery_lake():
    return TabularEnv.from_gymnasium("FrozenLake-v1")


@pytest.mark.parametrize(("id", "arguments"), TABLES)
def test_table_equals_gymnasium(id, arguments):
    theirs = gymnasium.make(id, **arguments)
    ours = TabularEnv.from_gymnasium(id, **arguments)
    for state, actions in theirs.unwrapped.P.items():
        for action, outcomes in actions.items():
            here = ours.probabilities[state, action] > 0
            rows = zip(
                ours.probabilities[state, action][here],
                ours.successors[state, action][here],
                ours.rewards[state, action][here],
                ours.terminated[state, action][here],
                strict=True,
            )
            assert list(rows) == [outcome for outcome in outcomes if outcome[0] > 0]
    starts = theirs.unwrapped.initial_state_distrib
    np.testing.assert_array_equal(ours.initial_distribution, starts)
    assert ours.start_states.tolist() == [state for state, probability in enumerate(starts) if probability > 0]
    adapter = JaxAdapter(id, ours)
    assert adapter.max_episode_steps == theirs.spec.max_episode_steps
    assert (adapter.observation_space, adapter.action_space) == (theirs.observation_space, theirs.action_space)


def test_outcomes_are_drawn_with_the_table_s_probabilities():
    lake, draws = slippery_lake(), 3_000
    rows = np.array([(s, a) for s in range(16) if s not in (5, 7, 11, 12, 15) for a in range(4)])
    step = jax.vmap(jax.vmap(lambda key, s, a: lake.step_env(key, s, a, ())[1], (0, None, None)))
    keys = jax.random.split(jax.random.key(0), (len(rows), draws))
    successors = np.asarray(jax.jit(step)(keys, rows[:, 0], rows[:, 1]))
    for (state, action), drawn in zip(rows, successors, strict=True):
        expected = np.zeros(16)
        for probability, successor, _, _ in gymnasium.make("FrozenLake-v1").unwrapped.P[state][action]:
            expected[successor] += probability
        frequency = np.bincount(drawn, minlength=16) / draws
        assert (np.abs(frequency - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()


def test_starts_are_drawn_with_the_initial_distribution():
    taxi = TabularEnv.from_gymnasium("Taxi-v4")
    keys = jax.random.split(jax.random.key(0), 60_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: taxi.reset_env(key, ())[0]))(keys))
    counts = np.bincount(drawn, minlength=500)
    expected = taxi.initial_distribution * len(keys)
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert counts[expected == 0].sum() == 0
    assert abs(chi_square - 299) < 5 * np.sqrt(2 * 299)  # 300 start states


def test_uniform_policy_on_frozen_lake_has_the_exact_return():
    keys = jax.random.split(jax.random.key(0), 1)
    steps = run(JaxAdapter("FrozenLake-v1", slippery_lake()), keys, uniform_actions(4), 100, num_environments=20_000)
    ended = np.asarray(steps.terminated | steps.truncated)[:, 0]
    first_episode = np.cumsum(ended, 0) - ended == 0
    returns = (np.asarray(steps.reward)[:, 0] * first_episode).sum(0)
    assert ended.any(0).all()
    assert abs(returns.mean() - 0.01394) < 4 * np.sqrt(0.01394 / 20_000)  # exact, by dynamic programming


def test_rows_of_different_length_and_impossible_outcomes():
    table = {0: {0: [(0.0, 0, 5.0, False), (0.25, 1, 1.0, False), (0.75, 2, 2.0, True), (0.0, 0, 5.0, False)]}}
    table |= {state: {0: [(1.0, state, 0.0, True)]} for state in (1, 2)}
    chain = TabularEnv(table, [1, 0, 0])
    keys = jax.random.split(jax.random.key(0), 4_000)
    step = jax.jit(jax.vmap(lambda key, state: chain.step_env(key, state, 0, ())[1:3], (0, None)))
    successors, rewards = step(keys, 0)
    assert set(np.unique(successors)) == {1, 2}
    assert abs(float(jnp.mean(rewards)) - 1.75) < 0.04
    assert set(np.unique(step(keys, 1)[0])) == {1}


def test_deterministic_table_draws_nothing():
    def primitives(environment):
        return str(jax.make_jaxpr(lambda key, s, a: environment.step_env(key, s, a, ()))(jax.random.key(0), 0, 0))

    assert "random_bits" in primitives(slippery_lake())
    assert "random_bits" not in primitives(Maze4x4())


def test_maze_and_treasure_line():
    maze, line = Maze4x4(), TreasureLine()
    assert maze.start_states.tolist() == [0] and line.start_states.tolist() == [0]
    step = jax.jit(lambda s, a: maze.step_env(None, s, a, ())[1:4])
    # along the upper and the right border, then left into the goal
    path, rewards, ends, state = [2, 2, 2, 1, 1, 0], [], [], 0
    for action in path:
        state, reward, end = step(state, action)
        rewards.append(float(reward))
        ends.append(bool(end))
    assert (int(state), rewards, ends) == (10, [0, 0, 0, 0, 0, 1], [False] * 5 + [True])
    assert [tuple(map(float, step(2, 1))), tuple(map(float, step(0, 0)))] == [(6, -1, 1), (0, 0, 0)]
    assert (maze.rewards == -1).sum() == 6 and (maze.rewards == 1).sum() == 2  # 3 ways into each pit, 2 to the goal
    assert maze.render_text(5) == "S...\n.@X.\n.XG.\n...."
    assert [line.render_text(0), line.render_text(5)] == ["@....G", "S....@"]

    keys = jax.random.split(jax.random.key(0), 1)
    right = run(JaxAdapter("zhixing/TreasureLine-v0", line), keys, constant(1), 10, num_environments=1)
    assert right.reward[:, 0, 0].tolist() == [0, 0, 0, 0, 1] * 2
    left = run(JaxAdapter("zhixing/TreasureLine-v0", line), keys, constant(0), 100, num_environments=1)
    assert np.flatnonzero(left.truncated[:, 0, 0]).tolist() == [99]
    assert set(TEACHING) == {"zhixing/Maze-v0", "zhixing/TreasureLine-v0", "zhixing/TMaze-v0"}


def test_t_maze():
    """Eleven steps whatever is done on the way; all but the first observation is alike on both sides."""
    maze = TMaze()
    adapter = JaxAdapter("zhixing/TMaze-v0", maze)
    played = run(adapter, jax.random.split(jax.random.key(0), 1), constant(0), 44, num_environments=8)
    cue = np.asarray(played.observation)[:, 0]  # to act on next: the first of a new episode where one ended
    rewards, ends = np.asarray(played.reward)[:, 0], np.asarray(played.terminated)[:, 0]
    assert np.flatnonzero(ends.all(-1)).tolist() == [10, 21, 32, 43] and not ends[:10].any()
    assert set(cue[10]) <= {0, 1} and len(np.unique(cue[[10, 21, 32]])) == 2
    np.testing.assert_array_equal(rewards[21], np.where(cue[10] == 0, 1.0, -1.0))  # up is right where 0 was shown
    np.testing.assert_array_equal(cue[11:20], 2)
    np.testing.assert_array_equal(cue[20], 3)
    assert maze.render_text(0) == f"{' ' * 10}G\n@{'.' * 10}\n{' ' * 10}X"
    assert maze.render_text(12 + 10) == f"{' ' * 10}X\nD{'.' * 9}@\n{' ' * 10}G"


def test_grids_of_gymnasium_are_drawn():
    assert slippery_lake().render_text(6) == "SFFF\nFH@H\nFFFH\nHFFG"
    assert TabularEnv.from_gymnasium("CliffWalking-v1").render_text(24).splitlines()[2:] == [
        "@" + "." * 11,
        "SCCCCCCCCCCG",
    ]
    assert TabularEnv.from_gymnasium("Taxi-v4").render_text(3) == "state 3"


# --- the adapter -------------------------------------------------------------------------------------------


class Countdown(JaxEnvironment):
    """Each episode draws a number, shows it next to the steps taken, and terminates after three steps."""

    def reset_env(self, key, params):
        state = {"drawn": jax.random.uniform(key), "steps": 0, "key": key}
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        state = {**state, "steps": state["steps"] + 1}
        return self.observe(state), state, action, state["steps"] >= 3, {}

    def observe(self, state):
        return {"drawn": state["drawn"], "steps": jnp.int32(state["steps"])}

    def observation_space(self, params):
        return gymnasium.spaces.Dict({"drawn": gymnasium.spaces.Box(0, 1, ()), "steps": gymnasium.spaces.Discrete(4)})

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)


class Protocol:
    """A user's object with nothing but the protocol: `Countdown` seen from outside, resetting itself."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = Countdown().observation_space(())

    def reset(self, key, params):
        return Countdown().reset(key, ())

    def step(self, key, state, action, params):
        return Countdown().step(key, state, action, ())


@pytest.mark.parametrize("environment", [Countdown, Protocol])
@pytest.mark.parametrize("limit", ["own", 2, 3])
def test_end_of_an_episode(environment, limit):
    keys = jax.random.split(jax.random.key(0), 2)
    adapter = JaxAdapter("user/Countdown", environment(), max_episode_steps=limit)
    steps = run(adapter, keys, constant(1), 9, num_environments=3)
    period = 2 if limit == 2 else 3
    ends = np.arange(1, 10) % period == 0
    assert steps.terminated.shape == (9, 2, 3)
    assert (steps.reward.dtype, steps.terminated.dtype, steps.truncated.dtype) == (jnp.float32, bool, bool)
    assert (steps.terminated == (ends if period == 3 else False * ends)[:, None, None]).all()
    assert (steps.truncated == (False * ends if limit == "own" else ends)[:, None, None]).all()
    # the true successor counts on to the end, the one to act on is a fresh one
    assert (steps.next_observation["steps"] == (np.arange(9) % period + 1)[:, None, None]).all()
    assert (steps.observation["steps"] == (np.arange(1, 10) % period)[:, None, None]).all()
    np.testing.assert_array_equal(steps.next_observation["drawn"][1:], steps.observation["drawn"][:-1])
    changed = np.asarray(steps.next_observation["drawn"] != steps.observation["drawn"])
    assert (changed == ends[:, None, None]).all()
    assert len(np.unique(steps.observation["drawn"])) == 6 * (9 // period + 1)  # no episode's number comes twice


@pytest.mark.parametrize("kind", [Countdown, CLASSIC_CONTROL["CartPole-v1"], slippery_lake])
def test_a_seed_runs_alone_as_among_others(kind):
    keys = jax.random.split(jax.random.key(3), 3)
    compiled = runner(JaxAdapter("x", kind()), constant(1), 60, num_environments=4)
    together = compiled(keys)
    assert (together.terminated | together.truncated).any()
    for seed in range(3):
        alone = compiled(keys[seed : seed + 1])
        for ours, among_others in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(ours[:, 0], among_others[:, seed])


def test_raw_keys_are_as_good_as_typed():
    batch = JaxAdapter("CartPole-v1", CLASSIC_CONTROL["CartPole-v1"]()).batch([0, 1], 2)
    typed = jax.random.split(jax.random.key(0), 2)
    _, expected = batch.reset(typed)
    _, observation = batch.reset(jax.random.key_data(typed))
    np.testing.assert_array_equal(observation, expected)
    assert len(np.unique(observation)) == observation.size


def carried_types(adapter):
    """Types of the state and observation before and after a step: unlike ones would be traced twice."""
    batch, keys = adapter.batch([0], 2), jax.random.split(jax.random.key(0), 1)
    space = adapter.action_space
    action = (
        jnp.zeros((1, 2), jnp.int32)
        if isinstance(space, gymnasium.spaces.Discrete)
        else jnp.zeros((1, 2, *space.shape))
    )
    before = jax.eval_shape(batch.reset, keys)
    state, timestep = jax.eval_shape(batch.step, before[0], action, keys)
    types = [
        [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
        for tree in (before, (state, timestep.observation))
    ]
    return types


@pytest.mark.parametrize("kind", [*CLASSIC_CONTROL.values(), Countdown, Protocol, Maze4x4])
def test_types_stay_the_same_over_a_step(kind):
    before, after = carried_types(JaxAdapter("x", kind()))
    assert before == after
    assert not any(weak for _, _, weak in before)


def test_protocol_of_our_own_environments():
    class Short(Countdown):
        max_episode_steps = 2

    environment, key = Short(), jax.random.key(0)
    _, state = environment.reset(key)
    observation, state, reward, terminated, truncated, info = environment.step(key, state, jnp.float32(1))
    assert (int(observation["steps"]), float(reward), bool(terminated), bool(truncated)) == (1, 1.0, False, False)
    observation, state, _, terminated, truncated, info = environment.step(key, state, jnp.float32(1))
    assert (bool(terminated), bool(truncated)) == (False, True)
    assert (int(observation["steps"]), int(info["final_observation"]["steps"]), int(state.steps)) == (0, 2, 0)


def test_gymnax_environments_run():
    gymnax = pytest.importorskip("gymnax")
    keys = jax.random.split(jax.random.key(0), 1)

    cart_pole, params = gymnax.make("CartPole-v1")
    adapter = JaxAdapter("gymnax/CartPole-v1", cart_pole, params.replace(max_steps_in_episode=7))
    assert adapter.action_space == gymnasium.spaces.Discrete(2) and adapter.max_episode_steps == 7
    assert adapter.observation_space.shape == (4,) and adapter.observation_space.dtype == np.float32
    np.testing.assert_allclose(adapter.observation_space.high[[0, 2]], [4.8, 0.41887903], rtol=1e-6)
    steps = run(adapter, keys, constant(1), 14)
    assert np.flatnonzero(steps.truncated[:, 0, 0]).tolist() == [6, 13] and not steps.terminated.any()
    assert np.abs(steps.observation[6]).max() <= 0.05 < np.abs(steps.next_observation[6]).max()
    longer = JaxAdapter("gymnax/CartPole-v1", cart_pole, adapter.params, max_episode_steps=8)
    steps = run(longer, keys, constant(1), 14)
    assert np.flatnonzero(steps.truncated[:, 0, 0]).tolist() == [7]

    breakout = JaxAdapter("Breakout-MinAtar", gymnax.make("Breakout-MinAtar")[0])
    assert breakout.observation_space.shape == (10, 10, 4) and breakout.max_episode_steps == 1000
    steps = run(breakout, keys, constant(0), 30)
    assert steps.terminated.any() and not steps.truncated.any() and steps.observation.shape == (30, 1, 2, 10, 10, 4)
    before, after = carried_types(breakout)
    assert before == after


# --- a user's slips ----------------------------------------------------------------------------------------


def test_slips_are_named():
    with pytest.raises(UsageError, match="max_episode_steps of 'x' is 0"):
        JaxAdapter("x", Countdown(), max_episode_steps=0)
    with pytest.raises(UsageError, match=r"max_episode_steps of 'x' is 1.5"):
        JaxAdapter("x", Countdown(), max_episode_steps=1.5)
    with pytest.raises(UsageError, match="has no 'step'"):
        JaxAdapter("x", type("Half", (), {"reset": None, "observation_space": None, "action_space": None})())
    with pytest.raises(UsageError, match="space of type int"):
        JaxAdapter("x", type("Odd", (Protocol,), {"observation_space": 3})())
    with pytest.raises(UsageError, match="sum to 1"):
        TabularEnv({0: {0: [(0.5, 0, 0.0, False)]}}, [1.0])
    with pytest.raises(UsageError, match="has 1 states"):
        TabularEnv({0: {0: [(1.0, 1, 0.0, False)]}}, [1.0])
    for id, arguments in [("FrozenLake-v9", {}), ("FrozenLake-v1", {"slippery": False})]:
        with pytest.raises(UsageError, match="Gymnasium cannot make"):
            TabularEnv.from_gymnasium(id, **arguments)
    for id, arguments in [("CartPole-v1", {}), ("Taxi-v4", {"fickle_passenger": True})]:
        with pytest.raises(UsageError, match="not described by a table"):
            TabularEnv.from_gymnasium(id, **arguments)
