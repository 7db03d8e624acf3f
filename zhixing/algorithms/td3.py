"""Twin delayed deep deterministic policy gradient (TD3): DDPG and three remedies for its overestimation.

Fujimoto, van Hoof & Meger, "Addressing function approximation error in actor-critic methods", arXiv:1802.09477,
Algorithm 1.

    (TD3.1)  a = μ(s; θ) + noise; store (s, a, r, s') in the replay; sample a minibatch from it
    (TD3.2)  ã = clip(μ(s'; θ⁻) + ε, -1, 1), ε ~ clip(N(0, σ̃), -c, c): target policy smoothing
    (TD3.3)  y = r + γ min(Q₁(s', ã; w₁⁻), Q₂(s', ã; w₂⁻)), y = r where the episode terminates at s': clipped double Q
    (TD3.4)  a gradient step on Σᵢ (y - Qᵢ(s, a; wᵢ))² with respect to w₁, w₂
    (TD3.5)  every d updates: a gradient step on -Q₁(s, μ(s; θ); w₁) with respect to θ, and
             wᵢ⁻ ← (1 - τ) wᵢ⁻ + τ wᵢ;  θ⁻ ← (1 - τ) θ⁻ + τ θ
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing.algorithms.ddpg import DDPG, State
from zhixing.core import Spec, hyperparameters, require_between, require_positive
from zhixing.transition import Experience


@hyperparameters
class TD3(DDPG):
    """Twin delayed deep deterministic policy gradient: says only what differs from DDPG."""

    critic_count: ClassVar[int] = 2

    policy_delay: int = 2  # d, updates of the critics for one of the actor and the targets
    smoothing_std: float = 0.2  # σ̃ of the target actions' noise
    smoothing_clip: float = 0.5  # c, the most that it moves them

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "policy_delay")
        require_between(self, 0, np.inf, "smoothing_std", "smoothing_clip")

    def update(self, state: State, batch: Experience, key: jax.Array) -> tuple[State, dict]:
        smoothing_key, dropout_key = jax.random.split(key)
        next_action = self.smoothed(state.actor_target(batch.next_observation), smoothing_key)  # (TD3.2)
        next_value = state.critics_target(batch.next_observation, next_action).min(0)
        target = batch.reward + batch.discount * next_value  # (TD3.3)
        critics, metrics = self.fit(state, batch, target, dropout_key)  # (TD3.4)

        def delayed(state: State) -> State:  # (TD3.5)
            actor = self.improve(state, critics, batch)
            actor_target = optax.incremental_update(actor.frozen, state.actor_target, self.polyak)
            critics_target = optax.incremental_update(critics.frozen, state.critics_target, self.polyak)
            return state._replace(actor=actor, actor_target=actor_target, critics_target=critics_target)

        due = (state.clock.updates + 1) % self.policy_delay == 0  # the same for all seeds: a branch under their vmap
        state = jax.lax.cond(due, delayed, lambda state: state, state)
        return state._replace(critics=critics), metrics

    def smoothed(self, action: jax.Array, key: jax.Array) -> jax.Array:
        """The target actor's `action` [B, d], with noise."""
        noise = self.smoothing_std * jax.random.normal(key, action.shape)
        return jnp.clip(action + jnp.clip(noise, -self.smoothing_clip, self.smoothing_clip), -1.0, 1.0)
