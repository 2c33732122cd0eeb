"""The analysis of a study: from the tables of its cells alone to tidy tables, so that analysing again trains nothing.

Comparisons are between runs with the same seed on the same test trajectories. Where a study has several splits, what is
compared is each seed's mean over splits, so that pairs are counted in seeds. In all tables ``low`` and ``high`` are the
limits of a 95 % interval, unless a column list says otherwise; there is none from fewer than ``FEWEST_PAIRS`` pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from study.cells import Result
from study.metrics import LARGEST, PRIMARY, SPREAD, Metric, Results, find_metrics, metrics_of
from study.paired_statistics import (
    FEWEST_PAIRS,
    REPLICATES,
    Estimate,
    crossed_interval,
    pool,
    resample_counts,
    seed_interval,
)
from study.policy_analysis import (
    mean_values,
    paired_propagations,
    paired_values,
    predictors_of_values,
    values_of_arms,
)
from study.stability import member_logs, spread_ratio, stability_table
from study.verdicts import judge_claims

POOLED = "all datasets"
_PAIRED = ["metric", "dataset", "arm", "reference", "compared", "pairs", "trajectories", "horizon"]
_PAIRED += ["effect", "low", "high", "least", "most", "verdict"]

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Runs:
    """One metric of one arm on one dataset, by seed and split; logs of it where it is compared by ratio.

    Attributes:
        metric: Which.
        values: On all test trajectories.
        replicates: On resampled trajectories, ``(B,)`` each; all arms and runs share the draws. Empty where the metric
            cannot be resampled.
        trajectories: How many test trajectories there are, in all splits.
    """

    metric: Metric
    values: dict[tuple[int, int], float]
    replicates: dict[tuple[int, int], np.ndarray]
    trajectories: int

    def minus(self, other: Runs) -> Runs:
        """Returns the paired differences, for the runs that both have."""
        runs = [run for run in self.values if run in other.values]
        replicates = {run: self.replicates[run] - other.replicates[run] for run in runs if run in self.replicates}
        return Runs(
            self.metric,
            {run: self.values[run] - other.values[run] for run in runs},
            replicates,
            self.trajectories,
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds that have a run."""
        return list(dict.fromkeys(seed for seed, _ in self.values))

    def estimate(self) -> Estimate:
        """Returns the mean over seeds; without uncertainty where there are too few of them."""
        by_seed = np.array([np.mean([value for run, value in self.values.items() if run[0] == s]) for s in self.seeds])
        if self.replicates:
            columns = [np.mean([r for run, r in self.replicates.items() if run[0] == s], axis=0) for s in self.seeds]
            estimate = crossed_interval(by_seed, np.column_stack(columns), self.trajectories)
        else:
            estimate = seed_interval(by_seed)
        if len(by_seed) < FEWEST_PAIRS:
            return dataclasses.replace(estimate, standard_error=np.nan, degrees=np.nan)
        return estimate

    def in_units(self, estimate: Estimate) -> dict[str, float]:
        """Returns the estimate and its limits, back from logarithms where these were averaged."""
        back = np.exp if self.metric.is_ratio else float
        return {"effect": back(estimate.mean), "low": back(estimate.low), "high": back(estimate.high)}


AllRuns = dict[tuple[str, str, str], Runs]
"""By name of the metric, arm and dataset."""


def analyse(results: Results, horizons: Mapping[str, int]) -> Tables:
    """Analyses a study; each table is documented by the function that makes it.

    Args:
        results: Results of the cells that have run.
        horizons: The horizon of rollouts by dataset, which was chosen on validation trajectories.

    Returns:
        ``cells``, ``values``, ``paired``, ``stability``, ``uncertainty``, ``claims`` (``verdicts.judge_claims``),
        ``horizon``, ``reliability``, ``timings``, and those of ``policy_tables``.
    """
    arms = list(dict.fromkeys(key.arm for key in results))
    datasets = list(dict.fromkeys(key.dataset for key in results))
    metrics = metrics_of(results)
    runs = {
        (metric.name, arm, dataset): gather_runs(results, metric, arm, dataset, horizons[dataset])
        for metric, dataset, arm in itertools.product(metrics, datasets, arms)
    }
    errors = {
        key: runs["nrmse", key.arm, key.dataset].values[key.seed, key.split]
        for key, result in results.items()
        if result.failure is None
    }
    cells, paired = cells_table(results, runs, metrics), paired_table(results, runs, _pairs(arms), horizons)
    policies = policy_tables(results, cells, metrics)
    return {
        "cells": cells,
        "values": values_table(results, runs),
        "paired": paired,
        "stability": stability_table(results, errors),
        "uncertainty": uncertainty_table(results),
        "claims": judge_claims(tables_of_claims(results, paired, policies)),
        "horizon": horizon_table(results),
        "reliability": reliability_table(results),
        "timings": timings_table(results),
        **policies,
    }


