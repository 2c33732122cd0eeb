from pathlib import Path

import pytest
import torch
from torch import Tensor

import dynamics_model
from dynamics_model import StackedMLP, stacked_linear

SIDE = dynamics_model._ONEDNN_SIDE
NEEDS_ONEDNN = pytest.mark.skipif(not dynamics_model._HAS_ONEDNN, reason="this PyTorch has no oneDNN linear layer")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def onednn_wherever_there_is_one(monkeypatch):
    """Tests oneDNN's products on processors, too, where others are faster."""
    monkeypatch.setattr(dynamics_model, "USES_ONEDNN", dynamics_model._HAS_ONEDNN)


def operands(ensemble: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weight and bias that oneDNN multiplies, all sides different."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ensemble, SIDE, SIDE + 8), (ensemble, SIDE + 8, SIDE + 16), (ensemble, 1, SIDE + 16)
    return tuple(torch.randn(shape, generator=generator) / 10 for shape in shapes)


def reference(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by PyTorch's batched product."""
    return torch.baddbmm(bias, inputs, weight)


@NEEDS_ONEDNN
@pytest.mark.parametrize("ensemble", [1, 3])
def test_large_products_are_onednn_s_and_right(ensemble):
    inputs, weight, bias = operands(ensemble)
    out = stacked_linear(inputs, weight.requires_grad_(), bias)

    assert "OneDnn" in out.grad_fn.name()
    expected = reference(*(part.detach().double() for part in (inputs, weight, bias)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stacked_linear(inputs, weight), torch.bmm(inputs, weight), **CLOSE)


@pytest.mark.parametrize("change", ["thin", "float64"])
def test_thin_and_float64_products_are_pytorch_s_own(change):
    inputs, weight, bias = operands()
    if change == "thin":
        inputs, weight = inputs[..., :8], weight[:, :8]
    else:
        inputs, weight, bias = inputs.double(), weight.double(), bias.double()
    out = stacked_linear(inputs, weight.requires_grad_(), bias)

    assert "OneDnn" not in out.grad_fn.name()
    assert torch.equal(out, reference(inputs, weight, bias))


@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_of_those_who_need_them(needed):
    cotangent = torch.randn(2, SIDE, SIDE + 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (stacked_linear, reference):
        parts = [part.requires_grad_(need) for part, need in zip(operands(), needed, strict=True)]
        function(*parts).backward(cotangent)
        gradients.append([part.grad for part in parts])

    for ours, expected, need in zip(*gradients, needed, strict=True):
        assert (ours is not None) == need
        if need:
            torch.testing.assert_close(ours, expected, **CLOSE)


def test_inputs_that_members_share_and_transposed_weights():
    inputs, weight, bias = operands()
    shared = inputs[:1].expand(2, -1, -1)
    turned = weight.mT.contiguous().mT
    assert shared.stride(0) == 0
    assert not turned.is_contiguous()

    torch.testing.assert_close(stacked_linear(shared, turned, bias), reference(shared, weight, bias), **CLOSE)


def test_second_derivatives():
    def penalty(function) -> Tensor:
        inputs, weight, bias = operands()
        inputs.requires_grad_()
        weight.requires_grad_()
        (slope,) = torch.autograd.grad(function(inputs, weight, bias).tanh().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        return weight.grad

    torch.testing.assert_close(penalty(stacked_linear), penalty(reference), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, 0, 2), (0, 0, 0)])
def test_vmap(in_dims):
    parts = []
    for part, dim in zip(operands(), in_dims, strict=True):
        parts.append(part if dim is None else torch.stack([part, 2 * part, -part], dim=dim))

    ours = torch.func.vmap(stacked_linear, in_dims)(*parts)
    torch.testing.assert_close(ours, torch.func.vmap(reference, in_dims)(*parts), **CLOSE)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_forward_derivatives(argument):
    parts, tangent = operands(), operands()[argument]

    def along(function) -> Tensor:
        def moved(part: Tensor) -> Tensor:
            return function(*parts[:argument], part, *parts[argument + 1 :])

        return torch.func.jvp(moved, (parts[argument],), (tangent,))[1]

    torch.testing.assert_close(along(stacked_linear), along(reference), **CLOSE)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_transforms_of_a_network_are_those_without_onednn(monkeypatch, transform):
    network = StackedMLP(1, 4, (SIDE, SIDE), 2, 1, "silu", False, torch.Generator().manual_seed(0))
    inputs = torch.randn(1, SIDE, 4, generator=torch.Generator().manual_seed(1))

    def summed(shift: Tensor) -> Tensor:
        return network(inputs + shift).square().sum()

    ours = transform(summed)(torch.zeros(4))
    monkeypatch.setattr(dynamics_model, "USES_ONEDNN", False)
    torch.testing.assert_close(ours, transform(summed)(torch.zeros(4)), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux says so in a file")
def test_the_maker_of_the_processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}

    assert dynamics_model.processor_says("AMD") == (makers == {"AuthenticAMD"})
