"""DQN against a network written by hand in NumPy (float64), and against rlax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from test_distributions import assert_frequencies

from zhixing.algorithms.dqn import DQN
from zhixing.core import Spec, hyperparameters
from zhixing.errors import UsageError
from zhixing.learned import Vector
from zhixing.replay import Replay
from zhixing.transition import Transition

KEY = jax.random.PRNGKey(0)
ACTIONS, B = 3, 12
SPEC = Spec(spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(ACTIONS), 2, 1_000)


@hyperparameters
class PlainDQN(DQN):
    """With plain gradient descent, so that a step shows its gradient."""

    def optimiser(self, clock):
        return optax.sgd(self.learning_rate)


def random_transitions(seed=0, scale=3.0):
    """Every kind of end, and errors on both sides of Huber's corner."""
    generator = np.random.default_rng(seed)
    terminated = np.arange(B) % 3 == 0
    truncated = np.arange(B) % 3 == 1
    observation, next_observation = generator.normal(size=(2, B, 2))
    batch = Transition(
        observation, generator.integers(0, ACTIONS, B), scale * generator.normal(size=B), next_observation,
        terminated, truncated,
    )  # fmt: skip
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), batch)


def random_batch(seed=0, scale=3.0, discount=0.9, weight=None):
    """`random_transitions` as a replay reads them."""
    transitions = random_transitions(seed, scale)
    replay = Replay.create(B, jax.tree.map(lambda x: x[:, None], transitions))
    replay = replay.add(jax.tree.map(lambda x: x[:, None], transitions))
    return replay.read(jnp.arange(B), jnp.ones(B) if weight is None else weight, discount, 1)


def initial_state(algorithm):
    """With a target network that is not the network."""
    state = algorithm.init(KEY, SPEC)
    noise = 0.5 * jax.random.normal(jax.random.PRNGKey(1), state.q_target.parameters.shape)
    return state._replace(q_target=Vector(state.q_target.parameters + noise, state.q_target.structure))


def layers(net):
    mlp = net.advantage  # Q itself, where the network is not dueling
    return [np.float64(x.T) for pair in zip(mlp.weights, mlp.biases, strict=True) for x in pair]


def forward(parameters, x):
    w1, b1, w2, b2 = parameters
    hidden = np.maximum(x @ w1 + b1, 0)
    return hidden @ w2 + b2, hidden


def loss_and_gradient(parameters, target_parameters, transitions, discount, huber, double=False, weight=1.0):
    """(DQN.4), (DQN.5), (DQN.7) and the chain rule by hand."""
    x, action, reward, following, terminated = (np.asarray(field, np.float64) for field in transitions[:5])
    action = action.astype(int)
    next_q = forward(target_parameters, following)[0]
    best = (forward(parameters, following)[0] if double else next_q).argmax(-1)
    target = reward + discount * (1 - terminated) * next_q[np.arange(B), best]
    q, hidden = forward(parameters, x)
    error = q[np.arange(B), action] - target
    if huber:
        losses = np.where(np.abs(error) <= 1, 0.5 * error**2, np.abs(error) - 0.5)
        slope = np.clip(error, -1, 1)
    else:
        losses, slope = error**2, 2 * error
    d_q = np.zeros_like(q)
    d_q[np.arange(B), action] = weight * slope / B
    d_hidden = (d_q @ parameters[2].T) * (hidden > 0)
    gradient = [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_q, d_q.sum(0)]
    return (weight * losses).mean(), np.abs(error), gradient


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_one_update(loss, double):
    algorithm = PlainDQN(hidden=(8,), learning_rate=0.1, loss=loss, double=double)
    weight = np.random.default_rng(1).uniform(0.1, 1.0, B)
    state, batch = initial_state(algorithm), random_batch(weight=jnp.asarray(weight, jnp.float32))
    before, target = layers(state.q.net), layers(state.q_target.net)
    given = before, target, random_transitions(), 0.9, loss == "huber"
    value, errors, gradient = loss_and_gradient(*given, double, weight)
    assert errors.min() < 1 < errors.max()
    assert value != loss_and_gradient(*given, not double, weight)[0]  # the two targets differ here

    new, metrics = jax.jit(algorithm.update)(state, batch, KEY)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["td_error"], errors, rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum(np.square(g).sum() for g in gradient))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    for old, step, found in zip(before, gradient, layers(new.q.net), strict=True):
        np.testing.assert_allclose(found, old - 0.1 * step, rtol=1e-4, atol=1e-6)


