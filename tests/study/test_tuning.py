import math

import numpy as np
import pandas as pd
import pytest

from config import LearnConfig
from study.grid import Grid
from study.horizons import choose_horizons
from study.store import CellStore
from study.tuning import Tuning, further_trials, rates_table, sensitivity_table
from utils import InputError

ARMS = {"a": LearnConfig(), "b": LearnConfig()}


@pytest.fixture
def run(tmp_path, make_result):
    """Returns a function that makes up trials of a grid, from members' errors by arm and rate; None is a failure."""
    grid, store = Grid(ARMS, ["x"], seeds=[0], split_seeds=[0], device="cpu", threads=1), CellStore(tmp_path)

    def make(errors):
        trials = []
        for (arm, rate), members in errors.items():
            trials.append(grid.trial(arm, "x", rate))
            skill = pd.DataFrame({"horizon": [1, 5], "starts": [10, 10], "skill": [0.9, rate]})
            tables = {"members": pd.DataFrame({"val_mse": members or []}), "skill": skill}
            failure, median = (None, float(np.median(members))) if members else ("diverged", None)
            if trials[-1].name not in store:
                store.write(trials[-1].name, make_result(trials[-1], tables, failure=failure, val_mse=median))
        return trials, store, grid

    return make


def test_the_median_member_chooses_whatever_a_stray_one_does(run):
    trials, store, _ = run(
        {
            ("a", 0.1): [4.0, 4.0, 4.0],
            ("a", 0.2): [1.0, 1.0, 900.0],
            ("a", 0.4): [2.0, 2.0, 2.0],
            ("b", 0.1): [1.0, 2.0, 3.0],
            ("b", 0.2): None,
        }
    )
    table = rates_table(trials, store)
    assert list(table) == ["arm", "dataset", "fit_lr", "val_mse", "best", "worst", "stray", "is_chosen"]
    assert table[table.is_chosen][["arm", "fit_lr"]].values.tolist() == [["a", 0.2], ["b", 0.1]]
    assert table.stray[:4].tolist() == [0, 1, 0, 0]
    assert table.iloc[1][["best", "worst"]].tolist() == [1, 900]
    assert math.isinf(table.val_mse.iloc[-1])
    tuning = Tuning.of(trials, store)
    assert tuning.chosen == {("a", "x"): 0.2, ("b", "x"): 0.1}
    assert tuning.horizon == {"x": 1}  # at their chosen rates, arms have skills of 0.2 and 0.1 at five steps

    forgiving = sensitivity_table(table).set_index("arm")
    assert forgiving.loc["a", ["below", "above"]].tolist() == pytest.approx([2, math.sqrt(2)])
    assert np.isnan(forgiving.below["b"]) and math.isinf(forgiving.above["b"])
    assert forgiving.is_edge.to_dict() == {"a": False, "b": True}


def test_trials_go_on_beyond_the_edges_by_the_same_factor_twice_at_most(run):
    errors = {("a", 0.1): [10.0], ("a", 0.2): [5.0], ("b", 0.1): [0.1], ("b", 0.2): [0.2]}
    for rates in ([("a", 0.4), ("b", 0.05)], [("a", 0.8), ("b", 0.025)], []):
        trials, store, grid = run(errors)
        further = further_trials(trials, store, grid, candidates=2)
        assert [(trial.arm, trial.config.fit_lr) for trial in further] == rates
        errors |= {(arm, rate): [rate if arm == "b" else 1 / rate] for arm, rate in rates}


def test_trials_stop_where_the_best_is_inside_or_there_is_no_choice(run):
    trials, store, grid = run({("a", 0.1): [2.0], ("a", 0.2): [1.0], ("a", 0.4): [2.0]})
    assert further_trials(trials, store, grid, candidates=3) == []
    assert further_trials(trials[:1], store, grid, candidates=1) == []


def test_an_arm_that_fails_with_every_rate_tries_lower_ones_and_then_ends_the_study(run):
    trials, store, grid = run({("a", 0.1): None, ("a", 0.2): None})
    assert [trial.config.fit_lr for trial in further_trials(trials, store, grid, candidates=2)] == [0.05]
    with pytest.raises(FloatingPointError, match="arm a has diverged on x with every learning rate"):
        rates_table(trials, store)


def test_an_earlier_study_decides_for_the_same_names(tmp_path):
    rates = [("a", "x", 0.1, False), ("a", "x", 0.2, True), ("b", "x", 0.3, True), ("c", "x", 0.4, True)]
    table = pd.DataFrame(rates, columns=["arm", "dataset", "fit_lr", "is_chosen"]).assign(val_mse=1.0, stray=0)
    table.to_csv(tmp_path / "learning_rates.csv", index=False)
    pd.DataFrame([("x", 25), ("y", 5)], columns=["dataset", "horizon"]).to_csv(tmp_path / "horizons.csv", index=False)
    tuning = Tuning.read(tmp_path, ARMS, ["data/x.hdf5"])
    assert tuning.rates.fit_lr.tolist() == [0.1, 0.2, 0.3]
    assert tuning.horizon == {"x": 25}
    with pytest.raises(InputError, match="has no rate for the arm 'a' on 'y'"):
        Tuning.read(tmp_path, ARMS, ["y"])
    with pytest.raises(InputError, match=r"has no learning_rates\.csv and horizons\.csv"):
        Tuning.read(tmp_path / "nowhere", ARMS, ["x"])


# --- Horizons ---


def skill(*values, starts=(100, 90, 60, 20)):
    return pd.DataFrame({"horizon": [1, 5, 10, 25], "starts": starts, "skill": values})


def test_the_horizon_is_the_longest_at_which_the_best_arm_keeps_half_of_the_skill():
    skills = {
        ("a", "x"): skill(0.9, 0.4, 0.3, 0.9),
        ("b", "x"): skill(0.8, 0.6, 0.5, 0.9),
        ("a", "y"): skill(0.4, 0, 0, 0),
    }
    table = choose_horizons(skills, ["x", "y"]).set_index("dataset")
    assert table.horizon.to_dict() == {"x": 10, "y": 1}  # too few start points reach 25; on y nobody has any skill
    assert table.arm.to_dict() == {"x": "b", "y": "a"}
    assert table.skill["x"] == 0.5
