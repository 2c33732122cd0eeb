"""Evaluates an ensemble on trajectories it never saw: tidy tables, with no file access.

``evaluate`` returns every table by name, ``summarise`` the headline numbers out of them. All tables are in normalised
units (a dimension's mean absolute change in the training rows is 1) unless a column's name ends in ``_raw``. In the
column ``dimension``, ``all`` stands for all learned state dimensions together, else it is the dimension's index as
text.

Both kinds of ensemble answer for likelihood and coverage: a deterministic member is completed to a Gaussian by the mean
square of its training residuals, one variance per dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data.trajectories import Dataset, Transitions, gather_transitions
from dynamics_model import DynamicsEnsemble
from evaluation import metrics
from evaluation.predictions import OneStep, Rows, Scale, gather_rows, predict_one_step
from evaluation.rollouts import StateRange, evaluate_rollouts

_FOLDS = 5
_RESIDUAL_ROWS = 20_000
_PIT_BINS = 20
_CURVE_POINTS = np.arange(0.02, 1.001, 0.02)  # shares of rows at which risk-coverage curves are kept
_NEAR_BOUND = 0.1  # nats between a log-variance and the bound it counts as being at

Tables = dict[str, pd.DataFrame]


def evaluate(
    ensemble: DynamicsEnsemble,
    dataset: Dataset,
    indices: np.ndarray,
    training: Transitions | None = None,
    *,
    elites: Sequence[int] | None = None,
    ood_rows: Mapping[str, Rows] | None = None,
    horizons: Sequence[int],
    max_starts: int,
    seed: int = 0,
) -> Tables:
    """Evaluates an ensemble on whole trajectories, one step ahead and open loop.

    Args:
        ensemble: What is evaluated; all its members count alike.
        dataset: Where the trajectories are; its range of states is the one that rollouts may leave.
        indices: Trajectories to evaluate on, which should not have trained or selected anything.
        training: The model's training rows. Without them the variance of deterministic members and the linear baseline
            are fitted on the evaluated rows themselves, across folds of trajectories.
        elites: Members whose mean is scored beside that of all members, if they are not all.
        ood_rows: Rows of other datasets by name, which uncertainty should tell from the evaluated ones.
        horizons: Steps at which tables of single start points and dimensions are kept; the largest is how far to go.
        max_starts: Start points of rollouts, evenly spread over the rows.
        seed: Of folds, start points and sampling.

    Returns:
        Tables by name, each with the columns:

        - ``one_step``: predictor (``ensemble``, ``elites``, ``member_0``..., ``linear``, ``no_change``), dimension,
          rmse, rmse_raw, r2 (of the change ``s' - s``; over all dimensions: their mean);
        - ``ensemble_size``: members, rmse (root of the expected square over all subsets of that size);
        - ``likelihood``: prediction (``mixture``, ``gaussian``: its moment-matched Gaussian, ``recalibrated``: that
          Gaussian with its scale cross-fitted), dimension, nll, nll_raw, crps, crps_raw;
        - ``calibration``: variant (``raw``, ``recalibrated``), dimension, scale, mean_z2, ece, coverage_50 ... _95;
        - ``reliability``: variant, promised, observed; ``pit``: variant, lower, upper, density;
        - ``bounds`` (probabilistic only): dimension, at_max, at_min (shares of log-variances at their learned bounds);
        - ``parts``: dimension, aleatoric, epistemic, error (root mean squares), and the same ``_raw``;
        - ``uncertainty``: measure, units, spearman, pearson, auroc_worst, risk_reduction; ``risk_coverage``: measure,
          units, share, risk (measure ``error`` is the best order there is);
        - ``ood``: dataset, measure, units, auroc, and of that dataset rows and rmse;
        - ``rollout``: propagation (``mean``, ``ts1``, ``tsinf``, ``member_0``..., ``no_change``), horizon (every step),
          starts, trajectories, q10, q25, median, q75, q90 (of the error of the forecast's mean, over start points),
          spread (median standard deviation of the forecast; nan for points), left_range, diverged (shares of paths);
        - ``rollout_dimensions``: propagation, horizon, dimension, median, median_raw (of absolute errors);
        - ``rollout_coverage``: propagation, variant, horizon (every step), coverage (of the 90 % band),
          standard_error (clustered by trajectory), starts, trajectories;
        - ``calibrated_horizon``: propagation, variant, horizon, checked (steps that could be checked);
        - ``trajectories``: trajectory, rows, mse, crps, crps_recalibrated (means over rows and dimensions; nan where
          nothing can be cross-fitted): what a bootstrap over trajectories resamples;
        - ``starts``: trajectory, start (row in the trajectory), propagation (``mean``, ``ts1``, ``tsinf``), horizon,
          error.

    Raises:
        ValueError: If deterministic members must take their variance from a single trajectory.
    """
    rows = gather_rows(dataset, indices)
    scale = Scale.of(ensemble)
    one_step = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)
    fold = metrics.assign_folds(rows.trajectory, _FOLDS, seed)
    variances = complete_variances(ensemble, one_step, fold, training)
    calibrated = Calibrated.of(one_step, variances, fold)
    linear = linear_baseline(rows, scale, fold, training)

    tables = {
        "one_step": one_step_table(one_step, linear, elites, scale),
        "ensemble_size": ensemble_size_table(one_step),
        "likelihood": likelihood_table(one_step, variances, calibrated, scale),
        "calibration": calibration_table(calibrated, scale),
        "reliability": reliability_table(calibrated),
        "pit": pit_table(calibrated),
        "parts": parts_table(one_step, variances, scale),
        "uncertainty": uncertainty_table(one_step, scale),
        "risk_coverage": risk_coverage_table(one_step, scale),
        "trajectories": trajectory_table(rows, one_step, variances, calibrated),
    }
    if one_step.variances is not None:
        tables["bounds"] = bounds_table(ensemble, one_step.variances, scale)
    if ood_rows:
        tables["ood"] = ood_table(ensemble, one_step, ood_rows, scale)
    rollouts = evaluate_rollouts(
        ensemble,
        rows,
        variances,
        fold,
        StateRange.of(dataset),
        horizons=horizons,
        max_starts=max_starts,
        seed=seed,
    )
    return tables | rollouts


def summarise(tables: Tables, horizons: Sequence[int]) -> dict[str, float]:
    """Returns the headline numbers of an evaluation by name; what could not be measured is left out."""
    one_step = tables["one_step"].query("dimension == 'all'").set_index("predictor")
    members = one_step[one_step.index.str.startswith("member_")]
    likelihood = tables["likelihood"].query("dimension == 'all'").set_index("prediction")
    calibration = tables["calibration"].query("dimension == 'all'").set_index("variant")
    uncertainty = tables["uncertainty"].query("units == 'normalised'").set_index("measure")
    summary = {
        "nrmse": one_step.rmse["ensemble"],
        "rmse_raw": one_step.rmse_raw["ensemble"],
        "r2": one_step.r2["ensemble"],
        "nrmse_member_median": members.rmse.median(),
        "nrmse_member_worst": members.rmse.max(),
        "nrmse_linear": one_step.rmse.get("linear", np.nan),
        "nrmse_no_change": one_step.rmse["no_change"],
    }
    for prediction, row in likelihood.iterrows():
        summary |= {f"nll_{prediction}": row.nll, f"crps_{prediction}": row.crps}
    for variant, row in calibration.iterrows():
        names = ["mean_z2", "ece", *(name for name in calibration if name.startswith("coverage_"))]
        summary |= {f"{name}_{variant}": row[name] for name in names}
    for measure, row in uncertainty.iterrows():
        summary |= {f"{name}_{measure}": row[name] for name in ("spearman", "auroc_worst", "risk_reduction")}
    if "ood" in tables:
        for _, row in tables["ood"].query("units == 'normalised'").iterrows():
            summary[f"auroc_{row.dataset}_{row.measure}"] = row.auroc
    for _, row in tables["rollout"][tables["rollout"].horizon.isin(horizons)].iterrows():
        if row.propagation in ("mean", "ts1", "tsinf"):
            summary[f"error_{row.propagation}_{row.horizon}"] = row["median"]
            summary[f"diverged_{row.propagation}_{row.horizon}"] = row.diverged
    for _, row in tables["calibrated_horizon"].iterrows():
        summary[f"calibrated_horizon_{row.propagation}_{row.variant}"] = row.horizon
    return {name: float(value) for name, value in summary.items() if np.isfinite(value)}


# --- Completing and recalibrating predictions ---


def residual_variance(ensemble: DynamicsEnsemble, transitions: Transitions | Rows) -> np.ndarray:
    """Mean squared residual of each member per dimension, ``(E, 1, L)``, of at most 20,000 rows, evenly spread."""
    chosen = np.linspace(0, len(transitions) - 1, min(len(transitions), _RESIDUAL_ROWS)).astype(np.int64)
    one_step = predict_one_step(
        ensemble, transitions.states[chosen], transitions.actions[chosen], transitions.next_states[chosen]
    )
    return np.maximum(np.square(one_step.errors).mean(axis=1, keepdims=True), np.finfo(np.float32).tiny)


def complete_variances(
    ensemble: DynamicsEnsemble, one_step: OneStep, fold: np.ndarray, training: Transitions | None
) -> np.ndarray:
    """Returns the members' variances, ``(E, N, L)``; of deterministic ones, those of their residuals.

    Residuals are the training rows'; without training rows, those of the other folds' evaluated rows.

    Raises:
        ValueError: If deterministic members have neither training rows nor a second fold.
    """
    if one_step.variances is not None:
        return one_step.variances
    if training is not None:
        return np.broadcast_to(residual_variance(ensemble, training), one_step.means.shape)
    if len(np.unique(fold)) < 2:
        raise ValueError("without training rows, residuals need at least two trajectories to evaluate on")
    return np.square(metrics.cross_fitted_scale(one_step.errors, fold))


@dataclass(frozen=True)
class Calibrated:
    """The moment-matched Gaussian of each row, as predicted and with its scale cross-fitted over trajectories.

    Attributes:
        change: The truth, ``(N, L)``.
        mean: ``(N, L)``.
        variance: ``(N, L)``.
        scale: What recalibration multiplies standard deviations by, ``(N, L)``; None where there is one trajectory.
    """

    change: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    scale: np.ndarray | None

    @classmethod
    def of(cls, one_step: OneStep, variances: np.ndarray, fold: np.ndarray) -> Calibrated:
        """Matches moments and fits scales, each fold's on the others."""
        mean, variance = metrics.moment_match(one_step.means, variances)
        scale = metrics.cross_fitted_scale((one_step.change - mean) / np.sqrt(variance), fold)
        return cls(one_step.change, mean, variance, scale if np.isfinite(scale).all() else None)

    @property
    def variants(self) -> dict[str, np.ndarray]:
        """Variances ``(N, L)`` as predicted and, where there are any, recalibrated."""
        raw = {"raw": self.variance}
        return raw if self.scale is None else raw | {"recalibrated": self.variance * np.square(self.scale)}

    def z(self, variance: np.ndarray) -> np.ndarray:
        """Standardised errors ``(N, L)`` under one of the variants."""
        return (self.change - self.mean) / np.sqrt(variance)


def linear_baseline(rows: Rows, scale: Scale, fold: np.ndarray, training: Transitions | None) -> np.ndarray | None:
    """Predicts the change by least squares on states, actions and a constant: ``(N, L)``, normalised units.

    Fitted on the training rows; without them, for each fold on the others; None if there are no others.
    """

    def design(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.column_stack([states, actions, np.ones(len(states))]).astype(np.float64)

    def change(part: Rows | Transitions) -> np.ndarray:
        return scale.normalise(part.next_states.astype(np.float64) - part.states)

    inputs = design(rows.states, rows.actions)
    if training is not None:
        return inputs @ np.linalg.lstsq(design(training.states, training.actions), change(training), rcond=None)[0]
    if len(np.unique(fold)) < 2:
        return None
    predicted, truth = np.empty((len(rows), len(scale.learned))), change(rows)
    for current in np.unique(fold):
        inside, outside = fold == current, fold != current
        predicted[inside] = inputs[inside] @ np.linalg.lstsq(inputs[outside], truth[outside], rcond=None)[0]
    return predicted


# --- One step ---


def one_step_table(
    one_step: OneStep, linear: np.ndarray | None, elites: Sequence[int] | None, scale: Scale
) -> pd.DataFrame:
    """Root mean squared errors and R^2 of the ensemble's mean, its members and the baselines."""
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
                "rmse": _with_all(metrics.rmse(error, axis=0), _root_mean_square),
                "rmse_raw": _with_all(metrics.rmse(error, axis=0) * scale.factor, _root_mean_square),
                "r2": _with_all(metrics.r2(error, one_step.change), np.nanmean),
            }
        )
        for predictor, error in errors.items()
    )


