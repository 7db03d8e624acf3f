"""MADDPG against DDPG where there is one agent, its targets and actor steps against NumPy, and its four additions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from probes import box, make_driver, observations_of, team
from scipy import special

from zhixing.algorithms.ddpg import DDPG
from zhixing.algorithms.maddpg import MADDPG
from zhixing.core import Spec, hyperparameters
from zhixing.environments.jax_adapter import JaxAdapter, JaxEnvironment
from zhixing.errors import UsageError
from zhixing.learned import Learned, Vector
from zhixing.transition import Experience

KEY = jax.random.PRNGKey(0)
B, N, A = 8, 4, 3
SIZES = (2, 3, 4)  # of their actions
DISCRETE = team((box(2), box(3), box(1)), tuple(map(spaces.Discrete, SIZES)))
CONTINUOUS = team((box(2), box(3), box(1)), tuple(box(size) for size in SIZES))


@hyperparameters
class PlainMADDPG(MADDPG):
    """With plain gradient descent, so that a step shows its gradient."""

    def optimiser(self, clock):
        return optax.sgd(self.learning_rate)

    def critic_optimiser(self, clock):
        return optax.sgd(self.critic_learning_rate)


def state_of(algorithm, spec=DISCRETE, key=KEY):
    return jax.jit(lambda key: algorithm.init(key, spec))(key)


def random_batch(spec, seed=0, ensemble=1):
    """What a replay gives, [B, A]; a quarter has ended, and a tenth was not there."""
    generator = np.random.default_rng(seed)
    count = spec.agents.count
    reward = generator.normal(size=(B, count)).astype(np.float32)
    discount = 0.9 * (generator.random((B, count)) > 0.25).astype(np.float32)
    active = generator.random((B, count)) > 0.1
    if spec.agents.discrete:
        action = generator.integers(0, spec.agents.action_sizes, (B, count))
    else:
        action = generator.uniform(-1, 1, (B, count, spec.agents.action_size)) * spec.agents.allowed
        action = action.astype(np.float32)
    o, next_o = (observations_of(spec, B, key=jax.random.PRNGKey(seed + k)) for k in (1, 2))
    extras = generator.integers(0, ensemble, (B, count)) if ensemble > 1 else ()
    weight = np.ones(B, np.float32)
    return jax.tree.map(jnp.asarray, Experience(o, action, reward, next_o, discount, weight, extras, active))


def numpy_mlp(mlp, x, final=lambda x: x):
    """A network of rectified units, in float64."""
    x = np.float64(x)
    for weight, bias in zip(mlp.weights[:-1], mlp.biases[:-1], strict=True):
        x = np.maximum(x @ np.float64(weight).T + np.float64(bias), 0.0)
    return final(x @ np.float64(mlp.weights[-1]).T + np.float64(mlp.biases[-1]))


def numpy_value(mlp, observation, action):
    """Qᵢ(o, a) of [B, A, d] and [B, A, m]."""
    both = [np.float64(x).reshape(len(x), -1) for x in (observation, action)]
    return numpy_mlp(mlp, np.concatenate(both, -1))[:, 0]


def of_agent(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def parameters(learned):
    return np.asarray(learned.parameters)


# ---------------------------------------------------------------------------------------------------- one agent: DDPG


def test_one_agent_is_ddpg():
    """Number for number, actors, critics and both targets, over several updates."""
    alone = Spec(box(3), box(2), N, 1_000)
    settings = {"hidden": (8,), "polyak": 0.1, "learning_rate": 1e-2, "critic_learning_rate": 3e-2}
    ddpg = DDPG(**settings)
    maddpg = MADDPG(**settings, max_gradient_norm=None, logit_penalty=7.0)
    with jax.enable_x64(True):

        def doubled(tree):
            return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)

        one, many = doubled(state_of(ddpg, alone)), doubled(state_of(maddpg, team((box(3),), (box(2),))))

        def copied(vector, like, axes):
            lead = lambda x: x.reshape(*[1] * axes, *x.shape)  # noqa: E731
            found = Vector(lead(vector.parameters), like.structure)
            assert found.parameters.shape == like.parameters.shape
            if not isinstance(like, Learned):
                return found
            return Learned(found, jax.tree.map(lead, vector.optimiser_state))

        many = many._replace(
            actors=copied(one.actor, many.actors, 2),
            critics=copied(one.critics, many.critics, 1),
            actor_target=copied(one.actor_target, many.actor_target, 2),
            critics_target=copied(one.critics_target, many.critics_target, 1),
        )
        start = one
        update, team_update = jax.jit(ddpg.update), jax.jit(maddpg.update)
        generator = np.random.default_rng(0)
        for i in range(4):
            o, next_o = generator.normal(size=(2, B, 3))
            action, reward = generator.uniform(-1, 1, (B, 2)), generator.normal(size=B)
            discount, weight = 0.9 * (generator.random(B) > 0.2), generator.random(B) + 0.5
            batch = jax.tree.map(jnp.asarray, Experience(o, action, reward, next_o, discount, weight))
            stacked = jax.tree.map(lambda x: x[:, None], batch)
            stacked = stacked._replace(weight=jnp.ones(B), active=jnp.ones((B, 1), bool))
            batch = batch._replace(weight=jnp.ones(B))
            one, metrics = update(one, batch, jax.random.PRNGKey(i))
            many, team_metrics = team_update(many, stacked, jax.random.PRNGKey(i))
            for name, value in metrics.items():
                np.testing.assert_allclose(np.squeeze(team_metrics[name]), value, rtol=1e-6, err_msg=name)
        pairs = (one.actor, many.actors), (one.critics, many.critics)
        pairs = *pairs, (one.actor_target, many.actor_target), (one.critics_target, many.critics_target)
        for single, several in pairs:
            np.testing.assert_allclose(np.ravel(several.parameters), single.parameters, rtol=1e-6, atol=1e-9)
        assert np.abs(parameters(one.actor) - parameters(start.actor)).max() > 1e-2
        x = jnp.asarray(generator.normal(size=(B, 3)))
        np.testing.assert_allclose(maddpg.policy(many, x[:, None])[:, 0], ddpg.policy(one, x), rtol=1e-6)
        np.testing.assert_allclose(maddpg.value(many, x[:, None])[:, 0], ddpg.value(one, x), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- targets


def certain(vector, factor=1e4):
    """Networks whose logits are so large that a sample is the likeliest action."""
    net = vector.net
    last = lambda n: (n.mlp.weights[-1], n.mlp.biases[-1])  # noqa: E731
    return Vector(
        jax.vmap(jax.vmap(lambda n: Vector.of(n).parameters))(eqx.tree_at(last, net, [factor * x for x in last(net)])),
        vector.structure,
    )


def errors_of(algorithm, state, batch):
    """[B, A], |y - Qᵢ(o, a)|: the loss of one sample after the other."""

    def one(b):
        weight = jnp.eye(B)[b]
        return algorithm.update(state, batch._replace(weight=weight), KEY)[1]["critic_loss"]

    return np.sqrt(B * np.asarray(jax.jit(jax.vmap(one))(jnp.arange(B))))


def likeliest(policies, observation, discrete=True):
    """One-hot actions [B, A, m] of policies [A, 1], or continuous ones, by NumPy."""
    actions = np.zeros((len(observation), A, max(SIZES)))
    for i, size in enumerate(SIZES):
        outputs = numpy_mlp(of_agent(policies, i, 0).mlp, observation[:, i])[:, :size]
        actions[:, i, :size] = np.eye(size)[outputs.argmax(-1)] if discrete else np.tanh(outputs)
    return actions


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS])
@pytest.mark.parametrize("twins", [False, True])
def test_target(spec, twins):
    """(MADDPG.3), (MADDPG.10): with every agent's own reward, its own critic's target, and what all would do then."""
    algorithm = MADDPG(hidden=(8,), twin_critics=twins)
    state, other = state_of(algorithm, spec), state_of(algorithm, spec, jax.random.PRNGKey(5))
    target = certain(other.actor_target) if spec is DISCRETE else other.actor_target
    state = state._replace(actor_target=target, critics_target=other.critics_target)
    batch = random_batch(spec)
    next_action = likeliest(state.actor_target.net, batch.next_observation, spec is DISCRETE)
    action = np.asarray(batch.action)
    if spec is DISCRETE:
        action = np.eye(max(SIZES))[action]
    squares = np.zeros((B, A))
    lesser = []
    for i in range(A):
        values = []
        for k in range(1 + twins):
            q = of_agent(state.critics_target.net.members, i, k).mlp
            values.append(numpy_value(q, batch.next_observation, next_action))
        lesser.append(np.argmin(values, 0))
        y = np.float64(batch.reward[:, i]) + np.float64(batch.discount[:, i]) * np.min(values, 0)
        for k in range(1 + twins):
            q = of_agent(state.critics.net.members, i, k).mlp
            squares[:, i] += np.square(y - numpy_value(q, batch.observation, action))
    expected = np.sqrt(squares) * np.asarray(batch.active)
    np.testing.assert_allclose(errors_of(algorithm, state, batch), expected, rtol=2e-4, atol=1e-5)
    assert not twins or 0 < np.mean(lesser) < 1
    assert 0 < np.mean(batch.active) < 1 and 0 < np.mean(np.asarray(batch.discount) == 0) < 1


def test_smoothing():
    """(MADDPG.10): the target actions of continuous spaces get a noise that is clipped, and only those that exist."""
    algorithm = MADDPG(hidden=(8,), smoothing_std=10.0, smoothing_clip=0.25)
    state, batch = state_of(algorithm, CONTINUOUS), random_batch(CONTINUOUS)
    state = state._replace(actor_target=Vector(0.1 * state.actor_target.parameters, state.actor_target.structure))
    found = np.asarray(jax.jit(algorithm.expected)(state, batch, KEY))[0]
    clean = likeliest(state.actor_target.net, batch.next_observation, discrete=False)
    allowed = CONTINUOUS.agents.allowed
    moved = np.abs(found - clean)
    assert np.all(moved[:, ~allowed] == 0)
    assert np.all(moved[:, allowed] < 0.2501) and np.mean(moved[:, allowed] > 0.2499) > 0.9


# --------------------------------------------------------------------------------------------------------------- actors


@pytest.mark.parametrize("agent", range(A))
def test_actor_step_is_that_of_finite_differences(agent):
    """(MADDPG.5): of -Qᵢ with agent i's action its own, and those of the others as they were."""
    algorithm = PlainMADDPG(hidden=(8,), learning_rate=1.0)
    state, batch = state_of(algorithm, CONTINUOUS), random_batch(CONTINUOUS)
    weight = np.asarray(batch.active, np.float32)
    actors, _ = jax.jit(algorithm.improve)(state, state.critics, batch, jnp.asarray(weight), KEY)
    step = parameters(actors)[agent, 0] - parameters(state.actors)[agent, 0]
    vector = np.float64(parameters(state.actors)[agent, 0])
    q, allowed = of_agent(state.critics.net.members, agent, 0).mlp, CONTINUOUS.agents.allowed[agent]

    def loss(vector):
        actor = of_agent(Vector(vector[None, None], state.actors.structure).net, 0, 0)
        own = numpy_mlp(actor.mlp, batch.observation[:, agent], np.tanh) * allowed
        action = np.array(batch.action, np.float64)
        action[:, agent] = own
        value = numpy_value(q, batch.observation, action)
        return -(weight[:, agent] * value).sum() / weight[:, agent].sum()

    h, slopes = 1e-6, []
    for index in range(0, len(vector), 5):
        shift = h * np.eye(len(vector))[index]
        slopes.append((loss(vector + shift) - loss(vector - shift)) / (2 * h))
    np.testing.assert_allclose(-step[::5], slopes, rtol=2e-3, atol=1e-6)
    assert np.abs(slopes).max() > 1e-2


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS])
def test_agents_learn_apart(spec):
    """Another agent's actor has no part in one's own update, given the same minibatch."""
    algorithm = MADDPG(hidden=(8,))
    state, batch = state_of(algorithm, spec), random_batch(spec)
    changed = state.actors.parameters.at[1].mul(-1.5)
    other = state._replace(actors=Learned(Vector(changed, state.actors.structure), state.actors.optimiser_state))
    update = jax.jit(algorithm.update)
    (after, _), (after_other, _) = update(state, batch, KEY), update(other, batch, KEY)
    for i in (0, 2):
        assert_equal(of_agent(after_other.actors, i), of_agent(after.actors, i))
        assert np.all(parameters(after.actors)[i].any()) and np.any(
            parameters(after.actors)[i] != parameters(state.actors)[i]
        )
    assert_equal(after_other.critics, after.critics)
    assert np.any(parameters(after_other.actors)[1] != parameters(after.actors)[1])


