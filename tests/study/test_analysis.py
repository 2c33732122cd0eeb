import math

import numpy as np
import pandas as pd
import pytest

from study.analysis import POOLED, analyse, instability, primary_horizon
from study.cells import CellKey
from study.report import save_table
from study.store import CellStore
from utils import ROOT


def test_primary_horizon_is_reached_by_half_of_the_starts(make_study):
    assert primary_horizon(make_study(), "x") == 10


def test_paired_ratios_of_errors_twice_as_large(make_study):
    tables = analyse(make_study(datasets=("x", "y")))
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


def test_values_by_hand(make_study):
    tables = analyse(make_study())
    values = tables["values"].set_index(["metric", "arm"]).value
    seeds = 6 ** (1 / 3)  # the geometric mean of 1, 2, 3
    assert values["nrmse", "b"] == pytest.approx(2 * seeds * math.sqrt(7.5))  # mean of 1, 4, 9, 16
    assert values["crps_recalibrated", "a"] == pytest.approx(seeds * 2.5)
    assert values["rollout_error", "a"] == pytest.approx(seeds * 1 * 10)  # lower median of the two that reach step 10
    assert values["sd_log_nrmse", "a"] == pytest.approx(np.std(np.log([1, 2, 3]), ddof=1))
    horizon = tables["horizon"].set_index(["arm", "propagation", "horizon"]).loc[("b", "tsinf", 5)]
    assert horizon[["error", "low", "high"]].tolist() == pytest.approx([2 * seeds * 2 * 5, 2 * 2 * 5, 6 * 2 * 5])
    reliability = tables["reliability"].set_index(["arm", "promised"])
    assert reliability.observed["a", 0.9] == pytest.approx(0.8)


def test_cells_have_errors_settings_and_headline_numbers(make_study):
    cells = analyse(make_study(seeds=2, failing=[CellKey("b", "x", 1)]))["cells"]
    assert cells[["arm", "dataset", "seed"]].values.tolist() == [
        ["a", "x", 0],
        ["b", "x", 0],
        ["a", "x", 1],
        ["b", "x", 1],
    ]
    assert cells.fit_lr.tolist() == [0.1] * 4
    assert cells.nrmse.tolist() == pytest.approx([7.5**0.5, 2 * 7.5**0.5, 2 * 7.5**0.5, np.nan], nan_ok=True)
    assert cells.failure.isna().tolist() == [True, True, True, False]
    assert cells.r2.tolist() == pytest.approx([0.5, 0.5, 0.5, np.nan], nan_ok=True)


def test_failed_runs_have_no_ratio_but_lose(make_study):
    tables = analyse(make_study(seeds=4, failing=[CellKey("a", "x", 1)]))
    paired = tables["paired"].set_index(["metric", "dataset"])
    assert paired.pairs["nrmse", "x"] == 3
    assert paired.ratio["nrmse", "x"] == pytest.approx(2.0)
    stability = tables["stability"].set_index("arm")
    assert stability.failed.to_dict() == {"a": 1, "b": 0}
    # errors of a: 1, inf, 3, 4 and of b: 2, 4, 6, 8; b is lower against inf in all 4, 2 < 3, 2 < 4, ties 4 = 4
    assert tables["improvement"].set_index("metric").probability["nrmse"] == pytest.approx((4 + 1 + 1 + 0.5) / 16)


def test_runs_that_are_missing_are_no_failures(make_study):
    study = make_study(seeds=3)
    del study[CellKey("b", "x", 2)]
    tables = analyse(study)
    assert tables["paired"].pairs.iloc[0] == 2
    assert tables["stability"].set_index("arm")[["runs", "failed"]].loc["b"].tolist() == [2, 0]


def test_instability_by_hand(make_study):
    found = instability(make_study()[CellKey("a", "x", 0)], horizon=10)
    assert found["jitter"] == pytest.approx(1 / 4)  # one rise of log error by 1, from 1 to e, and three falls
    assert found["worst_to_median"] == pytest.approx(8 / 4)
    assert found["exploded"] == pytest.approx(0.1)


def test_rollouts_that_explode_stay_in_the_comparison(make_study):
    study = make_study()
    study[CellKey("b", "x", 0)].tables["starts"]["error"] = np.inf
    paired = analyse(study)["paired"].set_index(["metric", "dataset"])
    assert paired.pairs["rollout_error", "x"] == 3
    assert 10 < paired.ratio["rollout_error", "x"] < np.inf


def test_the_published_cells_give_the_published_tables(tmp_path):
    folder, datasets = ROOT / "results" / "tier2_doubled", ("hopper-medium-demo", "halfcheetah-medium-demo")
    store, arms = CellStore(folder), ("dnn", "pnn", "pnn_beta")
    keys = [CellKey(arm, dataset, seed) for seed in range(3) for dataset in datasets for arm in arms]
    tables = analyse({key: store.read(f"cells/{key.arm}/{key.dataset}/seed-{key.seed}") for key in keys})
    curves = {"horizon", "reliability"}  # thousands of rows, which git does not keep
    published = {path.stem for path in folder.glob("*.csv")} - curves
    assert published == tables.keys() - curves | {"learning_rates"}
    for name in published - {"learning_rates"}:
        found, kept = pd.read_csv(save_table(tables[name], tmp_path / "table.csv")), pd.read_csv(folder / f"{name}.csv")
        pd.testing.assert_frame_equal(found, kept, rtol=1e-4)  # other versions may round otherwise
