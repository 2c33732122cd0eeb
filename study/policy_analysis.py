"""Analysis of what models say that policies are worth: errors of arms compared, and which metric foresees them.

All functions take the tables that ``policies.policy_table`` returned, by the place of their cell. Pairs are counted as
in ``analysis.py``: in seeds, each the mean over splits. ``low`` and ``high`` are the limits of a 95 % interval; none is
given from fewer than ``FEWEST_PAIRS`` seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.policy_values import SIMULATOR, score_values
from study.cells import CellKey
from study.metrics import Metric
from study.paired_statistics import (
    FEWEST_PAIRS,
    REPLICATES,
    Estimate,
    crossed_interval,
    holm,
    pool,
    resample_counts,
    weighted_mean,
)

PRIMARY = {"propagation": "tsinf", "horizon": "truncated"}  # of the values that are compared first
POOLED = "all datasets"
DEGREES = 1e9  # of freedom, where a standard error is taken as known
VALUE_ERROR = Metric(
    "value_error",
    "error of values",
    "mean absolute error of the values of policies, over the range of true ones",
    lambda result, horizon: None,  # it has tables of its own
)
_PAIRED = ["metric", "dataset", "arm", "reference", "propagation", "horizon", "compared", "pairs", "policies"]
_PAIRED += ["effect", "low", "high", "least", "most", "verdict"]

PolicyTables = Mapping[CellKey, pd.DataFrame]
"""Tables that ``policy_table`` returned, by the place of their cell; cells without one are left out."""


def values_of_models(tables: PolicyTables) -> pd.DataFrame:
    """Scores each model.

    Returns:
        arm, dataset, seed, split, propagation, horizon, error (mean absolute error of values, over the range of true
        ones), spearman, regret (over the same range), escaped (share of paths). The propagation ``simulator`` shows
        what the reward model alone is to blame for.
    """
    records = []
    for key, table in tables.items():
        for (propagation, horizon), rows in table.groupby(["propagation", "horizon"], sort=False):
            scores = score_values(rows["true"].to_numpy(), rows["predicted"].to_numpy())
            place = key._asdict() | {"propagation": propagation, "horizon": horizon}
            records.append(place | scores._asdict() | {"escaped": rows["escaped"].mean()})
    return pd.DataFrame(records)


def values_of_arms(tables: PolicyTables) -> pd.DataFrame:
    """Summarises the models of each arm on each dataset.

    Returns:
        arm, dataset, propagation, horizon, seeds, policies, error (geometric mean over runs) with low and high (seeds
        crossed with policies), and the means over runs of spearman, regret and escaped.
    """
    models, records = values_of_models(tables), []
    for place, errors in _log_errors(tables).items():
        rows = _rows(models, place)
        estimate = errors.estimate()
        records.append(
            {
                **place._asdict(),
                "seeds": len(errors.seeds),
                "policies": errors.policies,
                "error": math.exp(estimate.mean),
                "low": math.exp(estimate.low),
                "high": math.exp(estimate.high),
                **rows[["spearman", "regret", "escaped"]].mean().to_dict(),
            }
        )
    return pd.DataFrame(records)


def mean_values(tables: PolicyTables) -> pd.DataFrame:
    """Lists what each policy is worth in the models of an arm, of the values that are compared first.

    Returns:
        arm, dataset, policy, true, predicted (mean over runs).
    """
    chosen = [table.assign(arm=key.arm, dataset=key.dataset) for key, table in tables.items()]
    rows = pd.concat(chosen, ignore_index=True)
    rows = rows[(rows.propagation == PRIMARY["propagation"]) & (rows.horizon == PRIMARY["horizon"])]
    return rows.groupby(["arm", "dataset", "policy"], sort=False)[["true", "predicted"]].mean().reset_index()


def paired_values(tables: PolicyTables) -> pd.DataFrame:
    """Compares the errors of values of every two arms: models of the same seed and split, on the same policies.

    Returns:
        metric (``value_error``), dataset (or ``all datasets``), arm, reference, propagation, horizon, compared
        (``ratio``), pairs (of seeds), policies, effect, low, high (seeds crossed with policies), least, most (over all
        datasets only: the smallest and the largest effect), verdict (see ``Metric.verdict``).
    """
    errors, records = _log_errors(tables), []
    arms = dict.fromkeys(place.arm for place in errors)
    kinds = dict.fromkeys((place.propagation, place.horizon) for place in errors if place.propagation != SIMULATOR)
    for (reference, arm), kind in itertools.product(itertools.combinations(arms, 2), kinds):
        pairs = {
            own.dataset: (errors[own], errors[other])
            for own in errors
            if (own.arm, own.propagation, own.horizon) == (arm, *kind)
            and (other := own._replace(arm=reference)) in errors
        }
        named = {"arm": arm, "reference": reference, **dict(zip(("propagation", "horizon"), kind, strict=True))}
        records += [named | record for record in _compare(pairs)]
    return pd.DataFrame(records, columns=_PAIRED)


def paired_propagations(tables: PolicyTables) -> pd.DataFrame:
    """Compares TS1 with TSinf, of the same models.

    Returns:
        As ``paired_values``; arm and reference are the same, and propagation is ``ts1``: its error over that of tsinf.
    """
    errors, records = _log_errors(tables), []
    for arm, horizon in dict.fromkeys((place.arm, place.horizon) for place in errors):
        pairs = {
            own.dataset: (errors[own], errors[own._replace(propagation="tsinf")])
            for own in errors
            if (own.arm, own.horizon, own.propagation) == (arm, horizon, "ts1")
        }
        named = {"arm": arm, "reference": arm, "propagation": "ts1", "horizon": horizon}
        records += [named | record for record in _compare(pairs)]
    return pd.DataFrame(records, columns=_PAIRED)


def predictors_of_values(
    tables: PolicyTables,
    metrics: pd.DataFrame,
    *,
    propagation: str = PRIMARY["propagation"],
    horizon: str = PRIMARY["horizon"],
) -> pd.DataFrame:
    """Asks which metric of a model foresees its error of values: rank correlation over the models of a dataset.

    Intervals hold models to be independent given their dataset (Bonett and Wright 2000 for the standard error).

    Args:
        tables: Tables of the cells.
        metrics: arm, dataset, seed, split, and a column of numbers per metric; a metric without variation is left out.
        propagation: Of the values.
        horizon: Of the values.

    Returns:
        metric, dataset (or ``all datasets``: the mean of Fisher's z), models, rho, low, high, p_value, p_holm (over the
        metrics, for all datasets together), within_arms: the same correlation of ranks from which the mean of the arm
        was subtracted, so that it says whether the metric tells models of one recipe apart. For all datasets together,
        the strongest metric comes first.
    """
    models = values_of_models(tables).query("propagation == @propagation and horizon == @horizon")
    place = list(CellKey._fields)
    joined = models[[*place, "error"]].merge(metrics.rename(columns={"error": "error_of_cell"}), on=place)
    names = [name for name in joined.select_dtypes("number") if name not in (*place, "error")]
    records = []
    for name in names:
        parts, estimates = [], []
        for dataset, rows in joined.groupby("dataset", sort=False):
            rows = rows[np.isfinite(rows[name]) & np.isfinite(rows["error"])]
            if len(rows) < 4 or rows[name].nunique() < 2:
                continue
            estimates.append(rank_correlation(rows[name].to_numpy(), rows["error"].to_numpy()))
            own = {"dataset": dataset, "models": len(rows), "within_arms": _within_arms(rows, name)}
            parts.append({"metric": name, **own, **_as_correlation(estimates[-1])})
        if parts:
            whole = {
                "dataset": POOLED,
                "models": sum(part["models"] for part in parts),
                "within_arms": float(np.mean([part["within_arms"] for part in parts])),
            }
            records += [*parts, {"metric": name, **whole, **_as_correlation(pool(estimates))}]
    if not records:
        return pd.DataFrame(columns=["metric", "dataset", "models", "rho", "low", "high", "p_value", "p_holm"])
    table = pd.DataFrame(records)
    pooled = table["dataset"] == POOLED
    table.loc[pooled, "p_holm"] = holm(table.loc[pooled, "p_value"])
    strength = table[pooled].set_index("metric")["rho"].abs()
    return table.sort_values("metric", key=lambda metric: -metric.map(strength), kind="stable", ignore_index=True)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Estimates Fisher's z of Spearman's rank correlation; its error is that of Bonett and Wright (2000)."""
    rho = float(np.clip(stats.spearmanr(first, second).statistic, -0.999999, 0.999999))
    return Estimate(math.atanh(rho), math.sqrt((1 + rho**2 / 2) / (len(first) - 3)), DEGREES)


