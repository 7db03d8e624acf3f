"""Soft actor-critic for discrete actions: the expectations over actions are sums.

Christodoulou, "Soft actor-critic for discrete action settings", arXiv:1910.07207, Algorithm 1.

    (DSAC.1)  a ~ π(·|s; θ); store (s, a, r, s') in the replay; sample a minibatch from it
    (DSAC.2)  V(s') = Σₐ π(a|s') (minᵢ Qᵢ(s', a; wᵢ⁻) - α log π(a|s'))
    (DSAC.3)  a gradient step on Σᵢ (r + γ V(s') - Qᵢ(s, a; wᵢ))²; V(s') = 0 where the episode terminates
    (DSAC.4)  a gradient step on Σₐ π(a|s; θ) (α log π(a|s; θ) - minᵢ Qᵢ(s, a; wᵢ)) with respect to θ
    (DSAC.5)  a gradient step on -α Σₐ π(a|s) (log π(a|s) + H̄) with respect to log α; H̄ a share of log |A|
    (DSAC.6)  wᵢ⁻ ← (1 - τ) wᵢ⁻ + τ wᵢ
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing.algorithms.dqn import taken
from zhixing.core import (
    DISCRETE,
    ActionSpaces,
    Clock,
    Spec,
    hyperparameters,
    require_between,
    require_positive,
)
from zhixing.distributions import Categorical
from zhixing.learned import Learned, Vector
from zhixing.networks import Ensemble, QNetwork, regression
from zhixing.off_policy import OffPolicyActorCritic
from zhixing.temperature import Temperature
from zhixing.transition import Experience


class State(NamedTuple):
    actor: Learned  # logits of π(·; θ)
    critics: Learned  # Q₁(·; w₁), Q₂(·; w₂)
    critics_target: Vector  # Q₁(·; w₁⁻), Q₂(·; w₂⁻)
    temperature: Temperature  # α
    clock: Clock


@hyperparameters
class DiscreteSAC(OffPolicyActorCritic):
    """Soft actor-critic for discrete actions."""

    action_spaces: ClassVar[ActionSpaces] = DISCRETE

    batch_size: int = 64  # B
    temperature: float | None = None  # α; None: learned, so that the entropy is as wanted
    initial_temperature: float = 1.0  # where learning it begins
    target_entropy_share: float = 0.5  # of log |A|, the entropy of the uniform policy

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "initial_temperature")
        require_between(self, 0, 1, "target_entropy_share")
        require_between(self, 0, np.inf, "temperature")

    def init(self, key: jax.Array, spec: Spec) -> State:
        def network(key: jax.Array) -> QNetwork:
            return QNetwork.create(key, spec.observation_space, spec.num_actions, self.hidden, self.activation)

        actor_key, critic_key = jax.random.split(key)
        clock = Clock.start(spec)
        actor = Learned.create(network(actor_key), self.optimiser(clock))
        critics = Learned.create(Ensemble.create(network, critic_key), self.critic_optimiser(clock))
        target_entropy = self.target_entropy_share * jnp.log(jnp.float32(spec.num_actions))
        temperature = Temperature.create(
            self.temperature, self.initial_temperature, target_entropy, self.optimiser(clock)
        )
        return State(actor, critics, critics.frozen, temperature, clock)

    def act(self, state: State, carry: Any, observation: Any, key: jax.Array):  # (DSAC.1)
        warm = state.clock.steps >= self.learning_starts
        logits = jnp.where(warm, state.actor(observation), 0.0)
        return Categorical(logits).sample(key), carry, ()

    def update(self, state: State, batch: Experience, key: jax.Array) -> tuple[State, dict]:
        alpha = state.temperature.alpha
        log_p = jax.nn.log_softmax(state.actor(batch.next_observation))
        next_q = state.critics_target(batch.next_observation).min(0)
        next_value = (jnp.exp(log_p) * (next_q - alpha * log_p)).sum(-1)  # (DSAC.2)
        target = batch.reward + batch.discount * next_value

        def critic_loss(critics: Ensemble) -> tuple[jax.Array, dict]:  # (DSAC.3)
            q = taken(critics(batch.observation), batch.action)  # [2, B]
            return regression(q, target, batch.weight)

        critics, metrics = state.critics.minimise(critic_loss, self.critic_optimiser(state.clock))
        q = critics.net(batch.observation).min(0)

        def actor_loss(actor: QNetwork) -> tuple[jax.Array, dict]:  # (DSAC.4)
            log_p = jax.nn.log_softmax(actor(batch.observation))
            entropy = -(jnp.exp(log_p) * log_p).sum(-1)
            return ((jnp.exp(log_p) * -q).sum(-1) - alpha * entropy).mean(), {"entropy": entropy}

        actor, drawn = state.actor.minimise(actor_loss, self.optimiser(state.clock))
        temperature = state.temperature.step(-drawn["entropy"], self.optimiser(state.clock))  # (DSAC.5)
        critics_target = optax.incremental_update(critics.frozen, state.critics_target, self.polyak)  # (DSAC.6)
        metrics |= {"entropy": drawn["entropy"].mean(), "temperature": alpha}
        return State(actor, critics, critics_target, temperature, state.clock), metrics

    def policy(self, state: State, observation: Any) -> jax.Array:
        return state.actor(observation).argmax(-1).astype(jnp.int32)

    def value(self, state: State, observation: Any) -> jax.Array:
        """The least Q(s, a) of the greedy action."""
        return taken(state.critics(observation).min(0), self.policy(state, observation))
