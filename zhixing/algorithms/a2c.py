"""Advantage actor-critic (A2C), for discrete and continuous actions.

Mnih et al., "Asynchronous methods for deep reinforcement learning", arXiv:1602.01783, Algorithm S3, with N
environments stepped together in the place of asynchronous threads.

With optimiser "kfac" it is ACKTR: see zhixing/kfac.py.

    (A2C.1)  run π(·|s; θ) for n steps in each of N environments
    (A2C.2)  returns Rₜ = rₜ + γ rₜ₊₁ + ... + γᵏ V(sₜ₊ₖ; θ) to the end of the n steps or of the episode, advantages
             Âₜ = Rₜ - V(sₜ; θ); with λ < 1 by generalised advantage estimation, and Rₜ = Âₜ + V(sₜ; θ)
    (A2C.3)  L(θ) = -E[Â log π(a|s; θ)] + c₁ E[(R - V(s; θ))²] - c₂ E[H[π]], where R and Â are constants
    (A2C.4)  Δθ = ∇L(θ)
    (A2C.5)  Δθ scaled down to a norm; g ← α g + (1 - α) Δθ²,  θ ← θ - η Δθ / √(g + ε)       paper, eqs. (8) and (9)
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing import schedules
from zhixing.core import Clock, Spec, Transition, hyperparameters, require_between, require_positive
from zhixing.errors import UsageError
from zhixing.gradients import AdvantageLearner
from zhixing.kfac import Curvature
from zhixing.learned import Learned, Vector
from zhixing.networks import Activation, ActorCritic
from zhixing.optimisers import Optimiser, make_optimiser
from zhixing.returns import generalized_advantages, state_values


class State(NamedTuple):
    actor_critic: Learned  # π(·|s; θ) and V(s; θ)
    clock: Clock
    curvature: Any = ()  # K-FAC's factors of the Fisher matrix


class Batch(NamedTuple):
    observation: Any  # [T, N, ...]
    action: Any  # [T, N, ...]
    advantage: jax.Array  # [T, N], Â
    value: jax.Array  # [T, N], V(s; θ)
    target: jax.Array  # [T, N], R


@hyperparameters
class A2C(AdvantageLearner):
    """Advantage actor-critic."""

    reads_action_mask: ClassVar[bool] = True

    rollout_length: int = 5  # n
    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer
    activation: Activation = "tanh"
    shared_trunk: bool = False  # one trunk for policy and value
    state_dependent_std: bool = False  # continuous actions: the standard deviation is an output, not a parameter
    initial_log_std: float = 0.0
    gsde_interval: int | None = None  # generalised state-dependent exploration, its noise renewed every so many steps
    optimiser: Optimiser = "rmsprop"
    learning_rate: float = 7e-4  # η
    learning_rate_schedule: schedules.Schedule = "constant"
    discount: float = 0.99  # γ
    gae_lambda: float = 1.0  # λ; 1 is the n-step return
    value_coefficient: float = 0.5  # c₁
    entropy_coefficient: float = 0.0  # c₂
    optimiser_epsilon: float = 1e-5  # ε of RMSProp and Adam
    max_gradient_norm: float = 0.5  # gradients are scaled down to this norm, but for K-FAC
    max_kl: float = 1e-3  # δ of K-FAC
    damping: float = 1e-2  # λ of K-FAC
    curvature_decay: float = 0.99  # of K-FAC's running averages

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "learning_rate", "max_gradient_norm", "optimiser_epsilon", "max_kl", "damping")
        require_between(self, 0, 1, "discount", "gae_lambda", "curvature_decay")
        require_between(self, 0, np.inf, "value_coefficient", "entropy_coefficient")
        require_between(self, 1, np.inf, "gsde_interval")
        if self.optimiser == "kfac" and self.gsde_interval is not None:
            raise UsageError("algorithm.optimiser kfac does not know the noise of gsde_interval; set one of the two")

    def init(self, key: jax.Array, spec: Spec) -> State:
        net, clock = ActorCritic.create(key, spec, self), Clock.start(spec)
        curvature = Curvature.create(net) if self.optimiser == "kfac" else ()
        return State(Learned.create(net, self.gradient_transformation(clock)), clock, curvature)

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        return ActorCritic.carry(key, spec, self)

    def act(self, state: State, carry: Any, observation: jax.Array, key: jax.Array):  # (A2C.1)
        action, carry, _ = state.actor_critic.net.act(carry, observation, key)
        return action, carry, ()

    def update(self, state: State, rollout: Transition, key: jax.Array) -> tuple[State, dict]:
        if self.optimiser == "kfac":
            net, rows = state.actor_critic.net, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollout.observation)
            curvature = state.curvature.observe(net, rows, key, self.curvature_decay, self.damping)
            state = state._replace(curvature=curvature)
        return super().update(state, rollout, key)

    def batches(self, state: State, rollout: Transition, key: jax.Array) -> Batch:
        """The rollout as one batch [1, T, N], with its advantages and value targets."""
        net = state.actor_critic.net
        value, next_value = state_values(ActorCritic.value, net, rollout)
        discount = self.discount * rollout.bootstrap
        advantage = generalized_advantages(rollout.reward, discount, rollout.ended, value, next_value, self.gae_lambda)
        batch = Batch(rollout.observation, rollout.action, advantage, value, advantage + value)  # (A2C.2)
        return jax.tree.map(lambda x: x[None], batch)

    def gradient(self, state: State, minibatch: Batch) -> tuple[jax.Array, dict]:
        return state.actor_critic.gradient(lambda net: self.loss(net, minibatch))  # (A2C.4)

    def loss(self, net: ActorCritic, batch: Batch) -> tuple[jax.Array, dict]:
        pi = net.policy(batch.observation)
        objective = (batch.advantage * pi.log_prob(batch.action)).mean()
        value_loss = jnp.square(batch.target - net.value(batch.observation)).mean()
        entropy = pi.entropy().mean()
        loss = -objective + self.value_coefficient * value_loss - self.entropy_coefficient * entropy  # (A2C.3)
        return loss, {"loss": loss, "objective": objective, "value_loss": value_loss, "entropy": entropy}

    def apply(self, state: State, gradient: jax.Array, metrics: dict) -> State:
        learned = state.actor_critic
        if self.optimiser == "kfac":
            vector = Vector(gradient, learned.structure)
            gradient = state.curvature.natural_gradient(vector, self.damping, self.rate(state.clock), self.max_kl)
        stepped = learned.step(gradient, self.gradient_transformation(state.clock))  # (A2C.5)
        return state._replace(actor_critic=stepped)

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        return state.actor_critic.net.policy(observation).mode

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        return state.actor_critic.net.value(observation)

    def gradient_transformation(self, clock: Clock) -> optax.GradientTransformation:
        return make_optimiser(self.optimiser, self.rate(clock), self.max_gradient_norm, self.optimiser_epsilon)

    def rate(self, clock: Clock) -> jax.Array | float:
        return self.learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress)
