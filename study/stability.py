"""Stability: how much members, ensembles, splits and trainings differ that should be alike.

Members are what there is most of: all members of all seeds of an arm on a dataset, 35 or more, trained alike on the
same rows. Their spread is measured robustly, so that a stray member does not make it; stray members are counted apart.
An ensemble's spread follows from its members by the jackknife, which needs no second ensemble.

Letters in shapes: ``M`` members of all seeds, ``E`` members of one ensemble, ``C`` ensembles (seeds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from study.cells import CellKey, Result
from study.paired_statistics import FEWEST_PAIRS, REPLICATES

STRAY = 2.0  # a member is stray whose error (a root mean square) is more than so many times the median's
_NORMAL = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation


class Interval(NamedTuple):
    """An estimate and the limits of its 95 % interval, which are nan where there is too little to tell."""

    value: float
    low: float
    high: float


def is_stray(errors: np.ndarray) -> np.ndarray:
    """Whether each of these errors (roots of mean squares) is more than ``STRAY`` times their median, or no number."""
    return ~(errors <= STRAY * np.median(errors))


def robust_spread(logs: np.ndarray) -> np.ndarray:
    """Scaled median absolute deviation: the standard deviation of normal values, whatever a few others are.

    Args:
        logs: ``(..., M)``.

    Returns:
        ``(...)``.
    """
    return _NORMAL * np.median(np.abs(logs - np.median(logs, axis=-1, keepdims=True)), axis=-1)


def spread_replicates(logs: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the robust spread of members drawn with replacement, ``(B,)``."""
    drawn = np.random.default_rng(seed).integers(len(logs), size=(REPLICATES, len(logs)))
    return robust_spread(logs[drawn])


def spread_interval(logs: np.ndarray) -> Interval:
    """Estimates the robust spread of members ``(M,)``, with the percentiles of a bootstrap over members."""
    if len(logs) < FEWEST_PAIRS:
        return Interval(float(robust_spread(logs)) if len(logs) > 1 else np.nan, np.nan, np.nan)
    low, high = np.quantile(spread_replicates(logs), [0.025, 0.975])
    return Interval(float(robust_spread(logs)), float(low), float(high))


