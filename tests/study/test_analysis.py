import math

import numpy as np
import pandas as pd
import pytest

from study.analysis import POOLED, analyse
from study.cells import CellKey

HORIZONS = {"x": 10, "y": 10}


def lines(table, metric, **where):
    for name, value in {"metric": metric, **where}.items():
        table = table[table[name] == value]
    return table


def test_paired_ratios_of_errors_twice_as_large(make_study):
    paired = analyse(make_study(datasets=("x", "y"), seeds=6), HORIZONS)["paired"]
    for metric in ("nrmse", "median_error", "crps", "rollout_mean", "rollout_tsinf"):
        found = lines(paired, metric)
        assert list(found.dataset) == ["x", "y", POOLED]
        for name in ("effect", "low", "high"):  # noise would pair away: what is left is exactly the factor
            assert found[name].to_numpy() == pytest.approx(np.full(3, 2.0))
        assert found.pairs.tolist() == [6, 6, 12]
        assert found.verdict.tolist() == ["worse"] * 3
        assert found.compared.eq("ratio").all()
    assert lines(paired, "rollout_mean").horizon.tolist()[:2] == [10, 10]
    assert lines(paired, "nrmse").horizon.isna().all()


def test_scores_are_compared_by_their_difference(make_study):
    paired = analyse(make_study(seeds=6), HORIZONS)["paired"]
    (nll,) = lines(paired, "nll", dataset="x").to_dict("records")
    assert (nll["compared"], nll["effect"], nll["verdict"]) == ("difference", pytest.approx(1.0), "worse")
    (ece,) = lines(paired, "ece_raw", dataset="x").to_dict("records")
    assert (ece["effect"], ece["verdict"]) == (pytest.approx(0.1), "worse")
    assert lines(paired, "spearman", dataset="x").verdict.tolist() == ["tie"]
    assert lines(paired, "spearman_probe", dataset="x").verdict.tolist() == ["tie"]
    assert lines(paired, "exploded", dataset="x").effect.tolist() == pytest.approx([0.1])
    assert lines(paired, "ece_isotonic").empty  # no cell has it


def test_fewer_than_six_pairs_have_no_interval(make_study):
    paired = analyse(make_study(datasets=("x", "y"), seeds=5), HORIZONS)["paired"]
    seeds = paired[paired.metric != "member_spread"]
    assert seeds[["low", "high"]].isna().all(axis=None)
    assert set(seeds.verdict) == {"too few runs"}
    assert lines(paired, "nrmse").effect.tolist() == pytest.approx([2.0] * 3)


def test_a_mean_over_datasets_has_its_range(make_study):
    study = make_study(datasets=("x", "y"), seeds=6)
    for key, result in study.items():
        if key.arm == "b" and key.dataset == "y":
            result.tables["trajectories"]["mse"] *= 4
    paired = analyse(study, HORIZONS)["paired"]
    (pooled,) = lines(paired, "nrmse", dataset=POOLED).to_dict("records")
    assert [pooled[name] for name in ("effect", "least", "most")] == pytest.approx([math.sqrt(8), 2, 4])


def test_values_by_hand(make_study):
    tables = analyse(make_study(), HORIZONS)
    values = tables["values"].set_index(["metric", "arm"]).value
    seeds = 6 ** (1 / 3)  # the geometric mean of 1, 2, 3
    assert values["nrmse", "b"] == pytest.approx(2 * seeds * math.sqrt(7.5))  # mean of 1, 4, 9, 16
    assert values["median_error", "a"] == pytest.approx(seeds * 2)
    assert values["crps", "a"] == pytest.approx(seeds * 2.5)
    assert values["rollout_mean", "a"] == pytest.approx(seeds * 1 * 10)  # lower median of the two that reach step 10
    assert values["skill_mean", "a"] == pytest.approx(1 / 10)
    horizon = tables["horizon"].set_index(["arm", "propagation", "horizon"]).loc[("b", "tsinf", 5)]
    assert horizon[["error", "low", "high"]].tolist() == pytest.approx([2 * seeds * 2 * 5, 2 * 2 * 5, 6 * 2 * 5])
    assert tables["reliability"].set_index(["arm", "promised"]).observed["a", 0.9] == pytest.approx(0.8)
    assert tables["timings"].set_index(["arm", "part"]).seconds["a", "test"] == 600
    probe = tables["uncertainty"].set_index(["arm", "rows"]).loc[("a", "probe")]
    assert probe[["runs", "spearman", "auroc"]].tolist() == pytest.approx([3, 0.2, 0.8])


def test_pairs_are_counted_in_seeds_whatever_the_splits(make_study):
    paired = analyse(make_study(seeds=3, splits=(0, 7)), HORIZONS)["paired"]
    (found,) = lines(paired, "nrmse", dataset="x").to_dict("records")
    assert (found["pairs"], found["effect"]) == (3, pytest.approx(2.0))


def test_cells_have_errors_settings_and_headline_numbers(make_study):
    cells = analyse(make_study(seeds=2, failing=[CellKey("b", "x", 1)]), HORIZONS)["cells"]
    places = [("a", "x", 0, 0), ("b", "x", 0, 0), ("a", "x", 1, 0), ("b", "x", 1, 0)]
    assert list(cells[["arm", "dataset", "seed", "split"]].itertuples(index=False, name=None)) == places
    assert cells.fit_lr.tolist() == [0.1] * 4 and cells.fit_epochs.tolist() == [2] * 4
    assert cells.nrmse.tolist() == pytest.approx([7.5**0.5, 2 * 7.5**0.5, 2 * 7.5**0.5, np.nan], nan_ok=True)
    assert cells.failure.isna().tolist() == [True, True, True, False]
    assert cells.r2.tolist() == pytest.approx([0.5, 0.5, 0.5, np.nan], nan_ok=True)
    assert not {"seconds", "timing"} & set(cells)


def test_failed_runs_have_no_ratio_but_are_counted(make_study):
    tables = analyse(make_study(seeds=4, failing=[CellKey("a", "x", 1)]), HORIZONS)
    (found,) = lines(tables["paired"], "nrmse", dataset="x").to_dict("records")
    assert (found["pairs"], found["effect"]) == (3, pytest.approx(2.0))
    assert tables["stability"].set_index("arm").failed.to_dict() == {"a": 1, "b": 0}


def test_runs_that_are_missing_are_no_failures(make_study):
    study = make_study(seeds=3)
    del study[CellKey("b", "x", 2)]
    tables = analyse(study, HORIZONS)
    assert tables["paired"].pairs.iloc[0] == 2
    assert tables["stability"].set_index("arm")[["runs", "failed"]].loc["b"].tolist() == [2, 0]


def test_rollouts_that_explode_stay_in_the_comparison(make_study):
    study = make_study()
    study[CellKey("b", "x", 0)].tables["starts"]["error"] = np.inf
    (found,) = lines(analyse(study, HORIZONS)["paired"], "rollout_tsinf", dataset="x").to_dict("records")
    assert found["pairs"] == 3
    assert 10 < found["effect"] < np.inf


def test_analysing_again_gives_the_same(make_study):
    first, second = (analyse(make_study(), HORIZONS) for _ in range(2))
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], check_exact=True)
