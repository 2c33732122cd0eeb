import contextlib
import dataclasses
import json
import re
import resource
import signal

import pytest
import torch

from tracking.run_folder import RunFolder, RunOrigin, RunOutcome, RunRecord, RunRequest, claim_name
from utils import InputError, Origin

DEFAULTS = {"fit_epochs": 40, "seed": 0, "kind": None}
REQUEST = RunRequest(
    dataset="hopper",
    sha256="0123456789abcdef" * 4,
    holdout_ratio=0.2,
    holdout_samples=None,
    test_ratio=0.0,
    track_training=False,
    config={"fit_epochs": 3, "seed": 0, "kind": None},
)
ORIGIN = RunOrigin(git_commit=None, versions={"python": "3.11"}, command="learn_model.py --dataset hopper")
OUTCOME = RunOutcome("model.pkl", [{"val_mse": 0.5, "nll": None}], [0])

FINDINGS = [{"name": "copies", "count": 2, "matters": True}]

# What the first version wrote, before there was a setting called kind, other ways to hold out, or an audit.
OLD_RECORD = {
    "request": {
        "dataset": "hopper",
        "sha256": "0123456789abcdef" * 4,
        "holdout_ratio": 0.2,
        "holdout_samples": None,
        "test_ratio": 0.0,
        "track_training": False,
        "config": {"fit_epochs": 3, "seed": 0},
    },
    "origin": {"command": "learn_model.py --dataset hopper", "git_commit": None, "versions": {"python": "3.11"}},
    "csv": None,
    "mlflow_run_id": "a1b2",
    "finished": None,
}


def begin(logs, name="run", request=REQUEST):
    run = RunFolder.create(logs, name, request, ORIGIN, findings=FINDINGS)
    run.hold("seed: 0\n", "2 copies\n")
    return run


def find(logs, name=None, request=REQUEST):
    return RunFolder.find_unfinished(logs, name, request, DEFAULTS)


def write(logs, name, record):
    (logs / name).mkdir()
    (logs / name / "run.json").write_text(record if isinstance(record, str) else json.dumps(record))


def test_a_new_run_writes_what_was_asked_for_before_training(tmp_path):
    run = begin(tmp_path / "logs")
    written = json.loads((tmp_path / "logs" / "run" / "run.json").read_text())
    newer = {"config": REQUEST.config, "holdout_blocks": None, "holdout_dataset": None, "holdout_sha256": None}
    changes = {
        "request": OLD_RECORD["request"] | newer,
        "findings": FINDINGS,
        "mlflow_run_id": None,
        "products": None,
        "shown": None,
    }
    assert written == OLD_RECORD | changes
    assert (run.config_yaml.read_text(), run.audit_md.read_text()) == ("seed: 0\n", "2 copies\n")


def test_a_record_comes_back_as_it_was(tmp_path):
    run = RunFolder.create(tmp_path, "run", REQUEST, ORIGIN, tmp_path / "elsewhere.csv")
    assert run.metrics_csv == tmp_path / "elsewhere.csv"
    run.hold("", "")
    run.update(mlflow_run_id="a1b2")
    assert find(tmp_path, "run").record == run.record == RunRecord(REQUEST, ORIGIN, str(run.metrics_csv), [], "a1b2")
    run.finish(OUTCOME)
    written = json.loads((run.path / "run.json").read_text())
    assert written["finished"] == {
        "output": "model.pkl",
        "scores": [{"val_mse": 0.5, "nll": None}],
        "elites": [0],
        "failed": [],
    }
    assert RunRecord.from_dict(written) == run.record


def test_the_origin_of_a_run_is_this_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["learn_model.py", "--dataset", "my data.hdf5"])
    origin = RunOrigin.here()
    assert origin.command == "learn_model.py --dataset 'my data.hdf5'"
    assert Origin(origin.git_commit, origin.versions) == Origin.here()


def test_a_name_is_given_once(tmp_path):
    begin(tmp_path)
    with pytest.raises(InputError, match=r"'run' exists already.*--resume.*--run_name"):
        RunFolder.create(tmp_path, "run", REQUEST, ORIGIN)


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.create(tmp_path / "logs", "run", REQUEST, ORIGIN)


