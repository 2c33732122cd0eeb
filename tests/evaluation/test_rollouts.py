import numpy as np
import pytest
import torch

from data.trajectories import Dataset, Trajectory
from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble
from evaluation import metrics
from evaluation.predictions import gather_rows
from evaluation.rollouts import (
    CLAMPED,
    Forecast,
    StateRange,
    choose_starts,
    forecast_all,
    forecast_baselines,
    roll_out,
    simulate,
    skill,
    validation_skill,
)
from probabilistic_model import ProbabilisticModel

BOUNDLESS = StateRange(np.full(2, -1e9), np.full(2, 1e9))
SAMPLED = pytest.mark.parametrize("propagation", ["ts1", "tsinf"])


def forecast(ensemble, rows, starts, horizon, propagation, state_range=BOUNDLESS, **options):
    return roll_out(ensemble, rows, np.array(starts), horizon, propagation, state_range, seed=0, **options)


def paths_of(ensemble, rows, starts, steps, propagation):
    """Simulated particles at every step, ``(K, P, S, D)``."""
    states = simulate(ensemble, rows, np.array(starts), steps, propagation, seed=0)
    return np.stack([state.particles for (state,) in states])


@pytest.fixture
def rows_of(walks):
    """Returns a function that gives all rows of walks of these lengths."""
    return lambda *lengths, **options: gather_rows(walks(*lengths, **options), np.arange(len(lengths)))


def test_start_points_are_spread_over_all_trajectories_longest_first(rows_of):
    rows = rows_of(100, 300)
    starts = choose_starts(rows, 40, seed=3)
    assert np.bincount(rows.trajectory[starts]).tolist() == [10, 30]
    assert (np.diff(rows.steps_left[starts]) <= 0).all()
    assert (np.diff(np.sort(starts)) == 10).all()
    assert sorted(choose_starts(rows, 1000, seed=3)) == list(range(400))  # no more than there are, each once


# --- Propagations ---


def test_members_go_alone(constant_ensemble, rows_of):
    ensemble = constant_ensemble(DeterministicModel, [1.0, 1.5, -1.0])
    members = forecast(ensemble, rows_of(6), [0, 2], 4, "member")
    for member, off_per_step in zip(members, [0.0, 0.5, -2.0], strict=True):
        expected = off_per_step * np.arange(1, 5)[:, None, None]
        np.testing.assert_allclose(member.error, np.broadcast_to(expected, (4, 2, 2)), atol=1e-5)
        assert np.isnan(member.variance).all()


@SAMPLED
def test_every_start_point_gets_every_member_equally(constant_ensemble, rows_of, propagation):
    ensemble = constant_ensemble(DeterministicModel, [0.0, 3.0, 6.0])
    (result,) = forecast(ensemble, rows_of(5), [0, 1], 4, propagation)
    # The members' mean is 3, the truth 1: the forecast is off by 2 per step, whoever was dealt to whom.
    np.testing.assert_allclose(result.error[:, 0, :], 2.0 * np.arange(1, 5)[:, None] * [1, 1], rtol=1e-5)
    np.testing.assert_allclose(result.variance[0], 6.0, rtol=1e-5)  # of 0, 3 and 6
    if propagation == "tsinf":
        np.testing.assert_allclose(result.variance[2, 0], 6.0 * 3**2, rtol=1e-5)
    else:
        assert (result.variance[3] < 6.0 * 4**2).all()


def test_ts1_paths_are_continuous_and_change_members(constant_ensemble, rows_of):
    ensemble = constant_ensemble(DeterministicModel, [0.0, 3.0, 6.0])
    steps = np.diff(paths_of(ensemble, rows_of(20), [0], 20, "ts1")[:, :, 0, 0], axis=0)  # (19, particles)
    np.testing.assert_allclose(np.sort(steps, axis=1), np.broadcast_to([0, 3, 6], steps.shape), atol=1e-4)
    assert len(np.unique(steps[:, 0].round())) == 3


