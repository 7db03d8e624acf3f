"""Many agents as an axis, from an environment's dictionaries to a run's records; and runs that play each other."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command, refused, succeed
from gymnasium import spaces
from probes import box

import zhixing as zx
from zhixing import records
from zhixing.agents import Agents, StackAgents
from zhixing.cross_play import Side, cross_play, table
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.environments.transforms import Chain, RescaleAction, ScaleReward, Spaces
from zhixing.errors import UsageError

KEY = jax.random.PRNGKey(0)


def agents_of(observation_spaces, action_spaces):
    """`{name: space}` twice -> the agents, and their chain of transforms."""
    inner = Spaces(spaces.Dict(observation_spaces), spaces.Dict(action_spaces))
    agents = Agents.of(tuple(observation_spaces), *inner)
    return agents, Chain((StackAgents(agents), RescaleAction()), inner)


SEEN = {"red_0": box(2), "red_1": spaces.Discrete(4), "blue_0": spaces.Dict(a=box(1), b=box(2))}


# ------------------------------------------------------------------------------------------------------------- the axis


def test_observations_become_rows():
    """Numbers flattened, indices one-hot, parts of a dictionary one after the other; zeros behind."""
    agents, chain = agents_of(SEEN, dict.fromkeys(SEEN, spaces.Discrete(2)))
    observation = {
        "red_0": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "red_1": jnp.array([1, 3]),
        "blue_0": {"a": jnp.array([[5.0], [6.0]]), "b": jnp.array([[7.0, 8.0], [9.0, 10.0]])},
    }
    expected = [[[1, 2, 0, 0], [0, 1, 0, 0], [5, 7, 8, 0]], [[3, 4, 0, 0], [0, 0, 0, 1], [6, 9, 10, 0]]]
    np.testing.assert_array_equal(chain.observe(chain.init(2), observation), expected)
    assert chain.spaces.observation.shape == (3, 4) == (agents.count, agents.observation_size)


def test_discrete_actions_go_back():
    """By name, and counted from where the agent's own space begins."""
    sizes = {"red_0": spaces.Discrete(2), "red_1": spaces.Discrete(3, start=1), "blue_0": spaces.Discrete(3, start=-1)}
    agents, chain = agents_of(SEEN, sizes)
    assert agents.discrete and agents.action_sizes == (2, 3, 3) and agents.action_size == 3
    assert chain.spaces.action == spaces.MultiDiscrete([2, 3, 3])
    np.testing.assert_array_equal(agents.allowed, [[True, True, False], [True] * 3, [True] * 3])
    back = chain.action(jnp.array([[0, 0, 0], [1, 2, 2]]))
    assert {name: x.tolist() for name, x in back.items()} == {"red_0": [0, 1], "red_1": [1, 3], "blue_0": [-1, 1]}
    assert all(space.contains(np.int64(back[name][1])) for name, space in sizes.items())


def test_continuous_actions_go_back():
    """From [-1, 1], clipped, to each agent's own bounds, without the numbers that it does not have."""
    bounds = {
        "red_0": spaces.Box(-2, 4, (1,), np.float32),
        "red_1": spaces.Box(np.float32([0, -10]), np.float32([1, 10])),
        "blue_0": spaces.Box(-1, 1, (3,), np.float32),
    }
    agents, chain = agents_of(SEEN, bounds)
    assert not agents.discrete and agents.action_sizes == (1, 2, 3)
    assert chain.spaces.action == spaces.Box(-1, 1, (3, 3), np.float32)
    action = jnp.array([[[-1.0, 9, 9], [1.0, 0.5, 9], [0.25, -0.5, -7.0]]])
    back = chain.action(action)
    expected = {"red_0": [[-2.0]], "red_1": [[1.0, 5.0]], "blue_0": [[0.25, -0.5, -1.0]]}
    assert back.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_allclose(back[name], rows, rtol=1e-6)


def test_kinds_and_teams():
    names = ("wolf_0", "wolf_1", "wolf_2", "sheep_0", "dog")
    seen = dict(zip(names, (box(2), box(2), box(3), box(2), box(2)), strict=True))
    agents, _ = agents_of(seen, dict.fromkeys(names, spaces.Discrete(2)))
    assert agents.kinds == (0, 0, 1, 2, 3)  # the third wolf sees more than the others
    assert agents.teams == {"wolf": (0, 1, 2), "sheep": (3,), "dog": (4,)}


