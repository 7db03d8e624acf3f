"""Q-learning.

Watkins, "Learning from delayed rewards", 1989; Sutton & Barto, "Reinforcement learning", 2nd ed., section 6.5.

    (Q.1)  with probability ε a random action A, otherwise A = argmaxₐ Q(S, a)
           (or A with probability proportional to exp(Q(S, a) / temperature))
    (Q.2)  take A, observe R, S'
    (Q.3)  δ = R                              if S' is terminal
           δ = R + γ maxₐ Q(S', a)            otherwise,  minus Q(S, A)
    (Q.4)  Q(S, A) ← Q(S, A) + α δ
"""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from zhixing import exploration, schedules
from zhixing.core import DISCRETE, ActionSpaces, Online, Spec, Transition, hyperparameters
from zhixing.tables import Table, check_table_settings, step_size


@hyperparameters
class QLearning(Online):
    """Q-learning on a table."""

    action_spaces: ClassVar[ActionSpaces] = DISCRETE

    learning_rate: float = 0.1  # α
    learning_rate_decay: float = 0.0  # ω: the n-th update of a pair has α n^-ω; 0 keeps α constant
    discount: float = 0.99  # γ
    exploration: Literal["epsilon", "softmax"] = "epsilon"
    epsilon_start: float = 0.1  # ε at the start
    epsilon_end: float = 0.1  # ε after annealing
    epsilon_fraction: float = 1.0  # the part of the run over which ε goes from start to end
    temperature: float = 1.0  # of softmax exploration
    initial_value: float = 0.0  # Q before any update; above what can be had, it makes the agent try everything

    def check(self, spec: Spec) -> None:
        super().check(spec)
        check_table_settings(self, spec)

    def init(self, key: jax.Array, spec: Spec) -> Table:
        return Table.create(spec, self.initial_value)

    def act(self, state: Table, carry: tuple, observation: jax.Array, key: jax.Array):  # (Q.1)
        q = state.q[observation]
        if self.exploration == "softmax":
            return exploration.softmax(key, q, self.temperature), carry, ()
        epsilon = schedules.linear(self.epsilon_start, self.epsilon_end, self.epsilon_fraction, state.clock.progress)
        return exploration.epsilon_greedy(key, q, epsilon), carry, ()

    def update(self, state: Table, episode: tuple, transition: Transition, key: jax.Array):
        s, a = transition.observation, transition.action
        target = transition.reward + self.discount * transition.bootstrap * state.q[transition.next_observation].max()
        n, q = state.visits[s, a] + 1, state.q[s, a]
        td_error = target - q  # (Q.3)
        alpha = step_size(self.learning_rate, self.learning_rate_decay, n)
        q = q + alpha * td_error  # (Q.4)
        state = Table(state.q.at[s, a].set(q), state.visits.at[s, a].set(n), state.clock)
        return state, episode, {"td_error": jnp.abs(td_error), "q": q, "step_size": alpha}

    def policy(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].argmax(-1).astype(jnp.int32)

    def value(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].max(-1)
