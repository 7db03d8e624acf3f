"""Proximal policy optimisation (PPO), for discrete and continuous actions.

Schulman et al., "Proximal policy optimization algorithms", arXiv:1707.06347, Algorithm 1.
Departures, all of the authors' own code: value clipping, advantage normalisation, gradient clipping, annealing.

    (PPO.1)  run π_old for T steps in each of N environments
    (PPO.2)  advantages Âₜ by generalised advantage estimation, value targets Âₜ + V_old(sₜ)
    (PPO.3)  r(θ) = π(a|s; θ) / π_old(a|s)                                                   paper, eq. (6)
    (PPO.4)  L_clip = E[min(r Â, clip(r, 1 - ε, 1 + ε) Â)]                                   paper, eq. (7)
    (PPO.5)  L_value = E[(V(s; θ) - target)²], or the larger of it and its clipped form
    (PPO.6)  for K epochs over M minibatches, a step up L_clip - c₁ L_value + c₂ H[π] - β KL[π_old, π]
             paper, eqs. (8) and (9)
    (PPO.7)  β doubles where KL > 1.5 × target, halves where KL < target / 1.5               paper, section 4
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
from zhixing.learned import Learned
from zhixing.networks import Activation, ActorCritic
from zhixing.optimisers import clip_by_norm
from zhixing.returns import generalized_advantages, state_values


class State(NamedTuple):
    actor_critic: Learned  # π(·|s; θ) and V(s; θ)
    kl_coefficient: jax.Array  # [], β
    stopped: jax.Array  # [] bool, no more steps on this rollout
    clock: Clock


class Acted(NamedTuple):
    log_prob: jax.Array  # [T, N], log π_old(a|s)
    policy: Any  # π_old(·|s), where the KL penalty needs it


class Minibatch(NamedTuple):
    observation: jax.Array  # [B, ...]
    action: jax.Array  # [B, ...]
    extras: Acted
    advantage: jax.Array  # [B], Â
    value: jax.Array  # [B], V_old(s)
    target: jax.Array  # [B]
    active: Any = ()  # [B, A] bool, of several agents those that were there


@hyperparameters
class PPO(AdvantageLearner):
    """Proximal policy optimisation."""

    reads_action_mask: ClassVar[bool] = True

    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer
    activation: Activation = "tanh"
    shared_trunk: bool = False  # one trunk for policy and value
    state_dependent_std: bool = False  # continuous actions: the standard deviation is an output, not a parameter
    initial_log_std: float = 0.0
    gsde_interval: int | None = None  # generalised state-dependent exploration, its noise renewed every so many steps
    learning_rate: float = 3e-4
    learning_rate_schedule: schedules.Schedule = "constant"
    discount: float = 0.99  # γ
    gae_lambda: float = 0.95  # λ
    clip: float = 0.2  # ε
    clip_schedule: schedules.Schedule = "constant"
    clip_value: bool = False  # clip the value's change by ε too
    epochs: int = 4  # K
    minibatches: int = 4  # M
    value_coefficient: float = 0.5  # c₁
    entropy_coefficient: float = 0.0  # c₂
    normalize_advantage: bool = True  # to mean 0 and standard deviation 1 in each minibatch
    max_gradient_norm: float = 0.5  # gradients are scaled down to this norm
    stop_kl: float | None = None  # no more steps on a rollout once KL[π_old, π] is above this
    kl_penalty: float | None = None  # the initial β; None for no penalty
    kl_target: float = 0.01  # what β is adapted to

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "epochs", "minibatches", "learning_rate", "max_gradient_norm", "clip")
        require_positive(self, "kl_target")
        require_between(self, 0, 1, "discount", "gae_lambda")
        require_between(self, 0, np.inf, "value_coefficient", "entropy_coefficient", "stop_kl", "kl_penalty")
        size = self.rollout_length * spec.num_environments
        if size % self.minibatches:
            raise UsageError(
                f"a rollout of {self.rollout_length} steps x {spec.num_environments} environments = {size} does not "
                f"divide into {self.minibatches} minibatches; change algorithm.minibatches or rollout_length"
            )

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * self.minibatches

    def init(self, key: jax.Array, spec: Spec) -> State:
        return self.start(ActorCritic.create(key, spec, self), spec)

    def start(self, net: Any, spec: Spec) -> State:
        clock = Clock.start(spec)
        beta = 0.0 if self.kl_penalty is None else self.kl_penalty
        return State(Learned.create(net, self.optimiser(clock)), jnp.float32(beta), jnp.bool(False), clock)

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        return ActorCritic.carry(key, spec, self)

    def act(self, state: State, carry: Any, observation: jax.Array, key: jax.Array):  # (PPO.1)
        action, carry, pi = state.actor_critic.net.act(carry, observation, key)
        return action, carry, Acted(pi.log_prob(action), () if self.kl_penalty is None else pi)

    def batches(self, state: State, rollout: Transition, key: jax.Array) -> Minibatch:
        return self.shuffle(self.assess(state, rollout), key)  # (PPO.2)

    def gradient(self, state: State, minibatch: Minibatch) -> tuple[jax.Array, dict]:
        return state.actor_critic.gradient(lambda net: self.loss(net, minibatch, state))

    def apply(self, state: State, gradient: jax.Array, metrics: dict) -> State:  # (PPO.6)
        learned, stopped = state.actor_critic.step(gradient, self.optimiser(state.clock)), state.stopped
        if self.stop_kl is not None:
            stopped = stopped | (metrics["kl"] > self.stop_kl)
            learned = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), state.actor_critic, learned)
        return state._replace(actor_critic=learned, stopped=stopped)

    def finish(self, state: State, metrics: dict) -> State:  # (PPO.7)
        beta, kl = state.kl_coefficient, metrics["kl"][-self.minibatches :].mean()
        beta = jnp.where(kl > 1.5 * self.kl_target, 2 * beta, jnp.where(kl < self.kl_target / 1.5, beta / 2, beta))
        return state._replace(kl_coefficient=beta, stopped=jnp.bool(False))

    def describe(self, minibatches: Minibatch) -> dict:
        return super().describe(jax.tree.map(lambda x: x[: self.minibatches], minibatches))  # each sample once

    def assess(self, state: State, rollout: Transition) -> Minibatch:
        """The rollout [T, N] with its advantages and value targets."""
        value, next_value = state_values(ActorCritic.value, state.actor_critic.net, rollout)
        discount = self.discount * rollout.bootstrap
        advantage = generalized_advantages(rollout.reward, discount, rollout.ended, value, next_value, self.gae_lambda)
        given = rollout.observation, rollout.action, rollout.extras
        return Minibatch(*given, advantage, value, advantage + value, rollout.active)

    def shuffle(self, batch: Minibatch, key: jax.Array) -> Minibatch:
        """The minibatches [K M, B, ...] of all epochs."""
        return shuffled_minibatches(batch, key, self.epochs, self.minibatches)

    def loss(self, net: ActorCritic, batch: Minibatch, state: State) -> tuple[jax.Array, dict]:
        epsilon = self.clip * schedules.remaining(self.clip_schedule, state.clock.progress)
        pi = net.policy(batch.observation)
        log_ratio = pi.log_prob(batch.action) - batch.extras.log_prob
        ratio = jnp.exp(log_ratio)  # (PPO.3)
        clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)

        value = net.value(batch.observation)
        value_error = jnp.square(value - batch.target)
        if self.clip_value:
            near = batch.value + jnp.clip(value - batch.value, -epsilon, epsilon)
            value_error = jnp.maximum(value_error, jnp.square(near - batch.target))

        # Without a penalty on it an estimate from the actions taken, which is unbiased and never negative.
        kl = ratio - 1 - log_ratio if self.kl_penalty is None else batch.extras.policy.kl(pi)
        terms = {
            "objective": jnp.minimum(ratio * batch.advantage, clipped * batch.advantage),  # (PPO.4)
            "value_loss": value_error,  # (PPO.5)
            "entropy": pi.entropy(),
            "kl": kl,
            "clip_fraction": (jnp.abs(ratio - 1) > epsilon).astype(jnp.float32),
        }
        mean = dict(zip(terms, self.means(list(terms.values()), batch), strict=True))
        penalty = 0.0 if self.kl_penalty is None else state.kl_coefficient * mean["kl"]
        loss = -mean["objective"] + self.value_coefficient * mean["value_loss"] + penalty
        loss -= self.entropy_coefficient * mean["entropy"]
        return loss, mean | {"loss": loss}

    def means(self, terms: list[jax.Array], batch: Minibatch) -> jax.Array:
        """Over the minibatch."""
        # One mean of all: at this size XLA takes as long to start a sum as to compute it.
        return jnp.stack([x.ravel() for x in terms]).mean(-1)

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        return state.actor_critic.net.policy(observation).mode

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        return state.actor_critic.net.value(observation)

    def optimiser(self, clock: Clock) -> optax.GradientTransformation:
        rate = self.learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress)
        return optax.chain(clip_by_norm(self.max_gradient_norm), optax.adam(rate, eps=1e-5))


def shuffled_minibatches(batch: Minibatch, key: jax.Array, epochs: int, minibatches: int) -> Minibatch:
    """[T, N, ...] -> [epochs x minibatches, B, ...], in a new random order in each epoch.

    A rollout that `minibatches` does not divide (the last of a run may be shorter) leaves out a few of its
    samples, others in each epoch.
    """
    length, instances = batch.advantage.shape[:2]
    minibatches = min(minibatches, length * instances)
    size = length * instances // minibatches
    order = random_orders(key, epochs, length * instances)
    order = order[:, : size * minibatches].reshape(epochs * minibatches, size)
    return jax.tree.map(lambda x: x.reshape(length * instances, *x.shape[2:])[order], batch)


def random_orders(key: jax.Array, count: int, size: int) -> jax.Array:
    """`count` random permutations of 0, ..., size - 1: [count, size]."""
    bits = jax.random.bits(key, (count, size))
    if size > 2**16:
        return jnp.argsort(bits, axis=-1)
    # The index in the lowest bits of what is sorted: sorting single numbers is five times as fast as sorting pairs.
    low = jnp.uint32(2 ** (size - 1).bit_length() - 1)
    return (jnp.sort((bits & ~low) | jnp.arange(size, dtype=jnp.uint32), axis=-1) & low).astype(jnp.int32)
