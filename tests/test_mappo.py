"""MAPPO against PPO where there is one agent, and what many change: who sees what, who counts, in which units."""

from dataclasses import replace
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from probes import box, observations_of, team

from zhixing.algorithms.mappo import MAPPO, Minibatch, Scale, by_network, rescaled
from zhixing.algorithms.ppo import PPO, Acted
from zhixing.core import Spec, Transition
from zhixing.errors import UsageError
from zhixing.learned import Learned, Vector
from zhixing.networks import MLP
from zhixing.teams import Members, seen_by_all

KEY = jax.random.PRNGKey(0)
T, N, B = 5, 4, 12

NAMES = ("chaser_0", "chaser_1", "runner_0")
UNEQUAL = team((box(2), box(2), box(4)), (spaces.Discrete(3), spaces.Discrete(3), spaces.Discrete(2)), NAMES)
CONTINUOUS = team((box(2), box(2), box(4)), (box(1), box(1), box(3)), NAMES)
ALIKE = team((box(3),) * 3, (spaces.Discrete(4),) * 3)


def doubled(tree):
    """In float64, so that what is the same computation in another order stays the same number."""
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


def state_of(algorithm, spec, key=KEY):
    return jax.jit(lambda key: algorithm.init(key, spec))(key)


# ----------------------------------------------------------------------------------------------------- one agent: PPO


def random_rollout(ppo, state, spec, seed):
    generator = np.random.default_rng(seed)
    observation, next_observation = generator.normal(size=(2, T, N, 3))
    observation = jnp.asarray(observation)
    action, _, extras = ppo.act(state, (), observation, jax.random.PRNGKey(seed))
    terminated = generator.random((T, N)) < 0.2
    truncated = (generator.random((T, N)) < 0.2) & ~terminated
    ended = (terminated | truncated)[..., None]
    successor = np.where(ended, next_observation, np.concatenate([observation[1:], next_observation[-1:]]))
    reward = generator.normal(size=(T, N))
    return jax.tree.map(jnp.asarray, Transition(observation, action, reward, successor, terminated, truncated, extras))


