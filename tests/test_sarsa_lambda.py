"""Sarsa(λ) against the book's pseudo-code, against Sarsa, and against the forward view."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from test_n_step_td import episodes_of
from test_sarsa import ACTIONS, GREEDY, KEY, STATES, learned, spec, trajectories

from zhixing.algorithms.sarsa import Sarsa
from zhixing.algorithms.sarsa_lambda import SarsaLambda
from zhixing.core import Spec
from zhixing.errors import UsageError
from zhixing.features import Features

TRACES = ("accumulating", "replacing", "dutch")
ALPHA, DISCOUNT = 0.2, 0.9
BOX = spaces.Box(np.float32([-1, 0]), np.float32([1, 3]))
TILINGS, TILES = 4, 3


class Book:
    """Sutton & Barto's loops (sections 12.5 and 12.7) of one instance; the weights [features, actions] all share."""

    def __init__(self, w, traces, alpha, trace_decay):
        self.w, self.traces, self.alpha, self.trace_decay = w, traces, alpha, trace_decay
        self.start()

    def start(self):
        self.z, self.q_old, self.step = np.zeros_like(self.w), 0.0, None

    def vector(self, features, action):
        x = np.zeros_like(self.w)
        x[features, action] = 1.0
        return x

    def body(self, x, reward, x_next):
        decay = DISCOUNT * self.trace_decay
        q, q_next = (self.w * x).sum(), (self.w * x_next).sum()
        delta = reward + DISCOUNT * q_next - q
        if self.traces == "dutch":
            self.z = decay * self.z + (1 - self.alpha * decay * (self.z * x).sum()) * x
            self.w += self.alpha * (delta + q - self.q_old) * self.z - self.alpha * (q - self.q_old) * x
            self.q_old = q_next
        else:
            self.z = decay * self.z
            self.z = self.z + x if self.traces == "accumulating" else np.where(x == 1, 1.0, self.z)
            self.w += self.alpha * delta * self.z

    def transition(self, features, action, reward, next_features, terminated, truncated):
        x = self.vector(features, action)
        if self.step is not None:
            self.body(*self.step, x)  # the loop's body of the step before, whose A' this is
        self.step = x, reward
        if terminated or truncated:
            greedy = self.w[next_features].sum(0).argmax()
            self.body(*self.step, (not terminated) * self.vector(next_features, greedy))
            self.start()


def by_the_book(rollouts, features, size, traces, alpha, trace_decay):
    w = np.zeros((size, ACTIONS))
    instances = [Book(w, traces, alpha, trace_decay) for _ in range(rollouts[0].reward.shape[1])]
    for rollout in rollouts:
        for i, book in enumerate(instances):
            s, a, r, following, terminated, truncated = (x[0, i] for x in rollout[:6])
            book.transition(features(s), a, r, features(following), terminated, truncated)
    return w


