"""Schemas of the tables that studies keep as files: what each must hold for anything here to read it.

Files come from other machines, too, and from processes that were killed: a table is checked whole when it is read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from config import LARGEST_NUMBER
from study.horizons import HORIZONS
from utils import InputError, read_file

Check = Callable[[pd.DataFrame], str | None]
"""Says what is wrong with a table beyond the types of its columns; None where nothing is."""

LARGEST_INDEX = 2**40  # of trajectories, steps, members: beyond anything that is recorded


@dataclass(frozen=True)
class Schema:
    """What a table must hold; further columns do no harm.

    Attributes:
        texts: Columns that hold text in every row.
        counts: Columns that hold whole numbers from 0 on.
        numbers: Columns that hold numbers; what could not be measured is missing.
        flags: Columns that hold true or false.
        check: What is to be checked beyond that.
    """

    texts: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    check: Check = field(default=lambda table: None)

    def fault(self, table: pd.DataFrame) -> str | None:
        """Says what is wrong with a table; None where nothing is."""
        kinds = (
            (self.texts, "text", _is_text),
            (self.counts, "whole numbers", _is_count),
            (self.numbers, "numbers", _is_number),
            (self.flags, "true or false", pd.api.types.is_bool_dtype),
        )
        for names, expected, holds in kinds:
            for name in names:
                if name not in table:
                    return f"it has no column {name!r}"
                if len(table) and not holds(table[name]):
                    return f"its column {name!r} does not hold {expected}"
        return self.check(table) if len(table) else None


def _is_text(column: pd.Series) -> bool:
    return all(isinstance(value, str) for value in column)


def _is_count(column: pd.Series) -> bool:
    return pd.api.types.is_integer_dtype(column) and bool(column.between(0, LARGEST_INDEX).all())


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


# --- Checks ---


def _unique(*columns: str) -> Check:
    def check(table: pd.DataFrame) -> str | None:
        repeated = table.duplicated(list(columns))
        return f"it has two rows of one {' and '.join(columns)}" if repeated.any() else None

    return check


def _even(of: str, *columns: str) -> Check:
    """Returns a check that all of these have rows of the same values of columns: a table that was cut off has not."""

    def check(table: pd.DataFrame) -> str | None:
        groups = [part[list(columns)].reset_index(drop=True) for _, part in table.groupby(of, sort=False)]
        is_even = all(part.equals(groups[0]) for part in groups)
        return None if is_even else f"it has not the same {' and '.join(columns)} for every {of}"

    return check


def _all_of(*checks: Check) -> Check:
    return lambda table: next((fault for check in checks if (fault := check(table))), None)


def _pairs_of_members(table: pd.DataFrame) -> str | None:
    """Checks that there is one row for every two members, and no member that has none."""
    members = int((np.sqrt(8 * len(table) + 1) - 1) / 2)
    pairs = np.stack(np.triu_indices(members))
    is_whole = np.array_equal(table[["first", "second"]].to_numpy().T, pairs)
    return None if is_whole else "its rows are not all pairs of members, in order"


def _some_rows(table: pd.DataFrame) -> str | None:
    return _unique("trajectory")(table) or (None if table.rows.min() > 0 else "it has trajectories without rows")


def _one_choice(table: pd.DataFrame) -> str | None:
    if not table.fit_lr.between(0, LARGEST_NUMBER, inclusive="right").all():
        return f"its column 'fit_lr' does not hold positive numbers, at most {LARGEST_NUMBER:g}"
    if (table.val_mse < 0).any():
        return "its column 'val_mse' holds negative numbers"
    chosen = table.groupby(["arm", "dataset"]).is_chosen.sum()
    return None if (chosen == 1).all() else "it does not choose one rate for each arm and dataset"


def _known_horizons(table: pd.DataFrame) -> str | None:
    is_known = table.horizon.isin(HORIZONS).all()
    return _unique("dataset")(table) or (None if is_known else f"it has other horizons than {HORIZONS}")


# --- The tables ---

# Of cells.
TABLES: Mapping[str, Schema] = {
    "training": Schema(
        counts=("step", "model_id"),
        numbers=("val_mse",),
        check=_all_of(_unique("step", "model_id"), _even("model_id", "step")),
    ),
    "members": Schema(numbers=("val_mse",)),
    "skill": Schema(counts=("horizon", "starts"), numbers=("skill",), check=_unique("horizon")),
    "one_step": Schema(texts=("predictor",), numbers=("rmse", "median")),
    "likelihood": Schema(texts=("prediction",), numbers=("nll", "crps")),
    "calibration": Schema(texts=("variant", "dimension"), numbers=("ece",)),
    "reliability": Schema(texts=("variant",), numbers=("promised", "observed"), check=_even("variant", "promised")),
    "trajectories": Schema(
        counts=("trajectory", "rows"), numbers=("mse", "nll", "crps", "sharpness"), check=_some_rows
    ),
    "uncertainty": Schema(texts=("rows", "measure"), numbers=("spearman", "auroc_worst")),
    "rollout": Schema(
        texts=("propagation",),
        counts=("horizon",),
        numbers=("median", "skill", "exploded"),
        check=_all_of(_unique("propagation", "horizon"), _even("propagation", "horizon")),
    ),
    "starts": Schema(texts=("propagation",), counts=("trajectory", "horizon"), numbers=("error",)),
    "row_errors": Schema(counts=("trajectory",), numbers=("error",)),
    "member_products": Schema(counts=("first", "second"), numbers=("product",), check=_pairs_of_members),
    "calibrated_horizon": Schema(texts=("propagation", "variant"), numbers=("horizon",)),
    "policy_values": Schema(
        texts=("policy", "propagation", "horizon"),
        numbers=("true", "predicted", "escaped"),
        check=_unique("policy", "propagation", "horizon"),
    ),
}
# Those that no training lacks which did not fail: of trials, and of cells that were tested.
OF_TRIALS = frozenset({"training", "members", "skill"})
OF_CELLS = frozenset(TABLES) - {"calibrated_horizon", "policy_values"}

# Of studies.
RATES = Schema(
    texts=("arm", "dataset"), numbers=("fit_lr", "val_mse", "stray"), flags=("is_chosen",), check=_one_choice
)
CHOSEN_HORIZONS = Schema(texts=("dataset",), counts=("horizon",), check=_known_horizons)


# --- Reading ---


def read_table(path: Path, schema: Schema, advice: str, names: Iterable[str] = ()) -> pd.DataFrame:
    """Reads a table that is kept as CSV.

    Args:
        path: The file.
        schema: What it must hold.
        advice: What to do about a table that cannot be used.
        names: Columns of names, which are text whatever they look like.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it cannot be read, or holds something else.
    """
    try:
        content = read_file(path)
        table = pd.read_csv(io.BytesIO(content))
        is_name = set(names).__contains__
        table[[*filter(is_name, table)]] = pd.read_csv(io.BytesIO(content), usecols=is_name, dtype=str, na_filter=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} cannot be read ({error}); {advice}") from None
    fault = schema.fault(table) if content.endswith(b"\n") else "it is cut off"
    if fault is not None:
        raise InputError(f"{path} is damaged: {fault}; {advice}")
    return table


def check_tables(tables: Mapping[str, pd.DataFrame], source: str, advice: str) -> None:
    """Checks the tables of a cell one by one, and that they are of the same trajectories.

    Args:
        tables: By name; those of other names are not looked at.
        source: Where they come from, for the message.
        advice: What to do about one that cannot be used.

    Raises:
        InputError: If one holds something else than its schema says.
    """
    for name, table in tables.items():
        if name in TABLES and (fault := TABLES[name].fault(table)):
            raise InputError(f"{name} of {source} is damaged: {fault}; {advice}")
    for name in {"row_errors", "starts"} & tables.keys() if "trajectories" in tables else ():
        if not tables[name].trajectory.isin(tables["trajectories"].trajectory).all():
            raise InputError(f"{name} of {source} is damaged: it is of other trajectories; {advice}")
    if {"row_errors", "trajectories"} <= tables.keys() and len(tables["row_errors"]) != tables[
        "trajectories"
    ].rows.sum():
        raise InputError(f"row_errors of {source} is damaged: it has not all rows; {advice}")
