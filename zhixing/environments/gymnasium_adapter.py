"""Gymnasium: anything registered, or a user's own class, stepped from Python as a vector environment."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from zhixing.environments.base import Batch, Environment, Timestep
from zhixing.environments.goals import gymnasium_goals
from zhixing.errors import UsageError, unknown


class GymnasiumAdapter(Environment):
    """A Gymnasium environment: a registered id ("module:Name-v0" imports the module first), or a class or factory.

    Args:
        id_or_factory: an id, a `gymnasium.Env` subclass, or a function that returns an environment.
        max_episode_steps: truncate there; None: as registered, for a factory as it does itself.
        vectorization: "sync", one process; "async", one process an instance, which pays off for slow environments
            (a script that uses it needs `if __name__ == "__main__":`).
        options: keyword arguments of the environment.

    Raises UsageError: unknown id, a missing package, options that it does not take, not an environment.
    """

    backend = "gymnasium"
    compiled = False
    saves_state = False

    def __init__(
        self,
        id_or_factory: str | Callable[..., gymnasium.Env],
        max_episode_steps: int | None = None,
        vectorization: str = "sync",
        **options: Any,
    ) -> None:
        if vectorization not in ("sync", "async"):
            raise unknown("vectorization", vectorization, ["sync", "async"])
        if max_episode_steps is not None and max_episode_steps < 1:
            raise UsageError(f"max_episode_steps is {max_episode_steps}; give at least 1")
        if not isinstance(id_or_factory, str) and not callable(id_or_factory):
            raise UsageError(f"{id_or_factory!r} is no environment; give an id, a gymnasium.Env subclass or a factory")
        if isinstance(id_or_factory, str):
            self.id, function = id_or_factory, None
        else:
            self.id = getattr(id_or_factory, "__name__", type(id_or_factory).__name__)
            function = id_or_factory
        self.vectorization = vectorization
        self.factory = _Factory(self.id, function, max_episode_steps, options)
        environment = self._make_one()
        self.observation_space = _space_in_32_bits(environment.observation_space)
        self.action_space = environment.action_space
        self.max_episode_steps = _time_limit(environment)
        self.goals = gymnasium_goals(environment)
        if self.goals is None:  # otherwise it is asked on for as long as there is training
            environment.close()

    def batch(self, seeds: Sequence[int], num_environments: int) -> "GymnasiumBatch":
        """`len(seeds)` x `num_environments` instances, seeded from `seeds[s]` and their index at every `reset`."""
        return GymnasiumBatch(self, seeds, num_environments)

    def _make_one(self) -> gymnasium.Env:
        try:
            environment = self.factory()
        except gymnasium.error.DependencyNotInstalled as error:
            commands = [command.strip() for command in re.findall(r"pip3? install [^`]*", str(error))]
            advice = " && ".join(commands) or f"install it: {error}"
            raise UsageError(f"environment '{self.id}' needs a package that is missing; {advice}") from error
        except (
            gymnasium.error.UnregisteredEnv,
            gymnasium.error.DeprecatedEnv,
        ) as error:
            raise unknown("environment", self.id, gymnasium.registry, hint=str(error)) from error
        except ModuleNotFoundError as error:
            raise UsageError(f"environment '{self.id}' cannot be imported: {error}; install that module") from error
        except (TypeError, gymnasium.error.Error) as error:
            raise UsageError(f"environment '{self.id}' cannot be made: {error}; check its options") from error
        if not isinstance(environment, gymnasium.Env):
            raise UsageError(f"'{self.id}' made {type(environment).__name__}; make it return a gymnasium.Env")
        return environment


def register_installed(id: str) -> None:
    """Register the ids of Gymnasium-Robotics, if it is installed and `id` is none that Gymnasium knows."""
    if id not in gymnasium.registry and ":" not in id and importlib.util.find_spec("gymnasium_robotics"):
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)


def instance_seed(seed: int, index: int) -> int:
    """The 31-bit seed of instance `index` of `seed`."""
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1)[0] >> 1)


class GymnasiumBatch(Batch):
    """S x N instances in one vector environment; NumPy in and out.

    Raises RuntimeError that names the instance where an instance does.
    """

    def __init__(self, environment: GymnasiumAdapter, seeds: Sequence[int], num_environments: int) -> None:
        if not seeds or num_environments < 1:
            size = f"{len(seeds)} seeds x {num_environments} environments"
            raise UsageError(f"a batch of {size} has no instance; give at least 1 of each")
        self._shape = (len(seeds), num_environments)
        self._seeds = [instance_seed(seed, index) for seed in seeds for index in range(num_environments)]
        factories = [
            _NamedFactory(environment.factory, f"environment {index} of seed {seed}")
            for seed in seeds
            for index in range(num_environments)
        ]
        self._vector: Any
        if environment.vectorization == "sync":
            self._vector = SyncVectorEnv(factories, autoreset_mode=AutoresetMode.SAME_STEP)
        else:
            # a plain fork can hang: it copies the locks that JAX's threads hold
            self._vector = AsyncVectorEnv(factories, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
        self._closed = False

    def reset(self, key: Any) -> tuple[tuple[()], Any]:
        """Start an episode in every instance, from its seed; the key is unused."""
        observation, _ = self._vector.reset(seed=self._seeds)
        return (), self._unflatten(observation)

    def step(self, state: Any, action: Any, key: Any) -> tuple[tuple[()], Timestep]:
        """One step of every instance; `state` and `key` are unused."""
        size = self._shape[0] * self._shape[1]
        action = _map(lambda value: np.asarray(value).reshape(size, *np.shape(value)[2:]), action)
        observation, reward, terminated, truncated, info = self._vector.step(action)
        next_observation = observation
        ended = np.flatnonzero(terminated | truncated).tolist()
        if ended:
            next_observation = _map(np.copy, observation)
            for index in ended:
                _put(next_observation, index, info["final_obs"][index])
        return (), Timestep(
            observation=self._unflatten(observation),
            next_observation=self._unflatten(next_observation),
            reward=self._unflatten(reward),
            terminated=self._unflatten(terminated),
            truncated=self._unflatten(truncated),
        )

    def close(self) -> None:
        """Close the instances; a second call does nothing."""
        if not self._closed:
            self._closed = True
            # An instance that failed in a process of its own no longer answers to a polite request.
            arguments = {"terminate": True} if isinstance(self._vector, AsyncVectorEnv) else {}
            self._vector.close(**arguments)

    def _unflatten(self, values: Any) -> Any:
        """[S * N, ...] -> [S, N, ...], 64 bits -> 32."""
        return _map(
            lambda value: _to_32_bits(value).reshape(*self._shape, *value.shape[1:]),
            values,
        )


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of every array of an observation or action, which may be a dictionary or a tuple of them.

    Not `jax.tree.map`: a process of "async" imports this file, and JAX would take it seconds.
    """
    if isinstance(value, dict):
        return {name: _map(function, part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(function, part) for part in value)
    return function(value)


def _put(values: Any, index: int, value: Any) -> None:
    """`values[index] = value`, in every array."""
    if isinstance(values, np.ndarray):
        values[index] = value
    else:
        for key in values if isinstance(values, dict) else range(len(values)):
            _put(values[key], index, value[key])


def _space_in_32_bits(space: gymnasium.Space) -> gymnasium.Space:
    """`space` with the type in which its values are handed on."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _space_in_32_bits(part) for name, part in space.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple(_space_in_32_bits(part) for part in space)
    if isinstance(space, spaces.Box) and space.low.itemsize == 8:
        low, high = _to_32_bits(space.low), _to_32_bits(space.high)
        return spaces.Box(low, high, dtype=low.dtype.type)
    return space


def _to_32_bits(value: np.ndarray) -> np.ndarray:
    narrow = {"f": np.float32, "i": np.int32, "u": np.uint32}.get(value.dtype.kind)
    return value.astype(narrow) if narrow and value.dtype.itemsize == 8 else value


def _time_limit(environment: gymnasium.Env) -> int | None:
    """The limit of the outermost TimeLimit wrapper, or else of the specification that it was registered with."""
    while isinstance(environment, gymnasium.Wrapper):
        if isinstance(environment, gymnasium.wrappers.TimeLimit):
            return environment._max_episode_steps
        environment = environment.env
    return environment.spec.max_episode_steps if environment.spec else None


class _Factory:
    """Makes one environment; a class, so that it can be sent to another process."""

    def __init__(
        self,
        id: str,
        function: Callable[..., gymnasium.Env] | None,
        max_episode_steps: int | None,
        options: dict,
    ) -> None:
        self.id = id
        self.function = function
        self.max_episode_steps = max_episode_steps
        self.options = options

    def __call__(self) -> gymnasium.Env:
        if self.function is None:
            register_installed(self.id)
            limit = {} if self.max_episode_steps is None else {"max_episode_steps": self.max_episode_steps}
            return gymnasium.make(self.id, disable_env_checker=True, **limit, **self.options)
        environment = self.function(**self.options)
        if self.max_episode_steps is None or not isinstance(environment, gymnasium.Env):
            return environment
        return gymnasium.wrappers.TimeLimit(environment, self.max_episode_steps)


class _NamedFactory:
    """Makes one environment whose errors say which instance it is."""

    def __init__(self, factory: _Factory, name: str) -> None:
        self.factory = factory
        self.name = name

    def __call__(self) -> gymnasium.Env:
        return _Named(self.factory(), f"'{self.factory.id}', {self.name}")


class _Named(gymnasium.Wrapper):
    def __init__(self, env: gymnasium.Env, name: str) -> None:
        super().__init__(env)
        self.name = name

    def reset(self, **arguments: Any) -> tuple[Any, dict]:
        try:
            return self.env.reset(**arguments)
        except Exception as error:
            raise RuntimeError(f"{self.name}: reset raised {type(error).__name__}: {error}") from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        try:
            return self.env.step(action)
        except Exception as error:
            raise RuntimeError(f"{self.name}: step raised {type(error).__name__}: {error}") from error
