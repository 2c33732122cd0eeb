import json

import numpy as np
import pandas as pd
import pytest
import torch

from config import LearnConfig
from study import cells
from study.cells import FORMAT, CellKey, CellRecord, Result, parse_name, read_record, run_cell, short_name
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
    assert first.tables.keys() == second.tables.keys()
    assert first.tables.keys() >= {"training", "members", "skill"}
    assert ({"row_errors", "member_products", "starts"} <= first.tables.keys()) == (not is_trial)
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name], check_exact=True)
    outcome = first.record.outcome
    assert first.record.request == cell.request(dataset.sha256)
    assert first.record.origin == Origin.here()
    assert outcome.val_mse == first.tables["members"].val_mse.median()
    assert list(first.record.timing)[:3] == ["data", "training", "validation"]
    assert first.record.seconds == sum(first.record.timing.values())
    assert ("nrmse" in outcome.metrics) == (not is_trial)
    assert first.failure is None


def test_what_resampling_needs_gives_the_evaluations_errors(make_cell, dataset):
    tables = run_cell(make_cell(ensemble_size=3), dataset).tables
    one_step = tables["one_step"].set_index("predictor")
    products = tables["member_products"]
    alone = products[products["first"] == products["second"]]
    members = one_step.rmse[[f"member_{index}" for index in range(3)]]
    assert np.sqrt(alone["product"].to_numpy()) == pytest.approx(members.to_numpy())
    both = np.where(products["first"] == products["second"], 1, 2)
    assert (both * products["product"]).sum() / 9 == pytest.approx(one_step.rmse["ensemble"] ** 2)
    errors = tables["row_errors"].error
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(one_step.rmse["ensemble"], rel=1e-3)
    assert errors.median() == pytest.approx(one_step["median"]["ensemble"], abs=1e-5)
    trajectories = tables["trajectories"]
    likelihood = tables["likelihood"].set_index("prediction").loc["mixture"]
    for name in ("nll", "crps"):
        assert np.average(trajectories[name], weights=trajectories.rows) == pytest.approx(likelihood[name])


def test_a_training_on_some_of_the_rows_tests_on_the_same(make_cell, dataset):
    few, all_of_them = (run_cell(make_cell(dataset=name), dataset) for name in ("one:40", "one"))
    assert few.record.request.rows == 40
    assert few.tables["trajectories"].trajectory.equals(all_of_them.tables["trajectories"].trajectory)
    assert few.record.outcome.val_mse > all_of_them.record.outcome.val_mse


def test_a_training_that_diverges_is_a_result(make_cell, dataset):
    result = run_cell(make_cell(fit_lr=1e9, hidden_size=(8, 8)), dataset)
    assert "diverged" in result.failure
    assert (result.record.outcome.val_mse, result.record.outcome.metrics) == (None, {})
    assert set(result.tables) <= {"training"}


# --- Records ---


def test_cells_have_a_place_in_the_grid_and_in_the_folder(make_cell):
    cell = make_cell(dataset="data/one.hdf5", seed=3, fit_lr=0.012)
    assert cell.key == CellKey("point", "one", 3, 0)
    assert cell.name == "cells/point/one/split-0-seed-3"
    assert make_cell(seed=3, split_seed=8).name == "cells/point/one/split-8-seed-3"
    assert make_cell(dataset="data/one.hdf5", is_trial=True, fit_lr=0.012).name == "trials/point/one/rate-0.012"


def test_records_are_read_back_as_they_were_written(make_cell, make_result):
    record = make_result(make_cell(hidden_size=(8, 4), weight_decay=(0.1, 0.2, 0.0)), metrics={"nrmse": 0.25}).record
    kept = json.loads(json.dumps(record.to_dict()))
    assert CellRecord.from_dict(kept, source="cell.json") == record
    assert kept["request"]["dataset"] == "one" and kept["request"]["config"]["hidden_size"] == [8, 4]
    assert kept["outcome"] == {"failure": None, "val_mse": 1.0, "metrics": {"nrmse": 0.25}}
    assert (kept["format"], kept["timing"]) == (FORMAT, {"training": 3000.0, "test": 600.0})
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


def test_records_of_another_version_are_refused(make_cell, make_result, tmp_path):
    kept = make_result(make_cell()).record.to_dict()
    for found, change in ((1, {}), (FORMAT + 1, {"format": FORMAT + 1})):
        del kept["format"]
        kept |= change
        (tmp_path / "cell.json").write_text(json.dumps(kept))
        with pytest.raises(InputError, match=rf"cell\.json was made by another version \(format {found}, expected"):
            read_record(tmp_path)
        kept["format"] = FORMAT


def test_names_ask_for_rows(tmp_path):
    assert parse_name("hopper-medium-demo") == ("hopper-medium-demo", None)
    assert parse_name("data/one.hdf5:500") == ("data/one.hdf5", 500)
    assert (short_name("data/one.hdf5:500"), short_name("data/one.hdf5")) == ("one-500", "one")
    assert parse_name("nested::state:500") == ("nested::state", 500)
    assert parse_name("nested::7") == ("nested::7", None)
    (tmp_path / "odd:5").write_text("")
    assert parse_name(str(tmp_path / "odd:5")) == (str(tmp_path / "odd:5"), None)


def test_requests_tell_everything_that_decides_a_result(make_cell):
    settings = make_cell(fit_lr=0.5).request("d1ge57").settings()
    assert settings.keys() == LearnConfig().to_dict().keys() | {
        "arm", "dataset", "sha256", "holdout_ratio", "test_ratio", "device", "threads", "simulator"
    }  # fmt: skip
    assert (settings["fit_lr"], settings["sha256"], settings["test_ratio"]) == (0.5, "d1ge57", 0.2)


# --- Folders ---


def test_folders_appear_whole_or_not_at_all(tmp_path, monkeypatch, make_cell, make_result):
    result = make_result(make_cell(), {"curve": pd.DataFrame({"step": [0], "lr": [1 / 3]})})
    monkeypatch.setattr(cells.json, "dump", no_writing)
    with pytest.raises(OSError):
        result.write(tmp_path / "cell")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    result.write(tmp_path / "cell")
    assert (tmp_path / "cell" / "curve.csv").read_text() == "step,lr\n0,0.333333333\n"
    assert oct((tmp_path / "cell").stat().st_mode)[-3:] == "755"
    assert Result.read(tmp_path / "cell").record == result.record == read_record(tmp_path / "cell")
