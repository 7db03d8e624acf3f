"""The particle environments: parity with mpe2 step by step, spaces, options, the batch, pictures."""

import importlib

import jax
import numpy as np
import pytest
from gymnasium import spaces

from zhixing import environments
from zhixing.environments.particle_scenarios import PARTICLES
from zhixing.environments.particles import Particles
from zhixing.errors import UsageError

CASES = [
    *((id, {}, continuous) for id in PARTICLES for continuous in (False, True)),
    ("simple_spread_v3", {"N": 5, "local_ratio": 0.2}, False),
    ("simple_spread_v3", {"N": 1}, False),
    ("simple_adversary_v3", {"N": 4}, True),
    ("simple_tag_v3", {"num_good": 3, "num_adversaries": 2, "num_obstacles": 1}, True),
    ("simple_tag_v3", {"num_obstacles": 0}, False),
    ("simple_reference_v3", {"local_ratio": 0.9}, False),
]
EPISODES = 6
# Who has a goal in mpe2, and by which name.
GOALS = {
    "simple_adversary_v3": ([0], "goal_a"),
    "simple_speaker_listener_v4": ([0], "goal_b"),
    "simple_reference_v3": ([0, 1], "goal_b"),
    "simple_push_v3": ([0], "goal_a"),
}
# Random actions in mpe2 1.1.1: the mean return of an episode of each agent, and the standard deviation, 400 episodes.
RANDOM = {
    ("simple_spread_v3", False): {"agent_0": (-27.254, 7.945), "agent_2": (-27.241, 7.982)},
    ("simple_adversary_v3", False): {"adversary_0": (-28.848, 12.84), "agent_1": (7.186, 16.876)},
    ("simple_tag_v3", False): {"adversary_1": (3.725, 9.944), "agent_0": (-14.978, 19.415)},
    ("simple_speaker_listener_v4", False): {"speaker_0": (-41.563, 33.137), "listener_0": (-41.563, 33.137)},
    ("simple_reference_v3", False): {"agent_0": (-29.144, 10.29), "agent_1": (-28.438, 10.404)},
    ("simple_push_v3", True): {"adversary_0": (-0.444, 17.724), "agent_0": (-26.836, 12.965)},
}


def their_environment(id, **options):
    return importlib.import_module(f"mpe2.{id}").parallel_env(**options)


def their_state(id, world):
    """The state of mpe2's world as ours."""
    landmarks = [landmark.state.p_pos for landmark in world.landmarks]
    holders, name = GOALS.get(id, ([], ""))
    goals = [world.landmarks.index(getattr(world.agents[holder], name)) for holder in holders]
    silent = id in ("simple_adversary_v3", "simple_tag_v3", "simple_push_v3")  # nobody observes what nobody says
    return Particles(
        position=np.array([agent.state.p_pos for agent in world.agents] + landmarks),
        velocity=np.array([agent.state.p_vel for agent in world.agents]),
        message=np.zeros((len(world.agents), 0)) if silent else np.array([agent.state.c for agent in world.agents]),
        goal=np.eye(len(landmarks))[goals] if goals else np.zeros((0, len(landmarks))),
    )


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def float32(tree):
    return jax.tree.map(lambda x: x.astype(np.int32 if x.dtype == np.int64 else np.float32), tree)


