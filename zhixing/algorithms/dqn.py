"""Deep Q-network (DQN) and what was added to it: each addition is a setting, and they combine.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 518, 2015, Algorithm 1.
Departures: Adam for RMSProp; frame stacking is the environment's, as a transform.
Double DQN: van Hasselt, Guez & Silver, arXiv:1509.06461, eq. (4). Dueling networks: Wang et al., arXiv:1511.06581,
eqs. (8) and (9). Prioritised replay: see `zhixing.priorities`. n-step targets: Sutton & Barto, eq. (7.4);
Hessel et al., "Rainbow", arXiv:1710.02298, section 3.

    (DQN.1)  with probability ε a random action a, otherwise a = argmaxₐ Q(s, a; θ)
    (DQN.2)  execute a, observe r and s', store (s, a, r, s') in the replay
    (DQN.3)  sample a minibatch of transitions from the replay
    (DQN.4)  y = r                                          if the episode terminates at s'
             y = r + γ maxₐ Q(s', a; θ⁻)                    otherwise; with n steps, γⁿ and the rewards between
    (DQN.5)  a gradient step on (y - Q(s, a; θ))² (or Huber's loss of it) with respect to θ
    (DQN.6)  every C updates θ⁻ = θ; or, softly, θ⁻ ← (1 - τ) θ⁻ + τ θ at each; or, naively, θ⁻ = θ always
    (DQN.7)  double:   y = r + γ Q(s', argmaxₐ Q(s', a; θ); θ⁻)
    (DQN.8)  dueling:  Q(s, a) = V(s) + A(s, a) - meanₐ A(s, a), or - maxₐ A(s, a)
"""

from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zhixing import exploration, schedules
from zhixing.core import (
    DISCRETE,
    ActionSpaces,
    Clock,
    Spec,
    hyperparameters,
    require_between,
    require_positive,
)
from zhixing.learned import Learned, Vector
from zhixing.networks import Activation, Dueling, QNetwork, Torso
from zhixing.off_policy import OffPolicy
from zhixing.optimisers import clip_by_norm
from zhixing.transition import Experience


class State(NamedTuple):
    q: Learned  # Q(·; θ)
    q_target: Vector  # Q(·; θ⁻)
    clock: Clock


@hyperparameters
class DQN(OffPolicy):
    """Deep Q-network."""

    action_spaces: ClassVar[ActionSpaces] = DISCRETE

    torso: Torso = "none"  # convolutions before the hidden layers, for images
    hidden: tuple[int, ...] = (256, 256)  # units of each hidden layer
    activation: Activation = "relu"
    dueling: Dueling = "none"  # value and advantages apart, joined by their mean or their max
    double: bool = False  # the online network chooses the action that the target network values
    learning_rate: float = 1e-3
    learning_rate_schedule: schedules.Schedule = "constant"
    epsilon_start: float = 1.0  # ε at the start
    epsilon_end: float = 0.05  # ε after annealing
    epsilon_fraction: float = 0.1  # the part of the run over which ε goes from start to end
    target_update: Literal["hard", "polyak", "none"] = "hard"  # none: the online network is its own target
    target_period: int = 200  # C, updates between two hard copies
    polyak: float = 0.005  # τ, of soft updates
    loss: Literal["huber", "squared"] = "huber"
    max_gradient_norm: float = 10.0  # gradients are scaled down to this norm

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "learning_rate", "target_period", "max_gradient_norm")
        require_between(self, 0, 1, "epsilon_start", "epsilon_end", "epsilon_fraction", "polyak")

    def init(self, key: jax.Array, spec: Spec) -> State:
        net = QNetwork.create(
            key, spec.observation_space, spec.num_actions, self.hidden, self.activation, self.dueling, self.torso
        )
        clock = Clock.start(spec)
        q = Learned.create(net, self.optimiser(clock))
        return State(q, q.frozen, clock)

    def act(self, state: State, carry: tuple, observation: jax.Array, key: jax.Array):  # (DQN.1)
        epsilon = schedules.linear(self.epsilon_start, self.epsilon_end, self.epsilon_fraction, state.clock.progress)
        return exploration.epsilon_greedy(key, state.q(observation), epsilon), carry, ()

    def update(self, state: State, batch: Experience, key: jax.Array) -> tuple[State, dict]:
        next_q = state.q_target(batch.next_observation)
        best = (state.q(batch.next_observation) if self.double else next_q).argmax(-1)  # (DQN.7)
        next_value = taken(next_q, best)
        target = batch.reward + batch.discount * next_value  # (DQN.4)

        def loss(q: QNetwork) -> tuple[jax.Array, dict]:  # (DQN.5)
            q_taken = taken(q(batch.observation), batch.action)
            error = optax.huber_loss if self.loss == "huber" else optax.squared_error
            loss = (batch.weight * error(q_taken, target)).mean()
            return loss, {"loss": loss, "q": q_taken.mean(), "td_error": jnp.abs(target - q_taken)}

        q, metrics = state.q.minimise(loss, self.optimiser(state.clock))

        if self.target_update == "hard":  # (DQN.6)
            q_target = optax.periodic_update(q.frozen, state.q_target, state.clock.updates + 1, self.target_period)
        elif self.target_update == "polyak":
            q_target = optax.incremental_update(q.frozen, state.q_target, self.polyak)
        else:
            q_target = q.frozen
        return State(q, q_target, state.clock), metrics

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        return state.q(observation).argmax(-1).astype(jnp.int32)

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        return state.q(observation).max(-1)

    def optimiser(self, clock: Clock) -> optax.GradientTransformation:
        rate = self.learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress)
        return optax.chain(clip_by_norm(self.max_gradient_norm), optax.adam(rate))


def taken(q: jax.Array, action: jax.Array) -> jax.Array:
    """Q(s, a) of the actions [B] among `q` [B, A]; as a product, whose gradient is cheaper than that of an index."""
    return (q * jax.nn.one_hot(action, q.shape[-1])).sum(-1)
