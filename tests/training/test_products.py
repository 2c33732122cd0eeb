"""products: each library's products and their derivatives, and the ways to multiply as text and in effect."""

import pytest
import torch
from threadpoolctl import threadpool_info

from config import LearnConfig
from dynamics_model import stacked_linear
from training import products
from training.products import (
    Products,
    default_products,
    has_onednn,
    has_openblas,
    onednn_linear,
    openblas_linear,
    possible_products,
)
from utils import InputError

SIDE = products._ONEDNN_SIDE
NEEDS_ONEDNN = pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN linear layer")
LIBRARIES = pytest.mark.parametrize("linear", [pytest.param(onednn_linear, marks=NEEDS_ONEDNN), openblas_linear])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

# --- Libraries ---


def operands(ensemble=2):
    """Inputs, weight and bias that oneDNN multiplies, all sides different."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ensemble, SIDE, SIDE + 8), (ensemble, SIDE + 8, SIDE + 16), (ensemble, 1, SIDE + 16)
    return tuple(torch.randn(shape, generator=generator) / 10 for shape in shapes)


@LIBRARIES
@pytest.mark.parametrize("ensemble", [1, 3])
def test_large_products_are_the_library_s_and_right(linear, ensemble):
    inputs, weight, bias = operands(ensemble)
    out = linear(inputs, weight.requires_grad_(), bias)

    assert "LibraryLinear" in out.grad_fn.name()
    expected = stacked_linear(*(part.detach().double() for part in (inputs, weight, bias)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(inputs, weight), torch.bmm(inputs, weight), **CLOSE)


@pytest.mark.parametrize(
    ("linear", "change"),
    [
        *((onednn_linear, change) for change in ("few rows", "few inputs", "few outputs", "float64", "meta")),
        *((openblas_linear, change) for change in ("float64", "meta")),
    ],
)
def test_other_products_are_pytorch_s_own(linear, change):
    inputs, weight, bias = operands()
    if change == "few rows":
        inputs = inputs[:, : SIDE - 1]
    elif change == "few inputs":
        inputs, weight = inputs[..., : SIDE - 1], weight[:, : SIDE - 1]
    elif change == "few outputs":
        weight, bias = weight[..., : SIDE - 1], bias[..., : SIDE - 1]
    elif change == "float64":
        inputs, weight, bias = inputs.double(), weight.double(), bias.double()
    else:  # another device than the CPU
        inputs, weight, bias = inputs.to("meta"), weight.to("meta"), bias.to("meta")
    out = linear(inputs, weight.requires_grad_(), bias)

    assert "LibraryLinear" not in out.grad_fn.name()
    expected = stacked_linear(inputs, weight, bias)
    assert out.shape == expected.shape and (change == "meta" or torch.equal(out, expected))


@LIBRARIES
@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_of_those_who_need_them(linear, needed):
    cotangent = torch.randn(2, SIDE, SIDE + 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (linear, stacked_linear):
        parts = [part.requires_grad_(need) for part, need in zip(operands(), needed, strict=True)]
        function(*parts).backward(cotangent)
        gradients.append([part.grad for part in parts])

    for ours, expected, need in zip(*gradients, needed, strict=True):
        assert (ours is not None) == need
        if need:
            torch.testing.assert_close(ours, expected, **CLOSE)


@LIBRARIES
def test_gradients_without_a_bias(linear):
    weights = []
    for function in (linear, stacked_linear):
        inputs, weight, _ = operands()
        function(inputs, weight.requires_grad_()).square().sum().backward()
        weights.append(weight.grad)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-3)


@LIBRARIES
def test_inputs_that_members_share_and_transposed_weights(linear):
    inputs, weight, bias = operands()
    shared = inputs[:1].expand(2, -1, -1)
    turned = weight.mT.contiguous().mT
    assert shared.stride(0) == 0
    assert not turned.is_contiguous()

    torch.testing.assert_close(linear(shared, turned, bias), stacked_linear(shared, weight, bias), **CLOSE)


@LIBRARIES
def test_second_derivatives_are_refused_rather_than_wrong(linear):
    inputs, weight, bias = operands()
    inputs.requires_grad_()
    (slope,) = torch.autograd.grad(linear(inputs, weight, bias).tanh().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


# --- Ways to multiply ---


@pytest.fixture
def two_threads():
    """PyTorch has two threads in the test, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_way_is_read_as_it_is_written(two_threads):
    ways = possible_products(members=7)
    assert len(ways) == len(set(ways)) >= 3
    for way in ways:
        assert Products.parse(str(way)) == way
        assert LearnConfig(products=str(way)).products == str(way)


@pytest.mark.parametrize("text", ["torch", "torch/apart", "mkl/apart/2", "torch/apart/0", "torch/apart/2/3", ""])
def test_other_ways_are_refused(text):
    with pytest.raises(InputError, match="LIBRARY/GROUPING/THREADS"):
        LearnConfig(products=text)


def test_the_default_comes_first_and_libraries_that_are_missing_are_not_tried(two_threads, monkeypatch):
    assert possible_products(members=7)[0] == default_products() == Products("torch", "together", 2)
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    monkeypatch.setattr(products, "has_openblas", lambda: False)
    assert {way.library for way in possible_products(members=7)} == {"torch"}
    assert {way.grouping for way in possible_products(members=1)} == {"together"}


def test_no_more_threads_have_members_of_their_own_than_there_are_members(two_threads):
    torch.set_num_threads(8)
    assert {way.threads for way in possible_products(members=3) if way.grouping == "apart"} == {3}


@pytest.mark.parametrize(("grouping", "threads", "group"), [("together", 2, 7), ("apart", 2, 3), ("apart", 9, 1)])
def test_members_of_a_group(grouping, threads, group):
    assert Products("torch", grouping, threads).members_per_group(7) == group


@pytest.mark.skipif(not has_openblas(), reason="NumPy multiplies with another library")
def test_openblas_multiplies_in_one_thread_while_in_effect(two_threads):
    def of_openblas():
        return {each["num_threads"] for each in threadpool_info() if each["internal_api"] == "openblas"}

    before = of_openblas()
    with Products("openblas", "apart", 2).in_effect():
        assert of_openblas() == {1}
    assert of_openblas() == before


def test_threads_are_as_before_even_if_training_fails(two_threads):
    with pytest.raises(FloatingPointError), Products("torch", "together", 1).in_effect():
        assert torch.get_num_threads() == 1
        raise FloatingPointError
    assert torch.get_num_threads() == 2
