import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from filelock import Timeout

from study.cells import Result
from study.store import CellStore, is_same, pack
from utils import InputError


@pytest.fixture
def study(tmp_path, make_cell, make_result):
    """A study of three cells in folders: their results by name, as CSV gives them back."""
    everything = pd.DataFrame(
        {
            "whole": [3, 2**40],
            "text": ["a,b", 'c"d'],
            "part": [np.nan, 0.1],
            "extreme": [np.inf, -1.23456789e-300],
            "nothing": [np.nan, np.nan],
            "flag": [True, False],
        }
    )
    whole_numbers = pd.DataFrame({"nothing": [1.0, 2.0], "extreme": [0.0, 5.0], "other": [1, 2]})
    results = [
        (make_cell("point"), {"first": everything, "second": everything[["part", "text"]]}, None),
        (make_cell("gauss"), {"first": whole_numbers, "none": everything[:0]}, None),
        (make_cell("wild", is_trial=True), {}, "diverged"),
    ]
    store = CellStore(tmp_path / "study")
    for cell, tables, failure in results:
        store.write(cell.name, make_result(cell, tables, failure=failure, metrics={} if failure else {"r2": 1 / 3}))
    return {cell.name: store.read(cell.name) for cell, *_ in results}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Packing ---


def test_packed_cells_are_the_same_as_in_folders(tmp_path, study):
    folder = tmp_path / "study"
    pack(folder)
    assert files(folder) == ["cells.parquet"] and list(folder.iterdir()) == [folder / "cells.parquet"]
    store = CellStore(folder)
    for name, result in study.items():
        assert name in store
        packed = store.read(name)
        assert packed.record == result.record
        assert list(packed.tables) == list(result.tables)
        for table, frame in result.tables.items():
            assert list(packed.tables[table]) == list(frame)
            pd.testing.assert_frame_equal(packed.tables[table], frame, check_exact=True)
    first = store.read("cells/gauss/one/split-0-seed-0").tables["first"]
    assert first.dtypes.astype(str).to_dict() == {"nothing": "int64", "extreme": "int64", "other": "int64"}
    assert "cells/gauss/one/split-0-seed-1" not in store


def test_further_cells_are_packed_with_the_others(tmp_path, study, make_cell, make_result):
    folder = tmp_path / "study"
    pack(folder)
    again, later = make_cell("point"), make_cell("point", seed=1)
    store = CellStore(folder)
    store.write(again.name, make_result(again, {"first": pd.DataFrame({"new": [0.5]})}))
    store.write(later.name, make_result(later, {"third": pd.DataFrame({"third": ["text"]})}))
    pack(folder)
    assert files(folder) == ["cells.parquet"]
    store = CellStore(folder)
    assert store.read(later.name).tables["third"].third.tolist() == ["text"]
    assert list(store.read(again.name).tables["first"]) == ["new"]  # a folder is younger than the file
    for name in ("cells/gauss/one/split-0-seed-0", "trials/wild/one/rate-0.005"):
        assert is_same(store.read(name), study[name])


def test_rows_and_horizon_may_be_text_or_numbers(tmp_path, make_cell, make_result):
    folder, cell = tmp_path / "study", make_cell()
    text, numbers = (
        pd.DataFrame({"rows": ["test"], "horizon": ["truncated"]}),
        pd.DataFrame({"rows": [3], "horizon": [5]}),
    )
    CellStore(folder).write(cell.name, make_result(cell, {"text": text, "numbers": numbers}))
    pack(folder)
    tables = CellStore(folder).read(cell.name).tables
    pd.testing.assert_frame_equal(tables["text"], text)
    pd.testing.assert_frame_equal(tables["numbers"], numbers)
    assert {"rows", "rows_text", "horizon_text"} <= set(pd.read_parquet(folder / "cells.parquet"))


def test_a_column_is_text_in_all_tables_or_in_none(tmp_path, study, make_cell, make_result):
    folder, odd = tmp_path / "study", make_cell("odd")
    pack(folder)
    CellStore(folder).write(odd.name, make_result(odd, {"first": pd.DataFrame({"whole": ["text"]})}))
    with pytest.raises(pa.ArrowTypeError):
        pack(folder)
    assert files(folder) == ["cells.parquet", f"{odd.name}/cell.json", f"{odd.name}/first.csv"]
    assert study.keys() | {odd.name} == {name for name in (*study, odd.name) if name in CellStore(folder)}


