"""The one-step actor-critic with both critics: whole updates against NumPy in float64; draws, ends, limits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from probes import CountingEnvironment, make_driver
from scipy import special, stats

from zhixing.algorithms.ac import ActionValue, OneStepActorCritic
from zhixing.core import Spec, Transition, hyperparameters
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.errors import UsageError
from zhixing.learned import Learned, Vector

KEY = jax.random.PRNGKey(0)
T, N, ACTIONS = 2, 4, 3
DISCOUNT = 0.9
SPEC = Spec(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(ACTIONS), N, 1_000)
CONTINUOUS = replace(SPEC, action_space=spaces.Box(-1, 1, (2,), np.float32))


@hyperparameters
class Plain(OneStepActorCritic):
    """With plain gradient descent, so that a step shows its gradient."""

    def optimisers(self, clock):
        return optax.sgd(self.learning_rate), optax.sgd(self.critic_learning_rate)


def moved(state, scale=0.3):
    """`state` with parameters that are not the special initial ones."""

    def move(learned, key):
        parameters = learned.parameters + scale * jax.random.normal(key, learned.parameters.shape)
        return Learned(Vector(parameters, learned.structure), learned.optimiser_state)

    actor_key, critic_key = jax.random.split(KEY)
    return state._replace(actor=move(state.actor, actor_key), critic=move(state.critic, critic_key))


def random_rollout(spec=SPEC, seed=0, length=T):
    generator = np.random.default_rng(seed)
    observation, next_observation = generator.normal(size=(2, length, N, 3)).astype(np.float32)
    shape = (length, N, *spec.action_space.shape)
    discrete = isinstance(spec.action_space, spaces.Discrete)
    action = generator.integers(0, ACTIONS, shape) if discrete else generator.normal(size=shape).astype(np.float32)
    reward, discounts = generator.normal(size=(length, N)), DISCOUNT ** generator.integers(0, 9, (length, N))
    terminated, truncated = np.zeros((2, length, N), bool)
    terminated[0, 0] = truncated[0, 1] = True
    arrays = observation, action, np.float32(reward), next_observation, terminated, truncated, np.float32(discounts)
    return jax.tree.map(jnp.asarray, Transition(*arrays))


# ------------------------------------------------------------------------------------------------- NumPy, in float64


def numpy_net(structure, parameters):
    treedef, shapes = structure
    parts = np.split(parameters, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])
    return treedef.unflatten([x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)])


def numpy_mlp(mlp, x):
    for weight, bias in zip(mlp.weights[:-1], mlp.biases[:-1], strict=True):
        x = np.tanh(x @ weight.T + bias)
    return x @ mlp.weights[-1].T + mlp.biases[-1]


def numpy_critic(algorithm, critic, observation, action):
    """-> V(s), or Q(s, a)."""
    x = np.float64(observation)
    if algorithm.critic == "td":
        return numpy_mlp(critic.mlp, x)[..., 0]
    if np.issubdtype(action.dtype, np.integer):
        return np.take_along_axis(numpy_mlp(critic.mlp, x), action[..., None], -1)[..., 0]
    return numpy_mlp(critic.mlp, np.concatenate([x, action], -1))[..., 0]


def numpy_actor(actor, observation, action):
    """-> log π(a|s), entropy."""
    outputs = numpy_mlp(actor.actor, np.float64(observation))
    if actor.log_std is None:
        log_p = special.log_softmax(outputs, -1)
        log_prob = np.take_along_axis(log_p, action[..., None], -1)[..., 0]
        return log_prob, stats.entropy(np.exp(log_p), axis=-1)
    normal = stats.norm(outputs, np.exp(actor.log_std))
    return normal.logpdf(action).sum(-1), normal.entropy().sum(-1)


def slopes(function, parameters, h=1e-6):
    """By central differences, parameter by parameter."""
    steps = h * np.eye(len(parameters))
    return np.array([(function(parameters + step) - function(parameters - step)) / (2 * h) for step in steps])


def next_actions(state, rollout):
    """a' ~ π(·|s'; θ), as the update with KEY draws them."""
    return np.asarray(state.actor.net.policy(rollout.next_observation).sample(KEY))


@pytest.mark.parametrize("spec", [SPEC, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "settings",
    [{"critic": "td"}, {"critic": "q"}, {"critic": "q", "discount_states": True, "entropy_coefficient": 0.3}],
    ids=["td", "q", "q_all"],
)
def test_update(spec, settings):
    """Both steps, with the critic of before in both."""
    rates = {"learning_rate": 0.3, "critic_learning_rate": 0.7}
    algorithm = Plain(hidden=(4,), discount=DISCOUNT, **rates, **settings)
    state, rollout = moved(algorithm.init(KEY, spec)), random_rollout(spec)
    new, metrics = jax.jit(algorithm.update)(state, rollout, KEY)

    data = jax.tree.map(np.asarray, rollout)
    theta, w = np.float64(state.actor.parameters), np.float64(state.critic.parameters)

    def estimate(w, observation=data.observation, action=data.action):
        return numpy_critic(algorithm, numpy_net(state.critic.structure, w), observation, action)

    following = estimate(w, data.next_observation, next_actions(state, rollout))
    target = np.float64(data.reward) + DISCOUNT * np.where(data.terminated, 0.0, following)
    signal = target - estimate(w) if algorithm.critic == "td" else estimate(w)
    if algorithm.discount_states:
        signal = signal * np.float64(data.extras)

    def critic_loss(w):
        return np.square(target - estimate(w)).mean()

    def actor_metrics(theta):
        actor = numpy_net(state.actor.structure, theta)
        log_prob, entropy = numpy_actor(actor, data.observation, data.action)
        return (signal * log_prob).mean(), entropy.mean()

    def actor_loss(theta):
        objective, entropy = actor_metrics(theta)
        return -objective - algorithm.entropy_coefficient * entropy

    actor_slopes, critic_slopes = slopes(actor_loss, theta), slopes(critic_loss, w)
    np.testing.assert_allclose(new.actor.parameters, theta - 0.3 * actor_slopes, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(new.critic.parameters, w - 0.7 * critic_slopes, rtol=1e-3, atol=1e-5)
    expected = {
        "objective": actor_metrics(theta)[0],
        "entropy": actor_metrics(theta)[1],
        "loss": actor_loss(theta),
        "gradient_norm": np.linalg.norm(actor_slopes),
        "critic_loss": critic_loss(w),
        "critic_gradient_norm": np.linalg.norm(critic_slopes),
        "value": estimate(w).mean(),
        "td_error": np.abs(target - estimate(w)).mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("critic", ["td", "q"])
def test_what_follows_an_end(critic):
    """The successor's value counts after a truncation, and not after a termination."""
    algorithm = Plain(hidden=(4,), critic=critic)
    state, rollout = moved(algorithm.init(KEY, SPEC)), random_rollout()
    update = jax.jit(lambda successor: algorithm.update(state, rollout._replace(next_observation=successor), KEY)[0])
    before = update(rollout.next_observation).critic.parameters
    after = update(rollout.next_observation.at[0, 0].add(1.0)).critic.parameters  # terminated
    np.testing.assert_array_equal(after, before)
    after = update(rollout.next_observation.at[0, 1].add(1.0)).critic.parameters  # truncated
    assert np.abs(after - before).max() > 1e-6


