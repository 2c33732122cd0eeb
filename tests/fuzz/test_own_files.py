"""What the project itself wrote, with some of its bytes changed: read, or refused in an error that says so."""

import contextlib
import itertools
import json
import resource
import shutil
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from config import LearnConfig
from data.trajectories import Transitions
from study.cells import Cell, CellOutcome, CellRecord, Result
from study.schemas import TABLES
from study.store import CellStore, pack, read_packed
from study.tuning import Tuning
from tracking.checkpoints import CheckpointFiles
from tracking.csv_tracker import CsvTracker, read_rows
from tracking.run_folder import RunFolder, RunOrigin, RunRequest, RunShown
from training.batches import normalise_rows
from training.build import build_ensemble
from training.checkpoint import check_checkpoint
from training.loop import train_ensemble
from training.scores import metric_columns, metric_rows
from utils import InputError, Origin

SECONDS, BYTES = 30, 2**30  # what reading a file may take at most


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was cut off after its second epoch, its request, and the check of its checkpoints."""
    config = LearnConfig(ensemble_size=2, hidden_size=(3,), batch_size=20, fit_epochs=4, kind="probabilistic")
    request = RunRequest("data.hdf5", "ab" * 32, 0.2, None, 0.0, False, config.to_dict())
    folder = RunFolder.create(
        tmp_path_factory.mktemp("run") / "logs", "run", request, RunOrigin("abc", {"python": "3"}, "learn_model.py")
    )
    folder.hold(config.to_yaml(), "none\n")
    folder.update(shown=RunShown({"kind": "probabilistic"}, 40, 5, 2), mlflow_run_id="ab" * 16)
    draw = np.random.default_rng(0)
    states, actions = draw.normal(size=(40, 2)).astype("f4"), draw.normal(size=(40, 1)).astype("f4")
    rows = Transitions(states, actions, states + draw.normal(size=states.shape).astype("f4"), None)
    ensemble = build_ensemble(config, rows)
    tracker = CsvTracker(folder.metrics_csv, metric_columns(ensemble))
    train = normalise_rows(ensemble, rows)
    for epoch in itertools.islice(train_ensemble(ensemble, config, train, train), 2):
        tracker.log_epoch(epoch.index, metric_rows(ensemble, config, epoch))
        folder.checkpoints.save(epoch.checkpoint())
    (folder.path / "checkpoint.before").unlink()
    folder._lock.release()
    return folder.path, request, partial(check_checkpoint, ensemble=ensemble, config=config, rows=len(states))


@pytest.fixture
def place(run, tmp_path):
    """A copy of the run's folder, to damage."""
    return shutil.copytree(run[0], tmp_path / "logs" / "run")


@contextlib.contextmanager
def bounds():
    """Bounds time and memory, and lets an InputError pass that says something."""
    before, started = peak(), time.monotonic()
    try:
        yield
    except InputError as error:
        assert str(error)
    assert time.monotonic() - started < SECONDS
    assert peak() - before < BYTES


def peak():
    """Most bytes of memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def change(path, mutate):
    path.write_bytes(mutate(path.read_bytes()))


def is_equal(one, other):
    """Whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other


def test_checkpoints(run, place, mutate):
    """What is read back is what was saved: every byte that matters is under a checksum."""
    saved = CheckpointFiles(place).load("cpu", run[2])
    change(place / "checkpoint", mutate)
    with bounds():
        assert is_equal(CheckpointFiles(place).load("cpu", run[2]), saved)


def test_records_of_runs(run, place, mutate):
    change(place / "run.json", mutate)
    with bounds():
        found = RunFolder.find_unfinished(place.parent, "run", run[1], {})
        assert found.record.request == run[1]
        json.dumps(found.record.to_dict())
        assert found.metrics_csv
        found.hold("a: 1\n", "none\n")
        found._lock.release()


def test_records_of_other_runs_do_no_harm(run, place, mutate):
    change(place / "run.json", mutate)
    with bounds():
        found = RunFolder.find_unfinished(place.parent, None, run[1], {})
        assert found is None or found.record.request == run[1]


