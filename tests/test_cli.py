"""The command line as a user meets it: help, a whole run, what is printed, how it ends."""

import json
import subprocess
import sys

import pytest
import yaml
from commands import (
    PROGRAM,
    command,
    environment_variables,
    kept_programs,  # noqa: F401
    refused,
    settings,
    succeed,
    write_settings,
)

from zhixing import checkpoint, cli, errors
from zhixing.algorithms import ALGORITHMS

pytestmark = pytest.mark.usefixtures("kept_programs")

SUMMARY_KEYS = ["iqm", "interval", "mean", "std", "min", "max", "episodes", "per_seed"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("settings") / "settings.yaml", settings("dqn", total_steps=320))


@pytest.fixture(scope="module")
def trained(kept_programs, written, tmp_path_factory):  # noqa: F811
    """-> the folder of a run on CartPole and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, succeed("train", written, "--run-dir", folder)


# ------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"], ["foo"]])
def test_help_imports_nothing_heavy(words):
    heavy = ("jax", "numpy", "gymnasium", "tyro", "rich", "matplotlib", "yaml")
    program = (
        "import sys\nfrom zhixing.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print(*set({heavy!r}) & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1] == ""
    assert result.stdout or "unknown command" in result.stderr


def test_help_names_every_command():
    output = succeed("--help")
    assert output == succeed() == succeed("-h")
    for name, function in cli.COMMANDS.items():
        assert f"  {name}" in output and function.__doc__ in output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(name):
    output = succeed(name, "--help")
    assert output.startswith(f"usage: zhixing {name}")
    assert "--debug" in output


@pytest.mark.parametrize("name", ALGORITHMS)
def test_help_of_an_algorithm_shows_every_setting(name):
    output = succeed("train", name, "CartPole-v1", "--help")
    for flag in ("--total-steps", "--algorithm.learning-rate", "--environment.backend", "--environment.options.NAME"):
        assert flag in output
    assert "--run-dir" in output and "--quiet" in output


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert succeed("--version") == version("zhixing") + "\n"


def test_list_shows_what_there_is():
    output = succeed("list")
    for name in (*ALGORITHMS, "CartPole-v1", "FrozenLake-v1", "LunarLander-v3", "Pendulum-v1", "td_control"):
        assert name in output
    parts = ("algorithms", "environments", "presets", "ladders")
    assert output == "".join(succeed("list", part) for part in parts)


# ------------------------------------------------------------------------------------------------------------ a run


def test_training_prints_plain_lines(trained):
    folder, output = trained
    lines = output.splitlines()
    assert lines[0] == "DQN on CartPole-v1"
    said = {line.split("  ")[1]: line.split(maxsplit=1)[1].strip() for line in lines[1:] if line.startswith("  ")}
    for name in ("environment", "seeds", "environments", "total steps", "rollout length", "updates", "learning starts"):
        assert name in said
    assert f"  {folder}" in output
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == [
        f"step {step}/320" for step in (0, 64, 128, 192, 256, 320)
    ]
    assert lines[-1].startswith("evaluation over 2 greedy episodes a seed: IQM ")
    assert "\x1b" not in output and "\r" not in output


def test_quiet_prints_nothing(written, tmp_path):
    assert succeed("train", written, "--run-dir", tmp_path / "run", "--quiet") == ""
    assert succeed("resume", tmp_path / "run", "--quiet") == ""


def test_flags_win_over_the_file_and_the_default_folder_says_what_it_is(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # within one second, too
        succeed("train", written, "--quiet", "--total-steps", 64, "--algorithm.learning-rate=1e-4")
    first, second = sorted((tmp_path / "runs").iterdir())
    assert first.name.startswith("dqn-CartPole-v1-20") and second.name.startswith("dqn-CartPole-v1-20")
    mapping = yaml.safe_load((first / "config.yaml").read_text())
    assert (mapping["total_steps"], mapping["algorithm"]["learning_rate"]) == (64, 1e-4)
    assert mapping["algorithm"]["hidden"] == settings("dqn")["algorithm"]["hidden"]  # as the file has it


def test_environment_of_the_file_can_be_changed(written, tmp_path):
    succeed("train", written, "MountainCar-v0", "--quiet", "--total-steps", 64, "--run-dir", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["environment"]["id"] == "MountainCar-v0"


def test_options_reach_the_environment(tmp_path):
    words = ("--quiet", "--total-steps", 64, "--evaluation.final-episodes", 4, "--evaluation.episodes", 4)
    options = ("--environment.options.is_slippery", "false", "--environment.max-episode-steps", "20")
    succeed("train", "q_learning", "FrozenLake-v1", *words, *options, "--run-dir", tmp_path / "run")
    mapping = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert mapping["environment"]["options"] == {"is_slippery": False}


def test_evaluate_as_json(trained):
    folder, _ = trained
    result = json.loads(succeed("evaluate", folder, "--episodes", 20, "--json"))
    assert list(result) == SUMMARY_KEYS
    assert result["episodes"] == 40 and len(result["per_seed"]) == 2
    assert result["min"] <= result["interval"][0] <= result["iqm"] <= result["interval"][1] <= result["max"]
    assert json.loads(succeed("evaluate", folder, "--episodes", 20, "--json")) == result


def test_evaluate_in_one_line(trained):
    folder, _ = trained
    output = succeed("evaluate", folder, "--episodes", 4)
    assert output.startswith("DQN on CartPole-v1, 320 steps, 2 seeds: IQM ") and output.count("\n") == 1


def test_evaluate_another_checkpoint(trained):
    folder, _ = trained
    best = folder / "checkpoints" / "best.safetensors"
    step = checkpoint.read(best)[1]["step"]
    for words in ((folder, "--checkpoint", "best"), (best,)):
        assert f"{step} steps" in succeed("evaluate", *words, "--episodes", 2)


def test_watch_writes_a_gif(trained, tmp_path):
    folder, _ = trained
    output = tmp_path / "episode.gif"
    printed = succeed("watch", folder, "--output", output, "--episodes", 2)
    assert output.read_bytes().startswith(b"GIF89a")
    assert printed.splitlines()[-1] == str(output) and printed.count("return") == 2


def test_watch_with_stacked_observations(tmp_path):
    """What is played raw has to be stacked for the policy."""
    mapping = settings("dqn", total_steps=64, environment={"frame_stack": 3}, seeds=1)
    succeed("train", write_settings(tmp_path / "s.yaml", mapping), "--run-dir", tmp_path / "run", "--quiet")
    succeed("watch", tmp_path / "run")
    assert (tmp_path / "run" / "episode.gif").exists()


def test_plot_draws_the_curve(trained, tmp_path):
    folder, _ = trained
    succeed("plot", folder, folder, "--labels", "one", "two", "--output", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_plot_draws_what_was_predicted_beside_what_came(trained, tmp_path):
    folder, _ = trained
    metrics = ("--metric", "evaluation/value", "evaluation/discounted_return")
    succeed("plot", folder, *metrics, "--output", tmp_path / "before.svg")
    succeed("plot", "--output", tmp_path / "after.svg", *metrics, folder)
    assert (tmp_path / "before.svg").read_bytes() == (tmp_path / "after.svg").read_bytes()
    assert refused("plot", "--metric", "evaluation/value") == "no run to plot; name one run directory or more"


# ------------------------------------------------------------------------------------------------------ how it ends


def test_diverged_run_keeps_its_last_checkpoint(written, tmp_path):
    folder = tmp_path / "run"
    result = command("train", written, "--algorithm.learning-rate", "1e30", "--run-dir", folder, "--quiet")
    assert result.code == 1 and result.out == ""
    kept = sorted(folder.glob("checkpoints/step-*"))[-1]
    start, _, end = result.error.partition(" became NaN or infinite at step ")
    assert start.removeprefix("zhixing: ") in ("loss", "td_error", "q", "gradient_norm")
    step, _, rest = end.partition(" of seed ")
    assert 0 < int(step) <= 320 and rest.startswith(("0; ", "1; "))
    assert f"; the last good checkpoint is {kept}; try a smaller learning rate\n" in rest
    assert result.error.count("\n") == 1
    assert "DQN on CartPole-v1" in succeed("evaluate", folder, "--episodes", 2)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.UsageError("a slip; do this"), 2, "zhixing: a slip; do this\n"),
        (errors.Diverged("loss became NaN"), 1, "zhixing: loss became NaN\n"),
        (errors.Interrupted("stopped"), 130, "zhixing: stopped\n"),
        (KeyboardInterrupt(), 130, "zhixing: interrupted\n"),
    ],
)
def test_exit_codes(error, code, line, monkeypatch):
    def fail(arguments: object) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "list", fail)
    assert command("list") == (code, "", line)
    with pytest.raises(type(error)):
        cli.main(["list", "--debug"])


def test_one_line_and_no_traceback_from_a_real_process():
    words = [*PROGRAM, "train", "ppo", "CartPol-v1"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment_variables())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "zhixing: unknown environment 'CartPol-v1'; did you mean 'CartPole-v1'?\n"
    assert refused("train", "ppo", "CartPol-v1") + "\n" == result.stderr.removeprefix("zhixing: ")
