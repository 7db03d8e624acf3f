"""The PettingZoo adapter: parity with the raw environment, agents that end at different times, resets, errors."""

import importlib.util
import sys

import gymnasium
import numpy as np
import pettingzoo
import pytest
from gymnasium import spaces
from mpe2 import simple_speaker_listener_v4, simple_spread_v3

from zhixing import environments
from zhixing.environments.gymnasium_adapter import instance_seed
from zhixing.environments.pettingzoo_adapter import PettingZooAdapter
from zhixing.errors import UsageError


class Relay(pettingzoo.ParallelEnv):
    """Agents a, b, c leave after `lengths` steps, by termination if in `terminates`; c enters after the first step.

    Observes [the seed's draw, the episode, the step]; the reward is 10 times the action.
    """

    metadata = {"name": "relay"}
    possible_agents = ["b", "c", "a"]

    def __init__(self, lengths=(2, 4, 3), terminates="abc", fails_at=-1):
        self.lengths, self.terminates, self.fails_at = dict(zip("abc", lengths, strict=True)), terminates, fails_at
        self.episode, self.generator = -1, np.random.default_rng()

    def observation_space(self, agent):
        return spaces.Dict({"seen": spaces.Box(-np.inf, np.inf, (3,), np.float64), "step": spaces.Discrete(99)})

    def action_space(self, agent):
        return spaces.Discrete(3, start=1)

    def observe(self):
        seen = np.array([self.draw, self.episode, self.count], np.float64)
        return {agent: {"seen": seen, "step": self.count} for agent in self.agents}

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        self.draw, self.episode, self.count = int(self.generator.integers(1 << 20)), self.episode + 1, 0
        self.agents = ["a", "b"]
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        assert actions.keys() == set(self.agents), actions
        self.count += 1
        if self.count == self.fails_at:
            raise ValueError("lost the baton")
        if self.count == 1:
            self.agents = [*self.agents, "c"]
        observations = self.observe()
        leaves = {agent: self.count == self.lengths[agent] for agent in self.agents}
        terminated = {agent: leaves[agent] and agent in self.terminates for agent in self.agents}
        truncated = {agent: leaves[agent] and agent not in self.terminates for agent in self.agents}
        self.agents = [agent for agent in self.agents if not leaves[agent]]
        rewards = {agent: 10.0 * action for agent, action in actions.items()}
        return observations, rewards, terminated, truncated, {agent: {} for agent in observations}


def actions(environment, shape, value=None):
    """{name: [*shape, ...]} as JAX hands them out: in 32 bits, and read-only."""
    taken = {}
    for name, space in environment.action_space.items():
        draws = [space.sample() if value is None else value for _ in range(int(np.prod(shape)))]
        array = np.array(draws).astype(np.int32 if isinstance(space, spaces.Discrete) else np.float32)
        taken[name] = array.reshape(*shape, *space.shape)
        taken[name].flags.writeable = False
    return taken


@pytest.mark.parametrize(
    ("module", "id", "continuous"),
    [
        (simple_spread_v3, "simple_spread_v3", False),
        (simple_speaker_listener_v4, "mpe2.simple_speaker_listener_v4", True),
    ],
)
def test_an_instance_is_the_raw_environment_with_its_seed(module, id, continuous):
    environment = environments.make(id, backend="pettingzoo", continuous_actions=continuous)
    raw = module.parallel_env(continuous_actions=continuous)
    assert environment.backend == "pettingzoo" and environment.agents == tuple(raw.possible_agents)
    assert (environment.compiled, environment.saves_state, environment.max_episode_steps) == (False, False, 25)
    for name in environment.agents:
        assert environment.observation_space[name] == raw.observation_space(name)
        assert environment.action_space[name] == raw.action_space(name)
    environment.action_space.seed(0)
    batch = environment.batch([4, 9], 2)
    state, first = batch.reset(None)
    expected, _ = raw.reset(seed=instance_seed(9, 1))
    assert state == () and first.keys() == set(environment.agents)
    ends = []
    for t in range(60):
        action = actions(environment, (2, 2))
        _, timestep = batch.step((), action, None)
        expected, reward, terminated, truncated, _ = raw.step({name: action[name][1, 1].copy() for name in action})
        for name in environment.agents:
            np.testing.assert_array_equal(timestep.next_observation[name][1, 1], expected[name])
        np.testing.assert_array_equal(
            timestep.agents.reward[1, 1], np.float32([reward[name] for name in environment.agents])
        )
        assert timestep.truncated[1, 1] == all(truncated.values()) and not any(terminated.values())
        assert not timestep.terminated.any() and not timestep.agents.terminated.any() and timestep.agents.active.all()
        if timestep.truncated[1, 1]:
            ends.append(t)
            expected, _ = raw.reset()
        for name in environment.agents:
            np.testing.assert_array_equal(timestep.observation[name][1, 1], expected[name])
    assert ends == [24, 49]
    assert timestep.reward.shape == (2, 2) and timestep.reward.dtype == timestep.agents.reward.dtype == np.float32
    assert timestep.observation[name].shape[:2] == (2, 2) and timestep.observation[name].dtype == np.float32
    batch.close()
    batch.close()


