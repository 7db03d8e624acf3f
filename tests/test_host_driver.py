"""The host driver learns what the compiled one learns, from environments that are stepped from Python."""

from dataclasses import replace

import numpy as np
import pytest
from commands import kept_programs  # noqa: F401

import zhixing as zx
from zhixing.assembly import build_environment, build_loop
from zhixing.config import from_mapping
from zhixing.drivers.host import HostDriver
from zhixing.drivers.loop import Loop

pytestmark = pytest.mark.usefixtures("kept_programs")

STEPS = 12_800  # some seeds are still near 100 after half of them
ALGORITHM = zx.PPO(
    hidden=(32,), rollout_length=32, epochs=8, minibatches=4, learning_rate=3e-3, discount=0.98, gae_lambda=0.9
)


@pytest.fixture(scope="module")
def runs(kept_programs, tmp_path_factory):  # noqa: F811
    """By backend, a run of the same algorithm with the same settings."""
    few = {"evaluation": {"every": STEPS, "episodes": 4, "final_episodes": 10}, "record": {"tensorboard": False}}
    sizes = {"total_steps": STEPS, "num_environments": 8, "seeds": 2, "quiet": True}
    folder = tmp_path_factory.mktemp("runs")
    return {
        backend: zx.train(
            ALGORITHM, "CartPole-v1", run_dir=folder / backend, environment={"backend": backend}, **sizes, **few
        )
        for backend in ("jax", "gymnasium")
    }


def test_same_steps_and_updates(runs):
    compiled, host = runs["jax"], runs["gymnasium"]
    assert (compiled.environment.compiled, host.environment.compiled) == (True, False)
    for name in ("environment_steps", "updates", "seeds", "algorithm", "environment"):
        assert compiled.summary[name] == host.summary[name]
    assert host.summary["environment_steps"] == STEPS
    assert host.summary["updates"] == STEPS // (8 * 32) * 8 * 4


@pytest.mark.parametrize("backend", ["jax", "gymnasium"])
def test_it_learns(runs, backend):
    """Several times what random actions get, with every seed."""
    before = runs[backend].metrics["evaluation/return"][:2]
    after = runs[backend].summary["evaluation"]["per_seed"]
    assert before.max() < 60
    assert min(after) > 100


def test_same_records(runs):
    """The same columns at the same steps; both count every episode of training."""
    compiled, host = (runs[backend].metrics for backend in ("jax", "gymnasium"))
    assert list(compiled) == list(host)
    np.testing.assert_array_equal(compiled["step"], host["step"])
    for metrics in (compiled, host):
        steps = np.nansum(metrics["episode/length"] * metrics["episode/count"])
        assert 0.8 * 2 * STEPS < steps <= 2 * STEPS
        np.testing.assert_array_equal(metrics["episode/return"], metrics["episode/length"])  # CartPole gives 1 a step


def test_evaluation_is_the_same_game(runs):
    """A policy that was trained on one backend plays as well on the other."""
    host = runs["gymnasium"]
    folder = host.directory
    on_jax = zx.load(folder, environment=zx.make("CartPole-v1", "jax")).evaluate(20)["per_seed"]
    on_gymnasium = host.evaluate(20)["per_seed"]
    np.testing.assert_allclose(on_jax, on_gymnasium, rtol=0.35)


def test_algorithm_is_traced_once(monkeypatch):
    """Not for every rollout: that takes longer than the environments' steps."""
    traced = []
    example = Loop.example
    monkeypatch.setattr(Loop, "example", lambda loop, algorithm: traced.append(1) or example(loop, algorithm))
    config = from_mapping({"algorithm": {"name": "a2c", "rollout_length": 1, "hidden": [4]}, "num_environments": 2})
    environment = build_environment(replace(config, environment=replace(config.environment, backend="gymnasium")))
    driver = HostDriver(build_loop(config, environment), environment.batch([0], 2))
    run = driver.advance(config.algorithm, driver.start(config.algorithm), 1, 1)
    traced.clear()
    driver.advance(config.algorithm, run, 20, 1)
    driver.close()
    assert not traced
