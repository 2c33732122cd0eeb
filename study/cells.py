"""One cell of a study: an arm trained and evaluated on one dataset with one seed.

``run_cell`` depends on its arguments alone: on processors of one kind, a cell gives the same numbers in whichever
process it runs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from config import LearnConfig, config_from_dict
from data.splits import Split, split_trajectories
from data.trajectories import Dataset, gather_transitions
from evaluation.evaluate import evaluate, summarise
from training.batches import normalise_rows
from training.build import build_ensemble
from training.loop import train_ensemble
from training.scores import metric_rows, score_members
from utils import Origin, atomic_write

HOLDOUT_RATIO = TEST_RATIO = 0.2
HORIZONS = (1, 5, 10, 25, 50, 100, 200)
MAX_STARTS = 256

# The tables of an evaluation that a study keeps, and which of their rows; None keeps all.
_KEPT = {
    "one_step": "dimension == 'all'",
    "likelihood": "dimension == 'all'",
    "calibration": "dimension == 'all'",
    "reliability": None,
    "calibrated_horizon": None,
    "trajectories": None,
    "rollout": "propagation in ('mean', 'ts1', 'tsinf', 'no_change')",
    "starts": "propagation == 'tsinf'",
}


# --- What is asked for ---


class CellKey(NamedTuple):
    """The place of a cell in the grid; ``dataset`` is its short name, as in tables."""

    arm: str
    dataset: str
    seed: int


@dataclass(frozen=True)
class CellRequest:
    """Everything that determines the result of a cell.

    Attributes:
        arm: Name of the configuration.
        dataset: Name of the dataset, as it was given.
        sha256: Checksum of the dataset.
        holdout_ratio: Share of the trajectories to validate on.
        test_ratio: Share of the trajectories to test on.
        device: Where to compute.
        threads: Threads to compute with; the last bits of sums may depend on their number.
        config: Settings, seed and learning rate included.
    """

    arm: str
    dataset: str
    sha256: str
    holdout_ratio: float
    test_ratio: float
    device: str
    threads: int
    config: LearnConfig

    def settings(self) -> dict[str, Any]:
        """Returns everything by name, in plain types; the configuration's settings stand among the rest."""
        return {name: value for name, value in vars(self).items() if name != "config"} | self.config.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Returns the request as a dictionary for JSON."""
        return {**vars(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> CellRequest:
        """Reads a request back; a setting that did not exist yet when it was written gets its default.

        Args:
            values: What ``to_dict`` returned.
            source: Where the values come from, for the error message.

        Raises:
            InputError: If there is a setting that does not exist any more.
        """
        return cls(**{**values, "config": config_from_dict(values["config"], source)})


@dataclass(frozen=True)
class Cell:
    """A training to do, and its place in a study.

    Attributes:
        arm: Name of the configuration.
        dataset: Name of the dataset, as it was given.
        config: Settings, seed and learning rate included; its ``split_seed`` is the study's.
        is_trial: Whether the cell only helps to choose a learning rate: it is trained, but not tested.
        device: Where to compute.
        threads: Threads to compute with.
    """

    arm: str
    dataset: str
    config: LearnConfig
    is_trial: bool
    device: str
    threads: int

    @property
    def key(self) -> CellKey:
        """Place of the cell in the grid."""
        return CellKey(self.arm, short_name(self.dataset), self.config.seed)

    @property
    def name(self) -> str:
        """Place of the cell in the study's folder, as a relative path."""
        if self.is_trial:
            return f"trials/{self.arm}/{short_name(self.dataset)}/rate-{self.config.fit_lr:g}"
        return f"cells/{self.arm}/{short_name(self.dataset)}/seed-{self.config.seed}"

    def request(self, sha256: str) -> CellRequest:
        """Returns what determines the result on a dataset with this checksum; a cell is done only if this is equal."""
        return CellRequest(
            self.arm, self.dataset, sha256, HOLDOUT_RATIO, TEST_RATIO, self.device, self.threads, self.config
        )


def short_name(dataset: str) -> str:
    """Returns the name of a dataset in tables and folders: of a path the file's, without its ending."""
    return Path(dataset).stem


def split_dataset(dataset: Dataset, split_seed: int) -> Split:
    """Splits the trajectories as all cells do: 60 % train, 20 % validate, 20 % test."""
    return split_trajectories(dataset, split_seed, holdout_ratio=HOLDOUT_RATIO, test_ratio=TEST_RATIO)


