"""batches: statistics of training rows, rows in normalised units, and who sees which row when."""

import math

import numpy as np
import pytest
import torch

from data.trajectories import Transitions
from dynamics_model import Architecture, Normalisation
from training.batches import NormalisedRows, draw_bootstrap, draw_order, measure_normalisation, normalise_rows
from utils import InputError

# --- Normalisation ---


def transitions_of(states, change, actions=None, rewards=None):
    states = np.asarray(states, dtype=np.float32)
    rows = len(states)
    actions = np.zeros((rows, 1), np.float32) if actions is None else np.asarray(actions, dtype=np.float32)
    rewards = np.zeros(rows, np.float32) if rewards is None else np.asarray(rewards, dtype=np.float32)
    return Transitions(states, actions, (states + np.asarray(change)).astype(np.float32), rewards)


@pytest.fixture
def four_rows():
    """Four transitions; the second state dimension is constant and so is its change."""
    return transitions_of(
        states=[[0, 5], [2, 5], [4, 5], [10, 5]],
        change=[[1, 0.5], [1, 0.5], [3, 0.5], [7, 0.5]],
        actions=[[1], [1], [1], [3]],
        rewards=[0, 0, 2, 6],
    )


def test_statistics_are_means_and_mean_absolute_deviations_by_hand(four_rows):
    normalisation = measure_normalisation(four_rows)

    # States: mean 16/4 = 4, deviations 4, 2, 0, 6, mean 3; a constant 5 has scale 1.
    # Actions: mean 6/4 = 1.5, deviations 0.5, 0.5, 0.5, 1.5, mean 0.75.
    assert normalisation.input_shift.tolist() == [4.0, 5.0, 1.5]
    assert normalisation.input_scale.tolist() == [3.0, 1.0, 0.75]
    # Changes: mean 12/4 = 3, deviations 2, 2, 0, 4, mean 2; a constant change has scale 0 and is no output.
    assert normalisation.delta_shift.tolist() == [3.0, 0.5]
    assert normalisation.delta_scale.tolist() == [2.0, 0.0]
    # Rewards: mean 2, deviations 2, 2, 0, 4.
    assert normalisation.reward_shift.tolist() == [2.0]
    assert normalisation.reward_scale.tolist() == [2.0]
    assert {getattr(normalisation, name).dtype for name in Normalisation.names()} == {torch.float32}


def test_constant_reward_has_scale_one():
    normalisation = measure_normalisation(transitions_of([[0.0], [1.0]], [[1.0], [2.0]], rewards=[3, 3]))
    assert (normalisation.reward_shift.item(), normalisation.reward_scale.item()) == (3.0, 1.0)


def test_dimension_that_varies_in_one_row_only_is_not_constant():
    states = np.zeros((1000, 1))
    states[700] = 1.0
    normalisation = measure_normalisation(transitions_of(states, np.arange(1000)[:, None]))
    # mean 0.001; mean absolute deviation (999 * 0.001 + 0.999) / 1000 = 0.001998: in this unit a move would be 500
    assert normalisation.input_scale[0].item() == pytest.approx((0.001 * 0.999) ** 0.5)


@pytest.mark.parametrize(("moving", "is_rare"), [(20, True), (40, False)])
def test_the_scale_of_a_dimension_that_moves_rarely_is_its_standard_deviation(moving, is_rare):
    """Of n in 1000 equal moves the ratio of the two deviations is 1 / (2 sqrt(p (1 - p))): 3.6 and 2.6."""
    change = np.zeros((1000, 2))
    change[:moving, 0], change[:, 1] = 0.25, np.arange(1000)
    share = moving / 1000
    scale = measure_normalisation(transitions_of(np.zeros((1000, 2)), change)).delta_scale
    standard, absolute = 0.25 * (share * (1 - share)) ** 0.5, 0.25 * 2 * share * (1 - share)
    assert scale[0].item() == pytest.approx(standard if is_rare else absolute)
    assert scale[1].item() == pytest.approx(250.0)


