import csv
import fcntl
import json
import math
import os
import pickle
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from tracking import mlflow_store
from tracking.csv_tracker import CsvTracker
from tracking.mlflow_tracker import MlflowTracker, load_run
from tracking.trackers import NullTracker, ProgressTracker, Trackers
from utils import InputError

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["step", "model_id", "mse_loss", "lr", "train_mse", "val_mse"]
PARAMS = {"fit_epochs": 300, "hidden_size": [256, 256], "probabilistic": False, "long": "x" * 9000}
DATASET = {"name": "hopper-tiny", "sha256": "0123456789abcdef" * 4, "rows": 120, "trajectories": 6}
SUMMARY = {
    "metrics": {"val_mse": 0.25, "nll": None},
    "members": [{"val_mse": 0.125}, {"val_mse": 0.375}],
    "elites": [1],
}

# A training in its own process, with trackers in the current directory; argv: the number of epochs.
TRAINING = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "tracking")!r}]
from test_tracking import COLUMNS, epoch_rows, open_mlflow
from tracking.csv_tracker import CsvTracker
from tracking.trackers import Trackers
mlflow = open_mlflow()
print(mlflow.run_id, flush=True)
with Trackers([CsvTracker("metrics.csv", COLUMNS), mlflow]) as tracker:
    for epoch in range(int(sys.argv[1])):
        if epoch == 20:
            mlflow._next_send = 0.0  # as if ten seconds had passed; without it, only the first epoch is sent soon
        tracker.log_epoch(epoch, epoch_rows(epoch))
        time.sleep(0.01)
