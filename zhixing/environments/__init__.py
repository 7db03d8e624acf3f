"""`make`: any environment by its id, in the fastest form that is installed."""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from zhixing.environments.base import Environment
from zhixing.errors import UsageError, unknown

CLASSIC_CONTROL = ("CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1", "Acrobot-v1")
TOY_TEXT = ("FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "CliffWalkingSlippery-v1", "Taxi-v4")
GOALS = ("zhixing/BitFlipping-v0",)
PLANES = ("zhixing/Point-v0",)
PARTICLES = (
    *("simple_spread_v3", "simple_adversary_v3", "simple_tag_v3"),
    *("simple_speaker_listener_v4", "simple_reference_v3", "simple_push_v3"),
)
TEACHING = ("zhixing/Maze-v0", "zhixing/TreasureLine-v0", "zhixing/TMaze-v0")
BOX2D = ("LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3", "BipedalWalkerHardcore-v3")
MUJOCO = (
    *("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5"),
    *("InvertedPendulum-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5"),
)
BACKENDS = ("auto", "jax", "envpool", "gymnasium", "pettingzoo")


def make(id: Any, backend: str = "auto", max_episode_steps: int | None = None, **options: Any) -> Environment:
    """The environment called `id`, or a user's own, ready to be made in batches.

    Args:
        id: a name; or a `gymnasium.Env` or `pettingzoo.ParallelEnv` class or a function that makes one; or a JAX
            environment object with `reset` and `step` of gymnax 1.x's protocol.
        backend: "jax" (compiled), "envpool" (compiled, C++), "gymnasium" or "pettingzoo" (from Python); "auto"
            takes the first of them that is installed and has the id.
        max_episode_steps: truncate episodes there; None keeps the environment's own limit.
        options: given to the environment's maker.

    Raises UsageError for an unknown id, option or backend, and for a package that is missing.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if max_episode_steps is not None and max_episode_steps < 1:
        raise UsageError(f"environment.max_episode_steps is {max_episode_steps}; it must be 1 or more")
    if isinstance(id, Environment):
        return id
    if not isinstance(id, str):
        return own(id, max_episode_steps, options)
    if backend == "auto":
        backend = best_backend(id)
    if backend == "jax":
        return make_jax(id, max_episode_steps, options)
    if backend == "envpool":
        from zhixing.environments.envpool_adapter import EnvPoolAdapter

        return EnvPoolAdapter(id, max_episode_steps, **options)
    if backend == "pettingzoo":
        from zhixing.environments.pettingzoo_adapter import PettingZooAdapter

        return PettingZooAdapter(id, max_episode_steps, **options)
    return make_gymnasium(id, max_episode_steps, options)


def best_backend(id: str) -> str:
    """The fastest installed backend that has `id`."""
    if id in CLASSIC_CONTROL + TOY_TEXT + TEACHING + GOALS + PLANES + PARTICLES or is_gymnax(id):
        return "jax"
    if id in BOX2D + MUJOCO and importlib.util.find_spec("envpool"):
        return "envpool"
    return "pettingzoo" if is_pettingzoo(id) else "gymnasium"


def is_gymnax(id: str) -> bool:
    """The families that only gymnax has; its import takes seconds, so names must do."""
    return id.endswith(("-MinAtar", "-bsuite", "-misc"))


def is_pettingzoo(id: str) -> bool:
    """Its modules are called name_v0, Gymnasium's environments Name-v0."""
    return re.search(r"_v\d+$", id) is not None


def own(thing: Any, max_episode_steps: int | None, options: dict) -> Environment:
    """A user's own: a JAX one if it has `reset` and `step` as an object, else a PettingZoo or Gymnasium factory."""
    if makes_pettingzoo(thing, options):
        from zhixing.environments.pettingzoo_adapter import PettingZooAdapter

        return PettingZooAdapter(thing, max_episode_steps, **options)
    if callable(thing):
        from zhixing.environments.gymnasium_adapter import GymnasiumAdapter

        return GymnasiumAdapter(thing, max_episode_steps, **options)
    if hasattr(thing, "reset") and hasattr(thing, "step"):
        from zhixing.environments.jax_adapter import JaxAdapter

        limit = "own" if max_episode_steps is None else max_episode_steps
        return JaxAdapter(type(thing).__name__, thing, max_episode_steps=limit, **options)
    raise UsageError(f"{thing!r} is no environment; give an id, a gymnasium.Env class or a JAX environment")


def makes_pettingzoo(thing: Any, options: dict) -> bool:
    """Whether it is a class of PettingZoo's kinds, or a function that returns one of their instances."""
    pettingzoo = sys.modules.get("pettingzoo")  # whoever has not imported it has made nothing of it
    if pettingzoo is None:
        return False
    kinds = pettingzoo.ParallelEnv, pettingzoo.AECEnv
    if isinstance(thing, kinds):
        raise UsageError(f"one {type(thing).__name__} is not enough; give its class, or a function that makes one")
    if isinstance(thing, type):
        return issubclass(thing, kinds)
    if not callable(thing):
        return False
    try:
        made = thing(**{name: value for name, value in options.items() if name != "vectorization"})
    except Exception:  # the adapter that takes it says what is wrong
        return False
    getattr(made, "close", lambda: None)()
    return isinstance(made, kinds)


def make_jax(id: str, max_episode_steps: int | None, options: dict) -> Environment:
    from zhixing.environments import bit_flipping, classic_control, jax_adapter, point, tabular, teaching
    from zhixing.environments.particle_scenarios import PARTICLES as WORLDS

    limit = "own" if max_episode_steps is None else max_episode_steps
    if id in TOY_TEXT:
        return jax_adapter.JaxAdapter(id, tabular.TabularEnv.from_gymnasium(id, **options), max_episode_steps=limit)
    if id in GOALS:
        if options.keys() - {"bits"}:
            raise unknown(f"option of {id}", min(options.keys() - {"bits"}), ["bits"])
        return jax_adapter.JaxAdapter(id, bit_flipping.BitFlipping(**options), max_episode_steps=limit)
    if id in WORLDS:
        known = inspect.signature(WORLDS[id]).parameters
        for name in options.keys() - known:
            raise unknown(f"option of {id}", name, known)
        return jax_adapter.JaxAdapter(id, WORLDS[id](**options), max_episode_steps=limit)
    planes = dict.fromkeys(PLANES, point.Point)
    makers: dict[str, Callable] = classic_control.CLASSIC_CONTROL | teaching.TEACHING | planes
    if id in makers:
        if options:
            raise UsageError(f"{id} takes no options in its JAX form, not {sorted(options)}; use backend gymnasium")
        return jax_adapter.JaxAdapter(id, makers[id](), max_episode_steps=limit)
    if not is_gymnax(id):
        raise unknown("JAX environment", id, CLASSIC_CONTROL + TOY_TEXT + TEACHING + GOALS + PLANES + PARTICLES)
    try:
        import gymnax
    except ImportError:
        raise UsageError(f"{id} needs gymnax; pip install 'zhixing[gymnax]'") from None
    try:
        environment, params = gymnax.make(id, **options)
    except (ValueError, KeyError):
        raise unknown("gymnax environment", id, gymnax.registered_envs) from None
    return jax_adapter.JaxAdapter(id, environment, params, max_episode_steps=limit)


def make_gymnasium(id: str, max_episode_steps: int | None, options: dict) -> Environment:
    import gymnasium

    from zhixing.environments.gymnasium_adapter import GymnasiumAdapter, register_installed

    register_installed(id)
    if ":" not in id and id not in gymnasium.registry:
        known = {*gymnasium.registry, *TEACHING, *GOALS, *PLANES, *PARTICLES}
        raise unknown("environment", id, known, "`zhixing list environments` shows them")
    return GymnasiumAdapter(id, max_episode_steps, **options)
