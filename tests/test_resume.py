"""A run that was stopped, killed or damaged goes on exactly where its last checkpoint is."""

import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import (
    assert_same_run,
    final_state,
    kept_programs,  # noqa: F401
    refused,
    settings,
    signalled,
    steps_saved,
    succeed,
    table,
    write_settings,
)
from probes import OWN, STRUCTURES

from zhixing import checkpoint, training
from zhixing.config import from_mapping
from zhixing.errors import Interrupted

TRANSFORMS = {"normalize_observation": True, "scale_reward": True}
TOTAL = 6_400


pytestmark = pytest.mark.usefixtures("kept_programs")


def long_settings(name: str) -> dict[str, Any]:
    """Long enough to be killed in the middle, with a checkpoint every few milliseconds."""
    record = {"every": 64, "checkpoint_seconds": 0.0}
    evaluation = {"every": 3_200}
    more = {"environment": TRANSFORMS} if name == "ppo" else {}
    return settings(name, total_steps=TOTAL, record=record, evaluation=evaluation, **more)


@pytest.fixture(scope="module")
def uninterrupted(kept_programs, tmp_path_factory):  # noqa: F811
    """By an algorithm's name, the folder of its run without any interruption."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            base = tmp_path_factory.mktemp(name)
            written = write_settings(base / "settings.yaml", long_settings(name))
            succeed("train", written, "--run-dir", base / "run", "--quiet")
            folders[name] = base / "run"
        return folders[name]

    return folder


@pytest.mark.parametrize("name", STRUCTURES)
def test_killed_run_resumes_to_the_bit(name, uninterrupted, tmp_path):
    expected, folder = uninterrupted(name), tmp_path / "run"
    result = signalled(
        folder, signal.SIGKILL, "train", expected / "config.yaml", "--run-dir", folder, at_step=TOTAL // 4
    )
    assert result.code == -signal.SIGKILL
    assert 0 < steps_saved(folder) < TOTAL and not (folder / "summary.json").exists()
    assert f"resumed at step {steps_saved(folder)}" in succeed("resume", folder)
    assert_same_run(folder, expected)


def stop_at_look(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The trainer is asked to stop when it looks for the `number`-th time."""
    looks = iter(range(1, 1_000_000))

    @contextmanager
    def signals():
        yield lambda: next(looks) >= number

    monkeypatch.setattr(training, "stop_signals", signals)


