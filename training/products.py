"""Ways to multiply matrices in training: by which library, with which members per thread, with how many threads.

What is learned depends on the way only through rounding errors, so any may be taken; the same way gives the same bits
on the same processor. Which one is fastest depends on the processor and on what else it does: ``fastest_products.py``
tries them. Models and planners work without this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from dynamics_model import Linear, stacked_linear

# oneDNN multiplies one member's matrices at a time. That pays only where no side of a matrix is shorter than this.
_ONEDNN_SIDE = 160


@dataclass(frozen=True)
class Products:
    """A way to multiply matrices.

    Attributes:
        library: A key of ``LINEAR``.
        grouping: ``together``: all members take each step together, and threads share every product. ``apart``: each
            thread trains members of its own. Python runs one thread at a time, so for small networks its calls of
            PyTorch take longer apart; for large ones threads that share products wait for one another, and all the more
            where another process keeps one of them from running.
        threads: How many threads multiply.
    """

    library: str
    grouping: str
    threads: int

    @classmethod
    def parse(cls, text: str) -> Products:
        """Reads what ``str`` wrote, such as ``torch/apart/2``; the setting ``products`` has been checked to be that."""
        library, grouping, threads = text.split("/")
        return cls(library, grouping, int(threads))

    def __str__(self) -> str:
        return f"{self.library}/{self.grouping}/{self.threads}"

    @property
    def linear(self) -> Linear:
        """The function that multiplies."""
        return LINEAR[self.library]

    def members_per_group(self, members: int) -> int:
        """How many of the members take steps together; threads take groups in turn where there are more of them."""
        return members if self.grouping == "together" else max(1, members // self.threads)

    @contextlib.contextmanager
    def in_effect(self) -> Iterator[None]:
        """Sets the threads that share a product: for members apart, and in OpenBLAS, each thread multiplies alone."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with threadpool_limits(1, user_api="blas") if self.library == "openblas" else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(before)


def default_products() -> Products:
    """Returns the way that needs no choice: PyTorch's own products, whose threads share each of them."""
    return Products("torch", "together", torch.get_num_threads())


def possible_products(members: int) -> list[Products]:
    """Lists the ways worth trying on this machine with as many threads as PyTorch has, the default one first."""
    threads = torch.get_num_threads()
    libraries = ["torch", *(["onednn"] if has_onednn() else []), *(["openblas"] if has_openblas() else [])]
    if threads == 1:
        return [Products(library, "together", 1) for library in libraries]
    ways = [default_products(), Products("torch", "together", 1)]
    return ways + [Products(library, "apart", min(threads, members)) for library in libraries if members > 1]


# --- Libraries beside PyTorch's own ---


def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's operator for linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_openblas() -> bool:
    """Whether NumPy multiplies with OpenBLAS."""
    return any(library["internal_api"] == "openblas" for library in threadpool_info())


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns what ``stacked_linear`` does, using oneDNN for large products on CPUs; differentiable once."""
    is_large = min(*inputs.shape[1:], weight.shape[2]) >= _ONEDNN_SIDE
    return _linear_by(_onednn_multiply, inputs, weight, bias) if is_large else stacked_linear(inputs, weight, bias)


def openblas_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns what ``stacked_linear`` does, using NumPy's OpenBLAS on CPUs; differentiable once."""
    return _linear_by(_openblas_multiply, inputs, weight, bias)


LINEAR: dict[str, Linear] = {"torch": stacked_linear, "onednn": onednn_linear, "openblas": openblas_linear}
"""The functions that multiply, by the name of the library that they use."""


def _linear_by(multiply: Callable[..., Tensor], inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if inputs.device.type == "cpu" and inputs.dtype == weight.dtype == torch.float32:
        return _LibraryLinear.apply(multiply, inputs, weight, bias)
    return stacked_linear(inputs, weight, bias)


def _onednn_multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies member by member with the operator that ``torch.compile`` emits for linear layers on CPUs."""
    biases = [None] * len(weight) if bias is None else [own[0] for own in bias]
    products = [
        torch.ops.mkldnn._linear_pointwise.default(rows, matrix.mT, own, "none", [], "")
        for rows, matrix, own in zip(inputs, weight, biases, strict=True)
    ]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def _openblas_multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = torch.from_numpy(np.matmul(inputs.detach().numpy(), weight.detach().numpy()))
    return product if bias is None else product.add_(bias.detach())


class _LibraryLinear(torch.autograd.Function):
    """``inputs @ weight + bias`` and its derivatives, multiplied by a given function."""

    @staticmethod
    def forward(
        ctx: Any, multiply: Callable[..., Tensor], inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.multiply = multiply
        ctx.save_for_backward(inputs, weight)
        return multiply(inputs, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        _, needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            None,
            ctx.multiply(gradient, weight.mT, None) if needs_inputs else None,
            ctx.multiply(inputs.mT, gradient, None) if needs_weight else None,
            gradient.sum(dim=1, keepdim=True) if needs_bias else None,
        )
