"""Turns predictions into distributions that can be scored: completes points, matches mixtures, recalibrates.

Letters in shapes and units as in ``predictions.py``. What is fitted on the evaluated rows themselves is fitted across
folds of whole trajectories, so that no row is scored by a fit that it was part of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from data.trajectories import Transitions
from dynamics_model import DynamicsEnsemble
from evaluation import metrics
from evaluation.predictions import OneStep, Rows, predict_one_step

_RESIDUAL_ROWS = 20_000
_QUANTILE_LEVELS = (np.arange(200) + 0.5) / 200  # at which distributions without a formula are integrated
_SMALLEST = np.finfo(np.float32).tiny  # least variance and least scale: all errors may be 0, and both are divided by

# --- Folds ---


def assign_folds(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deals whole groups to folds of (nearly) equal numbers of groups.

    Args:
        groups: Label of each row's group, ``(N,)``, such as its trajectory.
        folds: Number of folds; where there are fewer groups, as many folds as groups.
        seed: Decides which group goes to which fold.

    Returns:
        Fold of each row, ``(N,)`` int.
    """
    labels, group_of_row = np.unique(groups, return_inverse=True)
    fold_of_group = np.random.default_rng(seed).permutation(len(labels)) % folds
    return fold_of_group[group_of_row]


