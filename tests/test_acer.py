"""ACER against a float64 transcription of the paper's algorithms, its trust region against SciPy, its ring of steps."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from scipy import optimize, special

from zhixing.algorithms.acer import (
    ACER,
    DiscreteCritic,
    StochasticDueling,
    importance,
    stretches,
    within_trust_region,
)
from zhixing.core import Spec, Transition
from zhixing.distributions import Categorical, DiagonalNormal
from zhixing.errors import UsageError
from zhixing.networks import Actions
from zhixing.replay import Replay
from zhixing.returns import retrace

KEY = jax.random.PRNGKey(0)
T, N, ACTIONS, DIMENSIONS, SAMPLES = 6, 4, 3, 2, 3
DISCRETE, CONTINUOUS = spaces.Discrete(ACTIONS), spaces.Box(-1, 1, (DIMENSIONS,), np.float32)
SPEC = Spec(spaces.Box(-1, 1, (3,), np.float32), DISCRETE, N, 1_000)
STATES = 2 * T * N  # of a table: those of the rollout, then their successors


SMALL = ACER(hidden=(8,), optimiser="adam", learning_rate_schedule="linear")


@jax.jit
def update(algorithm, state, rollout, key):
    """One program for all algorithms that differ in their numbers only."""
    return algorithm.update(state, rollout, key)


@jax.jit
def gradient_of_loss(algorithm, net, average, rollout, key):
    return jax.grad(algorithm.loss, has_aux=True)(net, average, rollout, key)


class Table(eqx.Module):
    """In place of an actor-critic: rows of what a network would give for each state, which is its own observation."""

    statistics: Categorical | DiagonalNormal  # [STATES, ...]
    values: jax.Array  # [STATES], or [STATES, A] for Q
    actions: Actions = eqx.field(static=True)

    def policy(self, observation):
        return jax.tree.map(lambda x: x[observation], self.statistics)

    def features(self, observation):
        return observation[..., None]

    def critic(self, features):
        values = self.values[features[..., 0]]
        return values if self.values.ndim > 1 else values[..., None]

    def value(self, observation):
        return self.values[observation]


class QuadraticAdvantage(eqx.Module):
    """A(s, a) = slope · a - |a|², for states that have been put beside their action as a number."""

    slope: jax.Array  # [STATES, d]

    def __call__(self, x):
        state, action = x[..., 0].astype(int), x[..., 1:]
        return ((self.slope[state] * action).sum(-1) - jnp.square(action).sum(-1))[..., None]


def random_problem(discrete, seed=0):
    """-> a tabular net, the average policy over the rollout, and a rollout of an older policy; call it in float64."""
    generator = np.random.default_rng(seed)
    state = np.arange(STATES // 2).reshape(T, N)
    reward = generator.normal(size=(T, N))
    terminated = generator.random((T, N)) < 0.15
    truncated = (generator.random((T, N)) < 0.15) & ~terminated
    assert terminated.any() and truncated.any()
    if discrete:
        logits = generator.normal(size=(STATES, ACTIONS))
        average, mu = (Categorical(logits[state] + generator.normal(size=(T, N, ACTIONS))) for _ in range(2))
        action = generator.integers(0, ACTIONS, (T, N))
        values = generator.normal(size=(STATES, ACTIONS))
        net = DiscreteCritic(Table(Categorical(logits), values, Actions.of(DISCRETE)))
    else:
        mean, log_std = generator.normal(size=(2, STATES, DIMENSIONS)) * [[[1.0]], [[0.3]]]

        def near():
            noise = 0.4 * generator.normal(size=(2, T, N, DIMENSIONS))
            return DiagonalNormal(mean[state] + noise[0], log_std[state] + noise[1])

        average, mu = near(), near()
        action = mu.mean + np.exp(mu.log_std) * generator.normal(size=mu.mean.shape)
        table = Table(DiagonalNormal(mean, log_std), generator.normal(size=STATES), Actions.of(CONTINUOUS))
        net = StochasticDueling(table, QuadraticAdvantage(generator.normal(size=(STATES, DIMENSIONS))), SAMPLES)
    rollout = Transition(state, action, reward, state + STATES // 2, terminated, truncated, mu)
    return jax.tree.map(jnp.asarray, (net, average, rollout))


# ------------------------------------------------------------------------------- the paper's algorithms, transcribed


def log_density(mean, log_std, action):
    z = (action - mean) / np.exp(log_std)
    return (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


def limited(algorithm, g, k):
    if algorithm.trust_region is None:
        return g
    return g - max(0.0, (k @ g - algorithm.trust_region) / (k @ k)) * k


def algorithm_2(algorithm, net, average, rollout):
    """Discrete actions: the gradients with respect to the logits and to Q [STATES, A], of what is to be minimised."""
    logits, q = np.array(net.base.statistics.logits), np.array(net.base.values)
    c, gamma = algorithm.max_importance_weight, algorithm.discount
    to_logits, to_q = np.zeros_like(logits), np.zeros_like(q)
    pi = special.softmax(logits, -1)
    value = (pi * q).sum(-1)
    mu, other = (special.softmax(np.array(p.logits), -1) for p in (rollout.extras, average))
    for n in range(N):
        for t in reversed(range(T)):
            s, a = int(rollout.observation[t, n]), int(rollout.action[t, n])
            if rollout.terminated[t, n]:
                q_ret = 0.0
            elif rollout.truncated[t, n] or t + 1 == T:
                q_ret = value[rollout.next_observation[t, n]]
            # else the last line of the loop has made it that of the next state
            q_ret = rollout.reward[t, n] + gamma * q_ret

            rho = pi[s] / mu[t, n]
            grad_log = np.eye(ACTIONS) - pi[s]  # [action, logits]
            g = min(c, rho[a]) * (q_ret - value[s]) * grad_log[a]
            for b in range(ACTIONS):
                g += pi[s, b] * max(0.0, 1 - c / rho[b]) * (q[s, b] - value[s]) * grad_log[b]
            entropy = -(pi[s] * np.log(pi[s])).sum()
            g += algorithm.entropy_coefficient * -pi[s] * (np.log(pi[s]) + entropy)
            to_logits[s] = -limited(algorithm, g, pi[s] - other[t, n]) / (T * N)
            to_q[s, a] = -algorithm.value_coefficient * (q_ret - q[s, a]) / (T * N)

            # In the middle of an episode V(sₜ₊₁) is that of the next row's state: see `test_gradient`.
            q_ret = min(1.0, rho[a]) * (q_ret - q[s, a]) + value[s]
    return to_logits, to_q


def algorithm_3(algorithm, net, average, rollout, samples, other_action):
    """Continuous actions: the gradients with respect to means, log σ, V and the advantages' slopes."""
    mean, log_std = np.array(net.base.statistics.mean), np.array(net.base.statistics.log_std)
    value, slope = np.array(net.base.values), np.array(net.advantage.slope)
    c, gamma, mu = algorithm.max_importance_weight, algorithm.discount, rollout.extras
    gradients = [np.zeros_like(x) for x in (mean, log_std, value, slope)]

    for n in range(N):
        for t in reversed(range(T)):
            s, a, other = int(rollout.observation[t, n]), np.array(rollout.action[t, n]), other_action[t, n]
            if rollout.terminated[t, n]:
                q_ret = q_opc = 0.0
            elif rollout.truncated[t, n] or t + 1 == T:
                q_ret = q_opc = value[rollout.next_observation[t, n]]
            q_ret, q_opc = (rollout.reward[t, n] + gamma * x for x in (q_ret, q_opc))

            def centred(a, s=s, u=samples[:, t, n]):
                return (slope[s] @ a - a @ a) - (u @ slope[s] - (u**2).sum(-1)).mean()

            def rho(a, s=s, t=t, n=n):
                behaviour = log_density(np.array(mu.mean[t, n]), np.array(mu.log_std[t, n]), a)
                return np.exp(log_density(mean[s], log_std[s], a) - behaviour)

            def grad_log(a, s=s):
                z = (a - mean[s]) / np.exp(log_std[s])
                return np.concatenate([z / np.exp(log_std[s]), z**2 - 1])

            q = value[s] + centred(a)
            g = min(c, rho(a)) * (q_opc - value[s]) * grad_log(a)
            g += max(0.0, 1 - c / rho(other)) * centred(other) * grad_log(other)
            g += algorithm.entropy_coefficient * np.repeat([0.0, 1.0], DIMENSIONS)
            variance = np.exp(2 * log_std[s])
            gap, their_variance = mean[s] - average.mean[t, n], np.exp(2 * np.array(average.log_std[t, n]))
            k = np.concatenate([gap / variance, 1 - (their_variance + gap**2) / variance])
            z = limited(algorithm, g, k) / (T * N)
            gradients[0][s], gradients[1][s] = -z[:DIMENSIONS], -z[DIMENSIONS:]

            error = algorithm.value_coefficient * (q_ret - q) / (T * N)
            gradients[2][s] = -error - min(1.0, rho(a)) * error
            gradients[3][s] = -error * (a - samples[:, t, n].mean(0))

            q_ret = min(1.0, rho(a) ** (1 / DIMENSIONS)) * (q_ret - q) + value[s]
            q_opc = (q_opc - q) + value[s]
    return gradients


