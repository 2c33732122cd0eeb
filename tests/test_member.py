"""dynamics_model: a member by itself, and what planners call of it.

Some tests use members that predict a constant change, so that expected numbers are worked out by hand.
"""

import numpy as np
import pytest
import torch
from torch import nn

from deterministic_model import DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble, Normalisation
from probabilistic_model import ProbabilisticModel

LEADING = [(), (1,), (7,), (1000,), (2, 3), (0,)]


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_member_takes_any_leading_axes_of_arrays_and_tensors(
    member_class, random_member, leading, as_array, draw_rows, as_tuple
):
    member = random_member(member_class)
    states, actions = draw_rows(*leading)

    predictions = as_tuple(member(as_array(states), as_array(actions)))

    assert len(predictions) == (1 if member_class is DeterministicModel else 2)
    for prediction in predictions:
        assert type(prediction) is torch.Tensor and prediction.dtype == torch.float32
        assert prediction.shape == (*leading, 3)
    flat = as_tuple(member(states.reshape(-1, 3), actions.reshape(-1, 2)))
    for prediction, row_by_row in zip(predictions, flat, strict=True):
        torch.testing.assert_close(prediction, row_by_row.view(*leading, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.float16])
def test_member_takes_arrays_of_other_types(member_class, random_member, dtype, draw_rows):
    member = random_member(member_class)
    states, actions = np.round(draw_rows(4)[0]), np.round(draw_rows(4)[1])

    expected, predicted = member.predict(states, actions), member.predict(states.astype(dtype), actions.astype(dtype))

    np.testing.assert_array_equal(predicted, expected)


def test_inputs_are_not_changed(member_class, random_member, draw_rows):
    member = random_member(member_class)
    states, actions = (torch.as_tensor(part) for part in draw_rows(4))
    kept = states.clone(), actions.clone()
    member(states, actions)
    member.predict(states, actions)
    assert torch.equal(states, kept[0]) and torch.equal(actions, kept[1])


def test_nn_is_the_module_that_planners_look_for(member_class, random_member, draw_rows, as_tuple):
    member = random_member(member_class)
    states, actions = draw_rows(5)

    assert isinstance(member.nn, nn.Module)
    assert member.nn.eval() is member.nn and not member.nn.training
    for called, forward in zip(
        as_tuple(member.nn(states, actions)), as_tuple(member.forward(states, actions)), strict=True
    ):
        assert torch.equal(called, forward)
    assert sum(parameter.numel() for parameter in member.nn.parameters()) > 100
    assert set(Normalisation.names()) <= {name.split(".")[-1] for name in member.nn.state_dict()}


def test_evaluation_mode_changes_nothing(member_class, random_member, draw_rows):
    member = random_member(member_class, layer_norm=True)
    states, actions = draw_rows(5)
    np.testing.assert_array_equal(member.train().predict(states, actions), member.eval().predict(states, actions))


def test_device_is_a_string_and_to_moves_weights_and_normalisation(member_class, random_member):
    member = random_member(member_class, reward=True)
    assert member.device == "cpu"
    assert member.to("cpu") is member

    assert member.to("meta") is member  # the one device besides the CPU that every machine has
    assert member.device == "meta"
    tensors = [*member.parameters(), *member.buffers()]
    assert len(tensors) > 10 and {tensor.device.type for tensor in tensors} == {"meta"}