def spread_ratio(first: np.ndarray, second: np.ndarray) -> tuple[Interval, np.ndarray]:
    """Compares two robust spreads by their ratio, resampling the members of both independently.

    Returns:
        The ratio, and the logs of its replicates ``(B,)``, which are nan where there is too little to tell.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # equal members have no spread
        ratio = float(robust_spread(first) / robust_spread(second))
    if min(len(first), len(second)) < FEWEST_PAIRS:
        return Interval(ratio, np.nan, np.nan), np.full(REPLICATES, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):  # half of the draws may be one member
        logs = np.log(spread_replicates(first, seed=0)) - np.log(spread_replicates(second, seed=1))
    low, high = np.exp(np.nanquantile(logs, [0.025, 0.975], method="inverted_cdf"))
    return Interval(ratio, float(low), float(high)), logs


def share_interval(count: int, total: int) -> Interval:
    """Estimates a share, with the exact binomial interval (Clopper and Pearson 1934)."""
    if total == 0:
        return Interval(np.nan, np.nan, np.nan)
    low = stats.beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = stats.beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return Interval(count / total, float(low), float(high))


# --- Ensembles of these members ---


def product_matrix(table: pd.DataFrame) -> np.ndarray:
    """Returns the products of members' errors ``(E, E)`` from a cell's table ``member_products``."""
    size = int(table["second"].max()) + 1
    matrix = np.empty((size, size))
    matrix[table["first"], table["second"]] = matrix[table["second"], table["first"]] = table["product"]
    return matrix


def jackknife_variance(products: np.ndarray) -> float:
    """Variance of the log error (a root mean square) of an ensemble's mean that comes from the draw of its members.

    The delete-one jackknife (Efron and Stein 1981): the squared error of the mean of any members is the mean of their
    products ``(E, E)``, so no prediction is needed.
    """
    size = len(products)
    if size < 2:
        return np.nan
    total, rest = products.sum(), products.sum(axis=1)
    without = (total - 2 * rest + np.diag(products)) / (size - 1) ** 2  # (E,)
    logs = np.log(without) / 2
    return float((size - 1) / size * np.square(logs - logs.mean()).sum())


def ensemble_interval(variances: np.ndarray) -> Interval:
    """Estimates the spread of ensembles from the jackknife variances of several ``(C,)``, resampling whole ones."""
    value = float(np.sqrt(variances.mean())) if len(variances) else np.nan
    if len(variances) < FEWEST_PAIRS:
        return Interval(value, np.nan, np.nan)
    drawn = np.random.default_rng(0).integers(len(variances), size=(REPLICATES, len(variances)))
    low, high = np.quantile(np.sqrt(variances[drawn].mean(axis=1)), [0.025, 0.975])
    return Interval(value, float(low), float(high))


def deviation_interval(values: Sequence[float]) -> Interval:
    """Estimates a standard deviation, with the exact interval for normal values."""
    degrees = len(values) - 1
    value = float(np.std(values, ddof=1)) if degrees > 0 else np.nan
    if len(values) < FEWEST_PAIRS:
        return Interval(value, np.nan, np.nan)
    low, high = value * np.sqrt(degrees / stats.chi2.ppf([0.975, 0.025], degrees))
    return Interval(value, float(low), float(high))


# --- Of a study ---


def member_logs(results: Mapping[CellKey, Result], arm: str, dataset: str) -> np.ndarray:
    """Returns the log one-step test errors of all members of an arm on a dataset, those of each split over its median.

    So the spread over splits is no part of the spread over members.
    """
    by_split: dict[int, list[np.ndarray]] = {}
    for key, result in results.items():
        if (key.arm, key.dataset) == (arm, dataset) and result.failure is None:
            products = product_matrix(result.tables["member_products"])
            by_split.setdefault(key.split, []).append(np.log(np.diag(products)) / 2)
    logs = [np.concatenate(parts) for parts in by_split.values()]
    return np.concatenate([part - np.median(part) for part in logs]) if logs else np.empty(0)


def jitter(training: pd.DataFrame) -> float:
    """Mean rise of log validation error from one epoch to the next, over epochs and members; a fall counts 0."""
    curves = np.log(training.pivot(index="step", columns="model_id", values="val_mse").to_numpy())
    rises = np.maximum(np.diff(curves, axis=0), 0)
    return float(rises.mean()) if rises.size else 0.0


def stability_table(results: Mapping[CellKey, Result], ensemble_logs: Mapping[CellKey, float]) -> pd.DataFrame:
    """Says how stable each arm is on each dataset.

    Args:
        results: Results of the study.
        ensemble_logs: Logs of the one-step error of the ensemble of each cell whose training did not fail.

    Returns:
        - arm, dataset, runs, failed (trainings), members (of those that did not fail);
        - member_spread, member_low, member_high: robust spread of members' log errors, see ``spread_interval``;
        - stray, stray_share, stray_low, stray_high: members whose error is more than ``STRAY`` times the median of
          their arm, dataset and split; the interval takes members for independent;
        - with_stray: share of ensembles of this size that hold a stray member, were members drawn from the pool;
        - ensemble_spread, ensemble_low, ensemble_high: of ensembles' log errors, see ``ensemble_interval``;
        - seed_spread, seed_low, seed_high: standard deviation over seeds of ensembles' log errors, as observed;
        - split_spread: standard deviation over splits of their means over seeds; nan with one split;
        - jitter: see ``jitter``; mean over runs.
    """
    records = []
    places = dict.fromkeys((key.arm, key.dataset) for key in results)
    for arm, dataset in places:
        runs = {key: result for key, result in results.items() if (key.arm, key.dataset) == (arm, dataset)}
        done = {key: result for key, result in runs.items() if result.failure is None}
        logs = member_logs(runs, arm, dataset)
        spread = spread_interval(logs)
        stray = int((~(logs <= np.log(STRAY))).sum())
        share = share_interval(stray, len(logs))
        products = [product_matrix(result.tables["member_products"]) for result in done.values()]
        ensembles = ensemble_interval(np.array([jackknife_variance(matrix) for matrix in products]))
        errors = pd.Series({(key.split, key.seed): ensemble_logs[key] for key in done}, dtype=float)
        of_split = errors.groupby(level=0).mean() if len(errors) else errors
        centred = errors - errors.groupby(level=0).transform("mean") if len(errors) else errors
        seeds = deviation_interval(centred.groupby(level=1).mean().tolist() if len(errors) else [])
        records.append(
            {
                "arm": arm,
                "dataset": dataset,
                "runs": len(runs),
                "failed": len(runs) - len(done),
                "members": len(logs),
                **_named("member_spread", "member", spread),
                "stray": stray,
                **_named("stray_share", "stray", share),
                "with_stray": 1 - (1 - share.value) ** len(products[0]) if products else np.nan,
                **_named("ensemble_spread", "ensemble", ensembles),
                **_named("seed_spread", "seed", seeds),
                "split_spread": float(of_split.std(ddof=1)) if len(of_split) > 1 else np.nan,
                "jitter": np.mean([jitter(result.tables["training"]) for result in done.values()]) if done else np.nan,
            }
        )
    return pd.DataFrame(records)


def _named(name: str, prefix: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{prefix}_low": interval.low, f"{prefix}_high": interval.high}
