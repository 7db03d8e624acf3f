"""Trust region policy optimisation (TRPO), for discrete and continuous actions.

Schulman et al., "Trust region policy optimization", arXiv:1502.05477, single path.
Departures: advantages by generalised advantage estimation (arXiv:1506.02438), normalised; the value is learned by Adam.

    (TRPO.1)  run π_old for T steps in each of N environments
    (TRPO.2)  advantages Âₜ by generalised advantage estimation, value targets Âₜ + V(sₜ)
    (TRPO.3)  L(θ) = E[π(a|s; θ) / π_old(a|s) Â]                                              paper, eq. (14)
    (TRPO.4)  D(θ) = E[KL(π_old(·|s) ‖ π(·|s; θ))];  maximise L(θ) subject to D(θ) ≤ δ          paper, eq. (14)
    (TRPO.5)  F = E[Jᵀ M J], the Hessian of D at θ_old: J the Jacobian of the distribution's parameters in θ,
              M the Hessian of the KL divergence in them                                      paper, appendix C.1
    (TRPO.6)  x ≈ (F + cI)⁻¹ ∇L(θ_old) by conjugate gradient                                  paper, appendix C
    (TRPO.7)  θ = θ_old + αʲ √(2δ / xᵀ(F + cI)x) x with the first j = 0, 1, ... for which L has risen and D ≤ δ;
              θ_old if there is none                                                          paper, appendix C
    (TRPO.8)  for K epochs over M minibatches, a step of Adam down E[(V(s; w) - target)²]

With `reuse` the expectations are over the last rollouts too: generalised TRPO of Queeney, Paschalidis & Cassandras,
"Generalized policy improvement algorithms with theoretically supported sample reuse", arXiv:2206.13714.

    (TRPO.9)  in (TRPO.3) the probability is that of the policy μ that acted, π(a|s; θ) / μ(a|s); in (TRPO.2), with
              cₜ = min(1, π_old(aₜ|sₜ) / μ(aₜ|sₜ)), λ is λcₜ₊₁ and the targets are cₜÂₜ + V(sₜ)
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing import schedules
from zhixing.algorithms.ppo import random_orders
from zhixing.core import Clock, OnPolicy, Spec, Transition, hyperparameters, require_between, require_positive
from zhixing.distributions import Distribution
from zhixing.errors import UsageError
from zhixing.learned import Learned, Vector
from zhixing.linear_algebra import conjugate_gradient
from zhixing.networks import Activation, ActorCritic
from zhixing.returns import generalized_advantages, state_values

Mean = Callable[[jax.Array], jax.Array]  # [T, N] -> []


class State(NamedTuple):
    actor: Vector  # π(·|s; θ): an ActorCritic without its critic
    critic: Learned  # V(s; w): the critic alone
    clock: Clock


class Acted(NamedTuple):
    log_prob: jax.Array  # [T, N], log μ(a|s)
    weight: jax.Array  # [T, N], 1; 0 in the place of an earlier rollout that there is not yet


class Search(NamedTuple):
    """A step of the line search."""

    tries: jax.Array  # [] int32
    accepted: jax.Array  # [] bool
    parameters: jax.Array  # [P], θ
    kl: jax.Array  # [], D(θ)
    improvement: jax.Array  # [], L(θ) - L(θ_old)


@hyperparameters
class TRPO(OnPolicy):
    """Trust region policy optimisation."""

    reads_action_mask: ClassVar[bool] = True
    shared_trunk: ClassVar[bool] = False  # a step of the value's would leave the policy's trust region

    rollout_length: int = 1024  # T
    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer
    activation: Activation = "tanh"
    state_dependent_std: bool = False  # continuous actions: the standard deviation is an output, not a parameter
    initial_log_std: float = 0.0
    gsde_interval: int | None = None  # generalised state-dependent exploration, its noise renewed every so many steps
    discount: float = 0.99  # γ
    gae_lambda: float = 0.95  # λ
    normalize_advantage: bool = True  # to mean 0 and standard deviation 1
    max_kl: float = 0.01  # δ
    damping: float = 0.1  # c
    conjugate_gradient_steps: int = 15
    fisher_stride: int = 1  # the Fisher matrix is averaged over every so manieth time step
    backtracks: int = 10  # lengths of step that are tried
    backtrack_factor: float = 0.8  # α, from one to the next
    reuse: int = 0  # earlier rollouts that are learned from once more, with importance weights
    learning_rate: float = 1e-3  # of the value
    learning_rate_schedule: schedules.Schedule = "constant"
    epochs: int = 10  # K
    minibatches: int = 16  # M

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "max_kl", "conjugate_gradient_steps", "fisher_stride", "backtracks")
        require_positive(self, "learning_rate", "epochs", "minibatches", "backtrack_factor")
        require_between(self, 0, 1, "discount", "gae_lambda", "backtrack_factor")
        require_between(self, 0, np.inf, "damping", "reuse")
        require_between(self, 1, np.inf, "gsde_interval")
        size = self.rollout_length * spec.num_environments
        if size % self.minibatches:
            raise UsageError(
                f"a rollout of {self.rollout_length} steps x {spec.num_environments} environments = {size} does not "
                f"divide into {self.minibatches} minibatches; change algorithm.minibatches or rollout_length"
            )

    @property
    def updates_per_iteration(self) -> int:
        return 1 + self.epochs * self.minibatches

    def init(self, key: jax.Array, spec: Spec) -> State:
        net = ActorCritic.create(key, spec, self)
        actor = eqx.tree_at(lambda net: net.critic, net, None)
        critic = eqx.tree_at(lambda net: (net.actor, net.log_std), net, (None, None), is_leaf=lambda x: x is None)
        clock = Clock.start(spec)
        return State(Vector.of(actor), Learned.create(critic, self.optimiser(clock)), clock)

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        return ActorCritic.carry(key, spec, self)

    def act(self, state: State, carry: Any, observation: jax.Array, key: jax.Array):  # (TRPO.1)
        action, carry, pi = state.actor.net.act(carry, observation, key)
        log_prob = pi.log_prob(action)
        return action, carry, Acted(log_prob, jnp.ones_like(log_prob))

    def memory(self, spec: Spec, example: Transition) -> Any:
        """The last `reuse` rollouts, [reuse x T, N, ...]; weights of 0 until they are there."""
        rows = self.reuse * self.rollout_length
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), example) if self.reuse else ()

    def learn(self, state: State, memory: Any, rollout: Transition, key: jax.Array) -> tuple[State, Any, dict]:
        data = rollout
        if self.reuse:
            # Rollouts lie one after the other; the recursions over time must not run from one into the next.
            rollout = rollout._replace(truncated=rollout.truncated.at[-1].set(True))
            data = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), memory, rollout)
            memory = jax.tree.map(lambda x: x[-self.reuse * self.rollout_length :], data)
        state, metrics = self.update(state, data, key)
        clock = state.clock.tick(steps=rollout.steps, updates=self.updates_per_iteration)
        return state._replace(clock=clock), memory, metrics

    def update(self, state: State, rollout: Transition, key: jax.Array) -> tuple[State, dict]:
        advantage, target = self.advantages(state, rollout)
        actor, metrics = self.improve(state.actor, rollout, advantage)
        critic, value_metrics = self.fit(state, rollout, target, key)
        return State(actor, critic, state.clock), metrics | value_metrics

    def advantages(self, state: State, rollout: Transition) -> tuple[jax.Array, jax.Array]:
        """-> Â, and the targets of V, [T, N]."""
        critic = state.critic.net
        value, next_value = state_values(ActorCritic.value, critic, rollout)
        cut, trust = rollout.ended, jnp.float32(1)
        if self.reuse:
            log_prob = state.actor.net.policy(rollout.observation).log_prob(rollout.action)
            trust = jnp.exp(jnp.minimum(0.0, log_prob - rollout.extras.log_prob))  # c of (TRPO.9)
            cut = 1.0 - jnp.roll(trust, -1, axis=0) * (1.0 - rollout.ended)
        discount = self.discount * rollout.bootstrap
        advantage = generalized_advantages(rollout.reward, discount, cut, value, next_value, self.gae_lambda)
        return advantage, value + trust * advantage  # (TRPO.2)

    def improve(self, actor: Vector, rollout: Transition, advantage: jax.Array) -> tuple[Vector, dict]:
        """A step of the policy within its trust region."""
        mean = weighted_mean(rollout.extras.weight)
        if self.normalize_advantage:
            centred = advantage - mean(advantage)
            advantage = centred / (jnp.sqrt(mean(jnp.square(centred))) + 1e-8)

        def surrogate(pi: Distribution) -> jax.Array:  # (TRPO.3), (TRPO.9)
            ratio = jnp.exp(pi.log_prob(rollout.action) - rollout.extras.log_prob)
            return mean(ratio * advantage)

        policy = policy_at(actor, rollout.observation)
        old, pull_back = jax.vjp(policy, actor.parameters)
        objective, slope = jax.value_and_grad(surrogate)(old)
        (gradient,) = pull_back(slope)

        # What is left of a division by the stride comes first, so that the newest step is always among them.
        first, stride = (len(advantage) - 1) % self.fisher_stride, self.fisher_stride
        observation, weight = jax.tree.map(lambda x: x[first::stride], (rollout.observation, rollout.extras.weight))
        fisher = fisher_product(actor, observation, weighted_mean(weight), self.damping)
        x, residual = conjugate_gradient(fisher, gradient, self.conjugate_gradient_steps)  # (TRPO.6)
        length = x @ (gradient - residual)  # xᵀ(F + cI)x
        step = jnp.sqrt(2 * self.max_kl / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)) * x

        def measure(parameters: jax.Array) -> tuple[jax.Array, jax.Array]:  # (TRPO.4)
            pi = policy(parameters)
            return mean(old.kl(pi)), surrogate(pi) - objective

        found = self.line_search(actor.parameters, step, measure)
        return Vector(found.parameters, actor.structure), {
            "kl": found.kl,
            "improvement": found.improvement,
            "step_scale": jnp.where(found.accepted, self.backtrack_factor ** (found.tries - 1), 0.0),
            "entropy": mean(old.entropy()),
            "gradient_norm": jnp.linalg.norm(gradient),
        }

    def line_search(self, old: jax.Array, step: jax.Array, measure: Callable[[jax.Array], tuple]) -> Search:
        """`old` + αʲ `step` [P] with the first j that is acceptable, else `old` to the bit.

        `measure` is θ -> D(θ), L(θ) - L(θ_old). Under the seeds' vmap the slowest seed says how long it goes on.
        """

        def attempt(search: Search) -> Search:
            parameters = old + self.backtrack_factor**search.tries * step
            kl, improvement = measure(parameters)
            accepted = (kl <= self.max_kl) & (improvement > 0)  # False too where either is not a number
            return Search(search.tries + 1, accepted, parameters, kl, improvement)

        start = Search(jnp.int32(0), jnp.bool(False), old, jnp.float32(0), jnp.float32(0))
        found = jax.lax.while_loop(lambda s: ~s.accepted & (s.tries < self.backtracks), attempt, start)  # (TRPO.7)
        return jax.tree.map(lambda new, none: jnp.where(found.accepted, new, none), found, start)

    def fit(self, state: State, rollout: Transition, target: jax.Array, key: jax.Array) -> tuple[Learned, dict]:
        """Regression of the value on its targets (TRPO.8)."""
        mean = weighted_mean(rollout.extras.weight)
        value, size = state.critic.net.value(rollout.observation), target.size
        weight = rollout.extras.weight / rollout.extras.weight.mean()
        samples = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), (rollout.observation, target, weight))
        optimiser = self.optimiser(state.clock)

        def step(critic: Learned, rows: jax.Array) -> tuple[Learned, dict]:
            observation, target, weight = jax.tree.map(lambda x: x[rows], samples)

            def loss(net: ActorCritic) -> tuple[jax.Array, dict]:
                value_loss = (weight * jnp.square(net.value(observation) - target)).mean()
                return value_loss, {"value_loss": value_loss}

            critic, metrics = critic.minimise(loss, optimiser)
            return critic, {"value_loss": metrics["value_loss"]}

        minibatches = min(self.minibatches, size)
        batch = size // minibatches
        orders = random_orders(key, self.epochs, size)[:, : batch * minibatches]
        critic, metrics = jax.lax.scan(step, state.critic, orders.reshape(self.epochs * minibatches, batch))

        def variance(x: jax.Array) -> jax.Array:
            return mean(jnp.square(x - mean(x)))

        return critic, jax.tree.map(jnp.mean, metrics) | {
            "explained_variance": 1 - variance(target - value) / (variance(target) + 1e-8),
            "value": mean(value),
        }

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        return state.actor.net.policy(observation).mode

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        return state.critic.net.value(observation)

    def optimiser(self, clock: Clock) -> optax.GradientTransformation:
        rate = self.learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress)
        return optax.adam(rate, eps=1e-5)


def weighted_mean(weight: jax.Array) -> Mean:
    weight = weight / weight.mean()
    return lambda x: (weight * x).mean()


def policy_at(actor: Vector, observation: Any) -> Callable[[jax.Array], Any]:
    """θ [P] -> π(·|s; θ) at `observation`."""
    return lambda parameters: Vector(parameters, actor.structure).net.policy(observation)


def fisher_product(
    actor: Vector, observation: Any, mean: Mean, damping: jax.Array | float
) -> Callable[[jax.Array], jax.Array]:
    """v [P] ↦ (F + cI) v, where F is the Fisher matrix of the policy at `observation`, averaged by `mean`.

    That is the Hessian of D, of whose two terms one is zero at θ_old: there the gradient of the KL divergence is.
    """
    old, forward = jax.linearize(policy_at(actor, observation), actor.parameters)  # v ↦ Jv
    backward = jax.linear_transpose(forward, actor.parameters)  # u ↦ Jᵀu
    _, curvature = jax.linearize(jax.grad(lambda pi: mean(old.kl(pi))), old)  # u ↦ Mu

    def product(v: jax.Array) -> jax.Array:
        (image,) = backward(curvature(forward(v)))  # (TRPO.5)
        return image + damping * v

    return product
