"""What every kind of environment looks like from inside: `Environment`, its `Batch` of instances, `Timestep`.

Gymnasium, gymnax and EnvPool disagree on what happens when an episode ends. Here there is one rule, and the
adapters next to this file turn every kind into it: the step that ends an episode returns both the true last
observation of the old episode and the first observation of the new one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import gymnasium

from zhixing.environments.goals import Goals

ACTION_MASK = "action_mask"  # the part of a dictionary observation that says which actions are allowed


class AgentSteps(NamedTuple):
    """What a step brought to each of A agents, in the order of `Environment.agents`."""

    reward: Any  # [S, N, A] float32
    terminated: Any  # [S, N, A] bool: the agent's own task ended here, no value follows for it
    active: Any  # [S, N, A] bool: it acted; false from the step after its own end to that of the episode


class Timestep(NamedTuple):
    """What one step of a batch returns. Leading axes [S, N]: seeds, environments of one seed."""

    observation: Any  # [S, N, ...] to act on next: the first of the new episode where the old one ended
    next_observation: Any  # [S, N, ...] the true successor, never the reset one
    reward: Any  # [S, N] float32; of several agents the mean of theirs
    terminated: Any  # [S, N] bool: the task ended here, no value follows; of several agents: for every one of them
    truncated: Any  # [S, N] bool: cut off here (time limit), the value of the successor still counts
    agents: Any = ()  # AgentSteps, where there are several agents


class Environment(ABC):
    """One environment, described: its spaces, its limit, and how to make a batch of it.

    Attributes:
        id: the name it was made by.
        backend: "jax", "envpool", "gymnasium" or "pettingzoo".
        observation_space, action_space: Gymnasium spaces of a single instance; of several agents a Dict by their names.
        max_episode_steps: where an episode is truncated; None if never.
        goals: what a goal environment says of its goals; None for any other.
        agents: the names of the agents, where there are several; () for a single one.
    """

    backend: ClassVar[str]
    compiled: ClassVar[bool]  # `Batch.step` can be traced by `jax.jit`
    saves_state: ClassVar[bool]  # its state is arrays in the run, so that a resumed run is exact

    id: str
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    max_episode_steps: int | None
    goals: Goals | None = None
    agents: tuple[str, ...] = ()

    @abstractmethod
    def batch(self, seeds: Sequence[int], num_environments: int) -> "Batch":
        """`len(seeds)` x `num_environments` instances; those of seed s depend on `seeds[s]` alone."""


class Batch(ABC):
    """S x N instances of one environment.

    `step` of a compiled batch may be traced; where the environment saves its state, `reset` too, and all that
    changes is in `state`. A host batch (Gymnasium) keeps its state to itself: it is called from Python with NumPy
    arrays, and passes () around.
    """

    @abstractmethod
    def reset(self, key: Any) -> tuple[Any, Any]:
        """`key` [S] PRNG keys -> state, first observation [S, N, ...]."""

    @abstractmethod
    def step(self, state: Any, action: Any, key: Any) -> tuple[Any, Timestep]:
        """`action` [S, N, ...] in the environment's own units, `key` [S] -> state, timestep."""

    def close(self) -> None:  # noqa: B027 - most kinds hold nothing
        """Release what the instances hold."""
