"""REINFORCE, the Monte-Carlo policy gradient, with and without a learned baseline; discrete and continuous actions.

Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", Machine
Learning 8, 1992; Sutton & Barto, "Reinforcement learning", 2nd ed., sections 13.3 and 13.4.

    (REINFORCE.1)  play whole episodes with π(·|s; θ)
    (REINFORCE.2)  Gₜ = rₜ + γ rₜ₊₁ + γ² rₜ₊₂ + ...  to the episode's end, nothing after it
    (REINFORCE.3)  Âₜ = Gₜ - V(sₜ; θ), or Gₜ without a baseline
    (REINFORCE.4)  L(θ) = -E[Âₜ log π(aₜ|sₜ; θ)] - c₂ E[H[π]], the mean over all steps of the episodes that ended;
                   Âₜ is a constant in it, times γᵗ if states are discounted
    (REINFORCE.5)  L_value(θ) = E[(Gₜ - V(sₜ; θ))²]
    (REINFORCE.6)  one Adam step down L + c₁ L_value

Departures: steps of several episodes in one update, Adam, a clip of the gradient's norm; γᵗ is left out by default.
"""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing import schedules
from zhixing.core import Clock, Episodes, Episodic, Spec, hyperparameters, require_between, require_positive
from zhixing.learned import Learned
from zhixing.networks import Activation, ActorCritic
from zhixing.optimisers import clip_by_norm


class State(NamedTuple):
    actor_critic: Learned  # π(·|s; θ) and V(s; θ); π alone without a baseline
    clock: Clock


class Carry(NamedTuple):
    noise: Any  # of generalised state-dependent exploration
    discount: jax.Array  # [N], γᵗ


@hyperparameters
class Reinforce(Episodic):
    """REINFORCE, the Monte-Carlo policy gradient."""

    reads_action_mask: ClassVar[bool] = True

    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer
    activation: Activation = "tanh"
    shared_trunk: bool = False  # one trunk for policy and value
    state_dependent_std: bool = False  # continuous actions: the standard deviation is an output, not a parameter
    initial_log_std: float = 0.0
    gsde_interval: int | None = None  # generalised state-dependent exploration, its noise renewed every so many steps
    learning_rate: float = 3e-3
    learning_rate_schedule: schedules.Schedule = "constant"
    discount: float = 0.99  # γ
    baseline: bool = True  # learn V(s) and subtract it from the returns
    discount_states: bool = False  # weigh step t with γᵗ, as the gradient of the discounted return has it
    value_coefficient: float = 0.5  # c₁
    entropy_coefficient: float = 0.0  # c₂
    normalize_advantage: bool = False  # to mean 0 and standard deviation 1 in each update
    max_gradient_norm: float = 0.5  # gradients are scaled down to this norm

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "learning_rate", "max_gradient_norm")
        require_between(self, 0, 1, "discount")
        require_between(self, 0, np.inf, "value_coefficient", "entropy_coefficient")
        require_between(self, 1, np.inf, "gsde_interval")

    def init(self, key: jax.Array, spec: Spec) -> State:
        net = ActorCritic.create(key, spec, self)
        if not self.baseline:
            net = eqx.tree_at(lambda net: net.critic, net, None)
        clock = Clock.start(spec)
        return State(Learned.create(net, self.optimiser(clock)), clock)

    def carry(self, spec: Spec, key: jax.Array) -> Carry:
        return Carry(ActorCritic.carry(key, spec, self), jnp.ones(spec.num_environments))

    def act(self, state: State, carry: Carry, observation: jax.Array, key: jax.Array):  # (REINFORCE.1)
        action, noise, _ = state.actor_critic.net.act(carry.noise, observation, key)
        return action, Carry(noise, self.discount * carry.discount), carry.discount

    def update(self, state: State, episodes: Episodes, key: jax.Array) -> tuple[State, dict]:
        learned, metrics = state.actor_critic.minimise(
            lambda net: self.loss(net, episodes), self.optimiser(state.clock)
        )  # (REINFORCE.6)
        return State(learned, state.clock), metrics

    def loss(self, net: ActorCritic, episodes: Episodes) -> tuple[jax.Array, dict]:
        steps, weight = episodes

        def mean(x: jax.Array) -> jax.Array:
            return (weight * x).sum() / jnp.maximum(weight.sum(), 1.0)

        def variance(x: jax.Array) -> jax.Array:
            return mean(jnp.square(x - mean(x)))

        returns = discounted_returns(steps.reward, steps.ended, self.discount)  # (REINFORCE.2)
        value = net.value(steps.observation) if self.baseline else jnp.zeros_like(returns)
        error = returns - value
        advantage = jax.lax.stop_gradient(error)  # (REINFORCE.3)
        if self.normalize_advantage:
            advantage = (advantage - mean(advantage)) / (jnp.sqrt(variance(advantage)) + 1e-8)
        if self.discount_states:
            advantage = steps.extras * advantage

        pi = net.policy(steps.observation)
        objective, entropy = mean(advantage * pi.log_prob(steps.action)), mean(pi.entropy())
        loss = -objective - self.entropy_coefficient * entropy  # (REINFORCE.4)
        metrics = {"objective": objective, "entropy": entropy, "discounted_return": mean(returns)}
        if self.baseline:
            value_loss = mean(jnp.square(error))  # (REINFORCE.5)
            loss += self.value_coefficient * value_loss
            explained_variance = 1 - variance(error) / (variance(returns) + 1e-8)
            metrics |= {"value_loss": value_loss, "value": mean(value), "explained_variance": explained_variance}
        return loss, metrics | {"loss": loss}

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        return state.actor_critic.net.policy(observation).mode

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        """V(s); NaN without a baseline."""
        net = state.actor_critic.net
        if self.baseline:
            return net.value(observation)
        return jnp.full(net.features(observation).shape[:-1], jnp.nan)

    def optimiser(self, clock: Clock) -> optax.GradientTransformation:
        rate = self.learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress)
        return optax.chain(clip_by_norm(self.max_gradient_norm), optax.adam(rate, eps=1e-5))


def discounted_returns(reward: jax.Array, ended: jax.Array, discount: jax.Array | float) -> jax.Array:
    """Gₜ = rₜ + γ Gₜ₊₁ within each episode, [T, ...]; of an episode that goes on, the part up to the last row."""

    def backward(following: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reward, ended = step
        present = reward + discount * jnp.where(ended, 0.0, following)
        return present, present

    _, returns = jax.lax.scan(backward, jnp.zeros_like(reward[0]), (reward, ended), reverse=True, unroll=16)
    return returns
