"""Statistics of paired comparisons: plain, seeded functions from arrays to numbers.

Letters in shapes: ``S`` seeds, ``T`` test trajectories, ``B`` bootstrap replicates, ``N`` values.

A model's error varies with the seed that trained it and with the trajectories that test it, and every seed meets every
trajectory: the two are crossed random factors, as readers and cases are in radiology. ``crossed_interval`` resamples
both at once (Owen 2007, "The pigeonhole bootstrap"). With five seeds, the percentiles of such a bootstrap cover far
less than they promise; it therefore differs from the textbook in two points:

- each replicate draws ``n - 1`` of ``n`` items, which makes the variance of a mean unbiased (Rao and Wu 1988);
- limits are t quantiles, with Satterthwaite's degrees of freedom over the two factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

REPLICATES = 2000
FEWEST_PAIRS = 6  # of runs, from which an interval is given at all


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty, which is nan where there is too little to estimate it from.

    Attributes:
        mean: The estimate.
        standard_error: Its standard deviation.
        degrees: Degrees of freedom of the standard error.
        level: Probability that the interval promises.
    """

    mean: float
    standard_error: float
    degrees: float
    level: float = 0.95

    @property
    def low(self) -> float:
        """Lower limit of the interval."""
        return self.mean - self._half_width

    @property
    def high(self) -> float:
        """Upper limit of the interval."""
        return self.mean + self._half_width

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference: below ``1 - level`` exactly where the interval excludes 0."""
        if self.standard_error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.standard_error, self.degrees))

    @property
    def _half_width(self) -> float:
        return float(stats.t.ppf((1 + self.level) / 2, self.degrees)) * self.standard_error


# --- Seeds crossed with trajectories ---


def resample_counts(items: int, replicates: int, seed: int | Sequence[int]) -> np.ndarray:
    """Draws ``items - 1`` of so many items with replacement, in each replicate.

    Returns:
        How often each item was drawn, ``(B, items)``; nan for a single item.
    """
    if items < 2:
        return np.full((replicates, items), np.nan)
    return np.random.default_rng(seed).multinomial(items - 1, np.full(items, 1 / items), size=replicates).astype(float)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means under many weightings.

    Args:
        values: ``(N,)``.
        weights: ``(B, N)``, not negative.

    Returns:
        ``(B,)``.
    """
    return weights @ values / weights.sum(axis=1)


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Smallest value with at least half of the weight at or below it, under many weightings; arguments as above.

    With equal weights it is NumPy's median of method ``inverted_cdf``; values may be infinite.
    """
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[:, order], axis=1)
    return values[order][np.argmax(below >= below[:, -1:] / 2, axis=1)]


def crossed_interval(
    by_seed: np.ndarray, replicates: np.ndarray, trajectories: int, *, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Estimates a mean over seeds, with seeds and trajectories as crossed random factors.

    Args:
        by_seed: A statistic of all trajectories, one value per seed, ``(S,)``; for two arms, their paired difference.
        replicates: The same under resampled trajectories, ``(B, S)``; in a replicate all seeds share the trajectories.
        trajectories: How many were resampled.
        seed: Of the resampling of seeds.
        level: Of the interval.

    Returns:
        The estimate; its uncertainty is nan for fewer than two seeds or trajectories.
    """
    seeds = len(by_seed)
    if seeds < 2 or trajectories < 2:
        return Estimate(float(np.mean(by_seed)) if seeds else math.nan, math.nan, math.nan, level)
    counts = resample_counts(seeds, len(replicates), [seed, 1])  # not the stream that drew trajectories
    variance = np.var((replicates * counts).sum(axis=1) / (seeds - 1), ddof=1)
    of_seeds = np.var(by_seed, ddof=1) / seeds
    of_trajectories = np.var(replicates.mean(axis=1), ddof=1)
    degrees = satterthwaite([of_seeds, of_trajectories], [seeds - 1, trajectories - 1])
    return Estimate(float(np.mean(by_seed)), float(np.sqrt(variance)), degrees, level)


def seed_interval(by_seed: np.ndarray, level: float = 0.95) -> Estimate:
    """Estimates a mean over seeds on these very test trajectories: Student's interval.

    Args:
        by_seed: A statistic that trajectories cannot be resampled for, ``(S,)``.
        level: Of the interval.
    """
    seeds = len(by_seed)
    if seeds < 2:
        return Estimate(float(np.mean(by_seed)) if seeds else math.nan, math.nan, math.nan, level)
    return Estimate(float(np.mean(by_seed)), float(stats.sem(by_seed)), seeds - 1, level)


def satterthwaite(variances: Sequence[float], degrees: Sequence[float]) -> float:
    """Degrees of freedom of a sum of independent variance estimates (Satterthwaite 1946)."""
    variances, degrees = np.asarray(variances), np.asarray(degrees)
    if not variances.any():
        return float(degrees.sum())
    return float(1 / (np.square(variances / variances.sum()) / degrees).sum())


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates that all count alike: datasets as fixed effects."""
    variances = [np.square(estimate.standard_error / len(estimates)) for estimate in estimates]
    degrees = satterthwaite(variances, [estimate.degrees for estimate in estimates])
    mean = float(np.mean([estimate.mean for estimate in estimates]))
    return Estimate(mean, float(np.sqrt(np.sum(variances))), degrees, estimates[0].level)


# --- Many tests at once ---


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusts the p-values of one family (Holm 1979), for each to be compared with the level itself; nan stays nan."""
    p_values = np.asarray(p_values, dtype=float)
    adjusted, tested = np.full_like(p_values, np.nan), np.flatnonzero(np.isfinite(p_values))
    order = tested[np.argsort(p_values[tested])]
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted
