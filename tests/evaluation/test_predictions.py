import numpy as np
import pytest
from scipy import stats

from data.trajectories import Dataset, Trajectory, Transitions
from deterministic_model import DeterministicModel
from dynamics_model import DISAGREEMENTS, DynamicsEnsemble
from evaluation.predictions import (
    Scale,
    disagreements,
    gather_rows,
    measure_uncertainty,
    member_nll,
    predict_linearly,
    predict_one_step,
)
from probabilistic_model import ProbabilisticModel


@pytest.fixture
def random_ensemble(random_member):
    """Returns a function that builds untrained members of a kind."""
    return lambda kind, size: DynamicsEnsemble.from_members([random_member(kind, index) for index in range(size)])


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Lets an ensemble of three take seven rows at a time."""
    monkeypatch.setattr("evaluation.predictions._MEMBER_ROWS_PER_CALL", 21)


def test_rows_know_their_trajectory_and_place(walks):
    rows = gather_rows(walks(2, 3, 4), np.array([0, 2]))
    assert rows.trajectory.tolist() == [0, 0, 2, 2, 2, 2]
    assert rows.step.tolist() == [0, 1, 0, 1, 2, 3]
    assert rows.steps_left.tolist() == [2, 1, 4, 3, 2, 1]
    assert rows.states[:, 0].tolist() == [0, 1, 0, 1, 2, 3]


def test_the_scale_divides_and_leaves_out_what_never_varies(constant_member):
    member = constant_member(DeterministicModel, [0.0, 0.0], delta_scale=[2.0, 0.0, 10.0])
    scale = Scale.of(DynamicsEnsemble.from_members([member]))
    assert scale.learned.tolist() == [0, 2]
    np.testing.assert_array_equal(scale.divide(np.float32([[4, 5, 30]])), [[2.0, 3.0]])
    assert scale.divide(np.float32([[1, 1, 1]])).dtype == np.float64


def test_predictions_are_those_of_the_ensemble_whatever_the_chunks(random_ensemble, member_class, monkeypatch):
    ensemble = random_ensemble(member_class, 3)
    states = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    whole = predict_one_step(ensemble, states, states[:, :2], states + 1)
    monkeypatch.setattr("evaluation.predictions._MEMBER_ROWS_PER_CALL", 21)
    chunked = predict_one_step(ensemble, states, states[:, :2], states + 1)
    np.testing.assert_allclose(chunked.means, whole.means, rtol=1e-4, atol=1e-5)
    mean, variance = (part.detach().numpy() for part in ensemble.moments(states, states[:, :2]))
    scale = Scale.of(ensemble)
    np.testing.assert_allclose(whole.means * scale.factor, mean - states, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(chunked.variances * np.square(scale.factor), variance, rtol=1e-4)
    np.testing.assert_allclose(whole.change * scale.factor, 1.0, rtol=1e-5)
    np.testing.assert_array_equal(whole.errors, whole.means - whole.change)


def test_points_have_a_variance_of_zero(random_ensemble):
    states = np.zeros((4, 3), np.float32)
    one_step = predict_one_step(random_ensemble(DeterministicModel, 2), states, states[:, :2], states)
    np.testing.assert_array_equal(one_step.variances, np.zeros((2, 4, 3)))


# --- Likelihood and disagreement ---


def test_members_are_scored_by_the_density_of_their_kind(random_ensemble, few_at_a_time):
    random, ensemble = np.random.default_rng(0), random_ensemble(ProbabilisticModel, 3)
    change, means = random.normal(size=(20, 3)), random.normal(size=(3, 20, 3))
    variances = random.uniform(1, 2, (3, 20, 3))
    found = member_nll(ensemble, change, means, variances)
    np.testing.assert_allclose(found, -stats.norm(means, np.sqrt(variances)).logpdf(change))
    ensemble.nll = lambda truth, mean, log_variance: (truth - mean).abs() + log_variance  # some other density
    np.testing.assert_allclose(
        member_nll(ensemble, change, means, variances), np.abs(change - means) + np.log(variances)
    )


def test_disagreements_are_those_of_the_ensemble_in_both_units(random_ensemble, member_class, few_at_a_time):
    ensemble = random_ensemble(member_class, 4)
    states, actions = np.random.default_rng(0).normal(size=(2, 30, 3)).astype(np.float32) * 3
    one_step = predict_one_step(ensemble, states, actions[:, :2], states + 1)
    found = measure_uncertainty(ensemble, one_step)
    assert [of.units for of in found] == ["normalised", "raw"]
    for of, factor in zip(found, (1.0, Scale.of(ensemble).factor), strict=True):
        assert tuple(of.measures) == ensemble.disagreements
        for name, values in of.measures.items():
            expected = ensemble.disagreement(states, actions[:, :2], name, of.units == "normalised").numpy()
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        expected = np.linalg.norm((one_step.means.mean(axis=0) - one_step.change) * factor, axis=1)
        np.testing.assert_allclose(of.error, expected)


def test_disagreements_by_hand(random_ensemble):
    means = np.array([[[0.0, 0.0]], [[3.0, 4.0]], [[0.0, 4.0]]])  # three members, one row
    variances = np.array([[[1.0, 3.0]], [[4.0, 5.0]], [[1.0, 1.0]]])
    found = disagreements(random_ensemble(ProbabilisticModel, 3), means, variances)
    spread = 2.0 + 32 / 9  # variances of (0, 3, 0) and of (0, 4, 4)
    expected = {
        "max_pairwise": 5.0,
        "ensemble_std": np.sqrt(spread),
        "max_aleatoric": 3.0,
        "total_std": np.sqrt(spread + 2.0 + 3.0),
    }
    assert tuple(found) == DISAGREEMENTS
    assert {name: values.item() for name, values in found.items()} == pytest.approx(expected)


# --- The linear baseline ---


def test_linear_regression_is_exact_on_a_linear_system(linear_system, random_ensemble):
    scale = Scale.of(random_ensemble(DeterministicModel, 1))
    parts = [linear_system(rows=80, seed=seed) for seed in range(3)]
    made = [Trajectory(p.states, p.actions, p.rewards, p.next_states, False) for p in parts]
    rows = gather_rows(Dataset("linear", None, "", made), np.array([1, 2]))
    change = scale.divide(rows.next_states.astype(np.float64) - rows.states)
    for training in (parts[0], None):
        predicted = predict_linearly(rows, scale, rows.trajectory, training)
        assert np.abs(predicted - change).max() < 1e-3 * np.abs(change).max()


def test_without_training_rows_each_fold_is_predicted_from_the_others(walks, constant_ensemble):
    scale = Scale.of(constant_ensemble(DeterministicModel, [0.0]))
    slow, fast = walks(5, change=(1.0, 10.0)), walks(5, change=(3.0, 30.0))
    rows = gather_rows(Dataset("", None, "", slow.trajectories + fast.trajectories), np.arange(2))
    predicted = predict_linearly(rows, scale, rows.trajectory, training=None)
    np.testing.assert_allclose(predicted, np.repeat([[3.0, 3.0], [1.0, 1.0]], 5, axis=0))  # units of (1, 10)
    assert predict_linearly(rows, scale, np.zeros(10), training=None) is None
    training = Transitions(rows.states[:5], rows.actions[:5], rows.next_states[:5], np.zeros(5))
    np.testing.assert_allclose(predict_linearly(rows, scale, np.zeros(10), training), 1.0)
