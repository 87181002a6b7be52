"""Means, paired differences and ratios with 95 % intervals, on plain arrays.

Seeds differ from one another by several times the gap between two methods, so methods are compared seed by seed and
ratios on the log scale. NaN means "not measured" and is left out; an infinity is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95
BOOTSTRAP_FROM = 10  # below this many ratios a bootstrap interval is too narrow, so the t interval of the logs is used


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval [low, high] over `n` cells; NaN where there are too few cells to tell."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison(Estimate):
    """Over `n` pairs (a, b): a - b with `neutral` 0, or a ratio with 1. `wins`: pairs in which a is better."""

    wins: int
    neutral: float = 0.0
    higher_is_better: bool = True

    @property
    def verdict(self) -> str | None:
        """'tie' when the interval holds the neutral value, else 'better' or 'worse'; None without an interval."""
        if np.isnan(self.low):
            return None
        if self.low <= self.neutral <= self.high:
            return "tie"
        return "better" if (self.value > self.neutral) == self.higher_is_better else "worse"


def mean(values: ArrayLike) -> Estimate:
    """Mean of `values` [n] with the t interval of Student."""
    x = _measured(values)
    if len(x) < 2:
        return Estimate(float(x[0]) if len(x) else np.nan, np.nan, np.nan, len(x))
    centre = float(x.mean())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Estimate(centre, centre - half, centre + half, len(x))


def paired_difference(a: ArrayLike, b: ArrayLike, *, higher_is_better: bool = True) -> Comparison:
    """Mean of a - b, where a [n] and b [n] share their seeds place by place; pairs with a missing side are left out."""
    a, b = _same_length(a, b)
    difference = _measured(a - b)
    e = mean(difference)
    wins = int((difference > 0).sum() if higher_is_better else (difference < 0).sum())
    return Comparison(e.value, e.low, e.high, e.n, wins, higher_is_better=higher_is_better)


def geometric_mean(ratios: ArrayLike) -> Estimate:
    """Geometric mean of positive `ratios` [n]; the interval is made on the logs (bootstrap, or t for few ratios)."""
    x = _measured(ratios)
    if (x <= 0).any():
        raise ValueError(f"ratios must be positive, got {x.min()}: divide two latencies or two sizes.")
    logs = np.log(x)
    estimate = mean(logs)
    low, high = estimate.low, estimate.high
    if len(logs) >= BOOTSTRAP_FROM and np.ptp(logs) > 1e-12:  # BCa has no answer when all ratios are equal
        interval = stats.bootstrap(
            (logs,), np.mean, confidence_level=CONFIDENCE, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Estimate(float(np.exp(estimate.value)), float(np.exp(low)), float(np.exp(high)), len(x))


def speed_ratio(baseline_ms: ArrayLike, method_ms: ArrayLike) -> Comparison:
    """How many times faster the method [n] is than the baseline [n], paired seed by seed; above 1 is faster."""
    baseline, method = _same_length(baseline_ms, method_ms)
    ratios = _measured(baseline / method)
    e = geometric_mean(ratios)
    return Comparison(e.value, e.low, e.high, e.n, int((ratios > 1).sum()), neutral=1.0)


def _measured(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64).ravel()
    if np.isinf(x).any():
        raise ValueError("values must be finite, got an infinity: a record holds None where a number has no meaning.")
    return x[~np.isnan(x)]


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"pairs need two arrays of one length, got shapes {a.shape} and {b.shape}: align by seed first."
        )
    return a, b
