"""Settings: the same tree in code, in YAML and as flags."""

from dataclasses import fields, replace

import numpy as np
import pytest
import yaml
from gymnasium import spaces
from probes import team

from zhixing import config
from zhixing.algorithms import ALGORITHMS, algorithm_class
from zhixing.core import Spec
from zhixing.environments.goals import Goals
from zhixing.errors import UsageError
from zhixing.flags import read_flags, setting_types

PPO = {"algorithm": {"name": "ppo"}}
BOX, DISCRETE = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(3)
TEAM = replace(team((BOX, BOX), (DISCRETE, DISCRETE)), max_episode_steps=10)
GOALS = Goals(reward=lambda achieved, desired: achieved)


def refusal(function, *arguments) -> str:
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    return str(caught.value)


def made(**more) -> config.Config:
    return config.from_mapping(config.merge(PPO, more))


# ------------------------------------------------------------------------------------------------------------- YAML


def test_numbers_as_yaml_writes_them():
    text = "{algorithm: {name: ppo, learning_rate: 1e-4, discount: 1, epochs: 2.0}, total_steps: 1e5, seeds: 3}"
    read = config.from_mapping(yaml.safe_load(text))
    assert read.algorithm.learning_rate == 1e-4 and read.algorithm.discount == 1.0
    assert type(read.algorithm.discount) is float and type(read.algorithm.epochs) is int
    assert (read.algorithm.epochs, read.total_steps, read.seeds) == (2, 100_000, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total_steps: many", "total_steps is 'many'; it must be a whole number"),
        ("total_steps: 1.5", "total_steps is 1.5; it must be a whole number"),
        ("total_steps: true", "total_steps is True; it must be a whole number"),
        ("total_steps: null", "total_steps is None; it must be a whole number"),
        ("total_steps: .nan", "total_steps is nan; it must be a whole number"),
        ("total_steps: .inf", "total_steps is inf; it must be a whole number"),
        ("total_steps: [1]", "total_steps is [1]; it must be a whole number"),
        ("record: {tensorboard: 1}", "record.tensorboard is 1; it must be true or false"),
        ("record: {checkpoint_seconds: soon}", "record.checkpoint_seconds is 'soon'; it must be a number"),
        ("record: often", "record is 'often'; it must be a mapping of names to values"),
        ("environment: {id: 5}", "environment.id is 5; it must be text"),
        ("environment: {options: [1]}", "environment.options is [1]; it must be a mapping of names to values"),
        ("environment: {vectorization: a}", "environment.vectorization is 'a'; it must be one of: sync, async"),
        ("environment: {max_episode_steps: x}", "environment.max_episode_steps is 'x'; it must be a whole number"),
        ("algorithm: {hidden: [8, a]}", "algorithm.hidden is 'a'; it must be a whole number"),
        ("algorithm: {activation: gelu}", "algorithm.activation is 'gelu'; it must be one of: tanh, relu"),
        ("algorithm: {stop_kl: x}", "algorithm.stop_kl is 'x'; it must be a number"),
        ("totl_steps: 1", "unknown setting 'totl_steps'; did you mean 'total_steps'?"),
        ("algorithm: {learningrate: 1}", "unknown algorithm setting 'learningrate'; did you mean 'learning_rate'?"),
        ("record: {tensorbord: true}", "unknown record setting 'tensorbord'; did you mean 'tensorboard'?"),
        (
            "record: {zzz: 1}",
            "unknown record setting 'zzz'; one of: checkpoint_seconds, every, keep_checkpoints, tensorboard",
        ),
        ("algorithm: {name: pppo}", "unknown algorithm 'pppo'; did you mean 'ppo'?"),
    ],
)
def test_wrong_values_in_yaml(text, message):
    assert refusal(config.from_mapping, config.merge(PPO, yaml.safe_load(text))) == message


@pytest.mark.parametrize(
    "mapping", [{}, {"algorithm": "ppo"}, {"algorithm": {"learning_rate": 1}}, {"algorithm": None}]
)
def test_algorithm_must_be_named(mapping):
    message = "algorithm.name is missing; say which algorithm, for example algorithm: {name: ppo}"
    assert refusal(config.from_mapping, mapping) == message


@pytest.mark.parametrize("name", ALGORITHMS)
def test_mapping_and_yaml_round_trip(name):
    read = config.from_mapping({"algorithm": {"name": name}, "environment": {"options": {"a": [1, {"b": None}]}}})
    assert config.from_mapping(config.to_mapping(read)) == read
    assert config.from_mapping(yaml.safe_load(config.dump_yaml(read))) == read


