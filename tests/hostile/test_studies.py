"""Studies: what lies in their folders is checked whole; processes that are killed or stopped cost nothing but time."""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compare_models import main
from config import load_config
from evaluation.policy_values import PolicyTruths
from study.cells import CellOutcome, Result, read_record, short_name
from study.engines import run_locally, run_missing, run_nothing
from study.grid import Grid, check_done, check_places, load_datasets
from study.policies import read_truths, shared_reward, write_truths
from study.report import save_table
from study.schemas import OF_CELLS, OF_TRIALS
from study.store import CellStore, pack
from study.tracker import check_study
from study.tuning import Tuning
from utils import ROOT, InputError

ARMS, LENGTH, EPISODES = ("point", "gauss"), 12, 10
SMALL = ["ensemble_size=2", "hidden_size=8", "fit_epochs=2", "batch_size=32", "reduced_precision=0"]
CELL, TRIAL = "cells/point/one/split-0-seed-0", "trials/point/one/rate-0.01"


def write_dataset(path, episodes=EPISODES):
    """Writes episodes of a noisy linear system."""
    draw = np.random.default_rng(0)
    states = draw.normal(size=(episodes, LENGTH + 1, 3)).cumsum(axis=1).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["observations"] = states[:, :-1].reshape(-1, 3)
        file["next_observations"] = states[:, 1:].reshape(-1, 3)
        file["actions"] = draw.uniform(-1, 1, (episodes * LENGTH, 2)).astype(np.float32)
        file["rewards"] = np.zeros(episodes * LENGTH, np.float32)
        file["terminals"] = np.zeros(episodes * LENGTH, bool)
        file["timeouts"] = np.tile(np.arange(LENGTH) == LENGTH - 1, episodes)


def arguments(output, *more, seeds=1, arms=ARMS, dataset="one.hdf5"):
    configs = ["--configs", *(f"{arm}.yaml" for arm in arms), "--datasets", dataset, "--seeds", str(seeds)]
    return [*configs, "--params", *SMALL, "--learning_rates", "0.01", "--output", str(output), "--quiet", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store):
    """A folder with a dataset, two arms and a finished study ``whole``, whose runs are in the folder's MLflow."""
    folder = tmp_path_factory.mktemp("studies")
    write_dataset(folder / "one.hdf5")
    (folder / "point.yaml").write_text("fit_lr: 0.01")
    (folder / "gauss.yaml").write_text("{fit_lr: 0.01, probabilistic: true}")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        assert main(arguments("whole")) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")


@pytest.fixture
def study(place, tmp_path):
    """A copy of the study, to damage."""
    return Path(shutil.copytree(place / "whole", tmp_path / "study"))


@pytest.fixture(scope="module")
def grid(place):
    arms = {arm: load_config(place / f"{arm}.yaml", SMALL) for arm in ARMS}
    return Grid(arms, ["one.hdf5"], range(1), [0], "cpu", 1)