def cross_fitted_scale(z: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Returns the factor that recalibrates standard deviations, fitted for each fold on the other folds.

    There is one factor per column, the root mean square of standardised errors, which maximises the Gaussian likelihood
    (Levi et al. 2022, "Evaluating and calibrating uncertainty prediction in regression tasks").

    Args:
        z: Standardised errors, ``(..., N, D)``; values that are not finite are left out of the fit.
        fold: Fold of each row, ``(N,)``.

    Returns:
        ``(..., N, D)``; nan where the other folds have no finite value.
    """
    square = np.where(np.isfinite(z), np.square(z), 0.0)
    count = np.isfinite(z).astype(float)
    scale = np.empty_like(z, dtype=float)
    for current in np.unique(fold):
        inside, outside = fold == current, fold != current
        total = count[..., outside, :].sum(axis=-2)
        fitted = np.sqrt(square[..., outside, :].sum(axis=-2) / np.where(total > 0, total, np.nan))
        scale[..., inside, :] = np.maximum(fitted, _SMALLEST)[..., None, :]
    return scale


@dataclass(frozen=True)
class Isotonic:
    """Standardised errors placed in the distribution of those of other folds, ``(N, D)`` each.

    Attributes:
        pit: Probability that the recalibrated prediction gave to values below the truth.
        crps: Its continuous ranked probability score, in units of the standard deviation before recalibration.
        std: Its standard deviation, in the same units.
    """

    pit: np.ndarray
    crps: np.ndarray
    std: np.ndarray


def cross_fitted_isotonic(z: np.ndarray, fold: np.ndarray) -> Isotonic | None:
    """Recalibrates Gaussian predictions by isotonic regression, fitted for each fold on the other folds.

    Kuleshov et al. 2018, "Accurate uncertainties for deep learning using calibrated regression", algorithm 1: the
    recalibrated probability of values below ``y`` is ``R(F(y))``, where ``R`` regresses the share of truths at or below
    a predicted probability on that probability, for each dimension. Shares only rise, so the regression goes through
    all of them. Between them it interpolates in ``z``, not in ``F``, which would be 0 or 1 for all large errors alike;
    beyond the largest it is constant. So each prediction gets the distribution of the other folds' standardised errors,
    moved to its mean and stretched by its standard deviation. That has no density to speak of, hence no likelihood.

    Args:
        z: Standardised errors, ``(N, D)``.
        fold: Fold of each row, ``(N,)``.

    Returns:
        None where a fold has no others, or an error is not finite.
    """
    if len(np.unique(fold)) < 2 or not np.isfinite(z).all():
        return None
    result = Isotonic(*(np.empty(z.shape) for _ in range(3)))
    for current in np.unique(fold):
        inside, outside = fold == current, fold != current
        for dim, column in enumerate(z.T):
            known, counts = np.unique(column[outside], return_counts=True)
            share = np.cumsum(counts) / (counts.sum() + 1)
            quantiles = np.interp(_QUANTILE_LEVELS, share, known)
            result.pit[inside, dim] = np.interp(column[inside], known, share)
            result.crps[inside, dim] = metrics.quantile_crps(column[inside], quantiles)
            result.std[inside, dim] = quantiles.std()
    return result


# --- Completing points to distributions ---


def completion(
    ensemble: DynamicsEnsemble, one_step: OneStep, fold: np.ndarray, training: Transitions | None
) -> np.ndarray:
    """Returns what to add to the members' variances to make distributions of their predictions, ``(E, N, L)``.

    That is 0 where members predict distributions, and their mean squared residuals where they predict points.

    Args:
        ensemble: The ensemble that predicts.
        one_step: Its predictions for the evaluated rows.
        fold: Fold of each of these rows, ``(N,)``.
        training: Rows to take residuals from; None takes them, for each fold, from the evaluated rows of the others.

    Raises:
        ValueError: If members need residuals, and there are neither training rows nor a second fold.
    """

    def residuals() -> np.ndarray:
        if training is not None:
            return residual_variances(ensemble, training)
        if len(np.unique(fold)) < 2:
            raise ValueError("without training rows, residuals need at least two trajectories to evaluate on")
        return np.square(cross_fitted_scale(one_step.errors, fold))

    return np.broadcast_to(ensemble.completion(residuals), one_step.means.shape)


def residual_variances(ensemble: DynamicsEnsemble, transitions: Transitions | Rows) -> np.ndarray:
    """Mean squared residual of each member and dimension, ``(E, 1, L)``, over at most 20,000 rows, evenly spread."""
    chosen = np.linspace(0, len(transitions) - 1, min(len(transitions), _RESIDUAL_ROWS)).astype(np.int64)
    one_step = predict_one_step(
        ensemble, transitions.states[chosen], transitions.actions[chosen], transitions.next_states[chosen]
    )
    return np.maximum(np.square(one_step.errors).mean(axis=1, keepdims=True), _SMALLEST)


# --- The matching Gaussian ---


@dataclass(frozen=True)
class Calibrated:
    """The Gaussian with the mean and variance of the members' mixture, as predicted and recalibrated.

    Attributes:
        change: The truth, ``(N, L)``.
        mean: ``(N, L)``.
        variance: ``(N, L)``.
        scale: Factor by which recalibration multiplies standard deviations, ``(N, L)``; None if it could not be
            fitted, as with a single trajectory.
        isotonic: The same Gaussian recalibrated by isotonic regression; None likewise.
    """

    change: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    scale: np.ndarray | None
    isotonic: Isotonic | None

    @classmethod
    def of(cls, one_step: OneStep, variances: np.ndarray, fold: np.ndarray) -> Calibrated:
        """Matches moments, and fits what recalibrates each fold on the other folds.

        Args:
            one_step: The members' means, and the truth.
            variances: The members' variances, completed, ``(E, N, L)``.
            fold: Fold of each row, ``(N,)``.
        """
        mean, variance = metrics.moment_match(one_step.means, variances)
        z = (one_step.change - mean) / np.sqrt(variance)
        scale = cross_fitted_scale(z, fold)
        scale = scale if np.isfinite(scale).all() else None
        return cls(one_step.change, mean, variance, scale, cross_fitted_isotonic(z, fold))

    @property
    def variances(self) -> dict[str, np.ndarray]:
        """Variances ``(N, L)``: ``raw`` ones, as predicted, and ``recalibrated`` ones where there is a scale."""
        raw = {"raw": self.variance}
        return raw if self.scale is None else raw | {"recalibrated": self.variance * np.square(self.scale)}

    @property
    def z(self) -> dict[str, np.ndarray]:
        """Standardised errors ``(N, L)``, ``(truth - mean) / std``, for each of ``variances`` and for ``isotonic``.

        What is recalibrated by isotonic regression is no Gaussian: there, it is the standardised error to which a
        Gaussian gives the same probability integral transform.
        """
        z = {name: (self.change - self.mean) / np.sqrt(variance) for name, variance in self.variances.items()}
        return z if self.isotonic is None else z | {"isotonic": ndtri(self.isotonic.pit)}
