"""A run on EnvPool: its environments step in C++ inside the compiled program, and cannot be saved."""

import json
import signal
import subprocess

import numpy as np
import pytest
from commands import PROGRAM, TIMEOUT, environment_variables, settings, signalled, steps_saved, table, write_settings

pytest.importorskip("envpool")

TOTAL = 5_120


def in_its_own_process(*words: object) -> str:
    """EnvPool keeps threads of its own: each command gets a process, as for a user -> what it prints."""
    line = [*PROGRAM, *map(str, words)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT, env=environment_variables())
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_lunar_lander_is_trained_killed_resumed_and_evaluated(tmp_path):
    record = {"every": 512, "checkpoint_seconds": 0.0, "tensorboard": False}
    evaluation = {"every": 2_560, "episodes": 2, "final_episodes": 2}
    mapping = settings(
        "ppo", environment={"id": "LunarLander-v3"}, total_steps=TOTAL, record=record, evaluation=evaluation
    )
    folder, written = tmp_path / "run", write_settings(tmp_path / "settings.yaml", mapping)

    killed = signalled(folder, signal.SIGKILL, "train", written, "--run-dir", folder, at_step=1)
    assert killed.code == -signal.SIGKILL
    step = steps_saved(folder)
    assert 0 < step < TOTAL
    output = in_its_own_process("resume", folder)
    assert "LunarLander-v3 (envpool)" in output
    assert "the environments' state cannot be saved: a resumed run starts new episodes" in output
    assert f"resumed at step {step}\n" in output

    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["backend"], summary["environment_steps"], summary["seeds"]) == ("envpool", TOTAL, [0, 1])
    np.testing.assert_array_equal(np.unique(table(folder)["step"]), range(0, TOTAL + 1, 512))
    returns = table(folder)["episode/return"]
    assert -1_000 < np.nanmin(returns) < np.nanmax(returns) < 300  # as in the game, before anything is learned

    first, again = (json.loads(in_its_own_process("evaluate", folder, "--episodes", 4, "--json")) for _ in range(2))
    assert first == again
    assert first["episodes"] == 8 and -2_000 < first["iqm"] < 300
