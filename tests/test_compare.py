"""Comparisons: what a ladder means, what its folder holds, how it survives being stopped, and a user's slips."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import yaml
from commands import (
    assert_same_run,
    command,
    kept_programs,  # noqa: F401
    process,
    refused,
    steps_saved,
    succeed,
    wait_until,
)

import zhixing as zx
from zhixing import comparison, config, ladders, statistics
from zhixing.assembly import build_environment, build_loop
from zhixing.errors import Interrupted
from zhixing.flags import read_flags

pytestmark = pytest.mark.usefixtures("kept_programs")

SHORT = {
    "seeds": 3,
    "total_steps": 3200,
    "num_environments": 4,
    "evaluation": {"every": 1600, "episodes": 2, "final_episodes": 4, "max_steps": 50},
    "record": {"every": 1600, "tensorboard": False},
}
LADDER = {
    "form": "cumulative",
    "algorithm": {"name": "q_learning", "discount": 0.9},
    "environment": {"id": "zhixing/Maze-v0"},
    **SHORT,
    "rungs": {
        "still": {"algorithm": {"learning_rate": 1e-6}},
        "learns": {"algorithm": {"learning_rate": 0.5}},
        "explores α": {"algorithm": {"epsilon_start": 0.9}},
    },
}
FOLDERS = ["still", "learns", "explores-α"]


def write_ladder(path, mapping):
    path.write_text(yaml.safe_dump(mapping, sort_keys=False))
    return path


def rungs_of(ladder, environment=None, words=(), chosen=None):
    return ladders.rung_configs(ladders.load_ladder(ladder), environment, lambda c: read_flags(words, c), chosen)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_ladder(tmp_path_factory.mktemp("ladder") / "maze.yaml", LADDER)


@pytest.fixture(scope="module")
def compared(kept_programs, written, tmp_path_factory):  # noqa: F811
    """-> the folder of a finished comparison and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "all"
    return folder, succeed("compare", written, "--run-dir", folder)


# -------------------------------------------------------------------------------------------------- what a ladder means


def test_cumulative_rungs_add_to_the_one_before():
    rungs = rungs_of(LADDER)
    assert list(rungs) == ["still", "learns", "explores α"]
    rates = [(rung.algorithm.learning_rate, rung.algorithm.epsilon_start) for rung in rungs.values()]
    preset = config.preset("q_learning", "zhixing/Maze-v0")["algorithm"]
    assert rates == [(1e-6, preset["epsilon_start"]), (0.5, preset["epsilon_start"]), (0.5, 0.9)]
    assert {rung.algorithm.discount for rung in rungs.values()} == {0.9}  # shared, above the preset


def test_independent_rungs_add_to_what_is_shared():
    rungs = rungs_of(LADDER | {"form": "independent"})
    preset = config.preset("q_learning", "zhixing/Maze-v0")["algorithm"]
    assert rungs["explores α"].algorithm.learning_rate == preset["learning_rate"]


def test_rung_with_another_algorithm_has_its_preset_but_the_first_one_s_steps():
    ladder = {
        "form": "cumulative",
        "environment": {"id": "CartPole-v1"},
        "algorithm": {"learning_rate": 0.5},
        "rungs": {
            "dqn": {"algorithm": {"name": "dqn", "target_period": 9}},
            "ppo": {"algorithm": {"name": "PPO"}},
            "clip": {"algorithm": {"clip": 0.3}},
        },
    }
    rungs = rungs_of(ladder)
    assert [type(rung.algorithm).__name__ for rung in rungs.values()] == ["DQN", "PPO", "PPO"]
    preset = config.preset("ppo", "CartPole-v1")
    assert rungs["ppo"].num_environments == preset["num_environments"]
    assert rungs["clip"].algorithm.rollout_length == preset["algorithm"]["rollout_length"]
    assert {rung.algorithm.learning_rate for rung in rungs.values()} == {0.5}
    assert {rung.total_steps for rung in rungs.values()} == {config.preset("dqn", "CartPole-v1")["total_steps"]}
    assert {rung.seeds for rung in rungs.values()} == {ladders.SEEDS}


def test_flags_and_environment_are_of_every_rung():
    words = ("--seeds", "5", "--algorithm.epsilon-end", "0.3", "--total-steps", "1000")
    rungs = rungs_of(LADDER, "CliffWalking-v1", words)
    assert {(r.seeds, r.algorithm.epsilon_end, r.total_steps) for r in rungs.values()} == {(5, 0.3, 1000)}
    assert {r.environment.id for r in rungs.values()} == {"CliffWalking-v1"}