# --- Checkpoints ---


def test_checkpoints_come_back_as_they_were_and_end_with_the_run(tmp_path):
    run = begin(tmp_path)
    assert run.checkpoints.load("cpu") is None
    state = {"epochs": 2, "network": {"weight": torch.arange(4.0)}, "best": None}
    run.checkpoints.save({"epochs": 1})
    run.checkpoints.save(state)
    loaded = run.checkpoints.load("cpu")
    assert loaded["epochs"] == 2
    assert torch.equal(loaded["network"]["weight"], state["network"]["weight"])
    run.finish(OUTCOME)
    assert run.checkpoints.load("cpu") is None


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-100], lambda data: b"rubbish" * 99])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path, damage):
    run = begin(tmp_path)
    run.checkpoints.save({"epochs": 1, "weight": torch.zeros(100)})
    path = run.path / "checkpoint"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"checkpoint cannot be read.*delete it and resume again") as error:
        run.checkpoints.load("cpu")
    assert "\n" not in str(error.value)
    path.unlink()
    assert run.checkpoints.load("cpu") is None


def _save_under_a_size_limit(logs):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as on a full disk: larger files cannot be written
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = find(logs, "run")
    with (logs / "stderr").open("w") as told, contextlib.redirect_stderr(told):
        for _ in range(2):
            run.checkpoints.save({"epochs": 2, "weight": torch.zeros(100_000)})


def test_a_checkpoint_that_cannot_be_written_warns_and_keeps_the_one_before(tmp_path, processes):
    run = begin(tmp_path)
    run.checkpoints.save({"epochs": 1})
    process = processes.Process(target=_save_under_a_size_limit, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    (told,) = (tmp_path / "stderr").read_text().splitlines()
    assert told.startswith("warning: no checkpoint could be written")
    assert run.checkpoints.load("cpu") == {"epochs": 1}
    assert [path.name for path in run.path.iterdir() if path.suffix == ".tmp"] == []


# --- Finding a run again ---


def test_the_latest_unfinished_run_that_asked_for_the_same_is_found(tmp_path):
    begin(tmp_path, "other", dataclasses.replace(REQUEST, dataset="ant"))
    begin(tmp_path, "finished").finish(OUTCOME)
    assert find(tmp_path) is None
    mine = begin(tmp_path, "mine")
    assert find(tmp_path).path == mine.path


@pytest.mark.parametrize("name", [None, "old"])
def test_a_run_of_an_older_version_is_found(tmp_path, name):
    write(tmp_path, "old", OLD_RECORD)
    run = find(tmp_path, name)
    assert run.record == RunRecord(REQUEST, ORIGIN, mlflow_run_id="a1b2")
    run.hold("seed: 0\n", "")
    assert json.loads((run.path / "run.json").read_text())["request"]["config"] == REQUEST.config


def test_a_setting_that_an_older_version_lacks_must_have_its_default(tmp_path):
    write(tmp_path, "old", OLD_RECORD)
    other = dataclasses.replace(REQUEST, config=REQUEST.config | {"kind": "probabilistic"})
    assert find(tmp_path, request=other) is None
    with pytest.raises(InputError, match=r"kind None, now 'probabilistic'"):
        find(tmp_path, "old", other)


def test_a_setting_that_only_a_newer_version_has_is_another_request(tmp_path):
    config = REQUEST.config | {"dropout": None}
    write(tmp_path, "new", OLD_RECORD | {"request": OLD_RECORD["request"] | {"config": config}})
    assert find(tmp_path) is None
    with pytest.raises(InputError, match=r"dropout None, now 'unknown'"):
        find(tmp_path, "new")


def test_a_folder_cut_off_before_its_first_file_is_passed_over(tmp_path):
    (tmp_path / "empty").mkdir()
    assert find(tmp_path) is None
    assert find(tmp_path, "empty") is None
    assert find(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"config": REQUEST.config | {"fit_epochs": 9}}, "fit_epochs 3, now 9"), ({"dataset": "ant"}, "'hopper', now 'a")],
)
def test_a_named_run_says_which_setting_differs(tmp_path, change, message):
    begin(tmp_path)
    with pytest.raises(InputError, match=message):
        find(tmp_path, "run", dataclasses.replace(REQUEST, **change))


