"""Actor-critic with experience replay (ACER), for discrete and continuous actions.

Wang et al., "Sample efficient actor-critic with experience replay", arXiv:1611.01224, Algorithms 1 to 3.
Departures: N environments stepped together for asynchronous threads; a fixed number of replayed updates for one
drawn from a Poisson distribution, the statistics of a categorical are its logits, not its probabilities: see `ACER`.

    (ACER.1)  run π for T steps in each of N environments; store them with the policy μ(·|s) that acted
    (ACER.2)  (ACER.3) to (ACER.8) with this rollout, then `replay_ratio` times with N stretches of T stored steps
    (ACER.3)  ρ(a) = π(a|s) / μ(a|s);  V(s) = Σ_a π(a|s) Q(s, a)
    (ACER.4)  Q_ret(sₜ, aₜ) = rₜ + γ V(sₜ₊₁) + γ min(1, ρₜ₊₁) (Q_ret(sₜ₊₁, aₜ₊₁) - Q(sₜ₊₁, aₜ₊₁))      paper, eq. (5)
    (ACER.5)  critic: down the gradient of ½ (Q_ret - Q(s, a))²                                      paper, eq. (6)
    (ACER.6)  g = ∇_φ { min(c, ρ(a)) log π(a|s) (Q_ret - V(s))
                        + E_a'~π [(1 - c/ρ(a'))₊ log π(a'|s) (Q(s, a') - V(s))] + c₂ H[π] }
              at each state, φ(s) being the statistics of π(·|s)                            paper, eqs. (7) to (10)
    (ACER.7)  z = g - max(0, (kᵀg - δ) / ‖k‖²) k with k = ∇_φ KL[π_average, π]             paper, eqs. (11) and (12)
    (ACER.8)  actor: up zᵀ ∂φ/∂θ;  then θ_average ← α θ_average + (1 - α) θ

Continuous actions have a critic of their own, the stochastic dueling network, and

    (ACER.9)   Q(s, a) = V(s) + A(s, a) - 1/n Σᵢ A(s, uᵢ), uᵢ ~ π(·|s)                               paper, eq. (13)
    (ACER.10)  V descends ½ (V_target - V(s))² too, V_target = min(1, ρ) (Q_ret - Q(s, a)) + V(s)    paper, eq. (14)
    (ACER.11)  Q_ret has min(1, ρ^(1/d)) for d dimensions; in g, Q_opc stands for it: the same recursion with 1 for the
               weight; E_a'~π is one sample                                                          paper, eq. (15)
"""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnasium import spaces

from zhixing import schedules
from zhixing.core import (
    ActionSpaces,
    Clock,
    OnPolicy,
    Spec,
    Transition,
    hyperparameters,
    require_between,
    require_positive,
)
from zhixing.distributions import Distribution
from zhixing.errors import UsageError
from zhixing.learned import Learned, Vector
from zhixing.networks import MLP, Activation, ActorCritic
from zhixing.optimisers import Optimiser, make_optimiser
from zhixing.replay import Replay
from zhixing.returns import retrace


class State(NamedTuple):
    actor_critic: Learned  # π(·|s; θ) and Q(s, a; θ)
    average: Vector  # θ_average, of which the policy is used
    clock: Clock


class Critique(NamedTuple):
    """What the critic says of the steps of a rollout; its means over π are weighted sums over K `others`."""

    q: jax.Array  # [T, N], Q(s, a) of the action taken
    value: jax.Array  # [T, N], V(s)
    others: jax.Array  # [K, T, N, ...], actions a'
    weight: jax.Array  # [K, T, N]
    others_q: jax.Array  # [K, T, N], Q(s, a')