def test_some_rungs_stay_what_they_are_on_the_whole_ladder():
    whole = rungs_of(LADDER)
    assert rungs_of(LADDER, chosen=["explores α", "still"]) == {k: whole[k] for k in ("still", "explores α")}


@pytest.mark.parametrize("name", ladders.ladder_names())
def test_named_ladders_fit(name):
    ladder = ladders.load_ladder(name)
    rungs = rungs_of(name)
    assert len(rungs) > 2
    for rung in rungs.values():
        build_loop(rung, build_environment(rung))
    assert rungs_of(name.replace("_", "-")) == rungs
    compared = comparison.Comparison(Path(), ladder.form, rungs)
    assert all(compared.adds(rung) for rung in list(rungs)[1:])


def test_what_a_rung_adds():
    ladder = LADDER | {"rungs": LADDER["rungs"] | {"sarsa": {"algorithm": {"name": "sarsa"}, "num_environments": 1}}}
    rungs = rungs_of(ladder)
    compared = comparison.Comparison(Path(), "cumulative", rungs)
    assert [compared.adds(rung) for rung in rungs] == [
        {},
        {"algorithm.learning_rate": 0.5},
        {"algorithm.epsilon_start": 0.9},
        {"algorithm.name": "sarsa", "num_environments": 1},
    ]
    assert [compared.over(rung) for rung in rungs] == [None, "still", "learns", "explores α"]
    independent = comparison.Comparison(Path(), "independent", rungs)
    assert [independent.over(rung) for rung in rungs] == [None, "still", "still", "still"]


# --------------------------------------------------------------------------------------------- what a comparison leaves


