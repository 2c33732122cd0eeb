"""The grid of a study: arms x datasets x seeds, and the learning rate that each arm gets.

Every arm chooses among the same candidates, before the study and with a seed outside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from config import LearnConfig, load_config
from data.audit import audit
from data.sources import load_dataset
from data.trajectories import Dataset, gather_transitions
from study.cells import Cell, split_dataset
from study.store import CellStore
from tracking.trackers import warn
from training.build import build_ensemble, find_kind
from utils import InputError

TRIAL_SEED = 10_000  # seed of the trainings that choose learning rates; those of a study are smaller

Arms = dict[str, LearnConfig]
Datasets = dict[str, Dataset]


# --- Cells ---


@dataclass(frozen=True)
class Grid:
    """What a study compares.

    Attributes:
        arms: Configurations by name; the study replaces their seeds and learning rates by those of each cell.
        datasets: Names of the datasets, as they were given.
        seeds: How many seeds there are, 0 to ``seeds - 1``.
        split_seed: Seed of the split by trajectories, the same for every cell.
        device: Where to compute.
        threads: Threads of every cell.
    """

    arms: Arms
    datasets: Sequence[str]
    seeds: int
    split_seed: int
    device: str
    threads: int

    def __len__(self) -> int:
        return len(self.arms) * len(self.datasets) * self.seeds

    def trials(self, rates: Sequence[float]) -> list[Cell]:
        """Lists the trainings that choose learning rates: every arm with every candidate on every dataset."""
        return [
            self._cell(arm, dataset, TRIAL_SEED, rate, is_trial=True)
            for dataset in self.datasets
            for arm in self.arms
            for rate in rates
        ]

    def cells(self, rates: pd.DataFrame) -> list[Cell]:
        """Lists the cells of the study, seed by seed, so that a study that is cut short has whole seeds.

        Args:
            rates: The learning rates of the arms, as ``choose_rates`` returns them.
        """
        chosen = rates[rates.is_chosen].drop_duplicates("arm").set_index("arm").fit_lr
        return [
            self._cell(arm, dataset, seed, float(chosen[arm]), is_trial=False)
            for seed in range(self.seeds)
            for dataset in self.datasets
            for arm in self.arms
        ]

    def _cell(self, arm: str, dataset: str, seed: int, rate: float, is_trial: bool) -> Cell:
        config = dataclasses.replace(self.arms[arm], seed=seed, split_seed=self.split_seed, fit_lr=rate)
        return Cell(arm, dataset, config, is_trial, self.device, self.threads)

    def differences(self) -> dict[str, dict[str, Any]]:
        """Returns the settings in which arms differ, each with its values by arm."""
        settings = {arm: config.to_dict() for arm, config in self.arms.items()}
        keys = [key for key in next(iter(settings.values())) if key not in ("seed", "split_seed")]
        values = {key: {arm: setting[key] for arm, setting in settings.items()} for key in keys}
        return {key: by_arm for key, by_arm in values.items() if len({str(value) for value in by_arm.values()}) > 1}


def check_done(cells: Sequence[Cell], datasets: Datasets, store: CellStore) -> None:
    """Checks that cells that are done already were made as they are asked for now.

    Raises:
        InputError: If the result of another request is in a cell's place.
    """
    for cell in cells:
        store.check_request(cell, datasets[cell.dataset].sha256)


# --- Arms and datasets ---


def load_arms(paths: Sequence[Path], overrides: Sequence[str]) -> Arms:
    """Reads the configurations of the arms, which are named by their files.

    Args:
        paths: YAML files.
        overrides: ``key=value`` settings of every arm.

    Raises:
        InputError: If one cannot be used.
    """
    arms = {path.stem: load_config(path, overrides) for path in paths}
    for config in arms.values():
        find_kind(config)
    return arms


def load_datasets(names: Sequence[str], split_seed: int, quiet: bool) -> Datasets:
    """Loads every dataset, says what was found about it, and checks that it can be split and learned.

    Raises:
        InputError: If one cannot be used.
    """
    datasets = {name: load_dataset(name, quiet=quiet) for name in names}
    for name, dataset in datasets.items():
        for finding in audit(dataset):
            if finding.matters:
                warn(f"{name}: {finding}")
        split = split_dataset(dataset, split_seed)
        if len(split.test) < 2 or len(split.holdout) < 1:
            raise InputError(
                f"dataset {name!r} leaves {len(split.test)} trajectories to test on, expected at least 2, as errors "
                f"vary between them; give a dataset of more than its {len(dataset.trajectories)}"
            )
        build_ensemble(LearnConfig(ensemble_size=1, hidden_size=()), gather_transitions(dataset, split.train))
    return datasets


# --- Learning rates ---


def earlier_rates(folder: Path, arms: Arms) -> pd.DataFrame:
    """Reads the learning rates that an earlier study has chosen for arms of these names.

    Raises:
        InputError: If it has chosen none, or none for one of these arms.
    """
    path = folder / "learning_rates.csv"
    try:
        rates = pd.read_csv(path)
    except OSError:
        raise InputError(f"{str(folder)!r} has no learning_rates.csv; give the folder of a study") from None
    if missing := [arm for arm in arms if arm not in set(rates.arm[rates.is_chosen])]:
        raise InputError(f"{str(path)!r} has no rate for the arm {missing[0]!r}")
    return rates[rates.arm.isin(arms)]


def given_rates(arms: Arms, rate: float | None) -> pd.DataFrame:
    """Gives all arms the same learning rate; None leaves each its own."""
    rates = {arm: config.fit_lr if rate is None else rate for arm, config in arms.items()}
    return pd.DataFrame([{"arm": arm, "fit_lr": rate, "is_chosen": True} for arm, rate in rates.items()])


def choose_rates(trials: Sequence[Cell], store: CellStore) -> pd.DataFrame:
    """Chooses each arm's rate: the lowest geometric mean over datasets of the members' mean validation error.

    Returns:
        arm, fit_lr, dataset, val_mse (infinite where training failed), is_chosen; one row per trial.

    Raises:
        FloatingPointError: If an arm has failed somewhere with every rate.
    """
    records = []
    for trial in trials:
        error = store.read(trial.name).record.outcome.val_mse
        records.append((trial.arm, trial.config.fit_lr, trial.dataset, math.inf if error is None else error))
    table = pd.DataFrame(records, columns=["arm", "fit_lr", "dataset", "val_mse"])
    score = np.log(table.val_mse).groupby([table.arm, table.fit_lr]).mean()
    for arm, best in score.groupby("arm").min().items():
        if best == math.inf:
            raise FloatingPointError(f"arm {arm} has diverged with every learning rate; give lower --learning_rates")
    chosen = score.groupby("arm").idxmin().tolist()
    return table.assign(is_chosen=[pair in chosen for pair in zip(table.arm, table.fit_lr, strict=True)])
