"""Records on disk (round trip, resume, a killed process, TensorBoard) and the terminal view in all its modes."""

import csv
import io
import re
import subprocess
import sys

import numpy as np
import pytest

from zhixing.errors import UsageError
from zhixing.records import LiveView, Records, read_metrics, sparkline
from zhixing.statistics import bootstrap_interval

COLUMNS = ["loss/policy", "episode/return", "evaluation/return", "time/steps_per_second"]
SEEDS = [3, 1, 4]


def write(directory, steps, resume_step=None, seeds=SEEDS):
    with Records(directory, seeds, COLUMNS, resume_step) as records:
        for step in steps:
            per_seed = np.arange(len(seeds), dtype=np.float32) / 10 + step
            metrics = {"loss/policy": per_seed, "evaluation/return": 2.0 * per_seed, "time/steps_per_second": 1e5}
            records.row(step, step / 7, metrics)


def test_round_trip(tmp_path):
    write(tmp_path, [10, 20])
    table = read_metrics(tmp_path)
    assert list(table) == ["step", "seconds", "seed", *COLUMNS]
    assert table["step"].tolist() == [10, 10, 10, 20, 20, 20]
    assert table["seed"].tolist() == SEEDS * 2
    assert np.isnan(table["episode/return"]).all()
    assert table["time/steps_per_second"].tolist() == [1e5] * 6
    expected = np.float32([10, 10.1, 10.2, 20, 20.1, 20.2])
    np.testing.assert_array_equal(table["loss/policy"].astype(np.float32), expected)
    assert all(
        np.array_equal(column, read_metrics(tmp_path / "metrics.csv")[name], equal_nan=True)
        for name, column in table.items()
    )


def test_floats_read_back_exactly(tmp_path):
    single, double = np.float32([0.1, 1e-30, np.inf]), np.array([1 / 3, -1e300, 5e-324])
    with Records(tmp_path, SEEDS, ["a", "b", "c"]) as records:
        records.row(1, 0, {"a": single, "b": double, "c": np.array([True, False, True])})
    table = read_metrics(tmp_path)
    np.testing.assert_array_equal(table["a"].astype(np.float32), single)
    np.testing.assert_array_equal(table["b"], double)
    assert table["c"].tolist() == [1, 0, 1]


def test_pandas_and_csv_read_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    write(tmp_path, [10, 20])
    table = read_metrics(tmp_path)
    frame = pandas.read_csv(tmp_path / "metrics.csv")
    pandas.testing.assert_frame_equal(frame, pandas.DataFrame(table))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[1]["seed"] == "1" and rows[1]["episode/return"] == "" and rows[1]["loss/policy"] == "10.1"


def test_each_row_reaches_the_file_at_once(tmp_path):
    with Records(tmp_path, SEEDS, COLUMNS) as records:
        assert len(read_metrics(tmp_path)["step"]) == 0
        records.row(10, 1.0, {"loss/policy": 1.0})
        assert read_metrics(tmp_path)["loss/policy"].tolist() == [1, 1, 1]


