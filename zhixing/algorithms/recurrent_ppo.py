"""PPO with a memory: for tasks whose observation does not say all that matters.

PPO is in ppo.py; here is only what a memory changes. m is what a GRU or an LSTM remembers of the episode; policy and
value see it in the place of the observation.

    (M.1)  mₜ = cell(mₜ₋₁, sₜ), empty at the start of each episode;   π(·|mₜ), V(mₜ)
    (M.2)  V of the true successor: V(cell(mₜ, sₜ₊₁))
    (M.3)  the rollout is cut into sequences of L steps; each is unrolled anew with the present parameters, from the
           memory that the actor had at its first step; gradients flow back through its L steps
    (M.4)  a minibatch is a number of whole sequences

Hausknecht & Stone, "Deep recurrent Q-learning for partially observable MDPs", arXiv:1507.06527, section 4 (M.3, from
the memory that the actor had: Kapturowski et al., "Recurrent experience replay", ICLR 2019, section 3).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zhixing.algorithms.ppo import PPO, Acted, Minibatch, State, random_orders
from zhixing.core import Spec, Transition, hyperparameters, require_positive
from zhixing.errors import UsageError
from zhixing.networks import ActorCritic
from zhixing.recurrent import Cell, RecurrentActorCritic, empty, remembered_spec
from zhixing.returns import generalized_advantages


class Carry(NamedTuple):
    memory: Any  # [N, h], m of the step before
    noise: Any  # the actor-critic's own, for gSDE


class Extras(NamedTuple):
    acted: Acted
    memory: Any  # [T, N, h], m of the step before


class Sequences(NamedTuple):
    """A `Minibatch` of sequences [L, B, ...], its observations still to be remembered, and:"""

    observation: Any
    action: jax.Array
    extras: Acted
    advantage: jax.Array
    value: jax.Array
    target: jax.Array
    active: Any
    ended: jax.Array  # [L, B]
    memory: Any  # [B, h], m before the first step


@hyperparameters
class RecurrentPPO(PPO):
    """Proximal policy optimisation with a recurrent memory."""

    cell: Cell = "gru"
    memory_size: int = 64  # h
    sequence_length: int | None = None  # L; None: the whole rollout

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "memory_size")
        if self.sequence_length is not None:
            require_positive(self, "sequence_length")
            if self.rollout_length % self.sequence_length:
                raise UsageError(
                    f"algorithm.rollout_length {self.rollout_length} does not divide into sequences of "
                    f"{self.sequence_length}; change algorithm.sequence_length"
                )
        sequences = self.rollout_length // (self.sequence_length or self.rollout_length) * spec.num_environments
        if sequences % self.minibatches:
            raise UsageError(
                f"a rollout of {sequences} sequences does not divide into {self.minibatches} minibatches; change "
                "algorithm.minibatches, algorithm.sequence_length or num_environments"
            )

    def init(self, key: jax.Array, spec: Spec) -> State:
        return self.start(RecurrentActorCritic.create(key, spec, self, self.cell, self.memory_size), spec)

    def carry(self, spec: Spec, key: jax.Array) -> Carry:
        noise = ActorCritic.carry(key, remembered_spec(spec, self.memory_size), self)
        return Carry(empty(self.cell, self.memory_size, spec.num_environments), noise)

    def act(self, state: State, carry: Carry, observation: Any, key: jax.Array):
        net = state.actor_critic.net
        memory, seen = net.step(carry.memory, observation)  # (M.1)
        action, noise, pi = net.actor_critic.act(carry.noise, seen, key)
        acted = Acted(pi.log_prob(action), () if self.kl_penalty is None else pi)
        return action, Carry(memory, noise), Extras(acted, carry.memory)

    def assess(self, state: State, rollout: Transition) -> Sequences:  # type: ignore[override]
        net, extras, ended = state.actor_critic.net, rollout.extras, rollout.ended
        memories, seen = net.unroll(jax.tree.map(lambda x: x[0], extras.memory), rollout.observation, ended)
        _, next_seen = net.step(memories, rollout.next_observation)  # (M.2)
        value, next_value = self.worth(state, seen), self.worth(state, next_seen)
        discount = self.discount * rollout.bootstrap
        advantage = generalized_advantages(rollout.reward, discount, ended, value, next_value, self.gae_lambda)
        given = rollout.observation, rollout.action, extras.acted
        batch = Minibatch(*given, advantage, value, advantage + value, rollout.active)

        # (M.3): [T, N] -> [L, sequences]. A rollout that L does not divide, the last of a run, is one sequence.
        steps = len(ended)
        length = steps if self.sequence_length is None or steps % self.sequence_length else self.sequence_length

        def cut(x: jax.Array) -> jax.Array:
            pieces = x.reshape(steps // length, length, *x.shape[1:])
            return jnp.swapaxes(pieces, 0, 1).reshape(length, -1, *x.shape[2:])

        sequences: Sequences = jax.tree.map(cut, Sequences(*batch, ended, extras.memory))
        return sequences._replace(memory=jax.tree.map(lambda x: x[0], sequences.memory))

    def shuffle(self, sequences: Sequences, key: jax.Array) -> Sequences:  # type: ignore[override]
        count = sequences.ended.shape[1]
        minibatches = min(self.minibatches, count)
        size = count // minibatches
        order = random_orders(key, self.epochs, count)[:, : size * minibatches].reshape(-1, size)

        def choose(x: jax.Array) -> jax.Array:  # [L, sequences, ...] -> [K M, L, B, ...]
            return jnp.swapaxes(x[:, order], 0, 1)

        memory = jax.tree.map(lambda x: x[order], sequences.memory)
        return jax.tree.map(choose, sequences._replace(memory=()))._replace(memory=memory)  # (M.4)

    def loss(self, net: RecurrentActorCritic, sequences: Sequences, state: State):  # type: ignore[override]
        _, seen = net.unroll(sequences.memory, sequences.observation, sequences.ended)
        batch = Minibatch(seen, *sequences[1:7])
        return super().loss(net.actor_critic, batch, state)

    def play(self, state: State, carry: Carry, observation: Any) -> tuple[Any, Carry]:
        net = state.actor_critic.net
        memory, seen = net.step(carry.memory, observation)
        return net.actor_critic.policy(seen).mode, carry._replace(memory=memory)

    def policy(self, state: State, observation: Any) -> Any:
        """The greedy action at the start of an episode."""
        return state.actor_critic.net.actor_critic.policy(self.first_seen(state, observation)).mode

    def value(self, state: State, observation: Any) -> jax.Array:
        """V at the start of an episode."""
        return self.worth(state, self.first_seen(state, observation))

    def worth(self, state: State, seen: Any) -> jax.Array:
        """V of what is seen through the memory."""
        return state.actor_critic.net.actor_critic.value(seen)

    def first_seen(self, state: State, observation: Any) -> Any:
        net = state.actor_critic.net
        leading = net.encoder(observation).shape[:-1]
        return net.step(empty(self.cell, self.memory_size, *leading), observation)[1]
