"""How this machine multiplies matrices fastest: by which library, with which members per thread, with which precision.

What is learned depends on these choices only through rounding errors. They concern training alone: models and planners
work without this module.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import Linear, stacked_linear

# oneDNN multiplies one member's matrices at a time. That pays only where no side of a matrix is shorter than this.
_ONEDNN_SIDE = 160
_CPU_PRECISION = getattr(torch.backends.mkldnn, "matmul", None)  # its precision can be set from PyTorch 2.9 on


@dataclass(frozen=True)
class Multiplication:
    """How training multiplies.

    Attributes:
        linear: Multiplies inputs and weights of the members that take a step together.
        members_apart_from: From this size of a member's forward pass on, in multiply-adds, each thread trains members
            of its own. Smaller members take every step together: Python runs one thread at a time, and for them its
            calls of PyTorch take longer than the products.
    """

    linear: Linear
    members_apart_from: float


def processor_says(word: str) -> bool:
    """Whether the system's description of the processor has a word in it, such as a maker or an instruction set."""
    cpuinfo = Path("/proc/cpuinfo")
    return word in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's operator for linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def choose_multiplication() -> Multiplication:
    """Chooses oneDNN on AMD's processors, where PyTorch's own products (MKL) take twice the time, else PyTorch's."""
    if has_onednn() and processor_says("AMD"):
        return Multiplication(onednn_linear, members_apart_from=2e7)
    return Multiplication(stacked_linear, members_apart_from=8e7)


# --- oneDNN ---


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns what ``stacked_linear`` does, using oneDNN for large products on CPUs; differentiable once."""
    if (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and min(*inputs.shape[1:], weight.shape[2]) >= _ONEDNN_SIDE
    ):
        return _OneDnnLinear.apply(inputs, weight, bias)
    return stacked_linear(inputs, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    """The operator that ``torch.compile`` emits for linear layers on CPUs, member by member, with its derivatives."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        biases = [None] * len(weight) if bias is None else [own[0] for own in bias]
        products = [
            torch.ops.mkldnn._linear_pointwise.default(rows, matrix.mT, own, "none", [], "")
            for rows, matrix, own in zip(inputs, weight, biases, strict=True)
        ]
        return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            onednn_linear(gradient, weight.mT) if needs_inputs else None,
            onednn_linear(inputs.mT, gradient) if needs_weight else None,
            gradient.sum(dim=1, keepdim=True) if needs_bias else None,
        )


# --- Rounded operands ---


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
