"""The five classic-control tasks in JAX, with the dynamics, rewards, limits and spaces of Gymnasium 1.3's.

Written from the equations of Gymnasium's `envs/classic_control` and held to them step by step by the tests.
Gymnasium integrates in float64 (MountainCarContinuous stores float32), these in float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.environments.jax_adapter import JaxEnvironment


def _box(high: list[float]) -> spaces.Box:
    """A float32 box symmetric about 0."""
    bound = np.array(high, np.float32)
    return spaces.Box(-bound, bound, dtype=np.float32)


def _wrap_angle(angle: jax.Array) -> jax.Array:
    """-> the same angle in [-pi, pi)."""
    return angle - 2 * math.pi * jnp.floor((angle + math.pi) / (2 * math.pi))


class CartPoleParams(NamedTuple):
    gravity: float = 9.8  # m/s^2
    cart_mass: float = 1.0  # kg
    pole_mass: float = 0.1  # kg
    half_length: float = 0.5  # m, half the pole's
    force: float = 10.0  # N
    time_step: float = 0.02  # s
    angle_limit: float = 12 * 2 * math.pi / 360  # rad
    position_limit: float = 2.4  # m


class CartPoleState(NamedTuple):
    position: jax.Array  # m
    velocity: jax.Array  # m/s
    angle: jax.Array  # rad, 0 upright
    angular_velocity: jax.Array  # rad/s


class CartPole(JaxEnvironment):
    """CartPole-v1: balance a pole on a cart; +1 a step, until it falls 12 degrees or leaves 2.4 m.

    Source: Barto, Sutton and Anderson, "Neuronlike adaptive elements that can solve difficult learning control
    problems", 1983; the equations with R. V. Florian's correction, "Correct equations for the dynamics of the
    cart-pole system", 2007, without friction.
    """

    max_episode_steps = 500
    default_params = CartPoleParams()

    def reset_env(self, key: jax.Array, params: CartPoleParams) -> tuple[jax.Array, CartPoleState]:
        observation = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        return observation, CartPoleState(*observation)

    def step_env(self, key: jax.Array, state: CartPoleState, action: jax.Array, params: CartPoleParams) -> tuple:
        position, velocity, angle, angular_velocity = state
        total_mass = params.cart_mass + params.pole_mass
        pole_moment = params.pole_mass * params.half_length
        cosine, sine = jnp.cos(angle), jnp.sin(angle)

        force = jnp.where(action == 1, params.force, -params.force)
        push = (force + pole_moment * angular_velocity**2 * sine) / total_mass
        angular_acceleration = (params.gravity * sine - cosine * push) / (
            params.half_length * (4 / 3 - params.pole_mass * cosine**2 / total_mass)
        )
        acceleration = push - pole_moment * angular_acceleration * cosine / total_mass

        state = CartPoleState(  # explicit Euler: both positions move by the old velocities
            position + params.time_step * velocity,
            velocity + params.time_step * acceleration,
            angle + params.time_step * angular_velocity,
            angular_velocity + params.time_step * angular_acceleration,
        )
        fell = (jnp.abs(state.position) > params.position_limit) | (jnp.abs(state.angle) > params.angle_limit)
        return jnp.stack(state), state, jnp.float32(1.0), fell, {}

    def observation_space(self, params: CartPoleParams) -> spaces.Box:
        return _box([2 * params.position_limit, np.inf, 2 * params.angle_limit, np.inf])

    def action_space(self, params: CartPoleParams) -> spaces.Discrete:
        return spaces.Discrete(2)


class MountainCarParams(NamedTuple):
    min_position: float = -1.2
    max_position: float = 0.6
    max_speed: float = 0.07
    goal_position: float = 0.5
    goal_velocity: float = 0.0
    force: float = 0.001  # what a full push adds to the velocity
    gravity: float = 0.0025


class MountainCarState(NamedTuple):
    position: jax.Array
    velocity: jax.Array  # position per step


def _drive(state: MountainCarState, push: jax.Array, params: MountainCarParams) -> tuple[MountainCarState, jax.Array]:
    """-> state after one step with `push` in [-1, 1], whether the goal is reached."""
    velocity = state.velocity + push * params.force - params.gravity * jnp.cos(3 * state.position)
    velocity = jnp.clip(velocity, -params.max_speed, params.max_speed)
    position = jnp.clip(state.position + velocity, params.min_position, params.max_position)
    velocity = jnp.where((position == params.min_position) & (velocity < 0), 0.0, velocity)  # the wall stops the car
    reached = (position >= params.goal_position) & (velocity >= params.goal_velocity)
    return MountainCarState(position, velocity), reached


class MountainCar(JaxEnvironment):
    """MountainCar-v0: rock a weak car out of a valley with pushes left, none, right; -1 a step until the goal.

    Source: A. W. Moore, "Efficient memory-based learning for robot control", 1990.
    """

    max_episode_steps = 200
    default_params = MountainCarParams()

    def reset_env(self, key: jax.Array, params: MountainCarParams) -> tuple[jax.Array, MountainCarState]:
        state = MountainCarState(jax.random.uniform(key, minval=-0.6, maxval=-0.4), jnp.float32(0.0))
        return jnp.stack(state), state

    def step_env(self, key: jax.Array, state: MountainCarState, action: jax.Array, params: MountainCarParams) -> tuple:
        state, reached = _drive(state, action - 1.0, params)
        return jnp.stack(state), state, jnp.float32(-1.0), reached, {}

    def observation_space(self, params: MountainCarParams) -> spaces.Box:
        low = np.array([params.min_position, -params.max_speed], np.float32)
        high = np.array([params.max_position, params.max_speed], np.float32)
        return spaces.Box(low, high, dtype=np.float32)

    def action_space(self, params: MountainCarParams) -> spaces.Space:
        return spaces.Discrete(3)


class MountainCarContinuous(MountainCar):
    """MountainCarContinuous-v0: the push is a number in [-1, 1]; +100 at the goal, -0.1 action^2 a step.

    Gymnasium charges for the action as given, before it is clipped to what the motor can do.
    """

    max_episode_steps = 999
    default_params = MountainCarParams(goal_position=0.45, force=0.0015)

    def step_env(self, key: jax.Array, state: MountainCarState, action: jax.Array, params: MountainCarParams) -> tuple:
        push = action[0]
        state, reached = _drive(state, jnp.clip(push, -1.0, 1.0), params)
        reward = jnp.where(reached, 100.0, 0.0) - 0.1 * push**2
        return jnp.stack(state), state, reward, reached, {}

    def action_space(self, params: MountainCarParams) -> spaces.Space:
        return _box([1.0])


class PendulumParams(NamedTuple):
    gravity: float = 10.0  # m/s^2
    mass: float = 1.0  # kg
    length: float = 1.0  # m
    max_speed: float = 8.0  # rad/s
    max_torque: float = 2.0  # N m
    time_step: float = 0.05  # s


class PendulumState(NamedTuple):
    angle: jax.Array  # rad, 0 upright, not wrapped
    angular_velocity: jax.Array  # rad/s


class Pendulum(JaxEnvironment):
    """Pendulum-v1: swing up and hold; each step costs angle^2 + 0.1 angular_velocity^2 + 0.001 torque^2.

    The cost is of the state before the step. No episode terminates.
    """

    max_episode_steps = 200
    default_params = PendulumParams()

    def reset_env(self, key: jax.Array, params: PendulumParams) -> tuple[jax.Array, PendulumState]:
        angle, angular_velocity = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
        state = PendulumState(math.pi * angle, angular_velocity)
        return _observe_pendulum(state), state

    def step_env(self, key: jax.Array, state: PendulumState, action: jax.Array, params: PendulumParams) -> tuple:
        angle, velocity = state
        torque = jnp.clip(action[0], -params.max_torque, params.max_torque)
        cost = _wrap_angle(angle) ** 2 + 0.1 * velocity**2 + 0.001 * torque**2

        acceleration = (
            3 * params.gravity / (2 * params.length) * jnp.sin(angle) + 3 / (params.mass * params.length**2) * torque
        )
        velocity = jnp.clip(velocity + params.time_step * acceleration, -params.max_speed, params.max_speed)
        state = PendulumState(angle + params.time_step * velocity, velocity)  # semi-implicit Euler
        return _observe_pendulum(state), state, -cost, jnp.bool_(False), {}

    def observation_space(self, params: PendulumParams) -> spaces.Box:
        return _box([1.0, 1.0, params.max_speed])

    def action_space(self, params: PendulumParams) -> spaces.Box:
        return _box([params.max_torque])


def _observe_pendulum(state: PendulumState) -> jax.Array:
    return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.angular_velocity])


class AcrobotParams(NamedTuple):
    gravity: float = 9.8  # m/s^2
    link_mass: float = 1.0  # kg, each
    link_length: float = 1.0  # m, the first's
    link_center: float = 0.5  # m, from a link's joint to its centre of mass
    link_moment: float = 1.0  # kg m^2, each
    max_velocity_1: float = 4 * math.pi  # rad/s
    max_velocity_2: float = 9 * math.pi  # rad/s
    time_step: float = 0.2  # s


class AcrobotState(NamedTuple):
    angle_1: jax.Array  # rad, 0 hangs down
    angle_2: jax.Array  # rad, relative to the first link
    velocity_1: jax.Array  # rad/s
    velocity_2: jax.Array  # rad/s


class Acrobot(JaxEnvironment):
    """Acrobot-v1: swing the tip of two links above a line with torque -1, 0, +1 at the joint between them.

    -1 a step, 0 for the one that reaches the line. Source: Sutton and Barto, "Reinforcement Learning", 2018, and
    R. S. Sutton, "Generalization in reinforcement learning", 1996, with the book's equations, one step of
    Runge-Kutta 4 per action.
    """

    max_episode_steps = 500
    default_params = AcrobotParams()

    def reset_env(self, key: jax.Array, params: AcrobotParams) -> tuple[jax.Array, AcrobotState]:
        state = AcrobotState(*jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1))
        return _observe_acrobot(state), state

    def step_env(self, key: jax.Array, state: AcrobotState, action: jax.Array, params: AcrobotParams) -> tuple:
        torque, dt = action - 1.0, params.time_step

        def after(duration: float, slope: AcrobotState) -> AcrobotState:
            return AcrobotState(*(value + duration * change for value, change in zip(state, slope, strict=True)))

        slope_1 = _acrobot_derivative(state, torque, params)
        slope_2 = _acrobot_derivative(after(dt / 2, slope_1), torque, params)
        slope_3 = _acrobot_derivative(after(dt / 2, slope_2), torque, params)
        slope_4 = _acrobot_derivative(after(dt, slope_3), torque, params)
        slopes = zip(slope_1, slope_2, slope_3, slope_4, strict=True)
        angle_1, angle_2, velocity_1, velocity_2 = after(
            dt / 6, AcrobotState(*(a + 2 * (b + c) + d for a, b, c, d in slopes))
        )

        state = AcrobotState(
            _wrap_angle(angle_1),
            _wrap_angle(angle_2),
            jnp.clip(velocity_1, -params.max_velocity_1, params.max_velocity_1),
            jnp.clip(velocity_2, -params.max_velocity_2, params.max_velocity_2),
        )
        reached = -jnp.cos(state.angle_1) - jnp.cos(state.angle_1 + state.angle_2) > 1.0
        return _observe_acrobot(state), state, jnp.where(reached, 0.0, -1.0), reached, {}

    def observation_space(self, params: AcrobotParams) -> spaces.Box:
        return _box([1.0, 1.0, 1.0, 1.0, params.max_velocity_1, params.max_velocity_2])

    def action_space(self, params: AcrobotParams) -> spaces.Discrete:
        return spaces.Discrete(3)


def _acrobot_derivative(state: AcrobotState, torque: jax.Array, params: AcrobotParams) -> AcrobotState:
    """Time derivative of the state: the equations of motion of Sutton and Barto's book."""
    angle_1, angle_2, velocity_1, velocity_2 = state
    mass, length, center, moment, gravity = (
        params.link_mass,
        params.link_length,
        params.link_center,
        params.link_moment,
        params.gravity,
    )
    cosine_2, sine_2 = jnp.cos(angle_2), jnp.sin(angle_2)
    d1 = mass * center**2 + mass * (length**2 + center**2 + 2 * length * center * cosine_2) + 2 * moment
    d2 = mass * (center**2 + length * center * cosine_2) + moment
    phi_2 = mass * center * gravity * jnp.sin(angle_1 + angle_2)
    phi_1 = (
        -mass * length * center * velocity_2 * (velocity_2 + 2 * velocity_1) * sine_2
        + mass * (center + length) * gravity * jnp.sin(angle_1)
        + phi_2
    )
    acceleration_2 = (torque + d2 / d1 * phi_1 - mass * length * center * velocity_1**2 * sine_2 - phi_2) / (
        mass * center**2 + moment - d2**2 / d1
    )
    acceleration_1 = -(d2 * acceleration_2 + phi_1) / d1
    return AcrobotState(velocity_1, velocity_2, acceleration_1, acceleration_2)


def _observe_acrobot(state: AcrobotState) -> jax.Array:
    angle_1, angle_2, velocity_1, velocity_2 = state
    return jnp.stack([jnp.cos(angle_1), jnp.sin(angle_1), jnp.cos(angle_2), jnp.sin(angle_2), velocity_1, velocity_2])


CLASSIC_CONTROL: dict[str, Callable[[], JaxEnvironment]] = {
    "CartPole-v1": CartPole,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Pendulum-v1": Pendulum,
    "Acrobot-v1": Acrobot,
}
