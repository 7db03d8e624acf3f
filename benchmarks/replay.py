"""What the choice of transitions is worth: uniform, emphasis on recent experience, prioritised; SAC and TD3.

    python benchmarks/replay.py                     # all comparisons, into benchmarks/replay.md and .json
    python benchmarks/replay.py --only Pendulum     # those whose command contains it; the others stay as they are

The area under the curve is the mean of a seed's greedy evaluations at 5 %, 10 %, ..., 100 % of its steps; IQM over
seeds, with its 95 % bootstrap interval.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np

from zhixing import statistics
from zhixing.records import read_metrics

HERE = Path(__file__).parent
SMALL = "--seeds 5 --total-steps 50000 --algorithm.hidden 64 64 --algorithm.learning-starts 2000"
COMMANDS = (
    "replay Pendulum-v1 --seeds 10",
    "replay_td3 Pendulum-v1 --seeds 10",
    f"replay HalfCheetah-v5 {SMALL}",
    f"replay_td3 HalfCheetah-v5 {SMALL}",
)


def areas(folder: Path) -> np.ndarray:
    """[seeds], the mean of each seed's evaluations after step 0."""
    table = read_metrics(folder)
    known = ~np.isnan(table["evaluation/return"]) & (table["step"] > 0)
    return np.array([table["evaluation/return"][known & (table["seed"] == s)].mean() for s in np.unique(table["seed"])])


def measure(command: str, folder: Path) -> list[dict]:
    """Compare, unless the folder holds the finished comparison; a row for each rung."""
    if not (folder / "comparison.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["zhixing", "compare", *command.split(), "--run-dir", str(folder), "--quiet"], check=True)
    rungs = [path.parent.name for path in sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)]
    rows = []
    for rung in rungs:
        scores = areas(folder / rung)
        low, high = statistics.bootstrap_interval(scores)
        final = json.loads((folder / rung / "summary.json").read_text())["evaluation"]
        rows.append(
            {
                "command": f"zhixing compare {command}",
                "rung": rung,
                "area": float(statistics.iqm(scores)),
                "interval": [float(low), float(high)],
                "final": final["iqm"],
                "final_interval": final["interval"],
            }
        )
    return rows


def markdown(results: dict[str, list[dict]]) -> str:
    lines = [
        "# Which transitions to learn from\n",
        "`python benchmarks/replay.py`. The area under the curve is the mean of a seed's greedy evaluations at 5 %, "
        "10 %, ..., 100 % of its steps: IQM over seeds with its 95 % bootstrap interval over seeds.",
    ]
    for command, rows in results.items():
        lines += [f"\n`zhixing compare {command}`\n", "| rung | area under the curve | final return |", "|---|---|---|"]
        for row in rows:
            (low, high), (final_low, final_high) = row["interval"], row["final_interval"]
            lines.append(
                f"| {row['rung']} | {row['area']:.1f} [{low:.1f}, {high:.1f}] "
                f"| {row['final']:.1f} [{final_low:.1f}, {final_high:.1f}] |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="comparisons whose command contains this")
    parser.add_argument("--runs", type=Path, default=Path("runs/replay"), help="where the comparisons go")
    options = parser.parse_args()
    file = HERE / "replay.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for number, command in enumerate(COMMANDS):
        if options.only in command:
            results[command] = measure(command, options.runs / str(number))
            file.write_text(json.dumps(results, indent=1) + "\n")
            (HERE / "replay.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
