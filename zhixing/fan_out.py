"""The seeds of one run, spread over Ray in parts, and gathered in one run folder.

Seeds know nothing of each other, so that their parts are runs of their own: each is trained by a Ray task, and what
they leave is put side by side along the axis of the seeds. The folder is then that of any run with all these seeds.
A task that is killed is begun again, from its part's last checkpoint where it finds its folder.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zhixing import checkpoint, records
from zhixing import config as configs
from zhixing.checkpoint import Checkpoints
from zhixing.config import Config, WorkersConfig
from zhixing.drivers.crew import last_line, start_ray
from zhixing.environments.base import Environment
from zhixing.errors import UsageError
from zhixing.records import Records
from zhixing.shared import map_seeds

PARTS = "parts"  # the folder of the parts' own runs, within that of the run


def part_configs(config: Config, parts: int) -> list[Config]:
    """The settings of each part: its seeds, and nobody to share them with."""
    groups = np.array_split(np.asarray(config.all_seeds), min(parts, config.seeds))
    alone = replace(config, workers=WorkersConfig(), record=replace(config.record, tensorboard=False))
    return [replace(alone, seed=int(group[0]), seeds=len(group)) for group in groups]


def train_part(config: Config, own: Environment | None, folder: Path) -> dict[str, Any]:
    """Train a part, or go on with it -> its table, and the bytes of its last checkpoint."""
    from zhixing.assembly import build_environment
    from zhixing.training import carry_out

    folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / "config.yaml").exists()
    carry_out(config, build_environment(config, own), folder, resume=begun, quiet=True, stopped=lambda: False)
    return {
        "table": records.read_metrics(folder),
        "checkpoint": Checkpoints(folder / "checkpoints", 1).path().read_bytes(),
    }


def fan_out(config: Config, environment: Environment, directory: Path, quiet: bool) -> dict[str, Any]:
    """Train all seeds of `config` in parts over Ray, into `directory`; returns the summary."""
    from zhixing.training import carry_out

    workers = config.workers
    ray = start_ray(workers.ray_address, workers.count)
    cores = int(ray.cluster_resources().get("CPU", 1))
    parts = part_configs(config, workers.count if workers.count > 1 else cores)
    checkpoint.write_atomically(directory / "config.yaml", configs.dump_yaml(config).encode())
    own = environment if config.environment.backend == "own" else None
    folders = [directory.absolute() / PARTS / f"{part.seed}-{part.seed + part.seeds - 1}" for part in parts]

    @ray.remote(num_cpus=1, max_retries=workers.restarts)
    def train(paths: list[str], packed: bytes, folder: str) -> dict[str, Any]:
        import sys

        sys.path += [path for path in paths if path not in sys.path]
        from ray import cloudpickle

        from zhixing.fan_out import train_part

        part, own = cloudpickle.loads(packed)
        return train_part(part, own, Path(folder))

    pack = ray.cloudpickle.dumps
    tasks = [train.remote(sys.path, pack((part, own)), str(f)) for part, f in zip(parts, folders, strict=True)]
    waiting = list(tasks)
    while waiting:
        _, waiting = ray.wait(waiting)
        if not quiet:
            print(f"{len(tasks) - len(waiting)} of {len(tasks)} parts of the seeds are trained", flush=True)
    try:
        found = ray.get(tasks)
    except ray.exceptions.RayError as error:
        raise UsageError(f"a part of the seeds failed: {last_line(str(error))}; resume the run to try again") from None

    # From here on it is a run like any other.
    whole = replace(config, workers=WorkersConfig())
    gather(whole, environment, directory, found)
    return carry_out(whole, environment, directory, resume=True, quiet=quiet)


def gather(config: Config, environment: Environment, directory: Path, found: list[dict[str, Any]]) -> None:
    """Write the parts' tables as one, and their last checkpoints as one."""
    from zhixing.trainer import Trainer

    tables = [part["table"] for part in found]
    trainer = Trainer(config, environment, directory)
    columns = trainer.columns()
    (directory / "metrics.csv").unlink(missing_ok=True)
    with Records(directory, config.all_seeds, columns, None, config.record.tensorboard) as written:
        for step in np.unique(tables[0]["step"]):
            rows = [{name: table[name][table["step"] == step] for name in table} for table in tables]
            seconds = max(float(row["seconds"].max()) for row in rows)
            written.row(int(step), seconds, {name: np.concatenate([row[name] for row in rows]) for name in columns})

    template = trainer.saved(trainer.run)
    trainer.close()
    names, each_seed, _ = checkpoint.names_of(map_seeds(lambda x: True, template))
    arrays, metadata = zip(
        *(checkpoint.parse(part["checkpoint"], "a part's checkpoint") for part in found), strict=True
    )
    merged = [
        np.concatenate([of_part[name] for of_part in arrays]) if per_seed is True else arrays[0][name]
        for name, per_seed in zip(names, each_seed, strict=True)
    ]
    tree = jax.tree.unflatten(jax.tree.structure(template), merged)
    slowest = {name: max(m[name] for m in metadata) for name in ("seconds", "compile_seconds")}
    about = metadata[0] | slowest | {"config": configs.to_mapping(config), "best": float("-inf")}
    Checkpoints(directory / "checkpoints", config.record.keep_checkpoints).save(metadata[0]["step"], tree, about, True)