@pytest.fixture(scope="module")
def datasets(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return load_datasets(["one.hdf5"], [0], simulator=False, quiet=True)


@pytest.fixture
def look(grid, datasets):
    """Returns a function that reads all that a command reads of a study, and gives the cells that are not done."""

    def read(folder):
        check_study(folder)
        tuning, store = Tuning.read(folder, grid.arms, grid.datasets), CellStore(folder)
        check_places(grid, store)
        cells = [*grid.trials([0.01]), *grid.cells(tuning.chosen)]
        check_done(cells, datasets, store)
        done = {finished.cell for finished in run_missing(cells, datasets, store, run_nothing)}
        return [cell.name for cell in cells if cell not in done]

    return read


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replace(path, content):
    """Puts bytes, a named pipe, a folder or a circle of links in a file's place."""
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content == "circle":
        path.symlink_to(path)
    else:
        path.write_bytes(content)


# --- Files that are no such files ---

RUBBISH = {
    "empty": b"",
    "zeros": bytes(300),
    "no text": b"\xff\xfe\xfa",
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "nothing in it": b"{}",
    "deep": b"[" * 100_000,
    "half": b'{"format": 2, "requ',
    "a number too long": b'{"format": ' + b"9" * 5000 + b"}",
    "a pipe": "pipe",
    "a folder": "folder",
    "a circle": "circle",
}
JSON = [f"{CELL}/cell.json", f"{TRIAL}/cell.json", "study.json"]
TABLES = [
    *(f"{CELL}/{name}.csv" for name in sorted(OF_CELLS)),
    *(f"{TRIAL}/{name}.csv" for name in sorted(OF_TRIALS)),
    *("learning_rates.csv", "horizons.csv"),
]


@pytest.mark.parametrize("rubbish", RUBBISH)
@pytest.mark.parametrize("name", JSON)
def test_rubbish_in_place_of_a_record_is_refused(study, look, refused, name, rubbish):
    replace(study / name, RUBBISH[rubbish])
    message = refused(look, study)
    assert str(study / name) in message


@pytest.mark.parametrize("rubbish", ["empty", "zeros", "no text", "a list", "a pipe", "a folder"])
@pytest.mark.parametrize("name", TABLES)
def test_rubbish_in_place_of_a_table_is_refused(study, look, refused, name, rubbish):
    replace(study / name, RUBBISH[rubbish])
    message = refused(look, study)
    assert Path(name).stem in message and str(study) in message


@pytest.mark.parametrize("name", TABLES)
def test_tables_lack_no_column_and_hold_numbers(study, look, refused, name):
    table = pd.read_csv(study / name)
    table.iloc[:, :1].assign(other=1).rename(columns=lambda column: f"{column}_").to_csv(study / name, index=False)
    assert "has no column" in refused(look, study)
    table.select_dtypes("number").iloc[:, :0].to_csv(study / name, index=False)
    refused(look, study)
    table.astype(object).assign(**dict.fromkeys(table.select_dtypes("number"), "<b>")).to_csv(study / name, index=False)
    assert "does not hold" in refused(look, study)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_cut_off_is_refused(study, look, refused, name):
    path = study / name
    text = path.read_bytes()
    path.write_bytes(text[: len(text) // 2].rstrip(b"\n"))
    assert str(path) in refused(look, study)


@pytest.mark.parametrize(
    "name", [f"{CELL}/{name}" for name in ("cell.json", *(f"{each}.csv" for each in sorted(OF_CELLS)))]
)
def test_a_cell_that_is_not_whole_is_made_again(study, look, name):
    (study / name).unlink()
    assert look(study) == [CELL]


def test_the_rest_of_a_cell_is_replaced(study, place, look, grid, datasets):
    (study / CELL / "cell.json").unlink()
    (study / CELL / "old.csv").write_text("a\n1\n")
    begun = study / CELL.replace("split-0", ".split-0")
    begun = begun.with_name(f"{begun.name}.abcdefgh")
    begun.mkdir()
    [cell] = [cell for cell in grid.cells(dict.fromkeys([(arm, "one") for arm in ARMS], 0.01)) if cell.name == CELL]
    store = CellStore(study)
    assert list(run_locally([cell], datasets, store)) == [cell]
    made, kept = files(study / CELL), files(place / "whole" / CELL)
    del made["cell.json"], kept["cell.json"]  # what it took
    assert made == kept and not begun.exists() and look(study) == []


# --- Records that are forged ---


def change(*keys, to=None, remove=False):
    def forge(record):
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        if remove:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = to

    return forge


FORGED = {
    **{
        f"{'.'.join(keys)} is {to!r:.20}": change(*keys, to=to)
        for keys, values in {
            ("format",): (1, 3, None, "2", True, 2.0, [2], 10**30),
            ("request",): (None, [], "x", 3, {}),
            ("request", "arm"): (None, 3, ["point"], "gauss", "", "../point"),
            ("request", "dataset"): (None, 3, "two.hdf5"),
            ("request", "sha256"): (None, 3, "", "0" * 64),
            ("request", "threads"): (None, "1", 2, -1, 10**30, 1.0, True),
            ("request", "holdout_ratio"): (None, "0.2", 0.3, float("nan")),
            ("request", "device"): (None, 3, "cuda"),
            ("request", "simulator"): (None, 1, True),
            ("request", "config"): (None, [], "x", {"momentum": 1}),
            ("request", "config", "fit_lr"): (None, "x", 0, -1, 0.5, float("inf"), [0.01]),
            ("request", "config", "hidden_size"): (None, [-1], [1e300], [8, 8], [[8]]),
            ("request", "config", "seed"): (-1, 1, 2**40, 0.5),
            ("outcome",): (None, [], "x", {}),
            ("outcome", "failure"): (3, "diverged", ["x"]),
            ("outcome", "val_mse"): (None, "x", -1.0, float("nan"), True),
            ("outcome", "metrics"): (None, [], "x", {"nrmse": "x"}, {"nrmse": None}, {"nrmse": float("inf")}),
            ("timing",): (None, [], {"training": "x"}, {"training": -1}, {"training": 1e300}, {"training": None}),
            ("origin",): (None, [], "x", {}, {"git_commit": 3, "versions": {}}),
            ("origin", "versions"): (None, [], {"torch": 2}),
            ("more",): (1,),
        }.items()
        for to in values
    },
    **{
        f"no {'.'.join(keys)}": change(*keys, remove=True)
        for keys in (
            *(("format",), ("request",), ("outcome",), ("timing",), ("origin",), ("request", "config")),
            *(("request", name) for name in ("arm", "dataset", "sha256", "threads", "simulator")),
            *(("outcome", name) for name in ("failure", "val_mse", "metrics")),
        )
    },
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_record_of_a_cell_is_refused(study, look, refused, forged):
    record = json.loads((study / CELL / "cell.json").read_text())
    FORGED[forged](record)
    (study / CELL / "cell.json").write_text(json.dumps(record))
    assert str(study / CELL) in refused(look, study)


def test_a_cell_in_the_place_of_another_is_refused(study, look, refused):
    shutil.rmtree(study / CELL)
    shutil.copytree(study / CELL.replace("point", "gauss"), study / CELL)
    assert "was made with arm 'gauss', asked for is 'point'" in refused(look, study)


def test_a_file_in_the_place_of_a_cell_is_refused(study, look, refused):
    shutil.rmtree(study / CELL)
    (study / CELL).write_text("no cell")
    assert "is a file, but a cell needs a folder there" in refused(look, study)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("format", value) for value in (1, "2", None, True)),
        *(("command", value) for value in (None, 3, ["x"])),
        *(("mlflow_run_id", value) for value in (3, "", "a'b", "../x", "x" * 100, ["x"])),
        ("more", 1),
    ],
)
def test_a_forged_study_is_refused(study, look, refused, name, value):
    record = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps(record | {name: value}))
    assert "study.json" in refused(look, study)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("members", "val_mse", "x"),
        ("training", "step", 0),
        ("training", "model_id", -1),
        ("training", "step", 0.5),
        ("skill", "horizon", 1),
        ("trajectories", "trajectory", 0),
        ("trajectories", "trajectory", 777),
        ("trajectories", "rows", 0),
        ("trajectories", "rows", True),
        ("rollout", "horizon", 1),
        ("starts", "trajectory", 777),
        ("starts", "trajectory", ""),
        ("row_errors", "trajectory", 777),
        ("member_products", "second", 10**9),
        ("member_products", "first", 1),
        ("calibration", "variant", ""),
        ("uncertainty", "rows", 3),
        ("one_step", "rmse", "inf inf"),
    ],
)
def test_forged_tables_of_a_cell_are_refused(study, look, refused, table, column, value):
    path = study / CELL / f"{table}.csv"
    pd.read_csv(path).assign(**{column: value}).to_csv(path, index=False)
    assert table in refused(look, study)


