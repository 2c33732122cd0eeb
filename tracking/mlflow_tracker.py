"""A training's MLflow runs, which ``mlflow ui`` shows: numbers, configuration, dataset, files.

``MlflowTracker`` fills them while training runs, ``log_evaluation`` adds an evaluation later, and ``load_run`` fetches
the trained ensemble back. The ensemble is also there as an MLflow model (``mlflow_model.py``). A run copies what the
CSV has; nothing that the store does may stop training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracking.mlflow_store import (
    find_experiment,
    find_run,
    first_line,
    lock_store,
    mlflow_text,
    open_client,
    sqlite_path,
    tracking_uri,
)
from tracking.trackers import Row, Summary, Tracker, warn
from utils import InputError, git_commit

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from dynamics_model import DynamicsEnsemble


@dataclass(frozen=True)
class DatasetInfo:
    """What MLflow shows of the dataset that a run was trained on.

    Attributes:
        name: As ``--dataset`` took it.
        sha256: Checksum of its contents, in hexadecimal digits.
        rows: Number of transitions.
        trajectories: Number of trajectories.
    """

    name: str
    sha256: str
    rows: int
    trajectories: int


class MlflowTracker(Tracker):
    """Fills one MLflow run for the ensemble and, nested in it, one per member.

    Runs go to the store at ``MLFLOW_TRACKING_URI``, by default to ``mlflow.db`` and ``mlruns/`` in the current folder,
    which a bare ``mlflow ui`` shows. Once constructed, the tracker never stops training, whatever the store does:
    numbers that could not be sent are kept and sent again, at growing intervals, and a warning at the end says what is
    still missing. A server is waited for by 20 s in all, whatever it does or fails to do; at the end it is waited for
    longer only as long as it takes something every 10 s.

    Args:
        run_name: Shown in the UI.
        params: The effective configuration.
        tags: What else to find the run by in the UI, such as the kind of ensemble.
        dataset: The dataset that the ensemble is trained on.
        ensemble_size: Number of members.
        experiment: The MLflow experiment that holds the runs.
        resume_run_id: The ensemble's run of an interrupted training, which is continued.
        resume_rows: The rows of all epochs that the resumed training keeps; those that the runs lack are sent.
        remedy: The command that sends what is missing once training has succeeded, for the warning.

    Attributes:
        run_id: Id of the ensemble's run; None as long as no tracking server has answered.
        is_complete: Whether the store has everything; known after ``close``.

    Raises:
        InputError: If a local store cannot be used. A server that does not answer costs a warning instead: it may be
            back before training ends.
    """

    _SECONDS_BETWEEN_SENDS = 10.0
    _LONGEST_PAUSE = 600.0
    _LONGEST_WAIT, _KEPT_FOR_THE_END = 20.0, 10.0  # seconds that a server may hold up a training in all
    _LONGEST_TAG = 5000
    _LONGEST_PARAM = 500  # servers before MLflow 2.8 refuse longer ones

    def __init__(
        self,
        run_name: str,
        params: dict[str, Any],
        tags: dict[str, str],
        dataset: DatasetInfo,
        ensemble_size: int,
        experiment: str = "dynamics-ensembles",
        resume_run_id: str | None = None,
        resume_rows: Iterable[Row] = (),
        remedy: str = "",
    ):
        self.run_id, self.is_complete = resume_run_id, False
        self._uri = tracking_uri()
        self._run_name, self._experiment, self._ensemble_size = mlflow_text(run_name), experiment, ensemble_size
        self._params = {name: mlflow_text(str(value), self._LONGEST_PARAM) for name, value in params.items()}
        self._dataset = dataclasses.replace(dataset, name=mlflow_text(dataset.name))
        self._tags = {
            **{name: mlflow_text(value, self._LONGEST_TAG) for name, value in tags.items()},
            "dataset": self._dataset.name,
            "mlflow.source.name": Path(sys.argv[0]).name,
            "mlflow.source.git.commit": git_commit() or "unknown",
        }
        self._client: MlflowClient | None = None
        # By run: None is the ensemble's, a number is the member's.
        self._run_ids: dict[int | None, str] = {}  # empty until all runs are open
        self._last_steps: dict[int | None, dict[str, int]] = {}  # by metric, as the run had it when it was opened
        self._unsent: dict[int | None, list[tuple[str, float, int, int]]] = defaultdict(list)
        self._elites: list[int] | None = None
        self._failed: list[int] = []
        self._artifacts: list[Path] = []
        self._remedy = remedy
        self._pause = self._SECONDS_BETWEEN_SENDS
        self._next_send = 0.0
        self._warned = False
        self._is_server = self._uri.startswith(("http://", "https://"))
        self._pending: Future[None] | None = None  # what a server has been asked for
        self._patience, self._taken = self._LONGEST_WAIT, 0
        for _, rows in itertools.groupby(resume_rows, key=lambda row: row["step"]):
            self._collect(list(rows))
        if self._is_server:
            self._attempt(self._send)
            return
        try:
            self._send()
        except InputError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and the system each raise their own
            reason = first_line(error)
            raise InputError(
                f"the MLflow store {self._uri!r} cannot be used: {reason}; "
                "repair it, or set MLFLOW_TRACKING_URI to another store (sqlite:///FILE or http://HOST:PORT)"
            ) from error

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Collects the numbers, and sends all collected ones every 10 seconds."""
        self._collect(rows)
        if time.monotonic() >= self._next_send:
            self._attempt(self._send)

    def finish(self, summary: Summary, artifacts: list[Path]) -> None:
        """Remembers the outcome, which ``close`` sends."""
        for member, metrics in [(None, summary.metrics), *enumerate(summary.members)]:
            for name, value in metrics.items():
                self._add(member, f"summary/{name}", value, step=0)
        self._elites, self._failed = list(summary.elites), list(summary.failed)
        self._artifacts = list(artifacts)

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Sends what is left and ends the runs; a warning says what could not be sent."""
        model = next((path for path in self._artifacts if path.suffix == ".pkl"), None)
        status = "KILLED" if interrupted else "FAILED" if failed else "FINISHED"
        self._attempt(lambda: self._end(status, model), is_last=True)
        values = sum(map(len, self._unsent.values()))
        self.is_complete = not values and not self._artifacts
        if not self.is_complete:
            files = "".join(f", {path.name}" for path in self._artifacts)
            remedy = f"; send them by: {self._remedy}" if self._remedy and self._elites is not None else ""
            warn(f"MLflow at {self._uri} lacks {values} values{files}; the CSV has every value{remedy}")

    def _collect(self, rows: list[Row]) -> None:
        """Queues an epoch's numbers: each member's own and, for the ensemble's run, their mean, minimum and maximum."""
        step = rows[0]["step"]
        for name in [name for name in rows[0] if name not in ("step", "model_id")]:
            for row in rows:
                self._add(row["model_id"], name, row[name], step)
            values = [row[name] for row in rows if row[name] is not None]
            values = [value for value in values if not math.isnan(value)] or values[:1]  # nan: the member has failed
            if values:
                with np.errstate(all="ignore"):  # values may be infinite
                    self._add(None, f"{name}/mean", float(np.mean(values)), step)
                    self._add(None, f"{name}/min", float(np.min(values)), step)
                    self._add(None, f"{name}/max", float(np.max(values)), step)

    def _add(self, member: int | None, name: str, value: float | None, step: int) -> None:
        """Queues a number for a run, the ensemble's where ``member`` is None."""
        if value is not None:
            # A number may be sent twice because the first answer got lost. With its time, MLflow takes both for one.
            self._unsent[member].append((name, value, int(time.time() * 1000), step))

    def _attempt(self, action: Callable[[], None], is_last: bool = False) -> None:
        """Runs an action that needs the store. The first failure gives a warning, and each one a longer pause.

        What a server is asked for runs in a thread of its own, for which training waits only as long as its patience
        lasts: servers may fail to answer in many ways. Until the thread is done, nothing else is asked for.
        """
        start = time.monotonic()
        if self._pending is not None:
            self._wait(is_last)
            if self._pending is not None:
                return
        try:
            if self._is_server:
                self._pending = _start(action)
                self._wait(is_last)
            else:
                action()
                self._pause = self._SECONDS_BETWEEN_SENDS
        except Exception as error:  # every layer below MLflow raises its own, and none may stop training
            self._failed_with(error)
        end = time.monotonic()
        self._next_send = end + max(self._pause, 20 * (end - start))  # a slow store takes at most 5 % of the time

    def _wait(self, is_last: bool) -> None:
        """Waits for what a server has been asked for, and takes note of how it ended, if it has."""
        kept, taken = 0.0 if is_last else self._KEPT_FOR_THE_END, self._taken
        while not self._pending.done() and (self._patience > kept or (is_last and taken != self._taken)):
            start, taken = time.monotonic(), self._taken
            with contextlib.suppress(TimeoutError):  # of the wait; an error of the action is looked at below
                self._pending.exception(timeout=min(max(self._patience - kept, 1.0), 10.0))
            self._patience -= time.monotonic() - start
        if self._pending.done():
            error, self._pending = self._pending.exception(), None
            if error is not None:
                self._failed_with(error)
            else:
                self._pause = self._SECONDS_BETWEEN_SENDS

    def _failed_with(self, error: BaseException) -> None:
        self._pause = min(2 * self._pause, self._LONGEST_PAUSE)
        if not self._warned:
            reason = first_line(error)
            warn(f"MLflow at {self._uri} does not take numbers ({reason}); training goes on and keeps trying")
        self._warned = True

    def _send(self) -> None:
        """Sends the queued numbers, except those that a resumed run already has."""
        from mlflow.entities import Metric

        if not self._run_ids:
            self._open_runs()
        for member, metrics in list(self._unsent.items()):
            last_steps, count = self._last_steps[member], len(metrics)  # training goes on and adds more
            new = [Metric(*metric) for metric in metrics[:count] if metric[3] > last_steps.get(metric[0], -1)]
            self._client.log_batch(self._run_ids[member], new)
            del metrics[:count]
            self._taken += 1

    def _end(self, status: str, model: Path | None) -> None:
        """Sends what is left, the elites, the artifacts and the model, and ends the runs."""
        try:
            self._send()
            for name, members in (("elites", self._elites), ("failed", self._failed)):
                if members:
                    self._client.set_tag(self.run_id, name, ",".join(map(str, members)))
            while self._artifacts:
                self._client.log_artifact(self.run_id, str(self._artifacts[0]))
                del self._artifacts[0]
                self._taken += 1
            if model is not None:
                self._log_model(model)
        finally:
            self._terminate(status)

    def _log_model(self, path: Path) -> None:
        """Logs ``model.pkl`` as an MLflow model, too, which the run has as its output; a warning says if that fails."""
        from mlflow.entities import LoggedModelOutput

        from tracking.mlflow_model import save_mlflow_model

        client, model_id = self._client, None
        try:
            run = client.get_run(self.run_id)
            if run.outputs is not None and run.outputs.model_outputs:
                return  # it was sent before
            experiment_id = run.info.experiment_id
            model_id = client.create_logged_model(experiment_id, "model", self.run_id, self._tags).model_id
            with tempfile.TemporaryDirectory() as folder:
                save_mlflow_model(path, Path(folder) / "model", self.run_id, model_id)
                client.log_model_artifacts(model_id, f"{folder}/model")
            client.finalize_logged_model(model_id, "READY")
            client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])
        except Exception as error:  # the run has the file itself, whatever the store or MLflow's version lacks
            warn(f"MLflow at {self._uri} has {path.name} as a file, but not as an MLflow model ({first_line(error)})")
            if model_id is not None:
                with contextlib.suppress(Exception):
                    client.finalize_logged_model(model_id, "FAILED")

    def _terminate(self, status: str) -> None:
        """Ends the runs, the ensemble's last, so that all are ended when it is; members that failed have failed."""
        for member, run_id in reversed(self._run_ids.items()):
            self._client.set_terminated(run_id, "FAILED" if member in self._failed else status)

    def _open_runs(self) -> None:
        """Finds or creates every run. Called again after a failure, it continues where it stopped."""
        with lock_store(self._uri):
            client = self._client = open_client(self._uri)
            parent = self._open_parent(client)
            experiment_id = parent.info.experiment_id
            nested = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{self.run_id}'")
            runs = {None: parent} | {int(run.data.tags["member"]): run for run in nested}
            for member in range(self._ensemble_size):
                if member not in runs:
                    tags = {"mlflow.parentRunId": self.run_id, "member": str(member)}
                    runs[member] = client.create_run(experiment_id, tags=tags, run_name=f"member-{member}")
            for member, run in runs.items():
                if run.info.status != "RUNNING":
                    client.update_run(run.info.run_id, status="RUNNING")
                self._last_steps[member] = {
                    name: max(metric.step for metric in client.get_metric_history(run.info.run_id, name))
                    for name in run.data.metrics
                }
            self._run_ids = {member: run.info.run_id for member, run in runs.items()}

    def _open_parent(self, client: MlflowClient) -> Run:
        """Finds or creates the ensemble's run, with configuration and dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        parent = find_run(client, self.run_id)
        if parent is None:
            if self.run_id is not None:
                warn(f"MLflow at {self._uri} has no run {self.run_id} any more; all epochs go to a new one")
            experiment_id = find_experiment(client, self._experiment)
            parent = client.create_run(experiment_id, tags=self._tags, run_name=self._run_name)
            self.run_id = parent.info.run_id
        known = parent.data.params  # MLflow refuses to change them, and a run resumed elsewhere may try to
        client.log_batch(self.run_id, params=[Param(*item) for item in self._params.items() if item[0] not in known])
        dataset = Dataset(
            name=self._dataset.name,
            digest=self._dataset.sha256[:16],
            source_type="local",
            source=json.dumps({"uri": self._dataset.name}),
            profile=json.dumps(dataclasses.asdict(self._dataset)),
        )
        # Logging a dataset of the same name and digest again changes nothing.
        client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        return parent


def _start(action: Callable[[], None]) -> Future[None]:
    """Runs an action in a thread that ends with the program at the latest."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except Exception as error:  # whoever waits for it gets it
            future.set_exception(error)

    threading.Thread(target=work, name="mlflow", daemon=True).start()
    return future


