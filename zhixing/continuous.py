"""What the off-policy algorithms for continuous actions share: their settings, and networks that read an action.

Actions lie in [-1, 1], whatever the environment's bounds: its transform rescales them.
"""

from typing import Any, ClassVar

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import CONTINUOUS, ActionSpaces, Spec, hyperparameters, require_between, require_positive
from zhixing.distributions import SquashedNormal
from zhixing.errors import UsageError
from zhixing.exploration import ActionNoise, first_noise
from zhixing.networks import MLP, Encoder
from zhixing.off_policy import OffPolicyActorCritic

# The gain of PyTorch's layers, with which the published settings were found.
GAIN = 3**-0.5
LEAST_LOG_STD, LARGEST_LOG_STD = -20.0, 2.0


@hyperparameters
class ContinuousActorCritic(OffPolicyActorCritic):
    """Of continuous actions: what DDPG, TD3 and SAC share."""

    action_spaces: ClassVar[ActionSpaces] = CONTINUOUS

    layer_norm: bool = False  # in the hidden layers of actor and critics
    dropout: float | None = None  # the share of the critics' hidden units that is left out of an update
    noise: ActionNoise = "none"  # on top of the policy's action
    noise_std: float = 0.1  # σ, in units of half the range of the actions
    noise_theta: float = 0.15  # θ of the Ornstein-Uhlenbeck noise
    noise_dt: float = 0.01  # Δt of the Ornstein-Uhlenbeck noise

    def check(self, spec: Spec) -> None:
        super().check(spec)
        action_size(spec.action_space)
        require_positive(self, "noise_dt")
        require_between(self, 0, 0.99, "dropout")
        require_between(self, 0, np.inf, "noise_std", "noise_theta")

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        return first_noise(self, spec.num_environments, action_size(spec.action_space))


class ActionValue(eqx.Module):
    """Q(s, a)."""

    mlp: MLP
    encoder: Encoder = eqx.field(static=True)

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, settings: ContinuousActorCritic) -> "ActionValue":
        encoder = Encoder.of(spec.observation_space)
        sizes = encoder.size + action_size(spec.action_space), *settings.hidden, 1
        return cls(layers(key, settings, *sizes, critic=True), encoder)

    def __call__(self, observation: Any, action: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`observation` [B, ...], `action` [B, d] -> [B]; `key` is the dropout's, without it nothing is dropped."""
        return self.mlp(jnp.concatenate([self.encoder(observation), action], -1), key)[..., 0]


class StateValue(eqx.Module):
    """V(s)."""

    mlp: MLP
    encoder: Encoder = eqx.field(static=True)

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, settings: ContinuousActorCritic) -> "StateValue":
        encoder = Encoder.of(spec.observation_space)
        return cls(layers(key, settings, encoder.size, *settings.hidden, 1, critic=True), encoder)

    def __call__(self, observation: Any) -> jax.Array:
        """`observation` [B, ...] -> [B]."""
        return self.mlp(self.encoder(observation))[..., 0]


class DeterministicActor(eqx.Module):
    """a = μ(s)."""

    mlp: MLP
    encoder: Encoder = eqx.field(static=True)

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, settings: ContinuousActorCritic) -> "DeterministicActor":
        encoder = Encoder.of(spec.observation_space)
        return cls(layers(key, settings, encoder.size, *settings.hidden, action_size(spec.action_space)), encoder)

    def __call__(self, observation: Any) -> jax.Array:
        """`observation` [B, ...] -> actions [B, d] within [-1, 1]."""
        return jnp.tanh(self.mlp(self.encoder(observation)))


class SquashedActor(eqx.Module):
    """π(·|s), a normal distribution squashed by tanh."""

    mlp: MLP
    encoder: Encoder = eqx.field(static=True)

    @classmethod
    def create(cls, key: jax.Array, spec: Spec, settings: ContinuousActorCritic) -> "SquashedActor":
        encoder = Encoder.of(spec.observation_space)
        return cls(layers(key, settings, encoder.size, *settings.hidden, 2 * action_size(spec.action_space)), encoder)

    def __call__(self, observation: Any) -> SquashedNormal:
        """`observation` [B, ...] -> a distribution over actions [B, d]."""
        mean, log_std = jnp.split(self.mlp(self.encoder(observation)), 2, axis=-1)
        return SquashedNormal(mean, jnp.clip(log_std, LEAST_LOG_STD, LARGEST_LOG_STD))


def layers(key: jax.Array, settings: ContinuousActorCritic, *sizes: int, critic: bool = False) -> MLP:
    """Only a critic drops units: what is dropped of an actor would be dropped from the behaviour too."""
    return MLP.create(
        key,
        *sizes,
        activation=settings.activation,
        hidden_scale=GAIN,
        output_scale=GAIN,
        layer_norm=settings.layer_norm,
        dropout=(settings.dropout or 0.0) if critic else 0.0,
    )


def action_size(space: gymnasium.Space) -> int:
    """d, of actions that lie in [-1, 1]ᵈ."""
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        raise UsageError(f"the actions {space} must be a Box with one axis and finite bounds; wrap the environment")
    return int(space.shape[0])
