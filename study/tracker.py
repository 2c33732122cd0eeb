"""MLflow runs of a study: one parent run, and nested in it one per cell; whatever MLflow does, the study goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from study.cells import FORMAT, Cell, Result, check_format
from study.store import CellStore
from tracking.mlflow_store import (
    find_experiment,
    find_run,
    first_line,
    lock_store,
    mlflow_text,
    open_client,
    tracking_uri,
)
from tracking.trackers import warn
from utils import atomic_write


def open_study(store: CellStore, command: str, params: dict[str, Any]) -> StudyTracker:
    """Makes the folder of a study, with a ``study.json`` to recognise it by, and its run in MLflow; or continues both.

    Args:
        store: The cells of the study.
        command: Command line that the study was started with.
        params: What describes the study in MLflow.
    """
    path = store.folder / "study.json"
    with store.lock("study"):
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        tracker = StudyTracker(store.folder.name, record.get("mlflow_run_id"), params)
        with atomic_write(path, "w") as file:
            json.dump({"format": FORMAT, "command": command, "mlflow_run_id": tracker.run_id}, file, indent=2)
    return tracker


def check_study(folder: Path) -> None:
    """Checks that this version can go on with the study in a folder, if there is one.

    Raises:
        InputError: If another version made it.
    """
    path = folder / "study.json"
    if path.exists():
        check_format(json.loads(path.read_text(encoding="utf-8")), str(path))


def study_command(folder: Path) -> str:
    """Returns the command line that made a study."""
    return json.loads((folder / "study.json").read_text(encoding="utf-8"))["command"]


class StudyTracker:
    """Logs cells under the study's run. The first failure is reported by a warning, and nothing is logged after it.

    Args:
        name: Shown in the UI.
        run_id: The run to continue; None makes a new one.
        params: What describes the study.

    Attributes:
        run_id: Id of the study's run; None where MLflow could not be reached.
    """

    def __init__(self, name: str, run_id: str | None, params: dict[str, Any]) -> None:
        self.run_id = run_id
        self._is_lost = False
        self._attempt(lambda: self._open(name, params))

    def log(self, cell: Cell, result: Result) -> None:
        """Logs configuration, validation errors and headline numbers of a cell, unless they are logged already."""
        self._attempt(lambda: self._log(cell, result))

    def finish(self, files: Iterable[Path]) -> None:
        """Keeps the report's files with the study's run and ends it."""
        self._attempt(lambda: self._finish(files))

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except Exception as error:  # MLflow and the layers below raise what they like; the folder has everything
            self._is_lost = True
            warn(f"MLflow has not all of this study ({first_line(error)}); its folder has everything")

    def _open(self, name: str, params: dict[str, Any]) -> None:
        self._uri = tracking_uri()
        with lock_store(self._uri):
            self._mlflow = open_client(self._uri)
            self._experiment = find_experiment(self._mlflow, "dynamics-ensembles-studies")
        if find_run(self._mlflow, self.run_id) is None:
            self.run_id = self._mlflow.create_run(self._experiment, run_name=mlflow_text(name)).info.run_id
            for key, value in params.items():
                self._mlflow.log_param(self.run_id, key, str(value)[:500])

    def _log(self, cell: Cell, result: Result) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        children = f"tags.mlflow.parentRunId = '{self.run_id}' and attributes.run_name = '{mlflow_text(cell.name)}'"
        with lock_store(self._uri):  # so that only one of two processes of a study logs the cell
            if self._mlflow.search_runs([self._experiment], children, max_results=1):
                return
            run = self._mlflow.create_run(
                self._experiment,
                start_time=now - int(1000 * result.record.seconds),
                run_name=mlflow_text(cell.name),
                tags={
                    "mlflow.parentRunId": self.run_id,
                    "arm": mlflow_text(cell.arm),
                    "dataset": mlflow_text(cell.dataset),
                },
            )
        params = [Param(name, str(value)) for name, value in cell.config.to_dict().items()]
        metrics = [Metric(name, value, now, 0) for name, value in result.record.outcome.metrics.items()]
        if "training" in result.tables:
            curve = result.tables["training"].groupby("step").val_mse.mean()
            metrics += [Metric("val_mse/mean", value, now, step) for step, value in curve.items()]
        self._mlflow.log_batch(run.info.run_id, metrics, params)
        self._mlflow.set_terminated(run.info.run_id, "FINISHED" if result.failure is None else "FAILED")

    def _finish(self, files: Iterable[Path]) -> None:
        for path in files:
            self._mlflow.log_artifact(self.run_id, str(path))
        self._mlflow.set_terminated(self.run_id)