@pytest.mark.parametrize(("id", "options", "continuous"), CASES)
def test_steps_equal_mpe2(id, options, continuous):
    """Step by step from mpe2's own states: each step's rounding is seen, not what contacts make of it later."""
    ours = PARTICLES[id](**options, continuous_actions=continuous)
    theirs = their_environment(id, **options, continuous_actions=continuous)
    world = theirs.unwrapped.world
    assert ours.agents == tuple(theirs.possible_agents)
    assert ours.observation_space(()) == spaces.Dict({name: theirs.observation_space(name) for name in ours.agents})
    assert ours.action_space(()) == spaces.Dict({name: theirs.action_space(name) for name in ours.agents})
    for name in ours.agents:
        theirs.action_space(name).seed(1)

    steps, touched = [], 0
    for episode in range(EPISODES):
        first, _ = theirs.reset(seed=episode)
        if episode == 0:
            observed = jax.jit(ours.observe)(float32(their_state(id, world)))
            for name in ours.agents:
                np.testing.assert_allclose(observed[name], first[name], atol=1e-6)
        while theirs.agents:
            if episode > 0 and len(steps) % 5 == 0:  # make a crowd: they are to touch
                for entity in world.entities:
                    entity.state.p_pos *= 0.3
            state = their_state(id, world)
            action = {name: theirs.action_space(name).sample() for name in ours.agents}
            observation, reward, terminated, *_ = theirs.step(dict(action))
            rewards = np.array([reward[name] for name in ours.agents])
            steps.append((state, action, observation, rewards, their_state(id, world)))
            assert not any(terminated.values())
            distance = np.linalg.norm(state.position[: len(ours.agents), None] - state.position, axis=-1)
            touched += ((distance[:, : ours.reach.shape[1]] < ours.reach) & ours.touching).any()
    state, action, *expected = map(stacked, zip(*steps, strict=True))
    assert len(steps) == 25 * EPISODES
    assert (touched > 10) == ours.touching.any()

    step = jax.jit(jax.vmap(lambda state, action: ours.step_env(None, state, action, ())))
    observation, new_state, reward, terminated, _ = step(float32(state), float32(action))
    for name in ours.agents:
        np.testing.assert_allclose(observation[name], expected[0][name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(reward, expected[1], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), new_state, expected[2])
    assert reward.dtype == np.float32 and not terminated.any()
    assert np.ptp(reward, 0).min() > 0 or ours.num_agents == 1  # alone, nobody is there to touch


def random_actions(environment, leading):
    """Of NumPy, to be compiled less: {name: [*leading, ...]}."""
    generator = np.random.default_rng(0)
    return {
        name: generator.integers(space.n, size=leading, dtype=np.int32)
        if isinstance(space, spaces.Discrete)
        else generator.random((*leading, *space.shape), np.float32)
        for name, space in environment.action_space.items()
    }


@pytest.mark.parametrize(("id", "continuous"), RANDOM)
def test_random_actions_score_as_in_mpe2(id, continuous):
    environment, count = environments.make(id, continuous_actions=continuous), 4_000
    world = environment.environment
    _, state = jax.jit(jax.vmap(lambda key: world.reset_env(key, ())))(jax.random.split(jax.random.PRNGKey(0), count))
    step = jax.jit(jax.vmap(lambda state, action: world.step_env(None, state, action, ())[1:3]))
    actions, returns = random_actions(environment, (25, count)), 0.0
    for t in range(25):
        state, reward = step(state, {name: action[t] for name, action in actions.items()})
        returns = returns + np.asarray(reward)
    for name, (mean, deviation) in RANDOM[id, continuous].items():
        ours = returns[:, environment.agents.index(name)]
        assert abs(ours.mean() - mean) < 4 * deviation * np.sqrt(1 / 400 + 1 / count), name
        assert abs(ours.std() / deviation - 1) < 0.25, name


def test_batch():
    environment = environments.make("simple_speaker_listener_v4")
    assert (environment.backend, environment.max_episode_steps) == ("jax", 25)
    assert environment.agents == ("speaker_0", "listener_0")
    batch = environment.batch([0, 1], 3)
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    actions = random_actions(environment, (60, 2, 3))

    @jax.jit
    def play():
        state, first = batch.reset(keys)
        return first, jax.lax.scan(lambda state, action: batch.step(state, action, keys), state, actions)[1]

    first, steps = play()

    ends = np.flatnonzero(steps.truncated.all((1, 2)))
    assert ends.tolist() == [24, 49] and steps.truncated.sum() == 2 * 6 and not steps.terminated.any()
    assert steps.reward.shape == (60, 2, 3) and steps.agents.reward.shape == (60, 2, 3, 2)
    np.testing.assert_allclose(steps.reward, steps.agents.reward.mean(-1), rtol=1e-6)
    assert steps.agents.active.all() and not steps.agents.terminated.any()
    assert steps.agents.active.shape == steps.agents.terminated.shape == (60, 2, 3, 2)

    listener, following = (np.asarray(seen["listener_0"]) for seen in (steps.observation, steps.next_observation))
    goal = np.concatenate([first["speaker_0"][None], steps.observation["speaker_0"]])
    assert listener.shape == (60, 2, 3, 11) and goal.shape == (61, 2, 3, 3)
    np.testing.assert_array_equal(listener[ends, ..., :2], 0.0)  # at rest: a new episode
    assert (np.abs(following[ends, ..., :2]) > 0).any()
    going_on = np.setdiff1d(np.arange(60), ends)
    np.testing.assert_array_equal(listener[going_on], following[going_on])
    np.testing.assert_array_equal(np.diff(goal[:25], axis=0), 0.0)  # the goal is that of the episode
    assert len(np.unique(goal[[0, 25]].reshape(-1, 3), axis=0)) > 1


def test_places_and_goals_are_drawn_uniformly():
    world = PARTICLES["simple_tag_v3"]()
    _, state = jax.jit(jax.vmap(lambda key: world.reset_env(key, ())))(jax.random.split(jax.random.PRNGKey(0), 4_000))
    for part, bound in ((state.position[:, :4], 1.0), (state.position[:, 4:], 0.9)):
        part = np.asarray(part).reshape(4_000, -1)
        assert np.abs(part).max() <= bound and np.abs(part).max() > 0.998 * bound
        assert np.abs(part.std(0) - bound / np.sqrt(3)).max() < 0.03
        assert np.abs(np.corrcoef(part.T) - np.eye(part.shape[1])).max() < 0.08
    world = PARTICLES["simple_reference_v3"]()
    _, state = jax.jit(jax.vmap(lambda key: world.reset_env(key, ())))(jax.random.split(jax.random.PRNGKey(1), 4_000))
    both = np.asarray(state.goal[:, 0, :, None] * state.goal[:, 1, None])
    assert np.abs(both.mean(0) - 1 / 9).max() < 0.02  # every pair of goals


def test_bodies_in_one_place_and_actions_out_of_bounds_do_no_harm():
    world = PARTICLES["simple_spread_v3"](continuous_actions=True)
    state = drawn(world)._replace(position=np.zeros((6, 2)))
    step = jax.jit(lambda state, action: world.step_env(None, state, action, ())[:3])
    actions = [dict.fromkeys(world.agents, np.array([0, 0, value, 0, 0.5], np.float32)) for value in (1.0, 7.0)]
    observations, states, rewards = zip(*(step(state, action) for action in actions), strict=True)
    np.testing.assert_allclose(states[0].velocity, np.tile([0.5, 0.25], (3, 1)))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert np.isfinite(observations[1]["agent_0"]).all() and np.isfinite(rewards[1]).all()


def drawn(world):
    """A state; with NumPy, to be compiled less."""
    generator = np.random.default_rng(3)
    agents, landmarks = world.num_agents, world.num_landmarks
    return Particles(
        position=generator.uniform(-1, 1, (agents + landmarks, 2)),
        velocity=np.zeros((agents, 2)),
        message=np.zeros((agents, world.vocabulary)),
        goal=np.eye(landmarks)[generator.integers(landmarks, size=world.num_goals)],
    )


def test_pictures():
    for id, scenario in PARTICLES.items():
        world = scenario()
        state = drawn(world)
        frame = world.render_frame(state)
        assert frame.shape == (400, 400, 3) and frame.dtype == np.uint8
        scale = 200 / (1.15 * max(1.0, np.abs(state.position).max()))
        colours = (255 * world.colours(state)).astype(int)
        for index in range(len(world.agents)):  # each agent is where it should be, unless another covers it
            distance = np.abs(state.position - state.position[index]).max(-1)
            x, y = (200 + scale * state.position[index] * (1, -1)).round().astype(int)
            if np.delete(distance, index).min() > 0.35:
                np.testing.assert_array_equal(frame[y, x], colours[index], err_msg=f"{id} {index}")
    silent = drawn(world := PARTICLES["simple_reference_v3"]())
    said = [silent._replace(message=np.eye(10)[[word, 0]]) for word in (4, 5)]
    frames = [world.render_frame(state) for state in (silent, *said)]
    assert all((frames[i] != frames[i - 1]).any() for i in range(3))
    far = silent._replace(position=5 * silent.position)
    assert (world.render_frame(far) != 255).any()


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        (
            "simple_spred_v3",
            {"backend": "jax"},
            r"unknown JAX environment 'simple_spred_v3'; did you mean 'simple_spread_",
        ),
        ("simple_spread_v3", {"M": 2}, r"unknown option of simple_spread_v3 'M'; "),
        ("simple_spread_v3", {"local_ration": 0.1}, r"did you mean 'local_ratio'"),
        ("simple_spread_v3", {"N": 0}, r"environment.options.N is 0; it must be a whole number, 1 or more"),
        ("simple_spread_v3", {"N": 2.5}, r"environment.options.N is 2.5; it must be a whole number"),
        (
            "simple_spread_v3",
            {"local_ratio": 1.5},
            r"environment.options.local_ratio is 1.5; it must be a number from 0",
        ),
        ("simple_reference_v3", {"local_ratio": "half"}, r"local_ratio is 'half'; it must be a number from 0 to 1"),
        ("simple_tag_v3", {"num_adversaries": -1}, r"num_adversaries is -1; it must be a whole number, 0 or more"),
        ("simple_tag_v3", {"num_good": True}, r"num_good is True; it must be a whole number, 1 or more"),
        ("simple_push_v3", {"continuous_actions": 1}, r"continuous_actions is 1; it is true or false"),
        ("simple_push_v3", {"max_episode_steps": 0}, r"max_episode_steps is 0; it must be 1 or more"),
    ],
)
def test_bad_input(id, options, message):
    with pytest.raises(UsageError, match=message):
        environments.make(id, **options)
