"""One cell of a study: an arm trained and evaluated on one dataset with one seed.

``run_cell`` depends on its arguments alone: on processors of one kind, a cell gives the same numbers in whichever
process it runs. Only the time that it took differs, which no table holds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from config import LearnConfig, config_from_dict
from data.sources import source_attributes
from data.splits import Split, split_trajectories
from data.trajectories import Dataset, Transitions, gather_transitions
from dynamics_model import DynamicsEnsemble
from evaluation.evaluate import evaluate, summarise
from evaluation.oracle import make_probes
from evaluation.predictions import Rows, gather_rows, predict_one_step
from evaluation.rollouts import validation_skill
from study.horizons import HORIZONS, MAX_STARTS
from study.policies import load_snapshots, policy_table
from study.schemas import OF_CELLS, OF_TRIALS, TABLES, Schema, check_tables, read_table
from tracking.records import parse_record
from training.batches import normalise_rows
from training.build import build_ensemble
from training.loop import train_ensemble
from training.scores import metric_rows, score_members
from utils import ROOT, InputError, Origin, atomic_write, read_file

FORMAT = 2  # of cell.json and study.json; raised when older ones cannot be analysed any more
HOLDOUT_RATIO = TEST_RATIO = 0.2
SIMULATED = ROOT / "reports" / "simulated"  # what policies earn in the simulator: made once, for all cells
_LONGEST = 1e9  # seconds that a part of a cell may have taken
_AGAIN = "bring it back, or delete the cell's folder to have it made again"

# The tables of an evaluation that a study keeps, and which of their rows; None keeps all.
_KEPT = {
    "one_step": "dimension == 'all'",
    "likelihood": "dimension == 'all'",
    "calibration": "dimension == 'all'",
    "reliability": None,
    "calibrated_horizon": None,
    "trajectories": None,
    "uncertainty": "units == 'normalised'",
    "rollout": "not propagation.str.startswith('member_')",
    "starts": "propagation in ('mean', 'ts1', 'tsinf', 'mean_clamped', 'tsinf_clamped')",
}


# --- What is asked for ---


class CellKey(NamedTuple):
    """The place of a cell in the grid; ``dataset`` is its short name, as in tables, ``split`` the seed of the split."""

    arm: str
    dataset: str
    seed: int
    split: int = 0


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
        simulator: Whether the simulator of the dataset's environment tests, too.
        config: Settings, seed and learning rate included.
    """

    arm: str
    dataset: str
    sha256: str
    holdout_ratio: float
    test_ratio: float
    device: str
    threads: int
    simulator: bool
    config: LearnConfig

    @property
    def rows(self) -> int | None:
        """Rows to train on; None for all there are."""
        return parse_name(self.dataset).rows

    def settings(self) -> dict[str, Any]:
        """Returns everything by name, in plain types; the configuration's settings stand among the rest."""
        return {name: value for name, value in vars(self).items() if name != "config"} | self.config.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Returns the request as a dictionary for JSON."""
        return {**vars(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> CellRequest:
        """Reads a request back; a setting that did not exist yet when it was written gets its default.

        Args:
            values: What ``to_dict`` returned.
            source: Where the values come from, for the error message.

        Raises:
            ValueError: If it is no request, or an InputError if a setting does not exist any more.
        """
        plain = parse_record(dict[str, Any], values, "request")
        settings = parse_record(dict[str, Any], plain.get("config"), "config")
        return parse_record(cls, {**plain, "config": config_from_dict(settings, source)}, "request")


@dataclass(frozen=True)
class Cell:
    """A training to do, and its place in a study.

    Attributes:
        arm: Name of the configuration.
        dataset: Name of the dataset, as it was given.
        config: Settings, seed, learning rate and the seed of the split included.
        is_trial: Whether the cell only helps to choose a learning rate: it is trained, but not tested.
        device: Where to compute.
        threads: Threads to compute with.
        simulator: Whether the simulator of the dataset's environment tests, too; a trial never asks it.
    """

    arm: str
    dataset: str
    config: LearnConfig
    is_trial: bool
    device: str
    threads: int
    simulator: bool = False

    @property
    def key(self) -> CellKey:
        """Place of the cell in the grid."""
        return CellKey(self.arm, short_name(self.dataset), self.config.seed, self.config.split_seed)

    @property
    def name(self) -> str:
        """Place of the cell in the study's folder, as a relative path."""
        place = f"{folder_name(self.arm)}/{folder_name(short_name(self.dataset))}"
        if self.is_trial:
            return f"trials/{place}/rate-{self.config.fit_lr:g}"
        return f"cells/{place}/split-{self.config.split_seed}-seed-{self.config.seed}"

    def request(self, sha256: str) -> CellRequest:
        """Returns what determines the result on a dataset with this checksum; a cell is done only if this is equal."""
        ratios = HOLDOUT_RATIO, TEST_RATIO
        return CellRequest(
            self.arm, self.dataset, sha256, *ratios, self.device, self.threads, self.simulator, self.config
        )


