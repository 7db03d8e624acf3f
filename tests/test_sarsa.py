"""Sarsa and Expected Sarsa against the book's loops on a NumPy table."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from test_distributions import assert_frequencies

from zhixing import exploration
from zhixing.algorithms.expected_sarsa import ExpectedSarsa
from zhixing.algorithms.sarsa import Sarsa
from zhixing.core import Spec, Transition
from zhixing.errors import UsageError

KEY = jax.random.PRNGKey(0)
STATES, ACTIONS = 4, 3
GREEDY = {"epsilon_start": 0.0, "epsilon_end": 0.0}  # the action drawn where time is up is known then


def spec(instances: int) -> Spec:
    return Spec(spaces.Discrete(STATES), spaces.Discrete(ACTIONS), instances, 1_000)


def trajectories(length: int, instances: int, seed: int = 0, truncation: float = 0.12) -> list[Transition]:
    """`length` rollouts [1, N] of random episodes: each starts where the one before it left off, but after an end."""
    generator = np.random.default_rng(seed)
    rollouts, state = [], generator.integers(0, STATES, instances)
    for _ in range(length):
        successor, fresh = generator.integers(0, STATES, (2, instances))
        terminated, truncated = generator.random((2, instances)) < np.array([[0.15], [truncation]])
        truncated &= ~terminated
        action, reward = generator.integers(0, ACTIONS, instances), generator.normal(size=instances)
        rollouts.append(
            Transition(*(x[None] for x in (state, action, np.float32(reward), successor, terminated, truncated)))
        )
        state = np.where(terminated | truncated, fresh, successor)
    return rollouts


def learned(algorithm, rollouts, task=None):
    """The state after `rollouts`, and the metrics of each."""
    instances = rollouts[0].reward.shape[1]
    task = task or spec(instances)
    state, memory, metrics = algorithm.init(KEY, task), algorithm.memory(task, rollouts[0]), []
    learn = jax.jit(algorithm.learn)
    for i, rollout in enumerate(rollouts):
        state, memory, made = learn(state, memory, jax.tree.map(jnp.asarray, rollout), jax.random.fold_in(KEY, i))
        metrics.append(made)
    return state, metrics


def sarsa_by_the_book(rollouts, alpha, decay, discount, initial):
    """Each step's update at the time at which its A' is known: one step later, but at an end at once."""
    q, visits, errors = np.full((STATES, ACTIONS), initial), np.zeros((STATES, ACTIONS), int), []
    count = rollouts[0].reward.shape[1]
    updates = []
    for i in range(count):
        steps = [Transition(*(x[0, i] for x in rollout[:6])) for rollout in rollouts]
        for t, step in enumerate(steps):
            last = step.terminated or step.truncated
            if last or t + 1 < len(steps):
                updates.append((t if last else t + 1, i, t, step, None if last else steps[t + 1].action))
    for *_, (s, a, r, following, terminated, *_), next_action in sorted(updates, key=lambda update: update[:3]):
        if next_action is None:
            next_action = q[following].argmax()
        visits[s, a] += 1
        errors.append(r + discount * (not terminated) * q[following, next_action] - q[s, a])
        q[s, a] += alpha * visits[s, a] ** -decay * errors[-1]
    return q, visits, errors


@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_sarsa(instances, decay):
    rollouts = trajectories(80, instances)
    algorithm = Sarsa(learning_rate=0.3, learning_rate_decay=decay, discount=0.9, initial_value=0.5, **GREEDY)
    state, metrics = learned(algorithm, rollouts)
    q, visits, errors = sarsa_by_the_book(rollouts, 0.3, decay, 0.9, 0.5)
    np.testing.assert_allclose(state.q, q, atol=2e-5)
    np.testing.assert_array_equal(state.visits, visits)
    # The mean over transitions is that over updates, but for what still waits.
    total = sum(float(m["td_error"]) for m in metrics) * instances
    assert total == pytest.approx(np.abs(errors).sum(), rel=1e-4)


def test_sarsa_learns_from_the_last_step_at_once():
    """An episode of one step: its reward is there before another episode has begun."""
    zero, yes, no = np.zeros((1, 1), int), np.ones((1, 1), bool), np.zeros((1, 1), bool)
    one_step = Transition(zero, zero, np.ones((1, 1)), zero + 1, yes, no)
    state, _ = learned(Sarsa(learning_rate=0.5), [one_step])
    assert float(state.q[0, 0]) == 0.5
    state, _ = learned(Sarsa(learning_rate=0.5), [one_step._replace(terminated=no)])
    assert float(state.q[0, 0]) == 0.0  # it waits


@pytest.mark.parametrize("kind", ["epsilon", "softmax"])
def test_truncated_sarsa_is_expected_sarsa_on_average(kind):
    """Where time is up A' is drawn from the behaviour policy at the true successor."""
    settings = {"exploration": kind, "epsilon_start": 0.4, "epsilon_end": 0.4, "temperature": 0.5, "learning_rate": 1.0}
    q = jnp.asarray(np.random.default_rng(0).normal(size=(STATES, ACTIONS)), jnp.float32)
    step = Transition(jnp.int32(0), jnp.int32(0), jnp.float32(0.3), jnp.int32(2), jnp.bool_(False), jnp.bool_(True))

    def after(algorithm, key):
        state = algorithm.init(KEY, spec(1))._replace(q=q)
        return algorithm.update(state, algorithm.episode(spec(1)), step, key)[0].q[0, 0]

    drawn = np.asarray(jax.vmap(lambda key: after(Sarsa(**settings), key))(jax.random.split(KEY, 20_000)))
    expected = float(after(ExpectedSarsa(**settings), KEY))
    assert len(np.unique(drawn.round(5))) == ACTIONS
    assert drawn.mean() == pytest.approx(expected, abs=4 * float(drawn.std()) / len(drawn) ** 0.5)


