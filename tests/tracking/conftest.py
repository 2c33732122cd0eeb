"""What the tests of trackers share: numbers of a training, an empty MLflow store, and processes that start at once."""

import csv
import multiprocessing
import os
import shutil
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tracking import mlflow_store
from tracking.trackers import Summary


def make_rows(epoch):
    """Numbers of two members that tell their epoch and member; train_mse is measured every third epoch."""
    return [
        {
            "step": epoch + 1,
            "model_id": member,
            "mse_loss": 1 / (epoch + 1) + member,
            "lr": 1e-3,
            "train_mse": 10.0 * epoch + member if epoch % 3 == 0 else None,
            "val_mse": 100.0 * epoch + member,
        }
        for member in range(2)
    ]


@pytest.fixture
def epoch_rows():
    """Returns a function that gives the rows of an epoch."""
    return make_rows


@pytest.fixture
def run_epochs():
    """Returns a function that logs the rows of some epochs."""

    def run(tracker, epochs):
        for epoch in epochs:
            tracker.log_epoch(epoch, make_rows(epoch))

    return run


@pytest.fixture
def columns():
    """The names of the numbers, in the order of the CSV."""
    return list(make_rows(0)[0])


@pytest.fixture
def summary():
    """The outcome of a training of two members, the second being the elite."""
    return Summary({"val_mse": 0.25}, [{"val_mse": 0.125, "nll": None}, {"val_mse": 0.375, "nll": None}], elites=[1])


@pytest.fixture
def read_csv():
    """Returns a function that reads a CSV as dictionaries of strings."""

    def read(path):
        with Path(path).open(newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session", autouse=True)
def processes():
    """Starts processes at once, as forks of one that has imported PyTorch and MLflow, which takes it seconds.

    That one starts with the first test, to be ready when it is needed. Its forks work in the current directory of the
    test, but with the environment of the session's start.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    forkserver.set_forkserver_preload(["torch", "pytest", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"])
    forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    """Works in an empty folder with an empty MLflow database; gives a client that looks into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, "mlflow.db")
    return mlflow_store.open_client(mlflow_store.tracking_uri())