class NamedRows(NamedTuple):
    """What a dataset's name asks for: ``NAME`` or, to train on some of the rows only, ``NAME:ROWS``."""

    base: str
    rows: int | None


def parse_name(dataset: str) -> NamedRows:
    """Takes the number of training rows off a dataset's name, where there is one."""
    found = re.fullmatch(r"(.*[^:]):([0-9]{1,18})", dataset, re.DOTALL)
    if found is None or os.path.exists(dataset):  # noqa: PTH110 (it may be no path at all)
        return NamedRows(dataset, None)
    return NamedRows(found[1], int(found[2]))


def short_name(dataset: str) -> str:
    """Returns the name of a dataset in tables and folders: of a path the file's, without its ending."""
    base, rows = parse_name(dataset)
    return Path(base).stem if rows is None else f"{Path(base).stem}-{rows}"


def folder_name(name: str) -> str:
    """Returns the name of a folder for an arm or a dataset; a name that leads elsewhere is spelled out."""
    return name if name.strip(".") else f"{len(name)}-dots"


def split_dataset(dataset: Dataset, split_seed: int) -> Split:
    """Splits the trajectories as all cells do: 60 % train, 20 % validate, 20 % test."""
    return split_trajectories(dataset, split_seed, holdout_ratio=HOLDOUT_RATIO, test_ratio=TEST_RATIO)


def training_rows(dataset: Dataset, split: Split, rows: int | None, split_seed: int) -> Transitions:
    """Returns the rows to train on; fewer of them are those of whole trajectories in random order, up to the last.

    So a smaller set is part of every larger one, and all sizes share the trajectories that validate and test.

    Args:
        dataset: The whole dataset.
        split: Its split.
        rows: How many rows to train on; None takes all.
        split_seed: Seed of the split, and of that order.
    """
    if rows is None:
        return gather_transitions(dataset, split.train)
    order = np.random.default_rng(split_seed).permutation(split.train)
    everything = gather_transitions(dataset, order)
    return Transitions(*(None if part is None else part[:rows] for part in vars(everything).values()))


# --- The result ---


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        failure: Why training failed; None where it did not.
        val_mse: Validation error of the median member, normalised units; None where training failed.
        metrics: Headline numbers of the evaluation by name; empty for trials and where training failed.
    """

    failure: str | None
    val_mse: float | None
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        """Checks that it says one thing.

        Raises:
            ValueError: If not.
        """
        if (self.failure is None) == (self.val_mse is None) or not (self.val_mse is None or self.val_mse >= 0):
            raise ValueError(f"failure is {self.failure!r:.40}, but val_mse is {self.val_mse}")
        if bad := next((name for name, value in self.metrics.items() if not math.isfinite(value)), None):
            raise ValueError(f"the metric {bad[:40]!r} is no finite number")


@dataclass(frozen=True)
class CellRecord:
    """The contents of ``cell.json``: what was asked for, how it ended, what it took, and which code made it.

    Attributes:
        request: What was asked for.
        outcome: How it ended.
        timing: Seconds by part of the work, in the order in which it was done.
        origin: Which code made it.
    """

    request: CellRequest
    outcome: CellOutcome
    timing: dict[str, float]
    origin: Origin

    def __post_init__(self) -> None:
        """Checks that it took some time.

        Raises:
            ValueError: If not.
        """
        if not all(0 <= seconds <= _LONGEST for seconds in self.timing.values()):
            raise ValueError("its timing is not in seconds")

    @property
    def seconds(self) -> float:
        """Time that the cell took."""
        return sum(self.timing.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as a dictionary for JSON."""
        return {
            "format": FORMAT,
            "request": self.request.to_dict(),
            "outcome": vars(self.outcome),
            "timing": self.timing,
            "origin": vars(self.origin),
        }

    @classmethod
    def from_dict(cls, values: Any, source: str) -> CellRecord:
        """Reads back what ``to_dict`` returned; the source is named in error messages.

        Raises:
            InputError: If another version wrote it, or it is damaged.
        """
        check_format(values, source)
        try:
            plain = {name: value for name, value in values.items() if name != "format"}
            return parse_record(
                cls, {**plain, "request": CellRequest.from_dict(plain.get("request"), source)}, "the record"
            )
        except ValueError as error:
            raise InputError(f"{source} is damaged ({error}); {_AGAIN}") from None


