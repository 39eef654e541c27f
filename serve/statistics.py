"""Intervals for the ratio and the difference of two arms, resampling whole rounds.

Requests that run close together share the machine's mood, so they are not independent and must not be
resampled one by one. The unit is the *round*: four periods A B B A (or B A A B, drawn at random), in which
linear drift cancels. A statistic (a mean, a percentile, a rate) is computed over the pooled values of all
rounds; its standard error comes from a bootstrap over rounds, both arms taking the same rounds; the interval
is

    log ratio +- t(n - 1, 0.975) * bootstrap standard error * sqrt(n / (n - 1)),     n = number of rounds

and likewise for the difference, without the logarithm. The plain percentile bootstrap is too narrow with few
rounds (about 85% coverage at six rounds for a nominal 95%): its spread lacks the factor sqrt(n / (n - 1)) and
knows no t distribution. `benchmarks/measure.py coverage` shows both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
NUM_RESAMPLES = 1000
MIN_ROUNDS = 2
MAX_LOG_WIDTH = math.log(1000)
"""An interval a thousand times wide either way says nothing and is left out."""
MIN_TAIL = 5
"""A percentile gets an interval only when at least so many values lie beyond it."""


@dataclass(frozen=True)
class Estimate:
    """A statistic of both arms and how well their ratio and difference are known."""

    baseline: float
    candidate: float
    ratio: float
    """candidate / baseline."""
    interval: tuple[float, float] | None
    """Of the ratio."""
    difference: float
    """candidate - baseline."""
    difference_interval: tuple[float, float] | None
    smallest_effect: float | None
    """Smallest relative change that this run would have found with 80% probability: 0.05 is a ratio of 1.05.
    Smallest relative change that this run would have found with 80% probability: 0.05 is a ratio of 1.05."""


class Values:
    """Latencies of one arm, one array a round; pooled for a mean or a percentile."""

    def __init__(self, rounds: Sequence[np.ndarray]) -> None:
        self.num_rounds = len(rounds)
        self.counts = np.array([len(values) for values in rounds], dtype=int)
        self.sums = np.array([float(values.sum()) for values in rounds])
        pooled = np.concatenate(rounds) if rounds else np.empty(0)
        order = np.argsort(pooled, kind="stable")
        self.sorted = pooled[order]
        self._round_of_sorted = np.repeat(np.arange(self.num_rounds), self.counts)[order]

    def __len__(self) -> int:
        return len(self.sorted)

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Mean of each resample; `weights` [B, n] says how often each round was drawn."""
        return np.asarray((weights @ self.sums) / np.maximum(weights @ self.counts, 1))

    def quantile(self, weights: np.ndarray, q: float) -> np.ndarray:
        """Quantile of each resample, linearly interpolated as `numpy.percentile` does on the repeated values.
        Quantile of each resample, linearly interpolated as `numpy.percentile` does on the repeated values."""
        found = np.empty(len(weights))
        for row, drawn in enumerate(weights):
            ranks = np.cumsum(drawn[self._round_of_sorted])
            position = max(ranks[-1] - 1, 0) * q
            low = self.sorted[np.searchsorted(ranks, math.floor(position), side="right")]
            high = self.sorted[np.searchsorted(ranks, math.ceil(position), side="right")]
            found[row] = low + (high - low) * (position - math.floor(position))
        return found


