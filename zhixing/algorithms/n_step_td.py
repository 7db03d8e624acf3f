"""n-step temporal-difference control: Sarsa, Expected Sarsa or Q-learning over n steps.

Sutton & Barto, "Reinforcement learning", 2nd ed., section 7.2 (n-step Sarsa, n-step Expected Sarsa).

    (N.1)  Aₜ from Sₜ by the behaviour policy π: ε-greedy in Q, or softmax; observe Rₜ₊₁, Sₜ₊₁
    (N.2)  V(Sₜ) = Q(Sₜ, Aₜ)                   backup "sarsa"
           V(Sₜ) = Σₐ π(a | Sₜ) Q(Sₜ, a)       backup "expected_sarsa"
           V(Sₜ) = maxₐ Q(Sₜ, a)               backup "q_learning"
           V(Sₜ) = 0                           if Sₜ is terminal
    (N.3)  G = Rτ₊₁ + γ Rτ₊₂ + ... + γ^(h-τ-1) Rₕ + γ^(h-τ) V(Sₕ),  h = τ + n or, if sooner, the episode's end
    (N.4)  Q(Sτ, Aτ) ← Q(Sτ, Aτ) + α (G - Q(Sτ, Aτ))

"q_learning" takes the rewards as they came, exploration included, without importance sampling. Where a time limit
cuts the episode V is that of the true successor, for "sarsa" with an action drawn there.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from zhixing import exploration
from zhixing.core import DISCRETE, ActionSpaces, Clock, Online, Spec, Transition, hyperparameters, require_positive
from zhixing.exploration import Exploration
from zhixing.tables import Table, check_table_settings, step_size


class Waiting(NamedTuple):
    """The last n steps, the newest at the end."""

    observations: jax.Array  # [n] int32
    actions: jax.Array  # [n] int32
    returns: jax.Array  # [n] the discounted sum of a step's reward and those since
    length: jax.Array  # [] int32, how many steps are there

    def push(self, observation: jax.Array, action: jax.Array, reward: jax.Array, discount: float) -> "Waiting":
        n = len(self.returns)
        age = jnp.arange(n - 1, -1, -1)
        returns = jnp.roll(self.returns, -1).at[-1].set(0.0) + discount**age * reward
        observations, actions = (jnp.roll(x, -1) for x in (self.observations, self.actions))
        length = jnp.minimum(self.length + 1, n)
        return Waiting(observations.at[-1].set(observation), actions.at[-1].set(action), returns, length)


Learned = tuple[jax.Array, jax.Array, dict]  # Q, visits, metrics


@hyperparameters
class NStepTD(Online):
    """n-step Sarsa, Expected Sarsa or Q-learning on a table."""

    action_spaces: ClassVar[ActionSpaces] = DISCRETE

    n_step: int = 4  # n
    backup: Literal["sarsa", "expected_sarsa", "q_learning"] = "sarsa"  # what follows the n rewards
    learning_rate: float = 0.1  # α
    learning_rate_decay: float = 0.0  # ω: the k-th update of a pair has α k^-ω; 0 keeps α constant
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
        require_positive(self, "n_step")

    def init(self, key: jax.Array, spec: Spec) -> Table:
        return Table.create(spec, self.initial_value)

    def episode(self, spec: Spec) -> Waiting:
        integers = jnp.zeros(self.n_step, jnp.int32)
        return Waiting(integers, integers, jnp.zeros(self.n_step), jnp.int32(0))

    def act(self, state: Table, carry: tuple, observation: jax.Array, key: jax.Array):  # (N.1)
        pi = exploration.behaviour(self, state.q[observation], state.clock.progress)
        return exploration.sample(key, pi), carry, ()

    def update(self, state: Table, episode: Waiting, transition: Transition, key: jax.Array):
        s, a, successor, n = transition.observation, transition.action, transition.next_observation, self.n_step
        zero = jnp.float32(0.0)
        learned: Learned = state.q, state.visits, {"td_error": zero, "q": zero, "step_size": zero}
        if self.backup == "sarsa":  # h is this step, whose action is known now
            learned = self.correct(learned, episode, 0, episode.length // n, lambda q: q[s, a])

        episode = episode.push(s, a, transition.reward, self.discount)
        next_action = exploration.sample(key, exploration.behaviour(self, learned[0][successor], state.clock.progress))

        # h is the successor: for every step that waits, the oldest first, where the episode ends there.
        def value(q: jax.Array) -> jax.Array:
            return transition.bootstrap * self.value_of(q[successor], next_action, state.clock)

        first = n - episode.length
        due = 0 if self.backup == "sarsa" else episode.length // n
        last = jnp.where(transition.ended, n, first + due)
        q, visits, metrics = self.correct(learned, episode, first, last, value)
        return Table(q, visits, state.clock), episode, metrics

    def correct(self, learned: Learned, episode: Waiting, first: Any, last: Any, value: Callable) -> Learned:
        """Update the waiting steps `first`, ..., `last` - 1, with `value(q)` after their last reward.

        Metrics are summed: an episode has as many updates as steps, so that their mean over steps is that over updates.
        """

        def one(i: jax.Array, learned: Learned) -> Learned:
            q, visits, metrics = learned
            s, a = episode.observations[i], episode.actions[i]
            target = episode.returns[i] + self.discount ** (self.n_step - i) * value(q)  # (N.3)
            n, td_error = visits[s, a] + 1, target - q[s, a]
            alpha = step_size(self.learning_rate, self.learning_rate_decay, n)
            corrected = q[s, a] + alpha * td_error  # (N.4)
            q, visits = q.at[s, a].set(corrected), visits.at[s, a].set(n)
            made = {"td_error": jnp.abs(td_error), "q": corrected, "step_size": alpha}
            return q, visits, jax.tree.map(jnp.add, metrics, made)

        return jax.lax.fori_loop(first, last, one, learned)

    def value_of(self, q: jax.Array, action: jax.Array, clock: Clock) -> jax.Array:
        """V of a state, from its action values `q` [actions] and, for "sarsa", the action taken there."""
        if self.backup == "sarsa":  # (N.2)
            return q[action]
        if self.backup == "expected_sarsa":
            return (exploration.behaviour(self, q, clock.progress) * q).sum()
        return q.max()

    def policy(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].argmax(-1).astype(jnp.int32)

    def value(self, state: Table, observation: jax.Array) -> jax.Array:
        return state.q[observation].max(-1)