@pytest.mark.parametrize(
    "actions, message",
    [
        (
            (spaces.Discrete(2), box(2)),
            r"^agents must all have Discrete actions, or all Box with one axis; these have a_0: ",
        ),
        ((box(2, 2), box(2)), r"^agents must all have Discrete actions, or all Box with one axis; "),
        ((spaces.MultiBinary(2),) * 2, r"^agents must all have Discrete actions, or all Box with one axis; "),
    ],
)
def test_actions_that_are_refused(actions, message):
    with pytest.raises(UsageError, match=message):
        agents_of({"a_0": box(2), "b_0": box(2)}, dict(zip(("a_0", "b_0"), actions, strict=True)))


def test_masks_are_refused():
    masked = spaces.Dict(action_mask=spaces.MultiBinary(2), seen=box(2))
    with pytest.raises(UsageError, match=r"^agents with an action_mask are not known; wrap the environment"):
        agents_of({"a_0": box(2), "b_0": masked}, dict.fromkeys(("a_0", "b_0"), spaces.Discrete(2)))


# -------------------------------------------------------------------------------------------------------- environments


class Match(zx.JaxEnvironment):
    """Two agents of unequal spaces that have nothing to do with each other: each must name the bit that it sees.

    The second is gone after two of the four steps.
    """

    agents = ("a_0", "b_0")
    max_episode_steps = 4

    def observation_space(self, params):
        return spaces.Dict(a_0=box(2), b_0=box(3))

    def action_space(self, params):
        return spaces.Dict(a_0=spaces.Discrete(2), b_0=spaces.Discrete(3))

    def look(self, bits):
        return {"a_0": jnp.stack([bits[0], 0.0]), "b_0": jnp.stack([bits[1], 0.0, 1.0])}

    def reset_env(self, key, params):
        bits = jax.random.bernoulli(key, 0.5, (2,)).astype(float)
        return self.look(bits), (bits, jnp.int32(0))

    def step_env(self, key, state, action, params):
        (bits, step), there = state, jnp.array([True, state[1] < 2])
        hit = jnp.stack([action["a_0"] == bits[0], action["b_0"] == 2 * bits[1]])
        bits = jax.random.bernoulli(key, 0.5, (2,)).astype(float)
        info = {"terminated": jnp.array([False, step >= 1]), "active": there}
        return self.look(bits), (bits, step + 1), jnp.where(hit & there, 1.0, 0.0), jnp.bool_(False), info


def test_what_a_step_brings_to_each_agent():
    """Own rewards, own ends, who was there; of the environment the mean, and the end of the episode."""
    batch = JaxAdapter("match", Match()).batch((0,), 2)
    keys = jax.random.split(KEY, 1)
    state, observation = jax.jit(batch.reset)(keys)
    step = jax.jit(batch.step)
    for t in range(4):
        action = {"a_0": observation["a_0"][..., 0].astype(int), "b_0": jnp.ones((1, 2), int)}  # right, always wrong
        state, timestep = step(state, action, jax.random.split(jax.random.PRNGKey(t), 1))
        observation = timestep.observation
        reward, terminated, active = timestep.agents
        np.testing.assert_array_equal(reward, [[[1, 0]] * 2])
        np.testing.assert_array_equal(terminated, [[[False, t >= 1]] * 2])
        np.testing.assert_array_equal(active, [[[True, t < 2]] * 2])
        np.testing.assert_array_equal(timestep.reward, [[0.5] * 2])
        assert not timestep.terminated.any() and timestep.truncated.all() == (t == 3)