"""


def epoch_rows(epoch, members=2):
    """Numbers that say which epoch and member they belong to; train_mse is measured every third epoch."""
    return [
        {
            "step": epoch + 1,
            "model_id": member,
            "mse_loss": 1 / (epoch + 1) + member,
            "lr": 1e-3,
            "train_mse": 10.0 * epoch + member if epoch % 3 == 0 else None,
            "val_mse": 100.0 * epoch + member,
        }
        for member in range(members)
    ]


def open_mlflow(**changes):
    return MlflowTracker(**{"run_name": "tiny", "params": PARAMS, "dataset": DATASET, "ensemble_size": 2} | changes)


def run_epochs(tracker, epochs):
    for epoch in epochs:
        tracker.log_epoch(epoch, epoch_rows(epoch))


def file_names():
    return sorted(path.name for path in Path().iterdir())


def read_csv(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


# --- CSV ---


def test_csv_has_a_line_per_epoch_and_member_whose_floats_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "metrics.csv"
    rows = epoch_rows(0)
    rows[0]["mse_loss"], rows[1]["mse_loss"], rows[1]["lr"] = 0.1 + 0.2, math.inf, math.nan
    with CsvTracker(path, COLUMNS) as tracker:
        tracker.log_epoch(0, rows)
        tracker.log_epoch(1, epoch_rows(1))
        lines = path.read_text().splitlines()  # before the file is closed
    assert lines == [
        "step,model_id,mse_loss,lr,train_mse,val_mse",
        "1,0,0.30000000000000004,0.001,0.0,0.0",
        "1,1,inf,nan,1.0,1.0",
        "2,0,0.5,0.001,,100.0",
        "2,1,1.5,0.001,,101.0",
    ]


@pytest.mark.parametrize("change", [{"surprise": 1.0}, {"lr": ...}])
def test_csv_names_a_column_that_is_unknown_or_missing(tmp_path, change):
    row = {name: value for name, value in (epoch_rows(0)[0] | change).items() if value is not ...}
    with pytest.raises(ValueError, match=next(iter(change))):
        CsvTracker(tmp_path / "metrics.csv", COLUMNS).log_epoch(0, [row])


def test_csv_replaces_what_was_there_at_the_first_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("metrics.csv").write_text("of another run\n" * 100)
    tracker = CsvTracker("metrics.csv", COLUMNS)  # a bare file name, without a folder
    assert Path("metrics.csv").read_text().startswith("of another run")
    run_epochs(tracker, range(2))
    assert [row["step"] for row in read_csv("metrics.csv")] == ["1", "1", "2", "2"]
    assert file_names() == ["metrics.csv"]


def test_csv_resumes_with_whole_epochs_before_the_given_one(tmp_path):
    path, whole = tmp_path / "metrics.csv", tmp_path / "whole.csv"
    run_epochs(CsvTracker(whole, COLUMNS), range(6))
    run_epochs(CsvTracker(path, COLUMNS), range(5))
    path.write_bytes(path.read_bytes()[:-7])  # a kill amid the last line
    tracker = CsvTracker(path, COLUMNS, resume_epoch=3)
    assert tracker.kept_rows == [row for epoch in range(3) for row in epoch_rows(epoch)]
    run_epochs(tracker, range(3, 6))
    assert path.read_bytes() == whole.read_bytes()


def test_csv_resumes_without_further_epochs(tmp_path):
    path = tmp_path / "metrics.csv"
    run_epochs(CsvTracker(path, COLUMNS), range(3))
    with CsvTracker(path, COLUMNS, resume_epoch=2) as tracker:
        tracker.finish(SUMMARY, [])
    assert len(read_csv(path)) == 4


def test_csv_says_which_epochs_a_resumed_file_lacks(tmp_path, capsys):
    CsvTracker(tmp_path / "gone.csv", COLUMNS, resume_epoch=4)
    assert "holds 0 of the 4 epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "columns are"), ("step,other\n1,2\n", "other"), (",".join(COLUMNS) + "\n1,0,rubbish,1,1,1\n", "damaged")],
)
def test_csv_refuses_to_resume_another_file(tmp_path, content, message):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        CsvTracker(path, COLUMNS, resume_epoch=1)
    assert path.read_text() == content


def test_csv_refuses_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "metrics.csv", "/dev/null"):
        with pytest.raises(InputError, match="cannot be written"):
            CsvTracker(path, COLUMNS)
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("epochs_before", [0, 2])
def test_csv_loses_no_row_when_the_disk_is_full_for_a_while(tmp_path, capsys, epochs_before):
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.csv"
    tracker = CsvTracker(path, COLUMNS)
    run_epochs(tracker, range(epochs_before))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size if path.exists() else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # ten bytes more, which is no whole line
    try:
        run_epochs(tracker, range(epochs_before, 4))
        with pytest.raises(OSError, match="lacks its last rows"):
            tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("warning") == 1
    run_epochs(tracker, [4])
    tracker.close()
    run_epochs(CsvTracker(tmp_path / "whole.csv", COLUMNS), range(5))
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


# --- Progress and the composite ---


def test_progress_writes_some_short_lines_into_a_log_file(capsys):
    with ProgressTracker(200, first_epoch=50) as tracker:
        run_epochs(tracker, range(50, 200))
    lines = capsys.readouterr().err.splitlines()
    # The loss is 1 / (epoch + 1) + member: 1 / 51 + 0.5 on average; the validation error 5000 and 5001.
    assert lines[0].startswith("epoch 51/200: loss 0.5196, val 5000")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"epoch {n}/200" for n in (60, 80, 100, 120, 140, 160, 180, 200)
    ]
    assert all(line.endswith("left") for line in lines)


def test_progress_quiet_writes_nothing(capsys):
    with ProgressTracker(3, quiet=True) as tracker:
        run_epochs(tracker, range(3))
    assert capsys.readouterr().err == ""


def test_progress_draws_a_bar_in_a_terminal(monkeypatch):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    with os.fdopen(child, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        rows = [row | {"val_mse": None} for row in epoch_rows(0)]
        with ProgressTracker(2) as tracker:
            tracker.log_epoch(0, rows)
            time.sleep(0.11)  # tqdm draws ten times a second
            tracker.log_epoch(1, rows)
        drawn = ""
        while "2/2" not in drawn:  # a terminal gives what was written piece by piece
            drawn += os.read(parent, 10_000).decode()
    os.close(parent)
    assert "loss 1.5" in drawn
    assert "val" not in drawn
    assert "\r" in drawn
    assert "epoch 2/2:" not in drawn


class Recorder(NullTracker):
    """Remembers how it was closed; one that is broken raises."""

    def __init__(self, broken=False):
        self.broken, self.closed = broken, None

    def close(self, failed=False, interrupted=False):
        self.closed = (failed, interrupted)
        if self.broken:
            raise OSError("broken")


@pytest.mark.parametrize(
    ("error", "closed"), [(None, (False, False)), (RuntimeError, (True, False)), (KeyboardInterrupt, (True, True))]
)
def test_trackers_close_each_and_tell_how_training_ended(error, closed):
    trackers = [Recorder(), Recorder()]
    try:
        with Trackers(trackers):
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert [tracker.closed for tracker in trackers] == [closed, closed]


def test_trackers_close_the_others_when_one_breaks():
    trackers = [Recorder(), Recorder(broken=True), Recorder()]
    with pytest.raises(OSError, match="broken"), Trackers(trackers):
        pass
    assert [tracker.closed for tracker in trackers] == [(False, False)] * 3


# --- MLflow ---


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An MLflow database with its tables, made once as that takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_store.open_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    """Works in an empty folder with an empty MLflow database; gives a client that looks into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, "mlflow.db")
    return mlflow_store.open_client(mlflow_store.tracking_uri())


