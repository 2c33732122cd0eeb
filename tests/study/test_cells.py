import json

import pandas as pd
import pytest
import torch

from config import LearnConfig
from study import cells
from study.cells import CellKey, CellRecord, Result, read_record, run_cell
from utils import InputError, Origin


def no_writing(*_, **__):
    raise OSError("no space left")


# --- Running ---


@pytest.mark.parametrize("is_trial", [False, True])
def test_cells_do_not_depend_on_the_process(is_trial, make_cell, dataset):
    cell, threads = make_cell(is_trial=is_trial), torch.get_num_threads()
    first = run_cell(cell, dataset)
    try:
        torch.set_num_threads(3)
        torch.manual_seed(1)
        second = run_cell(cell, dataset)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert first.tables.keys() == second.tables.keys() >= {"training"}
    assert len(first.tables) == (1 if is_trial else 9)
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name], check_exact=True)
    outcome = first.record.outcome
    assert first.record.request == cell.request(dataset.sha256)
    assert first.record.origin == Origin.here()
    assert outcome.val_mse == pytest.approx(first.tables["training"].query("step == 1").val_mse.mean(), rel=1e-5)
    assert ("nrmse" in outcome.metrics) == (not is_trial)
    assert first.failure is None


def test_a_training_that_diverges_is_a_result(make_cell, dataset):
    result = run_cell(make_cell(fit_lr=1e30), dataset)
    assert "diverged" in result.failure
    assert (result.record.outcome.val_mse, result.record.outcome.metrics) == (None, {})
    assert set(result.tables) <= {"training"}


# --- Records ---


def test_cells_have_a_place_in_the_grid_and_in_the_folder(make_cell):
    cell = make_cell(dataset="data/one.hdf5", seed=3, fit_lr=0.012)
    assert cell.key == CellKey("point", "one", 3)
    assert cell.name == "cells/point/one/seed-3"
    assert make_cell(dataset="data/one.hdf5", is_trial=True, fit_lr=0.012).name == "trials/point/one/rate-0.012"


def test_records_are_read_back_as_they_were_written(make_cell, make_result):
    record = make_result(make_cell(hidden_size=(8, 4), weight_decay=(0.1, 0.2, 0.0)), metrics={"nrmse": 0.25}).record
    kept = json.loads(json.dumps(record.to_dict()))
    assert CellRecord.from_dict(kept, source="cell.json") == record
    assert kept["request"]["dataset"] == "one" and kept["request"]["config"]["hidden_size"] == [8, 4]
    assert kept["outcome"] == {"failure": None, "val_mse": 1.0, "metrics": {"nrmse": 0.25}, "seconds": 3600.0}
    assert kept["origin"]["git_commit"] == "c0ffee"


def test_settings_younger_than_a_record_have_their_defaults(make_cell, make_result):
    record = make_result(make_cell()).record
    kept = record.to_dict()
    for name in ("reduced_precision", "layer_norm"):
        del kept["request"]["config"][name]
    assert CellRecord.from_dict(kept, source="cell.json") == record


def test_settings_that_are_gone_are_named(make_cell, make_result, tmp_path):
    kept = make_result(make_cell()).record.to_dict()
    kept["request"]["config"]["momentum"] = 0.9
    (tmp_path / "cell.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"cell\.json: unknown setting 'momentum'"):
        read_record(tmp_path)


def test_requests_tell_everything_that_decides_a_result(make_cell):
    settings = make_cell(fit_lr=0.5).request("d1ge57").settings()
    assert settings.keys() == LearnConfig().to_dict().keys() | {
        "arm", "dataset", "sha256", "holdout_ratio", "test_ratio", "device", "threads"
    }  # fmt: skip
    assert (settings["fit_lr"], settings["sha256"], settings["test_ratio"]) == (0.5, "d1ge57", 0.2)


# --- Folders ---


def test_folders_appear_whole_or_not_at_all(tmp_path, monkeypatch, make_cell, make_result):
    result = make_result(make_cell(), {"training": pd.DataFrame({"step": [0], "lr": [1 / 3]})})
    monkeypatch.setattr(cells.json, "dump", no_writing)
    with pytest.raises(OSError):
        result.write(tmp_path / "cell")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    result.write(tmp_path / "cell")
    assert (tmp_path / "cell" / "training.csv").read_text() == "step,lr\n0,0.333333333\n"
    assert oct((tmp_path / "cell").stat().st_mode)[-3:] == "755"
    assert Result.read(tmp_path / "cell").record == result.record == read_record(tmp_path / "cell")
