"""Networks as pytrees that are called. Every leaf is a float32 array; any number of leading axes goes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.convolution import TORSOS, Convolutions, ImageEncoder
from zhixing.distributions import Categorical, DiagonalNormal
from zhixing.errors import UsageError
from zhixing.initialisers import orthogonal

Activation = Literal["tanh", "relu"]
Dueling = Literal["none", "mean", "max"]
Torso = Literal["none", "minatar", "nature"]


class MLP(eqx.Module):
    """Multi-layer perceptron over the last axis; orthogonal initial weights, zero biases."""

    weights: list[jax.Array]  # [outputs, inputs] a layer: their gradients then need no transposition
    biases: list[jax.Array]
    activation: Callable = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        key: jax.Array,
        *sizes: int,
        activation: Activation = "tanh",
        hidden_scale: float = 2**0.5,
        output_scale: float = 1.0,
    ) -> "MLP":
        """Layers between the given `sizes`; the hidden weights have gain `hidden_scale`, the last `output_scale`."""
        keys = jax.random.split(key, len(sizes) - 1)
        scales = [hidden_scale] * (len(keys) - 1) + [output_scale]
        weights = [
            scale * orthogonal(k, inputs, outputs).T
            for scale, k, inputs, outputs in zip(scales, keys, sizes[:-1], sizes[1:], strict=True)
        ]
        return cls(weights, [jnp.zeros(outputs) for outputs in sizes[1:]], getattr(jax.nn, activation))

    def __call__(self, x: jax.Array) -> jax.Array:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = self.activation(product(x, weight) + bias)
        return product(x, self.weights[-1]) + self.biases[-1]


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T`, [..., inputs] and [outputs, inputs] -> [..., outputs], without the transposition made."""
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


@dataclass(frozen=True)
class Encoder:
    """Turns an observation into the vector that a network reads: numbers flattened, indices one-hot."""

    shape: tuple[int, ...]  # of one observation
    sizes: tuple[int, ...] | None  # the number of values of each index; None for numbers

    @classmethod
    def of(cls, space: gymnasium.Space) -> "Encoder":
        match space:
            case spaces.Box() | spaces.MultiBinary():
                return cls(tuple(space.shape), None)
            case spaces.Discrete():
                return cls((), (int(space.n),))
            case spaces.MultiDiscrete() if len(space.shape) == 1:
                return cls(tuple(space.shape), tuple(int(n) for n in space.nvec))
            case _:
                raise UsageError(
                    f"no network reads the observation space {space}; "
                    "wrap the environment in gymnasium.wrappers.FlattenObservation"
                )

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) if self.sizes is None else sum(self.sizes)

    def __call__(self, observation: jax.Array) -> jax.Array:
        if self.sizes is None:
            leading = observation.shape[: observation.ndim - len(self.shape)]
            return observation.reshape(*leading, self.size).astype(jnp.float32)
        if not self.shape:
            return jax.nn.one_hot(observation, self.sizes[0])
        indices = [jax.nn.one_hot(observation[..., i], n) for i, n in enumerate(self.sizes)]
        return jnp.concatenate(indices, -1)


