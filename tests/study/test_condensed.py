import numpy as np
import pandas as pd
import pytest

from study.analysis import analyse
from study.condensed import ROW_STEP, condense
from study.store import is_same


@pytest.fixture
def cell(make_study):
    """A cell with numbers of many digits, with steps and horizons that are not compared."""
    (result, _) = make_study(seeds=1).values()
    rows = result.tables["row_errors"]
    rows["error"] = np.random.default_rng(0).lognormal(-4, 2, len(rows))
    rows.loc[3, "error"] = 0.0
    step = np.arange(1, 51)
    rollout = pd.DataFrame({"propagation": "mean", "horizon": step, "median": step / 7, "skill": 1 / step})
    result.tables["rollout"] = rollout.assign(exploded=0.0)
    return result


def test_what_is_compared_is_kept_and_the_rest_left_out(cell):
    tables = condense(cell, [5, 10]).tables
    assert tables.keys() == cell.tables.keys()
    assert set(tables["starts"].horizon) == {5, 10}
    assert tables["rollout"].horizon.tolist() == [1, 2, 3, 5, 7, 10, 14, 18, 25, 35, 50]
    assert tables["rollout"]["median"][1] == 0.2857
    pd.testing.assert_frame_equal(tables["trajectories"], cell.tables["trajectories"])


def test_errors_of_rows_are_kept_to_a_small_part_of_them_in_each_trajectory(cell):
    before, after = cell.tables["row_errors"], condense(cell, [5]).tables["row_errors"]
    before = before.sort_values(["trajectory", "error"])
    assert after.trajectory.tolist() == before.trajectory.tolist()
    np.testing.assert_allclose(after.error, before.error, rtol=0.51 * ROW_STEP + 5e-4)
    assert 0.0 in after.error.tolist()


def test_what_is_condensed_already_stays_as_it_is(cell):
    once = condense(cell, [5])
    assert not is_same(once, cell)
    assert is_same(condense(once, [5]), once)


def test_numbers_of_a_study_change_less_than_what_matters(make_study):
    study = make_study(seeds=6)
    exact, kept = (analyse(of, {"x": 5})["values"] for of in (study, {k: condense(r, [5]) for k, r in study.items()}))
    np.testing.assert_allclose(kept.value, exact.value, rtol=ROW_STEP)


def test_of_training_two_curves_are_kept(make_cell, make_result):
    curve = {"step": [0], "model_id": [0], "lr": [0.1], "train_mse": [1 / 3], "val_mse": [2 / 3]}
    tables = {"training": pd.DataFrame(curve), "members": pd.DataFrame({"val_mse": [1 / 3]})}
    condensed = condense(make_result(make_cell(is_trial=True), tables), [5])
    assert condensed.tables["training"].to_dict("records") == [
        {"step": 0, "model_id": 0, "train_mse": 0.3333, "val_mse": 0.6667}
    ]
    assert condensed.tables["members"].val_mse[0] == 1 / 3
