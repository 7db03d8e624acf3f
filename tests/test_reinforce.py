"""Whole episodes out of rollouts that cut them; REINFORCE's loss in float64; the policy gradient theorem."""

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from probes import (
    TERMINATES_AFTER,
    TRUNCATES_AFTER,
    CountingEnvironment,
    GymnasiumCountingEnvironment,
    make_driver,
)
from scipy import special, stats

from zhixing.algorithms.reinforce import Reinforce, discounted_returns
from zhixing.core import Clock, Episodes, Episodic, Spec, Transition, hyperparameters
from zhixing.distributions import Categorical, DiagonalNormal
from zhixing.environments.gymnasium_adapter import GymnasiumAdapter
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.errors import UsageError

KEY = jax.random.PRNGKey(0)
T, N, ACTIONS = 9, 4, 3
SPEC = Spec(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(ACTIONS), N, 1_000, max_episode_steps=5)
CONTINUOUS = replace(SPEC, action_space=spaces.Box(-1, 1, (2,), np.float32))


# ------------------------------------------------------------------------------------------ whole episodes, each once


class LedgerState(NamedTuple):
    episodes: Any  # what the last update was given
    updates: jax.Array  # [] int32, that had something to learn from
    clock: Clock


@hyperparameters
class Ledger(Episodic):
    """Learns nothing and keeps what it is given."""

    length: int = 5  # of its memory

    def init(self, key, spec):
        shape = (self.length + self.rollout_length, spec.num_environments)
        steps = Transition(
            jnp.zeros((*shape, 2)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape), (), *jnp.zeros((2, *shape), bool)
        )
        return LedgerState(Episodes(steps, jnp.zeros(shape)), jnp.int32(0), Clock.start(spec))

    def act(self, state, carry, observation, key):
        return jax.random.randint(key, observation.shape[:-1], 0, 3), carry, ()

    def update(self, state, episodes, key):
        return LedgerState(episodes, state.updates + 1, state.clock), {"learned": episodes.weight.sum()}


