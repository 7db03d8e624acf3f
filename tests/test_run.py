"""A run: its folder, its policy and values, and what it is trained with and on."""

import pickle
from dataclasses import fields
from operator import itemgetter
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import yaml
from commands import (
    assert_same_run,
    final_state,
    kept_programs,  # noqa: F401
    refused,
    settings,
    succeed,
    table,
    write_settings,
)
from gymnasium import spaces

import zhixing as zx
from zhixing import config
from zhixing.core import Transition, hyperparameters
from zhixing.errors import Diverged

pytestmark = pytest.mark.usefixtures("kept_programs")

SEEDS = [3, 4]
OBSERVATION = np.array([0.01, -0.02, 0.03, 0.04], np.float32)
FEW = {"evaluation": {"episodes": 2, "final_episodes": 4, "max_steps": 30}, "record": {"tensorboard": False}}


@pytest.fixture(scope="module")
def folder(kept_programs, tmp_path_factory):  # noqa: F811
    """A run whose last rollout is shorter: 600 steps are no multiple of 4 environments x 16 steps."""
    base = tmp_path_factory.mktemp("run")
    mapping = settings("ppo", total_steps=600, seed=3, record={"tensorboard": True})
    succeed("train", write_settings(base / "settings.yaml", mapping), "--run-dir", base / "run", "--quiet")
    return base / "run"


@pytest.fixture(scope="module")
def run(folder):
    return zx.load(folder)


# ------------------------------------------------------------------------------------------------------- the folder


def test_folder_holds_the_whole_run(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "metrics.csv", "summary.json", "checkpoints", "tensorboard"}
    events = {path.parent.name for path in folder.rglob("events.out.tfevents*")}
    assert {"seed_3", "seed_4", "iqm"} <= events
    assert (folder / "checkpoints" / "best.safetensors").exists()
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2  # as record.keep_checkpoints says


def test_config_is_complete_and_rerunnable(folder, tmp_path):
    mapping = yaml.safe_load((folder / "config.yaml").read_text())
    complete = config.to_mapping(config.from_mapping(mapping))
    assert mapping == complete
    assert set(mapping["algorithm"]) == {"name", *(f.name for f in fields(zx.PPO))}
    assert mapping["environment"]["backend"] == "jax"  # what "auto" took
    succeed("train", folder / "config.yaml", "--run-dir", tmp_path / "again", "--quiet")
    assert_same_run(tmp_path / "again", folder)
    summaries = [zx.load(path).summary["evaluation"] for path in (folder, tmp_path / "again")]
    assert summaries[0] == summaries[1]


def test_metrics_are_read_by_pandas(folder, run):
    frame = pandas.read_csv(folder / "metrics.csv")
    pandas.testing.assert_frame_equal(frame, pandas.DataFrame(run.metrics))
    assert list(frame["seed"].unique()) == SEEDS
    assert frame["step"].iloc[0] == 0 and frame["step"].iloc[-1] == 600
    at_evaluations = frame.dropna(subset="evaluation/return")["step"].unique()
    np.testing.assert_array_equal(at_evaluations, [0, 320, 600])


def test_steps_are_exact_where_rollouts_do_not_divide_them(folder, run):
    assert run.step == run.summary["environment_steps"] == 600
    arrays, _ = final_state(folder)
    assert arrays[".learner.clock.steps"] == arrays[".learner.clock.total_steps"] == 600
    updates = zx.PPO(**{f.name: getattr(run.algorithm, f.name) for f in fields(zx.PPO)}).updates_per_iteration
    assert run.summary["updates"] == arrays[".learner.clock.updates"] == 10 * updates  # 9 of 64 steps, 1 of 24


def test_summary_says_what_was_run(run):
    assert set(run.summary) == {
        "algorithm", "environment", "backend", "seeds", "environment_steps", "updates", "seconds", "compile_seconds",
        "steps_per_second", "evaluation", "versions", "python", "device",
    }  # fmt: skip
    assert (run.summary["algorithm"], run.summary["environment"], run.summary["backend"]) == (
        "ppo",
        "CartPole-v1",
        "jax",
    )
    assert run.summary["seeds"] == SEEDS and run.summary["seconds"] > 0
    assert set(run.summary["versions"]) == {"zhixing", "jax", "gymnasium"}
    assert run.summary["evaluation"]["episodes"] == 4  # 2 of each seed


# --------------------------------------------------------------------------------------------------- what it can do


def test_policy_gives_gymnasium_actions(run):
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=0)
    for seed in (None, *SEEDS):
        action = run.policy(observation, seed=seed)
        assert environment.action_space.contains(action)
    for index, seed in enumerate(SEEDS):
        learner = jax.tree.map(itemgetter(index), run._learner.actor_critic)
        expected = learner.net.policy(jnp.asarray(OBSERVATION)).mode
        assert run.policy(OBSERVATION, seed=seed) == int(expected)
        assert run.value(OBSERVATION, seed=seed) == pytest.approx(float(learner.net.value(jnp.asarray(OBSERVATION))))