def test_samples_of_discrete_actions():
    """(MADDPG.7): forward a one-hot sample of the softmax, backward the gradient of the softened sample."""
    algorithm = MADDPG(gumbel_temperature=0.7)
    logits = jnp.array([1.0, -0.5, 0.3, -1e9])
    many = jnp.broadcast_to(logits, (20_000, 4))
    drawn = np.asarray(algorithm.sampled(many, True, KEY))
    np.testing.assert_allclose(np.sort(drawn, -1), np.broadcast_to([0, 0, 0, 1.0], drawn.shape), atol=1e-6)
    np.testing.assert_allclose(drawn.mean(0), special.softmax(np.float64(logits)), atol=0.015)

    noise = np.float64(jax.random.gumbel(KEY, (4,)))
    weight = np.array([0.4, -1.0, 2.0, 5.0])
    gradient = jax.grad(lambda x: (algorithm.sampled(x, True, KEY) * weight).sum())(logits)
    p = special.softmax((np.float64(logits) + noise) / 0.7)
    expected = p * (weight - p @ weight) / 0.7
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient[3] == 0
    np.testing.assert_array_equal(algorithm.sampled(logits, False, KEY), logits)  # of continuous ones the action itself


def test_acting():
    """Each agent draws from its own actions alone, also while they are random; the greedy one is the likeliest."""
    algorithm = MADDPG(hidden=(8,), learning_starts=100)
    state = state_of(algorithm)
    o = observations_of(DISCRETE, 3_000)
    carry = algorithm.carry(DISCRETE, KEY)._replace(member=jnp.zeros((3_000, A), jnp.int32))
    act = jax.jit(algorithm.act)
    random = np.asarray(act(state, carry, o, KEY)[0])
    later = state._replace(clock=state.clock.tick(steps=100))
    drawn = np.asarray(act(later, carry, o, KEY)[0])
    for i, size in enumerate(SIZES):
        outputs = numpy_mlp(of_agent(state.actors.net, i, 0).mlp, o[:, i])[:, :size]
        frequency = np.bincount(drawn[:, i], minlength=size) / 3_000
        np.testing.assert_allclose(frequency, special.softmax(outputs, -1).mean(0), atol=0.04)
        np.testing.assert_allclose(np.bincount(random[:, i], minlength=size) / 3_000, 1 / size, atol=0.04)
        np.testing.assert_array_equal(algorithm.policy(state, o)[:, i], outputs.argmax(-1))
    action, _, extras = act(later, carry, o, KEY)
    assert action.shape == (3_000, A) and extras == ()


