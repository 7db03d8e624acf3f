"""The contract of an algorithm: what it eats, what it keeps, what it returns.

An algorithm is a frozen dataclass of hyper-parameters with pure functions over one declared state:

    init(key, spec)                       -> state
    act(state, carry, observation, key)   -> action, carry, extras      behaviour policy
    update(state, data, key)              -> state, metrics             one update, in the paper's order
    policy(state, observation)            -> action                     greedy, for evaluation
    value(state, observation)             -> V(s)

Its base says only which data `update` eats: `Online` the transition just made, `OnPolicy` a rollout [T, N],
`OffPolicy` a minibatch [B] that a replay samples. The functions see one seed; the drivers vmap them over seeds.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, dataclass_transform

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from zhixing import schedules
from zhixing.errors import UsageError
from zhixing.priorities import Kind
from zhixing.replay import Replay
from zhixing.shared import Shared
from zhixing.transition import Experience, Transition


@dataclass(frozen=True)
class Spec:
    """What an algorithm is told of its task. The spaces are those of one instance, as the algorithm sees them."""

    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    num_environments: int  # N
    total_steps: int  # environment steps of one seed in the whole run
    frame_stack: int = 1  # observations that make one, along a first axis of their own if there are several

    @property
    def num_actions(self) -> int:
        """The size of a Discrete action space."""
        space: Any = self.action_space
        return int(space.n)

    @property
    def num_states(self) -> int:
        """The size of a Discrete observation space."""
        space: Any = self.observation_space
        return int(space.n)


class Clock(Shared):
    """Where the run stands; every algorithm's state has one, named `clock`."""

    steps: jax.Array  # [] int32, environment steps of one seed so far
    updates: jax.Array  # [] int32, gradient or table updates so far
    total_steps: jax.Array  # [] int32

    @classmethod
    def start(cls, spec: Spec) -> "Clock":
        return cls(jnp.int32(0), jnp.int32(0), jnp.int32(spec.total_steps))

    @property
    def progress(self) -> jax.Array:
        """[] the part of the run that is over, from 0 to 1; what schedules are written in."""
        return self.steps / self.total_steps

    def tick(self, steps: int = 0, updates: int = 0) -> "Clock":
        return Clock(self.steps + steps, self.updates + updates, self.total_steps)


A = TypeVar("A", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def hyperparameters(cls: A) -> A:
    """Make a frozen dataclass that is a pytree: its `float` fields are leaves, so that a sweep can vmap them."""
    made: Any = dataclass(frozen=True, kw_only=True)(cls)
    floats = [f.name for f in fields(made) if f.type in (float, "float")]
    rest = [f.name for f in fields(made) if f.name not in floats]
    return jax.tree_util.register_dataclass(made, data_fields=floats, meta_fields=rest)


@hyperparameters
class Algorithm:
    """What the drivers know of an algorithm. See the module's docstring."""

    discrete_only: ClassVar[bool] = False  # acts only in Discrete action spaces

    @property
    def steps_per_iteration(self) -> int:
        """T, the environment steps that every instance makes between two calls of `learn`."""
        raise NotImplementedError

    @property
    def updates_per_iteration(self) -> int:
        """How many gradient (or table) updates one `learn` makes."""
        return 1

    def check(self, spec: Spec) -> None:
        """Raise UsageError for a task or a setting that does not fit."""
        name = type(self).__name__
        if self.discrete_only and not isinstance(spec.action_space, gymnasium.spaces.Discrete):
            raise UsageError(f"{name} needs discrete actions, this environment has {brief(spec.action_space)}; use PPO")
        if not isinstance(spec.action_space, gymnasium.spaces.Discrete | gymnasium.spaces.Box):
            raise UsageError(f"{name} acts in Discrete and Box spaces, this environment has {brief(spec.action_space)}")

    def init(self, key: jax.Array, spec: Spec) -> Any:
        raise NotImplementedError

    def memory(self, spec: Spec, example: Transition) -> Any:
        """What `learn` keeps of past transitions; `example` [T, N] gives shapes and types."""
        return ()

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        """What the actor keeps between the steps of one episode, as at its start; leading axis [N]."""
        return ()

    def act(self, state: Any, carry: Any, observation: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    def learn(self, state: Any, memory: Any, rollout: Transition, key: jax.Array) -> tuple[Any, Any, dict]:
        """Take in a rollout [T, N]: insert, sample, call `update` the stated number of times; metrics are means."""
        raise NotImplementedError

    def policy(self, state: Any, observation: Any) -> Any:
        raise NotImplementedError

    def value(self, state: Any, observation: Any) -> Any:
        raise NotImplementedError


def brief(space: gymnasium.Space) -> str:
    """A space in a word or two: bounds can be long arrays."""
    return str(space) if isinstance(space, gymnasium.spaces.Discrete) else f"{type(space).__name__}{space.shape}"


def require_positive(algorithm: Algorithm, *names: str) -> None:
    """Raise UsageError unless each named setting is above zero."""
    for name in names:
        if not np.all(np.asarray(getattr(algorithm, name)) > 0):
            raise UsageError(f"algorithm.{name} is {getattr(algorithm, name)}; it must be above 0")


def require_between(algorithm: Algorithm, low: float, high: float, *names: str) -> None:
    """Raise UsageError unless each named setting is a number from `low` to `high`, or None where it may be."""
    for name in names:
        value = getattr(algorithm, name)
        if value is not None and not np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)):
            wanted = f"from {low:g} to {high:g}" if np.isfinite(high) else f"{low:g} or more"
            raise UsageError(f"algorithm.{name} is {value}; it must be {wanted}")


