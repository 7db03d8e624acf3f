"""Expected Sarsa.

Van Seijen et al., "A theoretical and empirical analysis of Expected Sarsa", ADPRL 2009; Sutton & Barto,
"Reinforcement learning", 2nd ed., section 6.6.

    (ES.1)  A from S by the behaviour policy π: ε-greedy in Q, or softmax
    (ES.2)  take A, observe R, S'
    (ES.3)  δ = R                              if S' is terminal
            δ = R + γ Σₐ π(a | S') Q(S', a)    otherwise,  minus Q(S, A)
    (ES.4)  Q(S, A) ← Q(S, A) + α δ
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from zhixing import exploration
from zhixing.core import DISCRETE, ActionSpaces, Online, Spec, Transition, hyperparameters
from zhixing.exploration import Exploration
from zhixing.tables import Table, check_table_settings, step_size


@hyperparameters
class ExpectedSarsa(Online):
    """Expected Sarsa on a table."""

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
        check_table_settings(self, spec, instead="DQN")

    def init(self, key: jax.Array, spec: Spec) -> Table:
        return Table.create(spec, self.initial_value)

    def act(self, state: Table, carry: tuple, observation: jax.Array, key: jax.Array):  # (ES.1)
        pi = exploration.behaviour(self, state.q[observation], state.clock.progress)
        return exploration.sample(key, pi), carry, ()

    def update(self, state: Table, episode: tuple, transition: Transition, key: jax.Array):
        s, a, next_q = transition.observation, transition.action, state.q[transition.next_observation]
        next_value = (exploration.behaviour(self, next_q, state.clock.progress) * next_q).sum()
        target = transition.reward + self.discount * transition.bootstrap * next_value
        td_error = target - state.q[s, a]  # (ES.3)

        visits = state.visits.at[s, a].add(1)
        alpha = step_size(self.learning_rate, self.learning_rate_decay, visits[s, a])
        q = state.q.at[s, a].add(alpha * td_error)  # (ES.4)

        metrics = {"td_error": jnp.abs(td_error), "q": q[s, a], "step_size": alpha}
        return Table(q, visits, state.clock), episode, metrics

    def policy(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].argmax(-1).astype(jnp.int32)

    def value(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].max(-1)