@pytest.mark.parametrize("kind", ["epsilon", "softmax"])
@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_expected_sarsa(kind, decay):
    algorithm = ExpectedSarsa(
        learning_rate=0.3, learning_rate_decay=decay, discount=0.9, exploration=kind, epsilon_start=0.4,
        epsilon_end=0.4, temperature=0.7,
    )  # fmt: skip
    rollouts = trajectories(60, 3)
    q, visits = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS), int)
    for rollout in rollouts:
        for s, a, r, following, terminated in zip(*(x[0] for x in rollout[:5]), strict=True):
            if kind == "softmax":
                pi = np.exp(q[following] / 0.7) / np.exp(q[following] / 0.7).sum()
            else:
                pi = np.full(ACTIONS, 0.4 / ACTIONS)
                pi[q[following].argmax()] += 0.6
            visits[s, a] += 1
            error = r + 0.9 * (not terminated) * pi @ q[following] - q[s, a]
            q[s, a] += 0.3 * visits[s, a] ** -decay * error
    state, _ = learned(algorithm, rollouts)
    np.testing.assert_allclose(state.q, q, atol=2e-5)
    np.testing.assert_array_equal(state.visits, visits)


@pytest.mark.parametrize("algorithm", [Sarsa(), ExpectedSarsa()])
def test_acts_from_its_behaviour_policy(algorithm):
    """ε is annealed with the clock; both kinds of exploration draw what `probabilities` says."""
    annealed = replace(algorithm, epsilon_start=0.8, epsilon_end=0.2, epsilon_fraction=0.5)
    state = annealed.init(KEY, spec(1))
    state = state._replace(q=state.q.at[2].set(jnp.array([0.0, 1.0, 2.0])))
    for steps, epsilon in [(0, 0.8), (250, 0.5), (1_000, 0.2)]:
        now = state._replace(clock=state.clock.tick(steps=steps))
        actions, carry, extras = annealed.act(now, (), jnp.full(20_000, 2), jax.random.fold_in(KEY, steps))
        assert_frequencies(actions, np.array([epsilon / 3, epsilon / 3, 1 - epsilon * 2 / 3]))
        assert carry == () and extras == ()
    softmax = replace(algorithm, exploration="softmax", temperature=0.7)
    weights = np.exp(np.array([0.0, 1.0, 2.0]) / 0.7)
    assert_frequencies(softmax.act(state, (), jnp.full(20_000, 2), KEY)[0], weights / weights.sum())


def test_probabilities_of_ties_are_those_of_argmax():
    pi = exploration.probabilities("epsilon", jnp.zeros((2, 4)), 0.2, 1.0)
    np.testing.assert_allclose(pi, [[0.85, 0.05, 0.05, 0.05]] * 2, rtol=1e-6)


def test_sample_never_draws_what_has_no_probability():
    """Not at the ends of the range either, where sums are rounded."""
    probabilities = jnp.tile(jnp.array([0.0, 0.7, 0.3, 0.0]), (100_000, 1))
    drawn = exploration.sample(KEY, probabilities)
    assert drawn.dtype == jnp.int32
    assert_frequencies(drawn - 1, np.array([0.7, 0.3]))


@pytest.mark.parametrize("cls", [Sarsa, ExpectedSarsa])
def test_policy_value_and_check(cls):
    algorithm = cls()
    q = jnp.arange(STATES * ACTIONS, dtype=jnp.float32).reshape(STATES, -1)
    state = algorithm.init(KEY, spec(1))._replace(q=q)
    np.testing.assert_array_equal(algorithm.value(state, jnp.array([[0, 3]])), [[2, 11]])
    np.testing.assert_array_equal(algorithm.policy(state, jnp.array([[0, 3]])), [[2, 2]])
    with pytest.raises(UsageError, match=f"{cls.__name__} keeps a table and needs discrete observations"):
        algorithm.check(Spec(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), 1, 100))
    for setting in ("learning_rate", "temperature"):
        with pytest.raises(UsageError, match=setting):
            cls(**{setting: 0.0}).check(spec(1))