def test_members_that_are_not_all_there_are_refused(study, look, refused):
    path = study / CELL / "member_products.csv"
    pd.read_csv(path).iloc[1:].to_csv(path, index=False)
    assert "its rows are not all pairs of members" in refused(look, study)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        *(("learning_rates", "fit_lr", value) for value in (0, -1, "", "x", "inf", 1e12)),
        *(("learning_rates", "val_mse", value) for value in (-1, "x")),
        *(("learning_rates", "is_chosen", value) for value in (False, "x", "", 1)),
        *(("learning_rates", "arm", value) for value in ("", "point", "other")),
        ("learning_rates", "dataset", "two"),
        ("learning_rates", "stray", "x"),
        *(("horizons", "horizon", value) for value in (0, -5, 7, 10**9, "", "x", 5.5)),
        ("horizons", "dataset", "two"),
    ],
)
def test_forged_rates_and_horizons_are_refused(study, look, refused, name, column, value):
    path = study / f"{name}.csv"
    pd.read_csv(path).assign(**{column: value}).to_csv(path, index=False)
    assert str(study) in refused(look, study)


# --- Packed ---


@pytest.fixture(scope="module")
def packed(place):
    """The rows of the packed study."""
    folder = Path(shutil.copytree(place / "whole", place / "packed"))
    pack(folder)
    return pq.read_table(folder / "cells.parquet")


