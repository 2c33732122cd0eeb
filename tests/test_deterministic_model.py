"""deterministic_model: a point prediction, trained on squared error of the normalised change or on Huber's loss."""

import numpy as np
import pytest
import torch

from deterministic_model import DeterministicEnsemble, DeterministicModel, point_error
from dynamics_model import DynamicsEnsemble


def test_prediction_is_the_state_plus_the_change_in_raw_units(constant_member):
    # s + scale * output + shift: 1 + 10 * 0.5 + 3 = 9 and -4 + 0.5 * 2 - 1 = -4
    member = constant_member(DeterministicModel, [0.5, 2.0], delta_scale=[10.0, 0.5], delta_shift=[3.0, -1.0])

    next_state = member(np.array([1.0, -4.0]), np.array([0.0]))

    torch.testing.assert_close(next_state, torch.tensor([9.0, -4.0]))


def test_forward_returns_a_tensor_and_no_tuple(random_member):
    next_state = random_member(DeterministicModel)(np.zeros((5, 3)), np.zeros((5, 2)))

    assert type(next_state) is torch.Tensor
    assert next_state.shape == (5, 3) and next_state.dtype == torch.float32


def test_ensemble_predicts_no_variance(random_member):
    mean, variance = random_member(DeterministicModel).network.predict(torch.zeros(5, 3), torch.zeros(5, 2))

    assert mean.shape == (1, 5, 3)
    assert variance is None


def test_loss_is_the_mean_squared_error_of_each_member_by_hand(constant_member):
    # Member 0 predicts (1, 2), member 1 (0, 0), of the targets (1, 0) and (3, 2): squared errors
    # 0, 4, 4, 0 with mean 2, and 1, 0, 9, 4 with mean 3.5.
    ensemble = DynamicsEnsemble.from_members([constant_member(DeterministicModel, each) for each in ([1, 2], [0, 0])])
    targets = torch.tensor([[1.0, 0.0], [3.0, 2.0]]).expand(2, 2, 2)

    objective, reported = ensemble.losses(torch.zeros(2, 2, 3), targets)

    assert objective.tolist() == [2.0, 3.5]
    assert reported.tolist() == [2.0, 3.5]


def test_objective_is_differentiated_and_the_reported_loss_is_not(constant_member):
    ensemble = constant_member(DeterministicModel, [1.0, 2.0]).network.requires_grad_(True)
    targets = torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])

    objective, reported = ensemble.losses(torch.zeros(1, 2, 3), targets)
    objective.sum().backward()

    # d/d mu of mean((mu - y)^2) over 4 numbers: 2/4 * sum of errors, (0 - 2, 2 + 0) by dimension
    torch.testing.assert_close(ensemble.dynamics.biases[0].grad, torch.tensor([[[-1.0, 1.0]]]))
    assert not reported.requires_grad


def test_loss_is_the_same_all_through_training(constant_member):
    ensemble = constant_member(DeterministicModel, [1.0, 2.0]).network
    rows = torch.zeros(1, 2, 3), torch.ones(1, 2, 2)
    assert ensemble.losses(*rows, 0.0)[0].item() == ensemble.losses(*rows, 0.9)[0].item() == 0.5


def test_hubers_loss_is_squared_error_within_its_width_and_grows_in_proportion_beyond():
    errors = torch.tensor([0.0, 0.3, -0.5, 1.5, -4.0], requires_grad=True)

    loss = point_error(errors, torch.zeros(5), huber_width=0.5)
    loss.sum().backward()

    # Within: e^2 with slope 2e. Beyond: 2 * 0.5 * |e| - 0.25 with slope 1.
    assert loss.tolist() == pytest.approx([0, 0.09, 0.25, 1.25, 3.75])
    assert errors.grad.tolist() == pytest.approx([0, 0.6, -1, 1, -1])
    assert point_error(errors, torch.zeros(5), None).tolist() == pytest.approx([0, 0.09, 0.25, 2.25, 16])


def test_objective_is_hubers_loss_and_what_is_reported_is_squared_error(constant_member):
    # Errors of (0, 2) and (-2, 0): squared 4, 4; Huber's loss of width 0.5 is 2 * 0.5 * 2 - 0.25 = 1.75, twice.
    ensemble = constant_member(DeterministicModel, [1.0, 2.0]).network
    objective, reported = ensemble.losses(
        torch.zeros(1, 2, 3), torch.tensor([[[1.0, 0.0], [3.0, 2.0]]]), huber_width=0.5
    )

    assert objective.item() == pytest.approx(2 * 1.75 / 4)
    assert reported.item() == 2.0 and not reported.requires_grad


# --- What stands for a distribution ---


def test_scores_are_squared_errors_alone(constant_member):
    terms = constant_member(DeterministicModel, [0.0]).network.score_terms(
        torch.tensor([1.0, 4.0]), torch.ones(2), None
    )
    assert {name: term.tolist() for name, term in terms.items()} == {"mse": [0, 9]}


def test_a_point_is_its_own_draw(constant_member):
    ensemble, generator = constant_member(DeterministicModel, [0.0, 1.0]).network, torch.Generator().manual_seed(0)
    mean = torch.tensor([[1.0, 2.0]])

    assert torch.equal(ensemble.draw(mean, torch.full((1, 2), 4.0), generator), mean)
    assert ensemble.draws_per_member(1000) == 1, "more draws would be the same one again"


def test_residuals_complete_a_point_to_a_distribution(constant_member):
    residuals = np.array([[0.5, 2.0]])
    assert constant_member(DeterministicModel, [0.0, 1.0]).network.completion(lambda: residuals) is residuals


def test_no_variance_is_at_any_bound(constant_member):
    assert constant_member(DeterministicModel, [0.0, 1.0]).network.share_at_bounds(torch.zeros(1, 5, 2)) == {}


# --- The kind ---


def test_names_that_files_and_trackers_use():
    assert DeterministicEnsemble.kind == "deterministic"
    assert DeterministicEnsemble.loss_name == "mse_loss"
    assert DeterministicModel.__module__ == "deterministic_model", "pickles name it; planners have it on their path"


def test_base_classes_predict_and_learn_nothing_by_themselves(random_member):
    member = random_member(DeterministicModel)
    with pytest.raises(NotImplementedError):
        super(DeterministicModel, member).forward(np.zeros(3), np.zeros(2))
    with pytest.raises(NotImplementedError):
        super(DeterministicEnsemble, member.network).interpret(torch.zeros(1, 5, 3))
    with pytest.raises(NotImplementedError):
        super(DeterministicEnsemble, member.network).losses(torch.zeros(1, 5, 5), torch.zeros(1, 5, 3))
