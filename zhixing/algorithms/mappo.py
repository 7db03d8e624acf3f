"""Multi-agent proximal policy optimisation (MAPPO): PPO for a team, whose values see what all agents see.

Yu et al., "The surprising effectiveness of PPO in cooperative multi-agent games", arXiv:2103.01955, Algorithm 1.
The equations are PPO's (zhixing/algorithms/ppo.py) for every agent i = 1, ..., A; here is what many agents change.

    (MAPPO.1)  policies πᵢ(·|oᵢ; θ) that see their own observation; values Vᵢ(s; φ) of s = (oᵢ, oᵢ₊₁, ..., oᵢ₋₁):
               what all see, the agent's own first. Agents of a kind share θ and φ               paper, section 5.2
    (MAPPO.2)  advantages Âᵢ from agent i's own rewards and Vᵢ
    (MAPPO.3)  values are learned as (V - μ)/σ; μ and σ² follow the mean and variance of the targets  section 5.1
    (MAPPO.4)  PopArt: where μ, σ become μ', σ', the last layer becomes w σ/σ', (σ b + μ - μ')/σ', so that no V changes
    (MAPPO.5)  what is computed of an agent that is no longer there is left out                       section 5.5

PopArt: van Hasselt et al., "Learning values across many orders of magnitude", arXiv:1602.07714, Proposition 1.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from zhixing.agents import Agents
from zhixing.algorithms.ppo import PPO, Minibatch
from zhixing.core import Clock, Spec, Transition, hyperparameters, require_between
from zhixing.errors import UsageError
from zhixing.gradients import Moments
from zhixing.learned import Learned, Vector
from zhixing.networks import Activation
from zhixing.returns import generalized_advantages, state_values
from zhixing.teams import Sharing, TeamActorCritic


class Scale(NamedTuple):
    """Where the targets of K values lie: averages over all so far, the latest a little heavier."""

    mean: jax.Array  # [K], before its bias towards 0 is taken out
    square: jax.Array  # [K]
    weight: jax.Array  # [], what the two have taken in, from 0 to 1

    @classmethod
    def start(cls, count: int) -> "Scale":
        return cls(jnp.zeros(count), jnp.zeros(count), jnp.float32(0))

    @property
    def moments(self) -> tuple[jax.Array, jax.Array]:
        """-> μ, σ [K]; 0, 1 at the start."""
        known = self.weight > 0
        weight = jnp.where(known, self.weight, 1.0)
        mean = self.mean / weight
        variance = jnp.where(known, self.square / weight - jnp.square(mean), 1.0)
        return mean, jnp.sqrt(jnp.maximum(variance, 1e-2))

    def observe(self, mean: jax.Array, square: jax.Array, decay: jax.Array | float) -> "Scale":
        def follow(old: jax.Array, new: jax.Array | float) -> jax.Array:
            return decay * old + (1 - decay) * new

        return Scale(follow(self.mean, mean), follow(self.square, square), follow(self.weight, 1.0))


class State(NamedTuple):
    actor_critic: Learned  # πᵢ(·|oᵢ; θ) and Vᵢ(s; φ)
    kl_coefficient: jax.Array  # [], β
    stopped: jax.Array  # [] bool, no more steps on this rollout
    clock: Clock
    scale: Scale  # μ, σ of the targets


@hyperparameters
class MAPPO(PPO):
    """Multi-agent proximal policy optimisation."""

    many_agents: ClassVar[bool] = True
    reads_action_mask: ClassVar[bool] = False

    activation: Activation = "relu"
    sharing: Sharing = "kind"  # which agents share their networks: those of a kind, all, or none
    centralised: bool = True  # values see what all agents see; else their own observation
    agent_index: bool = True  # shared networks are told the agent's number
    normalize_value: Literal["none", "running", "popart"] = "popart"
    value_decay: float = 0.99999  # of μ and σ²

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_between(self, 0, 1, "value_decay")
        for name in ("shared_trunk", "state_dependent_std", "gsde_interval"):
            if getattr(self, name):
                raise UsageError(f"algorithm.{name} is not known to {type(self).__name__}; leave it out")

    def init(self, key: jax.Array, spec: Spec) -> Any:
        assert spec.agents is not None
        net = self.team(key, spec.agents, spec.agents.observation_size)
        return State(*self.start(net, spec), Scale.start(max(net.critic.of) + 1))

    def team(self, key: jax.Array, agents: Agents, size: int) -> TeamActorCritic:
        """Networks that read [..., A, size]."""
        networks = self.hidden, self.activation, self.sharing, self.centralised, self.initial_log_std, self.agent_index
        return TeamActorCritic.create(key, agents, size, *networks)

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        return ()

    def assess(self, state: Any, rollout: Transition) -> Any:
        def in_reward(parameters: tuple[TeamActorCritic, Scale], observation: jax.Array) -> jax.Array:
            net, scale = parameters
            return in_units(net, scale, net.value(observation))

        value, next_value = state_values(in_reward, (state.actor_critic.net, state.scale), rollout)
        discount = self.discount * rollout.bootstrap
        advantage = generalized_advantages(rollout.reward, discount, rollout.ended, value, next_value, self.gae_lambda)
        given = rollout.observation, rollout.action, rollout.extras
        return Minibatch(*given, advantage, value, advantage + value, rollout.active)  # (MAPPO.2)

    def moments(self, minibatch: Any) -> Moments:
        """Of each agent's own advantages, [A]: rivals' are of different sizes."""
        mean = average(minibatch.advantage, minibatch.active)
        return Moments(mean, average(jnp.square(minibatch.advantage - mean), minibatch.active))

    def loss(self, net: Any, batch: Any, state: Any) -> tuple[jax.Array, dict]:
        value, target = (out_of_units(net, state.scale, x) for x in (batch.value, batch.target))  # (MAPPO.3)
        loss, metrics = super().loss(net, batch._replace(value=value, target=target), state)
        mean, std = state.scale.moments
        target = by_network(net, batch.target, batch.active, mean)
        square = by_network(net, jnp.square(batch.target), batch.active, jnp.square(mean) + jnp.square(std))
        return loss, metrics | {"target": target, "squared_target": square}

    def means(self, terms: list[jax.Array], batch: Any) -> jax.Array:
        weighed = (jnp.stack(terms) * batch.active).reshape(len(terms), -1)
        return weighed.sum(-1) / batch.active.sum()  # (MAPPO.5)

    def apply(self, state: Any, gradient: jax.Array, metrics: dict) -> Any:
        state = super().apply(state, gradient, metrics)
        if self.normalize_value == "none":
            return state
        scale = state.scale.observe(metrics["target"], metrics["squared_target"], self.value_decay)
        state, old = state._replace(scale=scale), state.scale
        return state if self.normalize_value == "running" else rescaled(state, old)

    def value(self, state: Any, observation: jax.Array) -> jax.Array:
        net = state.actor_critic.net
        return in_units(net, state.scale, net.value(observation))


def in_units(net: Any, scale: Scale, value: jax.Array) -> jax.Array:
    """What a network says, [..., A], in units of the reward."""
    mean, std = (x[np.array(net.critic.of)] for x in scale.moments)
    return mean + std * value


def out_of_units(net: Any, scale: Scale, value: jax.Array) -> jax.Array:
    """(V - μ)/σ, [..., A]."""
    mean, std = (x[np.array(net.critic.of)] for x in scale.moments)
    return (value - mean) / std


def rescaled(state: State, old: Scale) -> State:
    """With the critics' last layers such that no value changes with the scale, (MAPPO.4).

    The first scale is not made up for: V = μ is a better first guess than V = 0.
    """
    learned: Any = state.actor_critic
    net: Any = learned.net
    (new_mean, new_std), known = state.scale.moments, old.weight > 0
    mean, std = (jnp.where(known, x, new) for x, new in zip(old.moments, (new_mean, new_std), strict=True))

    def last_layers(net: Any) -> tuple[jax.Array, jax.Array]:
        nets = net.critic.nets
        return nets.weights[-1], nets.biases[-1]

    weight, bias = last_layers(net)
    weight = weight * (std / new_std)[:, None, None]
    bias = (bias * std[:, None] + (mean - new_mean)[:, None]) / new_std[:, None]
    net = eqx.tree_at(last_layers, net, (weight, bias))
    return state._replace(actor_critic=Learned(Vector.of(net), learned.optimiser_state))


def average(x: jax.Array, active: jax.Array) -> jax.Array:
    """Of [..., A] over the batch, where the agent was there: [A]."""
    over = tuple(range(x.ndim - 1))
    return (x * active).sum(over) / jnp.maximum(active.sum(over), 1.0)


def by_network(net: Any, x: jax.Array, active: jax.Array, otherwise: jax.Array) -> jax.Array:
    """The mean [K] of `x` [..., A] where those that share a network were there; `otherwise` [K] if none was."""
    share = np.eye(max(net.critic.of) + 1, dtype=np.float32)[np.array(net.critic.of)]  # [A, K]
    total, count = (y.reshape(-1, y.shape[-1]).sum(0) @ share for y in (x * active, active))
    return jnp.where(count > 0, total / jnp.maximum(count, 1.0), otherwise)
