"""PettingZoo: any parallel environment, stepped from Python, one instance after the other."""

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array

from zhixing.environments.base import AgentSteps, Batch, Environment, Timestep
from zhixing.environments.gymnasium_adapter import _map, _space_in_32_bits, _to_32_bits, instance_seed
from zhixing.errors import UsageError, unknown

HOME = "mpe2"  # the package of the ids that name none


class PettingZooAdapter(Environment):
    """A PettingZoo parallel environment: many agents that act at the same time, and may end at different times.

    Agents are those of `possible_agents`, in that order. Of one that is not there, before it appears or after its own
    end, the observation and the reward are zeros, `AgentSteps.active` is false and its action goes nowhere. The
    episode is over when no agent is left: it is terminated if each of them ended by termination, else truncated.

    Args:
        id_or_factory: an id of mpe2 ("simple_spread_v3"), the path of a module with a `parallel_env`
            ("pettingzoo.butterfly.pistonball_v6"), or a class or function that returns a parallel environment.
        max_episode_steps: truncate there, unless the environment does so earlier; None: as it does itself.
        vectorization: "sync", one process, is all there is.
        options: keyword arguments of the environment.

    Raises UsageError: unknown id, a missing package, options that it does not take, not a parallel environment.
    """

    observation_space: spaces.Dict
    action_space: spaces.Dict
    backend = "pettingzoo"
    compiled = False
    saves_state = False

    def __init__(
        self,
        id_or_factory: str | Callable[..., Any],
        max_episode_steps: int | None = None,
        vectorization: str = "sync",
        **options: Any,
    ) -> None:
        if vectorization != "sync":
            raise unknown("vectorization of PettingZoo environments", vectorization, ["sync"])
        if max_episode_steps is not None and max_episode_steps < 1:
            raise UsageError(f"max_episode_steps is {max_episode_steps}; give at least 1")
        if isinstance(id_or_factory, str):
            self.id, self.function = id_or_factory, _parallel_env(id_or_factory)
        else:
            self.id = getattr(id_or_factory, "__name__", type(id_or_factory).__name__)
            self.function = id_or_factory
        self.options = options
        environment = self._make_one()
        self.agents = _agents(self.id, environment)
        self.observation_space, self.action_space = (
            spaces.Dict({name: _space_in_32_bits(space(name)) for name in self.agents})
            for space in (environment.observation_space, environment.action_space)
        )
        limits = max_episode_steps, getattr(environment.unwrapped, "max_cycles", None)  # PettingZoo's own name for it
        self.max_episode_steps = min((limit for limit in limits if limit is not None), default=None)
        environment.close()

    def batch(self, seeds: Sequence[int], num_environments: int) -> "PettingZooBatch":
        """`len(seeds)` x `num_environments` instances, seeded from `seeds[s]` and their index at every `reset`."""
        return PettingZooBatch(self, seeds, num_environments)

    def _make_one(self) -> Any:
        _require(self.id, "pettingzoo")
        from pettingzoo import AECEnv, ParallelEnv

        try:
            environment = self.function(**self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise UsageError(f"environment '{self.id}' cannot be made: {error}; check its options") from error
        if isinstance(environment, AECEnv):
            raise UsageError(f"'{self.id}' takes turns; make a parallel environment of it: its module's parallel_env")
        if not isinstance(environment, ParallelEnv):
            raise UsageError(f"'{self.id}' made {type(environment).__name__}; make it return a pettingzoo.ParallelEnv")
        return environment


class PettingZooBatch(Batch):
    """S x N instances; NumPy in and out. Raises RuntimeError that names the instance where an instance does."""

    def __init__(self, environment: PettingZooAdapter, seeds: Sequence[int], num_environments: int) -> None:
        if not seeds or num_environments < 1:
            size = f"{len(seeds)} seeds x {num_environments} environments"
            raise UsageError(f"a batch of {size} has no instance; give at least 1 of each")
        self._shape = (len(seeds), num_environments)
        self._environment = environment
        self._nothing = {
            name: _map(lambda part: part[0], create_empty_array(space))
            for name, space in environment.observation_space.items()
        }
        self._instances = [
            _Instance(environment, f"environment {index} of seed {seed}", instance_seed(seed, index))
            for seed in seeds
            for index in range(num_environments)
        ]

    def reset(self, key: Any) -> tuple[tuple[()], Any]:
        """Start an episode in every instance, from its seed; the key is unused."""
        return (), self._stack([instance.reset(instance.seed) for instance in self._instances])

    def step(self, state: Any, action: Any, key: Any) -> tuple[tuple[()], Timestep]:
        """One step of every instance; `state` and `key` are unused."""
        own = self._environment.action_space
        rows = {  # copies, in the environments' own types: what JAX hands out cannot be written to
            name: _map(lambda part: np.array(part).reshape(-1, *np.shape(part)[2:]), action[name])
            for name in self._environment.agents
        }
        steps, firsts = [], []
        for index, instance in enumerate(self._instances):
            steps.append(instance.step({name: _row(own[name], rows[name], index) for name in rows}))
            over = steps[-1].terminated or steps[-1].truncated
            firsts.append(instance.reset() if over else steps[-1].observations)
        next_observation = self._stack([step.observations for step in steps])
        ended = any(step.terminated or step.truncated for step in steps)
        reward = self._array([step.reward for step in steps], np.float32)
        return (), Timestep(
            observation=self._stack(firsts) if ended else next_observation,
            next_observation=next_observation,
            reward=reward.mean(-1),
            terminated=self._array([step.terminated for step in steps], bool),
            truncated=self._array([step.truncated for step in steps], bool),
            agents=AgentSteps(
                reward,
                self._array([step.agents_terminated for step in steps], bool),
                self._array([step.active for step in steps], bool),
            ),
        )

    def close(self) -> None:
        """Close the instances; a second call does nothing."""
        while self._instances:
            self._instances.pop().environment.close()

    def _array(self, rows: list, dtype: Any) -> np.ndarray:
        """S * N rows -> [S, N, ...]."""
        array = np.array(rows, dtype)
        return array.reshape(*self._shape, *array.shape[1:])

    def _stack(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """S * N times observations by name, without those who are not there -> {name: [S, N, ...]}, in 32 bits."""
        stacked = {}
        for name in self._environment.agents:
            space = self._environment.observation_space[name]
            each = [row.get(name, self._nothing[name]) for row in rows]
            room: Any = create_empty_array(space, len(rows))
            values = concatenate(space, each, room)
            stacked[name] = _map(lambda part: _to_32_bits(part).reshape(*self._shape, *part.shape[1:]), values)
        return stacked


class _Step(NamedTuple):
    """What a step of one instance brought."""

    observations: dict[str, Any]  # of the agents that acted
    reward: list[float]  # of every agent
    agents_terminated: list[bool]
    active: list[bool]
    terminated: bool
    truncated: bool


class _Instance:
    """One environment, and which of its agents are still there."""

    def __init__(self, adapter: PettingZooAdapter, name: str, seed: int) -> None:
        self.environment = adapter._make_one()
        self.name = f"'{adapter.id}', {name}"
        self.seed = seed
        self.agents = adapter.agents
        self.limit = adapter.max_episode_steps

    def reset(self, seed: int | None = None) -> dict[str, Any]:
        """-> the first observations."""
        try:
            observations, _ = self.environment.reset(seed=seed)
        except Exception as error:
            raise RuntimeError(f"{self.name}: reset raised {type(error).__name__}: {error}") from error
        self.steps = 0
        self.gone: dict[str, bool] = {}  # who has ended in this episode, and whether by termination
        self.live = set(self.environment.agents)
        return observations

    def step(self, actions: dict[str, Any]) -> _Step:
        acted = self.live
        try:
            observations, rewards, terminations, truncations, _ = self.environment.step(
                {name: actions[name] for name in self.environment.agents if name in acted}
            )
        except Exception as error:
            raise RuntimeError(f"{self.name}: step raised {type(error).__name__}: {error}") from error
        self.steps += 1
        before = set(self.gone)
        for name in acted:
            terminated = bool(terminations.get(name, False))
            if terminated or truncations.get(name, False) or name not in self.environment.agents:
                self.gone[name] = terminated
        self.live = set(self.environment.agents) - self.gone.keys()
        over = not self.live or self.steps == self.limit
        terminated = not self.live and all(self.gone.values())
        return _Step(
            {name: observations[name] for name in observations if name not in before},
            [float(rewards.get(name, 0.0)) if name in acted else 0.0 for name in self.agents],
            # No value follows for one that went before, however it went.
            [self.gone.get(name, False) or name in before for name in self.agents],
            [name in acted for name in self.agents],
            terminated,
            over and not terminated,
        )


def _parallel_env(id: str) -> Callable[..., Any]:
    """The function `parallel_env` of the module that an id means."""
    path = id if "." in id else f"{HOME}.{id}"
    if not re.fullmatch(r"\w+(\.\w+)+", path):
        raise UsageError(f"'{id}' is no path of a module; give one like simple_spread_v3 or {HOME}.simple_spread_v3")
    _require(id, path.partition(".")[0])
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{path}.".startswith(f"{missing}."):  # not it, but something that it imports
            raise UsageError(f"environment '{id}' cannot be imported: {error}; install that module") from error
        parent = importlib.import_module(missing.rpartition(".")[0])
        prefix = "" if path != id else f"{parent.__name__}."
        raise unknown("environment", id, [prefix + name for name in _versions(parent)]) from error
    except ImportError as error:
        raise UsageError(f"environment '{id}' cannot be imported: {error}") from error
    if not hasattr(module, "parallel_env"):
        raise UsageError(f"module {path} has no parallel_env; only PettingZoo's parallel environments can be run")
    return module.parallel_env


def _require(id: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        advice = "pip install 'zhixing[marl]'" if package in (HOME, "pettingzoo") else "install it"
        raise UsageError(f"environment '{id}' needs {package}, which is missing; {advice}")


def _versions(package: Any) -> Iterable[str]:
    """The environments among the modules of a package: their names end in a version, the others' do not."""
    names = [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", ()))]
    return [name for name in names if re.search(r"_v\d+$", name)] or names


def _agents(id: str, environment: Any) -> tuple[str, ...]:
    names = tuple(getattr(environment, "possible_agents", ()))
    if not names:
        raise UsageError(f"'{id}' does not say who may take part; give it possible_agents")
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"the agents of '{id}' are {names}; give them names that are strings")
    return names


def _row(space: spaces.Space, rows: Any, index: int) -> Any:
    """Row `index` of the actions of one agent, in the type of its space."""
    return _map(lambda part: part[index].astype(space.dtype) if space.dtype else part[index], rows)