def test_next_action_is_drawn_from_the_policy():
    """(AC.3): over many keys, the critic's step is on average that of Expected Sarsa."""
    algorithm = Plain(hidden=(4,), critic="q", critic_learning_rate=1.0)
    state, rollout = moved(algorithm.init(KEY, SPEC), scale=1.0), random_rollout()
    actor, critic = state.actor.net, state.critic.net
    keys = jax.random.split(KEY, 4_000)
    steps = jax.jit(jax.vmap(lambda key: algorithm.update(state, rollout, key)[0].critic.parameters))(keys)

    probability = jax.nn.softmax(actor.policy(rollout.next_observation).logits)
    every = jnp.broadcast_to(jnp.arange(ACTIONS)[:, None, None], (ACTIONS, T, N))
    values = jax.vmap(critic, (None, 0), -1)(rollout.next_observation, every)
    target = rollout.reward + algorithm.discount * rollout.bootstrap * (probability * values).sum(-1)
    gradients, _ = jax.grad(algorithm.critic_loss, has_aux=True)(critic, rollout, target)
    expected = state.critic.parameters - Vector.of(gradients).parameters
    error = np.abs(steps.mean(0) - expected) / (steps.std(0) / np.sqrt(len(keys)) + 1e-6)
    assert steps.std(0).max() > 0.01 and error.max() < 5


def test_actor_with_the_true_action_values_follows_the_policy_gradient():
    """(AC.5) over all states and actions, each with its probability: the gradient of the expected reward."""
    algorithm = OneStepActorCritic(hidden=(4,), critic="q")
    actor = moved(algorithm.init(KEY, SPEC)).actor.net
    observation = jax.random.normal(KEY, (5, 3))
    q = jax.random.normal(jax.random.PRNGKey(1), (5, ACTIONS))

    def expected_reward(actor):
        return (jax.nn.softmax(actor.policy(observation).logits) * q).sum(-1).mean()

    action = jnp.broadcast_to(jnp.arange(ACTIONS), (5, ACTIONS))
    repeated = jnp.broadcast_to(observation[:, None], (5, ACTIONS, 3))
    rollout = Transition(repeated, action, q, repeated, q > 9, q > 9, jnp.ones_like(q))
    probability = jax.nn.softmax(actor.policy(observation).logits)
    loss = jax.jit(jax.grad(lambda actor: algorithm.actor_loss(actor, rollout, ACTIONS * probability * q)[0]))
    found = Vector.of(loss(actor)).parameters
    np.testing.assert_allclose(-found, Vector.of(jax.grad(expected_reward)(actor)).parameters, rtol=1e-4, atol=1e-6)
    assert np.abs(found).max() > 0.01


# ------------------------------------------------------------------------------------------------------------- critics


