"""The tables of open-loop rollouts: one function each, whose docstring names the columns.

Units and the column ``dimension`` as in ``tables.py``; letters in shapes as in ``rollouts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from evaluation import metrics
from evaluation.calibration import cross_fitted_scale
from evaluation.predictions import Scale
from evaluation.rollouts import Forecast, skill

BAND = 0.9  # level of the band for which rollouts are said to be calibrated
QUANTILES = {"q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9}


def rollout_table(forecasts: Mapping[str, Forecast], trajectory: np.ndarray) -> pd.DataFrame:
    """Errors, skill, spreads and shares of paths that went astray, over start points, at every step.

    Medians and other quantiles are observed values, see ``metrics.observed_quantiles``.

    Args:
        forecasts: By propagation, ``no_change`` and ``mean_state`` among them.
        trajectory: Trajectory of each start point, ``(S,)``.

    Returns:
        - propagation: ``no_change``, ``mean_state``, ``mean``, ``mean_clamped``, ``ts1``, ``tsinf``, ``tsinf_clamped``,
          ``member_0``, ``member_1``, ...;
        - horizon: steps from the start;
        - starts, trajectories: start points whose trajectory lasts so long, and how many trajectories they are of;
        - q10, q25, median, q75, q90: quantiles of the error of the forecast's mean;
        - skill, skill_no_change: 1 minus the median error over that of ``mean_state``, and of ``no_change``; nan where
          the baseline has no error;
        - energy_score: median of the sampled states' energy scores; of a point's errors;
        - spread: median standard deviation of the forecast; nan where it is a point;
        - left_range, exploded: share of simulated paths that have left the data's range, and that have gone farther
          outside than it is wide.
    """
    alive = ~np.isnan(forecasts["no_change"].distance)  # (K, S), the same for all
    columns = {
        "horizon": np.arange(1, len(alive) + 1),
        "starts": alive.sum(axis=1),
        "trajectories": [len(np.unique(trajectory[of_step])) for of_step in alive],
    }
    tables = []
    for propagation, forecast in forecasts.items():
        quantiles = metrics.observed_quantiles(forecast.distance, list(QUANTILES.values()))
        spread = np.sqrt(forecast.variance.mean(axis=-1))
        measured = {
            **dict(zip(QUANTILES, quantiles, strict=True)),
            "skill": skill(forecast, forecasts["mean_state"]),
            "skill_no_change": skill(forecast, forecasts["no_change"]),
            "energy_score": metrics.observed_quantiles(forecast.energy_score, [0.5])[0],
            "spread": pd.DataFrame(spread.T).median(),  # of those that are numbers
            "left_range": np.nanmean(forecast.left_range, axis=1),
            "exploded": np.nanmean(forecast.exploded, axis=1),
        }
        tables.append(pd.DataFrame({"propagation": propagation, **columns, **measured}))
    return pd.concat(tables, ignore_index=True)


def half_skill_horizon(skill: ArrayLike) -> int:
    """Counts the steps from the start for which at least half of the first step's skill is kept; 0 if it has none.

    Args:
        skill: At steps 1, 2, ..., ``(steps,)``.
    """
    skill = np.asarray(skill)
    keeps = (skill >= skill[0] / 2) & (skill[0] > 0)  # False where nan
    return len(keeps) if keeps.all() else int(np.argmin(keeps))


def rollout_dimensions_table(forecasts: Mapping[str, Forecast], horizons: Sequence[int], scale: Scale) -> pd.DataFrame:
    """Errors of each dimension, over start points, at the horizons asked for.

    Returns:
        - propagation, horizon, dimension;
        - median, median_raw: of the absolute error of the forecast's mean.
    """
    tables = []
    for propagation, forecast in forecasts.items():
        for horizon in horizons:
            error = np.abs(forecast.error[horizon - 1])  # (S, L)
            median = metrics.observed_quantiles(error.T, [0.5])[0]
            columns = {"dimension": scale.learned.astype(str), "median": median, "median_raw": median * scale.factor}
            tables.append(pd.DataFrame({"propagation": propagation, "horizon": horizon, **columns}))
    return pd.concat(tables, ignore_index=True)


def rollout_coverage_table(forecasts: Mapping[str, Forecast], trajectory: np.ndarray, fold: np.ndarray) -> pd.DataFrame:
    """Coverage of the 90 % band of forecasts, taken for Gaussians, at every step.

    Recalibration multiplies standard deviations by one factor per dimension and step. It ends at the step where a fold
    has no other fold to be fitted on.

    Args:
        forecasts: By propagation, with variances.
        trajectory: Trajectory of each start point, ``(S,)``.
        fold: Fold of each start point, ``(S,)``.

    Returns:
        - propagation;
        - variant: ``raw``, as forecast, or ``recalibrated``;
        - horizon: steps from the start;
        - coverage: share of true states inside the band, mean over start points and dimensions;
        - standard_error: of the coverage, clustered by trajectory;
        - starts, trajectories: as in ``rollout_table``.
    """
    records = []
    for propagation, forecast in forecasts.items():
        with np.errstate(invalid="ignore"):
            z = forecast.error / np.sqrt(forecast.variance)  # (K, S, L)
        scale = cross_fitted_scale(z, fold)
        for step, alive in enumerate(~np.isnan(forecast.error[..., 0])):
            variants = {"raw": z[step, alive]}
            if np.isfinite(scale[step, alive]).all():
                variants["recalibrated"] = z[step, alive] / scale[step, alive]
            for variant, values in variants.items():
                covered = metrics.is_covered(values, BAND).mean(axis=-1)
                mean, error = metrics.clustered_mean(covered, trajectory[alive])
                record = {"propagation": propagation, "variant": variant, "horizon": step + 1, "coverage": mean}
                record |= {"standard_error": error, "starts": len(covered)}
                records.append(record | {"trajectories": len(np.unique(trajectory[alive]))})
    return pd.DataFrame(records)


def calibrated_horizon_table(coverage: pd.DataFrame) -> pd.DataFrame:
    """For how many steps the 90 % band covers what it promises.

    Args:
        coverage: A ``rollout_coverage_table``.

    Returns:
        - propagation, variant: as there;
        - horizon: steps for which coverage stays at or above 90 % minus two standard errors;
        - checked: steps that could be checked: those that two or more trajectories reach.
    """
    records = []
    for (propagation, variant), table in coverage.groupby(["propagation", "variant"], sort=False):
        horizon = metrics.calibrated_horizon(table.coverage, table.standard_error, BAND)
        checked = int(table.standard_error.notna().sum())
        records.append({"propagation": propagation, "variant": variant, "horizon": horizon, "checked": checked})
    return pd.DataFrame(records)


def start_table(
    forecasts: Mapping[str, Forecast], horizons: Sequence[int], trajectory: np.ndarray, step: np.ndarray
) -> pd.DataFrame:
    """Scores of single start points, of those whose trajectory lasts so long, at the horizons asked for.

    Args:
        forecasts: By propagation.
        horizons: Steps from the start.
        trajectory: Trajectory of each start point, ``(S,)``.
        step: Index of each start point in its trajectory, ``(S,)``.

    Returns:
        - propagation;
        - trajectory, start: index of the trajectory in the dataset, and of the start point in the trajectory;
        - horizon: steps from the start;
        - error: of the forecast's mean, root mean square over dimensions;
        - energy_score: of the sampled states; of a point its error.
    """
    tables = []
    for propagation, forecast in forecasts.items():
        for horizon in horizons:
            scores = {"error": forecast.distance[horizon - 1], "energy_score": forecast.energy_score[horizon - 1]}
            columns = {"trajectory": trajectory, "start": step, "horizon": horizon, **scores}
            tables.append(pd.DataFrame({"propagation": propagation, **columns})[~np.isnan(scores["error"])])
    return pd.concat(tables, ignore_index=True)
