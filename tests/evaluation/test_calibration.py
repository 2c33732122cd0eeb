import itertools

import numpy as np
import pytest
from scipy.special import ndtri

from data.trajectories import Transitions, gather_transitions
from deterministic_model import DeterministicModel
from evaluation import metrics
from evaluation.calibration import (
    Calibrated,
    assign_folds,
    completion,
    cross_fitted_isotonic,
    cross_fitted_scale,
    residual_variances,
)
from evaluation.predictions import OneStep, gather_rows, predict_one_step


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- Folds ---


def test_folds_keep_groups_whole_and_equal_in_number():
    groups = np.repeat([7, 3, 9, 1, 4, 8], [5, 1, 2, 4, 3, 6])
    fold = assign_folds(groups, 3, seed=1)
    by_group = {group: set(fold[groups == group]) for group in set(groups)}
    assert all(len(folds) == 1 for folds in by_group.values())
    assert np.bincount([folds.pop() for folds in by_group.values()]).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(fold, assign_folds(groups, 3, seed=1))
    assert any((assign_folds(groups, 3, seed) != fold).any() for seed in range(2, 6))


def test_a_scale_comes_from_the_other_folds_only():
    z = np.array([[1.0, 10.0], [3.0, 30.0], [2.0, np.inf]])  # three rows, two dimensions
    scale = cross_fitted_scale(z, np.array([0, 0, 1]))
    np.testing.assert_allclose(scale[:, 0], [2.0, 2.0, np.sqrt(5)])
    np.testing.assert_allclose(scale[:, 1], [np.nan, np.nan, np.sqrt(500)])  # the infinite error is no evidence


