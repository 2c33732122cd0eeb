"""Outputs: nothing that must live is overwritten, and a path that cannot be written is refused before any work."""

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import learn_model
from cli import check_output_file, check_output_folder, output_path
from learn_model import main
from utils import ROOT

LONG = "n" * 300
DEEP = "/".join(["x" * 200] * 25)
COMMAND = ["--config", "c.yaml", "--cpu", "--quiet", "--holdout_ratio", "0.3"]


@pytest.fixture
def place(workplace, monkeypatch):
    """A folder with a dataset, a configuration, earlier runs and odd things under many names."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    random = np.random.default_rng(0)
    with h5py.File("d.hdf5", "w") as file:
        file["observations"] = random.normal(size=(240, 3)).astype("f4")
        file["actions"] = random.normal(size=(240, 2)).astype("f4")
        file["rewards"], file["terminals"] = np.zeros(240, "f4"), np.zeros(240, bool)
        file["timeouts"] = np.arange(240) % 40 == 39
    Path("c.yaml").write_text("fit_epochs: 2\nensemble_size: 2\nhidden_size: [8]\n")
    os.link("d.hdf5", "hard.hdf5")
    os.link("c.yaml", "hard.yaml")
    Path("sym.hdf5").symlink_to("d.hdf5")
    Path("sym.yaml").symlink_to("hard.yaml")
    Path("folder").mkdir()
    Path("symfolder").symlink_to("folder")
    Path("folder/link.hdf5").symlink_to("../hard.hdf5")
    Path("afile").write_text("precious")
    os.mkfifo("pipe")
    Path("loop").symlink_to("pool")
    Path("pool").symlink_to("loop")
    shutil.copy(workplace.parent / "mlflow.db", "old.db")
    os.link("old.db", "old-linked")
    Path("mlflow.db").write_bytes(b"")
    Path("logs/other").mkdir(parents=True)
    for name in ("run.json", "config.yaml", "metrics.csv", "checkpoint"):
        Path("logs/other", name).write_text("of another run")
    return workplace


def contents(folder):
    """Everything in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else os.lstat(path).st_mode
        for path in sorted(folder.rglob("*"))
        if not path.is_fifo()
    }


MUST_LIVE = [
    *("d.hdf5", "./d.hdf5", "folder/../d.hdf5", "hard.hdf5", "sym.hdf5", "folder/link.hdf5", "symfolder/../d.hdf5"),
    *("c.yaml", "hard.yaml", "sym.yaml"),
    *("mlflow.db", "./mlflow.db", "mlflow.db-wal", "mlflow.db-journal", "mlflow.db.lock", "old.db", "old-linked"),
    *("logs/r/run.json", "logs/r/config.yaml", "logs/r/audit.md", "logs/r/checkpoint", "logs/r/checkpoint.before"),
    *("logs/r/.lock", "logs/r/learning_curves.png", "folder/../logs/r/run.json"),
    *("logs/other/run.json", "logs/other/metrics.csv", "logs/other/checkpoint"),
]
IMPOSSIBLE = [
    *("", ".", "./", "..", "folder", "folder/", "newfolder/", "new/.", "symfolder", "/", "pipe", "loop", "pool"),
    *("loop/m.pkl", "afile/m.pkl", "pipe/m.pkl", "/dev/null", "/dev/full", "/dev/zero", "/proc/x", "/sys/x"),
    *(
        LONG,
        "n" * 250,
        f"{LONG}/m.pkl",
        f"new/{LONG}/m.pkl",
        f"folder/{LONG}",
        DEEP,
        f"{DEEP}/m.pkl",
        f"new/{'n' * 250}",
    ),
]


def refuse(arguments, place, capsys):
    """Runs the command, which must refuse in one line and leave everything as it was: that line."""
    before = contents(place)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.isprintable()
    assert contents(place) == before
    return line


@pytest.mark.parametrize("flag", ["--output", "--csv", "--dataset_path"])
@pytest.mark.parametrize("path", MUST_LIVE)
def test_what_must_live_is_not_overwritten(place, capsys, flag, path):
    line = refuse(["--dataset", "d.hdf5", *COMMAND, "--run_name", "r", flag, path], place, capsys)
    assert "overwrite" in line


def test_the_model_does_not_replace_the_metrics(place, capsys):
    line = refuse(["--dataset", "d.hdf5", *COMMAND, "--run_name", "r", "--output", "logs/r/metrics.csv"], place, capsys)
    assert "overwrite" in line


@pytest.mark.parametrize("dataset", ["d.hdf5::observations", "sym.hdf5", "hard.hdf5::a,b"])
@pytest.mark.parametrize("path", ["d.hdf5", "hard.hdf5", "sym.hdf5"])
def test_a_dataset_of_chosen_keys_or_by_a_link_is_not_overwritten(place, capsys, dataset, path):
    assert "--dataset" in refuse(["--dataset", dataset, *COMMAND, "--output", path], place, capsys)


@pytest.mark.parametrize("name", ["hopper-medium-demo", "hopper-random-demo"])
def test_bundled_data_are_not_overwritten(place, capsys, name):
    path = ROOT / "data" / "bundled" / f"{name}.hdf5"
    assert "--dataset" in refuse(["--dataset", name, *COMMAND, "--output", str(path)], place, capsys)


