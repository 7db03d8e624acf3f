"""Ray workers: the same learner as one worker's, and what happens when they are killed, raise, hang or come late."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ray
from commands import refused

import zhixing as zx
from zhixing.algorithms.a2c import A2C
from zhixing.algorithms.dppo import DPPO
from zhixing.assembly import build_environment, build_loop, build_worker
from zhixing.config import from_mapping
from zhixing.drivers.compiled import CompiledDriver
from zhixing.drivers.distributed import ApplyingAsTheyCome, Averaging, Learning
from zhixing.drivers.loop import empty_window
from zhixing.errors import UsageError

SETTINGS = {
    "environment": {"id": "CartPole-v1"},
    "num_environments": 8,
    "total_steps": 4_096,
    "seeds": 2,
    "workers": {"kind": "ray", "count": 2},
}


class Store:
    put = staticmethod(lambda x: x)


class LocalCrew:
    """A crew without Ray: the same calls, made at once; `slow` workers answer only when nobody else is left."""

    ray = Store

    def __init__(self, config, slow=()):
        self.actors = [build_worker(config, None, config.all_seeds, w, 0) for w in range(config.workers.count)]
        self.slow, self.failures, self.asked, self.rollouts = set(slow), 0, [], []

    def idle(self):
        return [w for w in range(len(self.actors)) if w not in {worker for worker, *_ in self.asked}]

    def ask(self, worker, method, *arguments):
        self.asked.append((worker, method, arguments))

    def next_answer(self):
        quick = [i for i, (worker, *_) in enumerate(self.asked) if worker not in self.slow]
        worker, method, arguments = self.asked.pop(quick[0] if quick else 0)
        return worker, getattr(self.actors[worker], method)(*arguments)

    def all(self, workers, method, arguments, need):
        for worker in workers:
            self.ask(worker, method, *arguments)
        answers = {}
        while len(answers) < min(need, len(workers)):
            worker, answer = self.next_answer()
            answers[worker] = answer
        return answers

    def close(self):
        pass


def configured(algorithm, **settings):
    return from_mapping({**SETTINGS, **settings, "algorithm": {"name": "custom"}}, algorithm)


def loop_of(config):
    return build_loop(config, build_environment(config))


def parameters(run):
    return np.asarray(run.learner.actor_critic.parameters)


def spy_on_rollouts(crew):
    """Keep every rollout that a worker of `crew` collects."""
    for worker, actor in enumerate(crew.actors):

        def collector(*arguments, collect=actor.collector, worker=worker):
            run, rollout = collect(*arguments)
            crew.rollouts.append((worker, rollout))
            return run, rollout

        actor.collector = collector


@pytest.mark.parametrize("settings", [{}, {"kl_penalty": 0.5, "stop_kl": 0.01}], ids=["clip", "penalty"])
def test_workers_in_step_are_one(settings):
    """W workers and the mean of their gradients: PPO's update of all their data as one batch, up to float order."""
    algorithm = DPPO(rollout_length=16, hidden=(16,), epochs=5, minibatches=1, learning_rate=3e-3, **settings)
    config = configured(algorithm)
    crew, loop = LocalCrew(config), loop_of(config)
    spy_on_rollouts(crew)
    driver = Averaging(loop, crew, late=0)
    run = driver.start(algorithm)
    alone = loop_of(configured(algorithm, workers={}))
    start = run._replace(window=empty_window(2, len(alone.metric_names(algorithm))))
    for _ in range(3):
        before, crew.rollouts = run.learner, []
        run = driver.advance(algorithm, run, 1, 16)
        both = [rollout for _, rollout in sorted(crew.rollouts, key=lambda x: x[0])]
        whole = jax.tree.map(lambda *x: jnp.concatenate(x, 2), *both)
        key = loop.keys()[3]
        expected = alone.learn(algorithm, start._replace(learner=before), whole, key).learner
        np.testing.assert_allclose(parameters(run), expected.actor_critic.parameters, rtol=2e-4, atol=2e-6)
        np.testing.assert_allclose(run.learner.kl_coefficient, expected.kl_coefficient)
        assert int(run.learner.clock.steps) == int(expected.clock.steps)
        assert int(run.learner.clock.updates) == int(expected.clock.updates)
    assert np.abs(parameters(run) - parameters(driver.start(algorithm))).max() > 0.01


