"""Finite Markov decision processes in JAX, made from Gymnasium's toy-text tables.

A table is what Gymnasium's toy-text environments keep in `P`: `P[state][action]` is a list of
`(probability, successor, reward, terminated)`. Here it becomes arrays [states, actions, outcomes], which a step
looks up, and which dynamic programming can read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.environments.base import ACTION_MASK
from zhixing.environments.jax_adapter import JaxEnvironment
from zhixing.errors import UsageError

Table = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]


class TabularEnv(JaxEnvironment):
    """A finite Markov decision process; the observation is the index of the state, int32 [].

    Args:
        table: `table[state][action]` -> outcomes `(probability, successor, reward, terminated)`; states and actions
            are numbered from 0, and every state has every action.
        initial_distribution: [states] probability of starting there.
        max_episode_steps: where an episode is cut; None: never.
        observations: [states] the number that is seen in each state, where several look alike; None: its own.
        action_mask: the observation is a dictionary, with the actions that may change something in "action_mask".
        grid: rows of one letter per state, in the order of the states, for `render_text`; None: it has no picture.

    Attributes:
        probabilities: [states, actions, outcomes] float64; 0 for the outcomes that pad a row.
        successors, rewards, terminated: [states, actions, outcomes] int32, float32, bool.
        initial_distribution: [states] float64.
        start_states: int32, the states with a non-zero initial probability.

    Raises:
        UsageError: the table or the initial distribution is no distribution over the table's states.
    """

    def __init__(
        self,
        table: Table,
        initial_distribution: Sequence[float] | np.ndarray,
        max_episode_steps: int | None = None,
        grid: Sequence[str] | None = None,
        action_mask: bool = False,
        observations: Sequence[int] | None = None,
    ):
        self.num_states, self.num_actions = len(table), len(table[0])
        self.max_episode_steps = max_episode_steps
        self.grid = grid
        self.probabilities, self.successors, self.rewards, self.terminated = _arrays(table)
        self.initial_distribution = np.asarray(initial_distribution, np.float64)
        _check_distributions("the table's outcomes", self.probabilities)
        _check_distributions("the initial distribution", self.initial_distribution)
        if self.initial_distribution.shape != (self.num_states,) or not (self.successors < self.num_states).all():
            raise UsageError(f"the table has {self.num_states} states; name no others in its successors or starts")
        self.start_states = np.flatnonzero(self.initial_distribution).astype(np.int32)
        own = np.arange(self.num_states) if observations is None else observations
        self.observations = np.asarray(own, np.int32)
        self.action_mask = self._effective() if action_mask else None
        self._outcome_thresholds = _thresholds(self.probabilities)
        # Side by side in one array, for one lookup a step; float32 holds numbers of states up to 2^24 exactly.
        self._outcomes = np.stack([self.successors, self.rewards, self.terminated], -1).astype(np.float32)
        self._start_thresholds = _thresholds(self.initial_distribution[self.start_states])

    @classmethod
    def from_gymnasium(cls, id: str, action_mask: bool = False, **kwargs: Any) -> Self:
        """The table of a Gymnasium environment that has one: `from_gymnasium("FrozenLake-v1", is_slippery=False)`.

        Raises:
            UsageError: Gymnasium cannot make it, or it is not described by a table.
        """
        import gymnasium

        try:
            environment = gymnasium.make(id, **kwargs)
        except (gymnasium.error.Error, TypeError, KeyError) as error:
            raise UsageError(f"Gymnasium cannot make '{id}': {error}; check the id and its arguments") from error
        inner: Any = environment.unwrapped
        spec: Any = environment.spec
        # Taxi's fickle passenger changes his mind outside the table.
        if not hasattr(inner, "P") or getattr(inner, "fickle_passenger", False):
            raise UsageError(f"'{id}' is not described by a table of its transitions; use backend=gymnasium")
        return cls(inner.P, inner.initial_state_distrib, spec.max_episode_steps, _grid(inner), action_mask)

    def _effective(self) -> np.ndarray:
        """[states, actions] bool: the actions that do not surely leave the state as it is; all where none would do."""
        stays = (self.successors == np.arange(self.num_states)[:, None, None]) & ~self.terminated
        mask = (self.probabilities * stays).sum(-1) < 1.0
        return mask | ~mask.any(-1, keepdims=True)

    def observe(self, state: jax.Array) -> Any:
        seen = jnp.asarray(self.observations)[state]
        if self.action_mask is None:
            return seen
        return {"observation": seen, ACTION_MASK: jnp.asarray(self.action_mask, jnp.int8)[state]}

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        state = jnp.asarray(self.start_states)[_draw(key, jnp.asarray(self._start_thresholds))]
        return self.observe(state), state

    def step_env(self, key: jax.Array, state: jax.Array, action: jax.Array, params: Any) -> tuple:
        outcome = _draw(key, jnp.asarray(self._outcome_thresholds)[state, action])
        successor, reward, terminated = jnp.asarray(self._outcomes)[state, action, outcome]
        successor = successor.astype(jnp.int32)
        return self.observe(successor), successor, reward, terminated > 0, {}

    def observation_space(self, params: Any) -> spaces.Space:
        states: spaces.Space = spaces.Discrete(int(self.observations.max()) + 1)
        if self.action_mask is None:
            return states
        return spaces.Dict({"observation": states, ACTION_MASK: spaces.MultiBinary(self.num_actions)})

    def action_space(self, params: Any) -> spaces.Discrete:
        return spaces.Discrete(self.num_actions)

    def render_text(self, state: int) -> str:
        """The grid with the agent as "@", or the number of the state where there is no grid."""
        if self.grid is None:
            return f"state {int(state)}"
        row, column = divmod(int(state), len(self.grid[0]))
        line = self.grid[row]
        return "\n".join([*self.grid[:row], f"{line[:column]}@{line[column + 1 :]}", *self.grid[row + 1 :]])


def _draw(key: jax.Array, thresholds: jax.Array) -> jax.Array:
    """`thresholds` [outcomes - 1] -> int32 index of an outcome; a single outcome costs no random number."""
    if thresholds.size == 0:
        return jnp.int32(0)
    return jnp.sum(jax.random.uniform(key) >= thresholds, dtype=jnp.int32)


def _thresholds(probabilities: np.ndarray) -> np.ndarray:
    """[..., outcomes] -> cumulative sums [..., outcomes - 1] float32: outcome i where u lies from i - 1's to i's."""
    cumulative = np.cumsum(probabilities, -1)
    # Nothing may lie above the last outcome that can happen, however the sum was rounded.
    remaining = np.cumsum(probabilities[..., ::-1], -1)[..., ::-1]
    return np.where(remaining[..., 1:] > 0, cumulative[..., :-1], 1.0).astype(np.float32)


def _arrays(table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> probabilities, successors, rewards, terminated [states, actions, outcomes], short rows padded."""
    outcomes = max(len(row) for actions in table.values() for row in actions.values())
    shape = (len(table), len(table[0]), outcomes)
    probabilities, successors = np.zeros(shape), np.zeros(shape, np.int32)
    rewards, terminated = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for state, actions in table.items():
        for action, row in actions.items():
            for i, (probability, successor, reward, end) in enumerate(row):
                probabilities[state, action, i] = probability
                successors[state, action, i] = successor
                rewards[state, action, i] = reward
                terminated[state, action, i] = end
    return probabilities, successors, rewards, terminated


def _check_distributions(what: str, probabilities: np.ndarray) -> None:
    if (probabilities < 0).any() or not np.allclose(probabilities.sum(-1), 1.0):
        raise UsageError(f"{what} must be non-negative probabilities that sum to 1; correct the table")


def _grid(environment: Any) -> list[str] | None:
    """The picture of a Gymnasium grid world, one letter per state, where its states are the cells of a grid."""
    if hasattr(environment, "_cliff"):
        cells = np.where(environment._cliff, "C", ".")
        cells[np.unravel_index(environment.start_state_index, environment.shape)] = "S"
        cells[-1, -1] = "G"
    elif getattr(environment, "desc", np.empty(0)).size == len(environment.P):
        cells = environment.desc.astype(str)
    else:
        return None
    return ["".join(row) for row in cells]
