"""Ladders: named settings that are compared with each other.

A ladder is a mapping, as YAML has it: two keys of its own, and besides them the settings that all rungs share.

    form: cumulative        # each rung adds to the one before; independent: each adds to the shared settings alone
    algorithm: {name: dqn}
    rungs:                  # the lowest first; settings as in a run's config.yaml
      hard: {algorithm: {target_update: hard}}
      slower: {algorithm: {target_period: 1_000}}

Below all of it lies the preset of the rung's algorithm for the environment. Ladders with a name are in
`presets/ladders/`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from zhixing import config as configs
from zhixing.config import Config
from zhixing.errors import UsageError, unknown

FORMS = ("cumulative", "independent")
SEEDS = 8  # where neither the ladder nor the user says how many: enough for an interval


@dataclass(frozen=True)
class Ladder:
    """What is compared: `rungs` maps a name to what the rung adds to the shared settings, or to the rung before."""

    name: str
    form: str
    shared: dict[str, Any]
    rungs: dict[str, dict[str, Any]]

    def settings(self, rung: str) -> dict[str, Any]:
        """All that the ladder says of a rung; from one that names another algorithm on, the former's are gone."""
        names = list(self.rungs)
        below = names[: names.index(rung)] if self.form == "cumulative" else []
        settings = self.shared
        for name in [*below, rung]:
            added = self.rungs[name]
            if algorithm_name(added) not in (None, algorithm_name(settings)):
                settings = {**settings, "algorithm": self.shared.get("algorithm", {})}
            settings = configs.merge(settings, added)
        return settings


def algorithm_name(settings: Mapping) -> str | None:
    algorithm = settings.get("algorithm")
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else None
    return None if name is None else str(name).lower().replace("-", "_")


def ladder_names() -> list[str]:
    """The ladders that come with the package."""
    folder = resources.files("zhixing") / "presets" / "ladders"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_ladder(source: str | Path | Mapping) -> Ladder:
    """The ladder of that name, in that YAML file, or of that mapping; UsageError for anything else."""
    if isinstance(source, Mapping):
        return read_ladder(source, "ladder")
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return read_ladder(configs.load_yaml(path), path.stem)
    name = str(source).lower().replace("-", "_")
    if name not in ladder_names():
        raise unknown("ladder", source, ladder_names())
    file = resources.files("zhixing") / "presets" / "ladders" / f"{name}.yaml"
    with resources.as_file(file) as path:
        return read_ladder(configs.load_yaml(path), name)


def read_ladder(mapping: Mapping, name: str) -> Ladder:
    """The ladder that `mapping` describes; what is wrong with its rungs' settings shows once they are read."""
    keys = ["form", "rungs", *(f.name for f in fields(Config))]
    for key in mapping:
        if key not in keys:
            raise unknown(f"key of the ladder {name}:", key, keys)
    form, rungs = mapping.get("form"), mapping.get("rungs")
    if form not in FORMS:
        said = "does not say its form" if form is None else f"has the form {form!r}"
        raise UsageError(
            f"the ladder {name} {said}; write form: cumulative (each rung adds to the one before) or form: independent"
        )
    if not isinstance(rungs, Mapping) or not rungs:
        raise UsageError(f"the ladder {name} has no rungs; write rungs: and below it a name and settings for each")
    for rung, settings in rungs.items():
        if not isinstance(settings, Mapping | None):
            raise UsageError(f"rung '{rung}' is {settings!r}; it must be a mapping of names to values")
    shared = {key: value for key, value in mapping.items() if key not in ("form", "rungs")}
    return Ladder(name, form, shared, {str(rung): dict(settings or {}) for rung, settings in rungs.items()})


def rung_configs(
    ladder: Ladder, environment: str | None, more: Callable[[Config], Mapping], chosen: Sequence[str] | None = None
) -> dict[str, Config]:
    """The settings of each rung, or of the `chosen` ones, as they are on the whole ladder.

    From below: the preset of the rung's algorithm for the environment (but the total steps are those of the ladder's
    first rung), the shared settings, the rung's, and `more`, which is asked for each rung.
    """
    for name in chosen or ():
        if name not in ladder.rungs:
            raise unknown(f"rung of the ladder {ladder.name}:", name, ladder.rungs)
    first = ladder.settings(next(iter(ladder.rungs)))
    id = environment or environment_id(first)
    task = {"environment": {"id": id} | ({"backend": "auto"} if environment else {})}
    made = {}
    for name in ladder.rungs:
        if chosen and name not in chosen:
            continue
        with says(name):
            settings = ladder.settings(name)
            sizes = {"seeds": SEEDS, "total_steps": preset(first, id).get("total_steps")}
            given = {key: value for key, value in sizes.items() if value is not None}
            mapping = configs.merge(preset(settings, id), given, settings, task)
            made[name] = configs.from_mapping(configs.merge(mapping, more(configs.from_mapping(mapping))))
    require_comparable(made)
    return made


def preset(settings: Mapping, environment: str) -> dict[str, Any]:
    """The preset of the algorithm that `settings` name."""
    name = algorithm_name(settings)
    if name is None:
        raise UsageError("algorithm.name is missing; say which algorithm, for example algorithm: {name: ppo}")
    return configs.preset(name, environment)


@contextmanager
def says(rung: str) -> Iterator[None]:
    """A slip within it is said to be of `rung`."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"rung '{rung}': {error}") from None


def environment_id(settings: Mapping) -> str:
    environment = settings.get("environment")
    if not isinstance(environment, Mapping) or "id" not in environment:
        raise UsageError("which environment? name it after the ladder, or in it as environment: {id: CartPole-v1}")
    return str(environment["id"])


def require_comparable(rungs: Mapping[str, Config]) -> None:
    """Raise UsageError unless the rungs share the task, the steps and the seeds, and differ in something else."""
    (first, reference), *others = rungs.items()
    for name, config in others:
        for what, of in {
            "environment.id": lambda c: c.environment.id,
            "total_steps": lambda c: c.total_steps,
            "seed": lambda c: c.seed,
            "seeds": lambda c: c.seeds,
        }.items():
            if of(config) != of(reference):
                raise UsageError(
                    f"rung '{name}' has {what} {of(config)}, '{first}' has {of(reference)}; a comparison needs the same"
                )
    seen: dict[str, str] = {}
    for name, config in rungs.items():
        same = seen.setdefault(repr(configs.to_mapping(config)), name)
        if same != name:
            raise UsageError(f"the rungs '{same}' and '{name}' have the same settings; leave one of them out")


def added(before: Config, after: Config) -> dict[str, Any]:
    """The settings in which `after` differs from `before`, by name; of another algorithm, its name alone."""
    old, new = configs.to_mapping(before), configs.to_mapping(after)
    changed = {name: value for name, _, value in configs.differences(old, new)}
    if "algorithm.name" in changed:
        return {name: value for name, value in changed.items() if name == "algorithm.name" or "algorithm" not in name}
    return changed
