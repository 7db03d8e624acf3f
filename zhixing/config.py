"""A run's settings: one typed tree, the same in code, in YAML and as flags.

`Config` is what a run is made of. `read` turns a mapping, as YAML gives it, into a typed dataclass: a float may be
written 1e-4, and an unknown key is an error that names the nearest valid one. Presets fill what is not given.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from zhixing.algorithms import algorithm_class, name_of
from zhixing.errors import UsageError, unknown

Options = dict[str, Any]
CUSTOM = "custom"  # what `name_of` calls a user's own algorithm


@dataclass(frozen=True)
class EnvironmentConfig:
    """Which environment, and what is done to its observations and rewards."""

    id: str = "CartPole-v1"
    backend: Literal["auto", "jax", "envpool", "gymnasium", "pettingzoo", "own"] = (
        "auto"  # auto: the fastest that is installed
    )
    max_episode_steps: int | None = None  # cut episodes there; None: the environment's own limit
    normalize_observation: bool = False  # by the running mean and standard deviation
    scale_reward: bool = False  # by the running standard deviation of the discounted return; in training only
    frame_stack: int = 1  # observations that the algorithm sees at once
    vectorization: Literal["sync", "async"] = "sync"  # Gymnasium: one process, or one for each instance
    options: Options = field(default_factory=dict)  # given to the environment's maker, as {name: value}


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy episodes in environments of their own."""

    every: int | None = None  # environment steps between two evaluations; None: 20 times a run
    episodes: int = 20  # of each seed, each time
    final_episodes: int = 100  # of each seed, at the end
    max_steps: int = 1_000  # where an episode is cut if the environment has no limit


@dataclass(frozen=True)
class RecordConfig:
    """What is written down, and how often."""

    every: int | None = None  # environment steps between two rows; None: 100 times a run
    checkpoint_seconds: float = 60.0  # between two checkpoints, besides those at evaluations
    keep_checkpoints: int = 2  # the latest that are kept, besides the best
    tensorboard: bool = True


@dataclass(frozen=True)
class StartConfig:
    """What the networks begin as, where it is not at random: a skill of DIAYN."""

    run: str | None = None  # the folder of a run of DIAYN on the same spaces, with networks of the same size
    skill: int | None = None  # None: for each seed the one with the highest return of this task


@dataclass(frozen=True)
class WorkersConfig:
    """Who shares the work of one run: each has an equal part of its environments, or with "seeds" of its seeds."""

    kind: Literal["none", "threads", "ray", "ray_asynchronous", "devices", "seeds"] = "none"
    count: int = 1  # W; with "seeds", 1 is as many as Ray has cores
    late: int = 0  # D: with "ray", an update does not wait for the slowest so many
    timeout: float = 300.0  # seconds after which a Ray worker that gives no answer counts as hung
    restarts: int = 10  # times that Ray workers are replaced before the run gives up; counted anew when it is resumed
    ray_address: str | None = None  # of a Ray cluster, "auto" for the one this machine is part of; None: this machine


A = TypeVar("A")


