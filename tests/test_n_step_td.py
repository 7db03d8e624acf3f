"""n-step Sarsa, Expected Sarsa and Q-learning against the returns as the book defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sarsa import ACTIONS, GREEDY, KEY, STATES, learned, spec, trajectories

from zhixing.algorithms.expected_sarsa import ExpectedSarsa
from zhixing.algorithms.n_step_td import NStepTD
from zhixing.algorithms.q_learning import QLearning
from zhixing.algorithms.sarsa import Sarsa
from zhixing.core import Transition
from zhixing.errors import UsageError

BACKUPS = ("sarsa", "expected_sarsa", "q_learning")
EPSILON = 0.3  # of "expected_sarsa" below


def episodes_of(rollouts, i):
    """-> the time of the first step and the steps of each episode of instance `i`, the last one perhaps unfinished."""
    first, steps = 0, []
    for t, rollout in enumerate(rollouts):
        steps.append(Transition(*(x[0, i] for x in rollout[:6])))
        if steps[-1].terminated or steps[-1].truncated:
            yield first, steps
            first, steps = t + 1, []
    if steps:
        yield first, steps


def n_step_by_the_book(rollouts, n, backup, alpha, decay, discount):
    """Sutton & Barto, section 7.2: every update in the order of time, each return summed anew from its rewards."""
    q, visits, updates = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS), int), []
    for i in range(rollouts[0].reward.shape[1]):
        for first, steps in episodes_of(rollouts, i):
            ended = steps[-1].terminated or steps[-1].truncated
            for tau in range(len(steps)):
                horizon = tau + n
                known = horizon if backup == "sarsa" else horizon - 1  # the time at which the return is
                if known < len(steps):
                    updates.append((first + known, i, tau, horizon, steps))
                elif ended:
                    updates.append((first + len(steps) - 1, i, tau, len(steps), steps))
    drawn = {}  # the action at the true successor where time was up, drawn once
    for time, i, tau, horizon, steps in sorted(updates, key=lambda update: update[:3]):
        value = 0.0
        if horizon < len(steps) or not steps[-1].terminated:
            row = q[steps[horizon - 1].next_observation]
            if backup == "q_learning":
                value = row.max()
            elif backup == "expected_sarsa":
                value = EPSILON * row.mean() + (1 - EPSILON) * row.max()
            elif horizon < len(steps):
                value = row[steps[horizon].action]
            else:
                value = row[drawn.setdefault((time, i), row.argmax())]
        rewards = [step.reward for step in steps[tau:horizon]]
        total = sum(discount**k * r for k, r in enumerate(rewards)) + discount ** (horizon - tau) * value
        s, a = steps[tau].observation, steps[tau].action
        visits[s, a] += 1
        q[s, a] += alpha * visits[s, a] ** -decay * (total - q[s, a])
    return q, visits


@pytest.mark.parametrize("backup", BACKUPS)
@pytest.mark.parametrize("n, instances, decay", [(1, 1, 0.0), (2, 3, 0.5), (3, 1, 0.0), (5, 2, 0.0)])
def test_update(backup, n, instances, decay):
    epsilon = EPSILON if backup == "expected_sarsa" else 0.0
    algorithm = NStepTD(
        n_step=n, backup=backup, learning_rate=0.3, learning_rate_decay=decay, discount=0.9, epsilon_start=epsilon,
        epsilon_end=epsilon,
    )  # fmt: skip
    rollouts = trajectories(80, instances)
    state, _ = learned(algorithm, rollouts)
    q, visits = n_step_by_the_book(rollouts, n, backup, 0.3, decay, 0.9)
    np.testing.assert_allclose(state.q, q, atol=2e-5)
    np.testing.assert_array_equal(state.visits, visits)


@pytest.mark.parametrize(
    "backup, cls", [("sarsa", Sarsa), ("expected_sarsa", ExpectedSarsa), ("q_learning", QLearning)]
)
def test_one_step(backup, cls):
    """n = 1 is the algorithm of that name, its metrics too."""
    settings = {"learning_rate": 0.3, "learning_rate_decay": 0.4, "discount": 0.9, **GREEDY}
    rollouts = trajectories(60, 2)
    state, metrics = learned(NStepTD(n_step=1, backup=backup, **settings), rollouts)
    expected, expected_metrics = learned(cls(**settings), rollouts)
    np.testing.assert_allclose(state.q, expected.q, atol=1e-6)
    np.testing.assert_array_equal(state.visits, expected.visits)
    for made, wanted in zip(metrics, expected_metrics, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), made, wanted)


@pytest.mark.parametrize("backup", BACKUPS)
def test_many_steps_are_monte_carlo(backup):
    """Episodes shorter than n: with α = 1, ω = 1, Q is the mean of the returns that followed each pair."""
    rollouts = trajectories(200, 1, truncation=0.0)
    state, _ = learned(
        NStepTD(n_step=100, backup=backup, learning_rate=1.0, learning_rate_decay=1.0, discount=0.9), rollouts
    )
    returns = {}
    for _, steps in episodes_of(rollouts, 0):
        if steps[-1].terminated:
            total = 0.0
            for step in reversed(steps):
                total = step.reward + 0.9 * total
                returns.setdefault((step.observation, step.action), []).append(total)
    q = np.zeros((STATES, ACTIONS))
    for pair, values in returns.items():
        q[pair] = np.mean(values)
    np.testing.assert_allclose(state.q, q, atol=2e-5)


def test_policy_value_and_check():
    algorithm = NStepTD()
    q = jnp.arange(STATES * ACTIONS, dtype=jnp.float32).reshape(STATES, -1)
    state = algorithm.init(KEY, spec(1))._replace(q=q)
    np.testing.assert_array_equal(algorithm.value(state, jnp.array([[0, 3]])), [[2, 11]])
    np.testing.assert_array_equal(algorithm.policy(state, jnp.array([[0, 3]])), [[2, 2]])
    with pytest.raises(UsageError, match="n_step is 0; it must be above 0"):
        NStepTD(n_step=0).check(spec(1))