def tables_of_claims(results: Results, paired: pd.DataFrame, policies: Tables) -> Tables:
    """Returns the tables that claims are held against.

    Args:
        results: Results of a study.
        paired: Table of ``paired_table``, which may hold more arms than the study: the twins of a further one.
        policies: Tables of ``policy_tables``.
    """
    return {"paired": paired, "uncertainty_of_cells": _of_all_cells(results, "uncertainty"), **policies}


# --- Metrics, and their resampling over trajectories ---


def gather_runs(results: Results, metric: Metric, arm: str, dataset: str, horizon: int) -> Runs:
    """Gathers one metric of one arm on one dataset; runs whose training failed, or that lack it, are left out.

    Args:
        results: Results of the study.
        metric: The metric.
        arm: The arm.
        dataset: The dataset.
        horizon: Steps after which metrics of rollouts are taken.
    """
    tested = _tested_trajectories(results, dataset)
    counts = _trajectory_counts(len(tested))
    values, replicates = {}, {}
    for key, result in results.items():
        if (key.arm, key.dataset) != (arm, dataset) or result.failure is not None:
            continue
        sample = metric.read(result, horizon)
        if sample is None:
            continue
        run = (key.seed, key.split)
        if sample.trajectory is None:
            numbers = sample.values
        else:
            weights = counts[:, np.searchsorted(tested, sample.trajectory)] * sample.weights
            weights[weights.sum(axis=1) == 0] = sample.weights  # none of this split's trajectories was drawn
            numbers = sample.combine(sample.values, weights)
        numbers = np.log(numbers) if metric.is_ratio else numbers
        values[run] = float(numbers[0])
        if sample.trajectory is not None:
            replicates[run] = numbers[1:]
    return Runs(metric, values, replicates, len(tested))


def _tested_trajectories(results: Results, dataset: str) -> np.ndarray:
    """Returns the indices of all trajectories that test on any split of a dataset, sorted."""
    by_split = {
        key.split: result.tables["trajectories"].trajectory.to_numpy()
        for key, result in results.items()
        if key.dataset == dataset and result.failure is None
    }
    return np.unique(np.concatenate(list(by_split.values()))) if by_split else np.empty(0, dtype=int)


@functools.lru_cache
def _trajectory_counts(trajectories: int) -> np.ndarray:
    """Returns how often each trajectory counts, ``(1 + B, T)``: once in row 0, and as often as drawn in the others."""
    return np.vstack([np.ones(trajectories), resample_counts(trajectories, REPLICATES, seed=0)])


# --- Tables ---


def cells_table(results: Results, runs: AllRuns, metrics: Sequence[Metric]) -> pd.DataFrame:
    """Lists every cell with its numbers; those of a cell that failed are empty.

    Returns:
        arm, dataset, seed, split, fit_lr, fit_epochs, rows (to train on; empty for all there are), failure (why
        training failed), every metric, and all other headline numbers of the evaluation.
    """
    records = []
    for key, result in results.items():
        config = result.record.request.config
        record = {**key._asdict(), "fit_lr": config.fit_lr, "fit_epochs": config.fit_epochs}
        record |= {"rows": result.record.request.rows, "failure": result.failure}
        for metric in metrics:
            value = runs[metric.name, key.arm, key.dataset].values.get((key.seed, key.split), np.nan)
            record[metric.name] = np.exp(value) if metric.is_ratio else value
        records.append(record | {n: value for n, value in result.record.outcome.metrics.items() if n not in record})
    return pd.DataFrame(records)


def values_table(results: Results, runs: AllRuns) -> pd.DataFrame:
    """Lists the metrics of each arm on each dataset.

    Returns:
        metric, dataset, arm, fit_epochs, rows (to train on; empty for all there are), seeds (how many), value (mean
        over seeds, of errors the geometric mean), low, high.
    """
    settings = {(key.arm, key.dataset): result.record.request for key, result in results.items()}
    records = []
    for (metric, arm, dataset), of_arm in runs.items():
        if of_arm.values:
            request, numbers = settings[arm, dataset], of_arm.in_units(of_arm.estimate())
            record = {"metric": metric, "dataset": dataset, "arm": arm, "fit_epochs": request.config.fit_epochs}
            record |= {"rows": request.rows, "seeds": len(of_arm.seeds), "value": numbers.pop("effect")}
            records.append(record | numbers)
    return pd.DataFrame(records)


