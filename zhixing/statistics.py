"""How runs of several seeds are summed up: interquartile mean, bootstrap interval, the summary of an evaluation.

The unit is the seed: episodes of one seed share its policy and are no independent evidence about the algorithm,
so only seeds are resampled. Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS 2021.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 22  # resampled numbers held at once (32 MB)


def iqm(values: npt.ArrayLike, axis: int = 0) -> Any:
    """Interquartile mean: the mean of what is left when the lowest and the highest quarter are cut off.

    `values` [S, ...] seeds along `axis` -> [...] (a float for [S]). `floor(S / 4)` values go at each end, as in
    `scipy.stats.trim_mean(values, 0.25)` and in rliable: below four seeds it is the mean. NaN gives NaN.
    Own lines, because importing `scipy.stats` takes a second.
    """
    values = np.moveaxis(np.asarray(values, np.float64), axis, -1)
    size = values.shape[-1]
    if size == 0:
        raise ValueError("the interquartile mean of no values")
    cut = size // 4
    middle = np.sort(values, axis=-1)[..., cut : size - cut].mean(axis=-1)
    # Sorting puts NaN at the upper end, where it would be cut off unseen.
    middle = np.where(np.isnan(values).any(axis=-1), np.nan, middle)
    return middle if middle.ndim else float(middle)


def bootstrap_interval(
    values: npt.ArrayLike,
    statistic: Callable[..., Any] = iqm,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Percentile bootstrap interval of `statistic` over seeds -> (low, high).

    `values` [S] -> two floats; [S, T] -> two arrays [T], an interval at each time (the same resamples of seeds at
    all times). `statistic` takes (values, axis=), as `iqm`, `np.mean` and `np.median` do. One seed has no spread
    to resample: low and high are then both the statistic itself, a band without width. NaN gives NaN.
    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979; the percentile form.
    """
    values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or len(values) == 0:
        raise ValueError(f"values must be [S] or [S, T] with S > 0, not {list(values.shape)}")
    seeds = len(values)
    if seeds == 1:
        value = statistic(values, axis=0)
        return value, value

    chosen = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    times = np.ascontiguousarray(values.reshape(seeds, -1).T)  # [T, S]
    low, high = np.empty(len(times)), np.empty(len(times))
    step = max(1, _BLOCK // chosen.size)
    for start in range(0, len(times), step):
        block = slice(start, start + step)
        estimates = statistic(times[block][:, chosen], axis=-1)  # [t, resamples, S] -> [t, resamples]
        low[block], high[block] = np.quantile(estimates, tails, axis=-1)
    return (low, high) if values.ndim == 2 else (float(low[0]), float(high[0]))


def probability_of_improvement(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """P(X > Y) + P(X = Y) / 2 over all pairs of a number of `x` [n] and one of `y` [m]; 0.5: neither is better.

    It is Mann & Whitney's U over n m, as in `scipy.stats.mannwhitneyu`. NaN gives NaN.
    Source: Agarwal et al. 2021, section 4.3.
    """
    return float(_wins(x, y).mean())


def improvement_interval(
    x: npt.ArrayLike, y: npt.ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `probability_of_improvement(x, y)` over seeds -> (low, high).

    Stratified: the seeds of `x` and those of `y` are resampled each among themselves. Where every x is above every
    y there is nothing to resample: both ends are then 1.
    """
    wins = _wins(x, y)
    generator = np.random.default_rng(seed)
    # How often each seed is drawn, over their number: the mean over resampled pairs is a product with these weights.
    rows, columns = (generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in wins.shape)
    estimates = np.einsum("rn,nm,rm->r", rows, wins, columns, optimize=True)
    low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _wins(x: npt.ArrayLike, y: npt.ArrayLike) -> np.ndarray:
    """[n, m]: 1 where x is above y, 1/2 where they are equal, 0 below; NaN where either is."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or y.ndim != 1 or not x.size or not y.size:
        raise ValueError(f"x and y must be [n] and [m], n and m above 0, not {list(x.shape)} and {list(y.shape)}")
    difference = x[:, None] - y
    return np.where(np.isnan(difference), np.nan, np.heaviside(difference, 0.5))


def hold_last(values: npt.ArrayLike) -> np.ndarray:
    """Fill each NaN with the last number before it in its row; `values` [S, T]. NaN stays where none came before."""
    values = np.asarray(values, np.float64)
    source = np.where(np.isnan(values), 0, np.arange(values.shape[1]))
    return np.take_along_axis(values, np.maximum.accumulate(source, axis=1), axis=1)


def summary(returns: npt.ArrayLike) -> dict[str, Any]:
    """What `zhixing evaluate` reports, ready for JSON; `returns` [S, E]: E undiscounted episode returns a seed.

    `iqm` and `interval` ([low, high], 95 %) are over the seeds' mean returns, which are `per_seed`; `mean`, `std`
    (of the population, ddof = 0), `min` and `max` are over all S * E episodes, whose number is `episodes`.
    """
    returns = np.asarray(returns, np.float64)
    if returns.ndim != 2 or returns.size == 0:
        raise ValueError(f"returns must be [S, E], not {list(returns.shape)}")
    per_seed = returns.mean(axis=1)
    return {
        "iqm": iqm(per_seed),
        "interval": list(bootstrap_interval(per_seed)),
        "mean": float(returns.mean()),
        "std": float(returns.std()),
        "min": float(returns.min()),
        "max": float(returns.max()),
        "episodes": returns.size,
        "per_seed": per_seed.tolist(),
    }