@pytest.fixture
def mlflow_command(tmp_path):
    """Starts ``mlflow ui`` or ``mlflow server`` in the test's folder and returns its address and process."""
    servers = []

    def start(command, port=None):
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        log = (tmp_path / "server.log").open("a")
        executable = [sys.executable, "-m", "mlflow", command, "--port", str(port), "--workers", "1"]
        # Without the workers for MLflow's own background jobs, which take longer to start than all the rest.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(
            executable, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        servers.append(server)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                return address, server
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)

    yield start
    for server in servers:
        stop(server)


def stop(server):
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


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


def nested_runs(client, run_id):
    experiment_id = client.get_run(run_id).info.experiment_id
    runs = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return sorted(runs, key=lambda run: run.info.run_name)


def history(client, run_id, name):
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def assert_complete(client, run_id, epochs):
    """Every number of every epoch is there once, in the ensemble's run and in its members'."""
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


def test_mlflow_ui_shows_the_runs(store, mlflow_command, capfd):
    Path("config.yaml").write_text("fit_epochs: 3\n")
    with open_mlflow() as tracker:
        run_epochs(tracker, range(3))
        tracker.finish(SUMMARY, [Path("config.yaml")])
    assert capfd.readouterr() == ("", "")

    address, _ = mlflow_command("ui")
    experiments = json.loads(ask(address, "/api/2.0/mlflow/experiments/search", max_results=10))["experiments"]
    experiment_id = next(e["experiment_id"] for e in experiments if e["name"] == "dynamics-ensembles")
    runs = json.loads(ask(address, "/api/2.0/mlflow/runs/search", experiment_ids=[experiment_id]))["runs"]
    runs = {run["info"]["run_name"]: run for run in runs}
    assert runs.keys() == {"tiny", "member-0", "member-1"}
    assert {run["info"]["status"] for run in runs.values()} == {"FINISHED"}

    parent, data = runs["tiny"]["info"]["run_id"], runs["tiny"]["data"]
    assert parent == tracker.run_id
    params = {param["key"]: param["value"] for param in data["params"]}
    assert params == {"fit_epochs": "300", "hidden_size": "[256, 256]", "probabilistic": "False", "long": "x" * 500}
    tags = {tag["key"]: tag["value"] for tag in data["tags"]}
    assert (tags["dataset"], tags["kind"], tags["elites"]) == ("hopper-tiny", "deterministic", "1")
    assert len(tags["mlflow.source.git.commit"].rstrip("+")) == 40
    metrics = {metric["key"]: metric["value"] for metric in data["metrics"]}
    assert metrics["summary/val_mse"] == 0.25
    assert (metrics["val_mse/mean"], metrics["val_mse/min"], metrics["val_mse/max"]) == (200.5, 200.0, 201.0)
    (used,) = runs["tiny"]["inputs"]["dataset_inputs"]
    assert (used["dataset"]["name"], used["dataset"]["digest"]) == ("hopper-tiny", "0123456789abcdef")
    assert json.loads(used["dataset"]["profile"])["rows"] == 120

    for member in (0, 1):
        nested = runs[f"member-{member}"]
        assert {"key": "mlflow.parentRunId", "value": parent} in nested["data"]["tags"]
        metrics = {metric["key"]: metric["value"] for metric in nested["data"]["metrics"]}
        assert metrics["val_mse"] == 200.0 + member
        assert metrics["summary/val_mse"] == SUMMARY["members"][member]["val_mse"]
    losses = json.loads(
        ask(address, "/api/2.0/mlflow/metrics/get-history", run_id=nested["info"]["run_id"], metric_key="mse_loss")
    )
    assert [(point["step"], point["value"]) for point in losses["metrics"]] == [(1, 2.0), (2, 1.5), (3, 1 / 3 + 1)]
    assert ask(address, "/get-artifact", path="config.yaml", run_id=parent) == b"fit_epochs: 3\n"


