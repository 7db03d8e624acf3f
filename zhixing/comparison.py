"""Comparisons: the rungs of a ladder trained one after the other, several seeds each; one figure and one table.

A comparison's folder holds `comparison.yaml` (complete, rerunnable), a folder for each rung, which is an ordinary
run, and, once all rungs are trained, `comparison.png` and `.svg`, `comparison.md` and `comparison.json`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zhixing import checkpoint, statistics, training
from zhixing import config as configs
from zhixing.assembly import build_environment, build_loop
from zhixing.config import Config
from zhixing.environments.base import Environment
from zhixing.errors import Diverged, Interrupted, UsageError
from zhixing.ladders import Ladder, added, ladder_names, load_ladder, rung_configs
from zhixing.plotting import plot_comparison
from zhixing.run import TrainedRun
from zhixing.trainer import stop_signals

FILE = "comparison.yaml"


@dataclass(frozen=True)
class Comparison:
    """Rungs, by name from the lowest on, and the folder where they are trained."""

    directory: Path
    form: str  # cumulative: a rung is held against the one before; independent: against the first
    rungs: dict[str, Config]
    own_environment: Any = None  # a user's class, function or object

    def folder(self, rung: str) -> Path:
        return self.directory / folder_name(rung)

    def over(self, rung: str) -> str | None:
        """The rung that `rung` is held against."""
        names = list(self.rungs)
        index = names.index(rung)
        return None if index == 0 else names[index - 1 if self.form == "cumulative" else 0]

    def adds(self, rung: str) -> dict[str, Any]:
        """The settings in which `rung` differs from the one that it is held against."""
        over = self.over(rung)
        return {} if over is None else added(self.rungs[over], self.rungs[rung])

    @property
    def runs(self) -> dict[str, TrainedRun]:
        return {rung: TrainedRun.load(self.folder(rung), self.own_environment) for rung in self.rungs}

    @property
    def table(self) -> list[dict[str, Any]]:
        """One entry a rung, as `comparison.json` holds them."""
        return json.loads((self.directory / "comparison.json").read_text())["rungs"]


def compare(
    ladder: str | Path | Mapping,
    environment: Any = None,
    /,
    *,
    rungs: Sequence[str] | None = None,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Comparison:
    """Train every rung of `ladder` on `environment`, with several seeds each, and hold them against each other.

    Args:
        ladder: a name ("dqn"), a YAML file or a mapping of that form, or the folder of a comparison to go on with.
        environment: as for `zx.train`; by default the ladder's own.
        rungs: the names of some rungs; by default all.
        run_dir: the comparison's folder; by default a new one under `runs/`. In one that holds some rungs already,
            finished ones are kept, and an unfinished one goes on where it was.
        settings: of every rung, as in YAML: `seeds=8`, `total_steps=10_000`, `algorithm={"learning_rate": 1e-3}`.

    Raises UsageError for what does not fit, Interrupted when stopped, Diverged, at the end, if a rung has.
    """
    if not isinstance(ladder, Mapping) and is_folder(ladder):
        return go_on(Path(ladder), quiet, environment)
    id = None if environment is None else training.environment_name(environment)
    loaded = load_ladder(ladder)
    return start(loaded, rung_configs(loaded, id, lambda _: settings, rungs), run_dir, quiet, environment)


def is_folder(name: str | Path) -> bool:
    """Whether it names a folder; a ladder's name is that of the ladder, whatever lies here."""
    return Path(name).is_dir() and str(name) not in ladder_names()


def start(
    ladder: Ladder, rungs: dict[str, Config], run_dir: str | Path | None, quiet: bool, environment: Any = None
) -> Comparison:
    """Carry out a comparison in a new folder, or in one that holds some of it."""
    own = environment is not None and not isinstance(environment, str | Environment)
    folders: dict[str, str] = {}
    made = {}
    for name, config in rungs.items():  # whatever does not fit is said before a folder is made
        same = folders.setdefault(folder_name(name), name)
        if same != name:
            raise UsageError(f"the rungs '{same}' and '{name}' would have the same folder; name them otherwise")
        built = build_environment(config, environment)
        made[name] = training.with_environment(config, built, own)
        build_loop(made[name], built)
    directory = training.writable_directory(run_dir, f"compare-{ladder.name}", next(iter(made.values())))
    if (directory / "config.yaml").exists():
        raise UsageError(f"{directory} holds a run; name another folder with --run-dir")
    comparison = Comparison(directory, ladder.form, made, environment)
    for name in made:
        require_same_settings(comparison, name)
    mappings = {name: configs.to_mapping(config) for name, config in made.items()}
    text = yaml.safe_dump({"form": ladder.form, "rungs": mappings}, sort_keys=False, allow_unicode=True)
    checkpoint.write_atomically(directory / FILE, text.encode())
    return carry_out(comparison, quiet)


def go_on(directory: Path, quiet: bool, environment: Any = None) -> Comparison:
    """Carry out the rest of the comparison in `directory`."""
    if not (directory / FILE).exists():
        raise UsageError(f"{directory} is no comparison, it holds no {FILE}; give a folder that `zhixing compare` made")
    ladder = load_ladder(directory / FILE)
    return start(ladder, rung_configs(ladder, None, lambda _: {}), directory, quiet, environment)


def folder_name(rung: str) -> str:
    """A rung's name as that of a folder."""
    return re.sub(r"[^\w.]+", "-", rung).strip("-.") or "rung"


def require_same_settings(comparison: Comparison, rung: str) -> None:
    """Raise UsageError if the rung's folder holds a run with other settings; how it is recorded does not count."""
    folder = comparison.folder(rung)
    if not (folder / "config.yaml").exists():
        return
    trained = configs.to_mapping(configs.from_mapping(configs.load_run(folder)))
    for name, before, after in configs.differences(trained, configs.to_mapping(comparison.rungs[rung])):
        if not name.startswith("record."):
            raise UsageError(
                f"{folder} was trained with {name} {before}, not {after}; name another folder with --run-dir"
            )


