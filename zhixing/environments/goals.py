"""Goal environments: observations in three parts, and a reward that can be asked for any pair of goals.

The convention is Gymnasium-Robotics': the observation is a dictionary of

    observation      what there is to see besides goals
    achieved_goal    the goal that this state meets
    desired_goal     the goal of the episode

and the environment has `compute_reward`, and `compute_terminated` where a goal that is met ends the episode.
Plappert et al., "Multi-goal reinforcement learning: challenging robotics environments and request for research",
arXiv:1802.09464, section 1.4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

OBSERVATION, ACHIEVED, DESIRED = "observation", "achieved_goal", "desired_goal"

# (achieved, desired) [..., *] -> [...]
Judge = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Goals:
    """What an environment says of reaching `achieved` where `desired` was wanted; both are traced, [..., *] -> [...].

    Attributes:
        reward: float32, of the step that led to `achieved`.
        terminated: bool, whether the episode terminates there; None: goals have no part in that.
    """

    reward: Judge
    terminated: Judge | None = None


def has_goals(space: gymnasium.Space) -> bool:
    """Whether observations have the three parts of a goal environment."""
    return isinstance(space, spaces.Dict) and {OBSERVATION, ACHIEVED, DESIRED} <= space.spaces.keys()


def jax_goals(environment: Any, space: gymnasium.Space, params: Any) -> Goals | None:
    """Of a JAX environment with `compute_reward(achieved, desired, params)`; None if it has no goals."""
    if not has_goals(space) or not hasattr(environment, "compute_reward"):
        return None

    def bound(name: str) -> Judge:
        judge = getattr(environment, name)
        return lambda achieved, desired: judge(achieved, desired, params)

    terminated = bound("compute_terminated") if hasattr(environment, "compute_terminated") else None
    return Goals(bound("compute_reward"), terminated)


def gymnasium_goals(environment: gymnasium.Env) -> Goals | None:
    """Of a Gymnasium environment with `compute_reward(achieved, desired, info)`; None if it has no goals.

    A compiled program calls them back. `environment` must not be closed or stepped as long as that goes on; what is
    asked is the innermost environment, whatever wraps it.
    """
    asked: Any = environment.unwrapped
    if not has_goals(environment.observation_space) or not hasattr(asked, "compute_reward"):
        return None
    space: Any = environment.observation_space
    shape = space[DESIRED].shape
    terminated = None
    if hasattr(asked, "compute_terminated"):
        terminated = called_back(asked.compute_terminated, shape, np.bool_)
    return Goals(called_back(asked.compute_reward, shape, np.float32), terminated)


def called_back(function: Callable[[Any, Any, dict], Any], shape: tuple[int, ...], dtype: Any) -> Judge:
    """`function(achieved, desired, info)` of the host, to be called in a compiled program; goals have this `shape`."""
    import jax  # not needed by the processes that only step environments

    def on_host(achieved: Any, desired: Any) -> np.ndarray:
        leading = np.shape(achieved)[: np.ndim(achieved) - len(shape)]
        rows = (np.asarray(goal).reshape(-1, *shape) for goal in (achieved, desired))
        return judged(function, *rows).astype(dtype).reshape(leading)

    def judge(achieved: Any, desired: Any) -> Any:
        result = jax.ShapeDtypeStruct(achieved.shape[: achieved.ndim - len(shape)], dtype)
        return jax.pure_callback(on_host, result, achieved, desired, vmap_method="broadcast_all")

    return judge


def judged(function: Callable[[Any, Any, dict], Any], achieved: np.ndarray, desired: np.ndarray) -> np.ndarray:
    """`function` of goals [B, *] -> [B]: in one call if it takes many, otherwise goal by goal.

    Some environments answer for one goal alone: an answer of another shape, or an error, says so.
    """
    try:
        answer = np.asarray(function(achieved, desired, {}))
    except (TypeError, ValueError):
        answer = np.empty(())
    if answer.shape == (len(achieved),):
        return answer
    return np.asarray([function(*pair, {}) for pair in zip(achieved, desired, strict=True)])