def test_tsinf_paths_keep_their_member_also_when_other_trajectories_end(constant_ensemble, rows_of):
    ensemble = constant_ensemble(DeterministicModel, [0.0, 3.0])
    rows = rows_of(5, 2)
    states = list(simulate(ensemble, rows, np.array([0, 5]), 5, "tsinf", seed=0))
    assert [state.particles.shape[1] for (state,) in states] == [2, 2, 1, 1, 1]
    paths = np.stack([state.particles[:, 0, 0] for (state,) in states])
    np.testing.assert_allclose(np.sort(paths[-1]), [0.0, 15.0], atol=1e-4)
    np.testing.assert_allclose(np.ptp(np.diff(paths, axis=0), axis=0), 0.0, atol=1e-5)


def test_points_are_their_own_draws_so_that_a_particle_per_member_is_enough(constant_ensemble, rows_of):
    points = constant_ensemble(DeterministicModel, [0.0, 3.0, 6.0])
    assert paths_of(points, rows_of(3), [0], 1, "tsinf").shape[1] == 3
    drawn = constant_ensemble(ProbabilisticModel, [0.0, 3.0, 6.0], variance=1e-6)
    particles = paths_of(drawn, rows_of(3), [0, 1], 1, "ts1")[0, :, :, 0] - [0, 1]
    for of_start in particles.T:  # at least 20, the same number on each of three members
        assert [np.isclose(of_start, member, atol=0.1).sum() for member in (0, 3, 6)] == [7, 7, 7]


@SAMPLED
def test_one_step_ahead_the_distribution_is_the_mixture_itself(constant_ensemble, rows_of, propagation):
    ensemble = constant_ensemble(ProbabilisticModel, [0.0, 2.0], variance=0.25)
    (result,) = forecast(ensemble, rows_of(5), [0], 1, propagation)
    np.testing.assert_allclose(result.error[0], 0.0, atol=1e-6)
    np.testing.assert_allclose(result.variance[0], 0.25 + 1.0, rtol=1e-5)


@SAMPLED
def test_noise_adds_up_along_a_rollout(constant_ensemble, rows_of, propagation):
    ensemble = constant_ensemble(ProbabilisticModel, [1.0, 1.0], variance=0.04)
    (result,) = forecast(ensemble, rows_of(400), range(300), 9, propagation)
    # Eight sampled steps, their variance estimated from 20 particles with ddof 0, and a ninth known exactly.
    expected = 0.04 * (8 * 19 / 20 + 1)
    assert result.variance[8].mean() == pytest.approx(expected, rel=0.05)
    assert np.square(result.error[8]).mean() == pytest.approx(0.04 * 8 / 20, rel=0.15)  # of the mean of 20


@pytest.mark.parametrize(("propagation", "batch"), [("mean", 1), ("member", 1), ("tsinf", 3)])
def test_paths_are_those_of_the_rollouts_of_the_ensemble(random_member, propagation, batch):
    ensemble = DynamicsEnsemble.from_members([random_member(DeterministicModel, index) for index in range(3)])
    random = np.random.default_rng(0)
    states, actions = random.normal(size=(6, 3)).astype(np.float32), random.normal(size=(6, 2)).astype(np.float32)
    rows = gather_rows(Dataset("", None, "", [Trajectory(states, actions, np.zeros(6), states, False)]), np.array([0]))
    # For tsinf, as many equal rows as members: each is dealt another one.
    rolled = ensemble.rollout(np.repeat(states[:1], batch, 0), np.repeat(actions[None], batch, 0), propagation)
    expected = rolled.numpy().reshape(-1, 7, 3)[:, 1:]
    found = paths_of(ensemble, rows, [0], 6, propagation)[:, :, 0].swapaxes(0, 1)
    expected, found = (paths[paths[:, 0, 0].argsort()] for paths in (expected, found))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# --- Ends, ranges and explosions ---


