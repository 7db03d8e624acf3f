"""Pictures of runs: valid files, the right curves, clear errors, no trace left in Matplotlib's global state."""

import logging
import subprocess
import sys
import warnings
import xml.etree.ElementTree

import numpy as np
import pytest

from zhixing import plotting
from zhixing.errors import UsageError
from zhixing.plotting import plot_runs
from zhixing.records import read_metrics


def run(directory, seeds=4, steps=range(100, 1001, 100), start=0.0):
    """A run's table, written by hand: plots need nothing else."""
    directory.mkdir(parents=True)
    lines = ["step,seconds,seed,episode/return,evaluation/return,loss/value"]
    generator = np.random.default_rng(0)
    for step in steps:
        for seed in range(seeds):
            value = start + step + 50 * generator.normal()
            evaluation = value if step % 200 == 0 else ""
            lines.append(f"{step},{step / 50},{seed},{value if (step // 100 + seed) % 2 else ''},{evaluation},")
    (directory / "metrics.csv").write_text("\n".join([*lines, ""]))
    return directory


def test_png_and_svg(tmp_path):
    one, other = run(tmp_path / "ppo-CartPole-v1"), run(tmp_path / "dqn 深度", seeds=1, steps=range(50, 2001, 50))
    png = plot_runs([one, other], tmp_path / "new" / "curves.png", title="CartPole-v1")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 10_000
    svg = plot_runs([one, other], tmp_path / "curves.svg", x="time")
    assert xml.etree.ElementTree.parse(svg).getroot().tag.endswith("svg")
    again = plot_runs([one, other], tmp_path / "again.svg", x="time")
    assert again.read_bytes() == svg.read_bytes()
    logarithmic = plot_runs([one, other], tmp_path / "log.svg", x="time", log=True)
    assert logarithmic.read_bytes() != svg.read_bytes()
    assert plot_runs([one], tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_each_run_keeps_its_own_grid(tmp_path):
    one, other = run(tmp_path / "one"), run(tmp_path / "other", seeds=2, steps=range(50, 1601, 50))
    curves = [plotting._curve(directory, "evaluation/return", "steps") for directory in (one, other)]
    assert curves[0][0].tolist() == [200, 400, 600, 800, 1000]
    assert curves[1][0].tolist() == list(range(200, 1601, 200))
    assert [values.shape for _, values in curves] == [(4, 5), (2, 8)]
    table = read_metrics(one)
    np.testing.assert_array_equal(
        curves[0][1][3], table["evaluation/return"][(table["seed"] == 3) & (table["step"] % 200 == 0)]
    )
    seconds, _ = plotting._curve(one, "evaluation/return", "time")
    assert seconds.tolist() == [4, 8, 12, 16, 20]


def test_training_return_is_held_between_episodes(tmp_path):
    position, values = plotting._curve(run(tmp_path / "one"), "episode/return", "steps")
    assert position.tolist() == list(range(200, 1001, 100))  # at 100 only half of the seeds had finished one
    assert not np.isnan(values).any() and np.array_equal(values[0, 1:-1:2], values[0, 2::2])


def test_legend_names_runs_and_seeds(tmp_path):
    directories = [run(tmp_path / "a" / "x"), run(tmp_path / "b" / "x", seeds=1)]
    curves = [plotting._curve(directory, "evaluation/return", "steps") for directory in directories]
    figure = plotting._draw({"evaluation/return": curves}, ["PPO", "DQN"], "steps", "title")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["PPO (4 seeds)", "DQN (1 seed)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "evaluation return")
    assert plotting._labels(directories[:1]) == ["x"]
    assert plotting._labels(directories) == [str(directory) for directory in directories]


def test_several_metrics_in_one_figure(tmp_path):
    """Colour is the run, dash the metric; the legend names each once."""
    directories, metrics = [run(tmp_path / "a"), run(tmp_path / "b", seeds=1)], ["evaluation/return", "episode/return"]
    curves = {name: [plotting._curve(directory, name, "steps") for directory in directories] for name in metrics}
    axes = plotting._draw(curves, ["PPO", "DQN"], "steps", None).axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata())]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--"]
    assert [line.get_color() for line in lines] == [*plotting.PALETTE[:2]] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "PPO (4 seeds)", "DQN (1 seed)", "evaluation return", "episode return"
    ]  # fmt: skip
    assert axes.get_ylabel() == ""
    both = plot_runs(directories, tmp_path / "both.svg", metric=metrics)
    assert both.read_bytes() != plot_runs(directories, tmp_path / "one.svg", metric=metrics[:1]).read_bytes()
    one = plot_runs(directories, tmp_path / "same.svg", metric="evaluation/return")
    assert one.read_bytes() == (tmp_path / "one.svg").read_bytes()


