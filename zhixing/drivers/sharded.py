"""The compiled driver on many devices: environments and minibatches split, gradients averaged.

The environments of each seed are cut into W shards. A shard collects with its own environments and random numbers and
computes the gradients of its part of each minibatch; `collective.mean` makes one gradient of them, one set of
statistics, one learner. So the run is defined by the number of its shards and not by that of the devices: these share
the shards evenly, by `shard_map`, and a device that has several of them runs them side by side, by `vmap`. What one
device computes and what W compute differ by the order of sums alone.

On several hosts the same program runs in a process on each, around copies of the same run.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zhixing import collective
from zhixing.core import Algorithm
from zhixing.drivers.compiled import advance
from zhixing.drivers.loop import Driver, Loop, Run, empty_window
from zhixing.drivers.workers import is_statistics, worker_loop
from zhixing.environments.base import Batch
from zhixing.errors import UsageError

DEVICES, BESIDE = "devices", "beside"  # the two axes: across the devices, and side by side on each


class ShardedDriver(Driver):
    """Runs a `Loop` around a pure batch, in shards. Same interface as the compiled driver."""

    saves_state = True

    def __init__(
        self, loop: Loop, whole: Batch, batch: Batch, shards: int, devices: Sequence[jax.Device] | None = None
    ):
        """`whole`: the batch of all environments, to begin with; `batch`: that of a single shard.

        `devices`: at most so many share the shards, as many as these can be dealt out to evenly; None: all of them.
        """
        self.loop, self.shards, self.batch = loop, shards, batch
        self.part = worker_loop(loop, shards)
        devices = devices or jax.devices()
        count = max(n for n in range(1, len(devices) + 1) if shards % n == 0)
        self.mesh = Mesh(np.array(devices[:count]), (DEVICES,))
        self.hosts = jax.process_count()
        if self.hosts > 1 and count < len(devices):
            raise UsageError(
                f"workers.count is {shards} and the hosts have {len(devices)} devices; take a multiple of these"
            )
        self._start = jax.jit(lambda algorithm, key: loop.start(algorithm, *whole.reset(key)))
        everywhere = NamedSharding(self.mesh, PartitionSpec()) if self.hosts > 1 else None
        self._advance = jax.jit(
            self.program, static_argnames="rollout_length", donate_argnames="run", out_shardings=everywhere
        )

    def start(self, algorithm: Algorithm) -> Run:
        """A run that has not made a step: the same as without shards."""
        return self._start(algorithm, self.loop.keys()[2])

    def restart(self, algorithm: Algorithm, run: Run) -> Run:
        """Never asked for: the environments' state lies in the run."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""

    def advance(self, algorithm: Algorithm, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` times collect `rollout_length` steps and learn from them; `run` is consumed."""
        if self.hosts == 1:
            return self._advance(algorithm, run, jnp.int32(iterations), rollout_length=rollout_length)
        run = multihost_utils.host_local_array_to_global_array(run, self.mesh, PartitionSpec())
        run = self._advance(algorithm, run, np.int32(iterations), rollout_length=rollout_length)
        return multihost_utils.global_array_to_host_local_array(run, self.mesh, PartitionSpec())

    def agreed(self, iterations: int, stop: bool) -> tuple[int, bool]:
        """What the first process says: the clocks of the others run differently."""
        if self.hosts == 1:
            return iterations, stop
        iterations, stop = multihost_utils.broadcast_one_to_all((np.int32(iterations), np.bool_(stop)))
        return int(iterations), bool(stop)

    def program(self, algorithm: Algorithm, run: Run, iterations: jax.Array, rollout_length: int) -> Run:
        """The whole of it, with the shards' parts of the run along a first axis."""
        window = empty_window(*run.window.metrics.shape)
        parts = self.cut(run), jnp.arange(self.shards)
        on_one_device = jax.shard_map(
            partial(self.on_one_device, rollout_length=rollout_length),
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(DEVICES), PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec(DEVICES),
            check_vma=False,
        )
        nothing: dict[str, Any] = dict.fromkeys(PARTS, ())
        whole = run._replace(**nothing, window=window)
        after: Run = on_one_device(algorithm, parts, whole, iterations)
        one: Run = jax.tree.map(lambda x: x[0], after._replace(**nothing))  # the same in all shards
        old, new = run.window, after.window
        window = jax.tree.map(jnp.add, old, one.window)._replace(
            episodes=old.episodes + new.episodes.sum(0),
            returns=old.returns + new.returns.sum(0),
            lengths=old.lengths + new.lengths.sum(0),
            first_bad=jnp.where(old.first_bad < 0, one.window.first_bad, old.first_bad),
        )
        return self.joined(after, one)._replace(window=window)

    def on_one_device(
        self, algorithm: Algorithm, parts: Any, whole: Run, iterations: jax.Array, rollout_length: int
    ) -> Run:
        """A device's shards, `parts` [W / D, ...] -> their runs [W / D, ...]."""

        def one(part: dict, shard: jax.Array) -> Run:
            key = jnp.where(shard == 0, whole.key, jax.vmap(lambda k: jax.random.fold_in(k, shard))(whole.key))
            run = whole._replace(**part, key=key)
            with collective.over((DEVICES, BESIDE), self.shards):
                after = advance(self.part, self.batch, algorithm, run, iterations, rollout_length)
            return after._replace(key=whole.key)

        return jax.vmap(one, axis_name=BESIDE)(*parts)

    def cut(self, run: Run) -> dict[str, Any]:
        """The parts of `run` that belong to environments, [S, N, ...] -> [W, S, N / W, ...]; statistics in each."""

        def one(x: Any) -> Any:
            if is_statistics(x):
                return jax.tree.map(lambda y: jnp.broadcast_to(y, (self.shards, *y.shape)), x)
            return jnp.moveaxis(x.reshape(x.shape[0], self.shards, -1, *x.shape[2:]), 1, 0)

        return {name: jax.tree.map(one, getattr(run, name), is_leaf=is_statistics) for name in PARTS}

    def joined(self, after: Run, one: Run) -> Run:
        """The inverse of `cut`, of the runs [W, ...] of all shards, into `one`."""

        def join(x: Any) -> Any:
            if is_statistics(x):
                return jax.tree.map(lambda y: y[0], x)
            x = jnp.moveaxis(x, 0, 1)
            return x.reshape(x.shape[0], -1, *x.shape[3:])

        return one._replace(**{name: jax.tree.map(join, getattr(after, name), is_leaf=is_statistics) for name in PARTS})


PARTS = ("environment", "transforms", "observation", "carry", "episodes")
