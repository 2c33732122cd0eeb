import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import compare_models
from compare_models import choose_rates, main
from config import LearnConfig
from data.sources import load_dataset
from study import cells
from study.analysis import POOLED, analyse, instability, primary_horizon
from study.cells import Cell, Result, run_cell

ROOT = Path(compare_models.__file__).parent
LENGTH, EPISODES = 30, 12
SMALL = ["ensemble_size=2", "hidden_size=8", "fit_epochs=2", "batch_size=64"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with datasets ``one`` and ``single``, arms ``point`` and ``gauss``, and a tracking store."""
    folder = tmp_path_factory.mktemp("studies")
    for name, episodes in (("one", EPISODES), ("single", 1)):
        random = np.random.default_rng(episodes)
        states = [random.normal(size=(episodes, 3))]
        actions = random.uniform(-1, 1, (LENGTH, episodes, 2))
        for action in actions:
            noise = 0.05 * random.normal(size=(episodes, 3))
            states.append(0.9 * states[-1] + action.sum(axis=1, keepdims=True) * [0.1, 0.2, 0.3] + noise)
        states = np.stack(states, axis=1)  # (episodes, LENGTH + 1, 3)
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            file["observations"] = states[:, :-1].reshape(-1, 3).astype(np.float32)
            file["next_observations"] = states[:, 1:].reshape(-1, 3).astype(np.float32)
            file["actions"] = actions.swapaxes(0, 1).reshape(-1, 2).astype(np.float32)
            file["rewards"] = np.zeros(episodes * LENGTH, np.float32)
            file["terminals"] = np.zeros(episodes * LENGTH, bool)
            file["timeouts"] = np.tile(np.arange(LENGTH) == LENGTH - 1, episodes)
    (folder / "point.yaml").write_text("fit_lr: 0.01")
    (folder / "gauss.yaml").write_text("{fit_lr: 0.02, probabilistic: true}")
    (folder / "wild.yaml").write_text("{fit_lr: 1.0e+30}")
    return folder


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    """Commands run in the workplace and log to its store."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")


def arguments(output, *more, arms=("point", "gauss"), seeds=2, rates=("0.01", "0.02")):
    configs = ["--configs", *(f"{arm}.yaml" for arm in arms), "--datasets", "one.hdf5", "--seeds", str(seeds)]
    return [*configs, "--params", *SMALL, "--learning_rates", *rates, "--output", str(output), "--quiet", *more]


@pytest.fixture(scope="module")
def whole(workplace):
    """A study that ran in one go."""
    kept, here = os.environ.get("MLFLOW_TRACKING_URI"), Path.cwd()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{workplace}/mlflow.db"
    os.chdir(workplace)
    assert main(arguments("whole")) == 0
    os.chdir(here)
    if kept is None:
        del os.environ["MLFLOW_TRACKING_URI"]
    return workplace / "whole"


def cell_tables(study):
    """The bytes of all tables of all cells; ``cell.json`` tells the seconds, too."""
    return {str(path.relative_to(study)): path.read_bytes() for path in sorted(study.glob("*/*/*/*/*.csv"))}


def no_training(*_, **__):
    raise AssertionError("a cell was run again")


# --- From the command to the report ---


def test_study_leaves_cells_tables_figures_and_reports(whole):
    assert len(list(whole.glob("cells/*/one/seed-*/cell.json"))) == 4
    assert len(list(whole.glob("trials/*/one/rate-*/cell.json"))) == 4
    names = {path.name for path in whole.iterdir()}
    tables = "cells values paired aggregates improvement stability horizon reliability learning_rates"
    assert names >= {f"{name}.csv" for name in tables.split()} | {
        "report.html",
        "report.md",
        "ratios.png",
        "study.json",
    }
    assert ".locks" not in names
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "http" not in page.partition("How it was made")[0]
    assert "| probabilistic | False | True |" in (whole / "report.md").read_text()


