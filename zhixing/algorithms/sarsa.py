"""Sarsa.

Rummery & Niranjan, "On-line Q-learning using connectionist systems", 1994; Sutton & Barto, "Reinforcement learning",
2nd ed., section 6.4.

    (S.1)  A' from S' by the behaviour policy: ε-greedy in Q, or softmax
    (S.2)  take A, observe R, S'
    (S.3)  δ = R                              if S' is terminal
           δ = R + γ Q(S', A')                otherwise,  minus Q(S, A)
    (S.4)  Q(S, A) ← Q(S, A) + α δ

A' is the action that is really taken next, so that a step waits for the one after it. Where a time limit cuts the
episode no action follows, and A' is drawn at the true successor.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from zhixing import exploration
from zhixing.core import DISCRETE, ActionSpaces, Online, Spec, Transition, hyperparameters
from zhixing.exploration import Exploration
from zhixing.tables import Table, check_table_settings, step_size


class Waiting(NamedTuple):
    """The last step, whose A' is not known yet."""

    observation: jax.Array  # [] int32
    action: jax.Array  # [] int32
    reward: jax.Array  # []
    there: jax.Array  # [] bool, false at an episode's start


@hyperparameters
class Sarsa(Online):
    """Sarsa on a table."""

    action_spaces: ClassVar[ActionSpaces] = DISCRETE

    learning_rate: float = 0.1  # α
    learning_rate_decay: float = 0.0  # ω: the n-th update of a pair has α n^-ω; 0 keeps α constant
    discount: float = 0.99  # γ
    exploration: Exploration = "epsilon"
    epsilon_start: float = 0.1  # ε at the start
    epsilon_end: float = 0.1  # ε after annealing
    epsilon_fraction: float = 1.0  # the part of the run over which ε goes from start to end
    temperature: float = 1.0  # of softmax exploration
    initial_value: float = 0.0  # Q before any update; above what can be had, it makes the agent try everything

    def check(self, spec: Spec) -> None:
        super().check(spec)
        check_table_settings(self, spec, instead="sarsa_lambda")

    def init(self, key: jax.Array, spec: Spec) -> Table:
        return Table.create(spec, self.initial_value)

    def episode(self, spec: Spec) -> Waiting:
        return Waiting(jnp.int32(0), jnp.int32(0), jnp.float32(0.0), jnp.bool_(False))

    def act(self, state: Table, carry: tuple, observation: jax.Array, key: jax.Array):  # (S.1)
        pi = exploration.behaviour(self, state.q[observation], state.clock.progress)
        return exploration.sample(key, pi), carry, ()

    def update(self, state: Table, episode: Waiting, transition: Transition, key: jax.Array):
        s, a = transition.observation, transition.action
        target = episode.reward + self.discount * state.q[s, a]
        state, before = self.correct(state, episode.observation, episode.action, target, episode.there)

        # The last step of an episode waits for nothing.
        next_q = state.q[transition.next_observation]
        next_action = exploration.sample(key, exploration.behaviour(self, next_q, state.clock.progress))
        target = transition.reward + self.discount * transition.bootstrap * next_q[next_action]
        state, last = self.correct(state, s, a, target, transition.ended)

        # No update at an episode's first step, two at its last: a sum, so that the mean over steps is that of updates.
        metrics = jax.tree.map(jnp.add, before, last)
        return state, Waiting(s, a, transition.reward, jnp.bool_(True)), metrics

    def correct(self, state: Table, s: jax.Array, a: jax.Array, target: jax.Array, due: jax.Array):
        """Q(s, a) a step towards `target`, where the update is due."""
        q, n = state.q[s, a], state.visits[s, a] + due
        td_error = target - q  # (S.3)
        alpha = jnp.where(due, step_size(self.learning_rate, self.learning_rate_decay, n), 0.0)
        q = q + alpha * td_error  # (S.4)
        state = Table(state.q.at[s, a].set(q), state.visits.at[s, a].set(n), state.clock)
        return state, {"td_error": due * jnp.abs(td_error), "q": due * q, "step_size": alpha}

    def policy(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].argmax(-1).astype(jnp.int32)

    def value(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].max(-1)