def joined(rollout, table):
    """`table` [STATES, ...] with the successor's row made the next step's, where the episode goes on."""
    table = np.array(table)
    for t, n in np.ndindex(T - 1, N):
        if not (rollout.terminated[t, n] or rollout.truncated[t, n]):
            table[rollout.next_observation[t, n]] = table[rollout.observation[t + 1, n]]
    return jnp.asarray(table)


SETTINGS = [
    {"max_importance_weight": 1.5, "trust_region": 0.05, "entropy_coefficient": 0.1},
    {"max_importance_weight": 0.5, "trust_region": None, "value_coefficient": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("discrete", [True, False])
def test_gradient(discrete, settings):
    """Of every entry of every table, in float64, against Algorithms 2 and 3."""
    algorithm = ACER(hidden=(4,), discount=0.875, **settings)  # γ as float32 has it
    with jax.enable_x64(True):
        net, average, rollout = random_problem(discrete)
        net = eqx.tree_at(lambda n: n.base, net, jax.tree.map(lambda x: joined(rollout, x), net.base))
        gradient, metrics = gradient_of_loss(algorithm, net, average, rollout, KEY)
        pi = net.base.policy(rollout.observation)
        samples = jax.vmap(pi.sample)(jax.random.split(KEY, 1 + SAMPLES)) if not discrete else None
    net, average, rollout = jax.tree.map(np.asarray, (net, average, rollout))  # JAX would make them float32 here
    if discrete:
        expected = algorithm_2(algorithm, net, average, rollout)
        actual = gradient.base.statistics.logits, gradient.base.values
    else:
        expected = algorithm_3(algorithm, net, average, rollout, np.array(samples[1:]), np.array(samples[0]))
        statistics = gradient.base.statistics
        actual = statistics.mean, statistics.log_std, gradient.base.values, gradient.advantage.slope
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == np.float64 and np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    if settings["trust_region"] == 0.05:  # every branch has been taken
        assert 0 < metrics["trust_region_fraction"] < 1 and 0 < metrics["truncated_fraction"] < 1


@pytest.mark.parametrize("action_space", [DISCRETE, CONTINUOUS])
def test_on_policy_it_is_the_actor_critic_gradient(action_space):
    """μ = π, no truncation, no trust region: -E[∇ log π(a|s) (Q_ret - V(s))]."""
    algorithm = ACER(hidden=(8,), trust_region=None, max_importance_weight=np.inf, value_coefficient=0.0)
    state = algorithm.init(KEY, replace(SPEC, action_space=action_space))
    rollout = random_rollout(algorithm, state)
    net = state.actor_critic.net
    gradient, metrics = gradient_of_loss(algorithm, net, rollout.extras, rollout, KEY)

    said = net.criticise(rollout.extras, rollout, KEY)
    next_value = net.value(rollout.next_observation)
    trace = jnp.ones((T, N))
    q_ret = retrace(rollout.reward, 0.99 * rollout.bootstrap, rollout.ended, said.q, next_value, trace)

    def actor_critic_loss(net):
        log_prob = net.base.policy(rollout.observation).log_prob(rollout.action)
        return -(log_prob * (q_ret - said.value)).mean()

    expected = jax.jit(jax.grad(actor_critic_loss))(net)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 1e-2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), gradient, expected)
    np.testing.assert_allclose(metrics["importance_weight"], 1.0, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- the trust region


@pytest.mark.parametrize("seed", range(8))
def test_trust_region_solves_its_quadratic_programme(seed):
    """(ACER.7) against SciPy, and the conditions of Karush, Kuhn and Tucker; statistics in two leaves as a normal's."""
    generator = np.random.default_rng(seed)
    delta = generator.uniform(0.05, 1.0)
    g, k = generator.normal(size=(2, 2, 5, DIMENSIONS))  # [leaf, state, d]
    z, limited = within_trust_region(tuple(jnp.asarray(g)), tuple(jnp.asarray(k)), delta)
    flat = [np.concatenate(list(x), -1) for x in (np.float64(np.stack(z)), g, k)]
    for z, g, k, active in zip(*flat, np.asarray(limited), strict=True):
        found = optimize.minimize(
            lambda z, g=g: 0.5 * np.sum((z - g) ** 2),
            np.zeros_like(g),
            jac=lambda z, g=g: z - g,
            constraints={"type": "ineq", "fun": lambda z, k=k: delta - k @ z, "jac": lambda z, k=k: -k},
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        assert found.success
        np.testing.assert_allclose(z, found.x, atol=1e-5)
        multiplier = (g - z) @ k / (k @ k)
        np.testing.assert_allclose(z, g - multiplier * k, atol=1e-6)  # stationary
        assert multiplier > -1e-6 and k @ z <= delta + 1e-5
        assert active == (multiplier > 1e-6)
        assert abs(multiplier * (k @ z - delta)) < 1e-5


def test_without_any_distance_the_trust_region_leaves_the_gradient():
    g, k = jnp.ones((4, 3)), jnp.zeros((4, 3))
    z, limited = within_trust_region(g, k, 0.0)
    np.testing.assert_array_equal(z, g)
    assert not limited.any()


# ------------------------------------------------------------------------------------- importance weights, corrections


def every_action(seed=0):
    """-> π, μ and a rollout [1, A] of one state whose column a took action a, and what the critic says."""
    generator = np.random.default_rng(seed)
    logits, other = generator.normal(size=(2, ACTIONS))
    q = jnp.float32(generator.normal(size=ACTIONS))
    pi, mu = (Categorical(jnp.broadcast_to(jnp.float32(x), (1, ACTIONS, ACTIONS))) for x in (logits, logits + other))
    table = Table(Categorical(jnp.float32(logits)[None]), q[None], Actions.of(DISCRETE))
    state, zeros, never = jnp.zeros((1, ACTIONS), int), jnp.zeros((1, ACTIONS)), jnp.zeros((1, ACTIONS), bool)
    rollout = Transition(state, jnp.arange(ACTIONS)[None], zeros, state, never, never, mu)
    return pi, mu, rollout, DiscreteCritic(table).criticise(pi, rollout, KEY), q


def ascent(algorithm, pi, rollout, critique):
    ratio = importance(pi, rollout.extras, rollout.action)
    return algorithm.ascent(pi, pi, rollout, ratio, critique.q, critique)[0].logits, ratio


@pytest.mark.parametrize("seed", range(4))
def test_correction_makes_the_truncated_gradient_unbiased(seed):
    """The sum over the behaviour policy's actions is E_π[∇ log π (Q - V)], whatever c is; Q_ret is Q here."""
    pi, mu, rollout, critique, q = every_action(seed)
    p, behaviour = (np.float64(jax.nn.softmax(x.logits[0, 0])) for x in (pi, mu))
    exact = (p * (np.float64(q) - p @ np.float64(q))) @ (np.eye(ACTIONS) - p)
    for c in (0.3, 0.8, 1.5, 100.0):
        algorithm = ACER(max_importance_weight=c, trust_region=None)
        gradients, _ = ascent(algorithm, pi, rollout, critique)
        np.testing.assert_allclose(behaviour @ np.float64(gradients[0]), exact, atol=1e-6)


def test_correction_vanishes_where_no_weight_is_truncated():
    pi, _, rollout, critique, _ = every_action()
    gradients, ratio = ascent(ACER(max_importance_weight=np.inf, trust_region=None), pi, rollout, critique)
    just_above = ACER(max_importance_weight=float(ratio.max()) * 1.001, trust_region=None)
    np.testing.assert_array_equal(ascent(just_above, pi, rollout, critique)[0], gradients)
    # With c below the largest ratio every column is corrected, also those whose own weight is not truncated.
    below = ACER(max_importance_weight=float(ratio.max()) * 0.9, trust_region=None)
    changed = np.abs(ascent(below, pi, rollout, critique)[0] - gradients)
    assert np.all(changed.max(-1) > 1e-4)


# ---------------------------------------------------------------------------------------------------------- the critics


def test_value_is_the_mean_of_q_over_the_policy():
    algorithm = ACER(hidden=(8,))
    state = algorithm.init(KEY, SPEC)
    net, rollout = state.actor_critic.net, random_rollout(algorithm, state)
    pi = net.base.policy(rollout.observation)
    said = net.criticise(pi, rollout, KEY)
    expected = sum(
        np.exp(pi.log_prob(jnp.full((T, N), a)))
        * net.criticise(pi, rollout._replace(action=jnp.full((T, N), a)), KEY).q
        for a in range(ACTIONS)
    )
    np.testing.assert_allclose(said.value, expected, rtol=1e-5)
    np.testing.assert_allclose(net.value(rollout.observation), expected, rtol=1e-5)
    np.testing.assert_allclose((said.weight * said.others_q).sum(0), expected, rtol=1e-5)
    np.testing.assert_array_equal(algorithm.value(state, rollout.observation), net.value(rollout.observation))


def test_stochastic_dueling():
    """(ACER.9) by hand, and that the mean of Q over actions from π is V."""
    with jax.enable_x64(True):
        net, _, rollout = random_problem(discrete=False)
        pi, draws = net.base.policy(rollout.observation), 4_000
        said = net.criticise(pi, rollout, KEY)
        samples = np.array(jax.vmap(pi.sample)(jax.random.split(KEY, 1 + SAMPLES))[1:])
        many = jax.jit(jax.vmap(lambda key: net.criticise(pi, rollout, key).others_q[0]))(jax.random.split(KEY, draws))
    slope, value = np.asarray(net.advantage.slope)[: T * N].reshape(T, N, -1), np.asarray(said.value)

    def advantage(action):
        return (slope * action).sum(-1) - (action**2).sum(-1)

    expected = value + advantage(np.array(rollout.action)) - np.mean([advantage(u) for u in samples], 0)
    np.testing.assert_allclose(said.q, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(value, np.asarray(net.base.values)[np.asarray(rollout.observation)])
    many = np.asarray(many)
    error, spread = many.mean(0) - value, many.std(0) / np.sqrt(draws)
    assert np.all(np.abs(error) < 4.5 * spread) and spread.max() < 0.15


# ------------------------------------------------------------------------------------------------ the ring, the updates


def random_rollout(algorithm, state, seed=0):
    generator = np.random.default_rng(seed)
    observation, next_observation = jnp.float32(generator.normal(size=(2, T, N, 3)))
    action, _, mu = algorithm.act(state, (), observation, jax.random.PRNGKey(seed))
    terminated = generator.random((T, N)) < 0.2
    truncated = (generator.random((T, N)) < 0.2) & ~terminated
    reward = jnp.float32(generator.normal(size=(T, N)))
    flags = jnp.asarray(terminated), jnp.asarray(truncated)
    return Transition(observation, action, reward, next_observation, *flags, mu)


def numbered(first, length):
    """A rollout whose rewards say (step, environment) as 10 step + environment."""
    number = 10.0 * (first + jnp.arange(length))[:, None] + jnp.arange(N)
    never = jnp.zeros((length, N), bool)
    return Transition(number, number, number, number, never, never, Categorical(number[..., None]))


@pytest.mark.parametrize(
    "capacity, lengths", [(5 * N, [3]), (8 * N, [3, 3]), (8 * N + 1, [3, 3, 3, 3]), (7 * N, [3] * 9)]
)
def test_stretches_come_from_the_newest_steps(capacity, lengths):
    """In a row, of one environment each, any start as likely; the oldest steps have been written over."""
    ring = Replay.create(capacity, numbered(0, 3))
    for i, length in enumerate(lengths):
        ring = ring.add(numbered(3 * i, length))
    total = sum(lengths)
    drawn = stretches(ring, KEY, 500, 3)
    assert drawn.reward.shape == (500, 3, N)
    steps, instances = np.divmod(np.asarray(drawn.reward), 10)
    np.testing.assert_array_equal(instances, np.broadcast_to(np.arange(N), instances.shape))
    np.testing.assert_array_equal(steps - steps[:, :1], np.broadcast_to(np.arange(3)[:, None], steps.shape))
    starts, counts = np.unique(steps[:, 0], return_counts=True)
    np.testing.assert_array_equal(starts, np.arange(max(0, total - capacity // N), total - 2))
    assert np.all(np.abs(counts / counts.sum() - 1 / len(starts)) < 0.05)
    np.testing.assert_array_equal(drawn.extras.logits[..., 0], drawn.reward)


def test_learn_is_one_update_with_the_rollout_and_then_replayed_ones():
    replay_ratio = 3
    small = replace(SMALL, learning_rate=0.01)
    algorithm = replace(small, replay_ratio=replay_ratio, replay_capacity=10 * N)
    state = algorithm.init(KEY, SPEC)
    old, rollout = (random_rollout(algorithm, state, seed) for seed in (1, 2))
    memory = algorithm.memory(SPEC, jax.eval_shape(lambda: rollout)).add(old)
    learned, memory_after, metrics = jax.jit(algorithm.learn)(state, memory, rollout, KEY)

    sample_key, *keys = jax.random.split(KEY, 2 + replay_ratio)
    memory = memory.add(rollout)
    replayed = stretches(memory, sample_key, replay_ratio, T)
    expected, errors = state, []
    for i, key in enumerate(keys):
        data = rollout if i == 0 else jax.tree.map(lambda x, i=i: x[i - 1], replayed)
        expected, of_one = update(small, expected, data, key)
        errors.append(of_one["value_loss"])
    np.testing.assert_allclose(learned.actor_critic.parameters, expected.actor_critic.parameters, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["value_loss"], np.mean(errors), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, memory_after, memory)
    assert int(learned.clock.updates) == 1 + replay_ratio == algorithm.updates_per_iteration
    assert int(learned.clock.steps) == T * N


def test_a_last_rollout_may_be_shorter():
    algorithm = ACER(hidden=(8,), rollout_length=T, replay_ratio=2, replay_capacity=2 * T * N)
    state = algorithm.init(KEY, SPEC)
    rollout = random_rollout(algorithm, state)
    memory = algorithm.memory(SPEC, rollout)
    learned, memory, metrics = jax.jit(algorithm.learn)(state, memory, jax.tree.map(lambda x: x[:2], rollout), KEY)
    assert int(learned.clock.steps) == 2 * N == int(memory.cursor.size)
    assert all(np.isfinite(x) for x in metrics.values())


def test_average_policy():
    """θ_average ← α θ_average + (1 - α) θ, after the step; at the start it is θ."""
    algorithm = replace(SMALL, learning_rate=0.02, average_decay=0.8)
    state = algorithm.init(KEY, SPEC)
    np.testing.assert_array_equal(state.average.parameters, state.actor_critic.parameters)
    expected = np.float64(state.average.parameters)
    for seed in range(3):
        state, metrics = update(algorithm, state, random_rollout(algorithm, state, seed), KEY)
        expected = 0.8 * expected + 0.2 * np.float64(state.actor_critic.parameters)
        np.testing.assert_allclose(state.average.parameters, expected, rtol=1e-5, atol=1e-6)
    assert metrics["kl"] > 1e-4 and np.abs(expected - state.actor_critic.parameters).max() > 1e-3


def test_learning_rate_schedule():
    """Half of the run over: half the step."""
    steps = []
    for done in (0, 500):
        state = SMALL.init(KEY, SPEC)
        state = state._replace(clock=state.clock.tick(steps=done))
        new, _ = update(SMALL, state, random_rollout(SMALL, state), KEY)
        steps.append(np.asarray(new.actor_critic.parameters - state.actor_critic.parameters))
    np.testing.assert_allclose(steps[1], steps[0] / 2, rtol=1e-3, atol=1e-7)


def test_gradient_clipping():
    """Adam's first moment after one step is a tenth of the clipped gradient."""
    state = SMALL.init(KEY, SPEC)
    for limit in (0.01, 1e6):
        new, metrics = update(replace(SMALL, max_gradient_norm=limit), state, random_rollout(SMALL, state), KEY)
        moment = np.linalg.norm(optax.tree.get(new.actor_critic.optimiser_state, "mu"))
        np.testing.assert_allclose(moment, 0.1 * min(limit, metrics["gradient_norm"]), rtol=1e-4)
        assert metrics["gradient_norm"] > 0.01


# ---------------------------------------------------------------------------------------------------- acting, bad input


@pytest.mark.parametrize(
    "action_space, settings",
    [
        (DISCRETE, {"shared_trunk": True}),
        (CONTINUOUS, {"shared_trunk": True, "dueling_samples": 1, "state_dependent_std": True}),
        (CONTINUOUS, {"gsde_interval": 2}),
    ],
)
def test_acting_and_learning_with_each_network(action_space, settings):
    """What is kept of the policy is what acted; an update moves everything and stays finite."""
    algorithm, spec = ACER(hidden=(8,), **settings), replace(SPEC, action_space=action_space)
    state = algorithm.init(KEY, spec)
    observation = jax.random.normal(KEY, (N, 3))
    action, _, mu = algorithm.act(state, algorithm.carry(spec, KEY), observation, KEY)
    pi = state.actor_critic.net.base.policy(observation)
    np.testing.assert_allclose(mu.log_prob(action), pi.log_prob(action), rtol=1e-6)
    np.testing.assert_array_equal(algorithm.policy(state, observation), pi.mode)

    rollout = jax.tree.map(lambda x: jnp.stack([x, x]), (observation, action, mu))
    flags, reward = jnp.zeros((2, N), bool), jnp.ones((2, N))
    rollout = Transition(rollout[0], rollout[1], reward, rollout[0] + 0.1, flags, flags, rollout[2])
    new, metrics = update(algorithm, state, rollout, KEY)
    assert all(np.isfinite(x) for x in metrics.values())
    for old, moved in zip(*(jax.tree.leaves(s.actor_critic.net) for s in (state, new)), strict=True):
        assert np.all(np.isfinite(moved)) and not np.array_equal(old, moved)


def test_masked_actions_are_never_learned():
    """An action that is not allowed weighs nothing, neither in V nor in the gradient."""
    allowed = spaces.MultiBinary(ACTIONS)
    spec = replace(SPEC, observation_space=spaces.Dict({"x": SPEC.observation_space, "action_mask": allowed}))
    algorithm = ACER(hidden=(8,), entropy_coefficient=0.1)
    state = algorithm.init(KEY, spec)
    mask = jnp.broadcast_to(jnp.array([1, 0, 1]), (T, N, ACTIONS))
    observation = {"x": jax.random.normal(KEY, (T, N, 3)), "action_mask": mask}
    action, _, mu = algorithm.act(state, (), observation, KEY)
    assert not np.any(action == 1)
    flags = jnp.zeros((T, N), bool)
    rollout = Transition(observation, action, jnp.ones((T, N)), observation, flags, flags, mu)
    gradient, metrics = gradient_of_loss(algorithm, state.actor_critic.net, mu, rollout, KEY)
    for layer in (gradient.base.actor, gradient.base.critic):
        assert np.all(layer.weights[-1][1] == 0) and np.any(layer.weights[-1][0] != 0)
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"replay_capacity": 10}, "replay_capacity is 10, less than the 20 x 4 transitions"),
        ({"replay_ratio": -1}, "replay_ratio"),
        ({"trust_region": -1.0}, "trust_region"),
        ({"average_decay": 1.5}, "average_decay"),
        ({"max_importance_weight": 0.0}, "max_importance_weight"),
        ({"dueling_samples": 0}, "dueling_samples"),
        ({"rollout_length": 0}, "rollout_length"),
        ({"gsde_interval": 0}, "gsde_interval"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=message):
        ACER(**settings).check(SPEC)


def test_other_action_spaces_are_refused():
    with pytest.raises(UsageError, match=r"ACER needs Discrete or Box actions, this environment has MultiBinary\(3,\)"):
        ACER().check(replace(SPEC, action_space=spaces.MultiBinary(3)))