def relay_steps(count, num_environments=1, **options):
    environment = PettingZooAdapter(Relay, **options)
    batch = environment.batch([3], num_environments)
    batch.reset(None)
    return [batch.step((), actions(environment, (1, num_environments), 2), None)[1] for _ in range(count)]


def test_agents_come_and_go():
    """Columns b, c, a: a goes after 2 steps, c after 3, b after 4; c is there from the second step on."""
    steps = relay_steps(8)
    active = np.array([step.agents.active[0, 0] for step in steps])
    expected = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_array_equal(active, np.tile(expected, (2, 1)))
    rewards = np.array([step.agents.reward[0, 0] for step in steps])
    np.testing.assert_array_equal(rewards, 20.0 * active)
    np.testing.assert_allclose([step.reward[0, 0] for step in steps], 20.0 * active.mean(1), rtol=1e-6)
    ended = np.array([step.agents.terminated[0, 0] for step in steps])
    np.testing.assert_array_equal(ended[:4], np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]], bool))
    np.testing.assert_array_equal(ended[4:], ended[:4])
    assert [bool(step.terminated[0, 0]) for step in steps] == [False, False, False, True] * 2
    assert not any(step.truncated.any() for step in steps)

    following = np.array([[step.next_observation[name]["step"][0, 0] for name in "bca"] for step in steps])
    np.testing.assert_array_equal(following[:4], [[1, 1, 1], [2, 2, 2], [3, 3, 0], [4, 0, 0]])
    to_act_on = np.array([[step.observation[name]["seen"][0, 0] for name in "bca"] for step in steps])
    np.testing.assert_array_equal(to_act_on[:, 0, 1:], [[0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0]])
    np.testing.assert_array_equal(to_act_on[3], [to_act_on[3, 0], [0, 0, 0], to_act_on[3, 0]])  # c is not yet there
    assert to_act_on[0, 0, 0] != to_act_on[3, 0, 0]  # another draw, from the seed's generator
    assert steps[0].observation["a"]["seen"].dtype == np.float32
    assert steps[0].observation["a"]["step"].dtype == np.int32


def test_an_episode_is_truncated_unless_everyone_ended_by_termination():
    steps = relay_steps(4, terminates="ab")
    np.testing.assert_array_equal(
        [step.agents.terminated[0, 0] for step in steps],
        np.array([[0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 1, 1]], bool),  # of c, cut off, no value follows one step later
    )
    assert [(bool(step.terminated), bool(step.truncated)) for step in steps] == [(False, False)] * 3 + [(False, True)]


def test_limit():
    steps = relay_steps(6, max_episode_steps=3)
    assert [bool(step.truncated) for step in steps] == [False, False, True] * 2
    assert not any(step.terminated.any() for step in steps)
    np.testing.assert_array_equal(steps[2].agents.terminated[0, 0], [False, True, True])
    assert steps[2].next_observation["b"]["step"] == 3 and steps[2].observation["b"]["step"] == 0
    assert PettingZooAdapter(Relay).max_episode_steps is None
    assert PettingZooAdapter("simple_spread_v3", 7).max_episode_steps == 7
    assert PettingZooAdapter("simple_spread_v3", 70).max_episode_steps == 25  # it cuts itself
    assert PettingZooAdapter("simple_spread_v3", 70, max_cycles=90).max_episode_steps == 70


def test_rows_depend_on_their_own_seed_alone_and_reset_repeats():
    environment = PettingZooAdapter(Relay)
    together, alone = environment.batch([5, 3], 2), environment.batch([3], 2)
    _, first = together.reset(None)
    draws = first["a"]["seen"][..., 0]
    np.testing.assert_array_equal(draws[1], alone.reset(None)[1]["a"]["seen"][0, :, 0])
    assert len(np.unique(draws)) == 4
    together.step((), actions(environment, (2, 2), 1), None)
    np.testing.assert_array_equal(together.reset(None)[1]["a"]["seen"][..., 0], draws)