def resample_weights(num_rounds: int, seed: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """Return how often each round is drawn in each resample, [B, n]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_rounds, np.full(num_rounds, 1 / num_rounds), size=num_resamples)


def t_quantile(probability: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def spread(resampled: np.ndarray) -> float:
    """Half the width of the middle 68%: a normal's standard deviation, deaf to a high percentile's long tails."""
    low, high = np.quantile(resampled, [0.158655, 0.841345])
    return float(high - low) / 2


def estimate(point: tuple[float, float], resampled: tuple[np.ndarray, np.ndarray] | None, num_rounds: int) -> Estimate:
    """Make an interval from a statistic of (baseline, candidate) and the same statistic of every resample."""
    baseline, candidate = point
    ratio, difference = candidate / baseline, candidate - baseline
    unknown = Estimate(baseline, candidate, ratio, None, difference, None, None)
    if resampled is None or num_rounds < MIN_ROUNDS or min(resampled[0].min(), resampled[1].min()) <= 0:
        # A resample of value 0 (all gaps of its rounds 0: chunks that came together) has no log ratio.
        return unknown
    a, b = resampled
    inflate = math.sqrt(num_rounds / (num_rounds - 1))
    log_error = spread(np.log(b / a)) * inflate
    error = spread(b - a) * inflate
    t = t_quantile(0.5 + CONFIDENCE / 2, num_rounds - 1)
    if t * log_error > MAX_LOG_WIDTH:
        return unknown
    return Estimate(
        baseline=baseline,
        candidate=candidate,
        ratio=ratio,
        interval=(ratio * math.exp(-t * log_error), ratio * math.exp(t * log_error)),
        difference=difference,
        difference_interval=(difference - t * error, difference + t * error),
        smallest_effect=smallest_effect(log_error, num_rounds),
    )


def compare_means(a: Values, b: Values, weights: np.ndarray) -> Estimate | None:
    """Estimate the ratio of mean latencies; None where an arm has no value in some round."""
    if not (a.counts.all() and b.counts.all() and a.num_rounds):
        return None
    point = (float(a.sums.sum() / len(a)), float(b.sums.sum() / len(b)))
    if min(point) <= 0:
        return None
    return estimate(point, (a.mean(weights), b.mean(weights)), a.num_rounds)


def compare_quantiles(a: Values, b: Values, q: float, weights: np.ndarray) -> Estimate | None:
    """Estimate the ratio of a percentile; no interval with fewer than `MIN_TAIL` values beyond it."""
    if not (a.counts.all() and b.counts.all() and a.num_rounds):
        return None
    point = (float(np.quantile(a.sorted, q)), float(np.quantile(b.sorted, q)))
    if min(point) <= 0:
        return None
    enough = min(len(a), len(b)) * (1 - q) >= MIN_TAIL
    resampled = (a.quantile(weights, q), b.quantile(weights, q)) if enough else None
    return estimate(point, resampled, a.num_rounds)


def compare_rates(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], weights: np.ndarray
) -> Estimate | None:
    """Estimate the ratio of rates; each arm is (amounts, seconds), one of each a round."""
    if not len(a[0]) or min(a[0].sum(), b[0].sum()) <= 0:
        return None
    point = (float(a[0].sum() / a[1].sum()), float(b[0].sum() / b[1].sum()))
    rates = [(weights @ amounts) / (weights @ seconds) for amounts, seconds in (a, b)]
    return estimate(point, (rates[0], rates[1]), len(a[0]))


def power(effect: float, log_error_per_round: float, num_rounds: int, pilot_rounds: int | None = None) -> float:
    """Probability that a true ratio of 1 + effect is told from 1 by the 95% interval of `num_rounds` rounds.

    Noncentral t distribution; `log_error_per_round` is the standard deviation of one round's log ratio. If that was
    estimated from `pilot_rounds` rounds, it is itself uncertain, (m - 1) s^2 / sigma^2 following chi-square with m - 1
    degrees of freedom: the power is then averaged over sigma, or the promise would be too high.
    """
    from scipy.special import chdtri, nctdtr

    if log_error_per_round <= 0:
        return 1.0
    spreads = np.array([log_error_per_round])
    if pilot_rounds is not None:
        middles = (np.arange(100) + 0.5) / 100
        spreads = log_error_per_round * np.sqrt((pilot_rounds - 1) / chdtri(pilot_rounds - 1, middles))
    shifts = abs(math.log1p(effect)) * math.sqrt(num_rounds) / spreads
    t = t_quantile(0.5 + CONFIDENCE / 2, num_rounds - 1)
    # Far out, scipy's series returns NaN: for the wrong tail, which is then zero, and for a certain discovery.
    below_upper = np.nan_to_num(nctdtr(num_rounds - 1, shifts, t), nan=0.0)
    below_lower = np.nan_to_num(nctdtr(num_rounds - 1, shifts, -t), nan=0.0)
    return float(np.clip(1 - below_upper + below_lower, 0, 1).mean())


def rounds_needed(
    effect: float,
    log_error_per_round: float,
    pilot_rounds: int | None = None,
    wanted: float = POWER,
    limit: int = 10_000,
) -> int:
    """Smallest number of rounds (at least 3) whose power reaches `wanted`, or `limit`."""
    low, high = 3, 3
    while high < limit and power(effect, log_error_per_round, high, pilot_rounds) < wanted:
        low, high = high, min(high * 2, limit)
    while low < high:
        middle = (low + high) // 2
        if power(effect, log_error_per_round, middle, pilot_rounds) >= wanted:
            high = middle
        else:
            low = middle + 1
    return high


def smallest_effect(log_error: float, num_rounds: int) -> float:
    """Relative change found with 80% probability, from the standard error of the whole run's log ratio."""
    per_round = log_error * math.sqrt(num_rounds)
    low, high = 0.0, 1e-6
    while power(high, per_round, num_rounds) < POWER and high < 1e3:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, per_round, num_rounds) >= POWER else (middle, high)
    return high
