"""scores: means over all rows in normalised units, the rows of metrics.csv, final scores and elites."""

import math

import numpy as np
import pytest
import torch

from config import LearnConfig
from data.trajectories import Transitions
from deterministic_model import DeterministicModel
from dynamics_model import VARIANCE_FLOOR, Architecture, DynamicsEnsemble
from probabilistic_model import ProbabilisticModel
from training.batches import NormalisedRows, normalise_rows
from training.build import build_ensemble
from training.scores import (
    STRAY,
    Epoch,
    failed_members,
    mean_scores,
    metric_columns,
    metric_rows,
    rank_elites,
    score_members,
    score_rows,
    stray_members,
)

LOG_2_PI = math.log(2 * math.pi)

# --- Scores of rows ---


def ten_rows():
    """Targets 0 to 9 in both of two dimensions."""
    targets = torch.arange(10.0).repeat(2, 1).T
    return NormalisedRows(torch.zeros(10, 3), targets, None)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 10, 4096])
def test_score_is_the_mean_over_all_rows_also_of_a_last_partial_chunk(monkeypatch, constant_member, rows_per_chunk):
    monkeypatch.setattr("training.scores._ROWS_PER_CALL", rows_per_chunk)
    ensemble = DynamicsEnsemble.from_members(
        [constant_member(DeterministicModel, change) for change in ([0, 0], [9, 1])]
    )

    score = score_rows(ensemble, ten_rows())

    # Squares of 0 to 9 sum to 285: 28.5 on average. Of distances to 1: 1 + (0 + 1 + ... + 64) = 205, 20.5 on average.
    assert score == {"mse": pytest.approx([28.5, (28.5 + 20.5) / 2])}


@pytest.mark.parametrize("rows_per_chunk", [4, 4096])
def test_nll_is_that_of_the_normal_distribution_in_nats(monkeypatch, constant_member, rows_per_chunk):
    monkeypatch.setattr("training.scores._ROWS_PER_CALL", rows_per_chunk)
    members = [([0.0, 3.0], [1.0, 4.0]), ([5.0, 5.0], [0.25, 9.0])]
    ensemble = DynamicsEnsemble.from_members([constant_member(ProbabilisticModel, *member) for member in members])

    score = score_rows(ensemble, ten_rows())

    for member, (mean, variance) in enumerate(members):
        density = torch.distributions.Normal(torch.tensor(mean), torch.tensor(variance).sqrt())
        assert score["nll"][member] == pytest.approx(-density.log_prob(ten_rows().targets).mean().item(), rel=1e-5)
    # By hand for member 0, dimension 0: 28.5 / 2 + log(2 pi) / 2; dimension 1: errors -3 to 6, squares sum to 105.
    by_hand = (28.5 / 2 + (10.5 / 4 + np.log(4)) / 2 + LOG_2_PI) / 2
    assert score["nll"][0] == pytest.approx(by_hand, rel=1e-5)
    assert score["mse"] == pytest.approx([(28.5 + 10.5) / 2, (8.5 + 8.5) / 2])


def test_deterministic_members_have_no_nll_and_no_reward_error(constant_member):
    assert set(score_rows(constant_member(DeterministicModel, [0, 0]).network, ten_rows())) == {"mse"}


@pytest.mark.parametrize("rows_per_chunk", [4, 4096])
def test_reward_error_is_a_mean_over_all_rows(monkeypatch, unit_normalisation, rows_per_chunk):
    monkeypatch.setattr("training.scores._ROWS_PER_CALL", rows_per_chunk)
    architecture = Architecture(2, 1, hidden_size=(), reward_hidden_size=())
    ensemble = DeterministicModel(architecture, unit_normalisation()).network  # all weights 0: predicts 0
    rows = ten_rows()._replace(rewards=torch.arange(10.0).view(10, 1))

    assert score_rows(ensemble, rows)["reward_mse"] == pytest.approx([28.5])


# --- Constant dimensions ---


@pytest.fixture
def with_constant_dimensions(linear_system):
    """A linear system with three dimensions around it: one that never moves, one that always adds 0.5, one clock."""
    plain = linear_system(300)
    rows = len(plain)
    extra = np.column_stack([np.full(rows, 0.3), np.linspace(-4, 4, rows), np.arange(rows)]).astype(np.float32)
    states = np.insert(plain.states, [0, 1, 3], extra, axis=1)
    moved = extra + np.float32([0, 0, 1])
    moved[:, 1] = np.float32(0.5) + np.round(extra[:, 1] * 64) / 64
    states[:, 2] = np.round(extra[:, 1] * 64) / 64  # multiples of 1/64: adding 0.5 is exact
    return Transitions(states, plain.actions, np.insert(plain.next_states, [0, 1, 3], moved, axis=1), plain.rewards)


