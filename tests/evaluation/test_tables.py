import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import ndtri

from data.trajectories import Dataset, Trajectory
from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble
from evaluation import metrics, tables
from evaluation.calibration import Calibrated
from evaluation.predictions import OneStep, Scale, gather_rows, measure_uncertainty, predict_one_step
from evaluation.rollouts import Forecast
from evaluation.selection import Model
from probabilistic_model import ProbabilisticModel

SCALE = Scale(np.arange(2), np.array([1.0, 10.0]))


# --- One step ---


def test_the_mean_of_members_who_err_in_opposite_directions_is_right(overall):
    off = np.array([0.0, 3.0, -3.0])[:, None, None]
    change = np.array([[1.0, 1.0], [3.0, 1.0]])
    one_step = OneStep(change, change + np.concatenate([off, 0 * off], axis=2), np.zeros((3, 2, 2)))
    table = tables.one_step_table(one_step, linear=change + 1, elites=[0, 1], scale=SCALE)
    rmse = table.query("dimension == '0'").set_index("predictor").rmse.to_dict()
    expected = {"ensemble": 0.0, "elites": 1.5, "member_0": 0.0, "member_1": 3.0, "member_2": 3.0, "linear": 1.0}
    assert rmse == pytest.approx(expected | {"no_change": np.sqrt(5)}, abs=1e-9)
    assert list(rmse) == [*expected, "no_change"]
    linear = overall(table, predictor="linear")
    assert (linear["rmse"], linear["rmse_raw"]) == (1.0, pytest.approx(np.sqrt((1 + 100) / 2)))
    assert linear["r2"] == pytest.approx(1 - 2 / 2)  # the second dimension is constant here: only the first counts
    assert linear["median"] == 1.0
    assert overall(table, predictor="no_change")["median"] == pytest.approx((1 + np.sqrt(5)) / 2)  # of 1 and sqrt(5)
    medians = table[table.predictor == "no_change"].set_index("dimension")["median"]
    assert medians[["0", "1"]].tolist() == [2.0, 1.0]
    all_elites = tables.one_step_table(one_step, None, [0, 1, 2], SCALE).predictor
    assert set(expected) - set(all_elites) == {"elites", "linear"}
    # Subsets of one: mean square 6 of one of two dimensions; of two: (1.5, 1.5, 0); of three: 0.
    sizes = tables.ensemble_size_table(one_step)
    assert sizes.members.tolist() == [1, 2, 3]
    np.testing.assert_allclose(sizes.rmse, [np.sqrt(6 / 2), np.sqrt(1.5 / 2), 0], atol=1e-9)


def test_the_mixture_has_the_likelihood_of_its_own_kind_of_density(constant_ensemble, overall):
    ensemble = constant_ensemble(ProbabilisticModel, [0.0], variance=1.0)
    one_step = OneStep(np.array([[1.0, -2.0]] * 4), np.zeros((1, 4, 2)), np.ones((1, 4, 2)))
    calibrated = Calibrated.of(one_step, one_step.variances, np.array([0, 0, 1, 1]))
    gaussian = tables.score_distributions(ensemble, one_step, one_step.variances, calibrated)
    np.testing.assert_allclose(gaussian["mixture"].nll, gaussian["gaussian"].nll)
    ensemble.nll = lambda truth, mean, log_variance: (truth - mean).abs() + np.log(2.0)  # Laplace of scale 1
    laplace = tables.score_distributions(ensemble, one_step, one_step.variances, calibrated)
    np.testing.assert_allclose(laplace["mixture"].nll, [[1 + np.log(2), 2 + np.log(2)]] * 4)
    np.testing.assert_array_equal(laplace["mixture"].crps, gaussian["mixture"].crps)
    np.testing.assert_array_equal(laplace["gaussian"].nll, gaussian["gaussian"].nll)
    table = tables.likelihood_table(laplace, SCALE)
    assert list(table.prediction.unique()) == ["mixture", "gaussian", "recalibrated", "isotonic"]
    mixture = overall(table, prediction="mixture")
    assert mixture["nll"] == pytest.approx(1.5 + np.log(2))
    assert mixture["nll_raw"] == pytest.approx(1.5 + np.log(2) + np.log(10) / 2)
    crps = laplace["mixture"].crps[0]
    assert mixture["crps_raw"] == pytest.approx((crps * (1, 10)).mean())
    assert mixture["sharpness"] == 1.0
    assert overall(table, prediction="recalibrated")["sharpness"] == pytest.approx((1 + 2) / 2)
    isotonic = overall(table, prediction="isotonic")
    assert np.isnan([isotonic["nll"], isotonic["nll_raw"]]).all()
    # All errors of the other fold are 1 and -2: the distribution is that point, and the score the distance to it.
    assert (isotonic["crps"], isotonic["sharpness"]) == (0.0, 0.0)


