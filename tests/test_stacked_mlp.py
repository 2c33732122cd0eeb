"""StackedMLP: every member is a network of PyTorch's own layers, in values, derivatives and initial weights."""

import pytest
import torch
from torch import nn

from deterministic_model import DeterministicModel
from dynamics_model import StackedMLP, stacked_linear
from probabilistic_model import ProbabilisticModel

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


# --- Transforms of torch.func ---


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, 0, 2), (0, 0, 0)])
def test_vmap_of_a_product_is_a_loop(in_dims):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3), (2, 3, 5), (2, 1, 5)]  # inputs, weight and bias of 2 members
    parts = [
        torch.randn(shape, generator=generator)
        if dim is None
        else torch.stack([torch.randn(shape, generator=generator) for _ in range(3)], dim=dim)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]

    mapped = torch.func.vmap(stacked_linear, in_dims)(*parts)

    for index in range(3):
        own = [part if dim is None else part.select(dim, index) for part, dim in zip(parts, in_dims, strict=True)]
        inputs, weight, bias = own
        torch.testing.assert_close(mapped[index], inputs @ weight + bias)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer_norm"])
def test_derivatives_of_a_member_are_those_of_layers_of_pytorch(transform, layer_norm):
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(2, 4, (8, 8), 2, 1, "silu", layer_norm, generator)
    inputs = torch.randn(5, 4, generator=generator)

    for member in range(2):
        reference = reference_of(stack, member, "silu", layer_norm)
        ours = transform(lambda shift, member=member: stack((inputs + shift).expand(2, -1, -1))[member].square().sum())
        theirs = transform(lambda shift, reference=reference: reference(inputs + shift).square().sum())
        torch.testing.assert_close(ours(torch.zeros(4)), theirs(torch.zeros(4)), rtol=1e-4, atol=1e-5)


def test_second_derivatives_reach_the_weights():
    """A penalty on the slope, as it regularises networks."""
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(1, 3, (6,), 2, 1, "tanh", False, generator)
    reference, inputs = reference_of(stack, 0, "tanh", False), torch.randn(5, 3, generator=generator)

    for network, batch in ((stack, inputs[None]), (reference, inputs)):
        batch.requires_grad_()
        (slope,) = torch.autograd.grad(network(batch).sum(), batch, create_graph=True)
        slope.square().sum().backward()

    torch.testing.assert_close(stack.weights[0].grad[0], reference[0].weight.grad.T)


# --- Initial weights ---


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


def test_two_kinds_start_with_the_same_reward_network(random_member):
    point, gaussian = (
        random_member(kind, reward=True).network.reward for kind in (DeterministicModel, ProbabilisticModel)
    )
    assert point.weights[0].abs().max() > 0
    assert torch.equal(point.weights[0], gaussian.weights[0])
