"""The tables of an evaluation: one function each, whose docstring names the columns.

Scores are in normalised units, like the predictions they are made of, unless a column's name ends in ``_raw``. In the
column ``dimension``, ``all`` stands for all learned state dimensions together; else it is the dimension's index, as
text. Letters in shapes as in ``predictions.py``. The tables of open-loop rollouts are in ``rollout_tables.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from data.audit import moves_rarely
from data.trajectories import Dataset, gather_transitions
from dynamics_model import DynamicsEnsemble
from evaluation import metrics
from evaluation.calibration import Calibrated
from evaluation.predictions import (
    OneStep,
    Rows,
    Scale,
    Uncertainty,
    disagreements,
    measure_uncertainty,
    member_nll,
    predict_one_step,
)
from evaluation.selection import Model, unseen_rows
from utils import InputError

Tables = dict[str, pd.DataFrame]

LEVELS = (0.5, 0.8, 0.9, 0.95)  # of the central intervals whose coverage is shown
_PIT_BINS = 20
_KEPT_SHARES = np.arange(0.02, 1.001, 0.02)  # shares of rows at which risk-coverage curves are shown

# --- Errors one step ahead ---


def one_step_table(
    one_step: OneStep, linear: np.ndarray | None, elites: Sequence[int] | None, scale: Scale
) -> pd.DataFrame:
    """Errors of the ensemble's mean, of its members and of baselines.

    Args:
        one_step: Predictions of the members.
        linear: Predictions of the linear baseline, ``(N, L)``; None where it could not be fitted.
        elites: Members whose mean is scored, too, unless they are all.
        scale: Scale of the ensemble.

    Returns:
        - predictor: ``ensemble``, ``elites``, ``member_0``, ``member_1``, ..., ``linear`` or ``no_change``;
        - dimension;
        - rmse, rmse_raw: root mean squared error;
        - median: median over rows of a row's error, absolute, for ``all`` the root mean square over dimensions: what a
          typical row is off by, while few rows decide ``rmse``;
        - r2: coefficient of determination of the change ``s' - s``; for ``all`` the mean over dimensions that vary.
    """
    members = one_step.errors
    errors = {"ensemble": members.mean(axis=0)}
    if elites is not None and len(elites) < len(members):
        errors["elites"] = members[list(elites)].mean(axis=0)
    errors |= {f"member_{index}": error for index, error in enumerate(members)}
    if linear is not None:
        errors["linear"] = linear - one_step.change
    errors["no_change"] = -one_step.change
    return _joined(
        pd.DataFrame(
            {
                "predictor": predictor,
                "dimension": _dimensions(scale),
                "rmse": _with_all(metrics.rmse(error, axis=0), metrics.rmse),
                "rmse_raw": _with_all(metrics.rmse(error, axis=0) * scale.factor, metrics.rmse),
                "median": np.median(np.column_stack([metrics.rmse(error, axis=1), np.abs(error)]), axis=0),
                "r2": _with_all(metrics.r2(error, one_step.change), lambda r2: pd.Series(r2).mean()),
            }
        )
        for predictor, error in errors.items()
    )


def ensemble_size_table(one_step: OneStep) -> pd.DataFrame:
    """Error of the mean of a subset of the members, by the subset's size.

    Returns:
        - members: how many are in the subset;
        - rmse: root of the mean squared error, averaged over all subsets of that size.
    """
    rmse = np.sqrt(metrics.subset_mse(one_step.errors).mean(axis=(1, 2)))
    return pd.DataFrame({"members": np.arange(1, len(rmse) + 1), "rmse": rmse})


# --- Likelihood and calibration ---


@dataclass(frozen=True)
class Scores:
    """Scores of a predicted distribution, value by value, ``(N, L)`` each.

    Attributes:
        nll: Negative log-likelihood, nats; nan where the distribution has no density.
        crps: Continuous ranked probability score.
        std: Its standard deviation.
    """

    nll: np.ndarray
    crps: np.ndarray
    std: np.ndarray


def score_distributions(
    ensemble: DynamicsEnsemble, one_step: OneStep, variances: np.ndarray, calibrated: Calibrated
) -> dict[str, Scores]:
    """Scores the mixture of members, the Gaussian that matches its moments, and what recalibration makes of that.

    The likelihood of the mixture is that of the ensemble's own kind of density. Its CRPS takes the members for
    Gaussians with the predicted means and variances, whatever their kind.

    Returns:
        By name: ``mixture``; ``gaussian``, as predicted; ``recalibrated`` by a scale, and ``isotonic``, recalibrated by
        isotonic regression, where they could be fitted.
    """
    truth, predicted_std = one_step.change, np.sqrt(calibrated.variance)
    mixture = Scores(
        metrics.mixture_nll(member_nll(ensemble, truth, one_step.means, variances)),
        metrics.mixture_crps(truth, one_step.means, variances),
        predicted_std,
    )
    gaussians = {
        "gaussian" if variant == "raw" else variant: Scores(
            metrics.gaussian_nll(truth, calibrated.mean, variance),
            metrics.gaussian_crps(truth, calibrated.mean, variance),
            np.sqrt(variance),
        )
        for variant, variance in calibrated.variances.items()
    }
    scores = {"mixture": mixture, **gaussians}
    if (isotonic := calibrated.isotonic) is not None:
        nothing = np.full_like(truth, np.nan)
        scores["isotonic"] = Scores(nothing, isotonic.crps * predicted_std, isotonic.std * predicted_std)
    return scores


def likelihood_table(scores: Mapping[str, Scores], scale: Scale) -> pd.DataFrame:
    """Mean scores of predicted distributions.

    Returns:
        - prediction: ``mixture``, ``gaussian``, ``recalibrated`` or ``isotonic``, as in ``score_distributions``;
        - dimension;
        - nll, nll_raw: negative log-likelihood, nats; nan for ``isotonic``, which has no density;
        - crps, crps_raw: continuous ranked probability score;
        - sharpness: predicted standard deviation, whether right or wrong.
    """
    return _joined(
        pd.DataFrame(
            {
                "prediction": prediction,
                "dimension": _dimensions(scale),
                "nll": _with_all(values.nll.mean(axis=0)),
                "nll_raw": _with_all(values.nll.mean(axis=0) + np.log(scale.factor)),
                "crps": _with_all(values.crps.mean(axis=0)),
                "crps_raw": _with_all(values.crps.mean(axis=0) * scale.factor),
                "sharpness": _with_all(values.std.mean(axis=0)),
            }
        )
        for prediction, values in scores.items()
    )


def calibration_table(calibrated: Calibrated, scale: Scale) -> pd.DataFrame:
    """Whether errors are as large as the matching Gaussian says; the line ``all`` is the mean over dimensions.

    Returns:
        - variant: ``raw``, as predicted, ``recalibrated`` by a scale, or ``isotonic``, by isotonic regression;
        - dimension;
        - scale: factor that standard deviations were multiplied by, mean over rows; nan for ``isotonic``;
        - mean_z2: mean square of standardised errors; 1 is calibrated;
        - ece: expected calibration error;
        - coverage_50, coverage_80, coverage_90, coverage_95: share of truths inside the central interval.
    """
    factor = {"raw": 1.0} if calibrated.scale is None else {"raw": 1.0, "recalibrated": calibrated.scale.mean(axis=0)}
    tables = []
    for variant, z in calibrated.z.items():
        columns = {
            "scale": np.broadcast_to(factor.get(variant, np.nan), z.shape[1]),
            "mean_z2": np.square(z).mean(axis=0),
            "ece": np.array([metrics.expected_calibration_error(column) for column in z.T]),
            **{f"coverage_{100 * level:.0f}": metrics.interval_coverage(z, level, axis=0) for level in LEVELS},
        }
        columns = {name: _with_all(values) for name, values in columns.items()}
        tables.append(pd.DataFrame({"variant": variant, "dimension": _dimensions(scale), **columns}))
    return _joined(tables)


def reliability_table(calibrated: Calibrated) -> pd.DataFrame:
    """Coverage of central intervals over all rows and dimensions.

    Returns:
        - variant: ``raw``, ``recalibrated`` or ``isotonic``;
        - promised: probability of the interval;
        - observed: share of truths inside it.
    """
    tables = []
    for variant, z in calibrated.z.items():
        promised, observed = metrics.coverage_curve(z)
        tables.append(pd.DataFrame({"variant": variant, "promised": promised, "observed": observed}))
    return _joined(tables)


def pit_table(calibrated: Calibrated) -> pd.DataFrame:
    """Histogram of the probability integral transform over all rows and dimensions.

    Returns:
        - variant: ``raw``, ``recalibrated`` or ``isotonic``;
        - lower, upper: edges of the bin;
        - density: 1 in every bin is calibrated.
    """
    tables = []
    for variant, z in calibrated.z.items():
        values = metrics.probability_integral_transform(z)
        density, edges = np.histogram(values, bins=_PIT_BINS, range=(0, 1), density=True)
        tables.append(pd.DataFrame({"variant": variant, "lower": edges[:-1], "upper": edges[1:], "density": density}))
    return _joined(tables)


def bounds_table(ensemble: DynamicsEnsemble, one_step: OneStep, scale: Scale) -> pd.DataFrame:
    """How many predicted variances are at a bound that the ensemble has learned; empty for kinds without such bounds.

    Returns:
        - dimension;
        - at_max, at_min: share of the variances at that bound, over members and rows.
    """
    shares = ensemble.share_at_bounds(torch.from_numpy(one_step.variances).to(ensemble.device))
    if not shares:
        return pd.DataFrame()
    columns = {name: _with_all(share.cpu().numpy()) for name, share in shares.items()}
    return pd.DataFrame({"dimension": _dimensions(scale), **columns})


# --- Usefulness of uncertainty ---


def parts_table(one_step: OneStep, variances: np.ndarray, scale: Scale) -> pd.DataFrame:
    """The two parts of the predicted variance beside the error, as root mean squares over rows.

    Returns:
        - dimension;
        - aleatoric, aleatoric_raw: standard deviation that members predict;
        - epistemic, epistemic_raw: standard deviation of the members' means;
        - error, error_raw: error of the ensemble's mean.
    """
    _, epistemic = metrics.moment_match(one_step.means)
    parts = {
        "aleatoric": variances.mean(axis=(0, 1)),
        "epistemic": epistemic.mean(axis=0),
        "error": np.square(one_step.errors.mean(axis=0)).mean(axis=0),
    }
    roots = {name: np.sqrt(part) for name, part in parts.items()}
    roots |= {f"{name}_raw": root * scale.factor for name, root in roots.items()}
    columns = {name: _with_all(root, metrics.rmse) for name, root in roots.items()}
    return pd.DataFrame({"dimension": _dimensions(scale), **columns})


def uncertainty_table(uncertainties: Mapping[str, Sequence[Uncertainty]]) -> pd.DataFrame:
    """How well each measure of disagreement orders rows by their true error.

    Args:
        uncertainties: Of the evaluated rows, named ``test``, and of probes.

    Returns:
        - rows: ``test`` or the probe's name;
        - measure: as in ``DynamicsEnsemble.disagreement``;
        - units: ``normalised`` or ``raw``;
        - spearman, pearson: rank and linear correlation of measure and error;
        - auroc_worst: AUROC of finding the worst tenth of errors;
        - auroc_told: AUROC of telling these rows from the test rows; nan of the test rows themselves;
        - risk_reduction: 1 if ordered like the error itself, 0 if at random.
    """
    on_test = {of_test.units: of_test.measures for of_test in uncertainties["test"]}
    return pd.DataFrame(
        [
            {
                "rows": rows,
                "measure": measure,
                "units": uncertainty.units,
                "spearman": metrics.spearman(values, uncertainty.error),
                "pearson": metrics.pearson(values, uncertainty.error),
                "auroc_worst": metrics.auroc_of_worst(values, uncertainty.error),
                "auroc_told": np.nan if rows == "test" else metrics.auroc(values, on_test[uncertainty.units][measure]),
                "risk_reduction": metrics.risk_reduction(values, uncertainty.error),
            }
            for rows, of_rows in uncertainties.items()
            for uncertainty in of_rows
            for measure, values in uncertainty.measures.items()
        ]
    )


def risk_coverage_table(uncertainties: Sequence[Uncertainty]) -> pd.DataFrame:
    """Mean error of the most certain rows.

    Returns:
        - measure: the measure that orders the rows; ``error`` itself gives the best order there is;
        - units: ``normalised`` or ``raw``;
        - share: share of the rows that is kept, the most certain first;
        - risk: mean error of the kept rows.
    """
    tables = []
    for uncertainty in uncertainties:
        error, units = uncertainty.error, uncertainty.units
        last = np.maximum(np.round(_KEPT_SHARES * len(error)).astype(int), 1) - 1
        for measure, values in (uncertainty.measures | {"error": error}).items():
            risk = metrics.risk_coverage(values, error)[last]
            columns = {"measure": measure, "units": units, "share": _KEPT_SHARES.round(2), "risk": risk}
            tables.append(pd.DataFrame(columns))
    return _joined(tables)


def ood_table(ensemble: DynamicsEnsemble, inside: Sequence[Uncertainty], ood_rows: Mapping[str, Rows]) -> pd.DataFrame:
    """How well each measure of disagreement tells rows of other datasets from the evaluated ones.

    Args:
        ensemble: The ensemble.
        inside: Its uncertainty about the evaluated rows.
        ood_rows: Rows of other datasets, by name.

    Returns:
        - dataset: the other dataset;
        - measure, units: as in ``uncertainty_table``;
        - auroc: probability that the measure is larger for a row of the other dataset;
        - rows: how many rows of the other dataset were used;
        - rmse: error of the ensemble's mean on them.
    """
    records = []
    for name, rows in ood_rows.items():
        one_step = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)
        rmse = float(metrics.rmse(one_step.errors.mean(axis=0)))
        for here, there in zip(inside, measure_uncertainty(ensemble, one_step), strict=True):
            for measure, values in there.measures.items():
                record = {"dataset": name, "measure": measure, "units": there.units}
                record |= {"auroc": metrics.auroc(values, here.measures[measure]), "rows": len(rows), "rmse": rmse}
                records.append(record)
    return pd.DataFrame(records)


# --- Trajectory by trajectory ---


def trajectory_table(rows: Rows, one_step: OneStep, scores: Mapping[str, Scores]) -> pd.DataFrame:
    """Scores of each trajectory, which a bootstrap over trajectories can resample.

    Returns:
        - trajectory: its index in the dataset;
        - rows: its number of transitions;
        - mse: squared error of the ensemble's mean, mean over rows and dimensions;
        - nll, crps, sharpness: of the mixture, the same means;
        - crps_recalibrated: of the recalibrated Gaussian, the same mean; nan where there is none.
    """
    nothing = np.full_like(one_step.change, np.nan)
    by_value = {
        "mse": np.square(one_step.errors.mean(axis=0)),
        "nll": scores["mixture"].nll,
        "crps": scores["mixture"].crps,
        "sharpness": scores["mixture"].std,
        "crps_recalibrated": scores["recalibrated"].crps if "recalibrated" in scores else nothing,
    }
    by_row = pd.DataFrame({name: values.mean(axis=1) for name, values in by_value.items()})
    groups = by_row.groupby(rows.trajectory)
    return groups.size().rename("rows").to_frame().join(groups.mean()).rename_axis("trajectory").reset_index()


# --- The simulator ---


def oracle_table(
    ensemble: DynamicsEnsemble, predictions: Mapping[str, OneStep], completion: np.ndarray | float
) -> pd.DataFrame:
    """Predictions against the simulator's truth, for actions on and off the data.

    Args:
        ensemble: The ensemble that predicted.
        predictions: By kind of actions, the recorded ones first.
        completion: Added to the members' variances to make distributions of points, ``(E, 1, L)`` or 0.

    Returns:
        - actions: ``recorded``, ``perturbed``, ``mirrored`` or ``random``;
        - rows: how many;
        - rmse: error of the ensemble's mean;
        - no_change: error of that baseline;
        - predicted_std: standard deviation of the matching Gaussian, root mean square;
        - mean_z2, coverage_90: of the matching Gaussian, as in ``calibration_table``;
        - mean_MEASURE, spearman_MEASURE, auroc_MEASURE, for each measure of disagreement, normalised units: its mean,
          its rank correlation with the error, and the AUROC of telling these actions from the recorded ones.
    """
    records, on_data = [], {}
    for actions, one_step in predictions.items():
        mean, variance = metrics.moment_match(one_step.means, one_step.variances + completion)
        error = mean - one_step.change
        z = -error / np.sqrt(variance)
        record = {
            "actions": actions,
            "rows": len(error),
            "rmse": float(metrics.rmse(error)),
            "no_change": float(metrics.rmse(one_step.change)),
            "predicted_std": float(np.sqrt(np.mean(variance))),
            "mean_z2": float(np.mean(np.square(z))),
            "coverage_90": float(metrics.interval_coverage(z, 0.9)),
        }
        for measure, values in disagreements(ensemble, one_step.means, one_step.variances).items():
            on_data.setdefault(measure, values)
            record |= {
                f"mean_{measure}": values.mean(),
                f"spearman_{measure}": metrics.spearman(values, np.linalg.norm(error, axis=-1)),
                f"auroc_{measure}": metrics.auroc(values, on_data[measure]),
            }
        records.append(record)
    return pd.DataFrame(records)


def oracle_noise_table(
    one_step: OneStep, completion: np.ndarray | float, true: np.ndarray, scale: Scale
) -> pd.DataFrame:
    """Predicted noise against the simulator's.

    Args:
        one_step: Predictions of the ensemble.
        completion: Added to the members' variances to make distributions of points, ``(E, 1, L)`` or 0.
        true: Variance of the simulator's next state, ``(N, L)``.
        scale: Of the ensemble.

    Returns:
        - dimension;
        - true: standard deviation of the simulator's next state, root mean square over rows;
        - predicted: standard deviation that members predict, root mean square over rows and members;
        - spearman: rank correlation of the two variances over rows.
    """
    predicted = (one_step.variances + completion).mean(axis=0)
    return pd.DataFrame(
        {
            "dimension": scale.learned.astype(str),
            "true": np.sqrt(true.mean(axis=0)),
            "predicted": np.sqrt(predicted.mean(axis=0)),
            "spearman": [metrics.spearman(*columns) for columns in zip(predicted.T, true.T, strict=True)],
        }
    )


# --- Several models and datasets ---


def cross_dataset_table(models: Iterable[Model], datasets: Sequence[Dataset], seed: int) -> pd.DataFrame:
    """Errors of every model on every dataset, on rows that it has not seen.

    Args:
        models: The models to evaluate.
        datasets: The datasets to evaluate each of them on.
        seed: Seed of the draw of trajectories where there are too many.

    Returns:
        - model, dataset: their names;
        - trained_on: whether the model was trained on the dataset;
        - rows: how many; nan, like the errors, where the model has seen them all;
        - rmse: error of the ensemble's mean over the learned dimensions that vary in the dataset, each divided by the
          mean absolute deviation of its change there (the standard deviation where it moves rarely): a unit that does
          not depend on the model;
        - rmse_raw: the same in raw units.
    """
    records = []
    for model in models:
        for dataset in datasets:
            record = {"model": model.name, "dataset": dataset.name, "trained_on": model.was_trained_on(dataset)}
            with contextlib.suppress(InputError):
                record |= _cross_dataset_error(model.ensemble, dataset, unseen_rows(model, dataset, seed))
            records.append(record)
    return pd.DataFrame(records, columns=["model", "dataset", "trained_on", "rows", "rmse", "rmse_raw"])


def _cross_dataset_error(ensemble: DynamicsEnsemble, dataset: Dataset, rows: Rows) -> dict[str, float]:
    every = gather_transitions(dataset, np.arange(len(dataset.trajectories)))
    scale = Scale.of(ensemble)
    change = (every.next_states.astype(np.float64) - every.states)[:, scale.learned]
    distance = np.abs(change - change.mean(axis=0))
    deviation, spread = distance.mean(axis=0), np.sqrt(np.square(distance).mean(axis=0))
    deviation = np.where(moves_rarely(spread, deviation), spread, deviation)
    one_step = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)
    error = (one_step.errors.mean(axis=0) * scale.factor)[:, deviation > 0]
    rmse = float(metrics.rmse(error / deviation[deviation > 0]))
    return {"rows": len(rows), "rmse": rmse, "rmse_raw": float(metrics.rmse(error))}


# --- Columns ---


def _dimensions(scale: Scale) -> list[str]:
    """Values of the column ``dimension`` in tables that begin with all dimensions together."""
    return ["all", *map(str, scale.learned)]


def _with_all(values: np.ndarray, combine: Callable[[np.ndarray], float] = np.mean) -> np.ndarray:
    """Puts the value for all dimensions together before those of each, ``(L,)``."""
    return np.concatenate(([combine(values)], values))


def _joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)