@pytest.mark.parametrize(
    "space, outputs",
    [
        (spaces.Discrete(3), 3),
        (spaces.Box(-1, 1, (2,), np.float32), 1),
        (spaces.MultiDiscrete([2, 3]), 1),
        (spaces.MultiBinary(4), 1),
    ],
)
def test_action_values_of_every_kind_of_actions(space, outputs):
    critic = ActionValue.create(KEY, replace(SPEC, action_space=space), (4,), "tanh")
    assert critic.mlp.biases[-1].shape == (outputs,)
    space.seed(0)
    observation = jax.random.normal(KEY, (T, N, 3))
    action = jnp.asarray(np.stack([[space.sample() for _ in range(N)] for _ in range(T)]))
    values = critic(observation, action)
    assert values.shape == (T, N)
    other = jnp.asarray(np.stack([[space.sample() for _ in range(N)] for _ in range(T)]))
    changed = np.asarray(action != other).reshape(T, N, -1).any(-1)
    differs = critic(observation, other) != values
    assert changed.any()
    np.testing.assert_array_equal(differs, changed)


def test_values():
    observation = jax.random.normal(KEY, (T, N, 3))
    td, q = (OneStepActorCritic(hidden=(4,), critic=critic) for critic in ("td", "q"))
    state = moved(td.init(KEY, SPEC))
    expected = numpy_critic(td, state.critic.net, observation, None)
    np.testing.assert_allclose(td.value(state, observation), expected, rtol=1e-5, atol=1e-6)
    state = moved(q.init(KEY, SPEC))
    greedy = np.asarray(state.actor.net.policy(observation).logits.argmax(-1))
    np.testing.assert_array_equal(q.policy(state, observation), greedy)
    expected = numpy_critic(q, state.critic.net, observation, greedy)
    np.testing.assert_allclose(q.value(state, observation), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- optimisers, and acting


def test_rates_and_limits_of_their_own():
    """Adam's first step is the rate in every parameter; its moment is a tenth of the clipped gradient."""
    algorithm = OneStepActorCritic(hidden=(4,), learning_rate=1e-3, critic_learning_rate=1e-2, max_gradient_norm=0.01)
    state, rollout = moved(algorithm.init(KEY, SPEC)), random_rollout()
    new, metrics = jax.jit(algorithm.update)(state, rollout, KEY)
    for name, rate, norm in (("actor", 1e-3, "gradient_norm"), ("critic", 1e-2, "critic_gradient_norm")):
        before, after = getattr(state, name), getattr(new, name)
        assert np.abs(after.parameters - before.parameters).max() == pytest.approx(rate, rel=0.02)
        assert metrics[norm] > 0.01
        moment = optax.tree.get(after.optimiser_state, "mu")
        np.testing.assert_allclose(np.linalg.norm(moment), 0.1 * 0.01, rtol=1e-4)


def test_learning_rate_schedule():
    """Half of the run over: half of both steps."""
    algorithm, rollout, steps = OneStepActorCritic(hidden=(4,), learning_rate_schedule="linear"), random_rollout(), []
    update = jax.jit(algorithm.update)
    for done in (0, 500):
        state = algorithm.init(KEY, SPEC)
        state = state._replace(clock=state.clock.tick(steps=done))
        new, _ = update(state, rollout, KEY)
        steps.append(
            [np.asarray(x.parameters - y.parameters) for x, y in ((new.actor, state.actor), (new.critic, state.critic))]
        )
    for whole, half in zip(*steps, strict=True):
        assert np.abs(whole).max() > 5e-5
        np.testing.assert_allclose(half, whole / 2, rtol=0.02, atol=1e-7)


def test_act_records_the_discount_of_its_state():
    """γᵗ with t from the episode's start; and one update after each step of the environments."""
    algorithm = OneStepActorCritic(hidden=(4,), discount=0.5)
    driver = make_driver(JaxAdapter("counting", CountingEnvironment()), (0,), N)
    run = driver.start(algorithm)
    for _ in range(9):
        run = driver.advance(algorithm, run, 1, algorithm.rollout_length)
        np.testing.assert_array_equal(run.carry.discount, 0.5 ** run.observation[..., 1])
    assert int(run.learner.clock.updates) == 9


@pytest.mark.parametrize("settings", [{}, {"gsde_interval": 2}, {"state_dependent_std": True}])
def test_act_draws_from_the_policy(settings):
    algorithm = OneStepActorCritic(hidden=(4,), **settings)
    state, observation = algorithm.init(KEY, CONTINUOUS), jax.random.normal(KEY, (N, 3))
    carry = algorithm.carry(CONTINUOUS, KEY)
    action, after, discount = algorithm.act(state, carry, observation, KEY)
    expected, noise, pi = state.actor.net.act(carry.noise, observation, KEY)
    np.testing.assert_array_equal(action, expected)
    jax.tree.map(np.testing.assert_array_equal, after.noise, noise)
    np.testing.assert_array_equal(discount, 1.0)
    np.testing.assert_array_equal(algorithm.policy(state, observation), pi.mode)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rollout_length": 0}, "rollout_length"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate"),
        ({"discount": -0.1}, "discount"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=f"algorithm.{message} is "):
        OneStepActorCritic(**settings).check(SPEC)