def test_one_worker_is_a_single_process():
    """With its random numbers too: the same trajectory."""
    algorithm = A2C(rollout_length=8, hidden=(16,))
    config = configured(algorithm, workers={"kind": "ray", "count": 1})
    run = Averaging(loop_of(config), LocalCrew(config), late=0)
    ray = run.advance(algorithm, run.start(algorithm), 20, 8)
    alone = configured(algorithm, workers={})
    driver = CompiledDriver(loop_of(alone), build_environment(alone).batch([0, 1], 8), True)
    expected = driver.advance(algorithm, driver.start(algorithm), 20, 8)
    np.testing.assert_allclose(parameters(ray), parameters(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ray.window.episodes, expected.window.episodes)
    np.testing.assert_array_equal(ray.window.returns, expected.window.returns)


def test_statistics_are_those_of_all_workers():
    algorithm = DPPO(rollout_length=8, hidden=(4,), epochs=1, minibatches=1)
    config = configured(
        algorithm, environment={"id": "Pendulum-v1", "normalize_observation": True, "scale_reward": True}
    )
    crew = LocalCrew(config)
    driver = Averaging(loop_of(config), crew, late=0)
    run = driver.advance(algorithm, driver.start(algorithm), 2, 8)
    counts = [
        int(x.count[0])
        for x in jax.tree.leaves(run.transforms, is_leaf=lambda x: hasattr(x, "variance"))
        if hasattr(x, "variance")
    ]
    assert counts == [2 * 8 * 8, 2 * 8 * 8]


def test_late_worker_is_not_waited_for():
    algorithm = DPPO(rollout_length=8, hidden=(4,), epochs=2, minibatches=1)
    config = configured(
        algorithm, num_environments=9, total_steps=9 * 8 * 4, workers={"kind": "ray", "count": 3, "late": 1}
    )
    crew = LocalCrew(config, slow=[1])
    spy_on_rollouts(crew)
    driver = Averaging(loop_of(config), crew, late=1)
    run = driver.advance(algorithm, driver.start(algorithm), 4, 8)
    assert {worker for worker, _ in crew.rollouts} == {0, 2}
    took_part = driver.loop.metric_names(algorithm).index("took_part")
    np.testing.assert_allclose(run.window.metrics[:, took_part] / 4, 2 / 3, rtol=1e-6)


def test_gradients_as_they_come():
    """Two workers in turn: each gradient is one step old, but for the first."""
    algorithm = A2C(rollout_length=8, hidden=(16,))
    config = configured(algorithm, workers={"kind": "ray_asynchronous", "count": 2})
    driver = ApplyingAsTheyCome(loop_of(config), LocalCrew(config))
    run = driver.advance(algorithm, driver.start(algorithm), 5, 8)
    assert driver.report()["staleness"] == {"0": 1, "1": 9}
    assert int(run.learner.clock.updates) == 10 and int(run.learner.clock.steps) == 5 * 8 * 8


@pytest.mark.parametrize("name", ["dqn", "trpo"])
def test_other_algorithms_learn_from_all_rollouts(name):
    mapping = {"algorithm": {"name": name, "rollout_length": 8, "hidden": [8]}}
    if name == "dqn":
        mapping["algorithm"] |= {"learning_starts": 64}
    config = from_mapping({**SETTINGS, **mapping})
    driver = Learning(loop_of(config), LocalCrew(config))
    run = driver.advance(config.algorithm, driver.start(config.algorithm), 4, 8)
    assert int(run.learner.clock.steps) == 4 * 8 * 8
    assert int(run.learner.clock.updates) > 0
    if name == "dqn":
        assert int(run.memory.cursor.size) == 4 * 8 * 8


# ------------------------------------------------------------------------------------------------- with Ray, and faults


class Faulty(gymnasium.Env):
    """A walk to the right; where `notes` says so, worker 1's instances raise, hang or are killed, once or always."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, notes, fault="none", at=40, always=False, slow=0.0):
        self.notes, self.fault, self.at, self.always, self.delay = Path(notes), fault, at, always, 0.0
        self.steps = self.time = 0
        in_worker = os.getpid() != int((self.notes / "chief").read_text())
        if slow and in_worker and not (self.notes / "slow").exists():  # the first of the workers' that is made
            (self.notes / "slow").touch()
            self.delay = slow

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps, self.time = self.steps + 1, self.time + 1
        mark = self.notes / "done"
        in_worker = os.getpid() != int((self.notes / "chief").read_text())
        if in_worker and self.fault != "none" and self.steps == self.at and (self.always or not mark.exists()):
            mark.touch()
            if self.fault == "raise":
                raise ValueError("the motor is on fire")
            if self.fault == "hang":
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.delay)
        return self.observation_space.sample(), float(action), False, self.time >= 20, {}


def train(directory, fault="none", workers=None, algorithm="dppo", **options):
    (directory / "notes").mkdir(exist_ok=True)
    (directory / "notes" / "chief").write_text(str(os.getpid()))
    settings = {"rollout_length": 16, "hidden": [8]}
    settings |= {"epochs": 2, "minibatches": 2} if algorithm == "dppo" else {}
    return zx.train(
        algorithm,
        Faulty,
        total_steps=16 * 2 * 8,
        num_environments=2,
        run_dir=directory / "run",
        quiet=True,
        workers={"kind": "ray", "count": 2, "timeout": 60.0} | (workers or {}),
        algorithm=settings,
        environment={"options": {"notes": str(directory / "notes"), "fault": fault, **options}},
        evaluation={"episodes": 1, "final_episodes": 1, "every": 10_000},
    )


@pytest.fixture(scope="module", autouse=True)
def ray_ends():
    yield
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()


def log_of(directory):
    return (directory / "run" / "workers.log").read_text()


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("kill", "ray", "its process has ended"),
        ("kill", "ray_asynchronous", "its process has ended"),
        ("raise", "ray", "ValueError: the motor is on fire"),
        ("hang", "ray", "no answer in 15 seconds"),
    ],
)
def test_failed_worker_is_replaced(tmp_path, fault, kind, said):
    """And the run goes on to its last step."""
    run = train(tmp_path, fault, {"kind": kind, "timeout": 15.0 if fault == "hang" else 60.0})
    assert run.step == run.summary["environment_steps"] == 256
    assert run.summary["workers_replaced"] == 1
    (line,) = [line for line in log_of(tmp_path).splitlines() if line.startswith("20")]
    assert re.match(r"20..-..-.. ..:..:.. worker [01]: ", line)
    assert said in log_of(tmp_path) and "\x1b" not in log_of(tmp_path)
    if fault == "raise":  # with its traceback
        assert 'raise ValueError("the motor is on fire")' in log_of(tmp_path)


def test_replay_goes_on_when_a_worker_is_killed(tmp_path):
    """Remote actors that feed one replay: with a cut where the episodes of the old worker were."""
    run = train(tmp_path, "kill", algorithm="dqn")
    assert run.step == 256 and run.summary["workers_replaced"] == 1


def test_too_many_failures_end_the_run(tmp_path):
    with pytest.raises(UsageError, match=r"failed, after 1 replacements: .*motor is on fire.*workers\.log"):
        train(tmp_path, "raise", {"restarts": 1}, always=True, at=5)
    assert log_of(tmp_path).count("the motor is on fire") >= 2


def test_slow_worker_does_not_hold_the_others_up(tmp_path):
    """D = 1 of 2: a worker with slow environments is waited for without it, and not with it."""
    slow = train(tmp_path, workers={"late": 1}, slow=0.2)
    assert slow.step == 256
    took_part = slow.metrics["train/took_part"]
    assert np.nanmean(took_part) < 0.9


def test_killed_chief_resumes(tmp_path):
    settings = ["--algorithm.epochs", "2", "--num-environments", "4", "--workers.count", "2", "--quiet"]
    settings += ["--evaluation.every", "2000", "--evaluation.final-episodes", "2", "--evaluation.episodes", "2"]
    command = [sys.executable, "-m", "zhixing", "train", "dppo", "CartPole-v1", "--total-steps", "40000", *settings]
    with subprocess.Popen([*command, "--run-dir", tmp_path / "run"]) as chief:
        deadline = time.monotonic() + 240
        while len(list((tmp_path / "run" / "checkpoints").glob("*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        chief.kill()
    at = max(zx.load(tmp_path / "run").step, 1)
    assert 0 < at < 40_000
    run = zx.resume(tmp_path / "run", total_steps=at // 500 * 500 + 4_000, quiet=True)
    assert run.step == at // 500 * 500 + 4_000


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_cluster_that_does_not_answer(address, tmp_path):
    ray.shutdown()  # what an earlier test has begun would be joined
    words = ["train", "ppo", "CartPole-v1", "--workers.kind", "ray", "--ray-address", address]
    error = refused(*words, "--run-dir", tmp_path / "run")
    assert error == f"no Ray cluster answers at {address}; start one with: ray start --head"


def test_seeds_spread_over_ray_leave_one_run(tmp_path):
    """As if they had been trained here: the same table, the same networks, a run that goes on."""
    few = ["--total-steps", "2048", "--num-environments", "4", "--algorithm.rollout-length", "64", "--quiet"]
    few += ["--algorithm.minibatches", "4", "--evaluation.episodes", "2", "--evaluation.final-episodes", "4"]
    command = [sys.executable, "-m", "zhixing", "train", "ppo", "CartPole-v1", "--seeds", "3", *few]
    local = [*command, "--run-dir", tmp_path / "here"]
    spread = [*command, "--ray-address", "local", "--workers.count", "2", "--run-dir", tmp_path / "spread"]
    for words in (local, spread):
        subprocess.run(words, check=True)
    here, there = (zx.load(tmp_path / name) for name in ("here", "spread"))
    assert here.loop.seeds == there.loop.seeds == (0, 1, 2)
    assert there.step == 2048 and there.config.workers.kind == "none"
    of_both = (np.asarray(run._learner.actor_critic.parameters) for run in (here, there))
    np.testing.assert_allclose(*of_both, atol=1e-3)
    for name in ("step", "seed", "evaluation/length"):
        np.testing.assert_allclose(here.metrics[name], there.metrics[name], rtol=0.2)
    assert len(there.summary["evaluation"]["per_seed"]) == 3
    assert sorted(path.name for path in (tmp_path / "spread" / "parts").iterdir()) == ["0-1", "2-2"]
    assert zx.resume(tmp_path / "spread", total_steps=4096, quiet=True).step == 4096