def test_inputs_are_moved_to_the_device(member_class, random_member, draw_rows, as_tuple):
    member = random_member(member_class).to("meta")
    for prediction in as_tuple(member(*draw_rows(5))):
        assert prediction.device.type == "meta" and prediction.shape == (5, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_member_and_ensemble_predict_the_same_on_cuda(member_class, random_member, draw_rows):
    states, actions = draw_rows(50)
    member = random_member(member_class)
    expected = member.predict(states, actions)

    assert member.to("cuda:0").device == "cuda:0"
    np.testing.assert_allclose(member.predict(states, actions), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(member.predict_batched(states, actions, 7), expected, rtol=1e-3, atol=1e-4)
    ensemble = DynamicsEnsemble.from_members([random_member(member_class)] * 2).to("cuda:0")
    assert ensemble.device == "cuda:0"
    assert ensemble.rollout(states, np.stack([actions] * 3, axis=1), "ts1").device.type == "cuda"


def test_predict_is_the_mean_as_numpy(member_class, random_member, draw_rows, as_tuple):
    member = random_member(member_class)
    states, actions = draw_rows(2, 3)

    predicted = member.predict(states, actions)

    assert type(predicted) is np.ndarray and predicted.dtype == np.float32 and predicted.shape == (2, 3, 3)
    np.testing.assert_array_equal(predicted, as_tuple(member(states, actions))[0].detach().numpy())


@pytest.mark.parametrize("batch_size", [1, 3, 10, 256])
def test_batches_hold_every_row_whatever_their_size(member_class, random_member, batch_size, draw_rows):
    member = random_member(member_class)
    states, actions = draw_rows(10)
    truth = states + 1

    batched = member.predict_batched(states, actions, batch_size=batch_size)

    expected = member.predict(states, actions)
    assert type(batched) is np.ndarray and batched.shape == (10, 3)
    np.testing.assert_allclose(batched, expected, rtol=1e-5, atol=1e-5)
    loss = member.compute_loss_batched(states, actions, truth, batch_size=batch_size)
    assert type(loss) is float
    assert loss == pytest.approx(np.mean((expected.astype(np.float64) - truth) ** 2), rel=1e-5)


def test_loss_is_the_raw_mean_squared_error_by_hand(member_class, constant_member):
    # Predictions are s + (1, 2): errors 1 and 2 where nothing moves, 0 and 2 - 5 in the last row.
    member = constant_member(member_class, [1.0, 2.0])
    states = np.array([[0.0, 0.0], [10.0, -10.0], [3.0, 3.0]])
    truth = states + np.array([[0, 0], [0, 0], [1, 5]])

    assert member.compute_loss_batched(states, np.zeros((3, 1)), truth, batch_size=2) == pytest.approx(19 / 6)
    as_tensors = (torch.as_tensor(part) for part in (states, np.zeros((3, 1)), truth))
    assert member.compute_loss_batched(*as_tensors) == pytest.approx(19 / 6)


def test_no_rows_are_no_predictions(member_class, random_member, draw_rows):
    assert random_member(member_class).predict_batched(*draw_rows(0)).shape == (0, 3)


def test_gradients_reach_the_inputs(member_class, random_member, draw_rows, as_tuple):
    member = random_member(member_class)
    states, actions = (torch.as_tensor(part).requires_grad_() for part in draw_rows(4))

    sum(part.sum() for part in as_tuple(member(states, actions))).backward()

    assert states.grad.shape == (4, 3) and actions.grad.shape == (4, 2)
    assert (actions.grad != 0).any(dim=1).all()


def test_jacobian_agrees_with_finite_differences(member_class, random_member, draw_rows, as_tuple):
    member = random_member(member_class)
    inputs = tuple(torch.as_tensor(values) for values in draw_rows())
    step = 0.02  # wide enough for float32, central so that what it leaves out is of second order

    for part in range(len(as_tuple(member(*inputs)))):
        jacobians = torch.func.jacrev(lambda s, a, part=part: as_tuple(member(s, a))[part], argnums=(0, 1))(*inputs)
        for at, size in enumerate((3, 2)):
            assert jacobians[at].shape == (3, size)
            for column, unit in enumerate(torch.eye(size)):
                up, down = list(inputs), list(inputs)
                up[at], down[at] = inputs[at] + step * unit, inputs[at] - step * unit
                difference = (as_tuple(member(*up))[part] - as_tuple(member(*down))[part]) / (2 * step)
                torch.testing.assert_close(jacobians[at][:, column], difference, rtol=0.02, atol=2e-3)


def test_vmap_equals_a_loop_also_around_a_jacobian(member_class, random_member, draw_rows, as_tuple):
    member = random_member(member_class)
    states, actions = (torch.as_tensor(part) for part in draw_rows(4))
    jacobian = torch.func.jacrev(lambda s, a: as_tuple(member(s, a))[0])

    mapped = as_tuple(torch.func.vmap(member)(states, actions))
    jacobians = torch.func.vmap(jacobian)(states, actions)

    for row in range(4):
        for all_rows, alone in zip(mapped, as_tuple(member(states[row], actions[row])), strict=True):
            torch.testing.assert_close(all_rows[row], alone)
        torch.testing.assert_close(jacobians[row], jacobian(states[row], actions[row]))


def test_reward_in_raw_units_by_hand(member_class, unit_normalisation):
    """With weights of 1 and no hidden layer the output is the sum of normalised state, action and change."""
    scales = {"input_shift": [1.0, 0.0, 0.0], "input_scale": [2.0, 1.0, 1.0], "reward_shift": [10.0]}
    scales |= {"delta_shift": [0.5, 7.0], "delta_scale": [0.5, 0.0], "reward_scale": [3.0]}
    member = member_class(Architecture(2, 1, hidden_size=(), reward_hidden_size=()), unit_normalisation(**scales))
    with torch.no_grad():
        member.network.reward.weights[0].fill_(1.0)

    reward = member.predict_reward(np.array([[3.0, 4.0]]), np.array([[-2.0]]), np.array([[5.0, 11.0]]))

    # (3 - 1) / 2 + 4 - 2 + (5 - 3 - 0.5) / 0.5 = 6, the constant dimension being no input; 10 + 3 * 6 = 28
    assert type(reward) is np.ndarray
    assert reward.tolist() == [28.0]


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_rewards_have_the_leading_axes(member_class, random_member, leading, draw_rows):
    states, actions = draw_rows(*leading)
    assert random_member(member_class, reward=True).predict_reward(states, actions, states + 1).shape == leading


def test_reward_that_was_not_learned_is_an_error(member_class, random_member, draw_rows):
    states, actions = draw_rows(4)
    with pytest.raises(ValueError, match=r"learned no reward; train one with --params learn_reward=true"):
        random_member(member_class).predict_reward(states, actions, states)


def test_small_units_keep_their_variance(constant_member):
    """A dimension in units a million times larger has a variance 10^12 times smaller, and the same relative one."""
    member = constant_member(ProbabilisticModel, [0.0], [0.01], delta_scale=[1e-6])
    _, variance = member(np.zeros(1), np.zeros(1))
    assert variance.item() == pytest.approx(0.01 * 1e-12, rel=1e-4)
    ensemble = DynamicsEnsemble.from_members([member])
    measured = ensemble.disagreement(np.zeros((1, 1)), np.zeros((1, 1)), "max_aleatoric", normalised=True)
    assert measured.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("states", "actions"), [((4, 1), (4, 4)), ((4, 2), (4, 3)), ((4, 3), (4, 1)), ((4, 3), (2,))])
def test_arrays_of_the_wrong_width_are_refused(member_class, random_member, states, actions):
    with pytest.raises(ValueError):
        random_member(member_class).predict(np.zeros(states), np.zeros(actions))


@pytest.mark.parametrize("truth", [(3,), (1, 3), (4, 1)])
def test_loss_against_a_truth_of_another_shape_is_refused(member_class, random_member, truth):
    with pytest.raises(ValueError):
        random_member(member_class).compute_loss_batched(np.zeros((4, 3)), np.zeros((4, 2)), np.zeros(truth))


@pytest.mark.filterwarnings("error")
def test_arrays_that_cannot_be_written_to_are_taken_without_a_warning(member_class, random_member, draw_rows):
    states, actions = draw_rows(4)
    states.flags.writeable = False
    random_member(member_class).predict(states, actions)
