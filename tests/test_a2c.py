"""A2C's gradient against NumPy in float64, its optimisers step by step, and REINFORCE as its limit of long rollouts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from probes import successors
from scipy import special, stats
from test_returns import advantages_by_definition

from zhixing.algorithms.a2c import A2C
from zhixing.algorithms.reinforce import Reinforce
from zhixing.core import Episodes, Spec, Transition
from zhixing.errors import UsageError
from zhixing.learned import Vector

KEY = jax.random.PRNGKey(0)
T, N = 6, 4
ACTIONS = 4
SPEC = Spec(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(ACTIONS), N, 1_000)
CONTINUOUS = replace(SPEC, action_space=spaces.Box(-1, 1, (2,), np.float32))


def shifted_state(algorithm, spec=SPEC):
    """With parameters that are not the special initial ones."""
    state = algorithm.init(KEY, spec)
    vector = state.actor_critic
    parameters = vector.parameters + 0.3 * jax.random.normal(KEY, vector.parameters.shape)
    return state._replace(actor_critic=replace_parameters(vector, parameters))


def replace_parameters(learned, parameters):
    return type(learned)(Vector(parameters, learned.structure), learned.optimiser_state)


def random_rollout(algorithm, state, spec=SPEC, seed=0, length=T):
    generator = np.random.default_rng(seed)
    observation, next_observation = generator.normal(size=(2, length, N, 3)).astype(np.float32)
    act, carry, actions = jax.jit(algorithm.act), algorithm.carry(spec, KEY), []
    for t in range(length):
        action, carry, extras = act(state, carry, jnp.asarray(observation[t]), jax.random.fold_in(KEY, t))
        assert extras == ()
        actions.append(action)
    terminated = generator.random((length, N)) < 0.2
    truncated = (generator.random((length, N)) < 0.2) & ~terminated
    reward = generator.normal(size=(length, N)).astype(np.float32)
    next_observation = successors(observation, next_observation, terminated | truncated)
    rollout = Transition(observation, jnp.stack(actions), reward, next_observation, terminated, truncated)
    return jax.tree.map(jnp.asarray, rollout)


# ------------------------------------------------------------------------------------------------- NumPy, in float64


def numpy_mlp(weights, biases, x):
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = np.tanh(x @ weight.T + bias)
    return x @ weights[-1].T + biases[-1]


def numpy_net(algorithm, net, observation, action):
    """-> log π(a|s), entropy, V(s), each [T, N]."""
    x = np.float64(observation)
    if net.trunk is not None:
        x = np.tanh(numpy_mlp(net.trunk.weights, net.trunk.biases, x))
    outputs = numpy_mlp(net.actor.weights, net.actor.biases, x)
    value = numpy_mlp(net.critic.weights, net.critic.biases, x)[..., 0]
    if net.log_std is None:
        log_p = special.log_softmax(outputs, -1)
        log_prob = np.take_along_axis(log_p, np.asarray(action, int)[..., None], -1)[..., 0]
        return log_prob, stats.entropy(np.exp(log_p), axis=-1), value
    normal = stats.norm(outputs, np.exp(net.log_std))
    return normal.logpdf(np.float64(action)).sum(-1), normal.entropy().sum(-1) + np.zeros(outputs.shape[:-1]), value


class NumpyLoss:
    """(A2C.3) as a function of the parameters [P] alone, the returns and advantages being those of the first ones."""

    def __init__(self, algorithm, vector, rollout):
        self.algorithm, self.structure = algorithm, vector.structure
        self.rollout = rollout = jax.tree.map(np.asarray, rollout)
        net = self.net(np.float64(vector.parameters))
        _, _, self.value = numpy_net(algorithm, net, rollout.observation, rollout.action)
        _, _, next_value = numpy_net(algorithm, net, rollout.next_observation, rollout.action)
        arguments = np.float64(rollout.reward), self.value, next_value, rollout.terminated, rollout.truncated
        self.advantage = advantages_by_definition(*arguments, algorithm.discount, algorithm.gae_lambda)
        self.target = self.advantage + self.value
        if algorithm.normalize_advantage:
            self.advantage = (self.advantage - self.advantage.mean()) / self.advantage.std()

    def net(self, parameters):
        treedef, shapes = self.structure
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        parts = np.split(parameters, ends[:-1])
        return treedef.unflatten([x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)])

    def metrics(self, parameters):
        rollout, algorithm = self.rollout, self.algorithm
        log_prob, entropy, value = numpy_net(algorithm, self.net(parameters), rollout.observation, rollout.action)
        objective, value_loss = (self.advantage * log_prob).mean(), np.square(self.target - value).mean()
        entropy = entropy.mean()
        loss = -objective + algorithm.value_coefficient * value_loss - algorithm.entropy_coefficient * entropy
        return {"loss": loss, "objective": objective, "value_loss": value_loss, "entropy": entropy}

    def gradient(self, parameters, h=1e-6):
        """By central differences, parameter by parameter."""
        steps = h * np.eye(len(parameters))
        ends = [[self.metrics(parameters + sign * step)["loss"] for sign in (1, -1)] for step in steps]
        return np.array([(above - below) / (2 * h) for above, below in ends])


def rollout_gradient(algorithm, state, rollout):
    """-> the gradient of the loss on `rollout` as its one batch, and its metrics."""
    batches = algorithm.batches(state, rollout, KEY)
    batch = jax.tree.map(lambda x: x[0], batches)
    moments = algorithm.pooled(algorithm.moments(batch), lambda x: x)
    gradient, metrics = algorithm.gradient(state, algorithm.prepared(batch, moments))
    return gradient, metrics | algorithm.describe(batches)


@pytest.mark.parametrize("spec", [SPEC, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gae_lambda": 0.8, "entropy_coefficient": 0.05, "value_coefficient": 0.7},
        {"normalize_advantage": True, "shared_trunk": True},
    ],
    ids=["n_step", "gae", "normalised"],
)
def test_gradient(spec, settings):
    algorithm = A2C(hidden=(4,), discount=0.9, **settings)
    state = shifted_state(algorithm, spec)
    rollout = random_rollout(algorithm, state, spec)
    assert rollout.terminated.any() and rollout.truncated.any()
    gradient, metrics = jax.jit(partial(rollout_gradient, algorithm))(state, rollout)

    loss, parameters = NumpyLoss(algorithm, state.actor_critic, rollout), np.float64(state.actor_critic.parameters)
    assert gradient.shape == parameters.shape
    expected = loss.gradient(parameters)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    expected = loss.metrics(parameters) | {
        "explained_variance": 1 - np.var(loss.target - loss.value) / np.var(loss.target),
        "value": loss.value.mean(),
        "gradient_norm": np.linalg.norm(expected),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_n_step_returns():
    """(A2C.2) with λ = 1: rₜ + γ rₜ₊₁ + ... + γᵏ V(sₜ₊ₖ), n - t steps of it, where no episode ends."""
    algorithm = A2C(hidden=(4,), discount=0.9, value_coefficient=1.0)
    state = shifted_state(algorithm)
    rollout = random_rollout(algorithm, state)
    never = jnp.zeros((T, N), bool)
    observation = jnp.concatenate([rollout.observation, jnp.ones((1, N, 3))])
    rollout = rollout._replace(next_observation=observation[1:], terminated=never, truncated=never)
    value = np.float64(state.actor_critic.net.value(observation))
    reward, powers = np.float64(rollout.reward), 0.9 ** np.arange(T + 1)
    returns = np.array([powers[: T - t] @ reward[t:] + powers[T - t] * value[T] for t in range(T)])

    _, metrics = jax.jit(partial(rollout_gradient, algorithm))(state, rollout)
    np.testing.assert_allclose(metrics["value_loss"], np.square(returns - value[:T]).mean(), rtol=1e-5)


# ---------------------------------------------------------------------------------------- REINFORCE is the limit of n

LENGTH = 8  # of every episode


def whole_episodes(algorithm, state, spec=SPEC):
    """[LENGTH, N]: one whole episode of each environment, which its last step terminates."""
    rollout = random_rollout(algorithm, state, spec, length=LENGTH)
    terminated = jnp.zeros((LENGTH, N), bool).at[-1].set(True)
    following = jnp.concatenate([rollout.observation[1:], rollout.next_observation[-1:]])
    return rollout._replace(next_observation=following, terminated=terminated, truncated=jnp.zeros_like(terminated))


def reinforce_with_baseline(algorithm, net, episodes):
    """By definition: the whole discounted return G, less V(s), times ∇ log π(a|s); and V(s) drawn to G. In float64."""
    reward = np.float64(episodes.reward)
    returns = np.zeros_like(reward)
    for t in range(LENGTH):
        for k in range(t, LENGTH):
            returns[t] += algorithm.discount ** (k - t) * reward[k]

    @jax.jit
    def loss(net):
        value, pi = net.value(episodes.observation), net.policy(episodes.observation)
        advantage = jax.lax.stop_gradient(returns - value)
        value_loss = jnp.square(returns - value).mean()
        return -(advantage * pi.log_prob(episodes.action)).mean() + algorithm.value_coefficient * value_loss

    return Vector.of(jax.grad(loss)(net)).parameters


def n_step_gradient(algorithm, state, episodes, n):
    """The mean of A2C's gradients of the rollouts of `n` steps that the episodes are cut into."""
    pieces = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]), episodes)
    return jax.jit(jax.vmap(partial(rollout_gradient, algorithm), (None, 0)))(state, pieces)[0].mean(0)


