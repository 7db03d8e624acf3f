"""A user's slip gives one line that says what is wrong and what to do, exit code 2, and leaves nothing behind."""

import contextlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from commands import command, refused, settings

from zhixing import training
from zhixing.config import from_mapping
from zhixing.errors import Interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with one checkpoint, stopped at once."""
    path = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Interrupted):
        monkeypatch.setattr(training, "stop_signals", lambda: contextlib.nullcontext(lambda: True))
        training.train_config(from_mapping(settings("q_learning")), path, quiet=True)
    return path


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("runs").exists()


CART_POLE = ("train", "ppo", "CartPole-v1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tran ppo CartPole-v1", "unknown command 'tran'; did you mean 'train'?"),
        (
            "--quiet train",
            "unknown command '--quiet'; one of: compare, evaluate, list, plot, resume, skills, train, watch",
        ),
        ("train", "which algorithm, on what? for example: zhixing train ppo CartPole-v1"),
        ("train --quiet", "which algorithm, on what? for example: zhixing train ppo CartPole-v1"),
        ("train ppo", "which environment? for example: zhixing train ppo CartPole-v1"),
        ("train pppo CartPole-v1", "unknown algorithm 'pppo'; did you mean 'ppo'?"),
        ("train CartPole-v1 ppo", "unknown algorithm 'CartPole-v1'; one of: "),
        ("train ppo CartPol-v1", "unknown environment 'CartPol-v1'; did you mean 'CartPole-v1'?"),
        ("train ppo CartPole-v1 junk", "'junk' is one word too many; settings are given as --name value"),
        (
            "train --seeds 2 ppo CartPole-v1",
            "the algorithm and the environment come first, then --seeds; see zhixing train --help",
        ),
        ("train ppo CartPole-v1 --total-steps x", "--total-steps is 'x'; it must be a whole number"),
        ("train --quiet ppo CartPole-v1 --seeds 0", "seeds is 0; it must be 1 or more"),
        ("train ppo CartPole-v1 --run-dir", "argument --run-dir: expected one argument; see zhixing train --help"),
        (
            "train ppo CartPole-v1 --total-steps 1001",
            "total_steps 1001 is not a multiple of the 8 environments of a seed; use 1000 or 1008",
        ),
        (
            "train ppo CartPole-v1 --algorithm.minibatches 3",
            "a rollout of 125 steps x 8 environments = 1000 does not divide into 3 minibatches; "
            "change algorithm.minibatches or rollout_length",
        ),
        (
            "train dqn CartPole-v1 --algorithm.replay-capacity 100",
            "algorithm.replay_capacity is 100, less than the 250 x 1 transitions of one rollout; make it larger",
        ),
        (
            "train ppo CartPole-v1 --algorithm.discount 1.5",
            "algorithm.discount is 1.5; it must be from 0 to 1",
        ),
        (
            "train dqn CartPole-v1 --algorithm.learning-starts -1",
            "algorithm.learning_starts is -1; it must be 0 or more",
        ),
        (
            "train ppo CartPole-v1 --algorithm.hidden 64 0",
            "algorithm.hidden is (64, 0); it must be above 0",
        ),
        (
            "train dqn Pendulum-v1",
            "DQN needs Discrete actions, this environment has Box(1,); use PPO",
        ),
        ("train ppo MyEnvironment --environment.backend jax", "unknown JAX environment 'MyEnvironment'; one of: "),
        (
            "train ppo CartPole-v1 --environment.options.a 1",
            "CartPole-v1 takes no options in its JAX form, not ['a']; ",
        ),
        ("train missing.yaml", "there is no file missing.yaml; give a run's config.yaml"),
        ("train .", ". is no run, it holds no config.yaml; give a folder that `zhixing train` made"),
        ("resume", "the following arguments are required: run; see zhixing resume --help"),
        ("resume nowhere", "there is no run folder nowhere; `zhixing train` makes one under runs/"),
        ("resume .", ". is no run, it holds no config.yaml; give a folder that `zhixing train` made"),
        ("resume . --total-steps x", "--total-steps is 'x'; it must be a whole number"),
        ("evaluate nowhere", "there is no checkpoint at nowhere; give a run's folder or one of its checkpoints"),
        ("evaluate .", ". is no run, it holds no config.yaml; give a folder that `zhixing train` made"),
        ("evaluate . --episodes 0", "--episodes is 0; it must be 1 or more"),
        ("evaluate . --episodes 1.5", "--episodes is '1.5'; it must be a whole number"),
        ("evaluate . --checkpoint first", "argument --checkpoint: invalid choice: 'first' (choose from "),
        ("evaluate . --foo", "unrecognized arguments: --foo; see zhixing evaluate --help"),
        ("watch . --episodes 0", "--episodes is 0; it must be 1 or more"),
        ("watch .", ". is no run, it holds no config.yaml; give a folder that `zhixing train` made"),
        ("plot nowhere", "'nowhere' is not a run (it holds no metrics.csv); name a directory that training wrote"),
        ("list foo", "argument what: invalid choice: 'foo' (choose from "),
    ],
)
def test_wrong_words(line, message):
    error = refused(*line.split())
    assert error == message or (message.endswith(" ") and error.startswith(message))


def test_table_needs_discrete_observations():
    error = refused("train", "q_learning", "CartPole-v1")
    assert error.startswith("QLearning keeps a table and needs discrete observations, this environment has Box")
    assert error.endswith("; use DQN")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no settings; give a run's config.yaml"),
        ("just text", "holds no settings; give a run's config.yaml"),
        ("- a\n- list", "holds no settings; give a run's config.yaml"),
        ("a: [1, 2", "is not YAML, line 1: expected ',' or ']', but got '<stream end>'; correct it, or "),
        ("a: b: c", "is not YAML, line 1: mapping values are not allowed here; correct it, or "),
        ("a: \x00", "is not YAML: "),
    ],
)
def test_file_that_holds_no_settings(text, message):
    Path("settings.yaml").write_text(text)
    assert refused("train", "settings.yaml").startswith(f"settings.yaml {message}")


def test_file_of_bytes_is_not_yaml():
    Path("settings.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "settings.yaml" in refused("train", "settings.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithm: ppo", "algorithm.name is missing; say which algorithm, for example algorithm: {name: ppo}"),
        ("algorithm: {name: ppo, learning_rate: fast}", "algorithm.learning_rate is 'fast'; it must be a number"),
        ("algorithm: {name: ppo}\ntotal_step: 1", "unknown setting 'total_step'; did you mean 'total_steps'?"),
    ],
)
def test_wrong_settings_in_a_file(text, message):
    Path("settings.yaml").write_text(text)
    assert refused("train", "settings.yaml") == message


# ---------------------------------------------------------------------------------------------------------- folders


def test_existing_run_is_not_overwritten(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    message = f"{folder} already holds a run; resume it, or name another folder with --run-dir"
    assert refused("train", folder / "config.yaml", "--run-dir", folder) == message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_folder_that_cannot_be_written(folder):
    Path("file").touch()
    line = "cannot write to file/below: Not a directory; name another folder with --run-dir"
    assert refused(*CART_POLE, "--run-dir", "file/below") == line
    assert refused(*CART_POLE, "--run-dir", "file").startswith("cannot write to file: File exists")
    error = refused("watch", folder, "--output", "file/below/episode.gif")
    assert error == "cannot write to file/below: Not a directory; name another folder"


def test_default_folder_that_cannot_be_made(tmp_path):
    Path("runs").touch()
    line = f"cannot write to {tmp_path}/runs: File exists; name another folder with --run-dir"
    assert refused(*CART_POLE, "--total-steps", 8) == line
    Path("runs").unlink()


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("data", [b"", b"some text\n", b"\x80\x04K\x01."])
@pytest.mark.parametrize("words", [("evaluate",), ("watch",)])
def test_file_that_is_no_checkpoint(words, data):
    Path("policy").write_bytes(data)
    error = refused(*words, "policy")
    assert error.startswith("policy is damaged or no checkpoint (") and error.endswith("; use another one of the run")


def test_damaged_checkpoint_of_a_run(folder):
    copy = shutil.copytree(folder, Path("copy"))
    for checkpoint in copy.glob("checkpoints/step-*"):
        data = checkpoint.read_bytes()
        checkpoint.unlink()
        checkpoint.write_bytes(data[:-20])
    assert refused("evaluate", copy).startswith("copy/checkpoints/step-")
    assert refused("resume", copy).startswith("no checkpoint in copy/checkpoints is whole; the newest: ")


def test_seed_that_was_not_trained(folder):
    error = refused("watch", folder, "--seed", 9, "--output", "episode.gif")
    assert error == "the run has no seed 9; it has [0, 1]"
    assert list(Path().iterdir()) == []


def test_unfinished_run_has_no_summary(folder):
    import zhixing as zx

    with pytest.raises(zx.UsageError, match=r"has no summary.json; the run is not over, resume it$"):
        _ = zx.load(folder).summary


# -------------------------------------------------------------------------------------------------- missing packages


@pytest.fixture
def without(monkeypatch):
    """Make a package look as if it were not installed."""
    found = importlib.util.find_spec

    def hide(name: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else found(n, *rest))

    return hide


def test_missing_gymnax(without):
    without("gymnax")
    assert refused("train", "dqn", "Breakout-MinAtar") == "Breakout-MinAtar needs gymnax; pip install 'zhixing[gymnax]'"


def test_missing_envpool(without):
    without("envpool")
    error = refused("train", "ppo", "LunarLander-v3", "--environment.backend", "envpool")
    assert "pip install 'zhixing[envpool]'" in error


def test_missing_box2d(without):
    without("Box2D")
    error = refused("train", "ppo", "LunarLander-v3", "--environment.backend", "gymnasium")
    assert "pip install" in error and "box2d" in error


def test_list_says_what_is_not_installed(without):
    without("gymnax")
    result = command("list", "environments")
    assert "not installed: pip install 'zhixing[gymnax]'" in result.out and result.code == 0