def test_bootstrapping_stops_at_terminations_only():
    """The successor's value is of no use where an episode terminated, and of use everywhere else."""
    algorithm = PlainDQN(hidden=(8,))
    state, batch, transitions = initial_state(algorithm), random_batch(), random_transitions()

    def moved_loss(kind):
        moved = jnp.where(kind[:, None], 5.0, batch.next_observation)
        return float(algorithm.update(state, batch._replace(next_observation=moved), KEY)[1]["loss"])

    same = moved_loss(jnp.zeros(B, bool))
    assert moved_loss(transitions.terminated) == same
    assert moved_loss(transitions.truncated) != same
    assert moved_loss(~(transitions.terminated | transitions.truncated)) != same


@pytest.mark.parametrize("double", [False, True])
def test_rlax(double):
    rlax = pytest.importorskip("rlax")
    algorithm = PlainDQN(hidden=(8,), double=double)
    state, batch = initial_state(algorithm), random_batch(1)
    discount = 0.9 * (1.0 - random_transitions(1).terminated)
    given = state.q(batch.observation), batch.action, batch.reward, discount, state.q_target(batch.next_observation)
    if double:
        td_error = jax.vmap(rlax.double_q_learning)(*given, state.q(batch.next_observation))
    else:
        td_error = jax.vmap(rlax.q_learning)(*given)
    _, metrics = algorithm.update(state, batch, KEY)
    np.testing.assert_allclose(metrics["td_error"], np.abs(td_error), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], rlax.huber_loss(td_error).mean(), rtol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_n_step_targets(n):
    """Through `learn`: one update on an ongoing episode has the targets of rlax's n-step returns."""
    rlax = pytest.importorskip("rlax")
    algorithm = PlainDQN(hidden=(8,), discount=0.9, n_step=n, loss="squared")
    state, transitions = initial_state(algorithm), random_transitions()
    never = jnp.zeros(B, bool)
    following = jnp.concatenate([transitions.observation[1:], transitions.next_observation[-1:]])
    episode = transitions._replace(next_observation=following, terminated=never, truncated=never)
    replay = Replay.create(B, jax.tree.map(lambda x: x[:, None], episode))
    replay = replay.add(jax.tree.map(lambda x: x[:, None], episode))
    batch = replay.read(jnp.arange(B), jnp.ones(B), 0.9, n)
    values = state.q_target(following).max(-1)
    target = rlax.n_step_bootstrapped_returns(episode.reward, jnp.full(B, 0.9), values, n)
    q = state.q(episode.observation)[jnp.arange(B), episode.action]
    _, metrics = algorithm.update(state, batch, KEY)
    np.testing.assert_allclose(metrics["td_error"], np.abs(target - q), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- target network, optimiser


def learned(algorithm, phases):
    """States before and after each of `phases` calls of `learn`."""
    example = jax.tree.map(lambda x: x.reshape(B // 2, 2, *x.shape[1:]), random_transitions())
    state, memory = algorithm.init(KEY, SPEC), algorithm.memory(SPEC, example)
    learn, states = jax.jit(algorithm.learn), []
    for i in range(phases):
        before = state
        state, memory, _ = learn(state, memory, example, jax.random.PRNGKey(i))
        states.append((before, state))
    return states


def test_hard_copy_every_period():
    """θ⁻ = θ after each C-th update, and does not move otherwise."""
    copies = []
    for before, after in learned(DQN(hidden=(8,), target_period=3, learning_starts=0), 10):
        copied = np.array_equal(after.q_target.parameters, after.q.parameters)
        assert copied or np.array_equal(after.q_target.parameters, before.q_target.parameters)
        if copied:
            copies.append(int(after.clock.updates))
    assert copies == [3, 6, 9]


def test_hard_copy_in_the_middle_of_a_phase():
    """Two updates a phase: the third update is the first of the second phase's two."""
    states = learned(DQN(hidden=(8,), target_period=3, learning_starts=0, gradient_steps=2), 3)
    moved = [not np.array_equal(a.q_target.parameters, b.q_target.parameters) for a, b in states]
    assert moved == [False, True, True]  # updates 1-2, 3-4, 5-6
    second = states[1][1]
    assert not np.array_equal(second.q_target.parameters, second.q.parameters)  # θ⁻ = θ as of update 3, not 4


def test_naive():
    """The online network is its own target, at each update."""
    for before, after in learned(DQN(hidden=(8,), target_update="none", learning_starts=0), 3):
        np.testing.assert_array_equal(after.q_target.parameters, after.q.parameters)
        assert not np.array_equal(after.q.parameters, before.q.parameters)


@pytest.mark.parametrize("replay", ["uniform", "proportional", "rank"])
def test_learn_passes_on_what_the_replay_needs(replay):
    """Weights only where sampling is prioritised; what was seen gets its error's priority, the rest keep theirs."""
    algorithm = DQN(hidden=(8,), learning_starts=0, replay=replay, batch_size=3, replay_capacity=B)
    example = jax.tree.map(lambda x: x.reshape(B // 2, 2, *x.shape[1:]), random_transitions())
    state, memory = algorithm.init(KEY, SPEC), algorithm.memory(SPEC, example)
    _, memory, metrics = jax.jit(algorithm.learn)(state, memory, example, KEY)
    assert metrics["td_error"].shape == ()
    if replay == "uniform":
        assert jax.tree.leaves(memory.priorities) == []
        return
    masses = np.asarray(memory.priorities.tree.leaves).ravel()[:B]
    if replay == "proportional":
        assert (masses != 1).sum() in (1, 2, 3)  # of three draws some may be the same
    else:
        np.testing.assert_allclose(np.sort(masses), np.sort(np.arange(1.0, B + 1) ** -0.6), rtol=1e-5)


def test_polyak():
    for before, after in learned(DQN(hidden=(8,), target_update="polyak", polyak=0.1, learning_starts=0), 4):
        expected = 0.9 * np.float64(before.q_target.parameters) + 0.1 * np.float64(after.q.parameters)
        np.testing.assert_allclose(after.q_target.parameters, expected, rtol=1e-5, atol=1e-7)


def test_learning_starts():
    """No update before so many environment steps; each phase here makes 12."""
    states = learned(DQN(hidden=(8,), learning_starts=30), 4)
    assert [int(after.clock.updates) for _, after in states] == [0, 0, 1, 2]
    assert [int(after.clock.steps) for _, after in states] == [12, 24, 36, 48]
    np.testing.assert_array_equal(states[1][1].q.parameters, states[0][0].q.parameters)


def test_optimiser_is_clipped_adam():
    """Three updates against Adam written out, with gradients of which some are longer than allowed."""
    algorithm = DQN(hidden=(8,), learning_rate=0.01, discount=0.9, max_gradient_norm=0.5, loss="squared")
    state = initial_state(algorithm)
    target, parameters = layers(state.q_target.net), layers(state.q.net)
    first = [np.zeros_like(x) for x in parameters]
    second = [np.zeros_like(x) for x in parameters]
    norms = []
    for n, scale in enumerate((3.0, 0.1, 1.0), start=1):
        batch = random_batch(n, scale)
        _, _, gradient = loss_and_gradient(parameters, target, random_transitions(n, scale), 0.9, huber=False)
        norms.append(np.sqrt(sum(np.square(g).sum() for g in gradient)))
        gradient = [g * min(1, 0.5 / norms[-1]) for g in gradient]
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradient, strict=True)]
        second = [0.999 * v + 0.001 * g**2 for v, g in zip(second, gradient, strict=True)]
        parameters = [
            p - 0.01 * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
            for p, m, v in zip(parameters, first, second, strict=True)
        ]
        state, metrics = algorithm.update(state, batch, KEY)
        np.testing.assert_allclose(metrics["gradient_norm"], norms[-1], rtol=1e-3)  # before it is clipped
    assert max(norms) > 0.5
    for expected, found in zip(parameters, layers(state.q.net), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_learning_rate_schedule():
    """Half of the run over: half the step, of Adam's first."""
    steps = []
    for done in (0, 500):
        algorithm = DQN(hidden=(8,), learning_rate_schedule="linear")
        state = algorithm.init(KEY, SPEC)
        state = state._replace(clock=state.clock.tick(steps=done))
        new, _ = algorithm.update(state, random_batch(), KEY)
        steps.append(np.asarray(new.q.parameters - state.q.parameters))
    np.testing.assert_allclose(steps[1], steps[0] / 2, rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize("steps, epsilon", [(0, 1.0), (50, 0.6), (100, 0.2), (900, 0.2)])
def test_epsilon_greedy(steps, epsilon):
    algorithm = DQN(hidden=(8,), epsilon_end=0.2, epsilon_fraction=0.1)
    state = algorithm.init(KEY, SPEC)
    state = state._replace(clock=state.clock.tick(steps=steps))
    observation = jnp.tile(jnp.array([0.3, -0.8]), (20_000, 1))
    greedy = int(state.q(observation[0]).argmax())
    expected = np.full(ACTIONS, epsilon / ACTIONS)
    expected[greedy] += 1 - epsilon
    assert_frequencies(algorithm.act(state, (), observation, KEY)[0], expected)
    assert int(algorithm.policy(state, observation[0])) == greedy
    assert float(algorithm.value(state, observation[0])) == float(state.q(observation[0]).max())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"target_period": 0}, "target_period"),
        ({"n_step": 0}, "n_step"),
        ({"priority_exponent": -0.1}, "priority_exponent"),
        ({"importance_exponent": 1.5}, "importance_exponent"),
        ({"replay_capacity": 4, "rollout_length": 3}, "replay_capacity"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=message):
        DQN(**settings).check(SPEC)
