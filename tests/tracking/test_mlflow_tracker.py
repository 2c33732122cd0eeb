import contextlib
import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from deterministic_model import DeterministicModel
from tracking import mlflow_store
from tracking.csv_tracker import CsvTracker
from tracking.mlflow_tracker import DatasetInfo, MlflowTracker, load_run, log_evaluation
from tracking.trackers import Trackers
from utils import InputError

SETTINGS = {
    "run_name": "tiny",
    "params": {"fit_epochs": 300, "hidden_size": [256, 256], "long": "x" * 9000},
    "tags": {"kind": "deterministic"},
    "dataset": DatasetInfo("hopper-tiny", "0123456789abcdef" * 4, rows=120, trajectories=6),
    "ensemble_size": 2,
}


def open_mlflow(**changes):
    return MlflowTracker(**SETTINGS | changes)


def train(columns, epoch_rows, epochs, run_id):
    """A training in its own process, with trackers in the current directory; sends its run's id."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    mlflow = open_mlflow()
    run_id.send(mlflow.run_id)
    with Trackers([CsvTracker("metrics.csv", columns), mlflow]) as tracker:
        for epoch in range(epochs):
            if epoch == 20:
                mlflow._next_send = 0.0  # as if ten seconds had passed; without it, only the first epoch is sent soon
            tracker.log_epoch(epoch, epoch_rows(epoch))
            time.sleep(0.005)


@pytest.fixture
def start_training(processes, columns, epoch_rows):
    """Returns a function that starts a training of some epochs, and gives its process and a pipe with its run's id."""

    def start(epochs):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=train, args=(columns, epoch_rows, epochs, sender))
        process.start()
        return process, receiver

    return start


def nested_runs(client, run_id):
    experiment_id = client.get_run(run_id).info.experiment_id
    runs = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return sorted(runs, key=lambda run: run.info.run_name)


def history(client, run_id, name):
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


@pytest.fixture
def assert_complete(epoch_rows):
    """Returns a function that checks that all numbers of the ensemble and its members are there, each once."""

    def check(client, run_id, epochs):
        steps = list(range(1, epochs + 1))
        assert history(client, run_id, "val_mse/mean") == [(step, 100.0 * (step - 1) + 0.5) for step in steps]
        assert history(client, run_id, "val_mse/max") == [(step, 100.0 * (step - 1) + 1) for step in steps]
        members = nested_runs(client, run_id)
        assert [run.info.run_name for run in members] == ["member-0", "member-1"]
        for member, run in enumerate(members):
            expected = [epoch_rows(step - 1)[member] for step in steps]
            for name in ("mse_loss", "lr", "train_mse", "val_mse"):
                logged = [(row["step"], row[name]) for row in expected if row[name] is not None]
                assert history(client, run.info.run_id, name) == logged

    return check