def learned_episodes(environment, rollout_length, steps=40, seeds=(0, 1), **settings):
    """-> [(seed, instance, update, its steps in their order)] of every episode that was learned from, as they came."""
    algorithm = Ledger(rollout_length=rollout_length, **settings)
    driver = make_driver(environment, seeds, N)
    run, found, updates = driver.start(algorithm), [], np.zeros(len(seeds), int)
    for iteration in range(-(-steps // rollout_length)):
        run = driver.advance(algorithm, run, 1, rollout_length)
        given = jax.tree.map(np.array, run.learner.episodes)
        for seed in range(len(seeds)):
            if run.learner.updates[seed] == updates[seed]:
                continue
            updates[seed] += 1
            for n in range(N):
                rows = np.flatnonzero(given.weight[seed, :, n])
                numbers = given.steps.observation[seed, rows, n, 0]
                for number in dict.fromkeys(numbers):
                    episode = jax.tree.map(lambda x, i=rows[numbers == number], s=seed, n=n: x[s, i, n], given.steps)
                    found.append((seed, n, iteration, episode))
    return found


ENVIRONMENTS = {
    "compiled": lambda: JaxAdapter("counting", CountingEnvironment()),
    "host": lambda: GymnasiumAdapter(GymnasiumCountingEnvironment, TRUNCATES_AFTER),
}


@pytest.mark.parametrize("kind, rollout_length", [("compiled", 1), ("compiled", 7), ("compiled", 20), ("host", 4)])
def test_every_step_of_every_episode_is_learned_from_once(kind, rollout_length):
    """In one update with its whole episode, the first after the episode's end; none of an episode that goes on."""
    steps = 40
    found = learned_episodes(ENVIRONMENTS[kind](), rollout_length, steps)
    steps = -(-steps // rollout_length) * rollout_length
    for seed, n in product((0, 1), range(N)):
        mine = [(iteration, episode) for s, m, iteration, episode in found if (s, m) == (seed, n)]
        end = 0
        for number, (iteration, episode) in enumerate(mine):
            length = TERMINATES_AFTER if number % 2 == 0 else TRUNCATES_AFTER
            end += length
            assert iteration == (end - 1) // rollout_length
            np.testing.assert_array_equal(episode.observation, [[number, t] for t in range(length)])
            np.testing.assert_array_equal(episode.reward, 10 * number + np.arange(length) + 0.25 * episode.action)
            ended = np.arange(length) == length - 1
            np.testing.assert_array_equal(episode.terminated, ended & (number % 2 == 0))
            np.testing.assert_array_equal(episode.truncated, ended & (number % 2 == 1))
        following = TERMINATES_AFTER if len(mine) % 2 == 0 else TRUNCATES_AFTER
        assert end <= steps < end + following  # every episode that has ended is among them


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_the_beginning_of_an_episode_longer_than_the_memory_is_lost(longest):
    """With rollouts of one step, all but the last of the L steps before its end and of the end itself."""
    found = learned_episodes(ENVIRONMENTS["compiled"](), 1, 16, longest_episode=longest, length=longest)
    assert len(found) == 2 * N * 4
    for _, _, _, episode in found:
        number = episode.observation[0, 0]
        length = TERMINATES_AFTER if number % 2 == 0 else TRUNCATES_AFTER
        expected = range(max(length - longest - 1, 0), length)
        np.testing.assert_array_equal(episode.observation, [[number, t] for t in expected])


def test_length_must_be_known():
    unknown = replace(SPEC, max_episode_steps=None)
    with pytest.raises(UsageError, match=r"does not say how long they can be; set algorithm\.longest_episode"):
        Reinforce().check(unknown)
    Reinforce(longest_episode=7).check(unknown)
    with pytest.raises(UsageError, match="longest_episode is 0"):
        Reinforce(longest_episode=0).check(SPEC)


def waiting_steps(length=T, seed=0, spec=SPEC, ended=()):
    """-> a rollout [length, N] of random steps; episodes are truncated in the rows `ended`."""
    generator = np.random.default_rng(seed)
    observation = generator.normal(size=(length, N, 3)).astype(np.float32)
    shape = (length, N, *spec.action_space.shape)
    discrete = isinstance(spec.action_space, spaces.Discrete)
    action = generator.integers(0, ACTIONS, shape) if discrete else generator.normal(size=shape).astype(np.float32)
    reward = generator.normal(size=(length, N)).astype(np.float32)
    truncated = np.zeros((length, N), bool)
    truncated[list(ended)] = True
    discounts = np.ones((length, N), np.float32)
    rollout = Transition(observation, action, reward, observation, np.zeros_like(truncated), truncated, discounts)
    return jax.tree.map(jnp.asarray, rollout)


def test_without_the_end_of_an_episode_nothing_changes():
    """Not even by the optimiser's momentum; but the clock goes on, and the metrics stay those of the last episodes."""
    algorithm = Reinforce(hidden=(4,), rollout_length=3)
    learn, first = jax.jit(algorithm.learn), waiting_steps(3, ended=[1])
    state = algorithm.init(KEY, SPEC)
    memory = algorithm.memory(SPEC, first)
    after, memory, metrics = learn(state, memory, first, KEY)
    assert np.abs(after.actor_critic.parameters - state.actor_critic.parameters).max() > 1e-4
    assert (int(after.clock.steps), int(after.clock.updates)) == (3 * N, 1)

    later, memory, held = learn(after, memory, waiting_steps(3, seed=1), KEY)
    jax.tree.map(np.testing.assert_array_equal, later.actor_critic, after.actor_critic)
    jax.tree.map(np.testing.assert_array_equal, held, metrics)
    assert (int(later.clock.steps), int(later.clock.updates)) == (6 * N, 2)

    again, _, fresh = learn(later, memory, waiting_steps(3, seed=2, ended=[0]), KEY)
    assert np.abs(again.actor_critic.parameters - later.actor_critic.parameters).max() > 1e-4
    assert fresh["loss"] != metrics["loss"]


@pytest.mark.parametrize("last", [1, 3])
def test_a_shorter_last_rollout(last):
    """The last rollout of a run may have fewer steps than the others."""
    algorithm = Reinforce(hidden=(4,), rollout_length=4, discount=1.0)
    steps = waiting_steps(4 + last, ended=[4])
    first, second = (jax.tree.map(lambda x, part=part: x[part], steps) for part in (slice(4), slice(4, None)))
    state, memory, learn = algorithm.init(KEY, SPEC), algorithm.memory(SPEC, first), jax.jit(algorithm.learn)
    state, memory, _ = learn(state, memory, first, KEY)
    _, memory, metrics = learn(state, memory, second, KEY)
    returns = np.cumsum(steps.reward[4::-1], axis=0)
    np.testing.assert_allclose(metrics["discounted_return"], returns.mean(), rtol=1e-5)
    np.testing.assert_array_equal(memory.waiting.sum(0), last - 1)


# ---------------------------------------------------------------------------------------------------------------- loss


class Table(eqx.Module):
    """In place of a network: what it gives for the steps of one window."""

    distribution: Any
    values: jax.Array

    def policy(self, observation):
        return self.distribution

    def value(self, observation):
        return self.values


def numpy_returns(reward, ended, discount):
    """G = sum of γ^k r, from each step forward to the end of its episode."""
    returns = np.zeros(reward.shape)
    for t, n in np.ndindex(*reward.shape):
        for k in range(t, len(reward)):
            returns[t, n] += discount ** (k - t) * np.float64(reward[k, n])
            if ended[k, n]:
                break
    return returns


def random_episodes(discrete=True, seed=0):
    """-> a net, and a window of which the first steps were learned from before and the last ones are not over."""
    generator = np.random.default_rng(seed)
    steps = waiting_steps(T, seed, SPEC if discrete else CONTINUOUS)
    ended = generator.random((T, N)) < 0.3
    terminated = ended & (generator.random((T, N)) < 0.5)
    discounts = 0.9 ** generator.integers(0, 5, (T, N))
    steps = steps._replace(
        next_observation=(), terminated=terminated, truncated=ended & ~terminated, extras=np.float32(discounts)
    )
    complete = np.flip(np.logical_or.accumulate(np.flip(ended, 0)), 0)
    weight = complete & (np.arange(T)[:, None] >= generator.integers(0, 3, N))
    assert 0 < weight.mean() < 1 and terminated.any() and steps.truncated.any()
    if discrete:
        pi = Categorical(generator.normal(size=(T, N, ACTIONS)))
    else:
        mean, log_std = generator.normal(size=(2, T, N, 2))
        pi = DiagonalNormal(mean, 0.3 * log_std)
    net = Table(pi, generator.normal(size=(T, N)))
    return jax.tree.map(jnp.asarray, (net, Episodes(steps, weight.astype(np.float32))))


def numpy_policy(pi, action):
    """-> log π(a), entropy; SciPy, float64."""
    if isinstance(pi, Categorical):
        log_p = special.log_softmax(np.float64(pi.logits), -1)
        log_prob = np.take_along_axis(log_p, np.asarray(action, int)[..., None], -1)[..., 0]
        return log_prob, stats.entropy(np.exp(log_p), axis=-1)
    normal = stats.norm(np.float64(pi.mean), np.exp(np.float64(pi.log_std)))
    return normal.logpdf(np.float64(action)).sum(-1), normal.entropy().sum(-1)


def numpy_loss(algorithm, net, episodes, advantage=None):
    """-> metrics; `advantage` [T, N] where it is another net's: it is a constant in the gradient."""
    steps, chosen = episodes.steps, np.asarray(episodes.weight) > 0
    returns = numpy_returns(steps.reward, np.asarray(steps.ended), np.float64(algorithm.discount))
    log_prob, entropy = (x[chosen] for x in numpy_policy(net.distribution, steps.action))
    discounts, value = np.float64(steps.extras)[chosen], np.float64(net.values)[chosen]
    returns = returns[chosen]
    if advantage is None:
        advantage = returns - value if algorithm.baseline else returns
        if algorithm.normalize_advantage:
            advantage = (advantage - advantage.mean()) / advantage.std()
        if algorithm.discount_states:
            advantage = discounts * advantage
    metrics = {
        "objective": (advantage * log_prob).mean(),
        "entropy": entropy.mean(),
        "discounted_return": returns.mean(),
    }
    metrics["loss"] = -metrics["objective"] - algorithm.entropy_coefficient * metrics["entropy"]
    if algorithm.baseline:
        metrics["value_loss"] = np.square(returns - value).mean()
        metrics["loss"] += algorithm.value_coefficient * metrics["value_loss"]
        metrics["value"] = value.mean()
        metrics["explained_variance"] = 1 - np.var(returns - value) / np.var(returns)
    return metrics, advantage


SETTINGS = [
    {},
    {"baseline": False},
    {"discount_states": True, "value_coefficient": 0.7, "entropy_coefficient": 0.2},
    {"normalize_advantage": True, "discount_states": True},
    {"normalize_advantage": True, "baseline": False, "entropy_coefficient": 0.1},
]


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_loss(discrete, settings):
    algorithm = Reinforce(hidden=(4,), discount=0.9, **settings)
    net, episodes = random_episodes(discrete)
    loss, metrics = jax.jit(algorithm.loss)(net, episodes)
    expected, _ = numpy_loss(algorithm, net, episodes)
    assert loss == metrics["loss"] and set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("settings", SETTINGS[1:4])
def test_gradient_is_that_of_finite_differences(settings):
    """With respect to the logits and the values, in float64; steps that are not learned from have none."""
    with jax.enable_x64(True):
        algorithm = Reinforce(hidden=(4,), discount=0.9, **settings)
        net, episodes = random_episodes()
        gradient, _ = jax.tree.map(np.asarray, jax.jit(jax.grad(algorithm.loss, has_aux=True))(net, episodes))
    logits, values, h = np.asarray(net.distribution.logits), np.asarray(net.values), 1e-6
    assert logits.dtype == values.dtype == np.float64
    _, advantage = numpy_loss(algorithm, net, episodes)

    def slope(logits_step, values_step):
        ends = (Table(Categorical(logits + sign * logits_step), values + sign * values_step) for sign in (1, -1))
        above, below = (numpy_loss(algorithm, net, episodes, advantage)[0]["loss"] for net in ends)
        return (above - below) / (2 * h)

    expected = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = h
        expected[index] = slope(step, 0.0)
    np.testing.assert_allclose(gradient.distribution.logits, expected, rtol=1e-5, atol=1e-8)
    expected = np.zeros_like(values)
    for index in np.ndindex(T, N):
        step = np.zeros_like(values)
        step[index] = h
        expected[index] = slope(0.0, step)
    np.testing.assert_allclose(gradient.values, expected, rtol=1e-5, atol=1e-8)
    idle = np.asarray(episodes.weight) == 0
    assert np.all(gradient.distribution.logits[idle] == 0) and np.all(gradient.values[idle] == 0)


def test_returns_end_where_the_episode_does():
    """At a truncation as at a termination, nothing is bootstrapped and nothing of the next episode counts."""
    reward, ended = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]), jnp.array([False, True, False, False, True])
    returns = jax.jit(discounted_returns)(reward[:, None], ended[:, None], 0.5)[:, 0]
    np.testing.assert_array_equal(returns, [2.0, 2.0, 12.0, 16.0, 16.0])


def test_returns_by_definition():
    _, (steps, _) = random_episodes()
    returns = jax.jit(discounted_returns)(steps.reward, steps.ended, 0.97)
    np.testing.assert_allclose(
        returns, numpy_returns(steps.reward, np.asarray(steps.ended), 0.97), rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------------------------ the policy gradient theorem

HORIZON, GAMMA = 3, 0.6
LADDER = np.array([[1, 2], [0, 2], [1, 0]])  # [state, action], the next state
PRIZES = np.array([[0.3, -0.5], [1.0, 0.2], [-0.7, 0.9]])  # [state, action]


def all_episodes():
    """-> every sequence of actions from state 0 as a column: states, actions, rewards [HORIZON, 8]."""
    actions = np.array(list(product((0, 1), repeat=HORIZON))).T
    states = np.zeros_like(actions)
    for t in range(HORIZON - 1):
        states[t + 1] = LADDER[states[t], actions[t]]
    return states, actions, PRIZES[states, actions]


@pytest.mark.parametrize(
    "settings, discount",
    [({"discount_states": True, "baseline": False}, GAMMA), ({"discount_states": True}, GAMMA), ({}, 1.0)],
)
def test_expected_gradient_is_the_gradient_of_the_expected_return(settings, discount):
    """Over all episodes, each with its probability: exact with γᵗ, or without it for γ = 1; with any baseline."""
    states, actions, rewards = all_episodes()
    powers = discount ** np.arange(HORIZON)

    def probabilities(logits):
        log_p = jax.nn.log_softmax(logits)[states, actions]
        return jnp.exp(log_p.sum(0))

    with jax.enable_x64(True):
        logits, values = jnp.array([[0.4, -0.1], [0.0, 0.8], [-0.5, 0.2]]), jnp.array([3.0, -2.0, 0.5])
        exact = jax.grad(lambda logits: probabilities(logits) @ (powers @ rewards))(logits)

        ended = jnp.zeros(states.shape, bool).at[-1].set(True)
        extras = jnp.broadcast_to(jnp.asarray(powers)[:, None], states.shape)
        steps = Transition(jnp.asarray(states), jnp.asarray(actions), jnp.asarray(rewards), (), ended, ended, extras)
        weight = jnp.broadcast_to(probabilities(logits), states.shape)  # sums up to HORIZON, so that loss is -J/HORIZON
        algorithm = Reinforce(discount=discount, value_coefficient=0.0, **settings)

        def loss(logits):
            net = Table(Categorical(logits[states]), values[states])
            return algorithm.loss(net, Episodes(steps, weight))[0]

        np.testing.assert_allclose(-HORIZON * jax.jit(jax.grad(loss))(logits), exact, rtol=1e-9, atol=1e-12)
        assert np.abs(exact).max() > 0.05


def test_without_the_discount_of_states_it_is_another_gradient():
    """For γ < 1 it is the gradient of no discounted return: later steps count as much as the first."""
    states, actions, rewards = all_episodes()
    ended = jnp.zeros(states.shape, bool).at[-1].set(True)
    powers = jnp.broadcast_to(GAMMA ** jnp.arange(HORIZON)[:, None], states.shape)
    steps = Transition(jnp.asarray(states), jnp.asarray(actions), jnp.asarray(rewards), (), ended, ended, powers)
    gradients = []
    for discount_states in (True, False):
        algorithm = Reinforce(discount=GAMMA, baseline=False, discount_states=discount_states)

        def loss(logits, algorithm=algorithm):
            net = Table(Categorical(logits[states]), None)
            return algorithm.loss(net, Episodes(steps, jnp.ones(states.shape)))[0]

        gradients.append(jax.jit(jax.grad(loss))(jnp.zeros((3, 2))))
    with_discount, without = gradients
    assert np.linalg.norm(with_discount - without) > 0.2 * np.linalg.norm(with_discount)


# -------------------------------------------------------------------------------------------------- update, and acting


def test_gradient_clipping():
    """Adam's first moment after one step is a tenth of the clipped gradient."""
    algorithm = Reinforce(hidden=(4,))
    state, episodes = algorithm.init(KEY, SPEC), random_episodes()[1]
    norms = []
    for limit in (0.25, 1e6):
        new, metrics = jax.jit(replace(algorithm, max_gradient_norm=limit).update)(state, episodes, KEY)
        moment = np.linalg.norm(optax.tree.get(new.actor_critic.optimiser_state, "mu"))
        norms.append(float(metrics["gradient_norm"]))
        np.testing.assert_allclose(moment, 0.1 * min(limit, norms[-1]), rtol=1e-4)
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.25


def test_learning_rate_schedule():
    """Half of the run over: half the step, of Adam's first."""
    algorithm, episodes, steps = Reinforce(hidden=(4,), learning_rate_schedule="linear"), random_episodes()[1], []
    update = jax.jit(algorithm.update)
    for done in (0, 500):
        state = algorithm.init(KEY, SPEC)
        state = state._replace(clock=state.clock.tick(steps=done))
        new, _ = update(state, episodes, KEY)
        steps.append(np.asarray(new.actor_critic.parameters - state.actor_critic.parameters))
    assert np.abs(steps[0]).max() > 1e-3
    np.testing.assert_allclose(steps[1], steps[0] / 2, rtol=1e-2, atol=1e-7)


def test_act_records_the_discount_of_its_state():
    """γᵗ with t from the episode's start, also for a step that waited in the memory."""
    algorithm = Reinforce(hidden=(4,), rollout_length=4, discount=0.5)
    driver = make_driver(JaxAdapter("counting", CountingEnvironment()), (0, 1), N)
    run = driver.advance(algorithm, driver.start(algorithm), 3, 4)
    steps = run.memory.steps
    np.testing.assert_array_equal(steps.extras, 0.5 ** steps.observation[..., 1])
    assert len(np.unique(steps.extras)) > 3


@pytest.mark.parametrize("settings", [{}, {"gsde_interval": 2}, {"state_dependent_std": True}])
def test_act_draws_from_the_policy(settings):
    algorithm = Reinforce(hidden=(4,), **settings)
    state, observation = algorithm.init(KEY, CONTINUOUS), jax.random.normal(KEY, (N, 3))
    carry = algorithm.carry(CONTINUOUS, KEY)
    action, after, discount = algorithm.act(state, carry, observation, KEY)
    expected, noise, pi = state.actor_critic.net.act(carry.noise, observation, KEY)
    np.testing.assert_array_equal(action, expected)
    jax.tree.map(np.testing.assert_array_equal, after.noise, noise)
    np.testing.assert_array_equal(discount, 1.0)
    np.testing.assert_allclose(after.discount, 0.99)
    np.testing.assert_array_equal(algorithm.policy(state, observation), pi.mode)
    assert np.abs(action - pi.mode).min() > 0


def test_without_a_baseline_there_is_no_critic():
    observation = jax.random.normal(KEY, (2, N, 3))
    learned, alone = (Reinforce(hidden=(4,), baseline=baseline) for baseline in (True, False))
    state = alone.init(KEY, SPEC)
    assert state.actor_critic.net.critic is None
    value = alone.value(state, observation)
    assert value.shape == (2, N) and np.all(np.isnan(value))
    full = learned.init(KEY, SPEC)
    assert np.all(np.isfinite(learned.value(full, observation)))
    assert full.actor_critic.parameters.size == state.actor_critic.parameters.size + 3 * 4 + 4 + 4 + 1
    np.testing.assert_array_equal(alone.policy(state, observation), learned.policy(full, observation))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rollout_length": 0}, "rollout_length"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"discount": 1.1}, "discount"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient"),
        ({"gsde_interval": 0}, "gsde_interval"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=f"algorithm.{message} is "):
        Reinforce(**settings).check(SPEC)