@pytest.mark.parametrize(
    ("first", "second"),
    [("--output", "--csv"), ("--output", "--dataset_path"), ("--csv", "--dataset_path")],
)
@pytest.mark.parametrize("names", [("m", "m"), ("m", "./m"), ("folder/m", "symfolder/m"), ("afile", "folder/../afile")])
def test_two_outputs_are_two_files(place, capsys, first, second, names):
    line = refuse(["--dataset", "d.hdf5", *COMMAND, first, names[0], second, names[1]], place, capsys)
    assert "overwrite" in line


@pytest.mark.parametrize("flag", ["--output", "--csv", "--dataset_path"])
@pytest.mark.parametrize("path", IMPOSSIBLE, ids=lambda path: path[:30] + str(len(path)))
def test_a_path_that_cannot_be_written_is_refused(place, capsys, flag, path):
    refuse(["--dataset", "d.hdf5", *COMMAND, flag, path], place, capsys)


@pytest.mark.parametrize("path", IMPOSSIBLE, ids=lambda path: path[:30] + str(len(path)))
def test_other_commands_refuse_it_by_the_same_checks(place, refused, path):
    before = contents(place)
    if path in ("", "./", "folder/", "newfolder/", "new/."):
        with pytest.raises(Exception, match="is the name of a folder"):
            output_path(path)
    else:
        refused(check_output_file, Path(path), "--output")
    assert contents(place) == before


@pytest.mark.parametrize(
    "path", ["afile", "afile/report", "pipe", "loop", "loop/report", LONG, f"new/{LONG}", DEEP, "logs/other", "."]
)
def test_a_folder_that_cannot_be_made_is_refused(place, refused, path):
    before = contents(place)
    refused(check_output_folder, Path(path), is_ours=False, expected="a report")
    assert contents(place) == before


@pytest.mark.parametrize(
    "path", ["m.pkl", "folder/m.pkl", "new/er/m.pkl", "n" * 240, "logs/r/m.pkl", "afile", "-m", "ü"]
)
def test_other_paths_are_fine(place, path):
    args = learn_model.parse_arguments(["--dataset", "d.hdf5", *COMMAND, "--run_name", "r", f"--output={path}"])
    learn_model.check_paths(args)


def test_the_metrics_of_a_named_run_may_be_named(place):
    args = ["--dataset", "d.hdf5", *COMMAND, "--run_name", "r", "--csv", "logs/r/metrics.csv"]
    learn_model.check_paths(learn_model.parse_arguments(args))


# --- No space ---


def learn_with_space_for(size, arguments, printed):
    """Learns where no file may grow beyond a size, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Path(printed).open("w") as told, contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    os._exit(code)


@pytest.mark.parametrize("size", [0, 300, 1500, 3000, 8000, 12_000, 20_000, 40_000])
def test_without_space_one_line_says_so_and_the_older_model_stays(place, processes, size, tmp_path):
    Path("model.pkl").write_text("the older model")
    os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    arguments = ["--dataset", "d.hdf5", *COMMAND, "--run_name", "r", "--params", "hidden_size=32"]
    process = processes.Process(target=learn_with_space_for, args=(size, arguments, str(tmp_path / "printed")))
    process.start()
    process.join(100)
    assert process.exitcode in (0, 1, 2)
    if process.exitcode:
        assert Path("model.pkl").read_text() == "the older model" or size > 20_000
    assert not list(place.rglob(".*.tmp"))


# --- A real full disk ---


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no disk may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("flag", ["--output", "--csv"])
def test_a_full_disk_costs_one_line_and_the_run_goes_on_later(place, small_disk, monkeypatch, capfd, flag, empty_store):
    shutil.copy(empty_store, place / "mlflow.db")
    target = small_disk / "file"
    target.write_text("the older file")
    filler = small_disk / "filler"
    command = ["--dataset", "d.hdf5", *COMMAND, "--run_name", "r", flag, str(target)]
    fill = learn_model.LearnConfig.to_yaml  # called once all is checked and before anything is trained

    def fill_first(config):
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(1 << 20))
        return fill(config)

    monkeypatch.setattr(learn_model.LearnConfig, "to_yaml", fill_first)
    assert main(command) == 1
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "go on with the same command and --resume --run_name r" in line
    assert target.read_text() == "the older file"
    if flag == "--csv":
        return  # its first rows were never on any disk
    filler.unlink()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([*command, "--resume"]) == 0
    assert target.read_bytes() != b"the older file"


def test_a_database_is_one_whatever_it_is_called(place):
    with contextlib.closing(sqlite3.connect("notes")) as database, database:
        database.execute("CREATE TABLE notes (text TEXT)")
    args = learn_model.parse_arguments(["--dataset", "d.hdf5", *COMMAND, "--output", "notes"])
    with pytest.raises(ValueError, match="is a database"):
        learn_model.check_paths(args)


def test_the_command_itself_ends_with_code_2(place):
    command = [
        sys.executable,
        str(Path(learn_model.__file__)),
        "--dataset",
        "d.hdf5",
        *COMMAND,
        "--output",
        "mlflow.db",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
