"""How fast training is: beside Stable-Baselines3, beside what the machine could do, and with many seeds at once.

    python benchmarks/speed.py                                   # a Markdown table on the screen
    python benchmarks/speed.py --output speed                    # speed.json and speed.md too
    python benchmarks/speed.py --only ppo dqn --repeats 5 --seconds 10

Each measurement is a process of its own, because the number of threads is fixed when a library starts; the sides take
turns, so that a busy spell of the machine meets both. Each side is run on one thread and on all of them; the table
gives its better one, as a median over the repeats. Both sides have the same hyper-parameters, as far as they go in
`TASKS` and below, and are timed once compiled, warm and learning.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "ppo": {"environment": "CartPole-v1", "num_environments": 8, "rollout_length": 32, "epochs": 4, "minibatches": 4,
            "hidden": (64, 64), "learning_rate": 3e-4, "discount": 0.98, "gae_lambda": 0.8, "max_gradient_norm": 0.5},
    "a2c": {"environment": "CartPole-v1", "num_environments": 8, "rollout_length": 5, "hidden": (64, 64),
            "learning_rate": 7e-4, "discount": 0.99, "gae_lambda": 1.0, "max_gradient_norm": 0.5},
    "trpo": {"environment": "CartPole-v1", "num_environments": 8, "rollout_length": 128, "epochs": 10, "minibatches": 8,
             "hidden": (64, 64), "learning_rate": 1e-3, "discount": 0.99, "gae_lambda": 0.95, "max_kl": 0.01,
             "damping": 0.1, "conjugate_gradient_steps": 15, "fisher_stride": 1, "backtracks": 10,
             "backtrack_factor": 0.8},
    "dqn": {"environment": "CartPole-v1", "num_environments": 1, "hidden": (256, 256), "batch_size": 64,
            "replay_capacity": 100_000, "learning_starts": 1_000, "target_period": 200, "learning_rate": 1e-3,
            "epsilon_start": 0.05, "epsilon_end": 0.05, "max_gradient_norm": 10.0},
    "q_learning": {"environment": "FrozenLake-v1", "num_environments": 1},
}  # fmt: skip
TASKS["dqn_64"] = TASKS["dqn"] | {"hidden": (64, 64)}
PEERED = ("ppo", "a2c", "trpo", "dqn", "dqn_64")  # with a side of Stable-Baselines3, for TRPO of its contrib package
LIMITED = ("ppo", "a2c", "dqn", "dqn_64")  # whose matrix products are counted
REPLAYS, CAPACITIES = ("uniform", "proportional", "rank"), (10_000, 100_000, 1_000_000)
INPUTS, ACTIONS = 4, 2  # of CartPole
WARM_UP = 1_100  # environment steps; DQN is learning by then
TOTAL_STEPS = 8_000_000  # what the schedules are told; more than a measurement makes
SEEDS = 16
SECTIONS = (*PEERED, "limit", "seeds", "replay")

# ---------------------------------------------------------------------------------------- in the measured process


def timed(function: Callable, *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def measure_zhixing(task: str, seconds: float, seeds: int = 1, **more: Any) -> dict[str, float]:
    def load() -> tuple:
        import jax

        from zhixing import assembly, config, runtime
        from zhixing.algorithms import algorithm_class
        from zhixing.drivers.compiled import CompiledDriver

        runtime.fit_processor(seeds)  # as `zhixing train` does; NPROC is set already
        return jax, assembly, config, algorithm_class(task.removesuffix("_64")), CompiledDriver

    (jax, assembly, config, algorithm_class, CompiledDriver), import_seconds = timed(load)
    settings = TASKS[task] | more
    environment_config = config.EnvironmentConfig(id=settings.pop("environment"), backend="jax")
    n = settings.pop("num_environments")
    algorithm = algorithm_class(**settings)
    run_config = config.Config(algorithm, environment_config, TOTAL_STEPS, n, seeds=seeds)
    length = algorithm.steps_per_iteration

    environment = assembly.build_environment(run_config)
    loop = assembly.build_loop(run_config, environment)
    driver = CompiledDriver(loop, environment.batch(loop.seeds, n), environment.saves_state)

    def advance(run: Any, iterations: int) -> Any:
        return jax.block_until_ready(driver.advance(algorithm, run, iterations, length))

    run, first_seconds = timed(lambda: advance(driver.start(algorithm), 1))
    run = advance(run, -(-WARM_UP // (length * n)))
    iterations, took = 1, 0.0
    while took < 0.2:  # long enough that calling the program costs nothing
        iterations *= 2
        run, took = timed(advance, run, iterations)
    started, cpu_started, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        run = advance(run, iterations)
        steps += iterations * length * n * seeds
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return {"rate": steps / wall, "cores": cpu / wall, "import": import_seconds, "first": first_seconds}


def measure_sb3(task: str, seconds: float, threads: int) -> dict[str, float]:
    def load() -> tuple:
        import stable_baselines3
        import torch
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.env_util import make_vec_env

        return torch, stable_baselines3, BaseCallback, make_vec_env

    (torch, sb3, BaseCallback, make_vec_env), import_seconds = timed(load)
    torch.set_num_threads(threads)

    class Timer(BaseCallback):
        """Notes the time at the start of each rollout, when all before it has been learned from."""

        def __init__(self):
            super().__init__()
            self.marks: list[tuple[int, float, float]] = []
            self.counted, self.end = 0, float("inf")

        def _on_rollout_start(self) -> None:
            self.marks.append((self.num_timesteps, time.perf_counter(), time.process_time()))
            if self.num_timesteps >= WARM_UP:
                self.counted += 1
                self.end = min(self.end, time.perf_counter() + seconds)

        def _on_step(self) -> bool:
            return time.perf_counter() < self.end or self.counted < 2  # one whole rollout at least

    started = time.perf_counter()
    s = TASKS[task]
    environment = make_vec_env(s["environment"], s["num_environments"], seed=0)
    common = {"learning_rate": s["learning_rate"], "seed": 0, "device": "cpu"}
    if "max_gradient_norm" in s:
        common["max_grad_norm"] = s["max_gradient_norm"]
    if "rollout_length" in s:  # on-policy
        common |= {"n_steps": s["rollout_length"], "gamma": s["discount"], "gae_lambda": s["gae_lambda"],
                   "policy_kwargs": {"net_arch": {"pi": list(s["hidden"]), "vf": list(s["hidden"])}}}  # fmt: skip
    if "minibatches" in s:
        common["batch_size"] = s["num_environments"] * s["rollout_length"] // s["minibatches"]
    if task == "ppo":
        model = sb3.PPO(
            "MlpPolicy", environment, n_epochs=s["epochs"], ent_coef=0.0, vf_coef=0.5, clip_range=0.2, **common
        )
    elif task == "a2c":
        model = sb3.A2C("MlpPolicy", environment, ent_coef=0.0, vf_coef=0.5, rms_prop_eps=1e-5, **common)
    elif task == "trpo":
        from sb3_contrib import TRPO

        model = TRPO(
            "MlpPolicy", environment, target_kl=s["max_kl"], cg_damping=s["damping"], n_critic_updates=s["epochs"],
            cg_max_steps=s["conjugate_gradient_steps"], sub_sampling_factor=s["fisher_stride"],
            line_search_max_iter=s["backtracks"], line_search_shrinking_factor=s["backtrack_factor"], **common,
        )  # fmt: skip
    else:
        model = sb3.DQN(
            "MlpPolicy", environment, buffer_size=s["replay_capacity"], learning_starts=s["learning_starts"],
            batch_size=s["batch_size"], gamma=0.99, train_freq=1, gradient_steps=1, tau=1.0,
            target_update_interval=s["target_period"], exploration_initial_eps=s["epsilon_start"],
            exploration_final_eps=s["epsilon_end"], policy_kwargs={"net_arch": list(s["hidden"])}, **common,
        )  # fmt: skip
    timer = Timer()
    model.learn(TOTAL_STEPS, callback=timer)
    first, last = next(mark for mark in timer.marks if mark[0] >= WARM_UP), timer.marks[-1]
    steps, wall, cpu = (b - a for a, b in zip(first, last, strict=True))
    first_seconds = timer.marks[1][1] - started
    return {"rate": steps / wall, "cores": cpu / wall, "import": import_seconds, "first": first_seconds}


def measure_products(sizes: list[tuple[int, int, int]]) -> list[float]:
    """Seconds of each matrix product [m, k] x [k, n] inside a compiled loop, the best of five."""
    import jax
    import jax.numpy as jnp

    from zhixing import runtime

    runtime.fit_processor(seeds=1)

    def repeat(x: jax.Array, w: jax.Array, times: int) -> Any:
        def once(_: Any, carry: tuple) -> tuple:
            x, y = carry
            x = x.at[0, 0].add(1e-9 * y[0, 0])  # so that no product can be left out
            return x, x @ w

        return jax.lax.fori_loop(0, times, once, (x, x @ w))

    program, best = jax.jit(repeat), []
    for m, k, n in sizes:
        x, w = jnp.full((m, k), 0.01), jnp.full((k, n), 0.01)
        times = max(5, int(2e8 / (m * k * n)) if m * k * n > 1e5 else 2_000)
        jax.block_until_ready(program(x, w, times))
        runs = [timed(lambda *a: jax.block_until_ready(program(*a)), x, w, times)[1] for _ in range(5)]
        best.append(min(runs) / (times + 1))
    return best


# ---------------------------------------------------------------------------------------- from the outside


def in_process(threads: int, what: str, **arguments: Any) -> Any:
    """Run one of the three functions above in a new process with that many threads."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),  # PyTorch
        "NPROC": str(threads),  # JAX; XLA's own flag --xla_cpu_multi_thread_eigen leaves a second core in use
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the first call shall compile
        "JAX_PLATFORMS": "cpu",
    }
    if what == "sb3":
        arguments["threads"] = threads
    command = [sys.executable, __file__, "--measure", what, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"speed: the measurement {what} {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(sides: dict[str, dict[str, Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Measure each side (a name -> what `in_process` gets), taking turns -> its medians at its best thread count."""
    choices = [(name, threads) for name in sides for threads in sorted({1, os.cpu_count() or 1})]
    results: dict[tuple[str, int], list[dict]] = {choice: [] for choice in choices}
    for repeat in range(repeats):
        for name, threads in choices if repeat % 2 == 0 else reversed(choices):
            print(f"{name}, {threads} threads, repeat {repeat + 1} of {repeats}", file=sys.stderr)
            results[name, threads].append(in_process(threads, **sides[name]))
    best = {}
    for name in sides:
        mine = {threads: rows for (side, threads), rows in results.items() if side == name}
        medians = {threads: {key: median(r[key] for r in rows) for key in rows[0]} for threads, rows in mine.items()}
        threads = max(medians, key=lambda t: medians[t]["rate"])
        best[name] = medians[threads] | {
            "threads": threads,
            "rate_of_threads": {t: medians[t]["rate"] for t in medians},
            "repeats": [r["rate"] for r in mine[threads]],
        }
    return best


def work(task: str) -> tuple[list[tuple[tuple[int, int, int], float]], float]:
    """-> the matrix products of one environment step, each ((m, k, n), how often), and the optimiser's operations."""
    s = TASKS[task]

    def forward(batch: int, outputs: int, often: float) -> list:
        return [((batch, k, n), often) for k, n in pairwise((INPUTS, *s["hidden"], outputs))]

    def forward_and_backward(batch: int, outputs: int, often: float) -> list:  # backward: dX = dY Wᵀ, dW = Xᵀ dY
        layers = forward(batch, outputs, often)
        return [p for (m, k, n), o in layers for p in (((m, k, n), o), ((m, n, k), o), ((k, m, n), o))]

    n = s["num_environments"]
    if "rollout_length" in s:
        rollout, minibatches = n * s["rollout_length"], s.get("minibatches", 1)
        updates = s.get("epochs", 1) * minibatches / rollout  # a step
        batch, outputs = rollout // minibatches, (ACTIONS, 1)
        values = 2 if task == "ppo" else 1  # V(s) and V(s') for the advantages; A2C's loss has V(s) already
        products = forward(n, ACTIONS, 1 / n) + forward(rollout, 1, values / rollout)
        products += [p for o in outputs for p in forward_and_backward(batch, o, updates)]
    else:
        updates, batch, outputs = 1.0, s["batch_size"], (ACTIONS,)
        products = forward(n, ACTIONS, 1 / n) + forward(batch, ACTIONS, 1.0)  # acting; the target network
        products += forward_and_backward(batch, ACTIONS, 1.0)
    parameters = sum((k + 1) * o for out in outputs for k, o in pairwise((INPUTS, *s["hidden"], out)))
    each = 9 if task == "a2c" else 14  # operations of a parameter: RMSProp 7, Adam 12; the gradient's norm 2
    return products, each * parameters * updates


def limits(rates: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Measured steps per second of each task beside the machine's rate on the products that a step is made of."""
    products = {task: work(task) for task in rates}
    sizes = [*sorted({size for task in rates for size, _ in products[task][0]}), (1024, 1024, 1024)]
    rows = []
    for threads in sorted({1, os.cpu_count() or 1}):
        print(f"matrix products, {threads} threads", file=sys.stderr)
        seconds = dict(zip(sizes, in_process(threads, "products", sizes=sizes), strict=True))
        large = 2 * 1024**3 / seconds[1024, 1024, 1024]
        for task in rates:
            multiplied = sum(2 * m * k * n * often for (m, k, n), often in products[task][0])
            reached = multiplied / sum(seconds[size] * often for size, often in products[task][0])
            operations = multiplied + products[task][1]
            rows.append({"task": task, "threads": threads, "operations": operations, "reached": reached, "large": large,
                         "limit": reached / operations, "large_limit": large / operations,
                         "rate": rates[task][threads]})  # fmt: skip
    return rows


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    text = (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']} before the start; medians of "
        f"{machine['repeats']} x {machine['seconds']:g} s; {', '.join(machine['versions'])}\n"
    )
    compared = [
        (f"{task} {TASKS[task]['environment']}", name, r["threads"], f"{r['rate']:,.0f}", f"{r['cores']:.2f}",
         f"{r['import']:.1f}", f"{r['first']:.1f}", f"{r['rate'] / results[task]['Stable-Baselines3']['rate']:.1f}")
        for task in PEERED for name, r in results.get(task, {}).items()
    ]  # fmt: skip
    text += table("task|side|threads|steps/s|cores used|import, s|first call, s|ratio", compared)
    limited = [
        (r["task"], r["threads"], f"{r['operations'] / 1e6:.3g}", f"{r['rate']:,.0f}",
         f"{r['reached'] / 1e9:.0f}", f"{r['limit']:,.0f}", f"{r['rate'] / r['limit']:.0%}",
         f"{r['large'] / 1e9:.0f}", f"{r['large_limit']:,.0f}", f"{r['rate'] / r['large_limit']:.0%}")
        for r in results.get("limit", [])
    ]  # fmt: skip
    head = "task|threads|MFLOP/step|steps/s|GFLOP/s, its products|limit, steps/s|reached"
    text += table(head + "|GFLOP/s, 1024 x 1024|limit, steps/s|reached", limited)
    seeds = [
        (f"{task} {TASKS[task]['environment']}", f"{r['1']['rate']:,.0f}", f"{r[str(SEEDS)]['rate']:,.0f}",
         f"{r[str(SEEDS)]['rate'] / r['1']['rate']:.1f} x as long")
        for task, r in results.get("seeds", {}).items()
    ]  # fmt: skip
    text += table(f"task|1 seed, steps/s|{SEEDS} seeds, steps/s of all|{SEEDS} runs of 1 seed take", seeds)
    replays = [
        (f"{int(capacity):,}", *(f"{1e6 / r[kind]['rate']:.0f}" for kind in REPLAYS),
         *(f"{r['uniform']['rate'] / r[kind]['rate']:.2f}" for kind in REPLAYS[1:]))
        for capacity, r in results.get("replay", {}).items()
    ]  # fmt: skip
    head = "replay capacity|" + "|".join(f"{kind}, us a step of DQN" for kind in REPLAYS)
    return text + table(head + "|" + "|".join(f"{kind} / uniform" for kind in REPLAYS[1:]), replays)


def table(head: str, rows: list[tuple]) -> str:
    """A Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head.split("|"), ["---"] * len(rows[0]), *rows]
    return "\n" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, once warm")
    parser.add_argument("--output", type=Path, help="write FILE.json and FILE.md", metavar="FILE")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        functions = {"zhixing": measure_zhixing, "sb3": measure_sb3, "products": measure_products}
        print(json.dumps(functions[options.measure[0]](**json.loads(options.measure[1]))))
        return
    tasks = [task for task in PEERED if task in options.only]
    if tasks and importlib.util.find_spec("stable_baselines3") is None:
        raise SystemExit("speed: Stable-Baselines3 is missing; pip install stable-baselines3, or --only limit seeds")
    if "trpo" in tasks and importlib.util.find_spec("sb3_contrib") is None:
        raise SystemExit(
            "speed: sb3-contrib, which has TRPO, is missing; pip install sb3-contrib, or --only the others"
        )

    results: dict[str, Any] = {"machine": machine() | {"repeats": options.repeats, "seconds": options.seconds}}

    def zhixing(task: str, **more: Any) -> dict[str, Any]:
        return {"what": "zhixing", "task": task, "seconds": options.seconds, **more}

    for task in tasks:
        peer = {"what": "sb3", "task": task, "seconds": options.seconds}
        results[task] = compare({"zhixing": zhixing(task), "Stable-Baselines3": peer}, options.repeats)
    if "limit" in options.only:
        alone = {task: zhixing(task) for task in LIMITED if task not in tasks}
        measured = compare(alone, options.repeats) | {task: results[task]["zhixing"] for task in tasks}
        results["limit"] = limits({task: measured[task]["rate_of_threads"] for task in LIMITED})
    if "seeds" in options.only:
        results["seeds"] = {
            task: compare({str(seeds): zhixing(task, seeds=seeds) for seeds in (1, SEEDS)}, options.repeats)
            for task in ("ppo", "dqn", "q_learning")
        }
    if "replay" in options.only:
        results["replay"] = {
            str(capacity): compare(
                {kind: zhixing("dqn", replay=kind, replay_capacity=capacity) for kind in REPLAYS}, options.repeats
            )
            for capacity in CAPACITIES
        }
    print(report(results), end="")
    if options.output:
        Path(f"{options.output}.json").write_text(json.dumps(results, indent=2) + "\n")
        Path(f"{options.output}.md").write_text(report(results))


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    try:
        described = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        described = []
    names = [line.partition(": ")[2] for line in described if line.startswith("model name")]
    installed = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
    packages = [
        name
        for name in ("zhixing", "jax", "stable-baselines3", "sb3-contrib", "torch", "gymnasium")
        if name in installed
    ]
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "unknown",
        "versions": [f"Python {platform.python_version()}", *(f"{name} {installed[name]}" for name in packages)],
    }


if __name__ == "__main__":
    main()
