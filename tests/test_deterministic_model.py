"""deterministic_model: a point prediction, trained on the mean squared error of the normalised change."""

import numpy as np
import pytest
import torch

from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble, NormalisedRows


def test_prediction_is_the_state_plus_the_change_in_raw_units(constant_member):
    # s + scale * output + shift: 1 + 10 * 0.5 + 3 = 9 and -4 + 0.5 * 2 - 1 = -4
    member = constant_member(DeterministicModel, [0.5, 2.0], delta_scale=[10.0, 0.5], delta_shift=[3.0, -1.0])

    next_state = member(np.array([1.0, -4.0]), np.array([0.0]))

    torch.testing.assert_close(next_state, torch.tensor([9.0, -4.0]))


def test_forward_returns_a_tensor_and_no_tuple(random_member):
    next_state = random_member(DeterministicModel)(np.zeros((5, 3)), np.zeros((5, 2)))

    assert type(next_state) is torch.Tensor
    assert next_state.shape == (5, 3) and next_state.dtype == torch.float32


def test_network_predicts_no_variance(random_member):
    mean, variance = random_member(DeterministicModel).network.predict(torch.zeros(5, 3), torch.zeros(5, 2))

    assert mean.shape == (1, 5, 3)
    assert variance is None


def test_loss_is_the_mean_squared_error_of_each_member_by_hand(constant_member):
    # Member 0 predicts (1, 2), member 1 (0, 0), of the targets (1, 0) and (3, 2): squared errors
    # 0, 4, 4, 0 with mean 2, and 1, 0, 9, 4 with mean 3.5.
    network = DynamicsEnsemble([constant_member(DeterministicModel, change) for change in ([1, 2], [0, 0])]).network
    targets = torch.tensor([[1.0, 0.0], [3.0, 2.0]]).expand(2, 2, 2)

    objective, reported = network.losses(NormalisedRows(torch.zeros(2, 2, 3), targets, None))

    assert objective.tolist() == [2.0, 3.5]
    assert reported.tolist() == [2.0, 3.5]


def test_objective_is_differentiated_and_the_reported_loss_is_not(constant_member):
    network = constant_member(DeterministicModel, [1.0, 2.0]).network.requires_grad_(True)
    targets = torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])

    objective, reported = network.losses(NormalisedRows(torch.zeros(1, 2, 3), targets, None))
    objective.sum().backward()

    # d/d mu of mean((mu - y)^2) over 4 numbers: 2/4 * sum of errors, (0 - 2, 2 + 0) by dimension
    torch.testing.assert_close(network.dynamics.biases[0].grad, torch.tensor([[[-1.0, 1.0]]]))
    assert not reported.requires_grad


def test_names_that_files_and_trackers_use():
    assert DeterministicModel.kind == "deterministic"
    assert DeterministicModel.loss_name == "mse_loss"
    assert DeterministicModel.__module__ == "deterministic_model", "pickles name it; planners have it on their path"


def test_base_class_predicts_nothing_by_itself(random_member):
    with pytest.raises(NotImplementedError):
        super(DeterministicModel, random_member(DeterministicModel)).forward(np.zeros(3), np.zeros(2))