def carry_out(comparison: Comparison, quiet: bool) -> Comparison:
    """Train what is not trained yet, then write the figure and the table."""
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    how = f"go on with: zhixing compare {comparison.directory}"
    diverged: dict[str, str] = {}
    with stop_signals() as stopped:
        for number, rung in enumerate(comparison.rungs, 1):
            adds = described(comparison.adds(rung))
            say(f"{number}/{len(comparison.rungs)} {rung}" + (f": {adds}" if adds else ""))
            try:
                if not finished(comparison, rung):
                    train_rung(comparison, rung, quiet, stopped)
            except Diverged as error:
                diverged[rung] = str(error)
                say(f"diverged: {error}")
            except (Interrupted, KeyboardInterrupt) as stop:
                saved = "and saved" if isinstance(stop, Interrupted) else "at once"
                raise Interrupted(f"stopped at rung '{rung}' {saved}; {how}") from None
    results = [result_of(comparison, rung, diverged) for rung in comparison.rungs]
    write(comparison, results)
    say(f"\n{table_of(comparison, results)}\n\n{comparison.directory / 'comparison.png'}")
    for rung, message in diverged.items():
        raise Diverged(f"rung '{rung}': {message}; the other rungs are in {comparison.directory / 'comparison.md'}")
    return comparison


def finished(comparison: Comparison, rung: str) -> bool:
    if not (comparison.folder(rung) / "summary.json").exists():
        return False
    return read_summary(comparison, rung)["environment_steps"] == comparison.rungs[rung].total_steps


def train_rung(comparison: Comparison, rung: str, quiet: bool, stopped: Callable[[], bool]) -> None:
    """Train a rung from its beginning, or from where it was stopped."""
    if stopped():  # asked for when the rung before was at its very end
        raise Interrupted
    config, folder = comparison.rungs[rung], comparison.folder(rung)
    environment = build_environment(config, comparison.own_environment)
    resume = (folder / "config.yaml").exists()
    folder.mkdir(exist_ok=True)
    training.carry_out(config, environment, folder, resume, quiet, stopped)


# ------------------------------------------------------------------------------------------------ what came of it


def result_of(comparison: Comparison, rung: str, diverged: Mapping[str, str]) -> dict[str, Any]:
    """What a rung has reached, and the probability that it is better than the one that it is held against."""
    config, over = comparison.rungs[rung], comparison.over(rung)
    result = {"rung": rung, "folder": folder_name(rung), "adds": comparison.adds(rung), "seeds": config.seeds}
    if rung in diverged:
        return result | {"diverged": diverged[rung]}
    summary = read_summary(comparison, rung)
    evaluation = summary["evaluation"]
    result |= {key: evaluation[key] for key in ("iqm", "interval", "per_seed")} | {"seconds": summary["seconds"]}
    if over is not None and over not in diverged:
        scores = evaluation["per_seed"], read_summary(comparison, over)["evaluation"]["per_seed"]
        probability = statistics.probability_of_improvement(*scores)
        result |= {"over": over, "improvement": probability}
        result["improvement_interval"] = list(statistics.improvement_interval(*scores))
    return result


def read_summary(comparison: Comparison, rung: str) -> dict[str, Any]:
    return json.loads((comparison.folder(rung) / "summary.json").read_text())


def described(settings: Mapping[str, Any]) -> str:
    """As one would say it: `double true, n_step 3`."""
    names = {name: "algorithm" if name == "algorithm.name" else name.removeprefix("algorithm.") for name in settings}
    return ", ".join(f"{names[name]} {json.dumps(value).strip(chr(34))}" for name, value in settings.items())


def table_of(comparison: Comparison, results: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table in Markdown, its columns aligned."""
    below = "the rung before" if comparison.form == "cumulative" else f"'{next(iter(comparison.rungs))}'"
    rows = [("rung", "adds", "IQM [95 %]", f"P(better than {below}) [95 %]", "seconds")]
    for result in results:
        adds = described(result["adds"])
        if "diverged" in result:
            rows.append((result["rung"], adds, "diverged", "", ""))
            continue
        low, high = result["interval"]
        score = f"{result['iqm']:.2f} [{low:.2f}, {high:.2f}]"
        improvement = ""
        if "improvement" in result:
            low, high = result["improvement_interval"]
            improvement = f"{result['improvement']:.2f} [{low:.2f}, {high:.2f}]"
        rows.append((result["rung"], adds, score, improvement, f"{result['seconds']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(comparison: Comparison, results: Sequence[Mapping[str, Any]]) -> None:
    """The table for readers and for programs, and the figure."""
    first = next(iter(comparison.rungs.values()))
    title = f"{first.environment.id}, {first.total_steps} steps, {first.seeds} seeds"
    facts = {
        "environment": first.environment.id,
        "form": comparison.form,
        "total_steps": first.total_steps,
        "seeds": list(first.all_seeds),
        "rungs": results,
    }
    files = {
        "comparison.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
        "comparison.md": f"# {title}\n\n{table_of(comparison, results)}\n\n![Learning curves](comparison.png)\n",
    }
    for name, text in files.items():
        checkpoint.write_atomically(comparison.directory / name, text.encode())
    scores = {result["rung"]: result["per_seed"] for result in results if "diverged" not in result}
    if scores:
        folders = [comparison.folder(rung) for rung in scores]
        outputs = [comparison.directory / f"comparison.{form}" for form in ("png", "svg")]
        plot_comparison(folders, list(scores), list(scores.values()), outputs, title)
