import itertools

import numpy as np
import pandas as pd
import pytest

from data.trajectories import Dataset, Trajectory
from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble
from evaluation import rollouts
from evaluation.predictions import Scale, draw_trajectories, gather_rows
from evaluation.rollouts import (
    Forecast,
    StateRange,
    calibrated_horizon_table,
    choose_starts,
    coverage_table,
    error_table,
    evaluate_rollouts,
    persist,
    roll_out,
    simulate,
)
from probabilistic_model import ProbabilisticModel


def walk(length, start=0.0, change=(1.0, 10.0)):
    """A trajectory of two dimensions that go up by ``change`` at every step."""
    states = start + np.outer(np.arange(length + 1), change)
    values = states.astype(np.float32)
    zeros = np.zeros(length, np.float32)
    return Trajectory(values[:-1], zeros[:, None], zeros, values[1:], terminated=False)


def dataset_of(*trajectories):
    return Dataset("walks", None, "0" * 64, list(trajectories))


def constant_ensemble(constant_member, kind, changes, variance=None):
    """Members that always predict these changes, in units of (1, 10)."""
    options = {} if variance is None else {"variance": [variance, variance]}
    scale = {"delta_scale": [1.0, 10.0]}
    return DynamicsEnsemble([constant_member(kind, [change, change], **options, **scale) for change in changes])


def forecast(ensemble, rows, starts, horizon, propagation, seed=0):
    everything = StateRange(*np.outer([-1e9, 1e9], np.ones(ensemble.state_dim)))
    return roll_out(ensemble, rows, starts, horizon, propagation, everything, seed)


# --- Rows and start points ---


def test_rows_know_their_trajectory_and_place():
    rows = gather_rows(dataset_of(walk(2), walk(3), walk(4)), np.array([0, 2]))
    assert rows.trajectory.tolist() == [0, 0, 2, 2, 2, 2]
    assert rows.step.tolist() == [0, 1, 0, 1, 2, 3]
    assert rows.steps_left.tolist() == [2, 1, 4, 3, 2, 1]


def test_trajectories_are_drawn_whole_until_there_are_enough_rows():
    data = dataset_of(*(walk(10) for _ in range(20)))
    drawn = draw_trajectories(data, np.arange(3, 20), max_rows=45, seed=0)
    assert len(drawn) == len(set(drawn)) == 5
    assert (np.diff(drawn) > 0).all()
    assert set(drawn) <= set(range(3, 20))
    assert draw_trajectories(data, np.arange(3, 20), max_rows=10**6, seed=0).tolist() == list(range(3, 20))
    assert len(draw_trajectories(data, np.arange(20), max_rows=1, seed=0)) == 2  # standard errors need two


def test_start_points_are_spread_over_all_trajectories_longest_first():
    rows = gather_rows(dataset_of(walk(100), walk(300)), np.arange(2))
    starts = choose_starts(rows, 40, seed=3)
    assert np.bincount(rows.trajectory[starts]).tolist() == [10, 30]
    assert (np.diff(rows.steps_left[starts]) <= 0).all()
    assert (np.diff(np.sort(starts)) == 10).all()
    assert sorted(choose_starts(rows, 1000, seed=3)) == list(range(400))  # no more than there are, each once


# --- Forecasts ---


def test_members_go_alone(constant_member):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [1.0, 1.5, -1.0])
    rows = gather_rows(dataset_of(walk(6)), np.array([0]))
    members = forecast(ensemble, rows, np.array([0, 2]), 4, "member")
    for member, off_per_step in zip(members, [0.0, 0.5, -2.0], strict=True):
        expected = off_per_step * np.arange(1, 5)[:, None, None]
        np.testing.assert_allclose(member.error, np.broadcast_to(expected, (4, 2, 2)), atol=1e-5)
        assert member.variance is None


