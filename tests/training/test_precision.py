"""precision: when matrix products round their operands, and what that changes."""

from pathlib import Path

import pytest
import torch

from config import LearnConfig
from training import precision
from training.precision import can_round, processor_says, product_precision, reduced_epochs

NEEDS_PRECISIONS = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch rounds no products on CPUs"
)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux says so in a file")
def test_the_maker_of_the_processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}

    assert processor_says("AMD") == (makers == {"AuthenticAMD"})


@pytest.fixture
def processor(monkeypatch):
    """Returns a function that has the processor say that it knows some instructions, and nothing else."""
    return lambda *words: monkeypatch.setattr(precision, "processor_says", lambda word: word in words)


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
    monkeypatch.setattr(precision, "_CPU_PRECISION", None)
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
