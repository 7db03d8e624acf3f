"""Memories against the cells' equations in NumPy, sequences against steps by hand; what a memory is for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from probes import train
from scipy import special
from test_returns import advantages_by_definition

import zhixing as zx
from zhixing.algorithms.ppo import PPO, Minibatch
from zhixing.algorithms.recurrent_ppo import RecurrentPPO
from zhixing.core import Spec, Transition
from zhixing.errors import UsageError

KEY = jax.random.PRNGKey(0)
T, N, SIZE = 6, 4, 5
SPEC = Spec(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(3), N, 1_000)


def numpy_step(cell, memory, x):
    """One step of Equinox's cells in float64; the order of the gates is theirs. Cho et al. 2014; Hochreiter 1997."""
    weight_i, weight_h = np.float64(cell.weight_ih), np.float64(cell.weight_hh)
    bias = np.float64(cell.bias)
    if isinstance(memory, tuple):
        h, c = memory
        i, f, g, o = np.split(x @ weight_i.T + h @ weight_h.T + bias, 4, -1)
        c = special.expit(f) * c + special.expit(i) * np.tanh(g)
        return special.expit(o) * np.tanh(c), c
    from_x, from_h = np.split(x @ weight_i.T + bias, 3, -1), np.split(memory @ weight_h.T, 3, -1)
    reset, update = (special.expit(a + b) for a, b in zip(from_x[:2], from_h[:2], strict=True))
    new = np.tanh(from_x[2] + reset * (from_h[2] + np.float64(cell.bias_n)))
    return new + update * (memory - new)


def make(cell="gru", **settings):
    algorithm = RecurrentPPO(hidden=(8,), cell=cell, memory_size=SIZE, rollout_length=T, minibatches=2, **settings)
    state = algorithm.init(KEY, SPEC)
    noise = 0.3 * jax.random.normal(KEY, state.actor_critic.parameters.shape)
    learned = state.actor_critic
    return algorithm, state._replace(
        actor_critic=jax.tree.map(lambda x: x + noise if x.shape == noise.shape else x, learned)
    )


def collected(algorithm, state, seed=0):
    """A rollout as the driver makes it: the memory goes along, and is empty after each end."""
    generator = np.random.default_rng(seed)
    observation, next_observation = generator.normal(size=(2, T, N, 3)).astype(np.float32)
    terminated = generator.random((T, N)) < 0.2
    truncated = (generator.random((T, N)) < 0.2) & ~terminated
    carry, steps = algorithm.carry(SPEC, KEY), []
    carry = carry._replace(memory=jax.tree.map(lambda x: x + 0.5, carry.memory))  # an episode is under way
    for t in range(T):
        action, carry, extras = algorithm.act(state, carry, jnp.asarray(observation[t]), jax.random.fold_in(KEY, t))
        steps.append((action, extras))
        ended = jnp.asarray(terminated[t] | truncated[t])[:, None]
        carry = carry._replace(memory=jax.tree.map(lambda x, e=ended: jnp.where(e, 0.0, x), carry.memory))
    action, extras = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    reward = generator.normal(size=(T, N)).astype(np.float32)
    rollout = Transition(observation, action, reward, next_observation, terminated, truncated, extras)
    return jax.tree.map(jnp.asarray, rollout)


