"""The command line: `zhixing train | compare | resume | evaluate | watch | skills | plot | list`.

Heavy imports happen inside the commands, so that `zhixing --help` answers at once.
"""

import argparse
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from zhixing.errors import Diverged, Interrupted, UsageError, unknown

EXIT_CODES = {UsageError: 2, Diverged: 1, Interrupted: 130, KeyboardInterrupt: 130}

EPILOG = """examples:
  zhixing train ppo CartPole-v1                    solved in seconds, with a live view
  zhixing train dqn CartPole-v1 --seeds 5 --algorithm.learning-rate 1e-3
  zhixing train runs/…/config.yaml                 the same run again
  zhixing resume runs/…                            goes on exactly where it was
  zhixing evaluate runs/… --episodes 100 --json
  zhixing watch runs/… --output episode.gif
  zhixing plot runs/… runs/… --output curves.png
  zhixing compare dqn CartPole-v1 --seeds 8        a ladder of settings: one figure, one table
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        wrong_type = re.fullmatch(r"argument ([^:]*): invalid int value: (.*)", message)
        if wrong_type:
            raise UsageError(f"{wrong_type[1]} is {wrong_type[2]}; it must be a whole number")
        raise UsageError(f"{message}; see {self.prog} --help")


def parser(command: str, description: str) -> Parser:
    made = Parser(prog=f"zhixing {command}", description=description, allow_abbrev=False)
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def train(arguments: Sequence[str]) -> None:
    """Train an algorithm on an environment, or a config.yaml again."""
    flags = parser("train", "Train an algorithm on an environment, or a config.yaml again.")
    flags.usage = "zhixing train ALGORITHM ENVIRONMENT [settings]  |  zhixing train CONFIG.yaml [settings]"
    flags.add_argument("--run-dir", type=Path, help="the run's folder (default: a new one under runs/)")
    flags.add_argument("--quiet", action="store_true", help="print nothing but errors")
    flags.epilog = "For the settings of an algorithm: zhixing train ppo CartPole-v1 --help"
    wants_help = "--help" in arguments or "-h" in arguments
    own, words = flags.parse_known_args([a for a in arguments if a not in ("--help", "-h")])
    names = leading_names(words)
    if wants_help and not names:
        flags.print_help()
        return
    if not words:
        raise UsageError("which algorithm, on what? for example: zhixing train ppo CartPole-v1")
    if not names:
        raise UsageError(f"the algorithm and the environment come first, then {words[0]}; see zhixing train --help")

    from zhixing import config as configs
    from zhixing.flags import read_flags

    mapping = chosen_settings(names)
    config = configs.from_mapping(mapping)
    if wants_help:
        print_settings(config, names)
        return
    config = configs.from_mapping(configs.merge(mapping, read_flags(words[len(names) :], config)))

    from zhixing.training import train_config

    train_config(config, own.run_dir, own.quiet)


def compare(arguments: Sequence[str]) -> None:
    """Train a ladder of settings, and say which rung is better than which."""
    flags = parser("compare", "Train the rungs of a ladder with several seeds each: one figure and one table.")
    flags.usage = (
        "zhixing compare LADDER [ENVIRONMENT] [settings]  |  zhixing compare LADDER.yaml [ENVIRONMENT] [settings]  |  "
        "zhixing compare FOLDER"
    )
    flags.add_argument("--rungs", nargs="+", help="only these (default: all)")
    flags.add_argument("--run-dir", type=Path, help="the comparison's folder (default: a new one under runs/)")
    flags.add_argument("--quiet", action="store_true", help="print nothing but errors")
    flags.epilog = "FOLDER goes on with a comparison that was stopped. Settings are of every rung, as in zhixing train."
    if {"--help", "-h"} & set(arguments):
        from zhixing.ladders import ladder_names

        flags.epilog += f" Ladders: {', '.join(ladder_names())}."
    own, words = flags.parse_known_args(arguments)
    names = leading_names(words)
    if not names:
        raise UsageError("which ladder, on what? for example: zhixing compare dqn CartPole-v1")

    from zhixing import comparison
    from zhixing.flags import read_flags
    from zhixing.ladders import load_ladder, rung_configs

    if comparison.is_folder(names[0]):
        if len(words) > 1 or own.rungs or own.run_dir:
            raise UsageError(
                f"a comparison goes on with the settings in its folder; for others: zhixing compare "
                f"{Path(names[0]) / comparison.FILE} …"
            )
        comparison.go_on(Path(names[0]), own.quiet)
        return
    ladder = load_ladder(names[0])
    environment = names[1] if len(names) == 2 else None
    rungs = rung_configs(ladder, environment, lambda config: read_flags(words[len(names) :], config), own.rungs)
    comparison.start(ladder, rungs, own.run_dir, own.quiet)


def leading_names(words: Sequence[str]) -> list[str]:
    """What the settings are of: the one or two words before the first flag."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if len(names) > 2:
        raise UsageError(f"'{names[2]}' is one word too many; settings are given as --name value")
    return names