@pytest.mark.parametrize("name", ALGORITHMS)
def test_presets_can_be_read_and_fit(name):
    assert "default" in config.presets(name)
    for environment in config.presets(name):
        read = config.from_mapping(config.preset(name, environment))
        read.check()
        sizes = read.num_environments, read.total_steps
        tasks = (BOX, DISCRETE), (DISCRETE, DISCRETE), (BOX, BOX)
        specs = [Spec(*task, *sizes, max_episode_steps=10, goals=GOALS) for task in tasks]
        specs.append(replace(TEAM, num_environments=read.num_environments, total_steps=read.total_steps))
        assert any(fits(read.algorithm, spec) for spec in specs), environment


def fits(algorithm, spec) -> bool:
    try:
        algorithm.check(spec)
    except UsageError:
        return False
    return True


def test_settings_of_an_object_are_read_as_those_in_yaml():
    own = algorithm_class("ppo")(hidden=[8], learning_rate=np.float32(0.5), epochs=2.0)
    read = config.from_mapping(PPO, own)
    assert (read.algorithm.hidden, read.algorithm.learning_rate, read.algorithm.epochs) == ((8,), 0.5, 2)
    assert type(read.algorithm) is type(own) and type(read.algorithm.learning_rate) is float
    assert refusal(config.from_mapping, PPO, algorithm_class("ppo")(epochs="many")) == (
        "algorithm.epochs is 'many'; it must be a whole number"
    )


def test_merge_is_deep_and_later_wins():
    merged = config.merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}}, {"d": {"e": 5}})
    assert merged == {"a": {"b": 1, "c": 4}, "d": {"e": 5}}


# ------------------------------------------------------------------------------------------------------------ sizes

POSITIVE = [
    "total_steps", "num_environments", "seeds", "workers.count",
    "environment.frame_stack", "environment.max_episode_steps",
    "evaluation.every", "evaluation.episodes", "evaluation.final_episodes", "evaluation.max_steps",
    "record.every", "record.keep_checkpoints",
]  # fmt: skip


def nested(name: str, value: object) -> dict:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[return-value]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", POSITIVE)
def test_sizes_of_a_run_must_be_positive(name, value):
    assert refusal(made(**nested(name, value)).check) == f"{name} is {value}; it must be 1 or more"


def test_every_whole_number_of_the_settings_is_checked():
    whole = {name for name, kind in setting_types(made()).items() if "int" in str(kind) and "algorithm" not in name}
    # Which skills there are, the run of start.run says; the two others may be 0.
    assert whole == {*POSITIVE, "seed", "start.skill", "workers.late", "workers.restarts"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"seed": 2**31 - 1, "seeds": 2}, "the last seed is 2147483648; it must be below 2147483648"),
        ({"total_steps": 2**31}, "total_steps is 2147483648; it must be below 2147483648"),
        (
            {"total_steps": 1_000, "num_environments": 7},
            "total_steps 1000 is not a multiple of the 7 environments of a seed; use 994 or 1001",
        ),
        (
            {"total_steps": 3, "num_environments": 4},
            "total_steps 3 is not a multiple of the 4 environments of a seed; use 4",
        ),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    assert refusal(made(**settings).check) == message


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"kind": "ray", "restarts": -1}, "workers.restarts is -1; it must be 0 or more"),
        ({"kind": "ray", "late": -1}, "workers.late is -1; it must be 0 or more"),
        ({"kind": "ray", "timeout": 0}, "workers.timeout is 0.0; it must be above 0"),
        (
            {"kind": "threads", "count": 2, "late": 1},
            "workers.late is 1, which only workers.kind ray knows; set it to 0",
        ),
        ({"kind": "ray", "count": 2, "late": 2}, "workers.late is 2; it must be below workers.count, 2"),
        ({"kind": "ray", "count": 3}, "num_environments 4 is no multiple of the 3 workers; use 6"),
        ({"kind": "seeds", "count": 3}, "workers.count is 3, more than the 1 seeds; lower it"),
        (
            {"count": 2},
            "workers.count is 2 and workers.kind is none; say which kind: threads, ray, ray_asynchronous, devices or "
            "seeds",
        ),
    ],
)
def test_workers_that_do_not_fit(workers, message):
    assert refusal(made(num_environments=4, workers=workers).check) == message


def test_ray_address_spreads_the_seeds_where_nobody_shares_the_work():
    spread = {"workers": {"ray_address": "auto", "kind": "seeds"}}
    assert flags("--ray-address auto") == flags("--ray-address=auto") == spread
    assert flags("--ray-address auto --workers.kind ray") == {"workers": {"ray_address": "auto", "kind": "ray"}}
    mapping = {"algorithm": {"name": "dppo"}, "workers": {"kind": "ray"}}
    assert read_flags(["--ray-address", "auto"], config.from_mapping(mapping)) == {"workers": {"ray_address": "auto"}}


