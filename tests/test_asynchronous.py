"""A3C: one worker is A2C, several are asynchronous, and the run they share is saved, resumed and recorded."""

import json
import threading

import gymnasium
import jax
import numpy as np
import pytest

import zhixing as zx
from zhixing.algorithms.a2c import A2C
from zhixing.assembly import build_driver, build_environment, build_loop
from zhixing.config import from_mapping

SETTINGS = {"environment": {"id": "CartPole-v1"}, "num_environments": 4, "total_steps": 4_000, "seeds": 2}


def advanced(algorithm, iterations=50, own=None, **settings):
    mapping = {**SETTINGS, **settings, "algorithm": {"name": "custom"}}
    config = from_mapping(mapping, algorithm)
    environment = build_environment(config, own)
    loop = build_loop(config, environment)
    driver = build_driver(config, environment, loop, config.all_seeds)
    run = driver.advance(algorithm, driver.start(algorithm), iterations, algorithm.rollout_length)
    driver.close()
    return driver, run


@pytest.mark.parametrize(
    "environment",
    [
        {"id": "CartPole-v1"},
        {"id": "Pendulum-v1", "normalize_observation": True, "scale_reward": True},
        {"id": "CartPole-v1", "backend": "gymnasium"},
    ],
    ids=["compiled", "transforms", "host"],
)
def test_one_worker_without_delay_is_a2c(environment):
    """To the bit: parameters, episodes, where the environments stand."""
    algorithm = A2C(rollout_length=5, hidden=(16,), learning_rate=1e-3)
    _, expected = advanced(algorithm, environment=environment)
    driver, run = advanced(algorithm, environment=environment, workers={"kind": "threads", "count": 1})
    jax.tree.map(np.testing.assert_array_equal, run.learner, expected.learner)
    jax.tree.map(np.testing.assert_array_equal, run.transforms, expected.transforms)
    np.testing.assert_array_equal(run.observation, expected.observation)
    np.testing.assert_array_equal(run.window.returns, expected.window.returns)
    np.testing.assert_array_equal(run.window.episodes, expected.window.episodes)
    assert driver.report() == {"staleness": {"0": 50}}


def test_workers_do_not_wait_for_each_other():
    """While one worker waits for its environment, the other applies many gradients: the late one is stale."""
    steps_of_others, enough = [], threading.Event()

    class Patient(gymnasium.Env):
        """The first that is stepped waits at its third step, for all the others to make 200."""

        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)
        waits = None

        def reset(self, *, seed=None, options=None):
            self.time = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            Patient.waits = Patient.waits or self
            self.time += 1
            if self is not Patient.waits:
                steps_of_others.append(1)
                if len(steps_of_others) == 200:
                    enough.set()
            elif self.time == 3:
                assert enough.wait(60)
            return np.zeros(2, np.float32), 1.0, False, self.time >= 50, {}

    algorithm = A2C(rollout_length=5, hidden=(4,))
    settings = {"seeds": 1, "num_environments": 2, "workers": {"kind": "threads", "count": 2}}
    driver, run = advanced(algorithm, own=Patient, **settings)
    staleness = {int(stale): count for stale, count in driver.report()["staleness"].items()}
    assert sum(staleness.values()) == 100 and max(staleness) >= 38  # 200 steps are 40 rollouts
    assert int(run.learner.clock.updates) == 100 and int(run.learner.clock.steps) == 100 * 5
    mean = sum(stale * count for stale, count in staleness.items()) / 100
    column = driver.loop.metric_names(algorithm).index("staleness")
    np.testing.assert_allclose(run.window.metrics[:, column] / 100, mean, rtol=1e-5)


def test_run_is_recorded_and_resumed(tmp_path):
    settings = {"num_environments": 4, "quiet": True, "evaluation": {"episodes": 2, "final_episodes": 2}}
    workers = {"kind": "threads", "count": 2}
    run = zx.train("a3c", "CartPole-v1", total_steps=4_000, run_dir=tmp_path / "run", workers=workers, **settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(summary["staleness"].values()) == summary["updates"] == 4_000 // (20 * 2)
    assert np.isfinite(run.metrics["train/staleness"]).any()
    run = zx.resume(tmp_path / "run", total_steps=8_000, quiet=True)
    assert run.step == 8_000 and run.summary["updates"] == 200
    assert sum(run.summary["staleness"].values()) == 200


def test_failure_in_a_thread_ends_the_run(tmp_path):
    class Fails(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.time = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.time += 1
            if self.time == 30:
                raise ValueError("the motor is on fire")
            return np.zeros(2, np.float32), 0.0, False, False, {}

    with pytest.raises(RuntimeError, match="step raised ValueError: the motor is on fire"):
        zx.train(
            "a3c", Fails, total_steps=4_000, run_dir=tmp_path / "run", quiet=True,
            evaluation={"episodes": 1, "max_steps": 5},
        )  # fmt: skip