def test_only_the_ended_instances_restart():
    lengths = iter([(9, 9, 9), (2, 2, 2), (5, 5, 5)])  # the first is the one that the adapter looks at
    batch = PettingZooAdapter(lambda: Relay(next(lengths))).batch([0], 2)
    batch.reset(None)
    environment = PettingZooAdapter(Relay)
    steps = [batch.step((), actions(environment, (1, 2), 1), None)[1] for _ in range(3)]
    assert [step.observation["a"]["step"][0].tolist() for step in steps] == [[1, 1], [0, 2], [1, 3]]
    assert [step.next_observation["a"]["step"][0].tolist() for step in steps] == [[1, 1], [2, 2], [1, 3]]


def test_an_error_names_the_instance():
    environment = PettingZooAdapter(Relay, fails_at=1)
    batch = environment.batch([8], 2)
    batch.reset(None)
    with pytest.raises(RuntimeError, match="'Relay', environment 0 of seed 8: step raised ValueError: lost the baton"):
        batch.step((), actions(environment, (1, 2), 1), None)


def test_what_make_takes():
    assert isinstance(environments.make(Relay), PettingZooAdapter)
    assert isinstance(environments.make(lambda lengths: Relay(lengths), lengths=(1, 1, 1)), PettingZooAdapter)
    assert isinstance(environments.make(simple_spread_v3.parallel_env, vectorization="sync"), PettingZooAdapter)
    assert environments.make(lambda: gymnasium.make("CartPole-v1")).backend == "gymnasium"
    assert environments.best_backend("simple_spread_v3") == "jax"
    assert environments.best_backend("simple_crypto_v3") == "pettingzoo"
    assert environments.best_backend("pettingzoo.butterfly.pistonball_v6") == "pettingzoo"
    assert environments.best_backend("Ant-v3") == "gymnasium"


def silent_about_agents():
    relay = Relay()
    relay.possible_agents = []
    return relay


def numbered():
    relay = Relay()
    relay.possible_agents = [0, 1]
    return relay


@pytest.mark.parametrize(
    ("thing", "options", "message"),
    [
        ("simple_cripto_v3", {}, "unknown environment 'simple_cripto_v3'; did you mean 'simple_crypto_v3'"),
        ("mpe2.simple_sprad_v3", {}, "did you mean 'mpe2.simple_spread_v3'"),
        ("pettingzoo.butterfly.pistonbal_v6", {}, "did you mean 'pettingzoo.butterfly.pistonball_v6'"),
        ("nowhere.thing_v0", {}, "'nowhere.thing_v0' needs nowhere, which is missing; install it"),
        (".thing_v0", {}, "'.thing_v0' is no path of a module; give one like"),
        ("mpe2.all_modules", {"backend": "pettingzoo"}, "module mpe2.all_modules has no parallel_env"),
        ("simple_spread_v3", {"backend": "pettingzoo", "M": 4}, "cannot be made: .*'M'; check its options"),
        (
            "simple_spread_v3",
            {"backend": "pettingzoo", "local_ratio": 4},
            "cannot be made: local_ratio is a proportion",
        ),
        (Relay, {"vectorization": "async"}, "unknown vectorization of PettingZoo environments 'async'"),
        (Relay, {"max_episode_steps": 0}, "max_episode_steps is 0"),
        (Relay(), {}, "one Relay is not enough; give its class"),
        (simple_spread_v3.env, {}, "'env' takes turns; make a parallel environment of it"),
        (silent_about_agents, {}, "'silent_about_agents' does not say who may take part"),
        (numbered, {}, r"the agents of 'numbered' are \(0, 1\); give them names that are strings"),
    ],
)
def test_bad_input(thing, options, message):
    with pytest.raises(UsageError, match=message):
        environments.make(thing, **options)


def test_no_parallel_environment_and_no_instance():
    with pytest.raises(UsageError, match=r"'<lambda>' made int; make it return a pettingzoo\.Par"):
        PettingZooAdapter(lambda: 3)
    with pytest.raises(UsageError, match="a batch of 0 seeds x 2 environments has no instance"):
        PettingZooAdapter(Relay).batch([], 2)
    with pytest.raises(UsageError, match="a batch of 1 seeds x 0 environments has no instance"):
        PettingZooAdapter(Relay).batch([1], 0)


def test_missing_packages(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mpe2" else found(name))
    with pytest.raises(
        UsageError, match=r"'simple_crypto_v3' needs mpe2, which is missing; pip install 'zhixing\[marl\]'"
    ):
        environments.make("simple_crypto_v3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"'Relay' needs pettingzoo, which is missing; pip install 'zhixing\[marl\]'"):
        PettingZooAdapter(Relay)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pymunk", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match=r"pistonball_v6' cannot be imported: .*; install that module"):
        environments.make("pettingzoo.butterfly.pistonball_v6")
