"""Training: `train` and `resume`, and the `Trainer` that makes a run folder out of a `Config`.

A run folder holds `config.yaml` (complete, rerunnable), `metrics.csv`, `tensorboard/`, `checkpoints/` and, once the
run is over, `summary.json`.
"""

import contextlib
import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zhixing import checkpoint, runtime, statistics
from zhixing import config as configs
from zhixing.assembly import build_environment, build_evaluator, build_loop
from zhixing.checkpoint import Checkpoints
from zhixing.config import Config
from zhixing.core import Algorithm, OffPolicy, Online
from zhixing.drivers.compiled import CompiledDriver
from zhixing.drivers.host import HostDriver
from zhixing.drivers.loop import Run, empty_window
from zhixing.environments.base import Environment
from zhixing.errors import Diverged, Interrupted, UsageError
from zhixing.records import LiveView, Records
from zhixing.run import TrainedRun

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
        self.metric_names = sorted(self.loop.shapes(self.algorithm)[2])

        self.checkpoints = Checkpoints(directory / "checkpoints", config.record.keep_checkpoints)
        self.step, self.seconds, self.best, self.compile_seconds = 0, 0.0, -np.inf, 0.0
        path, problems = self.checkpoints.latest_readable() if resume else (None, [])
        self.problems = problems
        self.metadata = checkpoint.read(path)[1] if path else {"step": 0}
        if path:
            self.require_same_settings(self.metadata, path)
        self.begun = path is not None
        self.driver = self.make_driver(self.metadata["step"])
        self.run = self.restored(path) if path else self.driver.start(self.algorithm)
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

    def make_driver(self, step: int) -> CompiledDriver | HostDriver:
        seeds = self.loop.seeds
        if step and not self.environment.saves_state:  # new episodes, not those of the beginning once more
            seeds = tuple(int(np.random.SeedSequence((seed, step)).generate_state(1)[0] >> 1) for seed in seeds)
        batch = self.environment.batch(seeds, self.config.num_environments)
        if self.environment.compiled:
            return CompiledDriver(self.loop, batch, self.environment.saves_state)
        return HostDriver(self.loop, batch)

    def restored(self, path: Path) -> Run:
        """The run as the checkpoint holds it, with new episodes where the environments could not be saved."""
        fresh = self.driver.start(self.algorithm)
        run, metadata = checkpoint.restore(path, self.saved(fresh))
        self.step, self.seconds, self.best = metadata["step"], metadata["seconds"], metadata["best"]
        self.compile_seconds = metadata["compile_seconds"]
        clock = run.learner.clock  # the run may go on for longer than it was first told
        total = jax.numpy.int32(self.config.total_steps)
        run = run._replace(learner=run.learner._replace(clock=type(clock)(clock.steps, clock.updates, total)))
        if self.environment.saves_state:
            return run
        return self.driver.restart(
            self.algorithm,
            fresh._replace(
                learner=run.learner, memory=run.memory, transforms=run.transforms, key=run.key, window=run.window
            ),
        )

    def saved(self, run: Run) -> Run:
        """What a checkpoint holds: everything, or everything but the episodes under way."""
        if self.environment.saves_state:
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
            if stopped() and self.step < total:
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
            returns, lengths = self.evaluator(self.algorithm, self.run.learner, self.run.transforms, self.step)
            metrics |= {"evaluation/return": returns.mean(1), "evaluation/length": lengths.mean(1)}
            score = float(statistics.iqm(returns.mean(1)))
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
            "time/updates", "time/steps_per_second",
        ]  # fmt: skip

    def save(self, best: bool) -> None:
        metadata = {
            "step": self.step,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "best": self.best,
            "config": configs.to_mapping(self.config),
        }
        self.checkpoints.save(self.step, self.saved(self.run), metadata, best)

    def summary(self, view: LiveView) -> dict[str, Any]:
        """Evaluate what was learned, and write `summary.json`."""
        evaluator = build_evaluator(self.config, self.environment, self.loop, self.config.evaluation.final_episodes)
        returns, _ = evaluator(self.algorithm, self.run.learner, self.run.transforms, self.step + 1)
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
            "evaluation": statistics.summary(returns),
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
        self.driver.batch.close()
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


def described(trainer: Trainer) -> dict[str, str]:
    """What is shown before the first step: every size that decides how much is learned from how much."""
    config, algorithm = trainer.config, trainer.algorithm
    updates = algorithm.updates_per_iteration * (config.num_environments if isinstance(algorithm, Online) else 1)
    shown = {
        "environment": f"{trainer.environment.id} ({trainer.environment.backend})",
        "seeds": f"{config.seeds}, from {config.seed}",
        "environments": f"{config.num_environments} of each seed",
        "total steps": f"{config.total_steps} of each seed",
        "rollout length": str(trainer.length),
        "updates": f"{updates} each {trainer.iteration_steps} steps: {updates / trainer.iteration_steps:.4g} a step",
    }
    if isinstance(algorithm, OffPolicy):
        shown["learning starts"] = f"after {algorithm.learning_starts} steps"
    sizes = ("learning_rate", "discount", "batch_size", "minibatches", "epochs", "hidden")
    present = [name for name in sizes if name in {f.name for f in fields(algorithm)}]
    shown["settings"] = ", ".join(f"{name} {getattr(algorithm, name)}" for name in present)
    if not trainer.environment.saves_state:
        shown["resume"] = "the environments' state cannot be saved: a resumed run starts new episodes"
    shown["folder"] = str(trainer.directory)
    return shown


