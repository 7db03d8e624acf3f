"""The scenarios of the multi-agent particle environments: who is there, what each agent sees and is paid for.

Names, observations and rewards are those of mpe2 1.1 (PettingZoo's MPE); `zhixing.environments.particles` has the
physics. Positions are relative to who observes, but for the observer's own; d(x, y) is a distance.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zhixing.environments.particles import GREY, Body, Particles, World, length
from zhixing.errors import UsageError

BLUE, RED, GREEN = (0.35, 0.35, 0.85), (0.85, 0.35, 0.35), (0.35, 0.85, 0.35)


class SimpleSpread(World):
    """simple_spread_v3: N agents cover N landmarks, and do not bump into each other.

    Sees: own velocity and position, landmarks, other agents, what they said (nothing: all are silent).
    Paid: (1 - local_ratio) times minus the sum over landmarks of the distance to the agent nearest to it, the same
    for all; and local_ratio times minus the number of agents that it overlaps.
    """

    def __init__(self, N: int = 3, local_ratio: float = 0.5, continuous_actions: bool = False):  # noqa: N803 - mpe2's
        count = _whole("N", N, 1)
        self.local_ratio = _ratio(local_ratio)
        agents = {f"agent_{i}": Body(0.15, BLUE, collides=True) for i in range(count)}
        super().__init__(agents, [Body()] * count, vocabulary=2, continuous_actions=continuous_actions)

    def observe(self, state: Particles) -> dict[str, jax.Array]:
        own = state.velocity, state.position[: self.num_agents]
        seen = self.landmarks_seen(state), self.others_seen(state), self.others_heard(state)
        return dict(zip(self.agents, jnp.concatenate([*own, *seen], -1), strict=True))

    def reward(self, state: Particles) -> jax.Array:
        agents, landmarks = state.position[: self.num_agents], state.position[self.num_agents :]
        uncovered = length(agents[:, None] - landmarks).min(0).sum()
        bumps = self.overlaps(state).sum(1)
        return -(1.0 - self.local_ratio) * uncovered - self.local_ratio * bumps


class SimpleAdversary(World):
    """simple_adversary_v3: N agents know which of N landmarks is the goal, one adversary does not.

    Sees: the goal (not the adversary), landmarks, other agents.
    Paid: agents d(adversary, goal) - the smallest d(agent, goal); the adversary -d(adversary, goal).
    """

    def __init__(self, N: int = 2, continuous_actions: bool = False):  # noqa: N803 - mpe2's
        count = _whole("N", N, 1)
        agents = {"adversary_0": Body(0.15, RED)} | {f"agent_{i}": Body(0.15, BLUE) for i in range(count)}
        landmarks = [Body(0.08, (0.15, 0.15, 0.15))] * count
        super().__init__(agents, landmarks, num_goals=1, continuous_actions=continuous_actions)

    def observe(self, state: Particles) -> dict[str, jax.Array]:
        goal = self.goal_positions(state) - state.position[: self.num_agents]
        seen = jnp.concatenate([self.landmarks_seen(state), self.others_seen(state)], -1)
        adversary, *good = self.agents
        rows = jnp.concatenate([goal, seen], -1)
        return {adversary: seen[0]} | {name: rows[1 + i] for i, name in enumerate(good)}

    def reward(self, state: Particles) -> jax.Array:
        distance = length(state.position[: self.num_agents] - self.goal_positions(state))
        adversary, nearest = distance[0], distance[1:].min()
        return jnp.where(np.arange(self.num_agents) == 0, -adversary, adversary - nearest)

    def colours(self, state: Particles) -> np.ndarray:
        return _with_goals(super().colours(state), state, (0.15, 0.65, 0.15))


class SimpleTag(World):
    """simple_tag_v3: slower adversaries hunt faster agents among obstacles.

    Sees: own velocity and position, obstacles, other agents, the velocities of the (other) good agents.
    Paid: adversaries 10 for each pair of a good agent and an adversary that overlap, all alike; good agents -10 for
    each adversary that overlaps them, less what they are out of bounds, in each coordinate.
    """

    landmark_range = 0.9

    def __init__(
        self, num_good: int = 1, num_adversaries: int = 3, num_obstacles: int = 2, continuous_actions: bool = False
    ):
        self.num_adversaries = _whole("num_adversaries", num_adversaries)
        hunter = Body(0.075, RED, collides=True, acceleration=3.0, max_speed=1.0)
        good = Body(0.05, GREEN, collides=True, acceleration=4.0, max_speed=1.3)
        agents = {f"adversary_{i}": hunter for i in range(self.num_adversaries)}
        agents |= {f"agent_{i}": good for i in range(_whole("num_good", num_good, 1))}
        obstacles = [Body(0.2, GREY, collides=True)] * _whole("num_obstacles", num_obstacles)
        super().__init__(agents, obstacles, continuous_actions=continuous_actions)

    def observe(self, state: Particles) -> dict[str, jax.Array]:
        own = state.velocity, state.position[: self.num_agents]
        rows = jnp.concatenate([*own, self.landmarks_seen(state), self.others_seen(state)], -1)
        good = range(self.num_adversaries, self.num_agents)
        observations = {}
        for index, name in enumerate(self.agents):
            fleeing = [state.velocity[other] for other in good if other != index]
            observations[name] = jnp.concatenate([rows[index], *fleeing])
        return observations

    def reward(self, state: Particles) -> jax.Array:
        caught = 10.0 * self.overlaps(state)[: self.num_adversaries, self.num_adversaries :]
        outside = _out_of_bounds(jnp.abs(state.position[self.num_adversaries : self.num_agents])).sum(-1)
        hunters = jnp.broadcast_to(caught.sum(), (self.num_adversaries,))
        return jnp.concatenate([hunters, -caught.sum(0) - outside])


class SimpleSpeakerListener(World):
    """simple_speaker_listener_v4: a speaker that cannot move tells a listener which of three landmarks to go to.

    Sees: the speaker the goal's colour; the listener its own velocity, landmarks, what was said.
    Paid: both -d(listener, goal)^2.
    """

    def __init__(self, continuous_actions: bool = False):
        agents = {"speaker_0": Body(0.075, moves=False, speaks=True), "listener_0": Body(0.075)}
        landmarks = [Body(0.04, colour) for colour in _coloured(0.15, 0.65)]
        super().__init__(agents, landmarks, vocabulary=3, num_goals=1, continuous_actions=continuous_actions)

    def observe(self, state: Particles) -> dict[str, jax.Array]:
        heard = state.velocity, self.landmarks_seen(state), self.others_heard(state)
        speaker, listener = self.agents
        return {speaker: self.goal_colours(state)[0], listener: jnp.concatenate(heard, -1)[1]}

    def reward(self, state: Particles) -> jax.Array:
        distance = length(state.position[1] - self.goal_positions(state)[0])
        return jnp.broadcast_to(-(distance**2), (2,))

    def colours(self, state: Particles) -> np.ndarray:
        colours = super().colours(state)
        colours[1] = np.asarray(self.goal_colours(state))[0] + (1 - 0.65)
        return colours


class SimpleReference(World):
    """simple_reference_v3: each of two agents knows where the other should go, and both move and speak.

    Sees: own velocity, landmarks, the colour of the landmark where the other should go, what the other said.
    Paid: local_ratio times -d(the other, its goal) and (1 - local_ratio) times the mean of both.
    """

    def __init__(self, local_ratio: float = 0.5, continuous_actions: bool = False):
        self.local_ratio = _ratio(local_ratio)
        agents = {f"agent_{i}": Body(speaks=True) for i in range(2)}
        landmarks = [Body(colour=colour) for colour in _coloured(0.25, 0.75)]
        super().__init__(agents, landmarks, vocabulary=10, num_goals=2, continuous_actions=continuous_actions)

    def observe(self, state: Particles) -> dict[str, jax.Array]:
        seen = state.velocity, self.landmarks_seen(state), self.goal_colours(state), self.others_heard(state)
        return dict(zip(self.agents, jnp.concatenate(seen, -1), strict=True))

    def reward(self, state: Particles) -> jax.Array:
        other = state.position[: self.num_agents][::-1]
        own = -length(other - self.goal_positions(state))
        return (1.0 - self.local_ratio) * own.mean() + self.local_ratio * own

    def colours(self, state: Particles) -> np.ndarray:
        colours = super().colours(state)
        colours[:2] = np.asarray(self.goal_colours(state))[::-1]
        return colours


class SimplePush(World):
    """simple_push_v3: an agent goes to one of two landmarks; an adversary that does not know which keeps it away.

    Sees: the agent its own velocity, the goal, its colour (the goal's, darker), landmarks, their colours, the
    adversary; the adversary its own velocity, landmarks, the agent.
    Paid: the agent -d(agent, goal); the adversary d(agent, goal) - d(adversary, goal).
    """

    def __init__(self, continuous_actions: bool = False):
        agents = {"adversary_0": Body(colour=(0.75, 0.25, 0.25), collides=True), "agent_0": Body(collides=True)}
        landmarks = [Body(colour=(0.1, 0.9, 0.1)), Body(colour=(0.1, 0.1, 0.9))]
        super().__init__(agents, landmarks, num_goals=1, continuous_actions=continuous_actions)

    def observe(self, state: Particles) -> dict[str, jax.Array]:
        goal = self.goal_positions(state)[0] - state.position[1]
        landmarks, others = self.landmarks_seen(state), self.others_seen(state)
        colours = self.agent_colour(state), self.landmark_colours().ravel()
        adversary, agent = self.agents
        return {
            adversary: jnp.concatenate([state.velocity[0], landmarks[0], others[0]]),
            agent: jnp.concatenate([state.velocity[1], goal, colours[0], landmarks[1], colours[1], others[1]]),
        }

    def reward(self, state: Particles) -> jax.Array:
        adversary, agent = length(state.position[:2] - self.goal_positions(state))
        return jnp.stack([agent - adversary, -agent])

    def agent_colour(self, state: Particles) -> jax.Array:
        """[3] grey, with half of the light of its goal's green or blue on top."""
        return jnp.array(GREY) + 0.5 * jnp.pad(state.goal[0], (1, 0))

    def colours(self, state: Particles) -> np.ndarray:
        colours = super().colours(state)
        colours[1] = np.asarray(self.agent_colour(state))
        return colours


PARTICLES: dict[str, type[World]] = {
    "simple_spread_v3": SimpleSpread,
    "simple_adversary_v3": SimpleAdversary,
    "simple_tag_v3": SimpleTag,
    "simple_speaker_listener_v4": SimpleSpeakerListener,
    "simple_reference_v3": SimpleReference,
    "simple_push_v3": SimplePush,
}


def _out_of_bounds(x: jax.Array) -> jax.Array:
    """What a coordinate `x` >= 0 costs: nothing to 0.9, then more and more steeply, at most 10."""
    return jnp.where(x < 0.9, 0.0, jnp.where(x < 1.0, 10.0 * (x - 0.9), jnp.minimum(jnp.exp(2.0 * x - 2.0), 10.0)))


def _coloured(dark: float, light: float) -> list[tuple[float, float, float]]:
    """Three landmarks: red, green, blue."""
    return [(light, dark, dark), (dark, light, dark), (dark, dark, light)]


def _with_goals(colours: np.ndarray, state: Particles, colour: tuple[float, float, float]) -> np.ndarray:
    """`colours` [A + L, 3] with `colour` for the landmarks that are goals."""
    goals = np.asarray(state.goal).any(0)
    colours[-goals.size :][goals] = colour
    return colours


def _whole(name: str, value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"environment.options.{name} is {value!r}; it must be a whole number, {least} or more")
    return value


def _ratio(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UsageError(f"environment.options.local_ratio is {value!r}; it must be a number from 0 to 1")
    return float(value)
