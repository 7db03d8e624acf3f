"""How fast MAPPO and IPPO train on compiled particle worlds, beside JaxMARL's own scripts.

    git clone https://github.com/FLAIROx/JaxMARL
    pip install jaxmarl flax distrax hydra-core omegaconf wandb matplotlib
    python benchmarks/speed_agents.py JaxMARL        # into benchmarks/speed_agents.md and .json

JaxMARL's side is `make_train` of baselines/IPPO/ippo_ff_mpe.py and baselines/MAPPO/mappo_rnn_mpe.py with the sizes of
their own configurations, on their own simple_spread; zhixing's has the same sizes: 16 environments, rollouts of 128
steps, 4 epochs of 4 minibatches. JaxMARL has no MAPPO without a memory; zhixing's stands beside its IPPO, which
computes less. Each measurement is a process of its own, compiled before the clock starts; the sides take turns.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from speed import in_process
from speed_sides import TASKS, measure_zhixing

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {"environment": "simple_spread_v3", "num_environments": 16, "rollout_length": 128, "epochs": 4,
                         "minibatches": 4, "max_gradient_norm": 0.5, "learning_rate": 2.5e-4,
                         "normalize_value": "none", "entropy_coefficient": 0.01}  # fmt: skip
TASKS |= {
    "ippo": SIZES | {"hidden": (64, 64), "activation": "tanh"},
    "mappo": SIZES | {"hidden": (64, 64), "activation": "tanh"},
    "recurrent_mappo": SIZES | {"hidden": (128,), "memory_size": 128},
}
PEERS = {
    "ippo": "IPPO/ippo_ff_mpe",
    "mappo": "IPPO/ippo_ff_mpe",
    "recurrent_mappo": "MAPPO/mappo_rnn_mpe",
}
CONFIGS = {"IPPO/ippo_ff_mpe": "ippo_ff_mpe", "MAPPO/mappo_rnn_mpe": "mappo_homogenous_rnn_mpe"}


def measure_jaxmarl(path: str, script: str, steps: int) -> dict[str, float]:
    """Steps per second of a script's whole training, once compiled; nothing is logged."""
    import jax
    import yaml

    sys.modules["wandb"] = types.SimpleNamespace(log=lambda *_, **__: None)  # type: ignore[assignment]
    folder, name = (Path(path) / "baselines" / script).parent, Path(script).name
    sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    config = yaml.safe_load((folder / "config" / f"{CONFIGS[script]}.yaml").read_text().replace("1e7", "1.0e+7"))
    numbers = ("LR", "TOTAL_TIMESTEPS")
    config |= {key: float(config[key]) for key in numbers} | {"TOTAL_TIMESTEPS": steps, "NUM_SEEDS": 1}
    train = jax.jit(module.make_train(config)).lower(jax.random.PRNGKey(0)).compile()
    started = time.perf_counter()
    jax.block_until_ready(train(jax.random.PRNGKey(0)))
    return {"rate": steps / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jaxmarl", nargs="?", help="the folder of JaxMARL's repository")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=409_600, help="of JaxMARL's training")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        functions = {"zhixing": measure_zhixing, "jaxmarl": measure_jaxmarl}
        print(json.dumps(functions[options.measure[0]](**json.loads(options.measure[1]))))
        return
    if not options.jaxmarl or not (Path(options.jaxmarl) / "baselines").is_dir():
        raise SystemExit("speed_agents: name the folder of JaxMARL's repository, which has baselines/ in it")

    lines, rows = [], {}
    for task, script in PEERS.items():
        sides = {
            "zhixing": {"what": "zhixing", "task": task, "seconds": options.seconds},
            "jaxmarl": {"what": "jaxmarl", "path": options.jaxmarl, "script": script, "steps": options.steps},
        }
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.repeats):
            for threads in sorted({1, os.cpu_count() or 1}):
                for side, arguments in sides.items():
                    rate = in_process(threads, program=__file__, **arguments)["rate"]
                    found.setdefault((side, threads), []).append(rate)
                    print(f"{task}: {side}, {threads} threads: {rate:,.0f}", file=sys.stderr, flush=True)
        medians = {side: max(median(v) for (s, _), v in found.items() if s == side) for side in sides}
        rows[task] = {f"{side}, {threads} threads": rates for (side, threads), rates in found.items()}
        ratio = medians["zhixing"] / medians["jaxmarl"]
        script = f"baselines/{script}.py"
        lines.append(f"| {task} | {medians['zhixing']:,.0f} | `{script}` | {medians['jaxmarl']:,.0f} | {ratio:.1f} |")
    described = f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {version('jax')}"
    text = [
        "# MAPPO and IPPO beside JaxMARL",
        "",
        f"Environment steps per second on simple_spread with 3 agents, {described}; medians of {options.repeats} "
        "repeats, the sides taking turns, each at its better number of threads. Made by "
        "`python benchmarks/speed_agents.py JaxMARL`, whose text says what is compared.",
        "",
        "| zhixing | steps/s | JaxMARL | steps/s | zhixing / JaxMARL |",
        "|---|---|---|---|---|",
        *lines,
        "",
    ]
    (HERE / "speed_agents.md").write_text("\n".join(text))
    (HERE / "speed_agents.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