def without_kept(table, change):
    """Changes the JSON that the first row of the first cell holds."""
    values = table["record"].to_pylist()
    first = next(index for index, value in enumerate(values) if value)
    kept = json.loads(values[first])
    values[first] = json.dumps(change(kept))
    return table.set_column(table.column_names.index("record"), "record", pa.array(values, pa.string()))


def typed(kind):
    def change(kept):
        table = next(iter(kept["types"].values()))
        table[next(iter(table))] = kind
        return kept

    return change


PACKED = {
    "no rows": lambda table: table.slice(0, 0),
    "no record": lambda table: table.drop_columns(["record"]),
    "no cell": lambda table: table.drop_columns(["cell"]),
    "a table that is missing": lambda table: table.filter(pa.compute.not_equal(table["table"], "training")),
    "a column that is missing": lambda table: table.drop_columns(["val_mse"]),
    "records that are numbers": lambda table: table.drop_columns(["record"]).append_column(
        "record", pa.array([1] * len(table))
    ),
    "null": lambda table: without_kept(table, lambda kept: None),
    "a list": lambda table: without_kept(table, lambda kept: [kept]),
    "no types": lambda table: without_kept(table, lambda kept: {"record": kept["record"]}),
    "types of no columns": lambda table: without_kept(table, lambda kept: kept | {"types": {"members": ["x"]}}),
    "dates": lambda table: without_kept(table, typed("datetime64[ns]")),
    "categories": lambda table: without_kept(table, typed("category")),
    "an unknown type": lambda table: without_kept(table, typed("<b>")),
    "an older version": lambda table: without_kept(table, lambda kept: kept | {"record": {"request": {}}}),
    "a forged outcome": lambda table: without_kept(
        table, lambda kept: kept | {"record": kept["record"] | {"outcome": {}}}
    ),
}


@pytest.mark.parametrize("damage", PACKED)
def test_a_forged_packed_study_is_refused(study, look, refused, packed, damage):
    for name in ("cells", "trials"):
        shutil.rmtree(study / name)
    pq.write_table(PACKED[damage](packed), study / "cells.parquet")
    if damage == "no rows":
        assert len(look(study)) == 4
    else:
        assert "cells.parquet" in refused(look, study)


@pytest.mark.parametrize("rubbish", ["empty", "zeros", "no text", "a pipe", "a folder", "a circle"])
def test_rubbish_in_place_of_a_packed_study_is_refused(study, look, refused, rubbish):
    shutil.rmtree(study / "trials")
    (study / "cells.parquet").touch()
    replace(study / "cells.parquet", RUBBISH[rubbish])
    assert "cells.parquet is damaged" in refused(look, study)


def test_a_small_packed_file_of_many_rows_is_refused(study, look, refused):
    shutil.rmtree(study / "trials")
    rows = pa.table({name: pa.nulls(10**7) for name in "abcdefghijklmnop"})
    pq.write_table(rows, study / "cells.parquet")
    assert "out of proportion" in refused(look, study)


# --- What policies earn, and the network that pays them ---


def truths(**changes):
    values = {
        "names": ("a", "b"),
        "starts": np.zeros((3, 4)),
        "returns": np.ones((2, 2, 3)),
        "model_paid": np.ones((2, 2, 3)),
        "seed": 7,
        "steps": 5,
    }
    return PolicyTruths(**values | changes)


def test_truths_are_read_back(tmp_path):
    write_truths(truths(), tmp_path / "a.npz")
    assert read_truths(tmp_path / "a.npz").names == ("a", "b")


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ("a", "b", "c")},
        {"starts": np.zeros(3)},
        {"starts": np.full((3, 4), np.nan)},
        {"returns": np.ones((2, 3, 3))},
        {"returns": np.full((2, 2, 3), np.inf)},
        {"returns": np.full((2, 2, 3), "x")},
        {"model_paid": np.ones((2, 2, 4))},
        {"seed": "x"},
        {"steps": [1, 2]},
        {"starts": np.array([[object()] * 4] * 3)},
    ],
)
def test_forged_truths_are_refused(tmp_path, refused, changes):
    write_truths(truths(**changes), tmp_path / "a.npz")
    assert "a.npz is damaged" in refused(read_truths, tmp_path / "a.npz")