def test_reinforce_with_baseline_is_the_limit_of_n():
    """Its gradient comes out once a rollout holds the whole episode, and not before: until then A2C bootstraps."""
    algorithm = A2C(hidden=(4,), discount=0.9)
    state = shifted_state(algorithm)
    episodes = whole_episodes(algorithm, state)
    with jax.enable_x64(True):
        parameters = jnp.float64(state.actor_critic.parameters)
        state = state._replace(actor_critic=replace_parameters(state.actor_critic, parameters))
        expected = reinforce_with_baseline(algorithm, state.actor_critic.net, episodes)

        def distance(n, **settings):
            found = n_step_gradient(replace(algorithm, **settings), state, episodes, n)
            return np.linalg.norm(found - expected) / np.linalg.norm(expected)

        assert distance(1) > 0.05 and distance(4) > 0.05
        assert distance(LENGTH) < 1e-6  # γ is a float32
        assert distance(LENGTH, gae_lambda=0.9) > 0.05


@pytest.mark.parametrize("spec", [SPEC, CONTINUOUS], ids=["discrete", "continuous"])
def test_reinforce_of_this_library_is_the_limit_of_n(spec):
    settings = {"hidden": (4,), "discount": 0.9, "entropy_coefficient": 0.1, "value_coefficient": 0.3}
    algorithm, reinforce = A2C(**settings), Reinforce(**settings)
    state = shifted_state(algorithm, spec)
    rollout = whole_episodes(algorithm, state, spec)
    gradient, metrics = jax.jit(partial(rollout_gradient, algorithm))(state, rollout)

    episodes = Episodes(rollout._replace(next_observation=()), jnp.ones((LENGTH, N)))
    expected, others = jax.jit(jax.grad(reinforce.loss, has_aux=True))(state.actor_critic.net, episodes)
    np.testing.assert_allclose(gradient, Vector.of(expected).parameters, rtol=1e-4, atol=1e-6)
    assert np.linalg.norm(gradient) > 0.1
    for name in ("loss", "objective", "value_loss", "entropy", "explained_variance", "value"):
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-4, atol=1e-6, err_msg=name)