@pytest.fixture(scope="module", autouse=True)
def starting_ui(empty_store, tmp_path_factory):
    """``mlflow ui`` in a folder with an empty database. It takes seconds to start: by then, other tests have run."""
    folder = tmp_path_factory.mktemp("ui")
    shutil.copy(empty_store, folder / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    # Without the workers for MLflow's own background jobs, which take longer to start than all the rest.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    yield folder, f"http://127.0.0.1:{port}", server
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


# --- A local store ---


def test_numbers_that_are_not_finite_are_taken(store, epoch_rows):
    rows = epoch_rows(0)
    rows[0] |= {"mse_loss": math.nan, "val_mse": math.inf}
    with open_mlflow() as tracker:
        tracker.log_epoch(0, rows)
    member, other = nested_runs(store, tracker.run_id)
    assert math.isnan(member.data.metrics["mse_loss"])
    assert member.data.metrics["val_mse"] > 1e300  # how MLflow's database keeps infinity
    assert other.data.metrics["val_mse"] == 1.0
    ensemble = store.get_run(tracker.run_id).data.metrics
    assert ensemble["mse_loss/min"] == other.data.metrics["mse_loss"], "of the members that have not failed"


def test_members_that_failed_are_marked(store, run_epochs, summary):
    with open_mlflow() as tracker:
        run_epochs(tracker, range(1))
        tracker.finish(dataclasses.replace(summary, failed=[0]), [])
    assert [run.info.status for run in nested_runs(store, tracker.run_id)] == ["FAILED", "FINISHED"]
    ensemble = store.get_run(tracker.run_id)
    assert (ensemble.info.status, ensemble.data.tags["failed"]) == ("FINISHED", "0")


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_tells_how_training_ended(store, error, status):
    with pytest.raises(error), open_mlflow() as tracker:
        raise error
    runs = [store.get_run(tracker.run_id), *nested_runs(store, tracker.run_id)]
    assert [run.info.status for run in runs] == [status] * 3


def test_more_numbers_are_sent_than_one_call_takes(store, epoch_rows, run_epochs, assert_complete):
    with open_mlflow() as tracker:
        tracker.log_epoch(0, epoch_rows(0))
        run_epochs(
            tracker, range(1, 350)
        )  # then 1163 numbers of each member, 3489 of the ensemble, at most 1000 a call
    assert_complete(store, tracker.run_id, 350)


def test_a_killed_training_resumes_to_complete_records_without_duplicates(
    store, start_training, columns, run_epochs, read_csv, assert_complete
):
    training, run_id = start_training(100_000)
    run_id = run_id.recv()
    while not Path("metrics.csv").exists() or len(read_csv("metrics.csv")) < 120:
        assert training.is_alive()
        time.sleep(0.02)
    training.kill()
    training.join()
    assert len(history(store, run_id, "lr/mean")) == 21
    assert store.get_run(run_id).info.status == "RUNNING"

    # The last checkpoint may be of later epochs than MLflow has, or of earlier ones.
    for resume_epoch in (55, 15):
        csv_tracker = CsvTracker("metrics.csv", columns, resume_epoch=resume_epoch)
        params = SETTINGS["params"] | {"fit_epochs": 9}
        mlflow = open_mlflow(resume_run_id=run_id, resume_rows=csv_tracker.kept_rows, params=params)
        assert mlflow.run_id == run_id
        assert store.get_run(run_id).info.status == "RUNNING"
        with Trackers([csv_tracker, mlflow]) as tracker:
            run_epochs(tracker, range(resume_epoch, 70))
    rows = [(int(row["step"]), int(row["model_id"])) for row in read_csv("metrics.csv")]
    assert rows == [(step, member) for step in range(1, 71) for member in (0, 1)]
    assert_complete(store, run_id, 70)
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["fit_epochs"] == "300"
    assert len(run.inputs.dataset_inputs) == 1


def test_resuming_a_run_that_was_deleted_makes_a_new_one(store, capsys, epoch_rows, run_epochs, assert_complete):
    with open_mlflow() as tracker:
        run_epochs(tracker, range(2))
    store.delete_run(tracker.run_id)
    rows = [row for epoch in range(2) for row in epoch_rows(epoch)]
    with open_mlflow(resume_run_id=tracker.run_id, resume_rows=rows) as resumed:
        run_epochs(resumed, range(2, 3))
    assert resumed.run_id != tracker.run_id
    assert tracker.run_id in capsys.readouterr().err
    assert_complete(store, resumed.run_id, 3)


def test_processes_that_race_to_create_the_database_all_succeed(start_training, assert_complete, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainings = [start_training(2) for _ in range(2)]
    run_ids = [run_id.recv() for _, run_id in trainings]
    for training, _ in trainings:
        training.join(60)
    assert [training.exitcode for training, _ in trainings] == [0, 0]
    client = mlflow_store.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    for run_id in run_ids:
        assert_complete(client, run_id, 2)


@pytest.mark.parametrize("uri", ["file store", "unknown scheme", "no database", "a folder", "no folder"])
def test_a_local_store_that_cannot_be_used_is_an_input_error(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no database at all\n" * 100)
    uris = {
        "file store": f"file://{tmp_path}/mlruns",
        "unknown scheme": "ftp://127.0.0.1/runs",
        "no database": f"sqlite:///{tmp_path}/notes.txt",
        "a folder": f"sqlite:///{tmp_path}",
        "no folder": "sqlite:////proc/runs/mlflow.db",
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uris[uri])
    start = time.monotonic()
    with pytest.raises(InputError, match="cannot be used"):
        open_mlflow()
    assert time.monotonic() - start < 5


def test_a_deleted_experiment_is_an_input_error_with_its_remedy(store):
    with open_mlflow() as tracker:
        pass
    store.delete_experiment(store.get_run(tracker.run_id).info.experiment_id)
    with pytest.raises(InputError, match="was deleted; bring it back by: mlflow experiments restore"):
        open_mlflow()


# --- After training ---


@pytest.fixture
def write_model(random_member):
    """Returns a function that writes a file as training does, and gives its two members."""

    def write(path):
        members = [random_member(DeterministicModel, member) for member in range(2)]
        Path(path).write_bytes(pickle.dumps((members, {"format_version": 1, "seed": 0})))
        return members

    return write


def logged_models(client, run_id):
    models = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    return [(model.name, str(model.status)) for model in models if model.source_run_id == run_id]


def test_load_run_gives_the_ensemble_that_the_run_trained(store, summary, write_model, capfd):
    members = write_model("hopper.pkl")
    with open_mlflow() as tracker:
        tracker.finish(summary, [Path("hopper.pkl")])
    Path("hopper.pkl").unlink()

    random = np.random.default_rng(0)
    states, actions = random.normal(size=(20, 3)).astype("float32"), random.normal(size=(20, 2)).astype("float32")
    predicted = load_run(tracker.run_id).predict(states, actions)[0].detach().numpy()
    for member, prediction in zip(members, predicted, strict=True):
        np.testing.assert_allclose(prediction, member.predict(states, actions), rtol=1e-6, atol=1e-6)
    assert capfd.readouterr() == ("", "")
    assert logged_models(store, tracker.run_id) == [("model", "READY")]
    with pytest.raises(InputError, match="no run 'nonsense'"):
        load_run("nonsense")
    with pytest.raises(InputError, match="has 0 models"):
        load_run(nested_runs(store, tracker.run_id)[0].info.run_id)


def test_a_model_that_mlflow_cannot_have_as_such_costs_a_warning(store, summary, capfd):
    Path("model.pkl").write_bytes(b"weights")
    with open_mlflow() as tracker:
        tracker.finish(summary, [Path("model.pkl")])
    (told,) = capfd.readouterr().err.splitlines()
    assert "has model.pkl as a file, but not as an MLflow model ('model.pkl' is not a model" in told
    assert [file.path for file in store.list_artifacts(tracker.run_id)] == ["model.pkl"]
    assert logged_models(store, tracker.run_id) == [("model", "FAILED")]
    assert store.get_run(tracker.run_id).info.status == "FINISHED"


def test_an_evaluation_joins_the_run_that_trained_the_model(store, capfd):
    with open_mlflow() as tracker:
        pass
    Path("report.html").write_text("<html>")
    log_evaluation(tracker.run_id, "hopper", {"nrmse (mean)": 0.5}, [Path("report.html")])
    assert store.get_run(tracker.run_id).data.metrics == {"eval/hopper/nrmse _mean_": 0.5}
    assert [file.path for file in store.list_artifacts(tracker.run_id, "evaluation/hopper")] == [
        "evaluation/hopper/report.html"
    ]
    assert capfd.readouterr().err == ""
    log_evaluation("0" * 32, "hopper", {"nrmse": 0.5}, [])
    told = capfd.readouterr().err
    assert told.startswith("warning: the evaluation is not in MLflow")
    assert "it has no run 000" in told


# --- Servers ---


@pytest.fixture(scope="module")
def mlflow_ui(starting_ui):
    """The folder of an MLflow database, and the address of the ``mlflow ui`` that shows it."""
    folder, address, server = starting_ui
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1).close()
            return folder, address
        except OSError:
            assert time.monotonic() < deadline and server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.05)


def ask(address, endpoint, **query):
    """Asks MLflow's REST API: a search is a POST, all else here a GET."""
    if endpoint.endswith("/search"):
        request = urllib.request.Request(
            f"{address}{endpoint}", json.dumps(query).encode(), {"Content-Type": "application/json"}
        )
    else:
        request = f"{address}{endpoint}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read()


def test_mlflow_ui_shows_the_runs(mlflow_ui, monkeypatch, summary, run_epochs, capfd):
    folder, address = mlflow_ui
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("config.yaml").write_text("fit_epochs: 3\n")
    with open_mlflow() as tracker:
        run_epochs(tracker, range(3))
        tracker.finish(summary, [Path("config.yaml")])
    assert capfd.readouterr() == ("", "")

    experiments = json.loads(ask(address, "/api/2.0/mlflow/experiments/search", max_results=10))["experiments"]
    experiment_id = next(e["experiment_id"] for e in experiments if e["name"] == "dynamics-ensembles")
    runs = json.loads(ask(address, "/api/2.0/mlflow/runs/search", experiment_ids=[experiment_id]))["runs"]
    runs = {run["info"]["run_name"]: run for run in runs}
    assert runs.keys() == {"tiny", "member-0", "member-1"}
    assert {run["info"]["status"] for run in runs.values()} == {"FINISHED"}

    parent, data = runs["tiny"]["info"]["run_id"], runs["tiny"]["data"]
    assert parent == tracker.run_id
    params = {param["key"]: param["value"] for param in data["params"]}
    assert params == {"fit_epochs": "300", "hidden_size": "[256, 256]", "long": "x" * 500}
    tags = {tag["key"]: tag["value"] for tag in data["tags"]}
    assert (tags["dataset"], tags["kind"], tags["elites"]) == ("hopper-tiny", "deterministic", "1")
    assert len(tags["mlflow.source.git.commit"].rstrip("+")) == 40
    metrics = {metric["key"]: metric["value"] for metric in data["metrics"]}
    assert metrics["summary/val_mse"] == 0.25
    assert (metrics["val_mse/mean"], metrics["val_mse/min"], metrics["val_mse/max"]) == (200.5, 200.0, 201.0)
    (used,) = runs["tiny"]["inputs"]["dataset_inputs"]
    assert (used["dataset"]["name"], used["dataset"]["digest"]) == ("hopper-tiny", "0123456789abcdef")
    profile = {"name": "hopper-tiny", "sha256": "0123456789abcdef" * 4, "rows": 120, "trajectories": 6}
    assert json.loads(used["dataset"]["profile"]) == profile

    for member in (0, 1):
        nested = runs[f"member-{member}"]
        assert {"key": "mlflow.parentRunId", "value": parent} in nested["data"]["tags"]
        metrics = {metric["key"]: metric["value"] for metric in nested["data"]["metrics"]}
        assert metrics["val_mse"] == 200.0 + member
        assert metrics["summary/val_mse"] == summary.members[member]["val_mse"]
        assert "summary/nll" not in metrics
    losses = json.loads(
        ask(address, "/api/2.0/mlflow/metrics/get-history", run_id=nested["info"]["run_id"], metric_key="mse_loss")
    )
    assert [(point["step"], point["value"]) for point in losses["metrics"]] == [(1, 2.0), (2, 1.5), (3, 1 / 3 + 1)]
    assert ask(address, "/get-artifact", path="config.yaml", run_id=parent) == b"fit_epochs: 3\n"


class Relay(socketserver.ThreadingTCPServer):
    """Passes connections on to a server. Once stopped, it is to clients what a server is that has died."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, server, port=0):
        self.server, self.sockets = server, []
        super().__init__(("127.0.0.1", port), Passage)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)


class Passage(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(self.server.server) as server:
            self.server.sockets += [self.request, server]
            threading.Thread(target=self.copy, args=(server, self.request), daemon=True).start()
            self.copy(self.request, server)

    def copy(self, source, target):
        with contextlib.suppress(OSError):  # one of them was closed
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_server_that_dies_does_not_stop_training_and_gets_all_when_it_is_back(
    mlflow_ui, monkeypatch, tmp_path, columns, summary, run_epochs, read_csv, assert_complete, write_model, capfd
):
    server = ("127.0.0.1", int(mlflow_ui[1].rpartition(":")[2]))
    relay = Relay(server)
    port = relay.server_address[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    write_model("model.pkl")
    mlflow = open_mlflow(experiment="by a server")
    with Trackers([CsvTracker("metrics.csv", columns), mlflow]) as tracker:
        run_epochs(tracker, range(2))
        mlflow._next_send = 0.0  # ten seconds later
        run_epochs(tracker, [2])
        relay.stop()
        mlflow._next_send = 0.0
        run_epochs(tracker, range(3, 30))
        tracker.close()
        told = capfd.readouterr().err.splitlines()
        # Each epoch has 15 numbers of the ensemble and its members, and 5 more where train_mse is measured.
        missing = 27 * 15 + 9 * 5
        assert len(told) == 2
        assert "training goes on" in told[0]
        assert told[1].endswith(f"lacks {missing} values; the CSV has every value")
        assert len(read_csv("metrics.csv")) == 60

        relay = Relay(server, port)
        tracker.finish(summary, [Path("model.pkl")])
    assert capfd.readouterr().err == ""
    relay.stop()
    client = mlflow_store.open_client(mlflow_ui[1])
    assert_complete(client, mlflow.run_id, 30)
    assert client.get_run(mlflow.run_id).info.status == "FINISHED"
    fetched = client.download_artifacts(mlflow.run_id, "model.pkl", str(tmp_path / "fetched"))
    assert Path(fetched).read_bytes() == Path("model.pkl").read_bytes()
    assert logged_models(client, mlflow.run_id) == [("model", "READY")]


class FailingHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture(params=["refuses", "hangs", "answers 500"])
def broken_server(request):
    """Addresses of servers that are of no use."""
    if request.param == "answers 500":
        server = HTTPServer(("127.0.0.1", 0), FailingHandler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            listener.listen()  # the system accepts connections; nobody ever reads from them
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_useless_server_costs_one_warning_and_little_time(
    broken_server, tmp_path, monkeypatch, columns, summary, run_epochs, read_csv, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", broken_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    start = time.monotonic()
    mlflow = open_mlflow()
    assert mlflow.run_id is None
    with Trackers([CsvTracker("metrics.csv", columns), mlflow]) as tracker:
        run_epochs(tracker, range(20))
        tracker.finish(summary, [Path("metrics.csv")])
    assert time.monotonic() - start < 10
    assert len(read_csv("metrics.csv")) == 40
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert "training goes on" in told[0]
    assert "metrics.csv; the CSV has every value" in told[1]


def test_pauses_grow_while_a_server_fails(tmp_path, monkeypatch, epoch_rows, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = open_mlflow()
    pauses = []
    for epoch in range(8):
        tracker._next_send = 0.0
        tracker.log_epoch(epoch, epoch_rows(epoch))
        pauses.append(tracker._pause)
    assert pauses == [40, 80, 160, 320, 600, 600, 600, 600]
    before = tracker._next_send
    tracker.log_epoch(8, epoch_rows(8))
    assert tracker._next_send == before  # no attempt during the pause
    assert capfd.readouterr().err.count("warning") == 1