@dataclass(frozen=True)
class Config(Generic[A]):
    """Everything that a run is made of."""

    algorithm: A
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    total_steps: int = 100_000  # environment steps of each seed
    num_environments: int = 1  # environments of each seed, stepped together
    seed: int = 0  # the first seed; the others follow it
    seeds: int = 1  # seeds trained side by side
    start: StartConfig = field(default_factory=StartConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    record: RecordConfig = field(default_factory=RecordConfig)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.seeds))

    def check(self) -> None:
        """Raise UsageError for sizes that make no run."""
        positive = {
            "total_steps": self.total_steps,
            "num_environments": self.num_environments,
            "seeds": self.seeds,
            "workers.count": self.workers.count,
            "environment.frame_stack": self.environment.frame_stack,
            "environment.max_episode_steps": self.environment.max_episode_steps,
            "evaluation.every": self.evaluation.every,
            "evaluation.episodes": self.evaluation.episodes,
            "evaluation.final_episodes": self.evaluation.final_episodes,
            "evaluation.max_steps": self.evaluation.max_steps,
            "record.every": self.record.every,
            "record.keep_checkpoints": self.record.keep_checkpoints,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more")
        self.check_workers()
        if self.start.skill is not None and self.start.run is None:
            raise UsageError("start.skill is given and start.run is not; say which run's skill it is")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; it must be 0 or more")
        for name, value in {"total_steps": self.total_steps, "the last seed": self.seed + self.seeds - 1}.items():
            if value >= 2**31:  # both are 32-bit numbers in the run
                raise UsageError(f"{name} is {value}; it must be below {2**31}")
        if self.total_steps % self.num_environments:
            down = self.total_steps - self.total_steps % self.num_environments
            near = f"{down} or {down + self.num_environments}" if down else f"{self.num_environments}"
            raise UsageError(
                f"total_steps {self.total_steps} is not a multiple of the {self.num_environments} environments of a "
                f"seed; use {near}"
            )

    def check_workers(self) -> None:
        workers = self.workers
        for name, least in {"late": 0, "restarts": 0}.items():
            if getattr(workers, name) < least:
                raise UsageError(f"workers.{name} is {getattr(workers, name)}; it must be {least} or more")
        if not workers.timeout > 0:
            raise UsageError(f"workers.timeout is {workers.timeout}; it must be above 0")
        if workers.kind == "none" and workers.count > 1:
            raise UsageError(
                f"workers.count is {workers.count} and workers.kind is none; say which kind: threads, ray, "
                "ray_asynchronous, devices or seeds"
            )
        if workers.late and workers.kind != "ray":
            raise UsageError(f"workers.late is {workers.late}, which only workers.kind ray knows; set it to 0")
        if workers.late >= workers.count:
            raise UsageError(f"workers.late is {workers.late}; it must be below workers.count, {workers.count}")
        if workers.kind == "seeds":
            if workers.count > self.seeds:
                raise UsageError(f"workers.count is {workers.count}, more than the {self.seeds} seeds; lower it")
        elif self.num_environments % workers.count:
            raise UsageError(
                f"num_environments {self.num_environments} is no multiple of the {workers.count} workers; use "
                f"{-(-self.num_environments // workers.count) * workers.count}"
            )


def read(cls: Any, value: Any, where: str = "") -> Any:
    """`value`, as YAML gives it, as the type `cls`; UsageError says which key is wrong and how."""
    origin, arguments = get_origin(cls), get_args(cls)
    name = where or "the settings"
    if cls is Any or isinstance(cls, TypeVar):
        return value
    if origin is Annotated:
        return read(arguments[0], value, where)
    if is_dataclass(cls):
        return read_dataclass(cls, value, where)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or value in ("None", "none", "null")):
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return read(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{name} is {value!r}; it must be one of: {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(read(arguments[0], item, where) for item in items)
    if origin is dict or cls is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} is {value!r}; it must be a mapping of names to values")
        return dict(value)
    return read_scalar(cls, value, name)


def read_scalar(cls: type, value: Any, name: str) -> Any:
    if cls is bool and str(value).lower() in ("true", "false"):  # flags are text
        return str(value).lower() == "true"
    if cls is str and isinstance(value, str):
        return value
    if cls in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as text
            if cls is float or number == int(number):
                return int(value) if cls is int and isinstance(value, int) else cls(number)
        except (TypeError, ValueError, OverflowError):
            pass
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise UsageError(f"{name} is {value!r}; it must be {kinds.get(cls, cls)}")


def read_dataclass(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where or 'the settings'} is {value!r}; it must be a mapping of names to values")
    hints = get_type_hints(cls, include_extras=True)
    names = [f.name for f in fields(cls)]
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in names:
            raise unknown(f"{where} setting".strip(), key, names)
    given = {key: read(hints[key], v, f"{prefix}{key}") for key, v in value.items()}
    for f in fields(cls):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{prefix}{f.name} is missing; give it")
    return cls(**given)


def merge(*mappings: Mapping) -> dict:
    """Later ones win, key by key, at every depth."""
    merged: dict = {}
    for mapping in mappings:
        for key, value in mapping.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def presets(algorithm: str) -> dict[str, dict]:
    """The preset file of `algorithm`: settings by environment id, and `default`."""
    file = resources.files("zhixing") / "presets" / f"{algorithm}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def preset(algorithm: str, environment: str) -> dict:
    """The preset's settings for one environment, as a mapping that `from_mapping` reads."""
    table = presets(algorithm)
    chosen = merge(table.get("default", {}), table.get(environment, {}))
    return merge(chosen, {"algorithm": {"name": algorithm}, "environment": {"id": environment}})


def from_mapping(mapping: Mapping, own_algorithm: Any = None) -> Config:
    """A `Config` from a mapping, as `config.yaml` holds it.

    The algorithm is named in `algorithm.name`; a user's own is given as an object instead.
    """
    algorithm = mapping.get("algorithm")
    if not isinstance(algorithm, Mapping) or "name" not in algorithm:
        raise UsageError("algorithm.name is missing; say which algorithm, for example algorithm: {name: ppo}")
    rest = {key: value for key, value in mapping.items() if key != "algorithm"}
    config = read(Config, {**rest, "algorithm": own_algorithm})
    if own_algorithm is not None:
        name, settings = name_of(own_algorithm), settings_of(own_algorithm)
        if name == CUSTOM:
            return config
    else:
        name, settings = str(algorithm["name"]), {key: value for key, value in algorithm.items() if key != "name"}
        if name == CUSTOM:
            raise UsageError("the run's algorithm is your own; give it again, from Python: algorithm=MyAlgorithm(...)")
    return replace(config, algorithm=read(algorithm_class(name), settings, "algorithm"))


def settings_of(algorithm: Any) -> dict[str, Any]:
    return {f.name: getattr(algorithm, f.name) for f in fields(algorithm)}


def to_mapping(config: Config) -> dict:
    """The inverse of `from_mapping`: complete, rerunnable."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if hasattr(value, "item"):  # a NumPy or JAX number
            return value.item()
        known = value is None or isinstance(value, str | int | float)
        return value if known else getattr(value, "__qualname__", type(value).__qualname__)  # a function of a user's

    return plain(
        {"algorithm": {"name": name_of(config.algorithm)} | settings_of(config.algorithm)}
        | {
            f.name: asdict(v) if is_dataclass(v := getattr(config, f.name)) and not isinstance(v, type) else v
            for f in fields(config)
            if f.name != "algorithm"
        }
    )


def load_yaml(path: Path) -> dict:
    """The mapping in a YAML file; UsageError if there is none."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}; give a run's config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark, text = getattr(error, "problem_mark", None), " ".join(str(error).split())
        where = f", line {mark.line + 1}: {error.problem}" if mark else f": {text}"  # type: ignore[attr-defined]
        raise UsageError(f"{path} is not YAML{where}; correct it, or give a run's config.yaml") from None
    if not isinstance(mapping, Mapping):
        raise UsageError(f"{path} holds no settings; give a run's config.yaml")
    return dict(mapping)


def load_run(directory: Path) -> dict:
    """The settings of the run in `directory`."""
    if not directory.is_dir():
        raise UsageError(f"there is no run folder {directory}; `zhixing train` makes one under runs/")
    file = directory / "config.yaml"
    if not file.exists():
        raise UsageError(f"{directory} is no run, it holds no config.yaml; give a folder that `zhixing train` made")
    return load_yaml(file)


def differences(old: Mapping, new: Mapping, where: str = "") -> list[tuple[str, Any, Any]]:
    """-> (name, old value, new value) of every setting that differs between two trees of settings."""
    found: list[tuple[str, Any, Any]] = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{where}{key}.")
        elif before != after:
            found.append((f"{where}{key}", before, after))
    return found


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)
