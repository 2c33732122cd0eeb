"""The metrics of a study: where a cell's tables hold each, how two arms are compared, and what difference matters.

Errors and scores are in normalised units (1 is a typical change in one step). A metric that is a positive error is
compared as a ratio, its logarithms being averaged over runs; others as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from study.cells import CellKey, Result
from study.paired_statistics import weighted_mean, weighted_median

# A difference counts when its interval lies beyond the margin, and a tie is said when it lies within.
RATIO_MARGIN = 0.05  # of errors: ratios from 0.95 to 1.05
NLL_MARGIN = 0.05  # nats per dimension: a density 5 % higher
SKILL_MARGIN = 0.05  # of the error of the mean training state
RANK_MARGIN = 0.05  # of rank correlations and AUROC
ECE_MARGIN = 0.01  # of coverage
SHARE_MARGIN = 0.05  # of simulated paths

PRIMARY = ("nrmse", "median_error", "nll", "rollout_mean", "spearman", "member_spread")  # and the error of values

LARGEST = 1e6  # the largest error of a rollout that is counted as it is: exploded ones may overflow
TOTAL = "total_std"  # the measure of uncertainty that metrics are of; tables have all
TEST = "test"  # in the column ``rows`` of the table ``uncertainty``: test rows, no probe

Results = Mapping[CellKey, Result]
"""Results by their place in the grid, of the cells that have run."""


@dataclass(frozen=True)
class Sample:
    """Single values of one cell, and how they combine to its metric.

    Attributes:
        values: ``(N,)``.
        weights: ``(N,)``.
        trajectory: Trajectory of each value, ``(N,)``; None where the metric is one number that cannot be resampled.
        combine: From values and weights ``(B, N)`` to ``(B,)``.
    """

    values: np.ndarray
    weights: np.ndarray
    trajectory: np.ndarray | None
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray]


Reader = Callable[[Result, int], Sample | None]
"""Reads a metric from the result of a cell, at a horizon if it is one of rollouts; None where the cell lacks it."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: In tables.
        label: In figures.
        meaning: In words.
        read: Reads it.
        is_ratio: Whether arms are compared by a ratio; else by a difference.
        margin: What a difference must exceed to matter; of a ratio, how far it is from 1.
        better: -1 where less is better, 1 where more is, 0 where neither is.
        has_horizon: Whether it is taken at the dataset's horizon.
    """

    name: str
    label: str
    meaning: str
    read: Reader
    is_ratio: bool = True
    margin: float = RATIO_MARGIN
    better: int = -1
    has_horizon: bool = False

    def verdict(self, low: float, high: float) -> str:
        """Says what an interval of ratios or differences means: better, worse, tie or undecided; with nan nothing."""
        least, most = (1 - self.margin, 1 + self.margin) if self.is_ratio else (-self.margin, self.margin)
        if np.isnan(low) or np.isnan(high):
            return "too few runs"
        if low >= least and high <= most:
            return "tie"
        if least <= high and low <= most:
            return "undecided"
        direction = -1 if high < least else 1
        if self.better == 0:
            return "lower" if direction < 0 else "higher"
        return "better" if direction == self.better else "worse"


# --- Readers ---


def root_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Roots of means under many weightings; arguments as those of ``weighted_mean``."""
    return np.sqrt(weighted_mean(values, weights))


def of_trajectories(column: str, combine: Callable[[np.ndarray, np.ndarray], np.ndarray] = weighted_mean) -> Reader:
    """Returns a reader of a column that has the mean over the rows of each trajectory."""

    def read(result: Result, horizon: int) -> Sample | None:
        table = result.tables["trajectories"]
        return Sample(table[column].to_numpy(), table.rows.to_numpy(float), table.trajectory.to_numpy(), combine)

    return read


def of_rows(result: Result, horizon: int) -> Sample | None:
    """Reads the median error over rows."""
    table = result.tables["row_errors"]
    return Sample(table.error.to_numpy(), np.ones(len(table)), table.trajectory.to_numpy(), weighted_median)


def of_starts(propagation: str, column: str) -> Reader:
    """Returns a reader of the median over start points at the horizon."""

    def read(result: Result, horizon: int) -> Sample | None:
        table = result.tables["starts"]
        if column not in table:
            return None
        table = table[(table.propagation == propagation) & (table.horizon == horizon)]
        values = table[column].clip(upper=LARGEST).to_numpy()
        return Sample(values, np.ones(len(table)), table.trajectory.to_numpy(), weighted_median) if len(table) else None

    return read


def of_table(table: str, column: str, at_horizon: bool = False, **where: str) -> Reader:
    """Returns a reader of one number, which stands where columns have these values."""

    def read(result: Result, horizon: int) -> Sample | None:
        rows = result.tables.get(table, pd.DataFrame())
        for name, value in (where | ({"horizon": horizon} if at_horizon else {})).items():
            rows = rows[rows[name] == value] if name in rows else rows[:0]
        if not len(rows) or column not in rows or np.isnan(rows[column].iloc[0]):
            return None
        return Sample(rows[column].to_numpy(float)[:1], np.ones(1), None, weighted_mean)

    return read


