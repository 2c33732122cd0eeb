"""The grid of a study: arms x datasets x splits x seeds, and the trials that come before it (see ``tuning.py``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import LearnConfig, load_config
from data.audit import audit
from data.sources import load_dataset
from data.trajectories import Dataset
from study.cells import Cell, parse_name, short_name, simulate_probes, split_dataset, training_rows
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
        seeds: Seeds of the trainings.
        split_seeds: Seeds of splits by trajectories; every seed trains on every split. Trials have the first one.
        device: Where to compute.
        threads: Threads of every cell.
        simulator: Whether simulators test, too.
    """

    arms: Arms
    datasets: Sequence[str]
    seeds: Sequence[int]
    split_seeds: Sequence[int]
    device: str
    threads: int
    simulator: bool = False

    def __len__(self) -> int:
        return len(self.arms) * len(self.datasets) * len(self.split_seeds) * len(self.seeds)

    def trials(self, rates: Sequence[float]) -> list[Cell]:
        """Lists the first trials: every arm with every candidate on every dataset; with none each arm has its own."""
        return [
            self.trial(arm, dataset, rate)
            for dataset in self.datasets
            for arm in self.arms
            for rate in rates or [self.arms[arm].fit_lr]
        ]

    def trial(self, arm: str, dataset: str, rate: float) -> Cell:
        """Returns one trial."""
        return self._cell(arm, dataset, TRIAL_SEED, self.split_seeds[0], rate, is_trial=True)

    def cells(self, rates: Mapping[tuple[str, str], float]) -> list[Cell]:
        """Lists the cells of the study, seed by seed, so that a study that is cut short has whole seeds.

        Args:
            rates: Learning rates by arm and short name of the dataset.
        """
        return [
            self._cell(arm, dataset, seed, split_seed, rates[arm, short_name(dataset)], is_trial=False)
            for seed in self.seeds
            for split_seed in self.split_seeds
            for dataset in self.datasets
            for arm in self.arms
        ]

    def _cell(self, arm: str, dataset: str, seed: int, split_seed: int, rate: float, is_trial: bool) -> Cell:
        config = dataclasses.replace(self.arms[arm], seed=seed, split_seed=split_seed, fit_lr=rate)
        return Cell(arm, dataset, config, is_trial, self.device, self.threads, self.simulator and not is_trial)

    def differences(self) -> dict[str, dict[str, Any]]:
        """Returns the settings in which arms differ, each with its values by arm."""
        settings = {arm: config.to_dict() for arm, config in self.arms.items()}
        keys = [key for key in next(iter(settings.values())) if key not in ("seed", "split_seed")]
        values = {key: {arm: setting[key] for arm, setting in settings.items()} for key in keys}
        return {key: by_arm for key, by_arm in values.items() if len({str(value) for value in by_arm.values()}) > 1}


def check_places(grid: Grid, store: CellStore) -> None:
    """Checks that all cells can be kept, whatever arms and datasets are called, and that what is kept can be read.

    Raises:
        InputError: If the system takes no such path, something else is in the place of a cell, or a cell is damaged.
    """
    rates = {(arm, short_name(name)): config.fit_lr for arm, config in grid.arms.items() for name in grid.datasets}
    for cell in (*grid.trials([]), *grid.cells(rates)):
        store.check_place(cell)
        store.has(cell)


def check_done(cells: Sequence[Cell], datasets: Datasets, store: CellStore) -> None:
    """Checks that cells that are done already were made as they are asked for now.

    Raises:
        InputError: If the result of another request is in a cell's place, or a cell is damaged.
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


def load_datasets(names: Sequence[str], split_seeds: Sequence[int], simulator: bool, quiet: bool) -> Datasets:
    """Loads every dataset, says what was found about it, and checks that it can be split and learned.

    Args:
        names: As they were given; where they ask for some of the rows, the whole dataset is loaded, once.
        split_seeds: Seeds of the splits.
        simulator: Whether to check that their simulators can test.
        quiet: Whether to show no progress.

    Raises:
        InputError: If one cannot be used.
    """
    bases = {name: parse_name(name).base for name in names}
    loaded = {
        base: load_dataset(base, simulator_states=simulator, quiet=quiet) for base in dict.fromkeys(bases.values())
    }
    for base, dataset in loaded.items():
        for finding in audit(dataset):
            if finding.matters:
                warn(f"{base}: {finding}")
    datasets = {name: loaded[base] for name, base in bases.items()}
    for name, dataset in datasets.items():
        for split_seed in split_seeds:
            check_split(name, dataset, split_seed)
    for dataset in loaded.values() if simulator else ():
        simulate_probes(dataset, split_dataset(dataset, split_seeds[0]))
    return datasets


def check_split(name: str, dataset: Dataset, split_seed: int) -> None:
    """Checks that a dataset has enough to train, validate and test on.

    Raises:
        InputError: If it has not.
    """
    try:
        split, rows = split_dataset(dataset, split_seed), parse_name(name).rows
    except InputError as error:
        raise InputError(f"dataset {name!r}: {error}") from None
    if len(split.test) < 2 or len(split.holdout) < 1:
        raise InputError(
            f"dataset {name!r} leaves {len(split.test)} trajectories to test on, expected at least 2, as errors "
            f"vary between them; give a dataset of more than its {len(dataset.trajectories)}"
        )
    transitions = training_rows(dataset, split, rows, split_seed)
    if rows is not None and not 0 < rows <= len(transitions):
        raise InputError(
            f"dataset {name!r} has {len(training_rows(dataset, split, None, 0))} rows to train on; ask for fewer"
        )
    build_ensemble(LearnConfig(ensemble_size=1, hidden_size=()), transitions)
