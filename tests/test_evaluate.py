"""Evaluation: greedy, in episodes of its own, deterministic given the run, and the environment's own returns."""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import kept_programs, settings  # noqa: F401
from gymnasium import spaces
from probes import Recorder, TimeLimitedEnvironment

from zhixing import assembly, config
from zhixing.assembly import build_environment, build_evaluator, build_loop
from zhixing.drivers.loop import Loop
from zhixing.environments.base import Timestep
from zhixing.environments.jax_adapter import JaxEnvironment
from zhixing.records import read_metrics
from zhixing.shared import over_seeds
from zhixing.training import train, train_config

pytestmark = pytest.mark.usefixtures("kept_programs")


def evaluator_of(own: Any = None, episodes: int = 4, **more: Any):
    """-> a function of a step that evaluates an untrained PPO."""
    made = config.from_mapping(settings("ppo", **more))
    environment = build_environment(made, own)
    loop = build_loop(made, environment)
    learner = initial_learner(made, loop)
    transforms = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (made.seeds, *x.shape)), loop.chain.init(made.num_environments)
    )
    evaluator = build_evaluator(made, environment, loop, episodes)
    return lambda step=0: evaluator(made.algorithm, learner, transforms, step)


def initial_learner(made: config.Config, loop: Loop) -> Any:
    return jax.jit(lambda key: over_seeds(lambda k: made.algorithm.init(k, loop.spec), made.seeds, key))(loop.keys()[0])


