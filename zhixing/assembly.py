"""From a `Config` to the parts of a run: environment, transforms, loop, driver."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zhixing import environments
from zhixing.agents import Agents, StackAgents
from zhixing.config import Config
from zhixing.core import Spec
from zhixing.drivers.asynchronous import AsynchronousDriver
from zhixing.drivers.compiled import CompiledDriver
from zhixing.drivers.crew import Crew, start_ray
from zhixing.drivers.distributed import ApplyingAsTheyCome, Averaging, Learning, Worker, worker_actor
from zhixing.drivers.host import HostDriver
from zhixing.drivers.loop import Driver, Loop
from zhixing.drivers.sharded import ShardedDriver
from zhixing.drivers.workers import worker_loop
from zhixing.environments.base import Environment
from zhixing.environments.gymnasium_adapter import GymnasiumAdapter
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.environments.transforms import Chain, FrameStack, NormalizeObservation, RescaleAction, ScaleReward, Spaces
from zhixing.errors import UsageError
from zhixing.evaluate import Evaluator
from zhixing.gradients import GradientLearner
from zhixing.off_policy import OffPolicy

DRIVER_METRICS = {"threads": ("staleness",), "ray_asynchronous": ("staleness",), "ray": ("took_part",)}
COMPILED_INSTANCES, HOST_INSTANCES = 128, 10  # the most of each seed, in an evaluation


def build_environment(config: Config, own: Any = None) -> Environment:
    """The environment that `config` names, or a user's own class, function or object with the options of `config`."""
    settings = config.environment
    if isinstance(own, Environment):
        return own
    if own is None and settings.backend == "own":
        raise UsageError(f"the run's environment is your own; give it again, from Python: environment={settings.id}")
    thing, backend = (settings.id, settings.backend) if own is None or isinstance(own, str) else (own, "auto")
    if isinstance(thing, str) and backend == "auto":
        backend = environments.best_backend(thing)
    options = dict(settings.options)
    if backend == "gymnasium" or callable(thing):
        options["vectorization"] = settings.vectorization
    return environments.make(thing, backend, settings.max_episode_steps, **options)


def build_loop(config: Config, environment: Environment) -> Loop:
    """The seeds, transforms and task that `config` describes; UsageError where they do not fit together."""
    config.check()
    settings = config.environment
    agents, observed, acted = None, environment.observation_space, environment.action_space
    transforms: list = [RescaleAction()]
    if environment.agents:
        agents = Agents.of(environment.agents, observed, acted)  # type: ignore[arg-type]
        transforms.insert(0, StackAgents(agents))
    if settings.normalize_observation:
        transforms.append(NormalizeObservation())
    if settings.scale_reward:
        transforms.append(ScaleReward(discount=float(getattr(config.algorithm, "discount", 0.99))))
    if settings.frame_stack > 1:
        if not environment.observation_space.shape:
            raise UsageError(f"frames of {environment.observation_space} cannot be stacked; set frame_stack to 1")
        transforms.append(FrameStack(settings.frame_stack))
    chain = Chain(tuple(transforms), Spaces(observed, acted))
    sizes = config.num_environments, config.total_steps, settings.frame_stack, environment.max_episode_steps
    spec = Spec(chain.spaces.observation, chain.spaces.action, *sizes, environment.goals, agents)
    if settings.scale_reward and getattr(config.algorithm, "hindsight", "none") != "none":
        raise UsageError(
            "algorithm.hindsight asks the environment for rewards as it gives them; set environment.scale_reward to "
            "false"
        )
    config.algorithm.check(spec)
    check_workers(config, environment)
    off_policy = isinstance(config.algorithm, OffPolicy)
    learns_by_gradients = isinstance(config.algorithm, GradientLearner)
    driver_metrics = DRIVER_METRICS.get(config.workers.kind, ()) if learns_by_gradients else ()
    return Loop(config.all_seeds, chain, spec, off_policy, driver_metrics)