def chosen_settings(names: Sequence[str]) -> dict[str, Any]:
    """The settings that ALGORITHM ENVIRONMENT, or CONFIG.yaml [ENVIRONMENT], stand for."""
    from zhixing import config as configs
    from zhixing.algorithms import ALGORITHMS

    path = Path(names[0])
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        mapping = configs.load_run(path) if path.is_dir() else configs.load_yaml(path)
        if len(names) == 2:
            mapping = configs.merge(mapping, {"environment": {"id": names[1], "backend": "auto"}})
        return mapping
    algorithm = names[0].lower().replace("-", "_")
    if algorithm not in ALGORITHMS:
        raise unknown("algorithm", names[0], ALGORITHMS)
    if len(names) == 1:
        raise UsageError(f"which environment? for example: zhixing train {names[0]} CartPole-v1")
    return configs.preset(algorithm, names[1])


def print_settings(config: Any, names: Sequence[str]) -> None:
    """The help of `zhixing train ALGORITHM ENVIRONMENT`: every setting with its value."""
    import tyro

    from zhixing.config import Config

    kind: Any = Config[type(config.algorithm)]  # type: ignore[misc]
    description = (
        "Every setting, with the value it has. Besides these: --run-dir FOLDER, --quiet, --debug, and "
        "--environment.options.NAME VALUE for what the environment's maker takes."
    )
    program = f"zhixing train {' '.join(names)}"
    with contextlib.suppress(SystemExit):
        tyro.cli(kind, default=config, args=["--help"], prog=program, description=description)


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name} is {value}; it must be 1 or more")


def resume(arguments: Sequence[str]) -> None:
    """Go on with a run that was stopped or killed."""
    flags = parser("resume", "Go on with a run exactly where its last checkpoint is.")
    flags.add_argument("run", type=Path, help="the run's folder")
    flags.add_argument("--total-steps", type=int, help="go on to this many environment steps of each seed")
    flags.add_argument("--quiet", action="store_true", help="print nothing but errors")
    own = flags.parse_args(arguments)
    from zhixing.training import resume_directory

    resume_directory(own.run, total_steps=own.total_steps, quiet=own.quiet)


def evaluate(arguments: Sequence[str]) -> None:
    """Play greedy episodes with every seed's policy."""
    flags = parser("evaluate", "Play greedy episodes, in environments of their own, with every seed's policy.")
    flags.add_argument("run", type=Path, help="the run's folder, or a saved file")
    flags.add_argument("--episodes", type=int, default=100, help="of each seed (default: 100)")
    flags.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    flags.add_argument("--against", help="of several agents: another run that plays the other side, or 'random'")
    own = flags.parse_args(arguments)
    at_least_one("--episodes", own.episodes)
    from zhixing import runtime
    from zhixing.run import TrainedRun

    runtime.keep_compiled_programs()
    run = TrainedRun.load(own.run, which=own.checkpoint)
    if own.against is not None:
        from zhixing.cross_play import RANDOM, cross_play, table

        other = None if own.against == RANDOM else TrainedRun.load(own.against, which=own.checkpoint)
        found = cross_play(run, other, own.episodes)
        print(json.dumps(found) if own.json else table(found, str(own.run), own.against))
        return
    summary = run.evaluate(own.episodes)
    if own.json:
        print(json.dumps(summary))
        return
    low, high = summary["interval"]
    print(
        f"{type(run.algorithm).__name__} on {run.environment.id}, {run.step} steps, {len(run.loop.seeds)} seeds: "
        f"IQM {summary['iqm']:.2f} [{low:.2f}, {high:.2f}], mean {summary['mean']:.2f} ± {summary['std']:.2f}, "
        f"from {summary['min']:.2f} to {summary['max']:.2f}, {summary['episodes']} episodes"
    )
    for name, its in summary.get("agents", {}).items():
        low, high = its["interval"]
        print(f"  {name}: IQM {its['iqm']:.2f} [{low:.2f}, {high:.2f}], mean {its['mean']:.2f} ± {its['std']:.2f}")


