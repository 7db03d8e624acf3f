"""EnvPool: environments in C++ threads, stepped from inside a compiled program through XLA custom calls.

EnvPool resets an instance on the step after the one that ended it; `Batch` promises the reset in the same step.
Its custom calls carry exactly `batch_size` rows, so a pool whose batch is the whole set cannot step the ended
instances alone. Therefore the pool is asynchronous with a small batch of `block` rows: a step is M / block sends
and as many receives, and the ended instances go round once more, in as few blocks as hold them. A last block that
they do not fill is filled with spare instances that nobody looks at.
"""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.environments.base import Batch, Environment, Timestep
from zhixing.environments.gymnasium_adapter import instance_seed
from zhixing.errors import UsageError, unknown

# Rows of a custom call. More rows: fewer calls a step; but a reset steps up to BLOCK - 1 spare instances for nothing.
BLOCK = 4
SIGN = np.uint32(0x80000000)  # the sign's bit of a float32, and of the high word of a float64
UNROLL = 8  # calls written out in a row, without a loop around them


def _import_envpool() -> Any:
    try:
        import envpool  # 0.7 GB of packages: only on demand
    except ImportError:
        raise UsageError("the envpool backend needs EnvPool; pip install 'zhixing[envpool]'") from None
    return envpool


class EnvPoolAdapter(Environment):
    """An EnvPool environment by its id.

    `num_threads`: C++ threads that step one batch; None: see `default_threads`. `options`: EnvPool's own
    (`envpool.make_spec(id).config_keys`). Raises UsageError: EnvPool missing, unknown id or option, dictionary spaces.
    float64 observations and actions become float32.
    An episode that ends by itself exactly at its limit counts as truncated: EnvPool does not tell the two apart.
    Source: Weng et al. 2022, EnvPool, https://arxiv.org/abs/2206.10558
    """

    backend = "envpool"
    compiled = True
    saves_state = False

    def __init__(
        self,
        id: str,
        max_episode_steps: int | None = None,
        num_threads: int | None = None,
        **options: Any,
    ) -> None:
        envpool = _import_envpool()
        if sys.platform != "linux":
            raise UsageError("EnvPool steps inside compiled programs on Linux only; use the gymnasium backend")
        if id not in envpool.list_all_envs():
            raise unknown("EnvPool environment", id, envpool.list_all_envs())
        if num_threads is not None and num_threads < 1:
            raise UsageError(f"num_threads is {num_threads}; give at least 1")
        if max_episode_steps is not None:
            if max_episode_steps < 1:
                raise UsageError(f"max_episode_steps is {max_episode_steps}; give at least 1")
            options["max_episode_steps"] = max_episode_steps
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*Box (low|high)'s precision")  # nothing a user can change
                spec = envpool.make_spec(id, **options)
                observation_space, action_space = (
                    spec.gymnasium_observation_space,
                    spec.gymnasium_action_space,
                )
        except Exception as error:
            raise UsageError(f"EnvPool cannot make '{id}' with {options}: {error}; see EnvPool's options") from error
        self.id = id
        self.options = options
        self.num_threads = num_threads
        self.max_episode_steps = spec.config.max_episode_steps
        self.observation_space = _convert_space(observation_space, f"the observations of '{id}'")
        self.action_space = _convert_space(action_space, f"the actions of '{id}'")

    def batch(self, seeds: Sequence[int], num_environments: int) -> "EnvPoolBatch":
        """`len(seeds)` x `num_environments` instances, each with a random stream of its own."""
        return EnvPoolBatch(self, seeds, num_environments)


def default_threads(num_instances: int) -> int:
    """C++ threads for a batch of `num_instances`: every core this process may use.

    They work while the compiled program waits for them, so that they take nothing from it: with LunarLander-v3, two
    threads on two cores made 1.5 times the steps of one at 8 instances, and 1.8 times at 64.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, num_instances)


def _convert_space(space: gymnasium.Space, what: str) -> gymnasium.Space:
    """EnvPool's space as Gymnasium would state it: 32-bit, and infinite where EnvPool gives a type's limits."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n), start=int(space.start))
    if not isinstance(space, spaces.Box):
        raise UsageError(f"{what} are a {type(space).__name__} space, which the envpool backend lacks; use another")
    if not np.issubdtype(space.dtype, np.floating):
        return spaces.Box(
            space.low,
            space.high,
            dtype=np.uint8 if space.dtype == np.uint8 else np.int32,
        )
    # EnvPool's "no bound" is C++'s numeric_limits: min(), the smallest positive number, and max()
    limits = np.finfo(space.dtype)
    low = np.where((space.low == limits.tiny) | (space.low <= limits.min), -np.inf, space.low)
    high = np.where(space.high >= limits.max, np.inf, space.high)
    return spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


