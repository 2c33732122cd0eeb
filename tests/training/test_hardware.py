"""hardware: oneDNN's products and their derivatives, who is asked to multiply, and when operands are rounded."""

from pathlib import Path

import pytest
import torch

from config import LearnConfig
from dynamics_model import stacked_linear
from training import hardware
from training.hardware import (
    can_round,
    choose_multiplication,
    has_onednn,
    onednn_linear,
    processor_says,
    product_precision,
    reduced_epochs,
)

SIDE = hardware._ONEDNN_SIDE
NEEDS_ONEDNN = pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN linear layer")
NEEDS_PRECISIONS = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch rounds no products on CPUs"
)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

# --- oneDNN ---


def operands(ensemble=2):
    """Inputs, weight and bias that oneDNN multiplies, all sides different."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ensemble, SIDE, SIDE + 8), (ensemble, SIDE + 8, SIDE + 16), (ensemble, 1, SIDE + 16)
    return tuple(torch.randn(shape, generator=generator) / 10 for shape in shapes)


@NEEDS_ONEDNN
@pytest.mark.parametrize("ensemble", [1, 3])
def test_large_products_are_onednn_s_and_right(ensemble):
    inputs, weight, bias = operands(ensemble)
    out = onednn_linear(inputs, weight.requires_grad_(), bias)

    assert "OneDnn" in out.grad_fn.name()
    expected = stacked_linear(*(part.detach().double() for part in (inputs, weight, bias)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(onednn_linear(inputs, weight), torch.bmm(inputs, weight), **CLOSE)


@pytest.mark.parametrize("change", ["few rows", "few inputs", "few outputs", "float64", "meta"])
def test_other_products_are_pytorch_s_own(change):
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
    out = onednn_linear(inputs, weight.requires_grad_(), bias)

    assert "OneDnn" not in out.grad_fn.name()
    expected = stacked_linear(inputs, weight, bias)
    assert out.shape == expected.shape and (change == "meta" or torch.equal(out, expected))


@NEEDS_ONEDNN
@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_of_those_who_need_them(needed):
    cotangent = torch.randn(2, SIDE, SIDE + 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (onednn_linear, stacked_linear):
        parts = [part.requires_grad_(need) for part, need in zip(operands(), needed, strict=True)]
        function(*parts).backward(cotangent)
        gradients.append([part.grad for part in parts])

    for ours, expected, need in zip(*gradients, needed, strict=True):
        assert (ours is not None) == need
        if need:
            torch.testing.assert_close(ours, expected, **CLOSE)


@NEEDS_ONEDNN
def test_gradients_without_a_bias():
    weights = []
    for function in (onednn_linear, stacked_linear):
        inputs, weight, _ = operands()
        function(inputs, weight.requires_grad_()).square().sum().backward()
        weights.append(weight.grad)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-3)


@NEEDS_ONEDNN
def test_inputs_that_members_share_and_transposed_weights():
    inputs, weight, bias = operands()
    shared = inputs[:1].expand(2, -1, -1)
    turned = weight.mT.contiguous().mT
    assert shared.stride(0) == 0
    assert not turned.is_contiguous()

    torch.testing.assert_close(onednn_linear(shared, turned, bias), stacked_linear(shared, weight, bias), **CLOSE)


@NEEDS_ONEDNN
def test_second_derivatives_are_refused_rather_than_wrong():
    inputs, weight, bias = operands()
    inputs.requires_grad_()
    (slope,) = torch.autograd.grad(onednn_linear(inputs, weight, bias).tanh().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


# --- The processor ---


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux says so in a file")
def test_the_maker_of_the_processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}

    assert processor_says("AMD") == (makers == {"AuthenticAMD"})


@NEEDS_ONEDNN
@pytest.mark.parametrize(("maker", "linear"), [("AMD", onednn_linear), ("Intel", stacked_linear)])
def test_onednn_multiplies_on_the_processors_of_amd(maker, linear, monkeypatch):
    monkeypatch.setattr(hardware, "processor_says", lambda word: word == maker)
    assert choose_multiplication().linear is linear


def test_a_pytorch_without_onednn_multiplies_itself(monkeypatch):
    monkeypatch.setattr(hardware, "processor_says", lambda word: True)
    monkeypatch.setattr(hardware, "has_onednn", lambda: False)
    assert choose_multiplication().linear is stacked_linear


# --- Rounded operands ---


@pytest.fixture
def processor(monkeypatch):
    """Returns a function that has the processor say that it knows some instructions, and nothing else."""
    return lambda *words: monkeypatch.setattr(hardware, "processor_says", lambda word: word in words)


@pytest.mark.parametrize(("share", "epochs"), [(0, 0), (0.4, 2), (0.8, 4), (1, 5)])
@NEEDS_PRECISIONS
def test_products_round_in_the_first_share_of_the_epochs(share, epochs, processor):
    processor("amx_bf16")
    assert reduced_epochs(LearnConfig(fit_epochs=5, reduced_precision=share), is_cuda=False) == epochs


def test_products_round_only_where_the_processor_has_instructions_for_it(processor, monkeypatch):
    config = LearnConfig(fit_epochs=2, reduced_precision=1)
    processor("avx512_bf16")
    assert not can_round(is_cuda=False)
    assert reduced_epochs(config, is_cuda=False) == 0

    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        for capability, expected in (((7, 5), 0), ((8, 0), 2), ((12, 0), 2)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            assert reduced_epochs(config, is_cuda=True) == expected


@NEEDS_PRECISIONS
@pytest.mark.parametrize("is_cuda", [False, True], ids=["cpu", "cuda"])
def test_products_round_inside_the_block_alone(is_cuda):
    backend, rounded = (torch.backends.cuda.matmul, "tf32") if is_cuda else (torch.backends.mkldnn.matmul, "bf16")
    before = backend.fp32_precision
    for is_rounded, inside in ((True, rounded), (False, "ieee")):
        with product_precision(is_rounded, is_cuda):
            assert backend.fp32_precision == inside
        assert backend.fp32_precision == before


@NEEDS_PRECISIONS
@pytest.mark.parametrize(("before", "is_rounded"), [("highest", True), ("medium", False)])
def test_precision_is_as_before_when_an_epoch_fails(before, is_rounded):
    torch.set_float32_matmul_precision(before)
    outside = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with pytest.raises(KeyboardInterrupt), product_precision(is_rounded, is_cuda=False):
            assert torch.backends.mkldnn.matmul.fp32_precision != outside
            raise KeyboardInterrupt
        assert torch.backends.mkldnn.matmul.fp32_precision == outside
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_pytorch_without_the_setting_trains_in_its_own_precision(processor, monkeypatch):
    processor("amx_bf16")
    monkeypatch.setattr(hardware, "_CPU_PRECISION", None)
    before = torch.get_float32_matmul_precision()

    assert reduced_epochs(LearnConfig(reduced_precision=1), is_cuda=False) == 0
    for is_rounded in (True, False):
        with product_precision(is_rounded, is_cuda=False):
            assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not can_round(is_cuda=False), reason="this processor has no instructions for bfloat16")
def test_rounded_products_are_near_but_not_equal():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 64, 64, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    with product_precision(is_rounded=True, is_cuda=False):
        rounded = left @ right

    error = (rounded - exact).std() / exact.std()
    assert 1e-4 < error < 1e-2
    torch.testing.assert_close((left @ right).double(), exact, rtol=1e-4, atol=1e-4)
