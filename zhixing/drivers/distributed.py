"""Drivers whose workers are Ray actors, on this machine or on many.

`Averaging` is DPPO's (Heess et al., "Emergence of locomotion behaviours in rich environments", arXiv:1707.02286,
Algorithms 2 and 3): W workers collect and compute gradients, a chief waits for all but D of them, applies the mean and
sends the parameters back. `ApplyingAsTheyCome` is A3C's over processes: the chief is the parameter server. `Learning`
serves every other algorithm: remote actors feed the one learner (Horgan et al., "Distributed prioritized experience
replay", arXiv:1803.00933, for those with a replay).

The chief keeps the run. Workers keep what belongs to their environments, and it is lost with them: a resumed run begins
new episodes. Over the wire go the parameters, without what the optimiser remembers, gradients, and a few sums.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zhixing.core import Algorithm, Transition
from zhixing.drivers.asynchronous import recalled, staleness_report
from zhixing.drivers.compiled import CompiledCollector
from zhixing.drivers.crew import Crew
from zhixing.drivers.halves import Halves
from zhixing.drivers.host import HostCollector
from zhixing.drivers.loop import Driver, Loop, Run, empty_window, iteration_keys, shapes_in
from zhixing.drivers.workers import is_statistics, own_key, sum_of, worker_loop
from zhixing.environments.base import Batch
from zhixing.environments.transforms import Statistics, union
from zhixing.gradients import GradientLearner
from zhixing.learned import Learned
from zhixing.off_policy import OffPolicy

Leaves = list[np.ndarray]


class Worker:
    """A worker's environments, and what it computes; the methods take and give NumPy arrays."""

    def __init__(self, loop: Loop, batch: Batch, algorithm: Any, compiled: bool, index: int, life: int):
        """`loop` is the worker's; `life`: how many workers were in its place before."""
        self.loop, self.algorithm = loop, algorithm
        self.collector: Any = (CompiledCollector if compiled else HostCollector)(loop, batch)
        self.halves = Halves(loop)
        self._keys = jax.jit(iteration_keys, static_argnames=("rollout_length", "instances"))

        def own(key: jax.Array) -> jax.Array:
            key = own_key(key, index)
            return own_key(key, 2**31 + life) if life else key

        self.key = own(loop.keys()[3])
        self.run = jax.jit(loop.start)(algorithm, *batch.reset(own(loop.keys()[2])))
        self.learner_tree = jax.tree.structure(light(self.run.learner))
        self.minibatches: Any = None

    def take_over(self, learner: Leaves, statistics: Leaves) -> None:
        """The chief's parameters and statistics."""
        self.learner = jax.tree.unflatten(self.learner_tree, learner)
        self.run = self.run._replace(
            learner=self.learner,
            memory=(),
            transforms=with_statistics(self.run.transforms, statistics),
            window=empty_window(*self.run.window.metrics.shape),
        )

    def roll_out(self, learner: Leaves, statistics: Leaves, step: int, length: int) -> tuple[Transition, Any]:
        """-> a rollout [T, S, n, ...], and a key to learn with."""
        self.take_over(learner, statistics)
        keys, learn_key = self._keys(self.key, step, rollout_length=length, instances=self.loop.spec.num_environments)
        self.run, rollout = self.collector(self.algorithm, self.run, keys)
        return rollout, learn_key

    def seen(self) -> tuple[Leaves, Leaves]:
        """-> the statistics after the rollout, and the window of its episodes."""
        return arrays(statistics_of(self.run.transforms)), arrays(self.run.window)

    def rollout(self, learner: Leaves, statistics: Leaves, step: int, length: int) -> Any:
        """Collect -> the rollout, and what was seen."""
        rollout, _ = self.roll_out(learner, statistics, step, length)
        return arrays(rollout), self.seen()

    def collect(self, learner: Leaves, statistics: Leaves, step: int, length: int) -> Any:
        """Collect, and keep the minibatches -> their moments [S, M], metrics of the rollout, and what was seen."""
        rollout, key = self.roll_out(learner, statistics, step, length)
        self.minibatches, moments, of_rollout = self.halves.batches(self.algorithm, self.learner, rollout, key)
        self.moments_tree = jax.tree.structure(moments)
        return arrays(moments), numbers(of_rollout), self.seen()

    def gradient(self, learner: Leaves, number: int, moments: Leaves) -> Any:
        """-> the gradient of minibatch `number` of the rollout collected last, and its metrics."""
        self.learner = jax.tree.unflatten(self.learner_tree, learner)
        of_all = jax.tree.unflatten(self.moments_tree, moments)
        gradient, metrics = self.halves.gradient(self.algorithm, self.learner, self.minibatches, of_all, number)
        return arrays(gradient), numbers(metrics)

    def collect_and_gradient(self, learner: Leaves, statistics: Leaves, step: int, length: int) -> Any:
        """`collect`, and the gradient of its first minibatch."""
        moments, of_rollout, seen = self.collect(learner, statistics, step, length)
        gradient, metrics = self.gradient(learner, 0, moments)
        return gradient, metrics, (moments, of_rollout, seen)


