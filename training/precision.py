"""Matrix products that round their operands, on processors and GPUs that have instructions for them."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from config import LearnConfig

_CPU_PRECISION = getattr(torch.backends.mkldnn, "matmul", None)  # its precision can be set from PyTorch 2.9 on


def processor_says(word: str) -> bool:
    """Whether the system's description of the processor has a word in it, such as an instruction set."""
    cpuinfo = Path("/proc/cpuinfo")
    return word in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


def can_round(is_cuda: bool) -> bool:
    """Whether products of rounded operands are faster here: bfloat16 with Intel's AMX, TF32 on GPUs from Ampere on.

    AVX-512's instructions for bfloat16 gain nothing. PyTorch can be told to round from version 2.9 on.
    """
    if is_cuda:
        return hasattr(torch.backends.cuda.matmul, "fp32_precision") and torch.cuda.get_device_capability() >= (8, 0)
    return _CPU_PRECISION is not None and processor_says("amx_bf16")


def reduced_epochs(config: LearnConfig, is_cuda: bool) -> int:
    """Returns how many epochs, counted from the first, train with rounded operands on this machine."""
    return round(config.reduced_precision * config.fit_epochs) if can_round(is_cuda) else 0


@contextlib.contextmanager
def product_precision(is_rounded: bool, is_cuda: bool) -> Iterator[None]:
    """Sets whether matrix products inside the block round their operands; sums stay in float32.

    Rounding adds noise (for bfloat16, some 0.2 % of a product) that is small beside the noise of minibatches until the
    end of training is near. The likelihood of confident predictions depends on the smallest errors, which take full
    precision to learn. Mixed precision is from Micikevicius et al. 2018, its use of bfloat16 from Kalamkar et al. 2019;
    to end training without it is ours.
    """
    backend, rounded = (torch.backends.cuda.matmul, "tf32") if is_cuda else (_CPU_PRECISION, "bf16")
    if not hasattr(backend, "fp32_precision"):  # before PyTorch 2.9
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = rounded if is_rounded else "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
