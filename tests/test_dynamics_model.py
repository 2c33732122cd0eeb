"""dynamics_model: networks, normalisation, members, ensembles and model.pkl.

Many tests use members that predict a constant change, so that a value tells which member made it.
"""

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dynamics_model
from config import LearnConfig
from data.trajectories import Transitions
from deterministic_model import DeterministicModel
from dynamics_model import (
    VARIANCE_FLOOR,
    Architecture,
    DynamicsEnsemble,
    Normalisation,
    NormalisedRows,
    StackedMLP,
    load_ensemble,
    load_models,
    random_stream,
)
from probabilistic_model import ProbabilisticModel
from tracking.trackers import NullTracker
from training import optimisation
from training.build import build_ensemble
from training.loop import train_ensemble
from training.scores import rank_elites

ROOT = Path(dynamics_model.__file__).parent
MODULES = ("dynamics_model", "deterministic_model", "probabilistic_model")


def draw_rows(*leading, seed=0):
    """States and actions of the size of ``random_member``, float32."""
    random = np.random.default_rng(seed)
    draws = [random.normal(size=(*leading, size)).astype(np.float32) for size in (3, 2)]
    return draws[0] * np.float32([1, 2, 0.5]) + np.float32([0.5, -3, 10]), draws[1]


def as_tuple(prediction):
    return prediction if isinstance(prediction, tuple) else (prediction,)


def assert_same_weights(first, second):
    """Equality to the bit, normalisation included."""
    ours, others = first.state_dict(), second.state_dict()
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.detach(), others[name].detach()), name


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


# --- The stacked network ---

ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "elu": nn.ELU, "tanh": nn.Tanh}


def reference_of(stack, member, activation_fn, layer_norm):
    """The same network of PyTorch's own layers, with the weights of one member of a stack."""
    layers = []
    for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data, linear.bias.data = weight.data[member].T.clone(), bias.data[member, 0].clone()
        layers.append(linear)
        if layer < len(stack.weights) - 1:
            if layer_norm:
                norm = nn.LayerNorm(weight.shape[2])
                norm.weight.data, norm.bias.data = (
                    stack.gains[layer].data[member, 0],
                    stack.offsets[layer].data[member, 0],
                )
                layers.append(norm)
            layers.append(ACTIVATIONS[activation_fn]())
    return nn.Sequential(*layers)


@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer_norm"])
@pytest.mark.parametrize("activation_fn", ACTIVATIONS)
@pytest.mark.parametrize("ensemble_size", [1, 3])
def test_stack_equals_layers_of_pytorch_on_the_same_weights(ensemble_size, activation_fn, layer_norm):
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(ensemble_size, 3, (6, 4), 2, 1, activation_fn, layer_norm, generator)
    for parameter in (*stack.gains, *stack.offsets):
        parameter.data.uniform_(-2, 2, generator=generator)
    inputs = torch.randn(ensemble_size, 5, 3, generator=generator)

    outputs = stack(inputs)

    assert len(stack.gains) == (2 if layer_norm else 0)
    for member in range(ensemble_size):
        reference = reference_of(stack, member, activation_fn, layer_norm)
        torch.testing.assert_close(outputs[member], reference(inputs[member]), rtol=1e-5, atol=1e-6)


def test_stack_of_one_and_one_layer_is_nn_linear():
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(1, 3, (), 2, 1, "relu", True, generator)
    linear = nn.Linear(3, 2)
    linear.weight.data, linear.bias.data = stack.weights[0].data[0].T, stack.biases[0].data[0, 0]
    inputs = torch.randn(1, 5, 3, generator=generator)

    torch.testing.assert_close(stack(inputs)[0], linear(inputs[0]))


def test_gradients_of_a_stack_of_one_equal_those_of_nn_linear():
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(1, 3, (4,), 2, 1, "tanh", True, generator)
    inputs = torch.randn(1, 5, 3, generator=generator)
    reference = reference_of(stack, 0, "tanh", True)

    stack(inputs).square().sum().backward()
    reference(inputs[0]).square().sum().backward()

    torch.testing.assert_close(stack.weights[0].grad[0], reference[0].weight.grad.T)
    torch.testing.assert_close(stack.gains[0].grad[0, 0], reference[1].weight.grad)
    torch.testing.assert_close(stack.biases[1].grad[0, 0], reference[3].bias.grad)


def test_initial_weights_fill_the_bound_of_nn_linear_which_follows_the_inputs():
    stack = StackedMLP(50, 4, (64, 9), 5, 2, "silu", False, torch.Generator().manual_seed(0))

    for weight, bias, in_features in zip(stack.weights, stack.biases, (4, 64, 9), strict=True):
        bound = 1 / in_features**0.5
        assert weight.shape[1] == in_features
        for values in (weight, bias):
            assert 0.98 * bound < values.abs().max() <= bound
            # A uniform draw within the bound has standard deviation bound / sqrt(3).
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not torch.equal(values[0], values[1]), "members of a stack start differently"
        assert nn.Linear(in_features, 1000).weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_two_kinds_start_with_the_same_hidden_layers_and_mean_head(random_member):
    for member in (0, 3):
        point = random_member(DeterministicModel, member).network.dynamics
        gaussian = random_member(ProbabilisticModel, member).network.dynamics
        for layer in range(2):
            assert torch.equal(point.weights[layer], gaussian.weights[layer])
            assert torch.equal(point.biases[layer], gaussian.biases[layer])
        assert gaussian.weights[2].shape == (1, 6, 6)
        assert torch.equal(point.weights[2], gaussian.weights[2][..., :3])
        assert torch.equal(point.biases[2], gaussian.biases[2][..., :3])
        assert not torch.equal(gaussian.weights[2][..., :3], gaussian.weights[2][..., 3:])


def test_members_and_seeds_start_differently(member_class, random_member):
    starts = [random_member(member_class, member, seed) for seed in (0, 1) for member in (0, 1)]
    weights = [member.network.dynamics.weights[0].flatten()[0].item() for member in starts]
    assert len(set(weights)) == 4