class Chief(Driver):
    """What the drivers with a crew have in common: the run, which is whole only here."""

    saves_state = False

    def __init__(self, loop: Loop, crew: Crew):
        self.loop, self.crew, self.workers = loop, crew, len(crew.actors)
        self.part = worker_loop(loop, self.workers)
        self.before = 0  # workers that were replaced before the run was stopped
        self.halves = Halves(loop)
        self._start = jax.jit(loop.start)
        self._union = jax.jit(union)

    def start(self, algorithm: Algorithm) -> Run:
        """A run that has not made a step. Of the environments it holds nothing."""
        count, n = len(self.loop.seeds), self.loop.spec.num_environments
        space = self.loop.collecting.environment_spaces.observation
        unseen = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes_in(space, n))
        run = self._start(algorithm, (), unseen)
        fresh = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), self.loop.chain.init(n))
        return run._replace(transforms=fresh)

    def restart(self, algorithm: Algorithm, run: Run) -> Run:
        """`run` with new episodes, which the workers have begun."""
        return run._replace(memory=algorithm.forget_episodes(run.memory))

    def report(self) -> dict:
        return {"workers_replaced": self.before + self.crew.failures}

    def recall(self, report: dict) -> None:
        self.before = report.get("workers_replaced", 0)

    def close(self) -> None:
        """End the workers."""
        self.crew.close()

    def message(self, run: Run) -> tuple[Any, Any]:
        """-> what every worker is told, in Ray's store: the parameters, the statistics."""
        put = self.crew.ray.put
        return put(arrays(light(run.learner))), put(arrays(statistics_of(run.transforms)))

    def take_in(self, run: Run, seen: Sequence[tuple[Leaves, Leaves]]) -> Run:
        """`run` with what the workers saw: statistics, episodes that ended."""
        if not seen:
            return run
        statistics, windows = zip(*seen, strict=True)
        old = statistics_of(run.transforms)
        parts = [jax.tree.unflatten(jax.tree.structure(old), part) for part in statistics]
        merged = [self._union(x, of_x) for x, *of_x in zip(old, *parts, strict=True)]
        tree = jax.tree.structure(run.window)
        return run._replace(
            transforms=with_statistics(run.transforms, jax.tree.leaves(merged)),
            window=sum_of([run.window, *(jax.tree.unflatten(tree, window) for window in windows)]),
        )


