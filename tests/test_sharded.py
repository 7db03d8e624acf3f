"""Several devices: what they compute is what one device computes, up to the order of sums."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refused

from zhixing import collective, records
from zhixing import config as configs
from zhixing.algorithms.a2c import A2C
from zhixing.algorithms.ppo import PPO
from zhixing.assembly import build_environment, build_loop
from zhixing.config import from_mapping
from zhixing.drivers.compiled import CompiledDriver
from zhixing.drivers.sharded import ShardedDriver
from zhixing.environments.transforms import Statistics, union
from zhixing.errors import UsageError
from zhixing.gradients import Moments
from zhixing.training import train_config

SHARDS, N, T = 8, 16, 32


def configured(algorithm, **settings):
    mapping = {"environment": {"id": "CartPole-v1"}, "num_environments": N, "total_steps": 10 * T * N, "seeds": 2}
    return from_mapping({**mapping, **settings, "algorithm": {"name": "custom"}}, algorithm)


def trained(algorithm, devices, iterations=10, shards=SHARDS, **settings):
    config = configured(algorithm, **settings)
    environment = build_environment(config)
    loop = build_loop(config, environment)
    batches = environment.batch([0, 1], N), environment.batch([0, 1], N // shards)
    driver = ShardedDriver(loop, *batches, shards, devices)
    assert driver.mesh.devices.size == len(devices)
    return driver.advance(algorithm, driver.start(algorithm), iterations, T)


def on_eight_devices():
    """Run in a process that has eight (virtual) devices: each check fails with an AssertionError."""
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles for longer than it runs
    eight, one = jax.devices(), jax.devices()[:1]
    assert len(eight) == SHARDS
    algorithm = PPO(rollout_length=T, hidden=(16,), epochs=4, minibatches=4, stop_kl=0.05)
    many, alone = (trained(algorithm, devices) for devices in (eight, one))
    assert len(many.observation.sharding.device_set) == SHARDS
    parameters = [np.asarray(run.learner.actor_critic.parameters) for run in (many, alone)]
    np.testing.assert_allclose(*parameters, rtol=0, atol=1e-5)
    start = trained(algorithm, one, iterations=0).learner.actor_critic.parameters
    assert np.abs(parameters[0] - start).max() > 0.03
    for name in ("episodes", "returns", "lengths"):
        np.testing.assert_array_equal(getattr(many.window, name), getattr(alone.window, name))
    np.testing.assert_allclose(many.window.metrics, alone.window.metrics, rtol=1e-3, atol=1e-4)
    assert int(many.learner.clock.steps) == 10 * T * N and int(many.learner.clock.updates) == 160

    normalized = {"environment": {"id": "Pendulum-v1", "normalize_observation": True, "scale_reward": True}}
    algorithm = A2C(rollout_length=T, hidden=(16,), normalize_advantage=True)
    many, alone = (trained(algorithm, devices, 2, **normalized) for devices in (eight, one))
    parameters = [np.asarray(run.learner.actor_critic.parameters) for run in (many, alone)]
    np.testing.assert_allclose(*parameters, rtol=0, atol=1e-3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), many.transforms, alone.transforms)


def test_eight_devices_are_one():
    """10 iterations of PPO on CartPole: parameters within 1e-5."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={SHARDS}"
    code = "import test_sharded; test_sharded.on_eight_devices()"
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | {"XLA_FLAGS": flags}, check=False)
    assert done.returncode == 0


