"""What a handful of timings says, and what it does not: spread, intervals, percentiles where they exist, comparisons.

Timings are not normal: a machine adds time and never takes it away. So the centre is the median, the spread the median
absolute deviation, intervals are bootstrapped, and two sides are compared by ranks (Mann and Whitney 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
PERCENTILES = (90, 95, 99)
UNSTEADY = 0.1  # half width of the median's interval over the median, above which a figure is not to be quoted
SHORT = 5  # timings; with fewer the interval is the range


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Timings of one case, in their own unit.

    Attributes:
        n: number of timings.
        median, mad, iqr: centre, median absolute deviation and interquartile range.
        least, most: the extremes.
        low, high: the median's interval of CONFIDENCE.
        percentiles: those of PERCENTILES that `n` allows, see `percentile_needs`.
        steady: whether the interval is narrow enough to quote the median.
    """

    n: int
    median: float
    mad: float
    iqr: float
    least: float
    most: float
    low: float
    high: float
    percentiles: dict[str, float]
    steady: bool


def summary(values: Sequence[float], *, seed: int = 0) -> Summary:
    """Summarize timings; the seed is of the resampling, so that a report is made again byte for byte.

    Raises:
        ValueError: there is none, or one is not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        message = f"{array.size} timings of {array.ndim} axes: one or more finite numbers are needed"
        raise ValueError(message)
    middle = float(np.median(array))
    low, high = median_interval(array, seed=seed)
    quarter, three = np.percentile(array, [25, 75])
    return Summary(
        n=int(array.size),
        median=middle,
        mad=float(np.median(np.abs(array - middle))),
        iqr=float(three - quarter),
        least=float(array.min()),
        most=float(array.max()),
        low=low,
        high=high,
        percentiles={f"p{p}": float(np.percentile(array, p)) for p in PERCENTILES if array.size >= percentile_needs(p)},
        steady=(high - low) / 2 <= UNSTEADY * middle,
    )


def percentile_needs(percent: float) -> int:
    """Timings from which a percentile is worth a number: the largest of n is above it with CONFIDENCE.

    Wilks' criterion (1941), ``1 - p^n >= 0.95``: 29 for p90, 59 for p95, 299 for p99.
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(percent / 100))


def median_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The median's interval of CONFIDENCE: percentiles of the medians of resampled timings (Efron 1979)."""
    if values.size < SHORT:
        return float(values.min()), float(values.max())
    medians = np.median(resampled(values, np.random.default_rng(seed)), axis=1)
    low, high = np.percentile(medians, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """RESAMPLES draws of as many values, with replacement [RESAMPLES, n]."""
    drawn: np.ndarray = values[rng.integers(values.size, size=(RESAMPLES, values.size))]
    return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`new` against `old`: above 1 is slower.

    Attributes:
        ratio: of the medians.
        low, high: its interval of CONFIDENCE.
        p: two-sided, of the Mann-Whitney test.
        differs: whether both the test and the interval say so.
    """

    ratio: float
    low: float
    high: float
    p: float
    differs: bool

    def regressed(self, most: float) -> bool:
        """Whether `new` is slower by more than the share `most`, and that is no accident."""
        return self.differs and self.ratio > 1 + most


def compared(old: Sequence[float], new: Sequence[float], *, seed: int = 0) -> Comparison:
    """Compare two sets of timings that were taken under the same conditions.

    Raises:
        ValueError: fewer than SHORT on a side, with which no test can tell anything.
    """
    from scipy.stats import mannwhitneyu

    before, after = np.asarray(old, np.float64), np.asarray(new, np.float64)
    if min(before.size, after.size) < SHORT:
        message = f"{before.size} and {after.size} timings; each side needs at least {SHORT}"
        raise ValueError(message)
    rng = np.random.default_rng(seed)
    ratios = np.median(resampled(after, rng), axis=1) / np.median(resampled(before, rng), axis=1)
    low, high = (float(v) for v in np.percentile(ratios, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]))
    p = float(mannwhitneyu(after, before).pvalue)
    return Comparison(
        ratio=float(np.median(after) / np.median(before)),
        low=low,
        high=high,
        p=p,
        differs=p < 1 - CONFIDENCE and not low <= 1 <= high,
    )


def as_json(found: Summary | Comparison, digits: int = 6) -> dict[str, Any]:
    """Plain data with `digits` significant digits."""
    import dataclasses

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.{digits}g}")
        return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {name: rounded(value) for name, value in dataclasses.asdict(found).items()}
