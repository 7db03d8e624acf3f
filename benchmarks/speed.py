"""How fast training is: beside Stable-Baselines3, beside what the machine could do, and with many seeds at once.

    python benchmarks/speed.py                                   # a Markdown table on the screen
    python benchmarks/speed.py --output speed                    # speed.json and speed.md too
    python benchmarks/speed.py --only ppo dqn --repeats 5 --seconds 10

Each measurement is a process of its own, because the number of threads is fixed when a library starts; the sides take
turns, so that a busy spell of the machine meets all. Each side is run on one thread and on all of them; the table
gives its better one, as a median over the repeats. All sides have the same hyper-parameters, as far as they go in
`speed_sides.py`, and are timed once compiled, warm and learning. Two things differ, by what the libraries are: the
actor of SBX's TD3 learns from the least of both critics, not from the first, and its targets move at every update.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from speed_sides import TASKS, measure_peer, measure_products, measure_zhixing

Products = list[tuple[tuple[int, int, int], float]]  # ((m, k, n) of [m, k] x [k, n], how often in one step)
CONTINUOUS = ("sac", "td3", "ddpg")
PEERS = {"Stable-Baselines3": "stable_baselines3", "SBX": "sbx"}  # the packages of the sides beside zhixing
WITH_SBX = tuple(f"{name}{variant}" for name in CONTINUOUS for variant in ("", "_64", "_halfcheetah"))
PEERED = ("ppo", "a2c", "trpo", "dqn", "dqn_64", *WITH_SBX)
LIMITED = ("ppo", "a2c", "dqn", "dqn_64", *CONTINUOUS)  # whose matrix products are counted
DISTRIBUTIONS = {"stable_baselines3": "stable-baselines3", "sb3_contrib": "sb3-contrib", "sbx": "sbx-rl",
                 "envpool": "envpool", "mujoco": "mujoco"}  # fmt: skip
REPLAYS, CAPACITIES = ("uniform", "proportional", "rank"), (10_000, 100_000, 1_000_000)
SIZES = {"CartPole-v1": (4, 2), "Pendulum-v1": (3, 1)}  # of an observation; actions, or numbers in one
SEEDS = 16
SECTIONS = (*PEERED, "limit", "seeds", "replay")


def in_process(threads: int, what: str, program: str = __file__, **arguments: Any) -> Any:
    """Run one of the functions of `speed_sides` in a new process of `program` with that many threads."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),  # PyTorch
        "NPROC": str(threads),  # JAX; XLA's own flag --xla_cpu_multi_thread_eigen leaves a second core in use
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the first call shall compile
        "JAX_PLATFORMS": "cpu",
    }
    if what == "peer":
        arguments["threads"] = threads
    command = [sys.executable, program, "--measure", what, json.dumps(arguments)]
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


def network(batch: int, sizes: tuple[int, ...], often: float, weights: bool = False, inputs: bool = False) -> Products:
    """The products of a forward pass through layers of these `sizes`, Y = X W, and of the backward pass, if any.

    That is dW = Xᵀ dY for the gradient of the `weights`, and dX = dY Wᵀ, for the first layer only if that of the
    `inputs` is asked for.
    """
    layers = list(pairwise(sizes))
    products = [(batch, k, n) for k, n in layers]
    if weights:
        products += [(k, batch, n) for k, n in layers]
    if weights or inputs:
        products += [(batch, n, k) for k, n in (layers if inputs else layers[1:])]
    return [(product, often) for product in products]


def parameters(*sizes: int) -> int:
    return sum((k + 1) * n for k, n in pairwise(sizes))


def work(task: str) -> tuple[Products, float]:
    """-> the matrix products of one environment step, and the operations on single parameters.

    Of these RMSProp makes 7 for each, Adam 12, the gradient's norm 2, and a target network that follows slowly 3.
    """
    if task in CONTINUOUS:
        return continuous_work(task)
    s = TASKS[task]
    observation, action = SIZES[s["environment"]]
    n, hidden = s["num_environments"], s["hidden"]
    if "rollout_length" in s:
        rollout, minibatches = n * s["rollout_length"], s.get("minibatches", 1)
        updates = s.get("epochs", 1) * minibatches / rollout  # a step
        batch = rollout // minibatches
        actor, critic = (observation, *hidden, action), (observation, *hidden, 1)
        values = 2 if task == "ppo" else 1  # V(s) and V(s') for the advantages; A2C's loss has V(s) already
        products = network(n, actor, 1 / n) + network(rollout, critic, values / rollout)
        products += network(batch, actor, updates, weights=True) + network(batch, critic, updates, weights=True)
        learned = parameters(*actor) + parameters(*critic)
        return products, (9 if task == "a2c" else 14) * learned * updates
    values = observation, *hidden, action
    products = network(n, values, 1 / n) + network(s["batch_size"], values, 1.0)  # acting; the target network
    products += network(s["batch_size"], values, 1.0, weights=True)
    return products, 14 * parameters(*values)


