"""The EnvPool adapter: reset in the same step, inside a compiled scan, against EnvPool's own Python calls."""

import os
import subprocess
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zhixing.environments.envpool_adapter import EnvPoolAdapter, _decode, _encode
from zhixing.environments.gymnasium_adapter import instance_seed
from zhixing.errors import UsageError

envpool = pytest.importorskip("envpool")


def roll(batch, actions):
    """`actions` [T, S, N, ...] -> first observation, timesteps [T, S, N, ...], through one compiled scan."""
    state, first = batch.reset(None)
    state, timesteps = jax.jit(
        lambda state, actions: jax.lax.scan(lambda state, action: batch.step(state, action, None), state, actions)
    )(state, actions)
    return np.asarray(first), jax.tree.map(np.asarray, timesteps)


def random_actions(space, steps, seeds, num_environments):
    generator = np.random.default_rng(0)
    shape = (steps, seeds, num_environments)
    if isinstance(space, gymnasium.spaces.Discrete):
        return jnp.asarray(generator.integers(space.n, size=shape), jnp.int32)
    return jnp.asarray(
        generator.uniform(space.low, space.high, size=(*shape, *space.shape)),
        jnp.float32,
    )


def peer_roll(id, seed, index, actions, **options):
    """The same from EnvPool's Python call for one instance, its reset steps joined to the steps that ended."""
    peer = envpool.make(
        id,
        env_type="gymnasium",
        num_envs=1,
        num_threads=1,
        seed=[instance_seed(seed, index)],
        **options,
    )
    first, _ = peer.reset()
    rows = []
    for action in actions:
        next_observation, reward, terminated, truncated, info = peer.step(np.asarray(action)[None])
        observation = next_observation
        if terminated[0] or truncated[0]:
            observation, _, _, _, info = peer.step(np.asarray(action)[None])
            assert info["elapsed_step"][0] == 0
        rows.append(
            [
                value[0]
                for value in (
                    observation,
                    next_observation,
                    reward,
                    terminated,
                    truncated,
                )
            ]
        )
    return first[0], [np.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("id", "steps", "num_environments", "options"),
    [
        ("CartPole-v1", 150, 4, {}),
        ("CartPole-v1", 60, 1, {"max_episode_steps": 7}),
        ("CartPole-v1", 60, 5, {"max_episode_steps": 7, "num_threads": 1}),
        ("FrozenLake-v1", 150, 4, {}),
        ("Pendulum-v1", 50, 2, {"max_episode_steps": 20}),
        ("LunarLander-v3", 250, 2, {}),
        ("LunarLanderContinuous-v3", 250, 2, {}),
        ("BipedalWalker-v3", 120, 2, {}),
        (
            "HalfCheetah-v5",
            40,
            2,
            {"max_episode_steps": 15},
        ),  # float64 observations and actions
    ],
)
def test_trajectories_are_envpool_s_own(id, steps, num_environments, options):
    environment = EnvPoolAdapter(id, **options)
    options.pop("num_threads", None)
    batch = environment.batch([3, 9], num_environments)
    actions = random_actions(environment.action_space, steps, 2, num_environments)
    first, timesteps = roll(batch, actions)
    assert first.shape == (2, num_environments, *environment.observation_space.shape)
    assert first.dtype == (np.int32 if id == "FrozenLake-v1" else np.float32)
    assert (timesteps.terminated | timesteps.truncated).any(axis=0).any() and not np.isnan(timesteps.reward).any()
    for row, seed in enumerate([3, 9]):
        for index in range(num_environments):
            peer_first, columns = peer_roll(id, seed, index, np.asarray(actions)[:, row, index], **options)
            np.testing.assert_array_equal(first[row, index], peer_first.astype(first.dtype))
            for value, column in zip(timesteps, columns, strict=True):
                np.testing.assert_array_equal(value[:, row, index], column.astype(value.dtype))