class DiscreteCritic(eqx.Module):
    """π(·|s), and Q(s, ·) with an output for each action."""

    base: ActorCritic  # its critic is Q

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, settings: "ACER") -> "DiscreteCritic":
        base_key, critic_key = jax.random.split(key)
        base = ActorCritic.create(base_key, spec, settings)
        sizes = [weight.shape[1] for weight in base.critic.weights]
        critic = MLP.create(critic_key, *sizes, spec.num_actions, activation=settings.activation)
        return cls(replace(base, critic=critic))

    def value(self, observation: Any) -> jax.Array:
        """V(s) = Σ_a π(a|s) Q(s, a): `observation` [..., *] -> [...]."""
        pi: Any = self.base.policy(observation)
        return (jax.nn.softmax(pi.logits) * self.base.critic(self.base.features(observation))).sum(-1)

    def criticise(self, pi: Any, rollout: Transition, key: jax.Array) -> Critique:
        """All actions are the others: means over π are exact."""
        q = self.base.critic(self.base.features(rollout.observation))
        probability = jax.nn.softmax(pi.logits)
        taken = (q * jax.nn.one_hot(rollout.action, q.shape[-1])).sum(-1)
        actions = jnp.arange(q.shape[-1]).reshape(-1, *[1] * (q.ndim - 1))
        first = jnp.moveaxis(probability, -1, 0), jnp.moveaxis(q, -1, 0)
        return Critique(taken, (probability * q).sum(-1), jnp.broadcast_to(actions, first[0].shape), *first)


class StochasticDueling(eqx.Module):
    """π(·|s), V(s) and advantages A(s, a), of which Q(s, a) is made by sampling: (ACER.9)."""

    base: ActorCritic  # its critic is V
    advantage: MLP  # A, of the features and the action
    samples: int = eqx.field(static=True)  # n

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, settings: "ACER") -> "StochasticDueling":
        base_key, advantage_key = jax.random.split(key)
        base = ActorCritic.create(base_key, spec, settings)
        inputs, *hidden = [weight.shape[1] for weight in base.critic.weights]
        sizes = inputs + base.actions.outputs, *hidden, 1
        advantage = MLP.create(advantage_key, *sizes, activation=settings.activation)
        return cls(base, advantage, settings.dueling_samples)

    def value(self, observation: Any) -> jax.Array:
        """V(s): `observation` [..., *] -> [...]."""
        return self.base.value(observation)

    def criticise(self, pi: Distribution, rollout: Transition, key: jax.Array) -> Critique:
        """One sample from π is the others; n more are what the advantages are centred by."""
        samples = jax.vmap(pi.sample)(jax.random.split(key, 1 + self.samples))
        actions = jnp.concatenate([rollout.action[None], jax.lax.stop_gradient(samples)])
        features = self.base.features(rollout.observation)
        repeated = jnp.broadcast_to(features, (len(actions), *features.shape))
        advantage = self.advantage(jnp.concatenate([repeated, actions], -1))[..., 0]
        value = self.base.critic(features)[..., 0]
        q = value + advantage[:2] - advantage[2:].mean(0)  # (ACER.9)
        return Critique(q[0], value, actions[1:2], jnp.ones_like(q[1:]), q[1:])