# ------------------------------------------------------------------------------------------------------------ ensembles


def test_each_policy_learns_from_its_own_steps():
    """(MADDPG.9): what others of the ensemble met does not move it, and without steps it stays where it is."""
    algorithm = MADDPG(hidden=(8,), ensemble=3, logit_penalty=0.0)
    state, batch = state_of(algorithm), random_batch(DISCRETE, ensemble=2)  # the third policy never played
    batch = batch._replace(action=algorithm.one_hot(state, batch.action))
    weight = jnp.asarray(batch.active, jnp.float32)
    improve = jax.jit(algorithm.improve)
    actors, _ = improve(state, state.critics, batch, weight, KEY)
    moved = np.abs(parameters(actors) - parameters(state.actors)).max(-1)  # [A, K]
    assert np.all(moved[:, :2] > 0) and np.all(moved[:, 2] == 0)

    noise = jax.random.normal(KEY, batch.observation.shape)
    for i in range(A):
        elsewhere = (batch.extras[:, i] != 0)[:, None, None]  # where agent i played another policy than its first
        spoiled = batch._replace(observation=jnp.where(elsewhere, batch.observation + noise, batch.observation))
        other, _ = improve(state, state.critics, spoiled, weight, KEY)
        np.testing.assert_allclose(parameters(other)[i, 0], parameters(actors)[i, 0], rtol=1e-5, atol=1e-7)
        assert np.any(parameters(other)[i, 1] != parameters(actors)[i, 1])