class Choice(JaxEnvironment):
    """Ten steps from the same start; the reward is the action: all greedy episodes are the same."""

    max_episode_steps = 10

    def observation_space(self, params: Any) -> spaces.Space:
        return spaces.Box(0, 10, (1,), np.float32)

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Box(-1, 1, (1,), np.float32)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        return jnp.zeros(1), jnp.float32(0)

    def step_env(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
        return state[None] + 1, state + 1, action[0], False, {}


class Endless(gymnasium.Env):
    """A reward of 2 for ever."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, np.float32), 2.0, False, False, {}


class Uneven(gymnasium.Env):
    """The k-th episode of an instance takes k steps, and gives k."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.episode = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode = 1 if seed is not None else self.episode + 1
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == self.episode, False, {}


class Start(JaxEnvironment):
    """The first observation u says what is to come: a reward of u, three times; then one sees -1."""

    max_episode_steps = 3

    def observation_space(self, params: Any) -> spaces.Space:
        return spaces.Box(-1, 1, (1,), np.float32)

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Discrete(2)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        state = jax.random.uniform(key, (1,))
        return state, state

    def step_env(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
        return -jnp.ones(1), state, state[0], False, {}


class StartOnHost(gymnasium.Env):
    """`Start` for Gymnasium."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.start = 0, self.np_random.uniform(size=1).astype(np.float32)
        return self.start, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return -np.ones(1, np.float32), float(self.start[0]), self.steps == 3, False, {}


def test_actions_are_greedy():
    returns, lengths, *_ = evaluator_of(Choice(), episodes=6)()
    assert returns.shape == lengths.shape == (2, 6)
    assert np.all(lengths == 10)
    assert np.all(returns == returns[:, :1])  # a sampled action would differ from episode to episode
    assert returns[0, 0] != returns[1, 0]  # each seed has its own policy


@pytest.mark.parametrize("backend", ["jax", "gymnasium"])
def test_returns_are_the_environments_own(backend):
    """Undiscounted and unscaled, though training scales rewards: CartPole gives 1 a step."""
    transforms = {"backend": backend, "scale_reward": True, "normalize_observation": True}
    returns, lengths, *_ = evaluator_of(environment=transforms)()
    np.testing.assert_array_equal(returns, lengths)
    assert lengths.min() >= 8


def test_same_step_same_episodes():
    evaluate = evaluator_of()
    first, again, other = evaluate(100)[0], evaluate(100)[0], evaluate(101)[0]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, evaluator_of()(100)[0])  # another process would see the same
    assert np.any(first != other)


def test_a_seed_does_not_depend_on_its_neighbours():
    two, second = evaluator_of(seed=0, seeds=2)(7), evaluator_of(seed=1, seeds=1)(7)
    np.testing.assert_array_equal(two[0][1:], second[0])


@pytest.mark.parametrize("episodes", [1, 7, 12, 20])
def test_every_instance_plays_its_first_episodes(episodes):
    """As many as asked for, none preferred because it was short."""
    returns, lengths, *_ = evaluator_of(Uneven, episodes=episodes)()
    assert returns.shape == (2, episodes)
    np.testing.assert_array_equal(returns, lengths)
    instances = max(n for n in range(1, 11) if episodes % n == 0)  # at most ten on the host
    expected = np.tile(np.arange(1, episodes // instances + 1), instances)
    np.testing.assert_array_equal(returns, np.broadcast_to(expected, (2, episodes)))


def test_environment_without_a_limit_is_cut():
    returns, lengths, *_ = evaluator_of(Endless, episodes=3)()
    assert np.all(lengths == 50) and np.all(returns == 100.0)  # evaluation.max_steps of the settings


def test_training_statistics_are_used_and_kept():
    """Observations are normalised by the statistics of training, which evaluation leaves alone."""
    made = config.from_mapping(settings("ppo", environment={"normalize_observation": True}))
    environment = build_environment(made)
    loop = build_loop(made, environment)
    learner = initial_learner(made, loop)
    evaluator = build_evaluator(made, environment, loop, 8)
    plain = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), loop.chain.init(4))
    shifted = jax.tree.map(lambda x: x + 0.5, plain)
    before = jax.tree.map(np.array, shifted)
    with_plain, with_shifted = (evaluator(made.algorithm, learner, t, 0)[0] for t in (plain, shifted))
    assert np.any(with_plain != with_shifted)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, shifted), before)


# ------------------------------------------------------------------------------------------- predicted, and what came


@pytest.mark.parametrize("own", [Start(), StartOnHost], ids=["compiled", "host"])
def test_values_and_discounted_returns_are_of_the_first_observations(own, monkeypatch):
    """(E.1) and (E.2), with several episodes one after the other in each instance."""
    monkeypatch.setattr(assembly, "COMPILED_INSTANCES", 2)
    made = config.from_mapping(settings("ppo", algorithm={"discount": 0.5}))
    environment = build_environment(made, own)
    loop = build_loop(made, environment)
    learner = initial_learner(made, loop)
    evaluator = build_evaluator(made, environment, loop, 12)
    assert evaluator.each > 1
    played = evaluator(made.algorithm, learner, loop.chain.init(made.num_environments), 0)  # no transform has a state
    starts = played.returns / 3
    assert len(np.unique(starts)) == 24 and np.all(played.lengths == 3)
    np.testing.assert_allclose(played.discounted_returns, 1.75 * starts, rtol=1e-6)
    values = over_seeds(made.algorithm.value, 2, learner, jnp.asarray(starts)[..., None])
    np.testing.assert_allclose(played.values, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["jax", "gymnasium"])
def test_discounted_return_is_in_the_unit_of_the_values(backend):
    """Rewards scaled as training scales them: CartPole's reward of 1, over a standard deviation."""
    made = config.from_mapping(settings("ppo", environment={"backend": backend, "scale_reward": True}))
    environment = build_environment(made)
    loop = build_loop(made, environment)
    learner = initial_learner(made, loop)
    _, fresh = loop.chain.init(made.num_environments)
    statistics = fresh.statistics._replace(variance=jnp.array([4.0, 1e-4]), count=jnp.full(2, 1e9), mean=jnp.zeros(2))
    states = (), fresh._replace(statistics=statistics, discounted_return=jnp.zeros((2, made.num_environments)))
    played = build_evaluator(made, environment, loop, 4)(made.algorithm, learner, states, 0)
    np.testing.assert_array_equal(played.returns, played.lengths)
    discount = made.algorithm.discount
    rewards = np.array([[0.5], [10.0]])  # 1 / 2, and 100 clipped to the limit
    expected = rewards * (1 - discount**played.lengths) / (1 - discount)
    np.testing.assert_allclose(played.discounted_returns, expected, rtol=1e-4)
    # What training tells the algorithm, from the same statistics.
    one = jax.tree.map(lambda x: x[0], states)
    timestep = Timestep(jnp.zeros((4, 4)), jnp.zeros((4, 4)), jnp.ones(4), jnp.zeros(4, bool), jnp.zeros(4, bool))
    np.testing.assert_allclose(loop.chain.step(one, timestep, training=True)[1].reward, 0.5, rtol=1e-5)


def test_a_run_records_both(tmp_path):
    """A table that starts at 7 everywhere promises more than the maze gives."""
    made = config.from_mapping(settings("q_learning", algorithm={"initial_value": 7.0}))
    folder, _ = train_config(made, tmp_path / "run", quiet=True)
    metrics = read_metrics(folder)
    np.testing.assert_array_equal(metrics["evaluation/value"][:2], [7.0, 7.0])
    evaluated = ~np.isnan(metrics["evaluation/return"])
    for name in ("evaluation/value", "evaluation/discounted_return"):
        np.testing.assert_array_equal(~np.isnan(metrics[name]), evaluated)
    assert np.nanmax(metrics["evaluation/discounted_return"]) <= 1.0


def test_an_algorithm_that_predicts_nothing_has_no_such_columns(tmp_path):
    """One of a user's own, without discount and without a value."""
    few = {"evaluation": {"episodes": 2, "final_episodes": 2}, "record": {"tensorboard": False}}
    sizes = {"total_steps": 28, "num_environments": 4, "run_dir": tmp_path / "run"}
    run = train(Recorder(), TimeLimitedEnvironment(), quiet=True, **sizes, **few)
    assert "evaluation/return" in run.metrics and "evaluation/value" not in run.metrics
    played = build_evaluator(run.config, run.environment, run.loop, 2)(run.algorithm, run._learner, run._transforms, 0)
    assert np.isnan(played.values).all() and np.isnan(played.discounted_returns).all()
    assert np.isfinite(played.returns).all()