@pytest.mark.parametrize("rubbish", ["empty", "zeros", "no text", "a pipe", "a folder", "a circle", "half", "a bomb"])
def test_rubbish_in_place_of_truths_is_refused(tmp_path, refused, rubbish):
    path = tmp_path / "a.npz"
    write_truths(truths(), path)
    if rubbish == "half":
        path.write_bytes(path.read_bytes()[:400])
    elif rubbish == "a bomb":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (40 * 2**19,)})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("names.npy", "w") as file:
            file.write(header.getvalue())
            for _ in range(40):
                file.write(bytes(2**22))
    else:
        replace(path, RUBBISH[rubbish])
    assert "a.npz" in refused(read_truths, path)


@pytest.mark.parametrize("rubbish", ["empty", "zeros", "no text", "a pipe", "a folder", "a circle"])
def test_rubbish_in_place_of_a_reward_network_is_refused(tmp_path, refused, linear_system, rubbish):
    from mujoco_tasks import task

    path = tmp_path / "reward.pkl"
    path.touch()
    replace(path, RUBBISH[rubbish])
    assert "reward.pkl" in refused(shared_reward, task("HalfCheetah-v5"), linear_system(), path)


# --- Names ---

RATES = ["arm", "dataset", "fit_lr", "val_mse", "stray", "is_chosen"]
NAMES = (
    *(
        "a$b^{$",
        "x$\\frac$",
        "it's",
        'a"b',
        "pi|pe",
        "<b>bold",
        "=1+1",
        "+1",
        "@x",
        "a\nb",
        "a\rb",
        "a\tb",
        " a ",
        "..",
        "...",
    ),
    *(
        "\u202eabc",
        "\x1b[31m",
        "NA",
        "nan",
        "1e5",
        "True",
        "007",
        "a,b",
        "a;b",
        "%s",
        "{x}",
        "a\\nb",
        "n" * 200,
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_what_they_are(place, tmp_path, name, grid):
    arms = {name: grid.arms["point"], "b": grid.arms["gauss"]}
    named = Grid(arms, [f"{name}.hdf5"], range(1), [0], "cpu", 1)
    short, folder = short_name(f"{name}.hdf5"), tmp_path / "study"
    store, record = CellStore(folder), read_record(place / "whole" / CELL)
    check_places(named, store)
    cells = named.cells(dict.fromkeys([(arm, short) for arm in arms], 0.01))
    for cell in cells:
        with store.hold(cell.name):
            failed = {"request": cell.request("d1ge57"), "outcome": CellOutcome("diverged", None, {})}
            store.write(cell.name, Result(dataclasses.replace(record, **failed), {}))
    assert [CellStore(folder).read(cell.name).record.request.arm for cell in cells] == [name, "b"]
    assert len(list(folder.glob("cells/*/*/split-0-seed-0/cell.json"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"study"}

    rates = pd.DataFrame([(arm, short, 0.01, 1.0, 0, True) for arm in arms], columns=RATES)
    save_table(rates, folder / "learning_rates.csv")
    save_table(pd.DataFrame({"dataset": [short], "horizon": [5]}), folder / "horizons.csv")
    assert set(Tuning.read(folder, arms, named.datasets).chosen) == {(arm, short) for arm in arms}


@pytest.mark.parametrize("which", ["arm", "dataset", "folder"])
def test_names_too_long_are_said_before_training(tmp_path, which, grid, refused):
    arm, dataset = ("n" * 256 if which == kind else "n" for kind in ("arm", "dataset"))
    folder = tmp_path / "/".join(["f" * 200] * 20) if which == "folder" else tmp_path
    named = Grid({arm: grid.arms["point"]}, [f"{dataset}.hdf5"], range(1), [0], "cpu", 1)
    assert "give files and folders shorter names" in refused(check_places, named, CellStore(folder))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("episodes", [1, 2, 3])
def test_datasets_too_small_for_their_splits_are_named(tmp_path, refused, episodes):
    path = tmp_path / "few.hdf5"
    write_dataset(path, episodes)
    assert "few.hdf5" in refused(load_datasets, [str(path)], [0], simulator=False, quiet=True)


# --- The command ---


@pytest.mark.parametrize(
    ("damage", "flags"),
    [
        (f"{CELL}/cell.json", []),
        (f"{CELL}/starts.csv", ["--analyse_only"]),
        (f"{TRIAL}/members.csv", []),
        ("study.json", []),
        ("learning_rates.csv", ["--analyse_only"]),
    ],
)
def test_the_command_refuses_and_writes_nothing(study, capsys, damage, flags):
    replace(study / damage, bytes(300))
    before = files(study)
    with pytest.raises(SystemExit, match="2"):
        main(arguments(study, *flags))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(study) in error
    assert files(study) == before


def test_a_file_in_the_place_of_locks_is_one_line(study, capsys):
    (study / ".locks").write_text("no locks")
    assert main(arguments(study)) == 1
    assert capsys.readouterr().err.startswith("error: ")


# --- Processes ---


def runs(database):
    """Names and states of all runs."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return sorted(opened.execute("SELECT name, status FROM runs").fetchall())


def test_a_study_that_is_killed_again_and_again_ends_the_same(place, tmp_path, empty_store, monkeypatch, start_script):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    draw, study = random.Random(2), tmp_path / "whole"
    for _ in range(3):
        process, _ = start_script(ROOT / "compare_models.py", *arguments(study))
        process.join(draw.uniform(0.5, 4))
        process.kill()
        process.join()
    assert main(arguments(study)) == 0
    found, expected = (
        {name: text for name, text in files(folder).items() if name.endswith(".csv")}
        for folder in (study, place / "whole")
    )
    assert found == expected
    assert runs(tmp_path / "mlflow.db") == runs(place / "mlflow.db")
    assert [path.name for path in study.rglob(".*")] == []


def hold_and_stop(folder, name):
    """Takes the lock of a cell and stops, as a debugger or Ctrl-Z would stop a process."""
    with CellStore(folder).lock(name):
        (folder / "held").touch()
        os.kill(os.getpid(), signal.SIGSTOP)


def test_who_waits_for_a_stopped_process_says_so_and_goes_on_when_it_dies(tmp_path, processes, grid, datasets, capsys):
    [cell] = [cell for cell in grid.trials([0.01]) if cell.arm == "point"]
    holder = processes.Process(target=hold_and_stop, args=(tmp_path, cell.name))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    store, ran = CellStore(tmp_path), []
    waiting = threading.Thread(target=lambda: ran.extend(run_locally([cell], datasets, store)))
    waiting.start()
    waiting.join(4)
    assert waiting.is_alive() and ran == []
    assert f"waiting for another process, which holds {cell.name!r}" in capsys.readouterr().err
    holder.kill()
    waiting.join(60)
    assert ran == [cell] and store.has(cell)


def test_locks_stay_while_another_process_holds_one(tmp_path):
    store = CellStore(tmp_path)
    with store.lock("one"), CellStore(tmp_path).lock("two"):
        pass
    with CellStore(tmp_path).lock("one"):
        store.remove_locks()
        assert len(list((tmp_path / ".locks").iterdir())) == 2
    store.remove_locks()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_while_locks_are_removed_gets_the_lock(tmp_path):
    store, held = CellStore(tmp_path), []

    def wait():
        with store.hold("study"):
            held.append("study")

    with CellStore(tmp_path).lock("study"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        shutil.rmtree(tmp_path / ".locks")  # as a process that ends does
    waiting.join(10)
    assert held == ["study"]


def test_what_another_process_left_meanwhile_is_not_adopted(study, grid, datasets):
    cell, store = grid.cells(dict.fromkeys([(arm, "one") for arm in ARMS], 0.02))[0], CellStore(study)

    def other(cells, datasets, store):
        shutil.copytree(study / "aside", study / cell.name)
        yield from cells

    shutil.move(study / cell.name, study / "aside")
    with pytest.raises(InputError, match=r"was made with fit_lr 0.01, asked for is 0.02"):
        list(run_missing([cell], datasets, store, other))