def test_forecasts_end_with_their_trajectory(constant_ensemble, rows_of):
    ensemble = constant_ensemble(DeterministicModel, [1.0])
    (result,) = forecast(ensemble, rows_of(3, 5), [3, 0, 2], 100, "mean")  # 5, 3 and 1 steps left
    assert result.error.shape == (5, 3, 2)
    np.testing.assert_array_equal((~np.isnan(result.error[..., 0])).sum(axis=0), [5, 3, 1])
    np.testing.assert_array_equal(np.isnan(result.left_range), np.isnan(result.error[..., 0]))


def test_paths_that_leave_the_range_stay_counted(constant_ensemble, rows_of):
    # Members go up by 0 and 4 from 0; the range is 0 to 10, left beyond 10.5, exploded beyond 20.
    ensemble, rows = constant_ensemble(DeterministicModel, [0.0, 4.0]), rows_of(8, change=(1.0, 1.0))
    state_range = StateRange(np.array([0.0, -1e9]), np.array([10.0, 1e9]))
    (result,) = forecast(ensemble, rows, [0], 6, "tsinf", state_range)
    np.testing.assert_array_equal(result.left_range[:, 0], [0, 0, 0.5, 0.5, 0.5, 0.5])  # 12 at step 3
    np.testing.assert_array_equal(result.exploded[:, 0], [0, 0, 0, 0, 0, 0.5])  # 24 at step 6, 20 not yet beyond
    still, up = forecast(ensemble, rows, [0], 6, "member", state_range)
    assert (still.left_range.max(), up.left_range.max()) == (0.0, 1.0)


def test_errors_are_the_forecast_minus_the_record(constant_ensemble, rows_of):
    (result,) = forecast(constant_ensemble(DeterministicModel, [1.5]), rows_of(5), [0, 1], 3, "mean")
    for step, error in enumerate(result.error, start=1):
        np.testing.assert_allclose(error, 0.5 * step, rtol=1e-5)
    np.testing.assert_allclose(result.distance, result.error[..., 0])


def test_what_is_no_number_is_infinitely_wrong_and_has_exploded(constant_ensemble, rows_of):
    (result,) = forecast(constant_ensemble(DeterministicModel, [np.inf]), rows_of(3), [0], 3, "mean")
    assert np.isinf(result.error).all()
    assert (result.exploded == 1).all()


def test_the_range_covers_states_and_next_states(walks):
    data = walks(3)
    found = StateRange.of(Dataset("", None, "", data.trajectories + walks(2, start=-5.0).trajectories))
    np.testing.assert_array_equal(found.low, [-5, -5])
    np.testing.assert_array_equal(found.high, [3, 30])


# --- Clamping ---


NARROW = StateRange(np.array([0.0, -1e9]), np.array([10.0, 1e9]))  # clamped at -5 and 15


@pytest.mark.parametrize("propagation", ["mean", "tsinf"])
def test_clamped_states_stop_where_the_range_ends(constant_ensemble, rows_of, propagation):
    ensemble, rows = constant_ensemble(DeterministicModel, [4.0, 4.0]), rows_of(8, change=(1.0, 1.0))
    free, clamped = forecast(ensemble, rows, [0], 6, propagation, NARROW, also_clamped=True)
    np.testing.assert_allclose(free.error[:, 0, 0], 3.0 * np.arange(1, 7))
    np.testing.assert_allclose(clamped.error[:, 0, 0], [3, 6, 9, 11, 10, 9])  # 15 from step 4 on
    np.testing.assert_allclose(clamped.error[..., 1], free.error[..., 1])
    assert (free.exploded[-1, 0], clamped.exploded[-1, 0]) == (1.0, 0.0)


