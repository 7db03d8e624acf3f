"""Several agents as one more axis.

An environment with A agents gives and takes dictionaries by their names, whose observations and actions may differ in
size. An algorithm sees arrays [N, A, ...]: the i-th agent's own come first, zeros fill up what others have more.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.environments.base import ACTION_MASK, Timestep
from zhixing.environments.transforms import Spaces, Transform
from zhixing.errors import UsageError
from zhixing.networks import Encoder


@dataclass(frozen=True)
class Agents:
    """Who acts, and in what: the spaces of each of A agents."""

    names: tuple[str, ...]
    observation_spaces: tuple[gymnasium.Space, ...]
    action_spaces: tuple[gymnasium.Space, ...]

    @classmethod
    def of(cls, names: tuple[str, ...], observation_space: spaces.Dict, action_space: spaces.Dict) -> "Agents":
        """Raises UsageError where their actions are of different kinds, or of one that nobody here knows."""
        found = cls(names, *(tuple(space[name] for name in names) for space in (observation_space, action_space)))
        discrete = [isinstance(space, spaces.Discrete) for space in found.action_spaces]
        boxes = [isinstance(space, spaces.Box) and len(space.shape) == 1 for space in found.action_spaces]
        if not all(discrete) and not all(boxes):
            said = ", ".join(f"{name}: {space}" for name, space in zip(names, found.action_spaces, strict=True))
            raise UsageError(f"agents must all have Discrete actions, or all Box with one axis; these have {said}")
        if any(isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces for space in found.observation_spaces):
            raise UsageError("agents with an action_mask are not known; wrap the environment so that any action goes")
        return found

    @property
    def count(self) -> int:
        """A."""
        return len(self.names)

    @property
    def discrete(self) -> bool:
        return isinstance(self.action_spaces[0], spaces.Discrete)

    @cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        return tuple(Encoder.of(space) for space in self.observation_spaces)

    @property
    def observation_size(self) -> int:
        """d, of the agent that observes most."""
        return max(encoder.size for encoder in self.encoders)

    @cached_property
    def action_sizes(self) -> tuple[int, ...]:
        """Of each agent: how many actions, or of how many numbers one consists."""
        return tuple(int(s.n if isinstance(s, spaces.Discrete) else s.shape[0]) for s in self.action_spaces)  # type: ignore

    @property
    def action_size(self) -> int:
        """m, of the agent that has most."""
        return max(self.action_sizes)

    @property
    def allowed(self) -> np.ndarray:
        """[A, m] bool, which actions, or numbers of an action, an agent has."""
        return np.arange(self.action_size) < np.array(self.action_sizes)[:, None]

    @property
    def kinds(self) -> tuple[int, ...]:
        """Of each agent the number of its kind: equal names, but for what follows the last `_`, and equal spaces."""
        keys = [
            (team_of(name), str(observation), str(action))
            for name, observation, action in zip(self.names, self.observation_spaces, self.action_spaces, strict=True)
        ]
        order = list(dict.fromkeys(keys))
        return tuple(order.index(key) for key in keys)

    @property
    def teams(self) -> dict[str, tuple[int, ...]]:
        """Agents by the word that their names begin with: "adversary", "agent"."""
        found: dict[str, tuple[int, ...]] = {}
        for index, name in enumerate(self.names):
            found[team_of(name)] = (*found.get(team_of(name), ()), index)
        return found


def team_of(name: str) -> str:
    """An agent's name without what follows the last `_`."""
    return name.rpartition("_")[0] or name


@dataclass(frozen=True)
class StackAgents(Transform):
    """Dictionaries by the agents' names become arrays with an axis of the agents, and back."""

    agents: Agents

    def spaces(self, inner: Spaces) -> Spaces:
        agents = self.agents
        observation = spaces.Box(-np.inf, np.inf, (agents.count, agents.observation_size), np.float32)
        if agents.discrete:
            return Spaces(observation, spaces.MultiDiscrete(list(agents.action_sizes)))
        low, high = np.full((2, agents.count, agents.action_size), [[[-1.0]], [[1.0]]], np.float32)
        for i, space in enumerate(agents.action_spaces):
            box: Any = space
            low[i, : len(box.low)], high[i, : len(box.low)] = box.low, box.high
        return Spaces(observation, spaces.Box(low, high, dtype=np.float32))

    def action(self, inner: Spaces, action: jax.Array) -> dict[str, jax.Array]:
        agents, split = self.agents, {}
        for i, (name, space, size) in enumerate(
            zip(agents.names, agents.action_spaces, agents.action_sizes, strict=True)
        ):
            if isinstance(space, spaces.Discrete):
                split[name] = action[..., i] + int(space.start)
            else:
                split[name] = action[..., i, :size]
        return split

    def reset(self, state: Any, observation: Any, training: bool) -> tuple[Any, jax.Array]:
        return state, self.observe(state, observation)

    def step(self, state: Any, timestep: Timestep, training: bool) -> tuple[Any, Timestep]:
        return state, timestep._replace(
            observation=self.observe(state, timestep.observation),
            next_observation=self.observe(state, timestep.next_observation),
        )

    def observe(self, state: Any, observation: dict[str, Any]) -> jax.Array:
        """{name: [..., *]} -> [..., A, d]."""
        size, rows = self.agents.observation_size, []
        for name, encoder in zip(self.agents.names, self.agents.encoders, strict=True):
            row = encoder(jax.tree.map(jnp.asarray, observation[name]))
            rows.append(jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, size - encoder.size)]))
        return jnp.stack(rows, axis=-2)