def on_hosts(folder, *words):
    """Give the command in two processes that are hosts with two devices each; the exit codes and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    hosts = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "zhixing", *map(str, words)],
            env=os.environ | flags | hosts | {"JAX_PROCESS_ID": str(index)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    return [process.returncode for process in processes], said


def test_two_hosts_are_one(tmp_path):
    """A run begun and resumed on two hosts is that of one process: only the first keeps a folder."""
    words = "ppo CartPole-v1 --workers.kind devices --workers.count 4 --num-environments 8 --seeds 2"
    words += " --algorithm.rollout-length 16 --algorithm.minibatches 2 --algorithm.epochs 2 --total-steps 256"
    words += " --algorithm.learning-rate-schedule constant --algorithm.clip-schedule constant"
    words += " --evaluation.episodes 2 --evaluation.final-episodes 2 --record.tensorboard False --run-dir run"
    codes, said = on_hosts(tmp_path, "train", *words.split())
    assert codes == [0, 0], said
    assert "evaluation over 2" in said[0][0] and "evaluation" not in said[1][0]
    codes, said = on_hosts(tmp_path, "resume", "run", "--total-steps", 512)
    assert codes == [0, 0] and os.listdir(tmp_path) == ["run"], said

    alone = train_config(from_mapping(configs.load_run(tmp_path / "run")), run_dir=tmp_path / "alone", quiet=True)[0]
    tables = [records.read_metrics(folder) for folder in (tmp_path / "run", alone)]
    for name in ("train/value", "train/loss", "episode/return", "evaluation/return"):
        ends = [table[name][table["step"] == 512] for table in tables]
        np.testing.assert_allclose(*ends, rtol=1e-3, atol=1e-4, err_msg=name)


def test_hosts_that_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    error = refused("train", "ppo", "CartPole-v1", "--run-dir", tmp_path / "run")
    assert error.startswith("a run on several hosts needs JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID")


def test_one_shard_is_no_shards():
    algorithm = A2C(rollout_length=T, hidden=(16,), normalize_advantage=True)
    sharded = trained(algorithm, jax.devices()[:1], shards=1)
    config = configured(algorithm)
    environment = build_environment(config)
    driver = CompiledDriver(build_loop(config, environment), environment.batch([0, 1], N), True)
    expected = driver.advance(algorithm, driver.start(algorithm), 10, T)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), sharded, expected)


@pytest.mark.parametrize("parts", [1, 4])
def test_moments_of_parts_are_those_of_the_whole(parts):
    advantage = 3 + 2 * jax.random.normal(jax.random.PRNGKey(0), (64,))
    algorithm = PPO()
    split = advantage.reshape(parts, -1)
    moments = algorithm.pooled(Moments(split.mean(1), split.var(1)), lambda x: x.mean(0))
    np.testing.assert_allclose(moments.mean, np.mean(advantage), rtol=1e-6)
    np.testing.assert_allclose(moments.variance, np.var(advantage), rtol=1e-5)


def test_statistics_of_shards_are_those_of_all():
    data = 5 + jax.random.normal(jax.random.PRNGKey(0), (6, 8, 3)) * jnp.array([0.1, 1.0, 10.0])
    alone, apart = Statistics.start((3,)), Statistics.start((3,))
    for batch in data:
        alone = alone.merge(batch)

        def one(part, statistics=apart):
            with collective.over("shards", 4):
                return statistics.merge(part)

        apart = jax.tree.map(lambda x: x[0], jax.vmap(one, axis_name="shards")(batch.reshape(4, 2, 3)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), alone, apart)


@pytest.mark.parametrize("before", [0, 1_000])
def test_union_of_statistics(before):
    """What workers have taken in apart from each other, beginning with the same; one of them has seen nothing."""
    data = 5 + np.random.default_rng(0).normal(size=(before + 300, 3)) * np.array([0.1, 1.0, 10.0])
    start = Statistics.start((3,))
    old = start.merge(jnp.float32(data[:before])) if before else start
    parts = [old.merge(jnp.float32(data[before : before + 100])), old, old.merge(jnp.float32(data[before + 100 :]))]
    merged = union(old, parts)
    np.testing.assert_allclose(merged.mean, data.mean(0), rtol=1e-4)
    np.testing.assert_allclose(merged.variance, data.var(0), rtol=1e-3)
    np.testing.assert_allclose(merged.count, len(data), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": {"name": "dqn"}}, "DQN does not learn by gradients that could come from elsewhere"),
        ({"environment": {"id": "CartPole-v1", "backend": "gymnasium"}}, "is not written in JAX and cannot be split"),
        ({"algorithm": {"name": "a2c", "optimiser": "kfac"}}, "kfac looks at all samples in one place"),
        ({"num_environments": 12}, "num_environments 12 is no multiple of the 8 workers; use 16"),
    ],
)
def test_what_cannot_be_split(settings, message):
    mapping = {"algorithm": {"name": "ppo"}, "num_environments": N, "workers": {"kind": "devices", "count": SHARDS}}
    config = from_mapping({**mapping, "total_steps": 96_000, **settings})
    with pytest.raises(UsageError, match=message):
        build_loop(config, build_environment(config))
