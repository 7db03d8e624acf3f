"""Learning curves of one or many runs: the IQM over seeds, with its 95 % bootstrap interval as a band."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UsageError, unknown
from .records import EVALUATION, read_metrics
from .statistics import bootstrap_interval, hold_last, iqm

# Okabe and Ito's palette ("Color universal design", 2008), told apart by colour-blind readers too; dark ones first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")  # one a metric, or where there are more runs than colours
_FORMATS = ("png", "svg", "pdf")
_DATE = {"svg": "Date", "pdf": "CreationDate"}  # left out: the same runs give the same file
_AXES = {"steps": "environment steps", "time": "wall-clock time (s)"}
# The fonts with Chinese characters that systems ship; those that are installed come after the Latin one.
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Heiti SC",
    "SimHei",
    "Droid Sans Fallback",
    "Noto Sans CJK JP",
    "Arial Unicode MS",
)


def plot_runs(
    run_directories: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    metric: str | Sequence[str] = EVALUATION,
    x: str = "steps",
    title: str | None = None,
    labels: Sequence[str] | None = None,
    log: bool = False,
) -> Path:
    """Draw the learning curves of runs into `output` (.png, .svg or .pdf) and return its path.

    One curve a run, over the steps that its own table holds: the IQM over its seeds with the 95 % bootstrap
    interval, at the steps where every seed has a number (of the group `episode/`, a seed keeps its last one).
    `metric`: a column, or several: then a run's curves have one colour, and each metric a dash of its own.
    `x`: "steps" (environment steps of one seed) or "time" (seconds). `log`: powers of ten up the axis, for values
    that diverge; from -1 to 1 it is linear. `labels`: one a run; default the folder's
    name, or the path where two folders share a name. Raises UsageError for what is no run, has no such metric or
    no number of it yet, and for an unknown format.
    """
    output = Path(output)
    _require_format(output)
    if x not in _AXES:
        raise unknown("axis", x, _AXES)
    if not run_directories:
        raise UsageError("no run to plot; name one run directory or more")
    if labels is None:
        labels = _labels(run_directories)
    elif len(labels) != len(run_directories):
        raise UsageError(f"{len(labels)} labels for {len(run_directories)} runs; give one label a run")
    metrics = [metric] if isinstance(metric, str) else metric
    if not metrics:
        raise UsageError("no metric to plot; name a column of metrics.csv")
    curves = {name: [_curve(directory, name, x) for directory in run_directories] for name in metrics}
    _save(lambda: _draw(curves, labels, x, title, log), output)
    return output


def plot_comparison(
    run_directories: Sequence[str | os.PathLike],
    labels: Sequence[str],
    scores: Sequence[npt.ArrayLike],
    outputs: Sequence[Path],
    title: str,
) -> None:
    """Draw the learning curves of runs beside the IQM and interval of their final `scores`, [S] of each run."""
    curves = [_curve(directory, EVALUATION, "steps") for directory in run_directories]
    _save(lambda: _draw_comparison(curves, labels, [np.asarray(score) for score in scores], title), *outputs)


def plot_trajectories(
    points: np.ndarray, output: str | os.PathLike, labels: Sequence[str], titles: Sequence[str]
) -> Path:
    """Draw `points` [panels, K, m, M, 2] into `output`: m lines of each of K colours a panel; NaN ends a line."""
    output = Path(output)
    _require_format(output)
    _save(lambda: _draw_trajectories(points, labels, titles), output)
    return output


def _require_format(output: Path) -> None:
    if output.suffix.lower().removeprefix(".") not in _FORMATS:
        endings = ", ".join("." + name for name in _FORMATS)
        raise UsageError(f"cannot draw into '{output}'; let its name end in one of: {endings}")


def _save(draw: Callable[[], Any], *outputs: Path) -> None:
    """The figure that `draw` makes, into files; their endings are among _FORMATS."""
    import matplotlib

    with matplotlib.rc_context(_style()), warnings.catch_warnings():
        # Without a CJK font a Chinese label shows boxes; the picture is still good.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = draw()
        for output in outputs:
            form = output.suffix.lower().removeprefix(".")
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output, format=form, metadata=None if form == "png" else {_DATE[form]: None})


def _labels(directories: Sequence[str | os.PathLike]) -> list[str]:
    names = [Path(directory).resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else [str(directory) for directory in directories]


def _curve(directory: str | os.PathLike, metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """x [T] and values [S, T] of one run, at the steps where every seed has a number."""
    table = read_metrics(directory)
    if not table or len(table["step"]) == 0:
        raise UsageError(f"'{directory}' has no rows yet; train it for longer")
    metrics = [name for name in table if name not in ("step", "seconds", "seed")]
    if metric not in metrics:
        error = unknown("metric", metric, metrics)
        raise UsageError(f"'{directory}': {error}")
    steps, column = np.unique(table["step"], return_inverse=True)
    seeds, row = np.unique(table["seed"], return_inverse=True)
    values = np.full((len(seeds), len(steps)), np.nan)
    values[row, column] = table[metric]
    measured = ~np.isnan(values).all(axis=0)
    if metric.startswith("episode/"):
        values = hold_last(values)
    whole = measured & ~np.isnan(values).any(axis=0)
    if not whole.any():
        raise UsageError(f"'{directory}' has no step with '{metric}' of every seed yet; train it for longer")
    seconds = np.empty(len(steps))
    seconds[column] = table["seconds"]
    return (steps if x == "steps" else seconds)[whole], values[:, whole]


def _style() -> Any:
    from matplotlib import font_manager

    # Only what is installed: a family that is not makes Matplotlib warn at each text.
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)],
        "font.size": 10,
        "axes.unicode_minus": True,
        "svg.hashsalt": "zhixing",
        "text.parse_math": False,
    }


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(
    curves: Mapping[str, Sequence[tuple]], labels: Sequence[str], x: str, title: str | None, log: bool = False
) -> Any:
    """`curves`: of each metric, one a run, as `_curve` gives it."""
    from matplotlib.ticker import EngFormatter

    figure = _figure(7, 4.2)
    axes = figure.add_subplot()
    several = len(curves) > 1
    for number, (metric, of_runs) in enumerate(curves.items()):
        for index, ((position, values), label) in enumerate(zip(of_runs, labels, strict=True)):
            color, dash = _look(index)
            seeds = len(values)
            name = f"{label} ({seeds} seed{'s' if seeds > 1 else ''})" if number == 0 else None
            _line(axes, position, values, color, _DASHES[number % len(_DASHES)] if several else dash, name)
        if several:
            axes.plot([], [], color="#555555", linestyle=_DASHES[number % len(_DASHES)], label=_words(metric))

    axes.set_ylabel(_words(next(iter(curves))) if not several else "")
    if log:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _tidy(axes, x)
    has_band = any(len(values) > 1 for of_runs in curves.values() for _, values in of_runs)
    axes.legend(frameon=False, loc="best", title="IQM, 95 % interval" if has_band else None, alignment="left")
    if title:
        axes.set_title(title, loc="left", fontsize=13, pad=10)  # not bold: most CJK fonts have no bold face
    return figure


def _draw_comparison(curves: Sequence[tuple], labels: Sequence[str], scores: Sequence[np.ndarray], title: str) -> Any:
    figure = _figure(10, max(4.0, 1.6 + 0.42 * len(labels)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, ((position, values), of_seeds) in enumerate(zip(curves, scores, strict=True)):
        color, dash = _look(index)
        _line(left, position, values, color, dash, labels[index])
        low, high = bootstrap_interval(of_seeds)
        right.plot(of_seeds, np.full(len(of_seeds), index + 0.18), ".", color=color, alpha=0.35, markersize=4)
        right.plot([low, high], [index, index], color=color, linestyle=dash, linewidth=2.4, solid_capstyle="butt")
        right.plot([iqm(of_seeds)], [index], "o", color=color, markersize=6)
    left.set_ylabel(_words(EVALUATION))
    _tidy(left, "steps")
    right.set_yticks(range(len(labels)), labels)
    right.set_ylim(len(labels) - 0.5, -0.5)  # the first on top
    right.set_xlabel("final return: IQM, 95 % interval; each seed")
    right.locator_params(axis="x", nbins=5)
    _tidy(right)
    for index, label in enumerate(right.get_yticklabels()):
        label.set_color(_look(index)[0])
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    return figure


def _draw_trajectories(points: np.ndarray, labels: Sequence[str], titles: Sequence[str]) -> Any:
    from matplotlib import colormaps

    panels, kinds, lines = points.shape[:3]
    columns = min(panels, 5)
    figure = _figure(max(4.2, 2.6 * columns), 3.2 * -(-panels // columns))
    colors = colormaps["tab10" if kinds <= 10 else "turbo"]
    grid = figure.subplots(-(-panels // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[panels:]:
        axes.set_visible(False)
    for number, axes in enumerate(grid.flat[:panels]):
        for kind in range(kinds):
            color = colors(kind if kinds <= 10 else kind / (kinds - 1))
            for line in range(lines):
                x, y = points[number, kind, line].T
                label = str(kind) if number == line == 0 else None
                axes.plot(x, y, color=color, linewidth=1.2, alpha=0.8, label=label)
        axes.set_title(titles[number], fontsize=10)
        axes.set_xlabel(labels[0])
        _tidy(axes)
    for row in grid:
        row[0].set_ylabel(labels[1])
    figure.legend(title="skill", frameon=False, loc="outside right center")
    return figure


def _look(index: int) -> tuple[str, str]:
    """The colour and dash of a run."""
    return PALETTE[index % len(PALETTE)], _DASHES[index // len(PALETTE) % len(_DASHES)]


def _line(axes: Any, position: np.ndarray, values: np.ndarray, color: str, dash: str, label: str | None) -> None:
    """The IQM of `values` [S, T] and its interval."""
    low, high = bootstrap_interval(values)
    axes.fill_between(position, low, high, color=color, alpha=0.16, linewidth=0)
    marker = "o" if len(position) == 1 else None  # a line of one point would not show
    axes.plot(position, iqm(values), color=color, linestyle=dash, linewidth=1.8, marker=marker, label=label)


def _words(metric: str) -> str:
    return metric.replace("/", " ").replace("_", " ")


def _tidy(axes: Any, x: str | None = None) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if x is not None:
        axes.set_xlabel(_AXES[x])
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.margins(x=0.01)
    if x == "steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9a9a9a")
    axes.tick_params(color="#9a9a9a", labelcolor="#333333")