def test_comparison_draws_curves_beside_final_scores(tmp_path):
    labels = [f"rung {index}" for index in range(9)]  # more than there are colours
    directories = [run(tmp_path / label, start=100 * index) for index, label in enumerate(labels)]
    scores = [100.0 * index + np.arange(4) for index in range(9)]
    curves = [plotting._curve(directory, "evaluation/return", "steps") for directory in directories]
    left, right = plotting._draw_comparison(curves, labels, scores, "title").axes
    assert [line.get_label() for line in left.get_lines()] == labels
    looks = [(line.get_color(), line.get_linestyle()) for line in left.get_lines()]
    assert len(set(looks)) == 9
    assert [text.get_text() for text in right.get_yticklabels()] == labels
    assert [text.get_color() for text in right.get_yticklabels()] == [color for color, _ in looks]
    marks = right.get_lines()
    assert [line.get_xdata().tolist() for line in marks[2::3]] == [[score.mean()] for score in scores]  # 1.5 of 0..3
    for line, score in zip(marks[1::3], scores, strict=True):
        np.testing.assert_allclose(line.get_xdata(), plotting.bootstrap_interval(score))
    outputs = [tmp_path / "x.png", tmp_path / "x.svg"]
    plotting.plot_comparison(directories, labels, scores, outputs, "对比")
    assert outputs[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in outputs[1].read_bytes()


def test_no_warning_and_no_global_state(tmp_path, caplog):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        plot_runs([run(tmp_path / "知行")], tmp_path / "curves.png", title="强化学习: $100 - 3_a")
    assert not caplog.records
    assert dict(matplotlib.rcParams) == before


def test_pyplot_stays_out_and_matplotlib_is_lazy(tmp_path):
    run(tmp_path / "one")
    program = (
        "import sys; from zhixing.plotting import plot_runs; assert 'matplotlib' not in sys.modules\n"
        "plot_runs([sys.argv[1]], sys.argv[2]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "one"), str(tmp_path / "x.png")], check=True)


def test_errors(tmp_path):
    one, picture = run(tmp_path / "one"), tmp_path / "curves.png"
    with pytest.raises(UsageError, match=r"'.*nowhere' is not a run"):
        plot_runs([one, tmp_path / "nowhere"], picture)
    with pytest.raises(UsageError, match=r"unknown metric 'evaluation/retrun'; did you mean 'evaluation/return'\?"):
        plot_runs([one], picture, metric="evaluation/retrun")
    with pytest.raises(UsageError, match=r"curves.bmp'; let its name end in one of: \.png, \.svg, \.pdf"):
        plot_runs([one], tmp_path / "curves.bmp")
    with pytest.raises(UsageError, match="unknown axis 'step'; did you mean 'steps'"):
        plot_runs([one], picture, x="step")
    with pytest.raises(UsageError, match="no step with 'loss/value'"):
        plot_runs([one], picture, metric="loss/value")
    with pytest.raises(UsageError, match="has no rows yet"):
        plot_runs([run(tmp_path / "empty", steps=[])], picture)
    with pytest.raises(UsageError, match="2 labels for 1 runs"):
        plot_runs([one], picture, labels=["a", "b"])
    with pytest.raises(UsageError, match="no metric to plot"):
        plot_runs([one], picture, metric=[])
    with pytest.raises(UsageError, match="no run to plot"):
        plot_runs([], picture)
    assert not picture.exists()