@pytest.mark.parametrize("propagation", ["mean", "tsinf"])
def test_clamped_paths_are_those_of_simulating_everything_with_clamping(random_member, propagation):
    ensemble = DynamicsEnsemble.from_members([random_member(ProbabilisticModel, index) for index in range(3)])
    random = np.random.default_rng(0)
    states, actions = random.normal(size=(9, 3)).astype(np.float32), random.normal(size=(9, 2)).astype(np.float32)
    rows = gather_rows(Dataset("", None, "", [Trajectory(states, actions, np.zeros(9), states, False)]), np.array([0]))
    low, high = np.full((2, 3), [[-2.0], [2.0]], dtype=np.float32)
    starts = np.arange(4)
    found = [
        clamped.particles.numpy() for _, clamped in simulate(ensemble, rows, starts, 5, propagation, 0, (low, high))
    ]
    generator, draws = torch.Generator().manual_seed(0), 7 if propagation == "tsinf" else 1
    members = torch.arange(3).repeat_interleave(draws)[:, None].expand(-1, 4)
    current = torch.as_tensor(states[starts]).expand(3 * draws if propagation == "tsinf" else 1, -1, -1)
    for step in range(5):
        taken = torch.as_tensor(actions[starts + step]).expand(len(current), -1, -1)
        with torch.no_grad():
            if propagation == "mean":
                current = ensemble.predict(current, taken)[0].mean(dim=0).clamp(-2, 2)
            else:
                mean, variance = ensemble.predict_members(current, taken, members)
                current = ensemble.draw(mean.clamp(-2, 2), variance, generator).clamp(-2, 2)
        np.testing.assert_allclose(found[step], current.numpy(), atol=1e-5)
    assert (np.abs(found[-1]) == 2).any() and (np.abs(found[-1]) < 2).any()


def test_where_nothing_leaves_the_range_clamping_changes_nothing(constant_ensemble, rows_of):
    ensemble, rows = constant_ensemble(ProbabilisticModel, [1.0, 1.2], variance=0.01), rows_of(8)
    free, clamped = forecast(ensemble, rows, [0, 1], 6, "tsinf", also_clamped=True)
    for name in ("error", "variance", "energy_score", "exploded"):
        np.testing.assert_array_equal(getattr(free, name), getattr(clamped, name))


def test_the_range_is_widened_by_shares_of_its_width():
    low, high = NARROW.widened(CLAMPED)
    assert (low[0], high[0]) == (-5.0, 15.0)


# --- Energy score ---


@SAMPLED
def test_energy_score_is_that_of_the_sampled_states(constant_ensemble, rows_of, propagation):
    ensemble, rows = constant_ensemble(ProbabilisticModel, [0.0, 3.0], variance=0.25), rows_of(6)
    (result,) = forecast(ensemble, rows, [0, 2], 3, propagation)
    paths = paths_of(ensemble, rows, [0, 2], 3, propagation).astype(np.float64) / [1, 10]
    for step in range(3):
        truth = rows.next_states[np.array([0, 2]) + step] / [1, 10]
        np.testing.assert_allclose(result.energy_score[step], metrics.energy_score(paths[step], truth), rtol=1e-4)


def test_energy_score_of_a_point_is_its_error(constant_ensemble, rows_of):
    for result in forecast(constant_ensemble(DeterministicModel, [0.5, 2.0]), rows_of(6), [0, 1], 3, "member"):
        np.testing.assert_array_equal(result.energy_score, result.distance)


def test_points_are_drawn_with_what_they_lack(constant_ensemble, rows_of):
    ensemble, rows = constant_ensemble(DeterministicModel, [1.0] * 10), rows_of(400, change=(1.0, 10.0))
    (bare,) = forecast(ensemble, rows, range(300), 2, "tsinf")
    (completed,) = forecast(ensemble, rows, range(300), 2, "tsinf", lacking=np.full((300, 2), 4.0))
    np.testing.assert_allclose(bare.energy_score, 0.0, atol=1e-4)
    # A Gaussian of deviation 2 in two dimensions around the truth: E|X| (1 - 1 / sqrt(2)), E|X| = 2 sqrt(pi / 2).
    expected = 2 * np.sqrt(np.pi / 2) * (1 - 1 / np.sqrt(2)) / np.sqrt(2)
    assert completed.energy_score.mean() == pytest.approx(expected, rel=0.1)