def test_forecasts_end_with_their_trajectory(constant_member):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [1.0])
    rows = gather_rows(dataset_of(walk(3), walk(5)), np.arange(2))
    starts = np.array([3, 0, 2])  # 5, 3 and 1 steps left
    (result,) = forecast(ensemble, rows, starts, 100, "mean")
    assert result.error.shape == (5, 3, 2)
    np.testing.assert_array_equal((~np.isnan(result.error[..., 0])).sum(axis=0), [5, 3, 1])
    np.testing.assert_array_equal(np.isnan(result.left_range), np.isnan(result.error[..., 0]))


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_every_start_point_gets_every_member_equally(constant_member, propagation):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [0.0, 3.0, 6.0])
    rows = gather_rows(dataset_of(walk(5)), np.array([0]))
    (result,) = forecast(ensemble, rows, np.array([0, 1]), 4, propagation)
    # The members' mean is 3, the truth 1: the forecast is off by 2 per step, whoever was dealt to whom.
    np.testing.assert_allclose(result.error[:, 0, :], 2.0 * np.arange(1, 5)[:, None] * [1, 1], rtol=1e-5)
    np.testing.assert_allclose(result.variance[0], 6.0, rtol=1e-5)  # of 0, 3 and 6
    if propagation == "tsinf":
        np.testing.assert_allclose(result.variance[2, 0], 6.0 * 3**2, rtol=1e-5)
    else:
        assert (result.variance[3] < 6.0 * 4**2).all()


def test_ts1_paths_are_continuous_and_change_members(constant_member):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [0.0, 3.0, 6.0])
    rows = gather_rows(dataset_of(walk(20)), np.array([0]))
    paths = np.stack([states for states, *_ in simulate(ensemble, rows, np.array([0]), 20, "ts1", seed=0)])
    steps = np.diff(paths[:, :, 0, 0], axis=0)  # (19, particles)
    np.testing.assert_allclose(np.sort(steps, axis=1), np.broadcast_to([0, 3, 6], steps.shape), atol=1e-4)
    assert len(np.unique(steps[:, 0].round())) == 3


def test_tsinf_paths_keep_their_member(constant_member):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [0.0, 3.0])
    rows = gather_rows(dataset_of(walk(5)), np.array([0]))
    paths = np.stack([states for states, *_ in simulate(ensemble, rows, np.array([0]), 5, "tsinf", seed=0)])
    np.testing.assert_allclose(np.ptp(np.diff(paths[:, :, 0, 0], axis=0), axis=0), 0.0, atol=1e-5)


def test_one_step_ahead_the_distribution_is_the_mixture_itself(constant_member):
    ensemble = constant_ensemble(constant_member, ProbabilisticModel, [0.0, 2.0], variance=0.25)
    rows = gather_rows(dataset_of(walk(5)), np.array([0]))
    (result,) = forecast(ensemble, rows, np.array([0]), 1, "tsinf")
    np.testing.assert_allclose(result.error[0], 0.0, atol=1e-6)
    np.testing.assert_allclose(result.variance[0], 0.25 + 1.0, rtol=1e-5)


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_noise_adds_up_along_a_rollout(constant_member, propagation):
    ensemble = constant_ensemble(constant_member, ProbabilisticModel, [1.0, 1.0], variance=0.04)
    rows = gather_rows(dataset_of(walk(400)), np.array([0]))
    (result,) = forecast(ensemble, rows, np.arange(300), 9, propagation)
    # Eight sampled steps, their variance estimated from 20 particles with ddof 0, and a ninth known exactly.
    expected = 0.04 * (8 * 19 / 20 + 1)
    assert result.variance[8].mean() == pytest.approx(expected, rel=0.05)
    assert np.square(result.error[8]).mean() == pytest.approx(0.04 * 8 / 20, rel=0.15)  # of the mean of 20