def by_hand(net, rollout):
    """What the actor-critic sees at each step and at each true successor, step by step in float64: [T, N, h]."""
    memory = jax.tree.map(lambda x: np.float64(x[0]), rollout.extras.memory)
    first = lambda memory: memory[0] if isinstance(memory, tuple) else memory  # noqa: E731
    seen, next_seen = [], []
    for t in range(T):
        memory = numpy_step(net.cell, memory, np.float64(rollout.observation[t]))
        seen.append(first(memory))
        next_seen.append(first(numpy_step(net.cell, memory, np.float64(rollout.next_observation[t]))))
        going_on = ~np.asarray(rollout.ended[t])[:, None]
        memory = jax.tree.map(lambda x, g=going_on: x * g, memory)
    return np.stack(seen), np.stack(next_seen)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_assess(cell):
    """(M.1), (M.2), and the advantages by definition."""
    algorithm, state = make(cell, discount=0.9)
    rollout, net = collected(algorithm, state), state.actor_critic.net
    seen, next_seen = by_hand(net, rollout)
    value = np.float64(net.actor_critic.value(jnp.float32(seen)))
    next_value = np.float64(net.actor_critic.value(jnp.float32(next_seen)))
    arguments = map(np.asarray, (rollout.reward, value, next_value, rollout.terminated, rollout.truncated))
    advantage = advantages_by_definition(*arguments, 0.9, algorithm.gae_lambda)
    found = algorithm.assess(state, rollout)
    np.testing.assert_allclose(found.value, value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.advantage, advantage, rtol=1e-3, atol=1e-4)
    # The actor had the same memories, and the probabilities are those of what it saw.
    log_prob = net.actor_critic.policy(jnp.float32(seen)).log_prob(rollout.action)
    np.testing.assert_allclose(rollout.extras.acted.log_prob, log_prob, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("length", [None, 2])
def test_loss(cell, length):
    """(M.3): PPO's loss of what is seen, each sequence unrolled from the memory that the actor had at its start."""
    algorithm, state = make(cell, sequence_length=length)
    rollout, net = collected(algorithm, state), state.actor_critic.net
    sequences = algorithm.assess(state, rollout)
    assert sequences.ended.shape == ((T, N) if length is None else (2, T // 2 * N))
    seen, _ = by_hand(net, rollout)
    flat = (
        algorithm.assess(state, rollout)
        if length is None
        else replace(algorithm, sequence_length=None).assess(state, rollout)
    )
    batch = Minibatch(jnp.float32(seen), *flat[1:7])
    expected, metrics = PPO.loss(algorithm, net.actor_critic, batch, state)
    loss, found = algorithm.loss(net, sequences, state)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["entropy"], metrics["entropy"], rtol=1e-4)
    gradient = jax.grad(lambda net: algorithm.loss(net, sequences, state)[0])(net)
    assert np.abs(gradient.cell.weight_hh).max() > 1e-5


def test_gradients_flow_back_within_a_sequence_only():
    """The first observation of a sequence moves what is seen at its last step, but not across an episode's end."""
    _algorithm, state = make()
    net = state.actor_critic.net
    memory, observation = jnp.zeros((1, SIZE)), jnp.ones((4, 1, 3))

    def last(observation, ended):
        return net.unroll(memory, observation, ended)[1][-1].sum()

    through = jax.grad(last)(observation, jnp.zeros((4, 1), bool))
    cut = jax.grad(last)(observation, jnp.zeros((4, 1), bool).at[1].set(True))
    assert np.all(np.abs(through).max((1, 2)) > 0)
    np.testing.assert_array_equal(np.abs(cut).max((1, 2)) > 0, [False, False, True, True])


def test_shuffle():
    """(M.4): in each epoch every sequence once, whole and in its order, with its memory."""
    algorithm, state = make(sequence_length=3, epochs=3)
    rollout = collected(algorithm, state)
    sequences = algorithm.assess(state, rollout)
    numbers = jnp.arange(3 * 8).reshape(3, 8)  # [L, sequences]
    pieces = algorithm.shuffle(sequences._replace(advantage=numbers, memory=10.0 * jnp.arange(8)), KEY)
    assert pieces.advantage.shape == (6, 3, 4)
    for epoch in np.asarray(pieces.advantage).reshape(3, 2, 3, 4):
        assert len(np.unique(epoch)) == 24
    np.testing.assert_array_equal(pieces.advantage % 8, np.broadcast_to(pieces.memory[:, None] / 10, (6, 3, 4)))
    np.testing.assert_array_equal(pieces.advantage // 8, np.broadcast_to(np.arange(3)[:, None], (6, 3, 4)))


def test_only_a_memory_solves_the_t_maze():
    """Greedy returns: 1 with a memory, about 0 without, whatever the number of steps."""
    common = {"rollout_length": 64, "learning_rate": 3e-3, "entropy_coefficient": 0.01, "discount": 0.99}
    environment = zx.make("zhixing/TMaze-v0")
    table = environment.environment
    returns = {}
    for algorithm in (RecurrentPPO(memory_size=16, hidden=(16,), minibatches=1, **common), PPO(hidden=(16,), **common)):
        run = train(algorithm, environment, 40_000)
        learner = jax.tree.map(lambda x: x[0] if x.ndim else x, run.learner)
        spec = Spec(environment.observation_space, environment.action_space, 2, 1)
        states, carry, total = np.array(table.start_states), algorithm.carry(spec, KEY), np.zeros(2)
        for _ in range(table.LENGTH + 1):
            action, carry = algorithm.play(learner, carry, jnp.asarray(table.observations[states]))
            place = states, np.asarray(action), 0
            total, states = total + table.rewards[place], table.successors[place]
        returns[type(algorithm).__name__] = total.mean()
    assert returns == {"RecurrentPPO": 1.0, "PPO": 0.0}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"memory_size": 0}, "memory_size"),
        ({"sequence_length": 4}, "does not divide into sequences of 4"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"minibatches": 3}, "4 sequences does not divide into 3 minibatches"),
    ],
)
def test_check(settings, message):
    with pytest.raises(UsageError, match=message):
        RecurrentPPO(**{"rollout_length": T, "minibatches": 2} | settings).check(SPEC)