def ensemble_size_table(one_step: OneStep) -> pd.DataFrame:
    """Error of the mean of ``n`` members, in expectation over all subsets."""
    rmse = np.sqrt(metrics.subset_mse(one_step.errors).mean(axis=(1, 2)))
    return pd.DataFrame({"members": np.arange(1, len(rmse) + 1), "rmse": rmse})


def likelihood_table(one_step: OneStep, variances: np.ndarray, calibrated: Calibrated, scale: Scale) -> pd.DataFrame:
    """Negative log-likelihood and CRPS, per dimension and as their mean."""
    truth = one_step.change
    scores = {"mixture": _mixture_scores(one_step, variances)}
    for variant, variance in calibrated.variants.items():
        gaussian = truth, calibrated.mean, variance
        scores["gaussian" if variant == "raw" else variant] = (
            metrics.gaussian_nll(*gaussian),
            metrics.gaussian_crps(*gaussian),
        )
    return _joined(
        pd.DataFrame(
            {
                "prediction": prediction,
                "dimension": _dimensions(scale),
                "nll": _with_all(nll.mean(axis=0)),
                "nll_raw": _with_all(nll.mean(axis=0) + np.log(scale.factor)),
                "crps": _with_all(crps.mean(axis=0)),
                "crps_raw": _with_all(crps.mean(axis=0) * scale.factor),
            }
        )
        for prediction, (nll, crps) in scores.items()
    )


