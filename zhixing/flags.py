"""Settings as flags, `--algorithm.learning-rate 1e-3`, read by the same rules as the settings in YAML."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_origin, get_type_hints

import yaml

from zhixing.config import Config, read
from zhixing.errors import UsageError, unknown

OPTIONS = "environment.options"


def setting_types(part: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every setting below `part`, by its dotted name."""
    types: dict[str, Any] = {}
    hints = get_type_hints(type(part))
    for f in fields(part):
        name, value = f"{prefix}{f.name}", getattr(part, f.name)
        types |= setting_types(value, f"{name}.") if is_dataclass(value) else {name: hints[f.name]}
    return types


def groups(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """-> each flag with the words that follow it; `--flag=word` too."""
    flag, values = "", list[str]()
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        if flag:
            yield flag, values
        flag, equals, value = word.partition("=")
        values = [value] if equals else []
    if flag:
        yield flag, values


def read_flags(words: Sequence[str], config: Config) -> dict[str, Any]:
    """The settings in `words`, nested as in YAML; UsageError for an unknown name and a value of a wrong type.

    `--name` alone sets what is true or false to true, and `--no-name` to false; `--environment.options.NAME VALUE`
    gives an option to the environment's maker.
    """
    if words and not words[0].startswith("--"):
        raise UsageError(f"'{words[0]}' is no setting; settings are given as --name value")
    words = with_ray_address(words, config)
    types = setting_types(config)
    flags = {f"--{name.replace('_', '-')}": name for name in types if name != OPTIONS}
    settings: dict[str, Any] = {}
    for flag, values in groups(words):
        flag = flag.replace("_", "-") if not flag.startswith(f"--{OPTIONS}.") else flag
        name, alone = flags.get(flag), "true"
        positive = flags.get(flag.replace("no-", "", 1))
        if name is None and positive and types[positive] is bool and not values:
            name, alone = positive, "false"
        if flag.startswith(f"--{OPTIONS}."):
            name, value = flag.removeprefix("--"), yaml.safe_load(single(flag, values))
        elif name is None:
            raise unknown("setting", flag, [*flags, f"--{OPTIONS}.NAME"])
        elif get_origin(types[name]) is tuple:
            value = read(types[name], values, flag)
        else:
            word = alone if types[name] is bool and not values else single(flag, values)
            value = read(types[name], word, flag)
        put(settings, name.split("."), value)
    return settings


def with_ray_address(words: Sequence[str], config: Config) -> Sequence[str]:
    """`--ray-address A` is `--workers.ray-address A`; where nobody shares the work of the run, its seeds are spread."""
    short = [word for word in words if word.split("=")[0] == "--ray-address"]
    if not short:
        return words
    spread = config.workers.kind == "none" and not any(word.startswith("--workers.kind") for word in words)
    long = [word.replace("--ray-address", "--workers.ray-address", 1) if word in short else word for word in words]
    return [*long, "--workers.kind", "seeds"] if spread else long


def single(flag: str, values: Sequence[str]) -> str:
    if not values:
        raise UsageError(f"{flag} has no value; give one after it")
    if len(values) > 1:
        raise UsageError(f"{flag} takes one value, '{values[1]}' is one word too many")
    return values[0]


def put(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        settings = settings.setdefault(part, {})
    settings[path[-1]] = value