def test_forecasts_agree_with_the_rollouts_of_the_ensemble(random_member, member_class):
    ensemble = DynamicsEnsemble([random_member(member_class, index) for index in range(3)])
    random = np.random.default_rng(0)
    states, actions = random.normal(size=(6, 3)).astype(np.float32), random.normal(size=(6, 2)).astype(np.float32)
    rows = gather_rows(Dataset("", None, "", [Trajectory(states, actions, np.zeros(6), states, False)]), np.array([0]))
    truth = rows.next_states.astype(np.float64)
    scale = Scale.of(ensemble)
    for propagation in ("mean", "member"):
        rolled = ensemble.rollout(states[:1], actions[None], propagation).numpy().reshape(-1, 7, 3)
        ours = forecast(ensemble, rows, np.array([0]), 6, propagation)
        for path, result in zip(rolled, ours, strict=True):
            np.testing.assert_allclose(result.error[:, 0], scale.normalise(path[1:] - truth), rtol=1e-4, atol=1e-4)


def test_paths_that_leave_the_range_stay_counted(constant_member):
    # Members go up by 0 and 4 from 0; the range is 0 to 10, left beyond 10.5, diverged beyond 20.
    ensemble = constant_ensemble(constant_member, DeterministicModel, [0.0, 4.0])
    rows = gather_rows(dataset_of(walk(8, change=(1.0, 1.0))), np.array([0]))
    state_range = StateRange(np.array([0.0, -1e9]), np.array([10.0, 1e9]))
    (result,) = roll_out(ensemble, rows, np.array([0]), 6, "tsinf", state_range, 0)
    np.testing.assert_array_equal(result.left_range[:, 0], [0, 0, 0.5, 0.5, 0.5, 0.5])  # 12 at step 3
    np.testing.assert_array_equal(result.diverged[:, 0], [0, 0, 0, 0, 0, 0.5])  # 24 at step 6, 20 not yet beyond
    up, down = roll_out(ensemble, rows, np.array([0]), 6, "member", state_range, 0)
    assert (up.left_range.max(), down.left_range.max()) == (0.0, 1.0)


def test_what_is_no_number_is_infinitely_wrong_and_has_diverged(constant_member):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [np.inf])
    rows = gather_rows(dataset_of(walk(3)), np.array([0]))
    (result,) = forecast(ensemble, rows, np.array([0]), 3, "mean")
    assert np.isinf(result.error).all()
    assert (result.diverged == 1).all()
    table = error_table("mean", result, np.array([0]))
    assert np.isinf(table["median"]).all()


def test_the_range_covers_states_and_next_states():
    found = StateRange.of(dataset_of(walk(3), walk(2, start=-5.0)))
    np.testing.assert_array_equal(found.low, [-5, -5])
    np.testing.assert_array_equal(found.high, [3, 30])


def test_persistence_is_off_by_what_happened_since(constant_member):
    rows = gather_rows(dataset_of(walk(3)), np.array([0]))
    scale = Scale.of(constant_ensemble(constant_member, DeterministicModel, [0.0]))
    result = persist(rows, np.array([0, 1]), 10, scale)
    np.testing.assert_allclose(result.error[:, 0, 0], [-1, -2, -3])
    np.testing.assert_allclose(result.error[:, 1, 1], [-1, -2, np.nan])  # 10 raw units per step are 1 normalised


# --- Tables ---


def gaussian_forecast(factor, steps=3, starts=2000, seed=0):
    """A forecast whose errors are ``factor`` times as large as it says, dimensions alike."""
    error = factor * np.random.default_rng(seed).normal(size=(steps, starts, 2))
    shares = np.zeros((steps, starts))
    return Forecast(error, np.ones_like(error), shares, shares)