@hyperparameters
class Online(Algorithm):
    """Eats the transition just made, one at a time, instance after instance."""

    @property
    def steps_per_iteration(self) -> int:
        return 1

    def episode(self, spec: Spec) -> Any:
        """What the learner keeps of the episode under way, as at its start: zeros, of one instance.

        Traces, steps that wait for the next one. Each instance has its own; they are zeros again after the last
        transition of an episode.
        """
        return ()

    def memory(self, spec: Spec, example: Transition) -> Any:
        """`episode` of every instance: [N, ...]."""
        return jax.tree.map(lambda x: jnp.repeat(x[None], spec.num_environments, 0), self.episode(spec))

    def update(self, state: Any, episode: Any, transition: Transition, key: jax.Array) -> tuple[Any, Any, dict]:
        raise NotImplementedError

    def learn(self, state: Any, memory: Any, rollout: Transition, key: jax.Array) -> tuple[Any, Any, dict]:
        transitions = jax.tree.map(lambda x: x[0], rollout)  # T = 1

        def one(state: Any, inputs: Any) -> tuple[Any, tuple[Any, dict]]:
            state, episode, metrics = self.update(state, *inputs)
            ended = inputs[1].ended
            episode = jax.tree.map(lambda x: jnp.where(ended, jnp.zeros_like(x), x), episode)
            state = eqx.tree_at(lambda s: s.clock, state, state.clock.tick(steps=1, updates=1))
            return state, (episode, metrics)

        count = transitions.reward.shape[0]
        inputs = memory, transitions, jax.random.split(key, count)
        state, (memory, metrics) = jax.lax.scan(one, state, inputs)
        return state, memory, jax.tree.map(jnp.mean, metrics)


@hyperparameters
class OnPolicy(Algorithm):
    """Eats a rollout [T, N] of its own present policy, once."""

    rollout_length: int = 128  # T, steps of each environment between two updates

    @property
    def steps_per_iteration(self) -> int:
        return self.rollout_length

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "rollout_length")

    def update(self, state: Any, rollout: Transition, key: jax.Array) -> tuple[Any, dict]:
        raise NotImplementedError

    def learn(self, state: Any, memory: Any, rollout: Transition, key: jax.Array) -> tuple[Any, Any, dict]:
        state, metrics = self.update(state, rollout, key)
        clock = state.clock.tick(steps=rollout.reward.size, updates=self.updates_per_iteration)
        return eqx.tree_at(lambda s: s.clock, state, clock), memory, metrics