def test_a_calibrated_prediction_needs_no_scale(rng):
    scale = cross_fitted_scale(rng.normal(size=(50_000, 2)), assign_folds(np.arange(50_000) // 500, 5, seed=0))
    np.testing.assert_allclose(scale, 1.0, atol=0.02)


def test_errors_of_zero_are_recalibrated_to_zero():
    z = np.zeros((4, 1))
    np.testing.assert_array_equal(z / cross_fitted_scale(z, np.array([0, 0, 1, 1])), z)


def test_recalibration_restores_coverage_per_dimension_and_horizon(rng):
    factor = np.array([[0.5, 2.0], [3.0, 1.0]])[:, None, :]  # (horizons, rows, dimensions)
    z = factor * rng.normal(size=(2, 20_000, 2))
    scale = cross_fitted_scale(z, assign_folds(np.arange(20_000) // 100, 5, seed=0))
    np.testing.assert_allclose(metrics.interval_coverage(z / scale, 0.9, axis=-2), 0.9, atol=0.01)


# --- Isotonic regression ---


def test_isotonic_regression_is_that_of_another_library_on_the_other_folds(rng):
    regression = pytest.importorskip("sklearn.isotonic").IsotonicRegression(out_of_bounds="clip")
    z, fold = 1.5 * rng.standard_t(3, size=(300, 2)).round(1), np.arange(300) // 100  # with ties
    found = cross_fitted_isotonic(z, fold)
    for current, dim in itertools.product(range(3), range(2)):
        known = z[fold != current, dim]
        share = [(known <= value).sum() / 201 for value in known]  # of 200 and the row to come
        expected = regression.fit(known, share).predict(z[fold == current, dim])
        np.testing.assert_allclose(found.pit[fold == current, dim], expected)


def test_isotonic_regression_mends_any_shape(rng):
    z = rng.exponential(size=(20_000, 1)) * [2.0] - 1  # neither wide enough, nor centred, nor symmetric
    fold = assign_folds(np.arange(20_000) // 100, 5, seed=0)
    found = cross_fitted_isotonic(z, fold)
    assert np.histogram(found.pit, 20, (0, 1), density=True)[0] == pytest.approx(1, abs=0.1)
    assert metrics.expected_calibration_error(ndtri(found.pit)) < 0.01
    assert metrics.expected_calibration_error(z / cross_fitted_scale(z, fold)) > 0.03
    assert found.std.mean() == pytest.approx(2.0, rel=0.03)  # that of the errors themselves
    assert found.crps.mean() == pytest.approx(2.0 / 2, rel=0.03)  # of a known exponential: half its scale


def test_isotonic_regression_leaves_a_calibrated_gaussian_as_it_is(rng):
    z = rng.normal(size=(20_000, 2))
    found = cross_fitted_isotonic(z, assign_folds(np.arange(20_000) // 100, 5, seed=0))
    np.testing.assert_allclose(found.pit, metrics.probability_integral_transform(z), atol=0.02)
    expected = metrics.gaussian_crps(z, np.zeros(z.shape), np.ones(z.shape))
    assert found.crps.mean() == pytest.approx(expected.mean(), rel=0.01)


def test_without_another_fold_or_with_infinite_errors_there_is_no_isotonic_regression():
    fold = np.array([0, 0, 1, 1])
    assert cross_fitted_isotonic(np.ones((4, 1)), np.zeros(4)) is None
    assert cross_fitted_isotonic(np.array([[1.0], [np.inf], [0.0], [2.0]]), fold) is None
    extreme = cross_fitted_isotonic(np.array([[1.0], [2.0], [50.0], [-50.0]]), fold)
    np.testing.assert_allclose(extreme.pit[:, 0], [1 / 3 + 51 / 300, 1 / 3 + 52 / 300, 2 / 3, 1 / 3])  # never 0 or 1


# --- Completing points to distributions ---


def predict(ensemble, data):
    rows = gather_rows(data, np.arange(len(data.trajectories)))
    return rows, predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)


def test_distributions_lack_nothing(knowing_ensemble, noisy_dataset):
    ensemble = knowing_ensemble()
    rows, one_step = predict(ensemble, noisy_dataset(trajectories=1, length=50))
    found = completion(ensemble, one_step, rows.trajectory, training=None)  # nor do they need a second fold
    np.testing.assert_array_equal(found, np.zeros((2, 50, 2)))


def test_points_lack_the_residuals_of_the_training_rows(knowing_ensemble, noisy_dataset):
    ensemble, data = knowing_ensemble(DeterministicModel), noisy_dataset(trajectories=3)
    rows, one_step = predict(ensemble, data)
    training = gather_transitions(noisy_dataset(trajectories=6, seed=1), np.arange(6))
    found = completion(ensemble, one_step, rows.trajectory, training)
    assert found.shape == (2, 900, 2)
    np.testing.assert_array_equal(found, np.broadcast_to(residual_variances(ensemble, training), found.shape))
    np.testing.assert_allclose(found[0, 0], [0.25, 4.0], rtol=0.1)


def test_without_training_rows_residuals_come_from_the_other_folds(knowing_ensemble, noisy_dataset):
    ensemble, data = knowing_ensemble(DeterministicModel), noisy_dataset(trajectories=2, length=50)
    rows, one_step = predict(ensemble, data)
    found = completion(ensemble, one_step, rows.trajectory, training=None)
    of_second = residual_variances(ensemble, gather_transitions(data, np.array([1])))
    np.testing.assert_allclose(found[:, :50], np.broadcast_to(of_second, (2, 50, 2)))
    with pytest.raises(ValueError, match="two trajectories"):
        completion(ensemble, one_step, np.zeros(100), training=None)


def test_residuals_of_many_rows_are_taken_from_all_over(knowing_ensemble, monkeypatch):
    monkeypatch.setattr("evaluation.calibration._RESIDUAL_ROWS", 3)
    states = np.zeros((101, 2), np.float32)
    following = np.zeros((101, 2), np.float32)
    following[[0, 50, 100], 0] = [1, 2, 3]
    transitions = Transitions(states, states[:, :1], following, states[:, 0])
    variance = residual_variances(knowing_ensemble(DeterministicModel), transitions)
    np.testing.assert_allclose(variance[:, 0, 0], 14 / 3)
    assert (variance[:, 0, 1] > 0).all()  # of no errors at all


# --- The matching Gaussian ---


def test_the_gaussian_has_the_moments_of_the_mixture():
    one_step = OneStep(change=np.array([[3.0]]), means=np.array([[[0.0]], [[4.0]]]), variances=np.zeros((2, 1, 1)))
    calibrated = Calibrated.of(one_step, np.array([[[1.0]], [[3.0]]]), np.zeros(1))
    assert (calibrated.mean.item(), calibrated.variance.item()) == (2.0, 2.0 + 4.0)
    assert list(calibrated.variances) == list(calibrated.z) == ["raw"]  # there is no other fold
    assert calibrated.z["raw"].item() == pytest.approx(1 / np.sqrt(6))


def test_recalibration_multiplies_by_the_error_of_the_other_fold():
    change = np.array([[1.0], [2.0], [4.0], [4.0]])
    one_step = OneStep(change, np.zeros((2, 4, 1)), np.zeros((2, 4, 1)))
    calibrated = Calibrated.of(one_step, np.full((2, 4, 1), 4.0), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(calibrated.scale[:, 0], [2.0, 2.0, np.sqrt(0.625), np.sqrt(0.625)])
    np.testing.assert_allclose(calibrated.variances["recalibrated"][:, 0], [16.0, 16.0, 2.5, 2.5])
    np.testing.assert_allclose(calibrated.z["recalibrated"][0], 0.25)
