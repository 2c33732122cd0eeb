"""The analysis of a study: from the tables of its cells alone to tidy tables, so that analysing again trains nothing.

All errors are in normalised units (1 is a typical change in one step). Comparisons are ratios of an arm's error to that
of a reference arm, below 1 where the arm is better, between runs with the same seed on the same test trajectories.

In all tables ``low`` and ``high`` are the limits of a 95 % interval, unless a column list says otherwise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from study.cells import CellKey, Result
from study.paired_statistics import (
    REPLICATES,
    Estimate,
    compare_spreads,
    crossed_interval,
    holm,
    interquartile_mean,
    pool,
    probability_of_improvement,
    resample_counts,
    stratified_interval,
    weighted_mean,
    weighted_median,
)

PRIMARY = {
    "nrmse": "one-step error: root mean squared error of the ensemble's mean on test trajectories",
    "rollout_error": "long-rollout error: median over start points of the tsinf forecast's error at the horizon",
    "crps_recalibrated": "calibrated uncertainty: one-step CRPS after cross-fitted recalibration",
    "sd_log_nrmse": "stability: standard deviation over seeds of the log of the one-step error",
}
ERRORS = tuple(PRIMARY)[:3]
POOLED = "all datasets"
LONGEST_HORIZON = 25
_PAIRED = ["metric", "arm", "reference", "dataset", "horizon", "pairs", "trajectories", "ratio", "low", "high"]
_PAIRED += ["p_value", "p_holm"]
_ERROR_CAP = 1e6  # the largest error of a rollout that is counted as it is: diverged ones may overflow

Tables = dict[str, pd.DataFrame]
Results = Mapping[CellKey, Result]
"""Results by their place in the grid, of the cells that have run."""


class ErrorKey(NamedTuple):
    """Which error of which arm on which dataset."""

    metric: str
    arm: str
    dataset: str


@dataclass(frozen=True)
class LogErrors:
    """Logarithms of one error of one arm on one dataset.

    Attributes:
        by_seed: On all test trajectories, by seed; seeds whose training failed are left out.
        replicates: On resampled trajectories, ``(B,)`` by seed; all arms and seeds share the draws.
        trajectories: How many test trajectories there are.
    """

    by_seed: dict[int, float]
    replicates: dict[int, np.ndarray]
    trajectories: int

    def minus(self, other: LogErrors) -> LogErrors:
        """Returns the paired log ratios, for the seeds that both have."""
        seeds = [seed for seed in self.by_seed if seed in other.by_seed]
        return LogErrors(
            {seed: self.by_seed[seed] - other.by_seed[seed] for seed in seeds},
            {seed: self.replicates[seed] - other.replicates[seed] for seed in seeds},
            self.trajectories,
        )

    def estimate(self) -> Estimate:
        """Returns the mean over seeds."""
        values = np.array(list(self.by_seed.values()))
        replicates = np.column_stack(list(self.replicates.values())) if len(values) else np.empty((REPLICATES, 0))
        return crossed_interval(values, replicates, self.trajectories)


def analyse(results: Results) -> Tables:
    """Analyses a study; each table is documented by the function that makes it.

    Returns:
        ``cells``, ``values``, ``paired``, ``aggregates``, ``improvement``, ``stability``, ``horizon``, ``reliability``.
    """
    arms = list(dict.fromkeys(key.arm for key in results))
    datasets = list(dict.fromkeys(key.dataset for key in results))
    horizons = {dataset: primary_horizon(results, dataset) for dataset in datasets}
    keys = itertools.starmap(ErrorKey, itertools.product(ERRORS, arms, datasets))
    logs = {key: log_errors(results, key, horizons[key.dataset]) for key in keys}
    cells = cells_table(results, logs, horizons)
    return {
        "cells": cells,
        "values": values_table(logs),
        "paired": paired_table(logs, arms, datasets, horizons),
        **aggregate_tables(cells, arms, datasets),
        "stability": stability_table(cells),
        "horizon": horizon_table(results),
        "reliability": reliability_table(results),
    }


def primary_horizon(results: Results, dataset: str) -> int:
    """Returns the horizon of the long-rollout error.

    It is the longest one of at most 25 steps that half of the start points reach before their trajectory ends.
    """
    for key, result in results.items():
        if key.dataset == dataset and result.failure is None:
            counts = result.tables["starts"].groupby("horizon").size()
            return int(max(step for step in counts.index if step <= LONGEST_HORIZON and 2 * counts[step] >= counts[1]))
    return LONGEST_HORIZON  # every training has failed


# --- Errors, and their resampling over trajectories ---


def log_errors(results: Results, wanted: ErrorKey, horizon: int) -> LogErrors:
    """Gathers one error of one arm on one dataset, by seed.

    Args:
        results: Results of the study.
        wanted: The error to gather.
        horizon: Steps after which the error of rollouts is taken.
    """
    by_seed, replicates, trajectories = {}, {}, 0
    for key, result in results.items():
        if (key.arm, key.dataset) == (wanted.arm, wanted.dataset) and result.failure is None:
            by_seed[key.seed], replicates[key.seed], trajectories = _log_values(result, wanted.metric, horizon)
    return LogErrors(by_seed, replicates, trajectories)


@functools.lru_cache
def _trajectory_counts(trajectories: int) -> np.ndarray:
    """Returns how often each trajectory counts, ``(1 + B, T)``: once in row 0, and as often as drawn in the others."""
    return np.vstack([np.ones(trajectories), resample_counts(trajectories, REPLICATES, seed=0)])


def _log_values(result: Result, metric: str, horizon: int) -> tuple[float, np.ndarray, int]:
    """Returns the log of an error, the same under resampling ``(B,)``, and the number of trajectories."""
    if metric == "rollout_error":
        table = result.tables["starts"].query("horizon == @horizon")
        values, weights, combine = table.error.clip(upper=_ERROR_CAP), np.ones(len(table)), weighted_median
    else:
        table = result.tables["trajectories"]
        values, weights, combine = table["mse" if metric == "nrmse" else metric], table.rows, weighted_mean
    identities, place = np.unique(table.trajectory, return_inverse=True)
    counts = _trajectory_counts(len(identities))
    logs = np.log(combine(values.to_numpy(), counts[:, place] * np.asarray(weights)))
    logs = logs / 2 if metric == "nrmse" else logs  # root of the mean square
    return float(logs[0]), logs[1:], len(identities)


# --- Tables ---


def cells_table(results: Results, logs: Mapping[ErrorKey, LogErrors], horizons: Mapping[str, int]) -> pd.DataFrame:
    """Lists every cell with its numbers; those of a cell that failed are empty.

    Returns:
        arm, dataset, seed, fit_lr, failure (why training failed), nrmse, rollout_error, crps_recalibrated, jitter,
        worst_to_median, exploded (see ``instability``), seconds, and all other headline numbers of the evaluation.
    """
    records = []
    for key, result in results.items():
        outcome = result.record.outcome
        errors = {name: logs[ErrorKey(name, key.arm, key.dataset)].by_seed.get(key.seed, np.nan) for name in ERRORS}
        record = {
            **key._asdict(),
            "fit_lr": result.record.request.config.fit_lr,
            "failure": outcome.failure,
            **{name: np.exp(error) for name, error in errors.items()},
            **instability(result, horizons[key.dataset]),
            "seconds": outcome.seconds,
        }
        records.append(record | {name: value for name, value in outcome.metrics.items() if name not in record})
    return pd.DataFrame(records)


def instability(result: Result, horizon: int) -> dict[str, float]:
    """Measures how unstable one cell is; everything is nan where training failed.

    Returns:
        ``jitter``: mean rise of log validation error from one epoch to the next, over epochs and members, where a fall
        counts 0; ``worst_to_median``: one-step error of the worst member over that of the median one; ``exploded``:
        share of tsinf paths that by the horizon have left the data's range by more than its width.
    """
    if result.failure is not None:
        return dict.fromkeys(("jitter", "worst_to_median", "exploded"), np.nan)
    curves = np.log(result.tables["training"].pivot(index="step", columns="model_id", values="val_mse").to_numpy())
    rises = np.maximum(np.diff(curves, axis=0), 0)
    one_step = result.tables["one_step"]
    members = one_step.rmse[one_step.predictor.str.startswith("member_")]
    at_horizon = result.tables["rollout"].query("propagation == 'tsinf' and horizon == @horizon")
    return {
        "jitter": float(rises.mean()) if rises.size else 0.0,
        "worst_to_median": float(members.max() / members.median()),
        "exploded": float(at_horizon.diverged.iloc[0]),
    }


def values_table(logs: Mapping[ErrorKey, LogErrors]) -> pd.DataFrame:
    """Lists the errors of each arm on each dataset, and their spread over seeds.

    Returns:
        metric, dataset, arm, seeds (how many), value (geometric mean over seeds; for ``sd_log_nrmse`` the standard
        deviation itself, without interval), low, high.
    """
    records = []
    for (metric, arm, dataset), errors in logs.items():
        record = {"dataset": dataset, "arm": arm, "seeds": len(errors.by_seed)}
        records.append({"metric": metric, **record, **_exponentials(errors.estimate(), "value")})
        if metric == "nrmse":
            spread = _standard_deviation(list(errors.by_seed.values()))
            records.append({"metric": "sd_log_nrmse", **record, "value": spread})
    return pd.DataFrame(records).sort_values("metric", key=lambda names: names.map(list(PRIMARY).index), kind="stable")


def paired_table(
    logs: Mapping[ErrorKey, LogErrors], arms: Sequence[str], datasets: Sequence[str], horizons: Mapping[str, int]
) -> pd.DataFrame:
    """Compares every two arms on every dataset, and over all datasets, where the log ratio is the mean of theirs.

    Returns:
        metric, arm, reference, dataset (or ``all datasets``), horizon (of the rollout error), pairs (of runs),
        trajectories (that tested them), ratio, low, high, p_value, p_holm (adjusted over all datasets and pairs of arms
        of the metric).
    """
    records = []
    for reference, arm in itertools.combinations(arms, 2):
        for metric in ERRORS:
            pairs = _pairs(logs, metric, arm, reference, datasets)
            for record in compare_errors(pairs):
                horizon = horizons.get(record["dataset"]) if metric == "rollout_error" else None
                records.append({"metric": metric, "arm": arm, "reference": reference, "horizon": horizon, **record})
        for record in compare_stability(_pairs(logs, "nrmse", arm, reference, datasets)):
            records.append({"metric": "sd_log_nrmse", "arm": arm, "reference": reference, **record})
    table = pd.DataFrame(records, columns=_PAIRED)
    for metric in table.metric.unique():
        family = (table.metric == metric) & (table.dataset != POOLED)
        table.loc[family, "p_holm"] = holm(table.p_value[family])
    order = table.metric.map(list(PRIMARY).index)
    return table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


Pairs = dict[str, tuple[LogErrors, LogErrors]]
"""By dataset, the errors of an arm and those of its reference."""


def _pairs(logs: Mapping[ErrorKey, LogErrors], metric: str, arm: str, reference: str, datasets: Sequence[str]) -> Pairs:
    return {d: (logs[ErrorKey(metric, arm, d)], logs[ErrorKey(metric, reference, d)]) for d in datasets}


def compare_errors(pairs: Pairs) -> list[dict[str, Any]]:
    """Returns the ratio of errors on each dataset that has a pair of finished runs, and the mean over datasets."""
    records, estimates = [], []
    for dataset, (arm, reference) in pairs.items():
        ratio = arm.minus(reference)
        if ratio.by_seed:
            estimates.append(ratio.estimate())
            numbers = {"pairs": len(ratio.by_seed), "trajectories": ratio.trajectories}
            limits = _exponentials(estimates[-1], "ratio") | {"p_value": estimates[-1].p_value}
            records.append({"dataset": dataset, **numbers, **limits})
    return [*records, *_pooled(records, estimates)]


def compare_stability(pairs: Pairs) -> list[dict[str, Any]]:
    """Returns the ratio of standard deviations over seeds on each dataset that has two pairs of runs, and the mean.

    Seeds are the only random factor here: the spread is that on these very test trajectories.
    """
    records, spreads = [], []
    for dataset, (arm, reference) in pairs.items():
        seeds = [seed for seed in arm.by_seed if seed in reference.by_seed]
        if len(seeds) > 1:
            spreads.append(compare_spreads(*([side.by_seed[seed] for seed in seeds] for side in (arm, reference))))
            limits = {name: getattr(spreads[-1], name) for name in ("ratio", "low", "high", "p_value")}
            records.append({"dataset": dataset, "pairs": len(seeds), **limits})
    return [*records, *_pooled(records, [spread.log for spread in spreads])]


def _pooled(records: list[dict[str, Any]], estimates: list[Estimate]) -> list[dict[str, Any]]:
    """Returns the line for all datasets; it has no p-value, as it claims nothing beyond these datasets."""
    if not records:
        return []
    pairs = sum(record["pairs"] for record in records)
    return [{"dataset": POOLED, "pairs": pairs, **_exponentials(pool(estimates), "ratio")}]


def aggregate_tables(cells: pd.DataFrame, arms: Sequence[str], datasets: Sequence[str]) -> Tables:
    """Summarises the seeds that have run in every cell, unpaired; a failed training loses every comparison.

    Returns:
        Two tables:

        - ``aggregates``: metric, arm, iqm (interquartile mean of errors, each over the geometric mean of its dataset),
          low, high;
        - ``improvement``: metric, arm, reference, probability (that a run of the arm has a lower error), low, high.
    """
    runs = cells.groupby("seed").size()
    seeds = runs.index[runs == len(arms) * len(datasets)]
    means, improvements = [], []
    for metric in ERRORS if len(seeds) else ():
        errors = cells.pivot(index=["arm", "dataset"], columns="seed", values=metric)[seeds]
        typical = np.exp(np.log(errors).stack().groupby("dataset").mean())
        relative = errors.div(typical, axis=0, level="dataset").fillna(np.inf)
        of_arm = {arm: relative.loc[arm].loc[datasets].to_numpy() for arm in arms}  # (datasets, S) each
        for arm, values in of_arm.items():
            low, high = stratified_interval(interquartile_mean, [values])
            means.append({"metric": metric, "arm": arm, "iqm": interquartile_mean(values), "low": low, "high": high})
        for reference, arm in itertools.combinations(arms, 2):
            both = [of_arm[arm], of_arm[reference]]
            low, high = stratified_interval(probability_of_improvement, both)
            record = {"metric": metric, "arm": arm, "reference": reference}
            improvements.append(record | {"probability": probability_of_improvement(*both), "low": low, "high": high})
    return {
        "aggregates": pd.DataFrame(means, columns=["metric", "arm", "iqm", "low", "high"]),
        "improvement": pd.DataFrame(improvements, columns=["metric", "arm", "reference", "probability", "low", "high"]),
    }


def stability_table(cells: pd.DataFrame) -> pd.DataFrame:
    """Summarises how unstable each arm is on each dataset: means over the seeds whose training did not fail.

    Returns:
        arm, dataset, runs, failed (how many), sd_log_nrmse (standard deviation over seeds of the log of the one-step
        error), jitter, worst_to_median, exploded (see ``instability``).
    """
    groups = cells.groupby(["arm", "dataset"], sort=False)
    table = groups[["jitter", "worst_to_median", "exploded"]].mean()
    table.insert(0, "sd_log_nrmse", groups.nrmse.agg(lambda errors: _standard_deviation(np.log(errors.dropna()))))
    table.insert(0, "failed", groups.failure.count())
    table.insert(0, "runs", groups.size())
    return table.reset_index()


def horizon_table(results: Results) -> pd.DataFrame:
    """Lists the errors of rollouts at every step.

    Returns:
        arm, dataset, propagation, horizon, error (geometric mean over seeds of the median over start points), low, high
        (the same median of the best and of the worst seed).
    """
    table = _of_all_cells(results, "rollout")
    table["error"] = table["median"].clip(upper=_ERROR_CAP)
    groups = table.groupby(["arm", "dataset", "propagation", "horizon"], sort=False)["error"]
    return groups.agg(error=lambda errors: np.exp(np.log(errors).mean()), low="min", high="max").reset_index()


def reliability_table(results: Results) -> pd.DataFrame:
    """Compares how often intervals hold the truth with how often they promise to.

    Returns:
        arm, dataset, variant, promised (coverage), observed (coverage, mean over seeds).
    """
    table = _of_all_cells(results, "reliability")
    return table.groupby(["arm", "dataset", "variant", "promised"], sort=False)["observed"].mean().reset_index()


def _of_all_cells(results: Results, name: str) -> pd.DataFrame:
    """Joins one table of all cells that did not fail, with columns for arm, dataset and seed."""
    return pd.concat(
        [result.tables[name].assign(**key._asdict()) for key, result in results.items() if result.failure is None],
        ignore_index=True,
    )


def _exponentials(estimate: Estimate, name: str) -> dict[str, float]:
    """Returns the exponentials of an estimated logarithm and of its limits."""
    return {name: np.exp(estimate.mean), "low": np.exp(estimate.low), "high": np.exp(estimate.high)}


def _standard_deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