def test_a_packed_file_is_a_table_that_tells_whose_rows_are_whose(tmp_path, study):
    pack(tmp_path / "study")
    rows = pd.read_parquet(tmp_path / "study" / "cells.parquet")
    chosen = rows[(rows.cell == "cells/point/one/split-0-seed-0") & (rows.table == "second")].dropna(
        axis="columns", how="all"
    )
    assert set(chosen) == {"cell", "table", "text", "part"}
    assert chosen.text.tolist() == ["a,b", 'c"d']


def test_packing_keeps_what_was_written_not_what_is_read_from_it(tmp_path, study):
    path = tmp_path / "study" / "cells/point/one/split-0-seed-0" / "cell.json"
    kept = json.loads(path.read_text())
    del kept["request"]["config"]["layer_norm"]  # as in a cell that is older than the setting
    path.write_text(json.dumps(kept))
    pack(tmp_path / "study")
    rows = pd.read_parquet(tmp_path / "study" / "cells.parquet")
    (text,) = rows.record[rows.cell == "cells/point/one/split-0-seed-0"].dropna()
    assert json.loads(text)["record"] == kept


def test_packing_leaves_other_files_alone(tmp_path, study):
    folder = tmp_path / "study"
    (folder / "paired.csv").write_text("kept")
    (folder / "cells" / "point" / "note.txt").write_text("kept")
    pack(folder)
    assert files(folder) == ["cells.parquet", "cells/point/note.txt", "paired.csv"]


def test_packing_nothing_changes_nothing(tmp_path, study):
    folder = tmp_path / "study"
    pack(folder)
    before = (folder / "cells.parquet").stat()
    pack(folder)
    after = (folder / "cells.parquet").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (tmp_path / "empty").mkdir()
    pack(tmp_path / "empty")
    assert files(tmp_path / "empty") == []


def test_a_file_that_cannot_be_written_loses_no_cell(tmp_path, study, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no space left")))
    before = files(tmp_path / "study")
    with pytest.raises(OSError, match="no space left"):
        pack(tmp_path / "study")
    assert files(tmp_path / "study") == before


def test_results_differ_by_type_value_and_name(study):
    one = study["cells/point/one/split-0-seed-0"]
    assert is_same(one, Result(one.record, dict(one.tables)))
    for table in (
        one.tables["first"].astype({"whole": float}),
        one.tables["first"].replace(0.1, 0.2),
        one.tables["first"].rename(columns={"part": "parts"}),
        one.tables["first"].iloc[:, ::-1],
    ):
        assert not is_same(one, Result(one.record, one.tables | {"first": table}))
    assert not is_same(one, Result(study["cells/gauss/one/split-0-seed-0"].record, one.tables))


# --- Requests ---


@pytest.mark.parametrize("packed", [False, True])
def test_cells_of_another_request_are_refused(packed, tmp_path, study, make_cell):
    if packed:
        pack(tmp_path / "study")
    store = CellStore(tmp_path / "study")
    store.check_request(make_cell(), "d1ge57")
    store.check_request(make_cell(seed=7, fit_epochs=9), "d1ge57")  # not there: nothing to differ from
    with pytest.raises(InputError, match="was made with fit_epochs 2, asked for is 3; give another --output") as error:
        store.check_request(make_cell(fit_epochs=3), "d1ge57")
    assert ("delete that folder" in str(error.value)) == (not packed)
    with pytest.raises(InputError, match="was made with sha256 'd1ge57', asked for is '07her'"):
        store.check_request(make_cell(), "07her")


# --- Locks ---


def test_a_name_is_locked_once(tmp_path):
    store = CellStore(tmp_path / "study")
    with store.lock("cells/a/x/seed-0"):
        with pytest.raises(Timeout), CellStore(tmp_path / "study").lock("cells/a/x/seed-0").acquire(timeout=0):
            pass
        with store.lock("cells/a/x/seed-1").acquire(timeout=0):
            pass
    with store.lock("cells/a/x/seed-0").acquire(timeout=0):
        pass
    store.remove_locks()
    assert list((tmp_path / "study").iterdir()) == []
