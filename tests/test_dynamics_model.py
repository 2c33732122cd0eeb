"""dynamics_model: random streams, what planners call of a member, and of an ensemble.

Many tests use members that predict a constant change, so that a value tells which member made it.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn

import dynamics_model
from deterministic_model import DeterministicModel
from dynamics_model import KINDS, Architecture, DynamicsEnsemble, Normalisation, random_stream
from probabilistic_model import ProbabilisticModel

# --- Random streams ---


def test_streams_differ_by_seed_member_purpose_and_epoch():
    keys = [
        (seed, member, purpose, epoch)
        for seed in (0, 1, 2**32 - 1)
        for member in (0, 1, 2)
        for purpose in ("initialisation", "order", "bootstrap", "sampling", "propagation")
        for epoch in (0, 1, 2)
    ]
    draws = {torch.rand(2, generator=random_stream(*key)).numpy().tobytes() for key in keys}
    assert len(draws) == len(keys) == 135


def test_stream_is_the_same_whatever_the_global_generators_do():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
    first = torch.rand(5, generator=random_stream(3, 1, "order", 2))
    torch.rand(10)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    before = torch.get_rng_state()

    assert torch.equal(torch.rand(5, generator=random_stream(3, 1, "order", 2)), first)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not drawn from"


def test_unknown_purpose_is_an_error():
    with pytest.raises(ValueError):
        random_stream(0, 0, "bootstrapping")


# --- The list of kinds ---


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_a_kind_know_their_name_and_their_module(kind):
    found = dynamics_model.member_class(kind)

    assert (found.__module__, found.__name__) == KINDS[kind], "pickles name it so"
    assert found.ensemble_class.kind == kind
    assert set(found.ensemble_class.disagreements) <= set(dynamics_model.DISAGREEMENTS)


# --- A member: what planners call ---

LEADING = [(), (1,), (7,), (1000,), (2, 3), (0,)]


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_member_takes_any_leading_axes_of_arrays_and_tensors(
    member_class, random_member, leading, as_array, draw_rows, as_tuple
):
    member = random_member(member_class)
    states, actions = draw_rows(*leading)

    predictions = as_tuple(member(as_array(states), as_array(actions)))

    assert len(predictions) == (2 if member_class is ProbabilisticModel else 1)
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


# --- The ensemble ---


@pytest.fixture
def ensemble_of(random_member):
    """Returns a function that builds an ensemble of untrained members; also the members."""

    def build(kind, size=3, seed=0, **options):
        members = [random_member(kind, member, **options) for member in range(size)]
        return DynamicsEnsemble.from_members(members, seed), members

    return build


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_ensemble_predicts_what_its_members_predict(member_class, ensemble_of, leading, draw_rows, as_tuple):
    ensemble, members = ensemble_of(member_class, layer_norm=True)
    states, actions = draw_rows(*leading)

    mean, variance = ensemble.predict(states, actions)

    assert len(ensemble) == 3 and mean.shape == (3, *leading, 3)
    for index, member in enumerate(members):
        expected = as_tuple(member(states, actions))
        torch.testing.assert_close(mean[index], expected[0], rtol=1e-5, atol=1e-5)
        if member_class is ProbabilisticModel:
            torch.testing.assert_close(variance[index], expected[1], rtol=1e-4, atol=1e-8)
    assert (variance is None) == (member_class is DeterministicModel)


def test_each_member_predicts_its_own_rows(member_class, ensemble_of, draw_rows, as_tuple):
    ensemble, members = ensemble_of(member_class)
    states, actions = draw_rows(3, 5)

    mean, variance = ensemble.predict_each(states, actions)

    assert mean.shape == (3, 5, 3) and (variance is None or variance.shape == (3, 5, 3))
    for index, member in enumerate(members):
        expected = as_tuple(member(states[index], actions[index]))[0]
        torch.testing.assert_close(mean[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_moments_are_the_prediction_with_a_variance_of_zero_for_points(member_class, ensemble_of, draw_rows, leading):
    ensemble, _ = ensemble_of(member_class)
    rows = draw_rows(*leading)

    mean, variance = ensemble.moments(*rows)

    predicted, its_variance = ensemble.predict(*rows)
    assert torch.equal(mean, predicted)
    assert torch.equal(variance, torch.zeros_like(mean) if its_variance is None else its_variance)


@pytest.mark.parametrize(
    "members",
    [[0, 1, 2], [2, 2, 2, 2], [1, 0, 2, 1, 1, 0, 1], [[2, 0], [0, 0], [1, 2]], [0] * 500 + [2], []],
    ids=lambda members: f"{len(members)} rows",
)
def test_each_row_is_predicted_by_the_member_named_for_it(member_class, ensemble_of, draw_rows, members):
    ensemble, _ = ensemble_of(member_class)
    members = torch.tensor(members, dtype=torch.long)
    states, actions = draw_rows(*members.shape)

    mean, variance = ensemble.predict_members(states, actions, members)

    assert mean.shape == variance.shape == states.shape
    everyone = ensemble.moments(states, actions)  # each (ensemble, ..., state_dim)
    for found, of_all in zip((mean, variance), everyone, strict=True):
        expected = of_all.gather(0, members[None, ..., None].expand(1, *states.shape))[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("particles", "size"), [(6, 3), (7, 3), (2, 5), (1, 1), (20, 7)])
def test_particles_are_dealt_evenly_at_every_start_and_at_random(counting_ensemble, particles, size):
    ensemble, generator = counting_ensemble(size), torch.Generator().manual_seed(0)

    dealt = ensemble.deal_members(particles, 200, generator)

    assert dealt.shape == (particles, 200)
    counts = torch.nn.functional.one_hot(dealt, size).sum(dim=0)  # (starts, members)
    assert (counts.sum(dim=1) == particles).all()
    assert (counts.amax(dim=1) - counts.amin(dim=1) <= 1).all()
    for particle in dealt:  # one that never met a member by chance: 7 * (6/7)^200 = 3e-13
        assert len(set(particle.tolist())) == min(particles, size)
    if size > 1:
        assert not torch.equal(dealt, ensemble.deal_members(particles, 200, generator))
    assert torch.equal(dealt, ensemble.deal_members(particles, 200, torch.Generator().manual_seed(0)))


def test_ensemble_gives_back_the_members_it_was_built_from(member_class, ensemble_of, assert_same_weights):
    ensemble, members = ensemble_of(member_class, reward=True, layer_norm=True)
    returned = ensemble.members()

    assert [type(member) for member in returned] == [member_class] * 3
    for built_from, given_back in zip(members, returned, strict=True):
        assert_same_weights(built_from, given_back)


def test_members_and_ensemble_share_no_weights(member_class, ensemble_of, draw_rows):
    ensemble, members = ensemble_of(member_class)
    states, actions = draw_rows(4)
    before = ensemble.predict(states, actions)[0].detach().clone()
    for member in (*members, *ensemble.members()):
        for tensor in member.state_dict().values():
            tensor.fill_(3.0)

    assert torch.equal(ensemble.predict(states, actions)[0], before)


def test_sizes_are_read_from_the_ensemble(member_class, ensemble_of):
    ensemble, _ = ensemble_of(member_class)
    assert (len(ensemble), ensemble.state_dim, ensemble.action_dim, ensemble.device) == (3, 3, 2, "cpu")
    assert type(ensemble) is member_class.ensemble_class and ensemble.kind == member_class.ensemble_class.kind


def test_ensemble_needs_a_member():
    with pytest.raises(ValueError, match="at least one member, got none"):
        DynamicsEnsemble.from_members([])


def test_members_of_two_kinds_are_not_stacked(random_member):
    members = [random_member(DeterministicModel), random_member(DeterministicModel), random_member(ProbabilisticModel)]
    with pytest.raises(ValueError, match="member 2 differs from member 0 in kind or architecture"):
        DynamicsEnsemble.from_members(members)


@pytest.mark.parametrize("options", [{"hidden_size": (8, 7)}, {"activation_fn": "relu"}, {"layer_norm": True}])
def test_members_of_two_architectures_are_not_stacked(member_class, random_member, options):
    with pytest.raises(ValueError, match="member 1 differs from member 0 in kind or architecture"):
        DynamicsEnsemble.from_members([random_member(member_class), random_member(member_class, **options)])


@pytest.mark.parametrize("name", ["input_shift", "input_scale", "delta_shift", "delta_scale", "reward_scale"])
def test_members_of_two_normalisations_are_not_stacked(member_class, constant_member, name):
    other = constant_member(member_class, [0.0, 0.0])
    getattr(other.network, name).mul_(2).add_(1)
    with pytest.raises(ValueError, match="member 1 was normalised differently from member 0"):
        DynamicsEnsemble.from_members([constant_member(member_class, [0.0, 0.0]), other])


def test_sample_of_point_predictions_is_the_prediction(ensemble_of, draw_rows):
    ensemble, _ = ensemble_of(DeterministicModel)
    states, actions = draw_rows(2, 4)
    assert torch.equal(ensemble.sample(states, actions), ensemble.predict(states, actions)[0])


def test_samples_are_repeated_by_the_seed_and_differ_from_each_other(ensemble_of, draw_rows):
    rows = draw_rows(6)
    (first, _), (again, _), (other, _) = (ensemble_of(ProbabilisticModel, seed=seed) for seed in (0, 0, 1))

    draws = [first.sample(*rows), first.sample(*rows)]

    assert draws[0].shape == (3, 6, 3)
    assert torch.equal(draws[0], again.sample(*rows)) and torch.equal(draws[1], again.sample(*rows))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other.sample(*rows))


def test_a_members_noise_does_not_depend_on_how_many_there_are(constant_member):
    members = [constant_member(ProbabilisticModel, [0.0, 0.0])] * 3
    rows = np.zeros((5, 2)), np.zeros((5, 1))

    three, one = (
        DynamicsEnsemble.from_members(members).sample(*rows),
        DynamicsEnsemble.from_members(members[:1]).sample(*rows),
    )

    assert torch.equal(three[:1], one)
    assert not torch.equal(three[0], three[1]), "equal members draw noise of their own"


# --- Disagreement ---

# Three members that add (0, 0), (3, 4) and (6, 8): distances 5, 5 and 10; per dimension the variances (ddof 0) are
# (9 + 0 + 9) / 3 = 6 and (16 + 0 + 16) / 3 = 32/3, which sum to 50/3. Their own variances sum to 5, 25 and
# 20.25; the largest of each dimension, 9 and 20, are not one member's.
CHANGES = ([0.0, 0.0], [3.0, 4.0], [6.0, 8.0])
VARIANCES = ([1.0, 4.0], [9.0, 16.0], [0.25, 20.0])
DISAGREEMENTS = {
    "max_pairwise": 10.0,
    "ensemble_std": (50 / 3) ** 0.5,
    "max_aleatoric": 25.0**0.5,
    "total_std": (50 / 3 + 50.25 / 3) ** 0.5,
}


@pytest.fixture
def known_ensemble(constant_member):
    def build(kind, **scales):
        pairs = zip(CHANGES, VARIANCES, strict=True)
        return DynamicsEnsemble.from_members(
            [constant_member(kind, change, variance, **scales) for change, variance in pairs]
        )

    return build


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_disagreement_by_hand(known_ensemble, kind, leading):
    states = np.random.default_rng(0).normal(size=(*leading, 2))

    measured = known_ensemble(ProbabilisticModel).disagreement(states, np.zeros((*leading, 1)), kind)

    assert measured.shape == leading
    torch.testing.assert_close(measured, torch.full(leading, DISAGREEMENTS[kind]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["max_pairwise", "ensemble_std", "total_std"])
def test_disagreement_of_point_predictions_by_hand(known_ensemble, kind):
    measured = known_ensemble(DeterministicModel).disagreement(np.zeros((4, 2)), np.zeros((4, 1)), kind)
    expected = DISAGREEMENTS["ensemble_std" if kind == "total_std" else kind]  # no variance of their own to add
    torch.testing.assert_close(measured, torch.full((4,), expected))


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_disagreement_is_in_raw_units_unless_normalised(known_ensemble, kind):
    """The numbers above are normalised ones; in raw units dimensions count 10 and 0.5 times as much."""
    ensemble = known_ensemble(ProbabilisticModel, delta_scale=[10.0, 0.5], delta_shift=[5.0, -5.0])
    rows = np.zeros((1, 2)), np.zeros((1, 1))
    raw = {
        "max_pairwise": (60**2 + 4**2) ** 0.5,
        "ensemble_std": (100 * 6 + 0.25 * 32 / 3) ** 0.5,
        "max_aleatoric": (100 * 9 + 0.25 * 16) ** 0.5,
        "total_std": (100 * (6 + 10.25 / 3) + 0.25 * (32 + 40) / 3) ** 0.5,
    }

    assert ensemble.disagreement(*rows, kind).item() == pytest.approx(raw[kind], rel=1e-5)
    assert ensemble.disagreement(*rows, kind, normalised=True).item() == pytest.approx(DISAGREEMENTS[kind], rel=1e-5)


@pytest.mark.parametrize("kind", DISAGREEMENTS)
@pytest.mark.parametrize("normalised", [False, True])
def test_constant_dimensions_do_not_disagree(known_ensemble, kind, normalised):
    ensemble = known_ensemble(ProbabilisticModel, delta_scale=[1.0, 0.0, 1.0])  # three dimensions, two outputs
    rows = np.zeros((1, 3)), np.zeros((1, 1))
    assert ensemble.disagreement(*rows, kind, normalised).item() == pytest.approx(DISAGREEMENTS[kind], rel=1e-5)


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_disagreement_of_moments_that_are_known_already(known_ensemble, kind):
    ensemble = known_ensemble(ProbabilisticModel, delta_scale=[10.0, 0.5])
    rows = np.ones((4, 2)), np.zeros((4, 1))

    assert torch.equal(
        ensemble.disagreement_of(*ensemble.moments(*rows), kind).detach(), ensemble.disagreement(*rows, kind)
    )


def test_one_member_agrees_with_itself(constant_member):
    ensemble = DynamicsEnsemble.from_members([constant_member(DeterministicModel, [3.0, 4.0])])
    for kind in ("max_pairwise", "ensemble_std"):
        assert ensemble.disagreement(np.zeros((2, 2)), np.zeros((2, 1)), kind).tolist() == [0.0, 0.0]


def test_aleatoric_disagreement_needs_probabilistic_members(known_ensemble):
    with pytest.raises(ValueError, match="max_aleatoric needs probabilistic members; use max_pairwise or ensemble_std"):
        known_ensemble(DeterministicModel).disagreement(np.zeros((1, 2)), np.zeros((1, 1)), "max_aleatoric")


def test_unknown_disagreement_names_the_known_ones(known_ensemble):
    expected = "'variance' is unknown; use max_pairwise, ensemble_std, max_aleatoric or total_std"
    with pytest.raises(ValueError, match=expected):
        known_ensemble(DeterministicModel).disagreement(np.zeros((1, 2)), np.zeros((1, 1)), "variance")


# --- Rollouts ---


@pytest.fixture
def counting_ensemble(constant_member):
    """Member m adds m + 1 to the first dimension and nothing to the second: increments tell who made a step."""

    def build(size=3, seed=0):
        members = [constant_member(DeterministicModel, [member + 1.0, 0.0]) for member in range(size)]
        return DynamicsEnsemble.from_members(members, seed)

    return build


def roll(ensemble, batch, horizon, propagation, start=0.0):
    """Returns who made each step of each row: ``(..., batch, horizon)``, members counted from 1."""
    states, actions = np.full((batch, 2), start), np.zeros((batch, horizon, 1))
    trajectories = ensemble.rollout(states, actions, propagation)
    assert trajectories.shape[-3:] == (batch, horizon + 1, 2)
    assert (trajectories[..., 0, :] == start).all() and (trajectories[..., 1] == start).all()
    return trajectories[..., 0].diff(dim=-1)


@pytest.mark.parametrize("horizon", [1, 20])
def test_tsinf_keeps_one_member_for_each_row_and_deals_them_evenly(counting_ensemble, horizon):
    made_by = roll(counting_ensemble(), 6, horizon, "tsinf")

    assert (made_by == made_by[:, :1]).all()
    assert sorted(made_by[:, 0].tolist()) == [1, 1, 2, 2, 3, 3]


def test_ts1_deals_members_anew_and_evenly_at_each_step(counting_ensemble):
    made_by = roll(counting_ensemble(), 6, 20, "ts1")

    for step in made_by.T:
        assert sorted(step.tolist()) == [1, 1, 2, 2, 3, 3]
    assert all(len(set(row.tolist())) > 1 for row in made_by), "a row that kept its member by chance: 3 in 10^9"


def test_tsinf_is_what_a_rollout_does_by_default(counting_ensemble):
    rows = np.zeros((6, 2)), np.zeros((6, 4, 1))
    assert torch.equal(counting_ensemble().rollout(*rows), counting_ensemble().rollout(*rows, "tsinf"))


def test_mean_feeds_the_mean_over_members_back(counting_ensemble):
    assert (roll(counting_ensemble(), 4, 5, "mean") == 2.0).all()


def test_member_rolls_every_member_out_on_its_own(counting_ensemble):
    made_by = roll(counting_ensemble(), 4, 5, "member")
    assert made_by.shape == (3, 4, 5)
    for member in range(3):
        assert (made_by[member] == member + 1).all()


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "member"])
def test_rows_start_where_they_are_told_and_keep_their_order(counting_ensemble, propagation):
    starts = np.column_stack([np.arange(7) * 1000, np.arange(7)])
    trajectories = counting_ensemble().rollout(starts, np.zeros((7, 3, 1)), propagation)

    assert trajectories.dtype == torch.float32
    assert (trajectories[..., 1] == torch.arange(7.0)[:, None]).all(), "the second dimension names the row"
    assert (trajectories[..., 0] - 1000 * torch.arange(7.0)[:, None] <= 9).all()


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "member"])
def test_actions_and_predictions_are_fed_back_step_by_step(unit_normalisation, propagation):
    """One member whose change is -s/2 + a: from 8 with actions 0, 2, 4 the states are 4, 4, 6."""
    member = DeterministicModel(Architecture(1, 1, hidden_size=()), unit_normalisation(1, 1))
    with torch.no_grad():
        member.network.dynamics.weights[0].copy_(torch.tensor([[[-0.5], [1.0]]]))

    trajectory = DynamicsEnsemble.from_members([member]).rollout(
        np.array([[8.0]]), np.array([[[0.0], [2.0], [4.0]]]), propagation
    )

    assert trajectory.flatten().tolist() == [8.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_dealt_members_draw_from_their_own_distribution(constant_member, propagation):
    """Each row's first step has the variance of the member it was dealt to, which its mean tells apart."""
    changes, variances = ([0.0], [100.0]), ([1.0], [9.0])
    pairs = zip(changes, variances, strict=True)
    ensemble = DynamicsEnsemble.from_members([constant_member(ProbabilisticModel, *pair) for pair in pairs])

    first = ensemble.rollout(np.zeros((20_000, 1)), np.zeros((20_000, 1, 1)), propagation)[:, 1, 0]

    for (mean,), (variance,) in zip(changes, variances, strict=True):
        drawn = first[(first - mean).abs() < 40]
        assert len(drawn) == 10_000
        assert drawn.mean().item() == pytest.approx(mean, abs=5 * (variance / 10_000) ** 0.5)
        assert drawn.var().item() == pytest.approx(variance, rel=5 * (2 / 10_000) ** 0.5)


