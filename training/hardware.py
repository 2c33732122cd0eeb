"""What the machine multiplies fastest with: rounded operands where the processor has instructions for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from config import LearnConfig
from dynamics_model import processor_says

_CPU_PRODUCTS = getattr(torch.backends.mkldnn, "matmul", None)
# Intel's AMX multiplies bfloat16 many times as fast as float32; AVX-512's instructions for it gain nothing here.
MULTIPLIES_BFLOAT16 = _CPU_PRODUCTS is not None and processor_says("amx_bf16")


def reduced_epochs(config: LearnConfig, is_cuda: bool) -> int:
    """Returns for how many epochs, from the first, matrix products round their operands on this machine."""
    can_round = MULTIPLIES_BFLOAT16
    if is_cuda:  # TF32 came with Ampere, and the setting with PyTorch 2.9
        has_setting = hasattr(torch.backends.cuda.matmul, "fp32_precision")
        can_round = has_setting and torch.cuda.get_device_capability() >= (8, 0)
    return round(config.reduced_precision * config.fit_epochs) if can_round else 0


@contextlib.contextmanager
def product_precision(config: LearnConfig, epoch: int, is_cuda: bool) -> Iterator[None]:
    """Lets matrix products of an epoch round their operands, where ``config.reduced_precision`` says so.

    Sums, weights, moments and everything but products stay in float32. Rounding adds noise (bfloat16: some 0.2 % of a
    product), which hides behind that of minibatches until training is about to end: the smallest errors, on which the
    likelihood of confident predictions depends, are learned in full precision. Mixed precision is Micikevicius et al.
    2018, with bfloat16 Kalamkar et al. 2019; that training ends without it is ours.

    Args:
        config: Settings.
        epoch: Which one, from 0.
        is_cuda: Whether training is on a GPU.
    """
    backend, rounded = (torch.backends.cuda.matmul, "tf32") if is_cuda else (_CPU_PRODUCTS, "bf16")
    if not hasattr(backend, "fp32_precision"):  # before PyTorch 2.9
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = rounded if epoch < reduced_epochs(config, is_cuda) else "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
