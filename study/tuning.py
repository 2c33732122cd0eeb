"""Tuning: before a study, every arm chooses its learning rate on every dataset, and every dataset its horizon.

A trial is a training with a candidate rate and a seed outside the study, judged on validation trajectories by its
median member: a single stray member says little of a rate, and ensembles are not chosen by their worst member. Nothing
here has seen a test trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from config import LARGEST_NUMBER
from reporting.escape import spreadsheet_text
from study.cells import Cell, short_name
from study.grid import Arms, Grid
from study.horizons import choose_horizons
from study.schemas import CHOSEN_HORIZONS, RATES, read_table
from study.stability import is_stray
from study.store import CellStore
from utils import InputError

BEYOND = 2  # how many rates are tried beyond the candidates, where the best one lies at an edge
_RATES = ["arm", "dataset", "fit_lr", "val_mse", "best", "worst", "stray", "is_chosen"]


@dataclass(frozen=True)
class Tuning:
    """What trials have decided.

    Attributes:
        rates: As ``rates_table`` makes it.
        horizons: As ``horizons.choose_horizons`` makes it.
    """

    rates: pd.DataFrame
    horizons: pd.DataFrame

    @classmethod
    def of(cls, trials: Sequence[Cell], store: CellStore) -> Tuning:
        """Decides by the trials, all of which are done.

        Raises:
            FloatingPointError: If an arm has failed with every rate on a dataset.
        """
        rates = rates_table(trials, store)
        chosen = set(rates[rates.is_chosen][["arm", "dataset", "fit_lr"]].itertuples(index=False, name=None))
        skills = {
            (trial.arm, short_name(trial.dataset)): store.read(trial.name).tables["skill"]
            for trial in trials
            if (trial.arm, short_name(trial.dataset), trial.config.fit_lr) in chosen
        }
        return cls(rates, choose_horizons(skills, list(dict.fromkeys(rates.dataset))))

    @classmethod
    def read(cls, folder: Path, arms: Arms, datasets: Sequence[str]) -> Tuning:
        """Reads what an earlier study has decided for arms and datasets of these names.

        Raises:
            InputError: If it has not decided all of it, or its tables are damaged.
        """
        advice = "give the folder of a study whose trials are done"
        shown = {spreadsheet_text(name): name for name in (*arms, *map(short_name, datasets))}
        try:
            rates = read_table(folder / "learning_rates.csv", RATES, advice, names=("arm", "dataset"))
            horizons = read_table(folder / "horizons.csv", CHOSEN_HORIZONS, advice, names=("arm", "dataset"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{str(folder)!r} has no learning_rates.csv and horizons.csv; {advice}") from None
        rates = rates.assign(arm=rates.arm.replace(shown), dataset=rates.dataset.replace(shown))
        horizons = horizons.assign(dataset=horizons.dataset.replace(shown))
        known = set(rates[rates.is_chosen][["arm", "dataset"]].itertuples(index=False, name=None))
        names = [short_name(dataset) for dataset in datasets]
        for name in names:
            if name not in set(horizons.dataset):
                raise InputError(f"{str(folder)!r} has no horizon for {name!r}")
            for arm in arms:
                if (arm, name) not in known:
                    raise InputError(f"{str(folder)!r} has no rate for the arm {arm!r} on {name!r}")
        return cls(
            rates[rates.arm.isin(arms) & rates.dataset.isin(names)].reset_index(drop=True),
            horizons[horizons.dataset.isin(names)].reset_index(drop=True),
        )

    @property
    def chosen(self) -> dict[tuple[str, str], float]:
        """Learning rates by arm and short name of the dataset."""
        rows = self.rates[self.rates.is_chosen]
        return dict(zip(zip(rows.arm, rows.dataset, strict=True), rows.fit_lr.astype(float), strict=True))

    @property
    def horizon(self) -> dict[str, int]:
        """Horizons by short name of the dataset."""
        return {row.dataset: int(row.horizon) for row in self.horizons.itertuples()}


def further_trials(trials: Sequence[Cell], store: CellStore, grid: Grid, candidates: int) -> list[Cell]:
    """Lists the trials that are needed beyond the edges of the rates that were tried; they go on by the same factor.

    Args:
        trials: All trials so far, which are done.
        store: Their results.
        grid: The grid that they are of.
        candidates: How many rates each arm was given; a single one is no choice, and has no edge.
    """
    if candidates < 2:
        return []
    further = []
    table = rates_table(trials, store, may_fail=True)
    given = {short_name(name): name for name in grid.datasets}
    for (arm, dataset), rows in table.groupby(["arm", "dataset"], sort=False):
        rates, errors = rows.sort_values("fit_lr")[["fit_lr", "val_mse"]].to_numpy().T
        best = int(np.argmin(errors))  # the lowest rate, where all have failed
        if len(rates) - candidates >= BEYOND or 0 < best < len(rates) - 1:
            continue
        beyond = rates[0] ** 2 / rates[1] if best == 0 else rates[-1] ** 2 / rates[-2]
        if 0 < beyond <= LARGEST_NUMBER:
            further.append(grid.trial(arm, given[dataset], float(f"{beyond:.2g}")))
    return further


def rates_table(trials: Sequence[Cell], store: CellStore, may_fail: bool = False) -> pd.DataFrame:
    """Lists the trials, arm by arm and dataset by dataset, from the lowest rate to the highest.

    Args:
        trials: Trials that are done.
        store: Their results.
        may_fail: Whether it is no error that an arm has failed with every rate.

    Returns:
        arm, dataset, fit_lr, val_mse (of the median member, normalised units; infinite where training failed), best,
        worst (those of the best and of the worst member), stray (how many members are, see ``stability.STRAY``),
        is_chosen.

    Raises:
        FloatingPointError: If an arm has failed with every rate on a dataset.
    """
    records = []
    for trial in trials:
        result, place = store.read(trial.name), (trial.arm, short_name(trial.dataset), trial.config.fit_lr)
        if result.failure is not None:
            records.append((*place, math.inf, math.nan, math.nan, math.nan))
            continue
        errors = result.tables["members"].val_mse
        stray = int(is_stray(np.sqrt(errors.to_numpy())).sum())
        records.append((*place, result.record.outcome.val_mse, errors.min(), errors.max(), stray))
    table = pd.DataFrame(records, columns=_RATES[:-1])
    order = {name: place for place, name in enumerate(dict.fromkeys([*table.arm, *table.dataset]))}
    table = table.sort_values(
        ["arm", "dataset", "fit_lr"], key=lambda column: column if column.name == "fit_lr" else column.map(order)
    ).reset_index(drop=True)
    best = table.groupby(["arm", "dataset"], sort=False).val_mse.idxmin()
    for (arm, dataset), row in best.items():
        if not may_fail and math.isinf(table.val_mse[row]):
            raise FloatingPointError(f"arm {arm} has diverged on {dataset} with every learning rate; give lower ones")
    return table.assign(is_chosen=table.index.isin(best))


def sensitivity_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Says how forgiving each arm is to its rate: how much larger the error is one candidate below and above.

    Args:
        rates: As ``rates_table`` makes it.

    Returns:
        arm, dataset, fit_lr (chosen), below, above (root mean squared validation error of the median member at the next
        lower and the next higher rate over that at the chosen one; infinite where that training failed, nan where no
        such rate was tried), stray (members at the chosen rate), is_edge (whether it is the lowest or highest tried).
    """
    records = []
    for (arm, dataset), rows in rates.groupby(["arm", "dataset"], sort=False):
        rows = rows.sort_values("fit_lr").reset_index(drop=True)
        at = int(np.flatnonzero(rows.is_chosen)[0])
        ratio = np.sqrt(rows.val_mse / rows.val_mse[at]).to_dict()
        records.append(
            {
                "arm": arm,
                "dataset": dataset,
                "fit_lr": rows.fit_lr[at],
                "below": ratio.get(at - 1, np.nan),
                "above": ratio.get(at + 1, np.nan),
                "stray": rows.stray[at],
                "is_edge": len(rows) > 1 and at in (0, len(rows) - 1),
            }
        )
    return pd.DataFrame(records)