@pytest.mark.parametrize("propagation", ["mean", "member"])
def test_means_are_rolled_out_without_noise(known_ensemble, propagation):
    rows = np.zeros((4, 2)), np.zeros((4, 3, 1))
    point, gaussian = (
        known_ensemble(kind).rollout(*rows, propagation) for kind in (DeterministicModel, ProbabilisticModel)
    )
    assert torch.equal(point, gaussian)


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_rollouts_are_repeated_by_the_seed_and_differ_from_each_other(known_ensemble, propagation):
    rows = np.zeros((6, 2)), np.zeros((6, 3, 1))
    members = known_ensemble(ProbabilisticModel).members()
    first, again, other = (DynamicsEnsemble.from_members(members, seed) for seed in (0, 0, 1))

    draws = [first.rollout(*rows, propagation) for _ in range(2)]

    assert torch.equal(draws[0], again.rollout(*rows, propagation))
    assert torch.equal(draws[1], again.rollout(*rows, propagation))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other.rollout(*rows, propagation))


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "member"])
def test_rollout_of_no_steps_is_the_start(counting_ensemble, propagation):
    trajectories = counting_ensemble().rollout(np.ones((4, 2)), np.zeros((4, 0, 1)), propagation)
    assert trajectories.shape == ((3, 4, 1, 2) if propagation == "member" else (4, 1, 2))
    assert (trajectories == 1).all()


