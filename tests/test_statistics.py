"""The benchmark's statistics on synthetic clocks, whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from intaglio.bench.statistics import SHORT, as_json, compared, percentile_needs, summary

N = 30
SIMULATIONS = 2000
COVERAGE = (0.93, 0.97)  # of 95 % intervals
FALSE_ALARMS = 0.05
POWER = 0.95
# A clock: a quickest time, and what the machine adds to it.
CLOCKS = {
    "normal, 2 %": (lambda rng, n: 1 + 0.02 * rng.standard_normal(n), 1.0),
    "lognormal": (lambda rng, n: 1 + 0.05 * rng.lognormal(0, 1, n), 1.05),
    "exponential": (lambda rng, n: 1 + rng.exponential(0.1, n), 1 + 0.1 * np.log(2)),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_intervals_cover_the_true_median_as_often_as_they_say(clock):
    draw, truth = CLOCKS[clock]
    rng = np.random.default_rng(1)
    found = [summary(draw(rng, N), seed=i) for i in range(SIMULATIONS)]
    covered = np.mean([row.low <= truth <= row.high for row in found])
    assert COVERAGE[0] <= covered <= COVERAGE[1], covered


def test_the_same_thing_twice_is_seldom_called_different():
    rng = np.random.default_rng(2)
    draw, _ = CLOCKS["lognormal"]
    flagged = np.mean([compared(draw(rng, N), draw(rng, N), seed=i).differs for i in range(500)])
    assert flagged <= FALSE_ALARMS, flagged


def test_five_percent_at_two_percent_noise_are_found():
    rng = np.random.default_rng(3)
    draw, _ = CLOCKS["normal, 2 %"]
    pairs = [compared(draw(rng, N), 1.05 * draw(rng, N), seed=i) for i in range(500)]
    assert np.mean([pair.differs and pair.ratio > 1 for pair in pairs]) >= POWER
    assert np.mean([pair.regressed(0.02) for pair in pairs]) >= POWER
    assert not any(pair.regressed(0.1) for pair in pairs)
    quicker = [compared(draw(rng, N), 0.95 * draw(rng, N), seed=i) for i in range(100)]
    assert not any(pair.regressed(0) for pair in quicker)


def test_the_figures_are_those_of_numpy_and_scipy():
    values = np.random.default_rng(4).gamma(2, 1, 301)
    found = summary(values)
    assert (found.n, found.least, found.most) == (301, values.min(), values.max())
    assert found.median == np.median(values)
    assert found.mad == pytest.approx(stats.median_abs_deviation(values))
    assert found.iqr == pytest.approx(stats.iqr(values))
    assert found.percentiles == {f"p{p}": pytest.approx(np.percentile(values, p)) for p in (90, 95, 99)}
    assert found.low < found.median < found.high
    other = summary(values, seed=1)
    assert summary(values) == found, "a report is made again byte for byte"
    assert (other.low, other.high) != (found.low, found.high)
    assert as_json(found)["median"] == float(f"{found.median:.6g}")


@pytest.mark.parametrize(("percent", "least"), [(90, 29), (95, 59), (99, 299)])
def test_percentiles_appear_from_where_they_can_be_known(percent, least):
    assert percentile_needs(percent) == least
    values = np.random.default_rng(5).random(least)
    assert f"p{percent}" in summary(values).percentiles
    assert f"p{percent}" not in summary(values[1:]).percentiles


def test_a_wild_clock_is_not_called_steady():
    rng = np.random.default_rng(6)
    assert summary(1 + 0.02 * rng.standard_normal(N)).steady
    assert not summary(rng.lognormal(0, 1, N)).steady


def test_too_little_is_said_to_be_too_little():
    assert (summary([3.0]).low, summary([3.0, 1.0]).low) == (3.0, 1.0)
    for wrong in ([], [1.0, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="finite numbers"):
            summary(wrong)
    with pytest.raises(ValueError, match=f"at least {SHORT}"):
        compared([1.0] * 4, [1.0] * 30)