def test_observation_may_be_a_list(run):
    as_list = np.asarray(OBSERVATION).tolist()
    assert run.policy(as_list) == run.policy(OBSERVATION) == run.player()(as_list)
    assert run.value(as_list) == run.value(OBSERVATION)


def test_best_seed_is_the_default(run):
    per_seed = run.summary["evaluation"]["per_seed"]
    assert run.best_seed == SEEDS[int(np.argmax(per_seed))]
    assert run.value(OBSERVATION) == run.value(OBSERVATION, seed=run.best_seed)
    other = next(seed for seed in SEEDS if seed != run.best_seed)
    assert run.value(OBSERVATION) != run.value(OBSERVATION, seed=other)


def test_seed_that_was_not_trained_is_refused(run):
    with pytest.raises(zx.UsageError, match=r"^the run has no seed 0; it has \[3, 4\]$"):
        run.policy(OBSERVATION, seed=0)


def test_observation_of_another_shape_is_refused(run):
    for ask in (run.policy, run.value):
        with pytest.raises(
            zx.UsageError, match=r"^the observation has the shape \(1, 4\), not \(4,\); give one, as it is$"
        ):
            ask(OBSERVATION[None])


def test_save_and_load_round_trip(run, tmp_path):
    saved = run.save(tmp_path / "deep" / "policy.safetensors")
    loaded = zx.load(saved)
    assert loaded.config == run.config and loaded.step == run.step
    for seed in SEEDS:
        assert loaded.policy(OBSERVATION, seed=seed) == run.policy(OBSERVATION, seed=seed)
        assert loaded.value(OBSERVATION, seed=seed) == run.value(OBSERVATION, seed=seed)
    assert loaded.evaluate(4) == run.evaluate(4)
    with pytest.raises(zx.UsageError, match="is a single file, without the run's records; load the run's folder"):
        _ = loaded.metrics
    with pytest.raises(zx.UsageError, match=r"cannot write .*: (Not a directory|File exists)"):
        run.save(saved / "below.safetensors")


def test_plot_draws_into_the_folder(run, folder):
    path = run.plot()
    assert path == folder / "curve.png" and path.read_bytes().startswith(b"\x89PNG")
    path.unlink()


def test_checkpoint_that_is_a_pickle_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "policy.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    assert "is damaged or no checkpoint" in refused("evaluate", path)
    assert not (tmp_path / "sprung").exists()


# -------------------------------------------------------------------------------------------- a user's own parts


class Corridor(gymnasium.Env):
    """Discrete: walk to the right end; without a time limit of its own."""

    observation_space = spaces.Box(0, 4, (1,), np.float64)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place = 0
        return np.array([0.0]), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert isinstance(action, int | np.integer)
        self.place = max(0, self.place + (1 if action == 1 else -1))
        return np.array([float(self.place)]), -1.0, self.place == 4, False, {}


class Ladder(gymnasium.Env):
    """For tables, with an option: it never ends by itself."""

    action_space = spaces.Discrete(2)

    def __init__(self, height: int = 3):
        self.observation_space = spaces.Discrete(height)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        return int(action), -1.0, False, False, {}