def test_calibration_by_hand():
    one_step = OneStep(np.array([[0.5], [-0.5], [3.0], [-3.0]]), np.zeros((1, 4, 1)), np.ones((1, 4, 1)))
    calibrated = Calibrated.of(one_step, one_step.variances, np.array([0, 1, 0, 1]))
    table = tables.calibration_table(calibrated, Scale(np.array([3]), np.array([1.0])))
    assert table.dimension.tolist() == ["all", "3"] * 3
    found = table[table.dimension == "3"].set_index("variant")
    assert found.scale.tolist() == pytest.approx([1.0, np.sqrt(9.25 / 2), np.nan], nan_ok=True)
    # By isotonic regression, 0.5 and 3 lie beyond all of -0.5 and -3, where shares are 1/3 and 2/3; and so do those.
    assert found.mean_z2.tolist() == pytest.approx([9.25 / 2, 1.0, ndtri(2 / 3) ** 2])
    assert found[["coverage_50", "coverage_90"]].to_numpy().tolist() == [[0.5, 0.5], [0.5, 1.0], [1.0, 1.0]]
    reliability = tables.reliability_table(calibrated).query("variant == 'raw'").set_index("promised").observed
    assert (reliability[0.0], reliability[1.0]) == (0.0, 1.0)
    assert (reliability[(reliability.index > 0.4) & (reliability.index < 0.99)] == 0.5).all()  # |z| of 0.5 and of 3
    pit = tables.pit_table(calibrated)
    assert pit.groupby("variant").density.sum().tolist() == pytest.approx([20, 20, 20])
    raw = pit[pit.variant == "raw"]
    assert raw.lower[raw.density > 0].tolist() == pytest.approx([0.0, 0.3, 0.65, 0.95])  # Phi of -3, -0.5, 0.5, 3


def test_log_variances_at_their_bounds_are_counted(constant_member):
    member = constant_member(ProbabilisticModel, [0.0, 0.0, 0.0])  # log-variances of 0
    with torch.no_grad():
        member.network.max_logvar[0, 0] = torch.tensor([-9.0, 40.0, 40.0])
        member.network.min_logvar[0, 0] = torch.tensor([-40.0, -40.0, 9.0])
    ensemble, states = DynamicsEnsemble.from_members([member]), np.zeros((5, 3), np.float32)
    one_step = predict_one_step(ensemble, states, states[:, :1], states)
    table = tables.bounds_table(ensemble, one_step, Scale.of(ensemble)).set_index("dimension")
    assert table.at_max.to_dict() == pytest.approx({"all": 1 / 3, "0": 1, "1": 0, "2": 0})
    assert table.at_min.to_dict() == pytest.approx({"all": 1 / 3, "0": 0, "1": 0, "2": 1})


def test_where_nothing_has_bounds_the_table_is_empty(knowing_ensemble):
    one_step = OneStep(np.zeros((3, 2)), np.zeros((2, 3, 2)), np.zeros((2, 3, 2)))
    assert tables.bounds_table(knowing_ensemble(DeterministicModel), one_step, SCALE).empty


# --- Usefulness of uncertainty ---


def test_parts_of_the_variance_by_hand(overall):
    means = np.array([[[0.0, 1.0]], [[4.0, 1.0]]])
    one_step = OneStep(np.array([[-1.0, 1.0]]), means, np.zeros_like(means))
    variances = np.array([[[1.0, 4.0]], [[3.0, 4.0]]])
    table = tables.parts_table(one_step, variances, SCALE).set_index("dimension")
    assert table.loc["0", ["aleatoric", "epistemic", "error"]].tolist() == pytest.approx([np.sqrt(2), 2.0, 3.0])
    assert table.loc["1", ["aleatoric_raw", "epistemic_raw", "error_raw"]].tolist() == pytest.approx([20.0, 0.0, 0.0])
    assert table.aleatoric["all"] == pytest.approx(np.sqrt(3))


@pytest.fixture
def uncertain_ensemble(random_member):
    """Untrained members, who disagree."""
    return DynamicsEnsemble.from_members([random_member(ProbabilisticModel, index) for index in range(4)])


def drawn_rows(width, seed=0):
    """Rows that are far from where untrained members agree, if ``width`` is large."""
    random = np.random.default_rng(seed)
    states, actions = (random.normal(size=(500, size)).astype(np.float32) * width for size in (3, 2))
    return gather_rows(Dataset("", None, "", [Trajectory(states, actions, states[:, 0], states + 1, False)]), [0])