# Counts that may be 0, and numbers of any sign.
FREE = {"learning_starts", "replay_ratio", "reuse"}
COUNTS = [
    (name, f.name)
    for name in ALGORITHMS
    for f in fields(algorithm_class(name))
    if f.type in (int, "int") and f.name not in FREE
]
LEAST = {"skills": "from 2 to 1000"}  # one skill would be nothing to tell apart
RATES = [(name, "learning_rate") for name in ALGORITHMS]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(("name", "setting"), COUNTS + RATES)
def test_counts_and_rates_of_an_algorithm_must_be_positive(name, setting, value):
    algorithm = algorithm_class(name)(**{setting: value})
    pairs = [(observation, action) for observation in (BOX, DISCRETE) for action in (DISCRETE, BOX)]
    specs = [*(Spec(*pair, 4, 1_000, max_episode_steps=10) for pair in pairs), TEAM]
    spec = next(spec for spec in specs if fits(algorithm_class(name)(), spec))
    assert (
        refusal(algorithm.check, spec) == f"algorithm.{setting} is {value}; it must be {LEAST.get(setting, 'above 0')}"
    )


# ------------------------------------------------------------------------------------------------------------ flags


def flags(line: str, name: str = "ppo") -> dict:
    return read_flags(line.split(), config.from_mapping({"algorithm": {"name": name}}))


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("--total-steps 1e4", {"total_steps": 10_000}),
        ("--total-steps=100 --seed 0", {"total_steps": 100, "seed": 0}),
        ("--total_steps 100", {"total_steps": 100}),
        ("--algorithm.learning-rate 1e-4", {"algorithm": {"learning_rate": 1e-4}}),
        ("--algorithm.initial-log-std -0.5", {"algorithm": {"initial_log_std": -0.5}}),
        ("--algorithm.hidden 64 32 --seeds 2", {"algorithm": {"hidden": (64, 32)}, "seeds": 2}),
        ("--algorithm.hidden", {"algorithm": {"hidden": ()}}),
        (
            "--algorithm.stop-kl None --evaluation.every 10",
            {"algorithm": {"stop_kl": None}, "evaluation": {"every": 10}},
        ),
        ("--record.tensorboard False", {"record": {"tensorboard": False}}),
        ("--record.no-tensorboard", {"record": {"tensorboard": False}}),
        ("--algorithm.clip-value --seed 1", {"algorithm": {"clip_value": True}, "seed": 1}),
        ("--environment.id 5", {"environment": {"id": "5"}}),
        (
            "--environment.options.is_slippery false --environment.options.map-name 4x4",
            {"environment": {"options": {"is_slippery": False, "map-name": "4x4"}}},
        ),
        ("", {}),
    ],
)
def test_flags_are_read_as_yaml_is(line, settings):
    assert flags(line) == settings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--total-steps x", "--total-steps is 'x'; it must be a whole number"),
        ("--total-steps", "--total-steps has no value; give one after it"),
        ("--total-steps --seeds 2", "--total-steps has no value; give one after it"),
        ("--seeds 2 3", "--seeds takes one value, '3' is one word too many"),
        ("junk --seeds 2", "'junk' is no setting; settings are given as --name value"),
        ("-x", "'-x' is no setting; settings are given as --name value"),
        ("--seed 1 -x", "--seed takes one value, '-x' is one word too many"),
        ("--algorithm.learning-rate fast", "--algorithm.learning-rate is 'fast'; it must be a number"),
        ("--algorithm.hidden 8 a", "--algorithm.hidden is 'a'; it must be a whole number"),
        ("--algorithm.clip-value maybe", "--algorithm.clip-value is 'maybe'; it must be true or false"),
        ("--algorithm.activation gelu", "--algorithm.activation is 'gelu'; it must be one of: tanh, relu"),
        ("--learning-rate 1", "unknown setting '--learning-rate'; did you mean '--algorithm.learning-rate'?"),
        ("--no-seeds", "unknown setting '--no-seeds'; did you mean '--seeds'?"),
        (
            "--environment.options a",
            "unknown setting '--environment.options'; did you mean '--environment.options.NAME'?",
        ),
        ("--environment.options.a", "--environment.options.a has no value; give one after it"),
    ],
)
def test_wrong_flags(line, message):
    assert refusal(flags, line) == message


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_is_a_flag(name):
    read = config.from_mapping({"algorithm": {"name": name}})
    for setting, kind in setting_types(read).items():
        if setting != "environment.options":
            value = read
            for part in setting.split("."):
                value = getattr(value, part)
            words = map(str, value) if isinstance(value, tuple) else [str(value)]
            given = read_flags([f"--{setting.replace('_', '-')}", *words], read)
            assert given == nested(setting, value), kind


# ------------------------------------------------------------------------------------------------------ differences


def test_differences_name_each_setting():
    old, new = made(seed=1), made(seed=2, algorithm={"hidden": [8]})
    found = config.differences(config.to_mapping(old), config.to_mapping(new))
    assert sorted(found) == [("algorithm.hidden", [64, 64], [8]), ("seed", 1, 2)]
    assert config.differences(config.to_mapping(old), config.to_mapping(old)) == []
    assert config.differences({"a": {"b": 1}}, {}) == [("a", {"b": 1}, None)]