# --- The result ---


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        failure: Why training failed; None where it did not.
        val_mse: Mean validation error of the members, normalised units; None where training failed.
        metrics: Headline numbers of the evaluation by name; empty for trials and where training failed.
        seconds: Time that the cell took.
    """

    failure: str | None
    val_mse: float | None
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class CellRecord:
    """The contents of ``cell.json``: what was asked for, how it ended, and which code made it."""

    request: CellRequest
    outcome: CellOutcome
    origin: Origin

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as a dictionary for JSON."""
        return {"request": self.request.to_dict(), "outcome": vars(self.outcome), "origin": vars(self.origin)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> CellRecord:
        """Reads back what ``to_dict`` returned; the source is named in error messages."""
        request = CellRequest.from_dict(values["request"], source)
        return cls(request, CellOutcome(**values["outcome"]), Origin(**values["origin"]))


@dataclass(frozen=True)
class Result:
    """The result of a cell.

    Attributes:
        record: The contents of ``cell.json``.
        tables: By name: ``training`` (one row per epoch and member, as ``learn_model.py`` writes them) and, of a cell
            that was tested, tables of ``evaluation.evaluate``.
    """

    record: CellRecord
    tables: dict[str, pd.DataFrame]

    @property
    def failure(self) -> str | None:
        """Why training failed; None where it did not."""
        return self.record.outcome.failure

    def write(self, folder: Path) -> None:
        """Writes a folder with ``cell.json`` and a CSV file per table; it appears whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, table in self.tables.items():
                table.to_csv(unfinished / f"{name}.csv", index=False, float_format="%.9g")
            with atomic_write(unfinished / "cell.json", "w") as file:
                json.dump(self.record.to_dict(), file, indent=2)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Reads the folder of a cell."""
        return cls(read_record(folder), {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))})


def read_record(folder: Path) -> CellRecord:
    """Reads ``cell.json`` in the folder of a cell."""
    path = folder / "cell.json"
    return CellRecord.from_dict(json.loads(path.read_text(encoding="utf-8")), source=str(path))


# --- Running a cell ---


def run_cell(cell: Cell, dataset: Dataset) -> Result:
    """Trains and evaluates one cell on its dataset; that training diverged is a result, too."""
    start, training = time.monotonic(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    failure, val_mse, metrics, tables = None, None, {}, {}
    try:
        with threadpool_limits(cell.threads, user_api="blas"):
            val_mse, metrics, tables = _train_and_evaluate(cell, dataset, training)
    except FloatingPointError as error:
        failure = str(error)
    finally:
        torch.set_num_threads(threads)
    outcome = CellOutcome(failure, val_mse, metrics, seconds=round(time.monotonic() - start, 1))
    if training:  # a table without rows would be a file that cannot be read
        tables = {"training": pd.DataFrame(training), **tables}
    return Result(CellRecord(cell.request(dataset.sha256), outcome, Origin.here()), tables)


def _train_and_evaluate(
    cell: Cell, dataset: Dataset, training: list[dict[str, float | int | None]]
) -> tuple[float, dict[str, float], dict[str, pd.DataFrame]]:
    """Returns the mean validation error, the headline numbers and the tables of the evaluation.

    Args:
        cell: What to train and evaluate.
        dataset: The dataset that it names.
        training: Filled with the rows of ``training.csv``; the caller has them even if training fails.
    """
    split = split_dataset(dataset, cell.config.split_seed)
    transitions = gather_transitions(dataset, split.train)
    ensemble = build_ensemble(cell.config, transitions).to(cell.device)
    train = normalise_rows(ensemble, transitions)
    holdout = normalise_rows(ensemble, gather_transitions(dataset, split.holdout))
    for epoch in train_ensemble(ensemble, cell.config, train, holdout):
        training += metric_rows(ensemble, cell.config, epoch)
    scores = score_members(ensemble, train, holdout)
    val_mse = sum(score["val_mse"] for score in scores) / len(scores)
    if cell.is_trial:
        return val_mse, {}, {}
    tables = evaluate(ensemble, dataset, split.test, transitions, horizons=HORIZONS, max_starts=MAX_STARTS)
    kept = {name: tables[name].query(rows) if rows else tables[name] for name, rows in _KEPT.items()}
    return val_mse, summarise(tables, HORIZONS), kept
