"""TRPO against NumPy in float64 and explicit matrices: Fisher products, the step, the line search, reused rollouts."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from probes import successors
from scipy import special, stats
from scipy.sparse import linalg
from test_returns import advantages_by_definition

from zhixing.algorithms.ppo import random_orders
from zhixing.algorithms.trpo import TRPO, Acted, fisher_product, policy_at
from zhixing.config import from_mapping
from zhixing.core import Spec, Transition, hyperparameters
from zhixing.errors import UsageError
from zhixing.learned import Vector
from zhixing.linear_algebra import conjugate_gradient

KEY = jax.random.PRNGKey(0)
INPUTS, ACTIONS = 3, 4
T, N = 6, 4
BOX = spaces.Box(-1, 1, (2,), np.float32)
SPEC = Spec(spaces.Box(-1, 1, (INPUTS,), np.float32), spaces.Discrete(ACTIONS), N, 1_000)
SMALL = {"rollout_length": T, "minibatches": 2, "epochs": 2}
# Logits that are linear in the observation: all is known in closed form.
LINEAR = TRPO(hidden=(), conjugate_gradient_steps=30, **SMALL)
improve, learn = jax.jit(TRPO.improve), jax.jit(TRPO.learn)  # compiled once for all settings that are numbers


def random_rollout(algorithm, spec=SPEC, seed=0, noise=0.0, length=T):
    """-> a state, and a rollout of its policy; with `noise`, of one whose parameters are that far away."""
    generator = np.random.default_rng(seed)
    state = algorithm.init(KEY, spec)
    parameters = state.actor.parameters + np.float32(generator.normal(size=state.actor.parameters.shape))
    state = state._replace(actor=Vector(parameters, state.actor.structure))
    behaviour = parameters + noise * np.float32(generator.normal(size=parameters.shape))
    observation, next_observation = generator.normal(size=(2, length, N, INPUTS)).astype(np.float32)
    other = state._replace(actor=Vector(behaviour, state.actor.structure))
    action, _, extras = algorithm.act(other, (), jnp.asarray(observation), jax.random.PRNGKey(seed))
    terminated = generator.random((length, N)) < 0.2
    truncated = (generator.random((length, N)) < 0.2) & ~terminated
    reward = generator.normal(size=(length, N)).astype(np.float32)
    next_observation = successors(observation, next_observation, terminated | truncated)
    rollout = Transition(observation, action, reward, next_observation, terminated, truncated, extras)
    return state, jax.tree.map(jnp.asarray, rollout)


def linear_logits(parameters, observation):
    """Of a network without hidden layers, in float64."""
    parameters = np.float64(parameters)
    weight, bias = parameters[: ACTIONS * INPUTS].reshape(ACTIONS, INPUTS), parameters[ACTIONS * INPUTS :]
    return np.float64(observation) @ weight.T + bias


def log_probability(parameters, rollout):
    log_p = special.log_softmax(linear_logits(parameters, rollout.observation), -1)
    return np.take_along_axis(log_p, np.asarray(rollout.action)[..., None], -1)[..., 0]


def samples_of(rollout):
    """-> observation [T·N, inputs], action, log μ, weight; float64."""
    flat = (np.asarray(x).reshape(T * N, -1) for x in (rollout.observation, rollout.action, *rollout.extras))
    observation, action, log_prob, weight = flat
    return np.float64(observation), action[:, 0], np.float64(log_prob[:, 0]), np.float64(weight[:, 0])


class NumpyPolicy:
    """Equations (TRPO.3) to (TRPO.7) for linear logits, with explicit matrices."""

    def __init__(self, algorithm, parameters, rollout, advantage):
        self.algorithm, self.old = algorithm, np.float64(parameters)
        self.observation, self.action, self.log_prob, weight = samples_of(rollout)
        self.weight = weight / weight.sum()
        advantage = np.float64(advantage).reshape(-1)
        if algorithm.normalize_advantage:
            centred = advantage - self.weight @ advantage
            advantage = centred / np.sqrt(self.weight @ centred**2)
        self.advantage = advantage
        self.p_old = special.softmax(linear_logits(self.old, self.observation), -1)

    def log_probability(self, parameters):
        log_p = special.log_softmax(linear_logits(parameters, self.observation), -1)
        return log_p[np.arange(len(log_p)), self.action]

    def surrogate(self, parameters):
        return self.weight @ (np.exp(self.log_probability(parameters) - self.log_prob) * self.advantage)

    def kl(self, parameters):
        p = special.softmax(linear_logits(parameters, self.observation), -1)
        return self.weight @ stats.entropy(self.p_old, p, axis=-1)

    def gradient(self, parameters, h=1e-6):
        steps = h * np.eye(len(parameters))
        return np.array([self.surrogate(parameters + e) - self.surrogate(parameters - e) for e in steps]) / (2 * h)

    @property
    def fisher(self):
        """E[(diag(p) - ppᵀ) ⊗ (x, 1)(x, 1)ᵀ], in the order of the parameters."""
        x = np.concatenate([self.observation, np.ones((len(self.observation), 1))], -1)
        middle = self.p_old[:, :, None] * np.eye(ACTIONS) - self.p_old[:, :, None] * self.p_old[:, None]
        matrix = np.einsum("b,bij,bk,bl->ikjl", self.weight, middle, x, x).reshape(2 * [ACTIONS * (INPUTS + 1)])
        number = np.arange(ACTIONS * (INPUTS + 1)).reshape(ACTIONS, INPUTS + 1)
        order = np.concatenate([number[:, :-1].reshape(-1), number[:, -1]])
        return matrix[np.ix_(order, order)]

    def step(self):
        """-> the new parameters, how many lengths were tried; None where none was acceptable."""
        gradient, settings = self.gradient(self.old), self.algorithm
        damped = self.fisher + settings.damping * np.eye(len(self.old))
        x = np.linalg.solve(damped, gradient)
        full = np.sqrt(2 * settings.max_kl / (x @ damped @ x)) * x
        for tries in range(settings.backtracks):
            parameters = self.old + settings.backtrack_factor**tries * full
            if self.kl(parameters) <= settings.max_kl and self.surrogate(parameters) > self.surrogate(self.old):
                return parameters, tries + 1
        return self.old, None


# -------------------------------------------------------------------------------------------------- conjugate gradient


def random_system(seed, size=12):
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(size, size))
    return root @ root.T / size + 0.1 * np.eye(size), generator.normal(size=size)


def test_conjugate_gradient_is_a_direct_solve():
    """Of eight systems in one program; as many steps as unknowns, and more, which must do no harm."""
    matrices, sides = (np.stack(x) for x in zip(*(random_system(seed) for seed in range(8)), strict=True))
    expected = np.linalg.solve(matrices, sides[..., None])[..., 0]
    for dtype, steps, tolerance in ((np.float64, 12, 1e-5), (np.float32, 40, 1e-3)):
        with jax.enable_x64(dtype == np.float64):
            solve = jax.jit(jax.vmap(lambda a, b, steps=steps: conjugate_gradient(lambda v: a @ v, b, steps)))
            x, residual = solve(dtype(matrices), dtype(sides))
        assert x.dtype == dtype
        np.testing.assert_allclose(x, expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(residual, 0, atol=tolerance)


def test_conjugate_gradient_step_by_step():
    """Before it has converged: SciPy's iterates, and what is left."""
    matrix, b = random_system(0)
    iterates = []
    linalg.cg(matrix, b, maxiter=5, rtol=0, callback=lambda x: iterates.append(x.copy()))
    solve = jax.jit(lambda steps: conjugate_gradient(lambda v: jnp.float32(matrix) @ v, jnp.float32(b), steps))
    for steps in (1, 3, 5):
        x, residual = solve(steps)
        np.testing.assert_allclose(x, iterates[steps - 1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(residual, b - matrix @ iterates[steps - 1], rtol=1e-3, atol=1e-5)
        assert np.linalg.norm(residual) > 1e-2


@pytest.mark.parametrize("b", [np.zeros(4), np.float32([1e-30, 0, 0, 0]), np.float32([3.0, -2.0, 0.5, 0.0])])
def test_conjugate_gradient_stands_still_once_it_is_there(b):
    x, residual = conjugate_gradient(lambda v: 2 * v, jnp.float32(b), 10)
    np.testing.assert_allclose(x, b / 2, rtol=1e-6, atol=1e-29)
    np.testing.assert_allclose(residual, 0, atol=1e-29)


# ------------------------------------------------------------------------------------------------------- Fisher matrix

KINDS = {
    "discrete": (spaces.Discrete(3), {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), {}),
    "multi_binary": (spaces.MultiBinary(2), {}),
    "continuous": (BOX, {"initial_log_std": -0.3}),
    "state_dependent_std": (BOX, {"state_dependent_std": True}),
    "gsde": (BOX, {"gsde_interval": 4, "initial_log_std": -0.5}),
}


def all_actions(pi, kind):
    """-> every action and its probability, [A, B, ...] and [A, B]; of normals, nodes whose sums are exact integrals."""
    if kind == "discrete":
        actions = np.arange(3)
    elif kind == "multi_discrete":
        actions = np.array(list(product(range(2), range(3))))
    elif kind == "multi_binary":
        actions = np.array(list(product(range(2), range(2))))
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(6)
        z = np.array(list(product(nodes, nodes)))[:, None]
        probability = np.prod(list(product(weights, weights)), -1) / (2 * np.pi)
        actions = jax.lax.stop_gradient(pi.mean + jnp.exp(pi.log_std) * z)
        return actions, jnp.broadcast_to(probability[:, None], actions.shape[:2])
    actions = np.broadcast_to(actions[:, None], (len(actions), pi.logits.shape[0], *actions.shape[1:]))
    return actions, jnp.exp(pi.log_prob(actions))


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_product_is_that_of_the_explicit_matrix(kind):
    """E[∇log π ∇log πᵀ] over all actions, and the Hessian of the KL divergence; in float64."""
    space, settings = KINDS[kind]
    actor = TRPO(hidden=(4,), **settings).init(KEY, replace(SPEC, action_space=space)).actor
    generator = np.random.default_rng(0)
    theta = np.float64(actor.parameters) + 0.5 * generator.normal(size=actor.parameters.shape)
    observation, v = generator.normal(size=(5, INPUTS)), generator.normal(size=len(theta))

    @jax.jit
    def everything(theta, v):
        policy = policy_at(actor, observation)
        old = policy(theta)
        actions, probability = all_actions(old, kind)
        fisher = fisher_product(Vector(theta, actor.structure), observation, jnp.mean, 0.25)(v)
        scores = jax.jacfwd(lambda parameters: policy(parameters).log_prob(actions))(theta)
        slope = jax.grad(lambda parameters: old.kl(policy(parameters)).mean())
        return fisher, scores, jax.jvp(slope, (theta,), (v,))[1], probability

    with jax.enable_x64(True):
        fisher, scores, hessian, probability = jax.tree.map(np.asarray, everything(theta, v))
    assert fisher.dtype == np.float64
    np.testing.assert_allclose(probability.sum(0), 1)
    matrix = np.einsum("ab,abi,abj->ij", probability / 5, scores, scores)
    assert np.linalg.matrix_rank(matrix, tol=1e-8) > 5
    np.testing.assert_allclose(fisher, matrix @ v + 0.25 * v, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(hessian, matrix @ v, rtol=1e-6, atol=1e-8)


def test_the_actor_has_no_parameter_of_the_value():
    """Else F would be singular, and the step would move the value."""
    state = TRPO(hidden=(5,)).init(KEY, replace(SPEC, action_space=BOX))
    assert state.actor.parameters.size == 5 * INPUTS + 5 + 2 * 5 + 2 + 2  # the last: log σ
    assert state.critic.parameters.size == 5 * INPUTS + 5 + 5 + 1


def test_fisher_stride():
    """Every third time step, the newest among them: the step is that with the rest's weight at zero in F."""
    algorithm = replace(LINEAR, fisher_stride=4, max_kl=1e-3)
    state, rollout = random_rollout(algorithm)
    found, metrics = improve(algorithm, state.actor, rollout, rollout.reward)
    weights = np.ones((T, N)), np.isin(np.arange(T), (1, 5))[:, None] * np.ones((T, N))
    weighted = [rollout._replace(extras=rollout.extras._replace(weight=weight)) for weight in weights]
    full, part = (NumpyPolicy(algorithm, state.actor.parameters, r, rollout.reward) for r in weighted)
    damped = part.fisher + algorithm.damping * np.eye(len(full.old))
    gradient = full.gradient(full.old)
    x = np.linalg.solve(damped, gradient)
    step = np.sqrt(2 * algorithm.max_kl / (x @ gradient)) * x
    assert metrics["step_scale"] > 0
    np.testing.assert_allclose(found.parameters, full.old + metrics["step_scale"] * step, rtol=1e-3, atol=1e-4)
    assert np.abs(part.fisher - full.fisher).max() > 0.01


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_kl": 0.5, "damping": 1e-3},
        {"max_kl": 0.5, "damping": 1e-3, "normalize_advantage": False, "backtrack_factor": 0.5},
    ],
)
def test_step(settings, reused):
    """The new parameters are those of NumPy: gradient by finite differences, F as a matrix, solved directly.

    `reused`: the policy that acted is another, and part of the samples have no weight.
    """
    algorithm, tried = replace(LINEAR, **settings), set()
    for seed in range(6):
        state, rollout = random_rollout(algorithm, seed=seed, noise=0.5 * reused)
        if reused:
            weight = jnp.float32(np.arange(T) >= T // 2)[:, None] * jnp.ones(N)
            rollout = rollout._replace(extras=rollout.extras._replace(weight=weight))
            ratio = np.exp(log_probability(state.actor.parameters, rollout) - rollout.extras.log_prob)
            assert ratio.min() < 0.8 and ratio.max() > 1.2
        expected = NumpyPolicy(algorithm, state.actor.parameters, rollout, rollout.reward)
        parameters, tries = expected.step()
        actor, metrics = improve(algorithm, state.actor, rollout, rollout.reward)
        np.testing.assert_allclose(actor.parameters, parameters, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(metrics["step_scale"], algorithm.backtrack_factor ** (tries - 1), rtol=1e-5)
        np.testing.assert_allclose(metrics["kl"], expected.kl(parameters), rtol=5e-3)
        rise = expected.surrogate(parameters) - expected.surrogate(expected.old)
        np.testing.assert_allclose(metrics["improvement"], rise, rtol=1e-2)
        gradient_norm = np.linalg.norm(expected.gradient(expected.old))
        np.testing.assert_allclose(metrics["gradient_norm"], gradient_norm, rtol=1e-3)
        entropy = expected.weight @ stats.entropy(expected.p_old, axis=-1)
        np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
        tried.add(tries)
    assert len(tried) > 1 or algorithm.max_kl < 0.1  # a large region needs the line search


@pytest.mark.parametrize("action_space", [spaces.Discrete(ACTIONS), BOX])
def test_every_accepted_step_is_within_the_bound_and_an_improvement(action_space):
    """And it is the longest of those tried; of 64 steps in one program, some backtracked, some rejected."""
    algorithm = TRPO(hidden=(8,), max_kl=0.3, damping=1e-2, backtracks=3, **SMALL)
    spec = replace(SPEC, action_space=action_space)
    pairs = [random_rollout(algorithm, spec, seed) for seed in range(4)]
    states, rollouts = jax.tree.map(lambda *x: jnp.stack(x), *[(s.actor.parameters, r) for s, r in pairs])
    structure = pairs[0][0].actor.structure
    advantages = jax.random.normal(KEY, (16, T, N))

    def step(parameters, rollout, advantage):
        actor, metrics = algorithm.improve(Vector(parameters, structure), rollout, advantage)
        return actor.parameters, metrics

    def measure(old, new, rollout, advantage):
        pi_old, pi = (policy_at(Vector(old, structure), rollout.observation)(p) for p in (old, new))
        change = jnp.exp(pi.log_prob(rollout.action) - rollout.extras.log_prob) - jnp.exp(
            pi_old.log_prob(rollout.action) - rollout.extras.log_prob
        )
        normalised = (advantage - advantage.mean()) / advantage.std()
        return pi_old.kl(pi).mean(), (change * normalised).mean()

    every = jax.vmap(jax.vmap(step, (None, None, 0)), (0, 0, None))
    new, metrics = jax.jit(every)(states, rollouts, advantages)
    measured = jax.jit(jax.vmap(jax.vmap(measure, (None, 0, None, 0)), (0, 0, 0, None)))
    kl, rise = measured(states, new, rollouts, advantages)
    scale, old = np.asarray(metrics["step_scale"]), np.broadcast_to(states[:, None], new.shape)
    accepted = scale > 0
    assert accepted.any() and (scale[accepted] < 1).any()
    np.testing.assert_allclose(kl[accepted], metrics["kl"][accepted], rtol=1e-3)
    assert np.all(metrics["kl"] <= algorithm.max_kl) and np.all(kl <= algorithm.max_kl * (1 + 1e-4))
    assert np.all(rise[accepted] > 0) and np.all(metrics["improvement"][accepted] > 0)
    np.testing.assert_array_equal(new[~accepted], old[~accepted])

    # One try more to the left was not acceptable.
    longer = old + (new - old) / algorithm.backtrack_factor
    kl, rise = measured(states, longer, rollouts, advantages)
    backtracked = accepted & (scale < 0.99)
    assert np.all((kl[backtracked] > algorithm.max_kl * (1 - 1e-3)) | (rise[backtracked] < 1e-5))


def test_line_search_takes_the_first_that_is_acceptable():
    algorithm = TRPO(max_kl=0.1, backtrack_factor=0.5, backtracks=5)
    old, step = jnp.zeros(2), jnp.array([8.0, 0.0])

    def search(kl, improvement):
        return algorithm.line_search(old, step, lambda p: (jnp.float32(kl(p[0])), jnp.float32(improvement(p[0]))))

    for limit, expected, tries in ((8.0, 8.0, 1), (4.0, 4.0, 2), (3.9, 2.0, 3), (0.5, 0.5, 5)):
        found = search(lambda x, limit=limit: jnp.where(x <= limit, 0.1, 0.2), lambda x: 1.0)
        assert (float(found.parameters[0]), int(found.tries), float(found.kl)) == (expected, tries, np.float32(0.1))
        found = search(lambda x: 0.0, lambda x, limit=limit: jnp.where(x <= limit, 1e-6, -1.0))
        assert (float(found.parameters[0]), int(found.tries)) == (expected, tries)


NAN, BAD = float("nan"), 0.2


@pytest.mark.parametrize("kl, improvement", [(BAD, 1.0), (0.0, 0.0), (0.0, -1.0), (NAN, 1.0), (0.0, NAN), (BAD, NAN)])
def test_line_search_keeps_the_policy_when_nothing_is_acceptable(kl, improvement):
    algorithm = TRPO(max_kl=0.1)
    old = jax.random.normal(KEY, (50,))
    found = algorithm.line_search(old, jnp.ones(50), lambda p: (jnp.float32(kl), jnp.float32(improvement)))
    np.testing.assert_array_equal(found.parameters, old)
    assert not found.accepted and found.kl == found.improvement == 0.0


def test_without_a_direction_the_policy_stays_to_the_bit():
    algorithm = replace(LINEAR, normalize_advantage=False)
    state, rollout = random_rollout(algorithm)
    for advantage in (0.0, NAN, float("inf")):
        actor, metrics = improve(algorithm, state.actor, rollout, jnp.full((T, N), advantage))
        np.testing.assert_array_equal(actor.parameters, state.actor.parameters)
        assert metrics["step_scale"] == metrics["kl"] == metrics["improvement"] == 0.0


# ----------------------------------------------------------------------------------------------------------- the value


def test_fit():
    """Adam on a linear value, step by step in NumPy."""
    algorithm = replace(LINEAR, epochs=3, minibatches=4, learning_rate=0.1, learning_rate_schedule="linear")
    state, rollout = random_rollout(algorithm)
    state = state._replace(clock=state.clock.tick(steps=500))  # half of the run
    target = np.random.default_rng(1).normal(size=(T, N))
    critic, metrics = jax.jit(algorithm.fit)(state, rollout, jnp.float32(target), KEY)

    x = np.concatenate([np.float64(rollout.observation).reshape(T * N, -1), np.ones((T * N, 1))], -1)
    w, m, v = np.float64(state.critic.parameters), 0.0, 0.0
    value, losses = x @ w, []
    for i, rows in enumerate(np.asarray(random_orders(KEY, 3, T * N)).reshape(12, 6), 1):
        error = x[rows] @ w - target.reshape(-1)[rows]
        losses.append(np.mean(error**2))
        gradient = 2 * error @ x[rows] / 6
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w - 0.05 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-5)
    np.testing.assert_allclose(critic.parameters, w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["value_loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["value"], value.mean(), rtol=1e-4)
    explained = 1 - np.var(target.reshape(-1) - value) / np.var(target)
    np.testing.assert_allclose(metrics["explained_variance"], explained, rtol=1e-4)


def test_advantages():
    state, rollout = random_rollout(LINEAR)
    value, next_value = (np.asarray(LINEAR.value(state, x)) for x in (rollout.observation, rollout.next_observation))
    arguments = map(np.asarray, (rollout.reward, value, next_value, rollout.terminated, rollout.truncated))
    expected = advantages_by_definition(*arguments, LINEAR.discount, LINEAR.gae_lambda)
    advantage, target = LINEAR.advantages(state, rollout)
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, expected + value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ reuse


def test_advantages_of_another_policy_s_rollout():
    """(TRPO.9) by definition: a sum of errors, each with the product of the truncated ratios of the steps after t."""
    algorithm = replace(LINEAR, reuse=1)
    state, rollout = random_rollout(algorithm, noise=1.0)
    value, next_value = (np.float64(algorithm.value(state, x)) for x in (rollout.observation, rollout.next_observation))
    ratio = np.exp(log_probability(state.actor.parameters, rollout) - np.float64(rollout.extras.log_prob))
    trust = np.minimum(1, ratio)
    assert (ratio > 1.1).any() and (ratio < 0.9).any()

    delta = np.float64(rollout.reward) + algorithm.discount * ~np.asarray(rollout.terminated) * next_value - value
    expected, ended = np.zeros((T, N)), np.asarray(rollout.ended)
    for t, n in product(range(T), range(N)):
        factor = 1.0
        for i in range(t, T):
            expected[t, n] += factor * delta[i, n]
            if ended[i, n] or i + 1 == T:
                break
            factor *= algorithm.discount * algorithm.gae_lambda * trust[i + 1, n]
    advantage, target = algorithm.advantages(state, rollout)
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, value + trust * expected, rtol=1e-4, atol=1e-5)


@hyperparameters
class Remembering(TRPO):
    """Its learner is what it would learn from."""

    def update(self, state, rollout, key):
        return state._replace(actor=rollout), {}


def test_reused_rollouts():
    """`learn` hands the last three rollouts to `update`, cut from each other; the last of a run may be shorter."""
    algorithm = Remembering(hidden=(), reuse=2, **SMALL)
    state = algorithm.init(KEY, SPEC)
    rollouts = [random_rollout(LINEAR, seed=seed, length=T if seed < 4 else 2)[1] for seed in range(5)]
    cut = [r._replace(truncated=r.truncated.at[-1].set(True)) for r in rollouts]
    memory, count = algorithm.memory(SPEC, rollouts[0]), 0
    for i, rollout in enumerate(rollouts):
        state, memory, _ = algorithm.learn(state, memory, rollout, KEY)
        expected, weight = cut[max(0, i - 2) : i + 1], np.asarray(state.actor.extras.weight)
        rows, count = sum(len(r.reward) for r in expected), count + rollout.reward.size
        found = jax.tree.map(lambda x, rows=rows: x[-rows:], state.actor)
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda *x: jnp.concatenate(x), *expected))
        assert weight.shape == (len(rollout.reward) + 2 * T, N) and np.all(weight[:-rows] == 0)
        assert int(state.clock.steps) == count  # what is reused is not counted again


def test_what_is_not_there_yet_changes_nothing():
    plain = replace(LINEAR, minibatches=1)
    state, rollout = random_rollout(plain)
    expected, memory, wanted = learn(plain, state, (), rollout, KEY)
    assert memory == () == plain.memory(SPEC, rollout)
    reusing = replace(plain, reuse=3)
    found, _, metrics = learn(reusing, state, reusing.memory(SPEC, rollout), rollout, KEY)
    np.testing.assert_allclose(found.actor.parameters, expected.actor.parameters, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.critic.parameters, expected.critic.parameters, rtol=1e-3, atol=1e-4)
    assert set(metrics) == set(wanted) and metrics["step_scale"] > 0
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-3, atol=1e-5, err_msg=name)


