"""What a driver hands to the algorithm: aligned transitions, true successors, exact counts; both drivers the same."""

import jax
import numpy as np
import pytest
from probes import (
    TERMINATES_AFTER,
    TRUNCATES_AFTER,
    CountingEnvironment,
    GymnasiumCountingEnvironment,
    Recorder,
    TimeLimitedEnvironment,
    counting_step,
    make_algorithm,
    make_driver,
)

from zhixing.environments.gymnasium_adapter import GymnasiumAdapter
from zhixing.environments.jax_adapter import JaxAdapter

SEEDS, N, ITERATIONS = (0, 1), 3, 4
RECORDER = Recorder(rollout_length=7)  # episodes of 3 and 5 steps end everywhere in a rollout

ENVIRONMENTS = {
    "jax": lambda: JaxAdapter("counting", CountingEnvironment()),
    "gymnasium": lambda: GymnasiumAdapter(GymnasiumCountingEnvironment),
}


def record(driver, algorithm=RECORDER):
    """-> the whole stream of transitions [S, time, N, ...], and the run."""
    run, rollouts = driver.start(algorithm), []
    for _ in range(ITERATIONS):
        run = driver.advance(algorithm, run, 1, algorithm.rollout_length)
        rollouts.append(jax.tree.map(np.array, run.learner.rollout))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *rollouts), run


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def recorded(request):
    return record(make_driver(ENVIRONMENTS[request.param](), SEEDS, N))


def assert_transitions_of_the_counting_environment(transitions):
    """Each by itself: reward, ends and successor follow from observation and action."""
    episode, step = np.moveaxis(np.asarray(transitions.observation), -1, 0).astype(int)
    reward, terminated, truncated = counting_step(episode, step, np.asarray(transitions.action))
    np.testing.assert_array_equal(transitions.reward, reward)
    np.testing.assert_array_equal(transitions.terminated, terminated)
    np.testing.assert_array_equal(transitions.truncated, truncated)
    np.testing.assert_array_equal(transitions.next_observation, np.stack([episode, step + 1], -1))
    assert terminated.any() and truncated.any()


def test_transitions_are_aligned(recorded):
    transitions, _ = recorded
    assert transitions.reward.shape == (len(SEEDS), ITERATIONS * 7, N)
    assert_transitions_of_the_counting_environment(transitions)
    np.testing.assert_array_equal(transitions.action, RECORDER.policy(None, transitions.observation))


def test_transitions_follow_each_other(recorded):
    """The next observation to act on is the successor, or the first of the next episode where one ended."""
    transitions, run = recorded
    ended = (transitions.terminated | transitions.truncated)[..., None]
    first_of_next = transitions.observation * [1, 0] + [1, 0]
    expected = np.where(ended, first_of_next, transitions.next_observation)
    np.testing.assert_array_equal(transitions.observation[:, 1:], expected[:, :-1])
    np.testing.assert_array_equal(run.observation, expected[:, -1])
    np.testing.assert_array_equal(transitions.observation[:, 0], np.zeros((len(SEEDS), N, 2)))


def test_successors_where_episodes_end(recorded):
    """The old episode's last observation, never the new one's first."""
    transitions, _ = recorded
    at_truncation = transitions.next_observation[transitions.truncated]
    np.testing.assert_array_equal(at_truncation[:, 1], TRUNCATES_AFTER)
    np.testing.assert_array_equal(at_truncation[:, 0], transitions.observation[transitions.truncated][:, 0])
    np.testing.assert_array_equal(transitions.next_observation[transitions.terminated][:, 1], TERMINATES_AFTER)


