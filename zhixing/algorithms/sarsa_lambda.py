"""Sarsa(λ) with binary features: one of each state, or tiles.

Sutton & Barto, "Reinforcement learning", 2nd ed., sections 12.5 and 12.7; Van Seijen et al., "True online
temporal-difference learning", JMLR 17, 2016. Q(s, a) = Σ w over the features i of s and the action a, a product w·x.

    (SL.1)  A' from S' by the behaviour policy: ε-greedy in Q, or softmax
    (SL.2)  take A, observe R, S';  x, x' the features of (S, A) and (S', A')
    (SL.3)  δ = R + γ w·x' - w·x,  without w·x' if S' is terminal
    (SL.4)  z ← γ λ z, and then      z ← z + x                              accumulating traces
                                     zᵢ ← 1 where xᵢ = 1                    replacing
                                     z ← z + (1 - α γ λ z·x) x              dutch, with z as it was before
    (SL.5)  w ← w + α δ z                                                   accumulating, replacing
            w ← w + α (δ + w·x - q) z - α (w·x - q) x                       dutch: true online Sarsa(λ)
    (SL.6)  q ← w·x' with the w before (SL.5)

α is `learning_rate` divided by the number of tilings, so that 1 corrects the whole error of one observation.
As in Sarsa, a step waits for the action after it, and A' is drawn at the true successor where time is up.
"""

from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from zhixing import exploration, schedules
from zhixing.core import (
    DISCRETE,
    ActionSpaces,
    Clock,
    Online,
    Spec,
    Transition,
    hyperparameters,
    require_between,
    require_positive,
)
from zhixing.exploration import Exploration
from zhixing.features import Features


class State(NamedTuple):
    weights: jax.Array  # [features, actions], w
    features: Features  # s -> indices of the features that are 1
    clock: Clock

    @property
    def q(self) -> jax.Array:
        """Q(s, a) as a table, where the observations are numbered: the weights themselves."""
        return self.weights


class Waiting(NamedTuple):
    """The traces, and the last step, whose A' is not known yet."""

    trace: jax.Array  # [features, actions], z
    active: jax.Array  # [active] int32, the features of S
    action: jax.Array  # [] int32, A
    reward: jax.Array  # [], R
    q_old: jax.Array  # [], q: Q(S, A) as it was when S was reached
    there: jax.Array  # [] float32, 0 at an episode's start, then 1


@hyperparameters
class SarsaLambda(Online):
    """Sarsa(λ) on a table or on tiles, true online with dutch traces."""

    action_spaces: ClassVar[ActionSpaces] = DISCRETE

    tilings: int = 8  # of observations that are vectors; a power of 2, at least 4 times their length
    tiles: int = 8  # along each dimension
    traces: Literal["accumulating", "replacing", "dutch"] = "dutch"
    trace_decay: float = 0.9  # λ
    learning_rate: float = 0.1  # α times the number of tilings
    learning_rate_schedule: schedules.Schedule = "constant"
    discount: float = 0.99  # γ
    exploration: Exploration = "epsilon"
    epsilon_start: float = 0.1  # ε at the start
    epsilon_end: float = 0.1  # ε after annealing
    epsilon_fraction: float = 1.0  # the part of the run over which ε goes from start to end
    temperature: float = 1.0  # of softmax exploration
    initial_value: float = 0.0  # Q before any update; above what can be had, it makes the agent try everything

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "tilings", "tiles", "learning_rate", "temperature")
        require_between(self, 0, 1, "trace_decay", "discount", "epsilon_start", "epsilon_end", "epsilon_fraction")
        Features.of(spec.observation_space, self.tilings, self.tiles)

    def init(self, key: jax.Array, spec: Spec) -> State:
        features = Features.of(spec.observation_space, self.tilings, self.tiles)
        weights = jnp.full((features.size, spec.num_actions), self.initial_value / features.active, jnp.float32)
        return State(weights, features, Clock.start(spec))

    def episode(self, spec: Spec) -> Waiting:
        features = Features.of(spec.observation_space, self.tilings, self.tiles)
        trace, active = jnp.zeros((features.size, spec.num_actions)), jnp.zeros(features.active, jnp.int32)
        zero = jnp.float32(0.0)
        return Waiting(trace, active, jnp.int32(0), zero, zero, zero)

    def act(self, state: State, carry: tuple, observation: jax.Array, key: jax.Array):  # (SL.1)
        pi = exploration.behaviour(self, self.q(state, observation), state.clock.progress)
        return exploration.sample(key, pi), carry, ()

    def update(self, state: State, episode: Waiting, transition: Transition, key: jax.Array):
        w, x, a = state.weights, state.features(transition.observation), transition.action
        rate = jnp.asarray(self.learning_rate / state.features.active)
        alpha = rate * schedules.remaining(self.learning_rate_schedule, state.clock.progress)

        # The step that waited: its A' is known now.
        q = w[x, a].sum()
        w, before = self.correct(w, alpha, episode, episode.reward + self.discount * q, episode.there)

        trace = self.trace_decay * self.discount * episode.trace  # (SL.4)
        if self.traces == "accumulating":
            trace = trace.at[x, a].add(1.0)
        elif self.traces == "replacing":
            trace = trace.at[x, a].set(1.0)
        else:
            trace = trace.at[x, a].add(1.0 - alpha * trace[x, a].sum())
        episode = Waiting(trace, x, a, transition.reward, q, jnp.float32(1.0))

        # The last step of an episode waits for nothing.
        next_q = self.q(state._replace(weights=w), transition.next_observation)
        next_action = exploration.sample(key, exploration.behaviour(self, next_q, state.clock.progress))
        target = transition.reward + self.discount * transition.bootstrap * next_q[next_action]
        w, last = self.correct(w, alpha, episode, target, transition.ended.astype(jnp.float32))

        # No update at an episode's first step, two at its last: a sum, so that the mean over steps is that of updates.
        metrics = jax.tree.map(jnp.add, before, last) | {"step_size": alpha}
        return State(w, state.features, state.clock), episode, metrics

    def correct(self, w: jax.Array, alpha: jax.Array, episode: Waiting, target: jax.Array, due: jax.Array):
        """All weights by their traces, where the update is due (1, not 0)."""
        x, a = episode.active, episode.action
        q = w[x, a].sum()
        td_error = target - q  # (SL.3)
        step = due * alpha
        if self.traces == "dutch":  # (SL.5)
            w = (w + step * (td_error + q - episode.q_old) * episode.trace).at[x, a].add(-step * (q - episode.q_old))
        else:
            w = w + step * td_error * episode.trace
        return w, {"td_error": due * jnp.abs(td_error), "q": due * q}

    def q(self, state: State, observation: jax.Array) -> jax.Array:
        """[..., actions]"""
        return state.weights[state.features(observation)].sum(-2)

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        return self.q(state, observation).argmax(-1).astype(jnp.int32)

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        return self.q(state, observation).max(-1)
