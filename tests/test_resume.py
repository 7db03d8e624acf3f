"""A run that was stopped, killed or damaged goes on exactly where its last checkpoint is."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runs import (
    assert_same_run,
    compiled_programs_kept,
    final_state,
    refused,
    settings,
    signalled,
    steps_saved,
    succeed,
    table,
    write_settings,
)

from zhixing import checkpoint, train
from zhixing.algorithms import ALGORITHMS
from zhixing.errors import Interrupted

EVERY_ALGORITHM = [pytest.param(name, marks=pytest.mark.xdist_group(f"resume {name}")) for name in ALGORITHMS]
TRANSFORMS = {"normalize_observation": True, "scale_reward": True}
TOTAL = 6_400


@pytest.fixture(scope="module", autouse=True)
def kept_programs() -> Iterator[None]:
    with compiled_programs_kept():
        yield


def long_settings(name: str) -> dict[str, Any]:
    """Long enough to be killed in the middle, with a checkpoint every few milliseconds."""
    record = {"every": 64, "checkpoint_seconds": 0.0}
    evaluation = {"every": 3_200}
    more = {"environment": TRANSFORMS} if name == "ppo" else {}
    return settings(name, total_steps=TOTAL, record=record, evaluation=evaluation, **more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
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


@pytest.mark.parametrize("name", EVERY_ALGORITHM)
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

    monkeypatch.setattr(train, "stop_signals", signals)


@pytest.mark.parametrize("name", EVERY_ALGORITHM)
def test_run_stopped_twice_resumes_to_the_bit(name, uninterrupted, tmp_path, monkeypatch):
    expected, folder = uninterrupted(name), tmp_path / "run"
    from zhixing.config import from_mapping

    config = from_mapping(long_settings(name))
    stop_at_look(monkeypatch, 3)
    with pytest.raises(Interrupted, match=rf"^stopped at step \d+ and saved; go on with: zhixing resume {folder}$"):
        train.train_config(config, folder, quiet=True)
    stop_at_look(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train.resume_directory(folder, quiet=True)
    monkeypatch.undo()
    train.resume_directory(folder, quiet=True)
    assert_same_run(folder, expected)