def test_without_steps_only_the_penalty_moves():
    algorithm = PlainMADDPG(hidden=(8,), ensemble=2, logit_penalty=0.5, learning_rate=1.0)
    state, batch = state_of(algorithm), random_batch(DISCRETE)
    batch = batch._replace(action=algorithm.one_hot(state, batch.action), extras=jnp.zeros((B, A), jnp.int32))
    actors, _ = jax.jit(algorithm.improve)(state, state.critics, batch, jnp.ones((B, A)), KEY)
    for i, size in enumerate(SIZES):
        net, new = (of_agent(x.net, i, 1) for x in (state.actors, actors))
        outputs = numpy_mlp(net.mlp, batch.observation[:, i])[:, :size]
        slope = 2 * 0.5 * outputs.sum(0) / (B * max(SIZES))  # of the mean square, with respect to the last biases
        np.testing.assert_allclose((net.mlp.biases[-1] - new.mlp.biases[-1])[:size], slope, rtol=1e-3, atol=1e-6)


class Counting(JaxEnvironment):
    """Two agents; episodes of four steps."""

    agents = ("a_0", "b_0")
    max_episode_steps = 4

    def observation_space(self, params):
        return spaces.Dict(a_0=box(1), b_0=box(2))

    def action_space(self, params):
        return spaces.Dict(a_0=spaces.Discrete(2), b_0=spaces.Discrete(3))

    def reset_env(self, key, params):
        return {"a_0": jnp.zeros(1), "b_0": jnp.zeros(2)}, jnp.float32(0)

    def step_env(self, key, state, action, params):
        seen = {"a_0": jnp.full(1, state + 1), "b_0": jnp.full(2, state + 1)}
        return seen, state + 1, jnp.zeros(2), jnp.bool_(False), {}