def build_driver(
    config: Config, environment: Environment, loop: Loop, seeds: Sequence[int], directory: Path | None = None
) -> Driver:
    """The driver that `config` asks for; `seeds` are those of the environments, `directory` is the run's."""
    workers = config.workers
    if workers.kind == "none":
        batch = environment.batch(seeds, config.num_environments)
        if environment.compiled:
            return CompiledDriver(loop, batch, environment.saves_state)
        return HostDriver(loop, batch)
    if workers.kind == "threads":
        each = config.num_environments // workers.count
        batches = [environment.batch([worker_seed(seed, w) for seed in seeds], each) for w in range(workers.count)]
        return AsynchronousDriver(loop, batches, environment.compiled, environment.saves_state)
    if workers.kind == "devices":
        each = config.num_environments // workers.count
        return ShardedDriver(
            loop, environment.batch(seeds, config.num_environments), environment.batch(seeds, each), workers.count
        )
    crew = build_crew(config, environment, seeds, directory)
    if not isinstance(config.algorithm, GradientLearner):
        return Learning(loop, crew)
    return Averaging(loop, crew, workers.late) if workers.kind == "ray" else ApplyingAsTheyCome(loop, crew)


def build_crew(config: Config, environment: Environment, seeds: Sequence[int], directory: Path | None) -> Crew:
    """Ray workers for a run."""
    workers = config.workers
    ray = start_ray(workers.ray_address, workers.count)
    actor = worker_actor(ray)
    own = environment if config.environment.backend == "own" else None  # others are made anew where the worker is

    packed = ray.cloudpickle.dumps((config, own, tuple(seeds)))

    def make(index: int, life: int) -> Any:
        return actor.remote(sys.path, packed, index, life)

    log = None if directory is None else directory / "workers.log"
    return Crew(ray, make, workers.count, workers.timeout, workers.restarts, log)


def build_worker(config: Config, own: Any, seeds: Sequence[int], index: int, life: int) -> Worker:
    """Worker `index` of a run, in its `life`."""
    environment = build_environment(config, own)
    loop = build_loop(config, environment)
    part = worker_loop(loop, config.workers.count)
    its = [worker_seed(worker_seed(seed, index), life) for seed in seeds]
    batch = environment.batch(its, part.spec.num_environments)
    return Worker(part, batch, config.algorithm, environment.compiled, index, life)


def check_workers(config: Config, environment: Environment) -> None:
    """Raise UsageError where the algorithm cannot learn in the hands of these workers."""
    kind, algorithm = config.workers.kind, config.algorithm
    name = type(algorithm).__name__
    if kind in ("threads", "ray_asynchronous", "devices") and not isinstance(algorithm, GradientLearner):
        raise UsageError(
            f"{name} does not learn by gradients that could come from elsewhere, which workers.kind {kind} asks for; "
            "A2C, AC and PPO do"
        )
    if kind == "devices" and not (environment.compiled and environment.saves_state):
        raise UsageError(
            f"{environment.id} ({environment.backend}) is not written in JAX and cannot be split between devices; take "
            "workers.kind threads or ray"
        )
    if config.workers.late and not isinstance(algorithm, GradientLearner):
        raise UsageError(f"{name} learns from all workers' rollouts together; set workers.late to 0")
    if kind not in ("none", "seeds") and getattr(algorithm, "optimiser", None) == "kfac":
        raise UsageError("algorithm.optimiser kfac looks at all samples in one place; set workers.kind to none")


def worker_seed(seed: int, worker: int) -> int:
    """The seed of a worker's environments; the first has the run's own."""
    return seed if worker == 0 else int(np.random.SeedSequence((seed, worker)).generate_state(1)[0] >> 1)


def build_evaluator(config: Config, environment: Environment, loop: Loop, episodes: int) -> Evaluator:
    """Plays `episodes` for each seed; where the environment has no limit, one that always ends."""
    if environment.max_episode_steps is None:
        environment = limited(environment, config)
    instances = COMPILED_INSTANCES if environment.compiled else HOST_INSTANCES
    return Evaluator(environment, loop, episodes, instances)


def limited(environment: Environment, config: Config) -> Environment:
    """`environment`, with episodes that are cut at `evaluation.max_steps`."""
    limit = config.evaluation.max_steps
    if isinstance(environment, JaxAdapter):
        return JaxAdapter(environment.id, environment.environment, environment.params, limit)
    if isinstance(environment, GymnasiumAdapter):
        factory = environment.factory
        made_by = factory.id if factory.function is None else factory.function
        return GymnasiumAdapter(made_by, limit, environment.vectorization, **factory.options)
    if environment.backend == "pettingzoo" and config.environment.backend == "own":
        from zhixing.environments.pettingzoo_adapter import PettingZooAdapter

        assert isinstance(environment, PettingZooAdapter)
        return PettingZooAdapter(environment.function, limit, **environment.options)
    return build_environment(replace(config, environment=replace(config.environment, max_episode_steps=limit)))
