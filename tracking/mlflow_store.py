"""The MLflow store that runs go to: where it is, how it is opened, and what it is asked for.

Trackers of single runs (``mlflow_tracker.py``) and of studies (``study/tracker.py``) share these functions. MLflow
takes a second to import and is imported in the functions that need it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tqdm import tqdm

from utils import InputError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


def tracking_uri() -> str:
    """Returns where runs go; refuses a folder in which an old MLflow's files would keep ``mlflow ui`` from starting."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if old := next(Path("mlruns").glob("[0-9]*/meta.yaml"), None):
        raise InputError(
            f"{str(old)!r} was left by an older MLflow, beside which today's does not start; bring its runs over with: "
            "mlflow migrate-filestore --source . --target sqlite:///mlflow.db && rm mlruns/[0-9]*/meta.yaml"
        )
    # Absolute, as MLflow remembers stores by their URI; quoted where SQLAlchemy unquotes.
    path = str(Path("mlflow.db").resolve())
    return "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")


@contextlib.contextmanager
def lock_store(uri: str) -> Iterator[None]:
    """Lets one process at a time open a SQLite store: those that race to create its tables crash."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    from filelock import FileLock

    path = sqlite_path(uri)
    with FileLock(f"{path}.lock", timeout=60):
        sqlite3.connect(path).close()  # fails at once where MLflow would go on trying for minutes
        yield


def sqlite_path(uri: str) -> Path:
    """Returns the file behind the address of a SQLite store."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def open_client(uri: str) -> MlflowClient:
    """Returns a client of a tracking store that keeps quiet, gives up soon, and talks to nobody else."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the tracker tries again itself, later
    from mlflow.tracking import MlflowClient

    for name in "mlflow", "alembic":
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def find_experiment(client: MlflowClient, name: str) -> str:
    """Returns the id of an experiment, which is made where there is none of this name."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another process may have made it just now
            return client.create_experiment(name)
        experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id


def find_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """Returns the run, or None if the store has none of this id or it was deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def first_line(error: Exception) -> str:
    """Returns what an error says, short enough for a warning of one line."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= 160 else f"{line[:160]}..."


def warn(message: str) -> None:
    """Prints a warning on stderr; a progress bar is cleared before and drawn again after."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
