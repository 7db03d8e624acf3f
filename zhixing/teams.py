"""Networks of many agents: one for each, or one that several share, called on all agents at once."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from zhixing.agents import Agents
from zhixing.distributions import Categorical, DiagonalNormal
from zhixing.networks import MLP, Activation

Sharing = Literal["kind", "all", "none"]


def networks_of(agents: Agents, sharing: Sharing) -> tuple[int, ...]:
    """Which of K networks is whose, [A]: agents of a kind share one, or all do, or none."""
    match sharing:
        case "kind":
            return agents.kinds
        case "all":
            return (0,) * agents.count
        case "none":
            return tuple(range(agents.count))


class Members(eqx.Module):
    """K networks of one architecture for A agents. Called on [..., A, *], each agent's by its own network."""

    nets: Any  # one network whose leaves are [K, ...]
    of: tuple[int, ...] = eqx.field(static=True)  # [A], which of the K is whose

    @classmethod
    def create(cls, create: Callable[[jax.Array], Any], key: jax.Array, of: tuple[int, ...]) -> "Members":
        """`create` is key -> a network."""
        count = max(of) + 1
        keys = key[None] if count == 1 else jax.random.split(key, count)
        return cls(jax.vmap(create)(keys), of)

    @property
    def each(self) -> Any:
        """Every agent's network, [A, ...]."""
        return jax.tree.map(lambda x: x[np.array(self.of)], self.nets)

    def __call__(self, x: jax.Array) -> jax.Array:
        if max(self.of) == 0:  # one for all: agents are more samples
            return jax.tree.map(lambda leaf: leaf[0], self.nets)(x)
        return jax.vmap(lambda net, x: net(x), in_axes=(0, -2), out_axes=-2)(self.each, x)


class TeamActorCritic(eqx.Module):
    """Policies π(·|oᵢ) that see what their agent sees, and values Vᵢ that may see what all do.

    Shared networks are told whose turn it is, by a one-hot vector behind the observation.
    """

    actor: Members
    critic: Members
    log_std: jax.Array | None  # [K, m] of continuous actions
    allowed: tuple[tuple[bool, ...], ...] = eqx.field(static=True)  # [A, m], which actions an agent has
    discrete: bool = eqx.field(static=True)
    centralised: bool = eqx.field(static=True)
    told: bool = eqx.field(static=True)  # shared networks are told the agent's number

    @classmethod
    def create(
        cls,
        key: jax.Array,
        agents: Agents,
        size: int,
        hidden: tuple[int, ...],
        activation: Activation,
        sharing: Sharing,
        centralised: bool,
        initial_log_std: float,
        told: bool,
    ) -> "TeamActorCritic":
        """Networks that read [..., A, size]."""
        # The same keys as those of a single agent's networks.
        _, actor_key, critic_key = jax.random.split(key, 3)
        of, m = networks_of(agents, sharing), agents.action_size
        told = told and len(set(of)) < agents.count
        identity = agents.count if told else 0
        seen = size * agents.count if centralised else size

        def actor(key: jax.Array) -> MLP:
            return MLP.create(key, size + identity, *hidden, m, activation=activation, output_scale=0.01)

        def critic(key: jax.Array) -> MLP:
            return MLP.create(key, seen + identity, *hidden, 1, activation=activation)

        log_std = None if agents.discrete else jnp.full((max(of) + 1, m), initial_log_std)
        allowed = tuple(map(tuple, agents.allowed.tolist()))
        members = Members.create(actor, actor_key, of), Members.create(critic, critic_key, of)
        return cls(*members, log_std, allowed, agents.discrete, centralised, told)

    def policy(self, observation: jax.Array) -> Categorical | DiagonalNormal:
        """π(·|oᵢ) of every agent: `observation` [..., A, d] -> a distribution with leading axes [..., A]."""
        outputs, allowed = self.actor(self.with_identity(observation)), np.array(self.allowed)
        if self.discrete:
            pi = Categorical(outputs)
            return pi if allowed.all() else pi.masked(jnp.asarray(allowed))
        assert self.log_std is not None
        log_std = jnp.broadcast_to(self.log_std[np.array(self.actor.of)], outputs.shape)
        # Numbers that an agent does not have are drawn from what no parameter changes.
        return DiagonalNormal(jnp.where(allowed, outputs, 0.0), jnp.where(allowed, log_std, 0.0))

    def value(self, observation: jax.Array) -> jax.Array:
        """Vᵢ: `observation` [..., A, d] -> [..., A]."""
        seen = seen_by_all(observation) if self.centralised else observation
        return self.critic(self.with_identity(seen))[..., 0]

    def act(self, carry: Any, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, Any, Any]:
        """-> actions drawn from π [N, A] or [N, A, m], the carry, and π."""
        pi = self.policy(observation)
        return pi.sample(key), carry, pi

    def with_identity(self, x: jax.Array) -> jax.Array:
        if not self.told:
            return x
        count = x.shape[-2]
        return jnp.concatenate([x, jnp.broadcast_to(jnp.eye(count), (*x.shape[:-1], count))], -1)


def seen_by_all(x: jax.Array) -> jax.Array:
    """What all agents have: [..., A, d] -> [..., A, A d], in each row the agent's own first, then the next one's."""
    return jnp.concatenate([jnp.roll(x, -k, axis=-2) for k in range(x.shape[-2])], -1)
