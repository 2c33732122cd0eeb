"""Evaluates an ensemble on trajectories that it never saw: tables, and the headline numbers out of them; no files.

All kinds of ensembles are scored alike. Where members predict points and a score needs distributions, the variance of a
member's residuals, one per dimension, completes its points. The likelihood of the mixture of members is that of their
kind's own density; CRPS, coverage and calibration are those of Gaussians with the same means and variances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data.trajectories import Dataset, Transitions
from dynamics_model import DynamicsEnsemble
from evaluation.calibration import Calibrated, assign_folds, completion
from evaluation.predictions import Rows, Scale, gather_rows, measure_uncertainty, predict_linearly, predict_one_step
from evaluation.rollout_tables import (
    calibrated_horizon_table,
    half_skill_horizon,
    rollout_coverage_table,
    rollout_dimensions_table,
    rollout_table,
    start_table,
)
from evaluation.rollouts import StateRange, choose_starts, forecast_all
from evaluation.tables import (
    Tables,
    bounds_table,
    calibration_table,
    ensemble_size_table,
    likelihood_table,
    one_step_table,
    ood_table,
    parts_table,
    pit_table,
    reliability_table,
    risk_coverage_table,
    score_distributions,
    trajectory_table,
    uncertainty_table,
)

PROPAGATIONS = ("mean", "mean_clamped", "ts1", "tsinf", "tsinf_clamped")
SAMPLED = ("ts1", "tsinf", "tsinf_clamped")
_FOLDS = 5  # of whole trajectories, for what is fitted on the evaluated rows


def evaluate(
    ensemble: DynamicsEnsemble,
    dataset: Dataset,
    indices: np.ndarray,
    training: Transitions | None = None,
    *,
    elites: Sequence[int] | None = None,
    ood_rows: Mapping[str, Rows] | None = None,
    probes: Mapping[str, Rows] | None = None,
    horizons: Sequence[int],
    max_starts: int,
    seed: int = 0,
) -> Tables:
    """Evaluates an ensemble on whole trajectories, one step ahead and open loop.

    Args:
        ensemble: The ensemble to evaluate; all its members count alike.
        dataset: The dataset; the range of all its states is the range that rollouts may leave.
        indices: Trajectories of it to evaluate on, which should not have trained or selected anything.
        training: The model's training rows. Without them, residuals and the linear baseline are taken from the
            evaluated rows, across folds of trajectories.
        elites: Members whose mean is scored beside that of all members, if they are only some of them.
        ood_rows: Rows of other datasets by name, which uncertainty should tell from the evaluated ones.
        probes: Rows by name whose errors uncertainty should order, too, such as those of ``oracle.make_probes``.
        horizons: Steps at which single start points and dimensions are reported; rollouts go as far as the largest.
        max_starts: Start points of rollouts at most, evenly spread over the rows.
        seed: Seed of folds, start points and sampling.

    Returns:
        Tables by name; each is described by the function of ``tables.py`` or ``rollout_tables.py`` that makes it.

    Raises:
        ValueError: If members need residuals, and there are neither training rows nor a second trajectory.
    """
    rows = gather_rows(dataset, indices)
    scale = Scale.of(ensemble)
    fold = assign_folds(rows.trajectory, _FOLDS, seed)
    one_step = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)
    lacking = completion(ensemble, one_step, fold, training)
    variances = one_step.variances + lacking
    calibrated = Calibrated.of(one_step, variances, fold)
    scores = score_distributions(ensemble, one_step, variances, calibrated)
    uncertainties = measure_uncertainty(ensemble, one_step)
    probed = {
        name: measure_uncertainty(ensemble, predict_one_step(ensemble, probe.states, probe.actions, probe.next_states))
        for name, probe in (probes or {}).items()
    }
    linear = predict_linearly(rows, scale, fold, training)
    tables = {
        "one_step": one_step_table(one_step, linear, elites, scale),
        "ensemble_size": ensemble_size_table(one_step),
        "likelihood": likelihood_table(scores, scale),
        "calibration": calibration_table(calibrated, scale),
        "reliability": reliability_table(calibrated),
        "pit": pit_table(calibrated),
        "parts": parts_table(one_step, variances, scale),
        "uncertainty": uncertainty_table({"test": uncertainties, **probed}),
        "risk_coverage": risk_coverage_table(uncertainties),
        "trajectories": trajectory_table(rows, one_step, scores),
        "bounds": bounds_table(ensemble, one_step, scale),
        "ood": ood_table(ensemble, uncertainties, ood_rows or {}),
    }

    starts = choose_starts(rows, max_starts, seed)
    state_range = StateRange.of(dataset)
    forecasts = forecast_all(ensemble, rows, starts, max(horizons), lacking, state_range, seed)
    sampled = {name: forecasts[name] for name in ("ts1", "tsinf")}  # free ones
    propagated = {"mean": forecasts["mean"], **sampled}
    collective = {name: each for name, each in forecasts.items() if not name.startswith("member_")}
    reached = [step for step in horizons if step <= len(forecasts["mean"].error)]
    trajectory = rows.trajectory[starts]
    coverage = rollout_coverage_table(sampled, trajectory, fold[starts])
    tables |= {
        "rollout": rollout_table(forecasts, trajectory),
        "rollout_dimensions": rollout_dimensions_table(propagated, reached, scale),
        "rollout_coverage": coverage,
        "calibrated_horizon": calibrated_horizon_table(coverage),
        "starts": start_table(collective, reached, trajectory, rows.step[starts]),
    }
    return {name: table for name, table in tables.items() if not table.empty}


def summarise(tables: Tables, horizons: Sequence[int]) -> dict[str, float]:
    """Returns the headline numbers of an evaluation by name, without those that could not be measured."""
    one_step = tables["one_step"].query("dimension == 'all'").set_index("predictor")
    members = one_step[one_step.index.str.startswith("member_")]
    summary = {
        "nrmse": one_step.rmse["ensemble"],
        "rmse_raw": one_step.rmse_raw["ensemble"],
        "r2": one_step.r2["ensemble"],
        "nrmse_member_median": members.rmse.median(),
        "nrmse_member_worst": members.rmse.max(),
        "median_error": one_step["median"]["ensemble"],
        "nrmse_linear": one_step.rmse.get("linear", np.nan),
        "nrmse_no_change": one_step.rmse["no_change"],
    }
    # Of these tables, every column that is not left out gives a headline number for each label, COLUMN_LABEL.
    for name, labels, chosen, left_out in (
        ("likelihood", "prediction", "dimension == 'all'", ["dimension", "nll_raw", "crps_raw"]),
        ("calibration", "variant", "dimension == 'all'", ["dimension", "scale"]),
        ("uncertainty", "measure", "rows == 'test' and units == 'normalised'", ["rows", "units", "pearson"]),
    ):
        for label, row in tables[name].query(chosen).drop(columns=left_out).set_index(labels).iterrows():
            summary |= {f"{column}_{label}": value for column, value in row.items()}
    if "ood" in tables:
        for _, row in tables["ood"].query("units == 'normalised'").iterrows():
            summary[f"auroc_{row.dataset}_{row.measure}"] = row.auroc
    rollout = tables["rollout"][tables["rollout"].propagation.isin(PROPAGATIONS)]
    for propagation, by_step in rollout.groupby("propagation", sort=False):
        summary[f"half_skill_horizon_{propagation}"] = half_skill_horizon(by_step.skill)
        for _, row in by_step[by_step.horizon.isin(horizons)].iterrows():
            headline = {"error": row["median"], "skill": row.skill, "exploded": row.exploded}
            if propagation in SAMPLED:
                headline["energy_score"] = row.energy_score
            summary |= {f"{name}_{propagation}_{row.horizon}": value for name, value in headline.items()}
    for _, row in tables["calibrated_horizon"].iterrows():
        summary[f"calibrated_horizon_{row.propagation}_{row.variant}"] = row.horizon
    return {name: float(value) for name, value in summary.items() if np.isfinite(value)}