def uncertainties_of(ensemble, rows):
    return measure_uncertainty(ensemble, predict_one_step(ensemble, rows.states, rows.actions, rows.next_states))


def test_every_measure_is_scored_in_both_units(uncertain_ensemble):
    found = uncertainties_of(uncertain_ensemble, drawn_rows(1))
    table = tables.uncertainty_table(found)
    assert table.units.tolist() == ["normalised"] * 4 + ["raw"] * 4
    for units, of in zip(("normalised", "raw"), found, strict=True):
        row = table.set_index(["measure", "units"]).loc[("total_std", units)]
        values = of.measures["total_std"]
        assert row.spearman == metrics.spearman(values, of.error)
        assert row.auroc_worst == metrics.auroc_of_worst(values, of.error)


def test_risk_coverage_curves_end_at_the_mean_error(uncertain_ensemble):
    found = uncertainties_of(uncertain_ensemble, drawn_rows(1))
    table = tables.risk_coverage_table(found)
    last = table[table.share == 1].groupby("units", sort=False).risk
    np.testing.assert_allclose(last.max(), [of.error.mean() for of in found])
    assert (last.max() - last.min() < 1e-9).all()
    best = table[table.measure == "error"].set_index(["units", "share"]).risk
    for _, rows in table.groupby("measure"):
        assert (rows.set_index(["units", "share"]).risk >= best - 1e-12).all()


def test_far_away_data_is_told_apart_and_the_same_data_is_not(uncertain_ensemble):
    near, far = drawn_rows(1), drawn_rows(100)
    table = tables.ood_table(uncertain_ensemble, uncertainties_of(uncertain_ensemble, near), {"near": near, "far": far})
    auroc = table.set_index(["dataset", "measure", "units"]).auroc
    assert auroc["far", "ensemble_std", "normalised"] > 0.95
    np.testing.assert_allclose(auroc["near"], 0.5)
    assert (table.rows == 500).all()
    assert table.groupby("dataset").rmse.nunique().tolist() == [1, 1]


# --- Open loop ---


def gaussian_forecast(factor, steps=3, starts=2000, seed=0):
    """A forecast whose errors are ``factor`` times as large as it says, dimensions alike."""
    error = factor * np.random.default_rng(seed).normal(size=(steps, starts, 2))
    shares = np.zeros((steps, starts))
    return Forecast(error, np.ones_like(error), shares, shares)