def paired_table(
    results: Results, runs: AllRuns, pairs: Sequence[tuple[str, str]], horizons: Mapping[str, int]
) -> pd.DataFrame:
    """Compares two arms on every dataset, and over all datasets, where the effect is the mean of theirs.

    Args:
        results: Results of a study.
        runs: Its metrics.
        pairs: A reference and the arm that is compared with it, each.
        horizons: Of rollouts, by dataset.

    Returns:
        metric, dataset (or ``all datasets``), arm, reference, compared (``ratio`` or ``difference``), pairs (of seeds;
        of ``member_spread``, members), trajectories (that tested them; empty where they are not resampled), horizon (of
        rollouts), effect, low, high, least, most (over all datasets only: the smallest and the largest effect), verdict
        (``better``, ``worse``, ``tie``, ``undecided``, ``too few runs``; see ``Metric.verdict``).
    """
    records = []
    metrics = {name: of_arm.metric for (name, *_), of_arm in runs.items()}
    datasets = list(dict.fromkeys(key.dataset for key in results))
    for metric in metrics.values():
        for reference, arm in pairs:
            differences = {d: runs[metric.name, arm, d].minus(runs[metric.name, reference, d]) for d in datasets}
            differences = {dataset: found for dataset, found in differences.items() if found.values}
            estimates = {dataset: found.estimate() for dataset, found in differences.items()}
            lines = [
                {
                    "dataset": dataset,
                    "pairs": len(found.seeds),
                    "trajectories": found.trajectories if found.replicates else None,
                    "horizon": horizons[dataset] if metric.has_horizon else None,
                    **found.in_units(estimates[dataset]),
                }
                for dataset, found in differences.items()
            ]
            if lines:
                numbers = next(iter(differences.values())).in_units(pool(list(estimates.values())))
                lines.append(_over_datasets(lines, numbers))
            records += _lines(metric, arm, reference, lines)
    for reference, arm in pairs:
        records += _lines(SPREAD, arm, reference, _compare_spreads(results, arm, reference, datasets))
    return pd.DataFrame(records, columns=_PAIRED)


def twins_table(results: Results, twins: Results, horizons: Mapping[str, int]) -> pd.DataFrame:
    """Compares the arms of a study with those of another one that changes one setting of all, on what both have.

    Args:
        results: Results of a study.
        twins: Results of the other.
        horizons: Of rollouts, by dataset; the cells of both must have them.

    Returns:
        As ``paired_table``, of the primary metrics; the arms of ``twins`` are named ``ARM_ln``, and each is compared
        with its twin alone: layer normalisation is what the study has for a second setting.
    """
    shared = {key.dataset for key in results} & {key.dataset for key in twins}
    both = {key: result for key, result in results.items() if key.dataset in shared}
    both |= {key._replace(arm=twin_of(key.arm)): twin for key, twin in twins.items() if key.dataset in shared}
    arms = dict.fromkeys(key.arm for key in both)
    pairs = [(arm, twin_of(arm)) for arm in arms if twin_of(arm) in arms]
    metrics = [metric for metric in find_metrics(PRIMARY).values() if metric is not SPREAD]  # it is not read from cells
    runs = {
        (metric.name, arm, dataset): gather_runs(both, metric, arm, dataset, horizons[dataset])
        for metric, arm, dataset in itertools.product(metrics, itertools.chain(*pairs), shared)
    }
    return paired_table(both, runs, pairs, horizons)


def twin_of(arm: str) -> str:
    """Returns the name of an arm with layer normalisation."""
    return f"{arm}_ln"


def against_first(paired: pd.DataFrame) -> pd.DataFrame:
    """Returns the lines of a ``paired_table`` whose reference is the first arm that has any."""
    return paired[paired.reference == paired.reference.iloc[0]] if len(paired) else paired