def test_resume_removes_later_rows_and_a_half_line(tmp_path):
    write(tmp_path, [10, 20, 30])
    straight = tmp_path / "straight"
    write(straight, [10, 20, 30, 40])
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("40,5.7,3,4")
    assert read_metrics(tmp_path)["step"].max() == 30
    write(tmp_path, [30, 40], resume_step=20)
    assert (tmp_path / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("left", [b"", b"step,seco"])
def test_resume_where_not_even_the_header_was_written(tmp_path, left):
    (tmp_path / "metrics.csv").write_bytes(left)
    assert read_metrics(tmp_path) == {}
    write(tmp_path, [10], resume_step=0)
    assert read_metrics(tmp_path)["step"].tolist() == [10] * 3


def test_a_killed_process_leaves_whole_rows(tmp_path):
    program = (
        "import os, signal, sys; from zhixing.records import Records\n"
        "records = Records(sys.argv[1], [0, 1], ['loss/value'])\n"
        "for step in range(5): records.row(step, step, {'loss/value': step})\n"
        "os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert read_metrics(tmp_path)["step"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path, [10])
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(UsageError, match="already holds a run"):
        Records(tmp_path, SEEDS, COLUMNS)
    with pytest.raises(UsageError, match="other columns"):
        Records(tmp_path, SEEDS, ["loss/value"], resume_step=10)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_column_that_an_older_version_did_not_write(tmp_path):
    write(tmp_path, [10, 20])
    wider = [*COLUMNS[:1], "evaluation/value", *COLUMNS[1:]]
    with Records(tmp_path, SEEDS, wider, resume_step=10) as records:
        records.row(30, 4.0, {"evaluation/value": 1.0, "loss/policy": 2.0})
    table = read_metrics(tmp_path)
    assert list(table) == ["step", "seconds", "seed", *wider]
    assert table["step"].tolist() == [10] * 3 + [30] * 3
    np.testing.assert_array_equal(table["evaluation/value"], [np.nan] * 3 + [1.0] * 3)
    np.testing.assert_allclose(table["loss/policy"], [10, 10.1, 10.2, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(table["evaluation/return"][:3], [20, 20.2, 20.4], rtol=1e-6)


def test_wrong_metrics(tmp_path):
    with Records(tmp_path, SEEDS, COLUMNS) as records:
        with pytest.raises(UsageError, match=r"unknown metric 'loss/polcy'; did you mean 'loss/policy'\?"):
            records.row(1, 1.0, {"loss/polcy": 1.0})
        with pytest.raises(ValueError, match=r"must be \[3\] or one number, not \[2\]"):
            records.row(1, 1.0, {"loss/policy": np.zeros(2)})
        assert len(read_metrics(tmp_path)["step"]) == 0
    with pytest.raises(UsageError, match="is not a run"):
        read_metrics(tmp_path / "nowhere")


def events(directory):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loaded = accumulator.EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


def test_tensorboard(tmp_path):
    write(tmp_path, [10, 20, 30])
    write(tmp_path, [30, 40], resume_step=20)  # within the second: both files must live
    seed = events(tmp_path / "tensorboard" / "seed_1")
    assert set(seed) == {"loss/policy", "evaluation/return", "time/steps_per_second"}
    assert seed["loss/policy"] == [(step, pytest.approx(step + 0.1)) for step in (10, 20, 30, 40)]
    middle = events(tmp_path / "tensorboard" / "iqm")
    assert middle["evaluation/return"][-1] == (40, pytest.approx(80.2))
    low, high = bootstrap_interval([80.0, 80.2, 80.4])
    assert events(tmp_path / "tensorboard" / "iqm" / "low") == {
        "evaluation/return": [*[(s, pytest.approx(2 * s, abs=0.4)) for s in (10, 20, 30)], (40, pytest.approx(low))]
    }
    assert events(tmp_path / "tensorboard" / "iqm" / "high")["evaluation/return"][-1] == (40, pytest.approx(high))


def test_tensorboard_iqm_waits_for_every_seed(tmp_path):
    nan = np.nan
    with Records(tmp_path, [0, 1], ["episode/return", "loss/value"]) as records:
        for step, returns in enumerate([[1, nan], [nan, nan], [nan, 3], [5, nan]]):
            records.row(step, step, {"episode/return": np.array(returns), "loss/value": np.array(returns)})
    assert events(tmp_path / "tensorboard" / "iqm") == {"episode/return": [(2, 2.0), (3, 4.0)]}
    assert events(tmp_path / "tensorboard" / "seed_0")["loss/value"] == [(0, 1.0), (3, 5.0)]


def test_tensorboard_shows_at_most_sixteen_seeds(tmp_path):
    write(tmp_path, [10], seeds=range(20))
    assert len(list((tmp_path / "tensorboard").glob("seed_*"))) == 16
    assert len(read_metrics(tmp_path)["seed"]) == 20


def console(encoding="utf-8", width=100, terminal=False):
    from rich.console import Console

    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    # _environ: the test must not depend on FORCE_COLOR, TERM or COLUMNS around it.
    environment = {"TERM": "xterm", "COLUMNS": str(width), "LINES": "25"}
    return Console(file=file, force_terminal=terminal, force_interactive=terminal, width=width, _environ=environment)


def shown(view_console):
    view_console.file.flush()
    data = view_console.file.buffer.getvalue().decode(view_console.file.encoding)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data)


RETURNS = np.array([120.0, 130.0, 135.0, 142.0])


def play(view):
    with view:
        for step in range(0, 100_001, 20_000):
            view.update(step, 81_234)
            evaluation = {"evaluation/return": RETURNS * 2 + step / 1000} if step % 40_000 == 0 else {}
            view.row(step, {"episode/return": RETURNS + step / 1000, "loss/policy": 1.0} | evaluation)
            if step == 40_000:
                view.message("checkpoint [red] 写好了")


def test_plain_lines():
    output = console()
    play(LiveView("PPO on CartPole-v1", {"seeds": "4", "learning rate": "3e-4"}, 100_000, console=output))
    lines = shown(output).splitlines()
    assert lines[:3] == ["PPO on CartPole-v1", "  seeds          4", "  learning rate  3e-4"]
    assert len(lines) == 3 + 6 + 1
    assert "checkpoint [red] 写好了" in lines
    low, high = (f"{bound + 20:.4g}" for bound in bootstrap_interval(RETURNS))
    assert lines[4] == f"step 20000/100000  20%  steps/s 81.2k  return 152.5 [{low}, {high}]"
    assert "  evaluation 265 [" in lines[3]


def test_live_block():
    output = console(terminal=True)
    play(LiveView("PPO on CartPole-v1", {"seeds": "4"}, 100_000, console=output))
    text = shown(output)
    last = text.splitlines()[-3:]
    assert "100%   100,000/100,000 steps   0:00 elapsed   81.2k steps/s" in last[0] and "━━━━" in last[0]
    assert re.search(r"return 232.5 \[.*\]   evaluation 345 \[.*\]   best 345", last[1])
    assert last[2].startswith("evaluation ▁▅█  265 to 345")
    assert "checkpoint [red] 写好了" in text
    raw = output.file.buffer.getvalue()
    assert raw.count(b"\x1b[?25l") == 1 and raw.count(b"\x1b[?25h") == 1  # the cursor: hidden, then back


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
@pytest.mark.parametrize("width", [12, 100])  # narrow: what cuts a line off must be encodable too
def test_encodings_without_unicode(encoding, terminal, width):
    output = console(encoding, width, terminal)
    play(LiveView("知行 ⟨PPO⟩", {"环境": "CartPole-v1 …"}, 100_000, console=output))
    assert "100%" in shown(output)
    assert ("写好了" in shown(output)) == (encoding == "gbk")


@pytest.mark.parametrize("width", [1, 8, 20, 40, 60, 80])
def test_narrow_terminals(width):
    output = console(width=width, terminal=True)
    play(LiveView("t", {}, 100_000, console=output))
    block = shown(output).splitlines()[-3:]
    assert len(block) == 3 and all(len(line) <= width for line in block)
    assert width < 20 or "100%" in block[0]


def test_interrupt_gives_the_terminal_back():
    output = console(terminal=True)
    stdout = sys.stdout
    with pytest.raises(KeyboardInterrupt), LiveView("t", {}, 10, console=output) as view:
        view.update(1, 1.0)
        raise KeyboardInterrupt
    assert output.file.buffer.getvalue().count(b"\x1b[?25h") == 1
    assert sys.stdout is stdout


def test_quiet(capsys):
    play(LiveView("t", {"a": "b"}, 100_000, quiet=True))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_view_before_every_seed_has_a_return():
    output = console()
    with LiveView("t", {}, 100, console=output) as view:
        view.row(10, {"episode/return": np.array([1.0, np.nan])})
        view.row(20, {"episode/return": np.array([np.nan, 3.0])})
        view.row(30, {})
    lines = shown(output).splitlines()
    assert "return" not in lines[1] and "return 2 [1, 3]" in lines[2] and "return" not in lines[3]


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, ascii_only=True) == "_.:-=+*#"
    assert sparkline([5.0, 5.0], 10) == "▁▁"
    assert sparkline(list(range(1000)), 4) == "▁▃▆█"
