"""A run's own files, damaged or forged: what is resumed ends as the whole run, or one line says what is wrong."""

import io
import itertools
import json
import os
import pickle
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from config import LearnConfig
from data.trajectories import Transitions
from tracking.checkpoints import CheckpointFiles
from tracking.csv_tracker import CsvTracker, read_rows
from tracking.run_folder import RunFolder, RunOrigin, RunRequest, RunShown
from training.batches import normalise_rows
from training.build import build_ensemble
from training.checkpoint import check_checkpoint
from training.loop import train_ensemble
from training.scores import metric_columns, metric_rows

ROWS = 90
CONFIG = LearnConfig(ensemble_size=2, hidden_size=(5,), batch_size=40, fit_epochs=4, kind="probabilistic")
REQUEST = RunRequest("data.hdf5", "ab" * 32, 0.2, None, 0.0, False, CONFIG.to_dict())
DEFAULTS = LearnConfig().to_dict()


def transitions(rows, seed):
    random = np.random.default_rng(seed)
    states, actions = random.normal(size=(rows, 3)), random.normal(size=(rows, 2))
    parts = (states, actions, states + 0.1 * random.normal(size=states.shape))
    return Transitions(*(part.astype(np.float32) for part in parts), None)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that was cut off after its third epoch: its folder, the check of its checkpoints, its columns."""
    logs = tmp_path_factory.mktemp("cut") / "logs"
    run = RunFolder.create(logs, "run", REQUEST, RunOrigin("abc", {"python": "3"}, "learn_model.py"))
    run.hold(CONFIG.to_yaml(), "none\n")
    run.update(shown=RunShown({"kind": "probabilistic"}, 100, 5, 2), mlflow_run_id="ab" * 16)
    ensemble = build_ensemble(CONFIG, transitions(ROWS, 0))
    train, holdout = (normalise_rows(ensemble, transitions(rows, seed)) for rows, seed in ((ROWS, 0), (20, 1)))
    tracker = CsvTracker(run.metrics_csv, metric_columns(ensemble))
    for epoch in itertools.islice(train_ensemble(ensemble, CONFIG, train, holdout), 3):
        tracker.log_epoch(epoch.index, metric_rows(ensemble, CONFIG, epoch))
        run.checkpoints.save(epoch.checkpoint())
    run._lock.release()
    check = partial(check_checkpoint, ensemble=ensemble, config=CONFIG, rows=ROWS)
    return run.path, check, metric_columns(ensemble)


@pytest.fixture
def folder(cut, tmp_path):
    """A copy of the run's folder to damage."""
    return shutil.copytree(cut[0], tmp_path / "logs" / "run")


def put(path, content):
    """Puts something in a file's place: bytes, or what a word names."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path)
    elif content == "device":
        path.symlink_to("/dev/zero")
    elif content is not None:
        path.write_bytes(content)


SPECIAL = ("pipe", "folder", "loop", "device")

# --- Checkpoints ---


def flip(at):
    """Changes one bit where so much of the file lies before it."""

    def damage(content):
        content = bytearray(content)
        content[int(at * len(content))] ^= 1
        return bytes(content)

    return damage


def compressed(content):
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return target.getvalue()


def with_structure(pickled):
    """Puts another pickle into the place of the one that says what tensors there are."""

    def damage(content):
        target = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
            for entry in old.infolist():
                new.writestr(entry.filename, pickled if entry.filename.endswith("/data.pkl") else old.read(entry))
        return target.getvalue()

    return damage


def saved(change):
    """Loads, changes and saves again, as a forger would."""

    def damage(content):
        state = torch.load(io.BytesIO(content), weights_only=True)
        changed = change(state)
        target = io.BytesIO()
        torch.save(state if changed is None else changed, target)
        return target.getvalue()

    return damage


class Calls:
    """Calls something when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def moments(state):
    return state["optimizer"]["state"]