def test_episodes_and_window_are_exact(recorded):
    transitions, run = recorded
    ended = transitions.terminated | transitions.truncated
    episodes, returns, lengths = np.zeros((3, len(SEEDS)))
    so_far, length = np.zeros((2, len(SEEDS), N))
    for t in range(transitions.reward.shape[1]):
        so_far += transitions.reward[:, t]
        length += 1
        now = ended[:, t]
        episodes += now.sum(-1)
        returns += np.where(now, so_far, 0).sum(-1)
        lengths += np.where(now, length, 0).sum(-1)
        so_far[now], length[now] = 0, 0
    assert np.all(episodes > 3 * N)
    np.testing.assert_array_equal(run.window.episodes, episodes)
    np.testing.assert_allclose(run.window.returns, returns, rtol=1e-6)
    np.testing.assert_array_equal(run.window.lengths, lengths)
    np.testing.assert_allclose(run.episodes.returns, so_far, rtol=1e-6)
    np.testing.assert_array_equal(run.episodes.lengths, length)
    # Metrics are summed over the iterations: the recorder's is the mean reward of each.
    rewards = transitions.reward.reshape(len(SEEDS), ITERATIONS, -1).mean(-1).sum(-1)
    np.testing.assert_allclose(run.window.metrics[:, 0], rewards, rtol=1e-5)
    assert int(run.window.learned.iterations) == ITERATIONS
    assert int(run.learner.clock.steps) == ITERATIONS * 7 * N


def test_both_drivers_give_the_same():
    """A deterministic policy in the same dynamics: the same rollouts, counts and keys."""
    results = [record(make_driver(make(), SEEDS, N)) for make in ENVIRONMENTS.values()]
    (compiled, compiled_run), (host, host_run) = results
    jax.tree.map(np.testing.assert_array_equal, compiled, host)
    for part in ("learner", "observation", "carry", "key", "episodes", "window"):
        jax.tree.map(np.testing.assert_array_equal, getattr(compiled_run, part), getattr(host_run, part))


def test_restart_begins_new_episodes():
    """And keeps what was learned."""
    driver = make_driver(ENVIRONMENTS["jax"](), SEEDS, N)
    run = driver.advance(RECORDER, driver.start(RECORDER), 1, 7)
    learner = jax.tree.map(np.array, run.learner)
    run = driver.restart(RECORDER, run)
    assert not np.any(run.observation) and not np.any(run.carry) and not np.any(run.episodes.lengths)
    jax.tree.map(np.testing.assert_array_equal, run.learner, learner)


def test_environment_with_a_time_limit_of_its_own():
    """Written as `reset_env` and `step_env`; the limit and the reset are the library's."""
    transitions, _ = record(make_driver(JaxAdapter("limited", TimeLimitedEnvironment()), SEEDS, N))
    observation, following = transitions.observation, transitions.next_observation
    np.testing.assert_array_equal(following, observation + np.array([0, 1]))  # the same episode, one step on
    early = (observation[..., 0] % 3 == 0) & (following[..., 1] >= 2)
    np.testing.assert_array_equal(transitions.terminated, early)
    np.testing.assert_array_equal(transitions.truncated, following[..., 1] >= 4)
    assert early.any() and transitions.truncated.any() and not (early & transitions.truncated).any()

    ended = transitions.terminated | transitions.truncated
    goes_on = np.all(observation[:, 1:] == following[:, :-1], axis=-1)
    np.testing.assert_array_equal(goes_on, ~ended[:, :-1])
    starts = observation[:, 1:][ended[:, :-1]]
    assert np.all(starts[:, 1] == 0) and len(set(starts[:, 0])) == len(starts)  # each episode draws its own number
    assert len(set(observation[:, 0, :, 0].ravel())) == len(SEEDS) * N


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_replay_of_an_off_policy_algorithm(kind):
    """Whole transitions in the order in which they were made, though the host driver learns while it steps."""
    algorithm = make_algorithm("dqn", replay_capacity=60, learning_starts=20, rollout_length=5)
    driver = make_driver(ENVIRONMENTS[kind](), SEEDS, N)
    run = driver.advance(algorithm, driver.start(algorithm), 4, 5)
    assert int(run.learner.clock.steps) == 60 and int(run.learner.clock.updates) == 3
    assert int(run.memory.cursor.size) == 60
    stream = jax.tree.map(lambda x: np.asarray(x).reshape(len(SEEDS), 20, N, *x.shape[2:]), run.memory.data)
    assert_transitions_of_the_counting_environment(stream)
    ended = (stream.terminated | stream.truncated)[..., None]
    expected = np.where(ended, stream.observation * [1, 0] + [1, 0], stream.next_observation)
    np.testing.assert_array_equal(stream.observation[:, 1:], expected[:, :-1])
    np.testing.assert_array_equal(run.window.episodes, ended.sum((1, 2, 3)))