@hyperparameters
class OffPolicy(Algorithm):
    """Eats minibatches [B] that a replay samples."""

    discount: float = 0.99  # γ
    n_step: int = 1  # steps of a target before it bootstraps, fewer where the episode ends
    replay: Kind = "uniform"  # or prioritised: which transitions are sampled
    replay_capacity: int = 100_000  # transitions
    replay_frames: bool = False  # keep each image once, not in every observation that it is part of
    priority_exponent: float = 0.6  # α of prioritised replay: 0 is uniform
    importance_exponent: float = 0.4  # β of prioritised replay at the start; it rises to 1 over the run
    batch_size: int = 64  # B
    learning_starts: int = 1_000  # environment steps before the first update
    rollout_length: int = 1  # T, steps of each environment between two learning phases
    gradient_steps: int = 1  # updates in one learning phase

    @property
    def steps_per_iteration(self) -> int:
        return self.rollout_length

    @property
    def updates_per_iteration(self) -> int:
        return self.gradient_steps

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "replay_capacity", "batch_size", "rollout_length", "gradient_steps", "n_step")
        require_between(self, 0, np.inf, "learning_starts", "priority_exponent")
        require_between(self, 0, 1, "discount", "importance_exponent")
        if self.rollout_length * spec.num_environments > self.replay_capacity:
            raise UsageError(
                f"algorithm.replay_capacity is {self.replay_capacity}, less than the {self.rollout_length} x "
                f"{spec.num_environments} transitions of one rollout; make it larger"
            )

    def memory(self, spec: Spec, example: Transition) -> Replay:
        stack = 0 if spec.frame_stack == 1 else spec.frame_stack
        return Replay.create(self.replay_capacity, example, self.replay, stack if self.replay_frames else None)

    def update(self, state: Any, batch: Experience, key: jax.Array) -> tuple[Any, dict]:
        """-> state, metrics; among these, for prioritised replay, `td_error` [B], the |δ| of each sample."""
        raise NotImplementedError

    def learn(self, state: Any, memory: Replay, rollout: Transition, key: jax.Array) -> tuple[Any, Any, dict]:
        memory = memory.add(rollout, self.priority_exponent)
        clock = state.clock.tick(steps=rollout.reward.size)
        state = eqx.tree_at(lambda s: s.clock, state, clock)
        importance = schedules.linear(self.importance_exponent, 1.0, 1.0, clock.progress)

        # Only the priorities go through the loop and the branch: carrying the transitions along would copy them.
        def one(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], dict]:
            state, priorities = carry
            sample_key, update_key = jax.random.split(key)
            replay = replace(memory, priorities=priorities)
            batch, index = replay.sample(sample_key, self.batch_size, self.discount, self.n_step, importance)
            state, metrics = self.update(state, batch, update_key)
            state = eqx.tree_at(lambda s: s.clock, state, state.clock.tick(updates=1))
            if self.replay != "uniform":
                priorities = replay.reprioritise(index, metrics["td_error"], self.priority_exponent)
            return (state, priorities), jax.tree.map(jnp.mean, metrics)

        def several(state: Any, priorities: Any) -> tuple[tuple[Any, Any], dict]:
            carry, metrics = jax.lax.scan(one, (state, priorities), jax.random.split(key, self.gradient_steps))
            return carry, jax.tree.map(jnp.mean, metrics)

        def none(state: Any, priorities: Any) -> tuple[tuple[Any, Any], dict]:
            _, metrics = jax.eval_shape(several, state, priorities)
            return (state, priorities), jax.tree.map(lambda x: jnp.full(x.shape, 0, x.dtype), metrics)

        # The clock is shared by all seeds, so that this stays a branch under their vmap.
        started = clock.steps >= self.learning_starts
        (state, priorities), metrics = jax.lax.cond(started, several, none, state, memory.priorities)
        return state, replace(memory, priorities=priorities), metrics