@pytest.mark.parametrize(
    ("states", "actions"), [((2,), (3, 1)), ((4, 2), (4, 1)), ((4, 2), (5, 3, 1)), ((1, 4, 2), (1, 4, 3, 1))]
)
def test_rollout_of_shapes_that_do_not_fit_says_what_it_expects(counting_ensemble, states, actions):
    expected = (
        f"got states {states} and actions {actions}; expected (batch, state_dim) and (batch, horizon, action_dim)"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        counting_ensemble().rollout(np.zeros(states), np.zeros(actions))


def test_unknown_propagation_names_the_known_ones(counting_ensemble):
    with pytest.raises(ValueError, match="propagation 'ts2' is unknown; use ts1, tsinf, mean or member"):
        counting_ensemble().rollout(np.zeros((1, 2)), np.zeros((1, 1, 1)), "ts2")


def test_rollouts_keep_no_graph(member_class, ensemble_of, draw_rows):
    ensemble, _ = ensemble_of(member_class)
    states, actions = draw_rows(4)
    for propagation in ("ts1", "tsinf", "mean", "member"):
        assert not ensemble.rollout(states, np.stack([actions] * 2, axis=1), propagation).requires_grad
    assert not ensemble.sample(states, actions).requires_grad
    assert not ensemble.disagreement(states, actions, "max_pairwise").requires_grad


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
@pytest.mark.parametrize(("batch", "size"), [(7, 3), (8, 3), (10, 7), (100, 7)])
def test_members_are_dealt_evenly_where_they_do_not_divide_the_batch(counting_ensemble, propagation, batch, size):
    made_by = roll(counting_ensemble(size), batch, 10, propagation)

    for step in made_by.T:
        counts = [(step == member + 1).sum().item() for member in range(size)]
        assert sum(counts) == batch
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_rows_than_members_are_dealt_to_all_members_in_turn(counting_ensemble, propagation, batch):
    ensemble = counting_ensemble(5)
    made_by = torch.stack([roll(ensemble, batch, 2, propagation) for _ in range(100)])

    for row in range(batch):  # a member that one row never met by chance: 5 * 0.8^100 = 1e-9
        assert set(made_by[:, row].flatten().tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    if batch == 2:
        assert (made_by[:, 0] != made_by[:, 1]).all(), "two rows are never dealt to one member of five"


def test_rollout_with_actions_of_the_wrong_width_is_refused(counting_ensemble):
    with pytest.raises(ValueError):
        counting_ensemble().rollout(np.zeros((4, 2)), np.zeros((4, 5, 3)))
