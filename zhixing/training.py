"""Training, as a user asks for it: `train` and `resume`, and the run folder that they leave.

A run folder holds `config.yaml` (complete, rerunnable), `metrics.csv`, `tensorboard/`, `checkpoints/` and, once the
run is over, `summary.json`.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from zhixing import checkpoint, runtime
from zhixing import config as configs
from zhixing.assembly import build_environment, build_loop
from zhixing.config import Config
from zhixing.core import Algorithm, Online
from zhixing.environments.base import Environment
from zhixing.errors import UsageError
from zhixing.off_policy import OffPolicy
from zhixing.records import LiveView, Records
from zhixing.run import TrainedRun
from zhixing.trainer import Trainer, stop_signals


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


def carry_out(
    config: Config,
    environment: Environment,
    directory: Path,
    resume: bool,
    quiet: bool,
    stopped: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train, with records and the live view; returns the summary. By default, Ctrl-C and SIGTERM ask for a stop."""
    if config.workers.kind == "seeds":
        from zhixing.fan_out import fan_out

        return fan_out(config, environment, directory, quiet)
    follows = runtime.join_hosts() > 0
    check_hosts(config)
    workers = config.workers.count if config.workers.kind in ("threads", "devices") else 1
    runtime.fit_processor(config.seeds * workers)
    runtime.keep_compiled_programs()
    trainer = Trainer(config, environment, directory, resume)
    try:
        checkpoint.write_atomically(directory / "config.yaml", configs.dump_yaml(config).encode())
        title = f"{type(config.algorithm).__name__} on {environment.id}"
        # A row of step 0 stays only if its checkpoint was written.
        resume_step = (trainer.step if trainer.begun else -1) if resume else None
        records = Records(directory, trainer.loop.seeds, trainer.columns(), resume_step, config.record.tensorboard)
        view = LiveView(title, described(trainer), config.total_steps, quiet or follows)
        with records, view, nullcontext(stopped) if stopped else stop_signals() as stopped:
            for problem in trainer.problems:
                view.message(f"passed over a checkpoint: {problem}")
            if resume:
                view.message(f"resumed at step {trainer.step}")
            return trainer.fit(records, view, stopped)
    finally:
        trainer.close()


def check_hosts(config: Config) -> None:
    """Raise UsageError for a run on several hosts that is not split between their devices."""
    import jax

    if jax.distributed.is_initialized() and jax.process_count() > 1 and config.workers.kind != "devices":
        raise UsageError(
            f"a run on {jax.process_count()} hosts needs --workers.kind devices; unset {runtime.HOSTS[0]} for one host"
        )


def new_directory(run_dir: str | Path | None, config: Config) -> Path:
    """The folder of a new run, made; UsageError where that cannot be."""
    if runtime.join_hosts() > 0:
        return follower_directory()
    directory = writable_directory(run_dir, configs.to_mapping(config)["algorithm"]["name"], config)
    if any((directory / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
        raise UsageError(f"{directory} already holds a run; resume it, or name another folder with --run-dir")
    return directory


def follower_directory() -> Path:
    """Where a process writes whose run another one keeps; gone when it ends."""
    directory = Path(tempfile.mkdtemp(prefix="zhixing-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def writable_directory(run_dir: str | Path | None, name: str, config: Config) -> Path:
    """`run_dir`, made, or a new folder under `runs/` that begins with `name`; UsageError where that cannot be."""
    try:
        directory = made_directory(name, config) if run_dir is None else Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        where = run_dir or Path("runs").absolute()
        raise UsageError(f"cannot write to {where}: {error.strerror}; name another folder with --run-dir") from None
    return directory


def made_directory(name: str, config: Config) -> Path:
    """A new folder under `runs/`, named by `name`, environment and time; no other process gets the same."""
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
    runtime.join_hosts()
    environment = build_environment(config)
    config = with_environment(config, environment)
    check(config, environment)
    directory = new_directory(run_dir, config)
    return directory, carry_out(config, environment, directory, resume=False, quiet=quiet)


def check(config: Config, environment: Environment) -> None:
    """Say whatever does not fit before a folder is made."""
    build_loop(config, environment)
    if config.start.run is not None:
        from zhixing.skills import start_of  # it imports DIAYN, SAC, ...

        start_of(config, environment)


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
    runtime.join_hosts()
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
    check(config, made)
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
    if runtime.join_hosts() > 0:
        shutil.copytree(directory, directory := follower_directory(), dirs_exist_ok=True)
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
