"""What a run leaves behind while it trains: `Records` on disk (CSV and TensorBoard), `LiveView` in the terminal."""

import csv
import io
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from .errors import UsageError, unknown
from .statistics import bootstrap_interval, iqm

EVALUATION, EPISODE = "evaluation/return", "episode/return"
_FILE = "metrics.csv"
_INDEX = ("step", "seconds", "seed")
_TENSORBOARD_SEEDS = 16  # more curves in one chart are not read, and each costs an open file
_FLUSH_SECONDS = 10


def read_metrics(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The table of a run, column by column: `step` and `seed` int64, the others float64, all [rows].

    `path`: a run's directory or its metrics.csv. A missing number is NaN; a last line that is still being written
    is left out. `pandas.read_csv(path)` reads the same file, `pandas.DataFrame(read_metrics(path))` the same table.
    Raises UsageError where there is no such file.
    """
    file = Path(path)
    file = file / _FILE if file.is_dir() else file
    if not file.is_file():
        raise UsageError(f"'{path}' is not a run (it holds no {_FILE}); name a directory that training wrote")
    rows = list(csv.reader(_whole_lines(file)))
    if not rows:
        return {}
    header, body = rows[0], rows[1:]
    columns = zip(*body, strict=True) if body else [()] * len(header)
    return {name: _numbers(name, cells) for name, cells in zip(header, columns, strict=True)}


def _numbers(name: str, cells: Sequence[str]) -> np.ndarray:
    if name in ("step", "seed"):
        return np.array([int(cell) for cell in cells], np.int64)
    return np.array([float(cell) if cell else np.nan for cell in cells], np.float64)


def _whole_lines(file: Path) -> list[str]:
    """The lines that end in a newline: a killed process may leave half a line."""
    lines = file.read_bytes().split(b"\n")[:-1]
    return [line.decode() + "\n" for line in lines]


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _hold(last: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """A seed that finished no episode since the last row keeps the return it had."""
    return values if last is None else np.where(np.isnan(values), last, values)


class Records:
    """Writes one run's numbers: `metrics.csv`, and TensorBoard event files under `tensorboard/`.

    metrics.csv has one line for each (step, seed), with the columns step (environment steps of one seed), seconds,
    seed, then `columns`; all lines of a step reach the file at once. TensorBoard shows the first 16 seeds as
    `seed_<seed>`, the IQM over all seeds as `iqm`, and for the evaluation return the 95 % bootstrap interval as
    `iqm/low` and `iqm/high`, in the same chart. The IQM is written where every seed has a number; for metrics of
    the group `episode/` a seed without a finished episode keeps its last one.

    `resume_step`: the step of the checkpoint that the run goes on from: later rows are removed; columns that the old
    rows lack are empty there. Write a step's row before its checkpoint. Raises UsageError where a new run would
    overwrite an old one, or an old one has a column that is not among `columns`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        seeds: Sequence[int],
        columns: Sequence[str],
        resume_step: int | None = None,
        tensorboard: bool = True,
    ) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._seeds = [int(seed) for seed in seeds]
        self._columns = list(columns)
        self._last: dict[str, np.ndarray] = {}
        path, header = directory / _FILE, _line([*_INDEX, *self._columns])
        if resume_step is not None:
            _cut(path, header, resume_step)
        elif path.exists():
            raise UsageError(f"'{directory}' already holds a run; resume it, or name another directory")
        self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - open until `close`
        if self._file.tell() == 0:
            self._file.write(header)
            self._file.flush()
        self._writers = self._tensorboard(directory / "tensorboard", resume_step) if tensorboard else {}

    def _tensorboard(self, directory: Path, resume_step: int | None) -> dict[str, Any]:
        from tensorboardX import SummaryWriter

        names = [f"seed_{seed}" for seed in self._seeds[:_TENSORBOARD_SEEDS]] + ["iqm"]
        if len(self._seeds) > 1 and EVALUATION in self._columns:
            names += ["iqm/low", "iqm/high"]
        # TensorBoard hides the events from purge_step on. The suffix keeps a run that is resumed within the second
        # from writing over its own file: the name holds only the second.
        purge, suffix = None if resume_step is None else resume_step + 1, f".{time.time_ns()}"
        return {
            name: SummaryWriter(
                str(directory / name),
                purge_step=purge,
                max_queue=1000,
                flush_secs=_FLUSH_SECONDS,
                filename_suffix=suffix,
            )
            for name in names
        }

    def row(self, step: int, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Write one step: `metrics` maps a column to [S] numbers, or to one number that all seeds share.

        A column that is not given is NaN. Raises UsageError for a name that is not among the columns, ValueError
        for another shape.
        """
        table = {name: self._per_seed(name, value) for name, value in metrics.items()}
        blank = np.full(len(self._seeds), np.nan)
        body = [table.get(name, blank) for name in self._columns]
        text = "".join(
            _line([int(step), f"{seconds:.3f}", seed, *(_cell(values[index]) for values in body)])
            for index, seed in enumerate(self._seeds)
        )
        self._file.write(text)
        self._file.flush()
        for name, values in table.items() if self._writers else ():
            self._events(int(step), name, values)

    def close(self) -> None:
        """Flush and close every file."""
        self._file.close()
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _per_seed(self, name: str, value: Any) -> np.ndarray:
        if name not in self._columns:
            raise unknown("metric", name, self._columns)
        values = np.asarray(value)
        if values.dtype not in (np.float32, np.float64):
            values = values.astype(np.float64)
        if values.ndim and values.shape != (len(self._seeds),):
            raise ValueError(f"metric '{name}' must be [{len(self._seeds)}] or one number, not {list(values.shape)}")
        return np.broadcast_to(values, len(self._seeds))

    def _events(self, step: int, name: str, values: np.ndarray) -> None:
        for seed, value in zip(self._seeds[:_TENSORBOARD_SEEDS], values, strict=False):
            if not np.isnan(value):
                self._writers[f"seed_{seed}"].add_scalar(name, float(value), step)
        if np.isnan(values).all():
            return
        if name.startswith("episode/"):
            values = self._last[name] = _hold(self._last.get(name), values)
        if np.isnan(values).any():
            return
        self._writers["iqm"].add_scalar(name, iqm(values), step)
        if name == EVALUATION and "iqm/low" in self._writers:
            for side, bound in zip(("low", "high"), bootstrap_interval(values), strict=True):
                self._writers[f"iqm/{side}"].add_scalar(name, bound, step)


def _cell(value: np.floating) -> str:
    """The shortest text that reads back as the same float of its precision."""
    return "" if np.isnan(value) else str(value)


def _cut(path: Path, header: str, resume_step: int) -> None:
    """Remove the rows after `resume_step` and a half-written last line, all or nothing."""
    lines = _whole_lines(path) if path.exists() else []
    kept = [line for line in lines[1:] if int(line.partition(",")[0]) <= resume_step]
    if lines and lines[0] != header:  # an older version wrote it
        old, new = (next(csv.reader([line])) for line in (lines[0], header))
        if not set(old) <= set(new):
            raise UsageError(f"'{path}' has other columns than this run; resume with the version that wrote it")
        rows = (dict(zip(old, cells, strict=True)) for cells in csv.reader(kept))
        kept = [_line([row.get(name, "") for name in new]) for row in rows]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write("".join([header, *kept]))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class LiveView:
    """The terminal view of a run: its settings, then one live block of progress, return and a sparkline.

    `settings` maps a name to its text; `total_steps` are environment steps of one seed. Where the output is no
    terminal, plain lines, one a row; nothing at all with `quiet`. `console`: a `rich.console.Console` (default: a
    new one on standard output). A context manager: leaving it, also by Ctrl-C, gives the terminal back.
    """

    def __init__(
        self, title: str, settings: Mapping[str, str], total_steps: int, quiet: bool = False, console: Any = None
    ) -> None:
        self._title, self._settings, self._total = title, dict(settings), max(1, total_steps)
        self._step, self._rate = 0, 0.0
        self._marks: deque[tuple[float, int]] = deque(maxlen=32)  # (time, step) of the last updates, for the ETA
        self._last: dict[str, np.ndarray] = {}
        self._texts: dict[str, str] = {}  # metric -> its latest IQM and interval
        self._history: dict[str, list[float]] = {EVALUATION: [], EPISODE: []}
        self._console: Any = None
        self._live: Any = None
        if not quiet:
            from rich.console import Console

            self._console = console or Console()

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        if self._console is None:
            return self
        self._print_settings()
        if self._console.is_interactive:
            from rich.live import Live

            self._live = Live(self, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, steps_per_second: float) -> None:
        """Move the bar: `step` of one seed, `steps_per_second` over all seeds together."""
        self._step, self._rate = int(step), float(steps_per_second)
        self._marks.append((time.perf_counter(), self._step))

    def row(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics as `Records.row` takes them; only the episode and evaluation returns are used."""
        self._step = int(step)
        if self._console is None:
            return
        fresh = {name: text for name in self._history if (text := self._take(name, metrics.get(name)))}
        self._texts.update(fresh)
        if self._live is None:
            parts = [f"step {self._step}/{self._total}", self._percent(), f"steps/s {_short(self._rate)}"]
            parts += [f"return {fresh[EPISODE]}"] if EPISODE in fresh else []
            parts += [f"evaluation {fresh[EVALUATION]}"] if EVALUATION in fresh else []
            self._print("  ".join(parts))

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._console is not None:
            self._print(text)

    def _take(self, name: str, value: Any) -> str:
        """Keep the IQM over seeds for the sparkline; its text, or "" where not every seed has a number yet."""
        values = np.atleast_1d(np.asarray(np.nan if value is None else value, np.float64))
        if np.isnan(values).all():
            return ""
        values = self._last[name] = _hold(self._last.get(name), values)
        if not np.isfinite(values).all():
            return ""
        middle = iqm(values)
        self._history[name].append(middle)
        if len(values) == 1:
            return _number(middle)
        low, high = bootstrap_interval(values)
        return f"{_number(middle)} [{_number(low)}, {_number(high)}]"

    def _percent(self) -> str:
        return f"{min(100, 100 * self._step // self._total)}%"

    def _remaining(self) -> str:
        if self._step >= self._total:
            return f"{_clock(time.perf_counter() - self._start)} elapsed"
        # The clock starts at the first update, after compilation, which will not come again.
        if len(self._marks) < 2 or self._marks[0][1] == self._marks[-1][1]:
            return "ETA -:--"
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        pace = (last_time - first_time) / (last_step - first_step)
        left = pace * (self._total - last_step) - (time.perf_counter() - last_time)
        return f"ETA {_clock(max(0.0, left))}"

    def _print(self, text: str, style: str = "") -> None:
        from rich.text import Text

        # `Text`, so that brackets are not read as markup; soft_wrap, so that a line of a log stays one line.
        self._console.print(Text(_encodable(text, self._console.encoding), style=style), soft_wrap=True)

    def _print_settings(self) -> None:
        self._print(self._title, style="bold")
        width = max((len(name) for name in self._settings), default=0)
        for name, text in self._settings.items():
            self._print(f"  {name:<{width}}  {text}")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = options.max_width
        steps = f"{self._step:,}/{self._total:,} steps"
        parts = [self._percent(), steps, self._remaining(), f"{_short(self._rate)} steps/s"]
        facts = _fit(parts, (0, 2, 3, 1), width - 12)
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar_width = max(4, min(40, width - len(facts) - 2))
        shown = min(self._step, self._total)
        bar.add_row(
            ProgressBar(total=self._total, completed=shown, width=bar_width, complete_style="cyan"),
            Text(facts, style="cyan"),
        )
        yield bar

        name = EVALUATION if self._history[EVALUATION] else EPISODE
        history = self._history[name]
        if not history:
            return
        labels = {EPISODE: "return", EVALUATION: "evaluation"}
        returns = [f"{labels[name]} {self._texts[name]}" for name in (EPISODE, EVALUATION) if name in self._texts]
        returns.append(f"best {_number(max(history))}")
        order = (1, 2, 0) if len(returns) == 3 else (0, 1)
        yield Text(_fit(returns, order, width), style="bold", no_wrap=True, overflow="crop")

        ends = f"  {_number(min(history))} to {_number(max(history))}"
        label = f"{labels[name]} "
        line = sparkline(history, max(1, min(60, width - len(label) - len(ends))), options.ascii_only)
        yield Text.assemble(label, (line, "green"), (ends, "dim"), no_wrap=True, overflow="crop")


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """`values` from the lowest to the highest as blocks, at most `width` of them (means of neighbours beyond)."""
    blocks = "_.:-=+*#" if ascii_only else "▁▂▃▄▅▆▇█"
    if len(values) > width:
        values = [float(np.mean(part)) for part in np.array_split(values, width)]
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join(blocks[int((value - low) / span * (len(blocks) - 1) + 0.5)] for value in values)


def _fit(parts: Sequence[str], order: Sequence[int], width: int) -> str:
    """The parts that fit into `width`, the first of `order` before the others, in their own order."""
    kept: list[int] = []
    for index in order:
        trial = sorted([*kept, index])
        if not kept or len("   ".join(parts[i] for i in trial)) <= width:
            kept = trial
    return "   ".join(parts[i] for i in kept)


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "replace").decode(encoding)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