# --------------------------------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize("kind", KINDS)
def test_act_records_its_probability(kind):
    space, settings = KINDS[kind]
    spec, algorithm = replace(SPEC, action_space=space), TRPO(hidden=(5,), **settings)
    state, carry = algorithm.init(KEY, spec), algorithm.carry(spec, KEY)
    observation = jax.random.normal(KEY, (N, INPUTS))
    action, _, extras = algorithm.act(state, carry, observation, KEY)
    pi = state.actor.net.policy(observation)
    assert isinstance(extras, Acted) and action.shape == (N, *space.shape)
    np.testing.assert_allclose(extras.log_prob, pi.log_prob(action), rtol=1e-5)
    np.testing.assert_array_equal(extras.weight, 1)
    np.testing.assert_array_equal(algorithm.policy(state, observation), pi.mode)
    assert algorithm.value(state, observation).shape == (N,)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"minibatches": 5}, "does not divide into 5 minibatches"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"damping": -0.1}, "damping"),
        ({"conjugate_gradient_steps": 0}, "conjugate_gradient_steps"),
        ({"fisher_stride": 0}, "fisher_stride"),
        ({"backtracks": 0}, "backtracks"),
        ({"backtrack_factor": 1.1}, "backtrack_factor"),
        ({"backtrack_factor": 0.0}, "backtrack_factor"),
        ({"reuse": -1}, "reuse"),
        ({"gsde_interval": 0}, "gsde_interval"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=message):
        TRPO(**settings).check(SPEC)


def test_there_is_no_shared_trunk():
    mapping = {"algorithm": {"name": "trpo", "shared_trunk": True}, "environment": {"id": "CartPole-v1"}}
    with pytest.raises(UsageError, match="shared_trunk"):
        from_mapping(mapping)