# --- The list ---


def _rollout(name: str, label: str, propagation: str, column: str, meaning: str) -> Metric:
    return Metric(name, label, meaning, of_starts(propagation, column), has_horizon=True)


def _ranking(column: str, label: str, meaning: str, rows: str) -> Metric:
    name = column.removesuffix("_worst") + ("" if rows == TEST else f"_{rows}")
    where = "" if rows == TEST else f", {rows.replace('_', ' ')}"
    read = of_table("uncertainty", column, rows=rows, measure=TOTAL)
    return Metric(name, label + where, meaning + where, read, is_ratio=False, margin=RANK_MARGIN, better=1)


def _rankings(rows: str) -> list[Metric]:
    return [
        _ranking("spearman", "Spearman", f"rank correlation of {TOTAL} with the error of a row", rows),
        _ranking("auroc_worst", "AUROC", f"AUROC of finding the worst tenth of rows by {TOTAL}", rows),
    ]


def _calibration(variant: str) -> Metric:
    read = of_table("calibration", "ece", variant=variant, dimension="all")
    meaning = f"expected calibration error of one-step predictions, {variant}"
    return Metric(f"ece_{variant}", f"ECE, {variant}", meaning, read, is_ratio=False, margin=ECE_MARGIN)


_AT = "median over start points, at the dataset's horizon, of the error of "
METRICS = (
    Metric(
        "nrmse",
        "nRMSE",
        "one-step root mean squared error of the ensemble's mean, which the worst few rows decide",
        of_trajectories("mse", root_mean),
    ),
    Metric("median_error", "median error", "one-step error of the ensemble's mean in the median row", of_rows),
    Metric(
        "nll",
        "NLL",
        "one-step negative log-likelihood of the members' mixture, nats per dimension",
        of_trajectories("nll"),
        is_ratio=False,
        margin=NLL_MARGIN,
    ),
    Metric("crps", "CRPS", "one-step CRPS of the members' mixture", of_trajectories("crps")),
    Metric(
        "sharpness",
        "sharpness",
        "mean standard deviation of the members' mixture, whether right or wrong",
        of_trajectories("sharpness"),
        better=0,
    ),
    _rollout("rollout_mean", "rollout, mean", "mean", "error", f"{_AT}rollouts of the ensemble's mean"),
    _rollout("rollout_ts1", "rollout, TS1", "ts1", "error", f"{_AT}the mean of TS1's particles"),
    _rollout("rollout_tsinf", "rollout, TSinf", "tsinf", "error", f"{_AT}the mean of TSinf's particles"),
    _rollout("energy_tsinf", "energy score", "tsinf", "energy_score", "the same of TSinf's energy score"),
    _rollout("rollout_mean_clamped", "mean, clamped", "mean_clamped", "error", f"{_AT}mean, its states clamped"),
    _rollout("rollout_tsinf_clamped", "TSinf, clamped", "tsinf_clamped", "error", f"{_AT}TSinf, its states clamped"),
    Metric(
        "skill_mean",
        "skill, mean",
        "skill of rollouts of the ensemble's mean against the mean training state, at the horizon",
        of_table("rollout", "skill", at_horizon=True, propagation="mean"),
        is_ratio=False,
        margin=SKILL_MARGIN,
        better=1,
        has_horizon=True,
    ),
    Metric(
        "exploded",
        "exploded",
        "share of TSinf's paths that by the horizon have left the data's range by more than its width",
        of_table("rollout", "exploded", at_horizon=True, propagation="tsinf"),
        is_ratio=False,
        margin=SHARE_MARGIN,
        has_horizon=True,
    ),
    *_rankings(TEST),
    *map(_calibration, ("raw", "recalibrated", "isotonic")),
)
SPREAD = Metric(
    "member_spread",
    "member spread",
    "robust spread over members and seeds of the log of a member's one-step error",
    lambda result, horizon: None,  # of all cells of an arm together: see stability.py
)


def metrics_of(results: Results) -> list[Metric]:
    """Returns ``METRICS`` and, for each probe that a cell has, how well uncertainty orders its rows."""
    tables = [result.tables["uncertainty"] for result in results.values() if "uncertainty" in result.tables]
    probes = dict.fromkeys(name for table in tables for name in table.get("rows", ()) if name != TEST)
    return [*METRICS, *(metric for probe in probes for metric in _rankings(probe))]


def find_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """Returns the metrics of these names, in the order of the list, those of probes last."""
    names = dict.fromkeys(names)
    known = {metric.name: metric for metric in (*METRICS, SPREAD)}
    for name in names:
        if name not in known:
            known |= {metric.name: metric for metric in _rankings(name.partition("_")[2])}
    return {name: metric for name, metric in known.items() if name in names}