@pytest.mark.parametrize("action_space", [spaces.Discrete(4), box(2)])
def test_one_agent_is_ppo(action_space):
    """Number for number: three updates from the same parameters, rollouts and keys."""
    alone = Spec(box(3), action_space, N, 1_000)
    spec = team((box(3),), (action_space,))
    settings = {"hidden": (8,), "activation": "tanh", "epochs": 2, "minibatches": 2, "entropy_coefficient": 0.01}
    ppo = PPO(**settings, learning_rate_schedule="linear", clip_value=True)
    mappo = MAPPO(**settings, learning_rate_schedule="linear", clip_value=True, normalize_value="none")
    with jax.enable_x64(True):
        expected, found = doubled(state_of(ppo, alone)), doubled(state_of(mappo, spec))
        learned = expected.actor_critic
        assert learned.parameters.shape == found.actor_critic.parameters.shape
        copied = Vector(learned.parameters, found.actor_critic.structure)
        found = found._replace(actor_critic=Learned(copied, learned.optimiser_state))
        update, team_update = jax.jit(ppo.update), jax.jit(mappo.update)
        for i in range(3):
            rollout = random_rollout(ppo, expected, alone, i)
            stacked = jax.tree.map(lambda x: x[:, :, None], rollout)._replace(active=jnp.ones((T, N, 1), bool))
            key = jax.random.PRNGKey(10 + i)
            expected, metrics = update(expected, rollout, key)
            found, team_metrics = team_update(found, stacked, key)
            for name, value in metrics.items():
                np.testing.assert_allclose(team_metrics[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
        new = expected.actor_critic.parameters
        np.testing.assert_allclose(found.actor_critic.parameters, new, rtol=1e-6, atol=1e-9)
        assert np.abs(new - learned.parameters).max() > 1e-3
        x = jax.random.normal(KEY, (B, 3))
        np.testing.assert_allclose(mappo.value(found, x[:, None])[:, 0], ppo.value(expected, x), rtol=1e-6)
        np.testing.assert_allclose(mappo.policy(found, x[:, None])[:, 0], ppo.policy(expected, x), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- who sees what


def test_what_all_see_begins_with_ones_own():
    """(MAPPO.1): in row i the observations of i, i + 1, ..., i - 1."""
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    expected = [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 1, 2], [5, 6, 1, 2, 3, 4]]
    np.testing.assert_array_equal(seen_by_all(x), expected)
    np.testing.assert_array_equal(seen_by_all(jnp.stack([x, 2 * x])), np.stack([expected, 2 * np.array(expected)]))


@pytest.mark.parametrize("centralised", [True, False])
def test_values_see_all_and_policies_their_own(centralised):
    algorithm = MAPPO(hidden=(8,), centralised=centralised)
    net = state_of(algorithm, ALIKE).actor_critic.net
    o = observations_of(ALIKE)  # [A, d]
    # [A, A]: of whose value, with respect to whose observation
    of_value = np.abs(jax.jit(jax.jacobian(net.value))(o)).sum(-1)
    of_policy = np.abs(jax.jit(jax.jacobian(lambda o: net.policy(o).logits))(o)).sum((1, -1))
    own = np.eye(3, dtype=bool)
    assert np.all(of_policy[own] > 0) and np.all(of_policy[~own] == 0)
    assert np.all(of_value[own] > 0)
    assert np.all(of_value[~own] > 0) if centralised else np.all(of_value[~own] == 0)


@pytest.mark.parametrize("centralised", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_value_is_the_network_of_what_is_seen(centralised, told):
    net = state_of(MAPPO(hidden=(8,), centralised=centralised, agent_index=told), ALIKE).actor_critic.net
    o = observations_of(ALIKE, B)
    critic, actor = (jax.tree.map(lambda x: x[0], members.nets) for members in (net.critic, net.actor))
    for i in range(3):
        parts = [o[:, (i + k) % 3] for k in range(3)] if centralised else [o[:, i]]
        number = [jnp.broadcast_to(jnp.eye(3)[i], (B, 3))] if told else []
        np.testing.assert_allclose(net.value(o)[:, i], critic(jnp.concatenate(parts + number, -1))[:, 0], rtol=1e-5)
        logits = actor(jnp.concatenate([o[:, i], *number], -1))
        np.testing.assert_allclose(net.policy(o).logits[:, i], logits, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- sharing


@pytest.mark.parametrize("sharing, networks", [("kind", 2), ("all", 1), ("none", 3)])
@pytest.mark.parametrize("spec", [UNEQUAL, CONTINUOUS])
def test_sharing(sharing, networks, spec):
    """How many parameters there are, and whose network speaks."""
    net = state_of(MAPPO(hidden=(8,), sharing=sharing), spec).actor_critic.net
    of = {"kind": (0, 0, 1), "all": (0, 0, 0), "none": (0, 1, 2)}[sharing]
    assert net.actor.of == net.critic.of == of
    number = 0 if sharing == "none" else 3  # nobody needs to be told whose turn it is who has a network for himself
    d, m = 4, spec.agents.action_size
    actor = (d + number) * 8 + 8 + 8 * m + m
    critic = (3 * d + number) * 8 + 8 + 8 * 1 + 1
    std = 0 if spec is UNEQUAL else m
    assert sum(x.size for x in jax.tree.leaves(net)) == networks * (actor + critic + std)

    # Moving one network moves its agents, and nobody else.
    moved = eqx.tree_at(lambda n: n.actor.nets.biases[-1], net, net.actor.nets.biases[-1].at[0, 0].add(1.0))
    o = observations_of(spec, B)
    change = np.abs(moved.policy(o).mode - net.policy(o).mode) if spec is CONTINUOUS else None
    change = np.abs(moved.policy(o).logits - net.policy(o).logits) if change is None else change
    np.testing.assert_array_equal(change.max((0, 2)) > 0.5, np.array(of) == 0)


def test_members_are_the_networks_called_by_hand():
    create = lambda key: MLP.create(key, 3, 8, 2)  # noqa: E731
    of = (0, 1, 0, 2)
    members = Members.create(create, KEY, of)
    x = jax.random.normal(KEY, (B, 4, 3))
    nets = [create(key) for key in jax.random.split(KEY, 3)]
    expected = np.stack([nets[k](x[:, i]) for i, k in enumerate(of)], 1)
    np.testing.assert_allclose(members(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(members(x[0]), expected[0], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ unequal agents


def test_actions_that_an_agent_does_not_have():
    algorithm = MAPPO(hidden=(8,))
    state = state_of(algorithm, UNEQUAL)
    o = observations_of(UNEQUAL, 2_000)
    action, _, extras = algorithm.act(state, (), o, KEY)
    assert [set(np.unique(action[:, i])) for i in range(3)] == [{0, 1, 2}, {0, 1, 2}, {0, 1}]
    assert np.asarray(algorithm.policy(state, o))[:, 2].max() <= 1
    pi = state.actor_critic.net.policy(o)
    probability = np.exp(jax.nn.log_softmax(np.float64(pi.logits[:, 2, :2])))  # of the two that there are
    np.testing.assert_allclose(np.exp(extras.log_prob[:, 2]), probability[np.arange(2_000), action[:, 2]], rtol=1e-4)
    entropy = -(probability * np.log(probability)).sum(-1)
    np.testing.assert_allclose(pi.entropy()[:, 2], entropy, rtol=1e-4)


def random_minibatch(spec, seed=0, algorithm=None):
    """-> a state, and a minibatch of a policy that was near; every third (sample, agent) was not there."""
    generator = np.random.default_rng(seed)
    algorithm = algorithm or MAPPO(hidden=(8,))
    state, old = state_of(algorithm, spec), state_of(algorithm, spec, jax.random.PRNGKey(1))
    o = observations_of(spec, B)
    action, _, extras = jax.jit(algorithm.act)(old, (), o, KEY)
    count = spec.agents.count
    advantage, value, target = jnp.asarray(generator.normal(size=(3, B, count)), jnp.float32)
    active = jnp.asarray((np.arange(B * count).reshape(B, count) % 5) != 0, jnp.float32)
    return state, Minibatch(o, action, extras, advantage, value, target, active)


def gradient_of(algorithm, state, batch):
    def gradient(state, batch):
        return algorithm.gradient(state, algorithm.prepared(batch, algorithm.moments(batch)))

    return jax.jit(gradient)(state, batch)


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_that_an_action_does_not_have_change_nothing(seed):
    """Of continuous actions: neither the ratio nor any gradient; nor do their own parameters learn."""
    algorithm = MAPPO(hidden=(8,), entropy_coefficient=0.1, sharing="none")
    state, batch = random_minibatch(CONTINUOUS, seed, algorithm)
    allowed = CONTINUOUS.agents.allowed
    noise = jax.random.normal(jax.random.PRNGKey(2), batch.action.shape)
    old = state_of(algorithm, CONTINUOUS, jax.random.PRNGKey(1)).actor_critic.net.policy(batch.observation)
    gradients = []
    for action in (batch.action, jnp.where(allowed, batch.action, noise)):
        changed = batch._replace(action=action, extras=Acted(old.log_prob(action), ()))
        gradients.append(gradient_of(algorithm, state, changed)[0])
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert np.abs(gradients[0]).max() > 1e-3
    gradient = Vector(gradients[0], state.actor_critic.structure).net
    np.testing.assert_array_equal(np.asarray(gradient.log_std) != 0, allowed)
    assert not np.array_equal(batch.action, jnp.where(allowed, batch.action, noise))


# -------------------------------------------------------------------------------------------------------- who is there


@pytest.mark.parametrize("settings", [{}, {"normalize_advantage": False, "clip_value": True}, {"sharing": "none"}])
def test_who_is_not_there_does_not_count(settings):
    """(MAPPO.5): what is computed of those agents changes neither the gradient nor the metrics."""
    algorithm = MAPPO(hidden=(8,), entropy_coefficient=0.1, centralised=False, **settings)
    state, batch = random_minibatch(ALIKE, algorithm=algorithm)
    gone = batch.active == 0
    assert 0 < gone.sum() < gone.size / 2

    def spoiled(x, key):
        return jnp.where(gone.reshape(gone.shape + (1,) * (x.ndim - 2)), jax.random.normal(key, x.shape), x)

    keys = jax.random.split(KEY, 6)
    perturbed = batch._replace(
        observation=spoiled(batch.observation, keys[0]),
        action=jnp.where(gone, 3 - batch.action, batch.action),
        extras=Acted(spoiled(batch.extras.log_prob, keys[1]), ()),
        advantage=spoiled(batch.advantage, keys[2]),
        value=spoiled(batch.value, keys[3]),
        target=spoiled(batch.target, keys[4]),
    )
    (gradient, metrics), (other, other_metrics) = (gradient_of(algorithm, state, x) for x in (batch, perturbed))
    np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-7)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), metrics, other_metrics)
    # Whoever is there does count.
    here = batch._replace(advantage=batch.advantage + 0.5 * batch.active * jax.random.normal(keys[5], gone.shape))
    assert np.abs(gradient_of(algorithm, state, here)[0] - gradient).max() > 1e-3


def test_loss_is_the_mean_over_those_that_are_there():
    algorithm = MAPPO(hidden=(8,), entropy_coefficient=0.1, normalize_value="none", normalize_advantage=False)
    state, batch = random_minibatch(ALIKE, algorithm=algorithm)
    net, there = state.actor_critic.net, np.asarray(batch.active, bool)
    pi = net.policy(batch.observation)
    ratio = np.exp(np.float64(pi.log_prob(batch.action)) - np.float64(batch.extras.log_prob))[there]
    advantage = np.float64(batch.advantage)[there]
    objective = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean()
    value_loss = np.square(np.float64(net.value(batch.observation) - batch.target))[there].mean()
    entropy = np.float64(pi.entropy())[there].mean()
    loss, metrics = jax.jit(algorithm.loss)(net, batch, state)
    np.testing.assert_allclose(loss, -objective + 0.5 * value_loss - 0.1 * entropy, rtol=1e-4)
    for name, value in {"objective": objective, "value_loss": value_loss, "entropy": entropy}.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_advantages_are_normalised_for_each_agent():
    """To mean 0 and standard deviation 1 over the samples where it was there."""
    algorithm = MAPPO(hidden=(8,))
    _, batch = random_minibatch(ALIKE)
    batch = batch._replace(advantage=batch.advantage * jnp.array([1.0, 10.0, 100.0]) + jnp.array([0.0, -5.0, 300.0]))
    moments = algorithm.moments(batch)
    prepared = np.float64(algorithm.prepared(batch, moments).advantage)
    for i in range(3):
        there = np.asarray(batch.active[:, i], bool)
        own = np.float64(batch.advantage[:, i])[there]
        np.testing.assert_allclose(moments.mean[i], own.mean(), rtol=1e-4)
        np.testing.assert_allclose(moments.variance[i], own.var(), rtol=1e-3)
        np.testing.assert_allclose(prepared[there, i], (own - own.mean()) / own.std(), rtol=1e-3, atol=1e-4)


def test_advantages_are_each_agents_own():
    """(MAPPO.2): from its own rewards; they end with its own task, not with that of others."""
    algorithm = MAPPO(hidden=(8,), normalize_value="none", discount=0.9, gae_lambda=0.8)
    state = state_of(algorithm, ALIKE)
    o = observations_of(ALIKE, T + 1, N)
    reward = np.random.default_rng(0).normal(size=(T, N, 3)).astype(np.float32)
    terminated, never = np.zeros((2, T, N, 3), bool)
    terminated[2:, :, 1] = True  # agent 1 leaves after step 2
    action, _, extras = algorithm.act(state, (), o[:T], KEY)
    active = ~never
    active[3:, :, 1] = False
    rollout = jax.tree.map(jnp.asarray, Transition(o[:T], action, reward, o[1:], terminated, never, extras, active))
    batch = jax.jit(algorithm.assess)(state, rollout)
    value = np.float64(algorithm.value(state, o))
    for i in range(3):
        last = 3 if i == 1 else T
        for n in range(N):
            expected, following = np.zeros(last), 0.0
            for t in reversed(range(last)):
                more = 0.0 if i == 1 and t == 2 else 1.0
                delta = reward[t, n, i] + 0.9 * more * value[t + 1, n, i] - value[t, n, i]
                following = delta + 0.9 * 0.8 * more * following
                expected[t] = following
            np.testing.assert_allclose(batch.advantage[:last, n, i], expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(batch.target[:last, n, i], expected + value[:last, n, i], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.active, active)


# --------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("decay", [0.99999, 0.9])
def test_scale_is_the_weighted_moments_of_all_targets(decay):
    """(MAPPO.3) against float64, from the first batch on."""
    generator = np.random.default_rng(0)
    scale, batches = Scale.start(2), []
    np.testing.assert_array_equal(scale.moments, [[0.0, 0.0], [1.0, 1.0]])
    observe = jax.jit(lambda scale, x: scale.observe(x.mean(0), jnp.square(x).mean(0), decay))
    for t in range(20):
        batches.append(generator.normal(loc=(3.0 + t, -20.0), scale=(0.5, 4.0), size=(64, 2)))
        scale = observe(scale, jnp.float32(batches[-1]))
        weight = decay ** np.arange(t, -1, -1)
        weight /= weight.sum()
        mean = sum(w * x.mean(0) for w, x in zip(weight, batches, strict=True))
        square = sum(w * np.square(x).mean(0) for w, x in zip(weight, batches, strict=True))
        found = scale.moments
        np.testing.assert_allclose(found[0], mean, rtol=1e-4)
        np.testing.assert_allclose(found[1], np.sqrt(square - mean**2), rtol=1e-3)


def test_scale_of_targets_that_are_all_alike():
    """Nothing is divided by 0."""
    scale = Scale.start(1).observe(jnp.array([2.0]), jnp.array([4.0]), 0.5)
    np.testing.assert_allclose(scale.moments, [[2.0], [0.1]])


@pytest.mark.parametrize("sharing", ["kind", "none"])
def test_popart_changes_no_value(sharing):
    """(MAPPO.4): μ and σ move, V does not."""
    algorithm = MAPPO(hidden=(8,), sharing=sharing)
    state = state_of(algorithm, UNEQUAL)
    count = max(state.actor_critic.net.critic.of) + 1
    state = state._replace(scale=Scale.start(count).observe(jnp.arange(1.0, count + 1), jnp.full(count, 30.0), 0.9))
    o = observations_of(UNEQUAL, B)
    before = algorithm.value(state, o)
    new = state.scale.observe(jnp.full(count, 40.0), jnp.arange(count) * 100.0 + 2_000.0, 0.7)
    after = rescaled(state._replace(scale=new), state.scale)
    np.testing.assert_allclose(algorithm.value(after, o), before, rtol=1e-5, atol=1e-5)
    assert np.all(np.abs(np.array(new.moments) - np.array(state.scale.moments)) > 0.5)
    without = algorithm.value(state._replace(scale=new), o)
    assert np.abs(without - before).max() > 1.0


@pytest.mark.parametrize("kind, moves", [("popart", False), ("running", True)])
def test_apply_with_no_gradient(kind, moves):
    """The scale follows the targets; without PopArt values move with it, with it only by the first scale."""
    algorithm = MAPPO(hidden=(8,), normalize_value=kind, value_decay=0.0)
    state, batch = random_minibatch(ALIKE, algorithm=algorithm)
    apply = jax.jit(algorithm.apply)
    gradient, metrics = gradient_of(algorithm, state, batch)
    still = jnp.zeros_like(gradient)
    first = apply(state, still, metrics)
    np.testing.assert_allclose(first.actor_critic.parameters, state.actor_critic.parameters, rtol=1e-6)
    batch, state = batch._replace(target=10 + 3 * batch.target), first
    gradient, metrics = gradient_of(algorithm, state, batch)
    after = apply(state, still, metrics)
    there = np.asarray(batch.active, bool)
    targets = np.float64(batch.target)[there]
    np.testing.assert_allclose(after.scale.moments[0], [targets.mean()], rtol=1e-4)
    np.testing.assert_allclose(after.scale.moments[1], [targets.std()], rtol=1e-3)
    change = algorithm.value(after, batch.observation) - algorithm.value(state, batch.observation)
    assert np.abs(change).min() > 1.0 if moves else np.abs(change).max() < 1e-4


def test_value_loss_is_in_units_of_the_scale():
    """(MAPPO.3): what the network says is compared with (target - μ)/σ."""
    algorithm = MAPPO(hidden=(8,))
    state, batch = random_minibatch(ALIKE, algorithm=algorithm)
    state = state._replace(scale=Scale.start(1).observe(jnp.array([5.0]), jnp.array([34.0]), 0.9))  # μ 5, σ 3
    net, there = state.actor_critic.net, np.asarray(batch.active, bool)
    error = np.float64(net.value(batch.observation)) - (np.float64(batch.target) - 5) / 3
    _, metrics = jax.jit(algorithm.loss)(net, batch, state)
    np.testing.assert_allclose(metrics["value_loss"], np.square(error)[there].mean(), rtol=1e-4)
    said = algorithm.value(state, batch.observation)
    np.testing.assert_allclose(said, 5 + 3 * net.value(batch.observation), rtol=1e-5)


def test_scale_is_of_those_that_are_there():
    """One that was gone throughout does not pull its network's scale to 0, nor does one that has a network alone."""
    net = SimpleNamespace(critic=SimpleNamespace(of=(0, 1, 0, 2)))
    x = jnp.array([[1.0, 7.0, 3.0, 9.0], [2.0, 5.0, 4.0, 9.0]])
    active = jnp.array([[True, True, False, False], [True, False, False, False]])
    found = by_network(net, x, active, jnp.array([-1.0, -2.0, -3.0]))
    np.testing.assert_allclose(found, [1.5, 7.0, -3.0])
    np.testing.assert_allclose(by_network(net, x, jnp.ones((2, 4), bool), jnp.zeros(3)), [2.5, 6.0, 9.0])


# --------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shared_trunk": True}, "shared_trunk is not known to MAPPO; leave it out"),
        ({"state_dependent_std": True}, "state_dependent_std is not known to MAPPO"),
        ({"gsde_interval": 4}, "gsde_interval is not known to MAPPO"),
        ({"value_decay": 1.5}, "value_decay is 1.5; it must be from 0 to 1"),
        ({"minibatches": 3, "rollout_length": 4}, "does not divide into 3 minibatches"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=message):
        MAPPO(**settings).check(ALIKE)


def test_one_agent_is_not_many():
    alone = Spec(box(3), spaces.Discrete(2), N, 1_000)
    with pytest.raises(UsageError, match=r"^MAPPO is for several agents, this environment has one; use PPO, "):
        MAPPO().check(alone)
    with pytest.raises(UsageError, match=r"^PPO acts for one agent, this environment has 3; use MAPPO or MADDPG$"):
        PPO().check(ALIKE)
    MAPPO().check(replace(ALIKE, total_steps=10))