BYTES = {
    "empty": lambda content: b"",
    "ten bytes": lambda content: content[:10],
    "half": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-20],
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: np.random.default_rng(0).bytes(5000),
    "text": lambda content: b"hello\n" * 50,
    "compressed": compressed,
    "a pickle": lambda content: pickle.dumps({"epochs": 2}),
    "a pickle that calls": lambda content: b"cos\nsystem\n(S'touch pwned'\ntR.",
    "a call inside": with_structure(pickle.dumps(Calls(os.system, "touch pwned"), protocol=2)),
    "a call of another protocol": with_structure(pickle.dumps(Calls(os.system, "touch pwned"), protocol=4)),
    "ten gigabytes of zeros": with_structure(pickle.dumps(Calls(bytearray, 10**10), protocol=2)),
    "an endless pickle": with_structure(b"\x80\x02" + b"]" * (5 << 20)),
    "deep lists": with_structure(b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b"."),
    "no pickle": with_structure(b"nothing"),
    **{f"a bit at {at:.0%}": flip(at) for at in (0.15, 0.3, 0.6, 0.75)},
}
FORGED = {
    "a list": lambda state: [1],
    "nothing": lambda state: {},
    "a tensor": lambda state: torch.zeros(3),
    "epochs as text": lambda state: state | {"epochs": "3"},
    "epochs below zero": lambda state: state | {"epochs": -5},
    "epochs beyond the end": lambda state: state | {"epochs": 10**9},
    "epochs as a fraction": lambda state: state | {"epochs": 1.5},
    "epochs as a tensor": lambda state: state | {"epochs": torch.tensor(3)},
    "an epoch less": lambda state: state | {"epochs": 2},
    "an epoch more": lambda state: state | {"epochs": 4},
    "no network": lambda state: state | {"network": {}},
    "weights of another shape": lambda state: state["network"].update({"dynamics.weights.0": torch.zeros(3, 3, 3)}),
    "weights without memory": lambda state: state["network"].update(
        {"dynamics.weights.0": torch.zeros(1).expand(10**6, 10**6)}
    ),
    "weights that are nan": lambda state: state["network"]["dynamics.weights.0"].fill_(float("nan")),
    "other networks": lambda state: state["network"].update(reward=torch.zeros(2)),
    "no optimiser": lambda state: state | {"optimizer": None},
    "no moments": lambda state: moments(state).clear(),
    "short moments": lambda state: [moments(state)[k].update(exp_avg=torch.zeros(1)) for k in moments(state)] and None,
    "short squares": lambda state: (
        [moments(state)[k].update(exp_avg_sq=torch.zeros(2)) for k in moments(state)] and None
    ),
    "moments of integers": lambda state: moments(state)[0].update(exp_avg=torch.zeros(2, 5, 5, dtype=torch.int64)),
    "moments that are nan": lambda state: moments(state)[0]["exp_avg"].fill_(float("nan")),
    "steps of another epoch": lambda state: [moments(state)[k]["step"].fill_(1.0) for k in moments(state)] and None,
    "negative steps": lambda state: moments(state)[0]["step"].fill_(-9.0),
    "no best weights": lambda state: state | {"best": None},
    "best weights that are nan": lambda state: state["best"]["weights"][0].fill_(float("nan")),
    "scores as text": lambda state: state["best"].update(scores=["a", "b"]),
    "scores of nobody": lambda state: state["best"].update(scores=[]),
    "patience without end": lambda state: state["best"].update(epochs_since_best=[10**9, 0]),
}
DAMAGE = BYTES | {f"forged: {name}": saved(change) for name, change in FORGED.items()}


@pytest.mark.parametrize("name", [*DAMAGE, *SPECIAL])
def test_an_unreadable_checkpoint_falls_back_to_the_one_before(cut, folder, capfd, name):
    path = folder / "checkpoint"
    put(path, name if name in SPECIAL else DAMAGE[name](path.read_bytes()))
    state = CheckpointFiles(folder).load("cpu", cut[1])
    assert state["epochs"] == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: the checkpoint") and line.endswith("after epoch 2")
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "name", [*(name for name in DAMAGE if name != "forged: an epoch less"), *SPECIAL]
)  # the one before has it
def test_two_unreadable_checkpoints_are_refused(cut, folder, refused, name):
    for path in (folder / "checkpoint", folder / "checkpoint.before"):
        put(path, name if name in SPECIAL else DAMAGE[name](path.read_bytes()))
    assert "delete it and resume again" in refused(CheckpointFiles(folder).load, "cpu", cut[1])
    assert not Path("pwned").exists()


def test_what_is_undamaged_is_resumed(cut, folder, capfd):
    assert CheckpointFiles(folder).load("cpu", cut[1])["epochs"] == 3
    (folder / "checkpoint").unlink()
    assert CheckpointFiles(folder).load("cpu", cut[1])["epochs"] == 2, "killed between two renames"
    (folder / "checkpoint.before").unlink()
    assert CheckpointFiles(folder).load("cpu", cut[1]) is None
    assert capfd.readouterr().err == ""


# --- run.json ---


def without(*keys):
    def change(record):
        *path, last = keys
        inner = record
        for key in path:
            inner = inner[key]
        del inner[last]

    return change


def setting(value, *keys):
    def change(record):
        *path, last = keys
        inner = record
        for key in path:
            inner = inner[key]
        inner[last] = value

    return change