class QNetwork(eqx.Module):
    """Q(s, ·) of a discrete action space; dueling, of a value and advantages that share all layers but the last two.

    Wang et al., "Dueling network architectures for deep reinforcement learning", arXiv:1511.06581, eqs. (8) and (9).
    """

    torso: Convolutions | None  # of images
    trunk: MLP | None  # features that both streams read, if dueling
    advantage: MLP  # A(s, ·), or Q(s, ·) itself
    state_value: MLP | None  # V(s), if dueling
    encoder: Encoder | ImageEncoder = eqx.field(static=True)
    dueling: Dueling = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        key: jax.Array,
        observation_space: gymnasium.Space,
        actions: int,
        hidden: tuple[int, ...],
        activation: Activation = "relu",
        dueling: Dueling = "none",
        torso: Torso = "none",
    ) -> "QNetwork":
        # 1/√3 is the gain of PyTorch's layers, with which the published settings were found. With the √2 of the
        # actor-critics, DQN overestimates far more: on CartPole two seeds of five ended below 150.
        scale = 3**-0.5

        def layers(key: jax.Array, *sizes: int) -> MLP:
            return MLP.create(key, *sizes, activation=activation, hidden_scale=scale, output_scale=scale)

        torso_key, trunk_key, advantage_key, value_key = jax.random.split(key, 4)
        encoder: Encoder | ImageEncoder
        if torso == "none":
            encoder, convolutions = Encoder.of(observation_space), None
            sizes = (encoder.size, *hidden)
        else:
            encoder = ImageEncoder.of(observation_space)
            convolutions = Convolutions.create(torso_key, encoder.shape, TORSOS[torso], activation, scale)
            sizes = (convolutions.size, *hidden)
        if dueling == "none":
            return cls(convolutions, None, layers(advantage_key, *sizes, actions), None, encoder, dueling)
        trunk = layers(trunk_key, *sizes[:-1]) if len(hidden) > 1 else None
        advantage, value = layers(advantage_key, *sizes[-2:], actions), layers(value_key, *sizes[-2:], 1)
        return cls(convolutions, trunk, advantage, value, encoder, dueling)

    def __call__(self, observation: jax.Array) -> jax.Array:
        """`observation` [..., *] -> action values [..., A]."""
        x = self.encoder(observation)
        if self.torso is not None:
            x = self.torso(x)
        if self.trunk is not None:
            x = self.trunk.activation(self.trunk(x))
        advantage = self.advantage(x)
        if self.state_value is None:
            return advantage
        centre = advantage.mean(-1, keepdims=True) if self.dueling == "mean" else advantage.max(-1, keepdims=True)
        return self.state_value(x) + advantage - centre


class ActorCritic(eqx.Module):
    """A stochastic policy π(·|s) and a state value V(s), with separate trunks or a shared one.

    Continuous actions are diagonal normals whose log standard deviation is a parameter of its own, or an output.
    """

    trunk: MLP | None  # features that both read, if shared
    actor: MLP
    critic: MLP
    log_std: jax.Array | None  # [d], state-independent
    encoder: Encoder = eqx.field(static=True)
    discrete: bool = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        key: jax.Array,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        hidden: tuple[int, ...],
        activation: Activation = "tanh",
        shared_trunk: bool = False,
        state_dependent_std: bool = False,
        initial_log_std: float = 0.0,
    ) -> "ActorCritic":
        trunk_key, actor_key, critic_key = jax.random.split(key, 3)
        encoder = Encoder.of(observation_space)
        discrete = isinstance(action_space, spaces.Discrete)
        actions = (
            int(action_space.n) if isinstance(action_space, spaces.Discrete) else math.prod(action_space.shape or ())
        )
        outputs = 2 * actions if state_dependent_std and not discrete else actions

        trunk, sizes = None, (encoder.size, *hidden)
        if shared_trunk:
            trunk = MLP.create(trunk_key, *sizes, activation=activation, output_scale=2**0.5)
            sizes = sizes[-1:]
        actor = MLP.create(actor_key, *sizes, outputs, activation=activation, output_scale=0.01)
        critic = MLP.create(critic_key, *sizes, 1, activation=activation)
        log_std = None if discrete or state_dependent_std else jnp.full(actions, initial_log_std)
        if state_dependent_std and not discrete:
            actor.biases[-1] = actor.biases[-1].at[actions:].set(initial_log_std)
        return cls(trunk, actor, critic, log_std, encoder, discrete)

    def features(self, observation: jax.Array) -> jax.Array:
        x = self.encoder(observation)
        return x if self.trunk is None else self.trunk.activation(self.trunk(x))

    def policy(self, observation: jax.Array) -> Categorical | DiagonalNormal:
        """π(·|s): `observation` [..., *] -> a distribution over actions with the same leading axes."""
        outputs = self.actor(self.features(observation))
        if self.discrete:
            return Categorical(outputs)
        if self.log_std is not None:
            return DiagonalNormal(outputs, jnp.broadcast_to(self.log_std, outputs.shape))
        mean, log_std = jnp.split(outputs, 2, axis=-1)
        return DiagonalNormal(mean, jnp.clip(log_std, -5.0, 2.0))

    def value(self, observation: jax.Array) -> jax.Array:
        """V(s): `observation` [..., *] -> [...]."""
        return self.critic(self.features(observation))[..., 0]