def test_float64_states_are_normalised_before_they_are_rounded(member_class):
    """Near 5e5, float32 has steps of 1/32: rounded to them, half of these changes and positions would be noise."""
    random = np.random.default_rng(0)
    change = random.normal(size=(1000, 1)) * 0.01
    states = 5e5 + np.cumsum(change, axis=0) - change
    transitions = Transitions(states, np.zeros((1000, 1), np.float32), states + change, np.zeros(1000, np.float32))
    normalisation = measure_normalisation(transitions)
    rows = normalise_rows(member_class(Architecture(1, 1, hidden_size=()), normalisation).network, transitions)

    assert rows.inputs.dtype == rows.targets.dtype == torch.float32
    for values, found in ((states, rows.inputs[:, 0]), (change, rows.targets[:, 0])):
        deviation = np.abs(values - values.mean()).mean()
        steps = np.diff(values[:, 0]) / deviation  # a shift that is kept as float32 moves all rows alike
        np.testing.assert_allclose(np.diff(found.double().numpy()), steps, atol=1e-4)


def test_without_rewards_their_shift_is_0_and_their_scale_1():
    states = np.arange(4, dtype=np.float32)[:, None]
    normalisation = measure_normalisation(Transitions(states, states, states**2, None))
    assert (normalisation.reward_shift.tolist(), normalisation.reward_scale.tolist()) == ([0.0], [1.0])


def test_constant_whose_sum_is_rounded_is_still_constant():
    """This change has 46 bits: its mean over many rows is off by roundings, but its deviation must be exactly 0."""
    rows = 5003
    states, next_states = np.empty((2, rows, 2), dtype=np.float32)
    states[:, 0], next_states[:, 0] = 1e-7, 0.3
    states[:, 1], next_states[:, 1] = 0.0, np.arange(rows) % 7
    change = next_states[0, 0].astype(np.float64) - states[0, 0]
    assert (np.full((rows, 2), change).sum(axis=0) / rows != change).all(), "the test's own numbers do what it says"

    normalisation = measure_normalisation(Transitions(states, states[:, :1], next_states, states[:, 0]))

    assert normalisation.input_scale.tolist() == [1.0, 1.0, 1.0]
    assert normalisation.delta_scale[0].item() == 0 < normalisation.delta_scale[1].item()
    assert normalisation.delta_shift[0].item() == np.float32(change)


def test_changes_are_subtracted_in_float64(member_class):
    """1 - 2^-30 and 1 - 2^-28 are both 1 in float32; half-way between them lies 1 - 2.5 * 2^-30."""
    states = np.float32([[2**-30], [2**-28]])
    transitions = Transitions(states, np.float32([[0], [0]]), np.float32([[1], [1]]), np.float32([0, 0]))

    normalisation = measure_normalisation(transitions)

    assert normalisation.delta_scale.item() == 1.5 * 2**-30
    member = member_class(Architecture(1, 1, hidden_size=()), normalisation)
    # The shift itself is kept as float32, 1.0: off by 2.5 * 2^-30, alike for both rows.
    first, second = normalise_rows(member.network, transitions).targets.flatten().tolist()
    assert first - second == pytest.approx(2.0)


def test_nothing_to_learn_is_an_error():
    with pytest.raises(InputError, match="changes by a constant in the training rows: nothing to learn"):
        measure_normalisation(transitions_of([[0.0], [1.0]], [[1.0], [1.0]]))