def test_mlflow_takes_numbers_that_are_not_finite(store):
    rows = epoch_rows(0)
    rows[0] |= {"mse_loss": math.nan, "val_mse": math.inf}
    with open_mlflow() as tracker:
        tracker.log_epoch(0, rows)
    member, other = nested_runs(store, tracker.run_id)
    assert math.isnan(member.data.metrics["mse_loss"])
    assert member.data.metrics["val_mse"] > 1e300  # how MLflow's database keeps infinity
    assert other.data.metrics["val_mse"] == 1.0
    assert math.isnan(store.get_run(tracker.run_id).data.metrics["mse_loss/min"])


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_mlflow_run_tells_how_training_ended(store, error, status):
    with pytest.raises(error), open_mlflow() as tracker:
        raise error
    runs = [store.get_run(tracker.run_id), *nested_runs(store, tracker.run_id)]
    assert [run.info.status for run in runs] == [status] * 3


def test_mlflow_sends_more_numbers_than_one_call_takes(store):
    with open_mlflow() as tracker:
        tracker.log_epoch(0, epoch_rows(0))
        run_epochs(tracker, range(1, 600))  # 3 columns of 600 epochs for each member, 9 for the ensemble
    assert_complete(store, tracker.run_id, 600)


def test_a_killed_training_resumes_to_complete_records_without_duplicates(store):
    training = subprocess.Popen([sys.executable, "-c", TRAINING, "100000"], stdout=subprocess.PIPE, text=True)
    run_id = training.stdout.readline().strip()
    while not Path("metrics.csv").exists() or len(read_csv("metrics.csv")) < 120:
        assert training.poll() is None
        time.sleep(0.02)
    training.kill()
    training.communicate()
    assert len(history(store, run_id, "lr/mean")) == 21
    assert store.get_run(run_id).info.status == "RUNNING"

    # The last checkpoint may be of later epochs than MLflow has, or of earlier ones.
    for resume_epoch in (55, 15):
        csv_tracker = CsvTracker("metrics.csv", COLUMNS, resume_epoch=resume_epoch)
        mlflow = open_mlflow(resume_run_id=run_id, resume_rows=csv_tracker.kept_rows, params=PARAMS | {"fit_epochs": 9})
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


def test_resuming_a_run_that_was_deleted_makes_a_new_one(store, capsys):
    with open_mlflow() as tracker:
        run_epochs(tracker, range(2))
    store.delete_run(tracker.run_id)
    rows = [row for epoch in range(2) for row in epoch_rows(epoch)]
    with open_mlflow(resume_run_id=tracker.run_id, resume_rows=rows) as resumed:
        run_epochs(resumed, range(2, 3))
    assert resumed.run_id != tracker.run_id
    assert tracker.run_id in capsys.readouterr().err
    assert_complete(store, resumed.run_id, 3)


