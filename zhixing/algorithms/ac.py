"""One-step actor-critic (AC), with Q(s, a) or with the TD error as the critic's word; discrete and continuous actions.

Sutton & Barto, "Reinforcement learning", 2nd ed., section 13.5, with δ; Sutton, McAllester, Singh & Mansour, "Policy
gradient methods for reinforcement learning with function approximation", 2000, theorem 1, with Q.

    (AC.1)  take a ~ π(·|s; θ) in each of N environments, observe r and s'
    (AC.2)  critic "td":  y = r + γ V(s'; w),  δ = y - V(s; w)
    (AC.3)  critic "q":   y = r + γ Q(s', a'; w) with a' ~ π(·|s'; θ)                                          Sarsa
    (AC.4)  w down the gradient of E[(y - V(s; w))²], or of E[(y - Q(s, a; w))²], where y is a constant
    (AC.5)  θ up the gradient of E[ψ log π(a|s; θ)] + c₂ E[H[π]], where ψ is δ or Q(s, a; w), with w as it was
            before (AC.4), a constant; times γᵗ if states are discounted

y has no second term where s' is terminal. Departures: N environments at once, Adam, a clip of the gradients' norms,
no target network; γᵗ is left out by default.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnasium import spaces

from zhixing import schedules
from zhixing.core import Clock, Spec, Transition, hyperparameters, require_between, require_positive
from zhixing.gradients import GradientLearner
from zhixing.learned import Learned
from zhixing.networks import MLP, Activation, ActorCritic, Encoder
from zhixing.optimisers import clip_by_norm


class State(NamedTuple):
    actor: Learned  # π(·|s; θ)
    critic: Learned  # V(s; w) or Q(s, a; w)
    clock: Clock


class Carry(NamedTuple):
    noise: Any  # of generalised state-dependent exploration
    discount: jax.Array  # [N], γᵗ


class Batch(NamedTuple):
    rollout: Transition  # [T, N]
    target: jax.Array  # [T, N], y


class StateValue(eqx.Module):
    """V(s)."""

    mlp: MLP
    encoder: Encoder = eqx.field(static=True)

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, hidden: tuple[int, ...], activation: Activation) -> "StateValue":
        encoder = Encoder.of(spec.observation_space)
        return cls(MLP.create(key, encoder.size, *hidden, 1, activation=activation), encoder)

    def __call__(self, observation: Any) -> jax.Array:
        """`observation` [..., *] -> [...]."""
        return self.mlp(self.encoder(observation))[..., 0]


class ActionValue(eqx.Module):
    """Q(s, a): an output for each action of a Discrete space; else the action goes in together with the state."""

    mlp: MLP
    encoder: Encoder = eqx.field(static=True)
    action_encoder: Encoder = eqx.field(static=True)
    per_action: bool = eqx.field(static=True)  # an output for each of them

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, hidden: tuple[int, ...], activation: Activation) -> "ActionValue":
        encoder, action_encoder = Encoder.of(spec.observation_space), Encoder.of(spec.action_space)
        per_action = isinstance(spec.action_space, spaces.Discrete)
        inputs, outputs = encoder.size, action_encoder.size
        sizes = (inputs, *hidden, outputs) if per_action else (inputs + outputs, *hidden, 1)
        return cls(MLP.create(key, *sizes, activation=activation), encoder, action_encoder, per_action)

    def __call__(self, observation: Any, action: Any) -> jax.Array:
        """`observation` [..., *], `action` [..., *] -> [...]."""
        x, action = self.encoder(observation), self.action_encoder(action)
        if self.per_action:
            return (self.mlp(x) * action).sum(-1)
        return self.mlp(jnp.concatenate([x, action], -1))[..., 0]


@hyperparameters
class OneStepActorCritic(GradientLearner):
    """One-step actor-critic, with the TD error or with Q(s, a)."""

    reads_action_mask: ClassVar[bool] = True

    rollout_length: int = 1  # T; an update for each step of the N environments
    critic: Literal["td", "q"] = "td"  # what the actor is told: δ, or Q(s, a)
    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer, of actor and critic
    activation: Activation = "tanh"
    state_dependent_std: bool = False  # continuous actions: the standard deviation is an output, not a parameter
    initial_log_std: float = 0.0
    gsde_interval: int | None = None  # generalised state-dependent exploration, its noise renewed every so many steps
    learning_rate: float = 1e-4  # of the actor
    critic_learning_rate: float = 3e-3
    learning_rate_schedule: schedules.Schedule = "constant"  # of both
    discount: float = 0.99  # γ
    discount_states: bool = False  # weigh step t with γᵗ, as the gradient of the discounted return has it
    entropy_coefficient: float = 0.0  # c₂
    max_gradient_norm: float = 0.5  # the gradients of actor and critic are each scaled down to this norm

    @property
    def shared_trunk(self) -> bool:
        """Never: actor and critic learn at rates of their own."""
        return False

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "learning_rate", "critic_learning_rate", "max_gradient_norm")
        require_between(self, 0, 1, "discount")
        require_between(self, 0, np.inf, "entropy_coefficient")
        require_between(self, 1, np.inf, "gsde_interval")

    def init(self, key: jax.Array, spec: Spec) -> State:
        actor_key, critic_key = jax.random.split(key)
        actor = eqx.tree_at(lambda net: net.critic, ActorCritic.create(actor_key, spec, self), None)
        kind = StateValue if self.critic == "td" else ActionValue
        critic = kind.create(critic_key, spec, self.hidden, self.activation)
        clock = Clock.start(spec)
        actor_optimiser, critic_optimiser = self.optimisers(clock)
        return State(Learned.create(actor, actor_optimiser), Learned.create(critic, critic_optimiser), clock)

    def carry(self, spec: Spec, key: jax.Array) -> Carry:
        return Carry(ActorCritic.carry(key, spec, self), jnp.ones(spec.num_environments))

    def act(self, state: State, carry: Carry, observation: jax.Array, key: jax.Array):  # (AC.1)
        action, noise, _ = state.actor.net.act(carry.noise, observation, key)
        return action, Carry(noise, self.discount * carry.discount), carry.discount

    def batches(self, state: State, rollout: Transition, key: jax.Array) -> Batch:
        actor, critic, successor = state.actor.net, state.critic.net, rollout.next_observation
        after = (successor,) if self.critic == "td" else (successor, actor.policy(successor).sample(key))
        target = rollout.reward + self.discount * rollout.bootstrap * critic(*after)  # (AC.2), (AC.3)
        return jax.tree.map(lambda x: x[None], Batch(rollout, target))

    def gradient(self, state: State, minibatch: Batch) -> tuple[Any, dict]:
        rollout, target = minibatch
        estimate = self.estimate(state.critic.net, rollout)
        signal = target - estimate if self.critic == "td" else estimate
        for_critic, of_critic = state.critic.gradient(lambda critic: self.critic_loss(critic, rollout, target))
        for_actor, of_actor = state.actor.gradient(lambda actor: self.actor_loss(actor, rollout, signal))
        metrics = of_actor | {f"critic_{name}": value for name, value in of_critic.items()}
        metrics |= {"value": estimate.mean(), "td_error": jnp.abs(target - estimate).mean()}
        return (for_actor, for_critic), metrics

    def apply(self, state: State, gradient: Any, metrics: dict) -> State:
        actor_optimiser, critic_optimiser = self.optimisers(state.clock)
        actor, critic = state.actor.step(gradient[0], actor_optimiser), state.critic.step(gradient[1], critic_optimiser)
        return State(actor, critic, state.clock)

    def estimate(self, critic: Any, rollout: Transition) -> jax.Array:
        """V(s) or Q(s, a)."""
        return critic(rollout.observation) if self.critic == "td" else critic(rollout.observation, rollout.action)

    def critic_loss(self, critic: Any, rollout: Transition, target: jax.Array) -> tuple[jax.Array, dict]:
        loss = jnp.square(target - self.estimate(critic, rollout)).mean()  # (AC.4)
        return loss, {"loss": loss}

    def actor_loss(self, actor: ActorCritic, rollout: Transition, signal: jax.Array) -> tuple[jax.Array, dict]:
        if self.discount_states:
            signal = rollout.extras * signal
        pi = actor.policy(rollout.observation)
        objective, entropy = (signal * pi.log_prob(rollout.action)).mean(), pi.entropy().mean()
        loss = -objective - self.entropy_coefficient * entropy  # (AC.5)
        return loss, {"loss": loss, "objective": objective, "entropy": entropy}

    def policy(self, state: State, observation: Any) -> jax.Array:
        return state.actor.net.policy(observation).mode

    def value(self, state: State, observation: Any) -> jax.Array:
        """V(s); with the critic "q", Q(s, a) of the action that `policy` takes."""
        if self.critic == "td":
            return state.critic.net(observation)
        return state.critic.net(observation, self.policy(state, observation))

    def optimisers(self, clock: Clock) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        """Of actor and critic."""
        remaining = schedules.remaining(self.learning_rate_schedule, clock.progress)
        actor, critic = (
            optax.chain(clip_by_norm(self.max_gradient_norm), optax.adam(rate * remaining, eps=1e-5))
            for rate in (self.learning_rate, self.critic_learning_rate)
        )
        return actor, critic
