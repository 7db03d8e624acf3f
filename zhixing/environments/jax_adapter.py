"""JAX environments: gymnax 1.x's protocol, and the adapter that runs any environment that speaks it.

An environment is an object with

    reset(key, params)                -> observation, state
    step(key, state, action, params)  -> observation, state, reward, terminated, truncated, info

where `step` starts a new episode by itself and keeps the old one's last observation in
`info["final_observation"]`. `JaxEnvironment` below gives `reset` and `step` to whoever writes the two
functions without the automatic reset, `reset_env` and `step_env`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from zhixing.environments.base import AgentSteps, Batch, Environment, Timestep
from zhixing.environments.goals import jax_goals
from zhixing.errors import UsageError


class Episode(NamedTuple):
    """The state of a running episode: the environment's own, and how long it has run."""

    environment: Any  # the environment's own state
    steps: Any  # int32, steps since the reset; None where nobody counts


class JaxEnvironment:
    """Base of the JAX environments: write `reset_env`, `step_env` and the two spaces, get the protocol.

    `params` is any pytree of constants; `default_params` is used where none are given. Episodes are cut at
    `max_episode_steps` (None: never), which is counted outside, so that `step_env` never has to.
    """

    max_episode_steps: int | None = None
    default_params: Any = ()

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """-> observation, state of a new episode."""
        raise NotImplementedError

    def step_env(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple[Any, Any, Any, Any, dict]:
        """-> observation, state, reward [], terminated [], info; no automatic reset, no time limit."""
        raise NotImplementedError

    def observation_space(self, params: Any) -> gymnasium.Space:
        raise NotImplementedError

    def action_space(self, params: Any) -> gymnasium.Space:
        raise NotImplementedError

    def reset(self, key: jax.Array, params: Any = None) -> tuple[Any, Episode]:
        """-> observation, state: the protocol, for one instance."""
        observation, state = self.reset_env(key, self.default_params if params is None else params)
        return observation, Episode(state, jnp.int32(0))

    def step(
        self, key: jax.Array, state: Episode, action: jax.Array, params: Any = None
    ) -> tuple[Any, Episode, jax.Array, jax.Array, jax.Array, dict]:
        """-> observation, state, reward, terminated, truncated, info: the protocol, for one instance."""
        params = self.default_params if params is None else params
        step_key, reset_key = jax.random.split(key)
        last, inner, reward, terminated, info = self.step_env(step_key, state.environment, action, params)
        steps = state.steps + 1
        truncated = jnp.bool_(False) if self.max_episode_steps is None else steps >= self.max_episode_steps
        fresh = self.reset(reset_key, params)
        observation, state = _where(terminated | truncated, fresh, (last, Episode(inner, steps)))
        return observation, state, reward, terminated, truncated, {**info, "final_observation": last}


class JaxAdapter(Environment):
    """Any environment of the protocol, ours, gymnax's or a user's own, as an `Environment`.

    Args:
        id: the name it was made by.
        environment: an object with `reset` and `step`, or, faster, with `reset_env` and `step_env`.
        params: its constants; its `default_params` where None.
        max_episode_steps: cut episodes there instead of where the environment does; None: never;
            "own": as the environment does. One that resets by itself can only be cut earlier than it does itself.

    Raises:
        UsageError: the object lacks a part of the protocol, or the limit is not a positive whole number.
    """

    backend = "jax"
    compiled = True
    saves_state = True

    def __init__(self, id: str, environment: Any, params: Any = None, max_episode_steps: int | str | None = "own"):
        self.id = id
        self.environment = environment
        self.resets_itself = not (hasattr(environment, "step_env") and hasattr(environment, "reset_env"))
        for name in ("observation_space", "action_space", *(("reset", "step") if self.resets_itself else ())):
            if not hasattr(environment, name):
                raise UsageError(f"JAX environment '{id}' has no '{name}'; subclass JaxEnvironment, or add it")
        self.params = getattr(environment, "default_params", ()) if params is None else params
        self.observation_space = _gymnasium_space(id, environment.observation_space, self.params)
        self.action_space = _gymnasium_space(id, environment.action_space, self.params)
        self.agents = tuple(getattr(environment, "agents", ()))
        self.goals = jax_goals(environment, self.observation_space, self.params)
        own = max_episode_steps == "own"
        if own:
            own_limit = getattr(self.params, "max_steps_in_episode", None)
            max_episode_steps = getattr(environment, "max_episode_steps", own_limit)
        self.max_episode_steps = _checked_limit(id, max_episode_steps)
        # An environment that knows its limit needs no second counter.
        self.cuts_itself = own and (self.resets_itself or hasattr(environment, "is_truncated"))

    def batch(self, seeds: Sequence[int], num_environments: int) -> "JaxBatch":
        """A pure batch: what its instances draw comes from the keys of `reset` and `step`, `seeds` says how many."""
        return JaxBatch(self, num_environments)


class JaxBatch(Batch):
    """S x N instances as arrays; the automatic reset is done here, and only on steps where an episode ends."""

    def __init__(self, adapter: JaxAdapter, num_environments: int):
        self.environment = adapter.environment
        self.params = adapter.params
        self.agents = adapter.agents
        self.num_environments = num_environments
        self.limit = None if adapter.cuts_itself else adapter.max_episode_steps
        self.cuts_itself = adapter.cuts_itself
        self.resets_itself = adapter.resets_itself

    def reset(self, key: jax.Array) -> tuple[Episode, Any]:
        observation, inner = self._new_episodes(key)
        steps = None if self.limit is None else jnp.zeros((key.shape[0], self.num_environments), jnp.int32)
        return Episode(inner, steps), observation

    def step(self, state: Episode, action: jax.Array, key: jax.Array) -> tuple[Episode, Timestep]:
        keys = self._instance_keys(key, 0)
        observation, inner, next_observation, reward, terminated, truncated, agents = jax.vmap(
            jax.vmap(self._step_instance)
        )(keys, state.environment, action)
        ended_by_environment = terminated | truncated
        steps = None
        if self.limit is not None:
            steps = state.steps + 1
            truncated |= steps >= self.limit
            steps = jnp.where(terminated | truncated, 0, steps)

        if not self.resets_itself or self.limit is not None:
            ended = terminated | truncated
            restart = ended & ~ended_by_environment if self.resets_itself else ended
            # A `cond` around the `where`: most steps end no episode, and then no new one is drawn.
            observation, inner = jax.lax.cond(
                restart.any(),
                lambda old: _where(restart, self._new_episodes(key), old),
                lambda old: old,
                (observation, inner),
            )
        return Episode(inner, steps), Timestep(observation, next_observation, reward, terminated, truncated, agents)

    def _step_instance(self, key: jax.Array, inner: Any, action: jax.Array) -> tuple:
        """One instance -> observation and state (new ones if it resets itself), successor, reward, ends, agents."""
        if self.resets_itself:
            observation, inner, reward, terminated, truncated, info = self.environment.step(
                key, inner, action, self.params
            )
            next_observation = info["final_observation"]
        else:
            observation, inner, reward, terminated, info = self.environment.step_env(key, inner, action, self.params)
            truncated = self.environment.is_truncated(inner, self.params) if self.cuts_itself else False
            next_observation = observation
        reward, terminated = jnp.asarray(reward, jnp.float32), jnp.asarray(terminated, bool)
        agents: Any = ()
        if self.agents:  # what is each one's own, and of that what counts for the episode
            own_end = jnp.broadcast_to(info.get("terminated", terminated), reward.shape)
            agents = AgentSteps(reward, own_end, jnp.broadcast_to(info.get("active", True), reward.shape))
            reward = reward.mean()
        return (
            *_strong((observation, inner, next_observation)),
            reward,
            terminated,
            jnp.asarray(truncated, bool),
            agents,
        )

    def _new_episodes(self, key: jax.Array) -> tuple[Any, Any]:
        """`key` [S] -> observation, state of S x N new episodes."""
        reset = self.environment.reset if self.resets_itself else self.environment.reset_env
        keys = self._instance_keys(key, 1)
        return _strong(jax.vmap(jax.vmap(lambda key: reset(key, self.params)))(keys))

    def _instance_keys(self, key: jax.Array, purpose: int) -> jax.Array:
        """`key` [S] -> [S, N] keys of the instances, others for each purpose (0: a step, 1: a reset)."""
        n = self.num_environments
        return jax.vmap(lambda key: jax.random.split(key, 2 * n)[purpose * n : (purpose + 1) * n])(key)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """Leaf by leaf `new` where `condition` [...], else `old`; leaves [..., any more axes], in the dtypes of `old`."""

    def choose(new: Any, old: Any) -> jax.Array:
        old = jnp.asarray(old)
        mask = condition.reshape(condition.shape + (1,) * (old.ndim - condition.ndim))
        return jnp.where(mask, jax.lax.convert_element_type(new, old.dtype), old)

    return jax.tree.map(choose, new, old)


def _strong(tree: Any) -> Any:
    """The same arrays without weak types: a carry whose types change after the first step is traced twice."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), tree)


def _checked_limit(id: str, limit: Any) -> int | None:
    if limit is None:
        return None
    try:
        number = float(limit)
    except (TypeError, ValueError):
        number = 0.0
    if number < 1 or not number.is_integer():
        raise UsageError(f"max_episode_steps of '{id}' is {limit!r}; give a positive whole number, or None for never")
    return int(number)


def _gymnasium_space(id: str, space: Any, params: Any) -> gymnasium.Space:
    """A space, or the method that makes it, gymnax's or Gymnasium's -> Gymnasium's. Gymnax need not be importable."""
    if isinstance(space, gymnasium.Space):
        return space
    if callable(space):
        return _gymnasium_space(id, space(params), params)
    if hasattr(space, "n"):
        return gymnasium.spaces.Discrete(int(space.n))
    if hasattr(space, "low"):
        low, high = (np.broadcast_to(np.asarray(bound, space.dtype), space.shape) for bound in (space.low, space.high))
        return gymnasium.spaces.Box(low, high, dtype=np.dtype(space.dtype).type)
    if hasattr(space, "spaces"):
        if isinstance(space.spaces, dict):
            parts = {name: _gymnasium_space(id, part, params) for name, part in space.spaces.items()}
            return gymnasium.spaces.Dict(parts)
        return gymnasium.spaces.Tuple([_gymnasium_space(id, part, params) for part in space.spaces])
    raise UsageError(f"JAX environment '{id}' has a space of type {type(space).__name__}; give a Gymnasium space")