@pytest.mark.parametrize("traces", TRACES)
@pytest.mark.parametrize("instances, trace_decay", [(1, 0.8), (3, 0.5), (2, 1.0)])
def test_update_on_a_table(traces, instances, trace_decay):
    rollouts = trajectories(80, instances)
    algorithm = SarsaLambda(traces=traces, trace_decay=trace_decay, learning_rate=ALPHA, discount=DISCOUNT, **GREEDY)
    state, _ = learned(algorithm, rollouts)
    w = by_the_book(rollouts, lambda s: np.array([s]), STATES, traces, ALPHA, trace_decay)
    np.testing.assert_allclose(state.weights, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("traces", TRACES)
def test_update_on_tiles(traces):
    """The observations are points of a Box, near ones share tiles; α is divided by the number of tilings."""
    places = np.float32(np.random.default_rng(1).uniform(BOX.low, BOX.high, (STATES, 2)))
    rollouts = trajectories(80, 2)
    points = [
        r._replace(observation=places[r.observation], next_observation=places[r.next_observation]) for r in rollouts
    ]
    algorithm = SarsaLambda(
        tilings=TILINGS, tiles=TILES, traces=traces, trace_decay=0.8, learning_rate=ALPHA, discount=DISCOUNT, **GREEDY
    )
    state, _ = learned(algorithm, points, Spec(BOX, spaces.Discrete(ACTIONS), 2, 1_000))
    coding = Features.of(BOX, TILINGS, TILES)
    w = by_the_book(points, lambda s: np.asarray(coding(s)), coding.size, traces, ALPHA / TILINGS, 0.8)
    np.testing.assert_allclose(state.weights, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("traces", TRACES)
def test_without_traces_it_is_sarsa(traces):
    rollouts = trajectories(80, 3)
    settings = {"learning_rate": ALPHA, "discount": DISCOUNT, "initial_value": 0.5, **GREEDY}
    state, metrics = learned(SarsaLambda(traces=traces, trace_decay=0.0, **settings), rollouts)
    expected, expected_metrics = learned(Sarsa(**settings), rollouts)
    np.testing.assert_allclose(state.weights, expected.q, atol=1e-5)
    np.testing.assert_allclose([m["td_error"] for m in metrics], [m["td_error"] for m in expected_metrics], atol=1e-4)


def forward_view(w, steps, trace_decay):
    """Weights after an episode: at each time h the steps so far are updated anew, in order, by their λ-return to h."""
    pairs = [(step.observation, step.action) for step in steps]
    online = [w]  # at times 0, 1, ..., T

    def n_step_return(k, j):
        """From step k to time j, with the weights of the time before j; nothing follows the episode's end."""
        rewards = sum(DISCOUNT ** (m - k) * steps[m].reward for m in range(k, j))
        return rewards + (DISCOUNT ** (j - k) * online[j - 1][pairs[j]] if j < len(steps) else 0.0)

    for h in range(1, len(steps) + 1):
        w = online[0].copy()
        for k in range(h):
            weights = [(1 - trace_decay) * trace_decay ** (j - k - 1) for j in range(k + 1, h)]
            weights.append(trace_decay ** (h - k - 1))
            target = sum(c * n_step_return(k, j) for c, j in zip(weights, range(k + 1, h + 1), strict=True))
            w[pairs[k]] += ALPHA * (target - w[pairs[k]])
        online.append(w)
    return online[-1]


@pytest.mark.parametrize("trace_decay", [0.0, 0.7, 1.0])
def test_dutch_traces_are_the_online_forward_view(trace_decay):
    """Van Seijen et al. 2016, theorem 1, over several episodes; with λ = 1 it is Monte Carlo."""
    rollouts = trajectories(60, 1, truncation=0.0)
    ended = max(t for t, rollout in enumerate(rollouts) if rollout.terminated[0, 0])
    w = np.zeros((STATES, ACTIONS))
    for _, steps in episodes_of(rollouts[: ended + 1], 0):
        w = forward_view(w, steps, trace_decay)
    algorithm = SarsaLambda(trace_decay=trace_decay, learning_rate=ALPHA, discount=DISCOUNT)
    state, _ = learned(algorithm, rollouts[: ended + 1])
    np.testing.assert_allclose(state.weights, w, atol=2e-5)


def test_initial_value_schedule_and_policy():
    task = Spec(BOX, spaces.Discrete(ACTIONS), 1, 1_000)
    algorithm = SarsaLambda(tilings=TILINGS, tiles=TILES, initial_value=2.0, learning_rate_schedule="linear")
    state = algorithm.init(KEY, task)
    observation = jnp.zeros((5, 7, 2))
    np.testing.assert_allclose(algorithm.value(state, observation), np.full((5, 7), 2.0), rtol=1e-6)
    tiles = state.features(jnp.zeros(2))
    state = state._replace(weights=state.weights.at[tiles, 1].add(0.25), clock=state.clock.tick(steps=500))
    np.testing.assert_array_equal(algorithm.policy(state, observation), np.ones((5, 7)))
    np.testing.assert_allclose(algorithm.value(state, jnp.zeros(2)), 3.0, rtol=1e-6)
    rollout = jax.tree.map(lambda x: x[0, 0], trajectories(1, 1)[0])
    rollout = jax.tree.map(jnp.asarray, rollout._replace(observation=np.zeros(2), next_observation=np.zeros(2)))
    metrics = algorithm.update(state, algorithm.episode(task), rollout, KEY)[2]
    assert float(metrics["step_size"]) == pytest.approx(0.1 / TILINGS / 2)  # half of the run is over


@pytest.mark.parametrize("setting", ["tilings", "tiles", "learning_rate", "temperature"])
def test_check(setting):
    with pytest.raises(UsageError, match=f"{setting} is 0; it must be above 0"):
        SarsaLambda(**{setting: 0}).check(spec(1))