CONSTANT, LEARNED = [0, 2, 5], [1, 3, 4]


def test_constant_changes_are_predicted_exactly_with_a_small_positive_variance(
    member_class, with_constant_dimensions, train
):
    transitions = with_constant_dimensions
    settings = {"ensemble_size": 2, "hidden_size": (8,), "fit_epochs": 2, "batch_size": 64}

    ensemble, _ = train(LearnConfig(kind=member_class.ensemble_class.kind, **settings), transitions, transitions)

    assert ensemble.learned.tolist() == LEARNED

    mean, variance = ensemble.predict(transitions.states, transitions.actions)

    for member in mean.detach().numpy():
        np.testing.assert_array_equal(member[:, CONSTANT], transitions.next_states[:, CONSTANT])
    assert (variance is None) == (member_class is DeterministicModel)
    if variance is not None:
        assert (variance[..., CONSTANT] == VARIANCE_FLOOR).all() and VARIANCE_FLOOR > 0
        assert (variance[..., LEARNED] > 1e-8).all()


def test_constant_changes_are_left_out_of_scores(member_class, with_constant_dimensions):
    transitions = with_constant_dimensions
    ensemble = build_ensemble(LearnConfig(kind=member_class.ensemble_class.kind, hidden_size=(8,)), transitions)

    mean, _ = ensemble.predict(transitions.states, transitions.actions)
    delta = transitions.next_states.astype(np.float64) - transitions.states
    scale = np.abs(delta - delta.mean(axis=0)).mean(axis=0)
    error = (mean.detach().double().numpy() - transitions.next_states)[..., LEARNED] / scale[LEARNED]

    score = score_rows(ensemble, normalise_rows(ensemble, transitions))
    np.testing.assert_allclose(score["mse"], (error**2).mean(axis=(1, 2)), rtol=1e-4)


# --- The rows of metrics.csv ---


@pytest.fixture
def two_members(random_member):
    """Returns a function that builds an ensemble of two members."""
    return lambda kind, **options: DynamicsEnsemble.from_members([random_member(kind, m, **options) for m in range(2)])


PUBLISHED = ["lr", "train_mse", "val_mse", "nll"]


def test_columns_are_the_published_ones_and_those_of_the_reward(two_members):
    point, gaussian = two_members(DeterministicModel), two_members(ProbabilisticModel)

    assert metric_columns(point) == ["step", "model_id", "mse_loss", *PUBLISHED]
    assert metric_columns(gaussian) == ["step", "model_id", "gauss_loss", *PUBLISHED]
    of_reward = metric_columns(two_members(ProbabilisticModel, reward=True))
    assert of_reward == ["step", "model_id", "gauss_loss", *PUBLISHED, "reward_train_mse", "reward_val_mse"]


def test_rows_are_one_per_member_with_the_rate_of_the_epochs_first_step(two_members):
    config = LearnConfig(scheduler="exponential", scheduler_gamma=0.5, fit_lr=0.4)
    train, holdout = {"mse": [0.1, 0.2]}, {"mse": [0.3, 0.4], "nll": [-1.0, -2.0]}

    rows = metric_rows(
        two_members(ProbabilisticModel), config, Epoch(2, [5.0, 6.0], train, holdout, (False,) * 2, dict)
    )

    first = {"step": 2, "model_id": 0, "gauss_loss": 5.0, "lr": 0.1, "train_mse": 0.1, "val_mse": 0.3, "nll": -1.0}
    second = first | {"model_id": 1, "gauss_loss": 6.0, "train_mse": 0.2, "val_mse": 0.4, "nll": -2.0}
    assert rows == [pytest.approx(first), pytest.approx(second)]
    assert list(rows[0]) == metric_columns(two_members(ProbabilisticModel))


def test_what_was_not_measured_is_none_and_never_a_missing_row(two_members):
    ensemble = two_members(DeterministicModel, reward=True)

    rows = metric_rows(ensemble, LearnConfig(), Epoch(0, [5.0, 6.0], {}, {}, (False,) * 2, dict))

    assert [row["mse_loss"] for row in rows] == [5.0, 6.0]
    missing = ("train_mse", "val_mse", "nll", "reward_train_mse", "reward_val_mse")
    assert [{name: row[name] for name in missing} for row in rows] == [dict.fromkeys(missing)] * 2


