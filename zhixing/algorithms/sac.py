"""Soft actor-critic (SAC) for continuous actions, in both of its published forms.

Second form, the default: Haarnoja et al., "Soft actor-critic algorithms and applications", arXiv:1812.05905,
Algorithm 1. First form (`state_value`, with a fixed `temperature`): Haarnoja et al., "Soft actor-critic: off-policy
maximum entropy deep reinforcement learning with a stochastic actor", arXiv:1801.01290, Algorithm 1.

    (SAC.1)  a ~ π(·|s; θ); store (s, a, r, s') in the replay; sample a minibatch from it
    (SAC.2)  y = r + γ (minᵢ Qᵢ(s', a'; wᵢ⁻) - α log π(a'|s')), a' ~ π(·|s'); y = r where the episode terminates
    (SAC.3)  a gradient step on Σᵢ (y - Qᵢ(s, a; wᵢ))² with respect to w₁, w₂
    (SAC.4)  a gradient step on α log π(ã|s) - minᵢ Qᵢ(s, ã; wᵢ) with respect to θ, through ã = tanh(μ + σ ε)
    (SAC.5)  a gradient step on -α (log π(ã|s) + H̄) with respect to log α; H̄ = -d, unless told
    (SAC.6)  wᵢ⁻ ← (1 - τ) wᵢ⁻ + τ wᵢ
    (SAC.7)  first form: y = r + γ V(s'; v⁻), and a gradient step on (minᵢ Qᵢ(s, ã; wᵢ) - α log π(ã|s) - V(s; v))²
             with respect to v; v⁻ ← (1 - τ) v⁻ + τ v
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing.continuous import ActionValue, ContinuousActorCritic, SquashedActor, StateValue, action_size
from zhixing.core import Clock, Spec, hyperparameters, require_between, require_positive
from zhixing.exploration import noisy
from zhixing.learned import Learned, Vector
from zhixing.networks import Ensemble, regression
from zhixing.temperature import Temperature
from zhixing.transition import Experience


class State(NamedTuple):
    actor: Learned  # π(·; θ)
    critics: Learned  # Q₁(·; w₁), Q₂(·; w₂)
    state_value: Learned | None  # V(·; v), of the first form
    target: Vector  # Qᵢ(·; wᵢ⁻); V(·; v⁻) in the first form
    temperature: Temperature  # α
    clock: Clock


@hyperparameters
class SAC(ContinuousActorCritic):
    """Soft actor-critic."""

    state_value: bool = False  # the first form: the targets come from a network V of their own
    temperature: float | None = None  # α; None: learned, so that the entropy is `target_entropy`
    initial_temperature: float = 1.0  # where learning it begins
    target_entropy: float | None = None  # H̄; None: -d

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "initial_temperature")
        require_between(self, 0, np.inf, "temperature")

    def init(self, key: jax.Array, spec: Spec) -> State:
        actor_key, critic_key, value_key = jax.random.split(key, 3)
        clock = Clock.start(spec)
        actor = Learned.create(SquashedActor.create(actor_key, spec, self), self.optimiser(clock))
        critics = Learned.create(
            Ensemble.create(lambda k: ActionValue.create(k, spec, self), critic_key), self.critic_optimiser(clock)
        )
        state_value = None
        if self.state_value:
            state_value = Learned.create(StateValue.create(value_key, spec, self), self.critic_optimiser(clock))
        target_entropy = -float(action_size(spec.action_space)) if self.target_entropy is None else self.target_entropy
        temperature = Temperature.create(
            self.temperature, self.initial_temperature, target_entropy, self.optimiser(clock)
        )
        return State(actor, critics, state_value, (state_value or critics).frozen, temperature, clock)

    def act(self, state: State, carry: Any, observation: Any, key: jax.Array):  # (SAC.1)
        action_key, noise_key = jax.random.split(key)
        random = state.clock.steps < self.learning_starts
        return *noisy(self, carry, state.actor(observation).sample(action_key), random, noise_key), ()

    def update(self, state: State, batch: Experience, key: jax.Array) -> tuple[State, dict]:
        next_key, key, dropout_key = jax.random.split(key, 3)
        alpha = state.temperature.alpha
        if state.state_value is None:  # (SAC.2)
            next_action, next_log_prob = state.actor(batch.next_observation).sample_and_log_prob(next_key)
            next_value = state.target(batch.next_observation, next_action).min(0) - alpha * next_log_prob
        else:  # (SAC.7)
            next_value = state.target(batch.next_observation)
        target = batch.reward + batch.discount * next_value

        def critic_loss(critics: Ensemble) -> tuple[jax.Array, dict]:  # (SAC.3)
            q = critics(batch.observation, batch.action, key=dropout_key if self.dropout else None)  # [2, B]
            return regression(q, target, batch.weight)

        critics, metrics = state.critics.minimise(critic_loss, self.critic_optimiser(state.clock))
        q = critics.net

        def actor_loss(actor: SquashedActor) -> tuple[jax.Array, dict]:  # (SAC.4)
            action, log_prob = actor(batch.observation).sample_and_log_prob(key)
            value = q(batch.observation, action).min(0)
            return (alpha * log_prob - value).mean(), {"log_prob": log_prob, "value": value}

        actor, drawn = state.actor.minimise(actor_loss, self.optimiser(state.clock))
        temperature = state.temperature.step(drawn["log_prob"], self.optimiser(state.clock))  # (SAC.5)

        state_value = state.state_value
        if state_value is not None:  # (SAC.7)
            soft_value = drawn["value"] - alpha * drawn["log_prob"]

            def value_loss(v: StateValue) -> tuple[jax.Array, dict]:
                return jnp.square(v(batch.observation) - soft_value).mean(), {}

            state_value, _ = state_value.minimise(value_loss, self.critic_optimiser(state.clock))

        target_network = optax.incremental_update((state_value or critics).frozen, state.target, self.polyak)  # (SAC.6)
        metrics |= {"entropy": -drawn["log_prob"].mean(), "temperature": alpha}
        return State(actor, critics, state_value, target_network, temperature, state.clock), metrics

    def policy(self, state: State, observation: Any) -> jax.Array:
        return state.actor(observation).mode

    def value(self, state: State, observation: Any) -> jax.Array:
        """The least Q(s, a) of the greedy action."""
        return state.critics(observation, state.actor(observation).mode).min(0)
