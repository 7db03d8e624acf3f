"""Statistics against SciPy, closed forms and a simulation."""

import json
import time

import numpy as np
import pytest

from zhixing.statistics import (
    bootstrap_interval,
    hold_last,
    improvement_interval,
    iqm,
    probability_of_improvement,
    summary,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 10, 16, 33])
def test_iqm_is_scipys_trimmed_mean(size):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(size).normal(size=(size, 6))
    np.testing.assert_allclose(iqm(values), stats.trim_mean(values, 0.25, axis=0), rtol=1e-12)
    np.testing.assert_allclose(iqm(values.T, axis=-1), iqm(values))
    assert iqm(values[:, 0]) == pytest.approx(stats.trim_mean(values[:, 0], 0.25))


def test_iqm_known_values():
    assert iqm([0, 1, 2, 100]) == 1.5
    assert iqm([3.0]) == 3.0
    assert iqm([-1e9, 1, 2, 3, 4, 5, 6, 1e9]) == 3.5


def test_iqm_does_not_hide_a_diverged_seed():
    assert np.isnan(iqm([1, 2, 3, np.nan]))
    np.testing.assert_array_equal(iqm([[1, 1], [2, np.nan], [3, 3], [4, 4]]), [2.5, np.nan])
    with pytest.raises(ValueError, match="no values"):
        iqm([])


def test_interval_of_one_seed_is_its_value():
    assert bootstrap_interval([7.0]) == (7.0, 7.0)
    low, high = bootstrap_interval([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(low, [1, 2, 3])
    np.testing.assert_array_equal(high, [1, 2, 3])


def test_interval_at_each_time_is_the_interval_of_that_time():
    values = np.random.default_rng(0).normal(size=(8, 1100))  # more times than one block holds
    low, high = bootstrap_interval(values, resamples=500)
    for time_index in (0, 3, 1099):
        assert (low[time_index], high[time_index]) == bootstrap_interval(values[:, time_index], resamples=500)
    assert np.all(low < iqm(values)) and np.all(iqm(values) < high)


def test_interval_against_scipys_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(size=12)
    result = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert bootstrap_interval(values, np.mean, resamples=20_000) == pytest.approx(tuple(result), abs=0.02)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    # The percentile bootstrap is known to be narrow for few samples: at 20 normal ones it covers some 93 %.
    samples = np.random.default_rng(2).normal(loc=5.0, size=(20, 1000))
    low, high = bootstrap_interval(samples, np.mean, resamples=1000)
    coverage = np.mean((low < 5.0) & (high > 5.0))
    assert 0.89 < coverage < 0.97


def test_interval_is_repeatable_and_grows_with_confidence():
    values = np.random.default_rng(3).normal(size=10)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    narrow, wide = bootstrap_interval(values, confidence=0.5), bootstrap_interval(values, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_interval_is_fast_enough_for_every_row():
    values = np.random.default_rng(4).normal(size=16)
    bootstrap_interval(values)
    start = time.perf_counter()
    bootstrap_interval(values)
    assert time.perf_counter() - start < 0.1  # 3 ms on an idle core


def test_hold_last():
    nan = np.nan
    np.testing.assert_array_equal(
        hold_last([[nan, 1, nan, nan, 2], [3, nan, nan, 4, 5]]), [[nan, 1, 1, 1, 2], [3, 3, 3, 4, 5]]
    )


def test_summary():
    returns = np.array([[1.0, 3.0], [2.0, 4.0], [5.0, 5.0], [100.0, 0.0]])
    result = summary(returns)
    assert set(result) == {"iqm", "interval", "mean", "std", "min", "max", "episodes", "per_seed"}
    assert result["per_seed"] == [2.0, 3.0, 5.0, 50.0]
    assert result["iqm"] == 4.0
    assert result["interval"] == list(bootstrap_interval([2.0, 3.0, 5.0, 50.0]))
    assert (result["mean"], result["min"], result["max"], result["episodes"]) == (15.0, 0.0, 100.0, 8)
    assert result["std"] == pytest.approx(np.std(returns))
    assert json.loads(json.dumps(result)) == result
    with pytest.raises(ValueError, match=r"\[S, E\]"):
        summary([1.0, 2.0])


# ------------------------------------------------------------------------------------------- probability of improvement


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 5), (8, 8), (16, 3)])
def test_probability_of_improvement_is_mann_and_whitneys_u(n, m):
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(n)
    x, y = generator.integers(0, 6, n), generator.integers(0, 6, m)  # with ties
    expected = stats.mannwhitneyu(x, y).statistic / (n * m)
    assert probability_of_improvement(x, y) == pytest.approx(expected)
    assert probability_of_improvement(y, x) == pytest.approx(1 - expected)


def test_probability_of_improvement_known_values():
    assert probability_of_improvement([3, 4], [1, 2]) == 1.0
    assert probability_of_improvement([1, 1], [1, 1, 1]) == 0.5
    assert probability_of_improvement([1, 3], [2, 3]) == 0.375  # 0, 0, 1, 1/2
    assert probability_of_improvement([np.inf], [1]) == 1.0
    assert np.isnan(probability_of_improvement([1, np.nan], [1]))
    with pytest.raises(ValueError, match=r"x and y must be \[n\] and \[m\]"):
        probability_of_improvement([], [1])


def test_improvement_interval_is_that_of_resampled_seeds():
    """Against the bootstrap written out: each side's seeds drawn among themselves."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(0.7, 1, 9).round(1), generator.normal(0, 1, 7).round(1)
    estimates = [
        probability_of_improvement(generator.choice(x, len(x)), generator.choice(y, len(y))) for _ in range(20_000)
    ]
    low, high = improvement_interval(x, y, resamples=20_000)
    assert (low, high) == pytest.approx(tuple(np.quantile(estimates, [0.025, 0.975])), abs=0.015)
    assert low < probability_of_improvement(x, y) < high
    assert improvement_interval(x, y) == improvement_interval(x, y)
    assert improvement_interval(y, x)[0] == pytest.approx(1 - high, abs=0.02)


def test_improvement_interval_without_anything_to_resample():
    assert improvement_interval([3.0, 4.0], [1.0, 2.0]) == pytest.approx((1.0, 1.0))
    assert improvement_interval([1.0], [2.0]) == (0.0, 0.0)
