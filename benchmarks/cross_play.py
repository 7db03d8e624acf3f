"""Rivals against opponents that are held fixed: what MADDPG's agents are worth, and what its ensembles are.

    python benchmarks/cross_play.py            # into benchmarks/cross_play.md and .json
    python benchmarks/cross_play.py --again    # train anew what is already in the folder of runs

simple_tag: predators against prey that runs at random. simple_adversary: the good agents of one run against the
adversary of another, with one policy an agent and with ensembles of three.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

from zhixing.cross_play import cross_play
from zhixing.run import TrainedRun

HERE = Path(__file__).parent
EPISODES = 1_000  # of each seed
SEEDS = 3
TAG = f"maddpg simple_tag_v3 --seeds {SEEDS}"
ADVERSARY = {
    "K = 1": f"maddpg simple_adversary_v3 --seeds {SEEDS}",
    "K = 3": f"maddpg simple_adversary_v3 --seeds {SEEDS} --algorithm.ensemble 3",
}


def trained(command: str, runs: Path, again: bool) -> TrainedRun:
    folder = runs / command.replace("--", "").replace(" ", "-")
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["zhixing", "train", *command.split(), "--run-dir", folder, "--quiet"], check=True)
    return TrainedRun.load(folder)


def of_team(agents: dict[str, Any], team: str) -> str:
    """The IQM over seeds, and its interval, of a team's first agent: those of a team are paid alike."""
    its = next(numbers for name, numbers in agents.items() if name.startswith(team))
    low, high = its["interval"]
    return f"{its['iqm']:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/cross_play"))
    parser.add_argument("--again", action="store_true")
    own = parser.parse_args()

    predators = trained(TAG, own.runs, own.again)
    tag = cross_play(predators, None, EPISODES)
    runs = {name: trained(command, own.runs, own.again) for name, command in ADVERSARY.items()}
    pairs: dict[str, dict[str, Any]] = {
        good: {bad: cross_play(runs[good], runs[bad], EPISODES)["agent"] for bad in runs} for good in runs
    }
    against_random = {name: cross_play(run, None, EPISODES) for name, run in runs.items()}

    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    lines = [
        "# Rivals against fixed opponents",
        "",
        f"Returns of 25-step episodes: IQM over {SEEDS} seeds of the mean over {EPISODES} episodes [95 % bootstrap "
        f"interval over seeds]. Made by `python benchmarks/cross_play.py` on {machine}.",
        "",
        "## simple_tag",
        "",
        f"`zhixing train {TAG}`, then `zhixing evaluate RUN --against random`:",
        "",
        "| predators | prey | a predator's return | the prey's return |",
        "|---|---|---|---|",
    ]
    sides = {"all": ("trained", "trained"), "adversary": ("trained", "random"), "agent": ("random", "trained"),
             "none": ("random", "random")}  # fmt: skip
    for team, (hunting, hunted) in sides.items():
        found = tag[team]
        lines.append(f"| {hunting} | {hunted} | {of_team(found, 'adversary')} | {of_team(found, 'agent')} |")
    lines += ["", "## simple_adversary", "", *(f"- {k}: `zhixing train {c}`" for k, c in ADVERSARY.items()), ""]
    for title, team in (("a good agent's return", "agent"), ("the adversary's return", "adversary")):
        opponents = [*runs, "random"]
        lines += [f"| {title} | " + " | ".join(f"against adversary {name}" for name in opponents) + " |"]
        lines += ["|---" * (len(opponents) + 1) + "|"]
        for good in runs:
            cells = [of_team(pairs[good][bad], team) for bad in runs]
            cells.append(of_team(against_random[good]["agent"], team))
            lines.append(f"| good agents {good} | " + " | ".join(cells) + " |")
        cells = [of_team(against_random[bad]["adversary"], team) for bad in runs]
        cells.append(of_team(next(iter(against_random.values()))["none"], team))
        lines += [f"| good agents random | {' | '.join(cells)} |", ""]
    (HERE / "cross_play.md").write_text("\n".join(lines), encoding="utf-8")
    report = {"machine": machine, "tag": tag, "adversary": pairs, "adversary_against_random": against_random}
    (HERE / "cross_play.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
