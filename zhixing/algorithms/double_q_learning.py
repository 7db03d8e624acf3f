"""Double Q-learning.

Van Hasselt, "Double Q-learning", NeurIPS 2010, Algorithm 1; Sutton & Barto, "Reinforcement learning", 2nd ed.,
section 6.7.

    (DQL.1)  A from S by ε-greedy in Q₁ + Q₂, or softmax in their mean
    (DQL.2)  take A, observe R, S'
    (DQL.3)  a fair coin says which of the two is i, updated, and which j
    (DQL.4)  δ = R                                     if S' is terminal
             δ = R + γ Qⱼ(S', argmaxₐ Qᵢ(S', a))       otherwise,  minus Qᵢ(S, A)
    (DQL.5)  Qᵢ(S, A) ← Qᵢ(S, A) + α δ
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from zhixing import exploration
from zhixing.core import DISCRETE, ActionSpaces, Clock, Online, Spec, Transition, hyperparameters
from zhixing.exploration import Exploration
from zhixing.tables import check_table_settings, step_size


class State(NamedTuple):
    tables: jax.Array  # [2, states, actions], Q₁ and Q₂
    visits: jax.Array  # [2, states, actions] int32, how often each entry was updated
    clock: Clock

    @property
    def q(self) -> jax.Array:
        """[states, actions], the mean of the two."""
        return self.tables.mean(-3)


@hyperparameters
class DoubleQLearning(Online):
    """Double Q-learning on two tables."""

    action_spaces: ClassVar[ActionSpaces] = DISCRETE

    learning_rate: float = 0.1  # α
    learning_rate_decay: float = 0.0  # ω: the n-th update of an entry has α n^-ω; 0 keeps α constant
    discount: float = 0.99  # γ
    exploration: Exploration = "epsilon"
    epsilon_start: float = 0.1  # ε at the start
    epsilon_end: float = 0.1  # ε after annealing
    epsilon_fraction: float = 1.0  # the part of the run over which ε goes from start to end
    temperature: float = 1.0  # of softmax exploration
    initial_value: float = 0.0  # Q before any update; above what can be had, it makes the agent try everything

    def check(self, spec: Spec) -> None:
        super().check(spec)
        check_table_settings(self, spec, instead="DQN")

    def init(self, key: jax.Array, spec: Spec) -> State:
        shape = (2, spec.num_states, spec.num_actions)
        return State(jnp.full(shape, self.initial_value), jnp.zeros(shape, jnp.int32), Clock.start(spec))

    def act(self, state: State, carry: tuple, observation: jax.Array, key: jax.Array):  # (DQL.1)
        pi = exploration.behaviour(self, self.mean(state, observation), state.clock.progress)
        return exploration.sample(key, pi), carry, ()

    def update(self, state: State, episode: tuple, transition: Transition, key: jax.Array):
        i = jax.random.bernoulli(key).astype(jnp.int32)  # (DQL.3)
        j = 1 - i
        s, a, successor = transition.observation, transition.action, transition.next_observation
        best = state.tables[i, successor].argmax()
        target = transition.reward + self.discount * transition.bootstrap * state.tables[j, successor, best]
        td_error = target - state.tables[i, s, a]  # (DQL.4)

        visits = state.visits.at[i, s, a].add(1)
        alpha = step_size(self.learning_rate, self.learning_rate_decay, visits[i, s, a])
        tables = state.tables.at[i, s, a].add(alpha * td_error)  # (DQL.5)

        metrics = {"td_error": jnp.abs(td_error), "q": tables[i, s, a], "step_size": alpha}
        return State(tables, visits, state.clock), episode, metrics

    def mean(self, state: State, observation: jax.Array) -> jax.Array:
        """[..., actions], of the two tables at `observation` [...]."""
        return state.tables[:, observation].mean(0)

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        return self.mean(state, observation).argmax(-1).astype(jnp.int32)

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        return self.mean(state, observation).max(-1)
