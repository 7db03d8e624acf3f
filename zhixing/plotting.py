"""Learning curves of one or many runs: the IQM over seeds, with its 95 % bootstrap interval as a band."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError, unknown
from .records import EVALUATION, read_metrics
from .statistics import bootstrap_interval, hold_last, iqm

# Okabe and Ito's palette ("Color universal design", 2008), told apart by colour-blind readers too; dark ones first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")  # where there are more runs than colours
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
    metric: str = EVALUATION,
    x: str = "steps",
    title: str | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Draw the learning curves of runs into `output` (.png, .svg or .pdf) and return its path.

    One curve a run, over the steps that its own table holds: the IQM over its seeds with the 95 % bootstrap
    interval, at the steps where every seed has a number (of the group `episode/`, a seed keeps its last one).
    `x`: "steps" (environment steps of one seed) or "time" (seconds). `labels`: one a run; default the folder's
    name, or the path where two folders share a name. Raises UsageError for what is no run, has no such metric or
    no number of it yet, and for an unknown format.
    """
    output = Path(output)
    form = output.suffix.lower().removeprefix(".")
    if form not in _FORMATS:
        endings = ", ".join("." + name for name in _FORMATS)
        raise UsageError(f"cannot draw into '{output}'; let its name end in one of: {endings}")
    if x not in _AXES:
        raise unknown("axis", x, _AXES)
    if not run_directories:
        raise UsageError("no run to plot; name one run directory or more")
    if labels is None:
        labels = _labels(run_directories)
    elif len(labels) != len(run_directories):
        raise UsageError(f"{len(labels)} labels for {len(run_directories)} runs; give one label a run")
    curves = [_curve(directory, metric, x) for directory in run_directories]

    import matplotlib

    with matplotlib.rc_context(_style()), warnings.catch_warnings():
        # Without a CJK font a Chinese label shows boxes; the picture is still good.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _draw(curves, labels, metric, x, title)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, format=form, metadata=None if form == "png" else {_DATE[form]: None})
    return output


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


def _draw(curves: Sequence[tuple], labels: Sequence[str], metric: str, x: str, title: str | None) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, ((position, values), label) in enumerate(zip(curves, labels, strict=True)):
        color, dash = PALETTE[index % len(PALETTE)], _DASHES[index // len(PALETTE) % len(_DASHES)]
        seeds = len(values)
        low, high = bootstrap_interval(values)
        axes.fill_between(position, low, high, color=color, alpha=0.16, linewidth=0)
        name = f"{label} ({seeds} seed{'s' if seeds > 1 else ''})"
        marker = "o" if len(position) == 1 else None  # a line of one point would not show
        axes.plot(position, iqm(values), color=color, linestyle=dash, linewidth=1.8, marker=marker, label=name)

    axes.set_xlabel(_AXES[x])
    axes.set_ylabel(metric.replace("/", " ").replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    if x == "steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9a9a9a")
    axes.tick_params(color="#9a9a9a", labelcolor="#333333")
    axes.legend(frameon=False, loc="best", title="IQM, 95 % interval" if _has_band(curves) else None, alignment="left")
    if title:
        axes.set_title(title, loc="left", fontsize=13, pad=10)  # not bold: most CJK fonts have no bold face
    return figure


def _has_band(curves: Sequence[tuple]) -> bool:
    return any(len(values) > 1 for _, values in curves)
