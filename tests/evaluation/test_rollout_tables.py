import numpy as np
import pytest

from evaluation import rollout_tables
from evaluation.predictions import Scale
from evaluation.rollouts import Forecast

SCALE = Scale(np.arange(2), np.array([1.0, 10.0]))


def make_forecast(error, variance=np.nan, energy_score=0.0, left_range=0.0, exploded=0.0):
    """A forecast with these parts, which are broadcast to the shape of the error."""
    error = np.asarray(error, dtype=float)
    of_starts = (np.broadcast_to(part, error.shape[:2]) for part in (energy_score, left_range, exploded))
    return Forecast(error, np.broadcast_to(variance, error.shape), *of_starts)


def gaussian_forecast(factor, steps=3, starts=2000, seed=0):
    """A forecast whose errors are ``factor`` times as large as it says, dimensions alike."""
    return make_forecast(factor * np.random.default_rng(seed).normal(size=(steps, starts, 2)), variance=1.0)


def test_rollout_table_by_hand():
    error = np.array([[[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], [[1.0, 1.0], [2.0, 2.0], [np.nan, np.nan]]])
    shares = np.array([[0.0, 0.5, 1.0], [1.0, 1.0, np.nan]])
    scores = np.array([[1.0, 9.0, 2.0], [4.0, 3.0, np.nan]])
    forecasts = {
        "no_change": make_forecast(2 * error),
        "mean_state": make_forecast(np.where(np.isnan(error), np.nan, [[[4.0]], [[0.0]]])),
        "tsinf": make_forecast(error, 4.0, scores, shares, 1 - shares),
    }
    every = rollout_tables.rollout_table(forecasts, trajectory=np.array([7, 7, 8]))
    assert every.propagation.tolist() == ["no_change"] * 2 + ["mean_state"] * 2 + ["tsinf"] * 2
    table = every[every.propagation == "tsinf"]
    assert table.horizon.tolist() == [1, 2]
    assert table["median"].tolist() == pytest.approx([5 / np.sqrt(2), 1.0])
    assert table.q90.tolist() == pytest.approx([10 / np.sqrt(2), 2.0])
    assert table.starts.tolist() == [3, 2]
    assert table.trajectories.tolist() == [2, 1]
    assert table.skill.tolist() == pytest.approx([1 - 5 / np.sqrt(2) / 4, np.nan], nan_ok=True)
    assert table.skill_no_change.tolist() == [0.5, 0.5]
    assert table.energy_score.tolist() == [2.0, 3.0]
    assert table.left_range.tolist() == [0.5, 1.0]
    assert table.exploded.tolist() == [0.5, 0.0]
    assert table.spread.tolist() == [2.0, 2.0]
    assert every.skill[every.propagation == "mean_state"].tolist() == pytest.approx([0.0, np.nan], nan_ok=True)


def test_rollouts_that_explode_have_an_infinite_median_and_points_no_spread():
    error = np.full((1, 3, 2), np.inf)
    exploded = make_forecast(error, np.array([[[1.0, 1.0], [9.0, 9.0], [np.nan, np.nan]]]))
    still = make_forecast(np.ones((1, 3, 2)))
    forecasts = {"no_change": still, "mean_state": still, "tsinf": exploded, "mean": make_forecast(error)}
    table = rollout_tables.rollout_table(forecasts, np.arange(3)).set_index("propagation")
    assert np.isinf(table["median"][["tsinf", "mean"]]).all()
    assert table.skill["tsinf"] == -np.inf
    assert table.spread["tsinf"] == 2.0  # of those that are numbers
    assert np.isnan(table.spread["mean"])


def test_half_of_the_skill_is_kept_until_it_is_lost_for_the_first_time():
    assert rollout_tables.half_skill_horizon([0.8, 0.5, 0.4, 0.3, 0.7]) == 3
    assert rollout_tables.half_skill_horizon([0.8, 0.9]) == 2
    assert rollout_tables.half_skill_horizon([0.8, np.nan, 0.8]) == 1
    assert rollout_tables.half_skill_horizon([-0.1, -0.05]) == 0  # there was none to lose


def test_errors_of_dimensions_and_starts_by_hand():
    error = np.array([[[1.0, -2.0], [3.0, 4.0], [0.5, 0.0]], [[-2.0, 2.0], [4.0, 4.0], [np.nan, np.nan]]])
    forecasts = {"mean": make_forecast(error, energy_score=[[7.0, 7.0, 7.0], [5.0, 6.0, np.nan]])}
    table = rollout_tables.rollout_dimensions_table(forecasts, [1, 2], SCALE).set_index(["horizon", "dimension"])
    assert table["median"].tolist() == [1.0, 2.0, 2.0, 2.0]  # the smallest with half at or below it
    assert table.median_raw.tolist() == [1.0, 20.0, 2.0, 20.0]
    table = rollout_tables.start_table(forecasts, [2], trajectory=np.array([5, 6, 7]), step=np.array([10, 20, 30]))
    assert table.columns.tolist() == ["propagation", "trajectory", "start", "horizon", "error", "energy_score"]
    assert table.to_numpy().tolist() == [["mean", 5, 10, 2, 2.0, 5.0], ["mean", 6, 20, 2, 4.0, 6.0]]


def test_a_calibrated_forecast_keeps_its_promise_and_an_overconfident_one_does_when_recalibrated():
    trajectory, fold = np.arange(2000) // 20, np.arange(2000) // 400
    forecasts = {"right": gaussian_forecast(1.0), "wrong": gaussian_forecast(2.0)}
    table = rollout_tables.rollout_coverage_table(forecasts, trajectory, fold)
    coverage = table.set_index(["propagation", "variant"]).coverage
    assert (coverage["right"] - 0.9).abs().max() < 0.015
    assert (coverage["wrong", "raw"] < 0.65).all()
    assert (coverage["wrong", "recalibrated"] - 0.9).abs().max() < 0.015
    horizons = rollout_tables.calibrated_horizon_table(table).set_index(["propagation", "variant"])
    assert (horizons.checked == 3).all()
    expected = {("right", "raw"): 3, ("right", "recalibrated"): 3, ("wrong", "raw"): 0, ("wrong", "recalibrated"): 3}
    assert horizons.horizon.to_dict() == expected


def test_standard_errors_respect_trajectories():
    starts = 400
    error = np.repeat(np.random.default_rng(0).normal(size=(1, starts // 20, 2)), 20, axis=1)  # alike in a trajectory
    forecasts = {"tsinf": make_forecast(error, 1.0)}
    fold = np.zeros(starts)
    clustered = rollout_tables.rollout_coverage_table(forecasts, np.arange(starts) // 20, fold).standard_error[0]
    naive = rollout_tables.rollout_coverage_table(forecasts, np.arange(starts), fold).standard_error[0]
    assert clustered > 3 * naive


def test_recalibration_stops_where_no_other_fold_is_left():
    error = np.random.default_rng(0).normal(size=(2, 4, 1))
    error[1, 2:] = np.nan  # at the second step only the first fold is alive
    forecasts = {"ts1": make_forecast(error, 1.0)}
    table = rollout_tables.rollout_coverage_table(forecasts, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))
    assert table[["variant", "horizon"]].to_numpy().tolist() == [["raw", 1], ["recalibrated", 1], ["raw", 2]]