# ---------------------------------------------------------------------------------------------------------- optimisers


def clipped(gradient, limit):
    return gradient * min(1.0, limit / np.linalg.norm(gradient))


def numpy_rmsprop(parameters, gradients, rate, epsilon):
    """Mnih et al., arXiv:1602.01783, eqs. (8) and (9)."""
    g = np.zeros_like(parameters)
    for gradient in gradients:
        g = 0.99 * g + 0.01 * gradient**2
        parameters = parameters - rate * gradient / np.sqrt(g + epsilon)
    return parameters


def numpy_adam(parameters, gradients, rate, epsilon):
    """Kingma & Ba, arXiv:1412.6980, Algorithm 1."""
    m = v = np.zeros_like(parameters)
    for t, gradient in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        parameters = parameters - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + epsilon)
    return parameters


@pytest.mark.parametrize("name, by_definition", [("rmsprop", numpy_rmsprop), ("adam", numpy_adam)])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_apply(name, by_definition, epsilon):
    """Several steps, of gradients some of which are above the limit of the norm and some below it."""
    algorithm = A2C(hidden=(4,), optimiser=name, optimiser_epsilon=epsilon, learning_rate=0.01, max_gradient_norm=0.5)
    state = algorithm.init(KEY, SPEC)
    parameters = np.float64(state.actor_critic.parameters)
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(5, len(parameters))) * np.array([[1.0], [0.01], [0.3], [1e-4], [0.02]])
    apply = jax.jit(partial(algorithm.apply, metrics={}))
    for gradient in gradients:
        state = apply(state, jnp.float32(gradient))
    expected = by_definition(parameters, [clipped(gradient, 0.5) for gradient in gradients], 0.01, epsilon)
    assert np.abs(expected - parameters).max() > 1e-3
    np.testing.assert_allclose(state.actor_critic.parameters, expected, rtol=1e-4, atol=1e-6)


def test_epsilon_is_under_the_root():
    """A parameter with a gradient far below √ε moves in proportion to it; with ε outside it would move like any."""
    algorithm = A2C(hidden=(4,), optimiser_epsilon=1e-4, learning_rate=1.0)
    state = algorithm.init(KEY, SPEC)
    gradient = jnp.zeros_like(state.actor_critic.parameters).at[0].set(1e-5).at[1].set(2e-5)
    step = state.actor_critic.parameters - algorithm.apply(state, gradient, {}).actor_critic.parameters
    np.testing.assert_allclose(step[:3], [1e-3, 2e-3, 0.0], rtol=1e-3)


