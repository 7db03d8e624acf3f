"""zhixing 知行: classic reinforcement learning, one short file an algorithm, compiled end to end.

    import zhixing as zx

    run = zx.train("ppo", "CartPole-v1", seeds=8)
    run.policy(observation)

Names are imported when they are first used, so that `import zhixing` costs nothing.
"""

from importlib import import_module
from typing import Any

from zhixing.algorithms import ALGORITHMS

_HOMES = {
    "train": "zhixing.training",
    "resume": "zhixing.training",
    "compare": "zhixing.comparison",
    "make": "zhixing.environments",
    "JaxEnvironment": "zhixing.environments.jax_adapter",
    "TabularEnv": "zhixing.environments.tabular",
    "TrainedRun": "zhixing.run",
    "UsageError": "zhixing.errors",
    **{name: f"zhixing.algorithms.{module}" for module, name in ALGORITHMS.items()},
}

__all__ = [*_HOMES, "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return import_module("zhixing.run").TrainedRun.load
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zhixing' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