def test_metrics_of_runs(place, mutate):
    written = read_rows(place / "metrics.csv")
    change(place / "metrics.csv", mutate)
    for read in (read_rows, lambda path: CsvTracker(path, list(written[0]), resume_epoch=2).kept_rows):
        with bounds():
            for row in read(place / "metrics.csv"):
                assert type(row["step"]) is type(row["model_id"]) is int
                assert all(value is None or type(value) is float for value in list(row.values())[2:])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with two cells, one of which is packed, and the rates and horizons that were chosen."""
    folder = tmp_path_factory.mktemp("study")
    tables = {
        "training": pd.DataFrame({"step": [0, 0], "model_id": [0, 1], "val_mse": [2.0, 1.0]}),
        "members": pd.DataFrame({"model_id": [0, 1], "val_mse": [2.0, 1.0]}),
        "skill": pd.DataFrame({"horizon": [1, 5], "starts": [10, 8], "skill": [0.5, np.nan]}),
        "uncertainty": pd.DataFrame({"rows": ["test"], "measure": ["std"], "spearman": [0.5], "auroc_worst": [0.7]}),
    }
    timing, origin = {"training": 3000.0, "test": 600.0}, Origin("c0ffee", {"python": "3.11"})
    for seed in (0, 1):
        cell = Cell("point", "one", LearnConfig(seed=seed, split_seed=0, ensemble_size=2), False, "cpu", threads=1)
        outcome = CellOutcome(None, 1.0, {"mse": 1.5})
        CellStore(folder).write(cell.name, Result(CellRecord(cell.request("d1ge57"), outcome, timing, origin), tables))
        if seed == 0:
            pack(folder)
    rates = {"arm": "point", "dataset": "one", "fit_lr": [0.01, 0.1], "val_mse": [1.0, 2.0], "best": 1.0, "worst": 2.0}
    rates = pd.DataFrame(rates | {"stray": 0, "is_chosen": [True, False]})
    rates.to_csv(folder / "learning_rates.csv", index=False)
    pd.DataFrame({"dataset": ["one"], "horizon": [5]}).to_csv(folder / "horizons.csv", index=False)
    return folder, cell


@pytest.fixture
def copy(study, tmp_path):
    """A copy of the study's folder, to damage."""
    return shutil.copytree(study[0], tmp_path / "study")


def read_cell(folder, cell):
    """Reads all that commands read of a cell."""
    store = CellStore(folder)
    store.check_place(cell)
    store.check_request(cell, "d1ge57")
    return store.read(cell.name) if store.has(cell) else None


def test_records_of_cells(study, copy, mutate):
    cell = study[1]
    change(copy / cell.name / "cell.json", mutate)
    with bounds():
        found = Result.read(copy / cell.name).record
        json.dumps(found.to_dict(), allow_nan=False)
        assert found.seconds >= 0
    with bounds():
        read_cell(copy, cell)


@pytest.mark.parametrize("name", ["training", "skill", "uncertainty"])
def test_tables_of_cells(study, copy, mutate, name):
    change(copy / study[1].name / f"{name}.csv", mutate)
    with bounds():
        table = Result.read(copy / study[1].name).tables[name]
        assert TABLES[name].fault(table) is None


def test_packed_cells(study, copy, mutate):
    change(copy / "cells.parquet", mutate)
    with bounds():
        for result in read_packed(copy / "cells.parquet").values():
            json.dumps(result.record.to_dict(), allow_nan=False)
            for name, table in result.tables.items():
                assert name not in TABLES or TABLES[name].fault(table) is None


@pytest.mark.parametrize("name", ["learning_rates.csv", "horizons.csv"])
def test_what_trials_have_decided(study, copy, mutate, name):
    change(copy / name, mutate)
    with bounds():
        tuning = Tuning.read(copy, {"point": LearnConfig()}, ["one"])
        for rate in tuning.chosen.values():
            LearnConfig(fit_lr=rate)
        assert tuning.horizon.keys() == {"one"}
