"""The published way to train an ensemble: a Python loop over members, each its own ``nn.Linear`` layers and Adam.

It stands against the product's stacked training with the same mathematics: losses as in ``deterministic_model.py`` and
``probabilistic_model.py`` (without beta-NLL), the same normalisation, the same weights where they are copied.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from config import LearnConfig
from dynamics_model import DynamicsNetwork, NormalisedRows

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU}


class PlainMember(nn.Module):
    """One network of ``nn.Linear`` layers, normalised units."""

    heads: ClassVar[int]

    def __init__(self, in_dim: int, out_dim: int, config: LearnConfig) -> None:
        super().__init__()
        widths = [in_dim, *config.hidden_size]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[config.activation_fn]()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], self.heads * out_dim))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts mean and log-variance (or None) of the change, both ``(batch, out_dim)``."""
        raise NotImplementedError

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns what training minimises, a scalar."""
        raise NotImplementedError

    @torch.no_grad()
    def copy_weights(self, network: DynamicsNetwork, member: int) -> None:
        """Takes a member's weights from the product's stack."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer, weight, bias in zip(linear, network.dynamics.weights, network.dynamics.biases, strict=True):
            layer.weight.copy_(weight[member].T)
            layer.bias.copy_(bias[member, 0])


class PlainDeterministic(PlainMember):
    """A point prediction, trained on squared error."""

    heads: ClassVar[int] = 1

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        """Predicts the mean."""
        return self.layers(inputs), None

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return functional.mse_loss(self.layers(inputs), targets)


class PlainProbabilistic(PlainMember):
    """A Gaussian prediction, trained on its negative log-likelihood with learned bounds (PETS)."""

    heads: ClassVar[int] = 2

    def __init__(self, in_dim: int, out_dim: int, config: LearnConfig) -> None:
        super().__init__(in_dim, out_dim, config)
        self.max_logvar = nn.Parameter(torch.full((1, out_dim), 0.5))
        self.min_logvar = nn.Parameter(torch.full((1, out_dim), -10.0))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts mean and log-variance."""
        mean, log_variance = self.layers(inputs).chunk(2, dim=-1)
        log_variance = self.max_logvar - functional.softplus(self.max_logvar - log_variance)
        return mean, self.min_logvar + functional.softplus(log_variance - self.min_logvar)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood, and what draws the bounds together."""
        mean, log_variance = self(inputs)
        likelihood = ((mean - targets).square() * (-log_variance).exp() + log_variance).mean()
        return likelihood + 0.01 * (self.max_logvar.sum() - self.min_logvar.sum())

    def copy_weights(self, network: DynamicsNetwork, member: int) -> None:
        """Takes a member's weights and bounds."""
        super().copy_weights(network, member)
        with torch.no_grad():
            self.max_logvar.copy_(network.max_logvar[member])
            self.min_logvar.copy_(network.min_logvar[member])


def plain_member(config: LearnConfig, network: DynamicsNetwork, member: int = 0) -> PlainMember:
    """Returns a member of the product's stack as a plain network of its own."""
    kind = PlainProbabilistic if config.probabilistic else PlainDeterministic
    plain = kind(len(network.input_shift), network.learned_dim, config)
    plain.copy_weights(network, member)
    return plain


def train_steps(
    member: PlainMember, optimizer: torch.optim.Optimizer, rows: NormalisedRows, order: Tensor, batch_size: int
) -> None:
    """Takes a gradient step for each batch of ``order``, ``(rows,)`` row indices, the last one with what is left."""
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        loss = member.loss(rows.inputs[batch], rows.targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def forward_products(sizes: tuple[int, ...]) -> int:
    """Returns the multiply-adds of one row through layers of these sizes, input first."""
    return sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(sizes))


def training_flops(sizes: tuple[int, ...]) -> int:
    """Returns the matrix-multiply FLOPs that a row costs in training: forward, and backward to weights and inputs.

    The first layer needs no gradient of its inputs.
    """
    return 6 * forward_products(sizes) - 2 * sizes[0] * sizes[1]