def test_reward_network_leaves_the_start_of_the_dynamics_as_it_is(member_class, random_member):
    without = random_member(member_class).network.dynamics.state_dict()
    with_reward = random_member(member_class, reward=True).network.dynamics.state_dict()
    assert all(torch.equal(without[name], with_reward[name]) for name in without)


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
    normalisation = Normalisation.from_transitions(four_rows)

    # States: mean 16/4 = 4, deviations 4, 2, 0, 6, mean 3; a constant 5 has scale 1.
    # Actions: mean 6/4 = 1.5, deviations 0.5, 0.5, 0.5, 1.5, mean 0.75.
    assert normalisation.input_shift.tolist() == [4.0, 5.0, 1.5]
    assert normalisation.input_scale.tolist() == [3.0, 1.0, 0.75]
    # Changes: mean 12/4 = 3, deviations 2, 2, 0, 4, mean 2; a constant change has scale 0 and is no output.
    assert normalisation.delta_shift.tolist() == [3.0, 0.5]
    assert normalisation.delta_scale.tolist() == [2.0, 0.0]
    assert normalisation.learned.tolist() == [0]
    # Rewards: mean 2, deviations 2, 2, 0, 4.
    assert normalisation.reward_shift.tolist() == [2.0]
    assert normalisation.reward_scale.tolist() == [2.0]
    assert {getattr(normalisation, name).dtype for name in Normalisation.names()} == {torch.float32}


def test_constant_reward_has_scale_one():
    normalisation = Normalisation.from_transitions(transitions_of([[0.0], [1.0]], [[1.0], [2.0]], rewards=[3, 3]))
    assert (normalisation.reward_shift.item(), normalisation.reward_scale.item()) == (3.0, 1.0)


def test_dimension_that_varies_in_one_row_only_is_not_constant():
    states = np.zeros((1000, 1))
    states[700] = 1.0
    normalisation = Normalisation.from_transitions(transitions_of(states, np.arange(1000)[:, None]))
    # mean 0.001; mean absolute deviation (999 * 0.001 + 0.999) / 1000
    assert normalisation.input_scale[0].item() == pytest.approx(0.001998)


def test_constant_whose_sum_is_rounded_is_still_constant():
    """This change has 46 bits: its mean over many rows is off by roundings, but its deviation must be exactly 0."""
    rows = 5003
    states, next_states = np.empty((2, rows, 2), dtype=np.float32)
    states[:, 0], next_states[:, 0] = 1e-7, 0.3
    states[:, 1], next_states[:, 1] = 0.0, np.arange(rows) % 7
    change = next_states[0, 0].astype(np.float64) - states[0, 0]
    assert (np.full((rows, 2), change).sum(axis=0) / rows != change).all(), "the test's own numbers do what it says"

    normalisation = Normalisation.from_transitions(Transitions(states, states[:, :1], next_states, states[:, 0]))

    assert normalisation.input_scale.tolist() == [1.0, 1.0, 1.0]
    assert normalisation.delta_scale[0].item() == 0 < normalisation.delta_scale[1].item()
    assert normalisation.delta_shift[0].item() == np.float32(change)


def test_changes_are_subtracted_in_float64(member_class):
    """1 - 2^-30 and 1 - 2^-28 are both 1 in float32; half-way between them lies 1 - 2.5 * 2^-30."""
    states = np.float32([[2**-30], [2**-28]])
    transitions = Transitions(states, np.float32([[0], [0]]), np.float32([[1], [1]]), np.float32([0, 0]))

    normalisation = Normalisation.from_transitions(transitions)

    assert normalisation.delta_scale.item() == 1.5 * 2**-30
    member = member_class(Architecture(1, 1, hidden_size=()), normalisation)
    # The shift itself is kept as float32, 1.0: off by 2.5 * 2^-30, alike for both rows.
    first, second = DynamicsEnsemble([member]).normalise(transitions).targets.flatten().tolist()
    assert first - second == pytest.approx(2.0)


def test_nothing_to_learn_is_an_error():
    with pytest.raises(ValueError, match="changes by a constant in the training rows: nothing to learn"):
        Normalisation.from_transitions(transitions_of([[0.0], [1.0]], [[1.0], [1.0]]))


def test_statistics_by_chunks_equal_numpy_on_all_rows():
    random = np.random.default_rng(0)
    rows = 2 * 65536 + 123
    states = (random.normal(size=(rows, 2)) * (3, 0.01) + np.linspace(-50, 50, rows)[:, None]).astype(np.float32)
    change = random.exponential(size=(rows, 2)) * (1, 100)
    transitions = transitions_of(states, change, random.uniform(size=(rows, 1)), random.normal(size=rows))

    normalisation = Normalisation.from_transitions(transitions)

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

    normalisation = Normalisation.from_transitions(transitions)
    deviation = np.abs(delta - delta.mean()).mean()
    assert normalisation.delta_shift.item() == pytest.approx(delta.mean(), rel=1e-6)
    assert normalisation.delta_scale.item() == pytest.approx(deviation, rel=1e-6)

    member = member_class(Architecture(1, 1, hidden_size=()), normalisation)
    rows = DynamicsEnsemble([member]).normalise(transitions)
    np.testing.assert_allclose(rows.targets, (delta - delta.mean()) / deviation, rtol=1e-5, atol=1e-6)
    # The mean itself is known to half a step; a scale of 2.5 makes that 0.0125. Differences between rows are exact.
    exact = states.astype(np.float64) / normalisation.input_scale[0].item()
    np.testing.assert_allclose(rows.inputs[:, :1] - rows.inputs[0, 0], exact - exact[0], rtol=0, atol=1e-5)
    assert abs(rows.inputs[:, 0].mean().item()) < 1 / 32 / normalisation.input_scale[0].item()


def test_normalised_rows_by_hand(four_rows, member_class):
    options = {"hidden_size": (), "reward_hidden_size": ()}
    member = member_class(Architecture(2, 1, **options), Normalisation.from_transitions(four_rows))
    rows = DynamicsEnsemble([member]).normalise(four_rows)

    third = 1 / 3
    expected = [[-4 * third, 0, -2 * third], [-2 * third, 0, -2 * third], [0, 0, -2 * third], [2, 0, 2]]
    np.testing.assert_allclose(rows.inputs, expected, rtol=1e-6)
    assert rows.targets.tolist() == [[-1], [-1], [0], [2]], "the constant dimension is no target"
    assert rows.rewards.tolist() == [[-1], [-1], [0], [2]]


def test_rows_have_no_rewards_where_none_is_learned(four_rows, member_class):
    member = member_class(Architecture(2, 1, hidden_size=()), Normalisation.from_transitions(four_rows))
    assert DynamicsEnsemble([member]).normalise(four_rows).rewards is None