class _Rows(NamedTuple):
    """What one receive tells of each of its instances; leading axis [rows]."""

    instance: jax.Array
    observation: jax.Array
    reward: jax.Array
    done: jax.Array
    truncated: jax.Array


class EnvPoolBatch(Batch):
    """S x N instances in one pool; the state is a token whose only use is to order the calls.

    `reset` is called from Python, since EnvPool offers no compiled way to break off an episode; `step` is traced.
    A program may not run while another one that uses the same batch still does. The address of the pool is a
    constant of the program: JAX's persistent cache never mixes up two pools, and finds none of them again.
    """

    def __init__(self, environment: EnvPoolAdapter, seeds: Sequence[int], num_environments: int) -> None:
        if not seeds or num_environments < 1:
            raise UsageError(
                f"a batch of {len(seeds)} seeds x {num_environments} environments; give at least 1 of each"
            )
        envpool = _import_envpool()
        self._shape = (len(seeds), num_environments)
        self._size = len(seeds) * num_environments
        self._block = math.gcd(self._size, BLOCK)
        num_instances = self._size + self._block - 1
        instance_seeds = [instance_seed(seed, index) for seed in seeds for index in range(num_environments)]
        self._pool = envpool.make(
            environment.id,
            env_type="gymnasium",
            num_envs=num_instances,
            batch_size=self._block,
            num_threads=environment.num_threads or default_threads(self._size),
            seed=instance_seeds + list(range(self._block - 1)),
            **environment.options,
        )
        self._observation_shape = environment.observation_space.shape or ()
        self._send, self._receive = _custom_calls(self._pool)
        self._receive_started = jax.jit(self._receive_all)

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Start an episode in every instance, whatever it was doing; the key is unused (see `instance_seed`)."""
        self._check_open()
        # Called, not traced: a callback from inside a program could wait for ever for the thread that waits for it.
        self._pool._reset(np.arange(self._size, dtype=np.int32))
        token, rows = jax.block_until_ready(self._receive_started(jnp.zeros(8, jnp.uint8)))
        return token, self._unflatten(rows.observation, self._observation_shape)

    def step(self, state: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, Timestep]:
        """One step of every instance, and the first observation of each that ended."""
        self._check_open()
        action = action.reshape(self._size, *action.shape[2:])
        token, rows = self._step_all(state, action)
        token, observation = self._restart(token, rows.done, rows.observation, action)
        return token, Timestep(
            observation=self._unflatten(observation, self._observation_shape),
            next_observation=self._unflatten(rows.observation, self._observation_shape),
            reward=self._unflatten(rows.reward),
            terminated=self._unflatten(rows.done & ~rows.truncated),
            truncated=self._unflatten(rows.truncated),
        )

    def close(self) -> None:
        """Release the instances; no program compiled with this batch may be running, or run again."""
        self._pool = None

    def _check_open(self) -> None:
        if self._pool is None:
            raise UsageError("this batch of EnvPool environments is closed; make a new one")

    def _unflatten(self, value: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        return value.reshape(*self._shape, *shape)

    def _step_all(self, token: jax.Array, action: jax.Array) -> tuple[jax.Array, _Rows]:
        blocks = jax.tree.map(
            lambda value: value.reshape(-1, self._block, *value.shape[1:]),
            (jnp.arange(self._size), action),
        )
        token, _ = jax.lax.scan(
            lambda token, block: (self._send(token, *block), None),
            token,
            blocks,
            unroll=UNROLL,
        )
        return self._receive_all(token)

    def _receive_all(self, token: jax.Array) -> tuple[jax.Array, _Rows]:
        blocks = self._size // self._block
        token, rows = jax.lax.scan(lambda token, _: self._receive(token), token, length=blocks, unroll=UNROLL)
        rows = jax.tree.map(lambda value: value.reshape(self._size, *value.shape[2:]), rows)
        # rows come in the order in which the threads finish
        order = jnp.zeros(self._size, jnp.int32).at[rows.instance].set(jnp.arange(self._size), unique_indices=True)
        return token, jax.tree.map(lambda value: value[order], rows)

    def _restart(
        self,
        token: jax.Array,
        ended: jax.Array,
        observation: jax.Array,
        action: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Step the ended instances alone, which resets them; `observation` with theirs replaced."""
        waiting = jnp.nonzero(ended, size=self._size)[0]
        behind = jnp.arange(self._size) - ended.sum()  # behind the ended ones: spares, all distinct within a block
        waiting = jnp.where(behind < 0, waiting, self._size + behind)

        def more(carry: tuple) -> jax.Array:
            return carry[0] * self._block < ended.sum()

        def block(carry: tuple) -> tuple:
            index, token, observation = carry
            instances = jax.lax.dynamic_slice_in_dim(waiting, index * self._block, self._block)
            token = self._send(token, instances, action[: self._block])
            token, rows = self._receive(token)
            return (
                index + 1,
                token,
                observation.at[rows.instance].set(rows.observation, mode="drop"),
            )

        _, token, observation = jax.lax.while_loop(more, block, (jnp.int32(0), token, observation))
        return token, observation