def test_errors_are_those_of_the_evaluation(whole):
    cells = pd.read_csv(whole / "cells.csv")
    assert list(cells.arm) == ["point", "gauss", "point", "gauss"]
    horizon = int(pd.read_csv(whole / "paired.csv").dropna(subset="horizon").horizon.iloc[0])
    for row in cells.itertuples():
        record = json.loads((whole / f"cells/{row.arm}/one/seed-{row.seed}/cell.json").read_text())
        found = record["outcome"]["metrics"]
        assert row.nrmse == pytest.approx(found["nrmse"], rel=1e-5)
        assert row.rollout_error == pytest.approx(found[f"error_tsinf_{horizon}"], rel=1e-5)
        likelihood = pd.read_csv(whole / f"cells/{row.arm}/one/seed-{row.seed}/likelihood.csv").set_index("prediction")
        assert row.crps_recalibrated == pytest.approx(likelihood.crps["recalibrated"], rel=1e-5)


def test_every_run_has_the_same_split_and_its_arms_rate(whole):
    tested = {(path / "trajectories.csv").read_text().count("\n") for path in whole.glob("cells/*/one/seed-*")}
    starts = [pd.read_csv(path)[["trajectory", "start"]] for path in whole.glob("cells/*/one/seed-*/starts.csv")]
    assert len(tested) == 1
    assert all(start.equals(starts[0]) for start in starts)
    rates = pd.read_csv(whole / "learning_rates.csv")
    best = rates.loc[rates.groupby("arm").val_mse.idxmin()].set_index("arm").fit_lr
    assert (rates[rates.is_chosen].set_index("arm").fit_lr == best.reindex(rates[rates.is_chosen].arm)).all()
    cells = pd.read_csv(whole / "cells.csv")
    assert (cells.fit_lr == cells.arm.map(best)).all()


def test_finished_cells_are_not_run_again(whole, monkeypatch):
    before = {path.name: path.read_bytes() for path in whole.glob("*.csv")}
    monkeypatch.setattr(cells, "run_cell", no_training)
    assert main(arguments("whole")) == 0
    assert {path.name: path.read_bytes() for path in whole.glob("*.csv")} == before