def test_selected_rows_are_those_asked_for():
    rows = NormalisedRows(torch.arange(10.0).view(5, 2), torch.arange(5.0).view(5, 1), None)

    selected = rows.select(torch.tensor([[4, 0], [1, 1]]))

    assert selected.inputs.tolist() == [[[8, 9], [0, 1]], [[2, 3], [2, 3]]]
    assert selected.targets.tolist() == [[[4], [0]], [[1], [1]]]
    assert selected.rewards is None


def test_chunks_hold_every_row_once_and_the_last_what_is_left():
    rows = NormalisedRows(torch.arange(5.0).view(5, 1), torch.arange(5.0).view(5, 1), torch.arange(5.0).view(5, 1))
    assert [chunk.rewards.flatten().tolist() for chunk in rows.chunks(2)] == [[0, 1], [2, 3], [4]]


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


def test_constant_changes_are_predicted_exactly_with_a_small_positive_variance(member_class, with_constant_dimensions):
    transitions = with_constant_dimensions
    probabilistic = member_class is ProbabilisticModel
    config = LearnConfig(probabilistic=probabilistic, ensemble_size=2, hidden_size=(8,), fit_epochs=2, batch_size=64)
    ensemble = build_ensemble(config, transitions)
    train = ensemble.normalise(transitions)
    assert ensemble.network.learned.tolist() == LEARNED
    train_ensemble(ensemble, config, train, None, NullTracker())

    mean, variance = ensemble.predict(transitions.states, transitions.actions)

    for member in mean.detach().numpy():
        np.testing.assert_array_equal(member[:, CONSTANT], transitions.next_states[:, CONSTANT])
    if probabilistic:
        assert (variance[..., CONSTANT] == VARIANCE_FLOOR).all() and VARIANCE_FLOOR > 0
        assert (variance[..., LEARNED] > 1e-8).all()


def test_constant_changes_are_left_out_of_scores(member_class, with_constant_dimensions):
    transitions = with_constant_dimensions
    ensemble = build_ensemble(LearnConfig(probabilistic=member_class is ProbabilisticModel), transitions)

    mean, _ = ensemble.predict(transitions.states, transitions.actions)
    delta = transitions.next_states.astype(np.float64) - transitions.states
    scale = np.abs(delta - delta.mean(axis=0)).mean(axis=0)
    error = (mean.detach().double().numpy() - transitions.next_states)[..., LEARNED] / scale[LEARNED]

    score = ensemble.network.score(ensemble.normalise(transitions))
    np.testing.assert_allclose(score["mse"], (error**2).mean(axis=(1, 2)), rtol=1e-4)


# --- Scores ---


def ten_rows():
    """Targets 0 to 9 in both of two dimensions."""
    targets = torch.arange(10.0).repeat(2, 1).T
    return NormalisedRows(torch.zeros(10, 3), targets, None)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 10, 4096])
def test_score_is_the_mean_over_all_rows_also_of_a_last_partial_chunk(monkeypatch, constant_member, rows_per_chunk):
    monkeypatch.setattr(dynamics_model, "_SCORE_ROWS", rows_per_chunk)
    network = DynamicsEnsemble([constant_member(DeterministicModel, change) for change in ([0, 0], [9, 1])]).network

    score = network.score(ten_rows())

    # Squares of 0 to 9 sum to 285: 28.5 on average. Of distances to 1: 1 + (0 + 1 + ... + 64) = 205, 20.5 on average.
    assert score == {"mse": pytest.approx([28.5, (28.5 + 20.5) / 2])}


@pytest.mark.parametrize("rows_per_chunk", [4, 4096])
def test_nll_is_that_of_the_normal_distribution_in_nats(monkeypatch, constant_member, rows_per_chunk):
    monkeypatch.setattr(dynamics_model, "_SCORE_ROWS", rows_per_chunk)
    members = [([0.0, 3.0], [1.0, 4.0]), ([5.0, 5.0], [0.25, 9.0])]
    network = DynamicsEnsemble([constant_member(ProbabilisticModel, *member) for member in members]).network

    score = network.score(ten_rows())

    for member, (mean, variance) in enumerate(members):
        density = torch.distributions.Normal(torch.tensor(mean), torch.tensor(variance).sqrt())
        assert score["nll"][member] == pytest.approx(-density.log_prob(ten_rows().targets).mean().item(), rel=1e-5)
    # By hand for member 0, dimension 0: 28.5 / 2 + log(2 pi) / 2; dimension 1: errors -3 to 6, squares sum to 105.
    by_hand = (28.5 / 2 + (10.5 / 4 + np.log(4)) / 2 + np.log(2 * np.pi)) / 2
    assert score["nll"][0] == pytest.approx(by_hand, rel=1e-5)
    assert score["mse"] == pytest.approx([(28.5 + 10.5) / 2, (8.5 + 8.5) / 2])


def test_deterministic_members_have_no_nll_and_no_reward_error(constant_member):
    assert set(constant_member(DeterministicModel, [0, 0]).network.score(ten_rows())) == {"mse"}


@pytest.mark.parametrize("rows_per_chunk", [4, 4096])
def test_reward_error_is_a_mean_over_all_rows(monkeypatch, unit_normalisation, rows_per_chunk):
    monkeypatch.setattr(dynamics_model, "_SCORE_ROWS", rows_per_chunk)
    architecture = Architecture(2, 1, hidden_size=(), reward_hidden_size=())
    network = DeterministicModel(architecture, unit_normalisation()).network  # all weights 0: predicts 0
    rows = ten_rows()._replace(rewards=torch.arange(10.0).view(10, 1))

    assert network.score(rows)["reward_mse"] == pytest.approx([28.5])


# --- Training ---


def train(config, transitions, holdout=None):
    ensemble = build_ensemble(config, transitions)
    held_out = None if holdout is None else ensemble.normalise(holdout)
    train_ensemble(ensemble, config, ensemble.normalise(transitions), held_out, NullTracker())
    return ensemble