class Averaging(Chief):
    """The mean of all workers' gradients, without the slowest `late` of them; the same learner as one worker's.

    A worker that is late with its rollout or a gradient sits out the rest of the iteration, and what it has not
    delivered is dropped, as in the paper. The metric `took_part` is the part of the workers whose gradients counted.
    """

    def __init__(self, loop: Loop, crew: Crew, late: int):
        super().__init__(loop, crew)
        self.late = late

    def advance(self, algorithm: GradientLearner, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` times collect `rollout_length` steps and learn from them; `run` is consumed."""
        for _ in range(iterations):
            while (after := self.iteration(algorithm, run, rollout_length)) is None:
                pass  # nobody of those who began it is left: once more, from the same parameters
            run = after
        return run

    def iteration(self, algorithm: Any, run: Run, length: int) -> Run | None:
        needed = self.workers - self.late
        step = int(run.learner.clock.steps)
        message = self.message(run)
        collected: dict[int, Any] = {}
        while len(collected) < needed:
            free = [worker for worker in self.crew.idle() if worker not in collected]
            if free:
                collected |= self.crew.all(free, "collect", (*message, step, length), needed - len(collected))
            else:
                self.crew.next_answer()  # of one that was late the last time
        moments, of_rollout, seen = zip(*collected.values(), strict=True)
        pooled = [np.stack(x) for x in zip(*moments, strict=True)]
        tree = self.moments_tree(algorithm)
        pooled = arrays(algorithm.pooled(jax.tree.unflatten(tree, pooled), lambda x: x.mean(0)))

        learner, team, all_metrics, took_part = run.learner, list(collected), [], 0.0
        for number in range(algorithm.updates_per_iteration):
            parameters = message[0] if number == 0 else self.crew.ray.put(arrays(light(learner)))
            answers = self.crew.all(team, "gradient", (parameters, number, pooled), min(len(team), needed))
            if not answers:
                return None
            team = list(answers)
            gradients, metrics = zip(*answers.values(), strict=True)
            mean = [np.mean(x, axis=0) for x in zip(*gradients, strict=True)]
            gradient = jax.tree.unflatten(self.gradient_tree(algorithm), mean)
            means = {name: np.mean([m[name] for m in metrics], axis=0) for name in metrics[0]}
            learner = self.halves.apply(algorithm, learner, gradient, means)
            all_metrics.append(means)
            took_part += len(team) / self.workers / algorithm.updates_per_iteration

        run = self.take_in(run, seen)
        means = {name: np.mean([m[name] for m in of_rollout], axis=0) for name in of_rollout[0]}
        means["took_part"] = np.full(len(self.loop.seeds), took_part, np.float32)
        steps = length * self.loop.spec.num_environments
        learner, window = self.halves.finish(algorithm, learner, run.window, means, all_metrics, steps)
        return run._replace(learner=learner, window=window)

    def moments_tree(self, algorithm: Any) -> Any:
        return jax.tree.structure(self.shapes(algorithm)[0])

    def gradient_tree(self, algorithm: Any) -> Any:
        return jax.tree.structure(self.shapes(algorithm)[1])

    def shapes(self, algorithm: Any) -> tuple[Any, Any]:
        """The shapes of a minibatch's moments and of its gradient."""
        if getattr(self, "_shapes", None) is None:
            key = jax.ShapeDtypeStruct((2,), jnp.uint32)

            def first(key: jax.Array) -> tuple[Any, Any]:
                state = algorithm.init(key, self.part.spec)
                rollout = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.part.example(algorithm))
                minibatch = jax.tree.map(lambda x: x[0], algorithm.batches(state, rollout, key))
                moments = algorithm.moments(minibatch)
                return moments, algorithm.gradient(state, algorithm.prepared(minibatch, moments))[0]

            self._shapes = jax.eval_shape(first, key)
        return self._shapes


class ApplyingAsTheyCome(Averaging):
    """Each worker's gradient as it comes, computed from parameters that may be old: A3C with a parameter server."""

    def __init__(self, loop: Loop, crew: Crew):
        super().__init__(loop, crew, late=0)
        self.staleness: Counter[int] = Counter()

    def report(self) -> dict:
        return super().report() | staleness_report(self.staleness)

    def recall(self, report: dict) -> None:
        super().recall(report)
        self.staleness = recalled(report)

    def advance(self, algorithm: GradientLearner, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` rollouts of `rollout_length` steps for each worker, by whoever is free; `run` is consumed."""
        part_steps = rollout_length * self.part.spec.num_environments
        begin, left, version = int(run.learner.clock.steps), iterations * self.workers, 0
        done = [0] * self.workers  # rollouts that each has begun
        tasks: dict[int, dict[str, Any]] = {}  # of each busy worker: from which version, which minibatch, ...

        def go_on(worker: int) -> None:
            """The next rollout, if there is one left."""
            nonlocal left
            if left:
                left -= 1
                step = begin + done[worker] * part_steps
                done[worker] += 1
                tasks[worker] = {"version": version, "number": 0, "metrics": []}
                self.crew.ask(worker, "collect_and_gradient", *self.message(run), step, rollout_length)

        for worker in range(self.workers):
            go_on(worker)
        while tasks:
            worker, answer = self.crew.next_answer()
            task = tasks.pop(worker)
            if answer is None:  # it was replaced: its rollout is to be made by somebody
                left += 1
                go_on(worker)
                continue
            if task["number"] == 0:
                gradient, metrics, task["rollout"] = answer
            else:
                gradient, metrics = answer
            stale = version - task["version"]
            self.staleness[stale] += 1
            version += 1
            metrics["staleness"] = np.full(len(self.loop.seeds), stale, np.float32)
            task["metrics"].append(metrics)
            tree = self.gradient_tree(algorithm)
            learner = self.halves.apply(algorithm, run.learner, jax.tree.unflatten(tree, gradient), metrics)
            run = run._replace(learner=learner)
            if task["number"] + 1 < algorithm.updates_per_iteration:
                tasks[worker] = task | {"version": version, "number": task["number"] + 1}
                moments = task["rollout"][0]
                parameters = self.crew.ray.put(arrays(light(run.learner)))
                self.crew.ask(worker, "gradient", parameters, task["number"] + 1, moments)
                continue
            _, of_rollout, seen = task["rollout"]
            run = self.take_in(run, [seen])
            arguments = run.learner, run.window, of_rollout, task["metrics"], part_steps
            learner, window = self.halves.finish(algorithm, *arguments)
            run = run._replace(learner=learner, window=window)
            go_on(worker)
        return run


class Learning(Chief):
    """The chief learns from the rollouts of all workers, as if it had made them itself: for any algorithm.

    With a replay, the workers act with the parameters from before the last learning phase, beside which they act.
    """

    def __init__(self, loop: Loop, crew: Crew):
        super().__init__(loop, crew)
        self._learn = jax.jit(loop.learn, donate_argnames="run")
        self._keys = jax.jit(iteration_keys, static_argnames=("rollout_length", "instances"))

    def advance(self, algorithm: Algorithm, run: Run, iterations: int, rollout_length: int) -> Run:
        """`iterations` times collect `rollout_length` steps and learn from them; `run` is consumed."""
        instances = self.loop.spec.num_environments
        step = int(run.learner.clock.steps)
        tree = jax.tree.structure(self.loop.example(algorithm))
        overlap = isinstance(algorithm, OffPolicy)
        failures = self.crew.failures

        def ask(workers: Sequence[int]) -> None:
            message = self.message(run)
            for worker in workers:
                self.crew.ask(worker, "rollout", *message, step, rollout_length)

        for iteration in range(iterations):
            if iteration == 0 or not overlap:
                ask(range(self.workers))
            answers: dict[int, Any] = {}
            while len(answers) < self.workers:
                worker, answer = self.crew.next_answer()
                if answer is None:
                    ask([worker])
                else:
                    answers[worker] = answer
            leaves = [answers[worker][0] for worker in range(self.workers)]
            rollout = jax.tree.unflatten(tree, [np.concatenate(x, axis=2) for x in zip(*leaves, strict=True)])
            run = self.take_in(run, [answers[worker][1] for worker in range(self.workers)])
            _, key = self._keys(run.key, step, rollout_length=rollout_length, instances=instances)
            step += rollout_length * instances
            if overlap and iteration + 1 < iterations:
                ask(range(self.workers))
            if self.crew.failures > failures:  # what comes next in the replay is not of the same episodes
                failures = self.crew.failures
                run = run._replace(memory=algorithm.forget_episodes(run.memory))
            run = self._learn(algorithm, run, rollout, key)
        return run


def light(learner: Any) -> Any:
    """A learner without what its optimisers remember: all that acting and gradients need."""

    def strip(x: Any) -> Any:
        return Learned(x.frozen, ()) if isinstance(x, Learned) else x

    return jax.tree.map(strip, learner, is_leaf=lambda x: isinstance(x, Learned))


def arrays(tree: Any) -> Leaves:
    """The leaves of `tree` in NumPy: what goes over the wire."""
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def numbers(metrics: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in metrics.items()}


def statistics_of(transforms: Any) -> list[Statistics]:
    """What the workers share of the transforms' state: the running statistics."""
    return [x for x in jax.tree.leaves(transforms, is_leaf=is_statistics) if is_statistics(x)]


def with_statistics(transforms: Any, leaves: Sequence[Any]) -> Any:
    """`transforms` with other statistics, whose leaves are given."""
    new = iter(jax.tree.unflatten(jax.tree.structure(statistics_of(transforms)), list(leaves)))
    return jax.tree.map(lambda x: next(new) if is_statistics(x) else x, transforms, is_leaf=is_statistics)


def worker_actor(ray: Any) -> Any:
    """The class of the remote workers. Each has a core to itself."""

    @ray.remote(num_cpus=1, max_restarts=0)
    class RemoteWorker:
        def __init__(self, paths: Sequence[str], packed: bytes, index: int, life: int):
            import sys

            sys.path += [path for path in paths if path not in sys.path]  # where a user's own environment may be
            from ray import cloudpickle

            from zhixing import runtime
            from zhixing.assembly import build_worker

            runtime.fit_processor(1)
            runtime.keep_compiled_programs()
            config, environment, seeds = cloudpickle.loads(packed)
            self.worker = build_worker(config, environment, seeds, index, life)

        def collect(self, *arguments: Any) -> Any:
            return self.worker.collect(*arguments)

        def gradient(self, *arguments: Any) -> Any:
            return self.worker.gradient(*arguments)

        def collect_and_gradient(self, *arguments: Any) -> Any:
            return self.worker.collect_and_gradient(*arguments)

        def rollout(self, *arguments: Any) -> Any:
            return self.worker.rollout(*arguments)

        def process(self) -> int:
            """Its number in the system."""
            import os

            return os.getpid()

    return RemoteWorker