def test_folder_holds_runs_and_what_came_of_them(compared):
    folder, _ = compared
    files = ["comparison.json", "comparison.md", "comparison.png", "comparison.svg", "comparison.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, *FOLDERS])
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for rung, name in zip(rungs_of(LADDER).values(), FOLDERS, strict=True):
        mapping = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert mapping["algorithm"] == config.to_mapping(rung)["algorithm"]
        assert mapping["environment"]["backend"] == "jax"
    assert "3200 steps, 3 seeds" in succeed("evaluate", folder / "learns", "--episodes", 4)
    assert succeed("resume", folder / "learns").startswith("QLearning on zhixing/Maze-v0")


def test_table_is_made_of_the_runs(compared):
    folder, output = compared
    table = json.loads((folder / "comparison.json").read_text())["rungs"]
    scores = [json.loads((folder / name / "summary.json").read_text())["evaluation"] for name in FOLDERS]
    for row, score in zip(table, scores, strict=True):
        assert {key: row[key] for key in ("iqm", "interval", "per_seed")} == {
            key: score[key] for key in ("iqm", "interval", "per_seed")
        }
    assert "improvement" not in table[0]
    for below, row in zip(scores, table[1:], strict=False):
        pair = row["per_seed"], below["per_seed"]
        assert row["improvement"] == statistics.probability_of_improvement(*pair)
        assert row["improvement_interval"] == list(statistics.improvement_interval(*pair))
    lines = output.splitlines()
    printed = [line for line in lines if line.startswith("|")]
    assert len(printed) == 5 and len({len(line) for line in printed}) == 1
    assert "\n".join(printed) in (folder / "comparison.md").read_text()
    assert f"{table[1]['improvement']:.2f} [" in printed[3] and "learning_rate 0.5" in printed[3]
    assert lines[-1] == str(folder / "comparison.png")
    assert [line for line in lines if line[1:3] == "/3"] == [
        "1/3 still", "2/3 learns: learning_rate 0.5", "3/3 explores α: epsilon_start 0.9"
    ]  # fmt: skip


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*/*") if path.is_file()}


@pytest.mark.parametrize("how", ["folder", "again"])
def test_finished_rungs_are_not_trained_again(compared, written, how):
    folder, output = compared
    before = times(folder)
    again = succeed("compare", folder) if how == "folder" else succeed("compare", written, "--run-dir", folder)
    assert times(folder) == before
    assert again.splitlines()[-7:] == output.splitlines()[-7:]
    assert "steps/s" not in again


def test_rungs_can_be_added_and_the_comparison_repeated(compared, written, tmp_path):
    folder, _ = compared
    succeed("compare", written, "--run-dir", tmp_path / "new", "--quiet", "--rungs", "learns")
    before = times(tmp_path / "new")
    file = folder / "comparison.yaml"
    assert succeed("compare", file, "--run-dir", tmp_path / "new", "--quiet", "--rungs", "still", "learns") == ""
    assert before.items() <= times(tmp_path / "new").items()
    for name in ("still", "learns"):
        assert_same_run(tmp_path / "new" / name, folder / name)


# -------------------------------------------------------------------------------------------------------- being stopped


def test_killed_comparison_goes_on_where_it_was(written, tmp_path):
    words = ("compare", written, "--total-steps", 64000, "--quiet", "--rungs", "still", "learns")
    with process(*words, "--run-dir", tmp_path / "killed") as running:
        wait_until(lambda: steps_saved(tmp_path / "killed" / "learns") > 0, running)
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (tmp_path / "killed" / "learns" / "summary.json").exists()
    before = times(tmp_path / "killed" / "still")
    assert "resumed at step" in succeed("compare", tmp_path / "killed")
    assert times(tmp_path / "killed" / "still") == before
    succeed(*words, "--run-dir", tmp_path / "whole")
    for name in ("still", "learns"):
        assert_same_run(tmp_path / "killed" / name, tmp_path / "whole" / name)


@pytest.mark.parametrize(
    ("begun", "asked_once", "at"),
    [([], ".", "still"), (["still"], "still/metrics.csv", "still"), (["still"], "still/summary.json", "learns")],
)
def test_stopped_comparison_says_how_to_go_on(written, tmp_path, monkeypatch, begun, asked_once, at):
    """Asked to stop before the first rung, within it, and at its very end, where it is not looked for any more."""
    folder = tmp_path / "run"
    monkeypatch.setattr(comparison, "stop_signals", lambda: contextlib.nullcontext((folder / asked_once).exists))
    result = command("compare", written, "--run-dir", folder, "--quiet")
    assert result == (130, "", f"zhixing: stopped at rung '{at}' and saved; go on with: zhixing compare {folder}\n")
    assert [path.name for path in folder.iterdir() if path.is_dir()] == begun


def test_second_ctrl_c_says_so_too(written, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.training, "carry_out", interrupted)
    with pytest.raises(Interrupted, match="stopped at rung 'still' at once; go on with: zhixing compare"):
        zx.compare(written, run_dir=tmp_path / "run", quiet=True)


def test_rung_that_diverges_does_not_stop_the_others(tmp_path):
    rungs = {"wild": {"algorithm": {"learning_rate": 1e38}}, "tame": {"algorithm": {"learning_rate": 0.5}}}
    ladder = write_ladder(tmp_path / "ladder.yaml", LADDER | {"rungs": rungs})
    result = command("compare", ladder, "--run-dir", tmp_path / "run")
    assert result.code == 1
    assert result.error.startswith("zhixing: rung 'wild': ") and "became NaN or infinite" in result.error
    assert result.error.endswith(f"; the other rungs are in {tmp_path / 'run' / 'comparison.md'}\n")
    wild, tame = json.loads((tmp_path / "run" / "comparison.json").read_text())["rungs"]
    assert "became NaN" in wild["diverged"] and "improvement" not in tame and len(tame["per_seed"]) == 3
    assert "| diverged " in result.out.splitlines()[-4]


# ---------------------------------------------------------------------------------------------------------- from Python


class Corridor(gymnasium.Env):
    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return 0, {}

    def step(self, action):
        self.place = max(0, self.place + 2 * int(action) - 1)
        return self.place, -1.0, self.place == 2, False, {}


def test_compare_from_python(tmp_path):
    folder = tmp_path / "mine"
    settings = {"run_dir": folder, "quiet": True, "total_steps": 320, "algorithm": {"initial_value": 1.0}}
    made = zx.compare(LADDER, Corridor, rungs=["learns", "still"], **settings)
    assert made.directory == folder and list(made.rungs) == ["still", "learns"]
    assert [row["rung"] for row in made.table] == ["still", "learns"]
    assert [run.step for run in made.runs.values()] == [320, 320]
    assert made.runs["learns"].algorithm.initial_value == 1.0
    before = times(folder)
    assert zx.compare(folder, Corridor, quiet=True).table == made.table
    assert times(folder) == before
    assert "the run's environment is your own; give it again, from Python" in refused("compare", folder)


# ------------------------------------------------------------------------------------------------------- a user's slips


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compare", "which ladder, on what? for example: zhixing compare dqn CartPole-v1"),
        ("compare dqm CartPole-v1", "unknown ladder 'dqm'; did you mean 'dqn'?"),
        ("compare maze.yaml a b", "'b' is one word too many; settings are given as --name value"),
        ("compare maze.yaml --rungs lerns", "unknown rung of the ladder maze: 'lerns'; did you mean 'learns'?"),
        ("compare maze.yaml Maze", "unknown environment 'Maze'; did you mean 'zhixing/Maze-v0'?"),
        ("compare maze.yaml --seeds 0", "seeds is 0; it must be 1 or more"),
        (
            "compare maze.yaml --total-step 1",
            "rung 'still': unknown setting '--total-step'; did you mean '--total-steps'?",
        ),
        (
            "compare maze.yaml --algorithm.learning-rate 1",
            "the rungs 'still' and 'learns' have the same settings; leave one of them out",
        ),
        ("compare nowhere.yaml", "there is no file nowhere.yaml; give a run's config.yaml"),
        ("compare .", ". is no comparison, it holds no comparison.yaml; give a folder that `zhixing compare` made"),
        (
            "compare . --seeds 2",
            "a comparison goes on with the settings in its folder; for others: zhixing compare comparison.yaml …",
        ),
        ("compare maze.yaml --run-dir maze.yaml", "cannot write to maze.yaml: File exists; name another folder with "),
    ],
)
def test_wrong_words(written, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(written, "maze.yaml")
    error = refused(*line.split())
    assert error == message or (message.endswith(" ") and error.startswith(message))
    assert [path.name for path in Path().iterdir()] == ["maze.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": {}}, "the ladder ladder has no rungs; write rungs: and below it a name and settings for each"),
        ({"rungs": ["a"]}, "the ladder ladder has no rungs; write rungs: and below it a name and settings for each"),
        ({"rungs": {"a": 5}}, "rung 'a' is 5; it must be a mapping of names to values"),
        ({"rung": {}}, "unknown key of the ladder ladder: 'rung'; did you mean 'rungs'?"),
        ({"form": None}, "the ladder ladder does not say its form; write form: cumulative "),
        ({"form": "both"}, "the ladder ladder has the form 'both'; write form: cumulative "),
        ({"algorithm": {}}, "rung 'still': algorithm.name is missing; say which algorithm, "),
        (
            {"algorithm": {"name": "qlearning"}},
            "rung 'still': unknown algorithm 'qlearning'; did you mean 'q_learning'?",
        ),
        (
            {"environment": {}},
            "which environment? name it after the ladder, or in it as environment: {id: CartPole-v1}",
        ),
        (
            {"rungs": {"a": {"algorithm": {"learning_rat": 1}}}},
            "rung 'a': unknown algorithm setting 'learning_rat'; did you mean 'learning_rate'?",
        ),
        (
            {"rungs": {"a": {}, "b": {"seeds": 4}}},
            "rung 'b' has seeds 4, 'a' has 3; a comparison needs the same",
        ),
        (
            {"rungs": {"a": {}, "b": {"total_steps": 4}}},
            "rung 'b' has total_steps 4, 'a' has 3200; a comparison needs the same",
        ),
        ({"rungs": {"a": {}, "b": None}}, "the rungs 'a' and 'b' have the same settings; leave one of them out"),
        (
            {"rungs": {"a b": {}, "a:b": {"num_environments": 1}}},
            "the rungs 'a b' and 'a:b' would have the same folder; name them otherwise",
        ),
    ],
)
def test_wrong_ladders(tmp_path, change, message):
    write_ladder(tmp_path / "ladder.yaml", LADDER | change)
    error = refused("compare", tmp_path / "ladder.yaml", "--run-dir", tmp_path / "run")
    assert error == message or (message.endswith(" ") and error.startswith(message))
    assert not (tmp_path / "run").exists()


def test_help_names_the_ladders():
    assert "Ladders: dqn, replay, replay_td3, td_control." in " ".join(succeed("compare", "--help").split())


def test_folder_with_the_name_of_a_ladder_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dqn").mkdir()
    assert refused("compare", "dqn", "--rungs", "duelling").endswith("; did you mean 'dueling'?")


def test_other_settings_need_another_folder(compared, written):
    folder, _ = compared
    before = times(folder)
    error = refused("compare", written, "--run-dir", folder, "--algorithm.discount", 0.5)
    assert error == (
        f"{folder / 'still'} was trained with algorithm.discount 0.9, not 0.5; name another folder with --run-dir"
    )
    inside = folder / "still"
    error = refused("compare", written, "--run-dir", inside)
    assert error == f"{inside} holds a run; name another folder with --run-dir"
    assert times(folder) == before
    assert np.all([not path.name.startswith(".") for path in folder.rglob("*")])