def _as_correlation(estimate: Estimate) -> dict[str, float]:
    limits = {"rho": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {name: math.tanh(value) for name, value in limits.items()} | {"p_value": estimate.p_value}


def _within_arms(rows: pd.DataFrame, name: str) -> float:
    """Correlates ranks after subtracting the mean of each arm; nan where nothing is left."""
    ranks = rows[[name, "error"]].rank()
    left = ranks - ranks.groupby(rows["arm"]).transform("mean")
    if not left.std().gt(1e-9).all():
        return math.nan
    return float(left[name].corr(left["error"]))


# --- Errors, and their resampling over policies ---


Run = tuple[int, int]
"""Seeds of the training and of the split: what two paired models share."""


class _Place(NamedTuple):
    """Which error of values of which arm on which dataset."""

    arm: str
    dataset: str
    propagation: str
    horizon: str


@dataclass(frozen=True)
class _LogErrors:
    """Logarithms of the error of values, by run: over all policies, and over resampled ones, ``(B,)``."""

    by_run: dict[Run, float]
    replicates: dict[Run, np.ndarray]
    policies: int

    def minus(self, other: _LogErrors) -> _LogErrors:
        """Returns the paired log ratios, for the runs that both have."""
        runs = [run for run in self.by_run if run in other.by_run]
        return _LogErrors(
            {run: self.by_run[run] - other.by_run[run] for run in runs},
            {run: self.replicates[run] - other.replicates[run] for run in runs},
            self.policies,
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds that have a run."""
        return list(dict.fromkeys(seed for seed, _ in self.by_run))

    def estimate(self) -> Estimate:
        """Returns the mean over seeds, crossed with policies; without uncertainty where there are too few seeds."""
        of_seed = [[run for run in self.by_run if run[0] == seed] for seed in self.seeds]
        values = np.array([np.mean([self.by_run[run] for run in runs]) for runs in of_seed])
        replicates = [np.mean([self.replicates[run] for run in runs], axis=0) for runs in of_seed]
        estimate = crossed_interval(values, np.column_stack(replicates), self.policies)
        if len(values) < FEWEST_PAIRS:
            return dataclasses.replace(estimate, standard_error=math.nan, degrees=math.nan)
        return estimate


def _log_errors(tables: PolicyTables) -> dict[_Place, _LogErrors]:
    """Gathers the errors of all arms; all share the draws of policies, and the range of true values is that of all."""
    found: dict[_Place, _LogErrors] = {}
    for key, table in tables.items():
        for (propagation, horizon), rows in table.groupby(["propagation", "horizon"], sort=False):
            true, predicted = rows["true"].to_numpy(), rows["predicted"].to_numpy()
            relative = np.abs(predicted - true) / np.ptp(true)
            counts = resample_counts(len(rows), REPLICATES, seed=0)
            place = _Place(key.arm, key.dataset, propagation, horizon)
            own = found.setdefault(place, _LogErrors({}, {}, len(rows)))
            own.by_run[key.seed, key.split] = float(np.log(relative.mean()))
            own.replicates[key.seed, key.split] = np.log(weighted_mean(relative, counts))
    return found


def _rows(models: pd.DataFrame, place: _Place) -> pd.DataFrame:
    """Returns the models of one place."""
    return models[np.logical_and.reduce([models[name] == value for name, value in place._asdict().items()])]


def _compare(pairs: Mapping[str, tuple[_LogErrors, _LogErrors]]) -> list[dict[str, float | int | str]]:
    """Returns the ratio of errors on each dataset that has a pair of models, and the mean over datasets."""
    ratios = {dataset: arm.minus(reference) for dataset, (arm, reference) in pairs.items()}
    ratios = {dataset: ratio for dataset, ratio in ratios.items() if ratio.by_run}
    if not ratios:
        return []
    estimates = {dataset: ratio.estimate() for dataset, ratio in ratios.items()}
    lines = [
        {"dataset": dataset, "pairs": len(ratio.seeds), "policies": ratio.policies, **_as_ratio(estimates[dataset])}
        for dataset, ratio in ratios.items()
    ]
    effects, pairs_of_all = [line["effect"] for line in lines], sum(line["pairs"] for line in lines)
    whole = {"dataset": POOLED, "pairs": pairs_of_all, **_as_ratio(pool(list(estimates.values())))}
    lines.append(whole | {"least": min(effects), "most": max(effects)})
    named = {"metric": VALUE_ERROR.name, "compared": "ratio"}
    return [named | line | {"verdict": VALUE_ERROR.verdict(line["low"], line["high"])} for line in lines]


def _as_ratio(estimate: Estimate) -> dict[str, float]:
    limits = {"effect": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {name: math.exp(value) for name, value in limits.items()}
