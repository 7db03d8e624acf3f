"""From a `Config` to the parts of a run: environment, transforms, loop, driver."""

from dataclasses import replace
from typing import Any

from zhixing import environments
from zhixing.config import Config
from zhixing.core import Spec
from zhixing.drivers.loop import Loop
from zhixing.environments.base import Environment
from zhixing.environments.gymnasium_adapter import GymnasiumAdapter
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.environments.transforms import Chain, FrameStack, NormalizeObservation, RescaleAction, ScaleReward, Spaces
from zhixing.errors import UsageError
from zhixing.evaluate import Evaluator
from zhixing.off_policy import OffPolicy

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
    transforms: list = [RescaleAction()]
    if settings.normalize_observation:
        transforms.append(NormalizeObservation())
    if settings.scale_reward:
        transforms.append(ScaleReward(discount=float(getattr(config.algorithm, "discount", 0.99))))
    if settings.frame_stack > 1:
        if not environment.observation_space.shape:
            raise UsageError(f"frames of {environment.observation_space} cannot be stacked; set frame_stack to 1")
        transforms.append(FrameStack(settings.frame_stack))
    chain = Chain(tuple(transforms), Spaces(environment.observation_space, environment.action_space))
    sizes = config.num_environments, config.total_steps, settings.frame_stack, environment.max_episode_steps
    spec = Spec(chain.spaces.observation, chain.spaces.action, *sizes, environment.goals)
    if settings.scale_reward and getattr(config.algorithm, "hindsight", "none") != "none":
        raise UsageError(
            "algorithm.hindsight asks the environment for rewards as it gives them; set environment.scale_reward to "
            "false"
        )
    config.algorithm.check(spec)
    return Loop(config.all_seeds, chain, spec, keeps_observations=isinstance(config.algorithm, OffPolicy))


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
    return build_environment(replace(config, environment=replace(config.environment, max_episode_steps=limit)))
