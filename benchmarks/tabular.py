"""The tabular and linear learners: what they learn, with which curves, and how fast beside a Python loop.

    python benchmarks/tabular.py                 # all, into benchmarks/tabular.md, .json and docs/assets/cliff.png
    python benchmarks/tabular.py --only speed    # one section; the others stay as they are

Learning: ten seeds in one program, with the presets where nothing else is said. Speed: Q-learning on CliffWalking-v1
against the same algorithm as a loop over a NumPy table and Gymnasium's own environment, each in processes of their
own, on one thread, taking turns.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from results import exact_return, machine

HERE = Path(__file__).parent
FIGURE = HERE.parent / "docs" / "assets" / "cliff.png"
SEEDS = 10
SPEED_SEEDS = 64

CLIFF = "--algorithm.learning-rate 0.1 --algorithm.learning-rate-decay 0 --total-steps 100000"
CURVES = {  # Sutton & Barto, example 6.6: ε = 0.1, γ = 1, as the presets have it
    "Q-learning": f"q_learning CliffWalking-v1 {CLIFF}",
    "Sarsa": f"sarsa CliffWalking-v1 {CLIFF}",
    "Expected Sarsa": f"expected_sarsa CliffWalking-v1 {CLIFF}",
}
PRESETS = {  # what follows `zhixing train`: the exact value of what it approaches, greedy and (CliffWalking) exploring
    "q_learning CliffWalking-v1": "-13, -45.80",
    "double_q_learning CliffWalking-v1": "-13, -45.80",
    "sarsa CliffWalking-v1": "-15, -20.71",
    "expected_sarsa CliffWalking-v1": "-15, -20.71",
    "n_step_td CliffWalking-v1": "-15, -20.71",
    "sarsa_lambda CliffWalking-v1": "-15, -20.71",
    "double_q_learning Taxi-v4": "7.93",
    "sarsa Taxi-v4": "7.93",
    "expected_sarsa Taxi-v4": "7.93",
    "n_step_td Taxi-v4": "7.93",
    "sarsa_lambda Taxi-v4": "7.93",
    "double_q_learning FrozenLake-v1 --evaluation.final-episodes 2000": "0.744",
    "sarsa FrozenLake-v1 --evaluation.final-episodes 2000": "0.744",
    "expected_sarsa FrozenLake-v1 --evaluation.final-episodes 2000": "0.744",
    "sarsa_lambda FrozenLake-v1 --evaluation.final-episodes 2000": "0.744",
    "n_step_td zhixing/Maze-v0": "1",
    "sarsa_lambda MountainCar-v0": "-97.1",
}
LAMBDAS = (0.0, 0.3, 0.6, 0.9)
BUDGETS = (50_000, 100_000, 200_000)


def train(words: str, folder: Path) -> dict[str, Any]:
    """`zhixing train` with ten seeds -> the greedy and the late exploring returns of each, and the episodes made."""
    from zhixing.records import read_metrics
    from zhixing.run import TrainedRun
    from zhixing.statistics import iqm

    command = ["zhixing", "train", *words.split(), "--seeds", str(SEEDS), "--run-dir", str(folder), "--quiet"]
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    subprocess.run(command, check=True)
    run, table = TrainedRun.load(folder), read_metrics(folder)
    greedy = run.summary["evaluation"]["per_seed"]
    if run.environment.id in ("CliffWalking-v1", "Taxi-v4"):  # certain outcomes: followed from every start
        limit = run.environment.max_episode_steps or 1_000
        greedy = [exact_return(q, run.environment.id, limit) for q in np.asarray(run._learner.q)]
    late = table["step"] > 0.8 * table["step"].max()
    exploring = [float(np.nanmean(table["episode/return"][late & (table["seed"] == s)])) for s in run.loop.seeds]
    return {
        "command": f"zhixing train {words} --seeds {SEEDS}",
        "steps": run.summary["environment_steps"],
        "greedy": [float(x) for x in greedy],
        "iqm": float(iqm(greedy)),
        "exploring": exploring,
        "episodes": float(table["episode/count"].sum() / SEEDS),
        "seconds": run.summary["seconds"],
    }


def draw_curves(folders: list[Path]) -> None:
    """The exploring returns over the steps, each row's mean over the episodes that ended since the row before."""
    from matplotlib.figure import Figure

    from zhixing.plotting import PALETTE
    from zhixing.records import read_metrics
    from zhixing.statistics import bootstrap_interval, iqm

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for name, folder, color, dash in zip(CURVES, folders, PALETTE, ("-", "-", "--"), strict=False):
        table = read_metrics(folder)
        steps = np.unique(table["step"])
        values = table["episode/return"][np.lexsort((table["step"], table["seed"]))].reshape(SEEDS, len(steps))
        low, high = bootstrap_interval(values)
        axes.fill_between(steps, low, high, color=color, alpha=0.16, linewidth=0)
        axes.plot(steps, iqm(values), dash, color=color, linewidth=1.8, label=name)
    for exact, text in ((-20.71, "best of those that explore: -20.71"), (-45.80, "optimal path, exploring: -45.80")):
        axes.axhline(exact, color="#7a7a7a", linestyle=":", linewidth=1)
        axes.annotate(
            text, (steps[-1], exact), (0, 12), textcoords="offset points", ha="right", color="#555555", size=8
        )
    axes.set(ylim=(-100, 0), xlabel="environment steps", ylabel="episode return, exploring")
    axes.set_title("CliffWalking-v1", loc="left")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", title=f"IQM of {SEEDS} seeds, 95 % interval", alignment="left")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE)