def _mixture_scores(one_step: OneStep, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    arguments = one_step.change, one_step.means, variances
    return metrics.mixture_nll(*arguments), metrics.mixture_crps(*arguments)


# --- Calibration ---


def calibration_table(calibrated: Calibrated, scale: Scale) -> pd.DataFrame:
    """Scale, mean squared standardised error, calibration error and coverage, per dimension and as their mean."""
    tables = []
    for variant, variance in calibrated.variants.items():
        z = calibrated.z(variance)
        factor = np.ones(z.shape[1]) if variant == "raw" else calibrated.scale.mean(axis=0)
        columns = {
            "scale": factor,
            "mean_z2": np.square(z).mean(axis=0),
            "ece": np.array([metrics.expected_calibration_error(column) for column in z.T]),
            **{f"coverage_{level * 100:.0f}": metrics.interval_coverage(z, level, axis=0) for level in metrics.LEVELS},
        }
        columns = {name: _with_all(values) for name, values in columns.items()}
        tables.append(pd.DataFrame({"variant": variant, "dimension": _dimensions(scale), **columns}))
    return _joined(tables)


def reliability_table(calibrated: Calibrated) -> pd.DataFrame:
    """Promised and observed coverage of central intervals, over all rows and dimensions."""
    tables = []
    for variant, variance in calibrated.variants.items():
        promised, observed = metrics.coverage_curve(calibrated.z(variance))
        tables.append(pd.DataFrame({"variant": variant, "promised": promised, "observed": observed}))
    return _joined(tables)


def pit_table(calibrated: Calibrated) -> pd.DataFrame:
    """Histogram of the probability integral transform over all rows and dimensions; a calibrated density is 1."""
    tables = []
    for variant, variance in calibrated.variants.items():
        values = metrics.probability_integral_transform(calibrated.z(variance))
        density, edges = np.histogram(values, bins=_PIT_BINS, range=(0, 1), density=True)
        tables.append(pd.DataFrame({"variant": variant, "lower": edges[:-1], "upper": edges[1:], "density": density}))
    return _joined(tables)


def bounds_table(ensemble: DynamicsEnsemble, variances: np.ndarray, scale: Scale) -> pd.DataFrame:
    """Shares of the log-variances that are within 0.1 nats of their learned bounds."""
    log_variances = np.log(variances)  # (E, N, L)
    highest, lowest = (
        bound.detach().cpu().double().numpy() for bound in (ensemble.network.max_logvar, ensemble.network.min_logvar)
    )  # (E, 1, L)
    return pd.DataFrame(
        {
            "dimension": _dimensions(scale),
            "at_max": _with_all((log_variances > highest - _NEAR_BOUND).mean(axis=(0, 1))),
            "at_min": _with_all((log_variances < lowest + _NEAR_BOUND).mean(axis=(0, 1))),
        }
    )


# --- Usefulness of uncertainty ---


def parts_table(one_step: OneStep, variances: np.ndarray, scale: Scale) -> pd.DataFrame:
    """Root mean squares of the two parts of the predicted variance, beside that of the error of the ensemble's mean."""
    _, epistemic = metrics.moment_match(one_step.means)
    parts = {
        "aleatoric": variances.mean(axis=(0, 1)),
        "epistemic": epistemic.mean(axis=0),
        "error": np.square(one_step.errors.mean(axis=0)).mean(axis=0),
    }
    roots = {name: np.sqrt(part) for name, part in parts.items()}
    roots |= {f"{name}_raw": root * scale.factor for name, root in roots.items()}
    columns = {name: _with_all(root, _root_mean_square) for name, root in roots.items()}
    return pd.DataFrame({"dimension": _dimensions(scale), **columns})


def uncertainty_table(one_step: OneStep, scale: Scale) -> pd.DataFrame:
    """How well each measure of disagreement orders rows by their true error."""
    records = []
    for units, measures, error in _uncertainties(one_step, scale):
        for measure, values in measures.items():
            scores = {
                "spearman": metrics.spearman(values, error),
                "pearson": metrics.pearson(values, error),
                "auroc_worst": metrics.auroc_of_worst(values, error),
                "risk_reduction": metrics.risk_reduction(values, error),
            }
            records.append({"measure": measure, "units": units, **scores})
    return pd.DataFrame(records)


def risk_coverage_table(one_step: OneStep, scale: Scale) -> pd.DataFrame:
    """Mean error of the most certain rows, for growing shares of them."""
    tables = []
    for units, measures, error in _uncertainties(one_step, scale):
        at = np.maximum(np.round(_CURVE_POINTS * len(error)).astype(int), 1) - 1
        for measure, values in (measures | {"error": error}).items():
            risk = metrics.risk_coverage(values, error)[at]
            columns = {"measure": measure, "units": units, "share": _CURVE_POINTS.round(2), "risk": risk}
            tables.append(pd.DataFrame(columns))
    return _joined(tables)


def ood_table(
    ensemble: DynamicsEnsemble, one_step: OneStep, ood_rows: Mapping[str, Rows], scale: Scale
) -> pd.DataFrame:
    """How well each measure tells other datasets' rows from the evaluated ones, and the error there."""
    records = []
    inside = {units: measures for units, measures, _ in _uncertainties(one_step, scale)}
    for name, rows in ood_rows.items():
        outside = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)
        rmse = float(metrics.rmse(outside.errors.mean(axis=0)))
        for units, measures, _ in _uncertainties(outside, scale):
            for measure, values in measures.items():
                record = {"dataset": name, "measure": measure, "units": units}
                records.append(
                    record | {"auroc": metrics.auroc(values, inside[units][measure]), "rows": len(rows), "rmse": rmse}
                )
    return pd.DataFrame(records)


