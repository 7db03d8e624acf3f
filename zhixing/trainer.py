"""The `Trainer`: one run from its first step, or from a checkpoint, to its last."""

import contextlib
import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zhixing import checkpoint, statistics
from zhixing import config as configs
from zhixing.assembly import build_driver, build_evaluator, build_loop
from zhixing.checkpoint import Checkpoints
from zhixing.config import Config
from zhixing.drivers.loop import Driver, Run, empty_window
from zhixing.environments.base import Environment
from zhixing.errors import Diverged, Interrupted, UsageError
from zhixing.evaluate import predicts, score
from zhixing.records import LiveView, Records

PIECE_SECONDS = 0.3  # how long the program runs between two looks at Ctrl-C and the progress bar


class Trainer:
    """One run, from its first step or from a checkpoint to its last."""

    def __init__(self, config: Config, environment: Environment, directory: Path, resume: bool = False):
        """With `resume`, from the newest whole checkpoint; from the beginning where the run was killed before any."""
        self.config, self.environment, self.directory = config, environment, directory
        self.algorithm = config.algorithm
        self.loop = build_loop(config, environment)
        self.length = self.algorithm.steps_per_iteration  # T
        self.iteration_steps = self.length * config.num_environments
        self.record_every = self.whole_iterations(config.record.every, 100)
        self.evaluate_every = self.whole_iterations(config.evaluation.every, 20)
        self.metric_names = self.loop.metric_names(self.algorithm)

        self.checkpoints = Checkpoints(directory / "checkpoints", config.record.keep_checkpoints)
        self.step, self.seconds, self.best, self.compile_seconds = 0, 0.0, -np.inf, 0.0
        path, problems = self.checkpoints.latest_readable() if resume else (None, [])
        self.problems = problems
        self.metadata = checkpoint.read(path)[1] if path else {"step": 0}
        if path:
            self.require_same_settings(self.metadata, path)
        self.begun = path is not None
        self.driver = self.make_driver(self.metadata["step"])
        self.run = self.restored(path) if path else self.first_run()
        self.evaluator = build_evaluator(config, environment, self.loop, config.evaluation.episodes)

    def require_same_settings(self, metadata: dict[str, Any], path: Path) -> None:
        """Raise UsageError unless the checkpoint was trained with these settings, the length and the records apart."""
        trained, wanted = metadata["config"], configs.to_mapping(self.config)
        for name, before, after in configs.differences(trained, wanted):
            if name != "total_steps" and not name.startswith(("evaluation.", "record.")):
                raise UsageError(
                    f"{self.directory / 'config.yaml'} says {name} {after}, but {path.name} was trained with {before}; "
                    "put it back, or train a new run"
                )
        if metadata["step"] > self.config.total_steps:
            raise UsageError(
                f"the run has made {metadata['step']} steps already; give more than that as --total-steps, "
                f"not {self.config.total_steps}"
            )

    def whole_iterations(self, every: int | None, times: int) -> int:
        """`every` steps, or a `times`-th of the run, rounded up to whole iterations."""
        wanted = self.config.total_steps / times if every is None else every
        return int(np.ceil(wanted / self.iteration_steps)) * self.iteration_steps

    def make_driver(self, step: int) -> Driver:
        seeds = self.loop.seeds
        if step and not self.environment.saves_state:  # new episodes, not those of the beginning once more
            seeds = tuple(int(np.random.SeedSequence((seed, step)).generate_state(1)[0] >> 1) for seed in seeds)
        return build_driver(self.config, self.environment, self.loop, seeds, self.directory)

    def first_run(self) -> Run:
        """A run that has not made a step."""
        run = self.driver.start(self.algorithm)
        if self.config.start.run is None:
            return run
        from zhixing.skills import started  # it imports DIAYN, SAC, ...

        return run._replace(learner=started(self.config, self.environment, self.loop, run.learner))

    def restored(self, path: Path) -> Run:
        """The run as the checkpoint holds it, with new episodes where the environments could not be saved."""
        fresh = self.driver.start(self.algorithm)
        run, metadata = checkpoint.restore(path, self.saved(fresh))
        self.step, self.seconds, self.best = metadata["step"], metadata["seconds"], metadata["best"]
        self.compile_seconds = metadata["compile_seconds"]
        self.driver.recall(metadata.get("driver", {}))
        clock = run.learner.clock  # the run may go on for longer than it was first told
        total = jax.numpy.int32(self.config.total_steps)
        run = run._replace(learner=run.learner._replace(clock=type(clock)(clock.steps, clock.updates, total)))
        if self.driver.saves_state:
            return run
        return self.driver.restart(
            self.algorithm,
            fresh._replace(
                learner=run.learner, memory=run.memory, transforms=run.transforms, key=run.key, window=run.window
            ),
        )

    def saved(self, run: Run) -> Run:
        """What a checkpoint holds: everything, or everything but the episodes under way."""
        if self.driver.saves_state:
            return run
        nothing: Any = ()
        return run._replace(environment=nothing, observation=nothing, carry=nothing, episodes=nothing)

    # ------------------------------------------------------------------------------------------ the run

    def fit(self, records: Records, view: LiveView, stopped: Callable[[], bool]) -> dict[str, Any]:
        """Train to the end and return the summary. Raises Interrupted or Diverged with the state saved."""
        total = self.config.total_steps
        self.compile(self.length)
        if not self.begun:
            self.save(self.row(records, view, evaluate=True))
        elif self.step == total:
            view.message(f"the run is over; to go on, give more than {total} as --total-steps")
        saved_at, piece = time.perf_counter(), 1
        while self.step < total:
            mark = min(next_multiple(self.step, every) for every in (self.record_every, self.evaluate_every))
            piece = self.advance(min(mark, total), piece, view)
            at_mark = self.step in (mark, total)
            evaluate = self.step % self.evaluate_every == 0 or self.step == total
            improved = self.row(records, view, evaluate) if at_mark else False
            piece, stop = self.driver.agreed(piece, stopped())
            if stop and self.step < total:
                self.save(improved)
                raise Interrupted(f"stopped at step {self.step} and saved; go on with: zhixing resume {self.directory}")
            if evaluate or time.perf_counter() - saved_at > self.config.record.checkpoint_seconds:
                self.save(improved)
                saved_at = time.perf_counter()
        return self.summary(view)

    def compile(self, rollout_length: int) -> None:
        """Make the program for rollouts of this length, by running it for no iteration."""
        started = time.perf_counter()
        self.run = self.driver.advance(self.algorithm, self.run, 0, rollout_length)
        jax.block_until_ready(self.run.key)
        self.compile_seconds += time.perf_counter() - started

    def advance(self, target: int, piece: int, view: LiveView) -> int:
        """One piece of at most `piece` iterations towards `target`; returns the size that takes PIECE_SECONDS."""
        iterations, rest = divmod(target - self.step, self.iteration_steps)
        iterations = min(iterations, piece)
        # The last rollout of a run is shorter where the total is no multiple of it: the steps made are exact.
        length = self.length if iterations else rest // self.config.num_environments
        if not iterations:
            self.compile(length)
        started = time.perf_counter()
        self.run = self.driver.advance(self.algorithm, self.run, max(iterations, 1), length)
        first_bad = np.asarray(self.run.window.first_bad)
        self.step += max(iterations, 1) * length * self.config.num_environments
        took = time.perf_counter() - started
        self.seconds += took
        if np.any(first_bad >= 0):
            self.diverge(first_bad)
        steps = max(iterations, 1) * length * self.config.num_environments * self.config.seeds
        view.update(self.step, steps / took)
        if not iterations:
            return piece
        return max(1, int(iterations * np.clip(PIECE_SECONDS / took, 0.25, 4.0)))

    def diverge(self, first_bad: np.ndarray) -> None:
        earliest = np.where(first_bad < 0, np.iinfo(np.int32).max, first_bad).argmin()
        seed, metric = np.unravel_index(earliest, first_bad.shape)
        kept = self.checkpoints.all()
        where = f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"
        raise Diverged(
            f"{self.metric_names[metric]} became NaN or infinite at step {first_bad[seed, metric]} of seed "
            f"{self.loop.seeds[seed]}; {where}; try a smaller learning rate"
        )

    def row(self, records: Records, view: LiveView, evaluate: bool) -> bool:
        """Write and show what happened since the last row; True if this evaluation was the best so far."""
        window: Any = jax.tree.map(np.asarray, self.run.window)
        learned, episodes = window.learned.iterations, window.episodes
        metrics: dict[str, Any] = {}
        with np.errstate(divide="ignore", invalid="ignore"):  # nothing ended or nothing learned: no number
            metrics |= {f"train/{n}": window.metrics[:, i] / learned for i, n in enumerate(self.metric_names)}
            metrics |= {"episode/return": window.returns / episodes, "episode/length": window.lengths / episodes}
        metrics["episode/count"] = episodes
        metrics["time/updates"] = float(self.run.learner.clock.updates)
        metrics["time/steps_per_second"] = self.step * self.config.seeds / self.seconds if self.seconds else np.nan
        improved = False
        if evaluate:
            played = self.evaluator(self.algorithm, self.run.learner, self.run.transforms, self.step)
            metrics |= {"evaluation/return": played.returns.mean(1), "evaluation/length": played.lengths.mean(1)}
            for i, name in enumerate(self.environment.agents):
                metrics[f"evaluation/return/{name}"] = played.of_agents[..., i].mean(1)
            if predicts(self.algorithm):
                metrics["evaluation/value"] = played.values.mean(1)
                metrics["evaluation/discounted_return"] = played.discounted_returns.mean(1)
            score = float(statistics.iqm(played.returns.mean(1)))
            improved = score >= self.best  # of equals the later: it has learned more
            self.best = max(score, self.best)
        records.row(self.step, self.seconds, metrics)
        view.row(self.step, metrics)
        self.run = self.run._replace(window=empty_window(*window.metrics.shape))
        return improved

    def columns(self) -> list[str]:
        return [
            *(f"train/{name}" for name in self.metric_names),
            "episode/return", "episode/length", "episode/count",
            "evaluation/return", "evaluation/length",
            *(("evaluation/value", "evaluation/discounted_return") if predicts(self.algorithm) else ()),
            *(f"evaluation/return/{name}" for name in self.environment.agents),
            "time/updates", "time/steps_per_second",
        ]  # fmt: skip

    def save(self, best: bool) -> None:
        metadata = {
            "step": self.step,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "best": self.best,
            "driver": self.driver.report(),
            "config": configs.to_mapping(self.config),
        }
        self.checkpoints.save(self.step, self.saved(self.run), metadata, best)

    def summary(self, view: LiveView) -> dict[str, Any]:
        """Evaluate what was learned, and write `summary.json`."""
        evaluator = build_evaluator(self.config, self.environment, self.loop, self.config.evaluation.final_episodes)
        played = evaluator(self.algorithm, self.run.learner, self.run.transforms, self.step + 1)
        evaluator.close()
        summary = {
            "algorithm": configs.to_mapping(self.config)["algorithm"]["name"],
            "environment": self.environment.id,
            "backend": self.environment.backend,
            "seeds": list(self.loop.seeds),
            "environment_steps": self.step,
            "updates": int(self.run.learner.clock.updates),
            "seconds": round(self.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "steps_per_second": round(self.step * self.config.seeds / self.seconds, 1),
            "evaluation": score(self.environment, played),
            **self.driver.report(),
            "versions": {name: version(name) for name in ("zhixing", "jax", "gymnasium")},
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        }
        text = json.dumps(summary, indent=2) + "\n"
        checkpoint.write_atomically(self.directory / "summary.json", text.encode())
        low, high = summary["evaluation"]["interval"]
        view.message(
            f"evaluation over {self.config.evaluation.final_episodes} greedy episodes a seed: IQM "
            f"{summary['evaluation']['iqm']:.1f} [{low:.1f}, {high:.1f}]; {self.directory}"
        )
        return summary

    def close(self) -> None:
        self.driver.close()
        self.evaluator.close()


def next_multiple(step: int, of: int) -> int:
    return (step // of + 1) * of


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C and SIGTERM ask for a stop; a second Ctrl-C interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
