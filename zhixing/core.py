"""The contract of an algorithm: what it eats, what it keeps, what it returns.

An algorithm is a frozen dataclass of hyper-parameters with pure functions over one declared state:

    init(key, spec)                       -> state
    act(state, carry, observation, key)   -> action, carry, extras      behaviour policy
    update(state, data, key)              -> state, metrics             one update, in the paper's order
    policy(state, observation)            -> action                     greedy, for evaluation
    value(state, observation)             -> V(s)

A policy with a memory has `play(state, carry, observation) -> action, carry` in the place of `policy`.

Its base says only which data `update` eats: `Online` the transition just made, `OnPolicy` a rollout [T, N], `Episodic`
whole episodes, `OffPolicy` (in `zhixing.off_policy`) a minibatch [B] that a replay samples. The functions see one
seed; the drivers vmap them over seeds.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing import collective
from zhixing.agents import Agents
from zhixing.environments.base import ACTION_MASK
from zhixing.environments.goals import Goals
from zhixing.errors import UsageError
from zhixing.shared import Shared
from zhixing.transition import Transition

ActionSpaces = tuple[type[gymnasium.Space], ...]
DISCRETE: ActionSpaces = (spaces.Discrete,)
CONTINUOUS: ActionSpaces = (spaces.Box,)
ANY: ActionSpaces = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box)


@dataclass(frozen=True)
class Spec:
    """What an algorithm is told of its task. The spaces are those of one instance, as the algorithm sees them."""

    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    num_environments: int  # N
    total_steps: int  # environment steps of one seed in the whole run
    frame_stack: int = 1  # observations that make one, along a first axis of their own if there are several
    max_episode_steps: int | None = None  # where an episode is truncated; None if never, or not known
    goals: Goals | None = None  # of a goal environment: what reaching one is worth where another was wanted
    agents: Agents | None = None  # who acts, where several do: observations are then [N, A, d]

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

    action_spaces: ClassVar[ActionSpaces] = ANY  # where it acts
    reads_action_mask: ClassVar[bool] = False  # never takes an action that the observation's "action_mask" forbids
    many_agents: ClassVar[bool] = False  # acts for all agents of an environment that has several

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
        if spec.agents is not None and not self.many_agents:
            raise UsageError(
                f"{name} acts for one agent, this environment has {spec.agents.count}; use MAPPO or MADDPG"
            )
        if spec.agents is None and self.many_agents:
            raise UsageError(f"{name} is for several agents, this environment has one; use PPO, DDPG or TD3")
        if not isinstance(spec.action_space, self.action_spaces):
            known = " or ".join(space.__name__ for space in self.action_spaces)
            raise UsageError(f"{name} needs {known} actions, this environment has {brief(spec.action_space)}; use PPO")
        masked = isinstance(spec.observation_space, spaces.Dict) and ACTION_MASK in spec.observation_space.spaces
        if masked and not self.reads_action_mask:
            raise UsageError(f"{name} would take actions that the environment's mask forbids; use PPO")

    def init(self, key: jax.Array, spec: Spec) -> Any:
        raise NotImplementedError

    def memory(self, spec: Spec, example: Transition) -> Any:
        """What `learn` keeps of past transitions; `example` [T, N] gives shapes and types."""
        return ()

    def forget_episodes(self, memory: Any) -> Any:
        """`memory` without what it keeps of episodes under way: a resumed run begins new ones. Any leading axes."""
        return memory

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

    def play(self, state: Any, carry: Any, observation: Any) -> tuple[Any, Any]:
        """The greedy action and the next carry; what evaluation calls. Only a policy with a memory overrides it."""
        return self.policy(state, observation), carry

    def value(self, state: Any, observation: Any) -> Any:
        raise UsageError(f"{type(self).__name__} does not say what an observation is worth")


def brief(space: gymnasium.Space) -> str:
    """A space in a word or two: bounds can be long arrays."""
    return str(space) if isinstance(space, spaces.Discrete) else f"{type(space).__name__}{space.shape}"


def require_positive(algorithm: Algorithm, *names: str) -> None:
    """Raise UsageError unless each named setting is above zero, or None where it may be."""
    for name in names:
        value = getattr(algorithm, name)
        if value is not None and not np.all(np.asarray(value) > 0):
            raise UsageError(f"algorithm.{name} is {value}; it must be above 0")


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

    def forget_episodes(self, memory: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, memory)

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
        clock = state.clock.tick(steps=rollout.steps * collective.size(), updates=self.updates_per_iteration)
        return eqx.tree_at(lambda s: s.clock, state, clock), memory, metrics


class Episodes(NamedTuple):
    """The last steps of each environment, and which of them are to be learned from."""

    steps: Transition  # [L + T, N] in their order, without `next_observation`: nobody bootstraps
    weight: jax.Array  # [L + T, N], 1 for the steps of episodes that have just ended, else 0


class Unfinished(NamedTuple):
    """What waits for the end of its episode."""

    steps: Transition  # [L, N], the last ones, without `next_observation`
    waiting: jax.Array  # [L, N] bool, those whose episode goes on
    metrics: dict  # of the last update that had an episode to learn from


@hyperparameters
class Episodic(Algorithm):
    """Eats whole episodes, each step of them once, in the first update after the episode's end.

    A rollout cuts the episodes that go on at its end. Leaving those out would favour the short ones, so their steps
    wait: the last L steps of each environment are kept, L the length of the longest episode. Of a longer one the
    beginning may be pushed out before the end comes: it is then never learned from.
    """

    rollout_length: int = 128  # T, steps of each environment between two updates
    longest_episode: int | None = None  # L, in steps; None: the environment's own limit

    @property
    def steps_per_iteration(self) -> int:
        return self.rollout_length

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "rollout_length")
        require_between(self, 1, np.inf, "longest_episode")
        if self.longest_episode is None and spec.max_episode_steps is None:
            raise UsageError(
                f"{type(self).__name__} learns from whole episodes, and this environment does not say how long they "
                "can be; set algorithm.longest_episode"
            )

    def memory(self, spec: Spec, example: Transition) -> Unfinished:
        length = self.longest_episode or spec.max_episode_steps
        empty = jax.tree.map(
            lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype), example._replace(next_observation=())
        )
        never = jnp.zeros_like(empty.reward)
        key = jax.random.PRNGKey(0)
        _, metrics = jax.eval_shape(lambda: self.update(self.init(key, spec), Episodes(empty, never), key))
        return Unfinished(empty, never > 0, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics))

    def forget_episodes(self, memory: Unfinished) -> Unfinished:
        return memory._replace(waiting=jnp.zeros_like(memory.waiting))

    def update(self, state: Any, episodes: Episodes, key: jax.Array) -> tuple[Any, dict]:
        raise NotImplementedError

    def learn(self, state: Any, memory: Unfinished, rollout: Transition, key: jax.Array) -> tuple[Any, Any, dict]:
        rollout = rollout._replace(next_observation=())
        steps = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), memory.steps, rollout)
        waiting = jnp.concatenate([memory.waiting, jnp.full_like(rollout.ended, True)])
        # An end at this step or at a later one: the first of these is the end of this step's episode.
        complete = jax.lax.cummax(steps.ended.astype(jnp.int32), reverse=True) > 0
        learned = waiting & complete

        new, metrics = self.update(state, Episodes(steps, learned.astype(jnp.float32)), key)
        # Where no episode has ended there is nothing to learn: momentum must not move anything either.
        new, metrics = jax.tree.map(
            lambda new, old: jnp.where(learned.any(), new, old), (new, metrics), (state, memory.metrics)
        )
        clock = state.clock.tick(steps=rollout.steps, updates=self.updates_per_iteration)
        kept, waiting = jax.tree.map(lambda x: x[len(rollout.reward) :], (steps, waiting & ~complete))
        return eqx.tree_at(lambda s: s.clock, new, clock), Unfinished(kept, waiting, metrics), metrics