def disagreements(means: np.ndarray, variances: np.ndarray | None) -> dict[str, np.ndarray]:
    """Every measure of disagreement that members of this kind have, ``(N,)`` each."""
    kinds = [kind for kind in metrics.DISAGREEMENTS if kind != "max_aleatoric" or variances is not None]
    return {kind: metrics.disagreement(means, variances, kind) for kind in kinds}


def _uncertainties(one_step: OneStep, scale: Scale) -> Iterable[tuple[str, dict[str, np.ndarray], np.ndarray]]:
    """Yields, in normalised and in raw units, every measure of disagreement and the norm of the true error."""
    for units, factor in (("normalised", np.ones_like(scale.factor)), ("raw", scale.factor)):
        variances = None if one_step.variances is None else one_step.variances * np.square(factor)
        error = np.linalg.norm(one_step.errors.mean(axis=0) * factor, axis=-1)
        yield units, disagreements(one_step.means * factor, variances), error


def cross_dataset_error(ensemble: DynamicsEnsemble, dataset: Dataset, rows: Rows) -> dict[str, float]:
    """Error of the ensemble's mean on rows of any dataset, in units that do not depend on the model.

    Returns:
        ``rows``; ``rmse`` over the learned dimensions that vary in the dataset, each divided by its mean absolute
        deviation of the change there, so that models can be compared on one dataset; ``rmse_raw`` of the same.
    """
    every = gather_transitions(dataset, np.arange(len(dataset.trajectories)))
    scale = Scale.of(ensemble)
    change = (every.next_states.astype(np.float64) - every.states)[:, scale.learned]
    deviation = np.abs(change - change.mean(axis=0)).mean(axis=0)
    one_step = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)
    error = (one_step.errors.mean(axis=0) * scale.factor)[:, deviation > 0]
    rmse = float(metrics.rmse(error / deviation[deviation > 0]))
    return {"rows": len(rows), "rmse": rmse, "rmse_raw": float(metrics.rmse(error))}


