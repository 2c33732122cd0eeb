"""MLflow runs of a study: one parent run, and nested in it one per cell; whatever MLflow does, the study goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.cells import FORMAT, Cell, Result, check_format, read_json
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
from tracking.records import parse_record
from tracking.trackers import warn
from utils import InputError, atomic_write

if TYPE_CHECKING:
    from mlflow.entities import Run

_FOLDER = "study"  # the tag of a study's run that says which folder it is of


@dataclass(frozen=True)
class StudyRecord:
    """Contents of ``study.json``, by which a study is recognised.

    Attributes:
        format: As ``cells.FORMAT``.
        command: Command line that the study was last started with.
        mlflow_run_id: Its run in MLflow; None where no store has answered.
    """

    format: int
    command: str
    mlflow_run_id: str | None = None

    def __post_init__(self) -> None:
        """Checks what goes to MLflow.

        Raises:
            ValueError: If it is no id.
        """
        if self.mlflow_run_id is not None and not re.fullmatch(r"[\w-]{1,64}", self.mlflow_run_id):
            raise ValueError("mlflow_run_id is no id of a run")


def open_study(store: CellStore, command: str, params: dict[str, Any]) -> StudyTracker:
    """Makes the folder of a study, with a ``study.json`` to recognise it by, and its run in MLflow; or continues both.

    Args:
        store: The cells of the study.
        command: Command line that the study was started with.
        params: What describes the study in MLflow.
    """
    with store.hold("study"):
        record = read_study(store.folder)
        tracker = StudyTracker(store.folder, record and record.mlflow_run_id, params)
        with atomic_write(store.folder / "study.json", "w") as file:
            json.dump(vars(StudyRecord(FORMAT, command, tracker.run_id)), file, indent=2)
    return tracker


def read_study(folder: Path) -> StudyRecord | None:
    """Reads the ``study.json`` of a study; None where there is none.

    Raises:
        InputError: If another version made it, or it is damaged.
    """
    path, advice = folder / "study.json", "bring it back, or delete it: the cells tell what they were made with"
    try:
        plain = read_json(path, advice)
    except (FileNotFoundError, NotADirectoryError):
        return None
    check_format(plain, str(path))
    try:
        return parse_record(StudyRecord, plain, "the record")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {advice}") from None


def check_study(folder: Path) -> None:
    """Checks that this version can go on with the study in a folder, if there is one.

    Raises:
        InputError: If another version made it, or it is damaged.
    """
    read_study(folder)


def study_command(folder: Path) -> str:
    """Returns the command line that made a study.

    Raises:
        InputError: If there is none.
    """
    record = read_study(folder)
    if record is None:
        raise InputError(f"{folder} is no study: it has no study.json")
    return record.command


class StudyTracker:
    """Logs cells under the study's run. The first failure is reported by a warning, and nothing is logged after it.

    A process that was killed leaves runs behind that have not ended: they are gone on with, and ended.

    Args:
        folder: Folder of the study, whose name is shown in the UI.
        run_id: The run to continue; None makes a new one.
        params: What describes the study.

    Attributes:
        run_id: Id of the study's run; None where MLflow could not be reached.
    """

    def __init__(self, folder: Path, run_id: str | None, params: dict[str, Any]) -> None:
        self.run_id = run_id
        self._is_lost = False
        self._attempt(lambda: self._open(folder, params))

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

    def _open(self, folder: Path, params: dict[str, Any]) -> None:
        self._uri = tracking_uri()
        with lock_store(self._uri):
            self._mlflow = open_client(self._uri)
            self._experiment = find_experiment(self._mlflow, "dynamics-ensembles-studies")
        if find_run(self._mlflow, self.run_id) is None:
            run = self._abandoned_run(folder) or self._new_run(folder)
            self.run_id = run.info.run_id
            for key, value in params.items():
                if key not in run.data.params:
                    self._mlflow.log_param(self.run_id, key, mlflow_text(str(value), longest=500))

    def _new_run(self, folder: Path) -> Run:
        tags = {_FOLDER: _folder_tag(folder)}
        return self._mlflow.create_run(self._experiment, tags=tags, run_name=mlflow_text(folder.name))

    def _abandoned_run(self, folder: Path) -> Run | None:
        """Finds the run of a process that was killed before it wrote down the id: it has no cells and has not ended."""
        found = self._mlflow.search_runs(
            [self._experiment], f"tags.{_FOLDER} = '{_folder_tag(folder)}' and attributes.status = 'RUNNING'"
        )
        return next((run for run in found if not self._children(run.info.run_id)), None)

    def _children(self, run_id: str, name: str | None = None) -> list[Run]:
        """Returns the runs of cells under a study's run; of one cell, if a name is given."""
        wanted = f"tags.mlflow.parentRunId = '{run_id}'"
        if name is not None:
            wanted += f" and attributes.run_name = '{mlflow_text(name)}'"
        return self._mlflow.search_runs([self._experiment], wanted, max_results=1)

    def _log(self, cell: Cell, result: Result) -> None:
        from mlflow.entities import Metric, Param

        milliseconds = int(1000 * result.record.seconds)
        with lock_store(self._uri):  # so that only one of two processes of a study logs the cell
            run = next(iter(self._children(self.run_id, cell.name)), None)
            if run is None:
                run = self._mlflow.create_run(
                    self._experiment,
                    start_time=int(time.time() * 1000) - milliseconds,
                    run_name=mlflow_text(cell.name),
                    tags={
                        "mlflow.parentRunId": self.run_id,
                        "arm": mlflow_text(cell.arm),
                        "dataset": mlflow_text(cell.dataset),
                    },
                )
            elif run.info.status != "RUNNING":
                return
            end = run.info.start_time + milliseconds  # the same again, where a process was killed here
            params = [Param(name, str(value)) for name, value in cell.config.to_dict().items()]
            metrics = [Metric(name, value, end, 0) for name, value in result.record.outcome.metrics.items()]
            if "training" in result.tables:
                curve = result.tables["training"].groupby("step").val_mse.mean()
                metrics += [Metric("val_mse/mean", value, end, step) for step, value in curve.items()]
            self._mlflow.log_batch(run.info.run_id, metrics, params)
            self._mlflow.set_terminated(run.info.run_id, "FINISHED" if result.failure is None else "FAILED")

    def _finish(self, files: Iterable[Path]) -> None:
        for path in files:
            self._mlflow.log_artifact(self.run_id, str(path))
        self._mlflow.set_terminated(self.run_id)


def _folder_tag(folder: Path) -> str:
    """Returns what tells the folder of a study from others, whatever it is called."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
