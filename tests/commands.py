"""How the tests make runs as a user does: through the command line, in this process or in one of its own."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
import yaml
from jax._src import compilation_cache
from probes import make_algorithm, realistic_environment

from zhixing import checkpoint, cli, config, records, runtime

PROGRAM = [sys.executable, "-c", "from zhixing.cli import main; main()"]
TIMEOUT = 240  # seconds; nothing here takes a tenth of it on an idle machine


class Result(NamedTuple):
    code: int
    out: str
    error: str


@cache
def cache_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="zhixing-tests-")


def environment_variables() -> dict[str, str]:
    """Nothing is kept in the user's own cache."""
    return {**os.environ, "XDG_CACHE_HOME": cache_folder().name, "COLUMNS": "200"}


def command(*words: Any) -> Result:
    """`zhixing WORDS` in this process."""
    out, error = io.StringIO(), io.StringIO()
    code = 0
    with mock.patch.dict(os.environ, environment_variables()), redirect_stdout(out), redirect_stderr(error):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), error.getvalue())


def succeed(*words: Any) -> str:
    """`zhixing WORDS`, which must go well -> what it prints."""
    result = command(*words)
    assert (result.code, result.error) == (0, ""), result
    return result.out


def refused(*words: Any) -> str:
    """`zhixing WORDS`, which must be a user's slip -> the one line, without its beginning."""
    result = command(*words)
    assert result.code == 2, result
    assert result.out == ""
    assert result.error.startswith("zhixing: ") and result.error.count("\n") == 1, result.error
    return result.error.removeprefix("zhixing: ").rstrip("\n")


@contextlib.contextmanager
def process(*words: Any) -> Iterator[subprocess.Popen]:
    """`zhixing WORDS` in a process of its own, which does not outlive the block."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen([*PROGRAM, *map(str, words)], env=environment_variables(), **pipes)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def wait_until(condition: Callable[[], bool], running: subprocess.Popen) -> None:
    """Until `condition`; fails with what the process said if it ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if running.poll() is not None:
            raise AssertionError(f"ended with {running.returncode}: {running.communicate()}")
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_saved(folder: Path) -> int:
    """The step of the newest checkpoint; -1 if there is none."""
    return max(
        (int(path.stem.removeprefix("step-")) for path in folder.glob("checkpoints/step-*.safetensors")), default=-1
    )


def signalled(folder: Path, number: signal.Signals, *words: Any, at_step: int = 1) -> Result:
    """`zhixing WORDS`, sent a signal once a checkpoint of at least `at_step` is in `folder`."""
    with process(*words) as running:
        wait_until(lambda: steps_saved(folder) >= at_step, running)
        running.send_signal(number)
        out, error = running.communicate(timeout=TIMEOUT)
        return Result(running.returncode, out, error)


def settings(name: str, **more: Any) -> dict[str, Any]:
    """Settings of a short run of the algorithm called `name`, as YAML has them."""
    algorithm = make_algorithm(name)
    environment = config.EnvironmentConfig(id=realistic_environment(algorithm).id)
    whole = config.Config(algorithm=algorithm, environment=environment)
    short = {
        "total_steps": 640,
        "num_environments": 4,
        "seeds": 2,
        "evaluation": {"every": 320, "episodes": 2, "final_episodes": 2, "max_steps": 50},
        "record": {"every": 64, "tensorboard": False},
    }
    return config.merge(config.to_mapping(whole), short, more)


def write_settings(path: Path, mapping: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(mapping))
    return path


def final_state(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of the newest checkpoint, and its metadata without what a clock has measured."""
    arrays, metadata = checkpoint.read(checkpoint.Checkpoints(folder / "checkpoints", 1).path())
    return arrays, {key: value for key, value in metadata.items() if "seconds" not in key}


def table(folder: Path) -> dict[str, np.ndarray]:
    """The columns of metrics.csv without what a clock has measured."""
    timed = ("seconds", "time/steps_per_second")
    return {name: column for name, column in records.read_metrics(folder).items() if name not in timed}


def assert_same_run(folder: Path, other: Path) -> None:
    """The same state to the bit, and the same records."""
    arrays, metadata = final_state(folder)
    other_arrays, other_metadata = final_state(other)
    assert arrays.keys() == other_arrays.keys()
    assert [name for name in arrays if arrays[name].tobytes() != other_arrays[name].tobytes()] == []
    assert metadata == other_metadata
    assert table(folder).keys() == table(other).keys()
    for name, column in table(folder).items():
        np.testing.assert_array_equal(column, table(other)[name], err_msg=name)


@pytest.fixture(scope="module")
def kept_programs() -> Iterator[None]:
    """What is compiled in the module that uses it, and in processes that it starts, is compiled once, as for a user."""
    with mock.patch.dict(os.environ, environment_variables()):
        runtime.keep_compiled_programs()
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