def small_config(member_class, **settings):
    defaults = {"ensemble_size": 7, "hidden_size": (16, 16), "fit_epochs": 4, "batch_size": 64, "fit_lr": 1e-3}
    defaults["reduced_precision"] = 0  # so that trainings that differ in a last bit only stay as close as that
    return LearnConfig(**defaults | {"probabilistic": member_class is ProbabilisticModel} | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_clip": 0.5, "bootstrap": True, "layer_norm": True, "weight_decay": 0.01, "learn_reward": True},
        {"patience": 1, "fit_lr": 0.02},  # with a holdout: best weights of each member
    ],
    ids=["plain", "clipped_bootstrapped", "selected"],
)
def test_member_trained_in_a_stack_of_seven_equals_the_same_trained_alone(
    member_class, settings, linear_system, monkeypatch
):
    transitions = linear_system(200, noise=0.3)
    holdout = linear_system(50, noise=0.3, seed=1) if "patience" in settings else None
    stacked = train(small_config(member_class, **settings), transitions, holdout).members()

    for index in (0, 5):

        def shifted(seed, member, purpose, epoch=0, index=index):
            return random_stream(seed, member + index, purpose, epoch)

        with monkeypatch.context() as patch:  # the only member of a stack of one draws as the one of that index would
            patch.setattr(dynamics_model, "random_stream", shifted)
            patch.setattr(optimisation, "random_stream", shifted)
            (alone,) = train(small_config(member_class, ensemble_size=1, **settings), transitions, holdout).members()
        for name, weight in alone.state_dict().items():
            torch.testing.assert_close(stacked[index].state_dict()[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    first, other = (member.network.dynamics.weights[0] for member in (stacked[0], stacked[5]))
    assert (first - other).abs().mean() > 0.05, "members are far apart compared with the tolerance"


def test_members_do_not_depend_on_how_many_there_are(member_class, linear_system):
    transitions = linear_system(200)
    settings = {"bootstrap": True, "grad_clip": 0.5}
    two = train(small_config(member_class, ensemble_size=2, **settings), transitions).members()
    four = train(small_config(member_class, ensemble_size=4, **settings), transitions).members()

    for fewer, more in zip(two, four[:2], strict=True):
        for name, weight in fewer.state_dict().items():
            torch.testing.assert_close(more.state_dict()[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_same_seed_gives_the_same_model_to_the_bit(member_class, linear_system):
    transitions = linear_system(200)
    config = small_config(member_class, bootstrap=True)
    torch.manual_seed(1)
    first = train(config, transitions)
    torch.manual_seed(2)
    torch.rand(3)
    second = train(config, transitions)

    assert_same_weights(first, second)


def test_another_seed_gives_another_model(member_class, linear_system):
    transitions = linear_system(100)
    first, second = (train(small_config(member_class, fit_epochs=1, seed=seed), transitions) for seed in (0, 1))
    for ours, others in zip(first.network.dynamics.weights, second.network.dynamics.weights, strict=True):
        assert (ours != others).flatten(1).any(dim=1).all()


def test_dynamics_are_the_same_with_and_without_a_reward(member_class, linear_system):
    transitions = linear_system(200)
    without = train(small_config(member_class), transitions)
    with_reward = train(small_config(member_class, learn_reward=True), transitions)

    names = dict(without.network.dynamics.named_parameters()).keys()
    assert names
    for name in names:
        first, second = (dict(each.network.dynamics.named_parameters())[name] for each in (without, with_reward))
        assert torch.equal(first, second), name
    if member_class is ProbabilisticModel:
        assert torch.equal(without.network.max_logvar, with_reward.network.max_logvar)


def test_linear_system_is_learned_to_near_zero_error(member_class, linear_system):
    transitions, holdout = linear_system(1000), linear_system(200, seed=1)
    settings = {"ensemble_size": 2, "hidden_size": (), "fit_epochs": 30, "batch_size": 20, "fit_lr": 0.05}
    config = small_config(member_class, **settings)
    ensemble = build_ensemble(config, transitions)
    held_out = ensemble.normalise(holdout)
    before = ensemble.network.score(held_out)["mse"]

    train_ensemble(ensemble, config, ensemble.normalise(transitions), None, NullTracker())

    assert min(before) > 0.1
    assert max(ensemble.network.score(held_out)["mse"]) < 1e-8
    for member in ensemble.members():  # in raw units too, dimension by dimension
        error = np.abs(member.predict(holdout.states, holdout.actions) - holdout.next_states).mean(axis=0)
        assert (error < 1e-3 * np.abs(holdout.next_states - holdout.states).mean(axis=0)).all()


def test_deep_networks_learn_it_too_and_the_reward(member_class, linear_system):
    transitions, holdout = linear_system(1000), linear_system(200, seed=1)
    settings = {"hidden_size": (32, 32), "ensemble_size": 2, "fit_epochs": 30, "learn_reward": True, "fit_lr": 0.01}
    config = small_config(member_class, batch_size=32, reward_hidden_size=(32,), **settings)
    ensemble = train(config, transitions, holdout)

    score = ensemble.network.score(ensemble.normalise(holdout))
    assert max(score["mse"]) < 0.01
    assert max(score["reward_mse"]) < 0.02
    for member in ensemble.members():
        predicted = member.predict_reward(holdout.states, holdout.actions, holdout.next_states)
        assert np.abs(predicted - holdout.rewards).mean() < 0.25 < np.abs(holdout.rewards).mean()


def test_weights_kept_are_those_that_scored_best_for_each_member(linear_system):
    """A rate that ends far too high: later epochs are worse, and each member goes back to its own best one."""
    transitions, holdout = linear_system(100, noise=0.5), linear_system(50, noise=0.5, seed=1)
    config = small_config(DeterministicModel, fit_epochs=12, fit_lr=0.03, scheduler=None, batch_size=25)
    ensemble = build_ensemble(config, transitions)
    held_out = ensemble.normalise(holdout)
    epochs = []

    class Recorder(NullTracker):
        def log_epoch(self, epoch, rows):
            epochs.append([row["val_mse"] for row in rows])

    train_ensemble(ensemble, config, ensemble.normalise(transitions), held_out, Recorder())

    scores = np.array(epochs)
    assert len(set(scores.argmin(axis=0))) > 1 and (scores.argmin(axis=0) < 11).any()
    np.testing.assert_allclose(ensemble.network.score(held_out)["mse"], scores.min(axis=0), rtol=1e-6)


def test_elites_are_the_members_with_the_lowest_validation_error():
    scores = [{"val_mse": value} for value in (0.3, 0.1, 0.2)]
    assert rank_elites(scores, None) == [1, 2, 0]
    assert rank_elites(scores, 2) == [1, 2]
    assert rank_elites([{"val_mse": None}] * 3, 2) == [0, 1, 2], "without a holdout every member is one"


# --- A member: what planners call ---

LEADING = [(), (1,), (7,), (1000,), (2, 3), (0,)]


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_member_takes_any_leading_axes_of_arrays_and_tensors(member_class, random_member, leading, as_array):
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
def test_member_takes_arrays_of_other_types(member_class, random_member, dtype):
    member = random_member(member_class)
    states, actions = np.round(draw_rows(4)[0]), np.round(draw_rows(4)[1])

    expected, predicted = member.predict(states, actions), member.predict(states.astype(dtype), actions.astype(dtype))

    np.testing.assert_array_equal(predicted, expected)


def test_inputs_are_not_changed(member_class, random_member):
    member = random_member(member_class)
    states, actions = (torch.as_tensor(part) for part in draw_rows(4))
    kept = states.clone(), actions.clone()
    member(states, actions)
    member.predict(states, actions)
    assert torch.equal(states, kept[0]) and torch.equal(actions, kept[1])


def test_nn_is_the_module_that_planners_look_for(member_class, random_member):
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


def test_evaluation_mode_changes_nothing(member_class, random_member):
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


def test_inputs_are_moved_to_the_device(member_class, random_member):
    member = random_member(member_class).to("meta")
    for prediction in as_tuple(member(*draw_rows(5))):
        assert prediction.device.type == "meta" and prediction.shape == (5, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_member_and_ensemble_predict_the_same_on_cuda(member_class, random_member):
    states, actions = draw_rows(50)
    member = random_member(member_class)
    expected = member.predict(states, actions)

    assert member.to("cuda:0").device == "cuda:0"
    np.testing.assert_allclose(member.predict(states, actions), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(member.predict_batched(states, actions, 7), expected, rtol=1e-3, atol=1e-4)
    ensemble = DynamicsEnsemble([random_member(member_class)] * 2).to("cuda:0")
    assert ensemble.device == "cuda:0"
    assert ensemble.rollout(states, np.stack([actions] * 3, axis=1), "ts1").device.type == "cuda"


def test_predict_is_the_mean_as_numpy(member_class, random_member):
    member = random_member(member_class)
    states, actions = draw_rows(2, 3)

    predicted = member.predict(states, actions)

    assert type(predicted) is np.ndarray and predicted.dtype == np.float32 and predicted.shape == (2, 3, 3)
    np.testing.assert_array_equal(predicted, as_tuple(member(states, actions))[0].detach().numpy())


@pytest.mark.parametrize("batch_size", [1, 3, 10, 256])
def test_batches_hold_every_row_whatever_their_size(member_class, random_member, batch_size):
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


def test_no_rows_are_no_predictions(member_class, random_member):
    assert random_member(member_class).predict_batched(*draw_rows(0)).shape == (0, 3)


def test_gradients_reach_the_inputs(member_class, random_member):
    member = random_member(member_class)
    states, actions = (torch.as_tensor(part).requires_grad_() for part in draw_rows(4))

    sum(part.sum() for part in as_tuple(member(states, actions))).backward()

    assert states.grad.shape == (4, 3) and actions.grad.shape == (4, 2)
    assert (actions.grad != 0).any(dim=1).all()


def test_jacobian_agrees_with_finite_differences(member_class, random_member):
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


def test_vmap_equals_a_loop_also_around_a_jacobian(member_class, random_member):
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
def test_rewards_have_the_leading_axes(member_class, random_member, leading):
    states, actions = draw_rows(*leading)
    assert random_member(member_class, reward=True).predict_reward(states, actions, states + 1).shape == leading


def test_reward_that_was_not_learned_is_an_error(member_class, random_member):
    states, actions = draw_rows(4)
    with pytest.raises(ValueError, match=r"learned no reward; train one with --params learn_reward=true"):
        random_member(member_class).predict_reward(states, actions, states)


# --- Pickled members ---


def plain_parts(value):
    """Every value inside nested plain containers, containers included."""
    yield value
    for part in (*value.keys(), *value.values()) if type(value) is dict else value if type(value) is list else ():
        yield from plain_parts(part)
    if type(value) is tuple:
        for part in value:
            yield from plain_parts(part)


def test_state_is_plain_python_all_the_way_down(member_class, random_member):
    member = random_member(member_class, reward=True)
    member.holdout_idx = np.array([3, 5])

    types = {type(part) for part in plain_parts(member.__getstate__())}

    assert types <= {dict, list, tuple, str, bytes, int, float, bool, type(None)}
    assert {dict, bytes, int} <= types


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_member_comes_back_to_the_bit(member_class, random_member, protocol):
    member = random_member(member_class, reward=True, layer_norm=True, activation_fn="tanh")
    states, actions = draw_rows(7)

    loaded = pickle.loads(pickle.dumps(member, protocol))

    assert type(loaded) is member_class
    assert_same_weights(member, loaded)
    assert loaded.network.architecture == member.network.architecture
    for before, after in zip(as_tuple(member(states, actions)), as_tuple(loaded(states, actions)), strict=True):
        assert torch.equal(before, after)


def test_loaded_member_is_for_use_and_can_be_trained_further(member_class, random_member):
    member = random_member(member_class).to("cpu").train()
    loaded = pickle.loads(pickle.dumps(member))

    assert loaded.device == "cpu" and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.requires_grad_(True)
    sum(part.sum() for part in as_tuple(loaded(*draw_rows(2)))).backward()
    assert loaded.network.dynamics.weights[0].grad is not None


def test_members_of_one_file_share_nothing(member_class, random_member):
    ensemble = DynamicsEnsemble([random_member(member_class, member) for member in range(2)])
    ensemble.holdout_idx = np.arange(3)
    first, second = pickle.loads(pickle.dumps(ensemble.members()))
    untouched = {name: tensor.clone() for name, tensor in second.state_dict().items()}

    for tensor in first.state_dict().values():
        tensor.fill_(7.0)
    first.holdout_idx[:] = 9

    assert all(torch.equal(tensor, untouched[name]) for name, tensor in second.state_dict().items())
    assert second.holdout_idx.tolist() == [0, 1, 2]


def test_held_out_rows_are_absent_where_nothing_was_held_out(member_class, random_member):
    member = random_member(member_class)
    assert not hasattr(member, "holdout_idx")
    assert not hasattr(pickle.loads(pickle.dumps(member)), "holdout_idx")
    (from_ensemble,) = DynamicsEnsemble([member]).members()
    assert not hasattr(from_ensemble, "holdout_idx")


def test_held_out_rows_stay_with_every_member(member_class, random_member):
    members = [random_member(member_class, member) for member in range(3)]
    ensemble = DynamicsEnsemble(members)
    ensemble.holdout_idx = np.array([2, 5, 11])

    for member in pickle.loads(pickle.dumps(ensemble.members())):
        assert member.holdout_idx.tolist() == [2, 5, 11]
        assert member.holdout_idx.dtype == np.int64 and member.holdout_idx.ndim == 1
    assert DynamicsEnsemble(ensemble.members()).holdout_idx.tolist() == [2, 5, 11]
    first, second, _ = ensemble.members()
    first.holdout_idx[:] = 0
    assert second.holdout_idx.tolist() == ensemble.holdout_idx.tolist() == [2, 5, 11], "each has a copy of its own"


# --- model.pkl ---

METADATA = {
    "format_version": 1,
    "kind": "deterministic",
    "seed": 3,
    "elites": [0, 1],
    "scores": [{"val_mse": None}] * 2,
}


@pytest.fixture
def model_file(member_class, random_member, tmp_path):
    """A file as training writes it: two members with reward and held-out rows."""
    ensemble = DynamicsEnsemble([random_member(member_class, member, reward=True) for member in range(2)])
    ensemble.holdout_idx = np.array([1, 4])
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps((ensemble.members(), METADATA)))
    return path


FRESH_PROCESS = """
import json, pickle, sys
import numpy as np
folder, model, inputs, outputs = sys.argv[1:]
sys.path.insert(0, folder)
with open(model, "rb") as file:
    models, metadata = pickle.load(file)
rows = np.load(inputs)
results = {}
for index, member in enumerate(models):
    for n in (1, 7, 1000):
        s, a, sp = rows["states"][:n], rows["actions"][:n], rows["next_states"][:n]
        member.nn.eval()
        prediction = member.nn(s, a)
        for part, values in enumerate(prediction if isinstance(prediction, tuple) else (prediction,)):
            results[f"{index}/{n}/forward{part}"] = values.detach().cpu().numpy()
        results[f"{index}/{n}/predict"] = member.predict(s, a)
        results[f"{index}/{n}/predict_batched"] = member.predict_batched(s, a, batch_size=64)
        results[f"{index}/{n}/loss"] = member.compute_loss_batched(s, a, sp)
        results[f"{index}/{n}/reward"] = member.predict_reward(s, a, sp)
    assert member.to("cpu") is member and member.device == "cpu"
    assert len(list(member.nn.parameters())) > 0 and len(member.nn.state_dict()) > 0
    results[f"{index}/holdout_idx"] = member.holdout_idx
import dynamics_model
ensemble = dynamics_model.load_ensemble(model)
results["ensemble"] = ensemble.predict(rows["states"], rows["actions"])[0].detach().numpy()
np.savez(outputs, **results)
project = [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(folder)]
print(json.dumps({"types": [type(models).__name__, type(metadata).__name__], "metadata": metadata, "modules": project}))
"""


def test_file_serves_a_fresh_process_that_has_only_the_three_modules(model_file, tmp_path):
    folder = tmp_path / "downstream"
    folder.mkdir()
    for module in MODULES:
        shutil.copy(ROOT / f"{module}.py", folder)
    states, actions = draw_rows(1000)
    np.savez(tmp_path / "inputs.npz", states=states, actions=actions, next_states=states + 1)

    arguments = [folder, model_file, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    command = [
        sys.executable,
        "-I",
        "-c",
        FRESH_PROCESS,
        *map(str, arguments),
    ]  # -I: neither this folder nor PYTHONPATH
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert process.returncode == 0, process.stderr
    printed = json.loads(process.stdout)
    assert printed["types"] == ["list", "dict"]
    assert printed["metadata"] == METADATA
    needed = {"dynamics_model", "deterministic_model", "probabilistic_model"}
    assert {"dynamics_model"} < set(printed["modules"]) <= needed
    there = np.load(tmp_path / "outputs.npz")
    here, _ = load_models(model_file)
    for index, member in enumerate(here):
        assert there[f"{index}/holdout_idx"].tolist() == [1, 4]
        for n in (1, 7, 1000):
            s, a, sp = states[:n], actions[:n], states[:n] + 1
            expected = {f"forward{part}": values.numpy() for part, values in enumerate(as_tuple(member(s, a)))}
            expected |= {"predict": member.predict(s, a), "predict_batched": member.predict_batched(s, a, 64)}
            expected |= {"loss": member.compute_loss_batched(s, a, sp), "reward": member.predict_reward(s, a, sp)}
            for name, values in expected.items():
                got = there[f"{index}/{n}/{name}"]
                assert got.shape == np.shape(values)
                np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-5, err_msg=name)
    assert there["ensemble"].shape == (2, 1000, 3)


def test_model_modules_import_pytorch_numpy_and_each_other_only():
    for module in MODULES:
        nodes = list(ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom)), "no relative imports"
        others = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
        assert others <= {"torch", "numpy", *MODULES}, module
        assert "torch" in others


def test_loading_gives_members_and_metadata_as_pickle_does(model_file, member_class):
    models, metadata = load_models(model_file)
    with model_file.open("rb") as file:
        by_pickle, same_metadata = pickle.load(file)

    assert (type(models), type(metadata)) == (list, dict)
    assert [type(model) for model in models] == [member_class] * 2
    assert metadata == same_metadata == METADATA
    for ours, theirs in zip(models, by_pickle, strict=True):
        assert_same_weights(ours, theirs)


def test_loaded_ensemble_holds_the_members_of_the_file(model_file):
    ensemble = load_ensemble(model_file, device="cpu")
    models, _ = load_models(str(model_file))

    assert len(ensemble) == 2 and ensemble.device == "cpu"
    assert ensemble.holdout_idx.tolist() == [1, 4]
    for member, stored in zip(ensemble.members(), models, strict=True):
        assert_same_weights(member, stored)
    assert load_ensemble(model_file, device="meta").device == "meta"


def test_loaded_ensemble_samples_by_the_seed_of_its_run(random_member, tmp_path):
    members, path = [random_member(ProbabilisticModel, member) for member in range(2)], tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps((members, METADATA)))

    loaded, fresh = load_ensemble(path), DynamicsEnsemble(members, seed=METADATA["seed"])

    assert torch.equal(loaded.sample(*draw_rows(5)), fresh.sample(*draw_rows(5)))


def test_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        load_ensemble(tmp_path / "nowhere.pkl")


class Call:
    """Pickles as a call of a function, as a hostile file would."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_storage(canary):
    """A call of PyTorch's own unpickler on a hostile pickle, which ``weights_only=False`` would run."""
    stream = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), stream)
    return Call(torch.storage._load_from_bytes, stream.getvalue())


HOSTILE = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"open({str(canary)!r}, 'w')"),
    "exec": lambda canary: Call(exec, f"open({str(canary)!r}, 'w')"),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "torch_storage": torch_storage,
}