def _lines(metric: Metric, arm: str, reference: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Completes the lines of two arms."""
    pair = {"metric": metric.name, "arm": arm, "reference": reference}
    pair["compared"] = "ratio" if metric.is_ratio else "difference"
    return [pair | line | {"verdict": metric.verdict(line["low"], line["high"])} for line in lines]


def _over_datasets(lines: list[dict[str, Any]], numbers: dict[str, float]) -> dict[str, Any]:
    """Returns the line for all datasets, which never goes without their range; it claims nothing beyond them."""
    effects = [line["effect"] for line in lines]
    pairs = sum(line["pairs"] for line in lines)
    return {"dataset": POOLED, "pairs": pairs, **numbers, "least": min(effects), "most": max(effects)}


def _compare_spreads(results: Results, arm: str, reference: str, datasets: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the ratio of the robust spread of members on each dataset, and the geometric mean of these ratios."""
    lines, logs = [], []
    for dataset in datasets:
        both = [member_logs(results, name, dataset) for name in (arm, reference)]
        if min(map(len, both)) > 1:
            ratio, replicates = spread_ratio(*both)
            logs.append(replicates)
            limits = {"effect": ratio.value, "low": ratio.low, "high": ratio.high}
            lines.append({"dataset": dataset, "pairs": min(map(len, both)), **limits})
    if lines:
        known = [np.isfinite(replicates) for replicates in logs]
        means = np.mean(logs, axis=0)[np.logical_and.reduce(known)]
        low, high = np.exp(np.quantile(means, [0.025, 0.975])) if len(means) else (np.nan, np.nan)
        effect = float(np.exp(np.mean(np.log([line["effect"] for line in lines]))))
        lines.append(_over_datasets(lines, {"effect": effect, "low": float(low), "high": float(high)}))
    return lines


def uncertainty_table(results: Results) -> pd.DataFrame:
    """Says how well every measure of uncertainty orders rows by their error, on test rows and on probes.

    Returns:
        arm, dataset, rows (``test`` or a probe), measure, runs, spearman, spearman_low, spearman_high, auroc,
        auroc_low, auroc_high (means over runs, with the smallest and the largest; AUROC is that of finding the worst
        tenth).
    """
    table = _of_all_cells(results, "uncertainty")
    groups = table.groupby(["arm", "dataset", "rows", "measure"], sort=False)
    columns = {"runs": ("seed", "size")}
    for name, column in (("spearman", "spearman"), ("auroc", "auroc_worst")):
        columns |= {name: (column, "mean"), f"{name}_low": (column, "min"), f"{name}_high": (column, "max")}
    return groups.agg(**columns).reset_index()


def horizon_table(results: Results) -> pd.DataFrame:
    """Lists errors, skill and explosions of rollouts at every step.

    Returns:
        arm, dataset, propagation, horizon, error (geometric mean over runs of the median over start points), low, high
        (the same median of the best and of the worst run), skill, exploded (means over runs).
    """
    table = _of_all_cells(results, "rollout")
    table["error"] = table["median"].clip(upper=LARGEST)
    groups = table.groupby(["arm", "dataset", "propagation", "horizon"], sort=False)
    return groups.agg(
        error=("error", lambda errors: np.exp(np.log(errors).mean())),
        low=("error", "min"),
        high=("error", "max"),
        skill=("skill", "mean"),
        exploded=("exploded", "mean"),
    ).reset_index()


def reliability_table(results: Results) -> pd.DataFrame:
    """Compares how often intervals hold the truth with how often they promise to.

    Returns:
        arm, dataset, variant, promised (coverage), observed (coverage, mean over runs).
    """
    table = _of_all_cells(results, "reliability")
    return table.groupby(["arm", "dataset", "variant", "promised"], sort=False)["observed"].mean().reset_index()


def timings_table(results: Results) -> pd.DataFrame:
    """Says what trainings took; unlike all other tables it is not the same when a study is made again.

    Returns:
        arm, dataset, part (of the work), runs, seconds (mean over runs).
    """
    records = [
        {"arm": key.arm, "dataset": key.dataset, "part": part, "seconds": seconds}
        for key, result in results.items()
        for part, seconds in result.record.timing.items()
    ]
    groups = pd.DataFrame(records).groupby(["arm", "dataset", "part"], sort=False).seconds
    return groups.agg(runs="size", seconds="mean").reset_index()


def policy_tables(results: Results, cells: pd.DataFrame, metrics: Sequence[Metric]) -> Tables:
    """Analyses what policies are worth in the models; nothing where no cell has evaluated any.

    Returns:
        ``policies`` (``policy_analysis.values_of_arms``), ``policies_values`` (``mean_values``), ``policies_paired``
        (``paired_values``), ``policies_propagations`` (``paired_propagations``) and ``policies_foreseen``
        (``predictors_of_values``).
    """
    tables = {key: r.tables["policy_values"] for key, r in results.items() if "policy_values" in r.tables}
    if not tables:
        return {}
    place = ["arm", "dataset", "seed", "split"]
    return {
        "policies": values_of_arms(tables),
        "policies_values": mean_values(tables),
        "policies_paired": paired_values(tables),
        "policies_propagations": paired_propagations(tables),
        "policies_foreseen": predictors_of_values(tables, cells[place + [metric.name for metric in metrics]]),
    }


def _pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    return list(itertools.combinations(arms, 2))


def _of_all_cells(results: Results, name: str) -> pd.DataFrame:
    """Joins one table of all cells that did not fail, with columns for the place of each."""
    done: dict[Any, Result] = {key: result for key, result in results.items() if result.failure is None}
    return pd.concat([result.tables[name].assign(**key._asdict()) for key, result in done.items()], ignore_index=True)