def test_the_end_is_a_terminal_observation_and_the_start_a_start():
    batch = EnvPoolAdapter("CartPole-v1").batch([0], 8)
    actions = jnp.ones((200, 1, 8), jnp.int32)
    _, timesteps = roll(batch, actions)
    ended = timesteps.terminated
    assert ended.sum() > 8 * 15 and not timesteps.truncated.any()
    assert (ended.sum(axis=2) > 1).any()  # several in one step
    final, start = timesteps.next_observation[ended], timesteps.observation[ended]
    assert ((np.abs(final[:, 2]) > 0.2095) | (np.abs(final[:, 0]) > 2.4)).all()
    assert (np.abs(start) <= 0.05).all() and len(np.unique(start[:, 0])) == len(start)
    np.testing.assert_array_equal(timesteps.observation[~ended], timesteps.next_observation[~ended])


def test_every_step_moves_every_instance_by_gymnasium_s_dynamics():
    environment = EnvPoolAdapter("CartPole-v1", max_episode_steps=12)
    first, timesteps = roll(environment.batch([1], 6), random_actions(environment.action_space, 40, 1, 6))
    actions = np.asarray(random_actions(environment.action_space, 40, 1, 6))
    peer = gymnasium.make("CartPole-v1").unwrapped
    peer.reset(seed=0)
    for index in range(6):
        observation, length = first[0, index], 0
        for step in range(40):
            peer.state = observation.astype(np.float64)
            peer.steps_beyond_terminated = None
            expected, _, terminated, _, _ = peer.step(int(actions[step, 0, index]))
            length += 1
            np.testing.assert_allclose(
                timesteps.next_observation[step, 0, index],
                expected,
                rtol=1e-5,
                atol=1e-6,
            )
            assert timesteps.truncated[step, 0, index] == (length == 12)
            assert timesteps.terminated[step, 0, index] == (terminated and length < 12)
            observation = timesteps.observation[step, 0, index]
            length = 0 if terminated or length == 12 else length


def test_all_may_end_in_the_same_step():
    batch = EnvPoolAdapter("Pendulum-v1", max_episode_steps=5).batch([0, 1, 2], 4)
    _, timesteps = roll(batch, jnp.zeros((20, 3, 4, 1)))
    np.testing.assert_array_equal(
        timesteps.truncated,
        (np.arange(20) % 5 == 4)[:, None, None] & np.ones((1, 3, 4), bool),
    )
    assert not timesteps.terminated.any()
    starts = timesteps.observation[timesteps.truncated][:, 0]
    assert len(np.unique(starts)) == len(starts)


def test_a_row_depends_on_its_own_seed_alone():
    environment = EnvPoolAdapter("FrozenLake-v1")
    actions = random_actions(environment.action_space, 100, 3, 4)
    first, together = roll(environment.batch([5, 3, 11], 4), actions)
    for row, seed in enumerate([5, 3, 11]):
        first_alone, alone = roll(environment.batch([seed], 4), actions[:, row : row + 1])
        np.testing.assert_array_equal(first[row], first_alone[0])
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_array_equal(a[:, row], b[:, 0]),
            together,
            alone,
        )
    assert not np.array_equal(together.next_observation[:, 0], together.next_observation[:, 1])


def test_reset_breaks_episodes_off_and_two_batches_do_not_meet():
    environment = EnvPoolAdapter("Pendulum-v1", max_episode_steps=10)
    training, evaluation = environment.batch([0], 3), environment.batch([0], 3)
    actions = jnp.ones((7, 1, 3, 1))
    _, first_training = roll(training, actions)
    _, first_evaluation = roll(evaluation, actions)
    jax.tree.map(np.testing.assert_array_equal, first_training, first_evaluation)
    _, broken_off = roll(evaluation, actions)  # its old episodes had 3 steps to go
    assert not broken_off.truncated.any()
    state, _ = training.reset(None)
    state, timesteps = jax.lax.scan(lambda state, action: training.step(state, action, None), state, actions)
    assert not timesteps.truncated.any()
    evaluation.close()
    evaluation.close()
    with pytest.raises(UsageError, match="is closed; make a new one"):
        evaluation.step(state, actions[0], None)
    with pytest.raises(UsageError, match="is closed; make a new one"):
        evaluation.reset(None)