def load_run(run_id: str, device: str = "cpu") -> DynamicsEnsemble:
    """Fetches the ensemble that a run trained from MLflow.

    Args:
        run_id: Id of the ensemble's run, which the UI and the model's metadata show.
        device: Where the ensemble goes.

    Raises:
        InputError: If there is no such run, or it has no model.
    """
    from dynamics_model import load_ensemble

    uri = tracking_uri()
    with lock_store(uri):
        client = open_client(uri)
    if find_run(client, run_id) is None:
        raise InputError(f"MLflow at {uri} has no run {run_id!r}; mlflow ui shows the ids of the runs")
    models = [artifact.path for artifact in client.list_artifacts(run_id) if artifact.path.endswith(".pkl")]
    if len(models) != 1:
        raise InputError(
            f"MLflow run {run_id!r} has {len(models)} models, expected one; give a finished ensemble's run"
        )
    with tempfile.TemporaryDirectory() as folder:
        return load_ensemble(client.download_artifacts(run_id, models[0], folder), device)


def log_evaluation(run_id: str, name: str, metrics: dict[str, float], files: Iterable[Path]) -> None:
    """Adds an evaluation to the MLflow run that trained the model; if that fails, a warning says so.

    Args:
        run_id: Id of the ensemble's run.
        name: Name of the evaluation: its metrics are called ``eval/NAME/...``, its files go to ``evaluation/NAME``.
        metrics: Numbers by name.
        files: Files to keep with the run.
    """
    uri = "MLflow"
    try:
        uri = tracking_uri()
        if uri.startswith("sqlite:///") and not sqlite_path(uri).is_file():
            raise FileNotFoundError("there is no such store")
        with lock_store(uri):
            client = open_client(uri)
        from mlflow.entities import Metric

        if find_run(client, run_id) is None:
            raise LookupError(f"it has no run {run_id}")
        now = int(time.time() * 1000)
        name = re.sub(r"[^\w.-]|^\.+", "_", name)[:100]  # a part of paths and of metrics' names
        values = {re.sub(r"[^\w./ -]", "_", f"eval/{name}/{key}")[:250]: value for key, value in metrics.items()}
        client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in values.items()])
        for path in files:
            client.log_artifact(run_id, str(path), artifact_path=f"evaluation/{name}")
    except Exception as error:  # the report is written, whatever the store does
        warn(f"the evaluation is not in MLflow at {uri} ({first_line(error)}); its files have everything")
