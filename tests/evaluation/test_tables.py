import itertools

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
    other = uncertainties_of(uncertain_ensemble, drawn_rows(5))
    table = tables.uncertainty_table({"test": found, "other": other})
    assert table.units.tolist() == (["normalised"] * 4 + ["raw"] * 4) * 2
    assert table.rows.tolist() == ["test"] * 8 + ["other"] * 8
    for (rows, units), of in zip(
        itertools.product(("test", "other"), ("normalised", "raw")), found + other, strict=True
    ):
        row = table.set_index(["rows", "measure", "units"]).loc[(rows, "total_std", units)]
        values = of.measures["total_std"]
        assert row.spearman == metrics.spearman(values, of.error)
        assert row.auroc_worst == metrics.auroc_of_worst(values, of.error)
    told = table.set_index(["rows", "measure", "units"]).auroc_told
    assert told["test"].isna().all()
    for units, (near, far) in zip(("normalised", "raw"), zip(found, other, strict=True), strict=True):
        expected = metrics.auroc(far.measures["total_std"], near.measures["total_std"])
        assert told["other", "total_std", units] == expected > 0.8


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