def test_processes_that_race_to_create_the_database_all_succeed(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    trainings = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING, "2"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    run_ids = [training.communicate(timeout=120)[0].strip() for training in trainings]
    assert [training.returncode for training in trainings] == [0, 0]
    client = mlflow_store.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    for run_id in run_ids:
        assert_complete(client, run_id, 2)


def test_a_server_that_dies_does_not_stop_training_and_gets_all_when_it_is_back(
    store, mlflow_command, monkeypatch, tmp_path, capfd
):
    address, server = mlflow_command("server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    Path("model.pkl").write_bytes(b"weights")
    mlflow = open_mlflow()
    with Trackers([CsvTracker("metrics.csv", COLUMNS), mlflow]) as tracker:
        run_epochs(tracker, range(2))
        mlflow._next_send = 0.0  # ten seconds later
        run_epochs(tracker, [2])
        stop(server)
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

        mlflow_command("server", int(address.rpartition(":")[2]))
        tracker.finish(SUMMARY, [Path("model.pkl")])
    assert capfd.readouterr().err == ""
    client = mlflow_store.open_client(address)
    assert_complete(client, mlflow.run_id, 30)
    assert client.get_run(mlflow.run_id).info.status == "FINISHED"
    assert Path(client.download_artifacts(mlflow.run_id, "model.pkl", str(tmp_path))).read_bytes() == b"weights"


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


def test_a_useless_server_costs_one_warning_and_little_time(broken_server, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", broken_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    start = time.monotonic()
    mlflow = open_mlflow()
    assert mlflow.run_id is None
    with Trackers([CsvTracker("metrics.csv", COLUMNS), mlflow]) as tracker:
        run_epochs(tracker, range(20))
        tracker.finish(SUMMARY, [Path("metrics.csv")])
    assert time.monotonic() - start < 10
    assert len(read_csv("metrics.csv")) == 40
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert "training goes on" in told[0]
    assert "metrics.csv; the CSV has every value" in told[1]


def test_pauses_grow_while_a_server_fails(tmp_path, monkeypatch, capfd):
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


def test_the_file_store_of_an_old_mlflow_is_named_with_the_command_that_cures_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("mlruns/0").mkdir(parents=True)
    fields = {"artifact_location": f"file://{tmp_path}/mlruns/0", "experiment_id": "0", "lifecycle_stage": "active"}
    fields |= {"name": "Default", "creation_time": 1, "last_update_time": 1}
    Path("mlruns/0/meta.yaml").write_text("".join(f"{name}: {value!r}\n" for name, value in fields.items()))
    with pytest.raises(InputError, match="mlflow migrate-filestore") as refusal:
        open_mlflow()
    assert file_names() == ["mlruns"]

    command = str(refusal.value).partition("with: ")[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env=os.environ | {"PATH": path}, capture_output=True)
    with open_mlflow() as tracker:
        run_epochs(tracker, range(1))
    assert_complete(mlflow_store.open_client(mlflow_store.tracking_uri()), tracker.run_id, 1)


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


def test_a_folder_with_an_odd_name_holds_a_store(empty_store, tmp_path, monkeypatch):
    folder = tmp_path / "50% of #2 ü?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, "mlflow.db")
    Path("config.yaml").touch()
    with open_mlflow() as tracker:
        run_epochs(tracker, range(1))
        tracker.finish(SUMMARY, [Path("config.yaml")])
    assert file_names() == ["config.yaml", "mlflow.db", "mlflow.db.lock", "mlruns"]
    assert len(list(folder.rglob("artifacts/config.yaml"))) == 1


def test_load_run_gives_the_ensemble_that_the_run_trained(store, capfd):
    from deterministic_model import DeterministicModel
    from dynamics_model import Architecture, DynamicsEnsemble, Normalisation, random_stream

    generator = np.random.default_rng(0)
    states, actions = generator.normal(size=(20, 3)).astype("float32"), generator.normal(size=(20, 2)).astype("float32")

    class Rows:
        rewards = np.zeros(20, dtype="float32")

    Rows.states, Rows.actions, Rows.next_states = states, actions, states + 0.1 * states[:, ::-1]
    architecture = Architecture(state_dim=3, action_dim=2, hidden_size=(8,), activation_fn="relu")
    normalisation = Normalisation.from_transitions(Rows)
    streams = [random_stream(0, member, "initialisation") for member in range(2)]
    ensemble = DynamicsEnsemble([DeterministicModel(architecture, normalisation, stream) for stream in streams])
    Path("hopper.pkl").write_bytes(pickle.dumps((ensemble.members(), {"format_version": 1, "seed": 0})))
    with open_mlflow() as tracker:
        tracker.finish(SUMMARY, [Path("hopper.pkl")])
    Path("hopper.pkl").unlink()

    loaded = load_run(tracker.run_id)
    np.testing.assert_array_equal(
        loaded.predict(states, actions)[0].detach(), ensemble.predict(states, actions)[0].detach()
    )
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InputError, match="no run 'nonsense'"):
        load_run("nonsense")
    with pytest.raises(InputError, match="has 0 models"):
        load_run(nested_runs(store, tracker.run_id)[0].info.run_id)
