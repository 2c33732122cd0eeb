import contextlib
import re
import shlex
import shutil
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest

from tracking.mlflow_store import (
    find_experiment,
    find_run,
    first_line,
    lock_store,
    open_client,
    sqlite_path,
    tracking_uri,
)
from utils import InputError


def test_the_environment_names_the_store(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri() == "http://127.0.0.1:5000"


def test_a_folder_with_an_odd_name_holds_a_store(empty_store, tmp_path, monkeypatch):
    folder = tmp_path / "50% of #2 ü?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert sqlite_path(tracking_uri()) == folder / "mlflow.db"
    Path("mlflow.db").write_bytes(empty_store.read_bytes())
    Path("config.yaml").touch()
    client = open_client(tracking_uri())
    run_id = client.create_run(find_experiment(client, "ensembles")).info.run_id
    client.log_artifact(run_id, "config.yaml")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "mlflow.db", "mlruns"]
    assert [path.parts[-3] for path in folder.rglob("artifacts/config.yaml")] == [run_id]


def test_the_file_store_of_an_old_mlflow_is_named_with_the_command_that_cures_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("mlruns/0").mkdir(parents=True)
    fields = {"artifact_location": f"file://{tmp_path}/mlruns/0", "experiment_id": "0", "lifecycle_stage": "active"}
    fields |= {"name": "Of old", "creation_time": 1, "last_update_time": 1}
    Path("mlruns/0/meta.yaml").write_text("".join(f"{name}: {value!r}\n" for name, value in fields.items()))
    with pytest.raises(InputError, match="mlflow migrate-filestore") as refusal:
        tracking_uri()
    assert [path.name for path in tmp_path.iterdir()] == ["mlruns"]

    from mlflow.cli import cli

    migrate, remove = str(refusal.value).partition("with: ")[2].split(" && ")
    program, *arguments = shlex.split(migrate)
    assert program == "mlflow"
    cli.main(arguments, standalone_mode=False)  # in this process, as a new one imports MLflow for two seconds
    subprocess.run(remove, shell=True, check=True)
    client = open_client(tracking_uri())
    assert client.get_experiment("0").name == "Of old"
    assert client.create_run("0").info.status == "RUNNING"


def test_an_experiment_is_made_once(store):
    made = find_experiment(store, "ensembles")
    assert find_experiment(store, "ensembles") == made
    assert find_experiment(store, "studies") != made


def test_a_deleted_experiment_is_named_with_the_command_that_brings_it_back(store, monkeypatch):
    made = find_experiment(store, "ensembles")
    store.delete_experiment(made)
    with pytest.raises(InputError, match="experiment 'ensembles' was deleted") as refusal:
        find_experiment(store, "ensembles")

    from mlflow.cli import cli

    restore, setting = re.fullmatch(r".* by: (.*) \(first: export (.*)\)", str(refusal.value)).groups()
    monkeypatch.setenv(*shlex.split(setting)[0].split("=", 1))
    cli.main(shlex.split(restore)[1:], standalone_mode=False)
    assert find_experiment(store, "ensembles") == made


def test_a_run_is_found_unless_it_was_deleted(store):
    run_id = store.create_run("0").info.run_id
    assert find_run(store, run_id).info.run_id == run_id
    store.delete_run(run_id)
    assert find_run(store, run_id) is None
    assert find_run(store, "0" * 32) is None
    assert find_run(store, None) is None


def test_a_database_is_opened_by_one_at_a_time(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    entered = threading.Event()

    def enter():
        with lock_store(uri):
            entered.set()

    with lock_store(uri):
        other = threading.Thread(target=enter)
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(60)
    other.join()


def test_a_server_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lock_store("http://127.0.0.1:5000"), lock_store("http://127.0.0.1:5000"):
        assert list(tmp_path.iterdir()) == []


def test_the_message_of_an_error_fits_into_a_line():
    assert first_line(OSError("no space\nleft")) == "no space"
    assert first_line(OSError("x" * 999)) == "x" * 160 + "..."


# --- Databases that a kill has cut short ---


def cut(path, how):
    """Leaves a database as a process leaves it that is killed while MLflow makes it."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM experiments")
        if how == "few tables":
            database.execute("DROP TABLE runs")
        if how == "half migrated":
            database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        if how == "no version":
            database.execute("DROP TABLE alembic_version")
    if how == "empty file":
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["few tables", "half migrated", "no version", "empty file"])
def test_a_database_that_was_cut_short_is_made_anew_as_it_holds_no_run(how, empty_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_store, path)
    cut(path, how)
    Path("mlflow.db-journal").write_bytes(b"of the one before")

    with lock_store(f"sqlite:///{path}"):
        client = open_client(f"sqlite:///{path}")
    assert client.create_run(find_experiment(client, "ensembles")).info.status == "RUNNING"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_a_database_that_holds_runs_is_left_alone_whatever_else_it_lacks(empty_store, tmp_path):
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_store, path)
    client = open_client(f"sqlite:///{path}")
    client.create_run("0")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    before = path.read_bytes()
    with lock_store(f"sqlite:///{path}"):
        pass
    assert path.read_bytes() == before


def test_a_database_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with lock_store(f"sqlite:///{path}"):
        pass
    assert path.read_bytes() == before


def open_store(uri):
    with lock_store(uri):
        open_client(uri).search_experiments()


def test_killed_at_any_moment_while_the_database_is_made_the_next_run_makes_it(processes, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for seconds in (0.02, 0.1, 0.3, 0.6):
        process = processes.Process(target=open_store, args=(uri,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
    process = processes.Process(target=open_store, args=(uri,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