RECORDS = {
    **{f"no {key}": without(key) for key in ("request", "origin")},
    **{f"no request.{key}": without("request", key) for key in ("dataset", "sha256", "config", "holdout_ratio")},
    **{f"request is {value!r}": setting(value, "request") for value in ([], "x", 5, None, {}, True)},
    **{f"config is {value!r}": setting(value, "request", "config") for value in ([], "x", 5, None, True)},
    **{f"dataset is {value!r}": setting(value, "request", "dataset") for value in ([], 5, None, {}, True)},
    **{f"ratio is {value!r}": setting(value, "request", "holdout_ratio") for value in ("0.2", [0.2], None, True)},
    **{f"samples are {value!r}": setting(value, "request", "holdout_samples") for value in ("5", 0.5, True, [5])},
    **{f"origin is {value!r}": setting(value, "origin") for value in ([], "x", None, {})},
    **{f"versions are {value!r}": setting(value, "origin", "versions") for value in ([], "x", {"python": 3})},
    **{f"csv is {value!r}": setting(value, "csv") for value in (5, ["a"], {}, True, "a\nb", "a\0b", "a\x1b[2Jb")},
    **{
        f"id is {value!r}"[:40]: setting(value, "mlflow_run_id")
        for value in (5, ["a"], {}, True, "x' OR 1=1 --", "a" * 100_000, "", "../../x", "a b", "a\n")
    },
    **{f"products are {value!r}": setting(value, "products") for value in (5, ["a"], True)},
    **{f"finished is {value!r}": setting(value, "finished") for value in (5, [], True, {}, "yes", {"output": "x"})},
    **{f"findings are {value!r}": setting(value, "findings") for value in (5, {}, ["a"], [[]], [5])},
    **{f"shown is {value!r}": setting(value, "shown") for value in (5, [], {}, {"tags": {}})},
    "an unknown entry": setting(1, "unknown"),
    "a long unknown entry": setting(1, "x" * 100_000),
    "an unknown entry of request": setting(1, "request", "unknown"),
}
TEXTS = {
    "empty": b"",
    "half": b'{"request": {"dataset": "data.hdf5", "sha256": ',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"x"',
    "zeros": bytes(500),
    "no text": b"\xff\xfe{}",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"request":' * 100_000,
    "nothing in it": b"{}",
    "a long number": b'{"request": ' + b"9" * 100_000 + b"}",
    "two of them": b"{}{}",
    "a lone surrogate": b'{"\\udcff": 1}',
}


def damage_record(folder, name):
    path = folder / "run.json"
    if name in RECORDS:
        record = json.loads(path.read_text())
        RECORDS[name](record)
        put(path, json.dumps(record).encode())
    else:
        put(path, name if name in SPECIAL else TEXTS[name])


@pytest.mark.parametrize("name", [*RECORDS, *TEXTS, *SPECIAL])
def test_a_damaged_record_is_refused_by_name_and_passed_over_without(folder, refused, name):
    damage_record(folder, name)
    logs = folder.parent
    line = refused(RunFolder.find_unfinished, logs, "run", REQUEST, DEFAULTS)
    assert "run.json" in line and "give another --run_name" in line
    assert RunFolder.find_unfinished(logs, None, REQUEST, DEFAULTS) is None


@pytest.mark.parametrize("key", ["fit_epochs", "fit_lr", "hidden_size", "kind", "seed"])
@pytest.mark.parametrize("value", [-1, "x" * 100_000, [[[1]]], float("nan"), {}])
def test_a_forged_setting_is_another_run(folder, refused, key, value):
    record = json.loads((folder / "run.json").read_text())
    record["request"]["config"][key] = value
    put(folder / "run.json", json.dumps(record).encode())
    assert "was started with other settings" in refused(
        RunFolder.find_unfinished, folder.parent, "run", REQUEST, DEFAULTS
    )


@pytest.mark.parametrize("name", ["config.yaml", "audit.md", ".lock"])
@pytest.mark.parametrize("special", ["folder"])
def test_something_else_in_the_place_of_a_file_of_the_run(folder, refused, name, special):
    run = RunFolder.find_unfinished(folder.parent, "run", REQUEST, DEFAULTS)
    put(folder / name, special)
    assert "cannot be written" in refused(run.hold, "", "")


@pytest.mark.parametrize("leftover", [".checkpoint.abc.tmp", ".run.json.abc.tmp", "folder"])
def test_leftovers_of_a_kill_do_no_harm(folder, leftover):
    put(folder / (".x.tmp" if leftover == "folder" else leftover), "folder" if leftover == "folder" else b"half")
    run = RunFolder.find_unfinished(folder.parent, "run", REQUEST, DEFAULTS)
    run.hold("", "")
    assert [path for path in folder.glob(".*.tmp") if path.is_file()] == []


# --- Two at once ---


def test_a_run_is_trained_by_one_process_at_a_time(folder, refused):
    first, second = (RunFolder.find_unfinished(folder.parent, "run", REQUEST, DEFAULTS) for _ in range(2))
    first.hold("", "")
    assert "is being trained by another process" in refused(second.hold, "", "")
    first._lock.release()
    second.hold("", "")