def test_a_policy_plays_whole_episodes():
    """Drawn anew at the start of each, uniformly; each agent's own; the replay says which."""
    algorithm = MADDPG(hidden=(4,), ensemble=3, rollout_length=8, learning_starts=10**6, replay_capacity=1_600)
    driver = make_driver(JaxAdapter("counting", Counting()), (0,), N, 1_600)
    run = driver.advance(algorithm, driver.start(algorithm), 1_600 // (8 * N), 8)
    played = np.asarray(run.memory.data.extras)[0].reshape(-1, 4, N, 2)  # [episodes, steps, N, A]
    steps = np.asarray(run.memory.data.observation)[0, :, 0, 0].reshape(-1, 4, N)
    np.testing.assert_array_equal(steps, np.broadcast_to(np.arange(4)[:, None], steps.shape))
    assert np.all(played == played[:, :1])
    drawn = played[:, 0].reshape(-1, 2)
    assert len(drawn) == 400
    pairs = np.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9)  # independent: nine cases, as likely as each other
    assert np.all(np.abs(pairs - 400 / 9) < 4 * np.sqrt(400 * 8 / 81))


# ----------------------------------------------------------------------------------------------------- inferring others


def test_guesses_follow_what_others_do():
    """(MADDPG.8): on actions from fixed probabilities μ̂ᵢⱼ becomes these, whoever guesses."""
    algorithm = MADDPG(hidden=(8,), infer_others=True, guess_entropy=0.0, learning_rate=3e-3, polyak=0.1)
    probabilities = np.array([[0.9, 0.1, 0.0, 0.0], [0.2, 0.5, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]])
    counts = np.round(probabilities * 10).astype(int)
    action = np.stack([np.repeat(np.arange(4), row) for row in counts], -1)  # [10, A]: exactly so often
    batch = Experience(jnp.zeros((10, A, 3)), jax.nn.one_hot(action, 4), (), (), (), ())
    follow = jax.jit(lambda s: jax.lax.scan(lambda s, _: algorithm.guess(s, batch), s, None, 1_500))
    state, metrics = follow(state_of(algorithm))
    said = algorithm.guessed(state.guesses.net, state, jnp.zeros((1, A, 3)))[:, 0]  # [A, A, m]
    np.testing.assert_allclose(jax.nn.softmax(said), np.broadcast_to(probabilities, said.shape), atol=0.02)
    entropy = -np.sum(probabilities * np.log(np.maximum(probabilities, 1e-9)), -1).mean()
    np.testing.assert_allclose(metrics["guess_loss"][-1], entropy, atol=0.01)
    np.testing.assert_allclose(state.guesses_target.parameters, state.guesses.parameters, atol=0.05)