def test_a_named_run_that_has_finished_is_not_resumed(tmp_path):
    begin(tmp_path).finish(OUTCOME)
    with pytest.raises(InputError, match="has finished"):
        find(tmp_path, "run")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 1 column 2"),
        ("[" * 100_000, "recursion"),
        ([], "the record is list, expected dict"),
        ({}, "missing or unknown entry 'origin'"),
        (OLD_RECORD | {"surprise": 1}, "missing or unknown entry 'surprise'"),
        (OLD_RECORD | {"csv": 1}, "csv is int, expected str"),
        (OLD_RECORD | {"request": None}, "request is NoneType, expected dict"),
        (OLD_RECORD | {"request": OLD_RECORD["request"] | {"config": "all"}}, "config is str, expected dict"),
        (OLD_RECORD | {"request": OLD_RECORD["request"] | {"holdout_ratio": "0.2"}}, "holdout_ratio is str"),
        (OLD_RECORD | {"origin": {"command": ""}}, "missing or unknown entry 'git_commit'"),
        (OLD_RECORD | {"finished": True}, "finished is bool"),
    ],
)
def test_damaged_records_are_passed_over_unless_named(tmp_path, record, message):
    write(tmp_path, "broken", record)
    assert find(tmp_path) is None
    with pytest.raises(InputError, match=f"run.json is damaged .*{message}.*--run_name") as error:
        find(tmp_path, "broken")
    assert "\n" not in str(error.value)


def test_a_record_that_cannot_be_read_is_passed_over_unless_named(tmp_path):
    (tmp_path / "odd" / "run.json").mkdir(parents=True)
    mine = begin(tmp_path, "mine")
    assert find(tmp_path).path == mine.path
    with pytest.raises(InputError, match="cannot be read"):
        find(tmp_path, "odd")


# --- One process at a time ---


def _hold(logs, answers):
    try:
        find(logs, "run").hold("seed: 0\n", "")
        answers.put("held")
    except InputError as error:
        answers.put(str(error))


def test_two_processes_never_train_the_same_run(tmp_path, processes):
    run = begin(tmp_path)
    answers = processes.Queue()
    process = processes.Process(target=_hold, args=(tmp_path, answers))
    process.start()
    assert "another process" in answers.get(timeout=60)
    process.join()
    assert run.path.exists()


def test_a_discarded_run_leaves_nothing(tmp_path):
    begin(tmp_path / "logs").discard()
    assert list(tmp_path.iterdir()) == []


def test_discarding_a_run_spares_what_was_there_before(tmp_path):
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "notes.txt").write_text("mine")
    begin(tmp_path / "logs").discard()
    assert [path.name for path in (tmp_path / "logs" / "run").iterdir()] == ["notes.txt"]


def test_what_a_killed_write_left_behind_is_removed(tmp_path):
    run = begin(tmp_path)
    (run.path / ".checkpoint.abc.tmp").write_text("half")
    run.hold("seed: 0\n", "")
    assert not (run.path / ".checkpoint.abc.tmp").exists()


def test_made_up_names_are_taken_at_once(tmp_path):
    names = [claim_name(tmp_path, "hopper") for _ in range(3)]
    assert len(set(names)) == 3
    assert all(name.startswith("hopper-") and (tmp_path / name).is_dir() for name in names)


@pytest.mark.parametrize(
    "stem", ["x" * 400, "\u00e9" * 400, "a b/c$", "\udcff", ".hidden", "+a", "a\nb", "=1+1", "..", "<b>|"]
)
def test_made_up_names_are_names_whatever_the_file_is_called(tmp_path, stem):
    name = claim_name(tmp_path, stem)
    assert re.fullmatch(r"[\w-][\w.+-]*", name)
    assert (tmp_path / name).is_dir()
