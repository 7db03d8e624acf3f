"""The results table: every judged task, with its preset, five seeds in one program, and the score it must reach.

    python benchmarks/results.py                     # all rows, into benchmarks/results.md, .json and curves
    python benchmarks/results.py --only dqn          # rows whose command contains "dqn"; the others stay as they are
    python benchmarks/results.py --again             # train anew what is already in the folder of runs

The return is that of greedy episodes after training, true and undiscounted; IQM over seeds with its 95 % bootstrap
interval over seeds.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    command: str  # what follows `zhixing train`
    threshold: float
    reference: str  # the published or exact score next to it
    exact: bool = False  # the table's value is computed from the environment's table, not sampled
    at_most: bool = False  # what the row shows is that the threshold is not reached


def rows() -> list[Row]:
    return [
        Row("ppo CartPole-v1 --seeds 5", 475, "500 (optimum)"),
        Row("ppo CartPole-v1 --seeds 5 --environment.backend gymnasium", 475, "500 (optimum)"),
        Row("ppo Pendulum-v1 --seeds 5", -200, "-172 (rl-baselines3-zoo), -137.5 (optimum)"),
        Row("ppo LunarLander-v3 --seeds 5", 220, "242 (rl-baselines3-zoo)"),
        Row("ppo Acrobot-v1 --seeds 5", -85, "-73.5 (rl-baselines3-zoo, 1M steps)"),
        Row("ppo BipedalWalker-v3 --seeds 3", 280, "287.9 (rl-baselines3-zoo)"),
        Row("ppo Hopper-v5 --seeds 3", 2100, "2410 (rl-baselines3-zoo), 2383 (CleanRL)"),
        Row("ppo Taxi-v4 --seeds 5 --environment.options.action_mask true", 7.5, "7.93 (optimum)"),
        Row("ppo zhixing/TMaze-v0 --seeds 5", 0.3, "0 (best without a memory)", at_most=True),
        Row("recurrent_ppo zhixing/TMaze-v0 --seeds 5", 0.95, "1 (optimum)"),
        Row("reinforce CartPole-v1 --seeds 5", 475, "483 (SLM-Lab)"),
        Row("reinforce CartPole-v1 --seeds 5 --algorithm.baseline false", 450, "483 (SLM-Lab)"),
        Row("ac CartPole-v1 --seeds 5", 475, "500 (optimum)"),
        Row("ac CartPole-v1 --seeds 5 --algorithm.critic q", 300, "500 (optimum)"),
        Row("a2c CartPole-v1 --seeds 5", 475, "500 (rl-baselines3-zoo)"),
        Row("a2c Acrobot-v1 --seeds 5", -90, "-83.4 (rl-baselines3-zoo)"),
        Row("a2c Pendulum-v1 --seeds 5", -200, "-163 (rl-baselines3-zoo)"),
        Row(
            "a2c CartPole-v1 --seeds 5 --algorithm.optimiser kfac --algorithm.learning-rate 0.25 --total-steps 1000000",
            460,
            "487.6 (ACKTR, Stable-Baselines2, 1M steps)",
        ),
        Row("a3c CartPole-v1 --seeds 3 --workers.count 2", 475, "500 (optimum)"),
        Row("a3c CartPole-v1 --seeds 3 --workers.count 4", 475, "500 (optimum)"),
        Row("dppo CartPole-v1 --seeds 3 --workers.count 2", 475, "500 (optimum)"),
        Row("dppo CartPole-v1 --seeds 3 --workers.count 4", 475, "500 (optimum)"),
        Row("dppo Pendulum-v1 --seeds 3 --workers.count 2", -200, "-137.5 (optimum)"),
        Row("dppo Pendulum-v1 --seeds 3 --workers.count 4", -200, "-137.5 (optimum)"),
        Row("dppo LunarLanderContinuous-v3 --seeds 3 --workers.count 2", 200, "270.9 (rl-baselines3-zoo, PPO)"),
        Row("acer CartPole-v1 --seeds 5", 475, "498.6 (Stable-Baselines2)"),
        Row("acer Acrobot-v1 --seeds 5", -92, "-90.9 (Stable-Baselines2)"),
        Row("acer LunarLander-v3 --seeds 5", 180, "185.2 (Stable-Baselines2)"),
        Row("acer Pendulum-v1 --seeds 5", -250, "-137.5 (optimum)"),
        Row("trpo CartPole-v1 --seeds 5", 475, "500 (rl-baselines3-zoo)"),
        Row("trpo Acrobot-v1 --seeds 5", -90, "-83.1 (rl-baselines3-zoo)"),
        Row("trpo MountainCarContinuous-v0 --seeds 5", 90, "92.5 (rl-baselines3-zoo)"),
        Row("trpo Pendulum-v1 --seeds 5", -200, "-174.6 (rl-baselines3-zoo), -137.5 (optimum)"),
        Row("trpo LunarLander-v3 --seeds 5", 130, "133.2 (rl-baselines3-zoo)"),
        Row("trpo Hopper-v5 --seeds 3", 2800, "3618 (rl-baselines3-zoo), 3372 (sb3-contrib, 3 seeds)"),
        Row("dqn CartPole-v1 --seeds 5", 475, "500 (optimum)"),
        Row("dqn CartPole-v1 --seeds 5 --algorithm.double", 475, "500 (optimum)"),
        Row("dqn CartPole-v1 --seeds 5 --algorithm.dueling mean", 475, "500 (optimum)"),
        Row("dqn MountainCar-v0 --seeds 5", -115, "-100.8 (rl-baselines3-zoo), -97.1 (optimum)"),
        Row("dqn Acrobot-v1 --seeds 5 --algorithm.replay proportional", -90, "-83.9 (SLM-Lab, double + PER)"),
        Row("dqn Acrobot-v1 --seeds 5 --algorithm.dueling mean", -90, "-77 (rl-baselines3-zoo, DQN)"),
        Row("dqn LunarLander-v3 --seeds 5 --algorithm.double --algorithm.replay proportional", 200, "265.9 (SLM-Lab)"),
        Row(
            "dqn Breakout-MinAtar --seeds 5", 11.1, "11.1 (one run of the authors' DQN, 1M steps; sticky actions there)"
        ),
        Row("dqn SpaceInvaders-MinAtar --seeds 5", 20.5, "4.1 (random policy)"),
        Row("dqn zhixing/BitFlipping-v0 --seeds 5", -8, "-6.5 (optimum; -15 without hindsight)"),
        Row("ddpg Pendulum-v1 --seeds 5", -175, "-137.5 (optimum)"),
        Row("td3 Pendulum-v1 --seeds 5", -175, "-137.5 (optimum)"),
        Row("sac Pendulum-v1 --seeds 5", -175, "-137.5 (optimum)"),
        Row("sac Pendulum-v1 --seeds 5 --algorithm.state-value --algorithm.temperature 0.2", -175, "-137.5 (optimum)"),
        Row("sac MountainCarContinuous-v0 --seeds 5", 90, "94.7 (rl-baselines3-zoo)"),
        Row("ddpg MountainCarContinuous-v0 --seeds 5", 90, "93.5 (rl-baselines3-zoo)"),
        Row("td3 MountainCarContinuous-v0 --seeds 5", 90, "93.5 (rl-baselines3-zoo)"),
        Row("ddpg LunarLanderContinuous-v3 --seeds 5", 200, "230.2 (rl-baselines3-zoo)"),
        Row("td3 LunarLanderContinuous-v3 --seeds 5", 200, "207.5 (rl-baselines3-zoo)"),
        Row("sac LunarLanderContinuous-v3 --seeds 5", 250, "260.4 (rl-baselines3-zoo)"),
        Row("td3 InvertedDoublePendulum-v5 --seeds 5", 8400, "9360 (the most there is)"),
        Row("td3 HalfCheetah-v5 --seeds 5", 4500, "5242 (Spinning Up)"),
        Row("sac HalfCheetah-v5 --seeds 5", 5000, "6081 (Spinning Up)"),
        Row("sac FetchReach-v4 --seeds 5", -2.5, "-1.63 (a scripted controller)"),
        Row("td3 FetchReach-v4 --seeds 5", -2.5, "-1.63 (a scripted controller)"),
        Row("discrete_sac CartPole-v1 --seeds 5", 475, "500 (optimum)"),
        Row("mappo simple_spread_v3 --seeds 3", -12.5, "-7.8 (a scripted controller), -27.3 (random)"),
        Row("mappo simple_speaker_listener_v4 --seeds 3", -12, "-7.8 (a scripted controller), -41.6 (random)"),
        Row("ippo simple_spread_v3 --seeds 3", -20, "-7.8 (a scripted controller), -27.3 (random)"),
        Row("maddpg simple_spread_v3 --seeds 3", -14, "-7.8 (a scripted controller), -27.3 (random)"),
        Row("maddpg simple_speaker_listener_v4 --seeds 3", -15, "-7.8 (a scripted controller), -41.6 (random)"),
        Row("q_learning CliffWalking-v1 --seeds 5", -13, "-13 (optimum)", exact=True),
        Row("q_learning Taxi-v4 --seeds 5", 7.8, "7.93 (optimum)", exact=True),
        Row("q_learning FrozenLake-v1 --seeds 5 --evaluation.final-episodes 2000", 0.70, "0.744 (optimum)"),
        Row("sarsa CliffWalking-v1 --seeds 5", -17, "-15 (best policy with exploration at 0.1)", exact=True),
        Row("expected_sarsa CliffWalking-v1 --seeds 5", -17, "-15 (best policy with exploration at 0.1)", exact=True),
        Row("sarsa_lambda Taxi-v4 --seeds 5", 7.5, "7.93 (optimum)", exact=True),
        Row("sarsa_lambda MountainCar-v0 --seeds 5", -115, "-97.1 (optimum)"),
    ]


def exact_return(q: np.ndarray, environment_id: str, limit: int) -> float:
    """The mean return of the greedy policy over all start states, by following the table: deterministic ones only."""
    from zhixing.environments.tabular import TabularEnv

    table = TabularEnv.from_gymnasium(environment_id)
    outcome = np.asarray(table.probabilities).argmax(-1)
    total = []
    for start in np.asarray(table.start_states):
        state, collected = int(start), 0.0
        for _ in range(limit):
            action = int(q[state].argmax())
            chosen = state, action, outcome[state, action]
            collected += float(table.rewards[chosen])
            if table.terminated[chosen]:
                break
            state = int(table.successors[chosen])
        total.append(collected)
    return float(np.mean(total))


def measure(row: Row, folder: Path) -> dict:
    """Train, unless the folder holds the finished run, and return what the table shows."""
    from zhixing import statistics
    from zhixing.run import TrainedRun

    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = ["zhixing", "train", *row.command.split(), "--run-dir", str(folder), "--quiet"]
        subprocess.run(command, check=True)
    run = TrainedRun.load(folder)
    summary = run.summary
    evaluation = summary["evaluation"]
    if row.exact:
        tables = np.asarray(run._learner.q)
        limit = run.environment.max_episode_steps or 1_000
        scores = [exact_return(q, run.environment.id, limit) for q in tables]
        low, high = statistics.bootstrap_interval(scores)
        evaluation = {"iqm": float(statistics.iqm(scores)), "interval": [float(low), float(high)], "per_seed": scores}
    return {
        "command": f"zhixing train {row.command}",
        "steps": summary["environment_steps"],
        "iqm": evaluation["iqm"],
        "interval": evaluation["interval"],
        "per_seed": evaluation["per_seed"],
        "threshold": row.threshold,
        "at_most": row.at_most,
        "reference": row.reference,
        "backend": summary["backend"],
        "seconds": summary["seconds"],
        "compile_seconds": summary["compile_seconds"],
    }


def markdown(results: list[dict]) -> str:
    lines = [
        "# Results",
        "",
        "Greedy episodes after training, true returns: IQM over seeds [95 % bootstrap interval over seeds]. All seeds "
        "of a row are trained side by side in one program; seconds are those of training all of them, without "
        "compilation. "
        f"Made by `python benchmarks/results.py` on {machine()}. Taxi is the exact mean over all 300 start "
        "states, CliffWalking the exact return, FrozenLake over 2000 episodes of each seed; the others over 100 "
        "episodes of each seed.",
        "",
        "| command | steps of each seed | IQM | each seed | needed | reference | backend | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        low, high = r["interval"]
        digits = 3 if abs(r["iqm"]) < 1 else 1 if abs(r["iqm"]) > 20 else 2
        seeds = ", ".join(f"{x:.{digits}f}" for x in r["per_seed"])
        needed = f"below {r['threshold']}" if r.get("at_most") else r["threshold"]
        lines.append(
            f"| `{r['command']}` | {r['steps']:,} | **{r['iqm']:.{digits}f}** [{low:.{digits}f}, {high:.{digits}f}] "
            f"| {seeds} | {needed} | {r['reference']} | {r['backend']} | {r['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def title(row: Row) -> str:
    """The command without what it has in common with others."""
    words = row.command
    for part in (
        "--seeds 5",
        "--seeds 3",
        "--environment.backend",
        "--environment.options.",
        "--algorithm.",
        "--workers.",
        "zhixing/",
    ):
        words = words.replace(part, "")
    return " ".join(words.split(" --evaluation")[0].split())


def file_name(row: Row) -> str:
    return title(row).replace(" ", "-")


def machine() -> str:
    model = "an unknown processor"
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    from importlib.metadata import version

    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, jax {version('jax')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose command contains this")
    parser.add_argument("--again", action="store_true", help="train anew where there is a finished run")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="where the run folders go")
    arguments = parser.parse_args()
    from zhixing.plotting import plot_runs

    store = HERE / "results.json"
    known = {r["command"]: r for r in json.loads(store.read_text())} if store.exists() else {}
    (HERE / "curves").mkdir(exist_ok=True)
    failed = []
    for row in rows():
        command = f"zhixing train {row.command}"
        if arguments.only in row.command:
            name = file_name(row)
            if arguments.again:
                shutil.rmtree(arguments.runs / name, ignore_errors=True)
            known[command] = measure(row, arguments.runs / name)
            plot_runs([arguments.runs / name], HERE / "curves" / f"{name}.svg", title=title(row))
            print(command, known[command]["iqm"], known[command]["per_seed"], flush=True)
            if (known[command]["iqm"] > row.threshold) if row.at_most else (known[command]["iqm"] < row.threshold):
                failed.append(command)
        ordered = [known[c] for r in rows() if (c := f"zhixing train {r.command}") in known]
        store.write_text(json.dumps(ordered, indent=1) + "\n")
        (HERE / "results.md").write_text(markdown(ordered))
    if failed:
        sys.exit("below the threshold: " + "; ".join(failed))


if __name__ == "__main__":
    main()