def test_statistics_by_chunks_equal_numpy_on_all_rows():
    random = np.random.default_rng(0)
    rows = 2 * 65536 + 123
    states = (random.normal(size=(rows, 2)) * (3, 0.01) + np.linspace(-50, 50, rows)[:, None]).astype(np.float32)
    change = random.exponential(size=(rows, 2)) * (1, 100)
    transitions = transitions_of(states, change, random.uniform(size=(rows, 1)), random.normal(size=rows))

    normalisation = measure_normalisation(transitions)

    inputs = np.hstack([transitions.states, transitions.actions]).astype(np.float64)
    delta = transitions.next_states.astype(np.float64) - transitions.states
    rewards = transitions.rewards.astype(np.float64)[:, None]
    for name, values in (("input", inputs), ("delta", delta), ("reward", rewards)):
        shift, scale = getattr(normalisation, f"{name}_shift"), getattr(normalisation, f"{name}_scale")
        np.testing.assert_allclose(shift, values.mean(axis=0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(scale, np.abs(values - values.mean(axis=0)).mean(axis=0), rtol=1e-6)


def test_small_changes_at_large_offsets_keep_the_precision_of_their_inputs(member_class):
    """Near 1e6 float32 has steps of 1/16: changes of whole steps are exact and must stay so."""
    random = np.random.default_rng(0)
    states = (1e6 + random.integers(-80, 80, size=(5000, 1)) / 16).astype(np.float32)
    change = random.integers(-8, 8, size=(5000, 1)) / 16
    transitions = transitions_of(states, change)
    delta = transitions.next_states.astype(np.float64) - transitions.states
    assert np.array_equal(delta, change), "the test's own inputs are exact"

    normalisation = measure_normalisation(transitions)
    deviation = np.abs(delta - delta.mean()).mean()
    assert normalisation.delta_shift.item() == pytest.approx(delta.mean(), rel=1e-6)
    assert normalisation.delta_scale.item() == pytest.approx(deviation, rel=1e-6)

    member = member_class(Architecture(1, 1, hidden_size=()), normalisation)
    rows = normalise_rows(member.network, transitions)
    np.testing.assert_allclose(rows.targets, (delta - delta.mean()) / deviation, rtol=1e-5, atol=1e-6)
    # The mean itself is known to half a step; a scale of 2.5 makes that 0.0125. Differences between rows are exact.
    exact = states.astype(np.float64) / normalisation.input_scale[0].item()
    np.testing.assert_allclose(rows.inputs[:, :1] - rows.inputs[0, 0], exact - exact[0], rtol=0, atol=1e-5)
    assert abs(rows.inputs[:, 0].mean().item()) < 1 / 32 / normalisation.input_scale[0].item()


# --- Rows in normalised units ---


def test_normalised_rows_by_hand(four_rows, member_class):
    options = {"hidden_size": (), "reward_hidden_size": ()}
    member = member_class(Architecture(2, 1, **options), measure_normalisation(four_rows))
    rows = normalise_rows(member.network, four_rows)

    third = 1 / 3
    expected = [[-4 * third, 0, -2 * third], [-2 * third, 0, -2 * third], [0, 0, -2 * third], [2, 0, 2]]
    np.testing.assert_allclose(rows.inputs, expected, rtol=1e-6)
    assert rows.targets.tolist() == [[-1], [-1], [0], [2]], "the constant dimension is no target"
    assert rows.rewards.tolist() == [[-1], [-1], [0], [2]]


def test_rows_have_no_rewards_where_none_is_learned(four_rows, member_class):
    member = member_class(Architecture(2, 1, hidden_size=()), measure_normalisation(four_rows))
    assert normalise_rows(member.network, four_rows).rewards is None


def test_selected_rows_are_those_asked_for():
    rows = NormalisedRows(torch.arange(10.0).view(5, 2), torch.arange(5.0).view(5, 1), None)

    selected = rows.select(torch.tensor([[4, 0], [1, 1]]))

    assert selected.inputs.tolist() == [[[8, 9], [0, 1]], [[2, 3], [2, 3]]]
    assert selected.targets.tolist() == [[[4], [0]], [[1], [1]]]
    assert selected.rewards is None


def test_chunks_hold_every_row_once_and_the_last_what_is_left():
    rows = NormalisedRows(torch.arange(5.0).view(5, 1), torch.arange(5.0).view(5, 1), torch.arange(5.0).view(5, 1))
    assert [chunk.rewards.flatten().tolist() for chunk in rows.chunks(2)] == [[0, 1], [2, 3], [4]]


# --- Order and bootstrap ---


def test_order_is_a_permutation_for_each_member_and_epoch():
    first, second = draw_order(0, 3, 50, epoch=0), draw_order(0, 3, 50, epoch=1)

    for order in (*first, *second):
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in (*first, *second)}) == 6, "no two members or epochs share an order"


@pytest.mark.parametrize(
    "draw", [draw_bootstrap, lambda *sizes: draw_order(*sizes, epoch=4)], ids=["bootstrap", "order"]
)
def test_draws_depend_on_the_seed_and_not_on_the_number_of_members(draw):
    seven = draw(5, 7, 40)

    assert torch.equal(seven, draw(5, 7, 40))
    assert torch.equal(seven[:2], draw(5, 2, 40))
    assert not torch.equal(seven, draw(6, 7, 40))


def test_bootstrap_draws_as_many_rows_with_replacement_for_each_member():
    drawn = draw_bootstrap(0, 3, 10_000)

    assert drawn.shape == (3, 10_000)
    assert drawn.min() >= 0 and drawn.max() < 10_000
    assert not torch.equal(drawn[0], drawn[1])
    for rows in drawn:  # a row is missed with probability (1 - 1/n)^n = 1/e; standard deviation of the share: 0.003
        assert len(rows.unique()) / 10_000 == pytest.approx(1 - math.exp(-1), abs=0.015)


def test_bootstrap_is_not_the_order():
    assert not torch.equal(draw_bootstrap(0, 1, 50), draw_order(0, 1, 50, epoch=0))