def test_killed_studies_go_on_to_the_same_result(whole, workplace):
    command = [sys.executable, str(ROOT / "compare_models.py"), *arguments("killed")]
    process = subprocess.Popen(command)
    while len(list(workplace.glob("killed/*/*/one/*/cell.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    second = subprocess.Popen(command)  # two processes share what is left
    assert main(arguments("killed")) == 0
    assert second.wait() == 0
    assert cell_tables(workplace / "killed") == cell_tables(whole)
    for name in ("paired", "values", "stability", "learning_rates"):
        assert (workplace / f"killed/{name}.csv").read_bytes() == (whole / f"{name}.csv").read_bytes()


def test_analysis_of_a_study_cut_short(whole, workplace, monkeypatch):
    assert main(arguments("short", seeds=1)) == 0
    monkeypatch.setattr(cells, "run_cell", no_training)
    assert main(arguments("short", "--analyse_only", seeds=5)) == 0
    paired = pd.read_csv("short/paired.csv")
    assert set(paired.metric) == {"nrmse", "rollout_error", "crps_recalibrated"}  # one seed has no spread
    assert paired[["low", "high", "p_value"]].isna().all(axis=None)
    assert "2 of 10 runs" in Path("short/report.md").read_text()


def test_rates_of_an_earlier_study(whole):
    assert main(arguments("followed", "--learning_rates_of", "whole", seeds=1)) == 0
    assert not Path("followed/trials").exists()
    assert (whole / "cells/gauss/one/seed-0/training.csv").read_bytes() == Path(
        "followed/cells/gauss/one/seed-0/training.csv"
    ).read_bytes()


def test_a_training_that_fails_is_recorded(workplace):
    assert main(arguments("failed", arms=("point", "wild"), rates=())) == 0
    cells = pd.read_csv("failed/cells.csv").set_index(["arm", "seed"])
    assert "diverged" in cells.failure["wild", 0]
    assert np.isnan(cells.nrmse["wild", 1])
    assert cells.fit_lr["point", 0] == 0.01  # with no rates given each arm keeps its own
    stability = pd.read_csv("failed/stability.csv").set_index("arm")
    assert stability.failed.to_dict() == {"point": 0, "wild": 2}
    improvement = pd.read_csv("failed/improvement.csv")
    assert (improvement.probability == 0).all()
    assert "2 of which failed" in Path("failed/report.md").read_text()


def test_arms_that_fail_with_every_rate_end_the_study(capsys):
    assert main(arguments("hopeless", rates=("1e30", "1e31"))) == 1
    assert "diverged with every learning rate" in capsys.readouterr().err


def test_mlflow_has_one_run_per_cell_under_the_studys(whole, workplace):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    parent = json.loads((whole / "study.json").read_text())["mlflow_run_id"]
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    folders = [str(path.parent.relative_to(whole)) for path in whole.glob("*/*/*/*/cell.json")]
    assert sorted(run.info.run_name for run in children) == sorted(folders)
    cell = next(run for run in children if run.info.run_name == "cells/gauss/one/seed-1")
    found = json.loads((whole / "cells/gauss/one/seed-1/cell.json").read_text())["outcome"]["metrics"]
    assert cell.data.metrics["nrmse"] == pytest.approx(found["nrmse"])
    assert (cell.data.params["probabilistic"], cell.info.status) == ("True", "FINISHED")
    assert "report.html" in {file.path for file in client.list_artifacts(parent)}


def test_mlflow_never_stops_a_study(workplace, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/one.hdf5/mlflow.db")
    assert main(arguments("untracked", seeds=1, rates=("0.01",))) == 0
    assert capsys.readouterr().err.count("MLflow has not all of this study") == 1
    assert Path("untracked/report.html").exists()


def test_ray_gives_the_same_cells(whole):
    ray = pytest.importorskip("ray")
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(True, head_node_args={"num_cpus": 1})
    try:
        assert main(arguments("ray", "--engine", "ray", "--ray_address", cluster.address)) == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert cell_tables(Path("ray")) == cell_tables(whole)


# --- What a user can get wrong ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seeds", "0"], "--seeds is 0; expected a whole number from 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--split_seed", "-1"], "--split_seed is -1"),
        (["--configs", "point.yaml"], "expected at least two to compare"),
        (["--configs", "point.yaml", "point.yaml"], "--configs names 'point' twice"),
        (["--configs", "point.yaml", "gaus.yaml"], "did you mean 'gauss.yaml'?"),
        (["--datasets", "one.hdf5", "./one.hdf5"], "--datasets names 'one' twice"),
        (["--datasets", "hopper-medium-dem"], "did you mean 'hopper-medium-demo'?"),
        (["--datasets", "single.hdf5"], "leaves none to train on"),
        (["--learning_rates", "0.01", "0"], "expected positive numbers"),
        (["--learning_rates", "0.01", "0.01"], "names 0.01 twice"),
        (["--learning_rates_of", "nowhere"], "has no learning_rates.csv"),
        (["--ray_address", "127.0.0.1:6379"], "without --engine ray"),
        (["--device", "tpu"], "--device"),
        (["--params", "beta_nll=2"], "beta_nll is 2.0"),
        (["--output", "one.hdf5"], "is a file"),
        (["--output", "."], "holds other files than a study"),
        (["--analyse_only"], "has no learning_rates.csv"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(change, message, capsys):
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main([*arguments("new"), *change])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert sorted(Path().rglob("*")) == before


def test_another_studys_cells_are_refused(whole, capsys):
    before = cell_tables(whole)
    with pytest.raises(SystemExit) as stopped:
        main(arguments("whole", "--params", "fit_epochs=4"))
    assert stopped.value.code == 2
    assert "was made with fit_epochs 2, asked for is 4" in capsys.readouterr().err
    assert cell_tables(whole) == before


def test_rates_for_unknown_arms_are_refused(whole, capsys):
    with pytest.raises(SystemExit):
        main(arguments("new", "--learning_rates_of", "whole", arms=("point", "wild")))
    assert "has no rate for the arm 'wild'" in capsys.readouterr().err


def test_help_needs_no_heavy_imports():
    code = "import sys, compare_models\ntry: compare_models.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'pandas', 'mlflow', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# --- Cells ---


@pytest.mark.parametrize("is_trial", [False, True])
def test_cells_do_not_depend_on_the_process(is_trial):
    dataset = load_dataset("one.hdf5")
    config = LearnConfig(ensemble_size=2, hidden_size=(8,), fit_epochs=2, batch_size=64, split_seed=0)
    cell, threads = Cell("point", "one.hdf5", config, is_trial, "cpu", threads=1), torch.get_num_threads()
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


def test_cells_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    result = Result({"outcome": {"failure": None}}, {"training": pd.DataFrame({"step": [0]})})
    monkeypatch.setattr(cells.json, "dump", no_training)
    with pytest.raises(AssertionError):
        result.write(tmp_path / "cell")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    result.write(tmp_path / "cell")
    assert Result.read(tmp_path / "cell").record == result.record


def write_trial(folder, arm, dataset, rate, error):
    cell = Cell(arm, dataset, LearnConfig(fit_lr=rate), True, "cpu", 1)
    record = {"request": {}, "outcome": {"failure": None, "val_mse": error}}
    Result(record, {}).write(folder / cell.name)
    return cell


def test_rates_are_chosen_by_the_geometric_mean_over_datasets(tmp_path):
    errors = {("a", 0.1): (1.0, 100.0), ("a", 0.2): (4.0, 9.0), ("b", 0.1): (5.0, 5.0), ("b", 0.2): (0.1, None)}
    trials = [
        write_trial(tmp_path, arm, dataset, rate, error)
        for (arm, rate), both in errors.items()
        for dataset, error in zip(("x", "y"), both, strict=True)
    ]
    rates = choose_rates(trials, tmp_path)
    assert set(rates[rates.is_chosen][["arm", "fit_lr"]].itertuples(index=False, name=None)) == {("a", 0.2), ("b", 0.1)}
    assert math.isinf(rates.val_mse.iloc[-1])


# --- Analysis ---


def made_result(scale, seed, failure=None):
    """A cell of 4 test trajectories, whose errors are ``scale`` times those of seed and trajectory."""
    if failure:
        outcome = {"failure": failure, "seconds": 1.0, "metrics": {}}
        return Result({"request": {"config": {"fit_lr": 0.1}}, "outcome": outcome}, {})
    trajectory, error = np.arange(4), scale * (1 + seed) * np.array([1.0, 2.0, 3.0, 4.0])
    steps = np.array([1, 5, 10, 25, 50])
    reached = {1: 4, 5: 3, 10: 2, 25: 1, 50: 1}  # start points with that many steps left
    starts = [(t, k, error[t] * k) for k, count in reached.items() for t in trajectory[:count]]
    members = {"predictor": ["ensemble", "member_0", "member_1", "member_2"], "rmse": [1.0, 2.0, 4.0, 8.0]}
    curve = {"step": [0, 1, 2] * 2, "model_id": [0] * 3 + [1] * 3, "val_mse": [4.0, 1.0, math.e, 3.0, 2.0, 1.0]}
    rollout = {"propagation": "tsinf", "horizon": steps, "median": error[1] * steps, "diverged": steps / 100}
    tables = {
        "trajectories": pd.DataFrame(
            {"trajectory": trajectory, "rows": 10, "mse": np.square(error), "crps_recalibrated": error}
        ),
        "starts": pd.DataFrame(starts, columns=["trajectory", "horizon", "error"]),
        "one_step": pd.DataFrame(members),
        "training": pd.DataFrame(curve),
        "rollout": pd.DataFrame(rollout),
        "reliability": pd.DataFrame({"variant": "raw", "promised": [0.5, 0.9], "observed": [0.4, 0.8]}),
    }
    outcome = {"failure": None, "seconds": 1.0, "metrics": {"r2": 0.5}}
    return Result({"request": {"config": {"fit_lr": 0.1}}, "outcome": outcome}, tables)


def made_study(datasets=("x",), seeds=3, failing=()):
    return {
        (arm, dataset, seed): made_result(scale, seed, "diverged" if (arm, dataset, seed) in failing else None)
        for seed in range(seeds)
        for dataset in datasets
        for arm, scale in (("a", 1.0), ("b", 2.0))
    }


def test_primary_horizon_is_reached_by_half_of_the_starts():
    assert primary_horizon(made_study(), "x") == 10


def test_paired_ratios_of_errors_twice_as_large():
    tables = analyse(made_study(datasets=("x", "y")))
    errors = tables["paired"].query("metric != 'sd_log_nrmse'")
    assert list(errors.dataset) == ["x", "y", POOLED] * 3
    for name in ("ratio", "low", "high"):  # noise would pair away: what is left is exactly the factor
        assert errors[name].to_numpy() == pytest.approx(np.full(9, 2.0))
    assert errors.pairs.tolist() == [3, 3, 6] * 3
    assert errors.horizon.dropna().tolist() == [10, 10]
    assert (errors[errors.dataset != POOLED].p_holm < 1e-6).all()
    assert errors[errors.dataset == POOLED].p_value.isna().all()
    spread = tables["paired"].query("metric == 'sd_log_nrmse'")
    assert spread.ratio.tolist() == pytest.approx([1.0] * 3)
    assert (tables["improvement"].probability < 0.5).all()


def test_values_by_hand():
    values = analyse(made_study())["values"].set_index(["metric", "arm"]).value
    seeds = 6 ** (1 / 3)  # the geometric mean of 1, 2, 3
    assert values["nrmse", "b"] == pytest.approx(2 * seeds * math.sqrt(7.5))  # mean of 1, 4, 9, 16
    assert values["crps_recalibrated", "a"] == pytest.approx(seeds * 2.5)
    assert values["rollout_error", "a"] == pytest.approx(seeds * 1 * 10)  # lower median of the two that reach step 10
    assert values["sd_log_nrmse", "a"] == pytest.approx(np.std(np.log([1, 2, 3]), ddof=1))


def test_failed_runs_have_no_ratio_but_lose():
    tables = analyse(made_study(seeds=4, failing=[("a", "x", 1)]))
    paired = tables["paired"].set_index(["metric", "dataset"])
    assert paired.pairs["nrmse", "x"] == 3
    assert paired.ratio["nrmse", "x"] == pytest.approx(2.0)
    stability = tables["stability"].set_index("arm")
    assert stability.failed.to_dict() == {"a": 1, "b": 0}
    # errors of a: 1, inf, 3, 4 and of b: 2, 4, 6, 8; b is lower against inf in all 4, 2 < 3, 2 < 4, ties 4 = 4
    assert tables["improvement"].set_index("metric").probability["nrmse"] == pytest.approx((4 + 1 + 1 + 0.5) / 16)


def test_runs_that_are_missing_are_no_failures():
    study = made_study(seeds=3)
    del study["b", "x", 2]
    tables = analyse(study)
    assert tables["paired"].pairs.iloc[0] == 2
    assert tables["stability"].set_index("arm")[["runs", "failed"]].loc["b"].tolist() == [2, 0]


def test_instability_by_hand():
    found = instability(made_result(1.0, 0), horizon=10)
    assert found["jitter"] == pytest.approx(1 / 4)  # one rise of log error by 1, from 1 to e, and three falls
    assert found["worst_to_median"] == pytest.approx(8 / 4)
    assert found["exploded"] == pytest.approx(0.1)


def test_rollouts_that_explode_stay_in_the_comparison():
    study = made_study()
    study["b", "x", 0].tables["starts"]["error"] = np.inf
    paired = analyse(study)["paired"].set_index(["metric", "dataset"])
    assert paired.pairs["rollout_error", "x"] == 3
    assert 10 < paired.ratio["rollout_error", "x"] < np.inf