def test_guess_loss():
    """Minus log-likelihood and entropy, against NumPy."""
    algorithm = MADDPG(hidden=(8,), infer_others=True, guess_entropy=0.3)
    state, batch = state_of(algorithm), random_batch(DISCRETE)
    _, metrics = jax.jit(algorithm.guess)(state, batch._replace(action=algorithm.one_hot(state, batch.action)))
    losses = []
    for i in range(A):
        for j, size in enumerate(SIZES):
            outputs = numpy_mlp(of_agent(state.guesses.net, i, j).mlp, batch.observation[:, j])[:, :size]
            log_p = special.log_softmax(outputs, -1)
            entropy = -(np.exp(log_p) * log_p).sum(-1)
            losses.append(-(log_p[np.arange(B), batch.action[:, j]] + 0.3 * entropy).mean())
    np.testing.assert_allclose(metrics["guess_loss"], np.mean(losses), rtol=1e-4)


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS])
def test_targets_with_guesses(spec):
    """In yᵢ the agent itself does what it would, the others what it makes of them."""
    algorithm = MADDPG(hidden=(8,), infer_others=True)
    state, batch = state_of(algorithm, spec), random_batch(spec)
    if spec is DISCRETE:
        state = state._replace(actor_target=certain(state.actor_target), guesses_target=certain(state.guesses_target))
    found = np.asarray(jax.jit(algorithm.expected)(state, batch, KEY))  # [A, B, A, m]
    own = likeliest(state.actor_target.net, batch.next_observation, spec is DISCRETE)
    for i in range(A):
        guesses = jax.tree.map(lambda x, i=i: x[i][:, None], state.guesses_target.net)
        expected = likeliest(guesses, batch.next_observation, spec is DISCRETE)
        assert np.abs(expected - own).max() > 0.05
        expected[:, i] = own[:, i]
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- delay


def test_policy_delay():
    """Actors and all targets move in every second update, critics in each."""
    algorithm = MADDPG(hidden=(8,), policy_delay=2, twin_critics=True)
    state, batch = state_of(algorithm), random_batch(DISCRETE)
    update = jax.jit(algorithm.update)
    for updates, moves in ((0, False), (1, True), (2, False)):
        before = state._replace(clock=state.clock.tick(updates=updates))
        after, metrics = update(before, batch, KEY)
        for name in ("actors", "actor_target", "critics_target"):
            changed = np.any(parameters(getattr(after, name)) != parameters(getattr(before, name)))
            assert changed == moves, name
        assert np.any(parameters(after.critics) != parameters(before.critics))
        assert (metrics["actor_loss"] != 0) == moves


def test_gradients_are_scaled_down():
    """Of each agent by itself: Adam's first moment after a step is a tenth of the gradient, of norm 0.5 at most."""
    algorithm = MADDPG(hidden=(8,), max_gradient_norm=0.5)
    state, batch = state_of(algorithm), random_batch(DISCRETE)
    batch = batch._replace(reward=batch.reward * jnp.array([1e-3, 1.0, 100.0]), discount=0 * batch.discount)
    after, metrics = jax.jit(algorithm.update)(state, batch, KEY)
    moments = np.linalg.norm(optax.tree.get(after.critics.optimiser_state, "mu"), axis=-1)
    norms = np.asarray(metrics["gradient_norm"])
    np.testing.assert_allclose(moments, 0.1 * np.minimum(norms, 0.5), rtol=1e-4)
    assert norms.min() < 0.5 < norms.max()


# --------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_step": 2}, r"algorithm.n_step is 2; MADDPG's targets are of one step, set it to 1"),
        ({"ensemble": 0}, r"algorithm.ensemble is 0; it must be above 0"),
        ({"policy_delay": 0}, r"algorithm.policy_delay is 0; it must be above 0"),
        ({"gumbel_temperature": 0.0}, r"algorithm.gumbel_temperature is 0.0; it must be above 0"),
        ({"guess_entropy": -1.0}, r"algorithm.guess_entropy is -1.0; it must be 0 or more"),
        ({"polyak": 2.0}, r"algorithm.polyak is 2.0; it must be from 0 to 1"),
    ],
)
def test_check(settings, message):
    MADDPG().check(DISCRETE)
    MADDPG().check(CONTINUOUS)
    with pytest.raises(UsageError, match=message):
        MADDPG(**settings).check(DISCRETE)


def test_one_agent_is_not_many():
    with pytest.raises(
        UsageError, match=r"^MADDPG is for several agents, this environment has one; use PPO, DDPG or TD3"
    ):
        MADDPG().check(Spec(box(3), box(2), N, 1_000))
    with pytest.raises(UsageError, match=r"^DDPG acts for one agent, this environment has 3; use MAPPO or MADDPG$"):
        DDPG().check(CONTINUOUS)


def test_actions_without_bounds_are_refused():
    free = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    with pytest.raises(UsageError, match=r"^MADDPG needs actions with finite bounds; wrap the environment"):
        MADDPG().check(team((box(3), box(3)), (box(2), free)))