def test_error_table_by_hand():
    error = np.array([[[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], [[1.0, 1.0], [2.0, 2.0], [np.nan, np.nan]]])
    shares = np.array([[0.0, 0.5, 1.0], [1.0, 1.0, np.nan]])
    result = Forecast(error, np.full_like(error, 4.0), shares, np.zeros_like(shares))
    table = error_table("tsinf", result, trajectory=np.array([7, 7, 8]))
    assert table["median"].tolist() == pytest.approx([5 / np.sqrt(2), 1.0])
    assert table.q90.tolist() == pytest.approx([10 / np.sqrt(2), 2.0])
    assert table.starts.tolist() == [3, 2]
    assert table.trajectories.tolist() == [2, 1]
    assert table.left_range.tolist() == [0.5, 1.0]
    assert table.spread.tolist() == [2.0, 2.0]


def test_a_calibrated_forecast_keeps_its_promise_and_an_overconfident_one_does_when_recalibrated():
    trajectory, fold = np.arange(2000) // 20, np.arange(2000) // 400
    right = coverage_table("tsinf", gaussian_forecast(1.0), trajectory, fold)
    wrong = coverage_table("tsinf", gaussian_forecast(2.0), trajectory, fold)
    assert (right.coverage - 0.9).abs().max() < 0.015
    assert (wrong[wrong.variant == "raw"].coverage < 0.65).all()
    assert (wrong[wrong.variant == "recalibrated"].coverage - 0.9).abs().max() < 0.015
    horizons = calibrated_horizon_table(pd.concat([right.assign(propagation="right"), wrong]))
    found = {(row.propagation, row.variant): (row.horizon, row.checked) for row in horizons.itertuples()}
    assert found[("tsinf", "raw")] == (0, 3)
    assert found[("tsinf", "recalibrated")] == found[("right", "raw")] == (3, 3)


def test_standard_errors_respect_trajectories():
    starts = 400
    error = np.repeat(np.random.default_rng(0).normal(size=(1, starts // 20, 2)), 20, axis=1)  # alike in a trajectory
    same = Forecast(error, np.ones_like(error), np.zeros((1, starts)), np.zeros((1, starts)))
    fold = np.zeros(starts)
    clustered = coverage_table("tsinf", same, np.arange(starts) // 20, fold).standard_error[0]
    naive = coverage_table("tsinf", same, np.arange(starts), fold).standard_error[0]
    assert clustered > 3 * naive


def test_recalibration_stops_where_no_other_fold_is_left():
    error = np.random.default_rng(0).normal(size=(2, 4, 1))
    error[1, 2:] = np.nan  # at the second step only the first fold is alive
    shares = np.zeros((2, 4))
    result = Forecast(error, np.ones_like(error), shares, shares)
    table = coverage_table("ts1", result, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))
    assert table[["variant", "horizon"]].to_numpy().tolist() == [["raw", 1], ["recalibrated", 1], ["raw", 2]]


def test_deterministic_bands_contain_the_residual_variance(constant_member):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [1.0, 1.0])
    rows = gather_rows(dataset_of(walk(30), walk(30)), np.arange(2))
    tables = evaluate_rollouts(
        ensemble,
        rows,
        np.full((2, len(rows), 2), 0.25),
        rows.trajectory,
        StateRange(np.full(2, -1e9), np.full(2, 1e9)),
        horizons=[1, 5, 100],
        max_starts=10,
        seed=0,
    )
    spread = tables["rollout"].query("propagation == 'tsinf'").spread
    np.testing.assert_allclose(spread, 0.5)
    assert set(tables["starts"].horizon) == {1, 5}  # nothing lasts 100 steps
    assert tables["rollout"].horizon.max() <= 30
    names = ["no_change", "mean", "ts1", "tsinf", "member_0", "member_1"]
    assert tables["rollout"].propagation.unique().tolist() == names
    dimension = tables["rollout_dimensions"]
    assert len(dimension) == len(list(itertools.product(["mean", "ts1", "tsinf"], [1, 5], ["0", "1"])))
    np.testing.assert_allclose(dimension["median"], 0.0, atol=1e-4)


def test_raw_errors_are_in_the_units_of_the_data(constant_member):
    ensemble = constant_ensemble(constant_member, DeterministicModel, [1.5])
    rows = gather_rows(dataset_of(walk(5)), np.array([0]))
    (result,) = forecast(ensemble, rows, np.array([0, 1]), 2, "mean")
    table = rollouts.dimension_table("mean", result, [2], Scale.of(ensemble)).set_index("dimension")
    assert table["median"].tolist() == pytest.approx([1.0, 1.0])
    assert table["median_raw"].tolist() == pytest.approx([1.0, 10.0])
