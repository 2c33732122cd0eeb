"""MLflow's runs of a training: a copy of the CSV to look at."""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracking.mlflow_store import (
    find_experiment,
    find_run,
    first_line,
    lock_store,
    open_client,
    sqlite_path,
    tracking_uri,
    warn,
)
from utils import InputError, git_commit

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from dynamics_model import DynamicsEnsemble
from tracking.trackers import NullTracker, Row


class MlflowTracker(NullTracker):
    """One MLflow run for the ensemble and, nested in it, one per member.

    Runs go where ``MLFLOW_TRACKING_URI`` points, by default to ``mlflow.db`` and ``mlruns/`` in the current directory,
    which a bare ``mlflow ui`` shows. After construction nothing that the store does stops training: numbers that could
    not be sent are kept and tried again, less and less often, and what is missing in the end is said.

    Args:
        run_name: Shown in the UI.
        params: The effective configuration.
        dataset: ``name``, ``sha256``, and what else describes it (rows, trajectories), in plain values.
        ensemble_size: Number of members.
        experiment: The MLflow experiment that holds the runs.
        resume_run_id: Goes on with the runs of an interrupted training.
        resume_rows: The rows of all epochs that training keeps; those that the runs lack are sent.

    Attributes:
        run_id: Of the ensemble's run; None as long as no tracking server has answered.

    Raises:
        InputError: If the store cannot be used. A server that does not answer is none of the user's mistakes.
    """

    _SECONDS_BETWEEN_SENDS = 10.0
    _LONGEST_PAUSE = 600.0
    _LONGEST_PARAM = 500  # servers before MLflow 2.8 refuse longer ones

    def __init__(
        self,
        run_name: str,
        params: dict[str, Any],
        dataset: dict[str, Any],
        ensemble_size: int,
        experiment: str = "dynamics-ensembles",
        resume_run_id: str | None = None,
        resume_rows: Iterable[Row] = (),
    ):
        self.run_id = resume_run_id
        self._uri = tracking_uri()
        self._run_name, self._experiment, self._ensemble_size = run_name, experiment, ensemble_size
        self._params = {name: str(value)[: self._LONGEST_PARAM] for name, value in params.items()}
        self._dataset = dataset
        self._tags = {
            "dataset": dataset["name"],
            "kind": "probabilistic" if params["probabilistic"] else "deterministic",
            "mlflow.source.name": Path(sys.argv[0]).name,
            "mlflow.source.git.commit": git_commit() or "unknown",
        }
        self._client: MlflowClient | None = None
        # Of each run, None being the ensemble's and a number the member's:
        self._run_ids: dict[int | None, str] = {}  # empty until all are open
        self._last_steps: dict[int | None, dict[str, int]] = {}  # per metric, what the run held when it was opened
        self._unsent: dict[int | None, list[tuple[str, float, int, int]]] = defaultdict(list)
        self._elites: list[int] | None = None
        self._artifacts: list[Path] = []
        self._pause = self._SECONDS_BETWEEN_SENDS
        self._next_send = 0.0
        self._warned = False
        for _, rows in itertools.groupby(resume_rows, key=lambda row: row["step"]):
            self._collect(list(rows))
        if self._uri.startswith(("http://", "https://")):
            self._attempt(self._send)
            return
        try:
            self._send()
        except Exception as error:  # whatever MLflow, SQLAlchemy or the system have to say about the user's store
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

    def finish(self, summary: dict[str, Any], artifacts: list[Path]) -> None:
        """Takes note of the outcome; ``close`` delivers it."""
        for member, metrics in [(None, summary["metrics"]), *enumerate(summary["members"])]:
            for name, value in metrics.items():
                self._add(member, f"summary/{name}", value, step=0)
        self._elites = list(summary["elites"])
        self._artifacts = list(artifacts)

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Delivers what is left and says how training ended; then says what could not be delivered."""
        self._attempt(self._deliver)
        self._attempt(lambda: self._terminate("KILLED" if interrupted else "FAILED" if failed else "FINISHED"))
        values = sum(map(len, self._unsent.values()))
        if values or self._artifacts:
            files = "".join(f", {path.name}" for path in self._artifacts)
            warn(f"MLflow at {self._uri} lacks {values} values{files}; the CSV has every value")

    def _collect(self, rows: list[Row]) -> None:
        """Takes one epoch: the numbers of each member, and mean, smallest and largest over members for the ensemble."""
        step = rows[0]["step"]
        for name in [name for name in rows[0] if name not in ("step", "model_id")]:
            for row in rows:
                self._add(row["model_id"], name, row[name], step)
            if values := [row[name] for row in rows if row[name] is not None]:
                with np.errstate(all="ignore"):  # NumPy, as it lets nan win; a diverged member may as well be infinite
                    self._add(None, f"{name}/mean", float(np.mean(values)), step)
                    self._add(None, f"{name}/min", float(np.min(values)), step)
                    self._add(None, f"{name}/max", float(np.max(values)), step)

    def _add(self, member: int | None, name: str, value: float | None, step: int) -> None:
        if value is not None:
            # The time is fixed here: MLflow knows by it that a number sent twice, its first answer lost, is the same.
            self._unsent[member].append((name, value, int(time.time() * 1000), step))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Runs an action that needs the store; a failure costs a warning, once, and a longer pause."""
        start = time.monotonic()
        try:
            action()
        except Exception as error:  # any layer below MLflow may raise its own, and none of it may stop training
            self._pause = min(2 * self._pause, self._LONGEST_PAUSE)
            if not self._warned:
                reason = first_line(error)
                warn(f"MLflow at {self._uri} does not take numbers ({reason}); training goes on and keeps trying")
            self._warned = True
        else:
            self._pause = self._SECONDS_BETWEEN_SENDS
        end = time.monotonic()
        self._next_send = end + max(self._pause, 20 * (end - start))  # a slow store takes a twentieth of the time

    def _send(self) -> None:
        from mlflow.entities import Metric

        if not self._run_ids:
            self._open_runs()
        for member, metrics in self._unsent.items():
            last_steps = self._last_steps[member]
            new = [Metric(*metric) for metric in metrics if metric[3] > last_steps.get(metric[0], -1)]
            self._client.log_batch(self._run_ids[member], new)
            metrics.clear()

    def _deliver(self) -> None:
        self._send()
        if self._elites is not None:
            self._client.set_tag(self.run_id, "elites", ",".join(map(str, self._elites)))
        while self._artifacts:
            self._client.log_artifact(self.run_id, str(self._artifacts[0]))
            del self._artifacts[0]

    def _terminate(self, status: str) -> None:
        for run_id in reversed(self._run_ids.values()):  # the ensemble's last: when it has ended, all have
            self._client.set_terminated(run_id, status)

    def _open_runs(self) -> None:
        """Finds or makes every run. Called again after a failure, it goes on where it stopped."""
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
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        parent = find_run(client, self.run_id)
        if parent is None:
            if self.run_id is not None:
                warn(f"MLflow at {self._uri} has no run {self.run_id} any more; all epochs go to a new one")
            experiment_id = find_experiment(client, self._experiment)
            parent = client.create_run(experiment_id, tags=self._tags, run_name=self._run_name)
            self.run_id = parent.info.run_id
        known = parent.data.params  # MLflow refuses to change one, as --resume may on another machine
        client.log_batch(self.run_id, params=[Param(*item) for item in self._params.items() if item[0] not in known])
        dataset = Dataset(
            name=self._dataset["name"],
            digest=self._dataset["sha256"][:16],
            source_type="local",
            source=json.dumps({"uri": self._dataset["name"]}),
            profile=json.dumps(self._dataset),
        )
        # Logging the same dataset again changes nothing: MLflow knows it by name and digest.
        client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        return parent


def load_run(run_id: str, device: str = "cpu") -> DynamicsEnsemble:
    """Fetches the ensemble that a run trained from MLflow.

    Args:
        run_id: The ensemble's run, as the UI and the model's metadata name it.
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
    """Adds an evaluation to the run that trained the model; where that fails, one warning says so.

    Args:
        run_id: The ensemble's run.
        name: Of the evaluation; metrics are called ``eval/NAME/...``, files go to ``evaluation/NAME``.
        metrics: Numbers by name.
        files: What to keep with the run.
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
        values = {re.sub(r"[^\w./ -]", "_", f"eval/{name}/{key}"): value for key, value in metrics.items()}
        client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in values.items()])
        for path in files:
            client.log_artifact(run_id, str(path), artifact_path=f"evaluation/{name}")
    except Exception as error:  # nothing that a store does may cost the user the report
        warn(f"the evaluation is not in MLflow at {uri} ({first_line(error)}); its files have everything")