def test_step_calls_nothing_back():
    batch = EnvPoolAdapter("CartPole-v1").batch([0], 4)
    state, _ = batch.reset(None)
    text = str(jax.make_jaxpr(batch.step)(state, jnp.zeros((1, 4), jnp.int32), None))
    assert "callback" not in text and "ffi_call" in text


def test_raw_float64():
    values = np.array(
        [
            0.0,
            -0.0,
            1.0,
            -1.5,
            1 / 3,
            np.pi * 1e30,
            2.0**-126,
            3.4e38,
            1e39,
            -1e300,
            np.inf,
            -np.inf,
            1e-300,
        ]
    )
    values = np.concatenate(
        [
            values,
            np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-20, 30, 0.05),
        ]
    )
    ties = np.float64(1) + np.arange(8) * 2.0**-24
    values = np.concatenate([values, ties])
    decoded = np.asarray(_decode(jnp.asarray(values.view(np.uint32).reshape(-1, 2)), np.dtype(np.float64)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(decoded.view(np.uint32), values.astype(np.float32).view(np.uint32))
    encoded = np.asarray(_encode(jnp.asarray(decoded), np.dtype(np.float64))).view(np.float64).reshape(-1)
    np.testing.assert_array_equal(encoded, decoded.astype(np.float64))
    nan = np.array([np.nan]).view(np.uint32).reshape(1, 2)
    assert np.isnan(_decode(jnp.asarray(nan), np.dtype(np.float64))).all()


def test_spaces_and_limits():
    lander = EnvPoolAdapter("LunarLander-v3")
    assert lander.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
    assert lander.action_space == gymnasium.spaces.Discrete(4) and lander.max_episode_steps == 1000
    walker = EnvPoolAdapter("BipedalWalker-v3", max_episode_steps=50, hardcore=True)
    assert walker.action_space == gymnasium.spaces.Box(-1, 1, (4,), np.float32) and walker.max_episode_steps == 50
    for id in ("CartPole-v1", "Pendulum-v1", "FrozenLake-v1"):
        peer, environment = gymnasium.make(id), EnvPoolAdapter(id)
        assert environment.action_space == peer.action_space
        assert environment.max_episode_steps == peer.spec.max_episode_steps
        if id == "FrozenLake-v1":
            assert environment.observation_space == peer.observation_space
        else:
            np.testing.assert_allclose(environment.observation_space.high, peer.observation_space.high)


PROGRAM = """
import jax, jax.numpy as jnp
from zhixing.environments.envpool_adapter import EnvPoolAdapter
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
batch = EnvPoolAdapter("CartPole-v1").batch([0], 4)
state, _ = batch.reset(None)
roll = jax.jit(lambda s: jax.lax.scan(lambda s, a: batch.step(s, a, None), s, jnp.ones((50, 1, 4), jnp.int32)))
print(jax.tree.map(lambda value: value.sum().item(), roll(state)[1]))
"""


def test_the_compilation_cache_does_not_confuse_two_processes(tmp_path):
    variables = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.iterdir())
    assert outputs[0] == outputs[1] and "reward=200.0" in outputs[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"id": "LunarLandr-v3"},
            "unknown EnvPool environment 'LunarLandr-v3'; did you mean 'LunarLander-v3'?",
        ),
        ({"id": "CartPole-v1", "gravitas": 1}, "gravitas.*; see EnvPool's options"),
        ({"id": "CartPole-v1", "num_threads": 0}, "num_threads is 0; give at least 1"),
        (
            {"id": "CartPole-v1", "max_episode_steps": 0},
            "max_episode_steps is 0; give at least 1",
        ),
        ({"id": "FetchReach-v4"}, "observations of 'FetchReach-v4' are a Dict space"),
    ],
)
def test_slips_are_one_clear_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        EnvPoolAdapter(**arguments)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(UsageError, match=r"pip install 'zhixing\[envpool\]'"):
        EnvPoolAdapter("CartPole-v1")
