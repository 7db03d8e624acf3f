"""Deep deterministic policy gradient (DDPG).

Lillicrap et al., "Continuous control with deep reinforcement learning", arXiv:1509.02971, Algorithm 1.
Departures: layer normalisation in the place of batch normalisation, optional; the first actions are uniformly random.

    (DDPG.1)  a = μ(s; θ) + noise, Ornstein-Uhlenbeck or Gaussian; store (s, a, r, s') in the replay
    (DDPG.2)  sample a minibatch of transitions from the replay
    (DDPG.3)  y = r                              if the episode terminates at s'
              y = r + γ Q(s', μ(s'; θ⁻); w⁻)      otherwise
    (DDPG.4)  a gradient step on (y - Q(s, a; w))² with respect to w
    (DDPG.5)  a gradient step on -Q(s, μ(s; θ); w) with respect to θ: the deterministic policy gradient
    (DDPG.6)  w⁻ ← (1 - τ) w⁻ + τ w;  θ⁻ ← (1 - τ) θ⁻ + τ θ
"""

from typing import Any, ClassVar, NamedTuple

import jax
import optax

from zhixing.continuous import ActionValue, ContinuousActorCritic, DeterministicActor
from zhixing.core import Clock, Spec, hyperparameters
from zhixing.exploration import ActionNoise, noisy
from zhixing.learned import Learned, Vector
from zhixing.networks import Ensemble, regression
from zhixing.transition import Experience


class State(NamedTuple):
    actor: Learned  # μ(·; θ)
    critics: Learned  # Q(·; w), one or several side by side
    actor_target: Vector  # μ(·; θ⁻)
    critics_target: Vector  # Q(·; w⁻)
    clock: Clock


@hyperparameters
class DDPG(ContinuousActorCritic):
    """Deep deterministic policy gradient."""

    critic_count: ClassVar[int] = 1

    learning_rate: float = 1e-3  # of the actor
    critic_learning_rate: float = 1e-3
    noise: ActionNoise = "gaussian"

    def init(self, key: jax.Array, spec: Spec) -> State:
        actor_key, critic_key = jax.random.split(key)
        clock = Clock.start(spec)
        actor = Learned.create(DeterministicActor.create(actor_key, spec, self), self.optimiser(clock))
        critics = Ensemble.create(lambda k: ActionValue.create(k, spec, self), critic_key, self.critic_count)
        learned = Learned.create(critics, self.critic_optimiser(clock))
        return State(actor, learned, actor.frozen, learned.frozen, clock)

    def act(self, state: State, carry: Any, observation: Any, key: jax.Array):  # (DDPG.1)
        random = state.clock.steps < self.learning_starts
        return *noisy(self, carry, state.actor(observation), random, key), ()

    def update(self, state: State, batch: Experience, key: jax.Array) -> tuple[State, dict]:
        next_action = state.actor_target(batch.next_observation)
        next_value = state.critics_target(batch.next_observation, next_action)[0]
        target = batch.reward + batch.discount * next_value  # (DDPG.3)
        critics, metrics = self.fit(state, batch, target, key)  # (DDPG.4)
        actor = self.improve(state, critics, batch)  # (DDPG.5)
        actor_target = optax.incremental_update(actor.frozen, state.actor_target, self.polyak)  # (DDPG.6)
        critics_target = optax.incremental_update(critics.frozen, state.critics_target, self.polyak)
        return State(actor, critics, actor_target, critics_target, state.clock), metrics

    def fit(self, state: State, batch: Experience, target: jax.Array, key: jax.Array) -> tuple[Learned, dict]:
        """A step of every critic towards `target` [B]."""

        def loss(critics: Ensemble) -> tuple[jax.Array, dict]:
            q = critics(batch.observation, batch.action, key=key if self.dropout else None)  # [K, B]
            return regression(q, target, batch.weight)

        return state.critics.minimise(loss, self.critic_optimiser(state.clock))

    def improve(self, state: State, critics: Learned, batch: Experience) -> Learned:
        """A step of the actor up Q(s, μ(s)): the deterministic policy gradient."""
        q = critics.net.first

        def loss(actor: DeterministicActor) -> tuple[jax.Array, dict]:
            return -q(batch.observation, actor(batch.observation)).mean(), {}

        return state.actor.minimise(loss, self.optimiser(state.clock))[0]

    def policy(self, state: State, observation: Any) -> jax.Array:
        return state.actor(observation)

    def value(self, state: State, observation: Any) -> jax.Array:
        """Q(s, μ(s)), the least of the critics'."""
        return state.critics(observation, state.actor(observation)).min(0)
