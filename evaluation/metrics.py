"""Formulas of scores: plain functions from arrays to numbers, which read no files and draw no random numbers.

A new metric is a function here and a column of the table in ``tables.py`` that shows it.

Letters in shapes: ``E`` members, ``N`` rows, ``D`` dimensions; ``...`` stands for any axes. Units are the caller's:
errors, standard deviations and CRPS are in the unit of what is passed, variances in its square, and negative
log-likelihoods are in nats, of densities per that unit. "Standardised errors" are ``(truth - mean) / std`` of a
Gaussian prediction. Scores of single values come back value by value; the caller averages them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import erf, logsumexp, ndtr, ndtri

# --- Errors ---


def rmse(error: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Root mean square of errors over ``axis`` (default: over everything), in their unit."""
    return np.sqrt(np.mean(np.square(error), axis=axis))


def r2(error: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Coefficient of determination per dimension: ``1 - sum(error^2) / sum((truth - mean(truth))^2)``.

    Args:
        error: ``(..., N, D)``.
        truth: ``(N, D)``; a dimension that is constant here gives nan.

    Returns:
        ``(..., D)``: 1 is perfect, 0 no better than the mean of the truth, negative worse.
    """
    total = np.square(truth - truth.mean(axis=-2)).sum(axis=-2)
    return 1 - np.square(error).sum(axis=-2) / np.where(total > 0, total, np.nan)


def subset_mse(error: np.ndarray) -> np.ndarray:
    """Expected squared error of the mean of ``n`` members, over all subsets of that size, for ``n`` from 1 to E.

    The mean of ``n`` members drawn without replacement varies around that of all E by ``S^2 / n * (1 - n / E)``, where
    ``S^2`` is the members' variance with ddof 1 (Cochran 1977, Sampling Techniques, theorem 2.2): no subset has to be
    enumerated, and the answer does not depend on the order of the members.

    Args:
        error: ``(E, ...)``, one error per member.

    Returns:
        ``(E, ...)``: first entry the mean over single members, last entry the whole ensemble.
    """
    members = len(error)
    spread = error.var(axis=0, ddof=1) if members > 1 else np.zeros(error.shape[1:])
    sizes = np.arange(1, members + 1).reshape(-1, *(1,) * (error.ndim - 1))
    return np.square(error.mean(axis=0)) + spread / sizes * (1 - sizes / members)


def observed_quantiles(values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Quantiles over the last axis, nan left out: observed values, since interpolation fails where some are infinite.

    Each is the smallest value with at least that share of the values at or below it.

    Args:
        values: ``(..., N)``.
        shares: From 0 to 1, ``(Q,)``.

    Returns:
        ``(Q, ...)``; nan where all values are.
    """
    ordered = np.sort(values, axis=-1)  # nan last
    count = np.count_nonzero(~np.isnan(values), axis=-1)
    at = np.maximum(np.ceil(np.multiply.outer(np.asarray(shares), count) - 1e-9).astype(int) - 1, 0)  # (Q, ...)
    return np.take_along_axis(np.broadcast_to(ordered, (len(at), *ordered.shape)), at[..., None], axis=-1)[..., 0]


# --- Predictive distributions ---


def moment_match(means: np.ndarray, variances: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the equal-weight mixture of distributions stacked on the first axis.

    The law of total variance: the mean of the variances plus the variance of the means (ddof 0), as in Lakshminarayanan
    et al. 2017, section 2.4.

    Args:
        means: ``(E, ...)``.
        variances: ``(E, ...)``, or 0 for points.

    Returns:
        Both ``(...)``.
    """
    return means.mean(axis=0), means.var(axis=0) + np.mean(np.broadcast_to(variances, means.shape), axis=0)


def gaussian_nll(truth: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of a Gaussian, in nats, constant included; all arguments ``(...)``, one value each."""
    return 0.5 * (np.square(truth - mean) / variance + np.log(2 * np.pi * variance))


def mixture_nll(member_nll: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of the equal-weight mixture of members, in nats, from theirs.

    Args:
        member_nll: Negative log-likelihood of each value under each member, ``(E, ...)``, whatever their densities.

    Returns:
        ``(...)``: each value has a mixture of its own, the marginal one of its dimension.
    """
    return np.log(len(member_nll)) - logsumexp(-member_nll, axis=0)


def gaussian_crps(truth: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of a Gaussian, in the truth's unit; lower is better, |error| for a point.

    Gneiting et al. 2005, equation 5.
    """
    std = np.sqrt(variance)
    z = (truth - mean) / std
    return std * (z * (2 * ndtr(z) - 1) + 2 * _normal_density(z) - 1 / np.sqrt(np.pi))


def mixture_crps(truth: np.ndarray, means: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """CRPS of the equal-weight mixture of Gaussians, value by value, in closed form over pairs of members.

    ``mean_i A(y - m_i, v_i) - mean_ij A(m_i - m_j, v_i + v_j) / 2`` with ``A(m, v) = E|X|`` for ``X ~ N(m, v)`` (Grimit
    et al. 2006, equation 5).

    Args:
        truth: ``(...)``.
        means: ``(E, ...)``.
        variances: ``(E, ...)``.

    Returns:
        ``(...)``, in the truth's unit.
    """
    members = len(means)
    score = _expected_magnitude(truth - means, variances).mean(axis=0)
    score -= _expected_magnitude(np.zeros_like(means), 2 * variances).sum(axis=0) / (2 * members**2)
    for i, j in itertools.combinations(range(members), 2):
        score -= _expected_magnitude(means[i] - means[j], variances[i] + variances[j]) / members**2
    return score


def quantile_crps(truth: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """CRPS of one distribution given by its quantiles, for many truths.

    The integral of quantile losses over levels (Gneiting and Raftery 2007, section 4.2), on ``M`` levels evenly spaced:
    the score of the distribution that gives each of these quantiles the probability ``1 / M``.

    Args:
        truth: ``(N,)``.
        quantiles: Quantiles at the levels ``0.5 / M, 1.5 / M, ...``, ascending, ``(M,)``.

    Returns:
        ``(N,)``, in the truth's unit.
    """
    count = len(quantiles)
    below = np.searchsorted(quantiles, truth)
    sums = np.concatenate(([0.0], np.cumsum(quantiles)))
    distance = (truth * (2 * below - count) + sums[-1] - 2 * sums[below]) / count
    spread = np.sum(quantiles * (2 * np.arange(count) - count + 1)) / count**2  # half the mean over pairs
    return distance - spread


def energy_score(particles: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Energy score of equally likely particles: CRPS for vectors; lower is better, the error for a point.

    ``mean_i |x_i - y| - sum_ij |x_i - x_j| / (2 P (P - 1))`` (Gneiting and Raftery 2007, equation 22): the fair
    estimator, whose expectation is the score of the distribution that the particles are drawn from, however few they
    are (Ferro 2014). The norm is the root mean square over dimensions, so that scores compare with ``rmse``.

    Args:
        particles: ``(P, S, L)``.
        truth: ``(S, L)``.

    Returns:
        ``(S,)``, in the truth's unit; infinite where a particle is not a number.
    """
    count, _, dims = particles.shape
    centred = torch.from_numpy(particles - truth).transpose(0, 1).contiguous()  # (S, P, L)
    score = centred.norm(dim=-1).mean(dim=-1)
    if count > 1:
        exact = "donot_use_mm_for_euclid_dist"  # matrix products lose small distances beside large ones
        pairs = torch.cdist(centred, centred, compute_mode=exact).sum(dim=(1, 2))
        score -= pairs / (2 * count * (count - 1))
    score = score.numpy() / np.sqrt(dims)
    return np.where(np.isfinite(score), score, np.inf)


def _expected_magnitude(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """``E|X|`` for ``X ~ N(mean, variance)``: the mean of the folded normal distribution."""
    std = np.sqrt(variance)
    z = mean / std
    return mean * erf(z / np.sqrt(2)) + 2 * std * _normal_density(z)


def _normal_density(z: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * np.square(z)) / np.sqrt(2 * np.pi)


# --- Calibration of Gaussian predictions ---


def probability_integral_transform(z: np.ndarray) -> np.ndarray:
    """Probability that the prediction gave to values below the truth, from standardised errors; any shape.

    Uniform on [0, 1] for a calibrated prediction (Dawid 1984); a U shape in its histogram means too narrow.
    """
    return ndtr(z)


def interval_coverage(z: np.ndarray, level: float, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Share of truths inside the central interval of probability ``level``; a standardised error of nan is outside."""
    return np.mean(is_covered(z, level), axis=axis)


def is_covered(z: np.ndarray, level: float) -> np.ndarray:
    """Whether each truth lies in the central interval of probability ``level``: bool, the shape of ``z``."""
    return np.abs(z) <= ndtri(0.5 + level / 2)


def expected_calibration_error(z: np.ndarray, levels: int = 100) -> float:
    """Mean absolute difference between promised and observed coverage of central intervals, from 0 to 0.5.

    Kuleshov et al. 2018, but with absolute differences and evenly spaced levels from 0 to 1.

    Args:
        z: Standardised errors, any shape.
        levels: Number of levels compared.
    """
    promised, observed = coverage_curve(z, levels)
    return float(np.mean(np.abs(observed - promised)))


def coverage_curve(z: np.ndarray, levels: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Promised and observed coverage of central intervals, both ``(levels,)``, from standardised errors."""
    smallest = np.sort(np.abs(2 * probability_integral_transform(z) - 1), axis=None)  # narrowest interval that covers
    promised = np.linspace(0, 1, levels)
    return promised, np.searchsorted(smallest, promised, side="right") / smallest.size


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Mean of values and its standard error, when values of one cluster (a trajectory) resemble each other.

    The sandwich estimator for a mean, with the factor ``G / (G - 1)`` for ``G`` clusters (Cameron and Miller 2015);
    nan below two clusters.

    Args:
        values: ``(N,)``.
        clusters: Label of each value's cluster, ``(N,)``.
    """
    mean = float(np.mean(values))
    labels, cluster_of_row = np.unique(clusters, return_inverse=True)
    if len(labels) < 2:
        return mean, float("nan")
    sums = np.bincount(cluster_of_row, weights=values - mean)
    return mean, float(np.sqrt(len(labels) / (len(labels) - 1) * np.square(sums).sum()) / len(values))


def calibrated_horizon(coverage: ArrayLike, standard_error: ArrayLike, level: float = 0.9) -> int:
    """Number of first steps at which coverage stays at or above ``level`` minus two standard errors.

    Args:
        coverage: Observed coverage of the band at steps 1, 2, ..., ``(steps,)``.
        standard_error: Of the coverage, ``(steps,)``; nan, where it cannot be estimated, ends the count.
        level: What the band promises.
    """
    keeps = np.asarray(coverage) >= level - 2 * np.asarray(standard_error)  # False where nan
    return len(keeps) if keeps.all() else int(np.argmin(keeps))


# --- Usefulness of uncertainty ---


def spearman(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Rank correlation over rows, both ``(N,)``; nan if either is constant."""
    return pearson(ranks(uncertainty), ranks(error))


def pearson(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Linear correlation over rows, both ``(N,)``; nan if either is constant."""
    if np.ptp(uncertainty) == 0 or np.ptp(error) == 0:
        return float("nan")
    return float(np.corrcoef(uncertainty, error)[0, 1])


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a score drawn from ``positive`` exceeds one drawn from ``negative``, ties counting half.

    The area under the ROC curve: 1 separates perfectly, 0.5 not at all. nan if either is empty. It is the Mann-Whitney
    statistic, from the sum of the ranks of the positive ones.
    """
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    total = ranks(np.concatenate([positive, negative]))[: len(positive)].sum()
    return float((total / len(positive) - (len(positive) + 1) / 2) / len(negative))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 to N of values ``(N,)``; equal ones share the mean of theirs.

    NumPy alone: the libraries that have this function, and the two above, take seconds to import.
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def auroc_of_worst(uncertainty: np.ndarray, error: np.ndarray, share: float = 0.1) -> float:
    """AUROC of finding the rows with the largest errors (the worst ``share``) by their uncertainty, both ``(N,)``."""
    is_worst = error > np.quantile(error, 1 - share)
    return auroc(uncertainty[is_worst], uncertainty[~is_worst])


def risk_coverage(uncertainty: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Mean error of the ``n`` most certain rows for ``n`` from 1 to N: the risk-coverage curve (Geifman et al. 2019).

    Args:
        uncertainty: What rows are ordered by, ``(N,)``.
        error: ``(N,)``.

    Returns:
        ``(N,)``; the last value is the mean over all rows. Its mean is the area under the curve.
    """
    ordered = error[np.argsort(uncertainty, kind="stable")]
    return np.cumsum(ordered) / np.arange(1, len(ordered) + 1)


def risk_reduction(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Area under the risk-coverage curve on a scale from 0 (uninformative order) to 1 (ordered by the error itself).

    Negative where trusting the certain rows does harm; nan if all errors are equal.
    """
    best, chance = risk_coverage(error, error).mean(), error.mean()
    if best == chance:
        return float("nan")
    return float((chance - risk_coverage(uncertainty, error).mean()) / (chance - best))
