"""How much two workers are worth where the environment is the bottleneck, and how large what they say to each other is.

    python benchmarks/scaling.py          # into benchmarks/scaling.md and .json

Each side trains the same number of steps; samples per second are those of the second half of a run, when everything is
compiled. Sides take turns; the ratio is the median over the turns.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import zhixing as zx
from zhixing import runtime

HERE = Path(__file__).parent
INSTANCES, LENGTH = 2, 128


class Delayed(gymnasium.Env):
    """A pendulum of observations, each of whose steps takes two milliseconds of waiting."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        time.sleep(0.002)
        self.time += 1
        return np.full(3, np.sin(self.time), np.float32), float(-np.square(action).sum()), False, self.time >= 200, {}


TASKS: dict[str, tuple[Any, dict]] = {
    "an environment that waits 2 ms": (Delayed, {}),
    "HalfCheetah-v5 through Gymnasium": ("HalfCheetah-v5", {"backend": "gymnasium"}),
}
KINDS = {"a3c": "threads", "dppo": "ray"}


def rate(algorithm: str, task: str, workers: int, iterations: int) -> float:
    """Samples per second in the second half of a run."""
    environment, settings = TASKS[task]
    own: dict[str, Any] = {"rollout_length": LENGTH, "hidden": [64, 64]}
    own |= {"epochs": 4, "minibatches": 4} if algorithm == "dppo" else {"learning_rate_schedule": "constant"}
    return samples(algorithm, environment, settings, own, workers, iterations, INSTANCES)


def round_seconds(workers: int) -> float:
    """Of one minibatch of DPPO where next to nothing is computed: parameters out, gradients in, a step."""
    epochs, minibatches, instances, length = 8, 8, 4, 16
    own = {"rollout_length": length, "hidden": [64, 64], "epochs": epochs, "minibatches": minibatches}
    rate = samples("dppo", "CartPole-v1", {}, own, workers, 24, instances)
    return instances * length / rate / (epochs * minibatches)


def samples(
    algorithm: str, environment: Any, settings: dict, own: dict, workers: int, iterations: int, instances: int
) -> float:
    folder = Path(tempfile.mkdtemp())
    steps = iterations * instances * own["rollout_length"]
    zx.train(
        algorithm,
        environment,
        total_steps=steps,
        num_environments=instances,
        run_dir=folder / "run",
        quiet=True,
        workers={"kind": KINDS[algorithm], "count": workers},
        environment=settings,
        algorithm=own,
        evaluation={"every": 10 * steps, "episodes": 1, "final_episodes": 1, "max_steps": 200},
        record={"every": steps // 2, "tensorboard": False},
    )
    with (folder / "run" / "metrics.csv").open() as file:
        header, *rows = [line.rstrip("\n").split(",") for line in file]
    seconds = {int(row[0]): float(row[header.index("seconds")]) for row in rows}
    shutil.rmtree(folder)
    return (steps - steps // 2) / (seconds[steps] - seconds[steps // 2])


def message_sizes() -> dict[str, int]:
    """Bytes of what goes over the wire in an iteration of DPPO on HalfCheetah-v5, for each worker."""
    from zhixing.algorithms.dppo import DPPO
    from zhixing.assembly import build_environment, build_loop, build_worker
    from zhixing.config import from_mapping
    from zhixing.drivers.distributed import arrays, light, statistics_of

    mapping = {
        "algorithm": {"name": "dppo", "rollout_length": LENGTH, "hidden": [64, 64], "epochs": 4, "minibatches": 4},
        "environment": {"id": "HalfCheetah-v5", "backend": "gymnasium", "normalize_observation": True},
        "num_environments": INSTANCES,
        "total_steps": 2**20,
        "workers": {"kind": "ray", "count": 2},
    }
    config = from_mapping(mapping)
    assert isinstance(config.algorithm, DPPO)
    build_loop(config, build_environment(config))
    worker = build_worker(config, None, [0], 0, 0)
    learner, statistics = arrays(light(worker.run.learner)), arrays(statistics_of(worker.run.transforms))
    moments, _, seen = worker.collect(learner, statistics, 0, LENGTH)
    gradient, _ = worker.gradient(learner, 0, moments)

    def size(values: Any) -> int:
        return sum(x.nbytes for x in values)

    return {
        "parameters, to a worker, each minibatch": size(learner),
        "gradient, from a worker, each minibatch": size(gradient),
        "statistics and moments, both ways, each iteration": 2 * (size(statistics) + size(moments)),
        "episode sums, from a worker, each iteration": size(seen[1]),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--turns", type=int, default=3)
    flags.add_argument("--iterations", type=int, default=24)
    own = flags.parse_args()
    runtime.fit_processor(rows=2)
    results = []
    for task in TASKS:
        for algorithm in KINDS:
            rates = [[rate(algorithm, task, w, own.iterations) for w in (1, 2)] for _ in range(own.turns)]
            ratio = float(np.median([two / one for one, two in rates]))
            one, two = np.median(rates, axis=0)
            results.append({"task": task, "algorithm": algorithm, "one": one, "two": two, "ratio": ratio})
            print(f"{task}, {algorithm}: {one:.0f} -> {two:.0f} samples/s, {ratio:.2f} times", flush=True)
    sizes = message_sizes()
    rounds = {w: float(np.median([round_seconds(w) for _ in range(own.turns)])) for w in (1, 2, 4)}
    print({w: f"{1000 * seconds:.2f} ms" for w, seconds in rounds.items()}, flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    (HERE / "scaling.json").write_text(
        json.dumps({"machine": machine, "rates": results, "bytes": sizes, "round_seconds": rounds}, indent=1) + "\n"
    )
    lines = [
        "# Two workers beside one",
        "",
        f"`python benchmarks/scaling.py` on {machine}; {INSTANCES} environments in all, rollouts of {LENGTH} steps.",
        "",
        "| environment | algorithm | one worker, samples/s | two | ratio |",
        "|---|---|---|---|---|",
        *(f"| {r['task']} | {r['algorithm']} | {r['one']:.0f} | {r['two']:.0f} | {r['ratio']:.2f} |" for r in results),
        "",
        "| what goes over the wire (64 x 64 units, HalfCheetah-v5) | bytes |",
        "|---|---|",
        *(f"| {name} | {size} |" for name, size in sizes.items()),
        "",
        "| workers | one round of DPPO with almost nothing to compute, ms |",
        "|---|---|",
        *(f"| {workers} | {1000 * seconds:.2f} |" for workers, seconds in rounds.items()),
    ]
    (HERE / "scaling.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
