import json
import multiprocessing
import resource
import signal
from pathlib import Path

import pytest
import torch

from tracking.run_folder import RunFolder, unique_name
from utils import InputError

REQUEST = {"dataset": "hopper", "config": {"fit_epochs": 3, "seed": 0}}
ORIGIN = {"git_commit": None, "versions": {}, "command": "learn_model.py"}


def begin(logs: Path, name: str = "run", request: dict = REQUEST) -> RunFolder:
    run = RunFolder.create(logs, name, request, ORIGIN)
    run.hold("seed: 0\n")
    return run


def test_a_new_run_writes_what_was_asked_for_before_training(tmp_path):
    run = begin(tmp_path / "logs")
    record = json.loads((tmp_path / "logs" / "run" / "run.json").read_text())
    assert record == {"request": REQUEST, "origin": ORIGIN, "csv": None, "mlflow_run_id": None, "finished": None}
    assert run.config_yaml.read_text() == "seed: 0\n"


def test_a_name_is_given_once(tmp_path):
    begin(tmp_path)
    with pytest.raises(InputError, match=r"'run' exists already.*--resume.*--run_name"):
        RunFolder.create(tmp_path, "run", REQUEST, ORIGIN)


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.create(tmp_path / "logs", "run", REQUEST, ORIGIN)


def test_checkpoints_come_back_as_they_were_and_end_with_the_run(tmp_path):
    run = begin(tmp_path)
    assert run.load_checkpoint("cpu") is None
    state = {"epochs": 2, "network": {"weight": torch.arange(4.0)}, "best": None}
    run.save_checkpoint({"epochs": 1})
    run.save_checkpoint(state)
    loaded = run.load_checkpoint("cpu")
    assert loaded["epochs"] == 2
    assert torch.equal(loaded["network"]["weight"], state["network"]["weight"])
    run.finish({"elites": [0]})
    assert run.load_checkpoint("cpu") is None
    assert json.loads((run.path / "run.json").read_text())["finished"] == {"elites": [0]}


def _save_under_a_size_limit(logs: Path, answers) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as on a full disk: larger files cannot be written
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = RunFolder.find_unfinished(logs, "run", REQUEST)
    for _ in range(2):
        run.save_checkpoint({"epochs": 2, "weight": torch.zeros(100_000)})
    answers.put("went on")


def test_a_checkpoint_that_cannot_be_written_warns_and_keeps_the_one_before(tmp_path):
    run = begin(tmp_path)
    run.save_checkpoint({"epochs": 1})
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_save_under_a_size_limit, args=(tmp_path, answers))
    process.start()
    assert answers.get(timeout=60) == "went on"
    process.join()
    assert run.load_checkpoint("cpu") == {"epochs": 1}
    assert [path.name for path in run.path.iterdir() if path.suffix == ".tmp"] == []


def test_the_latest_unfinished_run_that_asked_for_the_same_is_found(tmp_path):
    begin(tmp_path, "other", {"dataset": "ant", "config": {"fit_epochs": 3, "seed": 0}})
    begin(tmp_path, "finished").finish({})
    assert RunFolder.find_unfinished(tmp_path, None, REQUEST) is None
    mine = begin(tmp_path, "mine")
    assert RunFolder.find_unfinished(tmp_path, None, REQUEST).path == mine.path


def test_a_folder_cut_off_before_its_first_file_is_passed_over(tmp_path):
    (tmp_path / "empty").mkdir()
    assert RunFolder.find_unfinished(tmp_path, None, REQUEST) is None
    assert RunFolder.find_unfinished(tmp_path / "missing", None, REQUEST) is None


def test_a_named_run_says_why_it_cannot_be_resumed(tmp_path):
    run = begin(tmp_path)
    other = {"dataset": "hopper", "config": {"fit_epochs": 9, "seed": 0}}
    with pytest.raises(InputError, match=r"fit_epochs 3, now 9"):
        RunFolder.find_unfinished(tmp_path, "run", other)
    run.finish({})
    with pytest.raises(InputError, match="has finished"):
        RunFolder.find_unfinished(tmp_path, "run", REQUEST)


def _hold(logs: Path, answers) -> None:
    try:
        RunFolder.find_unfinished(logs, "run", REQUEST).hold("seed: 0\n")
        answers.put("held")
    except InputError as error:
        answers.put(str(error))


def test_two_processes_never_train_the_same_run(tmp_path):
    run = begin(tmp_path)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_hold, args=(tmp_path, answers))
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


def test_damaged_records_are_passed_over_unless_named(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    mine = begin(tmp_path, "mine")
    assert RunFolder.find_unfinished(tmp_path, None, REQUEST).path == mine.path
    with pytest.raises(InputError, match="damaged"):
        RunFolder.find_unfinished(tmp_path, "broken", REQUEST)


def test_what_a_killed_write_left_behind_is_removed(tmp_path):
    run = begin(tmp_path)
    (run.path / ".checkpoint.abc.tmp").write_text("half")
    run.hold("seed: 0\n")
    assert not (run.path / ".checkpoint.abc.tmp").exists()


def test_made_up_names_are_free(tmp_path, monkeypatch):
    first = unique_name(tmp_path, "hopper")
    (tmp_path / first).mkdir()
    second = unique_name(tmp_path, "hopper")
    assert first.startswith("hopper-")
    assert second != first
    assert not (tmp_path / second).exists()