def carry_out(config: Config, environment: Environment, directory: Path, resume: bool, quiet: bool) -> dict[str, Any]:
    """Train, with records and the live view; returns the summary."""
    runtime.choose_threads(config.seeds)
    runtime.keep_compiled_programs()
    trainer = Trainer(config, environment, directory, resume)
    try:
        checkpoint.write_atomically(directory / "config.yaml", configs.dump_yaml(config).encode())
        title = f"{type(config.algorithm).__name__} on {environment.id}"
        # A row of step 0 stays only if its checkpoint was written.
        resume_step = (trainer.step if trainer.begun else -1) if resume else None
        records = Records(directory, trainer.loop.seeds, trainer.columns(), resume_step, config.record.tensorboard)
        view = LiveView(title, described(trainer), config.total_steps, quiet)
        with records, view, stop_signals() as stopped:
            for problem in trainer.problems:
                view.message(f"passed over a checkpoint: {problem}")
            if resume:
                view.message(f"resumed at step {trainer.step}")
            return trainer.fit(records, view, stopped)
    finally:
        trainer.close()


def new_directory(run_dir: str | Path | None, config: Config) -> Path:
    """The folder of a new run, made; UsageError where that cannot be."""
    try:
        directory = made_directory(config) if run_dir is None else Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        where = run_dir or Path("runs").absolute()
        raise UsageError(f"cannot write to {where}: {error.strerror}; name another folder with --run-dir") from None
    if any((directory / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
        raise UsageError(f"{directory} already holds a run; resume it, or name another folder with --run-dir")
    return directory


def made_directory(config: Config) -> Path:
    """A new folder under `runs/`, named by algorithm, environment and time; no other process gets the same."""
    name = configs.to_mapping(config)["algorithm"]["name"]
    environment = config.environment.id.replace("/", "-").replace(":", "-")
    base = f"runs/{name}-{environment}-{datetime.now():%Y%m%d-%H%M%S}"
    Path("runs").mkdir(exist_ok=True)
    count = 0
    while True:
        directory = Path(f"{base}-{count}" if count else base)
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            count += 1


def train_config(config: Config, run_dir: str | Path | None = None, quiet: bool = False) -> tuple[Path, dict[str, Any]]:
    """A new run of `config` -> its folder and its summary."""
    environment = build_environment(config)
    config = with_environment(config, environment)
    build_loop(config, environment)  # whatever does not fit is said before a folder is made
    directory = new_directory(run_dir, config)
    return directory, carry_out(config, environment, directory, resume=False, quiet=quiet)


def with_environment(config: Config, environment: Environment, own: bool = False) -> Config:
    """`config` with the backend that was taken, so that it gives the same run everywhere; "own" for a user's."""
    backend: Any = "own" if own else environment.backend
    settings = replace(config.environment, id=environment.id, backend=backend)
    return replace(config, environment=settings)


def train(
    algorithm: str | Algorithm,
    environment: Any,
    /,
    *,
    total_steps: int | None = None,
    num_environments: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Train `algorithm` on `environment` and return the run.

    Args:
        algorithm: a name ("ppo": with the preset's settings), or an object (`PPO(learning_rate=1e-3)`: as it is).
        environment: an id, a `gymnasium.Env` class or a function that makes one, or a JAX environment object.
        total_steps: environment steps of each seed; num_environments: of each seed, stepped together.
        seed: the first of `seeds` seeds, all trained at once.
        run_dir: the run's folder; by default a new one under `runs/`.
        settings: further parts of the configuration, as in YAML: `evaluation={"episodes": 50}`,
            `environment={"normalize_observation": True}`; with a name, `algorithm={"learning_rate": 1e-3}`.

    Raises UsageError for what does not fit, Interrupted when stopped, Diverged when a loss is no longer finite.
    """
    own = None if isinstance(algorithm, str) else algorithm
    if own is not None and "algorithm" in settings:
        raise UsageError(f"algorithm={settings['algorithm']} comes besides an object; give the settings to the object")
    name = algorithm.lower().replace("-", "_") if isinstance(algorithm, str) else configs.name_of(algorithm)
    sizes = {"total_steps": total_steps, "num_environments": num_environments, "seed": seed, "seeds": seeds}
    given = {key: value for key, value in sizes.items() if value is not None}
    preset = configs.preset(name, environment_name(environment))
    config = configs.from_mapping(configs.merge(preset, settings, given), own)
    made = build_environment(config, environment)
    config = with_environment(config, made, own=not isinstance(environment, str | Environment))
    build_loop(config, made)
    directory = new_directory(run_dir, config)
    carry_out(config, made, directory, resume=False, quiet=quiet)
    return TrainedRun.load(directory, environment=made, algorithm=own)


def environment_name(thing: Any) -> str:
    """What an environment is called in the records: its id, or the name of a user's class or function."""
    if isinstance(thing, str | Environment):
        return thing if isinstance(thing, str) else thing.id
    return getattr(thing, "__name__", type(thing).__name__)


def resume_directory(
    directory: Path,
    environment: Any = None,
    algorithm: Algorithm | None = None,
    total_steps: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Go on with the run in `directory`; returns its summary."""
    config = configs.from_mapping(configs.load_run(directory), algorithm)
    if total_steps is not None:
        config = replace(config, total_steps=total_steps)
    return carry_out(config, build_environment(config, environment), directory, resume=True, quiet=quiet)


def resume(
    directory: str | Path,
    environment: Any = None,
    algorithm: Algorithm | None = None,
    total_steps: int | None = None,
    quiet: bool = False,
) -> TrainedRun:
    """Go on with the run in `directory`, to `total_steps` if given; own environments and algorithms are named again."""
    resume_directory(Path(directory), environment, algorithm, total_steps, quiet)
    return TrainedRun.load(directory, environment=environment, algorithm=algorithm)