# --- Baselines, and skill against them ---


def test_no_change_is_off_by_what_happened_since(constant_ensemble, rows_of):
    ensemble = constant_ensemble(DeterministicModel, [0.0])
    result = forecast_baselines(ensemble, rows_of(3), np.array([0, 1]), 10)["no_change"]
    np.testing.assert_allclose(result.error[:, 0, 0], [-1, -2, -3])
    np.testing.assert_allclose(result.error[:, 1, 1], [-1, -2, np.nan])  # 10 raw units per step are 1 normalised


def test_the_mean_state_is_that_of_the_training_rows(constant_member, rows_of):
    member = constant_member(DeterministicModel, [0.0, 0.0], input_shift=[2.0, 30.0, 7.0], delta_scale=[1.0, 10.0])
    ensemble = DynamicsEnsemble.from_members([member])
    result = forecast_baselines(ensemble, rows_of(4), np.array([0, 1]), 10)["mean_state"]
    np.testing.assert_allclose(result.error[:, 0], [[1, 2], [0, 1], [-1, 0], [-2, -1]])
    np.testing.assert_allclose(result.error[:, 1, 0], [0, -1, -2, np.nan])
    assert np.isnan(result.variance).all() and np.nanmax(result.exploded) == 0
    np.testing.assert_array_equal(result.energy_score, result.distance)


def test_skill_is_the_share_of_the_median_error_that_is_spared():
    def forecast_of(*distances):
        error = np.array(distances, dtype=float)[..., None]
        return Forecast(error, error, error[..., 0], error[..., 0], error[..., 0])

    ours, baseline = (
        forecast_of([1, 1, 9], [np.inf, np.inf, 1], [1, 1, np.nan]),
        forecast_of([4, 4, 0], [2] * 3, [0] * 3),
    )
    np.testing.assert_allclose(skill(ours, baseline), [0.75, -np.inf, np.nan])


def test_validation_skill_is_that_of_the_mean_propagation(constant_ensemble, walks):
    ensemble, data = constant_ensemble(DeterministicModel, [1.5, 1.5]), walks(12, 12, 12)
    found = validation_skill(ensemble, data, np.array([0, 2]), [1, 4, 100], seed=3)  # 24 rows: all are start points
    assert found.horizon.tolist() == [1, 4]
    assert found.starts.tolist() == [24, 18]
    # The forecast is off by 0.5 a step; the mean training state of this ensemble is 0, so that baseline is off by where
    # the walk is: from 1 to 12 after a step, from 4 to 12 after four.
    np.testing.assert_allclose(found.skill, [1 - 0.5 / 6, 1 - 2.0 / 8])
    few = validation_skill(ensemble, data, np.array([0, 2]), [1], max_starts=2, seed=3)
    assert few.skill.tolist() != found.skill[:1].tolist()


# --- All of them ---


def test_completion_widens_what_is_sampled(constant_ensemble, rows_of):
    ensemble, rows = constant_ensemble(DeterministicModel, [1.0, 1.0]), rows_of(30, 30)
    completion = np.stack([np.full((60, 2), 0.25), np.full((60, 2), 0.75)])
    completion[:, 40:] += 1  # of the second trajectory's last rows
    found = forecast_all(ensemble, rows, np.array([0, 45]), 5, completion, BOUNDLESS, seed=0)
    names = ["no_change", "mean_state", "mean", "mean_clamped", "ts1", "tsinf", "tsinf_clamped", "member_0", "member_1"]
    assert list(found) == names
    for name in ("ts1", "tsinf", "tsinf_clamped"):
        np.testing.assert_allclose(found[name].variance, np.broadcast_to([[0.5, 0.5], [1.5, 1.5]], (5, 2, 2)))
    assert all(np.isnan(found[name].variance).all() for name in ("no_change", "mean", "member_0"))
    np.testing.assert_allclose(found["no_change"].error[:, 0, 0], -np.arange(1, 6))