def read_json(path: Path, advice: str) -> Any:
    """Reads a file of JSON.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it cannot be read; the message ends with the advice.
    """
    try:
        return json.loads(read_file(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, or JSON nested too deeply
        raise InputError(f"{path} is damaged ({error}); {advice}") from None


def check_format(record: Any, source: str) -> None:
    """Checks that this version can read a ``cell.json`` or ``study.json``.

    Raises:
        InputError: If it cannot.
    """
    if not isinstance(record, dict):
        raise InputError(f"{source} is damaged: it holds no record; give another --output, or delete it")
    found = record.get("format", 1)
    if type(found) is not int or found != FORMAT:
        raise InputError(
            f"{source} was made by another version (format {found!r:.20}, expected {FORMAT}); give another --output, "
            "or check that version out"
        )


@dataclass(frozen=True)
class Result:
    """The result of a cell.

    Attributes:
        record: The contents of ``cell.json``.
        tables: By name: ``training`` (one row per epoch and member, as ``learn_model.py`` writes them), ``members`` (as
            ``members_table`` makes it) and ``skill`` (as ``rollouts.validation_skill`` makes it); of a cell that was
            tested tables of ``evaluation.evaluate``, too, and those of ``error_tables``.
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
        """Reads the folder of a cell.

        Raises:
            FileNotFoundError: If there is none, or it has no ``cell.json``: it is not whole.
            InputError: If something in it is damaged.
        """
        record = read_record(folder)
        tables = {
            path.stem: read_table(path, TABLES.get(path.stem, Schema()), _AGAIN)
            for path in sorted(folder.glob("*.csv"))
        }
        check_tables(tables, str(folder), _AGAIN)
        return cls(record, tables)

    def is_whole(self, is_trial: bool) -> bool:
        """Whether all tables are there that a trial, or a cell that was tested, has."""
        expected = frozenset() if self.failure is not None else OF_TRIALS if is_trial else OF_CELLS
        return expected <= {name for name, table in self.tables.items() if len(table)}


def read_record(folder: Path) -> CellRecord:
    """Reads ``cell.json`` in the folder of a cell.

    Raises:
        FileNotFoundError: If there is none.
        InputError: If it is damaged.
    """
    path = folder / "cell.json"
    return CellRecord.from_dict(read_json(path, _AGAIN), source=str(path))


# --- Running a cell ---


class Stopwatch:
    """Measures what parts of a cell take.

    Attributes:
        seconds: By part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to that of a part; a block that fails counts, too."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)


def run_cell(cell: Cell, dataset: Dataset) -> Result:
    """Trains and evaluates one cell on its dataset; that training diverged is a result, too."""
    watch, tables, metrics, failure = Stopwatch(), {}, {}, None
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        with threadpool_limits(cell.threads, user_api="blas"):
            metrics = _train_and_evaluate(cell, dataset, tables, watch)
    except FloatingPointError as error:
        failure = str(error)
    finally:
        torch.set_num_threads(threads)
    val_mse = float(tables["members"].val_mse.median()) if failure is None else None
    outcome = CellOutcome(failure, val_mse, metrics)
    # A table without rows would be a file that cannot be read.
    tables = {name: table for name, table in tables.items() if len(table)}
    return Result(CellRecord(cell.request(dataset.sha256), outcome, watch.seconds, Origin.here()), tables)


def _train_and_evaluate(
    cell: Cell, dataset: Dataset, tables: dict[str, pd.DataFrame], watch: Stopwatch
) -> dict[str, float]:
    """Returns the headline numbers of the evaluation; a trial has none.

    Args:
        cell: What to train and evaluate.
        dataset: The dataset that it names.
        tables: Filled with the tables of the result; the caller has what there is even if training fails.
        watch: Measures what the parts take.
    """
    config = cell.config
    with watch.part("data"):
        split = split_dataset(dataset, config.split_seed)
        transitions = training_rows(dataset, split, parse_name(cell.dataset).rows, config.split_seed)
        ensemble = build_ensemble(config, transitions).to(cell.device)
        train = normalise_rows(ensemble, transitions)
        holdout = normalise_rows(ensemble, gather_transitions(dataset, split.holdout))
    training = []
    with watch.part("training"):
        try:
            for epoch in train_ensemble(ensemble, config, train, holdout):
                training += metric_rows(ensemble, config, epoch)
        finally:
            tables["training"] = pd.DataFrame(training)
    with watch.part("validation"):
        tables["members"] = members_table(score_members(ensemble, train, holdout))
        tables["skill"] = validation_skill(ensemble, dataset, split.holdout, HORIZONS, MAX_STARTS)
    if cell.is_trial:
        return {}
    probes = {}
    if cell.simulator:
        with watch.part("policies"):
            values = policy_table(ensemble, dataset, transitions, SIMULATED)
        if values is not None:
            tables["policy_values"] = values
        with watch.part("probes"):
            probes = simulate_probes(dataset, split)
    with watch.part("test"):
        found = evaluate(
            ensemble, dataset, split.test, transitions, probes=probes, horizons=HORIZONS, max_starts=MAX_STARTS
        )
    with watch.part("errors"):
        tables |= error_tables(ensemble, dataset, split.test)
    kept = {name: rows for name, rows in _KEPT.items() if name in found}
    tables |= {name: found[name].query(rows) if rows else found[name] for name, rows in kept.items()}
    return summarise(found, HORIZONS)


def simulate_probes(dataset: Dataset, split: Split) -> dict[str, Rows]:
    """Makes rows that the dataset does not hold, the same for all models of one split.

    Raises:
        InputError: If the dataset does not say which simulator made it and in which states, or it is not here.
    """
    noise = float(source_attributes(dataset.name).get("process_noise", 0.0))
    policies = list(load_snapshots(dataset.env_name).values())
    return make_probes(dataset, split.test, seed=0, policies=policies, process_noise=noise)


def members_table(scores: list[dict[str, float | None]]) -> pd.DataFrame:
    """Lists the errors of the members' final weights.

    Returns:
        model_id, train_mse, val_mse (normalised units).
    """
    table = pd.DataFrame(scores)[["train_mse", "val_mse"]]
    table.insert(0, "model_id", np.arange(len(table)))
    return table


def error_tables(ensemble: DynamicsEnsemble, dataset: Dataset, indices: np.ndarray) -> dict[str, pd.DataFrame]:
    """Returns what resampling needs of the one-step errors on some trajectories, normalised units.

    Returns:
        Two tables:

        - ``row_errors``: trajectory, error: root mean square over dimensions of the error of the ensemble's mean, a row
          per transition, to five decimals;
        - ``member_products``: first, second (members, first <= second), product: mean over rows and dimensions of the
          product of their errors. The squared error of the mean of any members is the mean of their products.
    """
    rows = gather_rows(dataset, indices)
    errors = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states).errors
    by_row = np.sqrt(np.square(errors.mean(axis=0)).mean(axis=1)).round(5)
    products = np.einsum("ird,jrd->ij", errors, errors) / errors[0].size
    first, second = np.triu_indices(len(ensemble))
    return {
        "row_errors": pd.DataFrame({"trajectory": rows.trajectory, "error": by_row}),
        "member_products": pd.DataFrame({"first": first, "second": second, "product": products[first, second]}),
    }