def test_a_run_that_finished_in_between_is_not_trained_again(folder, refused):
    first, second = (RunFolder.find_unfinished(folder.parent, "run", REQUEST, DEFAULTS) for _ in range(2))
    first.hold("", "")
    first._lock.release()
    record = json.loads((folder / "run.json").read_text())
    record["finished"] = {"output": "model.pkl", "scores": [], "elites": []}
    put(folder / "run.json", json.dumps(record).encode())
    assert "has finished" in refused(second.hold, "", "")


def test_of_two_new_runs_of_one_name_the_second_is_refused(tmp_path, refused):
    origin = RunOrigin("abc", {}, "learn_model.py")
    first, second = (RunFolder.create(tmp_path, "run", REQUEST, origin) for _ in range(2))
    first.hold("one", "")
    assert "is being trained" in refused(second.hold, "two", "")
    first._lock.release()
    assert "exists already" in refused(second.hold, "two", "")
    assert (tmp_path / "run" / "config.yaml").read_text() == "one"


def test_a_lock_that_a_dead_process_left_is_no_lock(folder):
    (folder / ".lock").write_text("4194304\n")
    RunFolder.find_unfinished(folder.parent, "run", REQUEST, DEFAULTS).hold("", "")


@pytest.mark.parametrize("time", [0, 1, 2**31, 2**33])
def test_a_clock_that_jumps_loses_no_run(folder, time):
    os.utime(folder, (time, time))
    assert RunFolder.find_unfinished(folder.parent, None, REQUEST, DEFAULTS).name == "run"


# --- metrics.csv ---

LINES = {
    "no header": lambda lines: lines[1:],
    "half a header": lambda lines: [lines[0][:9]],
    "another header": lambda lines: ["a,b\n", "1,2\n"],
    "a column less": lambda lines: [line.rpartition(",")[0] + "\n" for line in lines],
    "a cell more": lambda lines: [*lines[:2], lines[2].rstrip() + ",1\n", *lines[3:]],
    "a cell less": lambda lines: [*lines[:2], lines[2].rpartition(",")[0] + "\n", *lines[3:]],
    "rows doubled": lambda lines: [lines[0], *[lines[1]] * 5, *lines[2:]],
    "a row missing": lambda lines: [*lines[:2], *lines[3:]],
    "an epoch missing": lambda lines: [*lines[:3], *lines[5:]],
    "rows out of turn": lambda lines: [lines[0], *reversed(lines[1:])],
    "members out of turn": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "text for a number": lambda lines: [*lines[:2], "a" + lines[2], *lines[3:]],
    "a fraction of an epoch": lambda lines: [*lines[:3], "0.5" + lines[3][1:], *lines[4:]],
    "a long number": lambda lines: [*lines[:3], "9" * 5000 + lines[3][1:], *lines[4:]],
    "a long cell": lambda lines: [*lines[:2], "1," + "9" * 200_000 + "\n", *lines[3:]],
    "a quote": lambda lines: [*lines[:2], '"' + lines[2], *lines[3:]],
    "no step": lambda lines: [*lines[:2], lines[2][1:], *lines[3:]],
    "zeros inside": lambda lines: [*lines[:2], "\0" * 60 + "\n", *lines[3:]],
    "a line of zeros": lambda lines: [*lines, "\0" * 40 + "\n"],
}
FILES = {
    "empty": b"",
    "zeros": bytes(500),
    "no text": b"\xff\xfe\n" * 9,
    "a model": pickle.dumps(([], {})),
}


@pytest.mark.parametrize("name", [*LINES, *FILES, *SPECIAL])
def test_damaged_metrics_are_refused(cut, folder, refused, name):
    path = folder / "metrics.csv"
    before = path.read_text().splitlines(keepends=True)
    put(path, name if name in SPECIAL else FILES[name] if name in FILES else "".join(LINES[name](before)).encode())
    assert "CSV" in refused(CsvTracker, path, cut[2], resume_epoch=3)
    if name not in ("a column less", "rows out of turn"):  # which are right for another kind, or another order
        assert "cannot be read" in refused(read_rows, path)


@pytest.mark.parametrize("cut_at", [1, 7, 40, 200])
def test_metrics_that_a_kill_cut_short_are_resumed(cut, folder, cut_at, capfd):
    path = folder / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut_at])
    tracker = CsvTracker(path, cut[2], resume_epoch=2)
    assert [row["step"] for row in tracker.kept_rows] in ([0, 0, 1, 1], [0, 0, 1], [0, 0])


def test_rows_read_back_are_those_that_were_written(cut, folder):
    rows = read_rows(folder / "metrics.csv")
    assert [(row["step"], row["model_id"]) for row in rows] == [
        (step, member) for step in range(3) for member in (0, 1)
    ]
    assert CsvTracker(folder / "metrics.csv", cut[2], resume_epoch=3).kept_rows == rows
