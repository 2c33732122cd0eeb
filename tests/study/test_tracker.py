import json
import os

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from study.store import CellStore
from study.tracker import check_study, open_study, study_command
from utils import InputError


def test_mlflow_has_one_run_per_cell_under_the_studys(workplace, make_cell, make_result):
    store = CellStore(workplace / "first")
    tracker = open_study(store, "python compare_models.py --seeds 2", {"seeds": 2})
    done, failed = make_cell("gauss", seed=1, probabilistic=True), make_cell("wild")
    curve = pd.DataFrame({"step": [0, 0, 1, 1], "model_id": [0, 1, 0, 1], "val_mse": [4.0, 2.0, 1.0, 0.5]})
    tracker.log(done, make_result(done, {"training": curve}, metrics={"nrmse": 0.25}))
    tracker.log(failed, make_result(failed, failure="diverged"))

    again = open_study(store, "python compare_models.py --seeds 3", {"seeds": 3})
    assert again.run_id == tracker.run_id == json.loads((store.folder / "study.json").read_text())["mlflow_run_id"]
    assert study_command(store.folder) == "python compare_models.py --seeds 3"
    again.log(done, make_result(done, metrics={"nrmse": 0.5}))  # it is there already
    (store.folder / "report.html").write_text("report")
    again.finish([store.folder / "report.html"])

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    parent = client.get_run(tracker.run_id)
    assert (parent.info.run_name, parent.info.status, parent.data.params["seeds"]) == ("first", "FINISHED", "2")
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["report.html"]
    found = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{tracker.run_id}'")
    runs = {run.info.run_name: run for run in found}
    assert runs.keys() == {"cells/gauss/one/split-0-seed-1", "cells/wild/one/split-0-seed-0"} and len(found) == 2
    run = runs["cells/gauss/one/split-0-seed-1"]
    assert run.data.metrics == {"nrmse": 0.25, "val_mse/mean": 0.75}
    assert (run.data.params["probabilistic"], run.data.tags["arm"], run.info.status) == ("True", "gauss", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "val_mse/mean")
    assert [(point.step, point.value) for point in history] == [(0, 3.0), (1, 0.75)]
    assert runs["cells/wild/one/split-0-seed-0"].info.status == "FAILED"


def test_mlflow_never_stops_a_study(tmp_path, monkeypatch, capsys, make_cell, make_result):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    tracker = open_study(CellStore(tmp_path / "study"), "command", {})
    tracker.log(make_cell(), make_result(make_cell()))
    tracker.finish([])
    assert tracker.run_id is None
    assert capsys.readouterr().err.count("MLflow has not all of this study") == 1
    assert study_command(tmp_path / "study") == "command"


def test_a_study_of_another_version_is_refused(tmp_path):
    check_study(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"command": "command"}))
    with pytest.raises(InputError, match=r"study\.json was made by another version \(format 1, expected 2\)"):
        check_study(tmp_path)