@hyperparameters
class ACER(OnPolicy):
    """Actor-critic with experience replay.

    A fixed number of replayed updates has the mean of the paper's Poisson number, and all seeds have it in common:
    drawn numbers would differ between them, and the seeds that run side by side would all take as long as the largest.

    Logits are the statistics that the network gives, any of them is allowed, and ∇ KL[π_average, π] is bounded by them:
    π - π_average. With respect to the probabilities it is -π_average/π, which has no bound, and does not vanish where
    the two are equal.
    """

    reads_action_mask: ClassVar[bool] = True
    action_spaces: ClassVar[ActionSpaces] = (spaces.Discrete, spaces.Box)

    rollout_length: int = 20  # T
    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer
    activation: Activation = "tanh"
    shared_trunk: bool = False  # one trunk for policy and critic
    state_dependent_std: bool = False  # continuous actions: the standard deviation is an output, not a parameter
    initial_log_std: float = 0.0
    gsde_interval: int | None = None  # generalised state-dependent exploration, its noise renewed every so many steps
    dueling_samples: int = 5  # n, continuous actions: what A is centred by
    replay_capacity: int = 50_000  # transitions
    replay_ratio: int = 4  # replayed updates after each one with the newest rollout
    max_importance_weight: float = 10.0  # c
    trust_region: float | None = 1.0  # δ; None for none
    average_decay: float = 0.99  # α
    optimiser: Optimiser = "rmsprop"
    optimiser_epsilon: float = 1e-5
    learning_rate: float = 7e-4
    learning_rate_schedule: schedules.Schedule = "constant"
    discount: float = 0.99  # γ
    value_coefficient: float = 0.5  # of the critic's loss
    entropy_coefficient: float = 0.0  # c₂
    max_gradient_norm: float = 10.0  # gradients are scaled down to this norm

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "learning_rate", "max_gradient_norm", "optimiser_epsilon", "dueling_samples")
        require_positive(self, "replay_capacity", "max_importance_weight")
        require_between(self, 0, 1, "discount", "average_decay")
        require_between(self, 0, np.inf, "replay_ratio", "trust_region", "value_coefficient", "entropy_coefficient")
        require_between(self, 1, np.inf, "gsde_interval")
        if self.rollout_length * spec.num_environments > self.replay_capacity:
            raise UsageError(
                f"algorithm.replay_capacity is {self.replay_capacity}, less than the {self.rollout_length} x "
                f"{spec.num_environments} transitions of one rollout; make it larger"
            )

    @property
    def updates_per_iteration(self) -> int:
        return 1 + self.replay_ratio

    def init(self, key: jax.Array, spec: Spec) -> State:
        critic = DiscreteCritic if isinstance(spec.action_space, spaces.Discrete) else StochasticDueling
        clock = Clock.start(spec)
        actor_critic = Learned.create(critic.create(key, spec, self), self.gradient_transformation(clock))
        return State(actor_critic, actor_critic.frozen, clock)

    def memory(self, spec: Spec, example: Transition) -> Replay:
        return Replay.create(self.replay_capacity, example)

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        return ActorCritic.carry(key, spec, self)

    def act(self, state: State, carry: Any, observation: Any, key: jax.Array):  # (ACER.1)
        return state.actor_critic.net.base.act(carry, observation, key)

    def learn(self, state: State, memory: Replay, rollout: Transition, key: jax.Array):
        memory = memory.add(rollout)
        sample_key, *keys = jax.random.split(key, 2 + self.replay_ratio)
        replayed = stretches(memory, sample_key, self.replay_ratio, len(rollout.reward))
        data = jax.tree.map(lambda newest, old: jnp.concatenate([newest[None], old]), rollout, replayed)  # (ACER.2)
        state, metrics = jax.lax.scan(lambda state, x: self.update(state, *x), state, (data, jnp.stack(keys)))
        clock = state.clock.tick(steps=rollout.steps, updates=self.updates_per_iteration)
        return state._replace(clock=clock), memory, jax.tree.map(jnp.mean, metrics)

    def update(self, state: State, rollout: Transition, key: jax.Array) -> tuple[State, dict]:
        average = state.average.net.base.policy(rollout.observation)
        actor_critic, metrics = state.actor_critic.minimise(
            lambda net: self.loss(net, average, rollout, key), self.gradient_transformation(state.clock)
        )
        average = optax.incremental_update(actor_critic.frozen, state.average, 1 - self.average_decay)  # (ACER.8)
        return State(actor_critic, average, state.clock), metrics

    def loss(
        self, net: DiscreteCritic | StochasticDueling, average: Any, rollout: Transition, key: jax.Array
    ) -> tuple[jax.Array, dict]:
        """Its gradient is what the paper's algorithms accumulate, over T·N; its own value means nothing."""
        pi = net.base.policy(rollout.observation)
        critique = net.criticise(pi, rollout, key)
        fixed_pi, fixed, next_value = jax.lax.stop_gradient((pi, critique, net.value(rollout.next_observation)))
        ratio = importance(fixed_pi, rollout.extras, rollout.action)  # (ACER.3)

        def returns(trace: jax.Array) -> jax.Array:
            discount = self.discount * rollout.bootstrap
            return retrace(rollout.reward, discount, rollout.ended, fixed.q, next_value, trace)

        if net.base.actions.continuous:
            q_ret = returns(jnp.minimum(1.0, ratio ** (1 / net.base.actions.outputs)))  # (ACER.11)
            q_actor = returns(jnp.ones_like(ratio))
            value_target = jnp.minimum(1.0, ratio) * (q_ret - fixed.q) + fixed.value
            value_error = 0.5 * jnp.square(value_target - critique.value).mean()  # (ACER.10)
        else:
            q_ret = q_actor = returns(jnp.minimum(1.0, ratio))  # (ACER.4)
            value_error = jnp.float32(0)
        value_loss = 0.5 * jnp.square(q_ret - critique.q).mean() + value_error  # (ACER.5)

        ascent, limited = self.ascent(fixed_pi, average, rollout, ratio, q_actor, fixed)
        products = jax.tree.map(lambda statistic, z: (statistic * z).sum(-1).mean(), pi, ascent)
        objective = jax.tree.reduce(jnp.add, products)  # (ACER.8)
        return self.value_coefficient * value_loss - objective, {
            "value_loss": value_loss,
            "entropy": fixed_pi.entropy().mean(),
            "kl": average.kl(fixed_pi).mean(),
            "importance_weight": jnp.minimum(ratio, self.max_importance_weight).mean(),
            "truncated_fraction": jnp.mean(ratio > self.max_importance_weight),
            "trust_region_fraction": limited.mean(),
            "value": fixed.value.mean(),
            "explained_variance": 1 - jnp.var(q_ret - fixed.q) / (jnp.var(q_ret) + 1e-8),
        }

    def ascent(
        self, pi: Any, average: Any, rollout: Transition, ratio: jax.Array, q_actor: jax.Array, critique: Critique
    ) -> tuple[Any, jax.Array]:
        """-> z of each state in the form of `pi`'s statistics, and where the trust region limited it [T, N]."""
        c = self.max_importance_weight
        others_ratio = importance(pi, rollout.extras, critique.others)
        gain = jnp.minimum(c, ratio) * (q_actor - critique.value)
        correction = jax.nn.relu(1 - c / others_ratio) * (critique.others_q - critique.value)

        def objective(pi: Any) -> jax.Array:
            corrections = critique.weight * correction * pi.log_prob(critique.others)
            total = gain * pi.log_prob(rollout.action) + corrections.sum(0) + self.entropy_coefficient * pi.entropy()
            return total.sum()

        g = jax.grad(objective)(pi)  # (ACER.6)
        if self.trust_region is None:
            return g, jnp.zeros(ratio.shape, bool)
        k = jax.grad(lambda pi: average.kl(pi).sum())(pi)
        return within_trust_region(g, k, self.trust_region)  # (ACER.7)

    def policy(self, state: State, observation: Any) -> jax.Array:
        return state.actor_critic.net.base.policy(observation).mode

    def value(self, state: State, observation: Any) -> jax.Array:
        return state.actor_critic.net.value(observation)

    def gradient_transformation(self, clock: Clock) -> optax.GradientTransformation:
        rate = self.learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress)
        return make_optimiser(self.optimiser, rate, self.max_gradient_norm, self.optimiser_epsilon)


