"""The physics of the multi-agent particle environments: round bodies that push, touch and talk in a plane.

A body at p moves by its velocity v, its own push u and the contact c of whoever it touches (masses are 1):

    p <- p + DT v                                                            (MPE.1)
    v <- (1 - DAMPING) v + DT (a u + c), shortened to the body's top speed   (MPE.2)

where a is its acceleration, and two bodies with radii r and r' at a distance d, which lie along the unit vector n,
push each other apart with

    c = STIFFNESS MARGIN log(1 + exp((r + r' - d) / MARGIN)) n               (MPE.3)

a smooth form of the depth max(0, r + r' - d). Pushes and contacts are those at the positions before the step.

Mordatch and Abbeel, "Emergence of grounded compositional language in multi-agent populations", arXiv:1703.04908,
section 3; Lowe et al., "Multi-agent actor-critic for mixed cooperative-competitive environments",
arXiv:1706.02275, section 5.1. Constants, layouts and rewards are those of mpe2 1.1. The scenarios are in
`zhixing.environments.particle_scenarios`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.environments.jax_adapter import JaxEnvironment
from zhixing.errors import UsageError

DT = 0.1  # of a step
DAMPING = 0.25  # the part of the velocity that is lost in a step
STIFFNESS = 100.0
MARGIN = 1e-3  # how far contacts are felt beyond the radii, and within which they grow smoothly
MOVEMENTS = 5  # stay, left, right, down, up

Colour = tuple[float, float, float]
GREY: Colour = (0.25, 0.25, 0.25)


class Body(NamedTuple):
    """What an agent or a landmark is made of."""

    radius: float = 0.05
    colour: Colour = GREY  # red, green, blue, from 0 to 1
    collides: bool = False  # with other bodies that do
    moves: bool = True  # of an agent; landmarks never do
    speaks: bool = False  # of an agent
    acceleration: float = 5.0
    max_speed: float = math.inf


class Particles(NamedTuple):
    """The state: A agents, L landmarks, all A + L bodies with the agents first, C words, G goals."""

    position: jax.Array  # [A + L, 2]
    velocity: jax.Array  # [A, 2]
    message: jax.Array  # [A, C] what each agent said in the last step; zeros if nothing
    goal: jax.Array  # [G, L] one-hot: the landmarks that are meant


class World(JaxEnvironment):
    """Base of the scenarios: they say who is there, what is observed (`observe`) and what is rewarded (`reward`).

    The action of an agent is, for one that moves, a movement; for one that speaks, a word; for one that does both,
    movement + 5 word. With `continuous_actions` it is a vector from 0 to 1: the strength of each movement (the first,
    to stay, has no effect) and then of each word.

    Args:
        agents: by name, in their order.
        landmarks: what does not move.
        vocabulary: C, the number of words.
        num_goals: G, how many landmarks are drawn as goals for an episode, uniformly.
        continuous_actions: vectors instead of numbers.
    """

    max_episode_steps = 25
    landmark_range = 1.0  # landmarks begin at coordinates from -this to this; agents from -1 to 1

    def __init__(
        self,
        agents: Mapping[str, Body],
        landmarks: Sequence[Body],
        vocabulary: int = 0,
        num_goals: int = 0,
        continuous_actions: bool = False,
    ):
        if not isinstance(continuous_actions, bool):
            raise UsageError(f"environment.options.continuous_actions is {continuous_actions!r}; it is true or false")
        self.agents = tuple(agents)
        self.bodies = (*agents.values(), *landmarks)
        self.vocabulary, self.num_goals, self.continuous_actions = vocabulary, num_goals, continuous_actions
        self.num_agents, self.num_landmarks = len(agents), len(landmarks)
        self.acceleration = np.array([[body.acceleration] for body in agents.values()], np.float32)  # [A, 1]
        self.max_speed = np.array([body.max_speed for body in agents.values()], np.float32)  # [A]
        radius = np.array([body.radius for body in self.bodies], np.float32)
        # Agents among themselves, and the landmarks too only where one is in the way of anybody.
        others = len(self.bodies) if any(body.collides for body in landmarks) else len(agents)
        self.reach = radius[: len(agents), None] + radius[:others]  # [A, others] the distances at which two touch
        collides = np.array([body.collides for body in self.bodies])
        movable = np.array([body.moves for body in agents.values()])
        self.touching = (collides[: len(agents)] & movable)[:, None] & collides[:others]
        self.touching &= ~np.eye(len(agents), others, dtype=bool)

    # ------------------------------------------------------------------------------ what a scenario says

    def observe(self, state: Particles) -> dict[str, jax.Array]:
        """-> observation of each agent, by name."""
        raise NotImplementedError

    def reward(self, state: Particles) -> jax.Array:
        """-> [A] float32."""
        raise NotImplementedError

    def colours(self, state: Particles) -> np.ndarray:
        """[A + L, 3], of the bodies in this episode, for pictures."""
        return np.array([body.colour for body in self.bodies])

    # ---------------------------------------------------------------------------------- the environment

    def observation_space(self, params: Any) -> spaces.Dict:
        seen = jax.eval_shape(lambda key: self.reset_env(key, params)[0], jax.random.PRNGKey(0))
        return spaces.Dict({name: spaces.Box(-np.inf, np.inf, seen[name].shape, np.float32) for name in self.agents})

    def action_space(self, params: Any) -> spaces.Dict:
        return spaces.Dict(
            {name: self._action_space(body) for name, body in zip(self.agents, self.bodies, strict=False)}
        )

    def _action_space(self, body: Body) -> spaces.Space:
        if self.continuous_actions:
            return spaces.Box(0.0, 1.0, (MOVEMENTS * body.moves + self.vocabulary * body.speaks,), np.float32)
        return spaces.Discrete((MOVEMENTS if body.moves else 1) * (self.vocabulary if body.speaks else 1))

    def reset_env(self, key: jax.Array, params: Any) -> tuple[dict[str, jax.Array], Particles]:
        key, goal_key = jax.random.split(key)
        position = jax.random.uniform(key, (self.num_agents + self.num_landmarks, 2), minval=-1.0, maxval=1.0)
        agents, landmarks = position[: self.num_agents], self.landmark_range * position[self.num_agents :]
        goals = jax.random.randint(goal_key, (self.num_goals,), 0, self.num_landmarks)
        state = Particles(
            position=jnp.concatenate([agents, landmarks]),
            velocity=jnp.zeros((self.num_agents, 2)),
            message=jnp.zeros((self.num_agents, self.vocabulary)),
            goal=jax.nn.one_hot(goals, self.num_landmarks),
        )
        return self.observe(state), state

    def step_env(self, key: jax.Array, state: Particles, action: Any, params: Any) -> tuple:
        """`action` is a dictionary by the agents' names."""
        meant = [self._meaning(body, action[name]) for name, body in zip(self.agents, self.bodies, strict=False)]
        push, message = map(jnp.stack, zip(*meant, strict=True))
        state = self.move(state, push)._replace(message=message)
        return self.observe(state), state, self.reward(state), jnp.bool_(False), {}

    def _meaning(self, body: Body, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The action of one agent -> push [2] from -1 to 1, message [C]."""
        movement, words = jnp.zeros(MOVEMENTS), jnp.zeros(self.vocabulary)
        if self.continuous_actions:
            action = jnp.clip(action, 0.0, 1.0)
            movement = action[:MOVEMENTS] if body.moves else movement
            words = action[-self.vocabulary :] if body.speaks else words
        else:
            movement = jax.nn.one_hot(action % MOVEMENTS, MOVEMENTS) if body.moves else movement
            word = action // MOVEMENTS if body.moves else action
            words = jax.nn.one_hot(word, self.vocabulary) if body.speaks else words
        _, left, right, down, up = movement
        return jnp.stack([right - left, up - down]), words

    def move(self, state: Particles, push: jax.Array) -> Particles:
        """One step of the agents that push by `push` [A, 2]."""
        velocity = (1.0 - DAMPING) * state.velocity + DT * (self.acceleration * push + self.contact(state))  # (MPE.2)
        if np.isfinite(self.max_speed).any():
            speed = length(velocity)
            slowed = self.max_speed / jnp.maximum(speed, 1e-9)
            velocity = velocity * jnp.where(speed > self.max_speed, slowed, 1.0)[:, None]
        agents, landmarks = state.position[: self.num_agents], state.position[self.num_agents :]
        position = jnp.concatenate([agents + DT * state.velocity, landmarks])  # (MPE.1)
        return state._replace(position=position, velocity=velocity)

    def contact(self, state: Particles) -> jax.Array:
        """[A, 2] the force on each agent of all that it touches."""
        if not self.touching.any():
            return jnp.zeros((self.num_agents, 2))
        offset = state.position[: self.num_agents, None] - state.position[: self.reach.shape[1]]
        distance = length(offset)
        depth = MARGIN * jnp.logaddexp(0.0, (self.reach - distance) / MARGIN)
        # Two in the very same place push in no direction.
        force = jnp.where(self.touching, STIFFNESS * depth / jnp.maximum(distance, 1e-9), 0.0)
        return (force[..., None] * offset).sum(1)  # (MPE.3)

    # --------------------------------------------------------------- what observations and rewards are made of

    def landmarks_seen(self, state: Particles) -> jax.Array:
        """[A, 2 L] where the landmarks are, as each agent sees it."""
        offset = state.position[self.num_agents :] - state.position[: self.num_agents, None]
        return offset.reshape(self.num_agents, -1)

    def others_seen(self, state: Particles) -> jax.Array:
        """[A, 2 (A - 1)] where the other agents are, as each sees it."""
        agents = state.position[: self.num_agents]
        return others(agents - agents[:, None])

    def others_heard(self, state: Particles) -> jax.Array:
        """[A, C (A - 1)] what the other agents said."""
        return others(jnp.broadcast_to(state.message, (self.num_agents, *state.message.shape)))

    def goal_positions(self, state: Particles) -> jax.Array:
        """[G, 2]"""
        return (state.goal[..., None] * state.position[self.num_agents :]).sum(1)

    def goal_colours(self, state: Particles) -> jax.Array:
        """[G, 3]"""
        return (state.goal[..., None] * self.landmark_colours()).sum(1)

    def landmark_colours(self) -> np.ndarray:
        """[L, 3] float32."""
        return np.array([body.colour for body in self.bodies[self.num_agents :]], np.float32)

    def overlaps(self, state: Particles) -> jax.Array:
        """[A, A] bool, which agents are closer than their radii; nobody to itself."""
        agents = state.position[: self.num_agents]
        near = length(agents[:, None] - agents) < self.reach[:, : self.num_agents]
        return near & ~np.eye(self.num_agents, dtype=bool)

    # -------------------------------------------------------------------------------------------- pictures

    def render_frame(self, state: Particles, size: int = 400) -> np.ndarray:
        """uint8 [size, size, 3]: the bodies in their colours, agents above landmarks, and what was said."""
        from PIL import Image, ImageDraw

        position, message = np.asarray(state.position), np.asarray(state.message)
        scale = size / 2 / (1.15 * max(1.0, np.abs(position).max()))  # pixels of a unit; nobody leaves the picture
        image = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(image)
        colours = np.clip(255 * self.colours(state), 0, 255).astype(int)
        for index in reversed(range(len(self.bodies))):
            x, y = size / 2 + scale * position[index] * (1, -1)
            radius = max(2.0, scale * self.bodies[index].radius)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), tuple(colours[index]), "black")
        speakers = [index for index in range(self.num_agents) if self.bodies[index].speaks]
        for line, index in enumerate(speakers):
            word = chr(ord("A") + int(message[index].argmax())) if message[index].any() else "-"
            draw.text((8, 8 + 14 * line), f"{self.agents[index]}: {word}", "black")
        return np.asarray(image)


def length(vector: jax.Array) -> jax.Array:
    """[..., 2] -> [...], the Euclidean norm; written out, for a reduction over two numbers would not fuse."""
    return jnp.sqrt(vector[..., 0] ** 2 + vector[..., 1] ** 2)


def others(pairs: jax.Array) -> jax.Array:
    """[A, A, k] -> [A, (A - 1) k]: each row without the pair of an agent and itself.

    The diagonal stands at every (A + 1)-th place of the flattened pairs: less the first, it is a last column.
    """
    count, _, width = pairs.shape
    rest = pairs.reshape(count * count, width)[1:].reshape(count - 1, count + 1, width)[:, :-1]
    return rest.reshape(count, (count - 1) * width)