@pytest.mark.parametrize("name", OWN)
def test_run_stopped_twice_resumes_to_the_bit(name, uninterrupted, tmp_path, monkeypatch):
    expected, folder = uninterrupted(name), tmp_path / "run"
    config = from_mapping(long_settings(name))
    stop_at_look(monkeypatch, 3)
    with pytest.raises(Interrupted, match=rf"^stopped at step \d+ and saved; go on with: zhixing resume {folder}$"):
        training.train_config(config, folder, quiet=True)
    stop_at_look(monkeypatch, 1)
    with pytest.raises(Interrupted):
        training.resume_directory(folder, quiet=True)
    monkeypatch.undo()
    training.resume_directory(folder, quiet=True)
    assert_same_run(folder, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(number, uninterrupted, tmp_path):
    expected, folder = uninterrupted("q_learning"), tmp_path / "run"
    result = signalled(folder, number, "train", expected / "config.yaml", "--run-dir", folder, "--quiet")
    step = steps_saved(folder)
    assert 0 < step < TOTAL
    assert result == (
        130,
        "",
        f"zhixing: stopped at step {step} and saved; go on with: zhixing resume {folder}\n",
    )
    succeed("resume", folder)
    assert_same_run(folder, expected)


# ------------------------------------------------------------------------------------ one run, stopped in the middle

SHORT = {"record": {"every": 64, "checkpoint_seconds": 0.0, "keep_checkpoints": 2}}


@pytest.fixture(scope="module")
def finished(kept_programs, tmp_path_factory) -> Path:  # noqa: F811
    base = tmp_path_factory.mktemp("finished")
    written = write_settings(base / "settings.yaml", settings("ppo", **SHORT))
    succeed("train", written, "--run-dir", base / "run", "--quiet")
    return base / "run"


@pytest.fixture(scope="module")
def stopped(kept_programs, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Interrupted):
        stop_at_look(monkeypatch, 5)
        training.train_config(from_mapping(settings("ppo", **SHORT)), folder, quiet=True)
    assert len(checkpoints_of(folder)) == 2
    return folder


@pytest.fixture
def copy(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/step-*.safetensors"))


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()  # the best checkpoint may be the same file under another name
    path.write_bytes(data[: len(data) // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
def test_damaged_newest_checkpoint_is_passed_over(damage, copy, finished):
    older, newest = checkpoints_of(copy)
    damage(newest)
    output = succeed("resume", copy)
    assert f"passed over a checkpoint: {newest} is damaged" in output
    assert f"resumed at step {int(older.stem.removeprefix('step-'))}\n" in output
    assert_same_run(copy, finished)


def test_damaged_checkpoints_do_not_push_out_whole_ones(copy, monkeypatch):
    """Stopped right after it went on from the older one, the run still has a checkpoint to go on from."""
    newest = checkpoints_of(copy)[-1]
    late = newest.with_name("step-000000000639.safetensors")
    newest.rename(late)
    cut_in_half(late)
    with_one = yaml.safe_load((copy / "config.yaml").read_text())
    with_one["record"]["keep_checkpoints"] = 1
    write_settings(copy / "config.yaml", with_one)
    stop_at_look(monkeypatch, 1)
    with pytest.raises(Interrupted):
        training.resume_directory(copy, quiet=True)
    (kept,) = checkpoints_of(copy)
    assert checkpoint.read(kept)[1]["step"] < 639


def test_no_whole_checkpoint_is_one_line(copy):
    for path in checkpoints_of(copy):
        cut_in_half(path)
    error = refused("resume", copy)
    assert error.startswith(f"no checkpoint in {copy}/checkpoints is whole; the newest: {copy}/checkpoints/step-")


def test_killed_before_the_first_checkpoint_starts_over(copy, finished):
    """The program was compiling: there are settings and records, and nothing to go on from."""
    shutil.rmtree(copy / "checkpoints")
    assert "resumed at step 0\n" in succeed("resume", copy)
    assert_same_run(copy, finished)


def test_leftovers_of_a_killed_process_do_no_harm(copy, finished):
    newest = checkpoints_of(copy)[-1]
    part = newest.with_name(f"{newest.name}.part")
    part.write_bytes(newest.read_bytes()[:100])
    with (copy / "metrics.csv").open("a") as file:
        file.write("9999,1.0,0,0.5\n320,0.1,0,")  # rows after the checkpoint, the last one cut off
    succeed("resume", copy)
    assert_same_run(copy, finished)
    assert not part.exists()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("algorithm", {"learning_rate": 0.5}, "algorithm.learning_rate 0.5, but {newest} was trained with 0.01"),
        ("algorithm", {"hidden": [16]}, "algorithm.hidden [16], but {newest} was trained with [32]"),
        ("seed", 7, "seed 7, but {newest} was trained with 0"),
    ],
)
def test_edited_settings_are_refused(key, value, line, copy):
    mapping = yaml.safe_load((copy / "config.yaml").read_text())
    mapping[key] = {**mapping[key], **value} if isinstance(value, dict) else value
    write_settings(copy / "config.yaml", mapping)
    newest = checkpoints_of(copy)[-1].name
    error = refused("resume", copy)
    assert error == f"{copy}/config.yaml says {line.format(newest=newest)}; put it back, or train a new run"


def test_resume_goes_on_for_longer(tmp_path):
    """Where no schedule depends on the length, a run that goes on is the run that was longer from the beginning."""
    constant = settings("ppo", algorithm={"learning_rate_schedule": "constant"}, **SHORT)
    written = write_settings(tmp_path / "settings.yaml", constant)
    succeed("train", written, "--run-dir", tmp_path / "two", "--quiet")
    succeed("resume", tmp_path / "two", "--total-steps", 1_280, "--quiet")
    succeed("train", written, "--total-steps", 1_280, "--run-dir", tmp_path / "one", "--quiet")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["total_steps"] == 1_280
    assert refused("resume", tmp_path / "two", "--total-steps", 640) == (
        "the run has made 1280 steps already; give more than that as --total-steps, not 640"
    )
    assert refused("resume", tmp_path / "two", "--total-steps", 0) == "total_steps is 0; it must be 1 or more"


def test_resume_of_a_finished_run_changes_nothing(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert "the run is over; to go on, give more than 640 as --total-steps" in succeed("resume", folder)
    assert_same_run(folder, finished)


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_host_environment_resumes_with_new_episodes(name, tmp_path, monkeypatch):
    mapping = settings(name, environment={"backend": "gymnasium"}, total_steps=320, **SHORT)
    folder = tmp_path / "run"
    stop_at_look(monkeypatch, 2)
    with pytest.raises(Interrupted):
        training.train_config(from_mapping(mapping), folder, quiet=True)
    monkeypatch.undo()
    arrays, before = final_state(folder)
    assert 0 < before["step"] < 320
    assert not [key for key in arrays if key.startswith((".environment", ".observation"))]
    output = succeed("resume", folder)
    assert "the environments' state cannot be saved: a resumed run starts new episodes" in output
    arrays, after = final_state(folder)
    assert after["step"] == arrays[".learner.clock.steps"] == 320
    np.testing.assert_array_equal(np.unique(table(folder)["step"]), range(0, 321, 64))