@pytest.mark.parametrize("place", ["alone", "beside members", "in metadata", "in a member"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_file_is_refused_before_anything_runs(attack, place, random_member, tmp_path, monkeypatch):
    path, canary = tmp_path / "model.pkl", tmp_path / "canary"
    member, hostile = random_member(DeterministicModel), HOSTILE[attack](canary)
    if place == "in a member":
        state = DeterministicModel.__getstate__
        monkeypatch.setattr(DeterministicModel, "__getstate__", lambda self: state(self) | {"holdout_idx": hostile})
    contents = {
        "alone": hostile,
        "beside members": ([member, hostile], METADATA),
        "in metadata": ([member], METADATA | {"git_commit": hostile}),
        "in a member": ([member], METADATA),
    }
    path.write_bytes(pickle.dumps(contents[place]))

    for load in (load_models, load_ensemble):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load(path)
    assert not canary.exists()


@pytest.mark.parametrize("attack", HOSTILE)
def test_attack_of_the_test_above_is_real(attack, tmp_path):
    pickle.loads(pickle.dumps(HOSTILE[attack](tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("dynamics_model", "DynamicsModel"),
        ("dynamics_model", "os.system"),
        ("dynamics_model", "load_ensemble"),
        ("deterministic_model", "DynamicsNetwork"),
        ("deterministic_model", "DeterministicModel.__init__"),
        ("builtins", "getattr"),
        ("functools", "partial"),
        ("numpy", "load"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("learn_model", "main"),
    ],
)
def test_no_name_but_the_member_classes_is_admitted(module, name, tmp_path):
    path = tmp_path / "model.pkl"
    named = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    path.write_bytes(b"\x80\x04" + named + b"\x93.")  # STACK_GLOBAL: nothing but the name is in the file
    with pytest.raises(ValueError, match=f"it names {re.escape(module)}.{re.escape(name)}, which no model holds"):
        load_models(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_file_that_is_cut_off_is_refused(model_file, share):
    content = model_file.read_bytes()
    model_file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"is not a model that learn_model.py wrote .*; expected a model\.pkl"):
        load_ensemble(model_file)


@pytest.mark.parametrize(
    "content", [b"not a pickle", b"\x89HDF\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(50), b"."]
)
def test_file_that_is_no_pickle_is_refused(tmp_path, content):
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a model\.pkl"):
        load_ensemble(tmp_path / "model.pkl")


@pytest.mark.parametrize(
    "content", [5, [], {}, (), ([], METADATA), ([1, 2], METADATA), (None, METADATA), (["a.hdf5"], {})]
)
def test_pickle_that_holds_something_else_is_refused(tmp_path, content):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(tmp_path / "model.pkl")


@pytest.mark.parametrize("metadata", [None, 5, "metadata"])
def test_members_with_metadata_of_another_type_are_refused(model_file, metadata):
    members, _ = load_models(model_file)
    model_file.write_bytes(pickle.dumps((members, metadata)))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_models(model_file)


def change_state(monkeypatch, member_class, change):
    """Makes members pickle a state that ``change`` has altered."""
    state = member_class.__getstate__

    def altered(self):
        plain = state(self)
        change(plain)
        return plain

    monkeypatch.setattr(member_class, "__getstate__", altered)


def test_other_format_version_is_refused_with_both_numbers(member_class, random_member, tmp_path, monkeypatch):
    change_state(monkeypatch, member_class, lambda state: state.update(format_version=2))
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(([random_member(member_class)], METADATA)))

    with pytest.raises(ValueError, match="format version 2, expected 1; load it with the release that wrote it"):
        load_ensemble(path)
    with pytest.raises(ValueError, match="format version 2, expected 1"):
        pickle.loads(path.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["tensors"].pop("delta_scale"),
        lambda state: state["tensors"].pop("dynamics.weights.0"),
        lambda state: state["tensors"]["dynamics.weights.0"].update(shape=[1, 5, 9]),
        lambda state: state["tensors"]["dynamics.weights.0"].update(bytes=b"1234"),
        lambda state: state["tensors"]["dynamics.weights.0"].update(dtype="|O"),
        lambda state: state["architecture"].update(hidden_size=(9,)),
        lambda state: state["architecture"].update(activation_fn="sine"),
        lambda state: state["architecture"].update(unheard_of=1),
        lambda state: state.pop("architecture"),
    ],
)
def test_damaged_member_is_refused(damage, random_member, tmp_path, monkeypatch):
    change_state(monkeypatch, DeterministicModel, damage)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(([random_member(DeterministicModel)], METADATA)))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(path)


# --- The ensemble ---


@pytest.fixture
def ensemble_of(random_member):
    """Returns a function that builds an ensemble of untrained members; also the members."""

    def build(kind, size=3, seed=0, **options):
        members = [random_member(kind, member, **options) for member in range(size)]
        return DynamicsEnsemble(members, seed), members

    return build


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_ensemble_predicts_what_its_members_predict(member_class, ensemble_of, leading):
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


def test_each_member_predicts_its_own_rows(member_class, ensemble_of):
    ensemble, members = ensemble_of(member_class)
    states, actions = draw_rows(3, 5)

    mean, variance = ensemble.predict_each(states, actions)

    assert mean.shape == (3, 5, 3) and (variance is None or variance.shape == (3, 5, 3))
    for index, member in enumerate(members):
        expected = as_tuple(member(states[index], actions[index]))[0]
        torch.testing.assert_close(mean[index], expected, rtol=1e-5, atol=1e-5)


def test_ensemble_gives_back_the_members_it_was_built_from(member_class, ensemble_of):
    ensemble, members = ensemble_of(member_class, reward=True, layer_norm=True)
    returned = ensemble.members()

    assert [type(member) for member in returned] == [member_class] * 3
    for built_from, given_back in zip(members, returned, strict=True):
        assert_same_weights(built_from, given_back)


def test_members_and_ensemble_share_no_weights(member_class, ensemble_of):
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
    assert ensemble.member_class is member_class


def test_ensemble_needs_a_member():
    with pytest.raises(ValueError, match="at least one member, got none"):
        DynamicsEnsemble([])


def test_members_of_two_kinds_are_not_stacked(random_member):
    members = [random_member(DeterministicModel), random_member(DeterministicModel), random_member(ProbabilisticModel)]
    with pytest.raises(ValueError, match="member 2 differs from member 0 in kind or architecture"):
        DynamicsEnsemble(members)


@pytest.mark.parametrize("options", [{"hidden_size": (8, 7)}, {"activation_fn": "relu"}, {"layer_norm": True}])
def test_members_of_two_architectures_are_not_stacked(member_class, random_member, options):
    with pytest.raises(ValueError, match="member 1 differs from member 0 in kind or architecture"):
        DynamicsEnsemble([random_member(member_class), random_member(member_class, **options)])


@pytest.mark.parametrize("name", ["input_shift", "input_scale", "delta_shift", "delta_scale", "reward_scale"])
def test_members_of_two_normalisations_are_not_stacked(member_class, constant_member, name):
    other = constant_member(member_class, [0.0, 0.0])
    getattr(other.network, name).mul_(2).add_(1)
    with pytest.raises(ValueError, match="member 1 was normalised differently from member 0"):
        DynamicsEnsemble([constant_member(member_class, [0.0, 0.0]), other])


def test_sample_of_point_predictions_is_the_prediction(ensemble_of):
    ensemble, _ = ensemble_of(DeterministicModel)
    states, actions = draw_rows(2, 4)
    assert torch.equal(ensemble.sample(states, actions), ensemble.predict(states, actions)[0])


def test_samples_are_repeated_by_the_seed_and_differ_from_each_other(ensemble_of):
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

    three, one = DynamicsEnsemble(members).sample(*rows), DynamicsEnsemble(members[:1]).sample(*rows)

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
        return DynamicsEnsemble([constant_member(kind, change, variance, **scales) for change, variance in pairs])

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


def test_one_member_agrees_with_itself(constant_member):
    ensemble = DynamicsEnsemble([constant_member(DeterministicModel, [3.0, 4.0])])
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
        return DynamicsEnsemble(members, seed)

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

    trajectory = DynamicsEnsemble([member]).rollout(np.array([[8.0]]), np.array([[[0.0], [2.0], [4.0]]]), propagation)

    assert trajectory.flatten().tolist() == [8.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_dealt_members_draw_from_their_own_distribution(constant_member, propagation):
    """Each row's first step has the variance of the member it was dealt to, which its mean tells apart."""
    changes, variances = ([0.0], [100.0]), ([1.0], [9.0])
    pairs = zip(changes, variances, strict=True)
    ensemble = DynamicsEnsemble([constant_member(ProbabilisticModel, *pair) for pair in pairs])

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
    first, again, other = (DynamicsEnsemble(members, seed) for seed in (0, 0, 1))

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


def test_rollouts_keep_no_graph(member_class, ensemble_of):
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


@pytest.mark.parametrize(
    "metadata", [{}, {"seed": "x"}, {"seed": -1}, {"seed": None}, {"seed": 0, "format_version": 99}], ids=str
)
def test_metadata_that_cannot_be_used_is_refused(random_member, tmp_path, metadata):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(([random_member(DeterministicModel)], {"format_version": 1} | metadata)))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(path)


def test_member_without_a_state_is_refused(tmp_path):
    path = tmp_path / "model.pkl"
    # NEWOBJ without BUILD: an instance whose __setstate__ is never called, in a list, with {"seed": 0}
    named = b"\x8c\x13deterministic_model\x8c\x12DeterministicModel\x93"
    path.write_bytes(b"\x80\x04]" + named + b")\x81a}\x8c\x04seedK\x00s\x86.")
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(path)


def test_small_units_keep_their_variance(constant_member):
    """A dimension in units a million times larger has a variance 10^12 times smaller, and the same relative one."""
    member = constant_member(ProbabilisticModel, [0.0], [0.01], delta_scale=[1e-6])
    _, variance = member(np.zeros(1), np.zeros(1))
    assert variance.item() == pytest.approx(0.01 * 1e-12, rel=1e-4)
    ensemble = DynamicsEnsemble([member])
    measured = ensemble.disagreement(np.zeros((1, 1)), np.zeros((1, 1)), "max_aleatoric", normalised=True)
    assert measured.item() == pytest.approx(0.1, rel=1e-4)


def test_two_kinds_start_with_the_same_reward_network(random_member):
    point, gaussian = (
        random_member(kind, reward=True).network.reward for kind in (DeterministicModel, ProbabilisticModel)
    )
    assert point.weights[0].abs().max() > 0
    assert torch.equal(point.weights[0], gaussian.weights[0])


@pytest.mark.parametrize(("states", "actions"), [((4, 1), (4, 4)), ((4, 2), (4, 3)), ((4, 3), (4, 1)), ((4, 3), (2,))])
def test_arrays_of_the_wrong_width_are_refused(member_class, random_member, states, actions):
    with pytest.raises(ValueError):
        random_member(member_class).predict(np.zeros(states), np.zeros(actions))


@pytest.mark.parametrize("truth", [(3,), (1, 3), (4, 1)])
def test_loss_against_a_truth_of_another_shape_is_refused(member_class, random_member, truth):
    with pytest.raises(ValueError):
        random_member(member_class).compute_loss_batched(np.zeros((4, 3)), np.zeros((4, 2)), np.zeros(truth))


def test_rollout_with_actions_of_the_wrong_width_is_refused(counting_ensemble):
    with pytest.raises(ValueError):
        counting_ensemble().rollout(np.zeros((4, 2)), np.zeros((4, 5, 3)))


@pytest.mark.filterwarnings("error")
def test_arrays_that_cannot_be_written_to_are_taken_without_a_warning(member_class, random_member):
    states, actions = draw_rows(4)
    states.flags.writeable = False
    random_member(member_class).predict(states, actions)