class Aim(gymnasium.Env):
    """Continuous: one step, the nearer to 3 the better."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(2, 4, (1,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.low <= action <= self.action_space.high
        return np.zeros(2, np.float32), -float((action[0] - 3.0) ** 2), True, False, {}


class Counter(zx.JaxEnvironment):
    """In JAX: any action counts, three times; without a limit."""

    def observation_space(self, params: Any) -> spaces.Space:
        return spaces.Box(0, 3, (1,), np.float32)

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Discrete(2)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        return jnp.zeros(1), jnp.float32(0)

    def step_env(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
        state = state + 1
        return state[None], state, action * 1.0, state >= 3, {}


SMALL = {"hidden": (8,), "rollout_length": 8, "minibatches": 2, "epochs": 1}


def train_small(algorithm: Any, environment: Any, folder: Any, /, **more: Any) -> zx.TrainedRun:
    sizes = {"total_steps": 64, "num_environments": 4, "seeds": 2}
    return zx.train(algorithm, environment, run_dir=folder, quiet=True, **(sizes | FEW | more))


def test_own_gymnasium_class_with_discrete_actions(tmp_path):
    run = train_small(zx.PPO(**SMALL), Corridor, tmp_path / "run")
    assert run.step == 64 and run.environment.backend == "gymnasium"
    assert run.policy(np.array([2.0])) in (0, 1)
    assert run.summary["evaluation"]["min"] >= -30  # cut by evaluation.max_steps, as it has no limit of its own
    assert run.evaluate(2)["episodes"] == 4


def test_own_gymnasium_class_with_continuous_actions(tmp_path):
    run = train_small(zx.PPO(**SMALL), Aim, tmp_path / "run")
    action = run.policy(np.zeros(2))
    assert action.shape == (1,) and 2 <= action[0] <= 4
    assert -1 <= run.summary["evaluation"]["min"] <= 0


def test_own_jax_environment(tmp_path):
    run = train_small(zx.PPO(**SMALL), Counter(), tmp_path / "run")
    assert run.environment.compiled and run.environment.id == "Counter"
    np.testing.assert_array_equal(table(tmp_path / "run")["evaluation/length"][:2], 3)


def test_own_environment_is_given_again(tmp_path):
    folder = tmp_path / "run"
    train_small(zx.DQN(hidden=(8,), learning_starts=8, batch_size=4, replay_capacity=64), Corridor, folder)
    line = "the run's environment is your own; give it again, from Python: environment=Corridor"
    assert refused("resume", folder) == refused("evaluate", folder) == line
    again = zx.resume(folder, environment=Corridor, total_steps=96, quiet=True)
    assert again.step == 96
    assert zx.load(folder, environment=Corridor).value(np.array([1.0])) == again.value(np.array([1.0]))


class Broken(Ladder):
    """Its 40th reward is not a number."""

    count = 0

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.count += 1
        return int(action), np.nan if self.count == 40 else -1.0, self.count % 10 == 0, False, {}


def test_reward_that_is_no_number_stops_the_run(tmp_path):
    few = {"record": {"every": 8, "checkpoint_seconds": 0.0, "tensorboard": False}, "evaluation": {"every": 64}}
    with pytest.raises(Diverged) as caught:
        zx.train(zx.QLearning(), Broken, total_steps=64, run_dir=tmp_path / "run", quiet=True, **few)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert str(caught.value) == (
        f"q became NaN or infinite at step 40 of seed 0; the last good checkpoint is {kept[-1]}; "
        "try a smaller learning rate"
    )
    last_good = zx.load(tmp_path / "run", environment=Broken)
    assert 0 < last_good.step < 40 and np.isfinite(last_good.value(0))


@hyperparameters
class Bold(zx.PPO):
    """A user's own: PPO for twice the reward."""

    boldness: float = 2.0

    def update(self, state: Any, rollout: Transition, key: jax.Array) -> tuple[Any, dict]:
        state, metrics = super().update(state, rollout._replace(reward=self.boldness * rollout.reward), key)
        return state, metrics | {"bold_reward": self.boldness * rollout.reward.mean()}


def test_own_algorithm(tmp_path):
    run = train_small(Bold(**SMALL), "CartPole-v1", tmp_path / "run")
    assert run.summary["algorithm"] == "custom"
    assert refused("resume", tmp_path / "run") == (
        "the run's algorithm is your own; give it again, from Python: algorithm=MyAlgorithm(...)"
    )
    again = zx.resume(tmp_path / "run", algorithm=Bold(**SMALL), total_steps=96, quiet=True)
    assert again.step == 96
    assert np.nanmax(again.metrics["train/bold_reward"]) == 2.0  # its own update was called: CartPole gives 1
    with pytest.raises(zx.UsageError, match=r"says algorithm.boldness 3.0, but .* was trained with 2.0"):
        zx.resume(tmp_path / "run", algorithm=Bold(**SMALL, boldness=3.0), total_steps=128, quiet=True)


def test_settings_of_an_object_are_checked():
    with pytest.raises(zx.UsageError, match=r"comes besides an object; give the settings to the object$"):
        zx.train(zx.PPO(), "CartPole-v1", algorithm={"epochs": 1})
    with pytest.raises(zx.UsageError, match=r"^algorithm\.epochs is 'many'; it must be a whole number$"):
        zx.train(zx.PPO(epochs="many"), "CartPole-v1")


def test_name_with_its_preset_and_settings_as_in_yaml(tmp_path):
    settings = {"algorithm": {"learning_rate": "2e-1"}, "environment": {"max_episode_steps": 5}}
    run = train_small("Q-learning", "zhixing/Maze-v0", tmp_path / "run", **settings)
    assert run.algorithm.discount == 0.9  # as the preset for the maze says
    assert run.config.total_steps == 64
    assert run.algorithm.learning_rate == 0.2
    assert np.nanmax(table(tmp_path / "run")["evaluation/length"]) <= 5


def test_settings_reach_an_own_environment(tmp_path):
    run = train_small(
        zx.QLearning(), Ladder, tmp_path / "run", environment={"max_episode_steps": 7, "options": {"height": 5}}
    )
    assert run.environment.observation_space.n == 5
    np.testing.assert_array_equal(table(tmp_path / "run")["evaluation/length"][:2], 7)
    again = zx.load(tmp_path / "run", environment=Ladder)
    assert again.environment.observation_space.n == 5 and again.evaluate(2)["mean"] == -7.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pppo", "CartPole-v1"), "unknown algorithm 'pppo'; did you mean 'ppo'?"),
        (("ppo", "CartPol-v1"), "unknown environment 'CartPol-v1'; did you mean 'CartPole-v1'?"),
        (("ppo", object()), "is no environment; give an id, a gymnasium.Env class or a JAX environment"),
    ],
)
def test_slips_in_python_are_usage_errors(arguments, message, tmp_path):
    with pytest.raises(zx.UsageError) as caught:
        zx.train(*arguments, run_dir=tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