def test_scaled_rewards_have_one_scale():
    """`environment.scale_reward` divides every agent's rewards by the same number: that of their mean."""
    batch = JaxAdapter("match", Match()).batch((0,), 2)
    state, observation = batch.reset(jax.random.split(KEY, 1))
    bit = observation["a_0"][..., 0].astype(int)
    action = {"a_0": jnp.where(jnp.arange(2) == 0, bit, 1 - bit), "b_0": jnp.ones((1, 2), int)}  # right, and wrong
    _, timestep = batch.step(state, action, jax.random.split(KEY, 1))
    timestep = jax.tree.map(lambda x: x[0], timestep)
    scale = ScaleReward(0.9)
    _, scaled = scale.step(scale.init(Spaces(box(1), box(1)), 2), timestep, training=True)
    np.testing.assert_array_equal(timestep.agents.reward, [[1, 0], [0, 0]])
    factor = scaled.reward[0] / timestep.reward[0]
    assert 1.5 < factor < 5
    np.testing.assert_allclose(scaled.agents.reward, factor * timestep.agents.reward, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------------- a run


TINY = {"rollout_length": 8, "epochs": 2, "minibatches": 1, "hidden": (16,), "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def match(tmp_path_factory):
    """A run that has learned to name the bits."""
    return zx.train(
        zx.MAPPO(**TINY, discount=0.5),
        Match(),
        total_steps=4_000,
        seeds=2,
        num_environments=8,
        run_dir=tmp_path_factory.mktemp("match") / "run",
        quiet=True,
    )


SHORT = (
    *("--total-steps", 64, "--seeds", 2, "--num-environments", 4, "--quiet"),
    *("--evaluation.episodes", 4, "--evaluation.final-episodes", 4, "--record.tensorboard", "false"),
    *("--algorithm.hidden", 8, "--algorithm.rollout-length", 8, "--algorithm.minibatches", 1),
)


AGENTS = ("adversary_0", "agent_0")


@pytest.fixture(scope="module")
def alone(match):
    """Each agent's returns when the run plays all of them."""
    return match.evaluate(20)


@pytest.fixture(scope="module")
def push(tmp_path_factory):
    """The folder of a run on simple_push, hardly trained."""
    folder = tmp_path_factory.mktemp("push") / "run"
    succeed("train", "mappo", "simple_push_v3", *SHORT, "--run-dir", folder)
    return folder


def test_it_learns(alone):
    """All that there is: 4 steps of a_0, 2 of b_0."""
    assert alone["agents"]["a_0"]["mean"] == 4.0 and alone["agents"]["b_0"]["mean"] == 2.0
    assert alone["mean"] == 3.0  # the mean over agents


def test_records_have_a_column_for_each_agent(push):
    found = records.read_metrics(push)
    columns = [found[f"evaluation/return/{name}"] for name in ("adversary_0", "agent_0")]
    known = ~np.isnan(found["evaluation/return"])
    assert known.sum() >= 2
    np.testing.assert_allclose(np.mean(columns, 0)[known], found["evaluation/return"][known], rtol=1e-5)
    assert np.any(columns[0][known] != columns[1][known])


def test_summary_says_what_each_agent_got(push):
    summary = json.loads((push / "summary.json").read_text())["evaluation"]
    assert summary["agents"].keys() == {"adversary_0", "agent_0"}
    each = [summary["agents"][name]["per_seed"] for name in AGENTS]
    np.testing.assert_allclose(np.mean(each, 0), summary["per_seed"], rtol=1e-5)
    lines = succeed("evaluate", push, "--episodes", 4).splitlines()
    assert [line.split(":")[0].strip() for line in lines[-2:]] == ["adversary_0", "agent_0"]


def test_policy_value_and_player_speak_dictionaries(match):
    for bits in ((0.0, 1.0), (1.0, 0.0)):
        observation = {name: np.asarray(x) for name, x in Match().look(jnp.array(bits)).items()}
        right = {"a_0": int(bits[0]), "b_0": 2 * int(bits[1])}
        assert match.policy(observation) == right
        value = match.value(observation)
        assert value.shape == (2,)
        # One step is certain; a_0 goes on for 4, b_0 for 2, and neither value knows how long.
        assert np.all(value > 0.9) and np.all(value < 2.1)
        player = match.player()
        assert player(observation) == right and player(observation) == right
    with pytest.raises(UsageError, match=r"^the observation lacks b_0; give that of every agent, by name$"):
        match.value({"a_0": np.zeros(2, np.float32)})


# -------------------------------------------------------------------------------------------------- playing each other


def test_cross_play_of_agents_that_do_not_meet(match, alone):
    """Whoever plays the other side, one's own return is what it is against oneself."""
    other = zx.load(match.directory, environment=Match(), algorithm=match.algorithm)
    parameters = lambda run: run._learner.actor_critic.parameters  # noqa: E731
    other._learner = eqx.tree_at(lambda x: x.actor_critic.parameters, other._learner, -parameters(match))
    found = cross_play(match, other, 20)
    assert list(found) == ["all", "a", "b", "none"]
    ours, theirs = alone["agents"], found["none"]
    assert found["all"] == ours
    assert found["a"] == {"a_0": ours["a_0"], "b_0": theirs["b_0"]}
    assert found["b"] == {"a_0": theirs["a_0"], "b_0": ours["b_0"]}
    assert ours["a_0"] != theirs["a_0"] and ours["b_0"] != theirs["b_0"]
    lines = table(found, "ours", "others").splitlines()
    assert lines[0].split() == ["ours", "plays", "a_0", "b_0"]
    assert lines[1].split() == ["all", "4.00", "2.00"]
    assert len(lines) == 6 and lines[-1].endswith("the rest is played by others")


@pytest.mark.parametrize("discrete", [True, False])
def test_random_players(discrete):
    """Uniform over what each agent has."""
    sizes = (2, 3, 3)
    made = [spaces.Discrete(n) if discrete else box(n) for n in sizes]
    agents, _ = agents_of(SEEN, dict(zip(SEEN, made, strict=True)))
    side = Side(None, agents, np.arange(1))
    drawn, carry = side.play((), (), jnp.zeros((3_000, 3, 4)), jax.random.split(KEY, 3_000))
    assert carry == ()
    if discrete:
        for i, n in enumerate(sizes):
            np.testing.assert_allclose(np.bincount(drawn[:, i]) / 3_000, np.full(n, 1 / n), atol=0.04)
    else:
        assert drawn.shape == (3_000, 3, 3) and drawn.min() < -0.98 and drawn.max() > 0.98
        np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.05)


def test_evaluate_against(push):
    """A row for each team that the run plays, a column for each agent."""
    lines = succeed("evaluate", push, "--against", "random", "--episodes", 4).splitlines()
    assert lines[0].split()[-2:] == ["adversary_0", "agent_0"]
    rows = {line.split()[0]: [*map(float, line.split()[1:])] for line in lines[1:5]}
    assert list(rows) == ["all", "adversary", "agent", "none"]
    assert all(np.isfinite(row).all() and len(row) == 2 for row in rows.values())
    assert rows["all"] != rows["none"]
    assert lines[-1].endswith("the rest is played by random")


def test_against_what_is_refused(push, match, tmp_path):
    other = zx.load(push)
    with pytest.raises(
        UsageError, match=r"^the runs were trained on Match and on simple_push_v3, or with other options; "
    ):
        cross_play(match, other, 2)
    line = "train q_learning FrozenLake-v1 --total-steps 32 --quiet --run-dir"
    succeed(*line.split(), tmp_path / "alone")
    assert refused("evaluate", tmp_path / "alone", "--against", "random") == (
        "FrozenLake-v1 has one agent; --against is for environments with several"
    )
    assert "nowhere" in refused("evaluate", push, "--against", tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line, message",
    [
        ("train ppo simple_push_v3", "PPO acts for one agent, this environment has 2; use MAPPO or MADDPG"),
        ("train dqn simple_push_v3", "DQN acts for one agent, this environment has 2; use MAPPO or MADDPG"),
        ("train maddpg Pendulum-v1", "MADDPG is for several agents, this environment has one; use PPO, DDPG or TD3"),
        ("train ippo CartPole-v1", "IPPO is for several agents, this environment has one; use PPO, DDPG or TD3"),
    ],
)
def test_algorithms_and_environments_that_do_not_fit(line, message, tmp_path):
    assert refused(*line.split(), "--run-dir", tmp_path / "run") == message
    assert not (tmp_path / "run").exists()


def test_frames_of_agents_are_refused(tmp_path):
    line = "train mappo simple_push_v3 --environment.frame-stack 2 --run-dir"
    result = command(*line.split(), tmp_path / "run")
    assert result.code == 2 and "cannot be stacked" in result.error