def test_errors_of_the_reward_have_columns_of_their_own(two_members):
    train, holdout = {"mse": [1.0, 2.0], "reward_mse": [3.0, 4.0]}, {"mse": [5.0, 6.0], "reward_mse": [7.0, 8.0]}

    rows = metric_rows(
        two_members(DeterministicModel, reward=True),
        LearnConfig(),
        Epoch(0, [0.0, 0.0], train, holdout, (False,) * 2, dict),
    )

    found = [[row[name] for name in ("train_mse", "val_mse", "reward_train_mse", "reward_val_mse")] for row in rows]
    assert found == [[1, 5, 3, 7], [2, 6, 4, 8]]


# --- Final scores ---


def test_final_scores_are_those_of_the_weights_as_they_are(constant_member):
    ensemble = DynamicsEnsemble.from_members([constant_member(ProbabilisticModel, [change] * 2) for change in (0, 1)])
    train, holdout = ten_rows(), NormalisedRows(torch.zeros(2, 3), torch.full((2, 2), 3.0), None)

    scores = score_members(ensemble, train, holdout)

    assert [score["train_mse"] for score in scores] == pytest.approx([28.5, 20.5])
    assert [score["val_mse"] for score in scores] == pytest.approx([9, 4])
    assert [score["nll"] for score in scores] == pytest.approx([(9 + LOG_2_PI) / 2, (4 + LOG_2_PI) / 2], rel=1e-5)
    means = {"train_mse": 24.5, "val_mse": 6.5, "nll": (6.5 + LOG_2_PI) / 2}
    assert mean_scores(scores) == pytest.approx(means, rel=1e-5)


def test_scores_that_do_not_exist_are_none_and_have_no_mean(constant_member):
    ensemble = constant_member(DeterministicModel, [0, 0]).network

    scores = score_members(ensemble, ten_rows(), None)

    assert scores == [{"train_mse": pytest.approx(28.5), "val_mse": None, "nll": None}]
    assert mean_scores(scores) == {"train_mse": pytest.approx(28.5)}
    assert score_members(ensemble, ten_rows(), ten_rows())[0]["nll"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_member_whose_error_is_not_finite_has_failed_and_has_no_scores(constant_member, value):
    ensemble = DynamicsEnsemble.from_members([constant_member(DeterministicModel, [v, 0.0]) for v in (0.0, value)])
    scores = score_members(ensemble, ten_rows(), None)
    assert scores[1] == {"train_mse": None, "val_mse": None, "nll": None}
    assert mean_scores(scores) == {"train_mse": scores[0]["train_mse"]}
    assert failed_members(scores) == [1]
    assert ensemble.elites == rank_elites(scores, None) == [0]


def test_member_that_failed_in_training_has_no_scores_whatever_its_weights(constant_member):
    ensemble = DynamicsEnsemble.from_members([constant_member(DeterministicModel, [v, 0.0]) for v in (0.0, 0.5)])
    ensemble.elites = [1]
    assert [score["val_mse"] is None for score in score_members(ensemble, ten_rows(), ten_rows())] == [True, False]


def test_rewards_whose_errors_are_not_finite_in_all_members_are_an_error(unit_normalisation):
    architecture = Architecture(2, 1, hidden_size=(), reward_hidden_size=())
    ensemble = DeterministicModel(architecture, unit_normalisation()).network
    with torch.no_grad():
        ensemble.reward.biases[0].fill_(math.nan)
    rows = ten_rows()._replace(rewards=torch.zeros(10, 1))
    with pytest.raises(FloatingPointError, match="every member diverged: no error is a finite number; lower fit_lr"):
        score_members(ensemble, rows, None)


def test_stray_members_are_those_far_above_the_median():
    def scores(*errors):
        return [{"train_mse": error, "val_mse": error} for error in errors]

    assert stray_members(scores(1.0, 2.0, 3.0, 2.0 * STRAY)) == {}
    assert stray_members(scores(1.0, 2.0, 2.0, 20.0)) == {3: 10.0}
    assert stray_members(scores(1.0, None, 2.0, 2.0, 20.0)) == {4: 10.0}, "failed members do not count"
    assert stray_members([{"train_mse": error, "val_mse": None} for error in (1.0, 1.0, 9.0)]) == {2: 9.0}
    assert stray_members(scores(0.0, 0.0, 1.0)) == {}, "of nothing, nothing is several times as much"


def test_elites_are_the_members_with_the_lowest_validation_error():
    scores = [{"val_mse": value} for value in (0.3, 0.1, 0.2)]
    assert rank_elites(scores, None) == [1, 2, 0]
    assert rank_elites(scores, 2) == [1, 2]
    assert rank_elites([{"train_mse": 1.0, "val_mse": None}] * 3, 2) == [0, 1, 2], (
        "without a holdout every member is one"
    )