def importance(pi: Any, mu: Any, action: jax.Array) -> jax.Array:
    """ρ(a) = π(a|s) / μ(a|s)."""
    return jnp.exp(pi.log_prob(action) - mu.log_prob(action))


def within_trust_region(g: Any, k: Any, delta: float) -> tuple[Any, jax.Array]:
    """-> the z that is nearest to g with kᵀz ≤ δ, state by state, and where it is not g itself.

    `g` and `k` are pytrees of the same form with leaves [..., statistics]; (ACER.7).
    """

    def dot(x: Any, y: Any) -> jax.Array:
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: (a * b).sum(-1), x, y))

    excess = jnp.maximum(dot(k, g) - delta, 0.0)
    factor = excess / jnp.maximum(dot(k, k), jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(lambda g, k: g - factor[..., None] * k, g, k), excess > 0


def stretches(replay: Replay, key: jax.Array, count: int, length: int) -> Transition:
    """`count` times `length` successive steps of each environment, from anywhere in the ring: [count, T, N, ...]."""
    instances = replay.instances
    stored = replay.cursor.size // instances
    age = jax.random.randint(key, (count, 1, instances), length, stored + 1)  # of the first step; the newest has 1
    index = replay.cursor.position + (jnp.arange(length)[:, None] - age) * instances + jnp.arange(instances)
    return jax.tree.map(lambda x: x[index % replay.capacity], replay.data)
