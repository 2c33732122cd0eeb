"""One cell of a study: an arm trained and evaluated on one dataset with one seed, and the folder that keeps it.

cell.json      what was asked for (``request``), how it ended (``outcome``), where it came from (``origin``)
training.csv   one row per epoch and member, as ``learn_model.py`` writes them
*.csv          tables of ``evaluation.evaluate``, of which those rows are kept that studies use

``run_cell`` is a function of its arguments alone, so that a cell gives the same numbers in whichever process it runs,
if processors are of one kind; ``Cell.write`` makes its folder appear whole, however the process ends.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from config import LearnConfig
from data.trajectories import Dataset, gather_transitions, split_trajectories
from evaluation.evaluate import evaluate, summarise
from tracking.trackers import NullTracker, Row
from training.build import build_ensemble
from training.loop import train_ensemble
from training.scores import score_members
from utils import InputError, Origin, atomic_write

HOLDOUT_RATIO = TEST_RATIO = 0.2
HORIZONS = (1, 5, 10, 25, 50, 100, 200)
MAX_STARTS = 256

# The tables of an evaluation that a study keeps, and which of their rows; None for all.
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


@dataclass(frozen=True)
class Cell:
    """What to train and how to evaluate it; everything that decides the result.

    Attributes:
        arm: Name of the configuration.
        dataset: Name of the dataset.
        config: Settings, seed and learning rate included; its ``split_seed`` is the study's.
        is_trial: Whether the cell serves the choice of a learning rate only: trained, but never tested.
        device: Where to compute.
        threads: To compute with: sums may depend on their number in the last bits.
    """

    arm: str
    dataset: str
    config: LearnConfig
    is_trial: bool
    device: str
    threads: int

    @property
    def name(self) -> str:
        """Place of the cell in a study, as a relative path."""
        dataset = Path(self.dataset).stem
        if self.is_trial:
            return f"trials/{self.arm}/{dataset}/rate-{self.config.fit_lr:g}"
        return f"cells/{self.arm}/{dataset}/seed-{self.config.seed}"

    def request(self, sha256: str) -> dict[str, Any]:
        """Returns what decides the result, in plain types; a cell is done only where this is equal."""
        return {
            "arm": self.arm,
            "dataset": self.dataset,
            "sha256": sha256,
            "holdout_ratio": HOLDOUT_RATIO,
            "test_ratio": TEST_RATIO,
            "device": self.device,
            "threads": self.threads,
            "config": self.config.to_dict(),
        }


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        record: Contents of ``cell.json``.
        tables: By name, ``training`` among them; of a failed run that one only.
    """

    record: dict[str, Any]
    tables: dict[str, pd.DataFrame]

    @property
    def failure(self) -> str | None:
        """Why training failed; None where it did not."""
        return self.record["outcome"]["failure"]

    def write(self, folder: Path) -> None:
        """Makes the cell's folder, all at once."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, table in self.tables.items():
                table.to_csv(unfinished / f"{name}.csv", index=False, float_format="%.9g")
            with atomic_write(unfinished / "cell.json", "w") as file:
                json.dump(self.record, file, indent=2)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Reads a cell's folder."""
        record = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        return cls(record, {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))})


def check_request(folder: Path, request: dict[str, Any]) -> None:
    """Checks that a cell's folder, where there is one, holds the result of this request.

    Raises:
        InputError: If it holds that of another.
    """
    if not folder.exists():
        return
    found = json.loads((folder / "cell.json").read_text(encoding="utf-8"))["request"]
    found, wanted = ({**given, **given["config"], "config": None} for given in (found, request))
    for key in sorted(wanted.keys() | found.keys()):
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{str(folder)!r} was made with {key} {found.get(key)!r}, asked for is {wanted.get(key)!r}; give "
                "another --output, or delete that folder to have its cell made again"
            )


class _Recorder(NullTracker):
    """Keeps the rows of training."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Takes the numbers of one epoch."""
        self.rows += rows


def run_cell(cell: Cell, dataset: Dataset) -> Result:
    """Trains and evaluates one cell on the dataset that it names; a training that diverges is a result, too."""
    start, recorder = time.monotonic(), _Recorder()
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        with threadpool_limits(cell.threads, user_api="blas"):
            tables, outcome = _train_and_evaluate(cell, dataset, recorder)
    except FloatingPointError as error:
        tables, outcome = {}, {"failure": str(error), "val_mse": None, "metrics": {}}
    finally:
        torch.set_num_threads(threads)
    record = {
        "request": cell.request(dataset.sha256),
        "outcome": outcome | {"seconds": round(time.monotonic() - start, 1)},
        "origin": dataclasses.asdict(Origin.here()),
    }
    return Result(record, {"training": pd.DataFrame(recorder.rows), **tables})


def _train_and_evaluate(
    cell: Cell, dataset: Dataset, tracker: NullTracker
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    split = split_trajectories(dataset, cell.config.split_seed, holdout_ratio=HOLDOUT_RATIO, test_ratio=TEST_RATIO)
    transitions = gather_transitions(dataset, split.train)
    ensemble = build_ensemble(cell.config, transitions).to(cell.device)
    train, holdout = ensemble.normalise(transitions), ensemble.normalise(gather_transitions(dataset, split.holdout))
    train_ensemble(ensemble, cell.config, train, holdout, tracker)
    scores = score_members(ensemble, train, holdout)
    outcome = {"failure": None, "val_mse": sum(score["val_mse"] for score in scores) / len(scores)}
    if cell.is_trial:
        return {}, outcome | {"metrics": {}}
    tables = evaluate(ensemble, dataset, split.test, transitions, horizons=HORIZONS, max_starts=MAX_STARTS)
    kept = {name: tables[name].query(rows) if rows else tables[name] for name, rows in _KEPT.items()}
    return kept, outcome | {"metrics": summarise(tables, HORIZONS)}