def _custom_calls(pool: Any) -> tuple:
    """`send(token, instances [rows], action [rows, ...]) -> token` and `receive(token) -> token, _Rows`."""
    functions = {}
    for name, (address, (inputs, outputs), (cpu_capsule, _)) in pool._xla():
        target = f"zhixing.{type(pool).__module__}.{type(pool).__qualname__}.{name}"
        jax.ffi.register_ffi_target(target, cpu_capsule, platform="cpu")
        results = [jax.ShapeDtypeStruct(*_words(shape, dtype)) for dtype, shape in outputs]
        call = jax.ffi.ffi_call(target, results, has_side_effect=True, input_output_aliases={0: 0})
        functions[name] = (
            call,
            np.int64(int.from_bytes(address, sys.byteorder)),
            inputs,
            outputs,
        )
    send_call, handle, inputs, _ = functions["send"]
    receive_call, _, _, outputs = functions["recv"]
    action_dtype, action_shape = inputs[-1]
    dtypes = [dtype for dtype, _ in outputs]
    fields = ["token", *pool._state_keys]

    def send(token: jax.Array, instances: jax.Array, action: jax.Array) -> jax.Array:
        instances = instances.astype(jnp.int32)
        return send_call(
            token,
            instances,
            instances,
            _encode(action.reshape(action_shape), action_dtype),
            handle=handle,
        )[0]

    def receive(token: jax.Array) -> tuple[jax.Array, _Rows]:
        values = dict(
            zip(
                fields,
                map(_decode, receive_call(token, handle=handle), dtypes),
                strict=True,
            )
        )
        rows = _Rows(
            values["info:env_id"],
            values["obs"],
            values["reward"],
            values["done"],
            values["trunc"],
        )
        return values["token"], rows

    return send, receive


def _words(shape: Sequence[int], dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
    """The buffer of a raw value: JAX has no 64-bit types unless it is told so, hence pairs of 32-bit words."""
    return ((*shape, 2), np.dtype(np.uint32)) if dtype.itemsize == 8 else (tuple(shape), dtype)


def _encode(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """`value` as the raw buffer of `dtype` that EnvPool reads."""
    if dtype.itemsize < 8:
        return value.astype(dtype)
    if dtype != np.float64:
        value = value.astype(jnp.int32)
        return jax.lax.bitcast_convert_type(jnp.stack([value, value >> 31], -1), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> 23) & 0xFF
    fraction = bits & 0x7FFFFF
    # the exponent's bias goes from 127 to 1023; zero (and what is below 1e-38) and infinity keep their marks
    exponent = jnp.select(
        [exponent == 0, exponent == 0xFF],
        [jnp.uint32(0), jnp.uint32(0x7FF)],
        exponent + 896,
    )
    fraction = jnp.where(exponent == 0, 0, fraction)
    high = (bits & SIGN) | (exponent << 20) | (fraction >> 3)
    return jnp.stack([fraction << 29, high], -1)


def _decode(buffer: jax.Array, dtype: np.dtype) -> jax.Array:
    """The raw buffer of `dtype` as a value of at most 32 bits; float64 rounds to the nearest float32."""
    if dtype.itemsize < 8:
        return buffer
    low, high = buffer[..., 0], buffer[..., 1]
    if dtype != np.float64:
        return jax.lax.bitcast_convert_type(low, jnp.int32)
    exponent = (high >> 20) & 0x7FF
    fraction = ((high & 0xFFFFF) << 3) | (low >> 29)
    rest = low & 0x1FFFFFFF
    round_up = (rest > 0x10000000) | ((rest == 0x10000000) & (fraction & 1 == 1))
    normal = (((exponent - 896) << 23) | fraction) + round_up  # a carry runs over into the exponent, as it should
    is_nan = (exponent == 0x7FF) & ((high & 0xFFFFF) | low != 0)
    bits = jnp.select(
        [exponent <= 896, is_nan, exponent >= 896 + 0xFF],
        [jnp.uint32(0), jnp.uint32(0x7FC00000), jnp.uint32(0x7F800000)],
        normal,
    )
    return jax.lax.bitcast_convert_type((high & SIGN) | bits, jnp.float32)