def watch(arguments: Sequence[str]) -> None:
    """Write a video of greedy episodes, or open a window."""
    flags = parser("watch", "Write a video of greedy episodes, or open a window.")
    flags.add_argument("run", type=Path, help="the run's folder, or a saved file")
    flags.add_argument("--output", type=Path, help="an .mp4 or .gif (default: episode.gif in the run's folder)")
    flags.add_argument("--window", action="store_true", help="open a window (or print text frames) instead")
    flags.add_argument("--episodes", type=int, default=1)
    flags.add_argument("--seed", type=int, help="whose policy (default: the best seed's)")
    flags.add_argument("--skill", type=int, help="of a run of DIAYN (default: the first, then the second, …)")
    flags.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    own = flags.parse_args(arguments)
    at_least_one("--episodes", own.episodes)
    from zhixing import runtime
    from zhixing.run import TrainedRun
    from zhixing.watch import watch as play

    runtime.keep_compiled_programs()
    run = TrainedRun.load(own.run, which=own.checkpoint)
    folder = own.run if own.run.is_dir() else own.run.parent
    output = None if own.window else own.output or folder / "episode.gif"
    result = play(
        run.environment.id,
        run.player(own.seed, own.skill),
        output,
        episodes=own.episodes,
        seed=run.config.seed,
        max_steps=run.environment.max_episode_steps or run.config.evaluation.max_steps,
        options=run.config.environment.options,
    )
    if output is not None:
        print(result)


def skills(arguments: Sequence[str]) -> None:
    """Show what each skill of a DIAYN run does: a table, and their trajectories."""
    flags = parser("skills", "Play greedy episodes of each skill of a DIAYN run: a table, and a figure of their paths.")
    flags.add_argument("run", type=Path, help="the run's folder, or a saved file")
    flags.add_argument("--episodes", type=int, default=10, help="of each skill and seed (default: 10)")
    flags.add_argument("--output", type=Path, help="a .png, .svg or .pdf (default: skills.png in the run's folder)")
    flags.add_argument("--axes", type=int, nargs=2, default=(0, 1), help="numbers of the observation (default: 0 1)")
    flags.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    own = flags.parse_args(arguments)
    at_least_one("--episodes", own.episodes)
    from zhixing import runtime
    from zhixing.run import TrainedRun
    from zhixing.skills import draw_skills, play_skills

    runtime.keep_compiled_programs()
    run = TrainedRun.load(own.run, which=own.checkpoint)
    played = play_skills(run, own.episodes)
    folder = own.run if own.run.is_dir() else own.run.parent
    figure = draw_skills(run, played, own.output or folder / "skills.png", tuple(own.axes))
    summary = played.summary()
    if own.json:
        print(json.dumps(summary))
        return
    row = "{:>5}  {:>10}  {:>8}  {:>13}"
    print(row.format("skill", "return", "accuracy", "log q - log p"))
    for line in [*summary["skills"], summary | {"skill": "all"}]:
        numbers = f"{line['return']:.2f}", f"{line['accuracy']:.1%}", f"{line['pseudo_reward']:.2f}"
        print(row.format(line["skill"], *numbers))
    print(figure)


def plot(arguments: Sequence[str]) -> None:
    """Draw learning curves of one or many runs."""
    flags = parser("plot", "Draw learning curves: IQM over seeds with its 95 % bootstrap interval.")
    flags.add_argument("runs", type=Path, nargs="*", help="run folders")
    flags.add_argument("--output", type=Path, default=Path("curves.png"), help="a .png, .svg or .pdf")
    flags.add_argument("--metric", nargs="+", default=["evaluation/return"], help="columns of metrics.csv")
    flags.add_argument("--x", choices=("steps", "time"), default="steps")
    flags.add_argument("--log", action="store_true", help="powers of ten up the axis")
    flags.add_argument("--labels", nargs="+", help="one for each run")
    flags.add_argument("--title")
    own = flags.parse_args(arguments)
    from zhixing.plotting import plot_runs

    # A run may also come after the metrics.
    folders = [word for word in own.metric if Path(word).is_dir()]
    metrics = [word for word in own.metric if word not in folders]
    print(plot_runs([*own.runs, *map(Path, folders)], own.output, metrics, own.x, own.title, own.labels, own.log))


def list_all(arguments: Sequence[str]) -> None:
    """Show algorithms, environments, presets and ladders."""
    flags = parser("list", "Show algorithms, environments, presets and ladders.")
    flags.add_argument("what", nargs="?", choices=("algorithms", "environments", "presets", "ladders"))
    own = flags.parse_args(arguments)
    from zhixing.listing import print_list

    print_list(own.what)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "compare": compare,
    "resume": resume,
    "evaluate": evaluate,
    "watch": watch,
    "skills": skills,
    "plot": plot,
    "list": list_all,
}


def run_command(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {function.__doc__}" for name, function in COMMANDS.items()]
        print("usage: zhixing COMMAND …\n\nReinforcement learning, compiled end to end.\n\ncommands:")
        print("\n".join(lines), f"\n\n{EPILOG}\n`zhixing COMMAND --help` tells more.", sep="")
    elif arguments[0] == "--version":
        from importlib.metadata import version

        print(version("zhixing"))
    elif arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    else:
        COMMANDS[arguments[0]](arguments[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """The `zhixing` command; exits with 2 for a user's slip, 1 for a run that diverged, 130 when stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        run_command(arguments)
    except tuple(EXIT_CODES) as error:
        if "--debug" in arguments:
            raise
        print(f"zhixing: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))