def measure_loop(seconds: float) -> dict[str, float]:
    """Q-learning as one writes it in an afternoon -> updates per second of the clock and of the processor."""
    import gymnasium

    environment, generator = gymnasium.make("CliffWalking-v1"), np.random.default_rng(0)
    q = np.zeros((environment.observation_space.n, environment.action_space.n))
    alpha, epsilon, discount, actions = 0.5, 0.1, 1.0, q.shape[1]
    state, _ = environment.reset(seed=0)
    updates, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        for _ in range(1_000):
            greedy = generator.random() >= epsilon
            action = int(q[state].argmax()) if greedy else int(generator.integers(actions))
            successor, reward, terminated, truncated, _ = environment.step(action)
            target = reward + (0.0 if terminated else discount * q[successor].max())
            q[state, action] += alpha * (target - q[state, action])
            state = environment.reset()[0] if terminated or truncated else successor
        updates += 1_000
    return {"wall": updates / (time.perf_counter() - started), "cpu": updates / (time.process_time() - cpu_started)}


def measure_zhixing(seconds: float, seeds: int) -> dict[str, float]:
    import speed

    settings = {"learning_rate": 0.5, "discount": 1.0}
    speed.TASKS["q_learning"] = {"environment": "CliffWalking-v1", "num_environments": 1, **settings}
    made = speed.measure_zhixing("q_learning", seconds, seeds)
    return {"wall": made["rate"], "cpu": made["rate"] / made["cores"]}


def measure_speed(pairs: int, seconds: float) -> dict[str, Any]:
    """Pairs of measurements, each side in a process of its own, in turns."""
    sides = {"python": ["loop"], "zhixing, 1 seed": ["zhixing", "1"], "zhixing": ["zhixing", str(SPEED_SEEDS)]}
    rows: dict[str, list[dict]] = {side: [] for side in sides}
    environment = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    for pair in range(pairs):
        for side, words in sides.items() if pair % 2 == 0 else reversed(sides.items()):
            command = [sys.executable, __file__, "--measure", str(seconds), *words]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, rows[side][-1], file=sys.stderr, flush=True)
    ratios = {
        clock: median(z[clock] / p[clock] for z, p in zip(rows["zhixing"], rows["python"], strict=True))
        for clock in ("wall", "cpu")
    }
    medians = {side: {clock: median(r[clock] for r in rows[side]) for clock in ("wall", "cpu")} for side in sides}
    return {"medians": medians, "ratio": ratios, "pairs": pairs, "seconds": seconds}


