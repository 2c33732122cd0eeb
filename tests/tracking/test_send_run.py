"""send_run: what MLflow lacks of a finished run is sent afterwards, and nothing twice."""

import json
import shutil
from pathlib import Path

import pytest

from tracking import mlflow_store
from tracking.csv_tracker import CsvTracker
from tracking.run_folder import RunFolder, RunOrigin, RunOutcome, RunRequest, RunShown
from tracking.run_tracker import open_run_tracker
from tracking.send_run import main
from tracking.trackers import Summary, Trackers

SHOWN = RunShown({"kind": "deterministic"}, rows=120, trajectories=6, members=2)
SCORES = [{"val_mse": 0.125, "nll": None}, {"val_mse": None, "nll": None}]


@pytest.fixture
def finished_run(tmp_path, monkeypatch, columns, run_epochs, capfd):
    """A run that trained while its server was away, and the store that it should have gone to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    request = RunRequest("hopper", "ab" * 32, 0.2, None, 0.0, False, {"fit_epochs": 3})
    run = RunFolder.create(Path("logs"), "run", request, RunOrigin("abc", {}, "learn_model.py"))
    run.hold("fit_epochs: 3\n", "none\n")
    run.update(shown=SHOWN)
    Path("model.csv").write_text("no model")
    with Trackers([CsvTracker(run.metrics_csv, columns), open_run_tracker(run, [])]) as tracker:
        run_epochs(tracker, range(3))
        tracker.finish(Summary({"val_mse": 0.125}, SCORES, [0], [1]), [*run.artifacts[:3]])
    run.finish(RunOutcome("model.csv", SCORES, [0], [1]))
    run._lock.release()
    told = capfd.readouterr().err.splitlines()
    assert told[-1].endswith("send them by: python -m tracking.send_run logs/run")
    return run


def test_a_finished_run_is_sent_whole_and_only_once(finished_run, empty_store, monkeypatch, tmp_path, capfd):
    assert main(["logs/run"]) == 1, "the server is still away"
    capfd.readouterr()
    shutil.copy(empty_store, "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for _ in range(2):
        assert main(["logs/run"]) == 0
        assert capfd.readouterr().err == ""

    run_id = json.loads(Path("logs/run/run.json").read_text())["mlflow_run_id"]
    client = mlflow_store.open_client(mlflow_store.tracking_uri())
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["elites"], run.data.tags["failed"], run.data.tags["kind"]) == ("0", "1", "deterministic")
    assert run.data.metrics["summary/val_mse"] == 0.125
    assert [metric.step for metric in client.get_metric_history(run_id, "val_mse/mean")] == [1, 2, 3]
    members = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {member.info.run_name: member.info.status for member in members} == {
        "member-0": "FINISHED",
        "member-1": "FAILED",
    }
    sent = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert sent == {"config.yaml", "metrics.csv", "audit.md", "model.csv"}


@pytest.mark.parametrize("made", ["nothing", "a file", "an empty folder", "no JSON", "an unfinished run", "no members"])
def test_anything_else_is_refused_in_one_line(finished_run, made, capfd):
    path = Path("logs/run")
    if made == "nothing":
        path = Path("gone")
    elif made == "a file":
        path = path / "config.yaml"
    elif made == "an empty folder":
        path = Path("logs")
    elif made == "no JSON":
        (path / "run.json").write_text("{")
    else:
        record = json.loads((path / "run.json").read_text())
        record["finished"] = None if made == "an unfinished run" else record["finished"] | {"scores": []}
        (path / "run.json").write_text(json.dumps(record))
    assert main([str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
