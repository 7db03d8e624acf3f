"""Networks as pytrees that are called. Every leaf is a float32 array; any number of leading axes goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.convolution import TORSOS, Convolutions, ImageEncoder
from zhixing.distributions import Bernoulli, Categorical, DiagonalNormal, Distribution, MultiCategorical
from zhixing.environments.base import ACTION_MASK
from zhixing.environments.goals import ACHIEVED, has_goals
from zhixing.errors import UsageError
from zhixing.initialisers import orthogonal

Activation = Literal["tanh", "relu"]
Dueling = Literal["none", "mean", "max"]
Torso = Literal["none", "minatar", "nature"]


class MLP(eqx.Module):
    """Multi-layer perceptron over the last axis; orthogonal initial weights, zero biases."""

    weights: list[jax.Array]  # [outputs, inputs] a layer: their gradients then need no transposition
    biases: list[jax.Array]
    norms: list[jax.Array]  # [2, outputs] a hidden layer: gain and offset of its layer normalisation, if there is one
    activation: Callable = eqx.field(static=True)
    dropout: float = eqx.field(static=True, default=0.0)

    @classmethod
    def create(
        cls,
        key: jax.Array,
        *sizes: int,
        activation: Activation = "tanh",
        hidden_scale: float = 2**0.5,
        output_scale: float = 1.0,
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> "MLP":
        """Layers between the given `sizes`; the hidden weights have gain `hidden_scale`, the last `output_scale`.

        Hidden units are dropped with probability `dropout`, then normalised where `layer_norm` says so, then activated.
        """
        keys = jax.random.split(key, len(sizes) - 1)
        scales = [hidden_scale] * (len(keys) - 1) + [output_scale]
        weights = [
            scale * orthogonal(k, inputs, outputs).T
            for scale, k, inputs, outputs in zip(scales, keys, sizes[:-1], sizes[1:], strict=True)
        ]
        norms = [jnp.stack([jnp.ones(n), jnp.zeros(n)]) for n in sizes[1:-1]] if layer_norm else []
        biases = [jnp.zeros(outputs) for outputs in sizes[1:]]
        return cls(weights, biases, norms, getattr(jax.nn, activation), dropout)

    def hidden(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The last hidden layer's features; `x` itself if there is none. Without a `key` nothing is dropped."""
        for i, (weight, bias) in enumerate(zip(self.weights[:-1], self.biases[:-1], strict=True)):
            x = product(x, weight) + bias
            if self.dropout and key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.dropout, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0.0)
            if self.norms:
                gain, offset = self.norms[i]
                x = gain * jax.nn.standardize(x) + offset
            x = self.activation(x)
        return x

    def last(self, features: jax.Array) -> jax.Array:
        return product(features, self.weights[-1]) + self.biases[-1]

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.last(self.hidden(x, key))


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T`, [..., inputs] and [outputs, inputs] -> [..., outputs], without the transposition made.

    With few inputs it is made: the gradient is then a product whose long side comes last, twice as fast. The barrier
    keeps XLA from folding the transposition back into the product. Leading axes are made one: with several, XLA
    transposes whole activations for the gradient.
    """
    if x.ndim > 2:
        return product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    if weight.shape[1] < min(16, weight.shape[0]):
        return x @ jax.lax.optimization_barrier(weight.T)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


@dataclass(frozen=True)
class Encoder:
    """Turns an observation into the vector that a network reads: numbers flattened, indices one-hot.

    Of a dictionary or tuple, its parts one after the other, but for an action mask, and for the goal that a state
    meets where the one that is wanted stands beside it (HER.1).
    """

    shape: tuple[int, ...]  # of one observation
    sizes: tuple[int, ...] | None  # the number of values of each index; None for numbers
    parts: tuple[tuple[Any, "Encoder"], ...] = ()  # (key, its encoder) of a dictionary or tuple

    @classmethod
    def of(cls, space: gymnasium.Space) -> "Encoder":
        match space:
            case spaces.Box() | spaces.MultiBinary():
                return cls(tuple(space.shape), None)
            case spaces.Discrete():
                return cls((), (int(space.n),))
            case spaces.MultiDiscrete() if len(space.shape) == 1:
                return cls(tuple(space.shape), tuple(int(n) for n in space.nvec))
            case spaces.Dict():
                unread = {ACTION_MASK, ACHIEVED} if has_goals(space) else {ACTION_MASK}
                return cls((), None, tuple((key, cls.of(part)) for key, part in space.items() if key not in unread))
            case spaces.Tuple():
                return cls((), None, tuple((i, cls.of(part)) for i, part in enumerate(space.spaces)))
            case _:
                raise UsageError(
                    f"no network reads the observation space {space}; "
                    "wrap the environment in gymnasium.wrappers.FlattenObservation"
                )

    @property
    def size(self) -> int:
        if self.parts:
            return sum(encoder.size for _, encoder in self.parts)
        return int(np.prod(self.shape)) if self.sizes is None else sum(self.sizes)

    def __call__(self, observation: Any) -> jax.Array:
        if self.parts:
            return jnp.concatenate([encoder(observation[key]) for key, encoder in self.parts], -1)
        if self.sizes is None:
            leading = observation.shape[: observation.ndim - len(self.shape)]
            return observation.reshape(*leading, self.size).astype(jnp.float32)
        if not self.shape:
            return jax.nn.one_hot(observation, self.sizes[0])
        indices = [jax.nn.one_hot(observation[..., i], n) for i, n in enumerate(self.sizes)]
        return jnp.concatenate(indices, -1)


def mask_of(observation: Any) -> jax.Array | None:
    """The actions that are allowed, [..., outputs] bool; None if the observation does not say."""
    masked = isinstance(observation, dict) and ACTION_MASK in observation
    return observation[ACTION_MASK].astype(bool) if masked else None


@dataclass(frozen=True)
class Actions:
    """What a policy's network gives out for an action space, and which distribution is made of it."""

    outputs: int  # logits; for continuous actions the dimensions d
    kind: Literal["discrete", "multi_discrete", "multi_binary", "continuous"]
    sizes: tuple[int, ...] = ()  # of a multi-discrete space

    @classmethod
    def of(cls, space: gymnasium.Space) -> "Actions":
        match space:
            case spaces.Discrete():
                return cls(int(space.n), "discrete")
            case spaces.MultiDiscrete() if len(space.shape) == 1:
                sizes = tuple(int(n) for n in space.nvec)
                return cls(sum(sizes), "multi_discrete", sizes)
            case spaces.MultiBinary() if len(space.shape) == 1:
                return cls(int(space.shape[0]), "multi_binary")
            case spaces.Box() if len(space.shape) == 1:
                return cls(int(space.shape[0]), "continuous")
            case _:
                raise UsageError(f"no policy acts in the action space {space}; flatten it to one axis")

    @property
    def continuous(self) -> bool:
        return self.kind == "continuous"

    def discrete(self, logits: jax.Array, mask: jax.Array | None) -> Categorical | MultiCategorical | Bernoulli:
        """`logits`, `mask` [..., outputs] -> the distribution over what is allowed."""
        if self.kind == "multi_binary":
            return Bernoulli(logits)
        pi = Categorical(logits) if self.kind == "discrete" else MultiCategorical(logits, self.sizes)
        return pi if mask is None else pi.masked(mask)


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


class Ensemble(eqx.Module):
    """K networks of one architecture, computed side by side."""

    members: Any  # one network whose leaves are [K, ...]
    count: int = eqx.field(static=True)  # K

    @classmethod
    def create(cls, create: Callable[[jax.Array], Any], key: jax.Array, count: int = 2) -> "Ensemble":
        """`create` is key -> a network."""
        return cls(jax.vmap(create)(jax.random.split(key, count)), count)

    def __call__(self, *arguments: Any, key: jax.Array | None = None) -> jax.Array:
        """What each member says, [K, ...]; with a `key` each gets one of its own as its last argument."""
        if key is None:
            return jax.vmap(lambda member: member(*arguments))(self.members)
        keys = jax.random.split(key, self.count)
        return jax.vmap(lambda member, key: member(*arguments, key))(self.members, keys)

    @property
    def first(self) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], self.members)


def regression(q: jax.Array, target: jax.Array, weight: jax.Array) -> tuple[jax.Array, dict]:
    """The squared errors of an ensemble's `q` [K, B], weighed by `weight` [B] and added up, and its metrics."""
    error = q - target
    loss = (weight * jnp.square(error)).mean(-1).sum()
    return loss, {"critic_loss": loss, "q": q.mean(), "td_error": jnp.abs(error).mean(0)}


class ActorCriticSettings(Protocol):
    """The hyper-parameters that an algorithm with an `ActorCritic` has."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def shared_trunk(self) -> bool: ...
    @property
    def state_dependent_std(self) -> bool: ...
    @property
    def initial_log_std(self) -> float: ...
    @property
    def gsde_interval(self) -> int | None: ...


class ActorCritic(eqx.Module):
    """A stochastic policy π(·|s) and a state value V(s), with separate trunks or a shared one.

    The action space says which distribution π is. A diagonal normal's log standard deviation is a parameter of its
    own, an output, or, with generalised state-dependent exploration (gSDE), made of the actor's last features h(s):

        (SDE.1)  a = μ(s) + Eᵀ h(s),  E ~ N(0, σ²) element by element, drawn anew every few steps
        (SDE.2)  hence a ~ N(μ(s), (σ²)ᵀ h(s)²), by which its log-probability is computed

    Raffin, Kober & Stulp, "Smooth exploration for robotic reinforcement learning", arXiv:2005.05719, eqs. (4)-(6).
    """

    trunk: MLP | None  # features that both read, if shared
    actor: MLP
    critic: MLP
    log_std: jax.Array | None  # [d], or [h, d] for gSDE; None if an output, or if the actions are not continuous
    encoder: Encoder = eqx.field(static=True)
    actions: Actions = eqx.field(static=True)
    gsde_interval: int | None = eqx.field(static=True)

    @classmethod
    def create(cls, key: jax.Array, spec: Any, settings: ActorCriticSettings) -> "ActorCritic":
        """For the spaces of `spec`, as the algorithm's `settings` say."""
        trunk_key, actor_key, critic_key = jax.random.split(key, 3)
        encoder, actions = Encoder.of(spec.observation_space), Actions.of(spec.action_space)
        activation, interval = settings.activation, settings.gsde_interval if actions.continuous else None
        with_std = actions.continuous and settings.state_dependent_std and interval is None
        outputs = 2 * actions.outputs if with_std else actions.outputs

        trunk, sizes = None, (encoder.size, *settings.hidden)
        if settings.shared_trunk:
            trunk = MLP.create(trunk_key, *sizes, activation=activation, output_scale=2**0.5)
            sizes = sizes[-1:]
        actor = MLP.create(actor_key, *sizes, outputs, activation=activation, output_scale=0.01)
        critic = MLP.create(critic_key, *sizes, 1, activation=activation)
        log_std = None
        if with_std:
            actor.biases[-1] = actor.biases[-1].at[actions.outputs :].set(settings.initial_log_std)
        elif actions.continuous:
            shape = (actions.outputs,) if interval is None else (sizes[-1], actions.outputs)
            log_std = jnp.full(shape, settings.initial_log_std)
        return cls(trunk, actor, critic, log_std, encoder, actions, interval)

    def features(self, observation: jax.Array) -> jax.Array:
        x = self.encoder(observation)
        return x if self.trunk is None else self.trunk.activation(self.trunk(x))

    def policy(self, observation: Any) -> Distribution:
        """π(·|s): `observation` [..., *] -> a distribution over actions with the same leading axes."""
        return self.policy_and_features(observation)[0]

    def policy_and_features(self, observation: Any) -> tuple[Distribution, jax.Array]:
        """-> π(·|s), and the actor's last features [..., h]."""
        features = self.actor.hidden(self.features(observation))
        outputs = self.actor.last(features)
        if not self.actions.continuous:
            return self.actions.discrete(outputs, mask_of(observation)), features
        if self.log_std is None:
            mean, log_std = jnp.split(outputs, 2, axis=-1)
            return DiagonalNormal(mean, jnp.clip(log_std, -5.0, 2.0)), features
        if self.gsde_interval is None:
            return DiagonalNormal(outputs, jnp.broadcast_to(self.log_std, outputs.shape)), features
        # (SDE.2); σ learns from it, but the features do not
        variance = jnp.square(jax.lax.stop_gradient(features)) @ jnp.exp(2 * self.log_std)
        return DiagonalNormal(outputs, 0.5 * jnp.log(variance + 1e-6)), features

    def value(self, observation: Any) -> jax.Array:
        """V(s): `observation` [..., *] -> [...]."""
        return self.critic(self.features(observation))[..., 0]

    @staticmethod
    def carry(key: jax.Array, spec: Any, settings: ActorCriticSettings) -> Any:
        """What `act` keeps between the steps of an episode, as at its start: gSDE's noise, else nothing."""
        actions = Actions.of(spec.action_space)
        if settings.gsde_interval is None or not actions.continuous:
            return ()
        features = (Encoder.of(spec.observation_space).size, *settings.hidden)[-1]
        shape = spec.num_environments, features, actions.outputs
        return Noise(jax.random.normal(key, shape), jnp.zeros(spec.num_environments, jnp.int32))

    def act(self, carry: Any, observation: Any, key: jax.Array) -> tuple[jax.Array, Any, Distribution]:
        """`observation` [N, ...] -> actions drawn from π [N, ...], the carry, and π(·|s)."""
        pi, features = self.policy_and_features(observation)
        if self.gsde_interval is None:
            return pi.sample(key), carry, pi
        assert self.log_std is not None
        old = carry.age >= self.gsde_interval
        noise = jnp.where(old[:, None, None], jax.random.normal(key, carry.noise.shape), carry.noise)
        action = pi.mode + jnp.einsum("nh,nhd->nd", features, jnp.exp(self.log_std) * noise)  # (SDE.1)
        return action, Noise(noise, jnp.where(old, 0, carry.age) + 1), pi


class Noise(NamedTuple):
    """gSDE's E of each instance, in units of σ, and how many steps it has served."""

    noise: jax.Array  # [N, h, d]
    age: jax.Array  # [N] int32
