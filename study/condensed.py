"""What of a cell is analysed and published: everything that the analysis reads, and little else.

The tables of a cell take some 700 kB, 260 kB when they are packed, most of it digits that tell nothing and steps of
rollouts that are not compared; condensed and packed, a cell of eight thousand test rows takes some 35 kB. A report is
made of condensed cells only, and ``cells.parquet`` holds the same ones: so whoever has a published study computes every
number of it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import pandas as pd

from study.cells import Result
from study.horizons import HORIZONS

STEPS = sorted({*HORIZONS, 2, 3, 7, 14, 18, 35, 70, 140})  # of rollouts, that curves go through
ROW_STEP = 0.004  # errors of rows are kept to half of so large a part of them; a practical margin is 0.05
DIGITS = 4  # significant ones, of everything that there is much of

_TRAINING = ["step", "model_id", "train_mse", "val_mse"]


def condense(result: Result, horizons: Collection[int]) -> Result:
    """Returns what is kept of a cell; a cell that is condensed already stays as it is.

    Args:
        result: A cell or a trial.
        horizons: Steps at which the rollouts of its dataset are compared.

    Returns:
        The cell, its record's headline numbers to six significant digits, and of its tables

        - ``training``: step, model_id, train_mse and val_mse;
        - ``row_errors``: sorted within trajectories, each error to ``ROW_STEP``;
        - ``starts``: at these horizons only;
        - ``rollout``: at ``STEPS`` only;
        - these and ``reliability`` to ``DIGITS`` digits, all others as they are.
    """
    tables = dict(result.tables)
    for name, change in _CHANGES.items():
        if name in tables:
            tables[name] = change(tables[name], horizons).reset_index(drop=True)
    outcome = result.record.outcome
    metrics = {name: float(f"{value:.6g}") for name, value in outcome.metrics.items()}
    record = dataclasses.replace(result.record, outcome=dataclasses.replace(outcome, metrics=metrics))
    return Result(record, tables)


def _rows(table: pd.DataFrame, horizons: Collection[int]) -> pd.DataFrame:
    with np.errstate(divide="ignore"):
        steps = np.round(np.log(table.error) / ROW_STEP)  # -inf, where a mean is right to the last digit
    return table.assign(error=_to_digits(np.exp(ROW_STEP * steps))).sort_values(["trajectory", "error"])


def _starts(table: pd.DataFrame, horizons: Collection[int]) -> pd.DataFrame:
    return _rounded(table[table.horizon.isin(horizons)])


def _rollout(table: pd.DataFrame, horizons: Collection[int]) -> pd.DataFrame:
    return _rounded(table[table.horizon.isin(STEPS)])


def _training(table: pd.DataFrame, horizons: Collection[int]) -> pd.DataFrame:
    return _rounded(table[_TRAINING])


def _reliability(table: pd.DataFrame, horizons: Collection[int]) -> pd.DataFrame:
    return _rounded(table)


_CHANGES = {
    "training": _training,
    "row_errors": _rows,
    "starts": _starts,
    "rollout": _rollout,
    "reliability": _reliability,
}


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(**{name: _to_digits(column) for name, column in table.select_dtypes(float).items()})


def _to_digits(values: pd.Series | np.ndarray) -> np.ndarray:
    """Rounds to ``DIGITS`` significant digits, such that doing so again changes nothing."""
    return np.array([float(f"{value:.{DIGITS}g}") for value in np.asarray(values)])