def report(results: dict[str, Any]) -> str:
    lines = ["# Tabular and linear learners", "", f"Made by `python benchmarks/tabular.py` on {machine()}.", ""]
    if "presets" in results:
        lines += [
            f"{SEEDS} seeds each, with the presets. Greedy: IQM after training; exact for CliffWalking and Taxi (mean "
            "over all starts), 2000 episodes of each seed for FrozenLake, else 100. Exploring: mean return of the "
            "episodes in the last fifth of training. Exact: of the optimum that the algorithm approaches.",
            "",
            "| command | steps of each seed | greedy | each seed | exploring | exact: greedy, exploring |",
            "|---|---|---|---|---|---|",
        ]
        for words, r in results["presets"].items():
            each = ", ".join(f"{x:.3g}" for x in sorted(r["greedy"]))
            lines.append(
                f"| `zhixing train {words}` | {r['steps']:,} | **{r['iqm']:.4g}** | {each} "
                f"| {np.mean(r['exploring']):.4g} | {PRESETS[words]} |"
            )
    if "curves" in results:
        lines += ["", "CliffWalking-v1 with α = 0.1, ε = 0.1, γ = 1 (`docs/assets/cliff.png`), 100k steps:", ""]
        lines += ["| algorithm | greedy, each seed | exploring, last fifth |", "|---|---|---|"]
        for name, r in results["curves"].items():
            each = ", ".join(f"{x:.0f}" for x in sorted(r["greedy"]))
            lines.append(f"| {name} | {each} | {np.mean(r['exploring']):.1f} |")
    if "lambda" in results:
        lines += ["", "Sarsa(λ) on Taxi-v4, otherwise as in its preset; λ = 0 is Sarsa. Greedy, exact; exploring:", ""]
        lines += ["| steps | " + " | ".join(f"λ = {x}" for x in LAMBDAS) + " |", "|---" * (len(LAMBDAS) + 1) + "|"]
        for steps in BUDGETS:
            cells = [results["lambda"][f"{steps}, {x}"] for x in LAMBDAS]
            shown = [f"{c['iqm']:.2f} ({c['episodes']:,.0f} episodes; {c['online']:.1f})" for c in cells]
            lines.append(f"| {steps:,} | " + " | ".join(shown) + " |")
        lines += [
            "",
            "In brackets the episodes that fit into the steps, and their mean return from the first to the last.",
        ]
    if "speed" in results:
        r = results["speed"]
        rates = {side: f"{m['wall']:,.0f} ({m['cpu']:,.0f})" for side, m in r["medians"].items()}
        lines += [
            "",
            f"Q-learning on CliffWalking-v1, updates per second of the clock (and per second that the processor was "
            f"busy with it; others use this machine too); medians of {r['pairs']} interleaved measurements of "
            f"{r['seconds']:g} s, one thread each, compilation left out:",
            "",
            f"| Python loop, NumPy and Gymnasium | 1 seed | {SPEED_SEEDS} seeds at once | ratio, median of pairs |",
            "|---|---|---|---|",
            f"| {rates['python']} | {rates['zhixing, 1 seed']} | {rates['zhixing']} "
            f"| **{r['ratio']['wall']:.0f}** ({r['ratio']['cpu']:.0f}) |",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    sections = ("presets", "curves", "lambda", "speed")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--runs", type=Path, default=Path("runs/tabular"), help="where the run folders go")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of speed")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        seconds, what, *seeds = options.measure
        made = measure_loop(float(seconds)) if what == "loop" else measure_zhixing(float(seconds), int(seeds[0]))
        print(json.dumps(made))
        return

    store = HERE / "tabular.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for section in options.only:
        if section == "presets":
            results[section] = {}
            for number, words in enumerate(PRESETS):
                results[section][words] = made = train(words, options.runs / f"preset-{number}")
                print(words, made["iqm"], made["greedy"], np.mean(made["exploring"]), file=sys.stderr, flush=True)
        elif section == "curves":
            folders = [options.runs / f"cliff-{number}" for number in range(len(CURVES))]
            results[section] = {
                name: train(words, folder) for (name, words), folder in zip(CURVES.items(), folders, strict=True)
            }
            draw_curves(folders)
        elif section == "lambda":
            from zhixing.records import read_metrics

            results[section] = {}
            for steps in BUDGETS:
                for trace_decay in LAMBDAS:
                    folder = options.runs / f"lambda-{steps}-{trace_decay}"
                    words = f"sarsa_lambda Taxi-v4 --total-steps {steps} --algorithm.trace-decay {trace_decay}"
                    made, table = train(words, folder), read_metrics(folder)
                    counts = table["episode/count"]
                    online = float(np.nansum(np.nan_to_num(table["episode/return"]) * counts) / counts.sum())
                    results[section][f"{steps}, {trace_decay}"] = made | {"online": online}
                    print(words, made["iqm"], made["greedy"], made["episodes"], online, file=sys.stderr, flush=True)
        else:
            results[section] = measure_speed(options.pairs, options.seconds)
        store.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "tabular.md").write_text(report(results))
    print(report(results), end="")


if __name__ == "__main__":
    main()