# --- Trajectory by trajectory ---


def trajectory_table(rows: Rows, one_step: OneStep, variances: np.ndarray, calibrated: Calibrated) -> pd.DataFrame:
    """One line per trajectory with the means over its rows and dimensions: what a bootstrap resamples."""
    gaussians = calibrated.variants
    per_row = {
        "mse": np.square(one_step.errors.mean(axis=0)),
        "crps": metrics.mixture_crps(one_step.change, one_step.means, variances),
        "crps_recalibrated": np.full_like(one_step.change, np.nan),
    }
    if "recalibrated" in gaussians:
        gaussian = calibrated.change, calibrated.mean, gaussians["recalibrated"]
        per_row["crps_recalibrated"] = metrics.gaussian_crps(*gaussian)
    table = pd.DataFrame({name: values.mean(axis=1) for name, values in per_row.items()})
    groups = table.groupby(rows.trajectory)
    return groups.size().rename("rows").to_frame().join(groups.mean()).rename_axis("trajectory").reset_index()


# --- Columns ---


def _dimensions(scale: Scale) -> list[str]:
    """Names of the rows of a table that has one for all dimensions together and one for each."""
    return ["all", *map(str, scale.learned)]


def _with_all(values: np.ndarray, combine: Callable[[np.ndarray], float] = np.mean) -> np.ndarray:
    """Puts what stands for all dimensions before their values ``(L,)``."""
    return np.concatenate(([combine(values)], values))


def _joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)


def _root_mean_square(values: np.ndarray) -> float:
    return float(metrics.rmse(values))