def test_learning_rate_schedule():
    """Half of the run over: half the step."""
    algorithm = A2C(hidden=(4,), learning_rate_schedule="linear")
    state = algorithm.init(KEY, SPEC)
    gradient = jax.random.normal(KEY, state.actor_critic.parameters.shape)
    steps = []
    for done in (0, 500):
        later = algorithm.apply(state._replace(clock=state.clock.tick(steps=done)), gradient, {})
        steps.append(later.actor_critic.parameters - state.actor_critic.parameters)
    np.testing.assert_allclose(steps[1], steps[0] / 2, rtol=1e-3, atol=1e-8)


def test_update_is_gradient_and_apply():
    """The halves are pure: an asynchronous driver may take the gradient in one place and apply it in another."""
    algorithm = A2C(hidden=(4,))
    state = shifted_state(algorithm)
    rollout = random_rollout(algorithm, state)
    before = jax.tree.map(np.array, state)
    find, apply = jax.jit(partial(rollout_gradient, algorithm)), jax.jit(partial(algorithm.apply, metrics={}))
    gradient, metrics = find(state, rollout)
    together, same_metrics = jax.jit(algorithm.update)(state, rollout, KEY)
    apart = apply(state, gradient)
    np.testing.assert_allclose(together.actor_critic.parameters, apart.actor_critic.parameters, rtol=1e-5, atol=1e-7)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), same_metrics, metrics)
    assert not np.array_equal(apart.actor_critic.parameters, state.actor_critic.parameters)
    jax.tree.map(np.testing.assert_array_equal, before, state)

    # A gradient knows nothing of the optimiser, and is applied wherever the parameters have gone since.
    elsewhere = apply(state, -gradient)
    same = elsewhere._replace(actor_critic=replace_parameters(elsewhere.actor_critic, state.actor_critic.parameters))
    np.testing.assert_array_equal(find(same, rollout)[0], gradient)
    late = apply(elsewhere, gradient)
    assert np.all(np.isfinite(late.actor_critic.parameters))
    assert not np.array_equal(late.actor_critic.parameters, elsewhere.actor_critic.parameters)


# --------------------------------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize(
    "space, settings",
    [
        (spaces.Discrete(3), {}),
        (spaces.MultiDiscrete([2, 3]), {}),
        (spaces.MultiBinary(3), {"shared_trunk": True}),
        (spaces.Box(-1, 1, (2,), np.float32), {"state_dependent_std": True}),
        (spaces.Box(-1, 1, (2,), np.float32), {"gsde_interval": 2, "initial_log_std": -1.0}),
    ],
    ids=["discrete", "multi_discrete", "multi_binary", "normal", "gsde"],
)
def test_every_action_space(space, settings):
    """An update makes the actions that turned out well likelier, and the others less likely."""
    algorithm = A2C(hidden=(4,), learning_rate=1e-3, value_coefficient=0.0, **settings)
    spec = replace(SPEC, action_space=space)
    algorithm.check(spec)
    state = algorithm.init(KEY, spec)
    rollout = random_rollout(algorithm, state, spec)
    assert rollout.action.shape == (T, N, *space.shape)
    state_after, _ = jax.jit(algorithm.update)(state, rollout, KEY)

    net, after = state.actor_critic.net, state_after.actor_critic.net
    arguments = np.float64(rollout.reward), *(np.float64(net.value(x)) for x in (rollout[0], rollout[3]))
    ends = np.asarray(rollout.terminated), np.asarray(rollout.truncated)
    advantage = advantages_by_definition(*arguments, *ends, algorithm.discount, 1.0)
    log_prob, new_log_prob = (n.policy(rollout.observation).log_prob(rollout.action) for n in (net, after))
    assert (advantage * np.asarray(new_log_prob - log_prob)).mean() > 1e-3

    action = algorithm.policy(state_after, rollout.observation[0])
    np.testing.assert_array_equal(action, after.policy(rollout.observation[0]).mode)
    if not isinstance(space, spaces.Box):
        assert all(space.contains(np.asarray(a, space.dtype)) for a in action)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rollout_length": 0}, "rollout_length"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"optimiser_epsilon": 0.0}, "optimiser_epsilon"),
        ({"gae_lambda": 1.5}, "gae_lambda"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient"),
        ({"gsde_interval": 0}, "gsde_interval"),
        ({"hidden": (64, 0)}, "hidden"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=message):
        A2C(**settings).check(SPEC)