def continuous_work(task: str) -> tuple[Products, float]:
    """`work` of SAC, TD3 and DDPG: an update is one step of the critics and, every `policy_delay`, one of the actor."""
    s = TASKS[task]
    observation, action = SIZES[s["environment"]]
    actor = observation, *s["hidden"], 2 * action if task == "sac" else action
    critic = observation + action, *s["hidden"], 1
    batch, improved = s["batch_size"], 1 / s.get("policy_delay", 1)
    critics = 1 if task == "ddpg" else 2
    judges = 2 if task == "sac" else 1  # critics in the actor's loss; their weights get no gradient from it
    products = network(1, actor, 1.0)  # acting
    products += network(batch, actor, 1.0) + network(batch, critic, critics)  # the targets
    products += network(batch, critic, critics, weights=True)
    products += network(batch, actor, improved, weights=True) + network(batch, critic, judges * improved, inputs=True)
    of_actor, of_critics = parameters(*actor) * improved, parameters(*critic) * critics
    targets = of_critics if task == "sac" else of_actor + of_critics * improved
    return products, 14 * (of_actor + of_critics) + 3 * targets


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
    compared = {task: results[task] for task in PEERED if task in results}
    rates = []
    for task, sides in compared.items():
        mine = sides["zhixing"]["rate"]
        row = [title(task), f"{mine:,.0f}"]
        for peer in PEERS:
            rate = sides[peer]["rate"] if peer in sides else None
            row += [f"{rate:,.0f}", f"{mine / rate:.1f}"] if rate else ["", ""]
        rates.append(tuple(row))
    text += table("task|zhixing, steps/s|" + "|".join(f"{peer}, steps/s|zhixing / it" for peer in PEERS), rates)
    details = [
        (title(task), name, r["threads"], f"{r['cores']:.2f}", f"{r['import']:.1f}", f"{r['first']:.1f}")
        for task, sides in compared.items() for name, r in sides.items()
    ]  # fmt: skip
    text += table("task|side|threads|cores used|import, s|first call, s", details)
    limited = [
        (r["task"], r["threads"], f"{r['operations'] / 1e6:.3g}", f"{r['rate']:,.0f}",
         f"{r['reached'] / 1e9:.0f}", f"{r['limit']:,.0f}", f"{r['rate'] / r['limit']:.0%}",
         f"{r['large'] / 1e9:.0f}", f"{r['large_limit']:,.0f}", f"{r['rate'] / r['large_limit']:.0%}")
        for r in results.get("limit", [])
    ]  # fmt: skip
    head = "task|threads|MFLOP/step|steps/s|GFLOP/s, its products|limit, steps/s|reached"
    text += table(head + "|GFLOP/s, 1024 x 1024|limit, steps/s|reached", limited)
    seeds = [
        (title(task), f"{r['1']['rate']:,.0f}", f"{r[str(SEEDS)]['rate']:,.0f}",
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


def title(task: str) -> str:
    return f"{task} {TASKS[task]['environment']}"


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
        functions = {"zhixing": measure_zhixing, "peer": measure_peer, "products": measure_products}
        print(json.dumps(functions[options.measure[0]](**json.loads(options.measure[1]))))
        return
    tasks = [task for task in PEERED if task in options.only]
    for package in sorted({package for task in tasks for package in packages(task)}):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"speed: {package} is missing; pip install {DISTRIBUTIONS[package]}, or --only the others")

    results: dict[str, Any] = {"machine": machine() | {"repeats": options.repeats, "seconds": options.seconds}}

    def zhixing(task: str, **more: Any) -> dict[str, Any]:
        return {"what": "zhixing", "task": task, "seconds": options.seconds, **more}

    for task in tasks:
        sides = {"zhixing": zhixing(task)}
        for peer, package in peers(task).items():
            sides[peer] = {"what": "peer", "package": package, "task": task, "seconds": options.seconds}
        results[task] = compare(sides, options.repeats)
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


def peers(task: str) -> dict[str, str]:
    """The sides beside zhixing, each with its package; TRPO is in the contrib package of Stable-Baselines3."""
    if task == "trpo":
        return {"Stable-Baselines3": "sb3_contrib"}
    return {peer: package for peer, package in PEERS.items() if peer != "SBX" or task in WITH_SBX}


def packages(task: str) -> list[str]:
    """What the sides of a task need besides zhixing."""
    simulators = ["envpool", "mujoco"] if TASKS[task]["environment"] == "HalfCheetah-v5" else []
    return [*peers(task).values(), *simulators]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    try:
        described = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        described = []
    names = [line.partition(": ")[2] for line in described if line.startswith("model name")]
    installed = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
    packages = [name for name in ("zhixing", "jax", "torch", "gymnasium", *DISTRIBUTIONS.values()) if name in installed]
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "unknown",
        "versions": [f"Python {platform.python_version()}", *(f"{name} {installed[name]}" for name in packages)],
    }


if __name__ == "__main__":
    main()
