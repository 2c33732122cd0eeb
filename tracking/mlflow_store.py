"""The MLflow store that runs go to: where it is, how to open it, how to find an experiment or a run in it.

A store is a database (``mlflow.db``) or a tracking server. Trackers of single runs (``mlflow_tracker.py``) and of
studies (``study/tracker.py``) share these functions. MLflow takes a second to import: functions that need it import it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tracking.trackers import warn
from utils import InputError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_PATIENCE = 5.0  # seconds after which it is said that another process is waited for


def tracking_uri() -> str:
    """Returns the address of the store: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the current folder.

    Raises:
        InputError: If an older MLflow left its files in the current folder: beside them ``mlflow ui`` does not start.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if old := next(Path("mlruns").glob("[0-9]*/meta.yaml"), None):
        raise InputError(
            f"{str(old)!r} was left by an older MLflow, beside which today's does not start; bring its runs over with: "
            "mlflow migrate-filestore --source . --target sqlite:///mlflow.db && rm mlruns/[0-9]*/meta.yaml"
        )
    return _sqlite_uri(Path("mlflow.db"))


def _sqlite_uri(path: Path) -> str:
    """Returns the address of a SQLite store."""
    # Absolute, since MLflow caches opened stores by address; % and ? quoted, since SQLAlchemy unquotes the path.
    return "sqlite:///" + str(path.resolve()).replace("%", "%25").replace("?", "%3F")


@contextlib.contextmanager
def lock_store(uri: str) -> Iterator[None]:
    """Lets only one process at a time open a SQLite store: two that create its tables at the same time crash."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    from filelock import FileLock, Timeout

    path = sqlite_path(uri)
    lock = FileLock(f"{path}.lock")
    try:
        held = lock.acquire(timeout=_PATIENCE)
    except Timeout:
        warn(f"waiting for another process, which holds {lock.lock_file}; stop it if it hangs")
        held = lock.acquire(timeout=60 - _PATIENCE)
    with held:
        with contextlib.closing(sqlite3.connect(path)) as database:  # an unusable path fails here at once
            is_unfinished = _is_unfinished(database)
        if is_unfinished:
            _make_database(path)
        yield


def _is_unfinished(database: sqlite3.Connection) -> bool:
    """Whether a database is empty, or is MLflow's and was left by a process that was killed while it made the tables.

    The last thing that MLflow puts into a new database is its first experiment.
    """
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables & {"experiments", "alembic_version"}:
        return not tables
    filled = [name for name in ("experiments", "runs") if name in tables]
    return not any(database.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in filled)


def _make_database(path: Path) -> None:
    """Makes an empty database of MLflow, which appears whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    for leftover in (*_database_files(new), *_database_files(path)[1:]):  # a journal would be played into the new one
        leftover.unlink(missing_ok=True)
    open_client(_sqlite_uri(new)).search_experiments()
    new.replace(path)


def sqlite_path(uri: str) -> Path:
    """Returns the database file of a SQLite store's address."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def store_files(uri: str) -> list[Path]:
    """Returns the files of a SQLite store: the database, and those that SQLite and ``lock_store`` keep beside it."""
    if not uri.startswith("sqlite:///"):
        return []
    path = sqlite_path(uri)
    return [*_database_files(path), path.with_name(f"{path.name}.lock")]


def _database_files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}{ending}") for ending in ("", "-journal", "-wal", "-shm")]


def open_client(uri: str) -> MlflowClient:
    """Returns a client of the store at ``uri``: without log messages, long retries or telemetry."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # MlflowTracker itself tries again, later
    from mlflow.tracking import MlflowClient

    for name in "mlflow", "alembic":
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def find_experiment(client: MlflowClient, name: str) -> str:
    """Returns the id of the experiment called ``name``, which is created if there is none.

    Raises:
        InputError: If it was deleted: MLflow keeps the name then, and takes no runs for it.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another process may have created it just now
            return client.create_experiment(name)
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        raise InputError(
            f"the MLflow experiment {name!r} was deleted; bring it back by: mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id} (first: export MLFLOW_TRACKING_URI={shlex.quote(client.tracking_uri)})"
        )
    return experiment.experiment_id


def find_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """Returns the run; None if ``run_id`` is None, unknown to the store, or that of a deleted run."""
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


def mlflow_text(text: str, longest: int = 250) -> str:
    """Returns text as MLflow takes it in names and in searches, too: one line without quotes and backslashes, short.

    Args:
        text: What a stranger may have named.
        longest: Most characters; MLflow takes 250 in names.
    """
    encodable = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[^\S ]|['\"`\\\x00-\x1f\x7f]", "_", encodable)[:longest]


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, shortened to fit into a warning."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= 160 else f"{line[:160]}..."