def test_rollout_table_by_hand():
    error = np.array([[[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], [[1.0, 1.0], [2.0, 2.0], [np.nan, np.nan]]])
    shares = np.array([[0.0, 0.5, 1.0], [1.0, 1.0, np.nan]])
    result = Forecast(error, np.full_like(error, 4.0), shares, np.zeros_like(shares))
    table = tables.rollout_table({"tsinf": result}, trajectory=np.array([7, 7, 8]))
    assert table["median"].tolist() == pytest.approx([5 / np.sqrt(2), 1.0])
    assert table.q90.tolist() == pytest.approx([10 / np.sqrt(2), 2.0])
    assert table.starts.tolist() == [3, 2]
    assert table.trajectories.tolist() == [2, 1]
    assert table.left_range.tolist() == [0.5, 1.0]
    assert table.spread.tolist() == [2.0, 2.0]


def test_rollouts_that_explode_have_an_infinite_median_and_points_no_spread():
    error = np.full((1, 3, 2), np.inf)
    variance = np.array([[[1.0, 1.0], [9.0, 9.0], [np.nan, np.nan]]])
    shares = np.ones((1, 3))
    exploded = Forecast(error, variance, shares, shares)
    point = Forecast(error, np.full_like(error, np.nan), shares, shares)
    table = tables.rollout_table({"tsinf": exploded, "mean": point}, np.arange(3)).set_index("propagation")
    assert np.isinf(table["median"]).all()
    assert table.spread["tsinf"] == 2.0  # of those that are numbers
    assert np.isnan(table.spread["mean"])


def test_errors_of_dimensions_and_starts_by_hand():
    error = np.array([[[1.0, -2.0], [3.0, 4.0], [0.5, 0.0]], [[-2.0, 2.0], [4.0, 4.0], [np.nan, np.nan]]])
    shares = np.zeros((2, 3))
    forecasts = {"mean": Forecast(error, error, shares, shares)}
    table = tables.rollout_dimensions_table(forecasts, [1, 2], SCALE).set_index(["horizon", "dimension"])
    assert table["median"].tolist() == [1.0, 2.0, 2.0, 2.0]  # the smallest with half at or below it
    assert table.median_raw.tolist() == [1.0, 20.0, 2.0, 20.0]
    table = tables.start_table(forecasts, [2], trajectory=np.array([5, 6, 7]), step=np.array([10, 20, 30]))
    assert table.columns.tolist() == ["propagation", "trajectory", "start", "horizon", "error"]
    assert table.to_numpy().tolist() == [["mean", 5, 10, 2, 2.0], ["mean", 6, 20, 2, 4.0]]


def test_a_calibrated_forecast_keeps_its_promise_and_an_overconfident_one_does_when_recalibrated():
    trajectory, fold = np.arange(2000) // 20, np.arange(2000) // 400
    forecasts = {"right": gaussian_forecast(1.0), "wrong": gaussian_forecast(2.0)}
    table = tables.rollout_coverage_table(forecasts, trajectory, fold)
    coverage = table.set_index(["propagation", "variant"]).coverage
    assert (coverage["right"] - 0.9).abs().max() < 0.015
    assert (coverage["wrong", "raw"] < 0.65).all()
    assert (coverage["wrong", "recalibrated"] - 0.9).abs().max() < 0.015
    horizons = tables.calibrated_horizon_table(table).set_index(["propagation", "variant"])
    assert (horizons.checked == 3).all()
    expected = {("right", "raw"): 3, ("right", "recalibrated"): 3, ("wrong", "raw"): 0, ("wrong", "recalibrated"): 3}
    assert horizons.horizon.to_dict() == expected


def test_standard_errors_respect_trajectories():
    starts = 400
    error = np.repeat(np.random.default_rng(0).normal(size=(1, starts // 20, 2)), 20, axis=1)  # alike in a trajectory
    forecasts = {"tsinf": Forecast(error, np.ones_like(error), np.zeros((1, starts)), np.zeros((1, starts)))}
    fold = np.zeros(starts)
    clustered = tables.rollout_coverage_table(forecasts, np.arange(starts) // 20, fold).standard_error[0]
    naive = tables.rollout_coverage_table(forecasts, np.arange(starts), fold).standard_error[0]
    assert clustered > 3 * naive


def test_recalibration_stops_where_no_other_fold_is_left():
    error = np.random.default_rng(0).normal(size=(2, 4, 1))
    error[1, 2:] = np.nan  # at the second step only the first fold is alive
    shares = np.zeros((2, 4))
    forecasts = {"ts1": Forecast(error, np.ones_like(error), shares, shares)}
    table = tables.rollout_coverage_table(forecasts, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))
    assert table[["variant", "horizon"]].to_numpy().tolist() == [["raw", 1], ["recalibrated", 1], ["raw", 2]]


# --- Several models and datasets ---


def test_cross_dataset_errors_are_in_units_of_the_dataset(knowing_ensemble, noisy_dataset):
    data = noisy_dataset(deviation=(0.5, 20.0))

    def model(name, sha256, **split):
        parts = {"train": [], "holdout": [], "test": []} | split
        return Model(None, name, knowing_ensemble(), {"dataset": {"sha256": sha256, "split": parts}})

    models = [model("stranger", "other"), model("tested", data.sha256, test=[0, 1, 2]), model("all", data.sha256)]
    table = tables.cross_dataset_table(models, [data], seed=0).set_index("model")
    assert table.trained_on.to_dict() == {"stranger": False, "tested": True, "all": True}
    assert table.rows[["stranger", "tested"]].tolist() == [3600, 900]
    # A Gaussian's root mean square is sqrt(pi / 2) times its mean absolute deviation, in whatever units.
    assert table.rmse["tested"] == pytest.approx(np.sqrt(np.pi / 2), rel=0.03)
    assert table.rmse_raw["tested"] == pytest.approx(np.sqrt((0.5**2 + 20**2) / 2), rel=0.05)
    assert pd.isna(table.loc["all", ["rows", "rmse", "rmse_raw"]]).all()


def test_a_dimension_that_moves_rarely_does_not_take_over_cross_dataset_errors(knowing_ensemble, noisy_dataset):
    data = noisy_dataset()
    for trajectory in data.trajectories:
        trajectory.next_observations[:, 1] = trajectory.observations[:, 1]
        trajectory.next_observations[::100, 1] += 3
    parts = {"train": [], "holdout": [], "test": []}
    stranger = Model(None, "stranger", knowing_ensemble(), {"dataset": {"sha256": "other", "split": parts}})
    (error,) = tables.cross_dataset_table([stranger], [data], seed=0).rmse
    # Whoever expects no change errs by a standard deviation in it, and by sqrt(pi / 2) absolute ones in the other.
    assert error == pytest.approx(np.sqrt((np.pi / 2 + 1) / 2), rel=0.03)
